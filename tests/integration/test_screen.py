"""What the command prints where: narrow screens, pipes, other encodings, several processes."""

import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from leantune.cli import main
from leantune.cli.output import note, print_figures, print_json, print_text, reported_errors
from leantune.core.distributed import is_first_process
from leantune.errors import ConfigError, SiteError, UnsupportedError
from leantune.training.progress import has_screen, say

RUN = "from leantune.cli import main; main()"
NAMES = ["gradients + optimizer", "bert.encoder.layer.11.attention.output.dense"]
RUNS = ["baseline", "lora", "checkpoint+lora+wta_crs", "sparse_grad"]


@pytest.mark.parametrize("columns", [60, 80, 120, 200])
def test_figures_and_their_names_stay_whole(
    columns: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    figures = [
        [f"{1 + row + 10 * run}.345 MiB\n0.{run}23 of baseline" for run in range(4)]
        for row in range(2)
    ]
    print_figures("Title", ["", *RUNS], [[n, *f] for n, f in zip(NAMES, figures, strict=True)])
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= columns
    for cell in (*RUNS, *"\n".join(f for row in figures for f in row).split("\n")):
        assert cell in text, cell
    num_tables = sum(line.startswith(" \u2500") for line in text.splitlines())
    assert text.count(NAMES[0]) == num_tables and (num_tables == 1) == (columns == 200)
    assert "".join(text.split()).count("bert.encoder.layer") == num_tables


@pytest.mark.parametrize("columns", [60, 80])
def test_words_wrap_beside_the_first_column(
    columns: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    rows = [("encoder.layer.0", "word " * 40, "another " * 40), ("x" * 50, "b", "last")]
    print_text("Title", ("name", "long", "longer"), rows)
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= columns and "encoder.layer.0" in text
    counts = [text.count(word) for word in ("word", "another", "last", "x")]
    assert counts == [40, 40, 1, 50]


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigError("asked"), 2),
        (SiteError("no"), 1),
        (UnsupportedError("no"), 1),
        (OSError(28, "No space left"), 1),
        (KeyboardInterrupt(), 130),
    ],
)
def test_exit_codes(error: BaseException, code: int, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(typer.Exit) as ended, reported_errors(debug=False):
        raise error
    assert ended.value.exit_code == code
    said = capsys.readouterr()
    assert said.out == "" and len(said.err.splitlines()) == 1


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_ends_imports_at_once(name: str) -> None:
    """With the signal's exit code and no traceback; nothing slow is loaded to see to it."""
    number = getattr(signal, name)
    code = (
        "import signal, sys\nfrom leantune.training.interrupt import end_process, handled_by\n"
        f"signal.signal({int(number)}, signal.SIG_DFL)\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)\n"
        f"with handled_by(end_process):\n    signal.raise_signal({int(number)})\n"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (ran.returncode, ran.stderr) == (128 + number, "interrupted\n")


def test_a_reader_who_has_seen_enough_is_no_error() -> None:
    """As ``leantune methods --json | head -1``; it is longer than what a pipe takes unread."""
    command = [sys.executable, "-c", RUN, "methods", "--json"]
    read, write = os.pipe()
    os.close(read)
    ran = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert (ran.returncode, ran.stderr) == (1, "")


def test_letters_that_a_screen_lacks_are_spelled(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setattr(sys, "argv", ["leantune", "--version"])
    with pytest.raises(SystemExit):
        main()
    print_text("mod\u00e8le", ("\u00e9",), [("na\u00efve",)])
    print_json({"mod\u00e8le": "\ud800"})
    screen.flush()
    text = screen.buffer.getvalue().decode("ascii")
    assert "mod\\xe8le" in text and "na\\xefve" in text and "\\ud800" in text


def test_no_colours_where_none_are_wanted(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("NO_COLOR", "1")
    with pytest.raises(typer.Exit), reported_errors(debug=False):
        raise SiteError("no")
    assert "\x1b[31m" not in capsys.readouterr().err


@pytest.mark.parametrize(("term", "is_screen"), [("dumb", False), ("xterm", True)])
def test_a_bar_needs_a_screen(term: str, is_screen: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not has_screen()
    monkeypatch.setenv("TERM", term)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert has_screen() is is_screen


def test_one_process_speaks_for_all(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for number, said in (("0", "one\ntwo\n"), ("1", "")):
        monkeypatch.setenv("RANK", number)
        note("one")
        say("two")
        assert is_first_process() == (number == "0")
        assert capsys.readouterr().err == said
    # What went wrong in one process is not kept from the user.
    with pytest.raises(typer.Exit), reported_errors(debug=False):
        raise SiteError("no")
    assert capsys.readouterr().err == "error (process 1) no\n"


@pytest.mark.slow
def test_of_two_processes_one_prints_and_writes(
    tmp_path: Path, model_folder: Path, data_folder: Path
) -> None:
    script, output = tmp_path / "main.py", tmp_path / "run"
    script.write_text(RUN)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [str(script), "train", "--json", "task=text"]
    command += [f"model={model_folder}", f"data={data_folder}", f"output={output}", "max_steps=2"]
    command += ["batch_size=4", "max_length=16", "gradient_accumulation_steps=2"]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert "\r" not in ran.stderr  # no bars
    document = json.loads(ran.stdout)
    for line in ("loading torch", "baseline: step 0/2: training starts", f"writing {output}"):
        assert ran.stderr.splitlines().count(line) == 1, line
    # The mean over processes and micro-batches, near log 2; their sum would be four times that.
    assert all(0.6 < loss < 0.8 for _, loss in document["runs"][0]["train_loss"])
    assert (output / "model" / "config.json").is_file() and (output / "report.html").is_file()
