"""The harness: a case is tried in an empty folder, and is refused by name or works."""

import fnmatch
import hashlib
import io
import multiprocessing
import re
import resource
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import chdir, contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from tqdm.std import TqdmDefaultWriteLock
from typer.testing import CliRunner

from bench import rows
from leantune.cli.app import app
from leantune.errors import LeantuneError

SECONDS_EACH = 90
MEMORY_EACH = 6 * 2**30
_LONGEST_SAID = 400
_PARENT = str(Path(__file__).parents[2])
# Forks share the lock of progress bars: one that is killed with it would stop all others for good.
TqdmDefaultWriteLock.mp_lock = None
_OTHER_FOLDER = re.compile(rf"{re.escape(tempfile.gettempdir())}/\w+/?")


class Refused(LeantuneError):
    """The command refused: an exit code, one named line, no traceback, no file touched."""


@dataclass(frozen=True)
class Case:
    """A case says what is tried, and tries it.

    Args:
        name: unique in its area.
        expected: ``refused`` (by a ``LeantuneError``), or ``works`` (its own assertions hold).
        tried: one line for the table.
        run: gets an empty folder, which is the working directory, too; what it returns is recorded
            as what was said.
    """

    area: str
    name: str
    expected: str
    tried: str
    run: Callable[[Path], Any]


@dataclass(frozen=True)
class Cases:
    """An area's cases, in order; ``refused`` and ``works`` decorate functions of a folder.

    Args:
        prepare: makes once what many of the cases copy, before the first of them.
    """

    area: str
    prepare: Callable[[], Any] = lambda: None
    found: dict[str, Case] = field(default_factory=dict)

    def add(self, name: str, expected: str, tried: str, run: Callable[[Path], Any]) -> None:
        """Add one case; a table of inputs adds many."""
        assert name not in self.found, f"{self.area} has two cases {name}"
        self.found[name] = Case(self.area, name, expected, tried, run)

    def refused(self, run: Callable[[Path], Any]) -> None:
        """Add a function that must end in a refusal; its docstring says what is tried."""
        self.add(run.__name__, "refused", (run.__doc__ or "").rstrip("."), run)

    def works(self, run: Callable[[Path], Any]) -> None:
        """Add a function that must end well; its docstring says what is tried."""
        self.add(run.__name__, "works", (run.__doc__ or "").rstrip("."), run)


@contextmanager
def untouched(folder: Path) -> Iterator[None]:
    """Check that the block, however it ends, adds, changes and removes nothing in ``folder``."""
    before = _contents(folder)
    try:
        yield
    finally:
        after = _contents(folder)
        changed = sorted(k for k in before | after if before.get(k) != after.get(k))
        assert not changed, f"it touched {', '.join(changed)}"


def _contents(folder: Path) -> dict[str, str]:
    def digest(path: Path) -> str:
        return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "no file"

    return {str(path.relative_to(folder)): digest(path) for path in folder.rglob("*")}


@contextmanager
def raised() -> Iterator[list[LeantuneError]]:
    """Check that the block is refused, and keep the error for more checks."""
    found: list[LeantuneError] = []
    try:
        yield found
    except LeantuneError as error:
        found.append(error)
    assert found, "it was not refused"


def command(*arguments: object, typed: str = "", may_write: bool = False) -> str:
    """Run ``leantune`` in this process and return its stdout.

    Args:
        typed: what comes on stdin.
        may_write: whether a refusal may come after something was written: training had begun.

    Raises:
        Refused: it ended with another code than 0, one named line, and nothing touched here.
        AssertionError: it refused in another way.
    """
    before = _contents(Path())
    given = [str(argument) for argument in arguments]
    result = CliRunner().invoke(app, given, input=typed, env={"COLUMNS": "200"})
    if result.exit_code == 0:
        return result.stdout
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    said = re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", result.stderr).strip()
    # The last words are one paragraph, which names what is wrong.
    last = said.splitlines()[-1]
    assert last.startswith("error ") and result.stdout == "", f"said {said!r}, {result.stdout!r}"
    assert "Errno" not in last, f"it said {last!r}"
    assert may_write or _contents(Path()) == before, f"it touched the folder and said {last!r}"
    raise Refused(last.removeprefix("error "))


