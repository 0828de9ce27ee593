"""Publishing is whole or not at all, and nothing leaves its folder."""

import fsspec
import pytest

from pipeline import storage
from pipeline.errors import UserError


def test_round_trip_local_and_memory(tmp_path):
    for url in (str(tmp_path / "a" / "b.json"), "memory://bucket/a/b.json"):
        storage.write_json(url, {"x": [1, 2]})
        assert storage.read_json(url) == {"x": [1, 2]}
        assert storage.exists(url)
    assert storage.list_files(str(tmp_path)) == ["a/b.json"]
    assert "a/b.json" in storage.list_files("memory://bucket")


def test_a_failed_upload_leaves_the_old_content(tmp_path, monkeypatch):
    url = "memory://store/file"
    storage.write_bytes(url, b"old")
    fs, _ = storage.filesystem(url)
    opened = []

    class Discarding:
        def __init__(self):
            self.discarded = False
            opened.append(self)

        def write(self, data):
            raise OSError("connection lost")

        def discard(self):
            self.discarded = True

        def close(self):
            raise AssertionError("a broken upload must not be completed")

    monkeypatch.setattr(type(fs), "open", lambda self, path, mode: Discarding())
    with pytest.raises(OSError, match="connection lost"):
        storage.write_bytes(url, b"new")
    assert opened[0].discarded
    monkeypatch.undo()
    assert storage.read_bytes(url) == b"old"


def test_no_temporary_file_stays(tmp_path):
    storage.write_bytes(str(tmp_path / "x"), b"1")
    storage.write_bytes(str(tmp_path / "x"), b"2")
    with pytest.raises(TypeError):
        storage.write_bytes(str(tmp_path / "y"), "no bytes")
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_a_folder_in_place_of_a_file_is_one_line(tmp_path):
    with pytest.raises(UserError, match="is a folder; give a file"):
        storage.read_bytes(str(tmp_path))
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="no such file: .*file/below"):
        storage.read_bytes(str(tmp_path / "file" / "below"))
    with pytest.raises(UserError, match="cannot write to /proc: "):
        storage.write_bytes("/proc/file", b"")


def test_join_refuses_to_leave_the_folder():
    with pytest.raises(UserError, match="would leave"):
        storage.join("s3://bucket/folder", "../other")
    assert storage.join("s3://bucket/folder/", "a", "b") == "s3://bucket/folder/a/b"


def test_an_unwritable_folder_and_an_unknown_scheme_are_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write to"):
        storage.write_bytes(str(tmp_path / "file" / "below"), b"")
    with pytest.raises(UserError, match="cannot use"):
        storage.read_bytes("nosuchscheme://x/y")


def test_damaged_json_is_named(tmp_path):
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(UserError, match=r"a\.json is not valid JSON"):
        storage.read_json(str(tmp_path / "a.json"))


def test_fetch_dir_copies_remote_files(tmp_path):
    fs = fsspec.filesystem("memory")
    fs.pipe_file("/remote/one/x", b"1")
    folder = storage.fetch_dir("memory://remote", tmp_path)
    assert (folder / "one" / "x").read_bytes() == b"1"
