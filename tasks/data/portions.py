"""Portions in which stages work. A plan counts with them, so this imports nothing."""

from __future__ import annotations

SHARD_ROWS_PER_GROUP = 64
"""Images in a row group of a shard."""
SAMPLE_ROWS_PER_PART = 250
"""Images in a part of a sample, at least: a part is whole batches."""
SAMPLE_GRID_COLUMNS, SAMPLE_GRID_ROWS = 10, 8
"""Classes and images of each that a sample's picture shows."""
DECODED_AT_ONCE = 32
"""Images of a sample's batch that its decoder sees at once, at most: a decoder is wide where its network is not, and as
fast with so few."""
SCORED_AT_ONCE = 500
"""Images that an actor scores as one unit of work."""
SCORING_BATCH = 64
"""Images that scoring networks see at once; the last batch of a unit is filled up."""
RECONSTRUCTIONS_SHOWN, RECONSTRUCTION_ROWS = 40, 4
"""Images that a tokenizer's picture shows, above their reconstructions."""
CLASSIFIER_GRID = 4
"""Side in cells of what the classifier of class consistency pools to."""


def at_once(images: int, side: int) -> int:
    """How many of a batch of square images an autoencoder sees at once: all where they have up to 256 × 256 pixels, of
    larger ones fewer by their area, as its memory goes with that."""
    return max(1, images * 256**2 // max(side, 256) ** 2)
