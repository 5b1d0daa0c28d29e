"""The experiment's tables in Markdown: mean ± standard deviation over seeds, differences seed by seed."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean, stdev
from typing import Any

from benchmarks.tokenizers.trials import IMAGES

_TOKENIZER = {
    "psnr": "PSNR, dB",
    "align_cosine": "cosine to features",
    "align_distance_error": "distance-matrix error",
    "latent_probe": "probe, all cells",
    "latent_pooled_probe": "probe, mean cell",
    "density_variation": "density CV",
    "density_gini": "Gini",
    "density_entropy": "entropy",
    "channels_effective": "channels in use",
}
_NAMES = {"fashion": "Fashion-MNIST", "photographs": "photographs"}


def page(found: dict[str, Any]) -> str:
    """All tables of what was found."""
    rows, scale = found["tokenizers"], found["scale"]
    seeds = len({row["seed"] for row in rows})
    budget = ", ".join(f"{round(images * scale):,} images for `{name}`" for name, images in IMAGES.items())
    parts = [f"Budgets: {budget}; {seeds} seeds; mean ± standard deviation over seeds."]
    parts += ["### Alignment", _alignment(rows), "### Semantic VAE against PCA", _semantics(rows)]
    if found["diffusion"]:
        parts += ["### Diffusion on both latents", _diffusion(found["diffusion"])]
    seam = found["seam"]
    parts += [
        "### Tiles",
        f"The photograph `astronaut` (512 × 512) decoded in tiles of 128 pixels that share 32, by the first seed's "
        f"tokenizer without alignment: the worst edge shows by {seam['seam']:.2f} of 255 levels "
        f"({seam['seam_without_overlap']:.2f} without overlap). Off the edges too, tiles differ from one pass: by "
        f"{seam['mean_difference']:.2f} levels on average; tiled latents by {seam['latent_difference']:.3f} of their "
        "standard deviation.",
    ]
    return "\n\n".join(parts) + "\n"


def _alignment(rows: list[dict[str, Any]]) -> str:
    lines = [["", *_TOKENIZER.values()]]
    for data, title in _NAMES.items():
        plain, aligned = (
            [row for row in rows if (row["data"], row["variant"]) == (data, variant)]
            for variant in ("plain", "aligned")
        )
        for name, chosen in (("without", plain), ("aligned", aligned)):
            lines.append([f"{title}, {name}", *(spread([row[score] for row in chosen]) for score in _TOKENIZER)])
        gaps = {score: [b[score] - a[score] for a, b in zip(plain, aligned, strict=True)] for score in _TOKENIZER}
        lines.append([f"{title}, difference", *(spread(values, signed=True) for values in gaps.values())])
    return table(lines)


def _semantics(rows: list[dict[str, Any]]) -> str:
    scores = {
        "feature cosine": ("feature_cosine", "pca_feature_cosine"),
        "feature error": ("feature_error", "pca_feature_error"),
        "probe": ("semantic_pooled_probe", "pca_probe"),
    }
    lines = [["", *(f"{name}, {who}" for name in scores for who in ("Semantic VAE", "PCA")), "probe, all features"]]
    for data, title in _NAMES.items():
        chosen = [row for row in rows if row["data"] == data and "feature_cosine" in row]
        cells = [spread([row[score] for row in chosen]) for pair in scores.values() for score in pair]
        lines.append([title, *cells, spread([row["feature_probe"] for row in chosen])])
    return table(lines)


def _diffusion(rows: list[dict[str, Any]]) -> str:
    plain, aligned = ([row["frechet"] for row in rows if row["variant"] == variant] for variant in ("plain", "aligned"))
    gaps = [b - a for a, b in zip(plain, aligned, strict=True)]
    return table(
        [
            ["latents", "Fréchet distance (EfficientNet-Lite0)", "by seed"],
            ["without alignment", spread(plain), ", ".join(f"{value:.2f}" for value in plain)],
            ["aligned", spread(aligned), ", ".join(f"{value:.2f}" for value in aligned)],
            ["difference", spread(gaps, signed=True), ", ".join(f"{value:+.2f}" for value in gaps)],
        ]
    )


def spread(values: Sequence[float], signed: bool = False) -> str:
    """Mean ± standard deviation."""
    digits = 2 if max(abs(value) for value in values) >= 2 else 3
    deviation = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{mean(values):{'+' if signed else ''}.{digits}f}{deviation}"


def table(lines: list[list[str]]) -> str:
    """Markdown; the first line is the head."""
    rows = [f"| {' | '.join(line)} |" for line in lines]
    return "\n".join([rows[0], "|" + "---|" * len(lines[0]), *rows[1:]])
