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
from leantune.methods.sparse_grad.config import SparseGrad
from leantune.methods.sparse_grad.rotated import RotatedLinear, RotatedRule
from leantune.methods.sparse_grad.subspace import NOT_CALIBRATED, Bases, SubspaceRule
from leantune.ops import entries as maths

SIDES = ("q_out", "q_in")


class SparseGradConversion(SwapConversion):
    """A conversion holds all linears that one config converted, and calibrates them together.

    Linears of one group share their bases, so that a model of many layers keeps few of them.
    """

    is_plain = False

    def __init__(
        self, model: nn.Module, sites: list[Site], config: SparseGrad, runtime: Runtime
    ) -> None:
        super().__init__([])
        self.model, self.config, self.runtime = model, config, runtime
        self.num_calibration_batches = config.num_calibration_batches
        self.was_trained = [site.module.get_parameter("weight").requires_grad for site in sites]
        self.rules = [self._convert_site(site) for site in sites]
        self.rotated = [rule for rule in self.rules if isinstance(rule, RotatedRule)]
        runtime.at_forward_begin(self.before_forward)  # type: ignore[misc]
        self._hook = model.register_state_dict_pre_hook(self._write_rotated)

    def _convert_site(self, site: Site) -> SubspaceRule:
        weight = site.module.get_parameter("weight")
        is_step = self.config.selection == "step"
        rule = (RotatedRule if is_step else SubspaceRule)(site, self.config, self.runtime)
        start = rule.make_parameter(weight)
        cls = RotatedLinear if is_step else None
        rule.module = new = converted(site.module, self.runtime, subspace=rule, cls=cls)
        self.swaps.append(swap(self.model, site.name, new))
        weight.requires_grad_(False)
        new.register_parameter(rule.trained_name, start)
        return rule

    @property
    def sparse_parameters(self) -> Sequence[nn.Parameter]:  # type: ignore[override]
        """The rotated weights, where each step has entries of its own."""
        return [rule.parameter for rule in self.rotated]

    def undo(self) -> None:
        """Put the plain linears back, with what was trained; frozen where others froze that."""
        self._hook.remove()
        super().undo()
        for rule, was_trained in zip(self.rules, self.was_trained, strict=True):
            rule.fold()
            module = rule.module
            module.weight.requires_grad_(was_trained and rule.parameter.requires_grad)
            # The plain linear has the same dictionary of parameters.
            del module._parameters[rule.trained_name]

    def merge_state(self, state: dict[str, Tensor], model: nn.Module) -> None:
        """Put what the linears compute with in the place of their weights, one after the other."""
        for rule in self.rules:
            trained = state.pop(f"{rule.name}.{rule.trained_name}")
            weight = f"{rule.name}.weight"
            state[weight] = rule.merged(state[weight], trained).cpu()

    def before_forward(self) -> None:
        """Check before each forward that training may begin."""
        is_training = self.model.training and torch.is_grad_enabled()
        if is_training and not self.is_calibrated and not self.runtime.is_exact:
            raise ConfigError(NOT_CALIBRATED)
        if self.rotated and is_distributed():
            raise UnsupportedError(
                "SparseGrad: selection must be 'block' in several processes, which cannot share "
                "sparse gradients, got 'step'"
            )

    def _write_rotated(self, *of_hook: Any) -> None:
        for rule in self.rotated:
            rule.fold()

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
        if not self.rotated:
            # One group has one shape, hence one block.
            blocks = {rule.group: rule.num_vectors for rule in self.rules}
            bases = {group: bases[group].leading(*blocks[group]) for group in bases}
        for rule in self.rules:
            rule.bases = bases[rule.group]
        for rule in self.rotated:
            rule.start()

    def _find_bases(self, batches: list[Any]) -> dict[str, Bases]:
        """Return the complete bases of every group of linears, the same in all processes.

        Forwards and backwards are exact and leave no trace; no two gradients are held at once.
        """
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

        for rule in self.rules:
            rule.collect = add_gram
        try:
            for batch in batches:
                with self.runtime.exact():
                    calibration_step("SparseGrad", self.model, batch)
        finally:
            for rule in self.rules:
                rule.collect = None
        self._check_gradients(largest)
        # Sums go by the order of linears, which is the same in all processes.
        groups = dict.fromkeys(rule.group for rule in self.rules)
        sums = {group: [sum_over_ranks(gram) for gram in grams[group]] for group in groups}
        bases = {group: [maths.basis(gram) for gram in sums[group]] for group in groups}
        return {group: Bases(*(broadcast(q) for q in bases[group])) for group in groups}

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
        """Return the bases of every group."""
        return {
            f"{rule.group}:{side}": getattr(rule.bases, side).to(rule.bases.stored)
            for rule in self.rules
            if rule.bases is not None
            for side in SIDES
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Put bases back.

        Raises:
            ConfigError: the state belongs to another model or recipe, or is damaged.
        """
        if not state:
            for rule in self.rules:
                rule.bases = None
            return
        wanted = {
            f"{rule.group}:{side}": (d, r)
            for rule in self.rules
            for side, d, r in zip(SIDES, rule.shape, rule.num_vectors, strict=True)
        }
        if wanted.keys() != state.keys():
            raise _other_model(f"{min(wanted.keys() ^ state.keys())!r} on one side only")
        for key, shape in wanted.items():
            if tuple(state[key].shape) != shape:
                raise _other_model(f"shape {tuple(state[key].shape)} for the {shape} of {key}")
            if not state[key].is_floating_point() or not bool(state[key].isfinite().all()):
                raise _other_model(f"{state[key].dtype} or NaN or infinite entries in {key}")
        bases: dict[str, Bases] = {}
        for rule in self.rules:
            device, group = rule.parameter.device, rule.group
            if group not in bases:
                bases[group] = Bases(*(state[f"{group}:{side}"].to(device) for side in SIDES))
            rule.bases = bases[group]


def _other_model(got: str) -> ConfigError:
    return ConfigError(
        f"SparseGrad: state must belong to this model and recipe, got {got}; load it onto the "
        "model that it was calibrated on, or calibrate anew"
    )
