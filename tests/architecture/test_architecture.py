"""The shape of the house: who imports whom, what an import costs, what a method costs."""

import ast
import importlib
import inspect
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

import leantune as lt
from leantune.core import registry

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "leantune"
FILES = sorted(SOURCE.rglob("*.py"))

# A part may import itself and the parts below it.
ORDER = (
    ("errors", "_version"),
    ("ops",),
    ("core",),
    ("measure",),
    ("integrations",),
    ("methods",),
    ("planner",),
    ("training",),
    ("report",),
    ("cli",),
)
LAYERS = {
    part: {p for row in ORDER[:i] for p in row} for i, row in enumerate(ORDER) for part in row
}
# Third-party packages that only some parts may import.
OUTSIDE = {
    "transformers": {"training", "integrations"},
    "datasets": {"training"},
    "trl": {"training"},
    "liger_kernel": {"integrations"},
    "peft": {"training", "integrations", "methods/lora.py"},
    "typer": {"cli"},
    "rich": {"cli", "report", "training"},
    "matplotlib": set(),
    "jinja2": {"report"},
}
# Below these, a package that is not torch or safetensors is imported inside a function.
LIGHT = ("errors", "_version", "ops", "core", "measure", "integrations", "methods", "planner")
PUBLIC = {
    "Checkpoint",
    "ConfigError",
    "LeantuneError",
    "Liger",
    "LoRA",
    "MeProp",
    "Plan",
    "RoutedFFN",
    "SPTAttention",
    "Session",
    "SiteError",
    "SparseGrad",
    "TrainerCallback",
    "UnsupportedError",
    "WriteError",
    "WTACRS",
    "__version__",
    "apply",
    "evaluate",
    "fidelity",
    "find_sites",
    "ledger",
    "list_methods",
    "load",
    "merge_checkpoint",
    "plan",
    "predict",
    "still_held",
    "train",
}
SESSION = {
    "auxiliary_loss",
    "calibrate",
    "can_merge",
    "exact",
    "load_state_dict",
    "merge",
    "on_step",
    "optimizer",
    "remove",
    "save",
    "seed",
    "state_dict",
    "step",
}
# What a method costs: (files, lines) of its own and of the operations that it alone uses.
PRIVATE_OPS = {
    "routed_ffn": ("ops/groups.py",),
    "spt_attention": ("ops/sparse_attention",),
}
PRICES = {
    "checkpoint": (4, 377),
    "lora": (1, 202),
    "meprop": (1, 160),
    "routed_ffn": (9, 1024),
    "sparse_grad": (6, 730),
    "spt_attention": (11, 1640),
    "wta_crs": (8, 1272),
}
NEW_METHOD = (5, 700)
MAX_LINES, MAX_FILE, MAX_FUNCTION, MAX_SESSION = 21_086, 400, 60, 250


def relative(path: Path) -> str:
    return path.relative_to(SOURCE).as_posix()


def part_of(path: Path) -> str:
    return relative(path).split("/")[0].removesuffix(".py")


