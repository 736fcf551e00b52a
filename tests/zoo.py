"""Any timm entrypoint as a specimen: two blocks of it, few patches, float64, telling weights.

What a specimen reads and where its patches go is measured on the full model here, by gradients and
by changing pixels, and never asked of the package.
"""

from __future__ import annotations

import contextlib
import math
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn

import linear_oracles
import oracles
from comparison import LINEAR, SHARED_EVIDENCE, AnySetting, LinearSetting, Setting, distance
from linear_oracles import ImageTrace, LinearTrace, Rules
from oracles import Array
from vitviz.errors import OptionError
from vitviz.explaining.batch import explain_batch
from vitviz.models.model import Model, load_model

GRID = (4, 5)
CLASSES = 7
TOLERANCE = 1e-6  # of a map's range
SETTINGS = (
    Setting(fusion="mean", discard=0),
    Setting(fusion="max", discard=0.9),
    Setting(fusion="gradient", discard=0),
    Setting(fusion="gradient", discard=0.9),
    *LINEAR,
)
_CLASS = 2  # the class that is explained, beside the best one where signs matter
# First draws under which 0.9 keeps nothing but the class token, and no token speaks for a class.
_REDRAWN = {
    *("vit_base_r26_s32_224", "eva_giant_patch14_clip_224"),
    "vit_gigantic_patch14_clip_quickgelu_224",
}
# Their channels hang on a stem, on heads that share keys, on the blocks' own sizes.
_OF_ONE_WIDTH = ("vitamin", "sapiens2", "cait")


