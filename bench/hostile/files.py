"""Folders of others, damaged checkpoints, full disks."""

import itertools
import os
import shutil
import subprocess
import sys
import tempfile
from contextlib import suppress
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import transformers
from integration.damage import DAMAGES, FILES, TENSORS, TEXTS, CutOff, Payload
from integration.tiny import bert

import leantune as lt
from bench.hostile.case import Cases, command, in_child, raised, untouched
from bench.hostile.runs import write_inputs
from leantune.core.manifest import MANIFEST_FILE, find_damage, write_manifest


def _options(folder: Path) -> dict[str, Any]:
    options = dict(pair.split("=") for pair in write_inputs(folder)[1:])
    return options | {"max_steps": 6, "save_steps": 2, "batch_size": 4, "max_length": 32}


@cache
def _cut_off() -> tempfile.TemporaryDirectory[str]:
    """Return a folder with inputs and a run that was cut off after checkpoints 2 and 4 of 6."""
    place = tempfile.TemporaryDirectory()
    assert in_child(partial(_train_to_4, Path(place.name)))[1] == "cut off"
    return place


def _train_to_4(folder: Path) -> str:
    options = _options(folder)
    for name in ("model", "data", "output"):
        options[name] = str(folder / options[name])
    try:
        lt.train(options, methods=[lt.WTACRS(keep_ratio=0.3)], callbacks=[CutOff(4)])
    except KeyboardInterrupt:
        return "cut off"
    return "trained to the end"


CASES = Cases("files", prepare=_cut_off)


def _copy(folder: Path) -> list[str]:
    """Copy that run here; return the command that goes on with it."""
    shutil.copytree(_cut_off().name, folder, dirs_exist_ok=True)
    return ["train", "run/recipe.json", "output=run", "resume=true"]


def _damaged(name: str, damage: str, folder: Path) -> str:
    """Go on from the other checkpoint where one is damaged; refuse where both are."""
    arguments = _copy(folder)
    checkpoints = folder / "run" / "checkpoints"
    DAMAGES[damage](checkpoints / "checkpoint-4" / name)
    begun: list[int] = []

    class First(transformers.TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            begun.append(state.global_step)
            raise KeyboardInterrupt

    with suppress(KeyboardInterrupt):
        lt.train("run/recipe.json", output="run", resume=True, callbacks=[First()])
    assert begun == [2], f"went on from {begun}"
    with raised():
        command(*arguments, "resume_from=checkpoint-4")
    DAMAGES[damage](checkpoints / "checkpoint-2" / name)
    if name == MANIFEST_FILE and damage in ("missing", "a folder", "a dead link"):
        assert find_damage(checkpoints / "checkpoint-2", "checkpoint") is not None
        return "both passed over by name: cut off while they were written"
    with raised() as said:
        command(*arguments)
    assert not (folder / "ran").exists(), "a pickle ran"
    return f"went on from checkpoint-2; with both: {said[0]}"


_OF_SOME = dict.fromkeys(("short", "garbage", "nested", "a folder", "a dead link"), TEXTS)
_OF_SOME["without a tensor"] = TENSORS
for _name, _damage in itertools.product(FILES, DAMAGES):
    if _name not in _OF_SOME.get(_damage, FILES):
        continue
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
    DAMAGES[damage](path)
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
        torch.save(Payload(), checkpoint / name)
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


_OUTPUTS = ("run", "run/session", "run/session/new", "base", "base/new", ".", "..", "mine")
_OUTPUTS += ("link", "file", "file/new", "~", "/")
for _output in _OUTPUTS:
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
    command(*write_inputs(folder, "overwrite=true"))


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
    command(*write_inputs(folder, "overwrite=true"))


@CASES.works
def output_in_the_home_folder(folder: Path) -> str:
    """output=~/x with another home."""
    before = os.environ["HOME"]
    os.environ["HOME"] = str(folder)
    try:
        command(*write_inputs(folder, "output=~/x"))
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
    run = 'exec "$0" -c "$1"'
    mount = f"mount -t tmpfs -o size={kib}k none small"
    done = _shell(f'exec unshare -rm sh -c \'{mount} && {run}\' "$0" "$1"')
    how = ""
    if "unshare" in done.stderr or "mount:" in done.stderr:
        how = "by a limit on each file, since this machine mounts nothing: "
        # In blocks of 512 bytes.
        done = _shell(f"ulimit -f {2 * kib} && {run}")
    assert done.returncode == 0, done.stderr[-2000:]
    said = done.stdout.rpartition("SAID ")[2]
    # The last of them has room for all.
    assert said.startswith(("works",) if kib == _SIZES[-1] else ("WriteError ", "works")), said
    return how + said


def _shell(script: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["sh", "-c", script, sys.executable, _SMALL],
        check=False,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )


_SIZES = (16, 64, 128, 192, 256, 320, 640, 4096)
for _kib in _SIZES:
    CASES.add(
        f"disk of {_kib} KiB",
        "works",
        f"a run on a file system of {_kib} KiB: done, or a named error with what was whole kept",
        partial(_full_disk, _kib),
    )
