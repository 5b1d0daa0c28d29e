"""Published sizes by name; imports nothing, so that a plan can count with them."""

from __future__ import annotations

SIZES: dict[str, dict[str, int]] = {
    "S": {"hidden_size": 384, "depth": 12, "num_heads": 6},
    "B": {"hidden_size": 768, "depth": 12, "num_heads": 12},
    "L": {"hidden_size": 1024, "depth": 24, "num_heads": 16},
    "XL": {"hidden_size": 1152, "depth": 28, "num_heads": 16},
    "1p0B": {"hidden_size": 1536, "depth": 24, "num_heads": 24},
    "1p6B": {"hidden_size": 1792, "depth": 28, "num_heads": 28},
}

AUGMENTATION_LABELS = 9
"""What a network is told of an augmented image (`models/augmentation.py`): two flips, scale, two of the rotation, two
of the squeeze and two of the shift."""


def kept_count(tokens: int, drop: float) -> int:
    """How many of an image's tokens are kept where a share `drop` is not; at least one."""
    return max(1, round(tokens * (1 - drop)))
