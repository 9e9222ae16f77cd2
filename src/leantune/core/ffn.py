"""A feed-forward network (FFN) whatever its modules are called: whole, in slices, reordered.

Methods that compute some of an FFN's hidden units see every FFN in one way: plain, gated, or gated
with gate and up as the halves of one product, with ``nn.Linear`` or ``Conv1D``, with or without
LoRA layers, sampled by WTA-CRS or not.

Legend: n rows, F hidden units, r rank of an adapter.
"""

from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from itertools import repeat
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from leantune.core.adapters import Adapted, linears_along, unwrap
from leantune.core.distributed import full_tensor, shard_like
from leantune.core.linear import Converted, is_linear
from leantune.errors import ConfigError, UnsupportedError
from leantune.ops.autocast import autocast_dtype
from leantune.ops.linear import linear


class LinearView(NamedTuple):
    """A linear, or a slice of it: weight (d_out, d_in) whatever the module's layout, and bias."""

    module: Any
    weight: Tensor
    bias: Tensor | None

    @classmethod
    def of(cls, module: Any, scaling: float = 1.0) -> "LinearView":
        """View a whole linear as it is now (FSDP replaces parameters), its bias scaled."""
        weight, bias = module.weight, module.bias
        if bias is not None and scaling != 1.0:
            bias = scaling * bias
        return cls(module, weight if isinstance(module, nn.Linear) else weight.t(), bias)

    def multiply(self, x: Tensor) -> Tensor:
        """Return ``x weight^T + bias``; backward keeps what the module keeps of its inputs.

        Args:
            x: (..., d_in); cast to the weight's dtype outside autocast.
        """
        module, weight, bias = self
        if x.dtype != weight.dtype and autocast_dtype(x) is None:
            x = x.to(weight.dtype)
        if not (isinstance(module, Converted) and module.training):
            return F.linear(x, weight, bias)
        if module.runtime.is_exact or not (weight.requires_grad and torch.is_grad_enabled()):
            return F.linear(x, weight, bias)
        key = None if module.rows is None else module.runtime.key(x.device)
        return linear(x, weight, bias, rows=module.rows, codec=module.codec, key=key)

    def chunk(self, dim: int, num: int) -> "list[LinearView]":
        """Cut along the output (0) or input (1) features; a cut of inputs leaves the bias out."""
        # One operation for all slices: the gradient of a trained weight is put together once.
        weights = self.weight.chunk(num, dim)
        biases = repeat(None) if dim == 1 or self.bias is None else self.bias.chunk(num)
        return list(map(LinearView, repeat(self.module), weights, biases))


