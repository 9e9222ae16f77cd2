"""What one method did to one model: the live object behind each config of a recipe."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from leantune.core.linear import Ownership, Swap
from leantune.core.sites import Site
from leantune.errors import ConfigError

SAMPLE_ID = "sample_id"
"""The batch field that numbers samples, for methods that remember each of them."""


class Conversion(ABC):
    """A conversion is what one config did to one model, and everything that this takes later.

    The session keeps one for each config, in the order in which they were made, and undoes them in
    reverse. Two configs of one method are two conversions that never see each other.

    Attributes:
        name: its place in the recipe and its method; entries of a session's state begin with it.
        config: the method's options.
        sites: where it acts, as they were before; all that were chosen, unless the method has set
            fewer. Set with ``name`` and ``config`` once it is made.
        can_merge: whether plain modules can compute what the converted model computes.
        is_plain: whether the model's state holds the weights that it computes with, where
            ``can_merge`` says that there are such; otherwise :meth:`merge_state` makes them.
        is_adapter: whether the model's own files hold all that was trained, as a PEFT adapter.
        num_calibration_batches: how many batches :meth:`calibrate` wants; 0 where none is needed.
        sparse_parameters: trained parameters whose gradients are sparse tensors.
        needs_sample_ids: whether training batches must carry an integer ``sample_id`` per sample,
            which the conversion takes out before the model sees the batch.
    """

    name: str
    config: Any
    sites: Sequence[Site] = ()
    can_merge: bool = True
    is_plain: bool = True
    is_adapter: bool = False
    num_calibration_batches: int = 0
    sparse_parameters: Sequence[nn.Parameter] = ()
    needs_sample_ids: bool = False

    def calibrate(self, batches: Iterable[Any]) -> None:  # noqa: B027 (optional)
        """Find the method's starting point in some batches; does nothing by default.

        Args:
            batches: of the form that the model is called with (``model(**batch)``).
        """

    def on_step(self, step: int) -> None:  # noqa: B027 (optional)
        """Act after optimiser step number ``step``, counted from 1; does nothing by default."""

    def not_ours(self, owned: Ownership) -> list[str]:
        """Return the names of modules that others have since put where :meth:`undo` would act.

        Called before anything is undone, the last conversion first.

        Args:
            owned: is told what this conversion will put back.
        """
        return []

    @abstractmethod
    def undo(self) -> None:
        """Put back the very objects and flags that were there before; trained weights stay."""

    def merge(self) -> None:
        """Fold what was trained into the plain modules, and put those back."""
        self.undo()

    def merge_state(self, state: dict[str, Tensor], model: nn.Module) -> None:  # noqa: B027
        """Make of a model's state that of the plain model which :meth:`merge` would leave.

        Nothing that runs is touched; does nothing by default.

        Args:
            state: name -> value, of the model or already gathered from its shards; changed.
            model: shares all with the converted one but its own attributes, which may be changed.
        """

    def state_dict(self) -> dict[str, Tensor]:
        """Return what a resumed run needs besides weights and optimiser, by name."""
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take a state on, so that the run goes on as if it had never stopped.

        Raises:
            ConfigError: the state is damaged, or of another model or recipe.
        """
        if state:
            raise ConfigError(
                f"session: state must hold what this recipe keeps, got an entry {min(state)!r} "
                "that no method here keeps; apply the recipe that the state was saved with"
            )


def split_state(state: Mapping[str, Tensor], names: Iterable[str]) -> list[dict[str, Tensor]]:
    """Split a session's state into those of its conversions, whose keys begin with ``name/``.

    Raises:
        ConfigError: an entry of another conversion.
    """
    parts: dict[str, dict[str, Tensor]] = {name: {} for name in names}
    for key, value in state.items():
        name, slash, rest = key.partition("/")
        if slash and name not in parts:
            raise ConfigError(
                f"session: state must belong to this recipe, got an entry {key!r} that no "
                "method here keeps; apply the recipe that the state was saved with"
            )
        if slash:
            parts[name][rest] = value
    return list(parts.values())


class SwapConversion(Conversion):
    """A conversion that only put modules into others' places takes them out again.

    Args:
        swaps: in the order in which they were made.
    """

    def __init__(self, swaps: Sequence[Swap]) -> None:
        self.swaps = list(swaps)

    def not_ours(self, owned: Ownership) -> list[str]:
        """Return the names of those that others have replaced."""
        return [swap.name for swap in reversed(self.swaps) if not owned.undo(swap)]

    def undo(self) -> None:
        """Put the old modules back, the last one first."""
        while self.swaps:
            self.swaps[-1].undo()
            self.swaps.pop()
