"""What finished runs left: a record for each, and its values for each test item.

A study's folder holds `runs/ID/` (log, recipe and record of each run) and, packed, `results.json` with all records and
`items.npz` with all per-item values. The two packed files are enough to go on, or to write the report elsewhere.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np

from lit_adapters.errors import AdapterError, shown
from lit_adapters.files.arrays import read_arrays, write_arrays
from lit_adapters.files.atomic import write_atomically, write_together

RECORD = "record.json"
ITEMS = "items.npz"  # also the name that `lit_adapters.lightning.run_record` writes
RESULTS = "results.json"
RUNS = "runs"
_SEPARATOR = "|"
# The packed files are written anew from the folders of runs, as far as these are still there.
_AGAIN = "delete it, and run the study again"

Stage = Literal["search", "final", "noise"]


@dataclass(frozen=True)
class Record:
    """One finished run.

    Attributes:
        id: Arm, stage, set, seed, and a digest of program, recipe and stage.
        arm: Key of the arm.
        stage: "search" (evaluated on validation data), "final" or "noise" (on test data).
        set: Number of the training set.
        seed: Number of the seed.
        rates: Learning rate of each group.
        status: "done", or "diverged" if values were not finite.
        metrics: What the evaluation logged, unscaled.
        curve: Points of the learning curves, `{"step": ..., name: value, ...}`: means of what the training logged
            between two points, and values of validations during the training.
        parameters: Numbers of parameters: "trainable", and "without_head", those of them outside the head.
        seconds: "fit", and "total" with the start and the evaluation.
        peak_memory_mib: Largest resident memory of the process, in MiB.
        environment: Versions, processor, threads, date.
        message: Why a run diverged.
        protocol: What the study had named beforehand when a final run was started.
        ended: When the run ended, in UTC; empty for runs of earlier versions.
    """

    id: str
    arm: str
    stage: Stage
    set: int
    seed: int
    rates: dict[str, float]
    status: Literal["done", "diverged"]
    metrics: dict[str, float] = field(default_factory=dict)
    curve: list[dict[str, float]] = field(default_factory=list)
    parameters: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    peak_memory_mib: float = 0.0
    environment: dict[str, Any] = field(default_factory=dict)
    message: str = ""
    protocol: dict[str, Any] = field(default_factory=dict)
    ended: str = ""


class Results:
    """The finished runs of a study, in memory, and where they are kept.

    Args:
        folder: The study's folder; None to keep nothing.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder
        self._records: dict[str, Record] = {}
        self._items: dict[str, dict[str, np.ndarray]] = {}

    @classmethod
    def load(cls, folder: Path) -> Results:
        """Read the packed files, and the folders of runs that finished after these were written.

        Raises:
            AdapterError: A file is damaged.
        """
        results = cls(folder)
        packed = folder / RESULTS
        if packed.exists():
            entries = _read_json(packed)
            if not isinstance(entries, list):
                raise AdapterError(f"{packed} does not hold records of a study; {_AGAIN}")
            for values in entries:
                results.add(_record(values, packed))
            results._read_items(folder / ITEMS)
        for path in sorted((folder / RUNS).glob(f"*/{RECORD}")):
            record = read_record(path)
            if record.id not in results or not results.items(record):
                results.add(record, _checked(read_arrays(path.with_name(ITEMS)), path.with_name(ITEMS)))
        return results

    def _read_items(self, path: Path) -> None:
        for name, values in _checked(read_arrays(path), path).items():
            identity, _, item = name.rpartition(_SEPARATOR)
            self._items.setdefault(identity, {})[item] = values

    def __contains__(self, identity: str) -> bool:
        return identity in self._records

    def __getitem__(self, identity: str) -> Record:
        return self._records[identity]

    @property
    def records(self) -> list[Record]:
        """All records, in the order in which they were added."""
        return list(self._records.values())

    def items(self, record: Record) -> dict[str, np.ndarray]:
        """The values for each test item, by name, in the order of the test split; empty if the program gave none."""
        return self._items.get(record.id, {})

    def add(self, record: Record, items: Mapping[str, np.ndarray] | None = None) -> None:
        """Add a finished run."""
        self._records[record.id] = record
        if items:
            self._items[record.id] = dict(items)

    def save(self) -> None:
        """Write the packed files.

        Raises:
            AdapterError: A file cannot be written.
        """
        assert self.folder is not None
        records = [_plain(record) for record in self.records]
        text = "[\n" + ",\n".join(json.dumps(record, sort_keys=True) for record in records) + "\n]\n"
        arrays = {
            f"{identity}{_SEPARATOR}{name}": values
            for identity, items in self._items.items()
            for name, values in items.items()
        }
        write_together(
            self.folder,
            {
                ITEMS: lambda path: write_arrays(path, arrays),
                RESULTS: lambda path: path.write_text(text, encoding="utf-8"),
            },
        )


def write_record(folder: Path, record: Record) -> None:
    """Write the record of a run into its folder; a run is finished when it is there."""
    write_atomically(folder / RECORD, lambda path: path.write_text(json.dumps(_plain(record), indent=1) + "\n"))


def read_record(path: Path) -> Record:
    """Read the record of a run.

    Raises:
        AdapterError: The file is damaged.
    """
    return _record(_read_json(path), path)


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise AdapterError(f"{path} is damaged: {error}; {_AGAIN}") from error


def _record(values: Any, path: Path) -> Record:
    known = {f.name for f in fields(Record)}
    if not isinstance(values, dict) or not {"id", "arm", "stage", "set", "seed", "status"} <= values.keys() <= known:
        raise AdapterError(f"{path} does not hold records of a study; {_AGAIN}")
    record = Record(**values)
    wrong = _wrong_field(record)
    if wrong:
        raise AdapterError(f"{path} is damaged: {wrong} of the run {shown(record.id)} is wrong; {_AGAIN}")
    return record


def _wrong_field(record: Record) -> str:
    """The name of a field whose value no run can have left; empty if there is none."""
    numbers = {"rates", "metrics", "parameters", "seconds"}
    for name in (*numbers, "environment", "protocol"):
        values = getattr(record, name)
        if not isinstance(values, dict) or (name in numbers and not all(map(_is_number, values.values()))):
            return name
    points = record.curve if isinstance(record.curve, list) else [None]
    if not all(isinstance(point, dict) and all(map(_is_number, point.values())) for point in points):
        return "curve"
    if not isinstance(record.ended, str):
        return "ended"
    if record.status not in ("done", "diverged"):
        return "status"
    beginning = f"{record.arm}-{record.stage}-{record.set}-{record.seed}-"
    if record.stage not in ("search", "final", "noise") or not str(record.id).startswith(beginning):
        return "id"
    if not all(isinstance(number, int) for number in (record.set, record.seed)):
        return "set"
    return "" if _is_number(record.peak_memory_mib) else "peak_memory_mib"


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _plain(record: Record) -> dict[str, Any]:
    """A record as it is stored: without a protocol in the search, and without a time where there is none."""
    empty = [name for name in ("protocol", "ended") if not getattr(record, name)]
    return {name: value for name, value in asdict(record).items() if name not in empty}


def _checked(arrays: dict[str, np.ndarray], path: Path) -> dict[str, np.ndarray]:
    for name, values in arrays.items():
        if values.ndim != 1 or values.dtype.kind not in "biuf":
            raise AdapterError(f"{path} is damaged: {name!r} is not a list of numbers; {_AGAIN}")
    return arrays
