"""Where the parts of `latentzoom doctor --gpu` work: a device, a folder, a preset small enough for minutes."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import first_line
from training.config import Preset, override
from training.presets import debug
from training.run import TrainResult, train

Figures = dict[str, Any]
STAGES = ("autoencoder", "decoder", "denoiser", "align")


class NotInstalled(Exception):
    """A package that the part needs is not there."""


class NotHere(Exception):
    """The part needs something that an installed package does not have, such as the tests."""


@dataclass(frozen=True)
class Bench:
    """Where a part works: "cuda", of which there is one, or "cpu", a rehearsal (is_tiny)."""

    device: str
    folder: Path

    @property
    def is_tiny(self) -> bool:
        return not self.device.startswith("cuda")

    @property
    def data(self) -> str:
        return str(self.folder / "shop/data")

    @property
    def bundle(self) -> str:
        return str(self.folder / "shop/bundle")

    @property
    def preset(self) -> Preset:
        """Every stage in bfloat16, with a head that the fused kernels take."""
        width = 16 if self.is_tiny else 256
        settings = [f"model.decoder.mlp_width={width}", f"model.decoder.mlp_depth={2 if self.is_tiny else 4}"]
        for stage in STAGES:
            settings += [f"{stage}.precision=bf16", f"{stage}.steps=4", f"{stage}.log_every=2", f"{stage}.grid_every=0"]
            settings += [f"{stage}.global_batch=8", f"{stage}.micro_batch=2", f"{stage}.checkpoint_every=100"]
            settings += [f"{stage}.compile=false"]  # a minute for each network; `compiled` has it
        return override(debug(), settings)

    def train(self, stage: str, preset: Preset, run_dir: str, *, deepspeed: bool = False) -> TrainResult:
        bundle = None if stage == "autoencoder" else self.bundle
        return train(
            stage, preset, data=self.data, run_dir=run_dir, bundle=bundle, device=self.device, use_deepspeed=deepspeed
        )


def needs(package: str) -> None:
    try:
        importlib.import_module(package)
    except ImportError as error:
        raise NotInstalled(f"{package} is not installed ({first_line(error)})") from error
