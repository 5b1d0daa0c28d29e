"""The DeepSpeed engine of a training, its configuration derived from the recipe and never written by hand."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from configs.schema import TrainCompute, Training


def deepspeed_config(section: Training, compute: TrainCompute, workers: int) -> dict[str, Any]:
    """The engine's configuration: batch split, precision, ZeRO stage, clipping."""
    share = section.batch // workers
    micro = compute.micro_batch or share
    config: dict[str, Any] = {
        "train_batch_size": section.batch,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": share // micro,
        "zero_optimization": {"stage": compute.zero_stage},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": sys.maxsize,
    }
    if section.clip_norm:
        config["gradient_clipping"] = section.clip_norm
    if section.precision == "bf16":
        # Autocast over float32 weights, as published: the master copy is the copy.
        config["torch_autocast"] = {"enabled": True, "dtype": "bfloat16"}
    return config


def build_optimizer(module: nn.Module, section: Training, device: torch.device) -> torch.optim.Optimizer:
    """AdamW over what is trainable; fused where the device has it."""
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(
        parameters,
        lr=section.learning_rate,
        betas=section.betas,
        weight_decay=section.weight_decay,
        fused=True if device.type == "cuda" else None,
    )


def build_engine(module: nn.Module, optimizer: torch.optim.Optimizer, config: dict[str, Any]) -> Any:
    """Wrap a module for distributed steps, in the process group that Ray Train has already made."""
    # DeepSpeed compiles a small CPU communication op and looks for ninja on PATH, where a virtual environment that
    # was not activated does not put it.
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed
    from deepspeed.utils import logger

    logger.setLevel("WARNING")
    deepspeed.init_distributed(dist_init_required=False, verbose=False)
    engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=config, dist_init_required=False)
    return engine
