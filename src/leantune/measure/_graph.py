"""This module reads from outside what an autograd graph holds, and unpacks nothing."""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from fnmatch import fnmatchcase
from typing import Any, cast

from torch import Tensor
from torch.autograd.function import BackwardCFunction

from leantune.core.tensors import iter_tensors
from leantune.errors import UnsupportedError
from leantune.ops.backend import is_fake

Node = Any  # torch types neither C++ nodes nor the nodes of Python Functions usefully.

LINEAR_WEIGHT = "linear weight copy"
CHECKPOINT = "checkpoint input"

# Name of the node without "Backward0" -> kind; the first match counts.
_KINDS: tuple[tuple[str, str], ...] = (
    ("Addmm", "linear input"),
    ("Mm", "linear input"),
    ("Linear", "linear input"),
    ("*Attention*", "attention"),
    ("*bmm", "matmul"),
    ("Bmm", "matmul"),
    ("Mv", "matmul"),
    ("Dot", "matmul"),
    ("*Dropout*", "dropout"),
    ("*LayerNorm*", "norm"),
    ("*RmsNorm*", "norm"),
    ("*RMSNorm*", "norm"),
    ("*GroupNorm*", "norm"),
    ("*BatchNorm*", "norm"),
    ("*LogSoftmax*", "loss"),
    ("*Loss*", "loss"),
    ("*CrossEntropy*", "loss"),
    ("KlDiv", "loss"),
    ("*Softmax*", "softmax"),
    *((f"*{name}*", "activation function") for name in ("Gelu", "Silu", "Elu", "Relu", "Glu")),
    *((f"*{name}*", "activation function") for name in ("Sigmoid", "Tanh", "Softplus", "Mish")),
    *((f"*{name}*", "activation function") for name in ("swish", "Threshold", "Prelu")),
    ("Embedding*", "embedding"),
    ("*Convolution*", "convolution"),
    *((name, "elementwise") for name in ("Mul", "Div", "Pow", "Sqrt", "Rsqrt", "Exp", "Log")),
    *((name, "elementwise") for name in ("Abs", "Sin", "Cos", "Addcmul", "Addcdiv", "Lerp")),
    ("Index*", "indexing"),
    ("Gather", "indexing"),
    ("Scatter*", "indexing"),
    ("Where", "masking"),
    ("MaskedFill*", "masking"),
)
# Python Functions of torch itself; any other one is known by its class name.
_FUNCTION_KINDS = {
    "CheckpointFunction": CHECKPOINT,
    "NoopSaveInputs": CHECKPOINT,
    "CompiledFunction": "compiled region",
    # What a converted linear kept: the whole input, or some rows of it.
    "SaveForBackward": "linear input",
}
_LINEAR_OPERATIONS = {"Addmm", "Mm"}
# Reentrant checkpointing keeps generator states on ctx; they are no activations, and the
# non-reentrant mode keeps the same states where nobody can see them.
_GENERATOR_STATES = {"fwd_cpu_state", "fwd_device_states"}
_COMPRESSED_PARTS = {
    "torch.sparse_csr": ("crow_indices", "col_indices", "values"),
    "torch.sparse_bsr": ("crow_indices", "col_indices", "values"),
    "torch.sparse_csc": ("ccol_indices", "row_indices", "values"),
    "torch.sparse_bsc": ("ccol_indices", "row_indices", "values"),
}


def dense_parts(tensor: Tensor) -> list[Tensor]:
    """Return the strided tensors that hold the memory of ``tensor``, itself if it is strided.

    Raises:
        UnsupportedError: the layout gives no access to its memory.
    """
    layout = str(tensor.layout)
    if layout == "torch.strided":
        flatten: Callable[[], tuple[list[str], Any]] | None = getattr(
            tensor, "__tensor_flatten__", None
        )
        if flatten is None:
            return [tensor, *_scales(getattr(tensor, "quant_state", None))]
        return [part for name in flatten()[0] for part in dense_parts(getattr(tensor, name))]
    if layout == "torch.sparse_coo":
        return [tensor._indices(), tensor._values()]
    if layout in _COMPRESSED_PARTS:
        return [getattr(tensor, name)() for name in _COMPRESSED_PARTS[layout]]
    raise UnsupportedError(
        f"ledger: layout must be strided, sparse or a wrapper of such tensors, got {layout}; "
        f"convert the tensor with to_dense()"
    )


def _scales(state: Any) -> list[Tensor]:
    """Return what bitsandbytes keeps beside a packed weight: scales, which may be packed too."""
    if state is None:
        return []
    tensors = [value for value in vars(state).values() if isinstance(value, Tensor)]
    return tensors + _scales(getattr(state, "state2", None))


def storage_key(part: Tensor) -> tuple[str, int]:
    """Return what two tensors on the same memory have in common, while both are alive."""
    storage = part.untyped_storage()
    # What has no numbers has no address, but a storage of its own.
    address = storage._cdata if is_fake(part) else storage.data_ptr()  # pyright: ignore[reportPrivateUsage]
    return str(part.device), address


def walk(roots: Iterable[Tensor]) -> Iterator[Node]:
    """Yield every node of the graphs that end in ``roots``, each once."""
    stack = [root.grad_fn for root in roots if root.grad_fn is not None]
    seen = set(stack)
    while stack:
        node = stack.pop()
        yield node
        for parent, _ in node.next_functions:
            if parent is not None and parent not in seen:
                seen.add(parent)
                stack.append(parent)


def is_function(node: Node) -> bool:
    """Return whether the node belongs to a ``torch.autograd.Function`` written in Python."""
    return isinstance(node, BackwardCFunction)


def operation(node: Node) -> str:
    """Return the node's name without the decoration: ``Addmm``, ``CheckpointFunction``."""
    return re.sub(r"Backward\d*$", "", node.name()).rpartition("::")[2].strip("_")


def packed_data(node: Node) -> Iterator[tuple[str, Any]]:
    """Yield (field, what the pack hook returned) for everything the node saved.

    Nothing is unpacked: unpacking would make checkpointing recompute. Where this torch does not
    show the packed object, nothing is yielded for it.
    """
    for name in dir(node):
        if not name.startswith("_raw_saved_"):
            continue
        raw: Any = getattr(node, name)
        several = cast("Sequence[Any]", raw) if isinstance(raw, (tuple, list)) else (raw,)
        for saved in several:
            data: Any = getattr(saved, "data", None)
            if data is not None:
                yield name.removeprefix("_raw_saved_"), data


def hidden_tensors(node: Node) -> Iterator[tuple[str, Tensor]]:
    """Yield (attribute, tensor) for tensors that a Python Function put on its ``ctx``."""
    if not is_function(node):
        return
    for name, value in vars(cast(object, node)).items():
        if name not in _GENERATOR_STATES:
            for tensor in iter_tensors(value):
                yield name, tensor


def kind_of(node: Node, field: str) -> str:
    """Return in words what the node saved in ``field``."""
    name = operation(node)
    if is_function(node):
        return _FUNCTION_KINDS.get(name, name)
    if name in _LINEAR_OPERATIONS:
        if not _comes_from_leaf(node.next_functions[-1][0]):
            return "matmul"
        return LINEAR_WEIGHT if field == "mat2" else "linear input"
    return next((kind for pattern, kind in _KINDS if fnmatchcase(name, pattern)), name)


def _comes_from_leaf(node: Node | None) -> bool:
    # The second factor of a linear is a transposed and perhaps cast parameter, or a constant.
    while node is not None and operation(node) in {"T", "Transpose", "ToCopy"}:
        node = node.next_functions[0][0]
    return node is None or operation(node) == "AccumulateGrad"
