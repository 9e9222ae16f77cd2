"""The registry: what every method declares about itself, so that shared code needs no names."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from torch import nn

from leantune.core.config import Axis, MethodConfig, unknown_key
from leantune.core.sites import Site
from leantune.errors import ConfigError
from leantune.ops.stores import ActivationStore

if TYPE_CHECKING:
    from leantune.core.session import Session


Groups = list[list[Site]]


class Change(Protocol):
    """One reversible change that a method made to a model."""

    def undo(self) -> None:
        """Put back the very objects and flags that were there before."""
        ...

    def merge(self) -> None:
        """Fold trained weights into the plain modules and put those back."""
        ...


@dataclass(frozen=True)
class Figure:
    """A few numbers of one kind about a method, for people to compare.

    Args:
        title: of a few words.
        note: a sentence or two: what the numbers are, and what they were measured on.
        values: label -> finite number, in the order to be shown.
    """

    title: str
    note: str
    values: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class MethodSpec:
    """What one method is; registering it is enough to be tested, saved, listed and offered.

    Exactly one of ``stores``, ``build`` and ``attach`` is given.

    Args:
        config: the option class; its ``method`` attribute is the registry name.
        axis: at most one method per axis and site; the whole compatibility rule.
        roles: site roles it can act on.
        summary: one line for lists and help.
        source: paper and section.
        selects: (site, config) -> whether the method takes this site by default.
        stores: (groups of linears that may read one input, config, session) -> one store for
            each; for methods on the ``saved`` axis of linears.
        build: (site, config, session) -> a module that adopts the old parameters.
        attach: (model, sites, config, session) -> one change; for methods that need hooks, or
            hand over to another library.
        check: (site, config) -> why the method cannot act there, or None.
        neutral: options under which the model's output and gradients equal the plain model's.
        example: options that exercise the method on a tiny model; used by tests and benches.
        merges: (config) -> whether plain modules can compute the same; ``session.merge`` refuses
            the others before it folds anything.
        needs_sample_ids: (config) -> whether batches must carry ``sample_id``.
        on_step: (session, step) -> None, called once per optimiser step.
        calibrate: (session, batches) -> None, called by ``session.calibrate``.
        num_calibration_batches: (config) -> how many batches the trainer callback calibrates on.
        figures: (session, calibration, held_out) -> what a run's report shows of the method,
            measured once, after calibration and before step 1. Both are lists of batches: those
            that the method calibrated on (it may have taken fewer), and others, at least one.
            Called once however many configs of the method there are; leaves no trace, as
            ``measure.calibration_step`` does.
    """

    config: type[MethodConfig]
    axis: Axis
    roles: tuple[str, ...]
    summary: str
    source: str
    selects: Callable[[Site, Any], bool] = lambda site, config: True
    stores: "Callable[[Groups, Any, Session], Sequence[Sequence[ActivationStore]]] | None" = None
    build: "Callable[[Site, Any, Session], nn.Module] | None" = None
    attach: "Callable[[nn.Module, list[Site], Any, Session], Change] | None" = None
    check: Callable[[Site, Any], str | None] = lambda site, config: None
    neutral: Mapping[str, Any] | None = None
    example: Mapping[str, Any] = field(default_factory=dict)
    merges: Callable[[Any], bool] = lambda config: True
    needs_sample_ids: Callable[[Any], bool] = lambda config: False
    on_step: "Callable[[Session, int], None] | None" = None
    calibrate: "Callable[[Session, Any], None] | None" = None
    num_calibration_batches: Callable[[Any], int] = lambda config: 8
    figures: "Callable[[Session, list[Any], list[Any]], Sequence[Figure]] | None" = None

    def __post_init__(self) -> None:
        ways = [w for w in (self.stores, self.build, self.attach) if w is not None]
        assert len(ways) == 1, f"{self.name}: give exactly one of stores, build, attach"
        assert self.name, f"{self.config.__name__} must set its `method` name"

    @property
    def name(self) -> str:
        """The registry name: the paper's short name, lower case."""
        return self.config.method


_METHODS: dict[str, MethodSpec] = {}


def register(spec: MethodSpec) -> None:
    """Add one method; a second registration under the same name is refused."""
    if spec.name in _METHODS:
        raise ConfigError(f"register: method must be new, got {spec.name!r}, which is taken")
    _METHODS[spec.name] = spec


def get(name: str) -> MethodSpec:
    """Return the spec registered under ``name``.

    Raises:
        ConfigError: no such method; the message lists those there are.
    """
    if name not in _METHODS:
        raise ConfigError(unknown_key("leantune", "method", name, list(_METHODS)))
    return _METHODS[name]


def methods() -> dict[str, MethodSpec]:
    """Return the registry: name -> spec, in order of name."""
    return dict(sorted(_METHODS.items()))


def config_from_dict(data: Mapping[str, Any]) -> MethodConfig:
    """Build the config that ``data["method"]`` names.

    Raises:
        ConfigError: ``method`` is missing or unknown, or an option is.
    """
    if not isinstance(data, Mapping) or "method" not in data:
        raise ConfigError(
            f"recipe: each entry of methods must have a 'method' name, got {data!r}; "
            f"methods: {', '.join(_METHODS)}"
        )
    return get(str(data["method"])).config.from_dict(data)
