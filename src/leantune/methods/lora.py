"""LoRA, handed over to ``peft``: its layers, its files, its merging.

Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", arXiv 2106.09685.
"""

import warnings
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from leantune.core.adapters import adapted_layers, fold_in_state, saved_name, trained_by_adapter
from leantune.core.calibration import seeded_generators
from leantune.core.config import MethodConfig, option
from leantune.core.conversion import SwapConversion
from leantune.core.extras import require
from leantune.core.linear import (
    Ownership,
    Swap,
    is_conv1d,
    is_quantised,
    trained_in_place_of_weight,
)
from leantune.core.registry import MethodSpec, register
from leantune.core.runtime import Runtime
from leantune.core.sites import Site
from leantune.errors import UnsupportedError

_HEADS = ("classifier", "score", "qa_outputs")
_ADAPTER = "default"
_FLAGS = ("peft_config", "_hf_peft_config_loaded")


@dataclass(frozen=True, kw_only=True)
class LoRA(MethodConfig):
    """LoRA trains low-rank factors beside frozen linears, through ``peft``.

    The adapter that ``model.save_pretrained`` writes is a plain PEFT one. Every linear inside the
    model's blocks is adapted by default.
    """

    method: ClassVar[str] = "lora"

    rank: int = option(16, ge=1, help="width of the low-rank factors")
    alpha: float = option(32.0, gt=0, help="the update is scaled by alpha / rank")
    dropout: float = option(0.0, ge=0, lt=1, help="dropout on the factors' input")
    train_head: bool = option(
        True, help="train the task head (classifier, score, qa_outputs) in full beside the factors"
    )


class InjectedAdapter(SwapConversion):
    """An injected adapter knows its layers, and what the model looked like before."""

    is_adapter = True

    def __init__(self, model: nn.Module) -> None:
        super().__init__([])
        self.model = model
        self.requires_grad = [(p, p.requires_grad) for p in model.parameters()]
        self.trained: dict[str, nn.Module | None] = {}
        self.flags = {name: model.__dict__[name] for name in _FLAGS if name in model.__dict__}

    def find_layers(self) -> None:
        """Note which layers peft has put into the model, each as a swap."""
        for name, layer, original in adapted_layers(self.model):
            # New modules are in training mode, whatever the model is in.
            layer.train(original.training)
            parent = self.model.get_submodule(name.rpartition(".")[0])
            self.swaps.append(Swap(self.model, name, parent, original, layer))
            self.trained[name] = trained_by_adapter(layer).get(_ADAPTER)
        # Folded into few bits, the factors would be rounded away.
        self.can_merge = not any(is_quantised(swap.old) for swap in self.swaps)

    def not_ours(self, owned: Ownership) -> list[str]:
        """Return the names of layers that were replaced, or hold another adapter than ours."""
        lost = [
            swap.name
            for swap in self.swaps
            for name, module in trained_by_adapter(swap.new).items()
            if name != _ADAPTER or owned.undone(module) is not self.trained[swap.name]
        ]
        return super().not_ours(owned) + lost

    def undo(self) -> None:
        """Take the adapter's layers out, and put flags back as they were."""
        super().undo()
        for parameter, flag in self.requires_grad:
            parameter.requires_grad_(flag)
        for name in _FLAGS:
            self.model.__dict__.pop(name, None)
        self.model.__dict__.update(self.flags)

    def merge(self) -> None:
        """Fold the factors into the weights, copy trained heads, and take the layers out."""
        for swap in self.swaps:
            layer: Any = swap.new
            if hasattr(layer, "merge"):
                layer.merge(adapter_names=[_ADAPTER])
            else:
                swap.old.load_state_dict(trained_by_adapter(layer)[_ADAPTER].state_dict())
        self.undo()

    def merge_state(self, state: dict[str, Tensor], model: nn.Module) -> None:
        """Put weights with folded factors, and trained heads, under the plain modules' names."""
        vars(model).pop("_hf_peft_config_loaded", None)
        for swap in self.swaps:
            fold_in_state(state, swap.name, swap.new, _ADAPTER)


_NOTHING = "-"
"""A target for peft that no module is called by."""


def _inject(model: nn.Module, wanted: Any, names: list[str]) -> None:
    """Let peft adapt exactly the modules of these names.

    They are given as the names of a saved adapter, which peft takes as they are. As targets it
    would turn ``gate_proj`` and the like into parameters of the experts in newer mixtures.

    Raises:
        UnsupportedError: peft refuses one, or has adapted others.
    """
    from peft import inject_adapter_in_model
    from peft.tuners.tuners_utils import BaseTunerLayer

    saved = {saved_name(name): torch.empty(0) for name in names}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="While injecting the PEFT adapters")
        try:
            inject_adapter_in_model(wanted, model, state_dict=saved)
        except ValueError as error:
            raise UnsupportedError(
                f"LoRA: sites must be modules that peft can adapt, got {error}; leave them out "
                "with sites="
            ) from error
    adapted = {n for n, m in model.named_modules() if isinstance(m, BaseTunerLayer)}
    if adapted != set(names):
        lost, other = sorted(set(names) - adapted), sorted(adapted - set(names))
        raise UnsupportedError(
            "LoRA: sites must be adapted as asked, got peft leaving out "
            f"{', '.join(lost[:3]) or 'none'} and adapting {', '.join(other[:3]) or 'none'} instead"
        )
    wanted.target_modules = set(names)
    if hasattr(model, "_hf_peft_config_loaded"):
        # As transformers' own add_adapter does, so that save_pretrained writes the adapter.
        wanted.base_model_name_or_path = vars(model).get("name_or_path")
        vars(model)["_hf_peft_config_loaded"] = True


def _convert(
    model: nn.Module, sites: list[Site], config: LoRA, runtime: Runtime
) -> InjectedAdapter:
    require("peft", extra="train", who="LoRA")
    from peft import LoraConfig

    if hasattr(model, "peft_config") or any(adapted_layers(model)):
        raise UnsupportedError(
            "LoRA: model must carry no PEFT adapter yet, got one; leave LoRA out of the recipe: "
            "the other methods act on the adapter that is there"
        )
    heads = [name for name, _ in model.named_children() if name in _HEADS]
    wanted = LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,  # type: ignore[arg-type]
        lora_dropout=config.dropout,
        target_modules=_NOTHING,
        modules_to_save=heads if config.train_head and heads else None,
        fan_in_fan_out=any(is_conv1d(site.module) for site in sites),
    )
    injected = InjectedAdapter(model)
    # The factors' start is the session's choice, and the caller's generators do not move.
    with seeded_generators(model, runtime.seed):
        try:
            _inject(model, wanted, [site.name for site in sites])
        except BaseException:
            # peft changes one layer after the other: take back those it came to.
            injected.find_layers()
            injected.undo()
            raise
    injected.find_layers()
    # peft freezes all but its own; what another method trains beside it goes on training.
    for parameter in trained_in_place_of_weight(model):
        parameter.requires_grad_(True)
    return injected


register(
    MethodSpec(
        config=LoRA,
        axis="trained",
        roles=("linear",),
        summary="low-rank factors beside frozen linears, by peft",
        source="Hu et al., arXiv 2106.09685",
        suits_quantised=True,
        default_sites=lambda site, config: site.block is not None and site.tied_to is None,
        check=lambda site, config: site.sharing,
        convert=_convert,
        test_options={"rank": 4},
    )
)
