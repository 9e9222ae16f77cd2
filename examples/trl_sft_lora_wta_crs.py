"""TRL's SFTTrainer with LoRA factors and sampled rows; the adapter is a plain PEFT one."""

import tempfile
from pathlib import Path

import datasets
import toy
from trl import SFTConfig, SFTTrainer

import leantune as lt


def main(num_steps: int = 10) -> list[str]:
    """Fine-tune on texts, save the adapter, and return the names of its files."""
    model = toy.decoder()
    session = lt.apply(model, lt.LoRA(rank=4), lt.WTACRS(keep_ratio=0.3, min_rows=4), seed=0)
    texts = [" ".join(f"w{(start + i) % toy.NUM_WORDS}" for i in range(12)) for start in range(64)]
    with tempfile.TemporaryDirectory() as folder:
        trainer = SFTTrainer(
            model,
            args=SFTConfig(
                folder,
                max_steps=num_steps,
                per_device_train_batch_size=8,
                learning_rate=1e-2,
                max_length=16,
                report_to="none",
                save_strategy="no",
                bf16=False,
            ),
            train_dataset=datasets.Dataset.from_dict({"text": texts}),
            processing_class=toy.tokenizer(),
            callbacks=[lt.TrainerCallback(session)],
        )
        trainer.train()
        model.save_pretrained(f"{folder}/adapter")
        names = sorted(path.name for path in Path(folder, "adapter").iterdir())
    session.merge()  # or fold the factors in, for a model without an adapter
    print(", ".join(names))
    return names


if __name__ == "__main__":
    main()
