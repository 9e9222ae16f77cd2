"""The options of checkpointing."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from leantune.core.config import MethodConfig, option
from leantune.errors import ConfigError, shown

BLOCK = ("block",)
_CHOICES = (BLOCK, ("mlp",), ("attention",), ("mlp", "attention"), ("attention", "mlp"))


@dataclass(frozen=True, kw_only=True)
class Checkpoint(MethodConfig):
    """Checkpointing recomputes chosen blocks, or parts of them, in backward; exact, for more time.

    What is recomputed keeps its input alone, and does without its last product the second time.
    ``sites`` chooses blocks, ``parts`` what of them.
    """

    method: ClassVar[str] = "checkpoint"
    own_rules: ClassVar[Mapping[str, str]] = {
        **MethodConfig.own_rules,
        "parts": "'block', 'mlp', 'attention' or a list of the latter two",
    }

    parts: tuple[str, ...] = option(
        BLOCK,
        help="what of each block is recomputed: all of it, its MLP, its attention, or both of "
        "these, each by itself",
    )
    offload: bool = option(
        False, help="whether kept inputs that are on a GPU wait in host memory for backward"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        given: Any = (self.parts,) if isinstance(self.parts, str) else self.parts
        names = tuple(given) if isinstance(given, Sequence) else ()
        if names not in _CHOICES:
            raise ConfigError(
                f"Checkpoint: parts must be {self.own_rules['parts']}, got {shown(self.parts)}; "
                "leave it out to recompute whole blocks"
            )
        object.__setattr__(self, "parts", names)
