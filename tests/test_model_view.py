"""What ``inspect`` shows of models, in the words that a reader gets."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from rich.console import Console
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from fixtures_io import TORCH_IS_OLD
from vitviz.cli.model_view import show_model
from vitviz.inspection.describe import describe
from vitviz.inspection.parts import BlockKind, Cost, Layer, ModelSummary
from vitviz.models.building import build_skeleton


def shown(summary: ModelSummary, width: int = 100) -> str:
    """Return the view with every run of blanks as one: lines break where the width says."""
    stream = io.StringIO()
    show_model(summary, Console(file=stream, width=width))
    return " ".join(stream.getvalue().split())


def small_vit(
    module: Callable[..., VisionTransformer] = VisionTransformer, **arguments: object
) -> ModelSummary:
    settings = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "num_heads": 3, "depth": 2}
    with torch.device("meta"):
        return describe(module(**{**settings, "num_classes": 7, **arguments}).eval(), "small")


# Models of timm, each with what its paper or its code says of it

FACTS = {
    "vit_small_patch16_dinov3": [
        "class token 1 learned (cls_token), joins before the blocks",
        "register 4 learned (reg_token)",
        "fixed sine and cosine rotary (RoPE)",
        "(patch tokens only) in 12 places, the same in all",
        "layer scale gamma_1, gamma_2",
        "linear none: the output is the pooled features, no classes",
        "only rollout, attention, features and similarity",
    ],
    "vit_srelpos_small_patch16_224": [
        "other tokens none: no class token, no registers",
        "learned relative-position bias (1, 6, 196, 196) (shared_rel_pos.mlp, 4 tensors)",
        "in 12 places, the same in all",
        "pooling average of all tokens",
    ],
    "samvit_base_patch16": [
        "multiplied with the queries, then added to the attention scores in 12 places, each its",
        "of 2 different builds",
        "8 blocks 0–1, 3–4, 6–7, 9–10:",
        "4 blocks 2, 5, 8, 11:",
        "heads not determined × 64 channels",
        "not one row and column per token",
    ],
    "cait_xxs24_224": [
        "class token 1 learned (cls_token), joins after the blocks",
        "proj_l 4 → 4, not fused",
        "at blocks[i].attn.attn_drop",
    ],
    "xcit_nano_12_p16_224": [
        "convolutional stem patch_embed (ConvPatchEmbed): 4 convolutions",
        "a token sees beyond its own patch",
        "sine and cosine absolute",
        "probabilities (4, 32, 32)",  # between channels
        "pooling attention in cls_attn_blocks.0.attn (ClassAttn)",
    ],
    "mixer_b16_224": [
        "positions none: nothing tells one token from another",
        "attention not determined: no softmax was seen in the block",
        "1 Tokenization 591 k parameters",  # without a positional embedding
        "MLP 196 → 384 → 196, GELU (mlp_tokens: Mlp)",
    ],
    "eva02_tiny_patch14_224": ["192 → 1024, one half gates the other → 512 → 192, SiLU"],
    "vitamin_small_224": ["384 → 2 × 768, one gates the other → 768 → 384, GELU"],
    "naflexvit_base_patch16_gap": [
        "Linear, 768 → 768 channels, on patches cut out of the image",
        "grid 24 rows × 24 columns = 576 patch tokens",
    ],
    "vit_base_patch16_xp_224": [
        "norm RmsNorm (norm_pre), before the first block",
        "norm RmsNorm (in_norm, q_norm, k_norm)",
        "MLP not determined",
    ],
    "hiera_tiny_224": [
        "of 7 different builds",
        "block 1 408 k parameters",
        "norm1 → proj → attn → norm2 → mlp",
        "6 blocks 4–9:",
    ],
    "swinv2_tiny_window8_256": [
        "fixed mask or bias (1, 64, 1, 64, 64)",
        "not determined: no single sequence of blocks. The modules as they run:",
    ],
    "volo_d1_224": ["class token 1 learned (cls_token)", "post_network.0–1 2 × ClassBlock 2.96 M"],
    "poolformer_s12": [
        "no embedding; 3 convolutions see neighbours, and the border by their padding",
    ],
    "swin_tiny_patch4_window7_224": [
        "1 Tokenization + positional embedding",
        "grid 56 rows × 56 columns after patch_embed",
        "runs norm → head norm LayerNorm (norm), before pooling pooling average",
    ],
    "convnext_tiny": [
        "1 Stem",
        "grid 56 rows × 56 columns after stem",
        "norm LayerNorm2d (head.norm), after pooling pooling average",
    ],
    "resnet50": [
        "1 Stem",
        "runs global_pool → fc norm none seen pooling average",
    ],
    "twins_svt_small": [
        "first layer Conv2d, 3 → 64 channels, kernel 4×4, stride 4×4",
        "grid 56 rows × 56 columns after patch_embeds.0",
    ],
    "efficientvit_b0": ["norm BatchNorm2d (head.in_conv.norm), LayerNorm (head.classifier.1)"],
    "vit_so400m_patch14_siglip_224": [
        "sequence 256 tokens × 1152 channels",
        "qkv 1152 → 3456",
    ],
    "tnt_s_patch16_224": [
        "grid not determined",  # two sequences, one within each patch
        "attention 4 heads × 6 channels, qk 24 → 48, v 24 → 24",
        "attention 6 heads × 64 channels, qk 384 → 768, v 384 → 384",
        "norm LayerNorm (norm1_proj, norm2_proj), before the first block",
    ],
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("name", "facts"), FACTS.items(), ids=FACTS)
def test_view_says_what_is_known_of_the_model(name: str, facts: list[str]) -> None:
    text = shown(describe(build_skeleton(name), name))
    if TORCH_IS_OLD and "unsupported scalarType" in text:
        pytest.skip(f"torch {torch.__version__} does not run it without weights")
    for fact in facts:
        assert fact in text, text


# Models that timm does not have


class Idle(VisionTransformer):
    """Has parameters that nothing uses."""

    def __init__(self, **arguments: object) -> None:
        super().__init__(**arguments)
        self.spare = nn.Parameter(torch.ones(1234))


class ManyPositions(VisionTransformer):
    """Adds one constant after the other."""

    def __init__(self, **arguments: object) -> None:
        super().__init__(**arguments)
        for letter in "abcde":
            self.register_parameter(f"place_{letter}", nn.Parameter(torch.ones(1, 17, 48)))

    def _pos_embed(self, x: Tensor) -> Tensor:
        tokens = super()._pos_embed(x)
        for letter in "abcde":
            tokens = tokens + getattr(self, f"place_{letter}")
        return tokens


class OtherBlock(Block):
    """The same under another name."""


def mixed_blocks(**arguments: object) -> VisionTransformer:
    model = VisionTransformer(**arguments)
    model.blocks[1] = OtherBlock(48, 3)
    return model


def all_different(**arguments: object) -> VisionTransformer:
    model = VisionTransformer(**{**arguments, "depth": 9})
    for index, block in enumerate(model.blocks):
        block.mlp.fc1, block.mlp.fc2 = nn.Linear(48, 50 + index), nn.Linear(50 + index, 48)
    return model


def scattered(**arguments: object) -> VisionTransformer:
    model = VisionTransformer(**{**arguments, "depth": 20})
    for block in model.blocks[::2]:
        block.mlp.fc1, block.mlp.fc2 = nn.Linear(48, 50), nn.Linear(50, 48)
    return model


@pytest.mark.parametrize(
    ("module", "arguments", "facts"),
    [
        (Idle, {}, ["1.23 k parameters take no part in a forward pass"]),
        (ManyPositions, {}, ["and 2 more (all with --json)"]),
        (mixed_blocks, {}, ["2 × Block and OtherBlock, of 2 different builds",
                            "block 1 OtherBlock ·"]),
        (all_different, {}, ["of 9 different builds",
                             "and 2 more kinds of block (all with --json)"]),
        (scattered, {}, ["10 blocks 0, 2, 4, 6, 8, 10, … 18:",
                         "10 blocks 1, 3, 5, 7, 9, 11, … 19:"]),
        (VisionTransformer, {"drop_path_rate": 0.2}, ["drop path 0 to 0.2, in training"]),
        (VisionTransformer, {"qk_norm": True}, ["qkv 48 → 144, LayerNorm (q_norm, k_norm), fused"]),
        (VisionTransformer, {"depth": 1}, ["Transformer blocks: 1 × Block 2"]),
        (VisionTransformer, {"reg_tokens": 1}, ["register token 1 learned (reg_token)"]),
        (VisionTransformer, {"num_classes": 0}, ["→ features (48)"]),
    ],
    ids=["idle", "positions", "kinds", "many-kinds", "scattered", "drop-path", "qk-norm", "one",
         "register", "headless"],
)  # fmt: skip
def test_view_tells_what_is_special(
    module: Callable[..., VisionTransformer], arguments: dict[str, object], facts: list[str]
) -> None:
    text = shown(small_vit(module, **arguments))
    for fact in facts:
        assert fact in text, text


class OwnSoftmax(nn.Module):
    """Attention whose probabilities no dropout module sees."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(48, 144)

    def forward(self, x: Tensor, **_: object) -> Tensor:
        queries, keys, values = self.qkv(x).chunk(3, dim=-1)
        return (queries @ keys.mT).softmax(dim=-1) @ values


