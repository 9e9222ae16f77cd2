"""Folders of others, damaged checkpoints, full disks, two runs in one folder, signals."""

import itertools
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import transformers
from integration.tiny import bert

import leantune as lt
from bench.hostile.case import Cases, command, untouched
from bench.hostile.runs import write_inputs
from leantune.core.manifest import MANIFEST_FILE, find_damage, write_manifest
from leantune.errors import LeantuneError

CASES = Cases("files")
_MODULE = (sys.executable, "-c", "from leantune.cli import main; main()")


class _CutOff(transformers.TrainerCallback):
    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 4:
            raise KeyboardInterrupt


def _options(folder: Path) -> dict[str, Any]:
    options = dict(pair.split("=") for pair in write_inputs(folder))
    return options | {"max_steps": 6, "save_steps": 2, "batch_size": 4, "max_length": 32}


@cache
def _cut_off() -> Path:
    """Return a folder with inputs and a run that was cut off after checkpoints 2 and 4 of 6."""
    folder = Path(tempfile.mkdtemp(prefix="leantune-hostile-"))
    options = {name: value for name, value in _options(folder).items()}
    for name in ("model", "data", "output"):
        options[name] = str(folder / options[name])
    try:
        lt.train(options, methods=[lt.WTACRS(keep_ratio=0.3)], callbacks=[_CutOff()])
    except KeyboardInterrupt:
        return folder
    raise AssertionError("it was not cut off")


def _copy(folder: Path) -> list[str]:
    """Copy that run here; return the command that goes on with it."""
    shutil.copytree(_cut_off(), folder, dirs_exist_ok=True)
    return ["train", "run/recipe.json", "output=run", "resume=true"]


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def _drop_tensor(path: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(path)
    tensors.pop(min(tensors))
    save_file(tensors, path)


class _Payload:
    def __reduce__(self) -> Any:
        return os.mkdir, ("ran",)


_DAMAGES: dict[str, Callable[[Path], Any]] = {
    "missing": Path.unlink,
    "flipped": _flip,
    "truncated": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "short": lambda path: path.write_bytes(path.read_bytes()[:-2]),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"}"),
    "empty": lambda path: path.write_bytes(b""),
    "garbage": lambda path: path.write_bytes(b"\xff[[{" * 99),
    "nested": lambda path: path.write_text("[" * 100_000),
    "pickled": lambda path: path.write_bytes(pickle.dumps(_Payload(), protocol=2)),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "a dead link": lambda path: (path.unlink(), path.symlink_to("nowhere")),
}
_FILES = ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth")
_FILES += ("trainer_state.json", "leantune_session.safetensors", MANIFEST_FILE)


