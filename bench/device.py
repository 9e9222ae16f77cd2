"""What a bench asks of the machine; the only file of the benches that speaks to a GPU.

On a machine without one every call does the nearest thing, so that tiny shapes take the same path.
"""

import gc
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile


def has_gpu() -> bool:
    """Return whether there is an NVIDIA GPU, which is then what is measured on."""
    return torch.cuda.is_available()


def find() -> torch.device:
    """Return the device that is measured on."""
    return torch.device("cuda" if has_gpu() else "cpu")


def compiler() -> str:
    """Return torch.compile's backend: its own, or without a GPU what needs no C++ compiler."""
    return "inductor" if has_gpu() else "aot_eager_decomp_partition"


def compiled(model: nn.Module, budget: float, backend: str) -> Any:
    """Return a model that torch compiles when it first runs, beside others of its class.

    Args:
        model: what is compiled.
        budget: torch's ``activation_memory_budget``, the share of saved bytes that it aims at.
        backend: name of one of torch.compile's.
    """
    # Late: nothing else needs the compiler's settings.
    from torch._dynamo import lookup_backend
    from torch._functorch import config

    compile_graph = lookup_backend(backend)

    # One for each model, since code compiled for one is taken for all of the same backend.
    def with_budget(graph: Any, inputs: Any) -> Any:
        with config.patch(activation_memory_budget=budget):
            return compile_graph(graph, inputs)

    return torch.compile(model, backend=with_budget)


def synchronize() -> None:
    """Wait until everything that was launched has run."""
    if has_gpu():
        torch.cuda.synchronize()


def forget() -> None:
    """Let go of models and compiled code that nobody needs, for the next variant's sake."""
    torch.compiler.reset()
    gc.collect()
    if has_gpu():
        torch.cuda.empty_cache()


def launches(step: Callable[[], Any]) -> tuple[int, float]:
    """Run a step and return how many kernels and copies it launched and how many ms they took.

    Without a GPU the top-level ATen operations stand for them.
    """
    activities = [ProfilerActivity.CUDA] if has_gpu() else [ProfilerActivity.CPU]
    with profile(activities=activities) as record:
        step()
        synchronize()
    where = DeviceType.CUDA if has_gpu() else DeviceType.CPU
    found = [
        event
        for event in record.events() or ()
        if event.device_type == where
        and not event.is_user_annotation
        and (has_gpu() or (event.name.startswith("aten::") and event.cpu_parent is None))
    ]
    return len(found), sum(event.time_range.elapsed_us() for event in found) / 1e3
