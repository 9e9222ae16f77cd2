"""The converted linear, and the only code that puts a module into a model or takes it out."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from leantune.core.runtime import Runtime
from leantune.errors import SiteError
from leantune.ops.backend import is_fake, on_gpu
from leantune.ops.codec import EXACT, Codec
from leantune.ops.linear import TrainedSubspace, linear
from leantune.ops.rows import RowPolicy

M = TypeVar("M", bound=nn.Module)


@dataclass
class Swap:
    """One module stands in another's place; ``undo`` puts the very same object back.

    Others may wrap the new module meanwhile: the old one then comes back inside the wrapper.
    """

    root: nn.Module
    name: str
    parent: nn.Module
    old: nn.Module
    new: nn.Module

    @property
    def attribute(self) -> str:
        """The new module's name in its parent."""
        return self.name.rpartition(".")[2]

    def undo(self) -> None:
        """Put the old module back, in the training mode that the new one is in."""
        self.old.train(self.new.training)
        holders = [(self.parent, self.attribute)]
        if child(self.parent, self.attribute) is not self.new:
            children = ((m, n, c) for m in self.root.modules() for n, c in m.named_children())
            holders = [(m, n) for m, n, c in children if c is self.new]
        for parent, attribute in holders:
            setattr(parent, attribute, self.old)


def child(parent: nn.Module, name: str) -> nn.Module | None:
    """Return the module that a parent itself holds under a name; a wrapper may show others'."""
    children: dict[str, nn.Module | None] = vars(parent)["_modules"]
    return children.get(name)


class Ownership:
    """What a session still finds in its model, as it will be while its swaps are undone.

    Nothing is moved: whether all of a session can be undone is known before any of it is.
    """

    def __init__(self, model: nn.Module) -> None:
        self._present = {id(module) for module in model.modules()}
        self._old: dict[int, nn.Module] = {}
        self._restored: set[int] = set()

    def has(self, module: nn.Module) -> bool:
        """Return whether the module is in the model."""
        return id(module) in self._present

    def undone(self, module: nn.Module | None) -> nn.Module | None:
        """Return what a module is once the swaps so far are undone."""
        while module is not None and id(module) in self._old:
            module = self._old[id(module)]
        return module

    def restore_forward(self, module: nn.Module) -> None:
        """Take a forward that a conversion has put on the module itself as gone."""
        self._restored.add(id(module))

    def undo(self, swap: Swap) -> bool:
        """Take a swap as undone; return False where somebody else's module is in its place.

        Where its surroundings are gone from the model, so is all that was swapped: nothing is lost.
        """
        if not self.has(swap.new):
            stands_there = child(swap.parent, swap.attribute)
            return not (self.has(swap.parent) and stands_there is not None)
        if has_own_call(swap.new) and id(swap.new) not in self._restored:
            return False
        self._present.update(id(module) for module in swap.old.modules())
        self._old[id(swap.new)] = swap.old
        return True


def has_own_call(module: nn.Module) -> bool:
    """Return whether somebody has put another forward on this one module: a twin would not run it.

    Offloading by accelerate does so, and ``module.compile()``.
    """
    return "forward" in vars(module) or "_compiled_call_impl" in vars(module)


def swap(model: nn.Module, name: str, new: nn.Module) -> Swap:
    """Put ``new`` in the place of the module called ``name``.

    Raises:
        SiteError: ``name`` is the root, which nothing holds.
    """
    if not name:
        raise SiteError(
            "swap: name must be a module inside the model, got the model itself; wrap it in a "
            "module of your own, or apply the method to its children"
        )
    parent = model.get_submodule(name.rpartition(".")[0])
    done = Swap(model, name, parent, model.get_submodule(name), new)
    setattr(parent, done.attribute, new)
    return done


def swap_all(model: nn.Module, twins: Iterable[tuple[str, nn.Module]]) -> list[Swap]:
    """Put each module in the place of the one of its name; on an error all come out again."""
    swaps: list[Swap] = []
    try:
        for name, new in twins:
            swaps.append(swap(model, name, new))
    except BaseException:
        for done in reversed(swaps):
            done.undo()
        raise
    return swaps


