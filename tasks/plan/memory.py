"""Memory of one GPU in a training, before anything runs: what is always there, and what each image of a micro-batch
adds. What frozen networks take in their passes is in `passes.py`.

Weights, gradients, moments and averages follow from the recipe. What a network keeps for its backward pass was counted
by torch itself, of small networks on a CPU (tests/tasks/plan/test_memory.py): the same tensors are kept on a GPU, but
for attention, whose kernels differ. It was **not measured** on one, and a figure that was replaces it by `MEASURED`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from configs.autoencoders import Tokenizer
from configs.compute import TrainCompute
from configs.diffusion import DitModel, UnetModel
from configs.recipe import Recipe
from configs.training import Training
from tasks.plan import networks
from tasks.plan.tokenizers import convolutional

FLOAT32 = 4
WEIGHT, GRADIENT, MOMENTS, AVERAGE = FLOAT32, FLOAT32, 2 * FLOAT32, FLOAT32
"""Bytes of one trained number: itself, its gradient, AdamW's two moments, and each average. 20 with one average, and
13.5 GB for XL."""
CAST = 2
"""And of a half precision's copy of it, which products keep for their backward pass."""
KEPT = {(True, True): 40.2, (True, False): 76.2, (False, True): 65.5, (False, False): 106.9}
"""Bytes that a block of the transformer keeps for its backward pass of each number that leaves it (tokens × width), by
(compiled, half precision): 0.33 and 0.54 GB an image of XL at 256 tokens in bfloat16."""
KEPT_FOR_QK_NORM = {(True, True): 0.1, (True, False): 0.1, (False, True): 12.1, (False, False): 8.1}
"""More, where queries and keys are normed."""
KEPT_AROUND = {True: 14.3, False: 16.6}
"""The same of what lies around all blocks together, by half precision."""
KEPT_IN_HEAD = {(True, True): 50.1, (True, False): 100.1, (False, True): 77.4, (False, False): 138.7}
KEPT_AROUND_HEAD = {True: 18.0, False: 28.0}
"""Of a wide head, whose blocks are told something of their own for every token."""
KEPT_SEMANTIC = {True: 33.3, False: 66.6}
"""A block of the Semantic VAE, by half precision; not less where it is compiled."""
KEPT_CONVOLVED = {True: 14.4, False: 28.5}
"""Bytes an autoencoder keeps of each number that leaves its residual blocks, by half precision."""
TENSORS_A_BLOCK = 10
"""Tensors of its own size that a convolutional residual block keeps: two of each of norm, activation, convolution and
what they remember. An estimate by reading the code, of UNets."""
USABLE = 0.94
"""Share of a GPU's memory that tensors may fill: CUDA's context and what the allocator cannot use are left."""
COUNTED = "counted by torch, not measured: tasks/plan/memory.py"
ESTIMATE = "estimate, not measured: tasks/plan/memory.py"

MEASURED: Mapping[tuple[str, str, bool], float] = {}
"""Bytes an image by (stage, size of the network, compiled), in bfloat16, as a GPU showed them; none so far."""


@dataclass(frozen=True)
class Memory:
    """Bytes of one worker's GPU."""

    fixed: float
    """Weights, gradients, moments, averages, and frozen networks beside them."""
    image: float
    """Of each image of a micro-batch."""
    micro: int
    """Images at once: what the recipe says, or a worker's whole share of the batch."""
    share: int
    """Images of a worker in one step."""
    open: bool
    """Whether the recipe leaves the micro-batch open."""
    source: str
    field: str = "compute.train.micro_batch"
    """Of the recipe, that names `micro`."""
    least: int = 1
    """Images of the smallest micro-batch, of which the others are multiples: two where the objective pairs them."""

    def at(self, micro: int) -> float:
        return self.fixed + micro * self.image

    def fitting(self, gpu_bytes: float) -> int | None:
        """The largest micro-batch that fits and divides a worker's share (only the recipe's, where it names one); None
        where none does."""
        choices = range(self.share, 0, -1) if self.open else (self.micro,)
        divisors = (micro for micro in choices if self.share % micro == 0 and micro % self.least == 0)
        return next((micro for micro in divisors if self.at(micro) <= USABLE * gpu_bytes), None)


def memory_of(recipe: Recipe, stage: str) -> Memory | None:
    """Of a training stage that trains; None where nothing is trained."""
    section: Training | None = getattr(recipe, stage)
    if section is None or not section.images:
        return None
    compute = recipe.compute.train
    trained, frozen, image, source = _parts(recipe, stage)
    share = section.batch // compute.workers
    micro = min(compute.micro_batch or share, share)
    a_weight = _a_weight(section, compute) + (CAST if _half(section) else 0)
    fixed = trained * a_weight + frozen * FLOAT32
    paired = stage == "train_dit" and recipe.train_dit.objective.contrastive_weight > 0
    return Memory(fixed, image, micro, share, compute.micro_batch is None, source, least=2 if paired else 1)


