"""The model in a checkpoint: what trainers wrap around it, taken off; reads no files.

Nests of dicts and dotted names are one tree here: ``{"teacher": {"backbone.norm.weight": …}}`` has
the model at teacher → backbone. It is looked for by the names and shapes of the model that is to
get the tensors, so any nest and any prefix will do; where these are not known, or are other than
the file's, by the words that trainers use.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, takewhile
from typing import Any

from torch import Tensor

from vitviz.errors import WeightsError

__all__ = ["Unwrapped", "named_tensors", "unwrap"]


_Place = tuple[str, ...]

_AVERAGES = (
    *("state_dict_ema", "model_ema", "ema_state_dict", "model_ema_state_dict", "ema_model"),
    *("ema", "params_ema", "averaged_model"),
)
_WRAPPINGS = (
    *("teacher", "state_dict", "model_state_dict", "model", "module", "net", "network"),
    *("backbone", "weights", "params", "student"),
)
"""Names of what holds a model, those to take first; a student's weights before its average's."""
_RANKS = {word: rank for rank, word in enumerate((*_AVERAGES, *_WRAPPINGS))}
# What torch.compile, FSDP and activation checkpointing put before the names of any part.
_INNER = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
_PRETRAINING = "decoder"  # how names begin of what a masked autoencoder paints pixels with
_MOST_NESTED = 8
_MOST_NAMED = 3


@dataclass(frozen=True, kw_only=True, eq=False)
class Unwrapped:
    """The tensors of one model.

    Attributes:
        tensors: By parameter name.
        place: The keys and prefixes that led to it, from the outside.
        left_out: What else the file has tensors for, in words.
        remark: What else was done, in words.
    """

    tensors: dict[str, Tensor]
    place: _Place = ()
    left_out: tuple[str, ...] = ()
    remark: str = ""

    @property
    def is_average(self) -> bool:
        """Whether these are averaged (EMA) weights."""
        return any(word in _AVERAGES for word in self.place)

    def describe(self) -> str:
        """Say in one line what was taken off; empty where nothing was."""
        what = "its averaged (EMA) weights" if self.is_average else "the model"
        parts = [f"taking {what} at {' → '.join(self.place)}"] if self.place else []
        if self.left_out:
            parts.append(f"leaving out {_first(self.left_out)}")
        return ", ".join(filter(None, (*parts, self.remark)))


def unwrap(
    content: Mapping[Any, Any],
    origin: str,
    expected: Mapping[str, Sequence[int]] | None = None,
) -> Unwrapped:
    """Find the model in what a checkpoint holds, and take off what is around it.

    Args:
        content: What was read.
        origin: What to call it.
        expected: The shapes of the model that is to get the tensors, by name.

    Raises:
        WeightsError: There are no tensors, one twice, or several models and no reason to prefer
            one.
    """
    found: dict[_Place, tuple[_Place, Tensor]] = {}
    for keys, tensor in named_tensors(content):
        if found.setdefault(_parts(keys), (keys, tensor))[0] != keys:
            raise WeightsError(f"{origin} holds {'.'.join(_parts(keys))} twice; save it once")
    if not found:
        raise WeightsError(
            f"{origin} holds no tensors by name, but {_contents(content)}; expected a model's "
            "state dict"
        )
    leaves = {parts: tensor for parts, (_, tensor) in found.items()}
    place = _fitting(leaves, origin, expected or {})
    if place is None:
        place = _customary(leaves, {keys[:-1] for keys, _ in found.values()})
    depth, decoded = len(place), any(name.startswith(_PRETRAINING) for name in expected or {})
    inside = {
        parts: tensor
        for parts, tensor in leaves.items()
        if parts[:depth] == place and (decoded or not parts[depth].startswith(_PRETRAINING))
    }
    around = {
        part for keys, _ in found.values() for key in keys for part in key.split(".")
    } & _INNER
    return Unwrapped(
        tensors={".".join(parts[depth:]): tensor for parts, tensor in inside.items()},
        place=place,
        left_out=_groups([parts for parts in leaves if parts not in inside], place),
        remark=f"without {', '.join(sorted(around))}" if around else "",
    )


def named_tensors(content: Mapping[Any, Any], keys: _Place = ()) -> Iterator[tuple[_Place, Tensor]]:
    """Yield the named tensors of nested mappings; one that holds itself ends at some depth."""
    for key, value in content.items():
        if not isinstance(key, str):  # an optimiser counts its parameters
            continue
        if isinstance(value, Tensor):
            yield (*keys, key), value
        elif isinstance(value, Mapping) and len(keys) < _MOST_NESTED:
            yield from named_tensors(value, (*keys, key))


def _parts(keys: _Place) -> _Place:
    """Split keys at dots, and drop what wraps parts of a model."""
    parts = chain.from_iterable(key.split(".") for key in keys)
    return tuple(part for part in parts if part not in _INNER)


def _fitting(
    leaves: Mapping[_Place, Tensor], origin: str, expected: Mapping[str, Sequence[int]]
) -> _Place | None:
    """Find the place under which most matrices of the model lie; None where few do.

    Their last axis is compared alone: heads and position embeddings differ in the others.
    """
    widths = {name: (len(s), s[-1]) for name, s in expected.items() if len(s) > 1}
    hits: Counter[_Place] = Counter()
    for parts, tensor in leaves.items():
        if tensor.dim() > 1:
            width = tensor.dim(), tensor.shape[-1]
            names = ((at, ".".join(parts[at:])) for at in range(len(parts)))
            hits.update(parts[:at] for at, name in names if widths.get(name) == width)
    most = max(hits.values(), default=0)
    if not most or 2 * most < len(widths):
        return None
    first, *others = sorted((place for place in hits if hits[place] == most), key=_preference)
    if others and _preference(others[0]) == _preference(first):
        raise WeightsError(
            f"{origin} holds several models that fit, at {_path(first)} and at {_path(others[0])}; "
            "save the one that is meant by itself"
        )
    return first


def _customary(leaves: Mapping[_Place, Tensor], nests: set[_Place]) -> _Place:
    """Follow the words that trainers use, as far as they lead to most of the tensors."""
    # As places, which names with dots make longer than nests.
    keyed = {_parts(keys[: n + 1]) for keys in nests for n in range(len(keys))}
    place: _Place = ()
    while True:
        depth = len(place)
        below = [parts for parts in leaves if parts[:depth] == place]
        counts = Counter(parts[depth] for parts in below if len(parts) > depth + 1)
        words = sorted((word for word in counts if word in _RANKS), key=_RANKS.__getitem__)
        boxes = [word for word in counts if (*place, word) in keyed]
        most = 2 * sum(counts[word] for word in words) > len(below)
        if words and (most or words[0] in boxes):
            place = (*place, words[0])
        elif len(boxes) == 1 and len(counts) == 1 and counts[boxes[0]] == len(below):
            place = (*place, boxes[0])
        else:
            return place


def _preference(place: _Place) -> tuple[bool, tuple[int, ...]]:
    """Order places: averages first, then by the words of trainers, other words last."""
    ranks = tuple(_RANKS.get(word, len(_RANKS)) for word in place)
    return not any(word in _AVERAGES for word in place), ranks


def _groups(outside: Sequence[_Place], place: _Place) -> tuple[str, ...]:
    """Name what lies beside a place: single tensors in full, others by where they lie."""
    groups: dict[_Place, list[_Place]] = {}
    for parts in outside:
        pairs = zip(parts, place, strict=False)
        shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        groups.setdefault(parts[: shared + 1], []).append(parts)
    return tuple(
        ".".join(members[0]) if len(members) == 1 else f"{_path(group)} ({len(members)} tensors)"
        for group, members in groups.items()
    )


def _contents(content: Mapping[Any, Any]) -> str:
    """Say what there is, in place of tensors."""
    found = [f"{key} ({type(value).__name__})" for key, value in content.items()]
    return _first(found) or "nothing"


def _first(words: Sequence[str]) -> str:
    more = len(words) - _MOST_NAMED
    return ", ".join(words[:_MOST_NAMED]) + (f" and {more} more" if more > 0 else "")


def _path(place: _Place) -> str:
    return " → ".join(place) or "its top"
