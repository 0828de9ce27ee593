"""Which code made a run: commit, lock, versions."""

from __future__ import annotations

import functools
import hashlib
import json
import sys
from importlib import metadata
from pathlib import Path

from training.commit import source_commit

_LOCKS = ("requirements.lock", "requirements.txt", "uv.lock")


@functools.lru_cache(maxsize=1)
def provenance() -> dict[str, str]:
    """Tags that say which code made a run: git commit (and whether the tree was dirty), lock hash, versions."""
    root = Path(__file__).resolve().parents[2]
    commit = source_commit()
    lock = next((root / name for name in _LOCKS if (root / name).is_file()), None)
    return {
        "mlflow.source.name": Path(sys.argv[0]).name or "python",
        "mlflow.source.type": "LOCAL",
        **({"mlflow.source.git.commit": commit.removesuffix("+dirty")} if commit else {}),
        "git_commit": commit or f"none (installed package {_version('latentzoom')})",
        "lock_sha256": hashlib.sha256(lock.read_bytes()).hexdigest() if lock else installed_digest(),
        "versions": json.dumps(versions()),
    }


def versions() -> dict[str, str]:
    """Versions of the packages that decide numbers."""
    names = ("latentzoom", "torch", "diffusers", "numpy", "scipy", "pillow", "safetensors", "mlflow", "ray")
    return {"python": ".".join(map(str, sys.version_info[:3])), **{name: _version(name) for name in names}}


def installed_digest() -> str:
    """SHA-256 over all installed distributions: the lock hash of an environment made without a lock file."""
    names = sorted({f"{d.metadata['Name']}=={d.version}".lower() for d in metadata.distributions()})
    return hashlib.sha256("\n".join(names).encode()).hexdigest()


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"
