"""Images that cannot become samples: why, and how many are too many."""

from __future__ import annotations

from pipeline.errors import UserError


class Reject(Exception):
    """An image that cannot be used. `reason` is a short stable word, `detail` says more."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
        self.detail = detail


def check_ceiling(rejected: int, num_images: int, max_fraction: float, example: dict[str, str]) -> None:
    """Stop the run when rejected images pass the ceiling."""
    if rejected > max_fraction * num_images:
        raise UserError(
            f"{rejected} of {num_images} images rejected, more than --max-reject-fraction {max_fraction:g}; "
            f"the last: {example['image']} ({example['reason']} {example['detail']}); look at the source or raise it"
        )
