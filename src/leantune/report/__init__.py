"""One self-contained HTML page and PNG plots of a finished run."""

from leantune.report.page import write_report

__all__ = ["write_report"]
