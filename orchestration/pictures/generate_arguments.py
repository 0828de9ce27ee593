"""What `latentzoom generate` can be asked for. Light, so that its help comes at once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from pipeline.command_line import Device, Flag, plain_help
from pipeline.errors import MANY, SEEDS, require_range
from pipeline.formats import FORMATS


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

    def __post_init__(self) -> None:
        require_range(self, 1, MANY, "num", "batch_size", "steps")
        require_range(self, 0, MANY, "preview")
        require_range(self, 0, 1, "eta")
        require_range(self, 1, 100, "quality")
        require_range(self, *SEEDS, "seed")

    @property
    def is_single(self) -> bool:
        """Whether `out` is one file."""
        return self.out.suffix.lower() in FORMATS