def own_softmax(**arguments: object) -> VisionTransformer:
    model = VisionTransformer(**arguments)
    for block in model.blocks:
        block.attn = OwnSoftmax()
    return model


def test_attention_without_a_dropout_is_had_after_its_softmax() -> None:
    text = shown(small_vit(own_softmax))
    assert "heads not determined, qkv 48 → 144, not fused" in text
    assert "after the softmax of attn" in text


class Bottleneck(nn.Module):
    """Layers that are no chain of widths and no gate."""

    def __init__(self) -> None:
        super().__init__()
        self.narrow, self.wide, self.out = nn.Linear(48, 8), nn.Linear(48, 20), nn.Linear(28, 48)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.cat([self.narrow(x), self.wide(x)], dim=-1))


def bottleneck(**arguments: object) -> VisionTransformer:
    model = VisionTransformer(**arguments)
    for block in model.blocks:
        block.mlp = Bottleneck()
    return model


def test_layers_that_are_no_chain_are_listed() -> None:
    text = shown(small_vit(bottleneck))
    assert "MLP narrow 48 → 8, wide 48 → 20, out 28 → 48, activation not determined" in text


# What could not be found out


def first_kind(summary: ModelSummary) -> BlockKind:
    assert summary.blocks is not None
    return summary.blocks.kinds[0]


