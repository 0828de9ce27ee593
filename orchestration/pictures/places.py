"""Which pictures a command is asked for, and where each result goes: files, folders, pipes, paths and URLs.

Two pictures are never taken for input and output by their place on the command line alone: a shell that expands
`*.png` to two names would make the second the output.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import UserError
from pipeline.formats import FORMATS, PICTURE_SUFFIXES, format_of, looks_like_picture, own_suffix, suffix_of
from pipeline.kinds import said

PIPE = "-"
_NO_MENTION = {".ds_store", "thumbs.db", "desktop.ini"}
_HEAD_BYTES = 32


@dataclass(frozen=True)
class Task:
    """source, target: a path, a URL, or - for a pipe."""

    source: str
    target: str


@dataclass(frozen=True, kw_only=True)
class Places:
    """left_out: what lies in the input folders and is no picture. is_folder: the output is one. is_said: it was named
    by -o, or can only be an output."""

    tasks: list[Task]
    output: str
    left_out: list[str]
    is_folder: bool
    is_said: bool


def places(words: Sequence[str], output: str, form: str = "") -> Places:
    """words: the inputs, and last the output where `output` (-o) does not name it. form: suffix of the files of an
    output folder, without dot; by default each picture's own. Raises `UserError`."""
    inputs, output, is_said = _split(list(words), output)
    left_out: list[str] = []
    named: list[tuple[str, str]] = []  # each picture and its name in an output folder
    is_many = len(inputs) > 1
    for source in inputs:
        if source == PIPE:
            named.append((source, ""))
        elif _is_folder(source):
            is_many = True
            named += _in_folder(source, output, left_out)
        else:
            _check_there(source)
            named.append((source, _name_of(source)))
    if not named:
        raise UserError(f"no pictures in {', '.join(inputs)} ({', '.join(PICTURE_SUFFIXES)})")
    is_folder = is_many or _is_output_folder(output)
    if is_folder:
        _check_output_folder(output, [source for source, _ in named])
        tasks = _into_folder(named, output, form)
    else:
        if output != PIPE:
            format_of(output)
        tasks = [Task(named[0][0], output)]
    _check_apart(tasks, inputs, output)
    return Places(tasks=tasks, output=output, left_out=left_out, is_folder=is_folder, is_said=is_said or is_folder)


def _split(words: list[str], output: str) -> tuple[list[str], str, bool]:
    """(inputs, output, whether the output cannot be meant as an input)."""
    if not words:
        raise UserError("no picture is given: latentzoom upscale INPUT... OUTPUT")
    if output:
        return words, output, True
    if len(words) == 1:
        raise UserError(f"where shall the result of {words[0]} go? give a file or folder after it, or -o OUTPUT")
    *inputs, output = words
    if len(inputs) > 1 and output != PIPE and _is_file(output):
        raise UserError(
            f"{', '.join(words[:3])}{' ...' if len(words) > 3 else ''} are all pictures that are there: "
            "say where the results go, by a folder at the end (out/) or by -o"
        )
    return inputs, output, output == PIPE or not _is_file(output)


def _is_url(place: str) -> bool:
    return "://" in place


def _is_file(place: str) -> bool:
    if not _is_url(place):
        return Path(place).is_file()
    from pipeline import storage

    return not _is_folder(place) and storage.exists(place)


def _name_of(source: str) -> str:
    """In an output folder. Behind `?` a URL says what is no name; in a file's name it is a letter as any other."""
    path = source.split("?")[0].split("#")[0] if _is_url(source) else source
    return path.rstrip("/").rsplit("/", 1)[-1] or "picture"


def _is_folder(place: str) -> bool:
    if place.startswith(("http://", "https://")):
        return False
    if not _is_url(place):
        return Path(place).is_dir()
    from pipeline import storage

    fs, path = storage.filesystem(place)
    with storage.reaching(place):
        return bool(fs.isdir(path))


def _check_there(source: str) -> None:
    if not _is_url(source) and not Path(source).exists():
        raise UserError(f"no such file or folder: {source}")


def _is_output_folder(output: str) -> bool:
    if output == PIPE:
        return False
    return output.endswith("/") or not suffix_of(output) or _is_folder(output)


def _check_output_folder(output: str, sources: list[str]) -> None:
    if output == PIPE:
        raise UserError("several pictures need a folder to write to, not -")
    if PIPE in sources:
        raise UserError("a picture from standard input has no name: give a file to write to")
    if suffix_of(output) in FORMATS and not output.endswith("/") and not _is_folder(output):
        raise UserError(f"{output} is one file, and {len(sources)} pictures need a folder: write it as {output}/")
    if not _is_url(output) and Path(output).exists() and not Path(output).is_dir():
        raise UserError(f"cannot write to {output}: it is not a folder")


