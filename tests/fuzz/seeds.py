"""Whole small files of every kind that is read from outside: what damage starts from."""

from __future__ import annotations

import gzip
import io
import json
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image, features

from tests.helpers.odd_sources import jpeg, png, tar

REPOSITORY = Path(__file__).parents[2]
_FORMATS = ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "ICO", "TGA", "JPEG2000", "AVIF", "PCX", "SGI", "DDS")


@lru_cache
def images() -> list[bytes]:
    rng = np.random.default_rng(0)
    coloured = Image.fromarray(rng.integers(0, 256, (24, 20, 3), dtype=np.uint8))
    found = [_saved(coloured, kind) for kind in _FORMATS if kind != "AVIF" or features.check("avif")]
    found += [_saved(coloured.convert(mode), "PNG") for mode in ("L", "P", "RGBA", "LA", "1", "I;16")]
    found.append(_saved(coloured.convert("CMYK"), "JPEG"))
    found.append(_saved(coloured, "TIFF", compression="tiff_lzw"))
    found.append(_saved(coloured, "JPEG", progressive=True, exif=_exif()))
    found.append(_saved(coloured, "GIF", save_all=True, append_images=[coloured.rotate(90)]))
    return found


def _saved(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def _exif() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


@lru_cache
def webdatasets() -> list[bytes]:
    labelled = [
        (f"{n:06d}.{ext}", data) for n in range(4) for ext, data in (("jpg", jpeg(n)), ("cls", b"%d" % (n % 2)))
    ]
    described = [
        (f"a/{n:06d}.{ext}", data)
        for n in range(3)
        for ext, data in (("png", png(n)), ("json", json.dumps({"label": "cat", "meta": {"kind": n}}).encode()))
    ]
    return [tar(None, labelled), tar(None, described)]


@lru_cache
def nested_tars() -> list[bytes]:
    inner = [(f"n0{kind}.tar", tar(None, [(f"n0{kind}_{n}.JPEG", jpeg(n)) for n in range(2)])) for kind in range(2)]
    return [tar(None, inner)]


@lru_cache
def parquets() -> list[bytes]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    structs = [{"bytes": jpeg(n), "path": f"{n}.jpg"} for n in range(6)]
    features = {"info": {"features": {"label": {"names": ["cat", "dog"], "_type": "ClassLabel"}}}}
    metadata = {"huggingface": json.dumps(features)}
    hub = pa.table({"image": structs, "label": [0, 1] * 3}).replace_schema_metadata(metadata)
    plain = pa.table({"image": [jpeg(n) for n in range(6)], "label": ["a", "b"] * 3})
    coded = pa.table({"image": [png(n) for n in range(6)], "label": pa.array(["a", "b"] * 3).dictionary_encode()})
    found = []
    for table, options in (
        (hub, {}),
        (plain, {"compression": "zstd"}),
        (coded, {"compression": "none", "version": "1.0"}),
    ):
        sink = io.BytesIO()
        pq.write_table(table, sink, row_group_size=3, **options)
        found.append(sink.getvalue())
    return found


@lru_cache
def our_parquets() -> list[bytes]:
    """As stages write them: encoded images, and pixels as they are."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from tasks.data.images import image_table
    from tasks.data.tensors import WRITE_OPTIONS

    encoded = pa.table({"label": pa.array(range(6), pa.int32()), "image": [jpeg(n) for n in range(6)]})
    pixels = image_table(np.arange(6), np.arange(6), np.zeros((6, 8, 8, 3), np.uint8))
    found = []
    for table in (encoded, pixels):
        sink = io.BytesIO()
        pq.write_table(table, sink, row_group_size=3, **WRITE_OPTIONS)
        found.append(sink.getvalue())
    return found


@lru_cache
def csvs() -> list[bytes]:
    return [
        b"path,label\na.jpg,0\nb.jpg,1\nc.jpg,1\n",
        b'\xef\xbb\xbfpath,label,split,extra\r\n"a.jpg",cat,train,x\r\nsub/b.jpg,dog,test,"y, z"\r\n',
    ]


def label_lists() -> list[bytes]:
    return [b"ILSVRC_1.JPEG n01\nILSVRC_2.JPEG n02\n", b"n01\nn02\n", b"ILSVRC_1,n01\nILSVRC_2,n02\n"]


@lru_cache
def kits() -> list[bytes]:
    """ImageNet's development kit, of two classes."""
    from scipy.io import savemat

    synsets = np.zeros(2, dtype=[("ILSVRC2012_ID", "O"), ("WNID", "O")])
    for number, name in enumerate(("n02", "n01"), 1):
        synsets[number - 1] = (number, name)
    meta = io.BytesIO()
    savemat(meta, {"synsets": synsets})
    truth = "ILSVRC2012_validation_ground_truth.txt"
    whole = tar(None, [("kit/data/meta.mat", meta.getvalue()), (f"kit/data/{truth}", b"1\n2\n")])
    return [gzip.compress(whole, 1, mtime=0), whole]


@lru_cache
def recipes() -> list[bytes]:
    folder = REPOSITORY / "configs" / "recipes"
    return [(folder / f"{name}.yaml").read_bytes() for name in ("demo_tiny", "semvae_tiny", "lowdiff_tiny", "demo")]


@lru_cache
def clusters() -> list[bytes]:
    return [path.read_bytes() for path in sorted((REPOSITORY / "configs" / "clusters").glob("*.yaml"))]


@lru_cache
def races() -> list[bytes]:
    return [path.read_bytes() for path in sorted((REPOSITORY / "configs" / "races").glob("*.yaml"))]


def _network() -> dict[str, torch.Tensor]:
    """Names that tell a small LightningDiT, with tensors of few values."""
    from models.lightningdit import LightningDiT

    torch.manual_seed(0)
    model = LightningDiT(input_size=4, in_channels=4, num_classes=3, hidden_size=8, depth=1, num_heads=2, qk_norm=True)
    return model.state_dict()


@lru_cache
def safetensors() -> list[bytes]:
    from safetensors.torch import save

    weights = {name: value.contiguous().clone() for name, value in _network().items()}
    arguments = {"input_size": 4, "in_channels": 4, "num_classes": 3, "hidden_size": 8, "depth": 1, "num_heads": 2}
    facts = json.dumps({"kind": "lightningdit", "arguments": arguments | {"qk_norm": True}, "nesting": ["ema"]})
    ours = weights | {"statistics.texture.mean": torch.zeros(4), "statistics.texture.std": torch.ones(4)}
    return [save(weights), save(ours, {"format": "latentforge-model/1", "facts": facts})]


@lru_cache
def latents() -> list[bytes]:
    from safetensors.torch import save

    held = {"latents": torch.zeros(3, 4, 2, 2, dtype=torch.float16), "labels": torch.arange(3)}
    return [save(held), save(held | {"latents_flip": torch.zeros(3, 4, 2, 2, dtype=torch.float16)})]


@lru_cache
def latent_tars() -> list[bytes]:
    plain = tar(None, [("a/latents_0.safetensors", latents()[0]), ("a/latents_1.safetensors", latents()[1])])
    return [plain, gzip.compress(plain, 1, mtime=0)]


@lru_cache
def torch_networks() -> list[bytes]:
    from tests.helpers.published import omegaconf

    network = _network()
    told = {"opt": {"state": {}, "param_groups": []}, "step": 3, "scale": np.float64(0.5)}
    with omegaconf() as config:
        configured = {"state_dict": network, "config": config({"model": {"semantic_chans": 2}, "sizes": [1, 2]})}
        content = [network, {"model": network, "ema": network} | told, configured]
        return [_torch_saved(each, zipped) for each in content for zipped in (True, False)]


@lru_cache
def torch_statistics() -> list[bytes]:
    statistics = {"mean": torch.zeros(1, 4, 1, 1), "std": torch.ones(1, 4, 1, 1)}
    return [_torch_saved(statistics, zipped) for zipped in (True, False)]


def _torch_saved(content: object, zipped: bool) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, _use_new_zipfile_serialization=zipped)
    return buffer.getvalue()


