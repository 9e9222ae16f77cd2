"""The hostile harness tells refused, works, silent and traceback apart."""

import os
import signal
from pathlib import Path

import pytest

import leantune as lt
from bench.hostile.case import Cases, command, in_child, try_case, untouched


def outcome(expected: str, run: object) -> str:
    cases = Cases("none")
    cases.add("one", expected, "", run)  # type: ignore[arg-type]
    return try_case(cases.found["one"])["outcome"]


def refuse(folder: Path) -> None:
    raise lt.ConfigError("who: field must be rule, got value; way out")


def touch_and_refuse(folder: Path) -> None:
    with untouched(folder):
        (folder / "file").write_text("")
        refuse(folder)


@pytest.mark.parametrize(
    ("expected", "run", "found"),
    [
        ("refused", refuse, "refused"),
        ("refused", lambda folder: None, "silent"),
        ("refused", touch_and_refuse, "silent"),
        ("refused", lambda folder: {}["key"], "traceback"),
        ("refused", lambda folder: command("methods", "wta_csr"), "refused"),
        ("works", lambda folder: command("methods"), "works"),
        ("works", refuse, "silent"),
    ],
)
def test_outcomes(expected: str, run: object, found: str) -> None:
    assert outcome(expected, run) == found


def test_a_child_says_how_it_ended() -> None:
    assert in_child(lambda: os.kill(os.getpid(), signal.SIGKILL)) == (-signal.SIGKILL, None)
    assert in_child(lambda: 3) == (0, 3)
    ended, error = in_child(lambda: {}["key"])
    assert ended == 0 and isinstance(error, KeyError)
