"""The tensors inside whatever a model is called with or returns."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, cast

from torch import Tensor


def iter_tensors(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in nested mappings, lists and tuples, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in cast("Mapping[Any, Any]", value).values():
            yield from iter_tensors(item)
    elif isinstance(value, (list, tuple, set, frozenset)):
        for item in cast("Iterable[Any]", value):
            yield from iter_tensors(item)
