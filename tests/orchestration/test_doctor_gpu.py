"""`latentzoom doctor --gpu`: the program itself, rehearsed on a CPU; and that its parts are apart from each other."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from orchestration import cli
from orchestration.doctor import gpu
from pipeline.errors import UserError
from training.world import current_world


def without(monkeypatch: pytest.MonkeyPatch, folder: Path, *packages: str) -> None:
    """Processes started from now on cannot import these."""
    for package in packages:
        folder.mkdir(exist_ok=True)
        (folder / f"{package}.py").write_text(f"raise ModuleNotFoundError({package!r}, name={package!r})")
    monkeypatch.setenv("PYTHONPATH", f"{folder}:{Path(__file__).resolve().parents[2]}")


@pytest.mark.slow
@pytest.mark.more
def test_a_rehearsal_without_ray_deepspeed_and_mlflow(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    without(monkeypatch, tmp_path / "nothing", "ray", "deepspeed", "mlflow")
    # Without the test suite, which is running, and the goals and the bench, which have tests of their own.
    others = ("tests", "goals", "bench")
    only = tuple(part.name for part in gpu.PARTS if not part.name.startswith(others))
    outcomes = {o.name: o for o in gpu.check("cpu", tmp_path / "out", only=only, say=lambda line: print(line))}
    states = {name: outcome.state for name, outcome in outcomes.items()}
    missing = {"train deepspeed", "mlflow", "ray"}
    assert {name for name, state in states.items() if state == "not installed"} == missing, outcomes
    assert {state for name, state in states.items() if name not in missing} == {"ok"}, outcomes
    assert outcomes["train ddp"].figures["backend"] == "gloo"
    for stage in ("autoencoder", "decoder", "denoiser", "align"):
        assert f"{stage}: images_per_s" in outcomes["train local"].figures
    saved = json.loads((tmp_path / "out/gpu.json").read_text())
    assert [part["name"] for part in saved["parts"]] == list(outcomes) and saved["machine"]["device"] == "cpu"
    text = (tmp_path / "out/gpu.md").read_text()
    assert "a rehearsal" in text and "| ray | not installed |" in text and "## kernels" in text


@pytest.mark.slow
def test_a_rehearsal_with_everything(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    only = [word for name in ("train deepspeed", "mlflow", "ray") for word in ("--only", name)]
    assert cli.main(["doctor", "--gpu", "--device", "cpu", "--out", str(tmp_path), *only]) == 0
    assert "failed: none" in capsys.readouterr().out
    assert {part["state"] for part in json.loads((tmp_path / "gpu.json").read_text())["parts"]} == {"ok"}


@pytest.mark.parametrize(
    "program, state, text",
    [
        ("raise SystemExit('no such luck')", "FAILED", "no such luck"),
        ("import os; os.kill(os.getpid(), 11)", "FAILED", "exit status -11"),
        ("import time; print('waiting', flush=True); time.sleep(600)", "over time", "waiting"),
    ],
)
def test_a_part_that_fails_or_hangs_ends_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, program: str, state: str, text: str
) -> None:
    (tmp_path / "broken.py").write_text(program)
    started: list[int] = []
    real = gpu.subprocess.Popen

    def popen(command: list[str], **options: object) -> object:
        process = real([sys.executable, str(tmp_path / "broken.py")], **options)  # type: ignore[call-overload]
        started.append(process.pid)
        return process

    monkeypatch.setattr(gpu.subprocess, "Popen", popen)
    outcome = gpu.run_part("kernels", "cpu", tmp_path, 3.0)
    assert outcome.state == state and text in outcome.text
    assert not Path(f"/proc/{started[0]}").exists()


@pytest.mark.parametrize(
    "device, visible, expected",
    [
        ("cuda", "", "0"),
        ("cuda:1", "", "1"),
        ("cuda:1", "4,6", "6"),
        ("cuda", "GPU-8a, GPU-8b", "GPU-8a"),
        ("cpu", "3", ""),
    ],
)
def test_parts_see_one_card(device: str, visible: str, expected: str) -> None:
    assert gpu.one_card(device, visible).get("CUDA_VISIBLE_DEVICES", "") == expected


def test_two_processes_share_the_card(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Each takes the machine's only device, and so does DeepSpeed, which goes by LOCAL_RANK; it is "cuda", whose number
    nobody may ask for."""
    import torch

    from orchestration.doctor import gpu_parts

    started: list[dict[str, str]] = []

    class Process:
        returncode = 0

        def __init__(self, command: list[str], env: dict[str, str], **_: object) -> None:
            started.append(env)

        def communicate(self) -> tuple[str, None]:
            return "", None

    monkeypatch.setattr(gpu_parts.subprocess, "Popen", Process)
    gpu_parts._two(gpu_parts.Bench("cuda", tmp_path), "deepspeed", "nccl", tmp_path / "result.json")
    assert [env["RANK"] for env in started] == ["0", "1"] and {env["LOCAL_RANK"] for env in started} == {"0"}

    chosen: list[object] = []
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: chosen.append(torch.device(device).index))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for name in ("init_process_group", "destroy_process_group"):
        monkeypatch.setattr(torch.distributed, name, lambda *_, **__: None)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)

    def train_stages(bench: gpu_parts.Bench, engine: str, name: str) -> dict[str, object]:
        monkeypatch.setenv("LOCAL_RANK", started[1]["LOCAL_RANK"])
        current_world(bench.device)
        return {}

    monkeypatch.setattr(gpu_parts, "train_stages", train_stages)
    gpu_parts.as_one_of_two(gpu_parts.Bench("cuda", tmp_path), "ddp", "nccl", tmp_path / "result.json")
    assert chosen == [0]


def test_no_time_left_is_said(tmp_path: Path) -> None:
    outcomes = gpu.check("cpu", tmp_path, total_s=0.0, say=lambda line: None)
    assert {outcome.state for outcome in outcomes} == {"no time left"} and "Failed: data" in (
        tmp_path / "gpu.md"
    ).read_text()


def test_a_wrong_part_and_a_missing_device_are_one_line(tmp_path: Path) -> None:
    import torch

    assert cli.main(["doctor", "--gpu", "--device", "cpu", "--out", str(tmp_path), "--only", "nonsense"]) == 2
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="device 'cuda' is not there"):
            gpu.check("cuda", tmp_path)
