"""`latentzoom upscale`: enlarge pictures by any factor or to any size. What is asked for is judged here, before any
library is imported that takes its time; `orchestration.pictures.upscaling` does it."""

from __future__ import annotations

from pathlib import Path

from orchestration.pictures.places import PIPE, Places, left_out_line, places
from orchestration.pictures.upscale_arguments import Arguments as Arguments
from orchestration.pictures.writable import check_file, check_folder
from pipeline.allocator import keep_freed_memory
from pipeline.command_line import parse
from pipeline.common_options import note
from pipeline.errors import UserError
from pipeline.progress import Notice
from pipeline.starter import starter_path


def main(argv: list[str]) -> int:
    arguments = parse(Arguments, argv, prog="latentzoom upscale")
    found = _checked(arguments)
    if line := left_out_line(found.left_out):
        note(f"latentzoom: {line}")
    with Notice(f"latentzoom: loading {arguments.model or 'the starter'}") as notice:
        from orchestration.pictures.upscaling import run

        with keep_freed_memory():
            return run(arguments, found, notice)


def _checked(arguments: Arguments) -> Places:
    """The pictures and where they go. `UserError` for anything that cannot be."""
    if not arguments.pictures:
        raise UserError("no picture is given: latentzoom upscale INPUT... OUTPUT --scale 2 (--help says more)")
    _ = arguments.wanted  # exactly one size
    if arguments.look and arguments.model == "starter":
        raise UserError(f"--look {arguments.look} is enough, or --model starter:{arguments.look}; give one of them")
    if arguments.look and arguments.model:
        raise UserError(f"--look {arguments.look} chooses between the starter's two models; leave it or --model out")
    if not arguments.model:
        starter_path(arguments.look or "faithful")
    found = places(arguments.pictures, arguments.out, arguments.format)
    if found.output != PIPE and "://" not in found.output:
        (check_folder if found.is_folder else check_file)(Path(found.output))
    return found
