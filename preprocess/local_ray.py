"""A Ray that one command starts for itself on this machine: nobody else may reach it."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def loopback_only() -> Iterator[None]:
    """What `ray.init(address="local")` starts within the block listens on 127.0.0.1, not on every address.

    Ray has this for Windows and macOS, where it keeps firewalls from asking, and one setting for it. It decides which
    address a node calls its own, so a Ray that other machines are to join must be started outside of the block.

    Its token is looked up anew: a process remembers the first it used, of a cluster that it spoke with before, and the
    one it starts now would refuse it.
    """
    from ray._private import ray_constants
    from ray._raylet import AuthenticationTokenLoader  # type: ignore[attr-defined]

    AuthenticationTokenLoader.instance().reset_cache()
    logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)  # that there is a token is no warning

    name = ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR
    before, was_enabled = os.environ.get(name), ray_constants.ENABLE_RAY_CLUSTER
    os.environ[name], ray_constants.ENABLE_RAY_CLUSTER = "0", False  # for the processes that start, and for this one
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = was_enabled
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
