"""What a run is told: options, recipe files, output folders; and a training that goes wrong."""

import os
import re
import shutil
import tempfile
from functools import cache, partial
from pathlib import Path

from integration.tiny import bert, llama, tokenizer, write_sentences
from safetensors.torch import load_file, save_file

from bench.hostile.case import Cases, command, raised
from leantune.core.manifest import write_manifest


@cache
def tiny_inputs() -> tempfile.TemporaryDirectory[str]:
    """Return a folder with tiny models and data, which goes with this process."""
    place = tempfile.TemporaryDirectory()
    folder = Path(place.name)
    bert().bert.save_pretrained(folder / "model")
    llama().save_pretrained(folder / "decoder")
    for name in ("model", "decoder"):
        tokenizer().save_pretrained(folder / name)
    write_sentences(folder / "data", lambda good: str(int(good)))
    (folder / "text.txt").write_text("good w1 w2 w3 bad w4\n" * 40)
    return place


CASES = Cases("runs", prepare=tiny_inputs)


def write_inputs(folder: Path, *options: str) -> list[str]:
    """Write tiny models and data; return the command of a run of two steps, ``options`` last."""
    shutil.copytree(tiny_inputs().name, folder, dirs_exist_ok=True)
    own = ("task=text", "model=model", "data=data", "output=run", "max_steps=2", "batch_size=4")
    given = {option.partition("=")[0] for option in options}
    kept = [pair for pair in own if pair.partition("=")[0] not in given]
    return ["train", *kept, "max_length=32", *options]


def write_text_inputs(folder: Path, *options: str) -> list[str]:
    """Write the same, for a language model."""
    text = ("task=causal_lm", "model=decoder", "data=text.txt", "max_length=8")
    return write_inputs(folder, *text, *options)


def _option(folder: Path, option: str) -> str:
    return command(*write_inputs(folder, option))


REFUSED_OPTIONS = {
    "batch_size": "0 -1 1.5 true nan .inf many 9223372036854775808 1" + "0" * 400,
    "max_steps": "0 -1 1.5 .inf 9223372036854775808 1" + "0" * 30,
    "epochs": "0 -1 nan .inf true 1e308 1e400 1" + "0" * 400,
    "learning_rate": "0 -1 nan .inf true 1e400 fast",
    "warmup_ratio": "1 -0.1 nan",
    "weight_decay": "-1 nan .inf",
    "max_grad_norm": "-1 nan .inf",
    "max_length": "1 0 -5 33 9223372036854775808",
    "seed": "-1 4294967296 1.5 true",
    "eval_batch_size": "0 9223372036854775808",
    "gradient_accumulation_steps": "0 9223372036854775808",
    "eval_steps": "0 -1 9223372036854775808",
    "save_steps": "0 -1 9223372036854775808",
    "max_train": "0 -1 true",
    "max_validation": "0 -1",
    "precision": "fp64 fp16 3",
    "schedule": "step null",
    "gradient_checkpointing": "1 maybe",
    "compare": "baseline { 3 nothing",
    "methods": "3 { wta_crs [3] [null] [[wta_crs]] {method:lora}",
    "task": "sst3 null",
}
for _name, _values in REFUSED_OPTIONS.items():
    for _value in _values.split():
        _option_text = f"{_name}={_value}"
        _short = _option_text if len(_option_text) < 60 else f"{_option_text[:40]}... (digits)"
        CASES.add(_short, "refused", f"`{_short}`", partial(_option, option=_option_text))
for _text in ("model=", "data=", "output=", "batch_size=", "methods=", "=3", "batch_size", "a=b=c"):
    CASES.add(_text, "refused", f"`{_text}`", partial(_option, option=_text))

