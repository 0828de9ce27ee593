"""infra/: committed files are the generated ones, valid by published readers, and closed by default."""

from __future__ import annotations

import configparser
import json
import re
import shlex
import urllib.request
from importlib import resources
from pathlib import Path

import jsonschema
import kubernetes_validate
import pytest
import yaml
from ray_head import ray_head

from orchestration import jobs
from orchestration.cli import main
from orchestration.elastic import worker_counts
from orchestration.infra.files import generate
from orchestration.infra.tracking_server import SECRETS
from orchestration.infra.values import load_values
from orchestration.verbs import pipeline as pipeline_cli
from pipeline.errors import UserError
from training.config import override
from training.presets import get_preset

INFRA = Path(__file__).resolve().parents[2] / "infra"


@pytest.fixture(scope="module")
def values():
    return load_values(INFRA / "values.yaml")


def load(name: str):
    return yaml.safe_load((INFRA / name).read_text())


def test_the_committed_files_are_the_generated_ones(values, capsys):
    files = generate(values)
    for name, text in files.items():
        assert (INFRA / name).read_text() == text, f"{name}: run `latentzoom manifests`"
    there = {p.relative_to(INFRA).as_posix() for p in INFRA.rglob("*") if p.is_file()}
    assert there - set(files) - {"values.yaml", ".env"} == set()
    assert main(["manifests", "--values", str(INFRA / "values.yaml"), "--check"]) == 0


def test_a_changed_value_reaches_every_file_that_uses_it(tmp_path, capsys):
    text = (INFRA / "values.yaml").read_text().replace("max: 4\n  cpus: 14", "max: 3\n  cpus: 14")
    (tmp_path / "values.yaml").write_text(text)
    assert main(["manifests", "--values", str(tmp_path / "values.yaml")]) == 0
    job = yaml.safe_load((tmp_path / "kuberay/rayjob.yaml").read_text())
    assert "--workers 2:3" in job["spec"]["entrypoint"]
    assert yaml.safe_load((tmp_path / "ray-up.yaml").read_text())["available_node_types"]["gpu"]["max_workers"] == 3
    assert main(["manifests", "--values", str(INFRA / "values.yaml"), "--out", str(tmp_path), "--check"]) == 1


def test_what_is_there_is_replaced_only_where_that_is_said(tmp_path, capsys):
    words = ["manifests", "--values", str(INFRA / "values.yaml"), "--out", str(tmp_path)]
    for _ in range(2):  # what is the same is no hindrance
        assert main(words) == 0
    (tmp_path / "compose.yaml").write_text("mine")
    (tmp_path / "ray-up.yaml").unlink()
    assert main(words) == 2
    assert "compose.yaml is there already, and not what these values give; --overwrite" in capsys.readouterr().err
    assert (tmp_path / "compose.yaml").read_text() == "mine" and not (tmp_path / "ray-up.yaml").exists()
    assert main([*words, "--overwrite"]) == 0 and main([*words, "--check"]) == 0
    (tmp_path / "Dockerfile").unlink()
    (tmp_path / "Dockerfile").mkdir()
    assert main(words) == 2 and "Dockerfile: Is a directory" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("max: 4\n  cpus: 14", "max: 5\n  cpus: 14", "cannot be shared by 5 workers"),
        ("min: 2\n", "min: 9\n", "use 0 <= min <= max"),
        ("shm_gib: 8", "shm_gb: 8", "unknown field shm_gb"),
    ],
)
def test_bad_values_are_refused(tmp_path, old, new, message):
    (tmp_path / "values.yaml").write_text((INFRA / "values.yaml").read_text().replace(old, new))
    with pytest.raises(UserError, match=message):
        load_values(tmp_path / "values.yaml")


def test_rays_own_reader_understands_the_cluster(values):
    from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr

    cluster = load("kuberay/raycluster.yaml")
    config = _derive_autoscaling_config_from_ray_cr(cluster)
    types = config["available_node_types"]
    gpu, cpu = types["gpu"], types["cpu"]
    assert (gpu["min_workers"], gpu["max_workers"], gpu["resources"]["GPU"]) == (2, 4, 1)
    assert (cpu["min_workers"], cpu["max_workers"], cpu["resources"]["CPU"]) == (0, 4, 16)
    head = types[config["head_node_type"]]
    assert head["resources"]["CPU"] == 0 and "GPU" not in head["resources"]
    assert cluster["spec"] == load("kuberay/rayjob.yaml")["spec"]["rayClusterSpec"]


