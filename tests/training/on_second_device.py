"""Run by test_placement.py: trains a stage and uses the model on the second device. argv: case, data, pixels, bundle,
scratch folder, settings."""

from __future__ import annotations

import sys

import torch
from PIL import Image
from second_device import NAME, WrongDevice, second_device, waits

import training.adversary
import training.optim
import training.stages.denoiser as denoiser_stage
from pipeline.bundle import Bundle, load_bundle, save_bundle
from pipeline.model import LatentZoom
from training.config import override
from training.presets import debug
from training.run import TrainResult, train
from training.session import Session

torch.set_num_threads(1)


def waits_by_step() -> list[list[str]]:
    """From now on, what the host waits for from the end of one optimizer step to the end of the next, reports and the
    way of a batch to the device (which CUDA has from page-locked memory) left out."""
    by_step: list[list[str]] = []
    end_step, report = Session.end_step, Session._report

    def ended(self: Session) -> None:
        end_step(self)
        by_step.append([wait for wait in waits if "in _moved\n" not in wait])
        waits.clear()

    def unwatched(self: Session) -> None:
        before = len(waits)
        report(self)
        del waits[before:]

    Session.end_step, Session._report = ended, unwatched  # type: ignore[method-assign]
    return by_step


def run(stage: str, device: str, settings: list[str]) -> TrainResult:
    words = [f"{stage}.{word}" if not word.startswith("model.") else word for word in settings]
    words += [f"{stage}.{word}" for word in ("steps=4", "log_every=4", "grid_every=4", "micro_batch=2")]
    words += [f"{stage}.{word}" for word in ("checkpoint_every=4", "validate_every=4", "bundle_every=4")]
    return train(
        stage,
        override(debug(), words),
        data=pixels if stage == "autoencoder" else data,
        run_dir=f"{scratch}/{device}",
        bundle=None if stage == "autoencoder" else parts_for(settings),
        device=device,
    )


def parts_for(settings: list[str]) -> str:
    """The bundle; for direct super-resolution its autoencoder alone, as the denoiser is another model's."""
    if "model.task=direct" not in settings:
        return bundle
    whole = load_bundle(bundle)
    save_bundle(f"{scratch}/first", Bundle(whole.config, whole.autoencoder))
    return f"{scratch}/first"


def use() -> None:
    model = LatentZoom(load_bundle(bundle), device=NAME)
    for sampler in ("ddim", "dpm++"):
        model.generate(2, (40, 33), num_steps=3, sampler=sampler, eta=0.5 if sampler == "ddim" else 0.0)  # type: ignore[arg-type]
        seen: list[list[str]] = []

        def on_step(*_: object) -> None:
            seen.append(list(waits))  # noqa: B023
            waits.clear()

        model.sample_latents(num=2, num_steps=4, sampler=sampler, on_step=on_step)  # type: ignore[arg-type]
        assert len(seen) == 4 and not any(seen[1:]), "".join(seen[1] + seen[2])
    model.upscale(Image.new("RGB", (32, 40)), 3.3, tile=16)


def plant() -> None:
    """A mistake that a CPU hides: noise that stays where it is made."""
    original = denoiser_stage.Schedule.add_noise
    denoiser_stage.Schedule.add_noise = lambda self, z0, eps, t: original(self, z0, torch.randn(eps.shape), t)  # type: ignore[method-assign]
    try:
        run("denoiser", NAME, [])
    except WrongDevice as error:
        assert "aten::mul is given tensors on second:0 and on cpu" in str(error), error
    else:
        raise SystemExit("the planted mistake was not noticed")


case, data, pixels, bundle, scratch, *settings = sys.argv[1:]
with second_device():
    if case == "use":
        use()
    elif case == "planted":
        plant()
    else:
        by_step = waits_by_step()
        there = run(case, NAME, settings)
        # The first step may set things up; the last one saves.
        assert len(by_step) == 4 and by_step[1:3] == [[], []], "\n\n".join(by_step[1][:3])
        assert load_bundle(there.bundle).autoencoder is not None
if case not in ("use", "planted"):  # the same numbers: nothing went astray in the device's making either
    training.adversary.is_fused = training.optim.is_fused = lambda device: False  # as on the other device
    here = run(case, "cpu", settings)
    assert abs(there.last_loss - here.last_loss) <= 1e-4 * abs(here.last_loss), (there.last_loss, here.last_loss)
print("all in place")
