"""Families of transformers' models, and of which of timm's parts each is made; reads no files."""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from timm.layers import SwiGLUPacked
from timm.models.beit import Beit
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from vitviz.errors import ModelError
from vitviz.models.plans import Plan, parts, plain, ratio, require_gelu, require_kinds, sides
from vitviz.models.twofold import TwofoldVisionTransformer

__all__ = ["class_names", "plan_of"]


Config = Mapping[str, Any]

_CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))

_CLASSES = 2  # that transformers has where a config says nothing
# What a config leaves out is what transformers' config classes say.
_SIZES = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "image_size": 224,
    "patch_size": 16,
    "num_channels": 3,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
    "qkv_bias": True,
}


def plan_of(config: Config, architecture: str) -> Plan:
    """Say how to build the model of a config.

    Args:
        config: As in a config.json of transformers.
        architecture: transformers' name of the class that it is for.

    Raises:
        ModelError: It is of no known family, or asks for what timm's module cannot do.
    """
    kind = str(config.get("model_type"))
    if kind not in _FAMILIES:
        raise ModelError(
            f"transformers' {kind!r} is none of the plain vision transformers that vitviz can "
            f"build without it; it knows {', '.join(_FAMILIES)}"
        )
    if not architecture.endswith(_ANSWERS):
        raise ModelError(
            f"{architecture or 'a config that names no architecture'} is no classifier and no bare "
            f"encoder; expected a name that ends in {' or '.join(_ANSWERS)}"
        )
    defaults, family = _FAMILIES[kind]
    own = config.get("vision_config") or {} if kind in ("clip", "siglip") else config
    if not isinstance(own, Mapping):
        raise ModelError(f"vision_config is {reprlib.repr(own)}; expected the config of a tower")
    merged = {**_SIZES, **defaults, **own, "model_type": kind}
    require_kinds(merged, {**_SIZES, **defaults})
    _require_sizes(merged)
    return family(merged, _Asked(architecture, len(class_names(config))))


def class_names(config: Config) -> list[str]:
    """Return the names of classes in the order of the logits, empty ones where there are none.

    Raises:
        ModelError: There are some, but not for each.
    """
    named = config.get("id2label")
    if not named:
        count = config.get("num_labels", _CLASSES)
        require_kinds({"num_labels": count}, {"num_labels": _CLASSES})
        return [""] * count
    names = {str(key): name for key, name in named.items()} if isinstance(named, Mapping) else {}
    if names.keys() != set(map(str, range(len(names)))) or not names:
        raise ModelError(
            f"id2label is {reprlib.repr(named)}; expected a name for each class, counted from 0"
        )
    return [str(names[str(index)]) for index in range(len(names))]


def _require_sizes(config: Config) -> None:
    """Make sure that sizes go with each other, and that images are pictures."""
    width, heads = config["hidden_size"], config["num_attention_heads"]
    if width % heads:
        raise ModelError(f"hidden_size {width} is no multiple of num_attention_heads {heads}")
    if config["num_channels"] not in (1, 3):
        raise ModelError(f"num_channels is {config['num_channels']}; expected 3 (colours) or 1")
    image, patch = sides(config["image_size"]), sides(config["patch_size"])
    if image[0] < patch[0] or image[1] < patch[1]:
        raise ModelError(f"image_size {image} has no room for a patch of patch_size {patch}")


@dataclass(frozen=True)
class _Asked:
    architecture: str
    labels: int

    @property
    def classes(self) -> int:
        """How many it tells apart; 0 without a classifier."""
        return self.labels if "ForImageClassification" in self.architecture else 0


def _vit(config: Config, asked: _Asked) -> Plan:
    return Plan(
        kind=VisionTransformer,
        arguments={**plain(config), "num_classes": asked.classes},
        image_size=sides(config["image_size"]),
        default_filter=2,
    )


def _deit(config: Config, asked: _Asked) -> Plan:
    """Both heads, or the class token's alone, to which the distillation token is a register."""
    both = asked.architecture.endswith("WithTeacher")
    arguments = {**plain(config), "num_classes": asked.classes}
    return Plan(
        kind=VisionTransformerDistilled if both else VisionTransformer,
        arguments=arguments if both else {**arguments, "reg_tokens": 1},
        image_size=sides(config["image_size"]),
        renames=() if both else ((r"dist_token$", "reg_token"),),
    )


