"""Families that nobody has seen: vision transformers written by hand, each with one surprise.

A rule has to see it, since no table of names can: rollout is refused with the reason, and a plain
one passes.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fixtures_io import tiny_module
from vitviz.errors import UnsupportedModelError
from vitviz.explaining.batch import class_requests
from vitviz.methods.rollout import Rollout
from vitviz.models.model import load_model
from vitviz.models.tokens import Readout

ROWS, COLS = 3, 5
PATCHES = ROWS * COLS
TOKENS = 1 + PATCHES
HEADS, WIDTH = 2, 2 * TOKENS  # as many channels a head as tokens: shapes alone tell nothing

pytestmark = pytest.mark.usefixtures("one_thread")


class Patches(nn.Module):
    """Makes tokens of an image."""

    patch_size = (8, 8)
    img_size = (8 * ROWS, 8 * COLS)

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, WIDTH, 8, stride=8)

    def forward(self, images: Tensor) -> Tensor:
        return self.proj(images).flatten(2).transpose(1, 2)


class Attend(nn.Module):
    """Self-attention by torch's function."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.proj = nn.Linear(WIDTH, WIDTH)

    def split(self, tokens: Tensor) -> Tensor:
        batch, count, _ = tokens.shape
        qkv = self.qkv(tokens).reshape(batch, count, 3, HEADS, WIDTH // HEADS)
        return qkv.permute(2, 0, 3, 1, 4)

    def join(self, heads: Tensor) -> Tensor:
        return self.proj(heads.transpose(1, 2).flatten(2))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.join(F.scaled_dot_product_attention(*self.split(tokens)))


class Block(nn.Module):
    """A plain transformer block."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(WIDTH)
        self.attn = Attend()
        self.norm2 = nn.LayerNorm(WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 32), nn.GELU(), nn.Linear(32, WIDTH))

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = tokens + self.attn(self.norm1(tokens))
        return tokens + self.mlp(self.norm2(tokens))


class Plain(nn.Module):
    """A plain vision transformer of three blocks that reads its class token."""

    embed_dim = WIDTH
    num_classes = 7
    num_prefix_tokens = 1
    global_pool = "token"

    def __init__(self, block: Callable[[], nn.Module] = Block) -> None:
        super().__init__()
        self.patch_embed = Patches()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, WIDTH))
        self.pos_embed = nn.Parameter(torch.randn(1, TOKENS, WIDTH))
        self.blocks = nn.Sequential(Block(), block(), Block())
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, 7)

    def enter(self, images: Tensor) -> Tensor:
        patches = self.patch_embed(images)
        return torch.cat([self.cls_token.expand(len(images), -1, -1), patches], 1) + self.pos_embed

    def forward_features(self, images: Tensor) -> Tensor:
        return self.norm(self.blocks(self.enter(images)))

    def pool(self, tokens: Tensor) -> Tensor:
        return tokens[:, 0] if self.global_pool == "token" else tokens[:, 1:].mean(dim=1)

    def forward_head(self, tokens: Tensor, pre_logits: bool = False) -> Tensor:
        pooled = self.pool(tokens)
        return pooled if pre_logits else self.head(pooled)

    def forward(self, images: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(images))


class Average(Plain):
    """Averages its patches, and has a class token beside them."""

    global_pool = "avg"


class OwnSoftmax(Attend):
    """Attention written out, with the dropout that timm gives it."""

    def __init__(self) -> None:
        super().__init__()
        self.attn_drop = nn.Dropout(0.1)

    def forward(self, tokens: Tensor) -> Tensor:
        query, key, value = self.split(tokens)
        scores = query @ key.transpose(-2, -1) * (WIDTH // HEADS) ** -0.5
        return self.join(self.attn_drop(scores.softmax(dim=-1)) @ value)


class Written(Block):
    def __init__(self) -> None:
        super().__init__()
        self.attn = OwnSoftmax()


def _written_out() -> nn.Module:
    model = Plain()
    model.blocks = nn.Sequential(Written(), Written(), Written())
    return model


# Surprises inside a block.


class TwiceAttending(Block):
    def forward(self, tokens: Tensor) -> Tensor:
        return super().forward(tokens + self.attn(tokens))


class NeverAttending(Block):
    def forward(self, tokens: Tensor) -> Tensor:
        return tokens + self.mlp(self.norm2(tokens))


class Hidden(Attend):
    """Attention that nothing shows: neither torch's function nor a dropout is called."""

    def forward(self, tokens: Tensor) -> Tensor:
        query, key, value = self.split(tokens)
        return self.join((query @ key.transpose(-2, -1)).softmax(dim=-1) @ value)


class HiddenAttending(Block):
    def __init__(self) -> None:
        super().__init__()
        self.attn = Hidden()


class Dropping(Block):
    """Loses the last tokens."""

    def forward(self, tokens: Tensor) -> Tensor:
        return super().forward(tokens)[:, :-4]


class Convolving(Block):
    """A depthwise convolution over the patches, as positional encodings are made of."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(WIDTH, WIDTH, 3, padding=1, groups=WIDTH)

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = super().forward(tokens)
        grid = tokens[:, 1:].transpose(1, 2).unflatten(2, (ROWS, COLS))
        return torch.cat([tokens[:, :1], tokens[:, 1:] + self.conv(grid).flatten(2).mT], dim=1)


class MixingTokens(Block):
    """A linear layer across tokens beside the one across channels."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Linear(TOKENS, TOKENS)

    def forward(self, tokens: Tensor) -> Tensor:
        return super().forward(tokens) + self.tokens(tokens.mT).mT


class Squeezing(Block):
    """Channels gated with the average of all tokens."""

    def forward(self, tokens: Tensor) -> Tensor:
        return super().forward(tokens) * tokens.mean(dim=1, keepdim=True).sigmoid()


class Shifting(Block):
    """Tokens that move one place."""

    def forward(self, tokens: Tensor) -> Tensor:
        return super().forward(tokens).roll(1, dims=1)


class ValueConvolving(Attend):
    """Values that are mixed before attention weighs them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(WIDTH // HEADS, WIDTH // HEADS, 3, padding=1)

    def forward(self, tokens: Tensor) -> Tensor:
        query, key, value = self.split(tokens)
        mixed = self.conv(value.flatten(0, 1).mT).mT.unflatten(0, value.shape[:2])
        return self.join(F.scaled_dot_product_attention(query, key, mixed))


class ValueMixing(Block):
    def __init__(self) -> None:
        super().__init__()
        self.attn = ValueConvolving()


class AcrossChannels(Attend):
    """Channels attend to channels."""

    def forward(self, tokens: Tensor) -> Tensor:
        query, key, value = self.split(tokens).mT
        return self.join(F.scaled_dot_product_attention(query, key, value).mT)


class ChannelAttending(Block):
    def __init__(self) -> None:
        super().__init__()
        self.attn = AcrossChannels()


class InWindows(Attend):
    """Tokens attend within halves of the sequence."""

    def forward(self, tokens: Tensor) -> Tensor:
        halves = tokens.unflatten(1, (2, TOKENS // 2)).flatten(0, 1)
        return super().forward(halves).unflatten(0, (-1, 2)).flatten(1, 2)


class WindowAttending(Block):
    def __init__(self) -> None:
        super().__init__()
        self.attn = InWindows()


class FewKeys(Attend):
    """Keys and values that are averaged in pairs."""

    def forward(self, tokens: Tensor) -> Tensor:
        query, key, value = self.split(tokens)
        pairs = [part.unflatten(2, (TOKENS // 2, 2)).mean(dim=3) for part in (key, value)]
        return self.join(F.scaled_dot_product_attention(query, *pairs))


class KeyPooling(Block):
    def __init__(self) -> None:
        super().__init__()
        self.attn = FewKeys()


# Surprises between and behind the blocks.


class Refining(Plain):
    """One more attention of all tokens behind the blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.refine = Attend()

    def forward_features(self, images: Tensor) -> Tensor:
        return self.refine(super().forward_features(images))


class AttendingFirst(Plain):
    """One attention of all tokens before the blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.first = Attend()

    def enter(self, images: Tensor) -> Tensor:
        return self.first(super().enter(images))


class Between(Plain):
    """Tokens mixed once, after the first block, which looks like all others."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Linear(TOKENS, TOKENS)

    def forward_features(self, images: Tensor) -> Tensor:
        tokens = self.blocks[0](self.enter(images))
        return self.norm(self.blocks[1:](tokens + self.tokens(tokens.mT).mT))


class Neck(Plain):
    """Tokens mixed once, behind the blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Linear(TOKENS, TOKENS)

    def forward_features(self, images: Tensor) -> Tensor:
        return self.tokens(super().forward_features(images).mT).mT


class AverageNeck(Neck):
    """Tokens mixed once, behind the blocks, and averaged."""

    global_pool = "avg"


class Flagged(Block):
    """Moves tokens where a flag says so, which no print-out shows."""

    shifts = False

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = super().forward(tokens)
        return tokens.roll(1, dims=1) if self.shifts else tokens


def _flagged() -> nn.Module:
    model = Plain()
    model.blocks = nn.Sequential(Flagged(), Flagged(), Flagged())
    model.blocks[1].shifts = True
    return model


def _dropping_at_the_end() -> nn.Module:
    model = Average()
    model.blocks[2] = Dropping()
    return model


def _twice_through() -> nn.Module:
    """Weights shared: the three blocks run twice."""
    model = Plain()
    once = model.blocks
    model.forward_features = lambda images: model.norm(once(once(model.enter(images))))
    return model


def _backwards() -> nn.Module:
    model = Plain()
    model.forward_features = lambda images: model.norm(
        model.blocks[0](model.blocks[1](model.blocks[2](model.enter(images))))
    )
    return model


# Heads.


class Maximum(Plain):
    global_pool = "max"

    def pool(self, tokens: Tensor) -> Tensor:
        return tokens.amax(dim=1)


class Uneven(Average):
    """An average in which the middle of the image counts more."""

    def pool(self, tokens: Tensor) -> Tensor:
        return torch.linspace(0.1, 1, PATCHES).to(tokens) @ tokens[:, 1:] / PATCHES


class SecretAverage(Plain):
    """Says that it reads the class token."""

    def pool(self, tokens: Tensor) -> Tensor:
        return tokens.mean(dim=1)


class OtherToken(Plain):
    """Reads the last token for the first."""

    def pool(self, tokens: Tensor) -> Tensor:
        return tokens[:, -1]


class Everything(Plain):
    """Joins all tokens end to end."""

    global_pool = ""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(TOKENS * WIDTH, 7)

    def pool(self, tokens: Tensor) -> Tensor:
        return tokens.flatten(1)


class OwnForward(Plain):
    """Does not use the head that it has."""

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.forward_features(images).mean(dim=1))


class OwnHead(Plain):
    """Has its own way from the blocks to the logits, and no ``forward_head``."""

    forward_head = None

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.forward_features(images).amax(dim=1))


ATTENDS = "attention calls in 3 blocks"
CHAIN = "attention maps cannot be multiplied;"
MIXES = "mixes tokens by more than attention"
OUTSIDE = "attention calls outside its blocks|attention calls in 3 blocks"
READS = "depends on [0-9]+ of 16 tokens"
EVEN = "changes with the order of its tokens"
BETWEEN = "between its blocks"
POOLS = "pools its tokens by"

BLOCKS = [
    (TwiceAttending, ATTENDS),
    (NeverAttending, ATTENDS),
    (HiddenAttending, ATTENDS),
    (Dropping, CHAIN),
    (Convolving, MIXES),
    (MixingTokens, MIXES),
    (Squeezing, MIXES),
    (Shifting, MIXES),
    (ValueMixing, MIXES),
    (ChannelAttending, MIXES),
    (WindowAttending, CHAIN),
    (KeyPooling, CHAIN),
]
MODELS = [
    (Refining, OUTSIDE),
    (AttendingFirst, OUTSIDE),
    (Between, BETWEEN),
    (Neck, READS),
    (AverageNeck, READS),
    (_flagged, MIXES),
    (_dropping_at_the_end, CHAIN),
    (_twice_through, ATTENDS),
    (_backwards, ATTENDS),
    (Maximum, POOLS),
    (Uneven, EVEN),
    (SecretAverage, READS),
    (OtherToken, READS),
    (Everything, POOLS),
    (OwnForward, READS),
    (OwnHead, READS),
]


def _seeded(build: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return build().eval()


def _assert_refused(model: nn.Module, reason: str) -> None:
    with pytest.raises(UnsupportedModelError, match=reason) as caught:
        class_requests(load_model(model, device="cpu"), Rollout())
    message = str(caught.value)
    assert message.startswith(type(model).__name__)
    assert "\n" not in message


@pytest.mark.parametrize(
    ("build", "readout"),
    [
        (Plain, Readout.CLASS_TOKEN),
        (Average, Readout.PATCH_AVERAGE),
        (_written_out, Readout.CLASS_TOKEN),
    ],
)
def test_plain_model_written_by_hand_is_taken(
    build: Callable[[], nn.Module], readout: Readout
) -> None:
    layout = load_model(_seeded(build), device="cpu").layout
    assert (layout.class_tokens, layout.prefix_tokens, layout.blocks) == (1, 1, 3)
    assert tuple(layout.grid) == (ROWS, COLS)
    assert layout.readout is readout


@pytest.mark.parametrize(("block", "reason"), BLOCKS)
def test_model_with_one_strange_block_is_refused(
    block: Callable[[], nn.Module], reason: str
) -> None:
    _assert_refused(_seeded(lambda: Plain(block)), reason)


@pytest.mark.parametrize(("block", "reason"), BLOCKS)
def test_model_with_strange_blocks_only_is_refused(
    block: Callable[[], nn.Module], reason: str
) -> None:
    model = _seeded(Plain)
    model.blocks = nn.Sequential(block(), block(), block())
    _assert_refused(model, reason)


@pytest.mark.parametrize(("build", "reason"), MODELS)
def test_strange_model_is_refused(build: Callable[[], nn.Module], reason: str) -> None:
    _assert_refused(_seeded(build), reason)


def test_blocks_that_somebody_has_wrapped_stay_wrapped() -> None:
    model = _seeded(Plain)
    calls = []

    def wrapped(tokens: Tensor) -> Tensor:
        calls.append(len(tokens))
        return type(model.blocks[1]).forward(model.blocks[1], tokens)

    model.blocks[1].forward = wrapped
    load_model(model, device="cpu")
    assert model.blocks[1].forward is wrapped
    assert "forward" not in vars(model.blocks[0])
    calls.clear()
    model(torch.randn(3, 3, *Patches.img_size))
    assert calls == [3]


class LosesAPatch(Plain):
    """Has a patch token less than any grid of its image."""

    def enter(self, images: Tensor) -> Tensor:
        return super().enter(images)[:, :-1]


def test_model_whose_patch_tokens_fill_no_grid_is_refused() -> None:
    _assert_refused(_seeded(LosesAPatch), "makes 14 patch tokens of a 24×40 image, and no grid")


@pytest.mark.slow
def test_model_whose_patches_reach_beyond_the_image_is_refused() -> None:
    module = tiny_module(img_size=70, dynamic_img_pad=True)
    with pytest.raises(UnsupportedModelError, match="pads 70×70 images to 80×80.*for 64×64"):
        load_model(module, device="cpu")
    assert load_model(tiny_module(img_size=64, dynamic_img_pad=True), device="cpu")
