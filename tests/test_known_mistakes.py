"""Each mistake known from the field, planted in the reference, is seen by test_mathematics.

A mistaken reference stands for a package that makes the mistake: if its maps are far from the
package's, where the right reference's are within the tolerance, the mistake could not hide.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import linear_oracles
import oracles
from comparison import (
    BALANCED,
    CLASSIC,
    EVIDENCE,
    GRADIENTS,
    LINEAR,
    RELEVANCE,
    ROLLOUTS,
    SETTINGS,
    SHARED_EVIDENCE,
    STARTED,
    TOLERANCE,
    AnySetting,
    LinearSetting,
    Setting,
    by_hand,
    class_gradients,
    distance,
    found,
    linear_by_hand,
    traced,
)
from linear_oracles import ImageTrace, LinearSteps
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
    plant: Callable[[TinyCase, Any], Array]
    settings: Sequence[AnySetting]
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


def _variable(x: Tensor) -> Tensor:
    return x


def _under(**mistaken: object) -> Callable[[TinyCase, LinearSetting], Array]:
    """Plant a mistake in what counts as a constant."""

    def plant(case: TinyCase, setting: LinearSetting) -> Array:
        return linear_by_hand(case, setting, rules=replace(setting.rules, **mistaken))

    return plant


def _in_linear_steps(**steps: Callable[..., Any]) -> Callable[[TinyCase, LinearSetting], Array]:
    return partial(linear_by_hand, steps=LinearSteps(**steps))


def _clamp_the_mean(attention: Array, gradient: Array) -> Array:
    return np.maximum((attention * gradient).mean(axis=0), 0)


def _clamped_gradient_alone(attention: Array, gradient: Array) -> Array:
    return np.maximum(gradient, 0).mean(axis=0)


def _weigh_with_bias(values: Array, projection: Array, bias: Array) -> Array:
    joined = values.transpose(1, 0, 2).reshape(values.shape[1], -1)
    return np.linalg.norm(joined @ projection.T + bias, axis=1)


def _weigh_by_head(values: Array, projection: Array, bias: Array) -> Array:
    """Add up the norms of the heads, in place of the norm of their sum."""
    heads, _, width = values.shape
    columns = projection.reshape(len(projection), heads, width)
    return sum(np.linalg.norm(values[head] @ columns[:, head].T, axis=1) for head in range(heads))


def _weigh_without_projection(values: Array, projection: Array, bias: Array) -> Array:
    return np.sqrt((values**2).sum(axis=(0, 2)))


def _start_of_class_token(image: ImageTrace) -> Array:
    return oracles.class_token(len(image.tokens[-1]))


def _start_of_last_input(image: ImageTrace) -> Array:
    """Take the tokens before the last block."""
    start = np.maximum(linear_oracles.contribution(image.tokens[-2], image.token_gradients[-2]), 0)
    return start / start.sum() if start.any() else start


def _start_signed(image: ImageTrace) -> Array:
    start = linear_oracles.contribution(image.tokens[-1], image.token_gradients[-1])
    return start / start.sum()


def _start_from_gradient_alone(image: ImageTrace) -> Array:
    start = np.maximum(image.token_gradients[-1].sum(axis=1), 0)
    return start / start.sum() if start.any() else start


def _other_classes(case: TinyCase, setting: LinearSetting) -> Array:
    """Explain the class of the next number."""
    others = tuple((index + 1) % 7 for index in case.classes)
    return linear_by_hand(case, setting, classes=others)


def _gradients_of_all_classes(case: TinyCase, setting: LinearSetting) -> Array:
    """Give all maps the gradients of the first class."""
    maps = linear_by_hand(case, setting)
    return np.repeat(maps[:, :1], maps.shape[1], axis=1)


def _gradients_of_first_image(case: TinyCase, setting: LinearSetting) -> Array:
    """Explain the best class of the first image in all of them."""
    best = traced(case).top_class()[0]
    maps = linear_by_hand(case, setting, classes=(best, best))
    return np.concatenate([linear_by_hand(case, setting)[:, :2], maps[:, :1]], axis=1)


def _shifted_start(by: int) -> Callable[[TinyCase, LinearSetting], Array]:
    def plant(case: TinyCase, setting: LinearSetting) -> Array:
        return linear_by_hand(case, replace(setting, start_layer=setting.start_layer + by))

    return plant


def _averaged_start(case: TinyCase, setting: LinearSetting) -> Array:
    return linear_by_hand(case, replace(setting, start_layer=None))


def _without_the_last(carried: Sequence[Array]) -> Array:
    """Leave out r in front of the last block."""
    return linear_oracles.average_of_shares(carried[1:])


def _without_the_first(carried: Sequence[Array]) -> Array:
    """Leave out r in front of the first block."""
    return linear_oracles.average_of_shares(carried[:-1])


def _sum_of_shares(carried: Sequence[Array]) -> Array:
    return len(carried) * linear_oracles.average_of_shares(carried)


def _average_as_it_is(carried: Sequence[Array]) -> Array:
    return sum(carried) / len(carried)


def _shares_of_the_largest(carried: Sequence[Array]) -> Array:
    return sum(each / each.max() if each.any() else each for each in carried) / len(carried)


def _classic_from_half(case: TinyCase, setting: LinearSetting) -> Array:
    return linear_by_hand(case, replace(setting, start_layer=case.blocks // 2))


def _other_rule(case: TinyCase, setting: LinearSetting) -> Array:
    other = "value" if setting.is_shared else "shared"
    return linear_by_hand(case, replace(setting, name=other))


def _balanced_wrongly(**mistaken: object) -> Callable[[TinyCase, LinearSetting], Array]:
    """Plant a mistake in the residual rule."""
    return _under(residual=partial(linear_oracles.balanced, **mistaken))


def _inputs_and_last_output(image: ImageTrace) -> range:
    return range(len(image.tokens))


def _outputs_alone(image: ImageTrace) -> range:
    return range(1, len(image.tokens))


def _first_input_alone(image: ImageTrace) -> range:
    return range(1)


def _clamp_evidence(tokens: Array, gradient: Array) -> Array:
    return np.maximum(linear_oracles.contribution(tokens, gradient), 0)


def _evidence_without_sign(tokens: Array, gradient: Array) -> Array:
    return np.abs(linear_oracles.contribution(tokens, gradient))


def _sum_of_evidence(case: TinyCase, setting: LinearSetting) -> Array:
    return case.blocks * linear_by_hand(case, setting)


def _evidence_of_gradients(tokens: Array, gradient: Array) -> Array:
    return gradient.sum(axis=1)


def _row_0_read(case: TinyCase, setting: LinearSetting) -> Array:
    return linear_by_hand(case, setting, readout=oracles.class_token(case.tokens))


def _patch_average_read(case: TinyCase, setting: LinearSetting) -> Array:
    readout = oracles.patches_after(case.prefix_tokens)(case.tokens)
    return linear_by_hand(case, setting, readout=readout)


LINEARISED = (RELEVANCE, EVIDENCE, SHARED_EVIDENCE, *BALANCED)
BOTH_FORMS = (RELEVANCE, CLASSIC)
FROM_1 = LinearSetting(name="relevance", start_layer=1)
BOTH_RULES = (EVIDENCE, SHARED_EVIDENCE, *BALANCED)

LINEAR_MISTAKES = (
    Mistake(name="deviation-varies", plant=_under(deviation=_variable), settings=LINEARISED),
    Mistake(name="mean-is-a-constant", plant=_under(mean=Tensor.detach), settings=LINEARISED),
    Mistake(name="derivative-for-gate", plant=_under(gate=_variable), settings=LINEARISED),
    Mistake(name="softmax-not-cut", plant=_under(shares=(1, 1, 1)), settings=(RELEVANCE, EVIDENCE)),
    Mistake(
        name="plain-gradients",
        plant=_under(shares=(1, 1, 1), deviation=_variable, gate=_variable),
        settings=LINEARISED,
    ),
    Mistake(name="values-cut", plant=_under(shares=(0.5, 0.5, 0)), settings=BOTH_RULES),
    Mistake(
        name="shares-of-a-third",
        plant=_under(shares=(1 / 3, 1 / 3, 1 / 3)),
        settings=(SHARED_EVIDENCE,),
    ),
    Mistake(name="other-rule", plant=_other_rule, settings=BOTH_RULES),
    Mistake(
        name="relu-behind-the-mean",
        plant=_in_linear_steps(fuse=_clamp_the_mean),
        settings=BOTH_FORMS,
    ),
    Mistake(
        name="values-not-weighed",
        plant=_in_linear_steps(value_norms=lambda values, *_: np.ones(values.shape[1])),
        settings=(RELEVANCE,),
    ),
    Mistake(
        name="values-weighed-with-bias",
        plant=_in_linear_steps(value_norms=_weigh_with_bias),
        settings=(RELEVANCE,),
    ),
    Mistake(
        name="values-weighed-by-head",
        plant=_in_linear_steps(value_norms=_weigh_by_head),
        settings=(RELEVANCE,),
    ),
    Mistake(
        name="values-weighed-before-projection",
        plant=_in_linear_steps(value_norms=_weigh_without_projection),
        settings=(RELEVANCE,),
    ),
    Mistake(
        name="relevance-carried-along-columns",
        plant=_in_linear_steps(carry=lambda r, fused: r + fused @ r),
        settings=(RELEVANCE,),
    ),
    Mistake(
        name="relevance-carried-without-residual",
        plant=_in_linear_steps(carry=lambda r, fused: r @ fused),
        settings=(RELEVANCE,),
    ),
    Mistake(name="start-one-block-early", plant=_shifted_start(-1), settings=(FROM_1,)),
    Mistake(name="start-one-block-late", plant=_shifted_start(1), settings=(FROM_1,)),
    Mistake(name="averaged-in-spite-of-a-start", plant=_averaged_start, settings=(FROM_1,)),
    *(
        Mistake(name=name, plant=_in_linear_steps(average=average), settings=(RELEVANCE,))
        for name, average in (
            ("last-block-not-averaged", _without_the_last),
            ("first-block-not-averaged", _without_the_first),
            ("last-block-alone", lambda carried: linear_oracles.average_of_shares(carried[:1])),
            ("first-block-alone", lambda carried: linear_oracles.average_of_shares(carried[-1:])),
            ("shares-summed", _sum_of_shares),
            ("averaged-as-it-is", _average_as_it_is),
            ("shares-of-the-largest", _shares_of_the_largest),
        )
    ),
    Mistake(
        name="start-not-normalised",
        # Where shares are averaged, a factor is of no account.
        plant=_in_linear_steps(start=linear_oracles.speaking),
        settings=(FROM_1,),
    ),
    Mistake(
        name="start-at-class-token",
        plant=_in_linear_steps(start=_start_of_class_token),
        settings=(RELEVANCE,),
        concerns=lambda case: not _reads_class_token_alone(case),
    ),
    Mistake(
        name="start-before-last-block",
        plant=_in_linear_steps(start=_start_of_last_input),
        settings=(RELEVANCE,),
    ),
    Mistake(
        name="start-signed",
        plant=_in_linear_steps(start=_start_signed),
        settings=(RELEVANCE,),
    ),
    Mistake(
        name="start-from-gradient-alone",
        plant=_in_linear_steps(start=_start_from_gradient_alone),
        settings=(RELEVANCE,),
    ),
    Mistake(
        name="gradient-without-attention-in-classic",
        plant=_in_linear_steps(fuse=_clamped_gradient_alone),
        settings=(CLASSIC,),
    ),
    Mistake(
        name="classic-reads-row-0",
        plant=_row_0_read,
        settings=(CLASSIC,),
        concerns=lambda case: not _reads_class_token_alone(case),
    ),
    Mistake(name="classic-from-half", plant=_classic_from_half, settings=(CLASSIC,)),
    Mistake(
        name="classic-reads-patches",
        plant=_patch_average_read,
        settings=(CLASSIC,),
        concerns=_reads_prefix,
    ),
    Mistake(name="gradients-of-next-class", plant=_other_classes, settings=LINEAR),
    Mistake(name="gradients-of-first-class", plant=_gradients_of_all_classes, settings=LINEAR),
    Mistake(
        name="ranks-of-first-image",
        plant=_gradients_of_first_image,
        settings=LINEAR,
        concerns=lambda case: len(set(traced(case).top_class())) > 1,
    ),
    Mistake(
        name="evidence-for-alone",
        plant=_in_linear_steps(contribution=_clamp_evidence),
        settings=BOTH_RULES,
    ),
    Mistake(
        name="evidence-without-sign",
        plant=_in_linear_steps(contribution=_evidence_without_sign),
        settings=BOTH_RULES,
    ),
    Mistake(
        name="evidence-of-gradients",
        plant=_in_linear_steps(contribution=_evidence_of_gradients),
        settings=BOTH_RULES,
    ),
    Mistake(
        name="evidence-of-last-output-too",
        plant=_in_linear_steps(block_inputs=_inputs_and_last_output),
        settings=BOTH_RULES,
    ),
    Mistake(
        name="evidence-of-outputs",
        plant=_in_linear_steps(block_inputs=_outputs_alone),
        settings=BOTH_RULES,
    ),
    Mistake(
        name="evidence-of-first-input-alone",
        plant=_in_linear_steps(block_inputs=_first_input_alone),
        settings=BOTH_RULES,
    ),
    Mistake(name="evidence-not-averaged", plant=_sum_of_evidence, settings=BOTH_RULES),
    *(
        Mistake(name=name, plant=plant, settings=BALANCED)
        for name, plant in {
            "residuals-balanced-in-all-blocks": _under(depth=lambda blocks: blocks),
            "residuals-balanced-in-one-block-fewer": _under(
                depth=lambda blocks: 3 * blocks // 4 - 1
            ),
            "residuals-not-balanced": _under(residual=linear_oracles.unbalanced),
            "residuals-balanced-where-signs-agree": _balanced_wrongly(
                cancel=lambda a, b: a * b > 0
            ),
            "residuals-balanced-everywhere": _balanced_wrongly(
                cancel=lambda a, b: torch.ones_like(a, dtype=torch.bool)
            ),
            "smaller-operand-favoured": _balanced_wrongly(a_is_p=lambda a, b: a.abs() < b.abs()),
            "greater-operand-favoured": _balanced_wrongly(a_is_p=lambda a, b: a > b),
            "passing-operand-favoured": _balanced_wrongly(
                a_is_p=lambda a, b: torch.ones_like(a, dtype=torch.bool)
            ),
            "gamma-forgotten": _balanced_wrongly(gamma=0),
            "gamma-on-the-smaller-operand": _balanced_wrongly(
                denominator=lambda p, q, gamma: p + (1 + gamma) * q
            ),
            "gamma-forgotten-in-the-denominator": _balanced_wrongly(
                denominator=lambda p, q, gamma: p + q
            ),
            "magnitudes-in-the-denominator": _balanced_wrongly(
                denominator=lambda p, q, gamma: (1 + gamma) * p - q
            ),
        }.items()
    ),
)

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
        for mistake in MISTAKES + LINEAR_MISTAKES
        for case in CASES
        if case.missing or mistake.concerns(case)
    ],
)
def test_mistake_is_caught(mistake: Mistake, case: TinyCase) -> None:
    for setting in mistake.settings:
        error = distance(mistake.plant(case, setting), found(case, setting))
        assert error.max() > FAR, f"{setting}: only {error.max():.1e} of the range"