def _in_folder(folder: str, output: str, left_out: list[str]) -> list[tuple[str, str]]:
    """The pictures below a folder with their names in it, without what an earlier run wrote to an output folder inside
    it. Files without a suffix are looked into."""
    found = []
    for file, name in _files(folder, output):
        base = name.rsplit("/", 1)[-1]
        if base.startswith("._") or base.lower() in _NO_MENTION or (base.startswith(".") and base.endswith(".part")):
            continue
        suffix = suffix_of(base)
        if suffix in PICTURE_SUFFIXES or (not suffix and looks_like_picture(_head(file))):
            found.append((file, name))
        else:
            left_out.append(name)
    return found


def _files(folder: str, output: str) -> list[tuple[str, str]]:
    if _is_url(folder):
        from pipeline import storage

        inside = output.rstrip("/") + "/"
        files = [(storage.join(folder, name), name) for name in storage.list_files(folder)]
        return [(file, name) for file, name in files if not file.startswith(inside)]
    found, skipped = [], Path(output).absolute()
    for place, folders, names in os.walk(folder):
        folders[:] = sorted(f for f in folders if Path(place, f).absolute() != skipped and not _is_of_work(f))
        found += [Path(place, name) for name in names]
    there = [file for file in sorted(found) if file.is_file() or not file.exists()]  # a link that leads nowhere is said
    return [(str(file), str(file.relative_to(folder))) for file in there]


def _is_of_work(folder: str) -> bool:
    """Whether it holds the pieces of a result that is not finished."""
    return folder.startswith(".") and folder.endswith(".parts")


def _head(file: str) -> bytes:
    """The first bytes of a file; none of a pipe, which would lose them."""
    if not _is_url(file) and not Path(file).is_file():
        return b""
    from pipeline import storage

    try:
        return storage.read_head(file, _HEAD_BYTES)
    except (OSError, UserError):
        return b""


def _into_folder(named: list[tuple[str, str]], output: str, form: str) -> list[Task]:
    """Files that would go to the same place keep their suffix: a.bmp.png beside a.png.png."""
    suffixes = [
        f".{form}" if form else own_suffix(name, b"" if suffix_of(name) else _head(source)) for source, name in named
    ]
    stems = [name[: len(name) - len(suffix_of(name))] for _, name in named]
    while True:
        counts = Counter(zip(stems, suffixes))
        clashing = [i for i, key in enumerate(zip(stems, suffixes)) if counts[key] > 1]
        free = [i for i in clashing if stems[i] != named[i][1]]
        if not free:
            break
        for i in free:
            stems[i] = named[i][1]
    if clashing:
        same = [i for i in clashing if (stems[i], suffixes[i]) == (stems[clashing[0]], suffixes[clashing[0]])]
        one, other = (named[i][0] for i in same[:2])
        if _same(one) == _same(other):
            what = f"{one} is given twice" if one == other else f"{one} and {other} are the same picture"
            raise UserError(f"{what}; name it once")
        raise UserError(
            f"{one} and {other} would both become {stems[same[0]]}{suffixes[same[0]]}; "
            "write them to folders of their own"
        )
    base = output.rstrip("/") or "/"
    return [Task(source, f"{base}/{stem}{suffix}") for (source, _), stem, suffix in zip(named, stems, suffixes)]


def _check_apart(tasks: list[Task], inputs: list[str], output: str) -> None:
    """`UserError` where a result would replace a picture that is read."""
    for source in inputs:
        if source != PIPE and Path(output).exists() and not _is_url(source) and Path(output).samefile(source):
            kind = "folder" if Path(source).is_dir() else "file"
            raise UserError(f"{output} is what is read; write to another {kind}")
    read = {_same(task.source) for task in tasks}
    for task in tasks:
        if task.target != PIPE and _same(task.target) in read:
            raise UserError(f"{task.target} is what is read; write to another folder")


def _same(place: str) -> str:
    return place if _is_url(place) or place == PIPE else str(Path(place).resolve())


def left_out_line(left_out: list[str]) -> str:
    """ "" where nothing was left out."""
    if not left_out:
        return ""
    kinds = Counter(suffix_of(name.rsplit("/", 1)[-1]) or "without suffix" for name in left_out)
    files = "file that is no picture" if len(left_out) == 1 else "files that are no pictures"
    return f"left out {len(left_out)} {files}: {said(kinds)}"
