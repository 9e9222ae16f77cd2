"""An unmodified transformers.Trainer, all weights trained: one call and one callback are new."""

import tempfile

import toy
from transformers import Trainer, TrainingArguments

import leantune as lt


def main(num_steps: int = 60) -> float:
    """Fine-tune, save plain weights, and return the accuracy of the model that loads them."""
    model = toy.encoder()
    session = lt.apply(model, lt.WTACRS(keep_ratio=0.3), seed=0)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            max_steps=num_steps,
            per_device_train_batch_size=32,
            learning_rate=3e-3,
            report_to="none",
            save_strategy="no",
        )
        trainer = Trainer(
            model,
            arguments,
            train_dataset=toy.Rows(1024),
            callbacks=[lt.TrainerCallback(session)],
        )
        trainer.train()

        session.merge()
        model.save_pretrained(f"{folder}/final")  # loads without leantune
        again = type(model).from_pretrained(f"{folder}/final").eval()
    test = toy.Rows(256, seed=1)
    guess = again(input_ids=test.ids, attention_mask=test.mask).logits.argmax(-1)
    accuracy = (guess == test.labels).float().mean().item()
    print(f"accuracy {accuracy:.2f}")
    return accuracy


if __name__ == "__main__":
    main()
