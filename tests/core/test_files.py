"""What a session saves: whole or not at all, and read back with checks."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from models import MODELS
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

import leantune as lt
from leantune.core import disk
from leantune.core.disk import load_tensors, read_json, save_tensors, write_atomic, writing
from leantune.core.files import BASE_FILE, SESSION, STATE_FILE, WEIGHTS_FILE
from leantune.core.manifest import (
    MANIFEST_FILE,
    atomic_folder,
    find_damage,
    remove_leftovers,
    write_manifest,
)
from leantune.core.recipe import RECIPE_FILE
from leantune.errors import ConfigError, WriteError


def make_session(seed: int = 3, **options) -> lt.Session:
    model = MODELS["bert"].build()
    session = lt.apply(model, lt.WTACRS(min_rows=2, **options), seed=seed)
    model(**MODELS["bert"].batch()).loss.backward()
    return session


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def written(folder: Path) -> dict[str, bytes]:
    """Contents but for the manifest, of a folder that is as it was written."""
    assert find_damage(folder, "out") is None
    return {name: data for name, data in contents(folder).items() if name != MANIFEST_FILE}


def make_out(folder: Path) -> Path:
    with atomic_folder(folder, "out") as fresh:
        (fresh / "old").write_text("old")
    return folder


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    folder = tmp_path / "run" / "session"
    make_session().save(folder)
    return folder


def test_what_a_killed_process_left_beside_a_folder_is_removed(tmp_path: Path) -> None:
    """And nothing else, whatever looks like it."""
    others = {"model", "model.ab12cd_3", ".model.ab12cd_3x", ".model.mine", ".models.ab12cd_3"}
    writing = atomic_folder(tmp_path / "model", "out")
    left = {writing.__enter__().name}  # as if it were killed now
    for name in (*others, f"{min(left)}.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("1")
    assert left < {path.name for path in tmp_path.iterdir()}
    remove_leftovers(tmp_path / "model")
    assert {path.name for path in tmp_path.iterdir()} == others


def test_atomic_folder_replaces_the_old_one_whole(tmp_path: Path) -> None:
    target = tmp_path / "out"
    for text in ("first", "second"):
        with atomic_folder(target, "out") as fresh:
            (fresh / text).write_text(text)
            assert not (target / text).exists()
        assert written(target) == {text: text.encode()}
        assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, OSError])
def test_error_inside_keeps_the_old_folder(tmp_path: Path, error) -> None:
    target = make_out(tmp_path / "out")
    with pytest.raises(error), atomic_folder(target, "out") as fresh:
        (fresh / "new").write_text("half")
        raise error
    assert written(target) == {"old": b"old"} and os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("failing_call", [1, 2])
def test_error_while_renaming_keeps_the_old_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error, failing_call
) -> None:
    target = make_out(tmp_path / "out")
    replace, count = Path.replace, iter(range(1, 10))

    def fail(self: Path, other: Path) -> Path:
        if next(count) == failing_call:
            raise error
        return replace(self, other)

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(type(error)), atomic_folder(target, "out") as fresh:
        (fresh / "new").write_text("new")
    assert written(target) == {"old": b"old"} and os.listdir(tmp_path) == ["out"]


def test_write_atomic_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.json"
    write_atomic(path, "old")

    def fail(*_) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(disk.os, "fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        write_atomic(path, "new")
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["a.json"]


@pytest.mark.parametrize("target", ["save_file", "os.replace"])
def test_full_disk_keeps_the_old_session(saved: Path, monkeypatch, target: str) -> None:
    before = contents(saved)

    def fail(*_, **__) -> None:
        raise OSError(28, "No space left on device")

    session = make_session(seed=4)
    if target == "save_file":
        monkeypatch.setattr(disk, "save_file", fail)
    else:
        monkeypatch.setattr(disk.os, "replace", fail)
    with pytest.raises(OSError, match="No space left"):
        session.save(saved)
    monkeypatch.undo()
    assert contents(saved) == before and os.listdir(saved.parent) == ["session"]
    assert lt.load(MODELS["bert"].build(), saved).seed == 3


def test_file_that_cannot_grow_is_an_os_error(tmp_path: Path) -> None:
    """A real one: the system refuses to let the file grow, as it does when the disk is full."""
    code = """
