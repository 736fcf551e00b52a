"""Tiny seeded models of transformers, made by transformers itself, one for each form of a model."""

from __future__ import annotations

import inspect
import warnings
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import transformers

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

CLASSES = 7
_SIZES: dict[str, Any] = {
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "intermediate_size": 100,
    "image_size": 32,
    "patch_size": 8,
}
_TEXT = {key: _SIZES[key] for key in list(_SIZES)[:4]}
_LABELS = {index: f"kind {index}" for index in range(CLASSES)}


@dataclass(frozen=True, kw_only=True, eq=False)
class SourceCase:
    """A model of transformers and what is true of it.

    Attributes:
        name: Of the case.
        architecture: transformers' name of its class.
        config: Its name for the class of the config.
        settings: Of the config, beside the sizes.
        prefix_tokens: Tokens before the patch tokens.
        towers: Whether it is an image tower beside one for text.
        reads: The readout, by its name in the package.
    """

    name: str
    architecture: str
    config: str
    settings: dict[str, Any] = field(default_factory=dict)
    prefix_tokens: int = 1
    towers: bool = False
    reads: str = "CLASS_TOKEN"

    @property
    def classifies(self) -> bool:
        return "ForImageClassification" in self.architecture

    def build(self) -> nn.Module:
        """Build it, with the same weights each time; attention is not fused."""
        kind = getattr(transformers, self.architecture, None)
        if kind is None:
            pytest.skip(f"transformers {transformers.__version__} has no {self.architecture}")
        registers = self.reads == "CLASS_BESIDE_AVERAGE" and self.prefix_tokens > 1
        if registers and "num_register_tokens" not in inspect.getsource(kind.forward):
            # It was a mistake, mended in version 4.52.
            pytest.skip(f"transformers {transformers.__version__} averages registers, too")
        sizes = {**_SIZES, **self.settings}
        labels = {"id2label": dict(_LABELS)} if self.classifies else {}
        if self.towers:
            projected = {"projection_dim": 16} if "CLIP" in self.config else {}
            sizes = {"vision_config": {**sizes, **projected}, "text_config": _TEXT, **projected}
        config = getattr(transformers, self.config)(**sizes, **labels)
        model: nn.Module = kind._from_config(config, attn_implementation="eager")
        _draw(model)
        return model.eval()

    def images(self, count: int = 2) -> Tensor:
        side = self.settings.get("image_size", _SIZES["image_size"])
        generator = torch.Generator().manual_seed(1)
        return torch.randn(count, 3, side, side, generator=generator)

    def __str__(self) -> str:
        return self.name


def _draw(model: nn.Module) -> None:
    """Draw weights under which no part of a model is without effect."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            scales = ("norm" in name and name.endswith("weight")) or "lambda" in name
            if parameter.dim() < 2 or "bias_table" in name:
                drawn = 1 + 0.3 * noise if scales else 0.4 * noise
            elif "token" in name or "position" in name:
                drawn = noise
            elif any(part in name for part in ("query", "key", "q_proj", "k_proj", "in_proj")):
                drawn = 0.25 * noise
            elif "classifier" in name:
                drawn = noise
            else:
                drawn = noise / parameter[0].numel() ** 0.5 if parameter.numel() else noise
            parameter.copy_(drawn)


@cache
def source(case: SourceCase) -> nn.Module:
    """Return the model of a case; tests leave it as it is."""
    return case.build()


def outputs(model: nn.Module, images: Tensor) -> Tensor:
    """Return what transformers gives for images: logits, embeddings, or pooled features."""
    with torch.no_grad():
        if hasattr(model, "get_image_features"):
            given = model.get_image_features(pixel_values=images)
            return given if isinstance(given, Tensor) else given.pooler_output
        given = model(images)
    for name in ("logits", "image_embeds"):
        if getattr(given, name, None) is not None:
            return getattr(given, name)
    if type(model).__name__ in ("ViTModel", "DeiTModel"):  # whose pooler timm does not have
        return given.last_hidden_state[:, 0]
    return given.pooler_output


_RELATIVE = {"use_relative_position_bias": True}
_SHARED = {
    "use_shared_relative_position_bias": True,
    "use_absolute_position_embeddings": True,
    "use_mean_pooling": False,
    "layer_scale_init_value": 0.0,
}
_UNBIASED = {"query_bias": False, "mlp_bias": False, "proj_bias": False, "num_register_tokens": 0}


def _case(name: str, architecture: str, config: str, reads: str = "", **others: Any) -> SourceCase:
    reads = {"reads": reads} if reads else {}
    return SourceCase(name=name, architecture=architecture, config=config, **reads, **others)


CASES = (
    _case("vit", "ViTForImageClassification", "ViTConfig"),
    _case("vit-other", "ViTForImageClassification", "ViTConfig",
          settings={"hidden_act": "gelu_new", "qkv_bias": False, "layer_norm_eps": 0.1}),
    _case("vit-bare", "ViTModel", "ViTConfig"),
    _case("deit", "DeiTForImageClassificationWithTeacher", "DeiTConfig", "CLASS_AND_DISTILLATION",
          prefix_tokens=2),
    _case("deit-one-head", "DeiTForImageClassification", "DeiTConfig", prefix_tokens=2),
    _case("ijepa", "IJepaForImageClassification", "IJepaConfig", "TOKEN_AVERAGE",
          prefix_tokens=0),
    _case("dinov2", "Dinov2ForImageClassification", "Dinov2Config", "CLASS_BESIDE_AVERAGE"),
    _case("dinov2-gated", "Dinov2ForImageClassification", "Dinov2Config", "CLASS_BESIDE_AVERAGE",
          settings={"use_swiglu_ffn": True, "mlp_ratio": 3}),
    _case("dinov2-bare", "Dinov2Model", "Dinov2Config"),
    _case("dinov2-registers", "Dinov2WithRegistersForImageClassification",
          "Dinov2WithRegistersConfig", "CLASS_BESIDE_AVERAGE", prefix_tokens=5),
    _case("beit", "BeitForImageClassification", "BeitConfig", "PATCH_AVERAGE", settings=_RELATIVE),
    _case("beit-shared", "BeitForImageClassification", "BeitConfig", settings=_SHARED),
    _case("dinov3", "DINOv3ViTModel", "DINOv3ViTConfig", prefix_tokens=5,
          settings={"num_register_tokens": 4}),
    _case("dinov3-gated", "DINOv3ViTModel", "DINOv3ViTConfig",
          settings={**_UNBIASED, "use_gated_mlp": True, "hidden_act": "silu"}),
    _case("clip", "CLIPForImageClassification", "CLIPConfig", "PATCH_AVERAGE", towers=True),
    _case("clip-both", "CLIPModel", "CLIPConfig", towers=True),
    _case("clip-projected", "CLIPVisionModelWithProjection", "CLIPVisionConfig"),
    _case("clip-bare", "CLIPVisionModel", "CLIPVisionConfig", settings={"hidden_act": "gelu"}),
    _case("siglip", "SiglipForImageClassification", "SiglipConfig", "TOKEN_AVERAGE", towers=True,
          prefix_tokens=0),
    _case("siglip-both", "SiglipModel", "SiglipConfig", "ATTENTION_POOLING", towers=True,
          prefix_tokens=0),
    _case("siglip-bare", "SiglipVisionModel", "SiglipVisionConfig", "ATTENTION_POOLING",
          prefix_tokens=0),
)  # fmt: skip
