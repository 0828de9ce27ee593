"""Images that cannot become samples, and why."""

from __future__ import annotations


class Reject(Exception):
    """An image that cannot be used. `reason` is a short stable word, `detail` says more."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
        self.detail = detail
