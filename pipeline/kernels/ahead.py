"""Compiles the Triton kernels for GPUs that are not here, and says what they would take there.

    python -m pipeline.kernels.ahead [--every] [--json FILE]

Each kernel is compiled as its launch would: the launching function runs on CPU tensors of the shapes in question, and
where it would hand the kernel to a GPU, what was compiled is kept instead. Registers, stack and instructions are read
from the machine code. It fails where registers spill into memory, where a program does not fit the
GPU, or where its products do not run on matrix units. Needs Triton (Linux), no GPU and no CUDA build of torch.

Without --every, a part of the shapes stands for all: see `shapes`.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import nn
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from pipeline.geometry import axis_range
from pipeline.kernels import liif_triton, liif_triton_gradient
from pipeline.kernels.liif_triton import DTYPES, WIDTHS, Grid, Operands

SHARED = {80: 163 << 10, 90: 227 << 10}
"""Architecture → shared memory that one program may have, in bytes (CUDA C++ Programming Guide, technical
specifications per compute capability)."""
_MATRIX = {80: ("HMMA",), 90: ("HGMMA", "HMMA")}
PARTS = ("forward", "gradient", "gradient and weights")
"""What is compiled: the image; the table's gradient, the head frozen; that with what the weights' gradients need."""


_DEPTH = 4


@dataclass(frozen=True)
class Shape:
    """What a kernel is compiled for."""

    part: str
    width: int
    dtype: torch.dtype


@dataclass(frozen=True)
class Usage:
    """What a compiled kernel takes: registers a thread, bytes of stack and spilling instructions (both 0 where all fits
    the registers), bytes of shared memory, and matrix instructions by name."""

    num_warps: int
    registers: int
    stack: int
    spills: int
    shared: int
    matrix: dict[str, int]

    def problem(self, arch: int) -> str:
        """Why it must not be so; empty where all is well."""
        if self.stack or self.spills:
            return f"spills: {self.spills} instructions, {self.stack} bytes a thread"
        if self.shared > SHARED[arch]:
            return f"needs {self.shared} bytes of shared memory, there are {SHARED[arch]}"
        return "" if self.matrix else "no matrix instructions"


def shapes(every: bool) -> list[Shape]:
    """What `liif_triton.supports` promises: every width and type. Depth and sizes are arguments of a compiled
    kernel, so one serves all.

    Without `every`: each width in bfloat16, and the widest also in float16, whose numbers have the same size and whose
    instructions are the same."""
    if every:
        return [Shape(part, width, dtype) for part in PARTS for width in WIDTHS for dtype in DTYPES]
    found = [Shape(part, width, torch.bfloat16) for part in PARTS for width in WIDTHS]
    return found + [Shape(part, max(WIDTHS), torch.float16) for part in PARTS]


def usage(shape: Shape, arch: int) -> Usage:
    """Compile one kernel for compute capability `arch` / 10."""
    with _kept(arch) as kernels:
        _launch(shape)
    [kernel] = [kernel for kernel in kernels if kernel.name == "_kernel"]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "kernel.cubin")
        file.write_bytes(kernel.asm["cubin"])
        resources = _tool("--dump-resource-usage", file)
        opcodes = Counter(
            re.findall(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9]+)", _tool("-sass", file), re.M)
        )
    taken = {name: int(n) for name, n in re.findall(r"(REG|STACK|LOCAL):(\d+)", resources)}
    return Usage(
        kernel.metadata.num_warps,
        taken["REG"],
        taken["STACK"] + taken["LOCAL"],
        opcodes["STL"] + opcodes["LDL"],
        kernel.metadata.shared,
        {name: opcodes[name] for name in _MATRIX[arch] if opcodes[name]},
    )


def _launch(shape: Shape, size: tuple[int, int] = (5, 7), cells: tuple[int, int] = (3, 5)) -> None:
    """Run the function that launches the kernel in question, for an image of `size` pixels; see `_kept`."""
    rows, cols = size
    head = [nn.Linear(shape.width, shape.width) for _ in range(_DEPTH - 1)]
    table = torch.zeros(1, *cells, shape.width, dtype=shape.dtype)
    axes = [
        axis_range(0, n, n, k, dtype=torch.float32, device=table.device)
        for n, k in ((rows, cells[0]), (cols, cells[1]))
    ]
    position, out = torch.zeros(shape.width, 4), nn.Linear(shape.width, 3)
    operands = Operands.of(axes[0].cell, axes[1].cell, head, out, position, shape.dtype)
    grid = Grid.of(table, *axes)
    if shape.part == "forward":
        liif_triton.forward(table, operands, grid)
        return
    image, gradient = torch.zeros(1, 3, rows, cols, dtype=shape.dtype), torch.zeros(table.shape)
    if shape.part == "gradient":
        liif_triton_gradient._launch(table, operands, grid, image, gradient)
    else:
        liif_triton_gradient._learn(table, operands, grid, image, gradient)


@contextlib.contextmanager
def _kept(arch: int) -> Iterator[list[Any]]:
    """Within, kernels are compiled for `arch` instead of launched, and listed."""
    found: list[Any] = []
    run, before = JITFunction.run, driver._active

    def compile_only(self: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> None:
        self.device_caches.clear()  # of the other architecture
        found.append(run(self, *arguments, grid=grid, warmup=True, **options))

    driver.set_active(_Driver(arch))
    JITFunction.run = compile_only
    try:
        yield found
    finally:
        JITFunction.run = run
        driver._active = before


class _Driver:
    """Of a GPU that is not here: what Triton asks before it compiles."""

    def __init__(self, arch: int) -> None:
        self.target = GPUTarget("cuda", arch, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def _tool(option: str, file: Path) -> str:
    """What Triton's own cuobjdump says of a binary."""
    folder = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    command = [str(folder / "cuobjdump"), option, str(file)]
    path = {"PATH": f"{folder}:/usr/bin:/bin"}  # it calls nvdisasm
    return subprocess.run(command, capture_output=True, text=True, check=True, env=path).stdout


