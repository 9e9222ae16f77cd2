"""``python -m bench same-bits``: show that two versions of the source train to the same bits.

A change of structure must not change what is computed. Tiny random models train for a few steps
under every method, once with the source of an older commit and once with the source here; weights
are compared bit for bit. What a decision changed on purpose stands in :data:`EXPECTED`.

The file runs under both sources, so it imports nothing of ``bench`` and takes option names as they
come.
"""

import argparse
import dataclasses
import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

Methods = tuple[tuple[str, dict[str, Any]], ...]
Trained = dict[str, Tensor]

OLD = "c8965d4"
NUM_STEPS = 5
NUM_CALIBRATION = 2
ROOT = Path(__file__).parents[1]


class Decision(NamedTuple):
    """A change on purpose: why, and by how much a tensor may differ at most."""

    why: str
    at_most: float = float("inf")


THIN = Decision(
    "meProp is a hook on the output's gradient: products and column sums run over the columns that "
    "are zero, too, where they ran over the kept ones, and round in another order",
    at_most=1e-4,
)
DRAW = Decision(
    "rows are drawn without a sort of scores, in the order in which they come, one guess of norms "
    "serves all readers of a sample, and row masks are learned: other draws, as unbiased as before"
)
EXPECTED: dict[str, Decision] = {
    "meProp unified on BERT": THIN,
    "meProp unified on whole BERT": THIN,
    "meProp unified on GPT-2": THIN,
    "WTA-CRS": DRAW,
    "WTA-CRS, the paper's draws": DRAW,
    "WTA-CRS, cached norms": DRAW,
    "Checkpoint + WTA-CRS": DRAW,
    "LoRA + WTA-CRS": DRAW,
    "SparseGrad block + WTA-CRS": DRAW,
}
"""Case, or "case on model" -> the decision that changed its bits; all others must be equal."""

RENAMED = {"num_calibration_steps": "num_calibration_batches"}
"""Option of the old source -> its name here."""

WTA_CRS = {"keep_ratio": 0.3, "min_rows": 2}
SPARSE_GRAD = {"density": 0.1, "num_calibration_steps": NUM_CALIBRATION}
SPT = {"keep_ratio": 0.25, "min_keys": 3, "subspace_width": 2, "num_codewords": 4}

CASES: dict[str, Methods] = {
    "WTA-CRS": (("WTACRS", WTA_CRS),),
    "WTA-CRS, the paper's draws": (("WTACRS", {**WTA_CRS, "estimator": "wta"}),),
    "WTA-CRS, cached norms": (("WTACRS", {**WTA_CRS, "norms": "cache"}),),
    "Checkpoint": (("Checkpoint", {}),),
    "Checkpoint + WTA-CRS": (("Checkpoint", {}), ("WTACRS", WTA_CRS)),
    "LoRA": (("LoRA", {"rank": 4}),),
    "LoRA + WTA-CRS": (("LoRA", {"rank": 4}), ("WTACRS", WTA_CRS)),
    "SparseGrad block": (("SparseGrad", {**SPARSE_GRAD, "selection": "block"}),),
    "SparseGrad step": (("SparseGrad", {**SPARSE_GRAD, "selection": "step"}),),
    "SparseGrad block + WTA-CRS": (
        ("SparseGrad", {**SPARSE_GRAD, "selection": "block"}),
        ("WTACRS", WTA_CRS),
    ),
    "meProp unified": (("MeProp", {"keep_ratio": 0.2, "variant": "unified"}),),
    "meProp weight": (("MeProp", {"keep_ratio": 0.2, "variant": "weight"}),),
    "routed FFN": (("RoutedFFN", {"num_groups": 4, "num_active": 2, "split": "contiguous"}),),
    "routed FFN, coactivation": (
        ("RoutedFFN", {"num_groups": 4, "num_active": 2, "split": "coactivation"}),
    ),
    "SPT attention, the paper's score": (("SPTAttention", {**SPT, "scorer": "match"}),),
    "SPT attention": (("SPTAttention", {**SPT, "granularity": "token"}),),
}


