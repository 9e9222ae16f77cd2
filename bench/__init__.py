"""Measurements behind every figure in the README; run as ``python -m bench``."""
