"""Attention and FFNs as one forward shows them, whatever their modules are called.

Inside a block every tensor is marked with its origin: the linears whose outputs it was made of.
"""

import re
from collections import Counter
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from leantune.core import origins
from leantune.core.adapters import base_name
from leantune.core.linear import is_called_linear
from leantune.core.origins import FFN, MIXED, Attention, Dropped, LinearCall, Origin
from leantune.core.rehearsal import can_rehearse, rehearse
from leantune.core.sites import Part, path_of
from leantune.core.tensors import iter_tensors
from leantune.errors import UnsupportedError

_ACTIVATION = re.compile(
    "relu6?_?|gelu|silu_?|sigmoid_?|tanh_?|erf|elu|leaky_relu|mish|softplus|hardswish"
)
_PRODUCT = re.compile("(__r?)?matmul(__)?|bmm|baddbmm|einsum")
# These move elements: sizes, and tensors that only lend a shape, mean nothing.
_MOVING = re.compile(r"chunk|split|unbind|narrow|tensor_split|__getitem__|\w+_as")
# These keep the shape, but an element of the output depends on more than the one at its place.
_MIXING = re.compile(r"\w*softmax|\w+_norm|normalize|cumsum|sort|flip|roll|linear|addmm|conv\dd")


class Trace(NamedTuple):
    """What one forward showed: the parts, or the reason why it showed none."""

    parts: list[Part]
    failure: str | None = None


def trace_parts(model: nn.Module, blocks: Sequence[str]) -> Trace:
    """Find attention and FFNs in one forward on the model's dummy inputs, and leave all as it was.

    An FFN that can be computed only where it stands, because its activation is no module or is
    used elsewhere, is a part without ``activation``. A model without dummy inputs has no parts.

    Args:
        model: plain or with PEFT layers.
        blocks: names of the blocks, none inside another; nothing is looked for outside them.
    """
    if not blocks or not can_rehearse(model):
        return Trace([])
    try:
        with _Watch(model, blocks) as watch:
            rehearse(model)
    except UnsupportedError as error:
        return Trace([], str(error))
    return Trace(watch.parts())


@dataclass(eq=False)
class _Frame:
    """A call of a module that has not returned yet.

    Attributes:
        origin: of the first input.
        called: names of the linears and of the modules without children that were called inside.
        ffns: what this module may turn out to be.
    """

    name: str
    module: nn.Module
    inputs: Sequence[Tensor]
    origin: Origin
    called: set[str] = field(default_factory=set[str])
    ffns: list[FFN] = field(default_factory=list[FFN])


