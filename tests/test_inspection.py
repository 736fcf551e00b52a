"""What ``inspect`` finds out, against figures computed by hand."""

from __future__ import annotations

import io
import json
from dataclasses import replace

import pytest
import torch
from rich.console import Console
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from tiny import CASES, TinyCase
from vitviz.cli.model_view import show_model
from vitviz.inspection.describe import describe
from vitviz.inspection.parts import ModelSummary
from vitviz.inspection.trace import trace_model
from vitviz.models.building import build_skeleton

WIDTH, TOKENS, HEADS, DEPTH, CLASSES = 192, 197, 3, 12, 1000


@pytest.fixture(scope="module")
def deit() -> ModelSummary:
    return describe(build_skeleton("deit_tiny_patch16_224"), "deit_tiny_patch16_224")


def described(case_name: str) -> ModelSummary:
    case = next(case for case in CASES if case.name == case_name)
    return describe(case.build(), case.name)


def shown(summary: ModelSummary, width: int = 80) -> list[str]:
    stream = io.StringIO()
    show_model(summary, Console(file=stream, width=width))
    return stream.getvalue().splitlines()


def test_deit_tiny_parameters_are_divided_as_by_hand(deit: ModelSummary) -> None:
    patches = 3 * 16 * 16 * WIDTH + WIDTH
    tokens = patches + WIDTH + TOKENS * WIDTH  # with the class token and the positions
    norm = 2 * WIDTH
    qkv, projection = WIDTH * 576 + 576, WIDTH * WIDTH + WIDTH
    mlp = WIDTH * 768 + 768 + 768 * WIDTH + WIDTH
    block = 2 * norm + qkv + projection + mlp
    head = norm + WIDTH * CLASSES + CLASSES
    assert deit.parameters == 5_717_416 == tokens + DEPTH * block + head
    assert deit.blocks is not None
    costs = (deit.tokenization.cost, deit.blocks.cost, deit.head.cost)
    assert [cost.parameters for cost in costs if cost] == [tokens, DEPTH * block, head]
    assert sum(cost.share for cost in costs if cost) == pytest.approx(1)
    assert deit.blocks.kinds[0].parameters == block
    assert deit.unused_parameters == 0


def test_deit_tiny_macs_follow_the_formula_with_attention_products(deit: ModelSummary) -> None:
    patches = 196 * 3 * 16 * 16 * WIDTH
    linears = TOKENS * WIDTH * (576 + WIDTH + 768 + 768)
    products = 2 * HEADS * TOKENS * TOKENS * 64  # queries with keys, probabilities with values
    block = linears + products
    head = WIDTH * CLASSES
    assert deit.blocks is not None
    costs = (deit.tokenization.cost, deit.blocks.cost, deit.head.cost)
    assert [cost.macs for cost in costs if cost] == [patches, DEPTH * block, head]
    assert deit.blocks.kinds[0].macs == block
    assert deit.macs == patches + DEPTH * block + head


def test_deit_tiny_output_shapes_of_its_parts(deit: ModelSummary) -> None:
    assert deit.blocks is not None
    costs = (deit.tokenization.cost, deit.blocks.cost, deit.head.cost)
    shapes = [cost.output_shape for cost in costs if cost]
    assert shapes == [(1, 197, 192), (1, 197, 192), (1, 1000)]
    assert deit.output_shape == (1, 1000)


def test_deit_tiny_tokens_and_position(deit: ModelSummary) -> None:
    part = deit.tokenization
    assert part.patches is not None
    assert (part.patches.operation, part.patches.convolutions) == ("Conv2d", 1)
    assert (part.patches.kernel, part.patches.stride) == ((16, 16), (16, 16))
    assert (part.patches.in_channels, part.patches.out_channels) == (3, 192)
    assert (part.patches.grid, part.patches.patch_tokens) == ((14, 14), 196)
    assert [(one.kind, one.count) for one in part.extra_tokens] == [("class", 1)]
    (position,) = part.positions
    assert (position.kind, position.learned, position.shape) == ("absolute", True, (1, 197, 192))
    assert position.parameters == ("pos_embed",)
    assert position.place == "added after the class token is prepended, before the first block"
    assert part.tokens == TOKENS