class _EnoughSeenError(Exception):
    """Ends a forward pass whose rest is of no interest."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Specimen:
    """A small model made from a timm entrypoint.

    Attributes:
        name: The entrypoint.
        module: Two blocks of the model in float64, in evaluation mode.
        patch: (height, width) of a patch in pixels.
    """

    name: str
    module: nn.Module
    patch: tuple[int, int]

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of its images."""
        return GRID[0] * self.patch[0], GRID[1] * self.patch[1]

    @property
    def blocks(self) -> nn.Sequential:
        return getattr(self.module, "encoder", self.module).blocks

    @property
    def has_logit(self) -> bool:
        return bool(self.module.num_classes)

    @property
    def mixes_heads(self) -> bool:
        """Whether its attention cannot pass on a share to queries and keys."""
        return any(hasattr(module, "proj_w") for module in self.module.modules())

    @property
    def settings(self) -> list[AnySetting]:
        """Methods that are defined for it."""
        return [
            setting
            for setting in SETTINGS
            if (self.has_logit or not setting.is_gradient)
            and not (self.mixes_heads and setting.is_shared)
        ]

    def images(self, count: int = 2) -> Tensor:
        """Draw (count, 3, height, width)."""
        generator = torch.Generator().manual_seed(1 + _seed(self.name))
        return torch.randn(count, 3, *self.size, generator=generator, dtype=torch.float64)

    def features(self, block: int) -> Array:
        """Compute patch features (batch, channels, rows, cols) by timm's own function."""
        with torch.no_grad():
            found = self.module.forward_intermediates(  # type: ignore[operator]
                self.images(),
                indices=[block],
                norm=True,
                output_fmt="NLC",
                intermediates_only=True,
            )
        (tokens,) = found["image_intermediates"] if isinstance(found, dict) else found
        patches = tokens[:, -math.prod(GRID) :].transpose(1, 2)
        return patches.reshape(*patches.shape[:2], *GRID).numpy()

    @cached_property
    def loaded(self) -> Model:
        """The same, loaded with the package."""
        return load_model(self.module, device="cpu")

    @cached_property
    def trace(self) -> oracles.Trace:
        """Its attention, read by hand."""
        return oracles.trace_whole(self.module, self.images())

    @cached_property
    def tokens(self) -> int:
        """Length of the sequence in the blocks."""
        return self.trace.attention[0].shape[2]

    @cached_property
    def tail(self) -> int:
        """Number of attention calls after the blocks."""
        return len(self.trace.attention) - len(self.blocks)

    @cached_property
    def rows_read(self) -> Array:
        """Measure which of the last block's tokens the output depends on (tokens)."""
        last: list[Tensor] = []

        def begin_here(block: nn.Module, inputs: object, output: Tensor) -> Tensor:
            last.append(output.detach().requires_grad_(True))
            return last[0]

        with _hooked(self.blocks[-1].register_forward_hook(begin_here)), torch.enable_grad():
            output = self.module(self.images())
            output = output[:, _CLASS] if self.has_logit else output.flatten(1).sin().sum(dim=1)
            (gradient,) = torch.autograd.grad(output.sum(), last)
        read = (gradient != 0).any(dim=2)
        assert (read == read[0]).all(), "the readout depends on the image"
        return read[0].numpy()

    @cached_property
    def reads_evenly(self) -> bool:
        """Measure whether the tokens that are read could trade places and nobody would notice."""
        read = np.flatnonzero(self.rows_read)
        order = np.arange(self.tokens)
        order[read] = np.roll(read, 1)

        def trade(block: nn.Module, inputs: object, output: Tensor) -> Tensor:
            return output[:, order]

        with _hooked(self.blocks[-1].register_forward_hook(trade)), torch.no_grad():
            output = self.module(self.images()).numpy()
        return bool(np.abs(output - self.trace.logits).max() < 1e-6 * np.abs(output).max())

    def assert_patches_in_place(self) -> None:
        """Hold that each patch of the image enters at the token of its own cell.

        Behind a stem of convolutions a patch enters everywhere, and around its own cell most.
        """
        height, width = self.patch
        cells = np.array(list(np.ndindex(GRID)))
        images = self.images(1).repeat(1 + len(cells), 1, 1, 1)
        for changed, (row, col) in zip(images[1:], cells, strict=True):
            rows = slice(row * height, (row + 1) * height)
            changed[:, rows, col * width : (col + 1) * width] += 1
        entered = self._entering(images)
        change = (entered[1:] - entered[0]).abs().sum(dim=2).numpy()
        prefix = self.tokens - len(cells)
        assert not change[:, :prefix].any(), "a patch enters at a prefix token"
        change = change[:, prefix:]
        if not self.has_stem:
            np.testing.assert_array_equal(change > 0, np.eye(len(cells)))
        centres = change @ cells / change.sum(axis=1, keepdims=True)
        for axis in (0, 1):
            assert np.corrcoef(centres[:, axis], cells[:, axis])[0, 1] > 0.8

    def _entering(self, images: Tensor) -> Tensor:
        """Return the tokens that enter the first block (batch, tokens, channels)."""
        seen: list[Tensor] = []

        def note(block: nn.Module, inputs: Sequence[Tensor]) -> None:
            seen.append(inputs[0])
            raise _EnoughSeenError

        with (
            _hooked(self.blocks[0].register_forward_pre_hook(note)),
            torch.no_grad(),
            contextlib.suppress(_EnoughSeenError),
        ):
            self.module(images)
        return seen[0]

    @property
    def has_stem(self) -> bool:
        """Whether convolutions come before the patches, which makes them overlap."""
        return hasattr(_embedding(self.module), "backbone")

    def readout(self, fused: list[Array]) -> Array:
        """Return w (tokens) from what was measured: which tokens the head reads, and how.

        Args:
            fused: Attention after the blocks, its heads fused.
        """
        if not self.tail:
            return self.rows_read / self.rows_read.sum()
        if fused[0].shape[1] > self.tokens:
            return oracles.class_attention_readout(fused, self.tokens)
        (row,) = fused
        return oracles.pooling_readout(row, self.tokens)

    def _fused_tail(
        self, setting: Setting, image: int, gradients: list[Array] | None
    ) -> list[Array]:
        calls = range(len(self.blocks), len(self.trace.attention))
        attention = self.trace.attention
        if gradients is None:
            return [oracles.fuse_heads(attention[call][image], setting.fusion) for call in calls]
        return [
            oracles.fuse_gradient(attention[call][image], gradients[call][image]) for call in calls
        ]

    @cached_property
    def classes(self) -> list[list[int]]:
        """The classes of each image: one by number, and the one that tokens speak for most."""
        trace, count = self._linear_traces[linear_oracles.VALUE], len(self.trace.logits)
        spoken = [
            [linear_oracles.speaking(image).sum() for image in trace.about([index] * count)]
            for index in range(CLASSES)
        ]
        return [[_CLASS] * count, [int(index) for index in np.argmax(spoken, axis=0)]]

    @cached_property
    def gradients(self) -> list[list[Array]]:
        """∂y_c/∂A of every attention call, by hand, for each class."""
        return [self.trace.gradients(each) for each in self.classes]

    def by_hand(self, setting: AnySetting) -> Array:
        """Compute relevance (batch, maps, rows, cols) from the formulas."""
        if isinstance(setting, LinearSetting):
            return self._linear_by_hand(setting)
        gradients = self.gradients[0] if setting.is_gradient else None
        blocks = len(self.blocks)
        maps = []
        for image in range(len(self.trace.logits)):
            attention = [call[image] for call in self.trace.attention[:blocks]]
            if gradients is None:
                # Talking heads can go below zero, where nothing is gathered.
                attention = [np.maximum(call, 0) for call in attention]
            tokens = oracles.token_relevance(
                attention,
                gradients and [call[image] for call in gradients[:blocks]],
                readout=self.readout(self._fused_tail(setting, image, gradients)),
                fusion=setting.fusion,
                discard=setting.discard,
            )
            maps.append(self._on_grid(tokens)[None])
        return np.stack(maps)

    def _linear_by_hand(self, setting: LinearSetting) -> Array:
        if setting.name == "classic":
            maps = [self._classic(gradients) for gradients in self.gradients]
        else:
            traces = self._linear_images[setting.rules]
            method = (
                linear_oracles.token_evidence
                if setting.is_evidence
                else linear_oracles.token_relevance
            )
            maps = [[method(image) for image in images] for images in traces]
        return np.stack([np.stack([self._on_grid(each) for each in one]) for one in maps], axis=1)

    @cached_property
    def _linear_traces(self) -> dict[Rules, LinearTrace]:
        """The linearised network by hand, under each rule."""
        settings = [each for each in self.settings if isinstance(each, LinearSetting)]
        return {
            rules: linear_oracles.linear_trace(self.module, self.images(), rules)
            for rules in dict.fromkeys(each.rules for each in settings)
        }

    @cached_property
    def _linear_images(self) -> dict[Rules, list[list[ImageTrace]]]:
        """What the formulas ask for: under each rule, for each class, for each image."""
        return {
            rules: [trace.about(each) for each in self.classes]
            for rules, trace in self._linear_traces.items()
        }

    def _classic(self, gradients: list[Array]) -> list[Array]:
        attention, blocks = self.trace.attention, len(self.blocks)
        tokens = []
        for image in range(len(self.trace.logits)):
            tail = [
                linear_oracles.fuse_positive(attention[call][image], gradients[call][image])
                for call in range(blocks, len(attention))
            ]
            tokens.append(
                linear_oracles.classic_relevance(
                    [call[image] for call in attention[:blocks]],
                    [call[image] for call in gradients[:blocks]],
                    readout=self.readout(tail),
                )
            )
        return tokens

    def _on_grid(self, tokens: Array) -> Array:
        return oracles.on_grid(tokens, self.tokens - math.prod(GRID), GRID)

    def found(self, setting: AnySetting) -> Array:
        """Compute relevance (batch, maps, rows, cols) by the package."""
        options = setting.options((str(_CLASS),))
        classes = torch.tensor(self.classes).T if isinstance(setting, LinearSetting) else None
        maps = explain_batch(self.loaded, self.images(), options, class_indices=classes)
        return np.asarray(maps.relevance, np.float64)

    @cached_property
    def errors(self) -> dict[str, float]:
        """Compare package and reference: largest difference as a share of the range, by setting."""
        return {
            str(setting): float(distance(self.found(setting), self.by_hand(setting)).max())
            for setting in self.settings
        }


