"""Pictures as the content of files that keep nothing else; decides no names."""

from __future__ import annotations

import io

from PIL import Image

__all__ = ["png"]


def png(picture: Image.Image) -> bytes:
    """Return a picture as the content of a PNG file."""
    content = io.BytesIO()
    picture.save(content, "PNG")
    return content.getvalue()