def share_parameters_as(cls: type[M], old: nn.Module) -> M:
    """Return a ``cls`` that shares everything with ``old``: parameters, buffers, hooks, flags.

    The dictionaries themselves are shared, so a parameter replaced later in one (as sharding
    does) is replaced in both, and ties and optimiser references survive.
    """
    new = cls.__new__(cls)
    new.__dict__.update(old.__dict__)
    return new


class ConvertedLinear(nn.Linear):
    """A converted linear is an ``nn.Linear`` whose weight gradient comes from what was kept.

    Forward is the plain linear's. Which rows of the input are kept, in how many bits, and which
    parameter trains are three independent choices, so that methods combine without code for pairs.
    """

    runtime: Runtime
    rows: RowPolicy | None = None
    codec: Codec = EXACT
    subspace: TrainedSubspace | None = None

    def forward(self, input: Tensor) -> Tensor:
        """Return the plain linear's output, (..., d_out)."""
        return _forward(self, input, self.weight)


class ConvertedConv1D(nn.Module):
    """A converted ``Conv1D`` (weight (d_in, d_out)) does the same as a converted linear."""

    weight: nn.Parameter
    bias: nn.Parameter
    runtime: Runtime
    rows: RowPolicy | None = None
    codec: Codec = EXACT
    subspace: TrainedSubspace | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Return the plain layer's output, (..., d_out)."""
        return _forward(self, x, self.weight.t())


Converted = ConvertedLinear | ConvertedConv1D


def _forward(layer: Converted, x: Tensor, weight: Tensor) -> Tensor:
    subspace, runtime = layer.subspace, layer.runtime
    trained = weight if subspace is None else subspace.parameter
    is_kept = layer.training and trained.requires_grad and torch.is_grad_enabled()
    if is_kept and not runtime.is_exact:
        key = None if layer.rows is None else runtime.key(weight.device)
        rows, codec = layer.rows, layer.codec
        return linear(x, weight, layer.bias, rows=rows, codec=codec, key=key, subspace=subspace)
    if subspace is not None and trained is not layer.weight:
        # Nothing is sampled here, but the subspace says which weight it is, and what trains.
        return linear(x, weight, layer.bias, subspace=subspace)
    return F.linear(x, weight, layer.bias)


def converted(
    old: nn.Module,
    runtime: Runtime,
    *,
    rows: RowPolicy | None = None,
    codec: Codec | None = None,
    subspace: TrainedSubspace | None = None,
    cls: type[nn.Module] | None = None,
) -> Converted:
    """Return the twin of a linear that keeps and trains what is asked; what is None stays as it is.

    The twin shares its parameters with ``old``, which may be converted already.

    Args:
        old: an ``nn.Linear``, a ``Conv1D``, or either one converted.
        runtime: of the session.
        rows: which rows of the input are kept.
        codec: in how many bits they are kept.
        subspace: what is trained instead of the weight, which must be frozen unless the subspace
            trains the weight itself. Parameters that it adds to the twin are ``old``'s, too: take
            them out again before ``old`` comes back.
        cls: the twin's class, where it evaluates its output another way.
    """
    if cls is None:
        if isinstance(old, Converted):
            cls = type(old)
        else:
            cls = ConvertedLinear if isinstance(old, nn.Linear) else ConvertedConv1D
    new = cast(Converted, share_parameters_as(cls, old))
    new.runtime = runtime
    if rows is not None:
        new.rows = rows
    if codec is not None:
        new.codec = codec
    if subspace is not None:
        new.subspace = subspace
    return new


def is_linear(module: nn.Module) -> bool:
    """Return whether the module can be converted: a linear by its class and by its value."""
    return is_called_linear(module) and refusal(module) is None


def is_called_linear(module: nn.Module) -> bool:
    """Return whether the module is a linear by its class: ``nn.Linear``, its heirs, ``Conv1D``."""
    return isinstance(module, nn.Linear) or is_conv1d(module)


