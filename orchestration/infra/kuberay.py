"""KubeRay manifests: a RayCluster, a RayJob with a cluster of its own, and who may talk to them.

CPU workers decode, GPU workers encode and train. Both groups tolerate spot machines: Ray hands the notice to the
training code, which writes a checkpoint within the grace period. The head runs no work and needs no GPU.
"""

from __future__ import annotations

import shlex
from typing import Any

from orchestration.infra.values import Values, WorkerValues

SECRET = "latentzoom-env"
"""Kubernetes secret: AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, MLFLOW_TRACKING_USERNAME, MLFLOW_TRACKING_PASSWORD."""
_SPOT_TAINTS = ("cloud.google.com/gke-spot", "kubernetes.azure.com/scalesetpriority", "spot")
_HOME = "/home/latentzoom"


def ray_cluster(values: Values) -> dict[str, Any]:
    """A standing cluster for `latentzoom submit`."""
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayCluster",
        "metadata": {"name": values.name, "namespace": values.cluster.namespace},
        "spec": _cluster_spec(values),
    }


def ray_job(values: Values) -> dict[str, Any]:
    """One pipeline with a cluster of its own, which goes when the job ends. Applied again, the job continues."""
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": {"name": f"{values.name}-{values.job.model_name}", "namespace": values.cluster.namespace},
        "spec": {
            "entrypoint": shlex.join(values.job_command()),
            "submissionMode": "K8sJobMode",
            "backoffLimit": 3,
            "shutdownAfterJobFinishes": True,
            "ttlSecondsAfterFinished": 600,
            "rayClusterSpec": _cluster_spec(values),
        },
    }


def network_policy(values: Values) -> dict[str, Any]:
    """Ray's ports are open to the cluster's own pods, to KubeRay and to Prometheus; to nobody else."""
    own = {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": values.cluster.namespace}}}
    operator = {"namespaceSelector": {}, "podSelector": {"matchLabels": {"app.kubernetes.io/name": "kuberay-operator"}}}
    prometheus = {"namespaceSelector": {}, "podSelector": {"matchLabels": {"app.kubernetes.io/name": "prometheus"}}}
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {"name": values.name, "namespace": values.cluster.namespace},
        "spec": {
            "podSelector": {"matchExpressions": [{"key": "ray.io/cluster", "operator": "Exists"}]},
            "policyTypes": ["Ingress"],
            "ingress": [
                {"from": [own]},
                {"from": [operator], "ports": [{"port": 8265, "protocol": "TCP"}]},
                {"from": [prometheus], "ports": [{"port": 8080, "protocol": "TCP"}]},
            ],
        },
    }


def _cluster_spec(values: Values) -> dict[str, Any]:
    cluster = values.cluster
    return {
        "rayVersion": cluster.ray_version,
        "authOptions": {"mode": "token"},
        "enableInTreeAutoscaling": True,
        "autoscalerOptions": {
            "version": "v2",
            "upscalingMode": "Default",
            "idleTimeoutSeconds": cluster.idle_seconds,
            "securityContext": _container_security(),
        },
        "headGroupSpec": {
            "serviceType": "ClusterIP",
            "rayStartParams": {
                "num-cpus": "0",
                "dashboard-host": "0.0.0.0",
            },  # inside the pod network, behind the token
            "template": _pod(values, "ray-head", cluster.head.cpus, cluster.head.memory_gib, None),
        },
        "workerGroupSpecs": [
            _group(values, "cpu", values.cpu_workers),
            _group(values, "gpu", values.gpu_workers),
        ],
    }


def _group(values: Values, name: str, workers: WorkerValues) -> dict[str, Any]:
    return {
        "groupName": name,
        "replicas": workers.min,
        "minReplicas": workers.min,
        "maxReplicas": workers.max,
        "rayStartParams": {},
        "template": _pod(values, "ray-worker", workers.cpus, workers.memory_gib, workers),
    }


def _pod(values: Values, name: str, cpus: int, memory_gib: int, workers: WorkerValues | None) -> dict[str, Any]:
    amounts: dict[str, str] = {"cpu": str(cpus), "memory": f"{memory_gib}Gi"}
    if workers and workers.gpus:
        amounts["nvidia.com/gpu"] = str(workers.gpus)
    spec: dict[str, Any] = {
        "automountServiceAccountToken": workers is None,  # the head's autoscaler talks to Kubernetes; workers do not
        "terminationGracePeriodSeconds": values.cluster.grace_seconds,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": values.image.user,
            "fsGroup": values.image.user,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [_container(values, name, amounts)],
        "volumes": [
            {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": f"{values.cluster.shm_gib}Gi"}},
            {"name": "scratch", "emptyDir": {}},
        ],
    }
    if workers and workers.node_selector:
        spec["nodeSelector"] = dict(workers.node_selector)
    if tolerations := _tolerations(workers):
        spec["tolerations"] = tolerations
    return {"metadata": {"labels": {"app.kubernetes.io/name": "latentzoom"}}, "spec": spec}


def _container(values: Values, name: str, amounts: dict[str, str]) -> dict[str, Any]:
    environment = {
        "MLFLOW_TRACKING_URI": values.tracking.tracking_uri,
        "LATENTZOOM_CACHE": "/scratch/cache",
        "TMPDIR": "/scratch",
        "RAY_TMPDIR": "/tmp",  # else Ray follows TMPDIR, away from where KubeRay's autoscaler looks
        **({"AWS_ENDPOINT_URL": values.tracking.s3_endpoint} if values.tracking.s3_endpoint else {}),
    }
    return {
        "name": name,
        "image": values.image.name,
        "env": [{"name": key, "value": value} for key, value in environment.items()],
        "envFrom": [{"secretRef": {"name": SECRET}}],
        "securityContext": _container_security(),
        "resources": {"requests": amounts, "limits": amounts},
        "volumeMounts": [{"name": "shm", "mountPath": "/dev/shm"}, {"name": "scratch", "mountPath": "/scratch"}],
        "workingDir": _HOME,
    }


def _container_security() -> dict[str, Any]:
    return {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}


def _tolerations(workers: WorkerValues | None) -> list[dict[str, str]]:
    if workers is None:
        return []
    found = [{"key": key, "operator": "Exists"} for key in _SPOT_TAINTS] if workers.spot else []
    return [*found, *([{"key": "nvidia.com/gpu", "operator": "Exists"}] if workers.gpus else [])]