def bert() -> nn.Module:
    """Make a tiny classifier."""
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=32,
    )
    return BertForSequenceClassification(config)


def gpt2() -> nn.Module:
    """Make a tiny decoder of Conv1D layers."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=64, n_embd=32, n_inner=64, n_layer=2, n_head=4, n_positions=32, use_cache=False
    )
    return GPT2LMHeadModel(config)


def llama() -> nn.Module:
    """Make a tiny decoder with gated MLPs and grouped key heads."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        use_cache=False,
    )
    return LlamaForCausalLM(config)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "BERT": bert,
    "whole BERT": bert,
    "GPT-2": gpt2,
    "Llama": llama,
}


def batches(model_name: str, has_ids: bool) -> Iterator[dict[str, Tensor]]:
    """Yield padded batches for BERT, full ones for whole BERT and for decoders."""
    ids = torch.arange(4)  # the very tensor each time, as in a loop over prepared batches
    for batch in _batches(model_name):
        yield batch | ({"sample_id": ids} if has_ids else {})


def _wants_ids(session: Any) -> bool:
    """Tell whether batches must carry sample ids; the session knew, now its conversions do."""
    if hasattr(session, "conversions"):
        return any(conversion.needs_sample_ids for conversion in session.conversions)
    return session.needs_sample_ids


