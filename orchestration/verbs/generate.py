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
    if num < 1 or arguments.batch_size < 1:
        raise UserError(f"--num {num} --batch-size {arguments.batch_size}: use at least 1")
    if str(out) == "-" or (out.suffix.lower() in PICTURE_SUFFIXES and not arguments.is_single):
        raise UserError(f"--out {out}: give a folder, or a {WRITTEN} file")
    if arguments.is_single and num > 1:
        raise UserError(f"--out {out} is one file and --num {num} needs a folder")
    if arguments.preview < 0:
        raise UserError("--preview: use 0 or more")
    if arguments.steps < 1:
        raise UserError(f"--steps {arguments.steps} is not allowed; use 1 or more")
    if not 0 <= arguments.eta <= 1:
        raise UserError(f"--eta {arguments.eta:g} is not allowed; use 0 to 1")
    if not 1 <= arguments.quality <= 100:
        raise UserError(f"--quality {arguments.quality} is not allowed; use 1 to 100")
    if arguments.latent_size:
        parse_size(arguments.latent_size)
    if arguments.size:
        size = parse_size(arguments.size)
        format_of(str(out) if arguments.is_single else f"{out}/image.{arguments.format}", size)
    (check_file if arguments.is_single else check_folder)(out)