def with_kind(summary: ModelSummary, **changes: object) -> ModelSummary:
    assert summary.blocks is not None
    kinds = (replace(first_kind(summary), **changes),)
    return replace(summary, blocks=replace(summary.blocks, kinds=kinds))


def test_more_attentions_than_fit_are_counted() -> None:
    summary = small_vit()
    crowded = with_kind(summary, attentions=first_kind(summary).attentions * 5)
    assert "and 3 more attentions" in shown(crowded)


def test_what_is_not_determined_is_said_and_not_guessed() -> None:
    summary = small_vit()
    assert "not determined MACs" in shown(with_kind(summary, macs=None))
    nothing = replace(summary, tokenization=replace(summary.tokenization, patches=None))
    assert "patches not determined grid not determined" in shown(nothing)
    patches = summary.tokenization.patches
    assert patches is not None
    ungridded = replace(summary.tokenization, patches=replace(patches, grid=None))
    text = shown(replace(summary, tokenization=ungridded))
    assert "16 patch tokens, rows and columns not determined" in text
    text = shown(replace(summary, macs=None, output_shape=None))
    assert "MACs not determined · image (3, 32, 32) → output not determined" in text


def outlined(*names: str, macs: int | None = 5) -> ModelSummary:
    """Return a model without blocks, of modules that are alike."""
    cost = Cost(parameters=100, share=0.1, macs=macs, output_shape=(1, 4))
    layers = tuple(Layer(name=name, kind="Stage", cost=cost) for name in names)
    return replace(small_vit(), blocks=None, outline=layers)


def test_neighbours_that_are_alike_are_one_line_with_their_sum() -> None:
    text = shown(outlined("stem", "stages.0", "stages.1", "stages.2"))
    assert "stem Stage 100 5 (1, 4) stages.0–2 3 × Stage 300 15 (1, 4)" in text
    text = shown(outlined("stages.0", "stages.1", macs=None))
    assert "stages.0–1 2 × Stage 200 not determined (1, 4)" in text


def test_long_outline_is_cut_and_that_is_said() -> None:
    text = shown(outlined(*(f"part{index}.only" for index in range(15))))
    assert "part11.only" in text
    assert "part12.only" not in text
    assert "and 3 more (all with --json)" in text


@pytest.mark.parametrize(
    ("count", "says"),
    [
        *((0, "0"), (999, "999"), (1_000, "1.00 k"), (9_994, "9.99 k"), (9_996, "10.0 k")),
        *((99_960, "100 k"), (999_499, "999 k"), (999_600, "1.00 M"), (5_717_416, "5.72 M")),
        *((1_140_000_000, "1.14 G"), (1_780_000_000_000, "1.78 T"), (10**16, "10000 T")),
    ],
)
def test_counts_have_three_figures(count: int, says: str) -> None:
    assert f" {says} parameters · " in shown(replace(small_vit(), parameters=count))
