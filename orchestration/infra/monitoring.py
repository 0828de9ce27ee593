"""Prometheus and Grafana: the figures that tell whether money is burnt.

Ray exports its own metrics and those of `orchestration.ray_metrics` on every node.
"""

from __future__ import annotations

from typing import Any

from orchestration.infra.values import Values

_TASKS = 'ray_tasks{State="FAILED",Name!~"JobSupervisor.*"}'
_FAILED = f"sum({_TASKS})"
"""Work that was lost. Dead actors are no measure of it: Ray counts those that ended well among them, and the supervisor
of every job ends with a failed ping."""
_FAILED_BEFORE = f"sum({_TASKS} offset 15m)"

PANELS = (
    ("Training: images per second", "sum by (stage) (ray_latentzoom_images_per_s)", "none"),
    ("Training: share of time spent waiting for data", "max by (stage) (ray_latentzoom_data_wait_percent)", "percent"),
    ("Training: loss", "max by (stage) (ray_latentzoom_loss)", "none"),
    ("Preprocessing: share of time the encoder was busy", "100 * max(ray_latentzoom_encode_busy)", "percent"),
    ("GPU busy (encode-busy while preprocessing)", "avg by (instance) (ray_node_gpus_utilization)", "percent"),
    ("Failures: tasks that failed, also those whose actor or machine died", f"{_FAILED} or vector(0)", "none"),
    ("Nodes", 'count(up{job="ray"} == 1)', "none"),
    ("Memory used", "ray_node_mem_used", "bytes"),
    ("Disk free", "ray_node_disk_free", "bytes"),
)  # fmt: skip


def prometheus(values: Values) -> dict[str, Any]:
    """Scrapes every Ray pod's metrics port."""
    return {
        "global": {"scrape_interval": "15s", "evaluation_interval": "15s"},
        "rule_files": ["alerts.yaml"],
        "scrape_configs": [
            {
                "job_name": "ray",
                "kubernetes_sd_configs": [{"role": "pod", "namespaces": {"names": [values.cluster.namespace]}}],
                "relabel_configs": [
                    {
                        "source_labels": ["__meta_kubernetes_pod_label_ray_io_cluster"],
                        "regex": ".+",
                        "action": "keep",
                    },
                    {
                        "source_labels": ["__meta_kubernetes_pod_ip"],
                        "target_label": "__address__",
                        "replacement": "$1:8080",
                    },
                    {"source_labels": ["__meta_kubernetes_pod_label_ray_io_group"], "target_label": "group"},
                ],
            }
        ],
    }


def alerts(values: Values) -> dict[str, Any]:
    """What somebody should look at."""
    limits = values.alerts
    slow = f"max by (stage) (ray_latentzoom_images_per_s) < {limits.min_images_per_s:g}"
    waits = f"max by (stage) (ray_latentzoom_data_wait_percent) > {limits.max_data_wait_percent:g}"
    rules = [
        _rule("TrainingSlow", slow, limits.minutes, "training makes fewer images a second than it should"),
        _rule(
            "TrainingWaitsForData", waits, limits.minutes, "GPUs wait for data: more loader threads, or a nearer store"
        ),
        _rule("NodeGone", 'up{job="ray"} == 0', 2, "a Ray node does not answer; elastic training goes on without it"),
        _rule(
            "TasksFail",
            f"{_FAILED} - ({_FAILED_BEFORE} or vector(0)) > 5",
            1,
            "work is lost again and again: see the log",
        ),
        _rule("DiskFull", "ray_node_disk_free < 10e9", 5, "less than 10 GB free on a node"),
        _rule("GpuIdle", "max(ray_node_gpus_utilization) < 5", 30, "GPUs are paid for and idle"),
    ]
    return {"groups": [{"name": values.name, "rules": rules}]}


def _rule(name: str, expression: str, minutes: int, summary: str) -> dict[str, Any]:
    return {"alert": name, "expr": expression, "for": f"{minutes}m", "annotations": {"summary": summary}}


def dashboard() -> dict[str, Any]:
    """A Grafana dashboard; import it and choose the Prometheus data source."""
    panels = [
        {
            "id": number + 1,
            "type": "timeseries",
            "title": title,
            "datasource": {"type": "prometheus", "uid": "${source}"},
            "gridPos": {"h": 8, "w": 8, "x": 8 * (number % 3), "y": 8 * (number // 3)},
            "fieldConfig": {"defaults": {"unit": unit}, "overrides": []},
            "targets": [{"expr": expression, "refId": "A"}],
        }
        for number, (title, expression, unit) in enumerate(PANELS)
    ]
    variable = {"name": "source", "type": "datasource", "query": "prometheus", "label": "Prometheus"}
    return {
        "title": "latentzoom",
        "uid": "latentzoom",
        "schemaVersion": 39,
        "refresh": "30s",
        "time": {"from": "now-6h", "to": "now"},
        "templating": {"list": [variable]},
        "panels": panels,
    }
