"""Each mistake known from the field, planted in the reference, is seen by test_mathematics.

A mistaken reference stands for a package that makes the mistake: if its maps are far from the
package's, where the right reference's are within the tolerance, the mistake could not hide.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import pytest

import oracles
from comparison import (
    GRADIENTS,
    ROLLOUTS,
    SETTINGS,
    STARTED,
    TOLERANCE,
    Setting,
    by_hand,
    class_gradients,
    distance,
    found,
    traced,
)
from oracles import Array, Steps
from tiny import CASES, TinyCase

pytestmark = pytest.mark.usefixtures("one_thread")

FAR = 100 * TOLERANCE

MEAN, MEAN_CUT, MAX, MAX_CUT, MIN, MIN_CUT = ROLLOUTS
GRADIENT, GRADIENT_CUT = GRADIENTS
CUT = (MEAN_CUT, MAX_CUT, MIN_CUT, GRADIENT_CUT)
# Four blocks of whole maximum attention mix tokens so well that one token's weight hardly shows.
UNMIXED = tuple(setting for setting in SETTINGS if setting is not MAX)


def _any_case(case: TinyCase) -> bool:
    return True


@dataclass(frozen=True, kw_only=True)
class Mistake:
    """A mistake and where it must show.

    Attributes:
        name: What is done wrong.
        plant: Computes mistaken maps (batch, maps, rows, cols) for a case and a setting.
        settings: Methods under each of which the mistake must show.
        concerns: Whether a model can make the mistake at all.
    """

    name: str
    plant: Callable[[TinyCase, Setting], Array]
    settings: Sequence[Setting]
    concerns: Callable[[TinyCase], bool] = _any_case

    def __str__(self) -> str:
        return self.name


def _in_steps(**steps: Callable[..., Array]) -> Callable[[TinyCase, Setting], Array]:
    return partial(by_hand, steps=Steps(**steps))


def _multiply_in_reverse(maps: Sequence[Array]) -> Array:
    return oracles.multiply(maps[::-1])


def _divide_columns(fused: Array) -> Array:
    """a / a.sum(dim=-1), without keepdim."""
    mixed = (fused + np.eye(len(fused))) / 2
    return mixed / mixed.sum(axis=1)


def _leave_out_identity(fused: Array) -> Array:
    fused = fused + 1e-12  # a row may be empty
    return fused / fused.sum(axis=1, keepdims=True)


def _protect_class_token(fused: Array, ratio: float) -> Array:
    """indices[indices != 0]"""
    kept = oracles.discard_lowest(fused, ratio)
    kept[0, 0] = fused[0, 0]
    return kept


def _discard_by_row(fused: Array, ratio: float) -> Array:
    return np.stack([oracles.discard_lowest(row, ratio) for row in fused])


def _fuse_signed(attention: Array, gradient: Array) -> Array:
    return (attention * gradient).mean(axis=0)


def _fuse_clamped_heads(attention: Array, gradient: Array) -> Array:
    return np.maximum(attention * gradient, 0).mean(axis=0)


def _fuse_gradient_alone(attention: Array, gradient: Array) -> Array:
    return np.maximum(gradient.mean(axis=0), 0)


def _transpose(attention: list[Array], gradients: list[Array] | None) -> tuple:
    turned = None if gradients is None else [block.swapaxes(-1, -2) for block in gradients]
    return [block.swapaxes(-1, -2) for block in attention], turned


def _transpose_attention_only(attention: list[Array], gradients: list[Array] | None) -> tuple:
    return [block.swapaxes(-1, -2) for block in attention], gradients


def _pair_in_reverse(attention: list[Array], gradients: list[Array] | None) -> tuple:
    assert gradients is not None
    return attention, gradients[::-1]


def _pair_with_next(attention: list[Array], gradients: list[Array] | None) -> tuple:
    assert gradients is not None
    return attention, gradients[1:] + gradients[:1]


def _take_score_gradients(attention: list[Array], gradients: list[Array] | None) -> tuple:
    assert gradients is not None
    pairs = zip(attention, gradients, strict=True)
    return attention, [oracles.score_gradient(one, gradient) for one, gradient in pairs]


def _leave_out_last_blocks(case: TinyCase, setting: Setting) -> Array:
    count = case.blocks - setting.start_layer

    def keep_first(attention: list[Array], gradients: list[Array] | None) -> tuple:
        return attention[:count], None if gradients is None else gradients[:count]

    return by_hand(case, replace(setting, start_layer=0), mistake=keep_first)


def _add_up_classes(case: TinyCase, setting: Setting) -> Array:
    """Never clear ``.grad`` between classes."""
    total: list[Array] = [np.zeros_like(block) for block in traced(case).attention]
    sets = []
    for blocks in class_gradients(case):
        total = [before + block for before, block in zip(total, blocks, strict=True)]
        sets.append(total)
    return by_hand(case, setting, gradient_sets=sets)


def _first_row(case: TinyCase, setting: Setting) -> Array:
    return by_hand(case, setting, readout=oracles.class_token(case.tokens))


def _average_of_patches(case: TinyCase, setting: Setting) -> Array:
    readout = oracles.patches_after(case.prefix_tokens)(case.tokens)
    return by_hand(case, setting, readout=readout)


def _assume_one_prefix_token(case: TinyCase, setting: Setting) -> Array:
    return by_hand(case, setting, shift=1 - case.prefix_tokens)


def _average_a_prefix_token_too(case: TinyCase, setting: Setting) -> Array:
    readout = oracles.patches_after(case.prefix_tokens - 1)(case.tokens)
    return by_hand(case, setting, readout=readout)


def _average_from_second_patch(case: TinyCase, setting: Setting) -> Array:
    readout = oracles.patches_after(case.prefix_tokens + 1)(case.tokens)
    return by_hand(case, setting, readout=readout)


def _swap_rows_and_cols(case: TinyCase, setting: Setting) -> Array:
    maps = by_hand(case, setting)
    rows, cols = case.grid
    return maps.reshape(*maps.shape[:2], cols, rows).swapaxes(2, 3)


def _reads_prefix(case: TinyCase) -> bool:
    return case.readout(case.tokens)[: case.prefix_tokens].sum() > 0


def _averages_patches(case: TinyCase) -> bool:
    return not _reads_prefix(case)


def _reads_class_token_alone(case: TinyCase) -> bool:
    return case.readout(case.tokens)[0] == 1


MISTAKES = (
    Mistake(
        name="layers-in-reverse",
        plant=_in_steps(multiply=_multiply_in_reverse),
        settings=SETTINGS,
    ),
    Mistake(
        name="gradients-of-reversed-blocks",
        plant=partial(by_hand, mistake=_pair_in_reverse),
        settings=GRADIENTS,
    ),
    Mistake(
        name="gradients-of-next-block",
        plant=partial(by_hand, mistake=_pair_with_next),
        settings=GRADIENTS,
    ),
    Mistake(
        name="gradients-of-scores",
        plant=partial(by_hand, mistake=_take_score_gradients),
        settings=GRADIENTS,
    ),
    Mistake(
        # Rows of mean attention sum to 1 while nothing is discarded, so not there.
        name="columns-divided",
        plant=_in_steps(normalise=_divide_columns),
        settings=(MEAN_CUT, MAX, MAX_CUT, MIN, MIN_CUT, *GRADIENTS),
    ),
    Mistake(
        name="attention-transposed",
        plant=partial(by_hand, mistake=_transpose),
        settings=SETTINGS,
    ),
    Mistake(
        name="attention-transposed-under-its-gradient",
        plant=partial(by_hand, mistake=_transpose_attention_only),
        settings=GRADIENTS,
    ),
    Mistake(
        name="patches-one-token-early",
        plant=partial(by_hand, shift=-1),
        settings=SETTINGS,
        concerns=lambda case: case.prefix_tokens >= 1,
    ),
    Mistake(name="patches-one-token-late", plant=partial(by_hand, shift=1), settings=SETTINGS),
    Mistake(
        name="one-prefix-token-assumed",
        plant=_assume_one_prefix_token,
        settings=SETTINGS,
        concerns=lambda case: case.prefix_tokens != 1,
    ),
    Mistake(
        name="prefix-token-averaged",
        plant=_average_a_prefix_token_too,
        settings=UNMIXED,
        concerns=lambda case: _averages_patches(case) and case.prefix_tokens > 0,
    ),
    Mistake(
        name="first-patch-not-averaged",
        plant=_average_from_second_patch,
        settings=UNMIXED,
        concerns=_averages_patches,
    ),
    Mistake(
        name="row-0-read-where-the-head-averages",
        plant=_first_row,
        settings=SETTINGS,
        concerns=lambda case: not _reads_class_token_alone(case),
    ),
    Mistake(
        name="patches-averaged-where-the-head-reads-a-token",
        plant=_average_of_patches,
        settings=SETTINGS,
        concerns=_reads_prefix,
    ),
    Mistake(
        name="discard-on-image-0-only",
        plant=partial(by_hand, discarded_images=1),
        settings=CUT,
    ),
    Mistake(
        # What is negative goes first when something is discarded, so only where nothing is.
        name="gradient-without-relu",
        plant=_in_steps(fuse_gradient=_fuse_signed),
        settings=(GRADIENT,),
    ),
    Mistake(
        name="relu-before-the-mean",
        plant=_in_steps(fuse_gradient=_fuse_clamped_heads),
        settings=GRADIENTS,
    ),
    Mistake(
        name="gradient-without-attention",
        plant=_in_steps(fuse_gradient=_fuse_gradient_alone),
        settings=GRADIENTS,
    ),
    Mistake(
        name="gradients-of-classes-added-up",
        plant=_add_up_classes,
        settings=GRADIENTS,
    ),
    Mistake(
        name="residual-left-out",
        plant=_in_steps(normalise=_leave_out_identity),
        settings=SETTINGS,
    ),
    Mistake(
        # One entry in N²: it shows where that entry is among the lowest in the last blocks.
        name="class-token-protected-from-discard",
        plant=_in_steps(discard_lowest=_protect_class_token),
        settings=(MAX_CUT,),
        concerns=lambda case: case.name in ("class-token", "distilled", "registers", "rope"),
    ),
    Mistake(
        name="discard-by-row",
        plant=_in_steps(discard_lowest=_discard_by_row),
        settings=CUT,
    ),
    Mistake(
        name="start-layer-counted-from-the-end",
        plant=_leave_out_last_blocks,
        settings=STARTED,
    ),
    Mistake(
        name="rows-and-cols-swapped",
        plant=_swap_rows_and_cols,
        settings=SETTINGS,
    ),
)


@pytest.mark.parametrize(
    ("mistake", "case"),
    [
        pytest.param(mistake, case, id=f"{mistake}-{case}")
        for mistake in MISTAKES
        for case in CASES
        if mistake.concerns(case)
    ],
)
def test_mistake_is_caught(mistake: Mistake, case: TinyCase) -> None:
    for setting in mistake.settings:
        error = distance(mistake.plant(case, setting), found(case, setting))
        assert error.max() > FAR, f"{setting}: only {error.max():.1e} of the range"
