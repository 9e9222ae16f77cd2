"""Number the examples of a data set, so that what is kept per sample finds its sample."""

from __future__ import annotations

import operator
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from leantune.errors import ConfigError

if TYPE_CHECKING:
    import datasets

SAMPLE_ID = "sample_id"


def with_sample_ids(dataset: Any) -> Any:
    """Give every example an integer field ``sample_id``: its index, 0 to n - 1.

    Shuffle, select or split the result, not the input of this call: the ids travel with the rows.

    Args:
        dataset: a ``datasets.Dataset``, or any object with ``__len__`` and ``__getitem__`` whose
            examples are mappings.

    Returns:
        A ``datasets.Dataset`` with one more column, or a thin wrapper of any other data set.

    Raises:
        ConfigError: no length, examples that are not mappings, or the field is taken.
    """
    if isinstance(dataset, Mapping) or not (
        hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")
    ):
        raise ConfigError(
            "with_sample_ids: dataset must be map-style (__len__ and __getitem__), "
            f"got {type(dataset).__name__}; give one split, not a stream or a dict of splits"
        )
    # Whoever holds a datasets.Dataset has imported its module already.
    module = sys.modules.get("datasets")
    if module is not None and isinstance(dataset, module.Dataset):
        if SAMPLE_ID in dataset.column_names:
            raise _taken(dataset.column_names)
        if dataset.format["type"] != "custom":
            return _add_id_column(dataset)
    if len(dataset) > 0:
        _with_id(dataset[0], 0)
    return SampleIdDataset(dataset)


@dataclass(frozen=True, eq=False)
class SampleIdDataset:
    """A map-style data set whose examples carry their index as ``sample_id``.

    Args:
        dataset: the examples, mappings without that field.
    """

    dataset: Any

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        index = operator.index(index)
        position = index + len(self) if index < 0 else index
        if not 0 <= position < len(self):
            raise IndexError(f"index {index} is out of range for {len(self)} examples")
        return _with_id(self.dataset[position], position)


def _with_id(example: Any, index: int) -> dict[str, Any]:
    if not isinstance(example, Mapping):
        raise ConfigError(
            "with_sample_ids: examples must be mappings of field to value, "
            f"got {type(example).__name__} at index {index}; return dicts from __getitem__"
        )
    if SAMPLE_ID in example:
        raise _taken(list(example))
    return {**example, SAMPLE_ID: index}


def _taken(fields: list[str]) -> ConfigError:
    return ConfigError(
        f"with_sample_ids: field {SAMPLE_ID!r} must be free, "
        f"got fields {', '.join(map(str, fields))}; "
        "rename the field, or leave this call out if it was made already"
    )


def _add_id_column(dataset: datasets.Dataset) -> datasets.Dataset:
    import datasets

    shown = dict(dataset.format)
    numbered = dataset.with_format(None).add_column(
        SAMPLE_ID, list(range(len(dataset))), feature=datasets.Value("int64")
    )
    # A column added under a format with chosen columns would stay invisible.
    return numbered.with_format(
        type=shown["type"],
        columns=[*shown["columns"], SAMPLE_ID],
        output_all_columns=shown["output_all_columns"],
        **shown["format_kwargs"],
    )
