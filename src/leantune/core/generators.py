"""Torch's global random generators, lent for a while and put back."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def seeded_generators(model: nn.Module, seed: int) -> Iterator[None]:
    """Seed the generators of the CPU and of the model's GPUs inside, and put them back after."""
    # Only these: to touch another GPU would start CUDA on it.
    used = {p.device for p in model.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(devices=list(used)):
        torch.default_generator.manual_seed(seed)
        for device in used:
            torch.cuda.default_generators[device.index].manual_seed(seed)
        yield
