"""`latentzoom pipeline`: plan, kill, continue, redo, refuse. Tiny images, the `debug` preset, no Ray."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from small_pictures import make_pictures
from tiny_bundle import make_bundle

from orchestration.chain import job
from orchestration.chain.work import parent_run
from orchestration.cli import main
from orchestration.registry import versions as registry
from orchestration.tracking import store as tracking
from orchestration.verbs.pipeline import Arguments, make_job
from pipeline import storage
from pipeline.command_line import parse
from pipeline.errors import UserError

FAST = [
    "--preprocess=val_fraction=0.3",
    "--preprocess=samples_per_shard=16",
    "--preprocess=encode_threads=1",
    "--evaluate=num=6",
    "--evaluate=num_steps=2",
    "--evaluate=sizes=[16,32]",
]


@pytest.fixture
def images(tmp_path):
    return make_pictures(tmp_path / "images", 48)


def command(images: Path, work: Path | str, *more: str) -> list[str]:
    return [
        "pipeline", "--preset", "debug", "--source", "folder", "--source-url", str(images), "--workdir", str(work),
        "--local", "--device", "cpu", *FAST, *more,
    ]  # fmt: skip


def states(text: str) -> dict[str, str]:
    return {line.split()[0]: line.split()[1] for line in text.splitlines()[1:-1]}


def test_the_dry_run_names_every_step_and_writes_nothing(images, tmp_path, capsys):
    assert main(command(images, tmp_path / "work", "--dry-run")) == 0
    text = capsys.readouterr().out
    assert list(states(text)) == [
        "pixels", "autoencoder", "latents", "decoder", "denoiser", "align", "evaluate", "register", "promote",
    ]  # fmt: skip
    assert set(states(text).values()) == {"missing"}
    assert not (tmp_path / "work").exists()
    assert main(command(images, tmp_path / "work", "--dry-run", "--until", "decoder")) == 0
    assert list(states(capsys.readouterr().out))[-1] == "decoder"


def test_the_dry_run_knows_fine_tuning_and_distillation(images, tmp_path, capsys):
    theirs = make_bundle(tmp_path / "theirs")
    plan = command(images, tmp_path / "work", "--dry-run", "--init", theirs, "--stages", "decoder,align")
    assert main(plan) == 0
    text, warning = capsys.readouterr()
    assert list(states(text)) == ["latents", "decoder", "align", "evaluate", "register", "promote"]
    assert "would not begin: the decoder of" in warning  # theirs is another model, and a real run refuses it:
    assert main([word for word in plan if word != "--dry-run"]) == 2
    error = capsys.readouterr().err
    assert "autoencoder.kind = 'vq' in the bundle and 'kl' in the preset" in error and error.count("\n") == 1
    assert not (tmp_path / "work").exists()
    folders = text.split()
    make_bundle(tmp_path / "theirs", seed=1)  # other weights at the same place: nothing of before is taken for it
    assert main(plan) == 0
    assert not {word for word in folders if word.startswith("decoder/")} & set(capsys.readouterr().out.split())
    distil = ["--set=model.task=sr", "--set=model.lr_size=8", "--set=one_step=true", "--evaluate=scales=[2]"]
    small = [word for word in command(images, tmp_path / "work", "--dry-run", *distil) if "sizes" not in word]
    assert main(small) == 0
    assert list(states(capsys.readouterr().out))[5:8] == ["align", "distill", "evaluate"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--until", "cook"], "no step 'cook'"),
        (["--from", "align", "--until", "decoder"], "comes after"),
        (["--preprocess=dest=x"], "set by the pipeline"),
        (["--preprocess=colour=x"], "no setting 'colour'"),
        (["--set=align.speed=9"], "no setting 'align.speed'"),
        (["--autoencoder", "nowhere"], "no bundle"),
        (["--init", "nowhere"], "no bundle"),
        (["--init", "align=bundle"], "does not train the align"),
        (["--stages", "decoder,distill"], "no stage 'distill' to train here; there are autoencoder, decoder"),
        (["--stages", "decoder"], "leaves the autoencoder out"),
        (["--workdir", "memory://work"], "name the tracking server"),
    ],
)
def test_mistakes_get_one_line_before_anything_runs(images, tmp_path, capsys, monkeypatch, more, message):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert main(command(images, tmp_path / "work", *more)) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "work").exists()


@pytest.mark.slow
def test_a_killed_job_continues_and_a_finished_one_is_left_alone(images, tmp_path, capsys, cache):
    work = tmp_path / "work"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    job = subprocess.Popen(
        [sys.executable, "-m", "orchestration.cli", *command(images, work)],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment,
    )  # fmt: skip
    assert job.stdout is not None
    for line in job.stdout:
        if " decoder: " in line:  # announced as it starts
            job.kill()
            break
    job.wait()
    first = {p.name: p.read_bytes() for p in (work / "steps").glob("*.json")}
    assert {"pixels.json", "autoencoder.json", "latents.json"} <= set(first) and "promote.json" not in first

    assert main(command(images, work)) == 0
    text = capsys.readouterr().out
    assert "pixels: done before" in text and "latents: done before" in text and "promoted" in text
    assert all((work / "steps" / name).read_bytes() == content for name, content in first.items())
    uri = f"sqlite:///{work / 'mlflow.db'}"
    champion = registry.get_version("debug", "champion", tracking_uri=uri)
    assert champion is not None and champion.version == "1"
    assert champion.tags["latentzoom.dataset_url"].startswith(str(work))

    assert main(command(images, work)) == 0
    assert capsys.readouterr().out.count("done before") == 9
    assert main(command(images, work, "--dry-run", "--set=align.lr=0.01")) == 0
    text = capsys.readouterr().out
    assert states(text)["denoiser"] == "done" and states(text)["align"] == "stale"
    assert "align.lr was 0.001, now 0.01" in text and "align changed" in text


@pytest.mark.parametrize("is_answering", [True, False])
def test_a_continued_job_reopens_its_run_and_its_first_error_is_the_one_shown(
    images, tmp_path, capsys, monkeypatch, is_answering
):
    work = tmp_path / "joe's work"
    uri = f"sqlite:///{work / 'mlflow.db'}"
    seen = []

    def train(chain, *_):
        run = tracking.get_run(uri, parent_run(chain))
        seen.append((run.info.run_id, run.info.status))
        if not is_answering:
            monkeypatch.setattr(tracking, "end_run", lambda *_: (_ for _ in ()).throw(tracking.StoreError("gone")))
        raise UserError("no space left")

    monkeypatch.setattr(job, "train_step", train)
    for _ in range(2):
        assert main(command(images, work)) == 2
        error = capsys.readouterr().err
        assert "no space left" in error and "gone" not in error
    assert seen[0] == seen[1] and seen[0][1] == "RUNNING"  # the same run, open again
    status = tracking.get_run(uri, seen[0][0]).info.status
    assert status == ("FAILED" if is_answering else "RUNNING")


@pytest.mark.slow
def test_a_job_that_is_terminated_closes_its_run(images, tmp_path, cache):
    """As `latentzoom stop` ends it, in a step that does not listen itself."""
    words = command(images, tmp_path / "work", "--evaluate=num=2000", "--evaluate=chunk_size=1")
    process = subprocess.Popen(
        [sys.executable, "-m", "orchestration.cli", *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    for line in process.stdout:
        if " evaluate: " in line:
            break
    while not list((tmp_path / "work").glob("evaluate/*/chunks/*/*.npz")):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=100)
    assert process.returncode == 130 and "interrupted; run the same command again" in error
    uri = f"sqlite:///{tmp_path / 'work/mlflow.db'}"
    runs = tracking.client(uri).search_runs([tracking.experiment_id(uri)], "attributes.run_name LIKE 'pipeline%'")
    assert [run.info.status for run in runs] == ["KILLED"]


@pytest.mark.parametrize(
    ("more", "address", "workers"),
    [
        ([], "10.0.0.1:6379", 4),
        (["--evaluate-workers", "0"], "10.0.0.1:6379", 0),
        (["--evaluate-workers", "7"], "10.0.0.1:6379", 7),
        (["--local"], "10.0.0.1:6379", 0),
        ([], "", 0),
    ],
)
def test_on_a_cluster_the_workers_evaluate_and_not_the_head(images, tmp_path, monkeypatch, more, address, workers):
    monkeypatch.setenv("RAY_ADDRESS", address)
    words = [word for word in command(images, tmp_path / "work", "--workers", "2:4")[1:] if word != "--local"]
    made = make_job(parse(Arguments, [*words, *more], prog="latentzoom pipeline"))
    assert made.evaluate_workers == workers and made.gpus_per_worker is None  # as the cluster has them
    assert made.preprocess.workers == (0 if "--local" in more or not address else 4)


def on_workers(images: Path, work: Path, *more: str) -> list[str]:
    words = [word for word in command(images, work, *more) if word != "--local"]
    words[words.index("cpu") - 1 : words.index("cpu") + 1] = []
    return words


def test_latents_on_a_gpu_that_is_not_here_are_refused_before_anything_is_trained(
    images, tmp_path, capsys, monkeypatch
):
    """On a head that has none, with --preprocess-workers 0."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    words = on_workers(images, tmp_path / "work", "--gpus-per-worker", "1", "--preprocess-workers", "0")
    assert main(words) == 2
    assert "latents would be encoded on cuda in this process, which has no CUDA" in capsys.readouterr().err
    assert main([*words, "--dry-run"]) == 0
    assert "would not begin: latents would be encoded on cuda" in capsys.readouterr().err


