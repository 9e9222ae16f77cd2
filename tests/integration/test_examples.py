"""The examples run as they stand, and do what they say."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from integration.tiny import llama
from training.chats import chat_tokenizer, chats, write_lines

from leantune.training.recipe import RunRecipe

pytestmark = pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning")

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that runs an example's ``main``, imported as its folder's scripts are."""
    monkeypatch.syspath_prepend(str(EXAMPLES))

    def call(name: str, *values: Any, **options: Any) -> Any:
        spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module.main(*values, **options)

    yield call
    sys.modules.pop("toy", None)


def test_plain_loop(run: Any) -> None:
    losses = run("plain_loop")
    assert sum(losses[-5:]) < sum(losses[:5])


def test_checkpoint_and_sample(run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    before, after = run("checkpoint_and_sample", num_steps=3)
    assert after < before / 2
    assert "activations" in capsys.readouterr().out


def test_measure_before_you_train(run: Any) -> None:
    held = run("measure_before_you_train")
    names = [name.rpartition(".*.")[2] for linears in held for name in linears]
    assert names == ["attention.output.dense", "self_attn.o_proj"]


def test_fidelity_report(run: Any) -> None:
    assert run("fidelity_report") == {"systematic": False, "topk": True}


def test_trainer_full_finetune(run: Any) -> None:
    assert run("trainer_full_finetune") > 0.9


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
def test_trl_sft_lora_wta_crs(run: Any) -> None:
    assert "adapter_model.safetensors" in run("trl_sft_lora_wta_crs", num_steps=3)


def test_sparse_grad_block(run: Any) -> None:
    losses = run("sparse_grad_block")
    assert sum(losses[-5:]) < sum(losses[:5])


def test_routed_ffn(run: Any) -> None:
    assert run("routed_ffn", num_steps=5) < 1e-5


def test_ask(run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    llama().save_pretrained(tmp_path / "model")
    chat_tokenizer().save_pretrained(tmp_path / "model")
    lines = write_lines(tmp_path / "validation.jsonl", chats(2))
    model = str(tmp_path / "model")
    answers = run("ask", lines, model, model, num_tokens=3)
    assert len(answers) == 2 and answers[0] == answers[1]
    assert "the file: sad" in capsys.readouterr().out


@pytest.mark.slow
def test_fsdp2_torchrun() -> None:
    """Two processes on CPUs, started as the page says."""
    command = ["torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0"]
    done = subprocess.run(
        [sys.executable, "-m", *command, "--standalone", str(EXAMPLES / "fsdp2_torchrun.py")],
        capture_output=True,
        check=False,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "process 0: loss" in done.stdout and "process 1: loss" in done.stdout


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.yaml")), ids=lambda p: p.stem)
def test_recipes_can_be_read(path: Path) -> None:
    recipe = RunRecipe.read(path, {})
    assert recipe.methods and RunRecipe.from_dict(recipe.to_dict()) == recipe


def test_all_are_tested() -> None:
    names = {path.stem for path in EXAMPLES.glob("*.py")} - {"toy", "demo_data", "demo_llm_data"}
    tested = {name.removeprefix("test_") for name in globals() if name.startswith("test_")}
    assert names == tested - {"all_are_tested", "recipes_can_be_read"}
