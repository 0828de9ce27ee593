"""Benchmark results: rows, the table that people read, the JSON that is kept, and the comparison of two of them."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from pipeline.errors import UserError

TOLERANCE = 0.10
"""A rate or ratio lower, or peak memory higher, by more than this share is a regression."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One measured thing. `ratio` is its speed as a multiple of the straightforward implementation in the same run."""

    part: str
    name: str
    rate: float | None = None
    unit: str = ""
    seconds: float | None = None
    memory_mb: float | None = None
    """Peak memory beyond what stood before: of the process on a CPU, of the device on CUDA."""
    share_of_peak: float | None = None
    """Share of the device's measured matrix product rate that the method's own operations reach."""
    ratio: float | None = None
    max_difference: float | None = None
    """Largest difference to the float32 reference, in units of [-1, 1]."""
    psnr_change: float | None = None
    """dB lost against a picture that is 30 dB from the reference."""
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Options:
    """How to measure."""

    device: str = "cpu"
    threads: int = 2
    dtype: str = "float32"
    width: float = 0.25
    rounds: int = 3
    quick: bool = False


@dataclass(frozen=True)
class Results:
    machine: dict[str, Any]
    rows: tuple[Row, ...]

    def table(self) -> str:
        """Columns for a terminal; empty cells where a figure does not apply."""
        head = ("part", "what", "rate", "memory", "of peak", "ratio", "max diff", "PSNR")
        lines = [
            (
                row.part,
                row.name,
                f"{_short(row.rate)} {row.unit}" if row.rate is not None else "",
                f"{row.memory_mb:.0f} MB" if row.memory_mb is not None else "",
                f"{100 * row.share_of_peak:.0f} %" if row.share_of_peak is not None else "",
                f"{row.ratio:.2f}x" if row.ratio is not None else "",
                f"{row.max_difference:.1e}" if row.max_difference is not None else "",
                f"{row.psnr_change:+.3f} dB" if row.psnr_change is not None else "",
            )
            for row in self.rows
        ]
        widths = [max(len(line[i]) for line in [head, *lines]) for i in range(len(head))]
        texts = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in [head, *lines]]
        notes = [f"{row.part} {row.name}: {row.note}" for row in self.rows if row.note]
        return "\n".join([*texts, *notes])

    def save(self, file: Path) -> None:
        """Write JSON beside `file` and rename. Raises `UserError` when the folder cannot be written."""
        rows = [{k: v for k, v in dataclasses.asdict(row).items() if v not in (None, "")} for row in self.rows]
        temporary = file.with_name(f".{file.name}.{os.getpid()}.part")
        try:
            temporary.write_text(json.dumps({"machine": self.machine, "rows": rows}, indent=1) + "\n")
            temporary.replace(file)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise UserError(f"cannot write {file}: {error.strerror}") from error


def load_results(file: Path) -> Results:
    """Read what `save` wrote. Raises `UserError` when it is missing or something else."""
    try:
        data = json.loads(file.read_text())
        return Results(dict(data["machine"]), tuple(Row(**row) for row in data["rows"]))
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}") from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{file} is not a file that `latentzoom bench --json` wrote") from error


def compare(old: Results, new: Results, tolerance: float = TOLERANCE) -> tuple[list[str], int]:
    """Lines for each figure that both have, and how many of them got worse by more than `tolerance`. Rates and memory
    count only between equal machines; ratios always."""
    is_same_machine = _identity(old.machine) == _identity(new.machine)
    before = {(row.part, row.name): row for row in old.rows}
    lines: list[str] = []
    if not is_same_machine:
        lines.append("different machines or settings: only ratios are compared")
    num_worse = 0
    for row in new.rows:
        earlier = before.pop((row.part, row.name), None)
        if earlier is None:
            lines.append(f"new        {row.part} {row.name}")
            continue
        for field, sign in (("rate", 1), ("ratio", 1), ("memory_mb", -1)):
            a, b = getattr(earlier, field), getattr(row, field)
            if not a or b is None or (field != "ratio" and not is_same_machine):
                continue
            change = b / a - 1.0
            is_small = field == "memory_mb" and abs(b - a) < 16.0
            verdict = (
                "same" if is_small or abs(change) <= tolerance else "better" if change * sign > 0 else "REGRESSION"
            )
            num_worse += verdict == "REGRESSION"
            lines.append(f"{verdict:10} {row.part} {row.name}: {field} {_short(a)} → {_short(b)} ({change:+.0%})")
    lines += [f"missing    {part} {name}" for part, name in before]
    return lines, num_worse


def machine(options: Options) -> dict[str, Any]:
    """What the figures depend on besides the code. `busy` is the load when the run began, in processes a core."""
    device = torch.device(options.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    return {
        "device": name,
        "cores": os.cpu_count(),
        "threads": options.threads,
        "dtype": options.dtype,
        "width": options.width,
        "quick": options.quick,
        "torch": torch.__version__,
        "busy": round(psutil.getloadavg()[0] / (os.cpu_count() or 1), 2),
    }


def alternate(runs: Mapping[str, Callable[[], object]], rounds: int, device: str) -> dict[str, float]:
    """Median seconds of each run. One of each to warm up, then in turn, so that a change in the machine's speed
    meets them all."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds + 1):
        for name, run in runs.items():
            _wait(device)
            start = time.perf_counter()
            run()
            _wait(device)
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def matrix_peak(options: Options, dtype: torch.dtype) -> float:
    """Multiply-accumulates a second of large matrix products: the best of a few sizes, measured here and now."""
    best = 0.0
    for side in (512, 1024, 2048) if options.device == "cpu" else (4096, 8192):
        a, b = (torch.randn(side, side, device=options.device).to(dtype) for _ in range(2))
        product = torch.empty_like(a)
        for _ in range(8):  # the fastest counts: other programs only ever make it slower
            _wait(options.device)
            start = time.perf_counter()
            torch.mm(a, b, out=product)
            _wait(options.device)
            best = max(best, side**3 / (time.perf_counter() - start))
    return best


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def _identity(facts: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in facts.items() if key not in ("busy", "torch")}


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _short(value: float | None) -> str:
    """Three significant digits, without exponents for everyday numbers."""
    if value is None:
        return ""
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