def test_a_dry_run_knows_workers_that_no_batch_is_shared_by(images, tmp_path, capsys):
    assert main(on_workers(images, tmp_path / "work", "--dry-run", "--workers", "2:3")) == 0
    warned = capsys.readouterr().err
    assert "warning: decoder uses 2 of 3 workers: its global batch of" in warned and "would not begin" not in warned
    assert main(on_workers(images, tmp_path / "work", "--dry-run", "--workers", "32")) == 0
    assert "would not begin: " in capsys.readouterr().err


@pytest.mark.slow
def test_a_given_autoencoder_replaces_stage_0_and_from_redoes(images, tmp_path, capsys, cache):
    work, first = tmp_path / "work", tmp_path / "first"
    assert main(command(images, first, "--until", "autoencoder")) == 0
    bundle = storage.read_json(str(first / "steps/autoencoder.json"))["result"]["bundle"]
    given = command(images, work, "--autoencoder", bundle, "--name", "given")
    assert main(given) == 0
    capsys.readouterr()
    assert main([*given, "--dry-run"]) == 0
    assert list(states(capsys.readouterr().out))[0] == "latents"
    assert main([*given, "--from", "register"]) == 0
    text = capsys.readouterr().out
    assert "evaluate: done before" in text and "register: stale: times asked for anew is now 1" in text
    second = registry.get_version("given", "candidate", tracking_uri=f"sqlite:///{work / 'mlflow.db'}")
    assert second is not None and second.version == "2"
    assert main(given) == 0  # the request is closed: nothing left to do
    assert capsys.readouterr().out.count("done before") == 7
