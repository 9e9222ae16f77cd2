"""SparseGrad as a method of PEFT's own: its config, its layer, its files; importing registers it.

Legend: n rows, d_out and d_in the sides of a weight, r_out and r_in those of the block that trains.

Source: Chekalina et al., "SparseGrad: A Selective Method for Efficient Fine-tuning of MLP Layers",
EMNLP 2024, arXiv 2410.07383; the leading block of docs/methods/sparse_grad.md.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from functools import partial
from typing import Any

import torch
from peft import PeftConfig, mapping
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn
from torch.nn import functional as F

from leantune.core.linear import is_conv1d, is_linear
from leantune.errors import ConfigError, UnsupportedError
from leantune.measure.step import calibration_step
from leantune.ops import entries


class SparseGradType(str, Enum):  # noqa: UP042 (as PEFT's is, which it prints by its name)
    """SparseGrad's key in PEFT's tables is what a member of PEFT's own closed enumeration is."""

    SPARSE_GRAD = "SPARSE_GRAD"


@dataclass
class SparseGradConfig(PeftConfig):
    """A SparseGrad adapter trains a block of each target's weight, in bases of its gradient.

    Give it to ``get_peft_model``, then call :func:`calibrate` once.

    Args:
        density: share of each weight's entries that trains, in (0, 1].
        target_modules: names or a pattern of the linears, as for LoRA.
        exclude_modules: names or a pattern of linears that stay as they are.
        modules_to_save: modules that train in full beside them.
    """

    density: float = 0.01
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    modules_to_save: list[str] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type: Any = SparseGradType.SPARSE_GRAD
        if not 0 < self.density <= 1:
            raise ConfigError(f"SparseGradConfig: density must be in (0, 1], got {self.density}")


class SparseGradLinear(nn.Module, BaseTunerLayer):
    """A linear adds ``q_out delta q_in^T`` to its weight, one change for each adapter.

    Backward keeps ``x q_in``, (n, r_in), of the input. ``delta`` is a linear: others may sample it.
    """

    adapter_layer_names = ("sparse_grad_delta",)
    other_param_names = ("sparse_grad_q_out", "sparse_grad_q_in")

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: SparseGradConfig) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.is_transposed = is_conv1d(base_layer)
        self._disable_adapters, self._active_adapter = False, adapter_name
        self.merged_adapters: list[str] = []
        self._calibrated: set[str] = set()
        self.sparse_grad_delta = nn.ModuleDict()
        self.sparse_grad_q_out, self.sparse_grad_q_in = nn.ParameterDict(), nn.ParameterDict()
        self.update_layer(adapter_name, config)

    @property
    def base_weight(self) -> nn.Parameter:
        """The weight that the change is added to."""
        return self.get_base_layer().get_parameter("weight")

    def update_layer(self, adapter_name: str, config: SparseGradConfig) -> None:
        """Add an adapter whose change is zero; its bases come from calibration or a file."""
        weight = self.base_weight
        d_out, d_in = weight.shape[::-1] if self.is_transposed else weight.shape
        most = entries.num_entries((d_out, d_in), config.density)
        r_out, r_in = entries.block_shape((d_out, d_in), max(most, 1))
        delta = nn.Linear(r_in, r_out, bias=False, device=weight.device)
        self.sparse_grad_delta[adapter_name] = delta
        nn.init.zeros_(delta.weight)
        self.put_bases(adapter_name, weight.new_zeros(d_out, r_out), weight.new_zeros(d_in, r_in))
        self._calibrated.discard(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def put_bases(self, adapter: str, q_out: Tensor, q_in: Tensor) -> None:
        """Take bases on, (d_out, r_out) and (d_in, r_in), whose memory others may share."""
        self.sparse_grad_q_out[adapter] = nn.Parameter(q_out, requires_grad=False)
        self.sparse_grad_q_in[adapter] = nn.Parameter(q_in, requires_grad=False)

    def is_calibrated(self, adapter: str) -> bool:
        """Return whether an adapter has bases, which are zero before."""
        if adapter not in self._calibrated and bool(self.sparse_grad_q_in[adapter].any()):
            self._calibrated.add(adapter)  # Asked of the device once.
        return adapter in self._calibrated

    def get_delta_weight(self, adapter: str) -> Tensor:
        """Return an adapter's change in the weight's own shape and dtype."""
        delta: Any = self.sparse_grad_delta[adapter]
        q_out, q_in = self.sparse_grad_q_out[adapter], self.sparse_grad_q_in[adapter]
        change = q_out.to(delta.weight) @ delta.weight @ q_in.to(delta.weight).t()
        return (change.t() if self.is_transposed else change).to(self.base_weight.dtype)

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Fold the changes of some adapters, or of the active ones, into the weight."""
        for name in check_adapters_to_merge(self, adapter_names):
            if name in self.sparse_grad_delta:
                change = self.get_delta_weight(name)
                if safe_merge and not bool(change.isfinite().all()):
                    raise ValueError(f"merge: the change must be finite, got NaN in {name!r}")
                self.base_weight.add_(change)
                self.merged_adapters.append(name)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Take what was folded out of the weight again."""
        while self.merged_adapters:
            self.base_weight.sub_(self.get_delta_weight(self.merged_adapters.pop()))

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the layer's output with the changes of the active adapters, (..., d_out)."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        y = self.base_layer(x, *args, **kwargs)
        is_added = not (self.disable_adapters or self.merged)
        for name in self.active_adapters if is_added else ():
            if name in self.sparse_grad_delta:
                y = y + self._change(x, name).to(y.dtype)
        return y

    def _change(self, x: Tensor, name: str) -> Tensor:
        delta: Any = self.sparse_grad_delta[name]
        if self.training and delta.weight.requires_grad and not self.is_calibrated(name):
            raise ConfigError(
                "SparseGrad: bases must be calibrated before training, got none; call "
                "leantune.integrations.peft.calibrate(model, batches)"
            )
        x = self._cast_input_dtype(x, delta.weight.dtype)
        y = delta(F.linear(x, self.sparse_grad_q_in[name].t().to(x.dtype)))
        return F.linear(y, self.sparse_grad_q_out[name].to(y.dtype))


class SparseGradModel(BaseTuner):
    """A model whose targets are :class:`SparseGradLinear`; ``get_peft_model`` makes it."""

    prefix = "sparse_grad_"
    tuner_layer_cls: Any = SparseGradLinear
    target_module_mapping: Any = {}  # noqa: RUF012 (as the base class has it)

    def _create_and_replace(  # type: ignore[override]
        self, config: Any, name: str, target: Any, target_name: str, parent: Any, current_key: str
    ) -> None:
        if isinstance(target, SparseGradLinear):
            target.update_layer(name, config)
            return
        if not is_linear(target):
            raise UnsupportedError(
                f"SparseGradConfig: target_modules must be linears with a plain weight, got "
                f"{current_key}, a {type(target).__name__}; leave it out with exclude_modules"
            )
        layer = SparseGradLinear(target, name, config)
        if name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)


