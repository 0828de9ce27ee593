"""Files beside their target: whole or not there, whatever ends the process that writes them."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from pipeline.beside import hidden, replacing

WRITER = """
import signal, sys, time
from pathlib import Path
from pipeline.beside import replacing
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts what runs in the background without it
with replacing(Path(sys.argv[1])) as stream:
    stream.write(b"half" * 1000)
    stream.flush()
    print("writing", flush=True)
    time.sleep(60)
"""


def writer(target: Path) -> "subprocess.Popen[str]":
    process = subprocess.Popen([sys.executable, "-c", WRITER, str(target)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "writing\n"
    return process


def test_what_a_killed_run_left_is_taken_over(tmp_path: Path) -> None:
    target = tmp_path / "out.png"
    target.write_bytes(b"before")
    with writer(target) as process:
        process.kill()
    assert target.read_bytes() == b"before" and len(list(tmp_path.iterdir())) == 2
    with replacing(target) as stream:
        stream.write(b"whole")
    assert target.read_bytes() == b"whole" and list(tmp_path.iterdir()) == [target]


def test_two_that_write_the_same_do_not_mix(tmp_path: Path) -> None:
    target = tmp_path / "out.png"
    with writer(target) as process:
        with replacing(target) as stream:
            stream.write(b"whole")
        assert target.read_bytes() == b"whole"
        assert len(list(tmp_path.iterdir())) == 2  # the other one's is not touched
        process.send_signal(signal.SIGINT)
    assert list(tmp_path.iterdir()) == [target] and target.read_bytes() == b"whole"

    def write(text: bytes) -> None:
        for _ in range(50):
            with replacing(target) as stream:
                stream.write(text)

    threads = [threading.Thread(target=write, args=(letter * size,)) for letter, size in ((b"a", 9), (b"b", 5000))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert target.read_bytes() in (b"a" * 9, b"b" * 5000) and list(tmp_path.iterdir()) == [target]


def test_an_error_leaves_what_was_there(tmp_path: Path) -> None:
    target = tmp_path / "new" / "out.png"
    with pytest.raises(ZeroDivisionError), replacing(target) as stream:
        stream.write(b"half")
        _ = 1 // 0
    assert list(target.parent.iterdir()) == []


@pytest.mark.parametrize("name", ["n" * 251 + ".png", "é" * 125 + ".png"])
def test_the_longest_names_can_be_written(tmp_path: Path, name: str) -> None:
    with replacing(tmp_path / name) as stream:
        stream.write(b"whole")
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert len(os.fsencode(hidden(tmp_path / name, "parts").name)) < 256
    assert hidden(tmp_path / "a.png", "parts").name == ".a.png.parts"
