"""The session: forwards counted, batch facts, conversions called, the exact computation."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from models import MODELS
from torch import Tensor, nn

import leantune as lt
from leantune.core import registry
from leantune.core.config import MethodConfig, option
from leantune.core.conversion import Conversion, SwapConversion
from leantune.core.registry import MethodSpec
from leantune.core.runtime import IGNORED_LABEL, BatchInfo
from leantune.errors import ConfigError, UnsupportedError

TINY = MODELS["bert"]


def grads(model: nn.Module) -> list[Tensor]:
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def make(**options: Any) -> tuple[nn.Module, lt.Session]:
    model = TINY.build()
    return model, lt.apply(model, lt.WTACRS(min_rows=2, **options))


def counted(session: lt.Session) -> int:
    return int(session._runtime.counter)


def test_training_forwards_only_are_counted() -> None:
    model, session = make()
    batch = TINY.batch()
    assert counted(session) == 0
    model(**batch)
    assert counted(session) == 1
    with torch.no_grad():
        model(**batch)
    model.eval()
    model(**batch)
    assert counted(session) == 1
    model.train()
    model(**batch)
    assert counted(session) == 2


def test_accumulated_micro_batches_draw_anew() -> None:
    model, _ = make(norms="activation")
    batch = TINY.batch()
    model(**batch).loss.backward()
    first = grads(model)
    model(**batch).loss.backward()
    second = [total - one for total, one in zip(grads(model), first, strict=True)]
    assert any(not torch.allclose(a, b) for a, b in zip(first, second, strict=True))


def test_two_forwards_before_their_backwards_keep_their_own_draws() -> None:
    """The order of the backwards does not matter."""
    results = []
    for order in ((0, 1), (1, 0)):
        model, _ = make(norms="activation")
        losses = [model(**TINY.batch(i)).loss for i in range(2)]
        for i in order:
            losses[i].backward()
        results.append(grads(model))
    assert all(torch.allclose(a, b, atol=1e-7) for a, b in zip(*results, strict=True))


def test_exact_runs_the_plain_computation() -> None:
    model, session = make()
    plain = TINY.build()
    batch = TINY.batch()
    plain(**batch).loss.backward()
    with session.exact():
        assert session._runtime.is_exact
        model(**batch).loss.backward()
    assert not session._runtime.is_exact
    assert all(torch.equal(a, b) for a, b in zip(grads(model), grads(plain), strict=True))
    with pytest.raises(RuntimeError), session.exact():
        raise RuntimeError
    assert not session._runtime.is_exact


def test_hooks_end_with_the_session() -> None:
    model, session = make()
    session.remove()
    model(**TINY.batch())
    assert counted(session) == 0 and not model._forward_hooks and not model._forward_pre_hooks
    session.remove()


def real_rows(batch: BatchInfo, shape: tuple[int, ...]) -> Tensor:
    mask = batch.real_rows(torch.Size((*shape, 16)))
    assert mask is not None
    return mask.view(shape)


def test_masks_of_a_classifier() -> None:
    model, session = make()
    batch = TINY.batch()
    model(**batch)
    wanted = batch["attention_mask"].bool()
    assert torch.equal(real_rows(session._runtime.batch, wanted.shape), wanted)
    assert torch.equal(real_rows(session._runtime.batch, (32,)), wanted.flatten())
    assert session._runtime.batch.real_rows(torch.Size((3, 2, 16))) is None


def test_masks_of_an_encoder_and_a_decoder_of_one_shape() -> None:
    first, second = torch.tensor([[1, 1, 0, 0]]), torch.tensor([[1, 0, 0, 1]])
    batch = BatchInfo.of({"attention_mask": first, "decoder_attention_mask": second})
    assert real_rows(batch, (1, 4)).tolist() == [[True, True, False, True]]


def test_padding_with_a_label_is_no_padding() -> None:
    tiny = MODELS["llama"]
    model = tiny.build()
    session = lt.apply(model, lt.WTACRS(min_rows=2))
    batch = tiny.batch()
    batch["labels"] = torch.full_like(batch["input_ids"], IGNORED_LABEL)
    batch["labels"][1, 6] = 5  # sample 1 has five real tokens
    model(**batch)
    wanted = batch["attention_mask"].bool()
    # Scored against its own label or, shifted, against the next one.
    wanted[1, 6] = wanted[1, 5] = True
    assert torch.equal(real_rows(session._runtime.batch, wanted.shape), wanted)


def test_batch_of_an_evaluation_does_not_replace_the_training_batch() -> None:
    model, session = make()
    model(**TINY.batch())
    held = session._runtime.batch
    model.eval()
    model(**TINY.batch(1))
    assert session._runtime.batch is held


def test_optimizer_takes_what_trains() -> None:
    model = TINY.build()
    session = lt.apply(model, lt.LoRA(rank=2))
    optimizer = session.optimizer(torch.optim.SGD, lr=0.5)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters() if p.requires_grad}
    assert optimizer.defaults["lr"] == 0.5
    model.requires_grad_(False)
    with pytest.raises(ConfigError, match="must have a trainable parameter, got none"):
        session.optimizer()


def test_auxiliary_losses_are_those_of_the_last_forward() -> None:
    model, session = make()
    assert session.auxiliary_loss().item() == 0.0
    terms = [2.0, 0.5]

    def add(*args: object) -> None:
        for term in terms:
            session._runtime.add_auxiliary_loss(torch.tensor(term))

    model.bert.register_forward_hook(add)
    model(**TINY.batch())
    assert session.auxiliary_loss().item() == 2.5
    terms.clear()
    model(**TINY.batch())
    assert session.auxiliary_loss().item() == 0.0


def test_auxiliary_loss_counts_inside_a_training_forward_only() -> None:
    """Outside lies the backward pass, where checkpointing runs blocks again."""
    model, session = make()
    model(**TINY.batch())
    session._runtime.add_auxiliary_loss(torch.tensor(2.0))
    assert session.auxiliary_loss().item() == 0.0
    model.bert.register_forward_hook(
        lambda *_: session._runtime.add_auxiliary_loss(torch.tensor(2.0))
    )
    with torch.no_grad():
        model(**TINY.batch())
    model.eval()(**TINY.batch())
    assert session.auxiliary_loss().item() == 0.0


def test_auxiliary_loss_without_a_graph_is_refused() -> None:
    model, session = make()

    def add(*args: object) -> None:
        with torch.no_grad():
            session._runtime.add_auxiliary_loss(torch.tensor(2.0))

    model.bert.register_forward_hook(add)
    with pytest.raises(UnsupportedError, match="auxiliary loss must have a gradient"):
        model(**TINY.batch())


class Noting(SwapConversion):
    """A conversion that notes what the session asks of it."""

    def __init__(self, names: list[str], num_calibration_batches: int) -> None:
        super().__init__([])
        self.names = names
        self.num_calibration_batches = num_calibration_batches
        self.calls: list[Any] = []

    def calibrate(self, batches: Iterable[Any]) -> None:
        self.calls.append(("calibrate", list(batches)))
        self.drawn = torch.rand(3)

    def on_step(self, step: int) -> None:
        self.calls.append(("on_step", step))

    def undo(self) -> None:
        self.calls.append("undo")

    def state_dict(self) -> dict[str, Tensor]:
        return {name: torch.tensor(i) for i, name in enumerate(self.names)}

    def load_state_dict(self, state) -> None:
        self.calls.append(("load", sorted(state)))


@pytest.fixture
def noting(monkeypatch: pytest.MonkeyPatch) -> type[MethodConfig]:
    """Register a method whose conversions note what they are asked."""
    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))

    @dataclass(frozen=True, kw_only=True)
    class Note(MethodConfig):
        method: ClassVar[str] = "note"
        batches: int = option(2, ge=0, help="how many batches calibration wants")

    def convert(model, sites, config, runtime) -> Conversion:
        return Noting([site.name for site in sites], config.batches)

    registry.register(
        MethodSpec(
            config=Note, axis="trained", roles=("linear",), summary="", source="", convert=convert
        )
    )
    return Note


def test_two_configs_of_one_method_calibrate_step_and_undo_once_each(noting) -> None:
    model = TINY.build()
    session = lt.apply(model, noting(sites="query"), noting(sites="key"))
    first, second = session.conversions
    assert [n.rpartition(".")[2] for c in (first, second) for n in c.names] == [
        "query",
        "query",
        "key",
        "key",
    ]
    session.calibrate(iter([("a",), ("b",)]))
    session.on_step()
    session.on_step()
    session.load_state_dict(session.state_dict())
    session.remove()
    calibrated = ("calibrate", [("a",), ("b",)])
    for conversion in (first, second):
        assert conversion.calls == [
            calibrated,
            ("on_step", 1),
            ("on_step", 2),
            ("load", sorted(conversion.names)),
            "undo",
        ]
    assert session.step == 2 and not session.conversions


def test_batches_are_not_even_read_where_nobody_asks(noting) -> None:
    session = lt.apply(TINY.build(), noting(batches=0))
    batches = iter(["a", "b"])
    session.calibrate(batches)
    assert next(batches) == "a" and session.conversions[0].calls == []


def test_conversions_are_undone_in_reverse(noting) -> None:
    session = lt.apply(TINY.build(), noting(sites="query"), noting(sites="key"))
    order: list[Any] = []
    for conversion in session.conversions:
        conversion.undo = lambda c=conversion: order.append(c)  # type: ignore[method-assign]
    wanted = session.conversions[::-1]
    session.remove()
    assert order == wanted


def test_an_undo_that_fails_leaves_the_rest_to_be_undone(noting) -> None:
    session = lt.apply(TINY.build(), noting(sites="query"), noting(sites="key"))
    first, second = session.conversions

    def fail() -> None:
        raise KeyboardInterrupt

    second.undo = fail  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        session.remove()
    del second.undo
    session.remove()
    assert first.calls == second.calls == ["undo"]


def test_ranks_draw_different_rows(monkeypatch) -> None:
    from leantune.core import runtime as runtime_module

    model, session = make()
    model(**TINY.batch())
    here = session._runtime.key(torch.device("cpu"))
    monkeypatch.setattr(runtime_module, "rank", lambda: 3)
    model(**TINY.batch())
    there = session._runtime.key(torch.device("cpu"))
    assert there.seed == here.seed + (3 << 32) and there.counter == here.counter + 1


def test_empty_batch_is_refused() -> None:
    model, _ = make()
    batch = {name: value[:0] for name, value in TINY.batch().items()}
    with pytest.raises(ConfigError, match=r"batch must hold at least one row, got .* \(0, "):
        model(**batch)


def test_calibration_neither_reads_nor_moves_the_callers_generators(noting) -> None:
    drawn: list[Tensor] = []
    for caller, seed in ((1, 0), (2, 0), (1, 1)):
        session = lt.apply(TINY.build(), noting(), seed=seed)
        torch.manual_seed(caller)
        before = torch.get_rng_state()
        session.calibrate([])
        assert torch.equal(torch.get_rng_state(), before)
        drawn.append(session.conversions[0].drawn)
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


@pytest.mark.parametrize("batches", [None, 3, "text", {"input_ids": torch.zeros(1)}, torch.ones(2)])
def test_what_is_no_list_of_batches_is_named(batches: Any) -> None:
    _, session = make()
    with pytest.raises(ConfigError, match=r"^session\.calibrate: batches must be a list of"):
        session.calibrate(batches)


@pytest.mark.parametrize("batch", [None, 3, "text", b"text"])
def test_what_is_no_batch_is_named(batch: Any, noting) -> None:
    session = lt.apply(TINY.build(), noting())
    with pytest.raises(ConfigError, match=r"^session\.calibrate: batches must each be what the"):
        session.calibrate([batch])
    assert session.conversions[0].calls == []


@pytest.mark.parametrize("kind", ["adam", None, nn.Linear, torch.optim, torch.optim.AdamW.step])
def test_what_is_no_optimiser_is_named(kind: Any) -> None:
    _, session = make()
    with pytest.raises(ConfigError, match=r"^session\.optimizer: kind must be a class of torch"):
        session.optimizer(kind)


@pytest.mark.parametrize("options", [{"lr": -1.0}, {"lr": "fast"}, {"no_such": 1}])
def test_options_that_the_optimiser_refuses_are_named(options: dict[str, Any]) -> None:
    _, session = make()
    with pytest.raises(ConfigError, match=r"^session\.optimizer: options must suit AdamW, got"):
        session.optimizer(torch.optim.AdamW, **options)


def test_a_state_is_taken_on_whole_or_not_at_all(noting) -> None:
    model = TINY.build()
    session = lt.apply(model, lt.WTACRS(min_rows=2), noting(sites="query"), seed=4)
    model(**TINY.batch()).loss.backward()
    session.on_step()
    good = session.state_dict()

    def refuse(state: Any) -> None:
        with pytest.raises(ConfigError, match=r"^(session|WTACRS): .* must "):
            session.load_state_dict(state)
        now = session.state_dict()
        assert now.keys() == good.keys() and all(torch.equal(now[k], good[k]) for k in good)

    other = {k: torch.ones_like(v) for k, v in good.items()}
    for state in (None, [], "state", {"counter": 3}, {3: torch.ones(())}, {}):
        refuse(state)
    for name in ("counter", "step", "seed"):
        refuse({k: v for k, v in other.items() if k != name})
        for value in (torch.ones(2, dtype=torch.int64), torch.tensor(1.0), torch.tensor(True)):
            refuse({**other, name: value})
    refuse({**other, "step": torch.tensor(-1)})
    refuse({**other, "7.lora/x": torch.ones(1)})
    norms = next(k for k in good if k.startswith("0.wta_crs/"))
    refuse({**other, norms: torch.full((3,), torch.nan)})
    session.load_state_dict({**good, "step": torch.tensor(5)})
    assert session.step == 5 and session.seed == 4


@pytest.mark.parametrize("folder", [None, 3, "", b"x", "a\0b"])
def test_what_is_no_path_is_named(folder: Any) -> None:
    _, session = make()
    with pytest.raises(ConfigError, match=r"^session\.save: folder must be a path, got"):
        session.save(folder)
    with pytest.raises(ConfigError, match=r"^load: folder must be a path, got"):
        lt.load(TINY.build(), folder)


def test_a_file_in_the_folders_place_is_named(tmp_path) -> None:
    _, session = make()
    (tmp_path / "file").write_text("mine")
    for call in (session.save, lambda folder: lt.load(TINY.build(), folder)):
        with pytest.raises(ConfigError, match=r"folder must be a folder, got .*, which is a file"):
            call(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


def test_two_linears_that_share_a_weight_save_and_load(tmp_path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
            self.b.weight = self.a.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.tanh(self.a(x)))

    def trained() -> tuple[nn.Module, lt.Session]:
        torch.manual_seed(0)
        model = Tied()
        return model, lt.apply(model, lt.WTACRS(min_rows=1, sites="linear"))

    model, session = trained()
    optimizer = session.optimizer(torch.optim.SGD, lr=0.1)
    model(torch.randn(6, 8)).square().sum().backward()
    optimizer.step()
    session.save(tmp_path / "saved")
    session.merge()
    other = Tied()
    lt.load(other, tmp_path / "saved").merge()
    x = torch.randn(3, 8)
    assert other.b.weight is other.a.weight and model.b.weight is model.a.weight
    assert torch.equal(other(x), model(x))
    with pytest.raises(lt.SiteError, match=r"must not be shared, got one that b has"):
        lt.apply(model, lt.SparseGrad(sites="linear"))
    assert all(p.requires_grad for p in model.parameters())
