"""infra/chart, rendered by Helm: known to Kubernetes, KubeRay and Ray, closed by default, workers counted right."""

from __future__ import annotations

import copy
import importlib
import itertools
import json
import shlex
from pathlib import Path

import jsonschema
import kubernetes_validate
import pytest
import yaml
from helm_chart import CHART, TRACKED, helm, render, template

from orchestration.cluster import jobs
from orchestration.cluster.elastic import worker_counts
from orchestration.verbs import pipeline as pipeline_cli
from pipeline.command_line import parse
from training.config import override
from training.presets import get_preset

FIELDS = json.loads((Path(__file__).parents[1] / "data/kuberay/fields.json").read_text())
JOB = {**TRACKED, "job": {"enabled": True}}
FULL = {
    "trackingUri": "",
    "s3Endpoint": "https://minio.example.internal",
    "imagePullSecrets": [{"name": "my-registry"}],
    "serviceAccountName": "trainer",
    "secretName": "",
    "cluster": {"queue": "team-a"},
    "gcs": {"redisAddress": "redis.example.svc:6379", "redisPasswordSecret": "redis"},
    "head": {"nodeSelector": {"pool": "stable"}, "tolerations": [{"key": "stable", "operator": "Exists"}]},
    "gpuWorkers": {"gpus": 8, "nodeSelector": {"cloud.google.com/gke-accelerator": "nvidia-h100-80gb"}},
    "job": {"enabled": True},
    "mlflow": {"enabled": True, "serviceAccountName": "tracker"},
    "serve": {
        "enabled": True,
        "models": ["models:/faces@champion"],
        "keep": "/shared",
        "replicas": {"min": 1, "max": 4},
    },
}


def specs(objects):
    """The Ray cluster's specs of a rendering: of the standing one, and of the job's own."""
    found = [each["spec"] for (kind, _), each in objects.items() if kind == "RayCluster"]
    found += [each["spec"]["rayClusterSpec"] for (kind, _), each in objects.items() if kind == "RayJob"]
    return found + [each["spec"]["rayClusterConfig"] for (kind, _), each in objects.items() if kind == "RayService"]


def templates(spec):
    return [spec["headGroupSpec"]["template"], *(group["template"] for group in spec["workerGroupSpecs"])]


def group(spec, name):
    return next(each for each in spec["workerGroupSpecs"] if each["groupName"] == name)


def environment(template):
    (container,) = template["spec"]["containers"]
    return {each["name"]: each["value"] for each in container["env"]}


def test_what_the_service_names_is_what_serves(monkeypatch):
    """Its application is built from its arguments by the code itself."""
    service = render(FULL)["RayService", "latentzoom-serve"]["spec"]
    (application,) = yaml.safe_load(service["serveConfigV2"])["applications"]
    module, _, name = application["import_path"].partition(":")
    build = getattr(importlib.import_module(module), name)
    built = []
    monkeypatch.setattr(f"{module}.application", lambda *arguments: built.append(arguments))
    monkeypatch.setenv("LATENTZOOM_SERVE_TOKEN", "secret")
    build(application["args"])
    ((settings, replicas, token),) = built
    assert (settings.models, settings.keep, token) == (("models:/faces@champion",), "/shared", "secret")
    assert (replicas.min_num, replicas.max_num, replicas.num_cpus) == (1, 4, 2)
    assert application["route_prefix"] == "/" and "secret" not in service["serveConfigV2"]


def test_helm_finds_nothing_to_say():
    result = helm("lint", "--strict", str(CHART), "--set", "trackingUri=http://x:5000")
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("values", [TRACKED, JOB, FULL], ids=["cluster", "job", "everything"])
def test_kubernetes_and_kuberay_know_every_field(values):
    objects = render(values)
    for (kind, _), each in objects.items():
        if kind in ("RayCluster", "RayJob", "RayService"):
            jsonschema.validate(each, FIELDS)
        else:
            kubernetes_validate.validate(each, "1.37", strict=True)
    for spec in specs(objects):
        for pod in templates(spec):
            for version in ("1.31", "1.37"):
                kubernetes_validate.validate({"apiVersion": "v1", "kind": "Pod", **pod}, version, strict=True)