import resource, signal, sys, torch
from pathlib import Path
from leantune.core.disk import save_tensors
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
path = Path(sys.argv[1])
save_tensors(path, {"a": torch.zeros(4)})
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
try:
    save_tensors(path, {"a": torch.ones(100_000)})
except OSError as error:
    print("OSError", path.name in str(error))
"""
    path = tmp_path / "a.safetensors"
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["OSError", "True"]
    assert os.listdir(tmp_path) == ["a.safetensors"]
    assert torch.equal(load_tensors(path)["a"], torch.zeros(4))


def test_tied_and_strided_tensors_are_written(tmp_path: Path) -> None:
    value = torch.arange(6.0).view(2, 3)
    save_tensors(tmp_path / "a", {"x": value, "y": value, "z": value.t()})
    back = load_tensors(tmp_path / "a")
    assert torch.equal(back["x"], value) and torch.equal(back["z"], value.t())


def test_folder_holds_recipe_weights_and_state(saved: Path) -> None:
    files = [BASE_FILE, MANIFEST_FILE, RECIPE_FILE, STATE_FILE, WEIGHTS_FILE]
    assert sorted(contents(saved)) == files
    recipe = json.loads((saved / RECIPE_FILE).read_text())
    assert recipe == {
        "format": 2,
        "seed": 3,
        "methods": [lt.WTACRS(min_rows=2).to_dict()],
    }


def test_only_what_trains_is_saved(tmp_path: Path) -> None:
    model = MODELS["bert"].build()
    lt.apply(model, lt.LoRA(rank=2)).save(tmp_path / "s")
    names = set(load_file(tmp_path / "s" / WEIGHTS_FILE))
    assert names == {n for n, p in model.named_parameters() if p.requires_grad}
    assert all("lora_" in n or "classifier" in n for n in names)


@pytest.mark.parametrize(
    "options",
    [{}, {"norms": "activation"}, {"draw_at": "backward"}],
    ids=lambda o: next(iter(o), "default"),
)
def test_loaded_session_goes_on_bit_for_bit(tmp_path: Path, options) -> None:
    tiny = MODELS["bert"]
    model = tiny.build()
    session = lt.apply(model, lt.WTACRS(min_rows=2, **options), seed=3)
    for step in range(3):
        model(**tiny.batch(step)).loss.backward()
    session.save(tmp_path / "s")
    other = tiny.build(seed=9)
    frozen = lt.load(other, tmp_path / "s")
    assert frozen._runtime.counter == session._runtime.counter == 3 and frozen.seed == 3
    for step in range(2):
        grads = []
        for m in (model, other):
            m.zero_grad()
            loss = m(**tiny.batch(step)).loss
            loss.backward()
            grads.append([loss, *(p.grad for p in m.parameters())])
        assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("name", [BASE_FILE, MANIFEST_FILE, RECIPE_FILE, STATE_FILE, WEIGHTS_FILE])
def test_damaged_session_is_refused_by_the_name_of_the_file(saved: Path, name: str) -> None:
    whole = (saved / name).read_bytes()
    middle = len(whole) // 2
    flipped = whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]
    for damage in (b"", whole[:4], whole[:-2], b"\xff\xfe" * 20, b"[" * 100_000, flipped, None):
        (saved / name).unlink() if damage is None else (saved / name).write_bytes(damage)
        model = MODELS["bert"].build()
        before = {n: v.clone() for n, v in model.state_dict().items()}
        # A flipped letter in the manifest tells of another file.
        named = r"\.json" if name == MANIFEST_FILE else name
        with pytest.raises(ConfigError, match=rf"as session.save wrote it, got .*with .*{named}"):
            lt.load(model, saved)
        assert untouched(model, before)
        (saved / name).write_bytes(whole)
    lt.load(MODELS["bert"].build(), saved)


@pytest.mark.parametrize(
    "text", ["[]", "{}", '{"format": 1}', '{"format": 2, "kind": "session", "files": {"a": 1}}']
)
def test_manifest_with_other_content(saved: Path, text: str) -> None:
    (saved / MANIFEST_FILE).write_text(text)
    with pytest.raises(ConfigError, match=MANIFEST_FILE):
        lt.load(MODELS["bert"].build(), saved)


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nothing' with no such folder"):
        lt.load(MODELS["bert"].build(), tmp_path / "nothing")


@pytest.mark.parametrize("size", [0, 4, 30])
def test_no_safetensors_file(saved: Path, size: int) -> None:
    """Also where a manifest vouches for it."""
    path = saved / STATE_FILE
    path.write_bytes(path.read_bytes()[:size])
    write_manifest(saved, SESSION)
    with pytest.raises(ConfigError, match=f"{STATE_FILE} must be a whole safetensors file"):
        lt.load(MODELS["bert"].build(), saved)


@pytest.mark.parametrize("text", ["", "{", "[1", b"\xff\xfe", "[" * 100_000])
def test_broken_json(tmp_path: Path, text) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(ConfigError, match=r"a\.json must be valid JSON"):
        read_json(path)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        *(({"format": f}, "format must be 2, got") for f in (-5, 3, 2.0, True, "2", None, 10**30)),
        ({"methods": [{"method": "wta_crs", "version": 2}]}, "version must be 1, got 2"),
        (
            {"methods": [{"method": "wta_crs", "keep_ratoi": 1}]},
            "got 'keep_ratoi'; did you mean 'keep_ratio'",
        ),
        ({"methods": [{"method": "fancy"}]}, "got 'fancy'"),
    ],
)
def test_recipe_that_this_version_does_not_know(saved: Path, change, match) -> None:
    recipe = json.loads((saved / RECIPE_FILE).read_text())
    (saved / RECIPE_FILE).write_text(json.dumps({**recipe, **change}))
    write_manifest(saved, SESSION)
    with pytest.raises(ConfigError, match=match):
        lt.load(MODELS["bert"].build(), saved)


def put_file(folder: Path) -> None:
    (folder / "mine.txt").write_text("mine")


def put_checkpoint(folder: Path) -> None:
    (folder / "checkpoint-5").mkdir()
    (folder / "checkpoint-5" / "optimizer.pt").write_text("mine")


def change_file(folder: Path) -> None:
    (folder / "old").write_text("new")


@pytest.mark.parametrize(
    ("put", "named"),
    [
        (put_file, "mine.txt"),
        (put_checkpoint, "checkpoint-5"),
        (lambda folder: (folder / "empty").mkdir(), "empty"),
        (lambda folder: (folder / "link").symlink_to(folder), "link"),
        (change_file, "old"),
        (lambda folder: (folder / MANIFEST_FILE).unlink(), "old"),
        (lambda folder: write_manifest(folder, "in"), MANIFEST_FILE),
    ],
)
def test_what_others_wrote_is_never_replaced(tmp_path: Path, put, named: str) -> None:
    target = make_out(tmp_path / "out")
    put(target)
    before = contents(tmp_path)
    with (
        pytest.raises(ConfigError, match=rf"{named}, which leantune did not write"),
        atomic_folder(target, "out"),
    ):
        pytest.fail("refused too late")
    assert contents(tmp_path) == before and os.listdir(tmp_path) == ["out"]


def test_folders_that_nobody_means(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "here" / "below").mkdir(parents=True)
    make_out(tmp_path / "out")
    (tmp_path / "link").symlink_to(tmp_path / "out")
    (tmp_path / "file").write_text("mine")
    monkeypatch.chdir(tmp_path / "here" / "below")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name in (".", "..", "../..", "../../home", str(tmp_path), "/"):
        with pytest.raises(ConfigError, match=r"got .*: the working folder, the home"):
            make_out(Path(name))
    for name, got in (("link", "a symbolic link"), ("file", "a file")):
        with pytest.raises(ConfigError, match=f"got .*: {got}"):
            make_out(tmp_path / name)
    with pytest.raises(WriteError, match=r"got no folder with [\d,]+ bytes free"):
        make_out(tmp_path / "file" / "below")
    assert written(tmp_path / "out") == {"old": b"old"}


def test_session_is_not_saved_over_a_trainers_folder(tmp_path: Path) -> None:
    put_checkpoint(tmp_path)
    with pytest.raises(ConfigError, match="checkpoint-5, which leantune did not write"):
        make_session().save(tmp_path)
    assert (tmp_path / "checkpoint-5" / "optimizer.pt").read_text() == "mine"


def test_home_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    make_session().save("~/s")
    assert lt.load(MODELS["bert"].build(), "~/s").seed == 3


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device"),
        PermissionError(13, "Permission denied"),
        SafetensorError(
            "Error while serializing: I/O error: No space left on device (os error 28)"
        ),
        RuntimeError("basic_ios::clear: iostream error"),
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534"),
    ],
)
def test_full_disk_has_one_error(tmp_path: Path, error: Exception) -> None:
    with (
        pytest.raises(WriteError, match=r"a must be writable .* with [\d,]+ bytes free; make"),
        writing(tmp_path / "a"),
    ):
        raise error


@pytest.mark.parametrize("error", [RuntimeError("shapes differ"), ConnectionError(111, "refused")])
def test_other_errors_are_not_the_disks(tmp_path: Path, error: Exception) -> None:
    with pytest.raises(type(error), match=re.escape(str(error))), writing(tmp_path / "a"):
        raise error


def untouched(model: nn.Module, before: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(v, before[n]) for n, v in model.state_dict().items()) and not hasattr(
        model, "_leantune_session"
    )


@pytest.mark.parametrize("name", ["roberta", "distilbert", "llama"])
def test_weights_of_another_model(saved: Path, name: str) -> None:
    model = MODELS[name].build()
    before = {n: v.clone() for n, v in model.state_dict().items()}
    with pytest.raises(ConfigError, match=r"must match the model's|must belong to"):
        lt.load(model, saved)
    assert untouched(model, before)


def test_weights_of_another_shape(saved: Path) -> None:
    tiny = MODELS["bert"]
    config = type(tiny.build().config)(**{**tiny.options, "vocab_size": 65})
    model = type(tiny.build())(config)
    before = {n: v.clone() for n, v in model.state_dict().items()}
    with pytest.raises(ConfigError, match=r"must have shape \(65, 16\), got \(64, 16\)"):
        lt.load(model, saved)
    assert untouched(model, before)


def test_state_of_another_recipe() -> None:
    state = make_session().state_dict()
    with pytest.raises(
        ConfigError, match="state must hold what this recipe keeps, got an entry 'norms/bert"
    ):
        make_session(norms="activation").load_state_dict(state)


@pytest.mark.parametrize("key", ["counter", "step", "seed"])
def test_state_without_a_counter(key: str) -> None:
    session = make_session()
    state = session.state_dict()
    for value, error in (
        (torch.zeros(1, dtype=torch.int64), rf"{key} must be one whole number, got tensor\(\[0"),
        (torch.zeros(()), rf"{key} must be one whole number, got 0.0"),
        (None, f"got none for '{key}'"),
    ):
        damaged = {name: tensor for name, tensor in state.items() if name != key}
        if value is not None:
            damaged[key] = value
        with pytest.raises(ConfigError, match=error):
            session.load_state_dict(damaged)


def test_predicate_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    session = make_session(sites=lambda site: site.name.endswith("query"))
    with pytest.raises(ConfigError, match="got a predicate"):
        session.save(tmp_path / "s")
    assert os.listdir(tmp_path) == []