class FFN:
    """An FFN as it computes now, made by :func:`view_ffn`.

    Args:
        modules: part (``up``, ``gate``, ``down``, ``activation``, ``hidden_dropout``,
            ``output_dropout``) -> module; ``gate`` and the dropouts may be missing. An ``up`` that
            is twice as wide as ``down`` reads makes the gate's half first, then its own.
        linears: ``up``, ``gate`` and ``down`` without the LoRA layers around them.

    Attributes:
        is_divisible: whether slices of the weights may be used by themselves. A linear that trains
            a subspace needs its whole input and its own forward.
        num_hidden: F.
        is_halved: whether gate and up are the halves of one product.
    """

    def __init__(self, modules: Mapping[str, nn.Module], linears: Mapping[str, Adapted]) -> None:
        self.modules = modules
        self.linears = linears
        every = [m for adapted in linears.values() for m in adapted.modules]
        for module in every:
            if not is_linear(module):
                kind = f"{type(module).__module__}.{type(module).__qualname__}"
                raise UnsupportedError(
                    f"linear must be nn.Linear, Conv1D or a LoRA layer around one, got {kind}"
                )
        self._converted = [m for m in every if isinstance(m, Converted)]
        self.is_divisible = all(m.subspace is None for m in self._converted)
        self.num_hidden = self.weight("down").shape[1]
        is_double = len(self.weight("up")) == 2 * self.num_hidden
        self.is_halved = is_double and "gate" not in modules

    def weight(self, part: str) -> Tensor:
        """Return the weight of ``up``, ``gate`` or ``down`` without adapters, (d_out, d_in)."""
        return LinearView.of(self.linears[part].linear).weight

    def merged(self, part: str) -> Tensor:
        """Return the weight of a part with its adapters folded in, (d_out, d_in)."""
        weight = self.weight(part)
        for first, second, scaling, _ in self.linears[part].adapters:
            low, high = LinearView.of(first).weight, LinearView.of(second).weight
            weight = weight + scaling * (high @ low).to(weight.dtype)
        return weight

    def hidden(self, x: Tensor) -> Tensor:
        """Return all hidden activations, (..., F), by the modules' own forwards."""
        modules = self.modules
        if self.is_halved:
            gate, up = modules["up"](x).chunk(2, -1)
            return modules["activation"](gate) * up
        if "gate" not in modules:
            return modules["activation"](modules["up"](x))
        return modules["activation"](modules["gate"](x)) * modules["up"](x)

    def output(
        self, hidden: Tensor, scale: Tensor | None = None, extra: Tensor | None = None
    ) -> Tensor:
        """Return the output from all hidden activations, by the modules' own forwards.

        Args:
            hidden: (..., F), from :meth:`hidden`.
            scale: (n, G), multiplies the units of each of G slices; None for ones.
            extra: (..., d_model), added before the output's dropout.
        """
        hidden = self._drop("hidden_dropout", hidden)
        if scale is not None:
            slices = hidden.unflatten(-1, (scale.shape[-1], -1))
            hidden = (slices * scale.to(hidden.dtype).view(*slices.shape[:-1], 1)).flatten(-2)
        if autocast_dtype(hidden) is None:
            hidden = hidden.to(self.weight("down").dtype)
        y = self.modules["down"](hidden)
        return self._drop("output_dropout", y if extra is None else y + extra)

    def _drop(self, part: str, x: Tensor) -> Tensor:
        return self.modules[part](x) if part in self.modules else x

    def project(self, x: Tensor) -> list[Tensor]:
        """Return ``scaling * first(dropout(x))``, (..., r), for each adapter of up and gate.

        No slice has a part in it, so that it is computed once for all of them.
        """
        low = [
            scaling * LinearView.of(first).multiply(dropout(x))
            for part in ("up", "gate")
            if part in self.linears
            for first, _, scaling, dropout in self.linears[part].adapters
        ]
        return low * 2 if self.is_halved else low

    def slices(self, num: int) -> "list[FFNSlice]":
        """Cut the hidden units into ``num`` slices of equal size, whose weights are views."""
        parts: list[Iterable[tuple[LinearView, ...]]] = []
        for part, (base, adapters) in self.linears.items():
            dim = int(part == "down")
            num_halves = 2 if part == "up" and self.is_halved else 1
            pieces = [LinearView.of(base).chunk(dim, num_halves * num)]
            for first, second, scaling, _ in adapters:
                view = LinearView.of(first if dim else second, scaling)
                pieces.append(view.chunk(dim, num_halves * num))
            cuts = list(zip(*pieces, strict=True))
            parts += [cuts[num:], cuts[:num]] if num_halves == 2 else [cuts]
        return list(map(FFNSlice, repeat(self), zip(*parts, strict=True)))

    def finish(self, y: Tensor, low: Iterable[Tensor]) -> Tensor:
        """Return the FFN's output from the sums over slices of what :meth:`FFNSlice.run` returns.

        Args:
            y: (n, d_model).
            low: (n, r) for each adapter of ``down``.
        """
        down: Any = self.linears["down"].linear
        if down.bias is not None:
            y = y + down.bias.to(y.dtype)
        for z, adapter in zip(low, self.linears["down"].adapters, strict=True):
            view = LinearView.of(adapter.second, adapter.scaling)
            y = y + view.multiply(adapter.scaling * z).to(y.dtype)
        dropout = self.modules.get("output_dropout")
        return y if dropout is None else dropout(y)


class FFNSlice(NamedTuple):
    """Some hidden units of an FFN, with what they have of each weight.

    Args:
        ffn: the whole.
        parts: for ``up``, ``gate`` if there is one, and ``down``: the slice of the linear, then
            those of its adapters' factors that have the units.
    """

    ffn: FFN
    parts: tuple[tuple[LinearView, ...], ...]

    def run(
        self,
        x: Tensor,
        low: Iterable[Tensor],
        scale: Tensor | None = None,
    ) -> list[Tensor]:
        """Return the down product (n, d_model), then the low-rank output (n, r) of each adapter.

        Args:
            x: (n, d_model).
            low: for these rows, what :meth:`FFN.project` returns.
            scale: (n, 1), multiplies the hidden activations; None for ones.
        """
        modules, low = self.ffn.modules, iter(low)
        outputs: list[Tensor] = []
        *inputs, down = self.parts
        for base, *factors in inputs:
            out = base.multiply(x)
            for factor in factors:
                out = out + factor.multiply(next(low)).to(out.dtype)
            outputs.append(out)
        hidden: Tensor = modules["activation"](outputs[-1])
        if len(outputs) == 2:
            hidden = hidden * outputs[0]
        if "hidden_dropout" in modules:
            hidden = modules["hidden_dropout"](hidden)
        if scale is not None:
            hidden = hidden * scale.to(hidden.dtype)
        base, *factors = down
        results = [base.multiply(hidden)]
        for factor, adapter in zip(factors, self.ffn.linears["down"].adapters, strict=True):
            results.append(factor.multiply(adapter.dropout(hidden)))
        return results