def refusal(module: nn.Module) -> str | None:
    """Say why no method can act on what is a linear by its class, or None.

    A converted linear computes ``x W^T + b`` from a plain weight. Quantised and computed weights
    are none, and a class with a forward of its own must show that it gives the very same numbers.
    """
    if isinstance(module, Converted):
        return None
    kind, weight = type(module), dict(module.named_parameters(recurse=False)).get("weight")
    if weight is None:
        return "weight must be a parameter of the module itself, got one that is computed"
    if not has_entries(weight):
        way_out = "leave it out with sites=, or train LoRA factors beside it"
        if not _is_plain(weight):
            return f"weight must be a plain tensor, got {type(weight).__name__}; {way_out}"
        dtype = str(weight.dtype).removeprefix("torch.")
        return f"weight must be floating point, got {dtype}; {way_out}"
    if has_own_call(module):
        return (
            "forward must be that of its class, got one that was put on the module itself, as "
            "module.compile() does; apply the recipe first"
        )
    if kind is NonDynamicallyQuantizableLinear:
        return (
            "weight must be read by its own module, got torch's attention, which reads it past it"
        )
    if isinstance(module, nn.Linear) and not _computes_linear(module):
        return f"output must be that of a linear to the bit, got another from {kind.__name__}"
    return None


def is_quantised(module: nn.Module) -> bool:
    """Return whether a linear's weight is packed or scaled, so that others compute with it."""
    weight = dict(module.named_parameters(recurse=False)).get("weight")
    return is_called_linear(module) and weight is not None and not has_entries(weight)


_NEVER_TRAINED = ("torchao.quantization.", "bitsandbytes.")
"""Where the classes of weights live whose backward gives them no gradient."""


def cannot_train(weight: Tensor) -> bool:
    """Return whether a weight is of a quantised class that gets no gradient, whatever its flag."""
    return f"{type(weight).__module__}.".startswith(_NEVER_TRAINED)


_PLAIN = ("torch.distributed.", "torch._subclasses.")
"""Where the tensor classes live that stand for plain ones: sharded, and without data."""


def has_entries(weight: Tensor) -> bool:
    """Return whether a weight holds the very numbers that it stands for."""
    return _is_plain(weight) and weight.is_floating_point()


def _is_plain(weight: Tensor) -> bool:
    kind = type(weight)
    return kind in (nn.Parameter, Tensor) or kind.__module__.startswith(_PLAIN)


def _computes_linear(module: nn.Linear) -> bool:
    """Return whether the forward is torch's own, or gives what ``F.linear`` gives, to the bit."""
    if type(module).forward is nn.Linear.forward:
        return True
    held = {name for name, _ in (*module.named_parameters(), *module.named_buffers())}
    if held - {"weight", "bias"}:
        return False  # It has a state, which a try might move.
    twin = share_parameters_as(type(module), module)
    if module.weight.is_meta or is_fake(module.weight):
        parameters: dict[str, nn.Parameter | None] = vars(module)["_parameters"]
        vars(twin)["_parameters"] = {key: _few_rows(value) for key, value in parameters.items()}
    weight, used = twin.weight, [twin.weight.device] if on_gpu(twin.weight) else []
    x = torch.linspace(-1, 1, 3 * module.in_features, dtype=weight.dtype, device=weight.device)
    x = x.view(1, 3, -1)
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=used):
            wanted = F.linear(x, weight, twin.bias)
            for twin.training in (True, False):
                output = twin.forward(x)
                if not isinstance(output, Tensor) or not torch.equal(output, wanted):
                    return False
    except Exception:  # whatever a foreign class may raise, it is no linear then
        return False
    return True


def _few_rows(parameter: nn.Parameter | None) -> nn.Parameter | None:
    """Return numbers in place of the first rows of what has none."""
    if parameter is None:
        return None
    shape, dtype = parameter[:4].shape, parameter.dtype
    return nn.Parameter(torch.linspace(-1, 1, shape.numel(), dtype=dtype, device="cpu").view(shape))


def is_conv1d(module: nn.Module) -> bool:
    """Return whether the module is transformers' ``Conv1D``, a linear with a transposed weight.

    Matched with its module path: a class of the same name that is a real convolution is none.
    """
    kind = type(module)
    return kind is ConvertedConv1D or (
        kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils"
    )


def trained_in_place_of_weight(model: nn.Module) -> list[Tensor]:
    """Return the parameters that are trained in place of a linear's weight."""
    layers = [m for m in model.modules() if isinstance(m, Converted)]
    trained = [(m, m.subspace.parameter) for m in layers if m.subspace is not None]
    return [parameter for m, parameter in trained if parameter is not m.weight]
