"""The linear Function against float64, and bit for bit against the plain linear."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.gradcheck import GradcheckError
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from leantune.ops.codec import EXACT, Exact
from leantune.ops.linear import linear
from leantune.ops.random import RandomKey
from leantune.ops.rows import KeptRows, OuterProduct

D_IN, D_OUT = 12, 7
SHAPES = [(5, D_IN), (3, 4, D_IN), (2, 3, 4, D_IN), (1, D_IN), (0, D_IN), (2, 0, D_IN)]
KEY = RandomKey(0, torch.zeros((), dtype=torch.int64))


def leaves(
    shape: tuple[int, ...] = (3, 4, D_IN),
    dtype: torch.dtype = torch.float32,
    *,
    bias: bool = True,
) -> tuple[Tensor, Tensor, Tensor | None]:
    x = torch.randn(shape, dtype=dtype, requires_grad=True)
    weight = torch.randn(D_OUT, shape[-1], dtype=dtype, requires_grad=True)
    return x, weight, torch.randn(D_OUT, dtype=dtype, requires_grad=True) if bias else None


def run(function, x, weight, bias, grad_output) -> tuple[Tensor, list[Tensor]]:
    """Return the output and the gradients of x, weight, bias (those that are leaves with one)."""
    wanted = [t for t in (x, weight, bias) if t is not None and t.requires_grad]
    y = function(x, weight, bias)
    return y.detach(), list(torch.autograd.grad(y, wanted, grad_output.to(y.dtype)))


def ours(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return linear(x, weight, bias)


def relative_error(got: Tensor, wanted: Tensor) -> float:
    return float((got.double() - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_output_and_gradients_are_the_plain_ones_to_the_bit(shape, bias) -> None:
    x, weight, b = leaves(shape, bias=bias)
    grad_output = torch.randn(*shape[:-1], D_OUT)
    y, grads = run(ours, x, weight, b, grad_output)
    y_plain, grads_plain = run(F.linear, x, weight, b, grad_output)
    assert torch.equal(y, y_plain)
    assert [g.shape for g in grads] == [g.shape for g in grads_plain]
    assert all(torch.equal(g, p) for g, p in zip(grads, grads_plain, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_error_against_float64_is_at_most_twice_the_plain_linears(dtype: torch.dtype) -> None:
    x, weight, b = leaves((6, 20, D_IN), dtype)
    assert b is not None
    grad_output = torch.randn(6, 20, D_OUT, dtype=dtype)
    g2, x2 = grad_output.double().view(-1, D_OUT), x.detach().double().view(-1, D_IN)
    w64 = weight.detach().double()
    wanted = [
        x.detach().double() @ w64.t() + b.detach().double(),
        grad_output.double() @ w64,
        g2.t() @ x2,
        g2.sum(0),
    ]
    y, grads = run(ours, x, weight, b, grad_output)
    y_plain, grads_plain = run(F.linear, x, weight, b, grad_output)
    for got, plain, exact in zip([y, *grads], [y_plain, *grads_plain], wanted, strict=True):
        bound = 2 * relative_error(plain, exact)
        assert relative_error(got, exact) <= bound
        # The control: one percent off must not pass.
        assert relative_error(got.double() * 1.01, exact) > bound


def test_non_contiguous_input_and_grad_output() -> None:
    x = torch.randn(D_IN, 4, 3).permute(2, 1, 0).requires_grad_()
    _, weight, b = leaves()
    grad_output = torch.randn(D_OUT, 4, 3).permute(2, 1, 0)
    assert not x.is_contiguous() and not grad_output.is_contiguous()
    y, grads = run(ours, x, weight, b, grad_output)
    y_plain, grads_plain = run(F.linear, x, weight, b, grad_output)
    torch.testing.assert_close(y, y_plain)
    torch.testing.assert_close(grads, grads_plain)


def test_expanded_grad_output() -> None:
    x, weight, b = leaves()
    grad_output = torch.ones(()).expand(3, 4, D_OUT)
    _, grads = run(ours, x, weight, b, grad_output)
    _, plain = run(F.linear, x, weight, b, grad_output)
    torch.testing.assert_close(grads, plain)


def test_one_dimensional_input() -> None:
    x, weight, b = leaves((D_IN,))
    y, grads = run(ours, x, weight, b, torch.randn(D_OUT))
    assert y.shape == (D_OUT,) and [g.shape for g in grads] == [(D_IN,), (D_OUT, D_IN), (D_OUT,)]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(5, D_IN), (3, 4, D_IN), (2, 3, 4, D_IN)])
@pytest.mark.parametrize("way", ["plain", "autocast", "recomputed"])
def test_the_output_may_be_written_to_in_place(shape, bias: bool, way: str) -> None:
    x, weight, b = leaves(shape, bias=bias)

    def scaled(function, x: Tensor) -> Tensor:
        y = function(x, weight, b)
        y *= 0.5
        return y.add_(1.0)

    def written(function) -> Tensor:
        if way == "recomputed":
            return checkpoint(scaled, function, x, use_reentrant=False)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=way == "autocast"):
            return scaled(function, x)

    grad_output = torch.randn(*shape[:-1], D_OUT)
    y, grads = run(lambda *_: written(ours), x, weight, b, grad_output)
    y_plain, grads_plain = run(lambda *_: written(F.linear), x, weight, b, grad_output)
    assert torch.equal(y, y_plain)
    for got, plain in zip(grads, grads_plain, strict=True):
        torch.testing.assert_close(got, plain)


def test_frozen_weight_keeps_nothing_but_the_weight() -> None:
    x, weight, b = leaves()
    weight.requires_grad_(False)
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = ours(x, weight, b)
    assert [t.data_ptr() for t in saved] == [weight.data_ptr()]
    y.sum().backward()
    assert x.grad is not None and weight.grad is None


def test_input_without_gradient() -> None:
    x, weight, b = leaves()
    x = x.detach()
    grad_output = torch.randn(3, 4, D_OUT)
    _, grads = run(ours, x, weight, b, grad_output)
    _, plain = run(F.linear, x, weight, b, grad_output)
    assert len(grads) == 2 and all(torch.equal(g, p) for g, p in zip(grads, plain, strict=True))


def test_only_the_bias_trains() -> None:
    x, weight, b = leaves()
    (grad,) = run(ours, x.detach(), weight.detach(), b, torch.ones(3, 4, D_OUT))[1]
    assert torch.equal(grad, torch.full((D_OUT,), 12.0))


def test_no_grad_gives_no_graph() -> None:
    with torch.no_grad():
        assert ours(*leaves()).grad_fn is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_matches_the_plain_linear(dtype: torch.dtype) -> None:
    x, weight, b = leaves((6, 20, D_IN))
    assert b is not None
    grad_output = torch.randn(6, 20, D_OUT)
    with torch.autocast("cpu", dtype=dtype):
        y, grads = run(ours, x, weight, b, grad_output)
        y_plain, grads_plain = run(F.linear, x, weight, b, grad_output)
    assert y.dtype == y_plain.dtype == dtype
    assert [g.dtype for g in grads] == [g.dtype for g in grads_plain] == [torch.float32] * 3
    g2, x2 = grad_output.double().view(-1, D_OUT), x.detach().double().view(-1, D_IN)
    w64 = weight.detach().double()
    wanted = [x2 @ w64.t() + b.detach().double(), g2 @ w64, g2.t() @ x2, g2.sum(0)]
    for got, plain, exact in zip([y, *grads], [y_plain, *grads_plain], wanted, strict=True):
        bound = 2 * relative_error(plain.reshape(exact.shape), exact)
        assert relative_error(got.reshape(exact.shape), exact) <= bound
        assert relative_error(got.reshape(exact.shape).double() * 1.1, exact) > bound


def test_autocast_keeps_no_second_copy_of_the_weight() -> None:
    x, weight, b = leaves()
    saved: dict[int, torch.dtype] = {}

    def pack(tensor: Tensor) -> Tensor:
        saved[tensor.data_ptr()] = tensor.dtype
        return tensor

    with (
        torch.autocast("cpu", dtype=torch.bfloat16),
        torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t),
    ):
        ours(x, weight, b)
    kept = saved.pop(weight.data_ptr())
    assert kept == torch.float32 and list(saved.values()) == [torch.bfloat16]


def test_autocast_leaves_float64_alone_as_the_plain_linear_does() -> None:
    x, weight, b = leaves(dtype=torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert ours(x, weight, b).dtype == F.linear(x, weight, b).dtype == torch.float64


def test_gradcheck_in_float64() -> None:
    x, weight, b = leaves((2, 3, D_IN), torch.float64)
    assert torch.autograd.gradcheck(ours, (x, weight, b))

    class Wrong(Exact):
        def decode(self, saved: tuple[Tensor, ...]) -> Tensor:
            return saved[0] * 1.01

    with pytest.raises(GradcheckError):
        torch.autograd.gradcheck(lambda *t: linear(*t, codec=Wrong()), (x, weight, b))


def test_gradient_accumulates_over_backwards() -> None:
    x, weight, b = leaves()
    ours(x, weight, b).sum().backward()
    assert weight.grad is not None
    once = weight.grad.clone()
    ours(x, weight, b).sum().backward()
    torch.testing.assert_close(weight.grad, 2 * once)


def test_retained_graph_gives_the_same_gradient_again() -> None:
    x, weight, b = leaves()
    y = ours(x, weight, b).square().sum()
    first = torch.autograd.grad(y, weight, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(y, weight)[0])


def test_second_derivative_is_refused_not_wrong() -> None:
    x, weight, b = leaves()
    (grad,) = torch.autograd.grad(ours(x, weight, b).square().sum(), weight, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_input_changed_in_place_before_backward_is_noticed() -> None:
    x, weight, b = leaves()
    hidden = x * 1.0
    y = ours(hidden, weight, b)
    hidden.mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_saved_tensor_hooks_see_the_input() -> None:
    """Offloading works: what hooks return is what backward reads."""
    x, weight, b = leaves()
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t * 2)
    with hooks:
        y = ours(x, weight, b)
    y.sum().backward()
    plain = torch.autograd.grad(F.linear(x, weight, b).sum(), weight)[0]
    torch.testing.assert_close(weight.grad, 2 * plain)


def test_exact_codec_predicts_its_bytes_and_copies_nothing() -> None:
    assert EXACT.nbytes(torch.Size((3, 4, D_IN)), torch.bfloat16) == 3 * 4 * D_IN * 2
    x = torch.randn(3, 4)
    assert EXACT.encode(x)[0] is x and EXACT.decode((x,)) is x


class FirstRows:
    """A row policy that keeps the first rows, each counted twice."""

    def __init__(self, num_rows: int = 5) -> None:
        self.num_rows = num_rows
        self.sources: list[Tensor] = []

    def keep(self, x: Tensor, source: Tensor, key: RandomKey) -> tuple[KeptRows, Any]:
        self.sources.append(source)
        assert not x.requires_grad
        indices = torch.arange(self.num_rows, dtype=torch.int32)
        rows = x.reshape(-1, x.shape[-1])[: self.num_rows].clone()
        return KeptRows(rows, indices, torch.full((self.num_rows,), 2.0)), "note"

    def outer_product(self, kept: KeptRows, note: Any, grad_output: Tensor) -> OuterProduct:
        assert note == "note" and kept.indices is not None and kept.weights is not None
        return OuterProduct(grad_output[kept.indices.long()] * kept.weights[:, None], kept.rows)

    def nbytes(self, shape: torch.Size, dtype: torch.dtype) -> int:
        return self.num_rows * (shape[-1] * dtype.itemsize + 8)


class Halves(Exact):
    """A codec that keeps half as many bits."""

    def encode(self, x: Tensor) -> tuple[Tensor, ...]:
        return (x.half(),)

    def decode(self, saved: tuple[Tensor, ...]) -> Tensor:
        return saved[0].float()


@pytest.mark.parametrize("codec", [EXACT, Halves()])
def test_rows_and_bits_are_chosen_apart(codec: Exact) -> None:
    rows = FirstRows()
    x, weight, b = leaves()
    grad_output = torch.randn(3, 4, D_OUT)
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = linear(x, weight, b, rows=rows, codec=codec, key=KEY)
    assert len(rows.sources) == 1 and rows.sources[0] is x
    kept = sum(t.nbytes for t in saved if t.data_ptr() != weight.data_ptr())
    half = 5 * D_IN * 2 if codec is not EXACT else 0
    assert kept == rows.nbytes(x.shape, x.dtype) - half
    got = torch.autograd.grad(y, (x, weight, b), grad_output)
    y_plain, plain = run(F.linear, x, weight, b, grad_output)
    assert torch.equal(y, y_plain)
    assert torch.equal(got[0], plain[0]) and torch.equal(got[2], plain[2])
    g2, x2 = (t.detach().flatten(0, 1)[:5] for t in (grad_output, x))
    close = {} if codec is EXACT else {"rtol": 1e-2, "atol": 1e-2}
    torch.testing.assert_close(got[1], 2 * g2.t() @ x2, **close)
    # The control: all rows give another gradient.
    assert not torch.allclose(got[1], plain[1], **close)


def test_a_policy_is_not_asked_where_there_is_no_gradient() -> None:
    rows = FirstRows()
    x, weight, b = leaves()
    with torch.no_grad():
        linear(x, weight, b, rows=rows, key=KEY)
    linear(x, weight.detach(), b, rows=rows, key=KEY)
    assert not rows.sources


def test_a_weight_with_a_graph_of_its_own_gets_its_gradient() -> None:
    x, half, b = leaves()
    grad_output = torch.randn(3, 4, D_OUT)
    got, wanted = (
        torch.autograd.grad(function(x, half.square(), b), half, grad_output)[0]
        for function in (ours, F.linear)
    )
    assert torch.equal(got, wanted)


def test_meta_tensors_pass_through() -> None:
    layer = nn.Linear(D_IN, D_OUT, device="meta")
    x = torch.empty(3, D_IN, device="meta")
    assert linear(x, layer.weight, layer.bias).shape == (3, D_OUT)


class Products(TorchDispatchMode):
    """Counts matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("function", [ours, F.linear])
