"""What `latentzoom upscale` can be asked for. Light, so that its help comes at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from orchestration.pictures.wanted_size import WantedSize
from pipeline.command_line import Device, Flag, plain_help
from pipeline.errors import MANY, SEEDS, require_range


@plain_help
@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Enlarge pictures: latentzoom upscale photo.jpg big.jpg --scale 3.3. Several pictures, or a folder, give a folder.
    What this very command made before is kept, so a stopped one continues. Transparency, colour profile and EXIF are
    kept (in TIFF five fields of EXIF). Inputs up to 100 megapixels; PNG and TIFF of any size are written in bounded
    memory."""

    pictures: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="INPUT... OUTPUT")] = ()
    """Pictures or folders (paths or URLs, or - for standard input); at last where the result goes: a file (.png, .jpg,
    .webp, .avif or .tif), a folder (out/), a URL, or - for a PNG on standard output."""
    out: Annotated[str, tyro.conf.arg(aliases=["-o"], metavar="OUTPUT")] = ""
    """Where the result goes, instead of at the end: then all others are inputs."""
    overwrite: Flag = False
    """Replace what is there already. Without it, files that this command did not make are left and said."""
    model: Annotated[str, tyro.conf.arg(metavar="MODEL")] = ""
    """A bundle, which is a folder or URL that `latentzoom train`, `import` or `demo` made; or a registered model,
    models:/NAME@champion (`latentzoom register`). Without it: the starter, a small model that comes along."""
    look: Annotated[str, tyro.conf.arg(metavar="faithful|sharp")] = ""
    """Of the starter: faithful is closest to the truth (the default), sharp is crisper for the eye."""
    scale: float | None = None
    """Any positive factor, such as 5.3."""
    width: int | None = None
    """Pixels; the height follows. So do the others that keep the aspect: --height, --longest, --megapixels."""
    height: int | None = None
    """Pixels; the width follows."""
    longest: int | None = None
    """Pixels of the longer side."""
    megapixels: float | None = None
    """Millions of pixels in all."""
    size: Annotated[str, tyro.conf.arg(metavar="HEIGHTxWIDTH")] = ""
    """Exactly these pixels, such as 700x1000; the picture is stretched where its aspect is another."""
    format: Annotated[Literal["", "png", "jpg", "webp", "avif", "tif"], tyro.conf.arg(metavar="FORMAT")] = ""
    """Of the files in an output folder: png, jpg, webp, avif or tif. Without it each picture keeps its own format, and
    what is none of these becomes png."""
    quality: int = 95
    """Of JPEG, WebP and AVIF, 1 to 100. 100 is lossless in WebP."""
    seed: int = 0
    """Of the diffusion (super-resolution models)."""
    sampler: Literal["dpm++", "ddim"] = "dpm++"
    """Of the diffusion."""
    steps: int | None = None
    """Evaluations of the denoiser (super-resolution models); unless given 20, or 1 of a distilled one. 0 renders the
    input directly, which is fast and closest to the truth pixel by pixel; any other number adds plausible detail by
    diffusion, which looks better at large factors. Models without a denoiser, such as the starter, always do the
    former."""
    eta: float = 0.0
    """Noise added by DDIM, 0 to 1."""
    condition_noise: float = 0.0
    """Noise on the condition, 0 to what the model was trained with (super-resolution models with
    model.denoiser.condition_noise): more detail of its own, less trust in what the input shows."""
    tile: int = 0
    """Side of the tiles, in latent cells, that large pictures are worked on in; 0: twice the training size.
    Smaller needs less memory."""
    preview: int = 0
    """Every so many steps, show the picture as it stands in OUTPUT.preview.png; 0: never."""
    compile: Flag = False
    """Compile the denoiser: slow to start, then faster; pays for many pictures on a GPU."""
    device: Device = ""
    """cpu, cuda, cuda:1; without it CUDA where there is one."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Precision of the networks. bfloat16 suits recent GPUs; it changes pixels by a level or two."""
    tracking_uri: Annotated[str, tyro.conf.arg(metavar="URI")] = ""
    """MLflow store for models:/ addresses; without it MLFLOW_TRACKING_URI."""

    def __post_init__(self) -> None:
        require_range(self, 0, MANY, "steps", "tile", "preview")
        require_range(self, 0, 1, "eta", "condition_noise")
        require_range(self, 1, 100, "quality")
        require_range(self, *SEEDS, "seed")

    @property
    def model_address(self) -> str:
        return self.model or f"starter:{self.look or 'faithful'}"

    @property
    def wanted(self) -> WantedSize:
        return WantedSize(
            scale=self.scale,
            size=self.size,
            width=self.width,
            height=self.height,
            longest=self.longest,
            megapixels=self.megapixels,
        )
