"""Training steps to measure: the project's own, through its trainee, engine and averages, and a plain one beside it."""

from __future__ import annotations

import math
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.train_step import latents
from configs import Recipe, load_recipe
from models.execution import prepare
from models.flops import training_flops_per_image
from tasks.stage import Context, Job
from tasks.train_dit import Diffusion
from tasks.training.ema import averages
from tasks.training.engine import build_engine

Sizes = tuple[int, int, int]
"""Width, depth and heads of a transformer."""
_TINY = (
    "train_dit.model.size=null",
    "train_dit.model.hidden_size=64",
    "train_dit.model.depth=2",
    "train_dit.model.heads=4",
)
_TINY_SFD = ("train_dit.model.align_depth=1", "train_dit.model.align_hidden=32")


def recipe_of(name: str, batch: int, images: int, small: bool, *changes: str) -> Recipe:
    """A published recipe on one device, at a batch of its own; `small` shrinks the network."""
    own = [
        f"train_dit.batch={batch}",
        f"train_dit.images={images}",
        "compute.train={workers: 1, engine: plain, micro_batch: null, cpus_per_worker: 4}",
        f"compute.train.log_every={batch}",
        f"compute.train.checkpoint_every={100 * images}",
    ]
    if "sfd" in name:  # features that are stored or made stand in the inputs either way
        own += ["encode.align_features=true", "train_dit.objective.align=stored", *(_TINY_SFD if small else ())]
    return load_recipe(name, [*own, *(_TINY if small else ()), *changes])


def context_of(recipe: Recipe, root: str, name: str) -> Context:
    values = recipe.model_dump(mode="json")
    return Context(Job("train_dit", name, root, values, {"encode": "benchmark"}, {}))


class Step:
    """One step as `tasks/training/loop.py` takes it, on a batch that lies on the device."""

    def __init__(self, recipe: Recipe, root: str, device: torch.device, rows: int) -> None:
        latents(recipe, root, rows)
        compute, section = recipe.compute.train, recipe.train_dit
        torch.manual_seed(0)
        self.trainee = Diffusion(context_of(recipe, root, "step"))
        self.module = self.trainee.module.to(device).train()
        with torch.no_grad():  # layers that begin at zero would multiply zeros, which is faster
            for parameter in self.module.parameters():
                if parameter.requires_grad and not parameter.any():
                    parameter.normal_(std=0.02)
        prepare(self.trainee.network, compile=compute.compile, checkpoint_activations=compute.recompute)
        self.engine = build_engine(self.module, section, compute, device)
        self.averages = averages(section, self.engine.local())
        self.flops = training_flops_per_image(self.trainee.network, alignment=self.trainee.aligned)
        self.device = device
        with self.trainee.loader.stream(0, 0, 1) as stream:
            self.given = self.trainee.inputs(next(stream), device)
        self.batch = len(self.given["y_B"])
        self.terms: dict[str, Tensor] = {}

    def __call__(self) -> None:
        self.terms = self.engine.advance(self.given)
        self.average()

    def average(self) -> None:
        for average in self.averages.values():
            average.update(0, self.batch, self.engine.optimizer.bad)

    def loss(self) -> float:
        """Of the last step."""
        return float(self.terms["total"].detach())


class OnlineStep(Step):
    """The same with alignment targets made of images before it, in bfloat16, and nothing beside anything else."""

    def __init__(self, recipe: Recipe, root: str, device: torch.device, rows: int, foundation: nn.Module) -> None:
        super().__init__(recipe, root, device, rows)
        self._foundation = foundation
        side = recipe.image.size
        self._images = torch.rand(self.batch, 3, side, side, device=device) * 2 - 1

    def __call__(self) -> None:
        with torch.no_grad(), torch.autocast(self.device.type, torch.bfloat16):
            made = self._foundation(self._images).float()
        if made.shape == self.given["align_target_BChw"].shape:
            self.given["align_target_BChw"] = made
        super().__call__()


# ------------------------------------------------------------------------------------------------ a plain loop