def assert_telling(specimen: Specimen) -> None:
    """Hold that mistakes would show: attention far from uniform, maps with a range, no close call.

    Attributes:
        specimen: The small model.
    """
    for attention in specimen.trace.attention:
        excess = np.abs(attention - 1 / attention.shape[3]).sum(axis=3).mean() / 2
        assert excess > 0.15, f"attention is {excess:.2f} from uniform, on a scale from 0 to 1"
    for setting in specimen.settings:
        reference = specimen.by_hand(setting)
        span = reference.max(axis=(2, 3)) - reference.min(axis=(2, 3))
        assert (span > 0.1 * reference.max(axis=(2, 3)))[reference.any(axis=(2, 3))].all()
        assert reference[:, -1].any(), f"{setting}: nothing speaks for a class"


def assert_layout_is_measured(specimen: Specimen) -> None:
    """Hold that blocks, tokens and grid are what the model shows when it runs."""
    layout = specimen.loaded.layout
    assert (layout.blocks, layout.tail) == (2, specimen.tail)
    assert layout.tokens == specimen.tokens
    assert tuple(layout.grid) == GRID
    assert specimen.loaded.preprocessing.patch == specimen.patch
    specimen.assert_patches_in_place()


def assert_readout_is_measured(specimen: Specimen) -> None:
    """Hold that vitviz reads those tokens on which the logit depends, and averages where it may."""
    weights = specimen.loaded.layout.readout_weights(specimen.tokens).numpy()
    np.testing.assert_array_equal(weights > 0, specimen.rows_read)
    if not specimen.tail and not hasattr(specimen.module, "head_dist"):
        assert specimen.reads_evenly


