"""The versions that pyproject.toml promises are those that the tests run on."""

import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[2]
# What a machine without a GPU cannot use, and what works on the project, not in it.
UNTESTED = {"gpu", "demo", "demo-llm", "dev", "docs"}


def promised() -> dict[str, Requirement]:
    """Return what users install, by name: the dependencies and the tested extras."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    lines = [*project["dependencies"]]
    for extra, needed in project["optional-dependencies"].items():
        lines += [] if extra in UNTESTED else needed
    found = (Requirement(line) for line in lines)
    return {canonicalize_name(r.name): r for r in found if r.name != project["name"]}


def pins(name: str) -> dict[str, str]:
    lines = (ROOT / "requirements" / name).read_text("utf-8").splitlines()
    pairs = (line.split("==") for line in lines if line and not line.startswith("#"))
    return {canonicalize_name(key): value for key, value in pairs}


def test_lower_bounds_are_the_versions_of_the_oldest_environment() -> None:
    bounds = {
        name: Version(bound.version)
        for name, requirement in promised().items()
        for bound in requirement.specifier
        if bound.operator == ">="
    }
    assert bounds.keys() == promised().keys(), "each needs a lower bound"
    oldest = {name: Version(version) for name, version in pins("oldest.txt").items()}
    assert bounds == oldest


def test_pinned_versions_are_within_the_bounds() -> None:
    newest = pins("constraints.txt")
    for name, requirement in promised().items():
        assert name in newest, f"requirements/constraints.txt must pin {name}"
        assert newest[name] in requirement.specifier, f"{requirement}, pinned {newest[name]}"
