"""Bytes of what the stages write: payload by the schemas, and what Parquet and safetensors add to it.

The additions were fitted to files of the pinned pyarrow; the tests hold whole artifacts to real ones.
"""

from __future__ import annotations

from configs.recipe import Recipe
from tasks.data.portions import SHARD_ROWS_PER_GROUP
from tasks.plan.data import Images
from tasks.plan.networks import Cost

SHARD_COLUMNS = 4
_STRING = 4  # length before every variable-sized value
_CHUNK = 150  # page header and footer entry of one column in one row group
_STATISTICS_LIMIT = 4_096  # pyarrow keeps no minimum and maximum of longer values
_FILE = 1_000  # magic, schema, footer
_TENSOR = 100  # a tensor's entry in a safetensors header
_FLOAT16, _FLOAT32, _LABEL, _CONTENT = 2, 4, 4, 8


def parts(rows: int, per_part: int) -> int:
    return -(-rows // per_part)


def shard_parts(images: Images, recipe: Recipe) -> int:
    per_part = recipe.shard.rows_per_shard
    return parts(images.train, per_part) + parts(images.test, per_part)


def shard_bytes(images: Images, recipe: Recipe) -> float:
    """`key, label, image, content` in groups of 64 rows, and two small tables."""
    row = images.mean_bytes + images.key_bytes + 2 * _STRING + _LABEL + _CONTENT
    group = SHARD_COLUMNS * _CHUNK
    if images.mean_bytes < _STATISTICS_LIMIT:
        group += 4 * round(images.mean_bytes)  # minimum and maximum, in the page and in the footer
    groups = parts(images.all, SHARD_ROWS_PER_GROUP)
    return images.all * row + groups * group + (shard_parts(images, recipe) + 2) * _FILE


def latent_columns(recipe: Recipe) -> dict[str, int]:
    """Bytes of one row in each tensor column, without its mirrored twin; none where latents are made in training."""
    if recipe.online_latents:
        return {}
    cells = recipe.latent_size**2
    columns = {"z": recipe.train_vavae.model.z_channels * cells * _FLOAT16}
    if recipe.train_semvae is not None:
        columns["s"] = recipe.train_semvae.model.channels * cells * _FLOAT16
    if recipe.encode.posterior == "moments":
        columns |= {f"{name}_std": size for name, size in columns.items()}
    if recipe.encode.align_features and recipe.foundation is not None:
        columns["f"] = recipe.foundation.feature_dim * cells * _FLOAT16
    return columns


def views(recipe: Recipe) -> int:
    return 2 if recipe.image.flips else 1


def latent_bytes(images: Images, recipe: Recipe) -> float:
    """`key, label` and the tensor columns of every view, float16 and uncompressed."""
    columns = latent_columns(recipe)
    row = views(recipe) * sum(columns.values()) + _LABEL + _STRING + images.key_bytes
    groups = parts(images.all, recipe.encode.rows_per_group)
    chunks = groups * (2 + views(recipe) * len(columns))
    return images.all * row + chunks * _CHUNK + shard_parts(images, recipe) * _FILE


def weights_bytes(network: Cost) -> float:
    """A state dict in float32 as safetensors."""
    return _FLOAT32 * network.values + _TENSOR * network.tensors


def pixels_bytes(rows: int, side: int) -> float:
    """`index, label` and uint8 pixels."""
    return rows * (3 * side**2 + 8 + _LABEL)


def sample_bytes(rows: int, side: int, files: int, groups: int, shown: int) -> float:
    """Parts of a sample before compression, and the grid of `shown` images."""
    image = 3 * side**2
    group = 2 * _CHUNK + (4 * image if image < _STATISTICS_LIMIT else 0)  # minimum and maximum, as in `shard_bytes`
    return pixels_bytes(rows, side) + files * _FILE + groups * group + shown * image