def _batches(model_name: str) -> Iterator[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    while True:
        ids = torch.randint(3, 64, (4, 16), generator=generator)
        if "BERT" not in model_name:
            yield {"input_ids": ids, "labels": ids}
            continue
        shortest = 4 if model_name == "BERT" else 16
        lengths = torch.randint(shortest, 17, (4,), generator=generator)
        mask = (torch.arange(16) < lengths[:, None]).long()
        labels = torch.randint(0, 2, (4,), generator=generator)
        yield {"input_ids": ids * mask, "attention_mask": mask, "labels": labels}


def train(model_name: str, methods: Methods) -> Trained:
    """Train one model under one recipe; return losses, weights, and weights without the methods."""
    import leantune as lt

    torch.manual_seed(0)
    model = MODELS[model_name]()
    model.train()
    session = lt.apply(model, *[_config(lt, *method) for method in methods], seed=3)
    stream = batches(model_name, _wants_ids(session))
    session.calibrate([next(stream) for _ in range(NUM_CALIBRATION)])
    optimizer = session.optimizer(torch.optim.AdamW, lr=1e-2)
    out = {}
    torch.manual_seed(2)
    for step in range(NUM_STEPS):
        loss = model(**next(stream)).loss + session.auxiliary_loss()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        session.on_step()
        out[f"loss of step {step}"] = loss.detach()
    out |= {f"trained {k}": v.detach().clone() for k, v in model.named_parameters()}
    session.merge() if session.can_merge else session.remove()
    out |= {f"merged {k}": v.detach().clone() for k, v in model.named_parameters()}
    return out


def _config(lt: Any, name: str, options: dict[str, Any]) -> Any:
    """Make a config, each option under the name that this source knows."""
    kind = getattr(lt, name)
    known = {field.name for field in dataclasses.fields(kind)}
    return kind(**{k if k in known else RENAMED.get(k, k): v for k, v in options.items()})


def train_all(path: Path, source: Path) -> None:
    """Train every case with the ``leantune`` of ``source``; write tensors, and what failed."""
    import leantune

    assert Path(leantune.__file__).is_relative_to(source), (leantune.__file__, source)
    torch.set_num_threads(1)
    found, failed = {}, {}
    for name, model_name, methods in runs():
        try:
            trained = train(model_name, methods)
        except Exception as error:  # reported with the case, so that the others still run
            failed[name] = f"{type(error).__name__}: {error}"
            continue
        found.update({f"{name}: {key}": value.contiguous() for key, value in trained.items()})
    save_file(found, path, metadata=failed)


def runs() -> Iterator[tuple[str, str, Methods]]:
    """Yield name, model and methods of every training."""
    for case, methods in CASES.items():
        for model_name in MODELS:
            yield f"{case} on {model_name}", model_name, methods


def main(new: Path = ROOT / "src", old: str = OLD) -> None:
    """Train with both sources, print what differs, and exit with 1 where no decision says so.

    Args:
        new: folder that holds the package to check.
        old: commit whose source it is compared with.
    """
    with tempfile.TemporaryDirectory() as folder:
        archive = ["git", "-C", str(ROOT), "archive", old, "src"]
        packed = subprocess.run(archive, capture_output=True, check=True).stdout
        with tarfile.open(fileobj=BytesIO(packed)) as source:
            source.extractall(folder, filter="data")
        sources = Path(folder) / "src", new.resolve()
        paths = [Path(folder) / f"{name}.safetensors" for name in ("old", "new")]
        started = [_start(source, path) for source, path in zip(sources, paths, strict=True)]
        if any([process.wait() for process in started]):
            sys.exit("same-bits: a source failed to train, see above")
        before, after = map(_by_run, paths)
    sys.exit(report(before, after))


def _start(source: Path, path: Path) -> subprocess.Popen[bytes]:
    # -P: the folder of this file must not hide modules of others.
    command = [sys.executable, "-P", "-W", "ignore", __file__, "--train", str(path)]
    environment = os.environ | {"PYTHONPATH": str(source), "TRANSFORMERS_VERBOSITY": "error"}
    return subprocess.Popen([*command, "--source", str(source)], env=environment)


def _by_run(path: Path) -> dict[str, Trained | str]:
    """Read what one source trained: tensors by name, or an error's text, for every run."""
    out: dict[str, Trained | str] = {}
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        out.update(file.metadata() or {})
    for name, *_ in runs():
        start = f"{name}: "
        found = {k.removeprefix(start): v for k, v in tensors.items() if k.startswith(start)}
        out.setdefault(name, found)
    return out


def report(before: dict[str, Trained | str], after: dict[str, Trained | str]) -> int:
    """Print every difference with its decision, and return 1 if one lacks the other."""
    wrong, met = [], set()
    for case in CASES:
        for model_name in MODELS:
            name = f"{case} on {model_name}"
            difference, size = differs(before[name], after[name])
            if not difference:
                continue
            key = next((key for key in (name, case) if key in EXPECTED), None)
            if key is not None and size <= EXPECTED[key].at_most:
                met.add(key)
                print(f"decided: {name}: {difference}\n    {EXPECTED[key].why}")
            else:
                wrong.append(f"{name}: {difference}")
    wrong += [
        f"{key}: the same bits, though a decision was to change them: {EXPECTED[key].why}"
        for key in sorted(EXPECTED.keys() - met)
        if not any(line.startswith(key) for line in wrong)
    ]
    print(*(f"WRONG: {line}" for line in wrong), sep="\n", end="\n" if wrong else "")
    print(f"{len(before)} trainings of {NUM_STEPS} steps, {len(wrong)} unexplained")
    return int(bool(wrong))


def differs(old: Trained | str, new: Trained | str) -> tuple[str, float]:
    """Say what differs ("" where nothing does) and by how much at most.

    A parameter with another name is compared after the methods are merged.
    """
    if isinstance(old, str) or isinstance(new, str):
        text = {"old": old, "new": new}
        failed = [f"{k} source fails: {v}" for k, v in text.items() if isinstance(v, str)]
        return "; ".join(failed), float("nan")
    only = [key for key in old.keys() ^ new.keys() if not key.startswith("trained ")]
    if only:
        return f"only one source has {min(only)}", float("nan")
    wrong = [key for key in old if key in new and not _same(old[key], new[key])]
    if not wrong:
        return "", 0.0
    if any(old[key].shape != new[key].shape for key in wrong):
        return f"another shape, first {wrong[0]}", float("nan")
    worst = max(float((old[key].double() - new[key].double()).abs().max()) for key in wrong)
    return f"{len(wrong)} of {len(old)} tensors, first {wrong[0]}, by up to {worst:.1e}", worst


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and a.numpy().tobytes() == b.numpy().tobytes()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--train", type=Path)
    parser.add_argument("--source", type=Path, default=ROOT / "src")
    args = parser.parse_args()
    if args.train is None:
        main(args.source)
    else:
        train_all(args.train, args.source)
