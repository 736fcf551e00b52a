"""Errors in the words of Python: ``start_layer``, not ``--start-layer``."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from vitviz.errors import VitvizError

__all__ = ["in_python", "in_python_words"]

_Function = TypeVar("_Function", bound=Callable[..., Any])

_PARAMETERS = {"class": "classes", "bootstrap": "resamples"}
"""Parameters of Python that the command line calls otherwise."""


@contextmanager
def _python_words() -> Iterator[None]:
    """Let errors speak of Python's parameters (``start_layer``), not of ``--start-layer``."""
    try:
        yield
    except VitvizError as error:
        error.args = tuple(in_python(str(each)) for each in error.args)
        raise


def in_python(message: str) -> str:
    """Write the options in a message as the parameters that they are in Python."""

    def parameter(match: re.Match[str]) -> str:
        name = match[1].replace("-", "_")
        return _PARAMETERS.get(name, name)

    message = re.sub(r"-m (\S+) --weights (\S+)", r"model=\1, weights=\2", message)
    message = re.sub(r"--(classic)\b", r"\1=True", message)
    return re.sub(r"(?<![\w-])--([a-z][a-z-]*)", parameter, message).replace(
        " with -m", " as model"
    )


def in_python_words(function: _Function) -> _Function:
    """Let a function's errors speak of Python's parameters."""

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        with _python_words():
            return function(*args, **kwargs)

    return wrapper  # type: ignore[return-value]
