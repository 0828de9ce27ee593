"""`latentzoom bench`: how fast every part is on this machine, beside the straightforward way to do the same."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from orchestration.bench.parts import COSTLY
from orchestration.bench.parts import PARTS as PARTS
from orchestration.bench.parts import run as run
from orchestration.pictures.writable import check_file
from pipeline.command_line import Device, Flag, parse, plain_help
from pipeline.common_options import answer, did_you_mean, plain
from pipeline.errors import UserError, require_range

if TYPE_CHECKING:
    from orchestration.bench.table import Results


@plain_help
@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Measure every part, print one table. Ratios are to the straightforward implementation, measured in turn with ours
    in the same run. With --compare, exit status 1 says that something got more than 10 % worse."""

    only: tuple[str, ...] = ()
    """Parts to measure: preprocess, stage1, stage2, checkpoint, loader, sampling, decode, kernel, sr, starter, and two
    that are costly and run only when named, workers and memory; without it all but these two."""
    out: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Also write the figures here, as JSON."""
    overwrite: Flag = False
    """Replace a file of that name."""
    compare: tuple[Path, ...] = ()
    """One earlier file of --out to compare this run with, or two to compare without measuring."""
    device: Device = ""
    """cpu, cuda, cuda:1; without it CUDA where there is one."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Without it float32 on a CPU, bfloat16 on CUDA."""
    threads: int = 2
    """CPU threads."""
    width: float = 0.25
    """Widths of the networks trained and sampled, relative to the paper's (decoding always has the paper's)."""
    rounds: int = 3
    """Timed repetitions; the median counts."""
    quick: Flag = False
    """Fewer sizes."""

    def __post_init__(self) -> None:
        require_range(self, 1, 4096, "threads")
        require_range(self, 1, 1_000_000, "rounds")
        require_range(self, 0, 4, "width", is_open=True)


def main(argv: list[str]) -> int:
    arguments = parse(Arguments, argv, prog="latentzoom bench")
    if unknown := sorted(set(arguments.only) - set(PARTS)):
        raise UserError(f"no part {', '.join(unknown)}{did_you_mean(unknown[0], PARTS)}; use {', '.join(PARTS)}")
    if len(arguments.compare) > 2:
        raise UserError("--compare takes one or two files")
    import torch

    from orchestration.bench.table import Options, load_results

    earlier = [load_results(file) for file in arguments.compare]
    if len(earlier) == 2:
        return _report(earlier[0], earlier[1], is_new=False)
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    options = Options(
        device=device,
        threads=arguments.threads,
        dtype=arguments.dtype or ("bfloat16" if device.startswith("cuda") else "float32"),
        width=arguments.width,
        rounds=arguments.rounds,
        quick=arguments.quick,
    )
    if arguments.out is not None:
        check_file(arguments.out)
        if arguments.out.exists() and not arguments.overwrite:
            raise UserError(f"{arguments.out} is there already; give another name, or replace it with --overwrite")
    results = run(options, tuple(dict.fromkeys(arguments.only)) or tuple(part for part in PARTS if part not in COSTLY))
    if arguments.out is not None:
        results.save(arguments.out)
    return _report(earlier[0] if earlier else None, results)


def _report(old: Results | None, new: Results, *, is_new: bool = True) -> int:
    """The figures, where they are new, and the comparison with older ones."""
    from orchestration.bench.table import compare

    lines, num_worse = compare(old, new) if old else ([], 0)
    verdict = f"{num_worse} regressions over 10 %" if num_worse else "no regression over 10 %"
    texts = [*([new.table()] if is_new else []), *lines, *([verdict] if old else [])]
    answer("\n".join(texts), {**plain(new), **({"comparison": lines, "regressions": num_worse} if old else {})})
    return 1 if num_worse else 0
