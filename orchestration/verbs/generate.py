"""`latentzoom generate`: draw new images from any bundle or registered model, at any height × width. What is asked for
is judged here, before any library is imported that takes its time; `orchestration.pictures.generating` does it."""

from __future__ import annotations

from orchestration.pictures.generate_arguments import Arguments as Arguments
from orchestration.pictures.writable import check_file, check_folder
from pipeline.allocator import keep_freed_memory
from pipeline.command_line import parse
from pipeline.errors import UserError
from pipeline.formats import PICTURE_SUFFIXES, WRITTEN, format_of
from pipeline.progress import Notice
from pipeline.sizes import parse_size


def main(argv: list[str]) -> int:
    arguments = parse(Arguments, argv, prog="latentzoom generate")
    _check(arguments)
    with Notice(f"latentzoom: loading {arguments.model}") as notice:
        from orchestration.pictures.generating import run

        with keep_freed_memory():
            return run(arguments, notice)


def _check(arguments: Arguments) -> None:
    """`UserError` for anything that cannot be."""
    out, num = arguments.out, arguments.num
    if str(out) == "-" or (out.suffix.lower() in PICTURE_SUFFIXES and not arguments.is_single):
        raise UserError(f"--out {out}: give a folder, or a {WRITTEN} file")
    if arguments.is_single and num > 1:
        raise UserError(f"--out {out} is one file and --num {num} needs a folder")
    if arguments.latent_size:
        parse_size(arguments.latent_size)
    if arguments.size:
        size = parse_size(arguments.size)
        format_of(str(out) if arguments.is_single else f"{out}/image.{arguments.format}", size)
    (check_file if arguments.is_single else check_folder)(out)
