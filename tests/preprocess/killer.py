"""Kills a preprocessing run 20 times at random moments and checks what is left. Run by test_faults in its own process.

A program of its own, because it forks: everything is imported once, and no thread runs at the time of a fork.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import torch

from pipeline.autoencoder import Autoencoder
from pipeline.config import AutoencoderConfig
from preprocess.config import PreprocessConfig
from preprocess.run import preprocess

NUM_KILLS = 20


def content(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if not p.name.startswith((".", "latentzoom-"))}


def run_child(config: PreprocessConfig, encoder: Autoencoder, seconds: float | None) -> bool:
    """Run in a forked process, killed after `seconds`; True when it ended by itself."""
    child = os.fork()
    if child == 0:
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            preprocess(config, autoencoder=encoder)
            os._exit(0)
        finally:
            os._exit(1)
    if seconds is not None and signal.sigtimedwait([signal.SIGCHLD], seconds) is None:
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    signal.sigtimedwait([signal.SIGCHLD], 0)  # this child's own notice, so that the next wait is for the next child
    if not os.WIFSIGNALED(status) and os.WEXITSTATUS(status) != 0:
        raise SystemExit("the run failed instead of continuing")
    return not os.WIFSIGNALED(status)


def main(source: str, work: Path) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGCHLD])
    encoder = Autoencoder(
        AutoencoderConfig(
            kind="vq", latent_channels=2, base_width=8, width_mult=(1, 2), num_res_blocks=1, norm_groups=4
        )
    ).eval()
    config = PreprocessConfig(
        source_url=source, dest=str(work / "reference"), size=16, crops_per_image=6, crop_fraction=(0.3, 1.0),
        samples_per_shard=4, batch_size=4, encode_threads=1, decode_threads=2,
    )  # fmt: skip
    start = time.monotonic()
    run_child(config, encoder, None)
    whole = time.monotonic() - start
    reference = content(work / "reference")
    moments = random.Random(1)
    config = config.replace(dest=str(work / "killed"))
    num_kills = num_finished = 0
    while num_kills < NUM_KILLS:
        finished = run_child(config, encoder, moments.uniform(0.0, 0.6 * whole))
        found = content(work / "killed") if (work / "killed").exists() else {}
        wrong = [name for name, data in found.items() if reference.get(name) != data]
        if wrong:
            raise SystemExit(f"after kill {num_kills}: {wrong} differ from an uninterrupted run")
        num_kills += not finished
        if finished:
            assert found == reference
            num_finished += 1
            shutil.rmtree(work / "killed")
    run_child(config, encoder, None)
    if content(work / "killed") != reference:
        raise SystemExit("the last run is not the same as an uninterrupted one")
    if [p for p in (work / "killed").iterdir() if p.name.startswith((".", "latentzoom-"))]:
        raise SystemExit("temporary files are left")
    print(f"killed {num_kills}, finished {num_finished + 1}")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
