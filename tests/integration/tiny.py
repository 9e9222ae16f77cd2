"""Tiny models with dropout, a tokenizer made in code, rows of tokens, and plain trainers."""

import random
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from models import padded
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerFast, Trainer, TrainerCallback, TrainingArguments

import leantune as lt

VOCABULARY = 64
WORDS = (
    "good",
    "fine",
    "great",
    "nice",
    "bad",
    "poor",
    "awful",
    "sad",
    *(f"w{i}" for i in range(40)),
)


def bert(seed: int = 0, dropout: float = 0.1, **options: Any) -> Any:
    """Make a tiny BERT classifier; equal seeds give equal weights."""
    config = transformers.BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        **options,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return transformers.BertForSequenceClassification(config)


def llama(seed: int = 0) -> Any:
    """Make a tiny LLaMA-style language model."""
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return transformers.LlamaForCausalLM(config)


def tokenizer() -> PreTrainedTokenizerFast:
    """Make a tokenizer that splits at blanks: one token per word of ``WORDS``."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    names = ["[PAD]", "[EOS]", "[UNK]", "[CLS]", "[SEP]", *WORDS]
    split = Tokenizer(models.WordLevel({w: i for i, w in enumerate(names)}, unk_token="[UNK]"))
    split.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    return PreTrainedTokenizerFast(
        tokenizer_object=split,
        pad_token="[PAD]",
        eos_token="[EOS]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_max_length=32,
    )


def token_rows(num_rows: int = 24, num_tokens: int = 8) -> datasets.Dataset:
    """Make rows of tokens with padding at the end, a label that the first token decides."""
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(5, VOCABULARY, (num_rows, num_tokens), generator=generator)
    lengths = torch.randint(3, num_tokens + 1, (num_rows, 1), generator=generator)
    batch = padded(ids, lengths) | {"labels": ids[:, 0] % 2}
    return datasets.Dataset.from_dict({name: values.tolist() for name, values in batch.items()})


def make_trainer(model: Any, folder: Path, callbacks: list[Any], **options: Any) -> Trainer:
    """Make a plain Trainer on ``token_rows``; ``options`` are those of TrainingArguments."""
    dataset = options.pop("dataset", None)
    arguments: dict[str, Any] = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "max_steps": 7,
        "save_strategy": "no",
        "learning_rate": 1e-2,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        **options,
    }
    trainer = Trainer(
        model,
        TrainingArguments(**arguments),
        train_dataset=token_rows() if dataset is None else dataset,
        callbacks=callbacks,
    )
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Copy the parameters."""
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Whether two sets of weights are equal to the bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def write_sentences(folder: Path, label: Callable[[bool], str]) -> Path:
    """Write sentences with one word that decides the label, as ``train.tsv`` and ``dev.tsv``."""
    folder.mkdir()
    generator = random.Random(3)
    for name, count in (("train", 40), ("validation", 16)):
        lines = ["sentence1\tlabel"]
        for row in range(count):
            good = bool(row % 2)
            words = [generator.choice(WORDS[8:]) for _ in range(generator.randint(2, 9))]
            words.insert(
                generator.randrange(3), generator.choice(WORDS[:4] if good else WORDS[4:8])
            )
            lines.append(f"{' '.join(words)}\t{label(good)}")
        (folder / f"{name}.tsv").write_text("\n".join(lines) + "\n")
    return folder


def text_run(folder: Path) -> dict[str, Any]:
    """Write a tiny BERT encoder and its data; return a run's options: ten steps, five an epoch."""
    bert().bert.save_pretrained(folder / "model")
    tokenizer().save_pretrained(folder / "model")
    return {
        "model": str(folder / "model"),
        "task": "text",
        "data": str(write_sentences(folder / "data", lambda good: str(int(good)))),
        "output": str(folder / "run"),
        "methods": [lt.WTACRS(keep_ratio=0.3, min_rows=2)],
        "epochs": 2,
        "batch_size": 8,
        "learning_rate": 1e-2,
        "max_length": 32,
    }


def saved_weights(folder: Path | str) -> dict[str, torch.Tensor]:
    return load_file(Path(folder) / "model" / "model.safetensors")


def cut_off(whole: Path | str, output: Path | str, step: int) -> None:
    """Copy a run that has ended as it would be, had it been killed after a checkpoint."""
    shutil.copytree(whole, output)
    for path in Path(output).iterdir():
        if path.name in ("model", "adapter", "session"):
            shutil.rmtree(path)
    (Path(output) / "metrics.json").unlink()
    (Path(output) / "checkpoints" / "result.json").unlink()
    for path in (Path(output) / "checkpoints").glob("checkpoint-*"):
        if int(path.name.partition("-")[2]) > step:
            shutil.rmtree(path)
    assert (Path(output) / "checkpoints" / f"checkpoint-{step}").is_dir()


class Interrupt(TrainerCallback):
    """Press Ctrl-C when a step of a variant begins, or raise at once."""

    def __init__(
        self,
        step: int,
        name: str = "wta_crs",
        at_once: bool = False,
        number: int = signal.SIGINT,
    ) -> None:
        self.step, self.name, self.at_once, self.number = step, name, at_once, number

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step - 1 and args.run_name == self.name:
            if self.at_once:
                raise KeyboardInterrupt
            signal.raise_signal(self.number)


class Steps(TrainerCallback):
    """Note the optimiser steps that are taken."""

    def __init__(self) -> None:
        self.steps: list[tuple[str, int]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.steps.append((args.run_name, state.global_step))
