"""No traceback is ever the answer: random sources, names, damage, settings and storage errors through the command."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import shutil
import tarfile
import tempfile
import zipfile
from pathlib import Path
from unittest import mock

import botocore.exceptions
import lmdb
import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from pipeline import storage
from preprocess.cli import main
from preprocess.shards.verify import verify
from preprocess.sources.folder import FolderSource


def _picture(seed: int, kind: str = "PNG") -> bytes:
    values = np.random.default_rng(seed).integers(0, 255, (12, 11, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, kind)
    return buffer.getvalue()


CONTENTS = st.one_of(
    st.integers(0, 9).map(_picture),
    st.integers(0, 9).map(_picture),
    st.integers(0, 9).map(lambda seed: _picture(seed, "JPEG")),
    st.tuples(st.integers(0, 9), st.integers(0, 200)).map(lambda pair: _picture(pair[0])[: pair[1]]),
    st.binary(max_size=40),
)
PARTS = st.one_of(
    st.text(st.characters(blacklist_characters="/\0"), min_size=1, max_size=12),
    st.sampled_from(
        ["a", "b", "@eaDir", ".git", "__MACOSX", "n" * 120, "图" * 60, "e\u0301", "x\u202fy", "-o", "a\nb"]
    ),
)
SUFFIXES = st.sampled_from([".png", ".png", ".jpg", ".JPG", ".jfif", ".txt", ".HEIC", "", ".mask.png", ".tar", ".zip"])
NAMES = st.tuples(st.lists(PARTS, max_size=2), PARTS, SUFFIXES).map(lambda t: "/".join([*t[0], t[1] + t[2]]))
FILES = st.dictionaries(NAMES, CONTENTS, max_size=6)
SPECIALS = st.lists(st.sampled_from(["loop", "dangling", "up", "fifo", "folder", "noread"]), max_size=2, unique=True)
ERRORS = st.sampled_from(
    [
        OSError(errno.EIO, "bad sector"),
        OSError(errno.EINVAL, "Invalid argument"),
        OSError(errno.EUCLEAN, "Structure needs cleaning"),
        OSError(errno.ELOOP, "loop", "x"),
        PermissionError(errno.EACCES, "Permission denied", "x"),
        FileNotFoundError(errno.ENOENT, "gone", "x"),
        IsADirectoryError(errno.EISDIR, "a folder", "x"),
        ConnectionResetError(errno.ECONNRESET, "reset"),
        TimeoutError("timed out"),
        botocore.exceptions.NoCredentialsError(),
        botocore.exceptions.ClientError({"Error": {"Code": "ExpiredToken", "Message": "expired"}}, "GetObject"),
    ]
)
ODD_LINES = st.sampled_from(["", "./a.png", "\\", "/etc/passwd", "s3://b/c", "../x"])
LINES = st.lists(st.one_of(NAMES, st.text(max_size=8), ODD_LINES), max_size=3)
OPTIONS = st.fixed_dictionaries(
    {},
    optional={
        "--policy": st.sampled_from(["skip", "quarantine", "fail"]),
        "--max-reject-fraction": st.sampled_from(["1", "0.5"]),
        "--crop": st.sampled_from(["grid", "random", "center"]),
        "--crop-pixels": st.sampled_from(["5", "30"]),
        "--val-fraction": st.just("0.5"),
        "--val-folder": PARTS,
        "--limit": st.just("2"),
        "--members": st.sampled_from(["png", "mask.png"]),
        "--max-pixels": st.sampled_from(["10", "1000"]),
        "--shard-bytes": st.just("4000"),
        "--recheck": st.just("size"),
        "--autoencoder": st.sampled_from(["nowhere", "."]),
    },
)


def _write(folder: Path, files: dict[str, bytes]) -> None:
    folder.mkdir()
    for name, content in files.items():
        try:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
        except (OSError, UnicodeEncodeError):  # names that this system does not take, or that clash
            continue


def _add_specials(folder: Path, specials: list[str]) -> None:
    for kind in specials:
        path = folder / f"{kind}.png"
        if path.exists() or path.is_symlink():
            continue
        if kind == "fifo":
            os.mkfifo(path)
        elif kind == "folder":
            path.mkdir()
        elif kind == "noread":
            path.write_bytes(_picture(1))
            path.chmod(0)
        else:
            path.symlink_to({"loop": path.name, "dangling": "nowhere", "up": ".."}[kind])


def _packed(kind: str, folder: Path, files: dict[str, bytes]) -> Path:
    """The files as a source of a kind: a folder, a zip, a tar or a database."""
    place = folder.parent / {"folder": "in", "zip": "in.zip", "webdataset": "in.tar", "lsun": "x_train_lmdb"}[kind]
    if kind == "zip":
        with zipfile.ZipFile(place, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in files.items():
                archive.writestr(name.encode(errors="replace").decode(), content)
    elif kind == "webdataset":
        with tarfile.open(place, "w") as archive:
            for name, content in files.items():
                info = tarfile.TarInfo(name)
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    elif kind == "lsun":
        place.mkdir()
        with lmdb.open(str(place), map_size=1 << 20) as environment, environment.begin(write=True) as transaction:
            for name, content in files.items():
                transaction.put(name.encode(errors="replace")[:400], content)
    return place


def _damage(place: Path, at: float, cut: bool) -> None:
    path = place / "data.mdb" if place.is_dir() else place
    data = bytearray(path.read_bytes())
    position = int(at * len(data))
    if cut or place.is_dir():
        del data[position:]
    else:
        data[position : position + 8] = b"\xaa" * len(data[position : position + 8])
    path.write_bytes(bytes(data))


def _run(argv: list[str], root: Path) -> int:
    """The command's status. Anything raised, or an error of more than one line, is a failure."""
    out, err = io.StringIO(), io.StringIO()
    with mock.patch("sys.stdout", out), mock.patch("sys.stderr", err):
        try:
            status = main(argv)
        except SystemExit as exit:  # the parser's own answer to an argument
            assert "Traceback" not in err.getvalue()
            return int(exit.code or 0)
    assert status in (0, 1, 2), (argv, status)
    errors = [line for line in err.getvalue().splitlines() if "error:" in line]
    assert len(errors) == (status == 2), (argv, err.getvalue())
    assert "Traceback" not in err.getvalue()
    if status == 2:
        assert not re.search(r"\w+Error\(|object at 0x", errors[0]), errors
    return status


