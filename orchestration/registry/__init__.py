"""Registered models: versions, aliases, promotion, cards, lineage, and the cache of their bundles.

`orchestration.registry.load("models:/NAME@champion")` is for everybody's programs, as are `resolve`, `register`,
`promote` and `rollback`; they are imported when they are asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from orchestration.registry.versions import Version as Version
    from orchestration.registry.versions import get_version as get_version
    from orchestration.registry.versions import load as load
    from orchestration.registry.versions import promote as promote
    from orchestration.registry.versions import register as register
    from orchestration.registry.versions import resolve as resolve
    from orchestration.registry.versions import rollback as rollback

_OF_VERSIONS = ("Version", "get_version", "load", "promote", "register", "resolve", "rollback")


def __getattr__(name: str) -> Any:
    if name not in _OF_VERSIONS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from orchestration.registry import versions

    return getattr(versions, name)
