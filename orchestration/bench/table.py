"""Benchmark results: rows, the table that people read, the JSON that is kept, and the comparison of two of them.

How rows are measured is in measure.py, what is measured in decode.py and the others here.
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from orchestration.text_table import text_table
from pipeline.beside import replacing
from pipeline.errors import UserError

TOLERANCE = 0.10
"""A rate or ratio lower, or peak memory higher, by more than this share is a regression."""
PSNR_TOLERANCE = 0.05
"""So is a PSNR lower by more than this, in dB."""


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
    """Share of the device's measured matrix product rate that the matrix products, convolutions and attention reach.
    In decoding the method's own count, not what the straightforward way repeats."""
    ratio: float | None = None
    max_difference: float | None = None
    """Largest difference to the float32 reference, in units of [-1, 1]; of latents, in their standard deviations."""
    psnr_change: float | None = None
    """What the difference changes a PSNR of 30 dB by, in dB."""
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
        notes = [f"{row.part} {row.name}: {row.note}" for row in self.rows if row.note]
        if peak := self.machine.get("matrix_gmacs"):
            notes.insert(0, f"of peak: of {_short(peak)} GMAC/s, the rate of large matrix products, measured first")
        return "\n".join([text_table([head, *lines]), *notes])

    def save(self, file: Path) -> None:
        """Write JSON beside `file` and rename. Raises `UserError` when the folder cannot be written."""
        rows = [{k: v for k, v in dataclasses.asdict(row).items() if v not in (None, "")} for row in self.rows]
        try:
            with replacing(file) as stream:
                stream.write((json.dumps({"machine": self.machine, "rows": rows}, indent=1) + "\n").encode())
        except OSError as error:
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
        if earlier.rate is not None and row.rate is None:
            num_worse += 1
            lines.append(f"REGRESSION {row.part} {row.name}: {row.note or 'no rate any more'}")
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
        if row.psnr_change is not None and row.psnr_change < (earlier.psnr_change or 0.0) - PSNR_TOLERANCE:
            num_worse += 1
            lines.append(f"REGRESSION {row.part} {row.name}: PSNR {row.psnr_change:+.3f} dB")
    lines += [f"missing    {part} {name}" for part, name in before]
    return lines, num_worse


def machine(options: Options) -> dict[str, Any]:
    """What the figures depend on besides the code. `busy` is the load when the run began, in processes a core. Raises
    `UserError` for a device that is not there."""
    try:
        device = torch.device(options.device)
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    except (RuntimeError, AssertionError) as error:  # what PyTorch raises depends on its build
        reason = str(error).splitlines()[0]
        raise UserError(f"device {options.device!r} is not there ({reason}); use cpu, cuda, or cuda:1") from error
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"device {options.device!r} is not measured; use cpu, cuda, or cuda:1")
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


def _identity(facts: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in facts.items() if key not in ("busy", "torch", "matrix_gmacs")}


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
