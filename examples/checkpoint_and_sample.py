"""The least memory for its time: rows drawn inside checkpointed blocks.

A block that is recomputed in backward draws its rows there, where the true gradient norms are
known, and keeps nothing more for it.
"""

import torch
import toy

import leantune as lt


def main(num_steps: int = 20) -> tuple[int, int]:
    """Print what backward keeps, train, and return the saved bytes before and after."""
    model = toy.decoder()
    rows = [toy.Rows(16, seed=seed) for seed in range(num_steps)]
    texts = [
        {
            "input_ids": r.ids,
            "attention_mask": r.mask,
            "labels": r.ids.masked_fill(r.mask == 0, -100),
        }
        for r in rows
    ]

    before = lt.ledger(model, texts[0])
    session = lt.apply(model, lt.Checkpoint(), lt.WTACRS(keep_ratio=0.1), seed=0)
    after = lt.ledger(model, texts[0])
    print(before.compare(after))

    optimizer = session.optimizer(torch.optim.AdamW, lr=2e-3)
    model.train()
    for batch in texts:
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    session.merge()
    print(f"loss {loss.item():.3f}")
    return before.activations, after.activations


if __name__ == "__main__":
    main()
