"""A model under SparseGrad: linears are put in and taken out, calibrated and saved.

Legend: d_out and d_in the sides of a weight.
"""

from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from leantune.core.conversion import SwapConversion
from leantune.core.distributed import broadcast, is_distributed, sum_over_ranks
from leantune.core.linear import converted, swap
from leantune.core.runtime import Runtime
from leantune.core.sites import Site
from leantune.errors import ConfigError, UnsupportedError
from leantune.measure.step import calibration_step
from leantune.methods.sparse_grad import maths
from leantune.methods.sparse_grad.config import SparseGrad
from leantune.methods.sparse_grad.subspace import (
    NOT_CALIBRATED,
    PARAMETER,
    Bases,
    Collect,
    RotatedLinear,
    SubspaceRule,
    leading_vectors,
)
from leantune.methods.sparse_grad.updater import RotatedWeightUpdater

SIDES = ("q_out", "q_in")


class SparseGradConversion(SwapConversion):
    """A conversion holds all linears that one config converted, and calibrates them together.

    Linears of one group share their bases, so that a model of many layers keeps few of them.
    """

    def __init__(
        self, model: nn.Module, sites: list[Site], config: SparseGrad, runtime: Runtime
    ) -> None:
        super().__init__([])
        self.model, self.config, self.runtime = model, config, runtime
        self.num_calibration_batches = config.num_calibration_batches
        self.is_step = config.selection == "step"
        self.was_trained = [site.module.get_parameter("weight").requires_grad for site in sites]
        self.rules = [self._convert_site(site) for site in sites]
        self.updaters = [RotatedWeightUpdater(rule) for rule in self.rules if self.is_step]
        runtime.at_forward_begin(self.before_forward)  # type: ignore[misc]
        self._hook = model.register_state_dict_pre_hook(self.update)

    def _convert_site(self, site: Site) -> SubspaceRule:
        weight = site.module.get_parameter("weight")
        rule = SubspaceRule(site, self.config, self.runtime)
        start = rule.make_parameter(weight)
        cls = RotatedLinear if self.is_step else None
        rule.module = new = converted(site.module, self.runtime, subspace=rule, cls=cls)
        self.swaps.append(swap(self.model, site.name, new))
        weight.requires_grad_(False)
        new.register_parameter(PARAMETER[self.config.selection], start)
        return rule

    @property
    def sparse_parameters(self) -> Sequence[nn.Parameter]:  # type: ignore[override]
        """The rotated weights, where each step has entries of its own."""
        return [rule.parameter for rule in self.rules] if self.is_step else []

    @property
    def is_plain(self) -> bool:
        """Whether the weights are those that the linears compute with; a delta stands beside."""
        return self.is_step

    def undo(self) -> None:
        """Put the plain linears back, with what was trained; frozen where others froze that."""
        self.update()
        self._hook.remove()
        super().undo()
        for rule, was_trained in zip(self.rules, self.was_trained, strict=True):
            if not self.is_step:
                rule.fold()
            module = rule.module
            module.weight.requires_grad_(was_trained and rule.parameter.requires_grad)
            # The plain linear has the same dictionary of parameters.
            del module._parameters[PARAMETER[self.config.selection]]

    def before_forward(self) -> None:
        """Check before each forward that training may begin."""
        is_training = self.model.training and torch.is_grad_enabled()
        if is_training and not self.is_calibrated and not self.runtime.is_exact:
            raise ConfigError(NOT_CALIBRATED)
        if self.is_step and is_distributed():
            raise UnsupportedError(
                "SparseGrad: selection must be 'block' or 'fixed' in several processes, which "
                "cannot share sparse gradients, got 'step'"
            )

    def update(self, *of_hook: Any) -> None:
        """Bring the dense weights beside rotated ones up to date; a hook may call this."""
        for updater in self.updaters:
            updater.update()

    @property
    def is_calibrated(self) -> bool:
        """Whether the linears have bases."""
        return self.rules[0].bases is not None

    def calibrate(self, batches: Iterable[Any]) -> None:
        """Find the bases from the weight gradients of some batches; no parameter moves.

        A conversion that has bases keeps them: what was trained would mean nothing in others.

        Raises:
            ConfigError: no batches, or a linear whose gradient is zero or not finite.
        """
        if self.is_calibrated:
            return
        shown = list(islice(batches, self.config.num_calibration_batches))
        if not shown:
            raise ConfigError(
                "SparseGrad: calibration must see at least one batch, got none; give "
                "session.calibrate a list of training batches"
            )
        bases = self._find_bases(shown)
        moments = self._find_moments(shown, bases) if self.config.selection == "fixed" else {}
        if self.config.selection == "block":
            # One group has one shape, hence one block.
            blocks = {rule.group: rule.block for rule in self.rules}
            bases = {group: leading_vectors(bases[group], *blocks[group]) for group in bases}
        for rule in self.rules:
            rule.bases = bases[rule.group]
            if rule.name in moments:
                rule.indices = maths.top_entries(moments[rule.name], rule.num_entries)
        for updater in self.updaters:
            updater.start()

    def _find_bases(self, batches: list[Any]) -> dict[str, Bases]:
        """Return the complete bases of every group of linears, the same in all processes."""
        grams: dict[str, tuple[Tensor, Tensor]] = {}
        largest: dict[str, Tensor] = {}

        def add_gram(rule: SubspaceRule, grad: Tensor) -> None:
            if rule.group not in grams:
                dtype = torch.promote_types(grad.dtype, torch.float32)
                out, inn = (torch.zeros(d, d, dtype=dtype, device=grad.device) for d in grad.shape)
                grams[rule.group] = out, inn
            maths.accumulate_grams(*grams[rule.group], grad)
            top = grad.abs().amax()
            largest[rule.name] = torch.maximum(largest.get(rule.name, top), top)

        self.collect_gradients(batches, add_gram)
        self._check_gradients(largest)
        # Sums go by the order of linears, which is the same in all processes.
        groups = dict.fromkeys(rule.group for rule in self.rules)
        sums = {group: [sum_over_ranks(gram) for gram in grams[group]] for group in groups}
        bases = {group: [maths.basis(gram) for gram in sums[group]] for group in groups}
        return {group: Bases(*(broadcast(q) for q in bases[group])) for group in groups}

    def _find_moments(self, batches: list[Any], bases: dict[str, Bases]) -> dict[str, Tensor]:
        """Return linear -> the sum of squares of its rotated gradients, over all processes."""
        moments: dict[str, Tensor] = {}

        def add_moment(rule: SubspaceRule, grad: Tensor) -> None:
            q_out, q_in = bases[rule.group].on(grad.device)
            total = moments.setdefault(rule.name, torch.zeros_like(grad, dtype=q_out.dtype))
            total.add_(maths.rotate(grad, q_out, q_in).square())

        self.collect_gradients(batches, add_moment)
        return {rule.name: sum_over_ranks(moments[rule.name]) for rule in self.rules}

    def collect_gradients(self, batches: list[Any], collect: Collect) -> None:
        """Hand the weight gradient (d_out, d_in) of every linear and batch to ``collect``.

        Forwards and backwards are exact and leave no trace; no two gradients are held at once.
        """
        for rule in self.rules:
            rule.collect = collect
        try:
            for batch in batches:
                with self.runtime.exact():
                    calibration_step("SparseGrad", self.model, batch)
        finally:
            for rule in self.rules:
                rule.collect = None

    def _check_gradients(self, largest: dict[str, Tensor]) -> None:
        like = self.rules[0].parameter.new_zeros(())
        tops = torch.stack([largest.get(rule.name, like).to(like) for rule in self.rules])
        # Summed, so that all processes raise or none does.
        for rule, top in zip(self.rules, sum_over_ranks(tops).tolist(), strict=True):
            if not 0 < top < float("inf"):
                what = "zero in every batch" if top == 0 else f"a largest entry of {top}"
                raise ConfigError(
                    f"SparseGrad: gradient of {rule.name} must be finite and not zero in "
                    f"calibration, got {what}; show batches with labels whose loss is finite and "
                    "depends on this layer, or leave it out with sites="
                )

    def state_dict(self) -> dict[str, Tensor]:
        """Return the bases of every group and the chosen entries of every linear."""
        state: dict[str, Tensor] = {}
        for rule in self.rules:
            if rule.bases is not None:
                state[f"{rule.group}:q_out"] = rule.bases.q_out.to(rule.bases.stored)
                state[f"{rule.group}:q_in"] = rule.bases.q_in.to(rule.bases.stored)
            if rule.indices is not None:
                state[f"{rule.name}:indices"] = rule.indices
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Put bases and entries back.

        Raises:
            ConfigError: the state belongs to another model or recipe, or is damaged.
        """
        if not state:
            for rule in self.rules:
                rule.bases = rule.indices = None
            return
        wanted = self._shapes()
        if wanted.keys() != state.keys():
            raise _other_model(f"{min(wanted.keys() ^ state.keys())!r} on one side only")
        for key, shape in wanted.items():
            if tuple(state[key].shape) != shape:
                raise _other_model(f"shape {tuple(state[key].shape)} for the {shape} of {key}")
            is_wrong = state[key].is_floating_point() == key.endswith(":indices")
            if is_wrong or not bool(state[key].isfinite().all()):
                raise _other_model(f"{state[key].dtype} or NaN or infinite entries in {key}")
        bases: dict[str, Bases] = {}
        for rule in self.rules:
            device, group = rule.parameter.device, rule.group
            if group not in bases:
                bases[group] = Bases(*(state[f"{group}:{side}"].to(device) for side in SIDES))
            rule.bases = bases[group]
            if self.config.selection == "fixed":
                rule.indices = state[f"{rule.name}:indices"].to(device)

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        """Return key -> shape of the state of a calibrated conversion."""
        shapes: dict[str, tuple[int, ...]] = {}
        for rule in self.rules:
            num_vectors = rule.block if self.config.selection == "block" else rule.shape
            for side, d, r in zip(SIDES, rule.shape, num_vectors, strict=True):
                shapes[f"{rule.group}:{side}"] = (d, r)
            if self.config.selection == "fixed":
                shapes[f"{rule.name}:indices"] = (rule.num_entries,)
        return shapes


def _other_model(got: str) -> ConfigError:
    return ConfigError(
        f"SparseGrad: state must belong to this model and recipe, got {got}; load it onto the "
        "model that it was calibrated on, or calibrate anew"
    )
