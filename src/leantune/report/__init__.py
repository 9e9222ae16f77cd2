"""One self-contained HTML page of a finished run."""