def view_ffn(modules: Mapping[str, nn.Module], before: FFN | None = None) -> FFN:
    """Return the view of an FFN; ``before`` itself unless a module or an adapter has changed.

    Whoever keeps the view and hands it in again gets a new one only when an adapter was added,
    switched or merged, or a linear was converted. ``modules`` is as for :class:`FFN`, with LoRA
    layers.

    Raises:
        UnsupportedError: a linear of another kind, or an adapter that is no plain LoRA.
    """
    linears = {part: unwrap(modules[part]) for part in ("up", "gate", "down") if part in modules}
    if before is not None and before.linears == linears and before.modules == modules:
        return before
    return FFN(modules, linears)


class HiddenUnits:
    """The order of an FFN's hidden units, which is free: any is the same function.

    The module that computes the FFN gets a buffer ``permutation``, (F,): the original number of
    each unit. Weights in the model's ``state_dict`` are in the original order and load in that
    order, so that they and adapters suit the plain model as they are.

    Args:
        model: the model that the FFN is in.
        holder: the module that takes the FFN's place.
        linears: the names in ``holder`` of ``up``, ``down`` and, in a gated FFN, ``gate``.

    Raises:
        UnsupportedError: another module shares a weight, which would be reordered as well.
    """

    def __init__(self, model: nn.Module, holder: nn.Module, linears: Mapping[str, str]) -> None:
        self._holder = holder
        self._linears = linears
        own = {id(parameter) for _, parameter, _ in self._parameters()}
        names: dict[int, str] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            first = names.setdefault(id(parameter), name)
            if id(parameter) in own and first != name:
                raise UnsupportedError(
                    "hidden units can be reordered only where no weight is shared, got "
                    f"{first} tied to {name}; leave the site out with sites=, or keep the order"
                )
        _, weight, dim = next(self._parameters())
        units = torch.arange(weight.shape[dim], device=weight.device)
        holder.register_buffer("permutation", units)
        # (torch marks the hook, which a bound method does not allow.)
        holder.register_state_dict_post_hook(partial(self._to_original))
        holder.register_load_state_dict_pre_hook(self._from_original)

    @property
    def permutation(self) -> Tensor:
        """The original number of each unit, (F,) int64."""
        return self._holder.get_buffer("permutation")

    @torch.no_grad()
    def reorder(self, order: Tensor) -> None:
        """Reorder the units in everything that has them: weights, biases, adapters' factors.

        Args:
            order: (F,) int64: the new unit i is the present unit ``order[i]``.
        """
        for _, parameter, dim in self._parameters():
            parameter.copy_(_selected(parameter, dim, order))
        self.permutation.copy_(self.permutation.index_select(0, order))

    def restore(self) -> None:
        """Put the units back into their original order."""
        self.reorder(self.permutation.argsort())

    def load(self, permutation: Tensor) -> None:
        """Take on a saved order; the function stays.

        Raises:
            ConfigError: no order of these units.
        """
        now = self.permutation
        wanted = permutation.to(now.device)
        is_right = wanted.shape == now.shape and wanted.dtype == now.dtype
        if not (is_right and torch.equal(wanted.sort().values, now.sort().values)):
            raise ConfigError(
                f"session: permutation must be an order of {len(now)} hidden units, got a tensor "
                f"of shape {tuple(wanted.shape)} and {wanted.dtype}; load the state with the model "
                "it was saved with"
            )
        self.reorder(now.argsort()[wanted])

    def _parameters(self) -> Iterator[tuple[str, nn.Parameter, int]]:
        """Yield name in the holder, parameter and dimension of everything that has the units."""
        for part, name in self._linears.items():
            along = int(part == "down")
            for prefix, layer in linears_along(self._holder.get_submodule(name), along):
                dim = along if isinstance(layer, nn.Linear) else 1 - along
                yield f"{name}.{prefix}weight", layer.get_parameter("weight"), dim
                if along == 0 and getattr(layer, "bias", None) is not None:
                    yield f"{name}.{prefix}bias", layer.get_parameter("bias"), 0

    def _to_original(self, _: nn.Module, state: dict[str, Any], prefix: str, *__: Any) -> None:
        self._reorder_entries(state, prefix, self.permutation.argsort())

    def _from_original(self, _: nn.Module, state: dict[str, Any], prefix: str, *__: Any) -> None:
        if f"{prefix}permutation" in state:
            # A router knows the groups that it was saved with.
            self.load(state[f"{prefix}permutation"])
        self._reorder_entries(state, prefix, self.permutation)

    def _reorder_entries(self, state: dict[str, Any], prefix: str, order: Tensor) -> None:
        for name, parameter, dim in self._parameters():
            entry = state.get(prefix + name)
            # Of another shape: torch says so.
            if entry is not None and entry.shape == parameter.shape:
                state[prefix + name] = _selected(entry, dim, order)


def _selected(tensor: Tensor, dim: int, order: Tensor) -> Tensor:
    return shard_like(full_tensor(tensor).index_select(dim, order.to(tensor.device)), tensor)
