"""Sections of autoencoders: ours, one of diffusers by its files, or a class of one's own."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from configs.section import Added, Positive, Section


class AutoencoderModel(Section):
    """Convolutional KL autoencoder (papers.md 1.1); the defaults are the published f16d32."""

    kind: Annotated[Literal["convolutional"], Added(before="convolutional")] = "convolutional"
    identity: Annotated[bool, Added(before=False)] = False
    """No network: latents are the pixels themselves, for diffusion in pixel space (`train_dit.model.kind: unet`)."""
    base_channels: Positive = 128
    channel_multipliers: Annotated[tuple[Positive, ...], Field(min_length=1)] = (1, 1, 2, 2, 4)
    blocks_per_level: Positive = 2
    z_channels: Positive = 32
    attention_levels: tuple[int, ...] = (4,)
    decoder_attention: bool = True
    norm_groups: Positive = 32
    patch_size: Annotated[Positive, Added(before=1)] = 1
    """Side in pixels of the squares that are channels of one cell of level 0: no convolution at full resolution."""
    linear_path: Annotated[bool, Added(before=False)] = False
    """A linear map from each cell's pixels to its moments and another back, beside the networks, which learn what it
    leaves over (after DC-AE, arXiv 2410.10733). Short trainings gain most."""

    @property
    def downscale(self) -> int:
        """Pixels per latent cell along a side."""
        return 1 if self.identity else self.patch_size * 2 ** (len(self.channel_multipliers) - 1)

    @model_validator(mode="after")
    def _widths_fit(self) -> AutoencoderModel:
        if self.identity and self.z_channels != 3:
            raise ValueError(f"z_channels is {self.z_channels} but identity is true: pixels have 3")
        for multiplier in self.channel_multipliers:
            width = self.base_channels * multiplier
            if width % self.norm_groups:
                raise ValueError(
                    f"norm_groups {self.norm_groups} does not divide a level's width {width} "
                    f"(base_channels {self.base_channels} × {multiplier}): choose a divisor"
                )
        levels = len(self.channel_multipliers)
        for level in self.attention_levels:
            if not 0 <= level < levels:
                raise ValueError(f"attention_levels names level {level}; there are levels 0 to {levels - 1}")
        return self


class _Theirs(Section):
    """What others built: the recipe tells the sizes of its latents, which ours follow from its own."""

    channels: Positive
    """Of its latents; with `downscale`, what every other section is told before any file is opened."""
    downscale: Positive

    @property
    def identity(self) -> bool:
        return False

    @property
    def z_channels(self) -> int:
        return self.channels


class DiffusersModel(_Theirs):
    """An autoencoder of diffusers, from its own files (`docs/tokenizers.md`), in their own scale: their factors are
    shown and not used, because statistics are measured here."""

    kind: Literal["diffusers"]
    class_name: Literal["AutoencoderKL", "AutoencoderKLFlux2", "AutoencoderDC", "AutoencoderRAE"]
    location: str
    """A folder with `config.json` and safetensors (in shards or not), or such a file beside its `config.json`: local,
    any fsspec URL, or `hf://organisation/repository[/folder][@revision]`."""


class PythonModel(_Theirs):
    """A class in a file of one's own (`docs/tokenizers.md`): a `torch.nn.Module` with `encode`, `decode` and
    `latent_shape`, used as it is. Its code runs, so only a recipe of one's own may name it."""

    kind: Literal["python"]
    file: str
    """Where it lies on every machine that runs a stage."""
    class_name: str
    trusted: Literal[True]
    weights: str | None = None
    """Path, fsspec URL or hub name of safetensors under the module's own names; None has what the class makes."""
    options: dict[str, Any] = Field(default_factory=dict)
    """What the class is built with."""

    @model_validator(mode="before")
    @classmethod
    def _is_trusted(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("trusted") is not True:
            raise ValueError(
                f"kind is python, so the code of {values.get('file', 'a file')} would run, but trusted is "
                f"{values.get('trusted', 'not set')}: read that file, then say trusted: true in a recipe of your own"
            )
        return values

    @model_validator(mode="after")
    def _is_local(self) -> PythonModel:
        if "://" in self.file:
            raise ValueError(f"file is {self.file}: code is never fetched; save it and give its path")
        return self


TRAINABLE = ("AutoencoderKL",)
"""Classes of diffusers that our objective trains further: those with a posterior and known last layers."""


def _kind(value: Any) -> str:
    kind = value.get("kind", "convolutional") if isinstance(value, dict) else getattr(value, "kind", "convolutional")
    return str(kind)


Tokenizer = Annotated[
    Annotated[AutoencoderModel, Tag("convolutional")]
    | Annotated[DiffusersModel, Tag("diffusers")]
    | Annotated[PythonModel, Tag("python")],
    Discriminator(_kind),
]
