"""The linear Function against float64, and bit for bit against the plain linear."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.gradcheck import GradcheckError
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from leantune.ops.linear import linear
from leantune.ops.stores import ExactStore, Factors, grad_weight

D_IN, D_OUT = 12, 7
SHAPES = [(5, D_IN), (3, 4, D_IN), (2, 3, 4, D_IN), (1, D_IN), (0, D_IN), (2, 0, D_IN)]
STORE = ExactStore()


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
    return linear(x, weight, bias, STORE)


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

    class Wrong(ExactStore):
        def grad_factors(self, packed, grad_output, rule=None):
            return super().grad_factors(packed, grad_output * 1.01, rule)

    with pytest.raises(GradcheckError):
        torch.autograd.gradcheck(lambda *t: linear(*t, Wrong()), (x, weight, b))


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


def test_exact_store_predicts_its_bytes() -> None:
    assert STORE.saved_bytes(torch.Size((3, 4, D_IN)), torch.bfloat16) == 3 * 4 * D_IN * 2


def test_meta_tensors_pass_through() -> None:
    layer = nn.Linear(D_IN, D_OUT, device="meta")
    x = torch.empty(3, D_IN, device="meta")
    assert linear(x, layer.weight, layer.bias, STORE).shape == (3, D_OUT)


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
    """A rule that trains the first columns of the weight alone."""

    width = 3

    def project(self, rows: Tensor) -> Tensor:
        return rows[:, : self.width].contiguous()

    def grad(self, factors: Sequence[Factors]) -> Tensor:
        return grad_weight(factors)


@pytest.mark.parametrize("bias", [True, False])
def test_a_rule_trains_its_parameter_in_the_weights_stead(bias: bool) -> None:
    rule = LeadingColumns()
    x, weight, b = leaves(bias=bias)
    trained = torch.zeros(D_OUT, rule.width, requires_grad=True)
    grad_output = torch.randn(3, 4, D_OUT)
    y = linear(x, weight, b, STORE, None, trained, rule)
    leaf = [t for t in (x, b) if t is not None]
    *others, ours_, none = torch.autograd.grad(
        y, [*leaf, trained, weight], grad_output, allow_unused=True
    )
    y_plain, plain = run(F.linear, x, weight, b, grad_output)
    assert torch.equal(y, y_plain) and none is None
    assert all(torch.equal(g, p) for g, p in zip(others, [plain[0], *plain[2:]], strict=True))
    torch.testing.assert_close(ours_, plain[1][:, : rule.width])
    # The control: another rule must not pass.
    assert not torch.allclose(ours_, plain[1][:, -rule.width :])


@pytest.mark.parametrize("is_frozen", [True, False])
def test_a_rule_keeps_what_it_asks_for(is_frozen: bool) -> None:
    rule = LeadingColumns()
    x, weight, b = leaves()
    trained = torch.zeros(D_OUT, rule.width, requires_grad=not is_frozen)
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        linear(x, weight, b, STORE, None, trained, rule)
    sizes = [t.nbytes for t in saved if t.data_ptr() != weight.data_ptr()]
    assert sizes == ([] if is_frozen else [STORE.saved_bytes(x.shape, x.dtype, rule)])
