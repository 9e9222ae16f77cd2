"""The command ``leantune``; each command's machinery is imported when it runs."""

from leantune.cli.app import app, main

__all__ = ["app", "main"]
