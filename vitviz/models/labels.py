"""Class names and class requests; knows nothing of torch or of how a class is scored."""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from vitviz.errors import LabelError

__all__ = ["ClassRequest", "Labels", "is_label", "parse_requests", "parse_versus", "read_labels"]


_FEW = 20  # labels: so many are told in one line
_RANKS = re.compile(r"top([1-9]\d{0,18})", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class Labels:
    """The names of a model's classes.

    Attributes:
        names: One description per class, in the order of the logits; empty when unknown.
        source: Where they come from, in words.
        assumed: Whether they are a guess from the number of classes.
    """

    names: tuple[str, ...] = ()
    source: str = "unknown"
    assumed: bool = False

    def __post_init__(self) -> None:
        """Escape half characters, which JSON can name and no file can hold."""
        escaped = (name.encode("utf-8", "backslashreplace") for name in self.names)
        whole = tuple(name.decode("utf-8") for name in escaped)
        object.__setattr__(self, "names", whole)

    @cached_property
    def digest(self) -> str:
        """Digest of all names, to tell whether labels have changed."""
        return hashlib.sha256("\n".join(self.names).encode("utf-8")).hexdigest()[:16]

    def __getitem__(self, class_index: int) -> str | None:
        """Return the full description of a class, None when it has no name."""
        return self.names[class_index] if 0 <= class_index < len(self.names) else None

    def find(self, label: str, option: str = "--class") -> int:
        """Find the class of a label: its full description, else one of its synonyms.

        Args:
            label: The label.
            option: Where it was given, for messages.

        Raises:
            LabelError: No class or several have this label; near labels or the indices are named.
        """
        wanted = label.strip().casefold()
        full = [i for i, name in enumerate(self.names) if name.casefold() == wanted]
        hits = full or [i for i, name in enumerate(self.names) if wanted in _synonyms(name)]
        if len(hits) == 1:
            return hits[0]
        if hits:
            meanings = "; ".join(f"{i} = {self.names[i]!r}" for i in hits)
            raise LabelError(f"{option} {label!r} names several classes: {meanings}; give an index")
        raise LabelError(self._unknown(label, option))

    def _unknown(self, label: str, option: str) -> str:
        if not self.names:
            return (
                f"{option} {label!r} is a name, but this model's classes have none; "
                "give an index, or name them with --labels FILE"
            )
        words = {synonym: i for i, name in enumerate(self.names) for synonym in _synonyms(name)}
        near = difflib.get_close_matches(label.casefold(), words, n=3, cutoff=0.6)
        found = [word for word in words if label.casefold() in word.split()]
        offers = list(dict.fromkeys([*found[:2], *near]))[:4]
        if not offers and len(self.names) <= _FEW:
            every = ", ".join(f"{name!r} ({i})" for i, name in enumerate(self.names))
            return f"{option} {label!r} is no label of this model; give an index or one of: {every}"
        hint = ", ".join(f"{word!r} ({words[word]})" for word in offers)
        return f"{option} {label!r} is no label of this model; " + (
            f"near labels: {hint}" if hint else "give an index or one of its labels"
        )


@dataclass(frozen=True, kw_only=True)
class ClassRequest:
    """One class that a map is asked for, or what stands in its place.

    Attributes:
        class_index: A fixed class; None to go by rank.
        rank: 1 for the highest score of each image, 2 for the next.
        versus: The class that it is compared with: the map is of the difference of their logits.
        score: In place of a class, a function of logits (batch, classes) to scores (batch).
    """

    class_index: int | None = None
    rank: int = 1
    versus: ClassRequest | None = None
    score: Callable[[Any], Any] | None = None

    @property
    def key(self) -> str:
        """Name for files: ``c281`` for a fixed class, ``top1`` for a rank, ``c248-vs-c269``."""
        if self.score is not None:
            name = getattr(self.score, "__name__", type(self.score).__name__)
            return "target" if name == "<lambda>" else str(name)
        own = f"top{self.rank}" if self.class_index is None else f"c{self.class_index}"
        return own if self.versus is None else f"{own}-vs-{self.versus.key}"


def parse_requests(
    words: Iterable[str], labels: Labels, num_classes: int, versus: str | None = None
) -> tuple[ClassRequest, ...]:
    """Turn ``--class`` words into requests, each once, in the order asked for.

    Args:
        words: Indices, labels, ``top1`` or ``topK``.
        labels: The model's labels.
        num_classes: Number of logits.
        versus: The class that each is compared with, as ``parse_versus`` reads it.

    Raises:
        LabelError: A word names no class of this model, or a class would be compared with itself.
    """
    requests = [
        request for word in words for request in _parse_request(word.strip(), labels, num_classes)
    ]
    if versus is None:
        return tuple(dict.fromkeys(requests))
    other = parse_versus(versus, labels, num_classes)
    if other in requests:
        raise LabelError(
            f"--versus {versus} is a class that --class asks for, too: a class less itself is "
            "nothing; give another one"
        )
    return tuple(dict.fromkeys(replace(each, versus=other) for each in requests))


def parse_versus(word: str, labels: Labels, num_classes: int) -> ClassRequest:
    """Turn the ``--versus`` word into one request.

    Args:
        word: An index, a label, or ``topK``, which is the K-th best class alone.
        labels: The model's labels.
        num_classes: Number of logits.

    Raises:
        LabelError: It names no class of this model, or there is only one.
    """
    if num_classes == 1:
        raise LabelError(
            f"--versus {word}: this model has one output, so there is no other to compare it with; "
            "leave --versus out"
        )
    ranks = _RANKS.fullmatch(word.strip())
    if ranks and int(ranks[1]) > num_classes:
        raise LabelError(f"--versus {word}, but this model has {num_classes} classes")
    return _parse_request(word.strip(), labels, num_classes, "--versus")[-1]


def read_labels(path: Path, num_classes: int) -> Labels:
    """Read a label file: one label a line, a JSON list, or a JSON object {index: label}.

    Raises:
        LabelError: The file cannot be read, or does not have one label for each class.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise LabelError(f"--labels {path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise LabelError(f"--labels {path} is no UTF-8 text: {error}") from error
    names = _label_names(text, path)
    if len(names) != num_classes:
        raise LabelError(
            f"--labels {path} has {len(names)} labels, but the model has {num_classes} classes; "
            "give one label for each class, in the order of the logits"
        )
    return Labels(names=tuple(names), source=str(path))


def is_label(value: object) -> bool:
    """Tell whether a value of JSON can name a class: a text, or a number that stands for one."""
    return isinstance(value, (str, int, float)) and not isinstance(value, bool)


def _label_names(text: str, path: Path) -> list[str]:
    if text.lstrip()[:1] not in ("[", "{"):
        return text.splitlines()
    try:
        parsed = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise LabelError(f"--labels {path} looks like JSON, but is not: {error}") from error
    names = parsed if isinstance(parsed, list) else parsed.values()
    if odd := [name for name in names if not is_label(name)]:
        raise LabelError(f"--labels {path}: {json.dumps(odd[0])} is no label; expected text")
    if isinstance(parsed, list):
        return [str(name) for name in parsed]
    try:
        by_index = {int(index): str(name) for index, name in parsed.items()}
    except ValueError as error:
        raise LabelError(f"--labels {path}: keys must be class indices ({error})") from error
    if sorted(by_index) != list(range(len(by_index))):
        raise LabelError(f"--labels {path}: indices must run from 0 without gaps")
    return [by_index[index] for index in range(len(by_index))]


def _parse_request(
    word: str, labels: Labels, num_classes: int, option: str = "--class"
) -> Sequence[ClassRequest]:
    if ranks := _RANKS.fullmatch(word):
        return [ClassRequest(rank=rank + 1) for rank in range(min(int(ranks[1]), num_classes))]
    if not re.fullmatch(r"-?\d+", word, re.ASCII):
        return [ClassRequest(class_index=labels.find(word, option))]
    class_index = int(word) if len(word) < 20 else num_classes
    if not 0 <= class_index < num_classes:
        classes = f"classes 0 … {num_classes - 1}" if num_classes > 1 else "one output, class 0"
        raise LabelError(f"{option} {word} is outside this model's {classes}")
    return [ClassRequest(class_index=class_index)]


def _synonyms(name: str) -> list[str]:
    return [part.strip().casefold() for part in name.split(",")]
