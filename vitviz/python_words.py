"""Errors and warnings in the words of Python: ``start_layer``, not ``--start-layer``."""

from __future__ import annotations

import functools
import inspect
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from vitviz.errors import VitvizError
from vitviz.explaining.explanation import Caveat

__all__ = ["in_python_words", "warn", "warn_of_maps"]

_Function = TypeVar("_Function", bound=Callable[..., Any])

_PARAMETERS = {"bootstrap": "resamples"}
"""Parameters of Python that the command line calls otherwise, beside that of the class."""
_told: set[Caveat] = set()  # what is said once a process, not once a call


@contextmanager
def _python_words(class_parameter: str) -> Iterator[None]:
    """Let errors speak of Python's parameters (``start_layer``), not of ``--start-layer``."""
    try:
        yield
    except VitvizError as error:
        error.args = tuple(_in_python(str(each), class_parameter) for each in error.args)
        raise


def _in_python(message: str, class_parameter: str = "classes") -> str:
    """Write the options in a message as the parameters that they are in Python."""

    def parameter(match: re.Match[str]) -> str:
        name = match[1].replace("-", "_")
        return class_parameter if name == "class" else _PARAMETERS.get(name, name)

    message = re.sub(r"-m (\S+) --weights (\S+)", r"model=\1, weights=\2", message)
    message = re.sub(r"--(classic)\b", r"\1=True", message)
    return re.sub(r"(?<![\w-])--([a-z][a-z-]*)", parameter, message).replace(
        " with -m", " as model"
    )


def in_python_words(function: _Function, *, class_parameter: str = "classes") -> _Function:
    """Let a function's errors speak of Python's parameters.

    Args:
        function: The function.
        class_parameter: Its parameter that is ``--class`` on the command line.
    """

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        with _python_words(class_parameter):
            return function(*args, **kwargs)

    return wrapper  # type: ignore[return-value]


def warn_of_maps(text: str) -> None:
    """Warn of maps; of outlier tokens once, which are the model's in every image."""
    if text.startswith(Caveat.OUTLIERS.value[0]):
        if Caveat.OUTLIERS in _told:
            return
        _told.add(Caveat.OUTLIERS)
    warn(text)


def warn(text: str) -> None:
    """Warn at the line of the caller, outside this package."""
    home = str(Path(__file__).parent)
    level, frame = 1, inspect.currentframe()
    while frame is not None and frame.f_code.co_filename.startswith(home):
        level, frame = level + 1, frame.f_back
    warnings.warn(_in_python(text), stacklevel=level)
