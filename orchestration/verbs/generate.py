"""`latentzoom generate`: draw new images from any bundle or registered model, at any height × width. What is asked for
is judged here, before any library is imported that takes its time; `orchestration.generating` does it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from orchestration.writable import check_file, check_folder
from pipeline.allocator import keep_freed_memory
from pipeline.command_line import Device, Flag, parse, plain_help
from pipeline.errors import UserError
from pipeline.formats import FORMATS, PICTURE_SUFFIXES, WRITTEN, format_of
from pipeline.progress import Notice
from pipeline.sizes import parse_size


@plain_help
@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Draw new images. The same seed gives the same image at every size and for any --num and --batch-size. Run
    again, it goes on: pictures that this very command made before are kept."""

    model: Annotated[str, tyro.conf.arg(metavar="MODEL")]
    """A bundle, which is a folder or URL that `latentzoom train`, `import` or `demo` made; or a registered model,
    models:/NAME@champion (`latentzoom register`)."""
    size: Annotated[str, tyro.conf.arg(metavar="HEIGHTxWIDTH")] = ""
    """Such as 700x1000, or one number for a square; without it the training size."""
    num: int = 1
    """How many images; image i has seed + i."""
    seed: int = 0
    """Of the first image."""
    out: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("generated")
    """Folder, or one file (.png, .jpg, .webp, .avif or .tif) with --num 1. For PNG and TIFF memory does not grow with
    the size."""
    overwrite: Flag = False
    """Replace what is there already. Without it, files that this command did not make are left and said."""
    format: Literal["png", "jpg", "webp", "avif", "tif"] = "png"
    """Files of an output folder."""
    quality: int = 95
    """Of JPEG, WebP and AVIF, 1 to 100. 100 is lossless in WebP."""
    sampler: Literal["dpm++", "ddim"] = "dpm++"
    """Of the diffusion."""
    steps: int = 20
    """Evaluations of the denoiser."""
    eta: float = 0.0
    """Noise added by DDIM, 0 to 1."""
    latent_size: Annotated[str, tyro.conf.arg(metavar="HEIGHTxWIDTH")] = ""
    """Latent cells, such as 64x96, for another shape of scene; without it the training size."""
    batch_size: int = 8
    """Images sampled together."""
    preview: int = 0
    """Every so many steps, show the first picture as it stands in FILE.preview.png; 0: never."""
    compile: Flag = False
    """Compile the denoiser: slow to start, then faster; pays for many pictures on a GPU."""
    device: Device = ""
    """cpu, cuda, cuda:1; without it CUDA where there is one."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Precision of the networks. bfloat16 suits recent GPUs; it changes pixels by a level or two."""
    tracking_uri: Annotated[str, tyro.conf.arg(metavar="URI")] = ""
    """MLflow store for models:/ addresses; without it MLFLOW_TRACKING_URI."""

    @property
    def is_single(self) -> bool:
        """Whether `out` is one file."""
        return self.out.suffix.lower() in FORMATS


def main(argv: list[str]) -> int:
    arguments = parse(Arguments, argv, prog="latentzoom generate")
    _check(arguments)
    with Notice(f"latentzoom: loading {arguments.model}") as notice:
        from orchestration.generating import run

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
