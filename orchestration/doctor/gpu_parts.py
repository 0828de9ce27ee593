"""The parts of `latentzoom doctor --gpu`. Run by gpu.py: python -m orchestration.doctor.gpu_parts PART DEVICE FOLDER
RESULT. FOLDER is shared by the parts: `data` fills it with shards and a bundle of untrained networks.

A part is a function of `Bench` that returns what it measured and raises what is wrong.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from orchestration.bench.inputs import make_shards
from orchestration.doctor.gpu_bench import STAGES as STAGES
from orchestration.doctor.gpu_bench import Bench as Bench
from orchestration.doctor.gpu_bench import Figures as Figures
from orchestration.doctor.gpu_bench import NotHere as NotHere
from orchestration.doctor.gpu_bench import NotInstalled as NotInstalled
from orchestration.doctor.gpu_bench import needs
from orchestration.doctor.gpu_kernels import kernels as kernels
from pipeline.errors import first_line
from pipeline.model import LatentZoom
from training.config import override

_ROOT = Path(__file__).resolve().parents[2]


def data(bench: Bench) -> Figures:
    """Pictures, encoded to shards, and a bundle of untrained networks."""
    (bench.folder / "shop").mkdir()
    make_shards(bench.folder / "shop", bench.preset.model)
    return {}


def train_stages(bench: Bench, engine: str, name: str) -> Figures:
    """Every stage, a few steps, in this process. name: of the run folders."""
    figures: Figures = {}
    for stage in STAGES:
        run_dir = str(bench.folder / f"{name}-{stage}")
        result = bench.train(stage, bench.preset, run_dir, deepspeed=engine == "deepspeed")
        assert result.steps == 4 and result.last_loss == result.last_loss, f"{stage}: loss {result.last_loss}"
        figures[f"{stage}: first, last loss"] = f"{result.first_loss:.4g}, {result.last_loss:.4g}"
        for figure in ("images_per_s", "peak_memory_mb"):
            figures[f"{stage}: {figure}"] = result.metrics.get(figure, float("nan"))
    return figures


def train_two(bench: Bench, engine: str) -> Figures:
    """As `train_stages` in two processes on one device: by NCCL where it lets them share a card, else by gloo."""
    if engine == "deepspeed":
        needs("deepspeed")
    said = []
    for backend in ["gloo"] if bench.is_tiny else ["nccl", "gloo"]:
        result = bench.folder / f"{engine}-{backend}.json"
        texts, codes = _two(bench, engine, backend, result)
        if result.is_file() and not any(codes):
            return {"backend": backend, **json.loads(result.read_text())}
        lines = [line for text in texts for line in text.splitlines() if "rror" in line]
        said.append(f"{backend}: {lines[0].strip()[:200] if lines else texts[0][-200:]}")
    raise AssertionError("; ".join(said))


def _two(bench: Bench, engine: str, backend: str, result: Path) -> tuple[list[str], list[int]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "NCCL_DEBUG": "WARN"}
    command = [sys.executable, "-m", "orchestration.doctor.gpu_parts", f"{backend} {engine}"]
    command += [bench.device, str(bench.folder), str(result)]
    workers = [
        subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**common, "RANK": str(rank), "LOCAL_RANK": "0"},  # of the device, which is one for both
        )
        for rank in range(2)
    ]
    texts = [worker.communicate()[0] for worker in workers]
    return texts, [worker.returncode for worker in workers]


def as_one_of_two(bench: Bench, engine: str, backend: str, result: Path) -> None:
    """What each of the two processes does; the first one writes the figures."""
    import torch.distributed as dist

    dist.init_process_group(backend)
    figures = train_stages(bench, engine, f"{engine}-{backend}")
    if dist.get_rank() == 0:
        result.write_text(json.dumps(figures))
    dist.destroy_process_group()


def resume(bench: Bench) -> Figures:
    """A run that stops after 2 of 4 steps and goes on from its checkpoint, beside one that does not stop."""
    preset, runs = bench.preset, [str(bench.folder / f"resume-{name}") for name in ("whole", "halves")]
    whole = bench.train("denoiser", preset, runs[0])
    half = dataclasses.replace(preset, denoiser=dataclasses.replace(preset.denoiser, steps=2))
    bench.train("denoiser", half, runs[1])
    again = bench.train("denoiser", preset, runs[1])
    assert again.resumed_from == 2, f"it went on from step {again.resumed_from}, not 2"
    assert again.sample_order == whole.sample_order, "the samples come in another order"
    difference = abs(again.last_loss - whole.last_loss) / abs(whole.last_loss)
    # Convolutions of a GPU may add in another order each time.
    assert difference < (1e-6 if bench.is_tiny else 1e-2), f"the loss differs by {difference:.1e} of itself"
    return {"difference of the last loss": difference}


def compiled(bench: Bench) -> Figures:
    """The denoiser as CUDA trains it unless told otherwise: compiled, beside the same steps without."""
    setting = "true" if bench.is_tiny else "null"
    runs = [
        bench.train("denoiser", override(bench.preset, [f"denoiser.compile={value}"]), str(bench.folder / f"c-{value}"))
        for value in ("false", setting)
    ]
    difference = abs(runs[1].last_loss - runs[0].last_loss) / abs(runs[0].last_loss)
    assert difference < 2e-2, f"the loss differs by {difference:.1e} of itself"
    return {"difference of the last loss": difference, "seconds with compiling": runs[1].seconds}


def sampling(bench: Bench) -> Figures:
    """Both samplers, in the device's half precision and in float32 beside the CPU's latents."""
    figures: Figures = {}
    here = LatentZoom.load(bench.bundle, device=bench.device)
    cpu = LatentZoom.load(bench.bundle, device="cpu")
    for sampler in ("ddim", "dpm++"):
        latents = [model.sample_latents(num=2, seed=3, num_steps=5, sampler=sampler).cpu() for model in (cpu, here)]
        error = float((latents[1] - latents[0]).norm() / latents[0].norm())
        figures[f"{sampler}: difference to the CPU's"] = error
        assert error < 1e-2, f"{sampler}: latents differ from the CPU's by {error:.1e} of their norm"
    half = LatentZoom.load(bench.bundle, device=bench.device, dtype=torch.bfloat16)
    pictures = half.generate(2, (96, 70), num_steps=5)
    assert [picture.size for picture in pictures] == [(70, 96)] * 2
    return figures


def decode(bench: Bench) -> Figures:
    """32768² tile by tile, as `generate` draws it; the networks of the paper. A rehearsal draws 256²."""
    from orchestration.bench.decode import LARGEST, tile_by_tile
    from orchestration.bench.table import Options

    options = Options(device=bench.device, dtype="float32" if bench.is_tiny else "bfloat16")
    row = tile_by_tile(options, float("inf"), side=256 if bench.is_tiny else LARGEST)
    return {
        row.name: f"{row.rate:.4g} {row.unit}",
        "seconds": row.seconds,
        "memory beyond the weights, MB": row.memory_mb,
    }


def tests(bench: Bench) -> Figures:
    """The tests that need a GPU; a rehearsal counts them."""
    needs("pytest")
    if not (_ROOT / "tests").is_dir():
        raise NotHere("the tests come with the source")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-m",
        "gpu",
        "-p",
        "no:cacheprovider",
        "tests/pipeline",
        "tests/training",
    ]
    command += ["--collect-only"] if bench.is_tiny else ["-x", "--maxfail=20"]
    run = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True)
    lines = run.stdout.strip().splitlines()
    assert run.returncode == 0, " / ".join(
        [line for line in lines if line.startswith(("FAILED", "ERROR"))] or lines[-1:]
    )
    return {"result": re.sub(r"=+", "", lines[-1]).strip()}


def mlflow(bench: Bench) -> Figures:
    """A stage with its figures in a tracking store."""
    needs("mlflow")
    from orchestration.cli import main

    words = ["train", "denoiser", "--preset", "debug", "--data", bench.data, "--bundle", bench.bundle, "--local"]
    words += ["--run-dir", str(bench.folder / "mlflow"), "--device", torch.device(bench.device).type]
    words += [f"--tracking-uri=sqlite:///{bench.folder}/mlflow.db"]
    for name in ("mlp_width", "mlp_depth"):
        words += ["--set", f"model.decoder.{name}={getattr(bench.preset.model.decoder, name)}"]
    status = main([*words, "--set", "denoiser.steps=2"])
    assert status == 0, f"exit status {status}"
    return {}


def ray(bench: Bench) -> Figures:
    """A stage on one Ray Train worker, with distributed data parallel. A rehearsal takes one step."""
    needs("ray")
    from orchestration.cluster.ray_train import launch

    preset = override(bench.preset, ["denoiser.steps=1", "denoiser.micro_batch=8"]) if bench.is_tiny else bench.preset
    result = launch(
        "denoiser", preset, data=bench.data, run_dir=str(bench.folder / "ray"), bundle=bench.bundle,
        gpus_per_worker=0.0 if bench.is_tiny else 1.0, cpus_per_worker=1.0, engine="ddp", max_failures=0,
    )  # fmt: skip
    return {"last loss": result.last_loss}


def bench_part(bench: Bench, part: str) -> Figures:
    """A part of `latentzoom bench`."""
    from orchestration.bench.parts import run
    from orchestration.bench.table import Options

    dtype = "float32" if bench.is_tiny else "bfloat16"
    width = 1.0 if part == "stage2" else 0.25
    found = run(Options(device=bench.device, dtype=dtype, rounds=2, quick=True, width=width), (part,))
    figures: Figures = {"matrix products, GMAC/s": found.machine["matrix_gmacs"]}
    for row in found.rows:
        rate = "" if row.rate is None else f"{row.rate:.4g} {row.unit}"
        share = "" if row.share_of_peak is None else f", {100 * row.share_of_peak:.0f} % of peak"
        ratio = "" if row.ratio is None else f", {row.ratio:.2f} ×"
        figures[row.name] = f"{rate}{share}{ratio}" or row.note
    return figures


def goals(bench: Bench) -> Figures:
    """How fast the first GPU must be, and how fast it is."""
    from orchestration.doctor.goals import measure

    folder = bench.folder / "goals"
    folder.mkdir()
    return measure(bench.device, folder)


def _missed(figures: Figures) -> str:
    """The goals that are not met, for the table of parts."""
    names = [name for name, value in figures.items() if isinstance(value, dict) and not value["met"]]
    return f"missed: {'; '.join(names)}" if names else ""


def run_part(name: str, bench: Bench) -> dict[str, Any]:
    """A part by name → its state, figures and text."""
    alone: dict[str, Callable[[Bench], Figures]] = {
        "data": data, "kernels": kernels, "resume": resume, "compiled": compiled, "sampling": sampling,
        "decode": decode, "tests": tests, "mlflow": mlflow, "ray": ray, "goals": goals,
    }  # fmt: skip
    family, _, which = name.partition(" ")
    try:
        if name in alone:
            figures = alone[name](bench)
        elif family == "bench":
            figures = bench_part(bench, which)
        elif which == "local":
            figures = train_stages(bench, which, which)
        else:
            figures = train_two(bench, which)
    except (NotInstalled, NotHere) as error:
        return {
            "state": "not here" if isinstance(error, NotHere) else "not installed",
            "text": str(error),
            "figures": {},
        }
    except Exception as error:  # whatever goes wrong is what this program is for
        text = f"{type(error).__name__}: {first_line(error)}"[:400]
        return {"state": "FAILED", "text": text, "figures": {}}
    return {"state": "ok", "text": "" if bench.is_tiny else _missed(figures), "figures": figures}


def main(argv: list[str]) -> int:
    name, device, folder, result = argv
    bench = Bench(device, Path(folder))
    torch.manual_seed(0)
    if name.split()[0] in ("nccl", "gloo"):
        as_one_of_two(bench, name.split()[1], name.split()[0], Path(result))
        return 0
    found = run_part(name, bench)
    Path(result).write_text(json.dumps(found))
    return 0


if __name__ == "__main__":
    status = main(sys.argv[1:])
    sys.stdout.flush()
    os._exit(status)  # some packages take minutes to leave a process, or never do