def _half(section: Training) -> bool:
    return section.precision in ("bf16", "fp16")


def _a_weight(section: Training, compute: TrainCompute) -> float:
    """Bytes of one trained number on one worker; ZeRO leaves it a part of some."""
    averages = (section.ema_decay is not None) + len(section.ema_decays) + len(section.ema_sigmas)
    stages = {3: WEIGHT + averages * AVERAGE, 2: GRADIENT, 1: MOMENTS}
    return sum(size / (compute.workers if compute.zero_stage >= stage else 1) for stage, size in stages.items())


def _parts(recipe: Recipe, stage: str) -> tuple[int, int, float, str]:
    """Trained numbers, frozen numbers, bytes an image, and where those come from."""
    section = getattr(recipe, stage)
    half = _half(section)
    frozen = 0
    if stage == "train_dit":
        backbone, head = networks.diffusion(recipe, section.model)
        if section.online:
            frozen = _foundation_values(recipe)
        image, source = _diffusion_image(recipe, half)
        if recipe.online_latents:
            from tasks.plan.passes import making_latents  # which builds on this

            making = making_latents(recipe)
            frozen, image = frozen + making.values, image + making.image
        return backbone.values + head.values, frozen, image, source
    if stage == "tune_fewstep":
        teacher = sum(networks.diffusion(recipe, recipe.train_dit.model), networks.Cost())
        image, source = _diffusion_image(recipe, half)
        return networks.flow_map(recipe).values, teacher.values, len(section.evaluations) * image, source
    if stage == "train_semvae":
        assert recipe.foundation is not None  # the recipe's rules
        encoder, decoder = networks.semantic_vae(section.model, recipe.foundation.feature_dim, recipe.latent_size**2)
        tokens = 2 * section.model.depth * recipe.latent_size**2 * section.model.width
        image = KEPT_SEMANTIC[half] * tokens
        return encoder.values + decoder.values, _foundation_values(recipe), image, COUNTED
    encoder, decoder = networks.autoencoder(section.model, recipe.image.size)
    own = encoder.values + decoder.values
    image = KEPT_CONVOLVED[half] * activations(section.model, recipe.image.size)
    if section.adversarial:
        own += sum(part.values for part in networks.discriminator(section.objective.discriminator, recipe.image.size))
    by_foundation = section.perceptual and bool(section.objective.perceptual_layers)
    if section.aligned or by_foundation:
        frozen += _foundation_values(recipe)
    if section.perceptual and not by_foundation:
        frozen += networks.VGG_VALUES
        # Two images, each layer and its activation.
        image += (2 if half else 4) * 4 * networks.vgg_activations(recipe.image.size)
    return own, frozen, image, COUNTED


def _diffusion_image(recipe: Recipe, half: bool) -> tuple[float, str]:
    compute, model = recipe.compute.train, recipe.train_dit.model
    if isinstance(model, UnetModel):
        side, values = max(recipe.sides), 0
        for level, multiplier in enumerate(model.multipliers):
            cells = (side >> level) ** 2
            values += (2 * model.blocks + 1) * cells * model.channels * multiplier
        return (2.0 if half else 4.0) * TENSORS_A_BLOCK * values, ESTIMATE
    assert isinstance(model, DitModel)
    measured = MEASURED.get(("train_dit", model.size or "", compute.compile))
    if measured is not None and half and not compute.recompute:
        return measured, "measured: tasks/plan/memory.py"
    width, depth, _ = networks.dimensions(model)
    tokens = (max(recipe.sides) // model.patch_size) ** 2
    way = compute.compile, half
    normed = KEPT_FOR_QK_NORM[way] if model.qk_norm else 0.0
    # Width, number, and what each keeps of a number.
    blocks, around = [(width, depth, KEPT[way] + normed)], width * KEPT_AROUND[half]
    if (head := model.head) is not None:
        blocks.append((head.hidden_size, head.depth, KEPT_IN_HEAD[way] + normed))
        around += head.hidden_size * KEPT_AROUND_HEAD[half]
    if compute.recompute:  # the float32 tokens that enter each, and one block's own at a time
        again = max(wide * own for wide, _, own in blocks)
        return tokens * (sum(FLOAT32 * wide * count for wide, count, _ in blocks) + again + around), COUNTED
    return tokens * (sum(wide * count * own for wide, count, own in blocks) + around), COUNTED


def activations(model: Tokenizer, side: int) -> int:
    """Numbers that leave the residual blocks of a convolutional autoencoder, encoder and decoder, for one image."""
    found = convolutional(model)
    if found is None:  # levels of another kind, which may be trained all the same
        return 0
    both = zip(found.widths, found.decoder_widths, strict=True)
    return sum(
        (found.blocks * inward + (found.blocks + 1) * outward) * (side // found.patch >> level) ** 2
        for level, (inward, outward) in enumerate(both)
    )


def _foundation_values(recipe: Recipe) -> int:
    assert recipe.foundation is not None  # the recipe's rules
    return networks.foundation_values(recipe.foundation)