class _PlainBlock(nn.Module):
    """A transformer block from its formulas (papers.md 1.4), all in one data type."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, hidden = heads, int(2 / 3 * 4 * width)
        self.before, self.between = nn.RMSNorm(width, eps=1e-6), nn.RMSNorm(width, eps=1e-6)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.wide, self.narrow = nn.Linear(width, 2 * hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor, modulation: Tensor, turn: Tensor) -> Tensor:
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = modulation.unsqueeze(1).chunk(6, dim=-1)
        q, k, v = self.qkv(self.before(x) * (1 + scale_a) + shift_a).unflatten(-1, (3, self.heads, -1)).unbind(2)
        q, k = (_turned(each, turn).transpose(1, 2) for each in (q, k))
        mixed = F.scaled_dot_product_attention(q, k, v.transpose(1, 2)).transpose(1, 2).flatten(2)
        x = x + gate_a * self.out(mixed)
        gate, value = self.wide(self.between(x) * (1 + scale_m) + shift_m).chunk(2, dim=-1)
        return x + gate_m * self.narrow(F.silu(gate) * value)


def _turned(x: Tensor, turn: Tensor) -> Tensor:
    cos, sin = turn
    first, second = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([first * cos - second * sin, second * cos + first * sin], dim=-1).flatten(-2)


class _Plain(nn.Module):
    def __init__(self, width: int, depth: int, heads: int, channels: int, grid: int) -> None:
        super().__init__()
        self.depth, self.embed = depth, nn.Linear(channels, width)
        self.time, self.label = nn.Linear(256, width), nn.Embedding(1001, width)
        self.modulation = nn.Linear(width, depth * 6 * width)
        self.blocks = nn.ModuleList(_PlainBlock(width, heads) for _ in range(depth))
        self.norm, self.out = nn.RMSNorm(width, eps=1e-6), nn.Linear(width, channels)
        axis = width // heads // 2
        angles = torch.arange(grid)[:, None] / 10_000 ** (torch.arange(0, axis, 2) / axis)
        rows, columns = angles[:, None].expand(grid, grid, -1), angles[None].expand(grid, grid, -1)
        table = torch.cat([rows, columns], -1).reshape(grid * grid, 1, -1)
        self.register_buffer("turn", torch.stack([table.cos(), table.sin()]), persistent=False)

    def forward(self, x_BCHW: Tensor, t_B: Tensor, y_B: Tensor) -> Tensor:
        steps = torch.exp(torch.arange(128, device=t_B.device) * (-math.log(10_000) / 128)) * t_B[:, None]
        times = torch.cat([steps.cos(), steps.sin()], -1).to(self.embed.weight.dtype)
        told = F.silu(self.time(times) + self.label(y_B))
        x = self.embed(x_BCHW.flatten(2).transpose(1, 2))
        for block, modulation in zip(self.blocks, self.modulation(told).chunk(self.depth, dim=-1), strict=True):
            x = block(x, modulation, self.turn)
        found: Tensor = self.out(self.norm(x)).transpose(1, 2).unflatten(-1, x_BCHW.shape[-2:])
        return found


class PlainStep:
    """What a plain compiled loop with bfloat16 weights does: float32 masters, fused AdamW, an average by foreach."""

    def __init__(self, recipe: Recipe, given: dict[str, Any], device: torch.device, sizes: Sizes) -> None:
        width, depth, heads = sizes
        with device:
            model = _Plain(width, depth, heads, recipe.latent_channels, recipe.latent_size)
        self._model = model.to(torch.bfloat16)
        forward = torch.compile(_PlainBlock.forward, fullgraph=True)
        for block in self._model.blocks:
            block.forward = MethodType(forward, block)  # type: ignore[method-assign]
        self._live = list(self._model.parameters())
        self._masters = [p.detach().float() for p in self._live]
        self._average = [master.clone() for master in self._masters]
        self._optimizer = torch.optim.AdamW(self._masters, lr=2e-4, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
        self._given = given

    def __call__(self) -> None:
        x1, noise, labels, t = (self._given[name] for name in ("x1_BCHW", "noise_BCHW", "y_B", "u_B"))
        share = t.view(-1, 1, 1, 1)
        velocity = self._model((share * x1 + (1 - share) * noise).bfloat16(), t, labels).float()
        target = x1 - noise
        loss = (velocity - target).square().mean() + (1 - F.cosine_similarity(velocity, target, dim=1)).mean()
        loss.backward()
        for master, live in zip(self._masters, self._live, strict=True):
            master.grad = None if live.grad is None else live.grad.float()
        self._optimizer.step()
        torch._foreach_copy_([p.detach() for p in self._live], self._masters)
        torch._foreach_lerp_(self._average, self._masters, 1e-4)
        for live in self._live:
            live.grad = None
