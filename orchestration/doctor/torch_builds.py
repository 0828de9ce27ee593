"""The CUDA builds of torch that PyTorch publishes for the locked version, and what goes with each.

One table for the image (`infra/Dockerfile`), the Makefile's TORCH and the advice of `latentzoom doctor`.
"""

from __future__ import annotations

from dataclasses import dataclass

TORCH = "2.13.0"
_WHEELS = "https://download.pytorch.org/whl"


@dataclass(frozen=True)
class TorchBuild:
    """cuda: the toolkit it was built with, so the one of nvcc in the image. base: image with that toolkit. driver: the
    oldest Linux driver that runs it (CUDA's release notes: minor-version compatibility within a major version)."""

    cuda: str
    base: str
    driver: tuple[int, ...]

    @property
    def index(self) -> str:
        """What `TORCH_INDEX` is set to."""
        return f"{_WHEELS}/cu{self.cuda.replace('.', '')}"


BUILDS = (
    TorchBuild("13.0", "nvidia/cuda:13.0.2-cudnn-devel-ubuntu24.04", (580, 65, 6)),
    TorchBuild("12.6", "nvidia/cuda:12.6.3-cudnn-devel-ubuntu24.04", (525, 60, 13)),
)
"""The image's own first, then for older drivers."""


def for_driver(version: str) -> TorchBuild | None:
    """The newest build that a driver ("570.86.15") runs; None when it is too old for all, or unreadable."""
    try:
        driver = tuple(int(part) for part in version.strip().split("."))
    except ValueError:
        return None
    return next((build for build in BUILDS if driver >= build.driver), None)
