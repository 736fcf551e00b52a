"""What a process finds around it: streams, a width, a working directory; writes nothing."""

from __future__ import annotations

import codecs
import io
import os
import sys
from pathlib import Path

from vitviz.errors import SourceError

__all__ = ["SPELT_OUT", "make_do", "require_working_directory"]


SPELT_OUT = "vitviz.spelt-out"
"""Name of the error handler: signs become ASCII that means the same, all else an escape."""

_SIGNS = {
    **{"→": "->", "←": "<-", "↑": "^", "↓": "v", "×": "x", "·": "|", "–": "-", "—": "--", "−": "-"},
    **{"…": "...", "ᵀ": "^T", "²": "^2", "σ": "sigma", "∂": "d", "⌊": "floor(", "⌋": ")"},
    **{"½": "1/2", "‖": "||", "⊙": "*", "≤": "<=", "≥": ">=", "≈": "~", "±": "+-", "∞": "inf"},
    **{"“": '"', "”": '"', "‘": "'", "’": "'", "•": "*", "━": "-", "─": "-", "▀": "#", "\xa0": " "},
}


def make_do() -> None:
    """Let stdout and stderr take any text, and a terminal of no width have the usual one."""
    if os.environ.get("COLUMNS", "").strip("0") == "":  # as everybody reads it, except for Rich
        os.environ.pop("COLUMNS", None)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # else closed before we came, or not the system's
            stream.reconfigure(errors=SPELT_OUT)


def require_working_directory() -> None:
    """Make sure that the working directory is still there; torch, too, cannot do without.

    Raises:
        SourceError: It is gone.
    """
    try:
        Path.cwd()
    except OSError as error:
        raise SourceError(
            f"the working directory cannot be found: {error.strerror}; change into another one"
        ) from error


def _spelt_out(error: UnicodeError) -> tuple[str | bytes, int]:
    """Replace what an encoding does not have."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    found = error.object[error.start : error.end]
    return "".join(_SIGNS.get(char) or _escaped(char) for char in found), error.end


def _escaped(char: str) -> str:
    return char.encode("ascii", "backslashreplace").decode("ascii")


codecs.register_error(SPELT_OUT, _spelt_out)
