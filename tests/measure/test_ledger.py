"""The ledger against integers computed by hand."""

import json
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from leantune.errors import ConfigError, UnsupportedError
from leantune.measure.ledger import Ledger, ledger

FLOAT = 4


class Fork(nn.Module):
    """Three bias-free linears that read one tensor."""

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.up = nn.Linear(2, d_model)
        self.q, self.k, self.v = (nn.Linear(d_model, d_model, bias=False) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(x)
        return self.q(x) + self.k(x) + self.v(x)


class Block(nn.Module):
    """One attention block written out, and its MLP."""

    def __init__(self, d_model: int, num_heads: int, d_hidden: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.up = nn.Linear(2, d_model)
        self.norm = nn.LayerNorm(d_model)
        self.qkv = nn.Linear(d_model, 3 * d_model)
        self.out = nn.Linear(d_model, d_model)
        self.mlp = nn.Sequential(nn.Linear(d_model, d_hidden), nn.GELU())
        self.down = nn.Linear(d_hidden, d_model)

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(x)  # (b, t, d)
        b, t, d = x.shape
        qkv = self.qkv(self.norm(x)).view(b, t, 3, self.num_heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (b, h, t, d / h)
        p = torch.softmax(q @ k.mT, dim=-1)
        x = x + self.out((p @ v).transpose(1, 2).reshape(b, t, d))
        return x + self.down(self.mlp(x))


class Wrapped(nn.Module):
    """Calls a function on the output of a linear, so that its input is no batch input."""

    def __init__(self, function: Any, d_model: int = 8) -> None:
        super().__init__()
        self.up = nn.Linear(2, d_model)
        self.inner = _Call(function)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(self.up(x))


class _Call(nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class SaveView(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward((x * 2)[:1])
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0]


class Hide(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.kept = {"doubled": (x * 2, x.new_zeros(3))}
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0]


def _hide_sigmoid(x: Tensor) -> Tensor:
    return Hide.apply(x.sigmoid())  # type: ignore[no-any-return]


def _widen(packed: tuple[Tensor, str]) -> Tensor:
    return packed[0].float()


def saved(book: Ledger) -> dict[tuple[str, str], int]:
    """Return bytes of activations by (module, kind), batch inputs left out."""
    sums: dict[tuple[str, str], int] = {}
    for entry in book.entries:
        if entry.ledger == "activations" and entry.kind != "batch input":
            key = (entry.module, entry.kind)
            sums[key] = sums.get(key, 0) + entry.num_bytes
    return sums


def test_three_linears_on_one_input_keep_it_once() -> None:
    book = ledger(Fork(32), torch.randn(20, 2))
    assert saved(book) == {("q", "linear input"): 20 * 32 * FLOAT}
    assert book.batch_inputs == 20 * 2 * FLOAT
    assert book.activations == 2560 + 160
    (entry,) = [e for e in book.entries if e.kind == "linear input"]
    assert [h.module for h in entry.holders] == ["q", "k", "v"]
    assert [book.saved_bytes(name) for name in ("q", "k", "v", "up", "")] == [
        2560,
        2560,
        2560,
        160,
        2720,
    ]


def test_every_term_of_a_transformer_block() -> None:
    b, t, d, h, hidden = 2, 5, 8, 2, 12
    book = ledger(Block(d, h, hidden), torch.randn(b, t, 2))
    n = b * t
    assert saved(book) == {
        # the input of the norm, and mean and reciprocal deviation of each row
        ("norm", "norm"): (n * d + 2 * n) * FLOAT,
        ("qkv", "linear input"): n * d * FLOAT,
        # q, k and v are copied to be contiguous in heads; the softmax saves its output, which
        # the second product shares
        ("", "matmul"): 3 * n * d * FLOAT,
        ("", "softmax"): b * h * t * t * FLOAT,
        ("out", "linear input"): n * d * FLOAT,
        ("mlp.0", "linear input"): n * d * FLOAT,
        ("mlp.1", "activation function"): n * hidden * FLOAT,
        ("down", "linear input"): n * hidden * FLOAT,
    }
    numel = sum(p.numel() for p in Block(d, h, hidden).parameters())
    assert book.weights == book.gradients == numel * FLOAT
    assert book.by_module(1, ledger="activations")["mlp"] == (n * d + n * hidden) * FLOAT
    assert book.by_module(0) == {"": book.total}
    assert book.total == book.weights + book.gradients + book.optimizer + book.activations


def test_a_view_keeps_its_whole_storage() -> None:
    book = ledger(Wrapped(SaveView.apply), torch.randn(6, 2))
    assert saved(book) == {("inner", "SaveView"): 6 * 8 * FLOAT}
    (entry,) = [e for e in book.entries if e.kind == "SaveView"]
    assert entry.shape == (1, 8)


def test_tensors_hidden_on_ctx_are_counted_at_their_module() -> None:
    book = ledger(Wrapped(Hide.apply), torch.randn(6, 2))
    assert saved(book) == {("inner", "hidden on ctx"): (6 * 8 + 3) * FLOAT}


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpoint_keeps_its_input_and_nothing_inside(use_reentrant: bool) -> None:
    torch.manual_seed(0)
    mlp = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
    x = torch.randn(6, 2)

    model = Wrapped(lambda y: checkpoint(mlp, y, use_reentrant=use_reentrant))
    model.mlp = mlp
    book = ledger(model, x)
    assert saved(book) == {("inner", "checkpoint input"): 6 * 8 * FLOAT}
    assert book.gradients == sum(p.numel() for p in model.parameters()) * FLOAT

    plain = Wrapped(mlp)
    assert sum(saved(ledger(plain, x)).values()) == 6 * (8 + 16 + 16) * FLOAT


def test_hidden_tensors_inside_a_checkpoint_are_still_held() -> None:
    model = Wrapped(lambda y: checkpoint(_hide_sigmoid, y, use_reentrant=False))
    book = ledger(model, torch.randn(6, 2))
    assert saved(book) == {
        ("inner", "checkpoint input"): 6 * 8 * FLOAT,
        ("inner", "hidden on ctx"): (6 * 8 + 3) * FLOAT,
    }


def test_inner_pack_hooks_are_counted_as_what_they_made() -> None:
    def compress(x: Tensor) -> Tensor:
        with torch.autograd.graph.saved_tensors_hooks(lambda t: (t.half(), "meta"), _widen):
            return x.sigmoid()

    book = ledger(Wrapped(compress), torch.randn(6, 2))
    assert saved(book) == {("inner", "activation function"): 6 * 8 * 2}


def test_a_dropped_branch_holds_nothing() -> None:
    class Branches(nn.Module):
        def __init__(self, returned: bool) -> None:
            super().__init__()
            self.up = nn.Linear(2, 8)
            self.returned = returned

        def forward(self, x: Tensor) -> Any:
            y = self.up(x)
            branch = y.exp()
            return (y, branch) if self.returned else y

    x = torch.randn(6, 2)
    assert saved(ledger(Branches(False), x)) == {}
    assert saved(ledger(Branches(True), x)) == {("", "elementwise"): 6 * 8 * FLOAT}


def test_a_branch_lost_in_a_reference_cycle_holds_nothing() -> None:
    def lose(y: Tensor) -> Tensor:
        cycle = [y.exp()]
        cycle.append(cycle)  # type: ignore[arg-type]
        return y.clone()

    assert saved(ledger(Wrapped(lose), torch.randn(6, 2))) == {}


def test_nothing_outlives_the_measurement() -> None:
    kept: list[weakref.ref[Tensor]] = []

    def watch(y: Tensor) -> Tensor:
        y = y.exp().sigmoid()
        kept.append(weakref.ref(y))
        return y

    ledger(Wrapped(watch), torch.randn(6, 2))
    assert kept[0]() is None


def test_ties_buffers_and_frozen_weights_are_weights_once() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(10, 8)
            self.head = nn.Linear(8, 10, bias=False)
            self.head.weight = self.embed.weight
            self.register_buffer("scale", torch.ones(8))
            self.frozen = nn.Parameter(torch.ones(8), requires_grad=False)

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(self.embed(ids) * self.scale * self.frozen)

    ids = torch.arange(6)
    book = ledger(Tied(), {"ids": ids})
    assert book.weights == (80 + 8 + 8) * FLOAT
    assert book.gradients == 80 * FLOAT
    assert saved(book) == {("head", "linear input"): 6 * 8 * FLOAT}
    assert book.batch_inputs == 6 * 8
    assert book.by_kind(ledger="weights") == {
        "parameter": 320,
        "buffer": 32,
        "frozen parameter": 32,
    }
    tied = next(e for e in book.entries if e.kind == "parameter")
    assert [h.module for h in tied.holders] == ["embed", "head"]


def test_sparse_gradients_count_indices_and_values() -> None:
    model = nn.Embedding(50, 8, sparse=True)
    book = ledger(model, torch.tensor([1, 4, 7]))
    assert book.by_kind(ledger="gradients") == {"sparse gradient": 3 * 8 + 3 * 8 * FLOAT}
    assert book.optimizer == 2 * 50 * 8 * FLOAT


def test_autocast_copies_of_weights_have_a_kind_of_their_own() -> None:
    model = nn.Sequential(nn.Linear(2, 8), nn.Linear(8, 8))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        book = ledger(model, torch.randn(6, 2))
    kinds = book.by_kind(ledger="activations")
    # the first linear's input needs no gradient, so that only the second keeps its weight
    assert kinds == {"linear weight copy": 8 * 8 * 2, "linear input": 6 * (2 + 8) * 2}


def test_dropout_and_activations_in_modules_are_named() -> None:
    model = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 3))
    book = ledger(model, (torch.randn(6, 2),))
    assert saved(book) == {
        ("1", "activation function"): 6 * 8 * FLOAT,
        ("2", "dropout"): 6 * 8 * FLOAT,
        ("3", "linear input"): 6 * 8 * FLOAT,
    }


@pytest.mark.slow
def test_a_compiled_region_is_counted_as_one() -> None:
    plain = nn.Sequential(nn.Linear(2, 8), nn.GELU(), nn.Linear(8, 3))
    compiled = torch.compile(plain, backend="aot_eager")
    book = ledger(compiled, torch.randn(6, 2))  # type: ignore[arg-type]
    assert set(book.by_kind(ledger="activations")) == {"compiled region", "batch input"}
    assert not plain[0]._forward_hooks


@pytest.mark.parametrize("loss_of", ["attribute", "mapping", "first scalar", "sum"])
def test_the_loss_is_found(loss_of: str) -> None:
    class Output:
        def __init__(self, loss: Tensor) -> None:
            self.loss = loss

    def finish(y: Tensor) -> Any:
        loss = F.cross_entropy(y, torch.zeros(6, dtype=torch.int64))
        if loss_of == "attribute":
            return Output(loss)
        return {"mapping": {"loss": loss}, "first scalar": (y, loss), "sum": y}[loss_of]

    book = ledger(Wrapped(finish), torch.randn(6, 2))
    # The log-softmax saves its output, the loss its target and its total weight.
    target = 6 * 8
    expected = {("inner", "loss"): 6 * 8 * FLOAT + target + FLOAT} if loss_of != "sum" else {}
    assert saved(book) == expected
    assert book.gradients == (2 * 8 + 8) * FLOAT


class TestOptimizer:
    def model(self) -> nn.Module:
        model = nn.Sequential(nn.Linear(2, 8), nn.Linear(8, 3))
        model[0].weight.requires_grad_(False)
        model.unused = nn.Parameter(torch.ones(7))
        return model

    @pytest.mark.parametrize("given", ["none", "fresh"])
    def test_forecast_equals_the_state_after_a_step(self, given: str) -> None:
        model, x = self.model(), torch.randn(6, 2)
        fresh = torch.optim.AdamW(model.parameters())
        before = ledger(model, x, optimizer=None if given == "none" else fresh)
        optimizer = torch.optim.AdamW(model.parameters())
        model(x).sum().backward()
        optimizer.step()
        after = ledger(model, x, optimizer=optimizer)
        real = [t for s in optimizer.state.values() for t in s.values()]
        assert after.optimizer == sum(t.untyped_storage().nbytes() for t in real)
        assert before.optimizer == after.optimizer == 2 * (8 + 8 * 3 + 3) * FLOAT + 3 * 4
        assert before.optimizer_is_predicted and not after.optimizer_is_predicted
        assert before.by_module(ledger="optimizer") == after.by_module(ledger="optimizer")
        assert not fresh.state

    def test_other_optimizers_are_forecast_by_their_own_rule(self) -> None:
        model, x = self.model(), torch.randn(6, 2)
        plain = torch.optim.SGD(model.parameters(), lr=0.1)
        heavy = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        assert ledger(model, x, optimizer=plain).optimizer == 0
        assert ledger(model, x, optimizer=heavy).optimizer == (8 + 8 * 3 + 3) * FLOAT

    def test_an_optimizer_that_needs_values_asks_for_a_step_first(self) -> None:
        model, x = self.model(), torch.randn(6, 2)
        optimizer = torch.optim.Adafactor(model.parameters())
        with pytest.raises(UnsupportedError, match=r"optimizer must .* Adafactor .* one step"):
            ledger(model, x, optimizer=optimizer)
        model(x).sum().backward()
        optimizer.step()
        # a row and a column factor for the matrix, one factor for each vector, four counters
        expected = (3 + 8) * FLOAT + (8 + 3) * FLOAT + 3 * 4
        assert ledger(model, x, optimizer=optimizer).optimizer == expected


class TestReport:
    def test_tables_hold_the_totals(self) -> None:
        small, large = (ledger(Fork(32), torch.randn(n, 2)) for n in (20, 40))
        text = small.table()
        assert "optimizer (predicted)" in text
        assert "batch input (exists anyway)" in text
        assert [line.split() for line in text.splitlines() if line.startswith("q ")] == [
            ["q", "2.5", "KiB", "94.1%"]
        ]
        assert "2 more" in Ledger(small.entries).table(max_rows=0)
        rows = [line.split() for line in small.compare(large).splitlines()]
        assert ["linear", "input", "2.5", "KiB", "5", "KiB", "2.000"] in rows

    def test_to_dict_is_json_and_adds_up(self) -> None:
        book = ledger(Fork(32), torch.randn(20, 2))
        plain = json.loads(json.dumps(book.to_dict()))
        assert plain["total"] == book.total == sum(e["num_bytes"] for e in plain["entries"])
        entry = next(e for e in plain["entries"] if e["kind"] == "linear input")
        assert entry == {
            "ledger": "activations",
            "module": "q",
            "kind": "linear input",
            "num_bytes": 2560,
            "shape": [20, 32],
            "dtype": "float32",
            "device": "cpu",
            "holders": [["q", "Mm"], ["k", "Mm"], ["v", "Mm"]],
        }


class TestErrors:
    def test_meta_model(self) -> None:
        with pytest.raises(UnsupportedError, match=r"model must .* 2 tensors on meta .*to_empty"):
            ledger(nn.Linear(2, 2, device="meta"), torch.ones(1, 2))

    @pytest.mark.parametrize("batch", [{}, (), {"x": torch.ones(0, 2)}, torch.ones(0, 2)])
    def test_empty_batch(self, batch: Any) -> None:
        with pytest.raises(ConfigError, match="batch must hold at least one non-empty tensor"):
            ledger(nn.Linear(2, 2), batch)

    def test_wrong_batch(self) -> None:
        with pytest.raises(ConfigError, match=r"batch must be a mapping, .* got str"):
            ledger(nn.Linear(2, 2), "text")

    def test_nothing_differentiable(self) -> None:
        with pytest.raises(ConfigError, match="output must hold a differentiable tensor"):
            ledger(nn.Linear(2, 2).requires_grad_(False), torch.ones(1, 2))

    def test_a_loss_without_a_graph(self) -> None:
        model = Wrapped(lambda y: {"loss": torch.zeros(()), "logits": y})
        with pytest.raises(ConfigError, match="loss must be a tensor with a gradient path"):
            ledger(model, torch.ones(1, 2))

    def test_an_unsupported_layout(self) -> None:
        class Save(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, x: Tensor) -> Tensor:
                ctx.kept = x.detach().to_mkldnn()
                return x.clone()

            @staticmethod
            def backward(ctx: Any, *grads: Any) -> Any:
                return grads[0]

        if not torch.backends.mkldnn.is_available():
            pytest.skip("this torch is built without mkldnn")
        with pytest.raises(UnsupportedError, match="layout must be strided"):
            ledger(Wrapped(Save.apply), torch.ones(1, 2))