def test_the_checks_would_see_a_wrong_field():
    cluster = render()["RayCluster", "latentzoom"]
    wrong = copy.deepcopy(cluster)
    wrong["spec"]["headGroupSpec"]["servicetype"] = "ClusterIP"
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(wrong, FIELDS)
    pod = {"apiVersion": "v1", "kind": "Pod", **copy.deepcopy(templates(cluster["spec"])[0])}
    pod["spec"]["containers"][0]["envfrom"] = []
    with pytest.raises(kubernetes_validate.ValidationError, match="envfrom"):
        kubernetes_validate.validate(pod, "1.37", strict=True)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({**TRACKED, "shm_gib": 8}, "shm_gib"),
        ({**TRACKED, "gpuWorkers": {"min": 9}}, "gpuWorkers.min = 9 is more than gpuWorkers.max = 4"),
        ({**TRACKED, "gpuWorkers": {"gpus": 8, "cpus": 4}}, "gpuWorkers.cpus = 4 is less than gpuWorkers.gpus = 8"),
        ({"trackingUri": "http://joe:pass@mlflow:5000"}, "/trackingUri"),
        ({}, "give trackingUri"),
        ({**TRACKED, "job": {"modelName": "Faces and more"}}, "/job/modelName"),
        ({**TRACKED, "job": {"settings": ["a=1' ; rm -rf /"]}}, "/job/settings/0"),
    ],
)
def test_wrong_values_are_refused_by_name(values, message):
    result = template(values)
    assert result.returncode != 0 and message in result.stderr


def test_rays_own_autoscaler_reads_the_cluster():
    from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr

    cluster = render()["RayCluster", "latentzoom"]
    config = _derive_autoscaling_config_from_ray_cr(cluster)
    types = config["available_node_types"]
    gpu, cpu = types["gpu"], types["cpu"]
    assert (gpu["min_workers"], gpu["max_workers"], gpu["resources"]["GPU"]) == (2, 4, 1)
    assert (cpu["min_workers"], cpu["max_workers"], cpu["resources"]["CPU"]) == (0, 4, 16)
    head = types[config["head_node_type"]]
    assert head["resources"]["CPU"] == 0 and "GPU" not in head["resources"]
    assert cluster["spec"] == render(JOB)["RayJob", "latentzoom-faces"]["spec"]["rayClusterSpec"]


def job_arguments(values):
    objects = render(values)
    words = shlex.split(objects["RayJob", "latentzoom-faces"]["spec"]["entrypoint"])
    assert words[:2] == ["latentzoom", "pipeline"]
    return parse(pipeline_cli.Arguments, words[2:], prog="latentzoom pipeline")


def test_the_jobs_command_is_one_we_have_and_its_range_can_train():
    arguments = job_arguments(JOB)
    low, high = map(int, arguments.workers.split(":"))
    assert (low, high) == (2, 4)
    preset = override(get_preset(arguments.preset), list(arguments.set))
    for stage in preset.stages:
        assert worker_counts(preset.stage(stage), low, high) == tuple(range(low, high + 1))


