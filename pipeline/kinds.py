"""What was left out or found wrong, by kind and number, in words. Imports nothing heavy."""

from __future__ import annotations

import re
from collections.abc import Mapping

_ONE = re.compile(r"(?<=thumbnail)s$|(?<=linked folder)s$|(?<=r file)s$|(?<=l file)s$|(?<=e name)s$")


def said(left_out: Mapping[str, int]) -> str:
    """ "12 NAS thumbnails, 7 .heic", most first; of many kinds the first ten and the rest together."""
    ordered = sorted(left_out.items(), key=lambda item: (-item[1], item[0]))
    parts = [f"{number} {_ONE.sub('', kind) if number == 1 else kind}" for kind, number in ordered[:10]]
    if rest := ordered[10:]:
        parts.append(f"{sum(number for _, number in rest)} of {len(rest)} other kinds")
    return ", ".join(parts)