def test_deit_tiny_block(deit: ModelSummary) -> None:
    assert deit.blocks is not None
    (kind,) = deit.blocks.kinds
    (attention,) = kind.attentions
    (feed_forward,) = kind.feed_forwards
    assert kind.indices == tuple(range(12))
    assert [layer.name for layer in kind.order] == ["norm1", "attn", "norm2", "mlp"]
    assert (attention.heads, attention.head_dim, attention.fused) == (3, 64, True)
    assert [(one.name, one.inputs, one.outputs) for one in attention.projections] == [
        ("qkv", 192, 576)
    ]
    assert (attention.probabilities, attention.over_tokens) == ((3, 197, 197), True)
    assert attention.drop == "attn.attn_drop"
    assert [(one.inputs, one.outputs) for one in feed_forward.layers] == [(192, 768), (768, 192)]
    assert feed_forward.activation == "GELU"
    assert (kind.layer_scales, kind.drop_path) == ((), None)


def test_deit_tiny_head_and_support(deit: ModelSummary) -> None:
    head = deit.head
    assert [layer.name for layer in head.norms] == ["norm"]
    assert (head.norm_after_pooling, head.pooling, head.classes) == (False, "class token", 1000)
    assert [(one.name, one.inputs, one.outputs) for one in head.linears] == [("head", 192, 1000)]
    assert (deit.support.rollout, deit.support.grad_rollout) == (True, True)
    assert deit.support.grid == (14, 14)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_parts_sum_to_the_model_for_every_layout(case: TinyCase) -> None:
    summary = described(case.name)
    assert summary.error is None
    assert summary.blocks is not None
    costs = (summary.tokenization.cost, summary.blocks.cost, summary.head.cost)
    parameters = [cost.parameters for cost in costs if cost]
    assert sum(parameters) + summary.unused_parameters == summary.parameters
    assert sum(cost.macs or 0 for cost in costs if cost) == summary.macs
    assert summary.blocks.count == case.blocks
    assert summary.tokenization.tokens == case.tokens
    assert summary.tokenization.patches is not None
    assert summary.tokenization.patches.grid == case.grid
    assert sum(one.count for one in summary.tokenization.extra_tokens) == case.prefix_tokens


@pytest.mark.parametrize(
    ("case_name", "kind", "shape", "learned", "place"),
    [
        ("distilled", "absolute", (1, 18, 48), True,
         "added after the class token and distillation token are prepended"),
        ("registers", "absolute", (1, 21, 48), True,
         "added after the class token and register tokens are prepended"),
        ("relative-position", "relative bias", (1, 3, 16, 16), True,
         "added to the attention scores"),
        ("beit", "relative bias", (1, 3, 17, 17), True, "added to the attention scores"),
    ],
)  # fmt: skip
def test_position_embedding_is_read_from_the_model(
    case_name: str, kind: str, shape: tuple[int, ...], learned: bool, place: str
) -> None:
    (position,) = described(case_name).tokenization.positions
    assert (position.kind, position.shape, position.learned) == (kind, shape, learned)
    assert position.place.startswith(place)


def test_rotary_position_leaves_the_class_token_alone() -> None:
    absolute, rotary = described("rope").tokenization.positions
    assert (absolute.kind, rotary.kind) == ("absolute", "rotary")
    assert not rotary.learned
    assert rotary.times == 4
    assert "patch tokens only" in rotary.place


def test_bias_of_each_block_is_reported_once_with_its_count() -> None:
    (position,) = described("beit").tokenization.positions
    assert position.parameters == ("blocks.i.attn.relative_position_bias_table",)
    assert position.times == 4


def tiny_vit(**arguments: object) -> VisionTransformer:
    settings = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "num_heads": 3, "depth": 3}
    with torch.device("meta"):
        return VisionTransformer(**{**settings, "num_classes": 7, **arguments}).eval()


