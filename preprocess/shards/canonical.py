"""One text for one value: what is hashed to say whether two plans, receipts or manifests are the same."""

from __future__ import annotations

import json
from typing import Any


def canonical_json(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()
