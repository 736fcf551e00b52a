"""Text for streams that cannot hold all of it: spelt out, never lost and never refused."""

from __future__ import annotations

import codecs
import io
import sys

__all__ = ["SPELT_OUT", "spell_out"]


SPELT_OUT = "vitviz.spelt-out"
"""Name of the error handler: signs become ASCII that means the same, all else an escape."""

_SIGNS = {
    **{"→": "->", "←": "<-", "↑": "^", "↓": "v", "×": "x", "·": "|", "–": "-", "—": "--", "−": "-"},
    **{"…": "...", "ᵀ": "^T", "²": "^2", "σ": "sigma", "∂": "d", "⌊": "floor(", "⌋": ")"},
    **{"½": "1/2", "‖": "||", "⊙": "*", "≤": "<=", "≥": ">=", "≈": "~", "±": "+-", "∞": "inf"},
    **{"“": '"', "”": '"', "‘": "'", "’": "'", "•": "*", "━": "-", "─": "-", "\xa0": " "},
}


def spell_out() -> None:
    """Let stdout and stderr take any text."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # else closed before we came, or not the system's
            stream.reconfigure(errors=SPELT_OUT)


def _spelt_out(error: UnicodeError) -> tuple[str | bytes, int]:
    """Replace what an encoding does not have."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    found = error.object[error.start : error.end]
    return "".join(_SIGNS.get(char) or _escaped(char) for char in found), error.end


def _escaped(char: str) -> str:
    return char.encode("ascii", "backslashreplace").decode("ascii")


codecs.register_error(SPELT_OUT, _spelt_out)
