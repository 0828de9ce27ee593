"""infra/monitoring: dashboard and alerts ask for figures that the code sends, fire when they should, and a real
Prometheus finds them at a real head."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import time
import urllib.parse
import urllib.request
from pathlib import Path

import pytest
import yaml
from ray_head import ray_head
from servers import answers, free_port, process, wait_until
from small_shards import make_shards

from orchestration.cli import main
from orchestration.cluster import jobs
from orchestration.cluster.ray_metrics import PREFIX
from preprocess.tally import Tally

ROOT = Path(__file__).resolve().parents[2]
MONITORING = ROOT / "infra/monitoring"


def asked_by_panels() -> list[str]:
    panels = json.loads((MONITORING / "dashboard.json").read_text())["panels"]
    return [target["expr"] for panel in panels for target in panel["targets"]]


def asked_by_alerts() -> list[str]:
    groups = yaml.safe_load((MONITORING / "alerts.yaml").read_text())["groups"]
    return [rule["expr"] for group in groups for rule in group["rules"]]


def expressions() -> list[str]:
    """All that is asked of Prometheus."""
    return asked_by_panels() + asked_by_alerts()


def promtool(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    if not shutil.which("promtool"):
        pytest.skip("no promtool here: Debian's package prometheus has it")
    return subprocess.run(["promtool", *words], cwd=cwd, capture_output=True, text=True, check=False)


def test_every_figure_of_ours_that_is_asked_for_is_sent(tmp_path, monkeypatch):
    """The names come from a training run and from preprocessing: one that is renamed there fails here."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    words = [
        "train",
        "autoencoder",
        "--preset",
        "debug",
        "--data",
        make_shards(tmp_path),
        "--run-dir",
        "run",
        "--local",
    ]
    words += ["--no-tracking", "--set", "autoencoder.steps=1", "--set", "autoencoder.log_every=1"]
    assert main(words) == 0
    trained = json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[0])
    sent = {*trained, *Tally({}).figures(0.0)}
    asked = {name for text in expressions() for name in re.findall(rf"ray_{PREFIX}(\w+)", text)}
    assert asked and asked <= sent, f"nobody sends {', '.join(sorted(asked - sent))}"


def test_every_figure_of_rays_own_that_is_asked_for_is_rays():
    """Those of a node by Ray's table of gauges; `ray_tasks` counts in its core (the slow test scrapes it)."""
    from ray.dashboard.modules.reporter.reporter_agent import METRICS_GAUGES

    asked = {name for text in expressions() for name in re.findall(r"\bray_(\w+)", text) if PREFIX not in name}
    assert asked and asked - {"tasks"} <= set(METRICS_GAUGES)


def settings_for(target: str) -> dict[str, object]:
    """Our settings with a target by name: Kubernetes tells them in a cluster, and Debian's build knows none."""
    settings = yaml.safe_load((MONITORING / "prometheus.yaml").read_text())
    (scrape,) = settings["scrape_configs"]
    (discovery,) = scrape.pop("kubernetes_sd_configs")
    assert discovery == {"role": "pod", "namespaces": {"names": ["latentzoom"]}}
    scrape["static_configs"] = [{"targets": [target]}]
    return dict(settings)


