"""Sampled gradients are compared while a trainer trains: unchanged training, bad sites caught."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from integration.tiny import bert, make_trainer, same, token_rows, weights

import leantune as lt
from leantune.measure import running
from leantune.ops.rows import KeptRows
from leantune.training.results import RunResult

FIRST = "bert.encoder.layer.0.intermediate.dense"
SAMPLED = lt.WTACRS(keep_ratio=0.3, min_rows=2)


def train(
    folder: Path,
    method: Any = SAMPLED,
    *,
    resume: str | None = None,
    max_steps: int = 12,
    **how: Any,
) -> tuple[dict[str, torch.Tensor], lt.Session, list[Any]]:
    """Train a tiny BERT; return its weights, the session and what was logged of fidelity."""
    session = lt.apply(bert(), *(method if isinstance(method, list) else [method]))
    callback = lt.TrainerCallback(session, **how)
    options = {"save_strategy": "steps", "save_steps": max_steps // 2, "learning_rate": 1e-3}
    trainer = make_trainer(session.model, folder, [callback], max_steps=max_steps, **options)
    trainer.train(resume_from_checkpoint=resume)
    found = [entry for entry in trainer.state.log_history if "fidelity" in entry]
    return weights(session.model), session, found


def sampled_sites(session: lt.Session) -> int:
    return sum(len(c.sites) for c in session.conversions if c.config.method == "wta_crs")


METHODS = {
    "in forward": SAMPLED,
    "in backward": lt.WTACRS(keep_ratio=0.3, min_rows=2, draw_at="backward"),
    "recomputed": [SAMPLED, lt.Checkpoint()],
    "of factors": [SAMPLED, lt.LoRA(rank=4)],
    "in a subspace": [SAMPLED, lt.SparseGrad(density=0.1, num_calibration_batches=2)],
}


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_training_is_the_same_to_the_bit(tmp_path: Path, method: Any) -> None:
    expected, _, nothing = train(tmp_path / "a", method, max_steps=8)
    got, session, found = train(tmp_path / "b", method, max_steps=8, fidelity_steps=4)
    assert same(got, expected) and nothing == []
    assert [entry["step"] for entry in found] == [4, 8]
    # A factor whose gradient is 0 in the first step has no figures before the next.
    assert len(found[-1]["fidelity"]) == sampled_sites(session)
    figures = list(found[-1]["fidelity"].values())
    assert all(0 <= f["relative_variance"] < 50 and 0 < f["cosine"] < 1.01 for f in figures)
    # In backward it is known that few rows of the last block have a gradient: those are kept.
    assert sum(f["relative_variance"] > 0.01 for f in figures) >= len(figures) / 3
    assert not any(isinstance(m, running._Compared) for m in policies(session).values())


def policies(session: lt.Session) -> dict[str, Any]:
    return {n: m.rows for n, m in session.model.named_modules() if hasattr(m, "rows")}


def test_figures_are_those_of_the_gradients(tmp_path: Path) -> None:
    """One check by hand: the exact gradient of the same batch, and the one that was drawn."""
    session = lt.apply(bert(dropout=0.0), SAMPLED)
    watch = running.RunningFidelity(session.model, 1, 1)
    batch = token_rows().with_format("torch")[:8]
    watch.begin_step(0)
    session.model(**batch).loss.backward()
    watch.end_step()
    grads = {n: p.grad for n, p in session.model.named_parameters()}
    session.model.zero_grad()
    with session.exact():
        session.model(**batch).loss.backward()
    name = f"{FIRST}.weight"
    drawn, exact = grads[name], session.model.get_parameter(name).grad
    assert drawn is not None and exact is not None
    error, figures = drawn - exact, watch.figures()[FIRST]
    variance = float(error.square().sum() / exact.square().sum())
    assert figures["relative_variance"] == pytest.approx(variance, rel=1e-3) and variance > 0.01
    cosine = torch.cosine_similarity(drawn.flatten(), exact.flatten(), dim=0)
    assert figures["cosine"] == pytest.approx(float(cosine), abs=1e-4)
    assert figures["z_score"] == torch.sign((error * exact).sum())


LONG: dict[str, Any] = {"max_steps": 100, "fidelity_steps": 1}


def test_an_unbiased_sampler_raises_no_alarm(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        _, _, found = train(tmp_path, **LONG)
    scores = [figures["z_score"] for figures in found[-1]["fidelity"].values()]
    assert max(map(abs, scores)) < 6


def test_a_biased_sampler_is_caught_and_made_exact(tmp_path: Path) -> None:
    biased = lt.WTACRS(keep_ratio=0.3, min_rows=2, estimator="topk")
    with pytest.warns(RuntimeWarning, match="gradient looks bad, z-score") as caught:
        _, session, _ = train(tmp_path / "a", biased, **LONG)
    messages = [str(w.message) for w in caught if "gradient looks bad" in str(w.message)]
    assert len(messages) == len(set(messages)) > 3 and None not in policies(session).values()
    with pytest.warns(RuntimeWarning, match="it is exact from now on"):
        got, session, _ = train(tmp_path / "b", biased, on_bad_site="exact", **LONG)
    num_exact = sum(rows is None for rows in policies(session).values())
    assert 3 < num_exact <= sampled_sites(session)
    # A stopped run knows what it had found, and ends with the same bits.
    half = str(tmp_path / "b" / "checkpoint-50")
    with pytest.warns(RuntimeWarning, match="it is exact from now on"):
        resumed, session, _ = train(
            tmp_path / "b", biased, resume=half, on_bad_site="exact", **LONG
        )
    assert same(got, resumed)
    assert sum(rows is None for rows in policies(session).values()) == num_exact
    session.merge()


def test_weights_that_are_too_large_are_caught(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from leantune.methods.wta_crs.policy import SampledRows

    honest = SampledRows._sample

    def heavy(self: Any, *args: Any) -> KeptRows:
        kept = honest(self, *args)
        return kept._replace(weights=2 * kept.weights)  # type: ignore[operator]

    monkeypatch.setattr(SampledRows, "_sample", heavy)
    with pytest.warns(RuntimeWarning, match=r"z-score of its bias [67]\.\d, by chance within 6"):
        train(tmp_path, **LONG)


def test_a_variance_beyond_the_bound_is_caught(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(running, "MOST_VARIANCE", 0.01)
    with pytest.warns(RuntimeWarning, match="gradient looks bad, relative variance"):
        train(tmp_path, fidelity_steps=1)


def test_a_step_that_failed_leaves_nothing_behind(tmp_path: Path) -> None:
    class Fail(transformers.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 1:
                raise ZeroDivisionError

    session = lt.apply(bert(), SAMPLED)
    callback = lt.TrainerCallback(session, fidelity_steps=1)
    fail = Fail()
    trainer = make_trainer(session.model, tmp_path, [fail, callback], max_steps=2)
    with pytest.raises(ZeroDivisionError):
        trainer.train()
    assert any(isinstance(m, running._Compared) for m in policies(session).values())
    trainer.remove_callback(fail)
    trainer.train()
    assert not any(isinstance(m, running._Compared) for m in policies(session).values())


@pytest.mark.parametrize("how", [{"fidelity_steps": 0}, {"on_bad_site": "stop"}])
def test_bad_options_are_named(how: dict[str, Any]) -> None:
    with pytest.raises(lt.ConfigError, match="fidelity_steps must be at least 1 and on_bad_site"):
        lt.TrainerCallback(lt.apply(bert(), SAMPLED), **how)


def test_a_run_reports_it_for_the_variants_that_sample(
    model_folder: Path, data_folder: Path, tmp_path: Path
) -> None:
    options = {"model": str(model_folder), "task": "text", "data": str(data_folder)}
    options |= {"output": str(tmp_path / "run"), "epochs": 1, "batch_size": 8, "max_length": 32}
    lt.train(options, methods=[SAMPLED], compare=["baseline", lt.LoRA()], fidelity_steps=2)
    plain, exact, sampled = RunResult.read(tmp_path / "run").runs
    assert plain.fidelity == exact.fidelity == [] and [
        entry["step"] for entry in sampled.fidelity
    ] == [2, 4]
    sites = sampled.fidelity[-1]["sites"]
    assert FIRST in sites and sites[FIRST].keys() == {"relative_variance", "cosine", "z_score"}
