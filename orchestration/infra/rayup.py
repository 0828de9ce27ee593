"""`ray up infra/ray-up.yaml`: the same cluster on plain machines of a cloud, without Kubernetes."""

from __future__ import annotations

from typing import Any

from orchestration.infra.values import Values, WorkerValues

_TOKEN = "~/.ray/auth_token"


def ray_up(values: Values) -> dict[str, Any]:
    """Ray's cluster launcher file. The dashboard listens on the head's loopback; `ray dashboard` forwards it by SSH."""
    cluster, cloud = values.cluster, values.ray_up
    start = "ulimit -n 65536; RAY_AUTH_MODE=token ray start --disable-usage-stats"
    return {
        "cluster_name": values.name,
        "max_workers": values.cpu_workers.max + values.gpu_workers.max,
        "upscaling_speed": 1.0,
        "idle_timeout_minutes": max(1, cluster.idle_seconds // 60),
        "provider": {"type": "aws", "region": cloud.region, "use_internal_ips": False, "cache_stopped_nodes": False},
        "auth": {"ssh_user": cloud.ssh_user},
        "docker": {
            "image": values.image.name,
            "container_name": values.name,
            "pull_before_run": True,
            "run_options": [f"--shm-size={cluster.shm_gib}g", "--ulimit nofile=65536:65536"],
        },
        "file_mounts": {_TOKEN: _TOKEN},  # made by `ray get-auth-token --generate`
        "available_node_types": {
            "head": {"node_config": {"InstanceType": cloud.head_type}, "resources": {"CPU": 0}, "max_workers": 0},
            "cpu": _nodes(cloud.cpu_type, values.cpu_workers),
            "gpu": _nodes(cloud.gpu_type, values.gpu_workers),
        },
        "head_node_type": "head",
        "head_start_ray_commands": [
            "ray stop",
            f"{start} --head --port=6379 --dashboard-host=127.0.0.1 --autoscaling-config=~/ray_bootstrap_config.yaml",
        ],
        "worker_start_ray_commands": ["ray stop", f"{start} --address=$RAY_HEAD_IP:6379"],
    }


def _nodes(kind: str, workers: WorkerValues) -> dict[str, Any]:
    config: dict[str, Any] = {"InstanceType": kind}
    if workers.spot:
        config["InstanceMarketOptions"] = {"MarketType": "spot"}
    resources = {"CPU": workers.cpus, **({"GPU": workers.gpus} if workers.gpus else {})}
    return {
        "node_config": config,
        "resources": resources,
        "min_workers": workers.min,
        "max_workers": workers.max,
    }
