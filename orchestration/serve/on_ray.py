"""The same application on Ray Serve: replicas with a GPU or CPUs each, behind Serve's proxies.

`build` is what a RayService's `import_path` names (orchestration.serve.on_ray:build). Replicas share the pictures by
their folder; each holds the features of those that it is asked for.
"""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from typing import Any

from orchestration.serve.settings import Settings
from pipeline.errors import UserError

NAME = "latentzoom"
MAX_ONGOING, MAX_QUEUED = 64, 512
"""Requests that a replica works on or holds, and requests that wait for a replica; others are answered 503."""


@dataclass(frozen=True, kw_only=True)
class Replicas:
    """min_num, max_num: between which Serve scales by load."""

    min_num: int = 1
    max_num: int = 1
    num_gpus: float = 0.0
    num_cpus: float = 1.0

    def check(self, settings: Settings) -> None:
        if not 1 <= self.min_num <= self.max_num:
            raise UserError(
                f"--replicas {self.min_num}:{self.max_num} is not allowed; use NUM or LEAST:MOST, 1 or more"
            )
        if self.max_num > 1 and not settings.keep:
            raise UserError(f"{self.max_num} replicas need --keep FOLDER on storage that every node sees")


def application(settings: Settings, replicas: Replicas, token: str) -> Any:
    """A Serve application. token: what opens it, never empty: proxies listen for others than this machine."""
    from ray import serve

    replicas.check(settings)
    if not token:
        raise UserError(
            "a server on a cluster needs a token: put LATENTZOOM_SERVE_TOKEN into the cluster's own environment "
            "(the chart's secret, or before `ray start`)"
        )

    def build_app() -> Any:  # in each replica
        from orchestration.serve.access import Access
        from orchestration.serve.app import make_app

        return make_app(settings.make_server(), Access(token))

    deployment: Any = serve.deployment(
        serve.ingress(build_app)(),
        name=NAME,
        ray_actor_options={"num_gpus": replicas.num_gpus, "num_cpus": replicas.num_cpus},
        autoscaling_config={"min_replicas": replicas.min_num, "max_replicas": replicas.max_num,
                            "target_ongoing_requests": 8},
        max_ongoing_requests=MAX_ONGOING,
        max_queued_requests=MAX_QUEUED,
        health_check_period_s=10,
        health_check_timeout_s=60,
        graceful_shutdown_timeout_s=30,
    )  # fmt: skip
    return deployment.bind()


def build(args: dict[str, Any]) -> Any:
    """For RayService and `serve run`: the fields of `Settings` and `Replicas`; the token is in the replicas' own
    environment, LATENTZOOM_SERVE_TOKEN."""
    fields = {kind: {field.name for field in dataclasses.fields(kind)} for kind in (Settings, Replicas)}
    known = fields[Settings] | fields[Replicas]
    if unknown := set(args) - known:
        raise UserError(f"args {', '.join(sorted(unknown))}: not known; there are {', '.join(sorted(known))}")
    given: dict[Any, dict[str, Any]] = {kind: {n: v for n, v in args.items() if n in fields[kind]} for kind in fields}
    given[Settings]["models"] = tuple(given[Settings].get("models", ()))
    token = os.environ.get("LATENTZOOM_SERVE_TOKEN", "")
    return application(Settings(**given[Settings]), Replicas(**given[Replicas]), token)
