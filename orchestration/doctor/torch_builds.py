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
    oldest Linux driver that runs it (CUDA's release notes: minor-version compatibility within a major version).
    capabilities: the oldest and the newest generation of GPUs that it has code for, as compute capabilities (PyTorch's
    support matrix of CUDA builds): 7.0 is Volta, 7.5 Turing, 9.0 Hopper, 10.0 and 12.0 Blackwell."""

    cuda: str
    base: str
    driver: tuple[int, ...]
    capabilities: tuple[tuple[int, int], tuple[int, int]]

    @property
    def index(self) -> str:
        """What `TORCH_INDEX` is set to."""
        return f"{_WHEELS}/cu{self.cuda.replace('.', '')}"


BUILDS = (
    TorchBuild("13.0", "nvidia/cuda:13.0.2-cudnn-devel-ubuntu24.04", (580, 65, 6), ((7, 5), (12, 1))),
    TorchBuild("12.6", "nvidia/cuda:12.6.3-cudnn-devel-ubuntu24.04", (525, 60, 13), ((5, 0), (9, 0))),
)
"""The image's own first, then for older drivers."""


def for_driver(version: str, capability: tuple[int, int] | None = None) -> TorchBuild | None:
    """The newest build that a driver ("570.86.15") runs and that has code for GPUs of the capability, where it is
    known; None when the driver is too old for all of these, or unreadable."""
    try:
        driver = tuple(int(part) for part in version.strip().split("."))
    except ValueError:
        return None
    return next((build for build in for_capability(capability) if driver >= build.driver), None)


def for_capability(capability: tuple[int, int] | None) -> list[TorchBuild]:
    """The builds with code for GPUs of the capability, newest first; all where it is not known."""
    return [b for b in BUILDS if capability is None or b.capabilities[0] <= capability <= b.capabilities[1]]
