"""One self-contained HTML page of a finished run, and its plots as SVG beside it."""
