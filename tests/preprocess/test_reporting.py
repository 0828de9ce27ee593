"""What a run reports: rejects in the ledger, progress, repeated attempts, and what held the encoder back."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest

from pipeline.errors import UserError
from preprocess import run
from preprocess.build import StageSeconds
from preprocess.run import preprocess
from preprocess.sources.folder import FolderSource
from preprocess.tally import Tally


def test_the_ledger_of_a_stopped_run_names_the_rejects_that_stopped_it(config, pictures):
    for name in ("000", "004", "008"):
        (pictures / f"{name}.png").write_bytes(b"junk")
    with pytest.raises(UserError, match="rejects.jsonl names them all") as stopped:
        preprocess(config.replace(policy="skip", samples_per_shard=2, max_rejects=0))
    dest = Path(config.dest)
    receipts = [json.loads(path.read_text()) for path in dest.glob("shard-*.json")]
    in_receipts = sorted(reject["image"] for receipt in receipts for reject in receipt["rejects"])
    in_ledger = [json.loads(line)["id"] for line in (dest / "rejects.jsonl").read_text().splitlines()]
    assert str(stopped.value).startswith(f"{len(in_ledger)} of 11 images rejected") and in_ledger
    assert set(in_ledger) <= set(in_receipts)  # another shard may have been finished meanwhile
    assert not (dest / "manifest.json").exists()


def test_an_observer_is_told_how_it_goes(config, pictures, monkeypatch):
    monkeypatch.setattr(run, "_OBSERVE_S", 0.0)
    (pictures / "004.png").write_bytes(b"junk")
    told = []
    preprocess(config.replace(policy="skip", max_reject_fraction=1.0), observe=told.append)
    assert len(told) > 1 and told[-1]["rejected_images"] == 1 and told[-1]["workers_lost"] == 0
    assert 0 <= told[-1]["encode_busy"] <= 1 and told[-1]["samples_per_s"] > 0


def test_progress_counts_rejected_samples_as_done(config, pictures, capfd):
    (pictures / "004.png").write_bytes(b"junk")
    preprocess(config.replace(policy="skip", max_reject_fraction=1.0, crops_per_image=2))
    last = capfd.readouterr().err.splitlines()[-1]
    assert "22/22 (100%)" in last and "rejected 1" in last


class FlakySource(FolderSource):
    """Every read fails once with an input/output error."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.failed: set[str] = set()

    def read(self, image: str) -> bytes:
        if image not in self.failed:
            self.failed.add(image)
            raise OSError(errno.EIO, "the disk had a bad moment")
        return super().read(image)


def test_the_summary_counts_repeated_attempts(config, pictures, monkeypatch):
    monkeypatch.setattr("pipeline.retry.MAX_WAIT", 0.01)
    assert preprocess(config, source=FlakySource(str(pictures))).retries == 11
    assert preprocess(config).retries == 0


def test_the_summary_names_what_held_the_encoder_back(config):
    assert preprocess(config).limited_by in ("reading and decoding", "writing and publishing")
    assert preprocess(config).limited_by == "nothing to do"
    for seconds, expected in (
        (StageSeconds(total=10, encode=9.5, wait_decode=0.4, wait_publish=0.1), "encoder"),
        (StageSeconds(total=10, encode=4, wait_decode=5, wait_publish=1), "reading and decoding"),
        (StageSeconds(total=10, encode=4, wait_decode=1, wait_publish=5), "writing and publishing"),
    ):
        tally = Tally({})
        tally.by_builder = {"first": seconds, "second": seconds}
        assert tally.limited_by(has_encoder=True) == expected
        assert tally.limited_by(has_encoder=False) != "encoder"