def test_position_without_an_entry_for_the_class_token_is_told_apart() -> None:
    summary = describe(tiny_vit(no_embed_class=True), "tiny")
    (position,) = summary.tokenization.positions
    assert position.shape == (1, 16, 48)
    assert position.place == (
        "added to the patch tokens, before the class token is prepended, before the first block"
    )


def test_position_without_prefix_tokens_is_added_to_the_patches() -> None:
    summary = describe(tiny_vit(class_token=False, global_pool="avg"), "tiny")
    (position,) = summary.tokenization.positions
    assert position.shape == (1, 16, 48)
    assert position.place == "added to the patch tokens, before the first block"
    assert summary.tokenization.extra_tokens == ()


def test_norm_before_the_blocks_is_named_after_the_position() -> None:
    summary = describe(tiny_vit(pre_norm=True), "tiny")
    assert [layer.name for layer in summary.tokenization.norms] == ["norm_pre"]
    assert "norm_pre" not in summary.tokenization.positions[0].place


def test_model_without_positions_claims_none() -> None:
    summary = describe(tiny_vit(pos_embed="none"), "tiny")
    assert summary.tokenization.positions == ()
    assert summary.tokenization.later_convolutions == 0


def test_unknown_meeting_with_the_tokens_is_not_guessed() -> None:
    class Odd(VisionTransformer):
        def __init__(self, **arguments: object) -> None:
            super().__init__(**arguments)
            self.gate = nn.Parameter(torch.ones(17, 48))

        def _pos_embed(self, x: torch.Tensor) -> torch.Tensor:
            return torch.maximum(super()._pos_embed(x), self.gate)

    with torch.device("meta"):
        module = Odd(img_size=32, patch_size=8, embed_dim=48, num_heads=3, depth=2).eval()
    _, odd = describe(module, "odd").tokenization.positions
    assert (odd.kind, odd.parameters) == ("not determined", ("gate",))
    assert "maximum" in odd.place


def test_differing_blocks_are_named() -> None:
    module = tiny_vit()
    with torch.device("meta"):
        module.blocks[1].mlp.fc1 = nn.Linear(48, 96)
        module.blocks[1].mlp.fc2 = nn.Linear(96, 48)
    blocks = describe(module, "tiny").blocks
    assert blocks is not None
    assert [kind.indices for kind in blocks.kinds] == [(0, 2), (1,)]


def test_stochastic_depth_does_not_make_blocks_differ() -> None:
    blocks = describe(tiny_vit(drop_path_rate=0.2, init_values=0.1), "tiny").blocks
    assert blocks is not None
    (kind,) = blocks.kinds
    assert kind.layer_scales == ("ls1", "ls2")
    assert kind.drop_path is not None
    assert kind.drop_path[1] == pytest.approx(0.2)


def test_unfused_attention_is_had_at_its_dropout() -> None:
    module = tiny_vit()
    for block in module.blocks:
        block.attn.fused_attn = False
    fused, unfused = describe(tiny_vit(), "fused"), describe(module, "unfused")
    assert unfused.blocks is not None
    (attention,) = unfused.blocks.kinds[0].attentions
    assert not attention.fused
    assert (attention.probabilities, attention.drop) == ((3, 17, 17), "attn.attn_drop")
    assert fused.macs == unfused.macs


def test_model_without_classes_has_no_grad_rollout() -> None:
    summary = describe(tiny_vit(num_classes=0), "tiny")
    assert (summary.support.rollout, summary.support.grad_rollout) == (True, False)
    assert summary.head.linears == ()
    assert any("no logit" in line for line in shown(summary))


@pytest.mark.parametrize("name", ["resnet18", "swin_tiny_patch4_window7_224", "hiera_tiny_224"])
def test_other_architectures_are_described_without_guessing(name: str) -> None:
    summary = describe(build_skeleton(name), name)
    assert summary.macs
    assert summary.outline
    assert not summary.support.rollout
    assert summary.support.reason
    assert any("not determined" in line for line in shown(summary))


