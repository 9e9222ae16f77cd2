"""Training during calibration, the released code's habit: off unless asked for."""

import torch
from torch import Tensor, nn

from leantune.methods.sparse_grad.layer import Collect, Layer


class WarmUp:
    """A whole model trains by AdamW while the bases of its layers are found.

    Args:
        model: all that trains in it moves, and the dense weights of ``layers``.
        layers: under calibration.
        rate: learning rate.
    """

    def __init__(self, model: nn.Module, layers: list[Layer], rate: float) -> None:
        self._moved = {layer: _read_in_forward(layer) for layer in layers}
        stand_ins = {layer.module.trained for layer in layers}
        others = [p for p in model.parameters() if p.requires_grad and p not in stand_ins]
        moved = [*others, *self._moved.values()]
        self._optimizer = torch.optim.AdamW(moved, lr=rate, weight_decay=0.0)
        self._grads: dict[Layer, Tensor] = {}

    def watching(self, collect: Collect) -> Collect:
        """Return ``collect``, with every gradient also kept for the next step."""

        def both(layer: Layer, grad: Tensor) -> None:
            collect(layer, grad)
            self._grads[layer] = grad

        return both

    def step(self) -> None:
        """Move everything by one step on the gradients at hand; a layer without one stays."""
        for layer, moved in self._moved.items():
            grad = self._grads.pop(layer, None)
            if grad is not None and moved is layer.module.weight and layer.is_transposed:
                grad = grad.t()
            moved.grad = None if grad is None else grad.to(moved.dtype)
        self._optimizer.step()

    def end(self) -> None:
        """Keep the weights that were reached: the model that was given does not have them."""
        for layer, moved in self._moved.items():
            weight = layer.module.weight
            if moved is weight:
                layer.start = weight.detach().to("cpu", copy=True)
            else:
                with torch.no_grad():
                    weight.copy_(moved.t() if layer.is_transposed else moved)


def _read_in_forward(layer: Layer) -> nn.Parameter:
    """Return what the linear multiplies by before it has bases."""
    is_step = layer.config.selection == "step"
    return layer.module.trained if is_step else layer.module.weight
