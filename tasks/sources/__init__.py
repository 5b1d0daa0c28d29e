"""Where labelled images come from: one module per kind of source, all behind :class:`base.Source`."""

from tasks.sources.base import Listing, Reader, Refusal, Source, listing_table
from tasks.sources.registry import open_source

__all__ = ["Listing", "Reader", "Refusal", "Source", "listing_table", "open_source"]
