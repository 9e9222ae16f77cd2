"""What a plan is asked for, checked, and the batch that stands for it."""

import inspect
import re
from collections.abc import Mapping
from dataclasses import MISSING, dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from leantune.core.config import Options, option
from leantune.errors import ConfigError, shown

_BUDGET = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([kKMGT]?)(i?)B\s*")
_DTYPES = {"float32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
BUDGET_RULE = "a size with its unit, or bytes, above 0"


def parse_budget(given: Any, who: str) -> int:
    """Return the bytes of a budget, such as ``"22GiB"``.

    Args:
        given: a text, or bytes.
        who: the first word of an error.

    Raises:
        ConfigError: there is no unit, or nothing above zero.
    """
    found = _BUDGET.fullmatch(given) if isinstance(given, str) else None
    num_bytes = given
    if found is not None:
        base = 1024 if found[3] else 1000
        num_bytes = int(float(found[1]) * base ** " KMGT".index(found[2].upper() or " "))
    if type(num_bytes) is not int or num_bytes <= 0:
        raise ConfigError(
            f"{who}: budget must be {BUDGET_RULE}, got {shown(given)}; for example '22GiB', "
            "'8 GB' or '500MiB'"
        )
    return num_bytes


@dataclass(frozen=True, kw_only=True)
class PlanRequest(Options):
    """A request is a batch and a budget; ``budget`` is kept as bytes.

    Raises:
        ConfigError: a bad value; a budget without a unit, or not above zero.
    """

    own_rules: ClassVar[Mapping[str, str]] = {"budget": BUDGET_RULE}

    batch_size: int = option(MISSING, ge=1, le=10**9, help="samples of an optimiser step")
    max_length: int = option(MISSING, ge=2, le=10**9, help="tokens of the longest sample")
    budget: int = option(MISSING, help="memory that the step may take, such as 22GiB")
    min_keep_ratio: float = option(
        0.3, gt=0, le=1, help="least share of rows that WTA-CRS may keep; 1 leaves it out"
    )
    precision: Literal["float32", "bf16", "fp16"] = option(
        "float32", help="dtype of the products; weights keep theirs"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "budget", parse_budget(self.budget, "plan"))

    @property
    def dtype(self) -> torch.dtype | None:
        """The dtype of autocast, or None."""
        return _DTYPES[self.precision]

    def batch(self, model: nn.Module, device: torch.device) -> dict[str, Any]:
        """Return the longest batch, with one token of padding: its mask is kept for backward.

        Raises:
            ConfigError: the model reads no token ids, or not so many.
        """
        who, takes = type(model).__name__, inspect.signature(model.forward).parameters
        config: Any = getattr(model, "config", None)
        longest = getattr(config, "max_position_embeddings", None) or self.max_length
        if "input_ids" not in takes or self.max_length > longest:
            rule = f"at most {longest} for {who}, got {self.max_length}; shorten it"
            raise ConfigError(
                f"plan: max_length must be {rule}"
                if "input_ids" in takes
                else f"plan: model must read input_ids, got {who}; measure it with leantune.ledger"
            )
        shape = (self.batch_size, self.max_length)
        ids = torch.ones(shape, dtype=torch.int64, device=device)
        mask = torch.ones_like(ids)
        mask[-1, -1] = 0
        labels = ids.masked_fill(mask == 0, -100)
        if "SequenceClassification" in who:
            is_number = getattr(config, "num_labels", 2) == 1
            labels = torch.zeros(len(ids), device=device).to(torch.float32 if is_number else ids)
        batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
        return {name: tensor for name, tensor in batch.items() if name in takes}
