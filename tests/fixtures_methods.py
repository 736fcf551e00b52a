"""What tests share that go over several methods."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from vitviz.methods.method import Method
from vitviz.methods.table import METHODS


def make_method(name: str, **options: Any) -> Method:
    """Make a method with those of the options that it has."""
    method = METHODS[str(name)]
    known = {each.name for each in fields(method)}
    return method(
        **{key: value for key, value in options.items() if key in known and value is not None}
    )