def test_pods_and_policy_follow_kubernetes_published_schemas():
    """The pods inside KubeRay's objects too, in the strict form that refuses unknown fields."""
    spec = load("kuberay/raycluster.yaml")["spec"]
    templates = [spec["headGroupSpec"]["template"], *(group["template"] for group in spec["workerGroupSpecs"])]
    pods = [{"apiVersion": "v1", "kind": "Pod", **template} for template in templates]
    for version in ("1.31", "1.37"):
        for thing in (*pods, load("kuberay/networkpolicy.yaml")):
            kubernetes_validate.validate(thing, version, strict=True)
    pods[0]["spec"]["containers"][0]["envfrom"] = []
    with pytest.raises(kubernetes_validate.ValidationError, match="envfrom"):
        kubernetes_validate.validate(pods[0], "1.37", strict=True)


def test_the_compose_file_follows_the_published_schema():
    vendored = resources.files("check_jsonschema") / "builtin_schemas/vendor/compose-spec.json"
    schema = json.loads(vendored.read_text())
    compose = load("compose.yaml")
    jsonschema.validate(compose, schema)
    compose["services"]["mlflow"]["dependson"] = []
    with pytest.raises(jsonschema.ValidationError, match="dependson"):
        jsonschema.validate(compose, schema)


def test_the_ray_up_file_follows_rays_published_schema():
    import ray.autoscaler

    schema = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text())
    config = load("ray-up.yaml")
    jsonschema.validate(config, schema)
    assert config["available_node_types"]["gpu"]["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    commands = " ".join(config["head_start_ray_commands"])
    assert "--dashboard-host=127.0.0.1" in commands and "RAY_AUTH_MODE=token" in commands


def test_the_rayjob_is_a_command_we_have_and_its_range_can_train(values):
    words = shlex.split(load("kuberay/rayjob.yaml")["spec"]["entrypoint"])
    assert words[:2] == ["latentzoom", "pipeline"]
    arguments = pipeline_cli.parser().parse_args(words[2:])
    low, high = map(int, arguments.workers.split(":"))
    group = next(g for g in load("kuberay/raycluster.yaml")["spec"]["workerGroupSpecs"] if g["groupName"] == "gpu")
    assert (low, high) == (group["minReplicas"], group["maxReplicas"])
    preset = override(get_preset(arguments.preset), arguments.set)
    for stage in preset.stages:
        assert worker_counts(preset.stage(stage), low, high) == tuple(range(low, high + 1))


def test_pods_are_closed(values):
    spec = load("kuberay/raycluster.yaml")["spec"]
    assert spec["authOptions"] == {"mode": "token"}
    assert spec["headGroupSpec"]["serviceType"] == "ClusterIP"
    templates = [spec["headGroupSpec"]["template"], *(g["template"] for g in spec["workerGroupSpecs"])]
    for pod in (t["spec"] for t in templates):
        assert pod["securityContext"]["runAsNonRoot"] and pod["securityContext"]["runAsUser"] >= 1000
        (container,) = pod["containers"]
        assert not container["securityContext"]["allowPrivilegeEscalation"]
        assert container["resources"]["requests"] == container["resources"]["limits"]
        assert not any("KEY" in e["name"] or "PASSWORD" in e["name"] for e in container["env"])
        assert any(v.get("emptyDir", {}).get("medium") == "Memory" for v in pod["volumes"])
    policy = load("kuberay/networkpolicy.yaml")["spec"]
    assert policy["policyTypes"] == ["Ingress"] and all(rule["from"] for rule in policy["ingress"])


def test_the_compose_file_has_no_password_and_listens_on_the_loopback_only():
    compose = load("compose.yaml")
    ports = [port for service in compose["services"].values() for port in service.get("ports", [])]
    assert ports and all(port.startswith("127.0.0.1:") for port in ports)
    assert "ports" not in compose["services"]["postgres"]
    text = (INFRA / "compose.yaml").read_text()
    for name in SECRETS:
        assert re.search(rf"\$\{{{name}:\?", text), name  # refuses to start while it is unset or empty
    secret_values = [
        value for service in compose["services"].values() for key, value in service.get("environment", {}).items()
        if re.search("PASSWORD|SECRET|ACCESS_KEY", key)
    ]  # fmt: skip
    assert len(secret_values) >= 6 and all(value.startswith("${") for value in secret_values)
    assert "--app-name=basic-auth" in compose["services"]["mlflow"]["command"]
    assert {"postgres", "mlflow"} <= {name for name, service in compose["services"].items() if "healthcheck" in service}
    for service in compose["services"].values():
        assert set(service.get("depends_on", {})) <= set(compose["services"])
        assert all(v.split(":")[0] in compose["volumes"] for v in service.get("volumes", []))
    example = dict(
        line.split("=", 1) for line in (INFRA / ".env.example").read_text().splitlines() if not line.startswith("#")
    )
    assert example == dict.fromkeys(SECRETS, "")
    auth = configparser.ConfigParser()
    auth.read(INFRA / "tracking/basic_auth.ini")
    assert auth["mlflow"]["default_permission"] == "NO_PERMISSIONS" and "admin_password" not in auth["mlflow"]


def test_images_are_locked_and_not_root():
    text = (INFRA / "Dockerfile").read_text()
    assert text.index('"$TORCH"') < text.index("requirements.lock") < text.index("COPY pipeline")
    assert "--no-deps -r /build/requirements.lock boto3==" in text
    users = re.findall(r"^USER (.+)$", text, re.MULTILINE)
    assert users and users[-1] not in ("root", "0")
    assert re.findall(r"^USER (.+)$", (INFRA / "tracking/Dockerfile").read_text(), re.MULTILINE)[-1] == users[-1]


def test_no_file_holds_a_secret_value():
    for path in INFRA.rglob("*"):
        if path.is_file() and path.name != ".env":
            for line in path.read_text().splitlines():
                found = re.search(r"(?i)(password|secret_?key|token)\s*[:=]\s*[\"']?([A-Za-z0-9+/]{6,})", line)
                assert not found or found[2].startswith(("token", "false")), f"{path.name}: {line}"


def test_alerts_and_dashboard_ask_for_metrics_that_are_exported():
    exported = {"images_per_s", "data_wait_percent", "loss", "encode_busy", "samples_per_s"}
    text = (INFRA / "monitoring/alerts.yaml").read_text() + (INFRA / "monitoring/dashboard.json").read_text()
    assert set(re.findall(r"ray_latentzoom_(\w+)", text)) <= exported
    assert "ray_actors" not in text  # Ray counts actors that ended well among the dead ones
    for group in load("monitoring/alerts.yaml")["groups"]:
        for rule in group["rules"]:
            assert {"alert", "expr", "for", "annotations"} <= set(rule)
    assert load("monitoring/prometheus.yaml")["rule_files"] == ["alerts.yaml"]


@pytest.mark.slow
def test_figures_reach_prometheus_under_the_names_that_the_dashboard_asks_for(monkeypatch):
    code = (
        "import time, ray; ray.init(); from orchestration.ray_metrics import RayMetricsReporter, PreprocessingMetrics;"
        "RayMetricsReporter('align').metrics(3, {'images_per_s': 7.0}); "
        "PreprocessingMetrics()({'encode_busy': 0.5}); time.sleep(600)"
    )
    with ray_head() as head:
        monkeypatch.setenv("RAY_AUTH_TOKEN", head.token)
        client = jobs.connect(head.address)
        here = str(INFRA.parent)
        client.submit_job(entrypoint=f"python -c {shlex.quote(code)}", runtime_env=jobs.runtime_env(here, {}))
        wanted = ("ray_latentzoom_images_per_s{", "ray_latentzoom_encode_busy{", "ray_node_mem_used{", "ray_tasks{")
        text = ""
        while not all(name in text for name in wanted):
            with urllib.request.urlopen(f"http://{head.host}:{head.metrics_port}/metrics", timeout=20) as answer:
                text = answer.read().decode()
        line = next(line for line in text.splitlines() if line.startswith(wanted[0]))
        assert 'stage="align"' in line and line.endswith(" 7.0")
