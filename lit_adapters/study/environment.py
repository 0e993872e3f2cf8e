"""What a measurement was made with: versions, processor, threads."""

from __future__ import annotations

import platform
import subprocess
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

_PACKAGES = ("torch", "lightning", "timm", "transformers", "lit-adapters")


def environment() -> dict[str, Any]:
    """Versions, processor and threads of this process."""
    import torch

    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    flags = next((line.split() for line in lines if line.startswith("flags")), [])
    return {
        "date": date.today().isoformat(),
        "cpu": models[0] if models else platform.processor(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "bfloat16": any("bf16" in flag for flag in flags),  # in hardware, else numbers are converted
        "cores": len(models),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "commit": _commit(),
        **{name: found for name in _PACKAGES if (found := _version(name)) is not None},
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit of the checkout that this package is in; None for an installed copy."""
    line = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(line, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def peak_memory_mib() -> float:
    """Largest resident memory of this process so far, in MiB."""
    import resource

    scale = 2**20 if platform.system() == "Darwin" else 2**10  # bytes there, kilobytes elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / scale
