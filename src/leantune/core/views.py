"""One view of any linear: weight as (d_out, d_in), bias, low-rank factors, store.

It covers ``nn.Linear``, transformers' ``Conv1D``, their twins with a store, and a PEFT LoRA layer
around any of them, so that a method on a whole MLP or attention needs no case of its own.

Legend: n rows (all leading dimensions), d_in, d_out, r rank of the factors.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn import functional as F

from leantune.core.sites import is_linear
from leantune.core.swap import DrawSource, StoredConv1D, StoredLinear
from leantune.errors import UnsupportedError
from leantune.ops.autocast import autocast_dtype
from leantune.ops.linear import linear
from leantune.ops.stores import ActivationStore, GradientCut, GradientRule


@dataclass(frozen=True)
class LowRank:
    """One adapter of a linear: it adds ``scaling * b(a(dropout(x)))``.

    Args:
        a: the first factor, weight (r, d_in).
        b: the second factor, weight (d_out, r).
        scaling: the adapter's factor.
        dropout: module on the adapter's input.
    """

    a: "LinearView"
    b: "LinearView"
    scaling: float
    dropout: nn.Module

    def first(self, x: Tensor, product: "Product | None" = None) -> Tensor:
        """Return ``scaling * a(dropout(x))``, (..., r); ``product`` stands for a slice of ``a``."""
        if product is None:
            product = partial(self.a.product, weight=self.a.weight)
        return self.scaling * product(self.dropout(x))

    @property
    def second_bias(self) -> Tensor | None:
        """The bias of ``b``, scaled: what :meth:`first` returns carries the scaling already."""
        return None if self.b.bias is None else self.scaling * self.b.bias


@dataclass(frozen=True)
class LinearView:
    """A linear's tensors, which are the parameters themselves or views of them.

    Args:
        weight: (d_out, d_in), whatever the layer's own layout.
        bias: (d_out,) or None.
        factors: the adapters that add to the output.
        store: decides what backward keeps of the input, or None for all of it.
        draws: hands out the random numbers of ``store``; None outside training.
        rule: forms the gradient of what trains in the weight's stead, from the whole input.
        cut: thins the whole output's gradient out.
    """

    weight: Tensor
    bias: Tensor | None
    factors: tuple[LowRank, ...] = ()
    store: ActivationStore | None = None
    draws: DrawSource | None = None
    rule: GradientRule | None = None
    cut: GradientCut | None = None

    @property
    def is_divisible(self) -> bool:
        """Whether slices of the weight may be used by themselves: no rule or cut needs it whole."""
        inner = [v for f in self.factors for v in (f.a, f.b)]
        is_whole = self.rule is not None or self.cut is not None
        return not is_whole and all(v.is_divisible for v in inner)

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return ``x weight^T + bias`` for a slice of this linear's weight, through its store.

        Args:
            x: (..., d_in of the slice); cast to the weight's dtype outside autocast.
            weight: the weight, or a slice of its rows or columns.
            bias: the slice's bias, or None.
        """
        if x.dtype != weight.dtype and autocast_dtype(x) is None:
            x = x.to(weight.dtype)
        draw = None if self.draws is None else self.draws.draw_for(self.weight)
        if draw is None:
            return F.linear(x, weight, bias)
        assert self.store is not None
        return linear(x, weight, bias, self.store, draw)


def linear_view(module: nn.Module) -> LinearView:
    """View a linear as it computes now: with its active adapters, through its store if it trains.

    Raises:
        UnsupportedError: another kind of module, or an adapter that is no plain LoRA.
    """
    if hasattr(module, "base_layer"):
        base = linear_view(module.base_layer)  # type: ignore[arg-type]
        return replace(base, factors=(*base.factors, *_factors(module)))
    if not is_linear(module):
        raise UnsupportedError(
            f"linear must be nn.Linear, Conv1D or a LoRA layer around one, got {_kind(module)}"
        )
    layer: Any = module
    weight = layer.weight if isinstance(layer, nn.Linear) else layer.weight.t()
    if not isinstance(layer, StoredLinear | StoredConv1D):
        return LinearView(weight, layer.bias)
    draws = layer.draws if layer.training else None
    return LinearView(weight, layer.bias, (), layer.store, draws, layer.rule, layer.cut)


