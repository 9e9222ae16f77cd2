"""``leantune env``: versions and devices."""

import platform
from importlib import metadata
from typing import Any

from rich.markup import escape

from leantune._version import __version__
from leantune.cli.options import DebugFlag, JsonFlag
from leantune.cli.output import print_json, print_text, reported_errors

PACKAGES = ("torch", "transformers", "peft", "accelerate", "datasets", "triton")


def env(json: JsonFlag = False, debug: DebugFlag = False) -> None:
    """Show versions of everything that a result depends on, and the devices."""
    with reported_errors(debug):
        facts = describe_environment()
        if json:
            print_json(facts)
            return
        rows = [
            (name.replace("_", " "), "none" if value is None else escape(str(value)))
            for name, value in facts.items()
            if name != "gpus"
        ]
        rows += [
            (f"gpu {number}", f"{escape(gpu['name'])}, {gpu['memory_bytes'] / 2**30:.1f} GiB")
            for number, gpu in enumerate(facts["gpus"])
        ]
        print_text("Environment", ("", ""), rows)


def describe_environment() -> dict[str, Any]:
    """Return versions, None for what is not installed, and the CUDA devices with their memory."""
    import torch

    facts: dict[str, Any] = {"leantune": __version__, "python": platform.python_version()}
    facts |= {package: _version(package) for package in PACKAGES}
    facts["platform"] = platform.platform()
    facts["cpu_threads"] = torch.get_num_threads()
    facts["cuda"] = torch.version.cuda if torch.cuda.is_available() else None
    facts["gpus"] = [
        {"name": gpu.name, "memory_bytes": gpu.total_memory}
        for gpu in map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    ]
    return facts


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
