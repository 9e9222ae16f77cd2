"""Two processes: they agree to the bit with one another, and with one process to rounding."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from integration.rank_runs import (
    calibrated_start,
    forward_uncalibrated,
    measured_ratios,
    sampled_rows,
    save_sharded,
    sharded_order,
    sparse_grad,
    whole_and_resumed,
)
from integration.tiny import same
from models import MODELS
from ranks import Ranks
from safetensors.torch import load_file
from torch import distributed as dist
from training.chats import chats, run_options

import leantune as lt
from leantune.core.disk import read_json
from leantune.core.manifest import MANIFEST_FILE

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="needs torch built with gloo"
)


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    pool = Ranks()
    yield pool
    pool.close()


def agree(a: Any, b: Any) -> bool:
    """Whether two nested results are equal to the bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(agree(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(agree, a, b))
    return a is b if a is None else torch.equal(a, b)


def both(ranks: Ranks, call: Any, *args: Any, **options: Any) -> Any:
    """Return one rank's result, which must be the other's, too."""
    one, other = ranks.run(call, *args, **options)
    for key in one:
        assert agree(one[key], other[key]), key
    return one


def check_close(got: dict, wanted: dict) -> None:
    for part in ("values", "moments"):
        assert got[part].keys() == wanted[part].keys()
        for name, value in wanted[part].items():
            torch.testing.assert_close(got[part][name], value, rtol=1e-7, atol=1e-9, msg=name)


def check_trained(run: dict) -> None:
    """The control: entries have moved."""
    moved = [v for n, v in run["values"].items() if n.endswith(".delta")]
    assert len(moved) == 4 and all(bool((v.abs() > 1e-3).any()) for v in moved)


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_two_halves_train_as_the_whole_batch(ranks: Ranks, how: str) -> None:
    wanted = sparse_grad()
    check_trained(wanted)
    check_close(both(ranks, sparse_grad, how), wanted)


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_transposed_weights_and_micro_batches(ranks: Ranks, how: str) -> None:
    wanted = sparse_grad(kind="gpt2", num_micro_batches=2)
    got = both(ranks, sparse_grad, how, kind="gpt2", num_micro_batches=2)
    check_close(got, wanted)


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_a_fused_optimizers_steps_reach_the_weights(ranks: Ranks, how: str) -> None:
    fused = {"optimizer_options": {"fused": True}}
    wanted = sparse_grad(**fused)
    check_close(both(ranks, sparse_grad, how, **fused), wanted)


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_calibration_of_the_wrapped_model_is_the_same(ranks: Ranks, how: str) -> None:
    check_close(both(ranks, sparse_grad, how, calibrates="after"), sparse_grad())


def test_own_rows_and_dropout_give_all_ranks_one_basis(ranks: Ranks) -> None:
    """Each process calibrates on other rows, after DDP has sent the first one's parameters."""
    options = {"calibrates": "after", "rows": "own", "dropout": 0.2}
    got = both(ranks, sparse_grad, "ddp", **options)
    assert not agree(got["bases"], sparse_grad()["bases"])


@pytest.mark.parametrize("end", ["merge", "remove"])
def test_plain_modules_come_back_in_shards(ranks: Ranks, end: str) -> None:
    """The old module follows the weight into its shards, and holds no whole one meanwhile."""
    wanted = sparse_grad(end=end)["values"]
    got = both(ranks, sparse_grad, "fsdp", end=end)["values"]
    assert got.keys() == wanted.keys() and not any("delta" in name for name in got)
    for name, value in wanted.items():
        torch.testing.assert_close(got[name], value, rtol=1e-7, atol=1e-9, msg=name)


def test_a_model_sharded_all_at_once_trains_as_any_other(ranks: Ranks) -> None:
    check_close(both(ranks, sparse_grad, "fsdp root"), sparse_grad())


def moved(run: dict, word: str) -> bool:
    names = [n for n in run["first"] if word in n]
    return bool(names) and not any(torch.equal(run["first"][n], run["last"][n]) for n in names)


SPT = lt.SPTAttention(min_keys=3, subspace_width=2, num_codewords=4)


@pytest.mark.parametrize("rows", ["same", "own"])
def test_codebooks_start_alike_and_stay(ranks: Ranks, rows: str) -> None:
    run = both(ranks, calibrated_start, SPT, rows)
    books = [n for n in run["first"] if n.endswith(".codebooks")]
    assert books and all(torch.equal(run["first"][n], run["last"][n]) for n in books)
    one, other = ranks.run(calibrated_start, SPT, rows, agrees=False)
    assert agree(one["first"], other["first"]) is (rows == "same")


@pytest.mark.parametrize("split", ["contiguous", "coactivation"])
def test_routers_and_groups_start_alike(ranks: Ranks, split: str) -> None:
    method = lt.RoutedFFN(num_groups=4, num_active=2, split=split)
    assert moved(both(ranks, calibrated_start, method, "own"), "router.weight")


def test_sharded_state_keeps_the_original_order_of_units(ranks: Ranks) -> None:
    got = both(ranks, sharded_order)
    plain = MODELS["llama"].build().state_dict()
    assert all(torch.equal(got["state"][name], value) for name, value in plain.items())
    assert agree(got["before"], got["after"])
    moved = "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(got["before"][moved], plain[moved])


def test_codebooks_must_be_calibrated_first(ranks: Ranks) -> None:
    with pytest.raises(AssertionError, match=r"codebooks must be calibrated before .*calibrate\("):
        ranks.run(forward_uncalibrated, SPT)


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_sampled_gradients_are_averaged(ranks: Ranks, how: str) -> None:
    got = both(ranks, sampled_rows, how)
    start, exact = MODELS["bert"].build().double().state_dict(), sampled_rows(keep_ratio=1.0)
    name = "bert.encoder.layer.0.attention.self.query.weight"
    assert not torch.equal(got["values"][name], start[name])
    # Biases and norms are exact in the first step; two halves count as the whole batch.
    for kind, is_exact in (("query.bias", True), ("query.weight", False)):
        name = f"bert.encoder.layer.0.attention.self.{kind}"
        a, b = got["gradients"][name], exact["gradients"][name]
        assert torch.allclose(a, b, rtol=1e-7, atol=1e-12) == is_exact


@pytest.mark.parametrize(("keep_ratio", "differs"), [(0.3, True), (1.0, False)])
def test_ranks_draw_different_rows(ranks: Ranks, keep_ratio: float, differs: bool) -> None:
    """Of the same batch, without an average over the processes."""
    runs = ranks.run(sampled_rows, rows="same", keep_ratio=keep_ratio)
    name = "bert.encoder.layer.0.attention.self.query.weight"
    one, other = (run["gradients"][name] for run in runs)
    assert torch.equal(one, other) != differs


def test_ranks_divide_their_rows_alike(ranks: Ranks) -> None:
    """Each sees other batches; what sampling costs is summed."""
    one, other = ranks.run(measured_ratios)
    assert torch.equal(one, other) and one.unique().numel() > 1


def test_a_sharded_session_is_not_saved(ranks: Ranks, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"session\.save: parameters must be whole"):
        ranks.run(save_sharded, str(tmp_path / "saved"))
    assert not any(tmp_path.iterdir())


def test_sparse_gradients_are_refused(ranks: Ranks) -> None:
    with pytest.raises(AssertionError, match=r"selection must be 'block' in .*got 'step'"):
        ranks.run(sparse_grad, "ddp", selection="step")


@pytest.mark.slow
@pytest.mark.parametrize("task", ["text", "chat"])
# peft asks transformers for names that transformers is about to drop.
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")
def test_a_run_of_two_processes_is_resumed(base: dict[str, Any], tmp_path: Path, task: str) -> None:
    """Each process goes on from a state of its own, and the manifest vouches for both."""
    sampled = lt.WTACRS(keep_ratio=0.3, min_rows=2)
    if task == "chat":
        pytest.importorskip("trl", reason="trl is not installed")
        (tmp_path / "chats").mkdir()
        packed = {"packing": True, "max_length": 24, "batch_size": 1}
        base = {**run_options(tmp_path / "chats", chats), **packed}
        base["methods"] = [lt.LoRA(rank=4), sampled]
    else:
        base |= {"methods": [sampled], "batch_size": 4}
    options = {**base, "max_steps": 4, "save_steps": 2, "eval_steps": 2}
    whole, cut_off = tmp_path / "whole", tmp_path / "cut off"
    # Processes of its own: accelerate keeps what it saw of a process's first environment.
    pool = Ranks()
    try:
        pool.run(whole_and_resumed, options, str(whole), str(cut_off))
    finally:
        pool.close()
    states = {f"leantune_session_{number}.safetensors" for number in range(2)}
    for step in (2, 4):
        checkpoint = cut_off / "checkpoints" / f"checkpoint-{step}"
        assert states <= read_json(checkpoint / MANIFEST_FILE)["files"].keys()
    a, b = (load_file(run / "model" / "model.safetensors") for run in (whole, cut_off))
    assert same(a, b)
