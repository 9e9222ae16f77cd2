"""Tiny random models and a task that they learn in seconds: what the examples train on.

In a program of your own a pre-trained model and real data stand here; nothing else changes.
"""

from typing import Any

import torch
import transformers
from torch.utils.data import Dataset

PADDING, END, UNKNOWN, NUM_WORDS = 0, 1, 2, 61
WORDS = ["[PAD]", "[END]", "[UNK]", *(f"w{i}" for i in range(NUM_WORDS))]
SIZES: dict[str, Any] = {
    "vocab_size": len(WORDS),
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
}


def encoder(seed: int = 0) -> Any:
    """Make a BERT that tells two classes apart."""
    torch.manual_seed(seed)
    config = transformers.BertConfig(
        **SIZES, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    )
    return transformers.BertForSequenceClassification(config)


def decoder(seed: int = 0) -> Any:
    """Make a Llama that writes one word after the other."""
    torch.manual_seed(seed)
    tokens = {"bos_token_id": None, "eos_token_id": END, "pad_token_id": PADDING}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, **tokens))


class Rows(Dataset[dict[str, torch.Tensor]]):
    """Rows of words, padded at the end; the class says whether the first word's number is odd."""

    def __init__(self, num_rows: int = 256, num_words: int = 16, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        shape = (num_rows, num_words)
        ids = torch.randint(3, len(WORDS), shape, generator=generator)
        lengths = torch.randint(num_words // 2, num_words + 1, (num_rows, 1), generator=generator)
        self.mask = (torch.arange(num_words) < lengths).long()
        self.ids = ids * self.mask
        self.labels = ids[:, 0] % 2

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """Return one row, as the model is called with it."""
        return {
            "input_ids": self.ids[index],
            "attention_mask": self.mask[index],
            "labels": self.labels[index],
        }


def batches(num_batches: int, batch_size: int = 16, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    """Return batches of an encoder's rows."""
    rows = Rows(num_batches * batch_size, seed=seed)
    return list(torch.utils.data.DataLoader(rows, batch_size))


def tokenizer() -> Any:
    """Make a tokenizer that splits at blanks."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {word: number for number, word in enumerate(WORDS)}
    split = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    split.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=split, pad_token="[PAD]", eos_token="[END]", unk_token="[UNK]"
    )
