"""A plain PyTorch loop: three lines are new, and any optimiser and schedule will do."""

import torch
import toy

import leantune as lt


def main(num_steps: int = 40) -> list[float]:
    """Train with sampled rows and return the loss of each step."""
    model = toy.encoder()
    session = lt.apply(model, lt.WTACRS(keep_ratio=0.3), seed=0)  # new: in place, all or nothing

    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, num_steps)
    model.train()
    losses = []
    for batch in toy.batches(num_steps):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        session.on_step()  # new: some methods act after a step
        losses.append(loss.item())

    session.merge()  # new: plain modules again, model.save_pretrained(...) as ever
    print(f"loss {losses[0]:.3f} at first, {losses[-1]:.3f} at last")
    return losses


if __name__ == "__main__":
    main()