def imports(path: Path) -> list[tuple[str, bool, bool]]:
    """List (module, whether inside a function, whether for type checkers only), nested included."""
    found = []

    def visit(node: ast.AST, late: bool, typing_only: bool) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                found.extend((alias.name, late, typing_only) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, f"{path}: relative import"
                assert child.module is not None
                names = [f"{child.module}.{alias.name}" for alias in child.names]
                # `from package import module` imports the module, too.
                is_module = [_is_module(n) for n in names]
                found.extend(
                    (n if m else child.module, late, typing_only)
                    for n, m in zip(names, is_module, strict=True)
                )
            elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                visit(child, late, True)
            else:
                inside = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
                visit(child, late or inside, typing_only)

    visit(ast.parse(path.read_text()), False, False)
    return found


def _is_module(name: str) -> bool:
    if not name.startswith("leantune."):
        return False
    path = SOURCE.joinpath(*name.split(".")[1:])
    return path.is_dir() or path.with_suffix(".py").is_file()


def test_the_parser_sees_nested_and_typing_imports(tmp_path: Path) -> None:
    """The control of everything below."""
    path = tmp_path / "a.py"
    path.write_text(
        "import os.path\n"
        "from leantune import errors\n"
        "if TYPE_CHECKING:\n    from leantune.core.session import Session\n"
        "class A:\n    def f(self):\n        if 1:\n            import leantune.cli.app as d\n"
    )
    assert imports(path) == [
        ("os.path", False, False),
        ("leantune.errors", False, False),
        ("leantune.core.session", False, True),
        ("leantune.cli.app", True, False),
    ]


@pytest.mark.parametrize("path", [f for f in FILES if part_of(f) != "__init__"], ids=relative)
def test_imports_point_downwards(path: Path) -> None:
    part = part_of(path)
    for module, _, _ in imports(path):
        if module.split(".")[0] != "leantune":
            continue
        target = module.split(".")[1] if "." in module else "__init__"
        if target == "__init__" and part in ("report", "cli"):
            continue  # those on top use the public face
        assert target == part or target in LAYERS[part], f"{relative(path)} imports {module}"


def module_of(path: Path) -> str:
    return ".".join(["leantune", *path.relative_to(SOURCE).with_suffix("").parts]).removesuffix(
        ".__init__"
    )


def find_circle(graph: dict[str, set[str]]) -> list[str]:
    """Return one circle of a directed graph, or nothing."""
    done: set[str] = set()

    def visit(node: str, way: list[str]) -> list[str]:
        if node in way:
            return [*way[way.index(node) :], node]
        if node in done:
            return []
        for other in sorted(graph.get(node, ())):
            circle = visit(other, [*way, node])
            if circle:
                return circle
        done.add(node)
        return []

    return next((c for c in (visit(node, []) for node in sorted(graph)) if c), [])


def test_no_module_imports_itself_by_way_of_others() -> None:
    """Annotations and imports inside functions count."""
    graph = {
        module_of(path): {m for m, _, _ in imports(path) if m.split(".")[0] == "leantune"}
        - {module_of(path)}
        for path in FILES
    }
    # The public face imports everything; only those on top may use it.
    assert not find_circle({name: to for name, to in graph.items() if name != "leantune"})
    # The control.
    assert find_circle({**graph, "leantune.errors": {"leantune.core.apply"}})
    assert find_circle({"a": {"b"}, "b": {"c"}, "c": {"a"}}) == ["a", "b", "c", "a"]


def test_methods_never_import_each_other() -> None:
    for path in FILES:
        if part_of(path) != "methods" or relative(path) == "methods/__init__.py":
            continue
        own = relative(path).split("/")[1].removesuffix(".py")
        for module, _, _ in imports(path):
            if module.startswith("leantune.methods"):
                assert module.split(".")[2:3] == [own], f"{relative(path)} imports {module}"


@pytest.mark.parametrize("package", OUTSIDE)
def test_third_party_packages_stay_in_their_place(package: str) -> None:
    for path in FILES:
        allowed = relative(path) in OUTSIDE[package] or part_of(path) in OUTSIDE[package]
        used = [late for name, late, _ in imports(path) if name.split(".")[0] == package]
        assert not used or allowed, f"{relative(path)} imports {package}"
        asked_for = ("integrations/trainer.py", "integrations/peft.py")
        if part_of(path) in LIGHT and relative(path) not in asked_for:
            assert all(used), f"{relative(path)} must import {package} inside a function"


def code_of(path: Path) -> str:
    """Return a file's code without its docstrings and comments."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            for statement in body:
                if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
                    statement.value.value = ""
    return ast.unparse(tree)


def test_one_file_asks_where_a_tensor_lies() -> None:
    asks = re.compile(
        r"\bis_cuda\b|\.type\s*[!=]=\s*'cuda'|'cuda'\s*[!=]=|\btriton\b|cuda\.is_available"
    )
    for path in FILES:
        if relative(path) != "ops/backend.py" and not path.stem.endswith("_triton"):
            # What the environment is, is the command line's and a run's to report.
            if part_of(path) in ("cli", "training", "report"):
                continue
            found = asks.search(code_of(path))
            assert found is None, f"{relative(path)}: {found and found[0]}"
    assert asks.search("if x.device.type == 'cuda': pass") and asks.search("x.is_cuda")


def test_one_file_knows_what_peft_calls_its_factors() -> None:
    for path in FILES:
        if relative(path) != "core/adapters.py":
            assert not re.search(r"lora_A|lora_B|lora_variant", code_of(path)), relative(path)
    assert "lora_A" in code_of(SOURCE / "core" / "adapters.py")


def functions(path: Path) -> list[tuple[str, int]]:
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, kinds)]
    return [(n.name, (n.end_lineno or 0) - n.lineno + 1) for n in nodes]


def test_source_keeps_to_its_sizes() -> None:
    lines = {relative(path): len(path.read_text().splitlines()) for path in FILES}
    assert sum(lines.values()) <= MAX_LINES
    assert lines["core/session.py"] <= MAX_SESSION
    assert not {name: n for name, n in lines.items() if n > MAX_FILE}
    long = {
        f"{relative(path)}:{name}": n
        for path in FILES
        for name, n in functions(path)
        if n > MAX_FUNCTION
    }
    assert not long


def test_import_is_lean() -> None:
    code = """
import sys
import torch
own = set(sys.modules)
import leantune
heavy = ["triton", "transformers", "peft", "datasets", "matplotlib", "typer", "rich", "pandas"]
print([name for name in heavy if name in sys.modules and name not in own])
print(torch.cuda.is_initialized())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:2] == ["[]", "False"]


def test_public_names_are_pinned() -> None:
    assert set(lt.__all__) == PUBLIC
    assert all(hasattr(lt, name) for name in PUBLIC)
    assert lt.__version__


def test_the_sessions_public_members_are_pinned() -> None:
    assert {name for name in vars(lt.Session) if not name.startswith("_")} == SESSION


