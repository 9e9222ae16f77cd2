"""What the documentation shows runs as it stands: the method that it adds, and the commands."""

import re
import shlex
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from integration.test_cli import invoke
from integration.tiny import write_sentences
from torch import nn

import leantune as lt
from bench import readme
from leantune.core import registry

DOCS = Path(__file__).parents[2] / "docs"


def code(title: str) -> str:
    """Return the code block of that title in the page on adding a method."""
    text = (DOCS / "add-a-method.md").read_text("utf-8")
    found = re.search(rf'```python title="{re.escape(title)}"\n(.*?)```', text, re.DOTALL)
    assert found, title
    return found[1]


@pytest.fixture
def method(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Run the page's module; what it registers is taken back, so that no other test meets it."""
    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))
    module = types.ModuleType("uniform_rows_of_the_docs")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(compile(code("methods/uniform_rows.py"), "add-a-method.md", "exec"), vars(module))
    yield module


def test_the_example_method_is_unbiased(method: Any) -> None:
    names = {"nn": nn, "torch": torch, "lt": lt, "UniformRows": method.UniformRows}
    exec(code("tests/methods/test_uniform_rows.py"), names)
    names["test_the_weight_gradient_is_unbiased"]()


def test_its_control_fails(method: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that count once each, whatever the budget, are biased, and the page's test sees it."""
    honest = method.EvenRows.keep

    def forgetful(self: Any, *args: Any) -> Any:
        kept, note = honest(self, *args)
        return kept._replace(weights=torch.ones_like(kept.weights)), note

    monkeypatch.setattr(method.EvenRows, "keep", forgetful)
    with pytest.raises(AssertionError):
        test_the_example_method_is_unbiased(method)


def test_it_saves_what_it_predicts_and_comes_off_again(method: Any) -> None:
    model = nn.Sequential(nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 1))
    plain = list(model)
    x = torch.randn(40, 16)
    session = lt.apply(model, method.UniformRows(keep_ratio=0.25), seed=3)
    for layer, shape in ((model[0], (40, 16)), (model[2], (40, 8))):
        predicted = layer.rows.nbytes(torch.Size(shape), torch.float32)
        name = "0" if layer is model[0] else "2"
        assert lt.ledger(model, (x,)).saved_bytes(name) == predicted
    session.remove()
    assert list(model) == plain


def test_the_commands_around_training_run_as_shown(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("leantune.training.models.demo_model_path", lambda: model_folder)
    monkeypatch.chdir(tmp_path)
    write_sentences(tmp_path / "data", lambda good: "good" if good else "bad")
    (tmp_path / "rows.jsonl").write_text('{"sentence1": "good w1"}\n')
    page = (DOCS / "around-training.md").read_text("utf-8")
    blocks = re.findall(r"```sh\n(.*?)```", page, re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines()]
    for line in lines:
        program, *arguments = shlex.split(line)
        # The model reads no more tokens.
        short = ["max_length=16"] if arguments[0] == "train" else []
        done = invoke(*arguments, *short)
        assert program == "leantune" and done.exit_code == 0, (line, done.stderr)
    assert {line.split()[1] for line in lines} == {
        "init",
        "train",
        "evaluate",
        "predict",
        "compare",
    }
    assert len((tmp_path / "predicted.jsonl").read_text().splitlines()) == 1


@pytest.mark.parametrize("page", sorted(DOCS.rglob("*.md")), ids=lambda p: p.stem)
def test_python_on_the_pages_compiles(page: Path) -> None:
    for block in re.findall(r"```python[^\n]*\n(.*?)```", page.read_text("utf-8"), re.DOTALL):
        compile(block, str(page), "exec")


MEASURED = [name for name in readme.TABLES if not name.startswith("sites-")]


@pytest.mark.parametrize("name", MEASURED)
def test_the_tables_are_those_of_the_committed_rows(name: str) -> None:
    """Where it fails, rows or their layout have changed: ``python -m bench readme``."""
    pages = [DOCS.parent / "README.md", *sorted(DOCS.rglob("*.md"))]
    block = re.compile(rf"<!-- {name} -->\n(.*?)\n?<!-- /{name} -->", re.DOTALL)
    shown = [text for page in pages for text in block.findall(page.read_text("utf-8"))]
    assert shown and set(shown) == {readme.TABLES[name]()}


@pytest.mark.parametrize("name", readme.SURVEYED)
def test_the_page_shows_what_the_command_prints(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it fails, discovery or a method's choice has changed: ``python -m bench readme``."""
    monkeypatch.setenv("COLUMNS", "80")
    shown = f"<!-- sites-{name} -->\n{readme.sites(name)}\n<!-- /sites-{name} -->"
    assert shown in (DOCS / "sites.md").read_text("utf-8")
