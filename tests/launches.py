"""Operations that launch something on a GPU, by a count that needs none."""

from collections.abc import Callable
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

VIEWS = ("detach", "view", "_unsafe_view", "expand", "t", "slice", "select", "unsqueeze")
MORE_VIEWS = ("transpose", "alias", "as_strided", "permute", "split", "squeeze", "narrow")
EMPTY = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")
OTHERS = ("_local_scalar_dense", "lift_fresh")


class _Operations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        if name not in (*VIEWS, *MORE_VIEWS, *EMPTY, *OTHERS):
            self.names.append(name)
        return func(*args, **(kwargs or {}))


def operations(function: Callable[[], object]) -> list[str]:
    """Name the operations that a function computes with; views and allocations are none."""
    with _Operations() as seen:
        function()
    return seen.names
