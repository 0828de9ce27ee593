"""Places that surely cannot be written to: better said before the work than after it."""

from __future__ import annotations

import os
from pathlib import Path

from pipeline.errors import UserError


def check_file(target: Path) -> None:
    """`UserError` where the file cannot be written."""
    if target.is_dir():
        raise UserError(f"cannot write {target}: it is a folder")
    check_folder(target.absolute().parent, target)


def check_folder(folder: Path, target: Path | None = None) -> None:
    """As `check_file`, for any file (or `target`) in a folder that need not be there yet."""
    there = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
    if not there.is_dir():
        raise UserError(f"cannot write {target or folder}: {there} is not a folder")
    if not os.access(there, os.W_OK):
        raise UserError(f"cannot write {target or folder}: no permission for {there}")
