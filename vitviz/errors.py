"""The mistakes that vitviz explains to its user; everything else is a bug and keeps its traceback.

Every message says what was found, what was expected and what to try, on one line.
"""

from __future__ import annotations

__all__ = [
    "CaptureError",
    "ClusterError",
    "DeviceError",
    "ImageError",
    "LabelError",
    "ModelError",
    "OptionError",
    "OutputError",
    "SourceError",
    "UnsupportedModelError",
    "evidence_instead",
    "VitvizError",
    "WeightsError",
    "first_line",
    "printable",
    "reason",
]


class VitvizError(Exception):
    """Base of all errors that are the user's to mend."""


class OptionError(VitvizError):
    """An option has a value outside its range."""


class DeviceError(VitvizError):
    """The device asked for is not on this machine."""


class SourceError(VitvizError):
    """The sources name no image, or two that would write the same files."""


class ModelError(VitvizError):
    """No model of that name, or it cannot be built as asked."""


class UnsupportedModelError(ModelError):
    """The model exists, but the method is not defined for it."""


class WeightsError(ModelError):
    """The weights are missing, unreadable or do not fit the model."""


class LabelError(VitvizError):
    """A class name or a label file does not fit the model."""


class CaptureError(VitvizError):
    """The attention calls seen while the model ran are not the ones its layout promises."""


class ImageError(VitvizError):
    """One image cannot be read, explained or fitted; the others go on."""


class OutputError(VitvizError):
    """A result cannot be written where it belongs."""


class ClusterError(VitvizError):
    """Ray's cluster cannot be reached, or its actors cannot work."""


def reason(error: VitvizError | MemoryError) -> str:
    """Say in words why an image failed."""
    return str(error) if isinstance(error, VitvizError) else "needs more memory than there is"


def printable(text: str) -> str:
    """Show control characters and stray bytes instead of sending them to a terminal."""
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape", "backslashreplace").decode()
        for char in text
    )


def first_line(error: object) -> str:
    """Return the first line of what an error says, or its name."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def evidence_instead(reason: str) -> str:
    """Say why a model has no attention maps that chain, and that evidence needs none."""
    return f"{reason}; or use evidence, which needs no attention maps"