def calibrate(model: nn.Module, batches: Iterable[Any], adapter_name: str = "default") -> None:
    """Find the bases of an adapter from the weight gradients of some batches; no weight moves.

    Linears of one name and shape share their bases. An adapter that has bases keeps them.

    Args:
        model: what ``get_peft_model`` returned.
        batches: what the model is called with (``model(**batch)``); some thirty are enough.
        adapter_name: which adapter.

    Raises:
        ConfigError: no such adapter, no batches, or a gradient that is zero or not finite.
    """
    layers = [
        (f"{name.rpartition('.')[2]} {tuple(m.base_weight.shape)}", m)
        for name, m in model.named_modules()
        if isinstance(m, SparseGradLinear) and adapter_name in m.sparse_grad_delta
    ]
    if not layers:
        raise ConfigError(f"calibrate: adapter_name must be SparseGrad's, got {adapter_name!r}")
    if layers[0][1].is_calibrated(adapter_name):
        return
    grams = _grams(model, layers, batches)
    for group, _ in layers:
        tops = [float(gram.diagonal().amax()) for gram in grams.get(group, ())]
        if not tops or not all(0 < top < float("inf") for top in tops):
            raise ConfigError(
                f"calibrate: gradients of {group} must be finite and not zero, got {tops or 'none'}"
                "; show a batch whose loss depends on them, or leave the layer out"
            )
    shared: dict[str, list[Tensor]] = {}
    for group, layer in layers:
        if group not in shared:
            likes = layer.sparse_grad_q_out[adapter_name], layer.sparse_grad_q_in[adapter_name]
            pairs = zip(map(entries.basis, grams[group]), likes, strict=True)
            shared[group] = [q[:, : like.shape[1]].to(like).contiguous() for q, like in pairs]
        layer.put_bases(adapter_name, *shared[group])


def _grams(
    model: nn.Module, layers: list[tuple[str, SparseGradLinear]], batches: Iterable[Any]
) -> dict[str, tuple[Tensor, Tensor]]:
    """Return the Gram matrices of both sides of each group's gradients, without any adapter."""
    grams: dict[str, tuple[Tensor, Tensor]] = {}

    def add(group: str, is_transposed: bool, weight: Any) -> None:
        grad = weight.grad.t() if is_transposed else weight.grad
        if group not in grams:
            out, inn = (torch.zeros(d, d, device=grad.device) for d in grad.shape)
            grams[group] = out, inn
        entries.accumulate_grams(*grams[group], grad)
        weight.grad = None  # No two gradients are held at once.

    flags = [layer.base_weight.requires_grad for _, layer in layers]
    handles: list[Any] = []
    try:
        for group, layer in layers:
            layer.enable_adapters(False)
            weight, hook = layer.base_weight, partial(add, group, layer.is_transposed)
            handles.append(weight.requires_grad_(True).register_post_accumulate_grad_hook(hook))
        for batch in batches:
            calibration_step("SparseGrad", model, batch)
    finally:
        for handle in handles:
            handle.remove()
        for (_, layer), flag in zip(layers, flags, strict=True):
            layer.enable_adapters(True)
            layer.base_weight.requires_grad_(flag)
    return grams


_KEY: Any = SparseGradType.SPARSE_GRAD
mapping.PEFT_TYPE_TO_CONFIG_MAPPING[_KEY] = SparseGradConfig
mapping.PEFT_TYPE_TO_TUNER_MAPPING[_KEY] = SparseGradModel
mapping.PEFT_TYPE_TO_PREFIX_MAPPING[_KEY] = SparseGradModel.prefix
