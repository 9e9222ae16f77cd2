"""Ask chat models a question that they were not trained on, one after another.

``python examples/ask.py runs/demo-llm-data/validation.jsonl demo-llm runs/demo-llm/model`` asks the
file's first question of the model as it was and as it became.
"""

import json
import sys
from pathlib import Path
from typing import Any

from leantune.training.data import get_task
from leantune.training.models import load_model, load_tokenizer


def main(data: str | Path, *models: str, num_tokens: int = 40) -> list[str]:
    """Print each model's likeliest answer, cut at so many tokens, below the one of the file."""
    question, expected = json.loads(Path(data).read_text("utf-8").splitlines()[0])["messages"]
    print(question["content"], expected["content"], sep="\n  the file: ")
    answers: list[str] = []
    for name in models:
        tokenizer = load_tokenizer(name)
        model = load_model(name, get_task("chat"), None, tokenizer)
        how: dict[str, Any] = {"return_tensors": "pt", "return_dict": True}
        asked = tokenizer.apply_chat_template([question], add_generation_prompt=True, **how)
        said = model.generate(**asked, max_new_tokens=num_tokens, do_sample=False)[0]
        start = asked["input_ids"].shape[1]
        answers.append(tokenizer.decode(said[start:], skip_special_tokens=True).strip())
        print(f"  {name}: {answers[-1]}")
    return answers


if __name__ == "__main__":
    main(*sys.argv[1:])