def test_recomputation_ends_before_the_last_product(function) -> None:
    """A checkpointed block that ends in a linear needs that one's input, not its output."""
    x, weight, b = leaves()
    y = checkpoint(lambda x: function(torch.relu(x), weight, b), x, use_reentrant=False)
    with Products() as products:
        y.sum().backward()
    assert products.count == 2  # for the input and the weight
    # The control: in the middle of the block the product is needed.
    y = checkpoint(lambda x: function(x, weight, b).exp(), x, use_reentrant=False)
    with Products() as products:
        y.sum().backward()
    assert products.count == 3


class LeadingColumns:
    """A subspace that trains the first columns of the weight alone."""

    width = 3

    def __init__(self, trains: bool = True) -> None:
        self.parameter = torch.zeros(D_OUT, self.width, requires_grad=trains)

    def effective(self, base: Tensor, trained: Tensor) -> Tensor:
        return base

    def project(self, rows: Tensor) -> Tensor:
        return rows[:, : self.width].contiguous()

    def grad(self, outer: OuterProduct) -> Tensor:
        return outer.dense()


@pytest.mark.parametrize("bias", [True, False])
def test_a_subspace_trains_its_parameter_in_place_of_the_weight(bias: bool) -> None:
    subspace = LeadingColumns()
    x, weight, b = leaves(bias=bias)
    grad_output = torch.randn(3, 4, D_OUT)
    y = linear(x, weight, b, subspace=subspace)
    leaf = [t for t in (x, b) if t is not None]
    *others, trained, none = torch.autograd.grad(
        y, [*leaf, subspace.parameter, weight], grad_output, allow_unused=True
    )
    y_plain, plain = run(F.linear, x, weight, b, grad_output)
    assert torch.equal(y, y_plain) and none is None
    assert all(torch.equal(g, p) for g, p in zip(others, [plain[0], *plain[2:]], strict=True))
    torch.testing.assert_close(trained, plain[1][:, : subspace.width])
    # The control: another subspace must not pass.
    assert not torch.allclose(trained, plain[1][:, -subspace.width :])


@pytest.mark.parametrize("trains", [True, False])
def test_a_subspace_projects_before_anything_is_kept(trains: bool) -> None:
    subspace = LeadingColumns(trains)
    x, weight, b = leaves()
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        linear(x, weight, b, subspace=subspace)
    held = (weight.data_ptr(), subspace.parameter.data_ptr())
    sizes = [t.nbytes for t in saved if t.data_ptr() not in held]
    assert sizes == ([3 * 4 * subspace.width * 4] if trains else [])


def test_rows_are_chosen_of_the_projected_input() -> None:
    rows, subspace = FirstRows(), LeadingColumns()
    x, weight, b = leaves()
    y = linear(x, weight, b, rows=rows, key=KEY, subspace=subspace)
    assert rows.sources[0].shape == (3, 4, subspace.width)
    grad_output = torch.randn(3, 4, D_OUT)
    (got,) = torch.autograd.grad(y, subspace.parameter, grad_output)
    g2, x2 = (t.detach().flatten(0, 1)[:5] for t in (grad_output, x))
    torch.testing.assert_close(got, 2 * g2.t() @ x2[:, : subspace.width])
