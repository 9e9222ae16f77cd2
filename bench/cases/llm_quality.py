"""Quality on a real language model: SmolLM2 on GLUE tasks as chat, and on text in bits per byte.

Chat has a fixed set of answers of one token each; the loss, and the head, are on the answer alone.
The text is the documentation that Python carries, its last tenth held out. Every recipe of a task
and a seed sees the same rows in the same order. Embeddings, which the head shares, are frozen in
every recipe.
"""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product
from statistics import fmean
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import leantune as lt
from bench import quality, rows
from bench.cases.frontier import peft_model
from bench.cases.spt_smollm import smollm, windows
from bench.models import glue
from bench.quality import NO_ROWS, Recipe

RESULT = "llm_quality"
SEEDS = (0, 1, 2)
FULL, LORA = "full fine-tuning", "LoRA 8"
_RATES = {FULL: 5e-5, LORA: 5e-4}
_IGNORED = -100


@dataclass(frozen=True)
class Chat:
    """A GLUE task as chat: the system's message, what is asked, and the answer to each label."""

    name: str
    system: str
    question: str
    answers: tuple[str, ...]
    batch_size: int = 8
    num_steps: int = 24
    num_held_out: int = 200


CHATS = (
    Chat(
        "sst2",
        "Answer positive or negative.",
        "Is this sentence positive or negative?\n\n{sentence1}",
        ("negative", "positive"),
    ),
    Chat(
        "rte",
        "Answer yes or no.",
        "{sentence1}\n\nDoes it follow that: {sentence2}",
        ("yes", "no"),
        batch_size=4,
        num_held_out=100,
    ),
)
TEXT = "text"
_TEXT_LENGTH, _TEXT_STEPS, _TEXT_HELD_OUT = 512, 16, 8

_TENTH = lt.WTACRS(keep_ratio=0.1)
_ADAPTED = lt.LoRA(rank=8)
RECIPES: dict[str, Recipe] = {
    FULL: (),
    "WTA-CRS 0.3": (lt.WTACRS(keep_ratio=0.3),),
    "WTA-CRS 0.1": (_TENTH,),
    "MLP recomputed + WTA-CRS 0.1": (lt.Checkpoint(parts=("mlp",)), _TENTH),
    "checkpointing + WTA-CRS 0.1": (lt.Checkpoint(), _TENTH),
    "top-k of rows 0.1 (biased)": (lt.WTACRS(keep_ratio=0.1, estimator="topk"),),
    LORA: (_ADAPTED,),
    "LoRA 8 + WTA-CRS 0.3": (_ADAPTED, lt.WTACRS(keep_ratio=0.3)),
    "LoRA 8 + WTA-CRS 0.1": (_ADAPTED, _TENTH),
}
PEFTS = ("VeLoRA 8", "LoRA-FA 8")
"""PEFT's own, at the linears that ours adapts, their updates scaled as ours are."""
NAMES = (*RECIPES, *PEFTS)


def main(worker: int = 0, num_workers: int = 1) -> None:
    """Measure every row that is not there yet, seed by seed, then print the table."""
    done = {(r["task"], r["recipe"], r["seed"]) for r in rows.read(RESULT)}
    tasks = [*(chat.name for chat in CHATS), TEXT]
    for seed, task, name in list(product(SEEDS, tasks, NAMES))[worker::num_workers]:
        if (task, name, seed) not in done:
            row = _measure(task, name, seed)
            rows.append(RESULT, row)
            print(row, flush=True)
    print(summary())


def summary() -> str:
    """Return mean, spread and difference to the exact recipe of the same kind, as Markdown."""
    return rows.by_device(rows.read(RESULT), _table) or NO_ROWS