@pytest.mark.parametrize(("gpus", "workers"), [(1, "2:4"), (8, "16:32")])
def test_every_gpu_of_a_node_is_a_worker(gpus, workers):
    values = {**TRACKED, "job": {"enabled": True}, "gpuWorkers": {"gpus": gpus}}
    arguments = job_arguments(values)
    assert arguments.workers == workers and arguments.gpus_per_worker == 1
    assert arguments.evaluate_workers is None  # as many as train
    (container,) = group(specs(render(values))[0], "gpu")["template"]["spec"]["containers"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == str(gpus)


def test_what_the_guide_replaces_is_the_job_alone():
    """Replaced by force, a tracking server would lose its disk, and a standing cluster its work."""
    guide = (Path(__file__).parents[2] / "docs/cluster.md").read_text()
    (line,) = [line for line in guide.splitlines() if "kubectl replace --force" in line]
    (only,) = [word for before, word in itertools.pairwise(line.split()) if before == "-s"]
    values = {**FULL, "cluster": {"enabled": True}}
    result = helm("template", "x", str(CHART), "-f", "-", "-s", only, input=yaml.safe_dump(values))
    assert result.returncode == 0, result.stderr
    assert [each["kind"] for each in yaml.safe_load_all(result.stdout) if each] == ["RayJob"]


def test_a_mistake_in_the_command_builds_no_second_cluster():
    assert render(JOB)["RayJob", "latentzoom-faces"]["spec"]["backoffLimit"] == 0


def test_a_stopped_job_has_time_for_its_checkpoint():
    environment = yaml.safe_load(render(JOB)["RayJob", "latentzoom-faces"]["spec"]["runtimeEnvYAML"])
    assert environment == jobs.runtime_env("", {})  # as `submit` sends it, whose test stops a real stage on a real head


def test_pods_are_drained_for_as_long_as_kubernetes_waits():
    from ray._private import ray_constants

    assert hasattr(ray_constants, "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S")  # the variable's name, of this Ray
    for grace in (30, 120):
        (spec,) = specs(render({**TRACKED, "cluster": {"graceSeconds": grace}}))
        for pod in templates(spec):
            drain = int(environment(pod)["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"])
            assert pod["spec"]["terminationGracePeriodSeconds"] == grace and grace - 15 <= drain <= grace - 5


def test_kuberay_may_size_shared_memory_and_pods_ask_for_their_disk():
    (spec,) = specs(render())
    for pod, disk in zip(templates(spec), ("50Gi", "100Gi", "200Gi"), strict=True):
        (container,) = pod["spec"]["containers"]
        assert [mount["mountPath"] for mount in container["volumeMounts"]] == ["/scratch"]
        assert container["resources"]["requests"]["ephemeral-storage"] == disk
        assert pod["spec"]["volumes"] == [{"name": "scratch", "emptyDir": {"sizeLimit": disk}}]


def test_pods_are_closed():
    objects = render({**TRACKED, "mlflow": {"enabled": True}})
    (spec,) = specs(objects)
    assert spec["authOptions"] == {"mode": "token"} and spec["headGroupSpec"]["serviceType"] == "ClusterIP"
    mlflow = objects["Deployment", "latentzoom-mlflow"]["spec"]["template"]
    for pod in (each["spec"] for each in [*templates(spec), mlflow]):
        assert pod["securityContext"]["runAsNonRoot"] and pod["securityContext"]["runAsUser"] >= 1000
        (container,) = pod["containers"]
        assert not container["securityContext"]["allowPrivilegeEscalation"]
        assert container["resources"]["requests"] == container["resources"]["limits"]
        for each in container["env"]:
            assert "value" not in each or not any(word in each["name"] for word in ("KEY", "PASSWORD", "SECRET"))
        assert pod["automountServiceAccountToken"] is (container["name"] == "ray-head")
    for name in ("latentzoom", "latentzoom-mlflow"):
        policy = objects["NetworkPolicy", name]["spec"]
        assert policy["policyTypes"] == ["Ingress"] and all(rule["from"] for rule in policy["ingress"])
    assert objects["Service", "latentzoom-mlflow"]["spec"]["type"] == "ClusterIP"


def test_operators_set_what_their_cluster_asks_for():
    objects = render(FULL)
    for spec in specs(objects):
        for pod in templates(spec):
            assert pod["spec"]["serviceAccountName"] == "trainer"
            assert pod["spec"]["imagePullSecrets"] == [{"name": "my-registry"}]
            assert "envFrom" not in pod["spec"]["containers"][0]  # the service account is enough
            assert environment(pod)["MLFLOW_TRACKING_URI"] == "http://latentzoom-mlflow.latentzoom.svc:5000"
            assert environment(pod)["AWS_ENDPOINT_URL"] == "https://minio.example.internal"
        head, _, gpu = (each["spec"] for each in templates(spec))
        assert head["nodeSelector"] == {"pool": "stable"} and head["tolerations"][0]["key"] == "stable"
        assert gpu["nodeSelector"] == {"cloud.google.com/gke-accelerator": "nvidia-h100-80gb"}
        assert spec["gcsFaultToleranceOptions"]["redisAddress"] == "redis.example.svc:6379"
        reference = spec["gcsFaultToleranceOptions"]["redisPassword"]["valueFrom"]["secretKeyRef"]
        assert reference == {"name": "redis", "key": "password"}
    default = render()
    for pod in templates(specs(default)[0]):
        assert pod["spec"]["containers"][0]["envFrom"] == [{"secretRef": {"name": "latentzoom-env"}}]


def test_kueue_admits_a_cluster_of_one_size():
    """Kueue counts a cluster once: no autoscaler, every group at its most, and the job asks for just these workers."""
    objects = render(FULL)
    for key in (("RayCluster", "latentzoom"), ("RayJob", "latentzoom-faces")):
        assert objects[key]["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "team-a"
    assert objects["RayJob", "latentzoom-faces"]["spec"]["shutdownAfterJobFinishes"] is True
    for spec in specs(objects):
        assert spec["enableInTreeAutoscaling"] is False and "autoscalerOptions" not in spec
        for each in spec["workerGroupSpecs"]:
            assert each["replicas"] == each["minReplicas"] == each["maxReplicas"] == 4
    assert job_arguments(FULL).workers == "32"


def test_names_follow_the_release():
    objects = render({"mlflow": {"enabled": True}}, name="two", namespace="team")
    assert ("RayCluster", "two") in objects and ("Service", "two-mlflow") in objects
    (spec,) = specs(objects)
    assert environment(templates(spec)[0])["MLFLOW_TRACKING_URI"] == "http://two-mlflow.team.svc:5000"
    assert all(each["metadata"]["namespace"] == "team" for each in objects.values())


def test_versions_are_those_of_the_lock():
    root = CHART.parents[1]
    lock = dict(line.split("==") for line in (root / "requirements.lock").read_text().split() if "==" in line)
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    assert values["cluster"]["rayVersion"] == lock["ray"]
    assert f'"mlflow[auth]=={lock["mlflow"]}"' in (root / "infra/tracking/Dockerfile").read_text()
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert chart["appVersion"] == values["image"]["tag"]
