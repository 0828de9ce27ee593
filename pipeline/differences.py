"""What differs between two nested settings, in words."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any


def differences(earlier: Any, now: Any, name: str = "") -> Iterator[str]:
    """ "a.b was 1, now 2" for every leaf of nested dictionaries that differs. Leaves are JSON values."""
    if earlier == now:
        return
    if isinstance(earlier, dict) and isinstance(now, dict):
        for key in sorted(earlier.keys() | now.keys()):
            yield from differences(earlier.get(key), now.get(key), f"{name}.{key}" if name else key)
    elif earlier is None:
        yield f"{name} is now {_short(now)}"
    else:
        yield f"{name or 'settings'} was {_short(earlier)}, now {_short(now)}"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else text[:37] + "..."
