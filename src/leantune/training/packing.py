"""Short rows side by side in full ones: whether a model keeps them apart."""

from typing import Any

import torch

from leantune.errors import ConfigError


def check_segments(model: Any, name: str) -> None:
    """Check that a model keeps the segments of a packed row apart, by trying it on one.

    Its logits of one segment must not depend on another's tokens, to the bit.

    Raises:
        ConfigError: they do, or the model does not take a packed row.
    """
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    # As the trainer does, so that a model may go by positions, lengths or numbers of segments.
    collate = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)
    was_training, found, reason = model.training, [], "logits that changed"
    model.eval()
    try:
        for other in (2, 3):
            row = {"input_ids": [1, 2, other, 3, 2, 1], "seq_lengths": [3, 3]}
            batch = {**collate([row])}
            del batch["labels"]
            with torch.no_grad():
                found.append(model(**batch, use_cache=False).logits[0, 3:])
    # A model that does not take such a row may fail with any error.
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
    model.train(was_training)
    if len(found) < 2 or not torch.equal(*found):
        raise ConfigError(
            f"RunRecipe: packing must be False for a model that cannot see segments, got True for "
            f"{name!r}, a {type(model).__name__} ({reason}, where another segment did); leave it "
            "out, or take a model that goes by position_ids, such as Llama, Qwen or GPT-2"
        )
