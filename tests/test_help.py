"""What a newcomer meets before any work: help, usage, early mistakes, completion."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest
from rich.markup import render
from typer.main import get_command

from fixtures_io import Run, run_process
from vitviz.cli.app import build_app
from vitviz.methods.table import METHODS

GROUPS = ["What to explain", "The model", "Pictures and output", "Running", "Scripting"]
HEAVY = "import sys; from vitviz.cli.app import main\ntry: main(sys.argv[1:])\nfinally: print(" + (
    "[each for each in ('torch', 'timm', 'cv2') if each in sys.modules], file=sys.stderr)"
)


def run_without_torch(*arguments: str, **environment: str) -> Run:
    """Run a command and make sure that it loaded nothing heavy."""
    done = run_process("-c", HEAVY, *arguments, COLUMNS="80", **environment)
    assert done.err.splitlines()[-1] in ("[]", "['cv2']"), done.err
    return done


def shown(*arguments: str) -> str:
    done = run_process("-m", "vitviz", *arguments, "--help", COLUMNS="80", TERM="dumb")
    assert done.code == 0
    return done.out.decode()


@pytest.mark.parametrize("command", METHODS)
def test_help_shows_options_in_named_groups_with_examples_and_no_noise(command: str) -> None:
    text = shown(command)
    places = [text.index(group) for group in GROUPS]
    assert places == sorted(places)
    assert text.count(f"vitviz {command} ") >= 3  # its usage and two examples
    assert not re.search(r"<\w+(\[\w+\])?>|default: \(|Optional", text)
    assert max(map(len, text.splitlines())) <= 80


def test_no_word_of_help_is_taken_for_markup() -> None:
    commands = get_command(build_app()).commands.values()  # type: ignore[attr-defined]
    texts = [text for each in commands for text in (each.help, *help_of_options(each)) if text]
    assert len(texts) > 100
    assert [text for text in texts if render(text).plain != text] == []


def help_of_options(command: Any) -> list[str | None]:
    return [getattr(each, "help", None) for each in command.params]


def test_help_begins_with_what_is_used_most() -> None:
    text = shown("grad-rollout")
    assert text.index("--class") < text.index("--discard") < text.index("--refine")


def test_help_of_all_says_where_to_begin() -> None:
    text = shown()
    assert "Begin with: vitviz inspect" in text
    assert not re.search(r"<\w+>", text)


@pytest.mark.parametrize("command", METHODS)
def test_command_without_sources_shows_its_usage_and_an_example(command: str) -> None:
    done = run_without_torch(command)
    assert done.code == 2
    assert f"vitviz {command} [OPTIONS] SOURCE..." in done.err
    assert f"for example: vitviz {command} img.jpg" in done.err


def test_missing_file_alone_is_told_before_torch_is_loaded() -> None:
    done = run_without_torch("rollout", "gone.jpg")
    assert (done.code, done.out) == (1, b"")
    assert "failed: gone.jpg: cannot be read: No such file" in done.err


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads what it likes")
def test_unreadable_file_alone_is_told_before_torch_is_loaded(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(b"x")
    path.chmod(0)
    done = run_without_torch("rollout", str(path))
    assert done.code == 1
    assert "Permission denied" in done.err


@pytest.mark.usefixtures("census")
@pytest.mark.parametrize(
    "arguments", [("rollout", "{}", "-m", "deit_tinny"), ("inspect", "deit_tinny")]
)
def test_misspelt_model_is_told_before_torch_is_loaded(
    arguments: tuple[str, ...], tmp_path: Path
) -> None:
    (tmp_path / "a.png").write_bytes(b"x")
    done = run_without_torch(*(each.format(tmp_path / "a.png") for each in arguments))
    assert done.code == 2
    assert "no model is called 'deit_tinny'; did you mean deit_tiny" in done.err


@pytest.mark.slow
@pytest.mark.usefixtures("census")
@pytest.mark.parametrize(
    ("words", "offered"),
    [
        ("vitviz grad", "grad-rollout"),
        ("vitviz rollout --disc", "--discard"),
        ("vitviz rollout -m deit_tiny_p", "deit_tiny_patch16_224"),
        ("vitviz inspect dinov2_s", "dinov2_small"),
        ("vitviz rollout --colormap vir", "viridis"),
        ("vitviz rollout --fit na", "native"),
        ("vitviz evaluate --methods evidence-", "evidence-shared"),
    ],
)
def test_shell_completes_without_loading_torch(words: str, offered: str) -> None:
    count = len(words.split()) - 1
    done = run_process(
        "-X",
        "importtime",
        "-m",
        "vitviz",
        _VITVIZ_COMPLETE="complete_bash",
        COMP_WORDS=words,
        COMP_CWORD=str(count),
    )
    assert offered in done.out.decode().split()
    loaded = {line.rpartition("|")[2].strip() for line in done.err.splitlines()}
    assert not loaded & {"torch", "timm", "cv2", "numpy", "PIL"}
