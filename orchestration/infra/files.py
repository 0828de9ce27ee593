"""The table of files that are generated from `infra/values.yaml`."""

from __future__ import annotations

import json
from typing import Any

import yaml

from orchestration.infra.images import dockerfile, dockerignore, tracking_dockerfile
from orchestration.infra.kuberay import network_policy, ray_cluster, ray_job
from orchestration.infra.monitoring import alerts, dashboard, prometheus
from orchestration.infra.rayup import ray_up
from orchestration.infra.tracking_server import basic_auth, compose, env_example
from orchestration.infra.values import HEADER, Values


def generate(values: Values) -> dict[str, str]:
    """Every generated file: name below `infra/` → content."""
    return {
        "Dockerfile": dockerfile(values),
        "Dockerfile.dockerignore": dockerignore(),
        "kuberay/raycluster.yaml": to_yaml(ray_cluster(values)),
        "kuberay/rayjob.yaml": to_yaml(ray_job(values)),
        "kuberay/networkpolicy.yaml": to_yaml(network_policy(values)),
        "ray-up.yaml": to_yaml(ray_up(values)),
        "compose.yaml": to_yaml(compose(values)),
        ".env.example": env_example(),
        "tracking/Dockerfile": tracking_dockerfile(values),
        "tracking/basic_auth.ini": basic_auth(),
        "monitoring/prometheus.yaml": to_yaml(prometheus(values)),
        "monitoring/alerts.yaml": to_yaml(alerts(values)),
        "monitoring/dashboard.json": json.dumps(dashboard(), indent=1) + "\n",
    }


class _Dumper(yaml.SafeDumper):
    """Block style for texts of several lines, no aliases: the files are to be read by people."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style="|" if "\n" in value else None)


_Dumper.add_representer(str, _text)


def to_yaml(value: Any) -> str:
    return HEADER + yaml.dump(value, Dumper=_Dumper, sort_keys=False, width=110)
