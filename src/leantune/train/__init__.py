"""Training: tasks, data, metrics, the trainer callback, and whole runs."""
