"""Pictures on a terminal: by its own protocol where it has one, else two pixels a character."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

import numpy as np
from PIL import Image
from rich.color import Color
from rich.console import Console, ConsoleOptions, RenderResult
from rich.segment import ControlType, Segment
from rich.style import Style

from vitviz.options import OutputKind
from vitviz.pictures.encoding import png

__all__ = ["Preview", "Protocol", "protocol_of", "shown_files"]

_WIDEST = 72  # characters
_PIXELS = 10  # a character is this wide, for pictures that the terminal scales itself
_NO_TEXT = [(ControlType.CURSOR_FORWARD, 0)]  # takes no place on the line
_CHUNK = 4096  # bytes of a command of kitty's


class Protocol(Enum):
    """How a terminal takes pictures."""

    KITTY = "kitty"
    ITERM = "iterm"
    BLOCKS = "half blocks"


def protocol_of(environment: Mapping[str, str]) -> Protocol:
    """Tell by its variables how a terminal takes pictures."""
    if environment.get("TMUX") or environment.get("STY"):  # these pass nothing through
        return Protocol.BLOCKS
    program = environment.get("TERM_PROGRAM", "")
    if "KITTY_WINDOW_ID" in environment or environment.get("TERM") == "xterm-kitty":
        return Protocol.KITTY
    if program == "ghostty":
        return Protocol.KITTY
    if program in ("iTerm.app", "WezTerm") or environment.get("LC_TERMINAL") == "iTerm2":
        return Protocol.ITERM
    return Protocol.BLOCKS


def shown_files(files: Sequence[tuple[str, Path]]) -> list[Path]:
    """Choose which of an image's files (kind, path) are shown: its pictures of the first kind."""
    first = next((kind for kind, _ in files if kind != OutputKind.NPY.value), None)
    return [path for kind, path in files if kind == first]


@dataclass(frozen=True, kw_only=True)
class Preview:
    """A picture that Rich can print.

    Attributes:
        picture: Of any size.
        protocol: What the terminal takes.
    """

    picture: Image.Image
    protocol: Protocol

    @classmethod
    def read(cls, path: Path, protocol: Protocol) -> Preview:
        """Read a picture that was written."""
        with Image.open(path) as image:
            return cls(picture=image.convert("RGB"), protocol=protocol)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Yield it as text, or as commands to the terminal."""
        columns = min(options.max_width, _WIDEST)
        if self.protocol is Protocol.BLOCKS:
            yield from _half_blocks(self._scaled(columns))
            return
        png = _png(self._scaled(min(columns * _PIXELS, self.picture.width)))
        command = _kitty(png, columns) if self.protocol is Protocol.KITTY else _iterm(png, columns)
        yield Segment(command, control=_NO_TEXT)
        yield Segment.line()

    def _scaled(self, width: int) -> Image.Image:
        height = max(1, round(self.picture.height * width / self.picture.width))
        return self.picture.resize((width, height), Image.Resampling.LANCZOS, reducing_gap=3)


def _half_blocks(picture: Image.Image) -> Iterator[Segment]:
    """Yield characters whose upper half is one pixel, and whose lower half is the next."""
    pixels = np.asarray(picture)
    for top in range(0, len(pixels), 2):
        lower = pixels[top + 1] if top + 1 < len(pixels) else [None] * len(pixels[top])
        for above, below in zip(pixels[top], lower, strict=True):
            ground = None if below is None else Color.from_rgb(*map(int, below))
            style = Style(color=Color.from_rgb(*map(int, above)), bgcolor=ground)
            yield Segment("▀", style)
        yield Segment.line()


def _png(picture: Image.Image) -> str:
    return base64.b64encode(png(picture)).decode()


def _iterm(png: str, columns: int) -> str:
    """Return the command of https://iterm2.com/documentation-images.html."""
    return f"\x1b]1337;File=inline=1;width={columns};preserveAspectRatio=1:{png}\a"


def _kitty(png: str, columns: int) -> str:
    """Return the commands of https://sw.kovidgoyal.net/kitty/graphics-protocol."""
    chunks = [png[start : start + _CHUNK] for start in range(0, len(png), _CHUNK)]
    return "".join(
        f"\x1b_G{f'a=T,f=100,q=2,c={columns},' if chunk is chunks[0] else ''}"
        f"m={int(chunk is not chunks[-1])};{chunk}\x1b\\"
        for chunk in chunks
    )
