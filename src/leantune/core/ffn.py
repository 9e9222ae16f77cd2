"""A feed-forward network (FFN) whatever its modules are called: whole, in slices, reordered.

Methods that compute some of an FFN's hidden units see every FFN in one way: plain, gated, or gated
with gate and up as the halves of one product, with ``nn.Linear`` or ``Conv1D``, with or without
LoRA layers, sampled by WTA-CRS or not.

Legend: n rows, F hidden units, r rank of an adapter.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import repeat
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from leantune.core.adapters import Adapted, linears_along, unwrap
from leantune.core.distributed import full_tensor, shard_like
from leantune.core.linear import Converted, is_called_linear, is_linear, refusal
from leantune.errors import ConfigError, UnsupportedError
from leantune.ops.autocast import autocast_dtype
from leantune.ops.groups import grouped_linear
from leantune.ops.linear import linear


class LinearView(NamedTuple):
    """A linear, or a slice of it: weight (d_out, d_in) whatever the module's layout, and bias."""

    module: Any
    weight: Tensor
    bias: Tensor | None

    @classmethod
    def of(cls, module: Any) -> "LinearView":
        """View a whole linear as it is now: FSDP replaces parameters."""
        weight = module.weight if isinstance(module, nn.Linear) else module.weight.t()
        return cls(module, weight, module.bias)

    @property
    def is_plain(self) -> bool:
        """Whether backward keeps of the input what it does for any linear, not what it is told."""
        module: Any = self.module
        if not (isinstance(module, Converted) and module.training) or module.runtime.is_exact:
            return True
        return not (self.weight.requires_grad and torch.is_grad_enabled())

    def multiply(self, x: Tensor) -> Tensor:
        """Return ``x weight^T + bias``; backward keeps what the module keeps of its inputs.

        Args:
            x: (..., d_in); cast to the weight's dtype outside autocast.
        """
        module, weight, bias = self
        if x.dtype != weight.dtype and autocast_dtype(x) is None:
            x = x.to(weight.dtype)
        if self.is_plain:
            return F.linear(x, weight, bias)
        key = None if module.rows is None else module.runtime.key(x.device)
        return linear(x, weight, bias, rows=module.rows, codec=module.codec, key=key)

    def multiply_groups(
        self,
        x: Tensor,
        sizes: Sequence[int],
        dim: int = 0,
        onto: Tensor | None = None,
        scaling: float = 1.0,
    ) -> Tensor:
        """Multiply each group's rows by its slice; see :func:`leantune.ops.groups.grouped_linear`.

        A cut of inputs leaves the bias out. Backward keeps what the module keeps of its inputs.
        """
        weight, bias = self.weight, None if dim else self.bias
        dtype = autocast_dtype(x) or weight.dtype
        fits = onto is None or (bias is None and onto.dtype == dtype)
        if fits and self.is_plain:
            x, weight = x.to(dtype), weight.to(dtype)
            bias = None if bias is None else bias.to(dtype)
            return grouped_linear(x, weight, bias, sizes, dim=dim, onto=onto, scaling=scaling)
        biases = repeat(None) if bias is None else bias.chunk(len(sizes))
        slices = map(LinearView, repeat(self.module), weight.chunk(len(sizes), dim), biases)
        y = torch.cat([s.multiply(rows) for s, rows in zip(slices, x.split(sizes), strict=True)])
        return y if onto is None else onto + (scaling * y).to(onto.dtype)


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
                why = f": {refusal(module)}" if is_called_linear(module) else ""
                raise UnsupportedError(
                    f"linear must be nn.Linear, Conv1D or a LoRA layer around one, got {kind}{why}"
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
        """Return ``first(dropout(x))``, (..., r), for each adapter of up and gate.

        No group has a part in it, so that it is computed once for all of them.
        """
        return [
            LinearView.of(adapter.first).multiply(adapter.dropout(x))
            for part in ("up", "gate")
            if part in self.linears
            for adapter in self.linears[part].adapters
        ]

    def run_groups(
        self, x: Tensor, low: Iterable[Tensor], sizes: Sequence[int], scale: Tensor
    ) -> list[Tensor]:
        """Run each row through one of G groups of hidden units, equal slices of all of them.

        Args:
            x: (m, d_model), sorted by group.
            low: for these rows, what :meth:`project` returns.
            sizes: how many rows each of the G groups has.
            scale: (m, 1), multiplies the hidden activations.

        Returns:
            The down product, (m, d_model), then the low-rank output (m, r) of each adapter.
        """
        low, outputs = iter(low), dict[str, list[Tensor]]()
        for part in ("up", "gate"):
            if part not in self.linears:
                continue
            base, adapters = self.linears[part]
            outputs[part] = [v.multiply_groups(x, sizes) for v in self._halves(part, base)]
            for adapter, z in zip(adapters, low, strict=False):
                views = self._halves(part, adapter.second)
                outputs[part] = [
                    view.multiply_groups(z, sizes, onto=y, scaling=adapter.scaling)
                    for view, y in zip(views, outputs[part], strict=True)
                ]
        *gate, up = [*outputs.get("gate", []), *outputs["up"]]
        hidden: Tensor = self.modules["activation"](gate[0] if gate else up)
        hidden = self._drop("hidden_dropout", hidden * up if gate else hidden)
        hidden = hidden * scale.to(hidden.dtype)
        base, adapters = self.linears["down"]
        inputs = [(base, hidden), *((a.first, a.dropout(hidden)) for a in adapters)]
        return [LinearView.of(m).multiply_groups(z, sizes, dim=1) for m, z in inputs]

    def _halves(self, part: str, module: nn.Module) -> list[LinearView]:
        """View a linear, or its halves: the gate's, then that of up."""
        whole = LinearView.of(module)
        if not (part == "up" and self.is_halved):
            return [whole]
        biases = (None, None) if whole.bias is None else whole.bias.chunk(2)
        return list(map(LinearView, repeat(module), whole.weight.chunk(2), biases))

    def finish(self, y: Tensor, low: Iterable[Tensor]) -> Tensor:
        """Return the FFN's output from each token's sums of what :meth:`run_groups` returns.

        Args:
            y: (n, d_model), changed in place.
            low: (n, r) for each adapter of ``down``.
        """
        down: Any = self.linears["down"].linear
        if down.bias is not None:
            y = y + down.bias.to(y.dtype)
        for z, (_, second, scaling, _) in zip(low, self.linears["down"].adapters, strict=True):
            y = LinearView.of(second).multiply_groups(z, [len(z)], onto=y, scaling=scaling)
        return self._drop("output_dropout", y)


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
