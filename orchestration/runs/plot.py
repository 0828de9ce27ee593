"""A run's curves as one picture: a panel a figure, over optimizer steps."""

from __future__ import annotations

import io
import math

from orchestration.runs.state import RATES, Curves
from pipeline.errors import UserError

_COLUMNS = 3
_NUM_SHOWN = 100
"""Points from which on a curve is drawn without marks."""


def plot(curves: Curves, title: str) -> bytes:
    """PNG: figures of the model first, then rates; positive figures that span more than two decades on a logarithmic
    axis. `UserError` where there is nothing to draw."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = [n for n in curves if n not in RATES and curves[n]] + [n for n in curves if n in RATES and curves[n]]
    if not names:
        raise UserError(f"{title} has reported no figures yet")
    columns = min(_COLUMNS, len(names))
    rows = math.ceil(len(names) / columns)
    figure, axes = pyplot.subplots(
        rows, columns, figsize=(4.2 * columns, 2.6 * rows), layout="constrained", squeeze=False
    )
    for name, panel in zip(names, axes.flat):
        steps, values = zip(*curves[name])
        panel.plot(steps, values, marker="." if len(steps) < _NUM_SHOWN else None, linewidth=1.2)
        if min(values) > 0 and max(values) > 100 * min(values):
            panel.set_yscale("log")
        panel.set_title(name, fontsize="medium")
        panel.grid(alpha=0.3)
    for panel in axes.flat[len(names) :]:
        panel.set_visible(False)
    for column in range(columns):
        lowest = [panel for panel in axes[:, column] if panel.get_visible()][-1]
        lowest.set_xlabel("step")
    figure.suptitle(title)
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=110, format="png")
    pyplot.close(figure)
    return buffer.getvalue()
