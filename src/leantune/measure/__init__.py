"""Measures any torch model: bytes held, gradient error, time and peak of a step."""

from leantune.measure._entries import Entry, Holder
from leantune.measure._step import calibration_step
from leantune.measure._text import format_bytes
from leantune.measure.fidelity import Fidelity, ParameterFidelity, fidelity
from leantune.measure.ledger import Ledger, ledger
from leantune.measure.peak import StepStats, compare_steps, peak_memory, steps_table

__all__ = [
    "Entry",
    "Fidelity",
    "Holder",
    "Ledger",
    "ParameterFidelity",
    "StepStats",
    "calibration_step",
    "compare_steps",
    "fidelity",
    "format_bytes",
    "ledger",
    "peak_memory",
    "steps_table",
]
