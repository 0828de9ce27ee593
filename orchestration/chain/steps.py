"""A chain of steps that can be killed anywhere and continues: finished steps are remembered by content.

A step's key is the hash of its settings and of the keys of the steps it builds on. Its result (plain JSON) is written
last, under `WORK/steps/NAME.json`; a step whose key has changed is stale and runs again.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from orchestration.tracking.outages import patiently
from pipeline import storage
from pipeline.differences import differences
from pipeline.errors import UserError

Result = dict[str, Any]
State = Literal["done", "stale", "missing"]
UNFINISHED = "has not finished yet"
"""Why a step runs that has left no result."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """One step. settings: what decides its outcome, beside the steps named in `after`. run: (results so far by name) →
    its own result, plain JSON. A step must continue or redo half-done work of its own when it is run again.
    A result may name URLs under "outputs": the step counts as done only while they exist."""

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


def step_keys(steps: Sequence[Step]) -> dict[str, str]:
    """The key of every step, by name."""
    keys: dict[str, str] = {}
    for step in steps:
        content = [step.settings, [keys[name] for name in step.after]]
        keys[step.name] = storage.sha256_bytes(json.dumps(content, sort_keys=True, default=str).encode())
    return keys


def statuses(work: str, steps: Sequence[Step]) -> list[Status]:
    """For each step whether it is done, stale or missing, and why."""
    keys = step_keys(steps)
    found = []
    for step in steps:
        url = _url(work, step.name)
        stored = storage.read_json(url) if storage.exists(url) else None
        state, reason = _judge(stored, step, keys)
        result = stored["result"] if stored and state == "done" else None
        found.append(Status(name=step.name, key=keys[step.name], state=state, reason=reason, result=result))
    return found


def _judge(stored: dict[str, Any] | None, step: Step, keys: dict[str, str]) -> tuple[State, str]:
    if stored is None:
        return "missing", UNFINISHED
    if stored["key"] == keys[step.name]:
        gone = [url for url in stored["result"].get("outputs", ()) if not storage.exists(url)]
        return ("missing", f"its result {gone[0]} is gone") if gone else ("done", "")
    before = dict(zip(stored.get("after", step.after), stored["after_keys"]))
    changed = [name for name in step.after if before.get(name) != keys[name]]
    if changed:
        return "stale", f"{', '.join(changed)} changed"
    if "settings" in stored:
        changed = list(differences(stored["settings"], json.loads(json.dumps(step.settings, default=str))))
        if changed:
            more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
            return "stale", f"{'; '.join(changed[:3])}{more}"
    return "stale", "its settings changed"


def run_steps(
    work: str,
    steps: Sequence[Step],
    *,
    announce: Callable[[Status, int, int], None] = lambda status, index, num: None,
    retries: int = 0,
    check: Callable[[], None] = lambda: None,
) -> dict[str, Result]:
    """Run what is not done, in order. Results carry `seconds`, summed over interrupted attempts.

    retries: further attempts of a step that fails for a reason that a user cannot mend; it continues where it was. An
    outage of a store or the tracking server is none of these: it is waited for.
    check: called before every step and before its result is written; may raise to stop the chain.
    """
    results: dict[str, Result] = {}
    known = statuses(work, steps)
    for index, (step, status) in enumerate(zip(steps, known), start=1):
        announce(status, index, len(steps))
        if status.state == "done":
            assert status.result is not None
            results[step.name] = status.result
            continue
        check()
        result = _attempts(work, step, status.key, results, retries)
        check()
        keys = [other.key for name in step.after for other in known if other.name == name]
        record = {
            "key": status.key,
            "after": list(step.after),
            "after_keys": keys,
            "settings": json.loads(json.dumps(step.settings, default=str)),
            "result": result,
        }
        patiently(partial(storage.write_json, _url(work, step.name), record), step.name)
        results[step.name] = result
    return results


def _attempts(work: str, step: Step, key: str, results: dict[str, Result], retries: int) -> Result:
    for attempt in range(retries + 1):
        start = time.monotonic()
        before = patiently(partial(_spent, work, step.name, key), step.name)
        try:
            result = patiently(lambda: step.run(results), step.name)
            return {**result, "seconds": round(before + time.monotonic() - start, 1)}
        except BaseException as error:
            seconds = before + time.monotonic() - start
            with contextlib.suppress(UserError, OSError):  # the first error is the one to show
                storage.write_json(_attempt_url(work, step.name), {"key": key, "seconds": seconds})
            if attempt == retries or isinstance(error, UserError) or not isinstance(error, Exception):
                raise
            print(f"{step.name} failed ({type(error).__name__}: {error}); trying again", file=sys.stderr, flush=True)
    raise AssertionError("unreachable")


def _spent(work: str, name: str, key: str) -> float:
    """Seconds of earlier attempts that were interrupted (not of those that were killed outright)."""
    url = _attempt_url(work, name)
    stored = storage.read_json(url) if storage.exists(url) else {}
    return float(stored["seconds"]) if stored.get("key") == key else 0.0


def _url(work: str, name: str) -> str:
    return storage.join(work, "steps", f"{name}.json")


def _attempt_url(work: str, name: str) -> str:
    return storage.join(work, "steps", f"{name}.attempt.json")