def _table(found: list[dict[str, Any]]) -> str:
    by_key = {(r["task"], r["recipe"], r["seed"]): r for r in found}

    def values(task: str, name: str, key: str, factor: float) -> dict[int, float]:
        return {
            seed: factor * by_key[task, name, seed][key]
            for seed in SEEDS
            if (task, name, seed) in by_key
        }

    lines = []
    for name in NAMES:
        exact = LORA if name.startswith("LoRA") or name in PEFTS else FULL
        line: dict[str, Any] = {"recipe": name}
        for task, key, factor, digits in (
            *((chat.name, "accuracy", 100.0, 1) for chat in CHATS),
            (TEXT, "bits_per_byte", 1.0, 3),
        ):
            ours = values(task, name, key, factor)
            base = None if name == exact else values(task, exact, key, factor)
            line[task] = quality.cell(ours, base, digits) if ours else ""
        keys = [((TEXT, name, seed), (TEXT, FULL, seed)) for seed in SEEDS]
        pairs = [(by_key[a], by_key[b]) for a, b in keys if a in by_key and b in by_key]
        if pairs:
            line["saved"] = f"{pairs[0][0]['saved_bytes'] / pairs[0][1]['saved_bytes']:.2f}"
            seconds = [sum(row["step_cpu_seconds"] for row in x) for x in zip(*pairs, strict=True)]
            line["time"] = f"{seconds[0] / seconds[1]:.2f}"
        lines.append(line)
    heads = {"recipe": "recipe", "sst2": "SST-2 answers", "rte": "RTE answers"}
    heads |= {TEXT: "text, bits per byte", "saved": "saved bytes of a text step"}
    return rows.table(lines, heads | {"time": "CPU time of a text step"})


def _measure(task: str, name: str, seed: int) -> dict[str, Any]:
    """Train SmolLM2 on one task under one recipe, and score it on what is held out."""
    torch.manual_seed(seed)
    model, tokenizer = smollm()
    chat = next((chat for chat in CHATS if chat.name == task), None)
    if chat is None:
        batches, held_out = _texts(tokenizer, seed)
    else:
        batches, held_out = _chats(chat, tokenizer, seed)
    model.get_input_embeddings().requires_grad_(False)
    rate = _RATES[LORA if "LoRA" in name else FULL]
    model, session, optimizer = _prepared(model, name, seed, rate)
    if session is not None:
        session.calibrate(batches[:1])
    saved = lt.ledger(model, batches[0]).activations
    start = time.process_time()
    _train(model, session, optimizer, batches)
    seconds = time.process_time() - start
    return {
        "task": task,
        "recipe": name,
        "seed": seed,
        **(_score_text(model, held_out) if chat is None else _score_chat(model, held_out)),
        "saved_bytes": saved,
        "step_cpu_seconds": round(seconds / len(batches), 3),
        "num_steps": len(batches),
        "learning_rate": rate,
    }


def _prepared(
    model: Any, name: str, seed: int, rate: float
) -> tuple[Any, lt.Session | None, torch.optim.Optimizer]:
    options: dict[str, Any] = {"lr": rate, "weight_decay": 0.0}
    if name == PEFTS[1]:
        from peft.optimizers import create_lorafa_optimizer

        scale: dict[str, Any] = {"lora_alpha": _ADAPTED.alpha}
        model = peft_model(model, **scale)
        return model, None, create_lorafa_optimizer(model, r=8, **scale, **options)
    if name == PEFTS[0]:
        from peft import VeloraConfig

        model = peft_model(model, lora_alpha=_ADAPTED.alpha, velora_config=VeloraConfig())
    options["fused"] = True
    session = lt.apply(model, *RECIPES[name], seed=seed) if RECIPES.get(name) else None
    if session is not None:
        return model, session, session.optimizer(torch.optim.AdamW, **options)
    trained = [p for p in model.parameters() if p.requires_grad]
    return model, None, torch.optim.AdamW(trained, **options)


