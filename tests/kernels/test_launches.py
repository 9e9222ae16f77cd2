"""What a decoder block launches on a GPU: operations that compute, and kernels of ours, counted.

Nothing is timed: the interpreter runs the kernels on the CPU, out of sight of the count.
"""

import copy
import os

import pytest
import torch
from launches import operations
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

import leantune as lt
from leantune.ops.backend import num_launches

rows_triton = pytest.importorskip("leantune.ops.rows_triton")

IS_FORCED = os.environ.get("LEANTUNE_KERNELS") == "triton"
pytestmark = [
    pytest.mark.skipif(not IS_FORCED, reason="runs in the interpreter, see its test"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # it divides by 0 in lanes not stored
]

MAX_LAUNCHES = 16
"""Above the exact block, forward and backward."""


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        config = LlamaConfig(
            hidden_size=32,
            intermediate_size=64,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_hidden_layers=1,
            attn_implementation="sdpa",
        )
        self.layers = nn.ModuleList([LlamaDecoderLayer(config, 0)])
        self.rotary = LlamaRotaryEmbedding(config)

    def forward(self, x: Tensor) -> Tensor:
        positions = torch.arange(x.shape[1])[None]
        return self.layers[0](x, position_embeddings=self.rotary(x, positions))


def launches(model: nn.Module, x: Tensor) -> int:
    model.zero_grad()
    before = num_launches()
    names = operations(lambda: model(x).square().sum().backward())
    return len(names) + num_launches() - before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_decoder_block_keeps_to_its_budget_of_launches(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    launch = rows_triton._launch

    def unseen(*args, **kwargs) -> None:
        with _disable_current_modes():
            launch(*args, **kwargs)

    monkeypatch.setattr(rows_triton, "_launch", unseen)
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
