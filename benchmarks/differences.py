"""What remains different from the authors' pipelines, measured: latents in float16, and EXIF orientation.

    python -m benchmarks.differences [--latents FILE]

Latents: a small tokenizer, trained here on photographs, decodes latents as they are and as they are stored. Of the
authors' latents (files in tools/latent_demos of LightningDiT's repository), how much of them rounding takes.
Orientation: scikit-image's photographs, turned as cameras' tags say, against the same pixels as they lie in the file.
"""

from __future__ import annotations

import argparse
import io
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from benchmarks.tokenizers.data import PHOTOGRAPHS, SIDE, SOURCES, TEST, photograph, put_shards
from benchmarks.tokenizers.trials import Trial
from configs import load_recipe
from tasks import train_vavae
from tasks.data.crops import Crop
from tasks.data.decode import decode
from tasks.data.images import images
from tasks.data.pixels import peak_signal_to_noise, to_pixels, to_tensor
from tasks.networks import load_foundation, trained_autoencoder
from tasks.randomness import ImageNumbers

TURNED = {3: "upside down", 6: "a quarter to the right", 8: "a quarter to the left"}
"""The orientations that cameras write, by the tag's value."""
_TAG = 0x0112


def rounding(path: Path) -> str:
    """Of latents in a torch file, (N, C) or more."""
    latents = torch.load(path, map_location="cpu", weights_only=True).double()
    error = (latents.half().double() - latents).std() / latents.std()
    return f"{path.name}: float16 takes {error:.1e} of the latents' deviation ({-20 * torch.log10(error):.1f} dB)"


@torch.inference_mode()
def float16_latents(root: str, seed: int = 0) -> str:
    """PSNR of test images from posterior samples, with and without rounding, and what that does to levels."""
    shards = put_shards(root, "photographs", SOURCES["photographs"])
    with torch.inference_mode(False), torch.enable_grad():
        tokenizer = Trial(root, "photographs", "plain", seed, 2.0).train(train_vavae.STAGE, {})
    network, found = trained_autoencoder(tokenizer), list[np.ndarray]()
    for number, (_, pixels) in enumerate(images(shards, "test", SIDE, TEST)):
        posterior = network.encode(to_tensor(pixels))
        positions = np.arange(len(pixels)) + number * 10_000
        z = posterior.sample(ImageNumbers(seed, "posterior").normal(positions, posterior.mean.shape[1:]))
        whole, stored = (to_pixels(network.decode(each)) for each in (z, z.half().float()))
        psnr = [peak_signal_to_noise(pixels, each) for each in (whole, stored)]
        apart = np.abs(whole.astype(int) - stored).reshape(len(pixels), -1)
        found.append(np.stack([*psnr, psnr[1] - psnr[0], (apart > 0).mean(axis=1), apart.max(axis=1)]))
    whole, stored, gap, changed, most = np.concatenate(found, axis=1)
    return (
        f"{len(whole):,} images, PSNR {whole.mean():.4f} dB from float32 latents, {stored.mean():.4f} dB from "
        f"float16; of one image at most {np.abs(gap).max():.4f} dB apart; {changed.mean():.2%} of levels differ, by "
        f"{most.max():.0f} at most"
    )


@torch.inference_mode()
def orientation(size: int = 256) -> Iterator[str]:
    """PSNR and cosine of features between a turned photograph and its pixels as they lie in the file."""
    section = load_recipe("demo").foundation
    assert section is not None
    network = load_foundation(section.model_copy(update={"input_size": 224}))

    def features(crops: list[np.ndarray]) -> Tensor:
        return network(to_tensor(np.stack(crops))).mean(dim=(2, 3))

    upright = [Image.fromarray(photograph(name)) for name in PHOTOGRAPHS]
    among = features([Crop(size)(each) for each in upright])
    cosines = F.cosine_similarity(among[:, None], among[None], dim=2)
    apart = (cosines.sum() - len(upright)) / (len(upright) * (len(upright) - 1))
    yield f"two photographs: cosine of features {apart:.3f}"
    for value, words in TURNED.items():
        files = [_tagged(each, value) for each in upright]
        ours = [Crop(size)(decode(each)) for each in files]
        theirs = [Crop(size)(Image.open(io.BytesIO(each)).convert("RGB")) for each in files]
        psnr = peak_signal_to_noise(np.stack(ours), np.stack(theirs))
        cosine = F.cosine_similarity(features(ours), features(theirs))
        yield f"orientation {value} ({words}): PSNR {psnr.mean():.1f} dB, cosine of features {cosine.mean():.3f}"


def _tagged(image: Image.Image, value: int) -> bytes:
    tags, buffer = Image.Exif(), io.BytesIO()
    tags[_TAG] = value
    image.save(buffer, "PNG", exif=tags)
    return buffer.getvalue()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--latents", type=Path, nargs="*", default=[], help="torch files of latents")
    for path in parser.parse_args().latents:
        print(rounding(path))
    for line in orientation():
        print(line)
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    with tempfile.TemporaryDirectory() as root:
        print(float16_latents(f"file://{root}"))


if __name__ == "__main__":
    main()
