"""`make starter`: photographs → tiles → two trained looks → bundles inside the package. Run it again: it continues.

    python -m orchestration.starter --work build/starter [--packages FOLDER] [--steps N] [--into pipeline/weights]

Everything is done with the product's own commands, which it prints; each can be typed by hand instead.
"""

from __future__ import annotations

import importlib.util
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

from orchestration.starter import card
from orchestration.starter.photographs import HELD_OUT, TRAIN, lay_out
from pipeline import storage
from pipeline.bundle import load_bundle, save_bundle
from pipeline.command_line import plain_help
from pipeline.errors import UserError, exit_status
from pipeline.starter import LOOKS, Look

PRESETS: dict[Look, str] = {"faithful": "starter", "sharp": "starter-sharp"}


@plain_help
@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Make the starter model anew: hours on two CPU cores. Interrupt it at any time; the same command continues."""

    work: Path = Path("build/starter")
    """Folder for photographs, shards and runs."""
    packages: Path | None = None
    """Debian packages, unpacked side by side, where apt-get is not there to download them."""
    into: Path | None = None
    """Where the two bundles go; default: the package itself (pipeline/weights)."""
    steps: int = 0
    """Steps of the faithful look, and a tenth as many of the sharp one; 0: the presets' own numbers."""
    threads: int = 0
    """CPU threads; 0: all."""


def main(argv: list[str]) -> int:
    arguments = tyro.cli(Arguments, prog="python -m orchestration.starter", args=argv)
    if arguments.steps and arguments.into is None:
        raise UserError("--steps makes a trial of the starter: give --into FOLDER, or it would replace what ships")
    work, target = arguments.work, arguments.into or _package_folder()
    num_train, num_held_out = lay_out(work / "photographs", arguments.packages)
    print(f"{num_train} pictures of {len(TRAIN)} photographs, {num_held_out} of {len(HELD_OUT)} held out", flush=True)
    place = shlex.quote(str(work))
    _run(
        f"preprocess folder {place}/photographs {place}/tiles --size 256 --crop grid --val-folder val "
        "--samples-per-shard 256"
    )
    for look in LOOKS:
        _run(_train(look, arguments))
        _publish(look, work / look, target)
    return 0


def _train(look: Look, arguments: Arguments) -> str:
    preset, work = PRESETS[look], shlex.quote(str(arguments.work))
    command = f"train decoder --preset {preset} --data {work}/tiles --run-dir {work}/{look} --local --no-tracking"
    if look == "sharp":
        command += f" --bundle {work}/faithful/bundle"
    if arguments.steps:
        command += f" --set decoder.steps={arguments.steps if look == 'faithful' else max(1, arguments.steps // 10)}"
    return command + (f" --threads {arguments.threads}" if arguments.threads else "")


def _run(command: str) -> None:
    from orchestration.cli import VERBS

    print(f"latentzoom {command}", flush=True)
    verb, *rest = shlex.split(command)
    status = importlib.import_module(VERBS[verb][0]).main(rest)
    if status:
        raise SystemExit(status)


def _publish(look: Look, run_dir: Path, target: Path) -> None:
    """The run's bundle, with its card, as the package's starter."""
    bundle = load_bundle(str(run_dir / "bundle"))
    result = storage.read_json(str(run_dir / "result.json"))
    bundle.meta["licence"] = card.WEIGHTS_LICENCE
    weights = storage.read_json(str(run_dir / "bundle/config.json"))["files"]["decoder.safetensors"]
    bundle.card = card.starter_card(look, bundle, result, weights)
    folder = target / f"starter-{look}"
    save_bundle(str(folder), bundle)
    print(f"{folder}: {sum(f.stat().st_size for f in folder.iterdir()) / 1e6:.2f} MB", flush=True)


def _package_folder() -> Path:
    spec = importlib.util.find_spec("pipeline")
    if spec is None or spec.origin is None:
        raise UserError("the package `pipeline` is not installed; give --into FOLDER")
    return Path(spec.origin).parent / "weights"


if __name__ == "__main__":
    sys.exit(exit_status(lambda: main(sys.argv[1:])))