def _train(
    model: Any,
    session: lt.Session | None,
    optimizer: torch.optim.Optimizer,
    batches: Sequence[Mapping[str, Any]],
) -> None:
    """Take one step on each batch, warmed up over a tenth and then down to nothing."""
    num_steps, warmup = len(batches), max(1, len(batches) // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min((s + 1) / warmup, (num_steps - s) / (num_steps - warmup))
    )
    trained = [p for p in model.parameters() if p.requires_grad]
    model.train()
    for batch in batches:
        model(**batch, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if session is not None:
            session.on_step()


def _chats(chat: Chat, tokenizer: Any, seed: int) -> tuple[list[dict[str, Any]], Any]:
    """Return the batches of a run, and batches of prompts with the right answer's number.

    Rows of like length share a batch, so that little is padding.
    """
    words = [tokenizer(answer)["input_ids"] for answer in chat.answers]
    assert all(len(word) == 1 for word in words), "an answer is one token"
    answers = torch.tensor([word[0] for word in words])
    data = _glue(chat.name)
    draw = torch.Generator().manual_seed(seed)
    picked = torch.randperm(len(data["train"]), generator=draw)[: chat.num_steps * chat.batch_size]
    asked = _asked(chat, tokenizer, data["train"].select(picked.tolist()))
    batches = []
    for i in torch.randperm(chat.num_steps, generator=draw).tolist():
        part = asked[i * chat.batch_size :][: chat.batch_size]
        ends = [[int(answers[label]), tokenizer.eos_token_id] for _, label in part]
        batch = _padded(tokenizer, [ids + end for (ids, _), end in zip(part, ends, strict=True)])
        # The last token of a prompt, the answer, and what ends it.
        labels = torch.tensor([[_IGNORED, *end] for end in ends])
        batches.append({**batch, "labels": labels, "logits_to_keep": labels.shape[1]})
    num_held_out = min(chat.num_held_out, len(data["validation"]))
    asked = _asked(chat, tokenizer, data["validation"].select(range(num_held_out)))
    held_out = []
    for first in range(0, num_held_out, 20):
        part = asked[first : first + 20]
        batch = _padded(tokenizer, [ids for ids, _ in part])
        right = torch.tensor([label for _, label in part])
        held_out.append({"batch": batch, "answers": answers, "right": right})
    return batches, held_out


@cache
def _glue(task: str) -> Any:
    return glue(task)


def _asked(chat: Chat, tokenizer: Any, table: Any) -> list[tuple[list[int], int]]:
    """Return the tokens of each row's prompt with its label, short ones first."""
    found = []
    for row in table:
        messages = [
            {"role": "system", "content": chat.system},
            {"role": "user", "content": chat.question.format(**row)},
        ]
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        found.append((tokenizer(text)["input_ids"], row["label"]))
    return sorted(found, key=lambda pair: len(pair[0]))


def _padded(tokenizer: Any, sequences: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    """Return a batch padded on the left, so that all sequences end in the same column."""
    batch = {"input_ids": sequences}
    return dict(tokenizer.pad(batch, padding_side="left", return_tensors="pt"))


def _texts(tokenizer: Any, seed: int) -> tuple[list[dict[str, Tensor]], Any]:
    """Return the batches of a run, one window each, and windows that are held out."""
    train, held_out = windows(tokenizer, _TEXT_LENGTH)
    held_out = held_out[:_TEXT_HELD_OUT]
    draw = torch.Generator().manual_seed(seed)
    picked = train[torch.randperm(len(train), generator=draw)[:_TEXT_STEPS]]
    num_bytes = sum(len(tokenizer.decode(ids[1:]).encode()) for ids in held_out)
    batches = [{"input_ids": ids[None], "labels": ids[None]} for ids in picked]
    return batches, {"ids": held_out, "num_bytes": num_bytes}


@torch.no_grad()
def _score_chat(model: Any, held_out: list[dict[str, Any]]) -> dict[str, Any]:
    """Return how often the right answer is the likelier one, and the mean loss on it in nats."""
    model.eval()
    hits: list[Tensor] = []
    losses: list[Tensor] = []
    for part in held_out:
        logits = model(**part["batch"], use_cache=False, logits_to_keep=1).logits[:, -1]
        hits.append(logits[:, part["answers"]].argmax(-1) == part["right"])
        wanted = part["answers"][part["right"]]
        losses.append(F.cross_entropy(logits, wanted, reduction="none"))
    return {
        "accuracy": float(torch.cat(hits).double().mean()),
        "loss": float(torch.cat(losses).mean()),
        "num_held_out": sum(map(len, hits)),
    }


@torch.no_grad()
def _score_text(model: Any, held_out: dict[str, Any]) -> dict[str, Any]:
    """Return the mean loss in nats and the bits per byte of the held-out windows."""
    model.eval()
    ids = held_out["ids"]
    losses = [float(model(input_ids=x[None], labels=x[None], use_cache=False).loss) for x in ids]
    num_bits = sum(losses) * (ids.shape[1] - 1) / math.log(2)
    return {"loss": fmean(losses), "bits_per_byte": num_bits / held_out["num_bytes"]}
