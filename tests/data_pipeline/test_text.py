"""Which files are text; every bad one named at once, with what was found."""

import os
import pathlib

import pytest

from jaxpar._errors import DataError
from jaxpar.data import stdlib_sources, text_files, tokenise


def test_stdlib_is_real_text_in_one_order():
    files = stdlib_sources()
    assert files == stdlib_sources()
    assert len(set(files)) == len(files) > 300
    assert 5e6 < sum(file.stat().st_size for file in files) < 2e7
    assert not [file for file in files if {"test", "tests", "site-packages", "idlelib", "lib2to3"} & set(file.parts)]
    assert {"argparse.py", "ast.py"} <= {file.name for file in files}


def test_stdlib_without_sources(monkeypatch, tmp_path):
    monkeypatch.setattr("sysconfig.get_path", lambda _: str(tmp_path))
    with pytest.raises(DataError) as error:
        stdlib_sources()
    assert str(error.value) == (
        f"{tmp_path}: no Python sources here, though the standard library should be. "
        "Name your own text files, as text_files(['notes/']) or --data notes/."
    )


def test_files_directories_and_patterns(tmp_path):
    for name in ("b/two.txt", "b/.hidden/no.txt", "b/one.txt", "b/deep/three.txt", "b/four.md", "a.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "b" / "__init__.py").touch()  # empty: holds no text

    def names(*paths):
        return [str(path.relative_to(tmp_path)) for path in text_files(paths)]

    assert names(tmp_path / "b") == ["b/deep/three.txt", "b/four.md", "b/one.txt", "b/two.txt"]
    assert text_files(tmp_path / "a.txt") == text_files(str(tmp_path / "a.txt")) == [tmp_path / "a.txt"]
    assert names(tmp_path / "b" / "two.txt", str(tmp_path / "a.txt")) == ["b/two.txt", "a.txt"]
    assert names(str(tmp_path / "**" / "*.txt"))[:2] == ["a.txt", "b/.hidden/no.txt"]
    assert names(tmp_path / "b" / "one.txt", tmp_path / "b")[0] == "b/one.txt"
    assert len(names(tmp_path / "b" / "one.txt", tmp_path / "b")) == 4  # once each


def test_relative_pattern(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("a")
    monkeypatch.chdir(tmp_path)
    assert [str(path) for path in text_files(["*.txt"])] == ["a.txt"]


def test_all_bad_files_at_once(tmp_path):
    bad = {
        "absent.txt": (None, "does not exist"),
        "empty.txt": (b"", "is empty"),
        "zero.bin": (b"abc\0def", "is binary, not text (a zero byte at offset 3)"),
        "latin1.txt": (
            b"n\xe9 and more",
            "is not UTF-8 (byte 0xe9 at offset 1); convert it, as `iconv -f latin1 -t utf-8` does",
        ),
        "packed.gz": (b"\x1f\x8b\x08abc", "is gzip, not text; unpack or convert it first"),
        "picture": (b"\x89PNG\r\n", "is a PNG image, not text; unpack or convert it first"),
        "nothing/": (None, "a directory without a file that holds text"),
        "*.parquet": (None, "no file matches this pattern"),
    }  # fmt: skip
    (tmp_path / "good.txt").write_text("good")
    (tmp_path / "nothing").mkdir()
    for name, (data, _) in bad.items():
        if data is not None:
            (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError) as error:
        text_files([tmp_path / "good.txt", *(tmp_path / name for name in bad)])
    lines = str(error.value).splitlines()
    assert lines[0].endswith("data files cannot be used:")
    assert lines[1:-1] == [f"{tmp_path / name}: {found}" for name, (_, found) in bad.items()]
    assert lines[-1] == "Mend or leave out these; a pattern takes only the files it matches: 'notes/**/*.txt'."


def test_unreadable(tmp_path):
    """A file of mode 0; for root, who reads those, one that the system gives to nobody."""
    path = tmp_path / "a.txt"
    path.write_text("a")
    path.chmod(0)
    if os.geteuid() == 0:
        path = pathlib.Path("/proc/self/mem")
    with pytest.raises(DataError, match=rf"{path}: cannot be read"):
        text_files([path])


def test_special_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DataError, match="is neither a file nor a directory"):
        text_files([tmp_path / "pipe"])


def test_closed_directory(tmp_path, monkeypatch):
    """A folder that may not be read is named, not passed over."""

    def walk(top, onerror):
        onerror(PermissionError(13, "Permission denied", f"{top}/closed"))

    (tmp_path / "a.txt").write_text("a")
    monkeypatch.setattr("os.walk", walk)
    with pytest.raises(DataError, match=r"closed: cannot be read \(Permission denied\); mind its permissions"):
        text_files(tmp_path)


def test_a_text_where_a_path_should_be():
    with pytest.raises(DataError, match="File name too long"):
        text_files("to be or not to be " * 100)


def test_nothing_named():
    with pytest.raises(DataError, match="the list of paths is empty"):
        text_files([])


@pytest.mark.parametrize("shift", range(4))
def test_a_character_across_the_first_read(tmp_path, shift):
    """The first 64 KiB may end inside of a character."""
    (tmp_path / "a.txt").write_text("a" * ((1 << 16) - shift) + "😀" * 3)
    assert text_files([tmp_path / "a.txt"]) == [tmp_path / "a.txt"]


@pytest.mark.parametrize("tail", [b"\xf0\x9f", b"\xff"])
def test_bad_end(tmp_path, tail):
    (tmp_path / "a.txt").write_bytes(b"abc" + tail)
    with pytest.raises(DataError, match="at offset 3"):
        text_files([tmp_path / "a.txt"])


def test_tokenise_reads_on_to_the_end(tmp_path):
    """What the first look cannot see."""
    for name in ("a", "b"):
        (tmp_path / name).write_bytes(b"x" * 100_000 + b"\xff")
    files = text_files([tmp_path / "a", tmp_path / "b"])
    with pytest.raises(DataError) as error:
        tokenise(files, tmp_path / "cache")
    assert str(error.value).count("byte 0xff at offset 100000") == 2
    assert not (tmp_path / "cache").exists()
