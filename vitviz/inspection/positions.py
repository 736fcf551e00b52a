"""How a model knows where a token lies."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from vitviz.inspection.embedding import adds_tokens, measure_extra_tokens, measure_patch_embedding
from vitviz.inspection.events import AttentionUse, ConstantUse
from vitviz.inspection.parts import PositionEmbedding
from vitviz.inspection.traced import (
    TracedModel,
    is_within,
    norms_between,
    sequence_length,
    without_block_numbers,
)

__all__ = ["measure_positions"]


def measure_positions(traced: TracedModel) -> tuple[PositionEmbedding, ...]:
    """Find every constant that tells tokens apart, equal ones of several blocks as one."""
    trace = traced.trace
    met = [*trace.constant_uses, *(one.bias for one in trace.attentions if one.bias is not None)]
    merged: dict[tuple[Any, ...], PositionEmbedding] = {}
    paths: dict[tuple[Any, ...], set[str]] = {}
    for use in sorted(met, key=lambda use: use.step):
        position = _position(traced, use)
        if position is not None:
            key = (position.kind, position.parameters, position.place)
            merged.setdefault(key, position)
            # By module: a rotation multiplies several times, by a sine and by a cosine.
            paths.setdefault(key, set()).add(use.path)
    return tuple(replace(one, times=len(paths[key])) for key, one in merged.items())


def _position(traced: TracedModel, use: ConstantUse) -> PositionEmbedding | None:
    if use.meaning == "concatenate":
        return None
    if use.function == "scaled_dot_product_attention":
        return _attention_bias(traced, use, "attention scores")
    attention = _attention_around(traced, use)
    if attention is not None:
        return _position_in_attention(traced, use, attention)
    in_head = traced.stage(use.step) == 2
    if in_head and use.meaning != "add":
        return None  # what a head pools with
    if in_head:
        return _position_of(traced, use, "absolute", f"added in the head {use.path}".strip())
    if use.meaning == "add":
        return _position_of(traced, use, "absolute", _absolute_place(traced, use))
    where = f"{use.function} in {without_block_numbers(use.path) or 'the model itself'}"
    return _position_of(traced, use, "not determined", where)


def _attention_around(traced: TracedModel, use: ConstantUse) -> AttentionUse | None:
    """Return the attention in whose module a constant is met; the next one, if there are more."""
    near = [
        attention
        for attention, home in zip(traced.trace.attentions, traced.homes, strict=True)
        if home and is_within(use.path, home)
    ]
    return next((one for one in near if one.step > use.step), near[-1] if near else None)


def _position_in_attention(
    traced: TracedModel, use: ConstantUse, attention: AttentionUse
) -> PositionEmbedding | None:
    before = use.step < attention.step
    if use.meaning == "add" and use.constant_shape[-2:] == attention.shape[-2:]:
        target = "attention scores" if before else "attention probabilities, after softmax"
        return _attention_bias(traced, use, target)
    rotary = use.sine or any("rope" in name or "rot" in name for name in use.names)
    if use.meaning == "multiply" and before and rotary:
        return _position_of(traced, use, "rotary", _rotary_place(traced, use, attention))
    if before and use.names and all("rel" in name.rpartition(".")[2] for name in use.names):
        # Decomposed relative positions: the bias is a product of the queries and a small table.
        place = "multiplied with the queries, then added to the attention scores"
        return _position_of(traced, use, "relative bias", place)
    place = f"{use.function} inside {without_block_numbers(use.path)}"
    return _position_of(traced, use, "not determined", place)


def _attention_bias(traced: TracedModel, use: ConstantUse, target: str) -> PositionEmbedding:
    """Tell a relative bias, shared by all pairs at one distance, from any other bias."""
    stored = sum(traced.sizes.get(name, 0) for name in use.names)
    # A table that is looked up by distance holds another number of values than pairs of tokens.
    relative = stored > 0 and stored != math.prod(use.constant_shape)
    kind = "relative bias" if relative else "attention bias" if stored else "attention mask"
    return _position_of(traced, use, kind, f"added to the {target}")


def _rotary_place(traced: TracedModel, use: ConstantUse, attention: AttentionUse) -> str:
    # Whether the class token is rotated shows in the number of tokens that meet the sine.
    queries = attention.shape[-2]
    joined = [other for other in traced.trace.constant_uses if adds_tokens(traced, other)]
    front = sum(other.constant_shape[-2] for other in joined if other.step < traced.blocks_begin)
    which = ""
    if queries in use.tokens_shape[1:-1]:
        which = " (all tokens)"
    elif queries - front in use.tokens_shape[1:-1]:
        which = " (patch tokens only)"
    return f"rotates queries and keys inside attention{which}"


def _absolute_place(traced: TracedModel, use: ConstantUse) -> str:
    """Say when a position is added: before or after which tokens joined, and which norm."""
    plain = traced.block_runs and sequence_length(traced.block_runs[0].input_shape) is not None
    if not plain:
        return f"added in {use.path}" if use.path else "added to the tokens"
    if traced.stage(use.step) == 1:
        return "added inside the blocks"
    joined = [other for other in traced.trace.constant_uses if adds_tokens(traced, other)]
    front = [other for other in joined if other.step < traced.blocks_begin]
    earlier = [measure_extra_tokens(traced, other).kind for other in front if other.step < use.step]
    later = [measure_extra_tokens(traced, other).kind for other in front if other.step > use.step]
    words = []
    if earlier:
        words.append(f"after the {_listed(earlier)} {_are(earlier)} prepended")
    if later:
        words.append(f"to the patch tokens, before the {_listed(later)} {_are(later)} prepended")
    patches = measure_patch_embedding(traced, None)
    for run in norms_between(traced, 0, min(use.step, traced.blocks_begin)):
        if patches and not run.path.startswith(patches.name):
            words.append(f"after {run.path}")
    return ", ".join(
        [
            "added " + (words[0] if words else "to the patch tokens"),
            *words[1:],
            "before the first block",
        ]
    )


def _position_of(traced: TracedModel, use: ConstantUse, kind: str, place: str) -> PositionEmbedding:
    named = sorted({without_block_numbers(name) for name in use.names})
    # An index table only says where in the learned table to look.
    learned = [name for name in use.names if name in traced.sizes]
    shown = sorted({without_block_numbers(name) for name in learned}) or named
    return PositionEmbedding(
        kind=kind,
        parameters=tuple(shown),
        learned=any(traced.tensors[name].requires_grad for name in learned),
        sine=use.sine,
        shape=use.constant_shape,
        place=place,
        times=1,
    )


def _listed(kinds: list[str]) -> str:
    unique = list(dict.fromkeys(kinds))
    words = [f"{kind} tokens" if kind == "register" else f"{kind} token" for kind in unique]
    return " and ".join(words)


def _are(kinds: list[str]) -> str:
    return "is" if set(kinds) != {"register"} and len(set(kinds)) == 1 else "are"