def assert_relevance_equals_reference(specimen: Specimen) -> None:
    """Hold that every method that is defined gives the map that the formulas give."""
    if specimen.mixes_heads:
        with pytest.raises(OptionError, match="--rule is shared.*use --rule value"):
            specimen.found(SHARED_EVIDENCE)
    assert max(specimen.errors.values()) <= TOLERANCE, specimen.errors


def collect(name: str, *, narrow: bool = False) -> Specimen:
    """Build a specimen of a timm entrypoint, its weights drawn by its name.

    Args:
        name: The entrypoint.
        narrow: With few channels, where the entrypoint lets them be chosen by themselves.
    """
    patch = _patch(name)
    size = GRID[0] * patch[0], GRID[1] * patch[1]
    arguments = {**_cut(name), "img_size": size, "num_classes": CLASSES}
    if narrow and not any(word in name for word in _OF_ONE_WIDTH):
        arguments |= {"embed_dim": 192, "num_heads": 3}
    overlay = {"input_size": (3, *size)}  # NaFlex models, which take any size, ask it alone
    with _no_draws():
        module = timm.create_model(name, pretrained_cfg_overlay=overlay, **arguments)
    module = module.double().eval()
    _spread(module, _seed(name))
    return Specimen(name=name, module=module, patch=patch)


def _seed(name: str) -> int:
    return zlib.crc32(name.encode()) + (name in _REDRAWN)


def _cut(name: str) -> dict[str, Any]:
    """Say how an entrypoint is built with two blocks."""
    if "sapiens2" in name:
        # Its blocks have as many keys as queries at both ends, and shared ones between.
        with torch.device("meta"):
            whole = timm.create_model(name)
        middle = len(whole.blocks) // 2
        shares = tuple(whole.blocks[index].attn.num_kv_heads for index in (0, middle))
        return {"depth": 2, "num_kv_heads": shares}
    if "gemma4" in name:
        # Its table of positions is copied for each image.
        return {"depth": 2, "position_embedding_size": 16}
    return {"depth": 2}


def _patch(name: str) -> tuple[int, int]:
    with torch.device("meta"):
        module = timm.create_model(name, **_cut(name))
    embed = _embedding(module)
    # A stem of convolutions strides further than the embedding behind it.
    size = embed.feat_ratio() if hasattr(embed, "feat_ratio") else embed.patch_size
    return (size, size) if isinstance(size, int) else tuple(size)


def _embedding(module: nn.Module) -> nn.Module:
    trunk = getattr(module, "encoder", module)
    return getattr(trunk, "patch_embed", None) or trunk.embeds


@contextlib.contextmanager
def _no_draws() -> Iterator[None]:
    """Leave out the drawing of first weights, which is most of the time that building takes."""
    names = ("normal_", "uniform_", "erfinv_")
    before = {name: getattr(Tensor, name) for name in names}
    try:
        for name in names:
            setattr(Tensor, name, lambda tensor, *args, **kwargs: tensor.zero_())
        yield
    finally:
        for name in names:
            delattr(Tensor, name)
        assert all(getattr(Tensor, name) is method for name, method in before.items())


@contextlib.contextmanager
def _hooked(handle: torch.utils.hooks.RemovableHandle) -> Iterator[None]:
    try:
        yield
    finally:
        handle.remove()


def _spread(module: nn.Module, seed: int) -> None:
    """Draw weights under which attention is far from uniform and blocks are far from equal."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            leaf = name.rpartition(".")[2]
            if leaf.startswith("gamma") or (leaf == "weight" and parameter.dim() == 1):
                drawn = 1 + 0.4 * noise
            elif parameter.dim() == 1:
                drawn = 0.4 * noise
            elif leaf.endswith("weight"):
                drawn = noise / math.sqrt(parameter[0].numel())
            else:
                drawn = noise  # tokens, tables of positions, latent queries
            if any(part in name for part in ("qkv", "q_proj", "k_proj", "kv.", ".q.", ".k.")):
                drawn = 1.4 * drawn
            if leaf == "weight" and ".proj_w." in name:
                # Heads are mixed after the softmax, and none should vanish in the mixture.
                drawn = torch.eye(len(noise)) + 0.5 * drawn
            elif ".proj_w." in name:
                drawn = 0.1 * drawn
            if name.startswith("head"):
                # Strong gradients: fused attention has to matter beside the identity.
                drawn = 100 * drawn
            parameter.copy_(drawn)
