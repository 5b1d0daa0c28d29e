"""From a recipe's `data.source` to the object that reads it."""

from __future__ import annotations

from configs.data import CsvFile, Data, FashionMnist, ImageFolder, ImageNet, ParquetFiles, ReadyLatents, WebDataset
from configs.errors import UserError
from tasks.sources.base import Source
from tasks.sources.csv_file import CsvSource
from tasks.sources.fashion_mnist import FashionMnistSource
from tasks.sources.folder import FolderSource
from tasks.sources.imagenet import ImageNetSource
from tasks.sources.parquet import ParquetSource
from tasks.sources.webdataset import WebDatasetSource


def open_source(data: Data) -> Source:
    """The source a recipe names. Cheap: nothing is read or fetched yet."""
    section = data.source
    match section:
        case FashionMnist():
            return FashionMnistSource(section.path)
        case ImageFolder():
            return FolderSource(section.path, section.test_path, section.test_labels_path)
        case ImageNet():
            return ImageNetSource(section.path, section.test_path, section.test_labels_path)
        case WebDataset():
            return WebDatasetSource(section.path, section.test_path, section.image, section.label, section.first_label)
        case ParquetFiles():
            return ParquetSource(
                section.path, section.test_path, section.image_column, section.label_column, section.first_label
            )
        case CsvFile():
            return CsvSource(section.path, section.first_label)
        case ReadyLatents():
            raise UserError(f"data.source {section.path} holds latents (kind: latents) and no images to look at")
