"""The methods; each import line is that method's registration."""

from leantune.methods.checkpoint import Checkpoint
from leantune.methods.liger import Liger
from leantune.methods.lora import LoRA
from leantune.methods.meprop import MeProp
from leantune.methods.routed_ffn import RoutedFFN
from leantune.methods.sparse_grad import SparseGrad
from leantune.methods.spt_attention import SPTAttention
from leantune.methods.wta_crs import WTACRS

__all__ = [
    "WTACRS",
    "Checkpoint",
    "Liger",
    "LoRA",
    "MeProp",
    "RoutedFFN",
    "SPTAttention",
    "SparseGrad",
]
