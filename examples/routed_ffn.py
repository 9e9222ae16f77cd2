"""Routed FFN beside LoRA: a router picks, for each token, half of the FFN's hidden units.

The balance of the groups is an auxiliary loss, which a plain loop adds to its own. No dense model
computes the same, so the converted model is what is kept.
"""

import tempfile

import torch
import toy

import leantune as lt


def main(num_steps: int = 30) -> float:
    """Train, save and load; return the largest difference between both models' outputs."""
    model = toy.encoder()
    base = {name: value.clone() for name, value in model.state_dict().items()}
    methods = (lt.LoRA(rank=4), lt.RoutedFFN(num_groups=4, num_active=2))
    session = lt.apply(model, *methods, seed=0)
    batches = toy.batches(num_steps)
    session.calibrate(batches[:4])  # fits the router to the size of the groups' activations

    optimizer = session.optimizer(torch.optim.AdamW, lr=2e-3)
    model.train()
    for batch in batches:
        loss = model(**batch).loss + session.auxiliary_loss()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        session.on_step()
    print(f"loss {loss.item():.3f}, can merge: {session.can_merge}")

    again = toy.encoder()
    again.load_state_dict(base)
    with tempfile.TemporaryDirectory() as folder:
        session.save(folder)
        lt.load(again, folder)
    with torch.no_grad():
        outputs = [m.eval()(**batches[0]).logits for m in (model, again)]
    return (outputs[0] - outputs[1]).abs().max().item()


if __name__ == "__main__":
    main()
