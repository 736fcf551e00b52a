"""One of the parts that a run is cut into, for many processes; starts no process itself."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from vitviz.errors import OptionError

__all__ = ["Shard"]


@dataclass(frozen=True, kw_only=True)
class Shard:
    """Part ``number`` of ``count``: the images whose keys fall into it.

    Attributes:
        number: From 1 to ``count``.
        count: How many parts there are.
        origin: What it was read from, for people; empty where it was typed.
    """

    number: int
    count: int
    origin: str = ""

    def __post_init__(self) -> None:
        """Check that there is such a part.

        Raises:
            OptionError: There is none.
        """
        if not 1 <= self.number <= self.count:
            found = f" ({self.origin})" if self.origin else ""
            raise OptionError(
                f"--shard is {self.number}/{self.count}{found}; shards count from 1, "
                f"so give 1/{max(self.count, 1)} to {max(self.count, 1)}/{max(self.count, 1)}"
            )

    @classmethod
    def parse(cls, word: str, environment: Mapping[str, str] = os.environ) -> Shard:
        """Read "3/8", "auto", or "auto/8" where the number alone is in the environment.

        Raises:
            OptionError: It is none of these, or the environment does not tell.
        """
        if typed := re.fullmatch(r"(\d+)/(\d+)", word):
            return cls(number=int(typed[1]), count=int(typed[2]))
        if not (wanted := re.fullmatch(r"auto(?:/([1-9]\d*))?", word)):
            raise OptionError(
                f"--shard is {word!r}; give I/N, as 3/8 for the third of 8 parts, or auto or auto/8"
            )
        return _from_environment(environment, int(wanted[1]) if wanted[1] else None)

    def holds(self, key: str) -> bool:
        """Tell whether an image is in this part: by its key alone, whatever others there are."""
        digest = hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
        return int.from_bytes(digest[:8], "big") % self.count == self.number - 1

    def __str__(self) -> str:
        """Write it as it is typed, with what it was read from."""
        return f"{self.number}/{self.count}" + (f" ({self.origin})" if self.origin else "")


def _from_environment(environment: Mapping[str, str], count: int | None) -> Shard:
    """Find out which of its copies a process is, from what started it."""
    array = _slurm_array(environment)
    tasks = _counted(environment, "RANK", "WORLD_SIZE") or _counted(
        environment, "SLURM_PROCID", "SLURM_STEP_NUM_TASKS"
    )
    single = [
        each
        for each in (
            _uncounted(environment, "JOB_COMPLETION_INDEX", 1, count),
            _uncounted(environment, "PARALLEL_SEQ", 0, count),
        )
        if each
    ]
    whole = (
        [_product(array, tasks)] if array and tasks else [each for each in (array, tasks) if each]
    )
    if len(found := [*whole, *single]) > 1:
        names = " and ".join(each.origin for each in found)
        raise OptionError(f"--shard auto finds {names}; say which part this is with --shard I/N")
    if not found:
        raise OptionError(
            "--shard auto finds none of SLURM_ARRAY_TASK_ID, SLURM_PROCID (of srun), RANK, "
            "JOB_COMPLETION_INDEX and PARALLEL_SEQ in the environment; give --shard I/N"
        )
    if count and count != found[0].count:
        raise OptionError(f"--shard auto/{count} finds {found[0]}; give --shard auto or I/N")
    return found[0]


def _slurm_array(environment: Mapping[str, str]) -> Shard | None:
    """Read which task of a Slurm array this is; arrays may begin anywhere, and leave steps out."""
    number = _whole(environment, "SLURM_ARRAY_TASK_ID")
    if number is None:
        return None
    first, last, step, count = (
        _whole(environment, f"SLURM_ARRAY_TASK_{name}") for name in ("MIN", "MAX", "STEP", "COUNT")
    )
    step = step or 1
    if first is None or last is None or count != (last - first) // step + 1:
        raise OptionError(
            f"--shard auto finds SLURM_ARRAY_TASK_ID={number} of an array that is no plain range, "
            "as when some of its tasks run again; give --shard I/N"
        )
    steps = "" if step == 1 else f":{step}"
    origin = f"SLURM_ARRAY_TASK_ID={number} of {first}-{last}{steps}"
    return Shard(number=(number - first) // step + 1, count=count, origin=origin)


def _counted(environment: Mapping[str, str], name: str, total: str) -> Shard | None:
    """Read a number that counts from 0, and how many there are."""
    number, count = _whole(environment, name), _whole(environment, total)
    if number is None or count is None:
        return None
    return Shard(number=number + 1, count=count, origin=f"{name}={number}, {total}={count}")


def _uncounted(
    environment: Mapping[str, str], name: str, offset: int, count: int | None
) -> Shard | None:
    """Read a number where the environment does not say how many there are."""
    number = _whole(environment, name)
    if number is None:
        return None
    if count is None:
        raise OptionError(
            f"--shard auto finds {name}={number}, but not how many there are; "
            "give that, as in --shard auto/8"
        )
    return Shard(number=number + offset, count=count, origin=f"{name}={number}")


def _product(outer: Shard, inner: Shard) -> Shard:
    """Number the tasks of all members of an array."""
    return Shard(
        number=(outer.number - 1) * inner.count + inner.number,
        count=outer.count * inner.count,
        origin=f"{outer.origin}; {inner.origin}",
    )


def _whole(environment: Mapping[str, str], name: str) -> int | None:
    text = environment.get(name, "")
    if not text:
        return None
    if not re.fullmatch(r"\d+", text):
        raise OptionError(f"--shard auto finds {name}={text!r}, which is no number; give I/N")
    return int(text)