RECIPES: dict[str, bytes] = {
    "a list": b"- a\n- b\n",
    "one word": b"words\n",
    "a number": b"3\n",
    "nothing": b"",
    "a date": b"2026-01-01\n",
    "unclosed brackets": b"methods: [\n",
    "a tab as indent": b"methods:\n\t- lora\n",
    "an object to be built": b"!!python/object/apply:os.system ['touch harmed']\n",
    "100,000 brackets": b"methods: " + b"[" * 100_000,
    "100,000 brackets, closed": b"methods: " + b"[" * 100_000 + b"]" * 100_000,
    "aliases that grow to 10^9 entries": b"\n".join(
        [b"a0: &a0 [x,x,x,x,x,x,x,x,x,x]"]
        + [b"a%d: &a%d [%s]" % (i, i, b",".join([b"*a%d" % (i - 1)] * 10)) for i in range(1, 9)]
        + [b"methods: *a8"]
    ),
    "an alias of itself": b"methods: &a [*a]\n",
    "one key twice": b"seed: 1\nseed: 2\n",
    "an unknown key": b"learning_rte: 1\n",
    "a number as a key": b"1: 2\n",
    "a list as a key": b"[1, 2]: 3\n",
    "null as a key": b"null: 3\n",
    "bytes that are no text": b"\xff\xfe\x00\x01\x80",
    "UTF-16": "seed: -1\n".encode("utf-16"),
    "a NUL byte": b"seed: \x00\n",
    "a NUL in the model's name": b'model: "a\\0b"\n',
    "a NUL in the data's name": b'data: "a\\0b"\n',
    "a NUL in the output's name": b'output: "a\\0b"\n',
    "a lone surrogate in the model's name": b'model: "\\ud800"\n',
    "a model's name of 5,000 letters": b"model: " + b"m" * 5000 + b"\n",
    "an output of 5,000 letters": b"output: " + b"o" * 5000 + b"\n",
    "format -5": b"format: -5\n",
    "format 3": b"format: 3\n",
    "format as text": b"format: '2'\n",
    "a method that is null": b"methods: [null]\n",
    "a method without a name": b"methods: [{keep_ratio: 0.3}]\n",
    "a method's name that is a list": b"methods: [{method: [wta_crs]}]\n",
    "a method's option that is unknown": b"methods: [{method: wta_crs, keep: 1}]\n",
    "a method twice": b"methods: [wta_crs, wta_crs]\n",
    "a method's sites that are a mapping": b"methods: [{method: wta_crs, sites: {a: b}}]\n",
    "a method's sites that are no list": b"methods: [{method: wta_crs, sites: 5}]\n",
    "sites with a bad expression": b"methods: [{method: wta_crs, sites: ['re:(']}]\n",
    "sites that nothing matches": b"methods: [{method: wta_crs, sites: [nowhere]}]\n",
    "a boolean for a ratio": b"methods: [{method: wta_crs, keep_ratio: true}]\n",
    "a ratio that is not finite": b"methods: [{method: wta_crs, keep_ratio: .nan}]\n",
    "a rank beyond 2^63": b"methods: [{method: lora, rank: 9223372036854775808}]\n",
    "another version of a method": b"methods: [{method: lora, version: 99}]\n",
    "a rival of 400 methods": b"compare: [[%s]]\n" % b",".join([b"lora"] * 400),
}


def _recipe(folder: Path, content: bytes, name: str = "recipe.yaml") -> str:
    arguments = write_inputs(folder)
    # What the file says wins.
    said = set(re.findall(r"\w+", content[:100].decode("latin1")))
    (folder / name).write_bytes(content)
    rest = [pair for pair in arguments[1:] if pair.partition("=")[0] not in said]
    try:
        return command("train", name, *rest)
    finally:
        assert not (folder / "harmed").exists()


for _what, _content in RECIPES.items():
    _tried = f"A recipe file with {_what}"
    if _what == "nothing":
        CASES.add(_what, "works", _tried, partial(_recipe, content=_content))
    else:
        CASES.add(_what, "refused", _tried, partial(_recipe, content=_content))

JSON_RECIPES: dict[str, bytes] = {
    "a list in JSON": b"[1]",
    "half of a file": b'{"format": 2, "seed"',
    "NaN": b'{"seed": NaN}',
    "100,000 brackets in JSON": b'{"methods": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "one key twice in JSON": b'{"seed": 1, "seed": 2}',
    "a lone surrogate in JSON": b'{"model": "\\ud800"}',
    "a number of 5,000 digits": b'{"seed": ' + b"9" * 5000 + b"}",
}
for _what, _content in JSON_RECIPES.items():
    run = partial(_recipe, content=_content, name="recipe.json")
    CASES.add(_what, "refused", f"A recipe file with {_what}", run)


@CASES.works
def recipe_with_a_byte_order_mark(folder: Path) -> str:
    """A recipe file that begins with a byte order mark and ends its lines with CR LF."""
    return _recipe(folder, b"\xef\xbb\xbfseed: 1\r\nepochs: 2\r\n")[:40]


@CASES.refused
def recipe_is_missing(folder: Path) -> None:
    """A recipe that is no file."""
    command("train", "recipe.yaml")


@CASES.refused
def recipe_is_a_folder(folder: Path) -> None:
    """A recipe that is a folder."""
    (folder / "recipe.yaml").mkdir()
    command("train", "recipe.yaml")


@CASES.refused
def recipe_is_a_pipe(folder: Path) -> None:
    """A recipe that is a pipe that nobody writes to."""
    os.mkfifo(folder / "recipe.yaml")
    command("train", "recipe.yaml")


@CASES.refused
def recipe_is_endless(folder: Path) -> None:
    """A recipe that is a device without an end."""
    command("train", "/dev/zero")


@CASES.refused
def two_recipes(folder: Path) -> None:
    """Two recipe files."""
    command("train", "a.yaml", "b.yaml")


