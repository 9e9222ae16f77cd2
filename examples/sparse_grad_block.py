"""SparseGrad: about 1 % of each MLP weight trains, in a basis found from a few batches.

Gradients and moments of the MLP weights all but vanish, and backward keeps fewer bytes. Compare
with LoRA of the same size on your own task before you choose.
"""

import torch
import toy

import leantune as lt


def main(num_steps: int = 40) -> list[float]:
    """Print gradients and state before and after, train, and return the loss of each step."""
    model = toy.encoder()
    batches = toy.batches(num_steps)
    before = lt.ledger(model, batches[0])

    session = lt.apply(model, lt.SparseGrad(density=0.05, num_calibration_batches=4), seed=0)
    session.calibrate(batches[:4])  # gradients of a few batches give the bases; weights stay
    print(before.compare(lt.ledger(model, batches[0])))

    optimizer = session.optimizer(torch.optim.AdamW, lr=2e-3)
    model.train()
    losses = []
    for batch in batches:
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        session.on_step()
        losses.append(loss.item())
    session.merge()
    print(f"loss {losses[0]:.3f} at first, {losses[-1]:.3f} at last")
    return losses


if __name__ == "__main__":
    main()