def table(arches: Sequence[int], wanted: Sequence[Shape]) -> tuple[list[str], list[dict[str, Any]]]:
    """Compile all → lines of a table as they come (printed), and the same as records."""
    lines, records = [], []
    for arch in arches:
        for shape in wanted:
            try:
                found = usage(shape, arch)
                problem = found.problem(arch)
            except Exception as error:  # compilers raise all kinds
                found, problem = None, (str(error).strip() or repr(error)).splitlines()[0]
            name = f"sm_{arch}  {shape.part:20}  {shape.width:3}  {str(shape.dtype).removeprefix('torch.'):8}"
            figures = (
                ""
                if found is None
                else (
                    f"{found.num_warps:2} warps  {found.registers:3} registers  {found.spills:4} spills  "
                    f"{found.shared / 1024:5.1f} KiB shared  " + ", ".join(f"{n} {k}" for k, n in found.matrix.items())
                )
            )
            lines.append(f"{name}  {figures}" + (f"  FAILS: {problem}" if problem else ""))
            print(lines[-1], flush=True)
            record = {**dataclasses.asdict(shape), "dtype": str(shape.dtype), "arch": arch, "problem": problem}
            records.append({**record, **({} if found is None else dataclasses.asdict(found))})
    return lines, records


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--every", action="store_true", help="every shape, not only those that stand for the others")
    parser.add_argument("--arch", type=int, nargs="+", choices=sorted(SHARED), default=sorted(SHARED))
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--width", type=int, nargs="+", choices=WIDTHS, default=WIDTHS)
    arguments = parser.parse_args(argv)
    wanted = [shape for shape in shapes(arguments.every) if shape.width in arguments.width]
    _, records = table(arguments.arch, wanted)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(records, indent=1) + "\n")
    failed = sum(bool(record["problem"]) for record in records)
    print(f"{len(records)} kernels, {failed} fail")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
