"""``leantune train``: from a recipe to a fine-tuned model, over datasets and transformers."""
