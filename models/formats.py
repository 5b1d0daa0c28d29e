"""From the authors' argument names to ours and back, and from tensor shapes alone to arguments.

Three kinds of network have published checkpoints: "lightningdit" (one clock, or SFD's two), "autoencoder"
(VA-VAE and its plain twin) and "semantic_vae". Tensor names are the same on both sides; what differs is how
the authors spell the arguments and nest their files (models/checkpoints.py reads and writes the files).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, get_args

from torch import Tensor, nn

from models.autoencoder import AutoencoderKL
from models.cascade_dit import CascadeDiT
from models.flow_map import FlowMapDiT
from models.groups import SFD, ChannelGroups
from models.kinds import Kind
from models.lightningdit import LightningDiT
from models.semantic_vae import SemanticVAE
from models.sizes import SIZES
from models.wide_head_dit import WideHeadDiT

Arguments = dict[str, Any]
_COLOURS = 3
ANCHORS: dict[Kind, tuple[str, ...]] = {
    "lightningdit": ("x_embedder.proj.weight", "y_embedder.embedding_table.weight"),
    "autoencoder": ("encoder.conv_in.weight", "quant_conv.weight"),
    "semantic_vae": ("encoder.0.weight", "encoder.1.attn.in_proj_weight"),
    "cascade_unet": ("unet.conv_in.weight", "resolution_embedder.weight"),
}
"""Names of tensors that tell a kind of network from all others."""
_NETWORKS: dict[Kind, type[nn.Module]] = {
    "lightningdit": LightningDiT,
    "autoencoder": AutoencoderKL,
    "semantic_vae": SemanticVAE,
}

# The authors' constructor arguments for the backbone, and what each is when absent.
_SWITCHES = {"use_qknorm": "qk_norm", "use_swiglu": "swiglu", "use_rope": "rope", "use_rmsnorm": "rmsnorm"}
_SAME = ("input_size", "patch_size", "in_channels", "hidden_size", "depth", "num_heads", "num_classes")
_REPA = ("use_repa", "repa_dino_version", "repa_depth", "repa_projector_dim")
# These say how to train or sample, not what the network is.
_NOT_THE_NETWORK = (
    "class_dropout_prob",
    "semfirst_delta_t",
    "use_checkpoint",
    "use_gradient_checkpointing",
    "repa_weight",
    "repa_mode",
)
_DINO_WIDTHS = {"vits": 384, "vitb": 768, "vitl": 1024, "vitg": 1536}


def build(kind: Kind, arguments: Mapping[str, Any]) -> nn.Module:
    """The network of this kind from our constructor arguments as they are stored (plain JSON values).
    Raises ValueError on an unknown kind or argument.
    """
    if kind not in get_args(Kind):
        raise ValueError(f"kind must be one of {', '.join(get_args(Kind))}, found '{kind}'")
    given = dict(arguments)
    if given.get("groups") is not None and not isinstance(given["groups"], ChannelGroups):
        given["groups"] = ChannelGroups(tuple(given["groups"]["names"]), tuple(given["groups"]["sizes"]))
    for name in ("channel_multipliers", "attention_levels", "resolutions", "multipliers", "attention"):
        if name in given:
            given[name] = tuple(given[name])
    try:
        if kind == "cascade_unet":
            return _unet(given)
        if "head_hidden" in given:
            return WideHeadDiT(**given)
        if given.pop("flow_map", False):
            return FlowMapDiT(**given)
        return (CascadeDiT if "resolutions" in given else _NETWORKS[kind])(**given)
    except TypeError as error:
        raise ValueError(f"{kind}: {error}; check the argument names") from error


def _unet(given: Arguments) -> nn.Module:
    from models.cascade_unet import CascadeUNet  # its library takes seconds to import
    from models.edm import Preconditioning

    given = {"norm_channels": 1, **given}  # of files from before it was told
    return CascadeUNet(**{**given, "preconditioning": Preconditioning(**given.get("preconditioning", {}))})


def groups_of(arguments: Mapping[str, Any]) -> ChannelGroups:
    """The channel groups of stored LightningDiT arguments (one group when none are stored)."""
    stored = arguments.get("groups")
    if isinstance(stored, ChannelGroups):
        return stored
    if stored is None:
        return ChannelGroups(("latent",), (arguments["in_channels"],))
    return ChannelGroups(tuple(stored["names"]), tuple(stored["sizes"]))


def lightningdit_from_authors(authors: Mapping[str, Any]) -> Arguments:
    """Our LightningDiT arguments from the authors' (LightningDiT's or SFD's), which default every `use_*`
    switch to False. Raises ValueError on an argument we do not know: it may change the network.
    """
    known = {*_SAME, *_SWITCHES, *_REPA, *_NOT_THE_NETWORK, "wo_shift", "learn_sigma", "semantic_chans"}
    unknown = sorted(authors.keys() - known - {"mlp_ratio"})
    if unknown:
        raise ValueError(f"unknown LightningDiT arguments {', '.join(unknown)}; known: {', '.join(sorted(known))}")
    if authors.get("mlp_ratio", 4.0) != 4.0:
        raise ValueError(f"mlp_ratio must be 4.0 as in every published size, found {authors['mlp_ratio']}")
    ours: Arguments = {name: authors[name] for name in _SAME if name in authors}
    ours |= {name: bool(authors.get(theirs, False)) for theirs, name in _SWITCHES.items()}
    ours["shift"] = not authors.get("wo_shift", False)
    ours["learn_sigma"] = bool(authors.get("learn_sigma", False))
    semantic = int(authors.get("semantic_chans", 0) or 0)
    if semantic:
        ours["groups"] = {"names": list(SFD.names), "sizes": [authors["in_channels"] - semantic, semantic]}
    if authors.get("use_repa", False):
        ours["align_depth"] = int(authors.get("repa_depth", 2))
        ours["align_dim"] = _dino_width(str(authors.get("repa_dino_version", "dinov2_vitb14_reg")))
        ours["align_hidden"] = int(authors.get("repa_projector_dim", 2048))
    return ours


def lightningdit_to_authors(ours: Mapping[str, Any]) -> Arguments:
    """The inverse of `lightningdit_from_authors`. Raises ValueError for what the authors have no word for."""
    if ours.get("value_residual") or ours.get("flow_map"):
        raise ValueError("the authors' networks have no value residual and are no flow map: keep our layout")
    authors: Arguments = {name: ours[name] for name in _SAME if name in ours}
    defaults = {"qk_norm": False, "swiglu": True, "rope": True, "rmsnorm": True}
    authors |= {theirs: bool(ours.get(name, defaults[name])) for theirs, name in _SWITCHES.items()}
    authors["wo_shift"] = not ours.get("shift", True)
    authors["learn_sigma"] = bool(ours.get("learn_sigma", False))
    groups = groups_of(ours)
    if len(groups) > 1:
        if groups.names != SFD.names:
            raise ValueError(f"the authors' layout knows texture and semantic channels, found {groups.names}")
        authors["semantic_chans"] = groups.sizes[1]
        authors["use_repa"] = ours.get("align_depth") is not None
    if ours.get("align_depth") is not None:
        widths = {width: name for name, width in _DINO_WIDTHS.items()}
        if ours["align_dim"] not in widths:
            raise ValueError(f"the authors align to DINOv2 ({sorted(widths)} features), found {ours['align_dim']}")
        authors["use_repa"] = True
        authors["repa_dino_version"] = f"dinov2_{widths[ours['align_dim']]}14_reg"
        authors["repa_depth"] = ours["align_depth"]
        authors["repa_projector_dim"] = ours.get("align_hidden", 2048)
    return authors


def autoencoder_from_authors(authors: Mapping[str, Any]) -> Arguments:
    """Our AutoencoderKL arguments from the authors' `ddconfig` plus `embed_dim`; attention is theirs by
    resolution in pixels, ours by level.
    """
    multipliers = list(authors.get("ch_mult", (1, 1, 2, 2, 4)))
    resolution = int(authors.get("resolution", 256))
    attended = set(authors.get("attn_resolutions", (16,)))
    return {
        "in_channels": authors.get("in_channels", 3),
        "out_channels": authors.get("out_ch", 3),
        "base_channels": authors.get("ch", 128),
        "channel_multipliers": multipliers,
        "blocks_per_level": authors.get("num_res_blocks", 2),
        "z_channels": authors["z_channels"],
        "embed_dim": authors.get("embed_dim", authors["z_channels"]),
        "attention_levels": [i for i in range(len(multipliers)) if resolution // 2**i in attended],
        "dropout": authors.get("dropout", 0.0),
    }


def semantic_vae_from_authors(authors: Mapping[str, Any]) -> Arguments:
    """Our SemanticVAE arguments from what the published file stores beside its tensors."""
    names = {"input_dim": "feature_dim", "bottleneck_dim": "bottleneck", "num_heads": "num_heads"}
    return {ours: int(authors[theirs]) for theirs, ours in names.items() if theirs in authors}


def kind_of(tensors: Mapping[str, Tensor]) -> Kind:
    """Which network these tensor names belong to. Raises ValueError naming some of them otherwise."""
    for kind, names in ANCHORS.items():
        if all(name in tensors for name in names):
            return kind
    shown = ", ".join(list(tensors)[:4]) or "none at all"
    raise ValueError(f"these tensors belong to no network we know (LightningDiT, VA-VAE, Semantic VAE): {shown}")


def kind_for(model: nn.Module) -> Kind:
    """The kind of weights that a network takes. Raises ValueError for a network without published ones."""
    if hasattr(model, "unet"):
        return "cascade_unet"
    for kind, network in _NETWORKS.items():
        if isinstance(model, network):
            return kind
    raise ValueError(f"no checkpoint format is of a {type(model).__name__}")


def infer_arguments(
    tensors: Mapping[str, Tensor], *, num_heads: int | None = None, semantic_channels: int | None = None
) -> tuple[Kind, Arguments]:
    """Kind and constructor arguments from names and shapes. What shapes cannot tell is given or assumed:

    num_heads: needed where neither a rotary table, a query norm nor a published size gives it (LightningDiT),
        and for a Semantic VAE whose width is not the published 768 (6 heads).
    semantic_channels: of two-clock networks; 16 when the latent has the published 48 channels.
    Also assumed: alignment at depth 2, group norm over 32 groups, resolutions of a cascade that halve.
    Raises ValueError asking for what is missing.
    """
    kind = kind_of(tensors)
    if kind == "cascade_unet":
        raise ValueError("the arguments of a pixel cascade cannot be read off its tensors; a recipe has them")
    if kind == "lightningdit":
        return kind, _infer_lightningdit(tensors, num_heads, semantic_channels)
    if kind == "autoencoder":
        return kind, _infer_autoencoder(tensors)
    return kind, _infer_semantic_vae(tensors, num_heads)


def _infer_lightningdit(
    tensors: Mapping[str, Tensor], num_heads: int | None, semantic_channels: int | None
) -> Arguments:
    if "s_embedder.proj.weight" in tensors:
        raise ValueError("the heads of a wide head cannot be read off its tensors; a recipe has them")
    width, channels, patch, _ = tensors["x_embedder.proj.weight"].shape
    depth = _count(tensors, "blocks.{}.attn.qkv.weight")
    first = "blocks.0."
    heads = num_heads or _heads(tensors, width, depth)
    outputs = tensors["final_layer.linear.weight"].shape[0]
    arguments: Arguments = {
        "input_size": math.isqrt(tensors["pos_embed"].shape[1]) * patch,
        "patch_size": patch,
        "in_channels": channels,
        "hidden_size": width,
        "depth": depth,
        "num_heads": heads,
        "num_classes": tensors["y_embedder.embedding_table.weight"].shape[0] - 1,
        "qk_norm": first + "attn.q_norm.weight" in tensors,
        "swiglu": first + "mlp.w12.weight" in tensors,
        "rope": "feat_rope.freqs_cos" in tensors,
        "rmsnorm": first + "norm1.weight" in tensors,
        "shift": tensors[first + "adaLN_modulation.1.weight"].shape[0] == 6 * width,
        "learn_sigma": outputs == 2 * patch**2 * channels,
    }
    if "t_embedder_sem.mlp.0.weight" in tensors:
        semantic = semantic_channels or (SFD.sizes[1] if channels == SFD.channels else None)
        if semantic is None:
            raise ValueError(
                f"this network has two clocks over {channels} channels, and its tensors do not say how many "
                f"are semantic; give semantic_channels"
            )
        arguments["groups"] = {"names": list(SFD.names), "sizes": [channels - semantic, semantic]}
    if "resolution_embedder.weight" in tensors:
        halvings = reversed(range(tensors["resolution_embedder.weight"].shape[0]))
        arguments["resolutions"] = [arguments["input_size"] >> halving for halving in halvings]
    if "step_embedders.0.mlp.0.weight" in tensors:
        arguments["flow_map"] = True
    if "repa_projector.4.weight" in tensors:
        dim, hidden = tensors["repa_projector.4.weight"].shape
        arguments |= {"align_depth": 2, "align_dim": dim, "align_hidden": hidden}
    return arguments


def _heads(tensors: Mapping[str, Tensor], width: int, depth: int) -> int:
    for name, axis in (("feat_rope.freqs_cos", 1), ("blocks.0.attn.q_norm.weight", 0)):
        if name in tensors:
            return width // tensors[name].shape[axis]
    for size in SIZES.values():
        if (size["hidden_size"], size["depth"]) == (width, depth):
            return size["num_heads"]
    raise ValueError(f"the number of heads cannot be read off these tensors (width {width}); give num_heads")


def _infer_autoencoder(tensors: Mapping[str, Tensor]) -> Arguments:
    base, inward = tensors["encoder.conv_in.weight"].shape[:2]
    outward = tensors["decoder.conv_out.weight"].shape[0]
    side = math.isqrt(inward // _COLOURS)
    patch = side if inward == outward == _COLOURS * side**2 else 1  # squares of coloured pixels, or single pixels
    levels = _count(tensors, "encoder.down.{}.block.0.conv1.weight")
    widths = [tensors[f"encoder.down.{i}.block.0.conv2.weight"].shape[0] for i in range(levels)]
    attended = [i for i in range(levels) if f"encoder.down.{i}.attn.0.q.weight" in tensors]
    found = {
        "in_channels": inward // patch**2,
        "out_channels": outward // patch**2,
        "base_channels": base,
        "channel_multipliers": [width // base for width in widths],
        "blocks_per_level": _count(tensors, "encoder.down.0.block.{}.conv1.weight"),
        "z_channels": tensors["decoder.conv_in.weight"].shape[1],
        "embed_dim": tensors["post_quant_conv.weight"].shape[1],
        "attention_levels": attended,
        "decoder_attention": any(f"decoder.up.{i}.attn.0.q.weight" in tensors for i in attended),
    }
    switches = {"patch_size": patch} if patch > 1 else {}
    return found | switches | ({"linear_path": True} if "encoder_path.weight" in tensors else {})


def _infer_semantic_vae(tensors: Mapping[str, Tensor], num_heads: int | None) -> Arguments:
    width, features = tensors["encoder.0.weight"].shape
    if num_heads is None and width != 768:
        raise ValueError(f"the number of heads of a Semantic VAE of width {width} is unknown; give num_heads")
    return {
        "feature_dim": features,
        "width": width,
        "depth": sum(name.startswith("encoder.") and name.endswith("in_proj_weight") for name in tensors),
        "num_heads": num_heads or 6,
        "bottleneck": tensors["decoder.0.weight"].shape[1],
    }


def _count(tensors: Mapping[str, Tensor], pattern: str) -> int:
    """How many there are, from 0 on. Raises KeyError where there is none, as a missing tensor does."""
    count = 0
    while pattern.format(count) in tensors:
        count += 1
    if not count:
        raise KeyError(pattern.format(0))
    return count


def _dino_width(version: str) -> int:
    for name, width in _DINO_WIDTHS.items():
        if name in version:
            return width
    raise ValueError(f"repa_dino_version must name vits, vitb, vitl or vitg, found '{version}'")
