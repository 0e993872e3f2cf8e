"""Which files of a folder belong to which split: those with its exact name; in doubt an error says what was found."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Literal

from language.data.readers import READERS, suffix_of
from lit_adapters.errors import DataError

SplitName = Literal["train", "val", "test"]

NAMES = {"train": ("train",), "val": ("val", "valid", "validation", "dev"), "test": ("test",)}
# A split's name alone, or with the number of a part and its hash: train, test-00000-of-00002, train_1.
_EXACT = re.compile(
    rf"({'|'.join(n for names in NAMES.values() for n in names)})(?:[-_.](\d+)(?:-of-(\d+))?(?:-[0-9a-f]{{8,}})?)?"
)
# Words and their beginnings that hint at a split without being its exact name.
_HINTS = {
    "train": re.compile(r"train.*|.*train|trn|tr"),
    "val": re.compile(r"valid.*|val|.*valid|dev|devel.*|.*dev|eval.*|.*eval|held|holdout|heldout"),
    "test": re.compile(r"test.*|.*test|tst|eval.*|.*eval|held|holdout|heldout"),
}
_WORDS = re.compile(r"[A-Z]?[a-z]+|[A-Z]+")
# Words that match a hint by chance.
_INNOCENT = {"latest", "greatest", "shortest", "fastest", "contest", "contests", "protest", "retrieval", "medieval"}
_INNOCENT |= {"constrain", "restrain", "invalid", "testimony", "testimonial", "testimonials", "testament"}
_DOCUMENTS = re.compile(r"readme.*|licen[cs]e.*|.*\.md|sha\d+sums.*|md5sums.*|checksums.*|\..*", re.IGNORECASE)
_SHOWN = 8  # files in a message


@dataclass(frozen=True)
class Folder:
    """The data files of a folder, by what their names say.

    Attributes:
        path: The folder.
        exact: Files whose name is exactly that of a split, or a numbered part, by split.
        hinted: Files whose name only hints at a split, by split; a file may hint at several.
        plain: Files whose name has nothing to do with splits.
        unread: Other files with the reason for which they are not read.
    """

    path: Path
    exact: dict[str, list[Path]]
    hinted: dict[str, list[Path]]
    plain: list[Path]
    unread: dict[Path, str]

    def files(self, split: SplitName) -> list[Path]:
        """The files of a split: those of its name, or all where no name has anything to do with splits.

        Raises:
            DataError: There are none, or names leave in doubt which they are.
        """
        chosen = self.exact[split]
        doubtful = self.hinted[split] if chosen else sorted({f for files in self.hinted.values() for f in files})
        if doubtful:
            raise DataError(
                f"folder {self.path}: {_listed(doubtful)} may be {split} data or not (found {self.found()}). Give "
                f"them the exact name {' or '.join(NAMES[split])}, as in {split}.jsonl or "
                f"{split}-00000-of-00002.parquet, move them away, or name the files in path, val_path and test_path"
            )
        if not chosen and not any(self.exact.values()):
            chosen = self.plain
        if not chosen:
            raise DataError(
                f"folder {self.path} holds no {split} data (found {self.found()}): put {split}.jsonl (or json, "
                "parquet, yml) into it, or give the file itself"
            )
        self._check_parts(chosen)
        return chosen

    def named(self, word: str) -> list[Path]:
        """The files of exactly this name, or numbered parts of it."""
        return [f for files in self.exact.values() for f in files if (m := _EXACT.fullmatch(_stem(f))) and m[1] == word]

    def has(self, split: SplitName) -> bool:
        """Whether the folder has files of the split's own.

        Raises:
            DataError: Names leave it in doubt.
        """
        if self.hinted[split]:
            self.files(split)
        return bool(self.exact[split])

    def unused(self, used: list[Path]) -> str:
        """Which files are not among those used, and why; "" where all are."""
        others = [f for f in self._data() if f not in used]
        reasons = {**dict.fromkeys(others, "not of this split"), **self.unread}
        parts = []
        for reason in Counter(reasons.values()):
            files = [file for file, why in reasons.items() if why == reason]
            parts.append(f"{len(files)} {reason} ({_listed(files, self.path)})")
        return ", ".join(parts)

    def found(self) -> str:
        """All files by name, for a message."""
        files = [*self._data(), *self.unread]
        return _listed(files, self.path) if files else "no files"

    def _data(self) -> list[Path]:
        groups = [*self.exact.values(), *self.hinted.values(), self.plain]
        return sorted({file for group in groups for file in group})

    def _check_parts(self, files: list[Path]) -> None:
        """Check that no file is there twice, under two names or suffixes, and that no part is missing."""
        names = {_EXACT.fullmatch(_stem(file)) for file in files} - {None}
        words = sorted({match[1] for match in names if match})
        numbered = [match for match in names if match and match[2]]
        stems = Counter(_stem(file) for file in files)
        twice = [file for file in files if stems[_stem(file)] > 1]
        if twice or len(words) > 1 or 0 < len(numbered) < len(names):
            raise DataError(
                f"folder {self.path}: {_listed(twice or files)} may hold the same rows twice; keep one of them, or "
                "give the files themselves in path, val_path and test_path"
            )
        for total in sorted({int(match[3]) for match in numbered if match[3]}):
            parts = {int(match[2]) for match in numbered if match[3] and int(match[3]) == total}
            if len(parts) < total:
                raise DataError(
                    f"folder {self.path} has {len(parts)} of {total} parts ({_listed(files)}): copy the others too, or "
                    "give the files themselves in path, val_path and test_path"
                )


def look_into(path: Path) -> Folder:
    """The data files of a folder by their names; hidden files, READMEs and licences do not count."""
    exact: dict[str, list[Path]] = {split: [] for split in NAMES}
    hinted: dict[str, list[Path]] = {split: [] for split in NAMES}
    plain: list[Path] = []
    unread: dict[Path, str] = {}
    for file in sorted(path.iterdir()):
        if _DOCUMENTS.fullmatch(file.name):
            continue
        if file.is_dir():
            unread |= dict.fromkeys(islice(_within(file), 1000), "in a folder further down")
        elif suffix_of(file) not in READERS:
            unread[file] = "of another kind"
        elif match := _EXACT.fullmatch(_stem(file)):
            exact[next(split for split, names in NAMES.items() if match[1] in names)].append(file)
        elif hints := _hints(file):
            for split in hints:
                hinted[split].append(file)
        else:
            plain.append(file)
    return Folder(path, exact, hinted, plain, unread)


def _within(folder: Path) -> Iterator[Path]:
    """Files with data one folder down; deeper ones are not looked for."""
    try:
        yield from sorted(file for file in folder.iterdir() if suffix_of(file) in READERS)
    except OSError:
        yield folder


def _stem(file: Path) -> str:
    return file.name.lower().removesuffix(".gz").removesuffix(suffix_of(file))


def _hints(file: Path) -> list[str]:
    words = {word.lower() for word in _WORDS.findall(file.name[: len(_stem(file))])} - _INNOCENT
    return [split for split, hint in _HINTS.items() if any(hint.fullmatch(word) for word in words)]


def _listed(files: list[Path], folder: Path | None = None) -> str:
    names = [str(file.relative_to(folder)) if folder else file.name for file in files[:_SHOWN]]
    more = f" and {len(files) - _SHOWN} more" if len(files) > _SHOWN else ""
    return ", ".join(names) + more
