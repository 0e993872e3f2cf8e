"""Does memory grow with the training data, where `on_disk` leaves their tokens on the disk?

    python -m benchmarks.larger_than_memory [--gigabytes 0.1 1] [--in-memory 0.1] [--batches 500] [--folder DIR]

Rows of generated words in jsonl, SmolLM2's tokenizer, packed rows of 512 tokens. Each size has a process of its own,
which reads and tokenises the rows and then reads batches of 8 with two worker processes. Memory is what the process and
its workers hold beyond mapped files (Pss_Anon, the most of all moments, sampled ten times a second), less what the
process held before. It takes 2.5 times the size on the disk of DIR.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import re
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.results_file import RESULTS, append, environment
from benchmarks.timing import alone, other_load
from language.data import InstructionDataModule
from language.models import SMOLLM2, create_tokenizer

WORDS = 20_000
ROW = 1_000  # characters
BATCH = 8


def write_rows(path: Path, size: int) -> int:
    """Write so many bytes of rows; returns their number."""
    draw = random.Random(0)
    words = ["".join(draw.choices("etaoinshrdlucmfw", k=draw.randint(2, 9))) for _ in range(WORDS)]
    rows = 0
    with path.open("w") as file, tqdm(total=size, desc="writing", unit="B", unit_scale=True) as bar:
        while file.tell() < size:
            text = " ".join(draw.choices(words, k=ROW // 6))
            line = json.dumps({"instruction": f"{rows}: {text[:200]}", "input": "", "output": text[200:]}) + "\n"
            file.write(line)
            rows += 1
            bar.update(len(line))
    return rows


class Watch(threading.Thread):
    """Samples the memory of this process and its children."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.before = self.most = held()
        self.ended = threading.Event()

    def run(self) -> None:
        while not self.ended.wait(0.1):
            self.most = max(self.most, held())


def held() -> int:
    """Bytes that this process and its children hold beyond mapped files (Linux)."""
    total = 0
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    for process in ["self", *children]:
        try:
            status = Path("/proc", process, "smaps_rollup").read_text()
        except (FileNotFoundError, ProcessLookupError):  # a worker that has ended
            continue
        total += 1024 * int(found[1]) if (found := re.search(r"Pss_Anon:\s+(\d+)", status)) else 0
    return total


def measure(path: str, cache: str, on_disk: bool, batches: int) -> dict[str, Any]:
    """Tokenise and read batches, and say what it took."""
    tokenizer = create_tokenizer(SMOLLM2)
    tokenizer("warm")
    watch = Watch()
    watch.start()
    started = time.perf_counter()
    settings = {"cache_dir": cache, "on_disk": True} if on_disk else {}
    data = InstructionDataModule(
        path, tokenizer, packing="packed", max_length=512, batch_size=BATCH, val_fraction=0, num_workers=2, **settings
    )
    data.setup("fit")
    tokenised = time.perf_counter()
    loader = data.train_dataloader()
    read = sum(1 for _ in itertools.islice(loader, batches))
    seconds = time.perf_counter() - tokenised
    watch.ended.set()
    watch.join()
    documents = data._datasets["train"].documents
    return {
        "documents": len(documents),
        "tokens": len(documents.input_ids),
        "memory": watch.most - watch.before,
        "tokenising_seconds": tokenised - started,
        "batches": read,
        "batch_size": BATCH,
        "batches_seconds": seconds,
    }


def main() -> None:
    """Measure and append to results/larger_than_memory.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, nargs="+", default=[0.1, 1.0], help="sizes read on the disk")
    parser.add_argument("--in-memory", type=float, nargs="*", default=[0.1], help="sizes read into memory")
    parser.add_argument("--batches", type=int, default=500)
    parser.add_argument("--folder", help="where the data lie meanwhile; by default the system's place")
    args = parser.parse_args()
    for on_disk, sizes in ((False, args.in_memory), (True, args.gigabytes)):
        for size in sizes:
            with tempfile.TemporaryDirectory(dir=args.folder) as folder:
                path = Path(folder, "rows.jsonl")
                rows = write_rows(path, round(size * 1e9))
                found = alone(measure, str(path), f"{folder}/cache", on_disk, args.batches)
            record = {"gigabytes": size, "on_disk": on_disk, "rows": rows, **found}
            print(record, flush=True)
            append(RESULTS / "larger_than_memory.json", record | {"load": other_load(), "environment": environment()})


if __name__ == "__main__":
    main()