def parameters_along(module: nn.Module, dim: int) -> Iterator[tuple[str, nn.Parameter, int]]:
    """Yield what has a linear's output (0) or input (1) features, of every adapter, active or not.

    Yields:
        Name inside ``module``, parameter, and the parameter's dimension that has them.
    """
    layer: Any = module
    if hasattr(module, "base_layer"):
        side = "lora_A" if dim == 1 else "lora_B"
        inner = {"base_layer": layer.base_layer}
        inner |= {f"{side}.{name}": factor for name, factor in getattr(layer, side).items()}
        for name, linear in inner.items():
            for tail, parameter, along in parameters_along(linear, dim):
                yield f"{name}.{tail}", parameter, along
        return
    yield "weight", layer.weight, dim if isinstance(layer, nn.Linear) else 1 - dim
    if dim == 0 and layer.bias is not None:
        yield "bias", layer.bias, 0


Product = Callable[[Tensor], Tensor]
Divide = Callable[[Tensor, int], Sequence[Tensor]]
"""(tensor, dimension) -> its slices along it."""
Multiply = Callable[[LinearView, Tensor, Tensor | None, Tensor], Tensor]
"""(linear, slice of its weight, slice of its bias or None, rows) -> rows."""


class Slice(NamedTuple):
    """One slice of a linear's output features with its bias, or of its input features without.

    Args:
        base: rows (m, d_in) -> (m, d_out) of the slice.
        adapters: one product each. A slice of outputs takes :meth:`LowRank.first` of the rows,
            (m, r), to (m, d_out); a slice of inputs takes rows to their part of it, (m, r).
    """

    base: Product
    adapters: tuple[Product, ...]


def slices(view: LinearView, dim: int, divide: Divide, multiply: Multiply) -> list[Slice]:
    """Cut a linear along its output (0) or input (1) features; how is the caller's choice."""

    def share(v: LinearView, along: int, bias: Tensor | None) -> list[Product]:
        weights = divide(v.weight, along)
        biases = [None] * len(weights) if bias is None else divide(bias, 0)
        return [partial(multiply, v, w, b) for w, b in zip(weights, biases, strict=True)]

    if dim == 1:
        bases = share(view, 1, None)
        adapters = [
            [partial(f.first, product=p) for p in share(f.a, 1, None)] for f in view.factors
        ]
    else:
        bases = share(view, 0, view.bias)
        adapters = [share(f.b, 0, f.second_bias) for f in view.factors]
    return [Slice(base, tuple(a[i] for a in adapters)) for i, base in enumerate(bases)]


def _factors(layer: Any) -> Iterable[LowRank]:
    """List the LoRA adapters of a PEFT layer, which is known by its attributes alone."""
    if not hasattr(layer, "lora_A"):
        raise UnsupportedError(f"adapter must be plain LoRA, got {_kind(layer)}")
    if layer.disable_adapters and layer.merged:
        layer.unmerge()
    if layer.disable_adapters or layer.merged:
        return ()
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    variants = [name for name in names if name in getattr(layer, "lora_variant", {})]
    if variants:
        kind = type(layer.lora_variant[variants[0]]).__name__
        raise UnsupportedError(f"adapter must be plain LoRA, got {variants[0]!r}, a {kind}")
    return tuple(
        LowRank(
            linear_view(layer.lora_A[name]),
            linear_view(layer.lora_B[name]),
            layer.scaling[name],
            layer.lora_dropout[name],
        )
        for name in names
    )


def _kind(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"
