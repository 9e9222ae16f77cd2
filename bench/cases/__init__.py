"""What is measured: one module for each question, with its variants and its table."""