def in_child(work: Callable[[], Any]) -> tuple[int, Any]:
    """Run ``work`` in a forked child, for as long and in as much memory as a case may take.

    Returns:
        0, or minus the signal that ended the child; what ``work`` returned or raised, None if it
        was killed.
    """
    context = multiprocessing.get_context("fork")
    receive, send = context.Pipe(duplex=False)

    def run() -> None:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        most = pages * resource.getpagesize() + MEMORY_EACH
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
        try:
            found = work()
        except BaseException as error:
            found = error
        send.send(found)

    child = context.Process(target=run)
    child.start()
    send.close()
    if not receive.poll(SECONDS_EACH):
        child.kill()
    try:
        found = receive.recv()
    except EOFError:
        found = None
    child.join()
    return child.exitcode or 0, found


def try_case(case: Case) -> dict[str, Any]:
    """Try one case in a fresh folder, in a child of its own, and return its row."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        ended, found = in_child(partial(_outcome, case, Path(folder)))
    seconds = round(time.perf_counter() - start, 1)
    outcome, said = found or ("traceback", f"ended by signal {-ended} after {seconds} s")
    if outcome == "works" and case.expected == "refused":
        outcome = "silent"
    elif outcome == "refused" and case.expected == "works":
        outcome, said = "silent", f"refused what should work: {said}"
    said = said.replace(f"{folder}/", "").replace(folder, "FOLDER").replace(_PARENT, "")
    said = _OTHER_FOLDER.sub("", said).replace(str(Path.home()), "~")
    said = " ".join(said.split())
    if len(said) > _LONGEST_SAID:
        said = f"{said[: _LONGEST_SAID // 2]} ... {said[-_LONGEST_SAID // 2 :]}"
    row = {"area": case.area, "name": case.name, "tried": case.tried}
    return row | {"outcome": outcome, "said": said, "seconds": seconds}


def _outcome(case: Case, folder: Path) -> tuple[str, str]:
    output = io.StringIO()
    with chdir(folder), redirect_stdout(output), redirect_stderr(output):
        try:
            return "works", str(case.run(folder) or "")
        except LeantuneError as error:
            return "refused", str(error)
        except AssertionError as error:
            return "silent", f"AssertionError: {error}"
        except BaseException as error:
            return "traceback", f"{type(error).__name__}: {error}"


def try_areas(areas: Sequence[str], name: str, num_workers: int) -> None:
    """Try the cases whose name fits a glob, and replace their rows; of ``*`` the whole areas'.

    Args:
        num_workers: cases tried side by side.

    Raises:
        SystemExit: there was a traceback, or something silent.
    """
    wanted = []
    for area in areas:
        names = fnmatch.filter(_cases(area).found, name)
        wanted += [(area, one) for one in names]
        if names:
            _cases(area).prepare()
    found = []
    # Workers that are forked have the cases, which no pickle could hold.
    with ProcessPoolExecutor(num_workers, multiprocessing.get_context("fork")) as workers:
        for row in workers.map(_try_named, wanted):
            found.append(row)
            print(*(row[key] for key in ("area", "outcome", "name", "said")), flush=True)
    if name == "*":
        tried = {row["area"] for row in found}
        kept = [row for row in rows.read("hostile") if row["area"] not in tried]
        rows.write("hostile", sorted([*kept, *found], key=lambda row: row["area"]))
    else:
        rows.replace("hostile", ("area", "name"), found)
    counts = Counter(row["outcome"] for row in found)
    print(f"{len(found)} cases: {dict(counts)}")
    if counts["traceback"] or counts["silent"]:
        raise SystemExit(1)


def _cases(area: str) -> Cases:
    return import_module(f"bench.hostile.{area}").CASES


def _try_named(place: tuple[str, str]) -> dict[str, Any]:
    area, name = place
    return try_case(_cases(area).found[name])