def test_model_that_does_not_run_still_has_its_parameters() -> None:
    class Broken(VisionTransformer):
        def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
            raise RuntimeError("no head today")

    with torch.device("meta"):
        module = Broken(img_size=32, patch_size=8, embed_dim=48, num_heads=3, depth=2).eval()
    summary = describe(module, "broken")
    assert (summary.macs, summary.error) == (None, "no head today")
    assert summary.parameters == sum(one.numel() for one in module.parameters())
    assert any("no head today" in line for line in shown(summary))


def test_inspecting_leaves_the_model_as_it_was() -> None:
    module = CASES[0].build().train()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    describe(module, "tiny")
    assert all(part.training for part in module.modules())
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in module.modules())
    assert all(torch.equal(before[name], one) for name, one in module.state_dict().items())


def test_giant_model_is_traced_without_memory_for_its_weights() -> None:
    module = build_skeleton("vit_giant_patch14_dinov2")
    trace = trace_model(module, (3, 28, 28))
    assert trace.error is not None  # it wants 518 pixels, and says so
    assert all(parameter.is_meta for parameter in module.parameters())


def test_json_form_holds_plain_types(deit: ModelSummary) -> None:
    plain = deit.to_dict()
    assert json.loads(json.dumps(plain)) == plain
    assert plain["tokenization"]["positions"][0]["shape"] == [1, 197, 192]


def test_view_fits_forty_lines_of_eighty_columns(deit: ModelSummary) -> None:
    lines = shown(deit)
    assert len(lines) <= 40
    assert all(len(line) <= 80 and line == line.rstrip() for line in lines)


@pytest.mark.parametrize("width", [60, 80, 120])
def test_view_says_the_same_at_any_width(deit: ModelSummary, width: int) -> None:
    text = " ".join(" ".join(shown(deit, width)).split())
    for fact in (
        "12 × Block, all identical",
        "14 rows × 14 columns = 196 patch tokens",
        "qkv 192 → 576, fused",
        "192 → 768 → 192, GELU",
        "added after the class token is prepended, before the first block",
        "blocks[i].attn.attn_drop",
        "head 192 → 1000",
    ):
        assert fact in text


def test_names_are_not_read_as_markup(deit: ModelSummary) -> None:
    lines = shown(replace(deit, name="[red]a[/red] [/nope]", error="[bold]what[/x]"))
    assert "[red]a[/red] [/nope]" in lines[0]
    assert any("[bold]what[/x]" in line for line in lines)


def test_drop_path_starts_at_zero_where_the_first_block_never_drops() -> None:
    blocks = describe(tiny_vit(drop_path_rate=0.2), "tiny").blocks
    assert blocks is not None
    assert blocks.kinds[0].drop_path == pytest.approx((0, 0.2))


def test_class_token_of_another_sequence_is_not_taken_off_the_patch_tokens() -> None:
    # CrossViT has two sequences, of 12 and of 16 pixels a patch, each with its class token.
    part = describe(build_skeleton("crossvit_tiny_240"), "crossvit_tiny_240").tokenization
    assert part.patches is not None
    assert part.tokens == 401
    assert (part.patches.patch_tokens, part.patches.grid) == (20 * 20, (20, 20))


def test_position_that_is_added_in_place_is_seen() -> None:
    class InPlace(VisionTransformer):
        def _pos_embed(self, x: torch.Tensor) -> torch.Tensor:
            x = x.flatten(1, 2) if self.dynamic_img_size else x
            x += self.pos_embed
            return torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)

    with torch.device("meta"):
        settings = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "num_heads": 3, "depth": 2}
        module = InPlace(**settings, no_embed_class=True).eval()
    (position,) = describe(module, "in place").tokenization.positions
    assert (position.kind, position.parameters) == ("absolute", ("pos_embed",))
    assert position.place.startswith("added to the patch tokens, before the class token")
