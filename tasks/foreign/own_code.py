"""A tokenizer of one's own: a class in a file that one's own recipe names, and how its code comes to run.

Code runs only where the recipe that a person gave says `trusted: true` (`infra/trust.py`), and only the bytes that were
hashed.
"""

from __future__ import annotations

import hashlib
import types
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from configs.autoencoders import PythonModel
from configs.errors import UserError, brief
from infra.trust import is_trusted
from infra.weights import load_tensors
from models.image_autoencoder import ImageAutoencoder, certain
from models.posterior import DiagonalGaussian
from models.tokenizer_kit import try_out

_METHODS = ("encode", "decode", "latent_shape")


def content(section: PythonModel) -> bytes:
    """The file. Raises UserError where it is not there."""
    try:
        return Path(section.file).expanduser().read_bytes()
    except OSError as error:
        raise UserError(
            f"train_vavae.model.file {section.file}: cannot be read ({error.strerror}); it has to lie there on every "
            "machine that runs a stage"
        ) from None


def digest(section: PythonModel) -> str:
    """SHA-256 of the file, which is part of the fingerprint."""
    return hashlib.sha256(content(section)).hexdigest()


class OwnAutoencoder(ImageAutoencoder):
    """Somebody's class, `.network`, as a tokenizer."""

    def __init__(self, section: PythonModel, network: Any) -> None:
        super().__init__()
        self.network = network
        self.downscale, self.embed_dim = section.downscale, section.channels

    def encode(self, x_BCHW: Tensor) -> DiagonalGaussian:
        """A mean alone is certain; (mean, standard deviation) is a posterior."""
        found = self.network.encode(x_BCHW)
        if isinstance(found, tuple):
            mean, deviation = found
            return DiagonalGaussian(torch.cat([mean, 2 * deviation.clamp(min=1e-6).log()], dim=1))
        return certain(found)

    def decode(self, z_BCHW: Tensor) -> Tensor:
        image: Tensor = self.network.decode(z_BCHW)
        return image

    @property
    def kept(self) -> nn.Module:
        module: nn.Module = self.network
        return module


def build(section: PythonModel, expected: str | None = None) -> OwnAutoencoder:
    """The class of a trusted section, built from its options.

    expected: hash that the file must have; None takes what is there.

    Raises:
        UserError: the file is not trusted in this process, is another than expected, or breaks the contract.
    """
    if not is_trusted(section.file, section.class_name):
        raise UserError(
            f"{section.file} is code, and no recipe of this run names it: run it by a recipe of your own with "
            "train_vavae.model.trusted: true"
        )
    source = content(section)
    found = hashlib.sha256(source).hexdigest()
    if expected is not None and found != expected:
        raise UserError(
            f"train_vavae.model.file {section.file} has changed since its artifact was made (SHA-256 {expected[:12]}…, "
            f"now {found[:12]}…): run again, which makes the artifact anew"
        )
    where = f"train_vavae.model {section.file}:{section.class_name}"
    module = types.ModuleType(f"own_tokenizer_{found[:12]}")
    module.__file__ = section.file
    try:
        exec(compile(source, section.file, "exec"), module.__dict__)
        network = getattr(module, section.class_name)(**section.options)
    except Exception as error:  # whatever somebody's own code raises
        said = brief(error, 160)
        raise UserError(f"{where}: {type(error).__name__}: {said}") from error
    if not isinstance(network, nn.Module):
        raise UserError(f"{where}: expected a torch.nn.Module, found {type(network).__name__}")
    lacking = [name for name in _METHODS if not callable(getattr(network, name, None))]
    if lacking:
        raise UserError(f"{where}: has no {' and no '.join(lacking)}; the contract is in docs/tokenizers.md")
    return OwnAutoencoder(section, network)


def load(section: PythonModel, network: ImageAutoencoder) -> None:
    """Load the weights that the section names, every tensor or none. Raises UserError where they do not fit."""
    if section.weights is None:
        return
    try:
        network.kept.load_state_dict(load_tensors(section.weights, section.class_name))
    except RuntimeError as error:
        said = brief(error, 300)
        raise UserError(f"train_vavae.model.weights {section.weights}: {said}") from None


def check(section: PythonModel, side: int) -> None:
    """Try the contract on drawn images of side × side pixels, before anything runs.

    Raises:
        UserError: the first promise that is not kept, in one line.
    """
    network = build(section)
    load(section, network)
    name = f"train_vavae.model {section.file}:{section.class_name}"
    wanted, found = (section.channels, side // section.downscale), tuple(network.network.latent_shape(side))
    if found != wanted:
        raise UserError(
            f"{name}: latent_shape({side}) is {found}, but channels and downscale of the recipe make it {wanted}: make "
            "them agree"
        )
    broken = next((each for each in try_out(network.eval(), side) if not each.kept), None)
    if broken is not None:
        raise UserError(f"{name}: breaks its contract ({broken.promise}): {broken.seen}")
