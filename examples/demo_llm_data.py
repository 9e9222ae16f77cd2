"""The language model's demonstration: what does this function of Python do, in one sentence?

Questions and answers are the signatures and docstrings that a Python installation carries, so that
nothing is downloaded. ``python examples/demo_llm_data.py FOLDER`` writes ``train.jsonl`` and
``validation.jsonl``, rows of messages.
"""

import ast
import json
import random
import re
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

_SENTENCE = re.compile(r"[A-Z][^.`<>|\\]{15,110}\.")


def main(folder: str | Path, num_train: int = 320, num_validation: int = 48) -> None:
    """Write both splits to a folder; no function and no answer is in both.

    The same Python and the same counts give the same rows.
    """
    # One question for each answer: what many functions say of themselves is asked once.
    found = {answer.casefold(): (question, answer) for question, answer in _documented()}
    rows = sorted(found.values())
    if num_train + num_validation > len(rows):
        raise SystemExit(f"this Python documents {len(rows)} functions: ask for fewer")
    random.Random(0).shuffle(rows)
    splits = {"train": rows[:num_train], "validation": rows[num_train:][:num_validation]}
    Path(folder).mkdir(parents=True, exist_ok=True)
    for split, chosen in splits.items():
        lines = [json.dumps({"messages": _messages(*row)}) + "\n" for row in chosen]
        (Path(folder) / f"{split}.jsonl").write_text("".join(lines), "utf-8")


def _messages(question: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _documented() -> Iterator[tuple[str, str]]:
    """Yield question and answer of the functions of the standard library; none is imported."""
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        with warnings.catch_warnings():
            # Old modules hold invalid escapes; that is no fault of the caller.
            warnings.simplefilter("ignore")
            tree = ast.parse(path.read_bytes())
        for node in tree.body:
            if getattr(node, "name", "_").startswith("_"):
                continue
            for part in (node, *(node.body if isinstance(node, ast.ClassDef) else ())):
                if not isinstance(part, ast.FunctionDef) or part.name.startswith("_"):
                    continue
                sentence = _SENTENCE.match(" ".join((ast.get_docstring(part) or "").split()))
                if sentence is not None and sentence[0].isascii():
                    of = f"{node.name}." if isinstance(node, ast.ClassDef) else ""
                    names = [a.arg for a in part.args.args if a.arg != "self"]
                    call = f"{path.stem}.{of}{part.name}({', '.join(names)})"
                    yield f"What does Python's {call} do?", sentence[0]


if __name__ == "__main__":
    main(sys.argv[1])
