"""What a measurement on a GPU was made with."""

from __future__ import annotations

import subprocess
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from benchmarks.results_file import environment

_PACKAGES = ("triton", "peft", "trl")


def gpu_environment() -> dict[str, Any]:
    """The environment of all measurements, and the driver, CUDA, memory of the GPU, and more packages."""
    found = environment() | {"cuda": torch.version.cuda, "driver": _driver()}
    if torch.cuda.is_available():
        found["gpu_memory_mib"] = torch.cuda.get_device_properties(0).total_memory // 2**20
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def _driver() -> str | None:
    """The version of NVIDIA's driver; None where its command does not say."""
    line = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
    try:
        return subprocess.run(line, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
