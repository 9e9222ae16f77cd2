"""Chats of the tiny vocabulary, and a tokenizer with a chat template."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from integration.tiny import llama, tokenizer
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


def run_options(folder: Path, make_rows: Callable[[int], list[Any]]) -> dict[str, Any]:
    """Write a tiny model and rows; return the options of eight steps, two batches in each."""
    llama().save_pretrained(folder / "model")
    chat_tokenizer().save_pretrained(folder / "model")
    (folder / "data").mkdir()
    for split, count in (("train", 32), ("validation", 10)):
        write_lines(folder / "data" / f"{split}.jsonl", make_rows(count))
    return {
        "model": str(folder / "model"),
        "task": "chat",
        "data": str(folder / "data"),
        "output": str(folder / "run"),
        "epochs": 2,
        "batch_size": 4,
        "gradient_accumulation_steps": 2,
        "max_length": 16,
        "learning_rate": 1e-2,
    }
