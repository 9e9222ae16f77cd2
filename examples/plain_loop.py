"""A plain PyTorch loop: MiniLM with WTA-CRS inside checkpointed blocks, and what was saved."""

import argparse
from itertools import islice

import torch
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
)

import leantune as lt
from leantune.training.data import tokenize
from leantune.training.demo import demo_data, demo_model_path


def main(num_steps: int = 50) -> None:
    """Train a few steps on the demo's sentences and print what backward kept."""
    path = demo_model_path()
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForSequenceClassification.from_pretrained(path, num_labels=2)
    rows = tokenize(demo_data(num_train=1600, num_validation=100), tokenizer, 48)["train"]
    batches = DataLoader(
        rows, batch_size=32, shuffle=True, collate_fn=DataCollatorWithPadding(tokenizer)
    )

    batch = next(iter(batches))
    before = lt.ledger(model, batch)
    session = lt.apply(model, lt.Checkpoint(), lt.WTACRS(keep_ratio=0.1), seed=0)
    print(before.compare(lt.ledger(model, batch)))

    optimizer = session.optimizer(torch.optim.AdamW, lr=1e-4)
    model.train()
    for step, batch in enumerate(islice(batches, num_steps)):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 0:
            print(f"step {step}: loss {loss.item():.3f}")

    session.merge()  # plain modules again: model.save_pretrained(...) as ever


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=50)
    main(parser.parse_args().steps)
