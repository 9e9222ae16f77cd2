"""Short trainings that run alike in one process, under DDP and under FSDP2."""

import copy
import os
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from integration.damage import CutOff
from models import MODELS, Batch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

import leantune as lt
from leantune.core.config import MethodConfig
from leantune.core.distributed import full_tensor, is_sharded, rank
from leantune.methods.sparse_grad.conversion import SparseGradConversion
from leantune.methods.spt_attention import attention as attention_module

NUM_STEPS = 5


def batch(kind: str, seed: int) -> Batch:
    """Make a batch whose two halves count alike in the mean loss."""
    made = MODELS[kind].batch(seed)
    if MODELS[kind].task == "generate":
        ids = made["input_ids"].clamp(min=3)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    return made


def part(whole_batch: Batch) -> Batch:
    """Take this process's rows of a batch: all of them in a lone process."""
    if not dist.is_initialized():
        return whole_batch
    return {name: t.chunk(dist.get_world_size())[rank()] for name, t in whole_batch.items()}


def shard(model: nn.Module, kind: str, of: str = "blocks") -> nn.Module:
    """Shard a model by FSDP2: every block and then the rest, or all at once."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for pattern in MODELS[kind].blocks if of == "blocks" else ():
        for block in model.get_submodule(pattern.removesuffix(".*")).children():
            fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def wrap(model: nn.Module, kind: str, how: str | None) -> nn.Module:
    if how is None:
        return model
    if how == "ddp":
        return DistributedDataParallel(model)
    return shard(model, kind, of="root" if how == "fsdp root" else "blocks")


def dropped_out(model: nn.Module, ratio: float) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = ratio
    return model


def sparse_grad(
    how: str | None = None,
    kind: str = "bert",
    *,
    calibrates: str = "before",
    rows: str = "same",
    dropout: float = 0.0,
    end: str | None = None,
    optimizer_options: dict[str, Any] | None = None,
    num_micro_batches: int = 1,
    **options: Any,
) -> dict[str, Any]:
    """Train a few steps and return parameters, bases and what else must be alike.

    Args:
        how: None, "ddp", "fsdp" or "fsdp root".
        calibrates: "before" or "after" the model is wrapped.
        rows: what each process is shown: the "same" batches or its "own" part of them.
        end: "merge" or "remove" before the values are read.
    """
    model = dropped_out(MODELS[kind].build().double(), dropout)
    torch.manual_seed(1000 + rank())
    fields = {"density": 0.1, "num_calibration_batches": 2, **options}
    session = lt.apply(model, lt.SparseGrad(**fields), seed=3)
    shown = [batch(kind, seed) for seed in (100, 101)]
    shown = shown if rows == "same" else [part(b) for b in shown]
    if calibrates == "before":
        session.calibrate(shown)
    wrapped = wrap(model, kind, how)
    if calibrates == "after":
        session.calibrate(shown)
    (change,) = session.conversions
    assert isinstance(change, SparseGradConversion)
    # A whole weight that the old module kept would undo what sharding saves.
    assert how != "fsdp" or all(is_sharded(swap.old.weight) for swap in change.swaps)
    optimizer = session.optimizer(torch.optim.AdamW, lr=0.02, **(optimizer_options or {}))
    for step in range(NUM_STEPS):
        for i in range(num_micro_batches):
            loss = wrapped(**part(batch(kind, num_micro_batches * step + i))).loss
            (loss / num_micro_batches).backward()
        optimizer.step()
        optimizer.zero_grad()
        session.on_step()
    named = dict(model.named_parameters())
    return {
        "bases": [rule.bases.q_out for rule in change.rules],
        "moments": {
            f"{name}:{key}": full_tensor(value).detach()
            for name, p in named.items()
            for key, value in optimizer.state.get(p, {}).items()
        },
        "values": values(session, end),
    }


def values(session: lt.Session, end: str | None = None) -> dict[str, Tensor]:
    """Return the model's whole state, after ``session.merge()`` or ``remove()`` if ``end`` says."""
    if end is not None:
        getattr(session, end)()
    return {n: full_tensor(v).detach().clone() for n, v in session.model.state_dict().items()}


