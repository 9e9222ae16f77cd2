"""How the rotated weight that trains reaches the dense weight of a linear."""

import torch

from leantune.methods.sparse_grad import maths
from leantune.methods.sparse_grad.subspace import SubspaceRule


class RotatedWeightUpdater:
    """A rotated-weight updater writes the dense weight anew from the rotated weight that trains."""

    def __init__(self, rule: SubspaceRule) -> None:
        self.rule = rule
        self._seen: tuple[int, int] | None = None

    @torch.no_grad()
    def start(self) -> None:
        """Rotate the parameter into the new bases; the dense weight stays as it is."""
        assert self.rule.bases is not None
        trained = self.rule.parameter
        trained.copy_(maths.rotate(trained, *self.rule.bases.on(trained.device)))
        self._seen = (id(trained), trained._version)

    @torch.no_grad()
    def update(self) -> None:
        """Write the dense weight anew where the rotated one has moved."""
        trained, bases = self.rule.parameter, self.rule.bases
        now = (id(trained), trained._version)
        if bases is None or now == self._seen:
            return
        q_out, q_in = bases.on(trained.device)
        dense = maths.rotate(trained, q_out.t(), q_in.t())
        self.rule.module.weight.copy_(self.rule.laid_out(dense))
        self._seen = now
