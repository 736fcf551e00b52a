"""The README names every command and every option."""

from __future__ import annotations

import re
from typing import Any

import pytest
import typer.main

from fixtures_io import ROOT
from vitviz.cli.app import app
from vitviz.models.names import ALIASES
from vitviz.options import Colormap, Fit, HeadFusion, OutputKind

README = ROOT / "README.md"
COMMANDS: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]
OPTIONS = sorted(
    {
        (name, option)
        for name, command in COMMANDS.items()
        for parameter in command.params
        if parameter.param_type_name == "option"
        for option in (*parameter.opts, *parameter.secondary_opts)
        if option != "--help"
    }
)


@pytest.fixture(scope="module")
def text() -> str:
    assert README.is_file(), "README.md is not written yet"
    return README.read_text(encoding="utf-8")


def test_there_are_commands_and_options() -> None:
    assert {"inspect", "rollout", "grad-rollout"} <= set(COMMANDS)
    assert len(OPTIONS) > 20


@pytest.mark.parametrize("command", COMMANDS)
def test_readme_names_the_command(text: str, command: str) -> None:
    assert f"vitviz {command}" in text


@pytest.mark.parametrize("option", sorted({option for _, option in OPTIONS}))
def test_readme_names_the_option(text: str, option: str) -> None:
    assert re.search(rf"(?<![\w-]){re.escape(option)}(?![\w-])", text), f"{option} is missing"


@pytest.mark.parametrize("word", [*OutputKind, *Fit, *HeadFusion, *Colormap])
def test_readme_names_the_choice(text: str, word: str) -> None:
    assert re.search(rf"\b{word}\b", text)


def test_readme_invents_no_option(text: str) -> None:
    known = {option for _, option in OPTIONS} | {"--help", "--version"}
    commands = re.findall(r"vitviz (?:inspect|rollout|grad-rollout)[^\n`]*", text)
    named = {option for line in commands for option in re.findall(r"(?<!\S)--[a-z-]+", line)}
    assert named <= known


def test_readme_uses_known_aliases(text: str) -> None:
    assert any(alias in text for alias in ALIASES)