@CASES.works
def plain(folder: Path) -> str:
    """A plain run of two steps."""
    command(*write_inputs(folder))
    assert (folder / "run" / "model" / "model.safetensors").is_file()
    return "trained"


def _output(folder: Path, output: str) -> str:
    (folder / "file").write_text("mine")
    (folder / "mine").mkdir()
    (folder / "mine" / "text").write_text("mine")
    return command(*write_inputs(folder, f"output={output}"))


for _where, _what in {
    "file": "is a file",
    "file/run": "lies below a file",
    "mine": "holds files of others",
    ".": "is the working folder",
    "/dev/null": "is a device",
    "/dev/null/run": "lies below a device",
    "/proc/run": "lies where nothing can be made",
    "model": "is the base model",
    "data": "is the data",
}.items():
    CASES.add(
        f"output={_where}", "refused", f"An output that {_what}", partial(_output, output=_where)
    )


@CASES.refused
def output_of_another_run_without_overwrite(folder: Path) -> None:
    """An output that holds a finished run."""
    command(*write_inputs(folder))
    command(*write_inputs(folder, "seed=1"))


@CASES.refused
def resume_of_nothing(folder: Path) -> None:
    """Resuming where no run is."""
    command(*write_inputs(folder, "resume=true"))


@CASES.refused
def resume_with_another_seed(folder: Path) -> None:
    """Resuming with another seed."""
    command(*write_inputs(folder))
    command(*write_inputs(folder, "resume=true", "seed=1"))


@CASES.refused
def resume_and_overwrite(folder: Path) -> None:
    """Both resume and overwrite."""
    command(*write_inputs(folder, "resume=true", "overwrite=true"))


@CASES.refused
def option_of_no_chosen_method(folder: Path) -> None:
    """An option of a method that is not chosen."""
    command(*write_inputs(folder, "keep_ratio=0.3"))


@CASES.refused
def option_of_two_methods(folder: Path) -> None:
    """An option that two chosen methods have."""
    command(*write_inputs(folder, "sites=linear"), "--method", "wta_crs", "--method", "lora")


@CASES.refused
def unknown_method(folder: Path) -> None:
    """A method with a typing error."""
    command(*write_inputs(folder), "--method", "wta_csr")


@CASES.refused
def misspelt_option(folder: Path) -> None:
    """An option with a typing error."""
    command(*write_inputs(folder, "batch_szie=3"))


DIVERGING = ("learning_rate=1e30", "max_steps=20", "max_grad_norm=0", "schedule=constant")


def _diverge(folder: Path, *options: str) -> None:
    """Train until the loss is not finite; check that nothing on disk is, and refuse as it did."""
    with raised() as said:
        command(*write_text_inputs(folder, *DIVERGING, *options), may_write=True)
    for path in folder.rglob("*.safetensors"):
        assert all(tensor.isfinite().all() for tensor in load_file(path).values()), path
    assert not list(folder.glob("run/model")) and not (folder / "run" / "metrics.json").exists()
    assert "step" in str(said[0])
    raise said[0]


for _what, _options in {
    "a checkpoint each step": ("save_steps=1",),
    "a checkpoint each epoch": (),
    "an evaluation each step": ("eval_steps=1",),
    "a rival": ("methods=[wta_crs]", "compare=baseline"),
    "the sampled method": ("methods=[wta_crs]",),
}.items():
    CASES.add(
        f"diverges, {_what}",
        "refused",
        f"Training that diverges, with {_what}",
        partial(lambda folder, options: _diverge(folder, *options), options=_options),
    )


@CASES.refused
def resume_from_nan(folder: Path) -> None:
    """Resuming from a checkpoint whose weights are NaN, and whose manifest vouches for them."""
    arguments = write_text_inputs(folder, "save_steps=1", "max_steps=3")
    command(*arguments)
    (folder / "run" / "metrics.json").unlink()
    shutil.rmtree(folder / "run" / "checkpoints" / "checkpoint-3")
    path = folder / "run" / "checkpoints" / "checkpoint-2" / "model.safetensors"
    tensors = load_file(path)
    save_file({name: t * float("nan") for name, t in tensors.items()}, path, {"format": "pt"})
    write_manifest(path.parent, "checkpoint")
    command(*arguments, "resume=true", may_write=True)


@CASES.works
def resume_of_a_diverged_run_ends_alike(folder: Path) -> str:
    """Resuming a run that diverged, which diverges again at the same step."""
    said = []
    for options in ((), ("resume=true",)):
        with raised() as found:
            arguments = write_text_inputs(folder, *DIVERGING, "save_steps=1", *options)
            command(*arguments, may_write=True)
        said.append(str(found[0]))
    assert said[0] == said[1], said
    return said[1]