@settings(max_examples=30, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    kind=st.sampled_from(["folder", "folder", "zip", "webdataset", "lsun", "ffhq", "div2k"]),
    files=FILES, specials=SPECIALS, options=OPTIONS, lines=st.none() | LINES,
    damage=st.none() | st.tuples(st.floats(0, 1, exclude_max=True), st.booleans()),
    dest=st.sampled_from(["out", "out", "in/out", "in", "file", "loop", "n" * 300]),
    failing=st.none() | st.tuples(st.sampled_from(["read", "write", "list"]), ERRORS, st.integers(0, 3)),
)  # fmt: skip
def test_a_command_ends_with_a_status_and_at_most_one_line(
    kind, files, specials, options, lines, damage, dest, failing
):
    root = Path(tempfile.mkdtemp(prefix="fuzz-"))
    try:
        packed = kind in ("zip", "webdataset", "lsun")
        _write(root / "in", {} if packed else files)
        _add_specials(root / "in", [] if packed else specials)
        place = _packed(kind, root / "in", files) if packed else root / "in"
        if packed and damage:
            _damage(place, *damage)
        (root / "file").write_text("x")
        (root / "loop").symlink_to("loop")
        argv = [*(pair for item in options.items() for pair in item)]
        if lines is not None:
            (root / "list.txt").write_bytes("\n".join(lines).encode(errors="surrogatepass"))
            argv += ["--val-list", str(root / "list.txt")]
        argv += [
            "--size",
            "8",
            "--batch-size",
            "2",
            "--samples-per-shard",
            "3",
            "--retries",
            "2",
            "--encode-threads",
            "1",
        ]
        verb = [{"zip": "folder"}.get(kind, kind), str(place)]
        with mock.patch("pipeline.retry.MAX_WAIT", 0.001), _failing(failing):
            status = _run([*verb, str(root / dest), *argv], root)
            _run(["check", *verb, "--processes", "1"], root)
            again = _run([*verb, str(root / dest), *argv, "--update"], root)
        if status == 0 and not failing:
            assert again == 0 and not verify(str(root / dest)).damage
            manifest = json.loads((root / dest / "manifest.json").read_text())
            if kind == "folder":
                num_files = sum(len(found) for folder, _, found in os.walk(place) if "plan.json" not in found)
                own = sum("plan.json" in found for _, _, found in os.walk(place))
                assert own or manifest["num_images"] + sum(manifest.get("left_out", {}).values()) >= num_files
    finally:
        shutil.rmtree(root, ignore_errors=True)


def _failing(failing: tuple[str, BaseException, int] | None):
    """Reading, writing or listing fails from the n-th time on."""
    if failing is None:
        return mock.patch.object(FolderSource, "_nothing", None, create=True)
    where, error, after = failing
    owner, name = {
        "read": (FolderSource, "read"),
        "write": (storage, "publish_file"),
        "list": (FolderSource, "list_images"),
    }[where]
    original, calls = getattr(owner, name), [0]

    def broken(*arguments, **named):
        calls[0] += 1
        if calls[0] > after:
            raise error
        return original(*arguments, **named)

    return mock.patch.object(owner, name, broken)
