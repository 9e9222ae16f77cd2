"""What a PEFT LoRA layer looks like from outside: the only file that knows PEFT's names.

Nothing of PEFT is imported: its layers are known by their attributes.
"""

import re

_FACTOR = re.compile(r"\.(lora_A|lora_B)\.")


def is_factor(name: str) -> bool:
    """Return whether a module's name is that of a LoRA layer's first or second factor."""
    return _FACTOR.search(name) is not None


def is_second_factor(name: str) -> bool:
    """Return whether a module's name is that of a LoRA layer's second factor, which reads the first
    one's output."""
    return ".lora_B." in name
