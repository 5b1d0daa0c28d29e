"""From a recipe's `data.source` to the object that reads it."""

from __future__ import annotations

from configs.schema import Data, FashionMnist, ImageFolder
from tasks.sources.base import Source
from tasks.sources.fashion_mnist import FashionMnistSource
from tasks.sources.folder import FolderSource


def open_source(data: Data) -> Source:
    """The source a recipe names. Cheap: nothing is read or fetched yet."""
    section = data.source
    match section:
        case FashionMnist():
            return FashionMnistSource(section.path)
        case ImageFolder():
            return FolderSource(section.path, section.test_path)
