"""`latentzoom average`: the bundle of any averaging length from the snapshots of a training run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import tyro

from pipeline.command_line import Flag, parse, plain_help
from pipeline.common_options import answer
from pipeline.errors import MANY, require_range


@plain_help
@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Make a run's bundle with weights averaged over another length, after the training (post-hoc EMA, Karras et al.,
    CVPR 2024). The run must have kept snapshots: `train --set STAGE.power_ema_every=N`."""

    run_dir: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Run folder of `latentzoom train`."""
    length: Annotated[float, tyro.conf.arg(metavar="SIGMA")]
    """Deviation of the averaged steps in parts of the training: 0.05 is short, 0.2 long; at most 0.28."""
    out: Annotated[str, tyro.conf.arg(metavar="URL")]
    """Folder of the new bundle."""
    step: Annotated[int, tyro.conf.arg(metavar="N")] = 0
    """The average after this step; without it after the newest snapshot."""
    overwrite: Flag = False
    """Replace another bundle in the folder."""

    def __post_init__(self) -> None:
        require_range(self, 0, MANY, "step")


def main(argv: list[str]) -> int:
    arguments = parse(Arguments, argv, prog="latentzoom average")
    require_range(arguments, 0, 0.28, "length", is_open=True)
    from training.post_hoc import make_average

    made = make_average(
        arguments.run_dir, arguments.length, arguments.out, step=arguments.step, overwrite=arguments.overwrite
    )
    answer(
        f"average of length {made.length:g} after step {made.step}, from {made.snapshots} snapshots "
        f"(weighting off by {100 * made.error:.2g} %); bundle in {made.bundle}",
        made,
    )
    return 0
