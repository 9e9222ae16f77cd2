"""Chats of the tiny vocabulary, and a tokenizer with a chat template."""

import json
import random
from pathlib import Path
from typing import Any

from integration.tiny import tokenizer
from transformers import PreTrainedTokenizerFast

_TEMPLATE = (
    "{% for m in messages %}{{ '[' ~ m.role ~ '] ' }}TURN{{ ' ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant] ' }}{% endif %}"
)
_TURN = "{{ m.content ~ ' [EOS]' }}"
PLAIN = _TEMPLATE.replace("TURN", _TURN)
MARKED = _TEMPLATE.replace(
    "TURN",
    "{% if m.role == 'assistant' %}{% generation %}"
    f"{_TURN}{{% endgeneration %}}{{% else %}}{_TURN}{{% endif %}}",
)


def chat_tokenizer(template: str | None = PLAIN) -> PreTrainedTokenizerFast:
    """Make the tiny tokenizer with a chat template: a token for each word, role and turn's end."""
    made = tokenizer()
    made.add_tokens([f"[{role}]" for role in ("system", "user", "assistant")])
    made.chat_template = template
    return made


def said(*contents: str) -> list[dict[str, str]]:
    """Make messages of a user and an assistant in turn."""
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(contents)]


def chats(count: int) -> list[dict[str, Any]]:
    """Make questions with one word that decides which of two answers is right."""
    draw = random.Random(3)
    rows = []
    for number in range(count):
        words = [f"w{draw.randrange(40)}" for _ in range(draw.randint(2, 8))]
        words.insert(1, "good" if number % 2 else "bad")
        rows.append({"messages": said(" ".join(words), "fine nice" if number % 2 else "sad")})
    return rows


def write_lines(path: Path, rows: list[Any]) -> Path:
    """Write JSON lines."""
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    return path
