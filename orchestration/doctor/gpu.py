"""`latentzoom doctor --gpu`: everything that only a GPU can show, on one card, in ten minutes.

Each part of gpu_parts.py runs in a process of its own with a limit of time, so one that fails, crashes or hangs ends no
other. All figures go to one JSON file, and what people read to one page of Markdown. `--device cpu` is a rehearsal at
tiny size: it shows that this program works, not that a GPU does.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from pipeline import storage
from pipeline.device import checked_device

State = Literal["ok", "FAILED", "over time", "no time left", "not installed", "not here"]
BAD: tuple[State, ...] = ("FAILED", "over time", "no time left")
TOTAL_S = 600.0


def _print(line: str) -> None:
    print(line, flush=True)


@dataclass(frozen=True)
class Part:
    """One check. seconds: how long it may take on a GPU."""

    name: str
    seconds: float


PARTS = (
    Part("data", 60),
    Part("kernels", 120),
    Part("train local", 75),
    Part("train ddp", 90),
    Part("train deepspeed", 120),
    Part("resume", 45),
    Part("compiled", 90),
    Part("sampling", 45),
    Part("decode", 90),
    Part("tests", 120),
    Part("mlflow", 45),
    Part("ray", 75),
    Part("goals", 240),
    Part("bench kernel", 60),
    Part("bench decode", 90),
    Part("bench stage2", 90),
    Part("bench sampling", 60),
)
"""In the order in which they run: what the first training run needs comes first, figures last."""
_REHEARSED_BENCH = "bench kernel"


@dataclass
class Outcome:
    """What became of a part. figures: whatever it measured, by name. text: why it failed, or what there is to say."""

    name: str
    state: State
    seconds: float = 0.0
    text: str = ""
    figures: dict[str, Any] = field(default_factory=dict)


def check(
    device: str,
    folder: Path,
    *,
    only: tuple[str, ...] = (),
    total_s: float = TOTAL_S,
    say: Callable[[str], None] = _print,
) -> list[Outcome]:
    """Run every part (or `only` these, and the data they need) and write gpu.json and gpu.md into `folder` after each.
    On a CPU, parts have five times as long. Raises `UserError` for a device that is not there."""
    checked_device(device)
    folder.mkdir(parents=True, exist_ok=True)
    is_rehearsal, started = not device.startswith("cuda"), time.monotonic()
    stretch = 5.0 if is_rehearsal else 1.0
    facts = _facts(device)
    outcomes: list[Outcome] = []
    with tempfile.TemporaryDirectory(prefix="latentzoom-gpu-") as scratch:
        for part in PARTS:
            if only and part.name not in (*only, "data"):
                continue
            if is_rehearsal and part.name.startswith("bench") and part.name != _REHEARSED_BENCH:
                continue
            left = stretch * total_s - (time.monotonic() - started)
            if left < 5:
                outcome = Outcome(part.name, "no time left")
            else:
                outcome = run_part(part.name, device, Path(scratch), min(left, stretch * part.seconds))
            outcomes.append(outcome)
            say(f"{outcome.state:13} {outcome.name:16} {outcome.seconds:5.0f} s  {outcome.text}")
            _write(folder, {**facts, "seconds": round(time.monotonic() - started, 1)}, outcomes)
    return outcomes


def run_part(name: str, device: str, scratch: Path, limit_s: float) -> Outcome:
    """One part in a process of its own, which is killed with all its children when time is over."""
    result, log = scratch / "outcome.json", scratch / "log.txt"
    result.unlink(missing_ok=True)
    kind = torch.device(device).type
    command = [sys.executable, "-m", "orchestration.doctor.gpu_parts", name, kind, str(scratch), str(result)]
    threads = {"OMP_NUM_THREADS": "1"} if kind == "cpu" else {}  # more of them would wait for each other at that size
    started = time.monotonic()
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**os.environ, **threads, **one_card(device, os.environ.get("CUDA_VISIBLE_DEVICES", ""))},
        )
        try:
            code = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            code = None
        finally:  # with what it started and left
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    seconds = round(time.monotonic() - started, 1)
    if code is None:
        return Outcome(name, "over time", seconds, f"stopped after {limit_s:.0f} s; {_last_line(log)}")
    if not result.is_file():
        return Outcome(name, "FAILED", seconds, f"exit status {code}; {_last_line(log)}")
    found = json.loads(result.read_text())
    return Outcome(name, found["state"], seconds, found["text"], found["figures"])


def one_card(device: str, visible: str) -> dict[str, str]:
    """What lets a process see no other GPU than `device`, of those in CUDA_VISIBLE_DEVICES (empty: all)."""
    chosen = torch.device(device)
    if chosen.type != "cuda":
        return {}
    names, index = [name.strip() for name in visible.split(",") if name.strip()], chosen.index or 0
    return {"CUDA_VISIBLE_DEVICES": names[index] if names else str(index)}


def _last_line(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1].strip()[:300] if lines else "it wrote nothing"


def _facts(device: str) -> dict[str, Any]:
    facts: dict[str, Any] = {"device": device, "torch": torch.__version__, "cuda": torch.version.cuda or ""}
    if device.startswith("cuda"):
        properties = torch.cuda.get_device_properties(device)
        facts |= {"card": properties.name, "memory_gib": round(properties.total_memory / 2**30, 1)}
        facts["capability"] = f"{properties.major}.{properties.minor}"
    else:
        facts["card"] = "no GPU: a rehearsal"
    return facts


def _write(folder: Path, facts: dict[str, Any], outcomes: list[Outcome]) -> None:
    storage.write_json(str(folder / "gpu.json"), {"machine": facts, "parts": [asdict(o) for o in outcomes]})
    storage.write_bytes(str(folder / "gpu.md"), page(facts, outcomes).encode())


def page(facts: dict[str, Any], outcomes: list[Outcome]) -> str:
    """What people read: a table of the parts, then the figures of each."""
    failed = [o.name for o in outcomes if o.state in BAD]
    lines = [f"# {facts['card']}", ""]
    lines += [", ".join(f"{name} {value}" for name, value in facts.items() if name != "card" and value), ""]
    lines += [f"Failed: {', '.join(failed)}." if failed else "Nothing failed.", ""]
    lines += ["| part | state | seconds | |", "|---|---|---|---|"]
    lines += [f"| {o.name} | {o.state} | {o.seconds:.0f} | {_cell(o.text)} |" for o in outcomes]
    for outcome in outcomes:
        if outcome.figures:
            lines += ["", f"## {outcome.name}", "", "| | |", "|---|---|"]
            lines += [f"| {_cell(name)} | {_cell(_shown(value))} |" for name, value in outcome.figures.items()]
    return "\n".join(lines) + "\n"


def _shown(value: Any) -> str:
    if isinstance(value, dict):  # beside its goal
        return f"{_shown(value['measured'])} (goal {value['goal']}: {'met' if value['met'] else 'MISSED'})"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
