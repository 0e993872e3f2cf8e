"""What does it cost to begin? Importing the library, attaching to a LLaMA of 8B without weights, loading a file.

    python -m benchmarks.startup [--rounds 7]

Import: seconds of `import lit_adapters` in a fresh interpreter that has torch already. Build: of the rational kernel,
into an empty cache. Attach: on the meta device, to the shape of LLaMA-3-8B, every method's default targets.
File: bytes beyond 4 a trained value (and buffer value), and seconds to load it into ViT-S.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import timm
import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, LlamaConfig

import lit_adapters as la
from benchmarks.arms import methods
from benchmarks.results_file import RESULTS, append, environment
from benchmarks.timing import other_load, spread, timed

IMPORT = "import time, torch; start = time.perf_counter(); import lit_adapters; print(time.perf_counter() - start)"
BUILD = (
    "import time; from lit_adapters.ops import _native as n; start = time.perf_counter(); "
    "n.build('rational', M=5, N=4, ABS_OF_SUM=1); print(time.perf_counter() - start)"
)
LLAMA_3_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}


def import_seconds() -> float:
    """Seconds of the import in one fresh interpreter."""
    return float(subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, text=True, check=True).stdout)


def build_seconds() -> float:
    """Seconds to build the kernel of the rational function into an empty cache, in a fresh interpreter."""
    with tempfile.TemporaryDirectory() as cache:
        environment = os.environ | {"LIT_ADAPTERS_CACHE": cache}
        done = subprocess.run(
            [sys.executable, "-c", BUILD], capture_output=True, text=True, check=True, env=environment
        )
    return float(done.stdout)


def attach_seconds(method: la.Method) -> float:
    """Seconds to attach a method to a LLaMA of 8B on the meta device."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(LlamaConfig(**LLAMA_3_8B))
    return timed(lambda: la.attach(model, method))


def file_of(method: la.Method, folder: Path) -> tuple[int, int]:
    """Save adapters of ViT-S; bytes of the folder, and of its values at 4 bytes each."""
    model = timm.create_model("vit_small_patch16_224", num_classes=10)
    la.attach(model, method)
    la.save_adapters(model, folder)
    values = sum(t.numel() for _, adapter in la.adapters(model) for t in adapter.adapter_tensors().values())
    return sum(f.stat().st_size for f in folder.iterdir()), 4 * values


def load_seconds(folder: Path) -> float:
    """Seconds to load saved adapters into a fresh ViT-S."""
    model = timm.create_model("vit_small_patch16_224", num_classes=10)
    return timed(lambda: la.load_adapters(model, folder))


def main() -> None:
    """Measure and append to results/startup.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    about = {"rounds": rounds, "system_load": other_load(), "environment": environment()}
    builds = spread([build_seconds() for _ in tqdm(range(rounds), desc="build")])
    append(RESULTS / "startup.json", {"what": "build", "seconds": builds, **about})
    print(f"build of the rational kernel {builds['median']:.2f} s")
    imports = spread([import_seconds() for _ in tqdm(range(rounds), desc="import")])
    append(RESULTS / "startup.json", {"what": "import", "seconds": imports, **about})
    print(f"import {imports['median']:.2f} s")
    for name, kind in methods().items():
        method = kind()
        attach = spread([attach_seconds(method) for _ in tqdm(range(rounds), desc=name)])
        with tempfile.TemporaryDirectory() as folder:
            size, values = file_of(method, Path(folder))
            load = spread([load_seconds(Path(folder)) for _ in range(rounds)])
        record = {"what": name, "attach": attach, "load": load, "file_bytes": size, "value_bytes": values, **about}
        append(RESULTS / "startup.json", record)
        print(f"{name:<16} attach {attach['median']:.2f} s, load {load['median']:.2f} s, {size:,} bytes for {values:,}")


if __name__ == "__main__":
    main()