def test_prometheus_own_checker_accepts_rules_and_settings(tmp_path):
    (tmp_path / "prometheus.yaml").write_text(yaml.safe_dump(settings_for("127.0.0.1:8080")))
    shutil.copy(MONITORING / "alerts.yaml", tmp_path)
    result = promtool("check", "config", "prometheus.yaml", cwd=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "alerts.yaml" in result.stdout and "6 rules found" in result.stdout


GAPS = " ".join(["{0} stale stale"] * 20)  # figures come at reports only, and Ray drops them in between
FIRING = {
    "TrainingSlow": ("11m", ['ray_latentzoom_images_per_s{stage="align"}', GAPS.format(0.5)]),
    "TrainingWaitsForData": ("11m", ['ray_latentzoom_data_wait_percent{stage="align"}', GAPS.format(30)]),
    "NodeGone": ("3m", ['up{job="ray"}', "0x60"]),
    "TasksFail": ("22m", ['ray_tasks{State="FAILED",Name="encode"}', "0x19 10x60"]),
    "DiskFull": ("6m", ["ray_node_disk_free", "5000000000x60"]),
    "GpuIdle": ("31m", ["ray_node_gpus_utilization", "1x60"]),
}
QUIET = {
    "TrainingSlow": ['ray_latentzoom_images_per_s{stage="align"}', "50x60"],
    "TrainingWaitsForData": ['ray_latentzoom_data_wait_percent{stage="align"}', "3x60"],
    "NodeGone": ['up{job="ray"}', "1x60"],
    "TasksFail": ['ray_tasks{State="FAILED",Name="JobSupervisor.ping"}', "0x19 10x60"],
    "DiskFull": ["ray_node_disk_free", "50000000000x60"],
    "GpuIdle": ["ray_node_gpus_utilization", "80x60"],
}


def test_alerts_fire_when_they_should_and_not_before(tmp_path):
    rules = yaml.safe_load((MONITORING / "alerts.yaml").read_text())["groups"][0]["rules"]
    assert {rule["alert"] for rule in rules} == set(FIRING) == set(QUIET)
    tests = []
    for name, (at, (series, values)) in FIRING.items():
        kept = ("TrainingSlow", "TrainingWaitsForData", "NodeGone")  # the others sum over all
        labels = dict(re.findall(r'(\w+)="([^"]*)"', series)) if name in kept else {}
        summary = next(rule["annotations"] for rule in rules if rule["alert"] == name)
        fires = {"alertname": name, "eval_time": at, "exp_alerts": [{"exp_labels": labels, "exp_annotations": summary}]}
        before = {"alertname": name, "eval_time": "1m", "exp_alerts": []}
        tests.append({"input_series": [{"series": series, "values": values}], "alert_rule_test": [before, fires]})
        quiet_series, quiet_values = QUIET[name]
        quiet = {"alertname": name, "eval_time": at, "exp_alerts": []}
        series_of_quiet = {"series": quiet_series, "values": quiet_values}
        tests.append({"input_series": [series_of_quiet], "alert_rule_test": [quiet]})
    for each in tests:
        each["interval"] = "1m"
    cases = {"rule_files": [str(MONITORING / "alerts.yaml")], "evaluation_interval": "1m", "tests": tests}
    (tmp_path / "cases.yaml").write_text(yaml.safe_dump(cases))
    result = promtool("test", "rules", "cases.yaml", cwd=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr


def ask(port: int, expression: str) -> list[dict[str, object]]:
    query = urllib.parse.urlencode({"query": expression})
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/api/v1/query?{query}", timeout=20) as reply:
        answer = json.load(reply)
    assert answer["status"] == "success"
    return list(answer["data"]["result"])


@pytest.mark.slow
def test_a_real_prometheus_finds_at_a_real_head_what_the_dashboard_asks_for(monkeypatch, tmp_path):
    """With a job that reports as training and preprocessing do. Where there is no GPU only its panel stays empty."""
    if not shutil.which("prometheus"):
        pytest.skip("no prometheus here: Debian has the package")
    code = (
        "import time, ray; ray.init(); "
        "from orchestration.cluster.ray_metrics import RayMetricsReporter, PreprocessingMetrics;"
        "from preprocess.tally import Tally;"
        "RayMetricsReporter('align').metrics(3, {'images_per_s': 7.0, 'data_wait_percent': 2.0, 'loss': 0.5}); "
        "PreprocessingMetrics()({**Tally({}).figures(1.0), 'encode_busy': 0.5}); time.sleep(900)"
    )
    port = free_port()
    with ray_head() as head:
        monkeypatch.setenv("RAY_AUTH_TOKEN", head.token)
        entrypoint = f"python -c {shlex.quote(code)}"
        jobs.connect(head.address).submit_job(entrypoint=entrypoint, runtime_env=jobs.runtime_env(str(ROOT), {}))
        settings = settings_for(f"{head.host}:{head.metrics_port}")
        settings["global"] = {"scrape_interval": "3s", "evaluation_interval": "3s"}
        settings["scrape_configs"][0].pop("relabel_configs")  # type: ignore[index]  # of labels that pods have
        (tmp_path / "prometheus.yaml").write_text(yaml.safe_dump(settings))
        shutil.copy(MONITORING / "alerts.yaml", tmp_path)
        command = ["prometheus", "--config.file=prometheus.yaml", f"--web.listen-address=127.0.0.1:{port}"]
        command += [f"--storage.tsdb.path={tmp_path}/data"]
        with process(command, tmp_path / "log", cwd=tmp_path) as server:
            wait_until(lambda: answers(f"http://127.0.0.1:{port}/-/ready"), server, tmp_path / "log", "Prometheus")
            wanted = [text for text in asked_by_panels() if "gpus" not in text]
            while [text for text in wanted if not ask(port, text)]:
                time.sleep(0.5)  # until the global limit of a test
            assert len(wanted) == 8
            (row,) = ask(port, 'ray_latentzoom_images_per_s{stage="align"}')
            assert row["value"][1] == "7"  # type: ignore[index]
            for text in expressions():
                ask(port, text)  # Prometheus understands every one
