"""Models of transformers from their configurations, without weights."""

from typing import Any

import torch
from torch import nn

from leantune.errors import ConfigError, shown


def build_on_meta(config: Any) -> nn.Module:
    """Build the model that a configuration names, else a causal language model, without memory.

    Args:
        config: of transformers.

    Raises:
        ConfigError: it is none, or the model cannot be built on the meta device.
    """
    named = getattr(config, "architectures", "none")
    if named == "none":
        raise ConfigError(
            "plan: model must be a torch.nn.Module or a configuration of transformers, got "
            f"{shown(config)}; for a name take transformers.AutoConfig.from_pretrained(name)"
        )
    import transformers

    named = (named or ["none"])[0]
    build: Any = getattr(transformers, named, transformers.AutoModelForCausalLM.from_config)
    try:
        with torch.device("meta"):
            return build(config)
    # A configuration may say anything, and what a class makes of it may be any error.
    except Exception as error:
        raise ConfigError(
            f"plan: model must be one that can be built on the meta device, got {named} "
            f"({type(error).__name__}: {error}); load it and give the module"
        ) from error