def _damaged(name: str, damage: str, folder: Path) -> str:
    """Go on from the other checkpoint where one is damaged; refuse where both are."""
    arguments = _copy(folder)
    checkpoints = folder / "run" / "checkpoints"
    _DAMAGES[damage](checkpoints / "checkpoint-4" / name)
    begun: list[int] = []

    class First(transformers.TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            begun.append(state.global_step)
            raise KeyboardInterrupt

    try:
        lt.train("run/recipe.json", output="run", resume=True, callbacks=[First()])
    except KeyboardInterrupt:
        assert begun == [2], f"went on from {begun}"
    try:
        command(*arguments, "resume_from=checkpoint-4")
        raise AssertionError("took a damaged checkpoint")
    except LeantuneError:
        pass
    _DAMAGES[damage](checkpoints / "checkpoint-2" / name)
    if name == MANIFEST_FILE and damage in ("missing", "a folder", "a dead link"):
        assert find_damage(checkpoints / "checkpoint-2", "checkpoint") is not None
        return "both passed over by name: cut off while they were written"
    try:
        command(*arguments)
        raise AssertionError("took a damaged checkpoint")
    except LeantuneError as error:
        assert not (folder / "ran").exists(), "a pickle ran"
        return f"went on from checkpoint-2; with both: {error}"


for _name, _damage in itertools.product(_FILES, _DAMAGES):
    CASES.add(
        f"{_name} {_damage}",
        "works",
        f"{_name} of the last checkpoint is {_damage}, then of both",
        partial(_damaged, _name, _damage),
    )


def _own_file(name: str, damage: str, folder: Path) -> None:
    arguments = _copy(folder)
    path = folder / "run" / name
    shutil.copyfile(folder / "run" / "recipe.json", folder / "recipe.json")
    path.write_text("{}")
    _DAMAGES[damage](path)
    command("train", "recipe.json", *arguments[2:])


for _name, _damage in itertools.product(
    ("recipe.json", "metrics.json"), ("flipped", "empty", "garbage", "nested")
):
    CASES.add(
        f"{_name} {_damage}",
        "refused",
        f"resuming beside a {_name} that is {_damage}",
        partial(_own_file, _name, _damage),
    )


def _forged(name: str, folder: Path) -> None:
    arguments = _copy(folder)
    for number in (2, 4):
        checkpoint = folder / "run" / "checkpoints" / f"checkpoint-{number}"
        torch.save(_Payload(), checkpoint / name)
        write_manifest(checkpoint, "checkpoint")
    try:
        lt.train(arguments[1], output="run", resume=True)
    finally:
        assert not (folder / "ran").exists(), "a pickle ran"


for _name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
    CASES.add(
        f"{_name} forged with its manifest",
        "refused",
        f"{_name} is a pickle with a payload, and the manifest vouches for it",
        partial(_forged, _name),
    )


@CASES.works
def tensor_less(folder: Path) -> str:
    """One tensor less in the last checkpoint's model.safetensors."""
    _copy(folder)
    checkpoint = folder / "run" / "checkpoints" / "checkpoint-4"
    _drop_tensor(checkpoint / "model.safetensors")
    said = find_damage(checkpoint, "checkpoint")
    assert said is not None
    return said


@CASES.refused
def save_onto_a_trainers_folder(folder: Path) -> None:
    """session.save onto a folder with checkpoints of a Trainer."""
    _copy(folder)
    with untouched(folder):
        lt.apply(bert(), lt.WTACRS()).save(folder / "run" / "checkpoints")


@CASES.refused
def save_onto_a_checkpoint(folder: Path) -> None:
    """session.save onto one checkpoint of a run."""
    _copy(folder)
    with untouched(folder):
        lt.apply(bert(), lt.WTACRS()).save(folder / "run" / "checkpoints" / "checkpoint-4")


@CASES.refused
def save_onto_the_working_folder(folder: Path) -> None:
    """session.save onto the working folder, which is empty."""
    lt.apply(bert(), lt.WTACRS()).save(".")


def _merge(output: str, folder: Path) -> None:
    bert().save_pretrained(folder / "base")
    lt.apply(bert(), lt.LoRA(rank=2)).save(folder / "run" / "session")
    (folder / "mine").mkdir()
    (folder / "mine" / "notes.txt").write_text("mine")
    (folder / "link").symlink_to("mine")
    (folder / "file").write_text("mine")
    command("merge", "run/session", output, "--overwrite", "--model", "base")


for _output in ("run", "run/session", "run/session/new", "base", "base/new", ".", "..", "mine"):
    CASES.add(
        f"merge to {_output}",
        "refused",
        f"merge --overwrite onto {_output}",
        partial(_merge, _output),
    )
for _output in ("link", "file", "file/new", "~", "/"):
    CASES.add(
        f"merge to {_output}",
        "refused",
        f"merge --overwrite onto {_output}",
        partial(_merge, _output),
    )


@CASES.refused
def merge_with_another_base(folder: Path) -> None:
    """Merge --model with a base of the same shape and other weights."""
    bert(seed=2).save_pretrained(folder / "other")
    lt.apply(bert(seed=1), lt.LoRA(rank=2)).save(folder / "session")
    command("merge", "session", "plain", "--model", "other")


def _overwrite(place: str, folder: Path) -> None:
    _copy(folder)
    (folder / "run" / place).mkdir(exist_ok=True)
    (folder / "run" / place / "notes.txt").write_text("mine")
    command("train", *write_inputs(folder / "inputs"), f"output={folder}/run", "overwrite=true")


for _place in ("model", "session", "adapter", "plots", "checkpoints", "checkpoints/checkpoint-4"):
    CASES.add(
        f"overwrite beside {_place}/notes.txt",
        "refused",
        f"overwrite=true where {_place} holds a file of the user's",
        partial(_overwrite, _place),
    )


@CASES.refused
def overwrite_a_session(folder: Path) -> None:
    """overwrite=true onto a folder that session.save wrote, which has a recipe.json, too."""
    lt.apply(bert(), lt.LoRA(rank=2)).save(folder / "run")
    command("train", *write_inputs(folder), "overwrite=true")


@CASES.refused
def output_below_a_file(folder: Path) -> None:
    """A run's output below a file."""
    (folder / "file").write_text("mine")
    command("train", *write_inputs(folder), "output=file/run")


@CASES.works
def output_in_the_home_folder(folder: Path) -> str:
    """output=~/x with another home."""
    before = os.environ["HOME"]
    os.environ["HOME"] = str(folder)
    try:
        command("train", *write_inputs(folder), "output=~/x")
    finally:
        os.environ["HOME"] = before
    assert (folder / "x" / "model" / "model.safetensors").is_file() and not Path("~").exists()
    return "the model is in the home folder"


_SMALL = """
import sys
from pathlib import Path
import leantune as lt
from leantune.core.manifest import find_damage
from leantune.errors import LeantuneError
options = dict(task="text", model="model", data="data", output="small/run", max_steps=6,
               save_steps=2, batch_size=4, max_length=32, methods=["wta_crs"])
try:
    lt.train(options)
    said = "works"
except LeantuneError as error:
    said = f"{type(error).__name__} {error}"
run = Path("small/run")
names = sorted(path.name for path in run.glob("checkpoints/checkpoint-*"))
whole = [n for n in names if find_damage(run / "checkpoints" / n, "checkpoint") is None]
assert len(names) - len(whole) <= 1, "a whole checkpoint was lost"
assert (run / "recipe.json").is_file() or not list(run.parent.iterdir()), "half-made folder"
print(f"SAID {said}; of {names} whole: {whole}")
"""


def _full_disk(kib: int, folder: Path) -> str:
    """Train on a file system of that size, which this process alone sees."""
    write_inputs(folder)
    (folder / "small").mkdir()
    mount = f'mount -t tmpfs -o size={kib}k none small && exec "$0" -c "$1"'
    done = subprocess.run(
        check=False,
        args=["unshare", "-rm", "sh", "-c", mount, sys.executable, _SMALL],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    if "unshare" in done.stderr or "mount:" in done.stderr:
        return f"not tried: this machine mounts nothing ({done.stderr.strip()})"
    assert done.returncode == 0, done.stderr[-2000:]
    said = done.stdout.rpartition("SAID ")[2]
    assert said.startswith(("WriteError ", "works")), said
    return said


for _kib in (16, 64, 128, 192, 256, 320, 448, 640, 4096):
    CASES.add(
        f"disk of {_kib} KiB",
        "works",
        f"a run on a file system of {_kib} KiB: done, or a named error with what was whole kept",
        partial(_full_disk, _kib),
    )


def _start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.Popen(
        [*_MODULE, *arguments], cwd=folder, env=env, text=True, stdout=-1, stderr=-1
    )


@CASES.works
def two_runs(folder: Path) -> str:
    """Two runs started at once into one folder."""
    options = write_inputs(folder)
    both = [_start(folder, "train", *options, "max_steps=60") for _ in range(2)]
    said = [run.communicate()[1] for run in both]
    codes = sorted(run.returncode for run in both)
    assert codes[0] == 0 and codes[1] in (1, 2), said
    return next(
        text.splitlines()[-1] for text, run in zip(said, both, strict=True) if run.returncode
    )


def _signal(name: str, wait_for: str, code: int, folder: Path) -> str:
    options = write_inputs(folder)
    number = getattr(signal, name)
    run = _start(folder, "train", *options, "max_steps=100000", "save_steps=50000")
    start = time.monotonic()
    while not (folder / wait_for).exists():
        assert run.poll() is None and time.monotonic() < start + 100, run.communicate()
        time.sleep(0.05)
    time.sleep(1.0)
    run.send_signal(number)
    _, said = run.communicate()
    assert run.returncode == code and "Traceback" not in said, (run.returncode, said[-2000:])
    kept = list((folder / "run" / "checkpoints").glob("checkpoint-*"))
    assert len(kept) == 1 and find_damage(kept[0], "checkpoint") is None, kept
    return said.strip().splitlines()[-1]


for _name, _code in (("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 129)):
    CASES.add(
        f"{_name} while training",
        "works",
        f"{_name} in training keeps a checkpoint and ends with {_code}",
        partial(_signal, _name, "run/checkpoints", _code),
    )


def _early(seconds: float, folder: Path) -> str:
    options = write_inputs(folder)
    run = _start(folder, "train", *options, "max_steps=100000")
    time.sleep(seconds)
    run.send_signal(signal.SIGINT)
    _, said = run.communicate()
    assert run.returncode == 130 and "Traceback" not in said, (run.returncode, said[-2000:])
    assert not (folder / "run").exists() or list(folder.glob("run/checkpoints/checkpoint-*"))
    return said.strip().splitlines()[-1]


for _tenths in (2, 4, 6, 8, 10, 13, 16, 20, 30, 40, 60):
    CASES.add(
        f"Ctrl-C after {_tenths / 10} s",
        "works",
        f"Ctrl-C {_tenths / 10} s after the start: no traceback, no half-made folder",
        partial(_early, _tenths / 10),
    )


def _killed(method: str, moment: float, folder: Path) -> str:
    options = [*write_inputs(folder), f"--method={method}", "max_steps=8", "save_steps=2"]
    command("train", *options, "output=whole")
    run = _start(folder, "train", *options)
    while not (folder / "run" / "recipe.json").exists():
        assert run.poll() is None, run.communicate()
        time.sleep(0.01)
    time.sleep(moment)
    run.kill()
    run.communicate()
    command("train", *options, "resume=true")
    for path in sorted((folder / "whole" / "session").glob("*.safetensors")):
        other = folder / "run" / "session" / path.name
        assert path.read_bytes() == other.read_bytes(), f"other bits in {path.name}"
    return f"killed with {run.returncode}, resumed to the same bits"


_MOMENTS = random.Random(0)
for _name in lt.list_methods():
    for _ in range(3):
        _moment = round(_MOMENTS.uniform(0, 2), 2)
        CASES.add(
            f"kill -9 of {_name} after {_moment} s",
            "works",
            f"{_name} is killed {_moment} s after its folder was made, and resumed",
            partial(_killed, _name, _moment),
        )
