"""What a decoder block launches on a GPU: operations that compute, and kernels of ours, counted.

Nothing is timed: the interpreter runs the kernels on the CPU, out of sight of the count.
"""

import copy
import os

import pytest
import torch
from torch import Tensor, nn

import leantune as lt
from bench.host import Block, operations, unseen_launches

pytest.importorskip("leantune.ops.rows_triton")

IS_FORCED = os.environ.get("LEANTUNE_KERNELS") == "triton"
pytestmark = [
    pytest.mark.skipif(not IS_FORCED, reason="runs in the interpreter, see its test"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # it divides by 0 in lanes not stored
]

MAX_LAUNCHES = 16
"""Above the exact block, forward and backward."""


def launches(model: nn.Module, x: Tensor) -> int:
    model.zero_grad()
    launched = unseen_launches()
    before = launched()
    names = operations(lambda: model(x).square().sum().backward())
    return len(names) + launched() - before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_decoder_block_keeps_to_its_budget_of_launches(dtype: torch.dtype) -> None:
    plain = Block().to(dtype)
    model = copy.deepcopy(plain)
    session = lt.apply(model, lt.WTACRS(keep_ratio=0.25, min_rows=2))
    x = torch.randn(4, 16, 32).to(dtype)
    exact = launches(plain, x)
    for _ in range(17):  # from then on few steps look at their gradients
        model(x).square().sum().backward()
        session.on_step()
    more = launches(model, x) - exact - 1  # the model counts its forwards
    assert 0 < more <= MAX_LAUNCHES, more
    for _ in range(7):
        session.on_step()
    # The control: a step that looks at its gradients takes two more for each of the linears.
    assert launches(model, x) - exact - 1 == more + 2 * 7