def _ijepa(config: Config, asked: _Asked) -> Plan:
    pooling = {"class_token": False, "global_pool": "avg", "fc_norm": False}
    return Plan(
        kind=VisionTransformer,
        arguments={**plain(config), **pooling, "num_classes": asked.classes},
        image_size=sides(config["image_size"]),
        default_filter=2,
    )


def _dinov2(config: Config, asked: _Asked) -> Plan:
    """A classifier reads the class token beside the average; registers have no positions."""
    hidden = int(config["hidden_size"] * config["mlp_ratio"])
    registers = config["num_register_tokens"]
    arguments = {**plain({**config, "intermediate_size": hidden}), "init_values": 1.0}
    if config["use_swiglu_ffn"]:
        hidden = (int(hidden * 2 / 3) + 7) // 8 * 8
        gated = {"mlp_layer": SwiGLUPacked, "act_layer": nn.SiLU}
        arguments |= {**gated, "mlp_ratio": ratio(2 * hidden, config)}
    if registers:
        arguments |= {"reg_tokens": registers, "no_embed_class": True}
    return Plan(
        kind=TwofoldVisionTransformer if asked.classes else VisionTransformer,
        arguments={**arguments, "num_classes": asked.classes},
        image_size=sides(config["image_size"]),
        renames=(
            (r"layer_scale([12])\.lambda1$", r"ls\1.gamma"),
            (r"mlp\.weights_in\.", "mlp.fc1."),
            (r"mlp\.gate_proj\.", "mlp.fc1_g."),
            (r"mlp\.up_proj\.", "mlp.fc1_x."),
            (r"mlp\.(weights_out|down_proj)\.", "mlp.fc2."),
        ),
        antialias=config["model_type"] == "dinov2_with_registers",
        assumed=_IMAGENET,
    )


def _beit(config: Config, asked: _Asked) -> Plan:
    require_gelu(config)
    rows, cols = sides(config["image_size"])
    relative = config["use_relative_position_bias"] or config["use_shared_relative_position_bias"]
    if relative and rows != cols:
        raise ModelError(
            f"image_size is {rows}×{cols}, for which transformers mixes up rows and columns of "
            "relative positions; expected a square"
        )
    scale = float(config["layer_scale_init_value"])
    return Plan(
        kind=Beit,
        arguments={
            **parts(config),
            "num_classes": asked.classes,
            "global_pool": "avg" if config["use_mean_pooling"] else "token",
            "init_values": scale if scale > 0 else None,
            "use_abs_pos_emb": config["use_absolute_position_embeddings"],
            "use_rel_pos_bias": config["use_relative_position_bias"],
            "use_shared_rel_pos_bias": config["use_shared_relative_position_bias"],
        },
        image_size=(rows, cols),
        renames=(
            (r"lambda_([12])$", r"gamma_\1"),
            (r"pooler\.norm\.", "fc_norm."),
            (r"attention\.attention\.relative_position_bias\.", "attn."),
            (r"(?<=\d\.)relative_position_bias\.", "attn."),
            (r"(encoder\.relative_position_bias|shared_position_bias)\.", "rel_pos_bias."),
        ),
    )


def _dinov3(config: Config, asked: _Asked) -> Plan:
    require_gelu({**config, "hidden_act": "gelu"} if config["use_gated_mlp"] else config)
    if config["use_gated_mlp"] and config["hidden_act"] not in ("silu", "swish"):
        raise ModelError(f"a gated MLP has {config['hidden_act']!r}; timm's has silu alone")
    if config["key_bias"]:
        raise ModelError("key_bias is true; timm's module has none")
    gated = {"swiglu_mlp": True} if config["use_gated_mlp"] else {}
    biases = {
        "query_bias": r"\.attn\.q_bias$",
        "value_bias": r"\.attn\.v_bias$",
        "proj_bias": r"\.attn\.proj\.bias$",
        "mlp_bias": r"\.mlp\.\w+\.bias$",
    }
    return Plan(
        kind=Eva,
        arguments={
            **parts(config),
            **gated,
            "num_classes": asked.classes,
            "global_pool": "token",
            "qkv_bias": config["query_bias"] or config["value_bias"],
            "init_values": 1.0,
            "num_reg_tokens": config["num_register_tokens"],
            "use_abs_pos_emb": False,
            "use_rot_pos_emb": True,
            "rope_type": "dinov3",
            "rope_temperature": float(config["rope_theta"]),
            "rope_rotate_half": True,
        },
        image_size=sides(config["image_size"]),
        renames=(
            (r"layer_scale([12])\.lambda1$", r"gamma_\1"),
            (r"mlp\.gate_proj\.", "mlp.fc1_g."),
            (r"mlp\.up_proj\.", "mlp.fc1_x." if gated else "mlp.fc1."),
            (r"mlp\.down_proj\.", "mlp.fc2."),
        ),
        without_bias="|".join(name for flag, name in biases.items() if not config[flag]),
        assumed=_IMAGENET,
        default_filter=2,
    )