def calibrated_start(
    method: MethodConfig, rows: str = "own", agrees: bool = True
) -> dict[str, Any]:
    """Calibrate a model under DDP, train a few steps, and return its state before and after.

    Args:
        rows: as for :func:`sparse_grad`.
        agrees: False lets each process keep the codebooks that it found, the control.
    """
    model = MODELS["bert"].build().double()
    session = lt.apply(model, method, seed=3)
    with warnings.catch_warnings():
        # The option has another name from torch 2.13 on.
        warnings.simplefilter("ignore", FutureWarning)
        # Buffers must agree without DDP's help: FSDP2 gives none.
        wrapped = DistributedDataParallel(model, broadcast_buffers=False)
    shown = [batch("bert", seed) for seed in (100, 101)]
    before = attention_module.broadcast
    if not agrees:
        attention_module.broadcast = lambda tensor: tensor
    session.calibrate(shown if rows == "same" else [part(b) for b in shown])
    attention_module.broadcast = before
    first = copy.deepcopy({**values(session), **session.state_dict()})
    optimizer = session.optimizer(torch.optim.AdamW, lr=0.02)
    for step in range(NUM_STEPS):
        loss = wrapped(**part(batch("bert", step))).loss + session.auxiliary_loss()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        session.on_step()
    return {"first": first, "last": {**values(session), **session.state_dict()}}


def sharded_order() -> dict[str, dict[str, Tensor]]:
    """Reorder hidden units, shard the model and load its own state; return it before and after.

    Under FSDP2 the session's order is taken on once more, by a state that has another.
    """
    model = MODELS["llama"].build()
    session = lt.apply(model, lt.RoutedFFN(split="coactivation"), seed=3)
    first = session.state_dict()
    session.calibrate([batch("llama", 100)])
    shard(model, "llama")
    session.load_state_dict(first)
    before = {n: full_tensor(p).detach().clone() for n, p in model.named_parameters()}
    state = model.state_dict()
    model.load_state_dict(state)
    after = {n: full_tensor(p).detach() for n, p in model.named_parameters()}
    return {"state": values(session), "before": before, "after": after}


def sampled_rows(
    how: str | None = None, rows: str = "own", keep_ratio: float = 0.3
) -> dict[str, dict[str, Tensor]]:
    """Train with WTA-CRS a few steps; return the first gradients, and the weights at the end.

    Args:
        how: None, "ddp" or "fsdp".
        rows: each process trains on its "own" part of the batches, or on the "same" ones.
    """
    model = MODELS["bert"].build().double()
    session = lt.apply(model, lt.WTACRS(keep_ratio=keep_ratio, min_rows=2), seed=3)
    wrapped = wrap(model, "bert", how)
    optimizer = session.optimizer(torch.optim.SGD, lr=0.1)
    gradients: dict[str, Tensor] = {}
    for step in range(NUM_STEPS):
        shown = batch("bert", step)
        wrapped(**(part(shown) if rows == "own" else shown)).loss.backward()
        if not gradients:
            named = [(n, p.grad) for n, p in model.named_parameters() if p.grad is not None]
            gradients = {n: full_tensor(grad).detach().clone() for n, grad in named}
        optimizer.step()
        optimizer.zero_grad()
        session.on_step()
    return {"gradients": gradients, "values": values(session)}


def measured_ratios() -> Tensor:
    """Return how WTA-CRS divides its rows after steps on this process's own part of the batches."""
    model = MODELS["bert"].build()
    config = lt.WTACRS(keep_ratio=0.3, min_rows=2, allocation="measured")
    session = lt.apply(model, config, seed=3)
    for step in range(16):
        model(**part(batch("bert", step))).loss.backward()
        session.on_step()
    return session.state_dict()["0.wta_crs/allocation/ratios"]


def save_sharded(folder: str) -> None:
    model = MODELS["bert"].build()
    session = lt.apply(model, lt.SparseGrad())
    shard(model, "bert")
    session.save(folder)


def forward_uncalibrated(method: MethodConfig) -> None:
    lt.apply(MODELS["bert"].build(), method).model(**batch("bert", 0))


def whole_and_resumed(options: Mapping[str, Any], whole: str, cut_off: str) -> None:
    """Train a recipe in one go; and once more, cut off and resumed."""
    # What torchrun tells each process; the group is there already.
    own, size = str(rank()), str(dist.get_world_size())
    os.environ.update(RANK=own, LOCAL_RANK=own, WORLD_SIZE=size, LOCAL_WORLD_SIZE=size)
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT="29500")
    lt.train(options, output=whole)
    try:
        lt.train(options, output=cut_off, callbacks=[CutOff(3)])
    except KeyboardInterrupt:
        lt.train(options, output=cut_off, resume=True)
