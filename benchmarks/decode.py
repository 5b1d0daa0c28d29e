"""Images/s that one core decodes and crops: JPEGs of ImageNet's sizes and weight, made from real photographs.

    python -m benchmarks.decode [--seconds 20]

The photographs of scikit-image are cut and scaled to 500 × 375 pixels and the like, and saved at the quality at which
they weigh about 110 kB. Each is decoded to RGB and cropped to 256 × 256 as stages `shard` and `encode` do it, in one
thread. Seconds are the process's own (CPU time), so that other work on the machine counts little. The last line is
one JSON object.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import time
from collections.abc import Iterator

import numpy as np
import skimage.data
from PIL import Image

from tasks.data.decode import decode, load

PHOTOGRAPHS = ("astronaut", "chelsea", "coffee", "rocket", "immunohistochemistry", "hubble_deep_field", "retina")
SIDES = ((500, 375), (375, 500), (500, 333), (640, 480))
"""Width and height; half of ImageNet's training images are 500 × 375."""
BYTES, SIZE = 110_000, 256


def jpegs() -> Iterator[bytes]:
    for name in PHOTOGRAPHS:
        whole = Image.fromarray(np.ascontiguousarray(getattr(skimage.data, name)()[..., :3]))
        for width, height in SIDES:
            scale = max(width / whole.width, height / whole.height)
            scaled = whole.resize(
                (round(whole.width * scale + 1), round(whole.height * scale + 1)), Image.Resampling.LANCZOS
            )
            yield min((saved(scaled.crop((0, 0, width, height)), quality) for quality in range(75, 100, 2)), key=_far)


def saved(image: Image.Image, quality: int) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def _far(data: bytes) -> int:
    return abs(len(data) - BYTES)


def rate(images: list[bytes], seconds: float, crop: bool) -> float:
    done, started = 0, time.process_time()
    while time.process_time() - started < seconds:
        for data in images:
            _ = load(data, SIZE) if crop else decode(data)
        done += len(images)
    return done / (time.process_time() - started)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--seconds", type=float, default=20.0, help="of CPU time for each measurement")
    chosen = options.parse_args()
    images = list(jpegs())
    rate(images, 1.0, True)  # warms up
    result = {
        "images": len(images),
        "mean_bytes": round(sum(map(len, images)) / len(images)),
        "decode_and_crop_per_core_second": round(rate(images, chosen.seconds, True), 1),
        "decode_per_core_second": round(rate(images, chosen.seconds, False), 1),
        "cores": os.cpu_count(),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