@lru_cache
def npzs() -> list[bytes]:
    statistics, pictures = io.BytesIO(), io.BytesIO()
    np.savez(statistics, mu=np.zeros(4), sigma=np.eye(4), mu_s=np.zeros(3), sigma_s=np.eye(3), network=np.array("ab"))
    np.savez_compressed(pictures, arr_0=np.zeros((3, 8, 8, 3), np.uint8), arr_1=np.arange(3))
    return [statistics.getvalue(), pictures.getvalue()]


@lru_cache
def idx_files() -> list[bytes]:
    head = (0x0803).to_bytes(4, "big") + b"".join(n.to_bytes(4, "big") for n in (2, 28, 28))
    return [gzip.compress(head + bytes(2 * 28 * 28), 1, mtime=0)]


def idx_labels() -> bytes:
    return gzip.compress((0x0801).to_bytes(4, "big") + (2).to_bytes(4, "big") + bytes([3, 9]), 1, mtime=0)


@lru_cache
def manifests() -> list[bytes]:
    from infra.artifacts import Manifest
    from infra.storage import FileEntry

    files = tuple(FileEntry(f"train/part-{n:05d}.parquet", 10, "ab" * 32, 5) for n in range(2))
    whole = Manifest("shard", 1, "0" * 16, {}, {"data": {}}, {}, files, 10, {"source": {}}, {"psnr": 2.0}, 1.5, "2026")
    return [whole.to_json()]


@lru_cache
def receipts() -> list[bytes]:
    from infra.storage import FileEntry
    from tasks.data.receipts import Receipt

    return [Receipt(FileEntry("train/part-00000.parquet", 10, "ab" * 32, 5), "abc", {"rows": 5}).to_json().encode()]
