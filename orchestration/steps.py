"""A chain of steps that can be killed anywhere and continues: finished steps are remembered by content.

A step's key is the hash of its settings and of the keys of the steps it builds on. Its result (plain JSON) is written
last, under `WORK/steps/NAME.json`; a step whose key has changed is stale and runs again.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pipeline import storage

Result = dict[str, Any]
State = Literal["done", "stale", "missing"]


@dataclass(frozen=True, kw_only=True)
class Step:
    """One step. settings: what decides its outcome, beside the steps named in `after`. run: (results so far by name) →
    its own result, plain JSON. A step must continue or redo half-done work of its own when it is run again."""

    name: str
    settings: Any
    run: Callable[[dict[str, Result]], Result]
    after: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Status:
    """What is known of a step before it runs. reason: why it is not done."""

    name: str
    key: str
    state: State
    reason: str
    result: Result | None


def statuses(work: str, steps: Sequence[Step]) -> list[Status]:
    """For each step whether it is done, stale or missing, and why."""
    found: dict[str, Status] = {}
    for step in steps:
        keys = [found[name].key for name in step.after]
        key = storage.sha256_bytes(json.dumps([step.settings, keys], sort_keys=True, default=str).encode())
        url = _url(work, step.name)
        stored = storage.read_json(url) if storage.exists(url) else None
        state, reason = _judge(stored, key, step, keys)
        found[step.name] = Status(
            name=step.name,
            key=key,
            state=state,
            reason=reason,
            result=stored["result"] if stored and state == "done" else None,
        )
    return list(found.values())


def _judge(stored: dict[str, Any] | None, key: str, step: Step, keys: list[str]) -> tuple[State, str]:
    if stored is None:
        return "missing", "has not finished yet"
    if stored["key"] == key:
        return "done", ""
    changed = [name for name, old, new in zip(step.after, stored["after_keys"], keys) if old != new]
    if changed:
        return "stale", f"{', '.join(changed)} changed"
    return "stale", "its settings changed"


def run_steps(
    work: str,
    steps: Sequence[Step],
    *,
    announce: Callable[[Status, int, int], None] = lambda status, index, num: None,
) -> dict[str, Result]:
    """Run what is not done, in order. Results carry `seconds`, summed over interrupted attempts."""
    results: dict[str, Result] = {}
    known = statuses(work, steps)
    for index, (step, status) in enumerate(zip(steps, known), start=1):
        announce(status, index, len(steps))
        if status.state == "done":
            assert status.result is not None
            results[step.name] = status.result
            continue
        start = time.monotonic()
        before = _spent(work, step.name, status.key)
        try:
            result = step.run(results)
        except BaseException:
            seconds = before + time.monotonic() - start
            storage.write_json(_attempt_url(work, step.name), {"key": status.key, "seconds": seconds})
            raise
        result = {**result, "seconds": round(before + time.monotonic() - start, 1)}
        keys = [other.key for name in step.after for other in known if other.name == name]
        storage.write_json(_url(work, step.name), {"key": status.key, "after_keys": keys, "result": result})
        results[step.name] = result
    return results


def _spent(work: str, name: str, key: str) -> float:
    """Seconds of earlier attempts that were interrupted (not of those that were killed outright)."""
    url = _attempt_url(work, name)
    stored = storage.read_json(url) if storage.exists(url) else {}
    return float(stored["seconds"]) if stored.get("key") == key else 0.0


def _url(work: str, name: str) -> str:
    return storage.join(work, "steps", f"{name}.json")


def _attempt_url(work: str, name: str) -> str:
    return storage.join(work, "steps", f"{name}.attempt.json")
