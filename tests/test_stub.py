"""Editors and type checkers know the functions of the lazy package."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

import vitviz
from fixtures_io import ROOT
from tests.stub import STUB, stub
from vitviz.methods.table import METHODS


def checked(tmp_path: Path, *lines: str) -> str:
    """Return what mypy says of a user's lines."""
    script = tmp_path / "script.py"
    script.write_text("\n".join(["import vitviz", *lines]) + "\n")
    command = [sys.executable, "-m", "mypy", "--strict", "--cache-dir", str(ROOT / ".mypy_cache")]
    done = subprocess.run(
        [*command, str(script)], cwd=ROOT, capture_output=True, text=True, check=False, timeout=240
    )
    return done.stdout


def test_stub_is_what_the_functions_take() -> None:
    assert STUB.read_text(encoding="utf-8") == stub()


def test_stub_names_all_public_names() -> None:
    text = STUB.read_text(encoding="utf-8")
    for name in vitviz.__all__:
        assert re.search(rf"\b{name}\b", text), name


def test_each_method_has_its_function() -> None:
    for name, method in METHODS.items():
        function = getattr(vitviz, name.replace("-", "_"))
        taken = set(inspect.signature(function).parameters)
        assert {each.name for each in fields(method)} <= taken
        assert function.__doc__ and "Args:" in function.__doc__


@pytest.mark.slow
def test_type_checker_sees_types_and_finds_misspelt_names_and_options(tmp_path: Path) -> None:
    said = checked(
        tmp_path,
        'model = vitviz.load_model("demo")',
        "reveal_type(vitviz.rollout(model, [], discard=0.5)[0].relevance.ndim)",
        'vitviz.evidence(model, [], classes="star", refine=2)',
        "vitviz.rollout(model, [], discrad=0.5)",
        "vitviz.rolout(model, [])",
    )
    assert 'Revealed type is "int"' in said or 'Revealed type is "builtins.int"' in said, said
    assert "script.py:5: error: Unexpected keyword argument" in said, said
    assert 'script.py:6: error: Module has no attribute "rolout"' in said, said
    assert "script.py:4" not in said, said
