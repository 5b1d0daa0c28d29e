"""Where labelled images come from: one module per kind of source, all behind :class:`base.Source`."""

from tasks.sources.account import Account
from tasks.sources.base import Listing, Reader, Refusal, ScannedSource, Source
from tasks.sources.looked import listing_of, one_look
from tasks.sources.registry import open_source

__all__ = [
    "Account",
    "Listing",
    "Reader",
    "Refusal",
    "ScannedSource",
    "Source",
    "listing_of",
    "one_look",
    "open_source",
]