def test_no_public_name_is_a_package_or_module_too() -> None:
    """`import leantune.x as x` gives the module, and `leantune.x` is nothing else."""
    inside = {info.name for info in pkgutil.iter_modules([str(SOURCE)])}
    assert {"core", "methods", "measure"} <= inside and not inside & set(lt.__all__)
    for package in ("leantune.measure", "leantune.methods", "leantune.core", "leantune.ops"):
        module = importlib.import_module(package)
        for info in pkgutil.iter_modules(module.__path__, prefix=f"{package}."):
            found = importlib.import_module(info.name)
            name = info.name.rpartition(".")[2]
            assert inspect.ismodule(found)
            assert getattr(module, name) is found, f"{info.name} is hidden by another {name}"


def test_methods_and_measure_are_packages() -> None:
    import leantune.measure.fidelity as fidelity
    import leantune.measure.ledger as ledger
    import leantune.methods as m

    assert inspect.ismodule(m) and m.WTACRS is lt.WTACRS
    assert inspect.ismodule(ledger) and ledger.ledger is lt.ledger
    assert inspect.ismodule(fidelity) and fidelity.fidelity is lt.fidelity


def public_objects() -> list[tuple[str, object]]:
    found: list[tuple[str, object]] = []
    for name in sorted(PUBLIC & set(lt.__all__) - {"__version__"}):
        thing = getattr(lt, name)
        found.append((name, thing))
        if inspect.isclass(thing):
            for member, value in vars(thing).items():
                is_callable = inspect.isfunction(value) or isinstance(value, property | classmethod)
                if not member.startswith("_") and is_callable:
                    found.append((f"{name}.{member}", value))
    return found


@pytest.mark.parametrize(
    ("name", "thing"), public_objects(), ids=lambda v: v if isinstance(v, str) else ""
)
def test_public_names_have_docstrings(name: str, thing: object) -> None:
    text = inspect.getdoc(thing)
    assert text, name
    # A dataclass without a docstring gets its signature for one.
    assert not text.startswith(f"{name}("), name


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_files_open_with_a_docstring_and_are_ascii(path: Path) -> None:
    text = path.read_text()
    assert text.isascii()
    assert not text or ast.get_docstring(ast.parse(text)), "say what the file is for"


def test_no_file_is_called_after_nothing() -> None:
    bad = re.compile(r"^(utils?|helpers?|common|misc)$")
    names = [p for p in [*FILES, *sorted((ROOT / "tests").rglob("*.py"))] if bad.match(p.stem)]
    assert not names


def method_files() -> dict[str, list[Path]]:
    folder = SOURCE / "methods"
    return {
        name: [folder / f"{name}.py"]
        if (folder / f"{name}.py").exists()
        else sorted((folder / name).rglob("*.py"))
        for name in registry.list_methods()
    }


def private_ops(method: str) -> list[Path]:
    paths = [SOURCE / name for name in PRIVATE_OPS.get(method, ())]
    return [f for p in paths for f in (sorted(p.rglob("*.py")) if p.is_dir() else [p])]


def test_every_method_has_a_file_or_folder_of_its_name() -> None:
    owned = {path for files in method_files().values() for path in files}
    assert all(method_files().values())
    extra = {p for p in FILES if part_of(p) == "methods"} - owned
    assert {relative(p) for p in extra} == {"methods/__init__.py"}


@pytest.mark.parametrize("method", registry.list_methods())
def test_methods_keep_to_their_price(method: str) -> None:
    """Code that one method alone uses counts, wherever it lies."""
    paths = [p for p in [*method_files()[method], *private_ops(method)] if p.read_text()]
    num_lines = sum(len(p.read_text().splitlines()) for p in paths)
    max_files, max_lines = PRICES.get(method, NEW_METHOD)
    assert len(paths) <= max_files and num_lines <= max_lines, (method, len(paths), num_lines)


def test_operations_have_two_users_or_are_in_a_price() -> None:
    """No method hides its size in a part that all share."""
    counted = {p for method in registry.list_methods() for p in private_ops(method)}
    users: dict[str, set[str]] = {}
    for path in FILES:
        for module, _, _ in imports(path):
            if module.startswith("leantune.ops."):
                name = relative(path)
                own = name.split("/")[1] if part_of(path) == "methods" else name
                users.setdefault(module, set()).add(own)
    for path in FILES:
        if path.stem.endswith("_triton"):
            continue  # a kernel's users are those of its reference
        if part_of(path) == "ops" and path not in counted and path.name != "__init__.py":
            assert len(users.get(module_of(path), ())) >= 2, relative(path)


def test_oracles_import_nothing_of_ours() -> None:
    files = sorted((ROOT / "tests" / "oracles").rglob("*.py"))
    assert files
    for path in files:
        assert not [n for n, _, _ in imports(path) if n.split(".")[0] in ("leantune", "torch")]


def test_each_registered_method_is_tested_by_name() -> None:
    names = [p.stem for p in (ROOT / "tests" / "methods").glob("test_*.py")]
    for method in registry.list_methods():
        assert any(stem.startswith(f"test_{method}") for stem in names), method
