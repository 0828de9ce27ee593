"""Where the time of some optimizer steps goes: a torch trace in the run folder, and the costliest operations as text.

The main worker is watched: all do the same work. Watching costs time, so rates of these steps are lower than others'.
"""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path
from typing import Any

from torch.profiler import ProfilerActivity, profile, schedule

from pipeline import storage
from training.world import World

_WARM_UP = 3
"""Steps before the first that is watched: they compile, choose kernels and fill caches."""
_NUM_SHOWN = 10
_log = logging.getLogger("latentzoom")


class StepProfiler:
    """Watches optimizer steps `first` to `first + num_steps - 1`, first being 3 steps after the run's next one."""

    def __init__(self, num_steps: int, next_step: int, run_dir: str, world: World) -> None:
        self.num_steps, self.run_dir, self.is_cuda = num_steps, run_dir, world.device.type == "cuda"
        self.first, self._done = next_step + _WARM_UP, 0
        self._profile = profile(
            activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self.is_cuda else [])],
            schedule=schedule(wait=_WARM_UP - 1, warmup=1, active=num_steps, repeat=1),
            on_trace_ready=self._report,
        )
        self._profile.start()
        self._is_over = False

    def end_step(self) -> None:
        """One optimizer step is done."""
        self._done += 1
        if not self._is_over:
            self._profile.step()

    def close(self) -> None:
        """The run ends; what was watched by then is told."""
        if not self._is_over:
            self._profile.stop()
        if not self._is_over:
            _log.warning("no step was profiled: the run ended before its step %d", self.first)

    def _report(self, watched: Any) -> None:
        num = min(self._done - _WARM_UP, self.num_steps)
        if num < 1:
            return
        self._is_over = True
        name = f"profile/trace-{self.first:08d}-{self.first + num - 1:08d}.json.gz"
        with tempfile.TemporaryDirectory(prefix="latentzoom-") as folder:
            path = Path(folder, "trace.json.gz")
            watched.export_chrome_trace(str(path))
            storage.publish_file(path, storage.join(self.run_dir, name))
        title = f"steps {self.first} to {self.first + num - 1}; trace (for ui.perfetto.dev): "
        _log.info("%s", "\n".join([title + storage.join(self.run_dir, name), *costliest(watched, num, self.is_cuda)]))


def costliest(watched: Any, num_steps: int, is_cuda: bool) -> list[str]:
    """A line for each of the ten operations that took most time themselves (on the GPU where there is one), without
    what they called."""
    attribute = "self_device_time_total" if is_cuda else "self_cpu_time_total"
    rows = [(float(getattr(event, attribute)), int(event.count), str(event.key)) for event in watched.key_averages()]
    rows = [row for row in rows if not row[2].startswith("ProfilerStep")]
    total = sum(time for time, _, _ in rows) or 1.0
    lines = ["   share   ms/step  calls/step  operation, by its own time on the " + ("GPU" if is_cuda else "CPU")]
    for time, count, key in sorted(rows, reverse=True)[:_NUM_SHOWN]:
        lines.append(
            f"{100 * time / total:6.1f} %  {time / 1000 / num_steps:8.2f}  {count / num_steps:10.1f}  {key:.80}"
        )
    return lines