def _clip(config: Config, asked: _Asked) -> Plan:
    """The vision tower: a classifier averages the patches before the last norm."""
    projected = asked.architecture in ("CLIPModel", "CLIPVisionModelWithProjection")
    arguments = {**plain(config), "pre_norm": True, "num_classes": asked.classes}
    if asked.classes:
        arguments |= {"global_pool": "avg", "final_norm": False}
    elif projected:
        arguments |= {"num_classes": config["projection_dim"]}
    return Plan(
        kind=VisionTransformer,
        arguments=arguments,
        image_size=sides(config["image_size"]),
        renames=((r"pre_layrnorm\.", "norm_pre."),),
        unused=r"norm\.\w+" if asked.classes else "",
        without_bias=r"^head\.bias$" if projected else "",
        assumed=_CLIP,
    )


def _siglip(config: Config, asked: _Asked) -> Plan:
    """The vision tower: attention pools the patches, for which a classifier averages them."""
    if not asked.classes and not config["vision_use_head"]:
        raise ModelError("vision_use_head is false: without its head the tower pools no tokens")
    average = {"global_pool": "avg", "fc_norm": False}
    return Plan(
        kind=VisionTransformer,
        arguments={
            **plain(config),
            **(average if asked.classes else {"global_pool": "map"}),
            "class_token": False,
            "num_classes": asked.classes,
        },
        image_size=sides(config["image_size"]),
        renames=(
            (r"head\.attention\.in_proj_", "attn_pool.qkv."),
            (r"head\.attention\.out_proj\.", "attn_pool.proj."),
            (r"head\.norm\.", "attn_pool.norm."),
            (r"head\.mlp\.", "attn_pool.mlp."),
            (r"head\.probe$", "attn_pool.latent"),
        ),
        unused=r"attn_pool\..+" if asked.classes else "",
    )


_BEIT = {
    "use_absolute_position_embeddings": False,
    "use_relative_position_bias": False,
    "use_shared_relative_position_bias": False,
    "layer_scale_init_value": 0.1,
    "use_mean_pooling": True,
}
_DINOV3 = {
    "hidden_size": 384,
    "num_attention_heads": 6,
    "intermediate_size": 1536,
    "layer_norm_eps": 1e-5,
    "rope_theta": 100.0,
    "num_register_tokens": 0,
    "use_gated_mlp": False,
    "key_bias": False,
    **dict.fromkeys(("query_bias", "value_bias", "proj_bias", "mlp_bias"), True),
}
_CLIP_VISION = {
    "patch_size": 32,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
    "projection_dim": 512,
}
_SIGLIP = {"hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6, "vision_use_head": True}
_DINOV2 = {
    "mlp_ratio": 4.0,
    "layer_norm_eps": 1e-6,
    "use_swiglu_ffn": False,
    "num_register_tokens": 0,
}
_FAMILIES: dict[str, tuple[dict[str, Any], Callable[[Config, _Asked], Plan]]] = {
    "vit": ({}, _vit),
    "deit": ({}, _deit),
    "ijepa": ({}, _ijepa),
    "dinov2": (_DINOV2, _dinov2),
    "dinov2_with_registers": ({**_DINOV2, "num_register_tokens": 4}, _dinov2),
    "beit": (_BEIT, _beit),
    "dinov3_vit": (_DINOV3, _dinov3),
    "clip": (_CLIP_VISION, _clip),
    "clip_vision_model": (_CLIP_VISION, _clip),
    "siglip": (_SIGLIP, _siglip),
    "siglip_vision_model": (_SIGLIP, _siglip),
}
_ANSWERS = ("Model", "ForImageClassification", "WithTeacher", "WithProjection")