class _Watch(TorchFunctionMode):
    """Follows the tensors of a forward through a model's blocks."""

    def __init__(self, model: nn.Module, blocks: Sequence[str]) -> None:
        super().__init__()
        self._model = model
        self._blocks = set(blocks)
        self._handles: list[RemovableHandle] = []
        self._begin()

    def _begin(self) -> None:
        """Forget what a forward that failed has shown."""
        self._block = ""
        self._is_following = False
        self._stack: list[_Frame] = []
        # Each tensor is kept, so that its id stays its own; all go when their block ends.
        self._origins: dict[int, tuple[Tensor, Origin]] = {}
        self._num_calls: Counter[str] = Counter()
        self._ffns: dict[str, tuple[str, FFN]] = {}
        self._attentions: dict[str, Attention] = {}

    def __enter__(self) -> "_Watch":
        modules = dict(self._model.named_modules())
        linears = {base_name(name) for name, module in modules.items() if is_called_linear(module)}
        for name, module in modules.items():
            if name in linears:
                self._hook(name, module, self._enter_linear, self._leave_linear)
            elif linears.isdisjoint(path_of(name)):
                self._hook(name, module, self._enter_module, self._leave_module)
        return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        while self._handles:
            self._handles.pop().remove()
        super().__exit__(*exception)

    def _hook(self, name: str, module: nn.Module, enter: Any, leave: Any) -> None:
        def before(module: nn.Module, args: Any, kwargs: Any) -> None:
            if not name:
                self._begin()
            if name in self._blocks:
                self._block = name
            if self._block:
                with self._not_following():
                    enter(name, module, list(iter_tensors((args, kwargs))))

        def after(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            if self._block:
                with self._not_following():
                    leave(name, module, list(iter_tensors((args, kwargs))), output)
            if name == self._block:
                self._block = ""
                self._is_following = False
                self._origins.clear()

        self._handles += [
            module.register_forward_pre_hook(before, with_kwargs=True),
            module.register_forward_hook(after, with_kwargs=True),
        ]

    @contextmanager
    def _not_following(self) -> Generator[None]:
        self._is_following = False
        yield
        self._is_following = True

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run a function of torch and mark what it returns."""
        output = func(*args, **(kwargs or {}))
        if self._is_following:
            name = getattr(func, "__name__", "")
            read = list(iter_tensors((args, kwargs)))
            made = list(iter_tensors(output))
            if made and any(map(self._origin, read)):
                rate = (kwargs or {}).get("p", 1.0) if name == "dropout" else 0.0
                origin = self._origin_of_call(name, read, made)
                for x in made:
                    self._mark(x, (*origin, Dropped(None)) if rate else origin)
        return output

    def _origin(self, x: Tensor) -> Origin:
        return self._origins[id(x)][1] if id(x) in self._origins else ()

    def _mark(self, x: Tensor, origin: Origin) -> None:
        self._origins[id(x)] = x, origin

    def _origin_of_call(self, name: str, read: list[Tensor], made: list[Tensor]) -> Origin:
        every = [self._origin(x) for x in read]
        marked = [origin for origin in every if origin]
        if name == "scaled_dot_product_attention":
            return (self._see_attention(*every[:3]),)
        if _PRODUCT.fullmatch(name) and len(marked) > 1:
            return origins.product(*marked[-2:])
        origin = origins.union(*marked)
        scores = origins.first(origins.Scores, origin)
        if name == "softmax" and scores is not None:
            return (self._see_attention(scores.query, scores.key),)
        if _ACTIVATION.fullmatch(name) and len(origin) == 1 and isinstance(origin[0], LinearCall):
            return (origins.Activation(None, origin[0]),)
        size = made[0].numel()
        is_resized = any(x.numel() != size for x in read if self._origin(x))
        meets_others = any(x.numel() == size for x in read if not self._origin(x))
        if not _MOVING.fullmatch(name) and (
            is_resized or meets_others or _MIXING.fullmatch(name) or _PRODUCT.fullmatch(name)
        ):
            return origins.union(origin, (MIXED,))
        return origin

    def _see_attention(self, query: Origin, key: Origin, value: Origin = ()) -> Attention:
        """Note attention in the innermost module that has children."""
        frame = next(f for f in reversed(self._stack) if any(f.module.children()))
        seen = Attention(frame.name, self._block, frame.inputs, query, key, value)
        if frame.name != self._block:
            self._attentions.setdefault(frame.name, seen)
        return seen

    def _enter_module(self, name: str, module: nn.Module, inputs: list[Tensor]) -> None:
        origin = self._origin(inputs[0]) if inputs else ()
        self._stack.append(_Frame(name, module, inputs, origin))

    def _leave_module(self, name: str, module: nn.Module, _: list[Tensor], output: Any) -> None:
        frame = self._stack.pop()
        is_leaf = not any(module.children()) and not isinstance(module, nn.Identity)
        if is_leaf:
            frame.called.add(name)
            self._num_calls[name] += 1
        if self._stack:
            self._stack[-1].called |= frame.called
        if not isinstance(output, Tensor) or not frame.inputs:
            return
        for ffn in frame.ffns:
            self._end_ffn(ffn, frame, output)
        if isinstance(module, nn.Dropout):
            self._mark(output, (*frame.origin, Dropped(name, _copy(output))))
        elif is_leaf:
            self._see_activation(name, frame, output)

    def _see_activation(self, name: str, frame: _Frame, output: Tensor) -> None:
        source, *others = frame.origin or (None,)
        if not isinstance(source, LinearCall) or others or MIXED in self._origin(output):
            return
        read = frame.inputs[0]
        if read.shape == output.shape and not origins.same(read, output):
            seen = origins.Activation(name, source, _copy(read), _copy(output))
            self._mark(output, (seen,))

    def _end_ffn(self, ffn: FFN, frame: _Frame, output: Tensor) -> None:
        """Find out whether a module that ends now computes the FFN and nothing else."""
        down, *others = self._origin(output) or (None,)
        names = {call.name for call in others if isinstance(call, Dropped) and call.name}
        if not isinstance(down, LinearCall) or len(names) < len(others) or len(names) > 1:
            return
        ffn.is_whole = (
            down.name == ffn.modules["down"]
            and origins.same(output, down.made)
            and origins.same(frame.inputs[0], ffn.up.read)
            and frame.called <= {*ffn.modules.values(), *names}
        )
        if ffn.is_whole:
            ffn.modules.update(zip(["output_dropout"], names, strict=False))

    def _enter_linear(self, name: str, _: nn.Module, inputs: list[Tensor]) -> None:
        origin = self._origin(inputs[0])
        attention = origins.first(Attention, origin)
        if attention is not None:
            attention.output = attention.output or name
            return
        ffn = origins.match_ffn(name, origin, inputs[0])
        if ffn is not None and name not in self._ffns:
            self._ffns[name] = self._block, ffn
            for frame in self._stack:
                if frame.name == ffn.inside != self._block:
                    frame.ffns.append(ffn)

    def _leave_linear(self, name: str, _: nn.Module, inputs: list[Tensor], output: Any) -> None:
        self._num_calls[name] += 1
        self._stack[-1].called.add(name)
        if isinstance(output, Tensor):
            self._mark(output, (LinearCall(name, inputs[0], _copy(output)),))

    def parts(self) -> list[Part]:
        """Return what was seen, each part once."""
        mlps = [self._mlp_part(block, ffn) for block, ffn in self._ffns.values()]
        return [*map(origins.attention_part, self._attentions.values()), *mlps]

    def _mlp_part(self, block: str, ffn: FFN) -> Part:
        modules, up = ffn.modules, ffn.modules["up"]
        if ffn.is_whole:
            return Part("mlp", ffn.inside, block, modules)
        num_calls = {self._num_calls[name] for name in modules.values()}
        if "activation" in modules and not ffn.is_gated and len(num_calls) == 1:
            # The linears lie apart: what follows the first becomes the identity.
            others = tuple(name for part, name in modules.items() if part != "up")
            return Part("mlp", up, block, modules, also_replaced=others)
        linears = {part: name for part, name in modules.items() if part in ("up", "gate", "down")}
        return Part("mlp", up if ffn.inside == block else ffn.inside, block, linears)


def _copy(x: Tensor) -> Tensor:
    return x.detach().clone()
