"""The demonstration's data: is this sentence intact, or have two of its words been swapped?

The sentences are those of the docstrings that a Python installation carries, so that nothing is
downloaded. ``python examples/demo_data.py FOLDER`` writes ``train.tsv`` and ``validation.tsv``.
"""

import ast
import random
import re
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

_WORD = re.compile(r"[A-Za-z]+(?:['-][A-Za-z]+)*")
_CODE = re.compile(r"[<>={}|\\@#$]|\.\.|--|::|\+-")
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z\"'(*])")


def main(folder: str | Path, num_train: int = 4000, num_validation: int = 1000) -> None:
    """Write both splits, balanced, to a folder.

    A sentence occurs once, in one form, in one split; no other sentence is made of the same words.
    The same Python and the same counts give the same rows.
    """
    sentences = list(distinct_sentences())
    if num_train + num_validation > len(sentences):
        raise SystemExit(f"this Python documents {len(sentences)} sentences: ask for fewer")
    generator = random.Random(0)
    generator.shuffle(sentences)
    splits = {"train": slice(num_train), "validation": slice(num_train, num_train + num_validation)}
    Path(folder).mkdir(parents=True, exist_ok=True)
    for split, rows in splits.items():
        lines = ["sentence1\tlabel", *_labelled(sentences[rows], generator)]
        (Path(folder) / f"{split}.tsv").write_text("\n".join(lines) + "\n", "utf-8")


@lru_cache(maxsize=1)
def distinct_sentences() -> tuple[str, ...]:
    """Return every usable sentence of this Python's docstrings, sorted; about 2 s, then kept.

    Usable are 6 to 30 words, most of them plain English, with a pair of neighbours to swap.
    Sentences made of the same words (case, order and punctuation ignored) count once.
    """
    found: dict[tuple[str, ...], str] = {}
    for text in _docstrings():
        for paragraph in re.split(r"\n\s*\n", text):
            for sentence in _SENTENCE_END.split(" ".join(paragraph.split()).lstrip("*-o ")):
                words = sentence.split(" ")
                is_whole = sentence[:1].isupper() and sentence.endswith(".") and sentence.isascii()
                if not is_whole or not 6 <= len(words) <= 30 or _CODE.search(sentence):
                    continue
                plain = sum(_WORD.fullmatch(word.rstrip(",.;:")) is not None for word in words)
                if plain >= 0.7 * len(words) and _swap_positions(words):
                    key = tuple(sorted(word.strip(",.;:()\"'").casefold() for word in words))
                    found.setdefault(key, sentence)
    return tuple(sorted(found.values()))


def _docstrings() -> Iterator[str]:
    """Yield the docstrings of the standard library's single-file modules; none is imported."""
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        with warnings.catch_warnings():
            # Old modules hold invalid escapes; that is no fault of the caller.
            warnings.simplefilter("ignore")
            nodes = ast.walk(ast.parse(path.read_bytes()))
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
        yield from (ast.get_docstring(node) or "" for node in nodes if isinstance(node, kinds))


def _swap_positions(words: list[str]) -> list[int]:
    """Return where two plain neighbours start whose swap only word order can reveal."""
    return [
        i
        for i, (a, b) in enumerate(pairwise(words[1:]), start=1)
        if _WORD.fullmatch(a) and _WORD.fullmatch(b) and a.casefold() != b.casefold()
    ]


def _labelled(sentences: list[str], generator: random.Random) -> Iterator[str]:
    """Yield rows with two words of every second sentence swapped, the labels in random order."""
    labels = [row % 2 for row in range(len(sentences))]
    generator.shuffle(labels)
    for sentence, is_intact in zip(sentences, labels, strict=True):
        words = sentence.split(" ")
        if not is_intact:
            i = generator.choice(_swap_positions(words))
            words[i], words[i + 1] = words[i + 1], words[i]
        yield f"{' '.join(words)}\t{'intact' if is_intact else 'swapped'}"


if __name__ == "__main__":
    main(sys.argv[1])
