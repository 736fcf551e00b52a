"""One patch of an image, as users name it: read, and looked for on a grid."""

from __future__ import annotations

import re

from vitviz.errors import OptionError

__all__ = ["place", "read_patch", "require_on_grid"]


def read_patch(option: str, word: str) -> tuple[int, int]:
    """Read "3,5" (row, column).

    Raises:
        OptionError: It is no such word.
    """
    places = re.fullmatch(r"(\d+),(\d+)", word)
    if not places:
        raise OptionError(f"{option} is {word!r}; give its ROW,COL among the patches, like 3,5")
    return int(places[1]), int(places[2])


def place(patch: tuple[int, ...]) -> str:
    """Write the place of a patch as users name it."""
    return ",".join(map(str, patch))


def require_on_grid(option: str, patch: tuple[int, int], grid: tuple[int, int]) -> None:
    """Make sure that a patch (row, col) is on a grid of (rows, cols).

    Raises:
        OptionError: It is not.
    """
    if len(patch) != 2:
        raise OptionError(f"{option} is {patch}; give its row and column among the patches")
    if not all(0 <= at < side for at, side in zip(patch, grid, strict=True)):
        raise OptionError(
            f"{option} is {place(patch)}, but this makes {grid[0]} × {grid[1]} patches; "
            f"give ROW,COL from 0,0 to {grid[0] - 1},{grid[1] - 1}"
        )
