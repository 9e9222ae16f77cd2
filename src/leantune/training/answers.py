"""How often a model finds the right one of a few answers the likeliest."""

from collections.abc import Mapping
from typing import Any

import datasets
import torch
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from transformers import TrainerCallback

from leantune.errors import ConfigError
from leantune.training.chat import IGNORED, encode_chats

MOST_ANSWERS = 20


class ScoreAnswers(TrainerCallback):
    """At each evaluation, log as ``accuracy`` how often the right answer is the likeliest of all.

    An answer's score is the sum of its tokens' log-likelihoods, its end token's among them. The
    random streams do not move.

    Args:
        data: the checked rows of both splits, whose answers are those to choose from.
        tokenizer: of the model.
        max_length: most tokens of a row.

    Raises:
        ConfigError: there are fewer than two answers or more than ``MOST_ANSWERS``, or a row is
            too long to be scored whole.
    """

    def __init__(self, data: datasets.DatasetDict, tokenizer: Any, max_length: int) -> None:
        answers = sorted({_answer(row) for rows in data.values() for row in rows})
        if not 2 <= len(answers) <= MOST_ANSWERS:
            raise ConfigError(
                f"RunRecipe: score_answers must be False unless the answers are 2 to "
                f"{MOST_ANSWERS} different ones, got {len(answers)}; leave it out"
            )
        rows = list(data["validation"])
        self._right = [answers.index(_answer(row)) for row in rows]
        self._num_answers = len(answers)
        self._pad = tokenizer.pad_token_id
        candidates = (_with_answer(row, answer) for row in rows for answer in answers)
        self._encoded = list(encode_chats(candidates, tokenizer))
        longest = max(len(ids) for ids, _ in self._encoded)
        if longest > max_length:
            raise ConfigError(
                f"RunRecipe: max_length must be at least {longest} to score answers in whole rows, "
                f"got {max_length}; raise it, or leave out score_answers"
            )

    # The trainer passes much more by keyword; what is not named here is not needed.
    def on_evaluate(
        self, args: Any, state: Any, control: Any, model: Any, metrics: Any, **kwargs: Any
    ) -> None:
        step = max(1, args.per_device_eval_batch_size // self._num_answers) * self._num_answers
        scores = torch.cat(
            [
                self._score(model, self._encoded[at : at + step], args)
                for at in range(0, len(self._encoded), step)
            ]
        )
        chosen = scores.view(-1, self._num_answers).argmax(1).tolist()
        hits = sum(a == b for a, b in zip(chosen, self._right, strict=True))
        # The evaluation has been logged already, and what is logged becomes the run's result.
        for entry in (metrics, state.log_history[-1]):
            entry["eval_accuracy"] = hits / len(self._right)

    @torch.no_grad()
    def _score(self, model: Any, encoded: list[Any], args: Any) -> torch.Tensor:
        """Return the log-likelihood of each row's labels, on the CPU."""
        ids, labels = (
            pad_sequence([*map(torch.tensor, part)], batch_first=True, padding_value=value)
            for part, value in zip(zip(*encoded, strict=True), (self._pad, IGNORED), strict=True)
        )
        labels = labels.to(args.device)
        dtype = torch.float16 if args.fp16 else torch.bfloat16
        with torch.autocast(args.device.type, dtype=dtype, enabled=args.fp16 or args.bf16):
            # A causal model's tokens do not see the padding behind them.
            logits = model(input_ids=ids.to(args.device)).logits
        return -row_loss(logits, labels).cpu()


def row_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the loss of each row's labels, (rows,) in nats, which each token's logits precede."""
    found = logits[:, :-1].transpose(1, 2).float()
    return cross_entropy(found, labels[:, 1:], ignore_index=IGNORED, reduction="none").sum(1)


def _answer(row: Any) -> str:
    last = row["completion"] if "completion" in row else row["messages"]
    return last if isinstance(last, str) else last[-1]["content"]


def _with_answer(row: Any, answer: str) -> Mapping[str, Any]:
    name = "completion" if "completion" in row else "messages"
    last = row[name]
    if isinstance(last, str):
        return {**row, name: answer}
    return {**row, name: [*last[:-1], last[-1] | {"content": answer}]}
