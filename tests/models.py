"""Tiny random models as data, each with a padded sample batch; dropout is 0 everywhere."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn

if not hasattr(transformers.PreTrainedModel, "activation_checkpointing_enable"):
    # transformers 5.23 renamed it and warns of the older name, the only one before that.
    for _what in ("enable", "disable"):
        _older = getattr(transformers.PreTrainedModel, f"gradient_checkpointing_{_what}")
        setattr(transformers.PreTrainedModel, f"activation_checkpointing_{_what}", _older)

VOCABULARY = 64
D_MODEL, D_HIDDEN, NUM_HEADS = 16, 32, 2
NUM_SAMPLES, NUM_TOKENS = 4, 8
LENGTHS = (8, 5, 3, 7)

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class TinyModel:
    """One architecture: how to build it, and a batch for it.

    Args:
        kind: the transformers class to build.
        config: the configuration class.
        options: of the configuration.
        task: "classify", "generate" (labels by token) or "translate" (encoder and decoder).
        blocks: names of the blocks, with ``*`` for the number; two for each pattern.
    """

    kind: str
    config: str
    options: Mapping[str, Any]
    task: str
    blocks: tuple[str, ...]

    def build(self, seed: int = 0) -> nn.Module:
        """Make the model in training mode; equal seeds give equal weights."""
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            config = getattr(transformers, self.config)(**self.options)
            return getattr(transformers, self.kind)(config).train()

    def batch(self, seed: int = 0) -> Batch:
        """Make a batch of padded samples with labels."""
        return _BATCHES[self.task](torch.Generator().manual_seed(seed))

    def train(self, model: nn.Module, num_steps: int = 1) -> None:
        """Take steps of plain gradient descent, each on a batch of its own."""
        for seed in range(num_steps):
            model.zero_grad()
            model(**self.batch(seed)).loss.backward()
            with torch.no_grad():
                for p in model.parameters():
                    if p.grad is not None:
                        p -= 0.5 * p.grad

    def logits(self, model: nn.Module) -> Tensor:
        """Return what the model computes of a batch in evaluation mode; its own mode stays."""
        is_training = model.training
        with torch.no_grad():
            out = model.eval()(**self.batch(5)).logits
        model.train(is_training)
        return out


def padded(ids: Tensor, lengths: Tensor) -> Batch:
    """Make what a model reads of ``ids`` (samples, tokens): zero and masked from each length on."""
    mask = (torch.arange(ids.shape[1]) < lengths.view(-1, 1)).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


def _tokens(generator: torch.Generator) -> Batch:
    ids = torch.randint(3, VOCABULARY, (NUM_SAMPLES, NUM_TOKENS), generator=generator)
    return padded(ids, torch.tensor(LENGTHS))


def _classify(generator: torch.Generator) -> Batch:
    labels = torch.randint(0, 2, (NUM_SAMPLES,), generator=generator)
    return {**_tokens(generator), "labels": labels}


def _generate(generator: torch.Generator) -> Batch:
    batch = _tokens(generator)
    return {**batch, "labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)}


def _translate(generator: torch.Generator) -> Batch:
    labels = torch.randint(3, VOCABULARY, (NUM_SAMPLES, NUM_TOKENS - 2), generator=generator)
    return {**_tokens(generator), "labels": labels}


_BATCHES: dict[str, Callable[[torch.Generator], Batch]] = {
    "classify": _classify,
    "generate": _generate,
    "translate": _translate,
}

_BERT_LIKE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": D_MODEL,
    "num_hidden_layers": 2,
    "num_attention_heads": NUM_HEADS,
    "intermediate_size": D_HIDDEN,
    "max_position_embeddings": 32,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
_LLAMA_LIKE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": D_MODEL,
    "intermediate_size": D_HIDDEN,
    "num_hidden_layers": 2,
    "num_attention_heads": NUM_HEADS,
    "num_key_value_heads": 1,
    "head_dim": D_MODEL // NUM_HEADS,
    "max_position_embeddings": 32,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_T5: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "d_model": D_MODEL,
    "d_kv": D_MODEL // NUM_HEADS,
    "d_ff": D_HIDDEN,
    "num_layers": 2,
    "num_heads": NUM_HEADS,
    "dropout_rate": 0.0,
    "pad_token_id": 0,
    "eos_token_id": 2,
    "decoder_start_token_id": 0,
}

MODELS: dict[str, TinyModel] = {
    "bert": TinyModel(
        kind="BertForSequenceClassification",
        config="BertConfig",
        options=_BERT_LIKE,
        task="classify",
        blocks=("bert.encoder.layer.*",),
    ),
    "roberta": TinyModel(
        kind="RobertaForSequenceClassification",
        config="RobertaConfig",
        options={**_BERT_LIKE, "pad_token_id": 0},
        task="classify",
        blocks=("roberta.encoder.layer.*",),
    ),
    "distilbert": TinyModel(
        kind="DistilBertForSequenceClassification",
        config="DistilBertConfig",
        options={
            "vocab_size": VOCABULARY,
            "dim": D_MODEL,
            "hidden_dim": D_HIDDEN,
            "n_layers": 2,
            "n_heads": NUM_HEADS,
            "max_position_embeddings": 32,
            "dropout": 0.0,
            "attention_dropout": 0.0,
            "seq_classif_dropout": 0.0,
        },
        task="classify",
        blocks=("distilbert.transformer.layer.*",),
    ),
    "t5": TinyModel(
        kind="T5ForConditionalGeneration",
        config="T5Config",
        options=_T5,
        task="translate",
        blocks=("encoder.block.*", "decoder.block.*"),
    ),
    "t5_gated": TinyModel(
        kind="T5ForConditionalGeneration",
        config="T5Config",
        options={**_T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
        task="translate",
        blocks=("encoder.block.*", "decoder.block.*"),
    ),
    "gpt2": TinyModel(
        kind="GPT2LMHeadModel",
        config="GPT2Config",
        options={
            "vocab_size": VOCABULARY,
            "n_embd": D_MODEL,
            "n_layer": 2,
            "n_head": NUM_HEADS,
            "n_inner": D_HIDDEN,
            "n_positions": 32,
            "resid_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "attn_pdrop": 0.0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
        },
        task="generate",
        blocks=("transformer.h.*",),
    ),
    "opt": TinyModel(
        kind="OPTForCausalLM",
        config="OPTConfig",
        options={
            "vocab_size": VOCABULARY,
            "hidden_size": D_MODEL,
            "word_embed_proj_dim": D_MODEL,
            "ffn_dim": D_HIDDEN,
            "num_hidden_layers": 2,
            "num_attention_heads": NUM_HEADS,
            "max_position_embeddings": 32,
            "dropout": 0.0,
            "attention_dropout": 0.0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
        },
        task="generate",
        blocks=("model.decoder.layers.*",),
    ),
    "llama": TinyModel(
        kind="LlamaForCausalLM",
        config="LlamaConfig",
        options=_LLAMA_LIKE,
        task="generate",
        blocks=("model.layers.*",),
    ),
    "mistral": TinyModel(
        kind="MistralForCausalLM",
        config="MistralConfig",
        options=_LLAMA_LIKE,
        task="generate",
        blocks=("model.layers.*",),
    ),
    "qwen2": TinyModel(
        kind="Qwen2ForCausalLM",
        config="Qwen2Config",
        options=_LLAMA_LIKE,
        task="generate",
        blocks=("model.layers.*",),
    ),
    "qwen3": TinyModel(
        kind="Qwen3ForCausalLM",
        config="Qwen3Config",
        options=_LLAMA_LIKE,
        task="generate",
        blocks=("model.layers.*",),
    ),
}
