"""Image files by class: in folders, or in gzipped tar archives. What is not used is counted and named.

torchvision's ImageFolder passes over such files without a word, and reads no archives.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from lightning.pytorch.utilities import rank_zero_warn
from tqdm import tqdm

from lit_adapters.assets.archives import DAMAGES, bounded_tar, too_large, unpacked_limit
from lit_adapters.errors import AssetError, DataError
from vision.images import EncodedImage

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".ppm", ".tif", ".tiff", ".webp"}
SPLITS = ("train", "test")
_ARCHIVES = (".tar.gz", ".tgz", ".tar", ".zip", ".parquet")
_MOST_COUNTED = 10_000  # files of a folder that is not used

OTHER_SUFFIX = f"whose names do not end in {', '.join(sorted(IMAGE_SUFFIXES))}"
DEEPER = "in folders inside a class folder"
OUTSIDE = "outside the class folders"
LINKS = "that are links inside an archive"


class Unused:
    """Files that a reader passes over, by reason.

    Args:
        origin: The folder or archive, for the message.
    """

    def __init__(self, origin: Path) -> None:
        self.origin = origin
        self.names: dict[str, list[str]] = {}

    def add(self, reason: str, *names: str) -> None:
        """Count files; the reason goes on from "3 files"."""
        if names:
            self.names.setdefault(reason, []).extend(names)

    def warn(self) -> None:
        """Say how many there are, and name the first of each kind."""
        if self.names:
            parts = [f"{len(names)} {reason} ({_first(names)})" for reason, names in self.names.items()]
            rank_zero_warn(f"files of {self.origin} are not used: {'; '.join(parts)}")


def members_by_class(root: Path, split: str, *, warn: bool = True) -> dict[str, list[EncodedImage]]:
    """The images of each class in `root/split/<class>/*` or `root/split.tar.gz`, sorted by name.

    Names that begin with a dot are left out.

    Args:
        root: The folder of the data set.
        split: "train" or "test", the exact name.
        warn: Whether to name what is not used.

    Raises:
        DataError: Neither exists, there is no class, a class has no image, or the archive is damaged, ambiguous or too
            large.
    """
    folder, archive = root / split, root / f"{split}.tar.gz"
    origin = folder if folder.is_dir() else archive
    unused = Unused(origin)
    if folder.is_dir():
        try:
            members = _read_directory(folder, unused)
        except OSError as error:
            raise DataError(f"{error.filename or folder} cannot be listed: {error.strerror}; mend that") from error
    elif archive.is_file():
        members = _read_archive(archive, unused)
    else:
        found = sorted(path.name + "/" * path.is_dir() for path in root.iterdir()) if root.is_dir() else []
        raise DataError(
            f"neither {folder}/ nor {archive} exists: set root to the folder that holds one of them, under exactly "
            f"this name. In {root} there is {_first(found) if found else 'nothing'}"
        )
    if not members:
        raise DataError(f"{origin} holds no class folders")
    for name, images in members.items():
        if not images:
            raise DataError(f"class folder {name!r} of {root}/{split} holds no images: fill it or remove it")
    if warn:
        unused.warn()
        _warn_of_other_splits(root)
    return members


def _warn_of_other_splits(root: Path) -> None:
    """Name folders and archives beside the two splits, such as `val/`; validation images are held out of `train`."""
    unused = Unused(root)
    for path in sorted(root.iterdir()):
        split = path.name.removesuffix(".tar.gz")
        if path.name.startswith(".") or path.name in SPLITS:
            continue
        if path.is_dir():
            unused.add(f"in {path.name}/, which is neither train nor test", *_inside(path, root))
        elif path.name.endswith(_ARCHIVES) and split not in SPLITS:
            unused.add("named neither train.tar.gz nor test.tar.gz", path.name)
        elif split in SPLITS and (root / split).is_dir():
            unused.add("beside a folder of the same split", path.name)
    unused.warn()


def _inside(folder: Path, root: Path) -> list[str]:
    """Names of the files below a folder, as many as are worth counting."""
    found: list[str] = []
    for where, _, files in os.walk(folder):
        found += [str(Path(where, name).relative_to(root)) for name in sorted(files) if not name.startswith(".")]
        if len(found) > _MOST_COUNTED:
            break
    return found


def _is_image(path: Path | PurePosixPath) -> bool:
    return path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".")


def _read_directory(folder: Path, unused: Unused) -> dict[str, list[EncodedImage]]:
    members: dict[str, list[EncodedImage]] = {}
    for class_folder in _visible(folder):
        if not class_folder.is_dir():
            unused.add(OUTSIDE, class_folder.name)
            continue
        images = members.setdefault(class_folder.name, [])
        for path in _visible(class_folder):
            if _is_image(path):
                images.append(EncodedImage(str(path)))
            elif path.is_dir():
                unused.add(DEEPER, *_inside(path, folder))
            else:
                unused.add(OTHER_SUFFIX, f"{class_folder.name}/{path.name}")
    return members


def _visible(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.iterdir()) if not path.name.startswith("."))


def _read_archive(archive: Path, unused: Unused) -> dict[str, list[EncodedImage]]:
    """Read the images of a gzipped tar into memory: nothing is unpacked to disk, and gzip's checksum covers all of it.

    Raises:
        DataError: The archive is damaged or too large, a member stands twice, or one is not named class/file.
    """
    members: dict[str, dict[str, EncodedImage]] = {}
    limit = unpacked_limit(archive.stat().st_size)
    try:
        with bounded_tar(archive) as (tar, reader):
            for member in tqdm(tar, f"reading {archive.name}", unit="file", delay=1.0):
                path = PurePosixPath(member.name)
                if path.name.startswith("."):
                    continue
                if member.isdir():
                    if len(path.parts) == 1:
                        members.setdefault(path.name, {})
                elif not _is_image(path):
                    unused.add(OTHER_SUFFIX, member.name)
                elif not member.isfile():
                    unused.add(LINKS, member.name)
                elif len(path.parts) != 2 or path.parts[0] in ("/", ".."):
                    raise DataError(f"member {member.name!r} of {archive} is not named class/file; repack it")
                elif path.name in members.setdefault(path.parts[0], {}):
                    raise DataError(f"member {member.name!r} stands twice in {archive}; repack it")
                else:
                    if member.size > limit:  # also of a sparse file, which takes no space
                        raise too_large(archive, member.size, limit)
                    opened = tar.extractfile(member)
                    assert opened is not None  # regular files always open
                    members[path.parts[0]][path.name] = EncodedImage(f"{archive}:{member.name}", opened.read())
            while block := reader.read(1 << 20):
                if block.strip(b"\0"):
                    raise DataError(
                        f"archive {archive} goes on after its end: it was joined from several, or is damaged; repack it"
                    )
    except AssetError as error:
        raise DataError(str(error)) from error
    except DataError:
        raise
    except (*DAMAGES, OSError) as error:
        raise DataError(f"archive {archive} is truncated or corrupt ({error}): copy or download it again") from error
    return {name: [images[file] for file in sorted(images)] for name, images in members.items()}


def _first(names: list[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
