"""README and docs are true: options, links, files, targets, and the output that they show."""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from fixtures_io import ROOT
from fixtures_processes import Nursery
from tests.reference import commands, options_of, program_parameters, updated
from vitviz.models.names import ALIASES
from vitviz.options import (
    AttentionRule,
    Colormap,
    Convention,
    Fit,
    HeadFusion,
    Precision,
    Saved,
)

README, REFERENCE = ROOT / "README.md", ROOT / "docs" / "commands.md"
DOCS = sorted((ROOT / "docs").glob("*.md"))
CARDS = [ROOT / "vitviz" / "demo" / "README.md", ROOT / "sample_images" / "README.md"]
PAGES = [README, *DOCS, *CARDS]
COMMANDS = {name: options_of(each.params) | {"--help", "-h"} for name, each in commands().items()}
PROGRAM = options_of(program_parameters()) | {"--help", "-h"}
OPTIONS = sorted(PROGRAM.union(*COMMANDS.values()))
CHOICES = (*Saved, *Fit, *HeadFusion, *Colormap, *Precision, *Convention, *AttentionRule)
LARGEST_README = 12 * 1024  # bytes

_OUR_FOLDERS = ("docs", "tests", "vitviz", "sample_images", ".ci", ".github")
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_SPAN = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
_LINK = re.compile(r"\]\(([^)\s]+)\)")


def _text(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def _prose(page: Path) -> str:
    return _FENCE.sub("", _text(page))


def _code(page: Path) -> Iterator[str]:
    """Yield what a page has in code: spans, and lines without their comments or output."""
    for kind, block in _FENCE.findall(_text(page)):
        lines = [re.sub(r"(^|\s+)# .*", "", line) for line in block.splitlines()]
        commands = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
        yield from commands if kind == "console" else lines
    yield from _SPAN.findall(_prose(page))


def _calls(page: Path) -> Iterator[list[str]]:
    """Yield the words of each call of vitviz that a page has."""
    for code in _code(page):
        for part in re.split(r"[|;]|\bdo\b", code):
            words = part.split()
            if words[:1] == ["vitviz"] and len(words) > 1:
                yield words[1:]


def _examples() -> dict[str, list[str]]:
    """Return the commands that pages show, with the lines of output that they show of each."""
    shown: dict[str, list[str]] = {}
    for page in PAGES:
        for kind, block in _FENCE.findall(_text(page)):
            parts = re.split(r"^\$ ", block, flags=re.MULTILINE)[1:] if kind == "console" else []
            for command, *lines in map(str.splitlines, parts):
                shown.setdefault(command, []).extend(lines)
    return shown


def _anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", _prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", each.lower()).replace(" ", "-") for each in headings}


def _name(page: Path) -> str:
    return str(page.relative_to(ROOT))


EXAMPLES = _examples()
FOREIGN = " --weights "  # weights that are no part of the repository


@pytest.fixture
def clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Be in a folder that has the sample images, as a clone has them."""
    shutil.copytree(ROOT / "sample_images", tmp_path / "sample_images")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_there_are_commands_options_and_examples() -> None:
    assert {"inspect", "rollout", "grad-rollout"} <= set(COMMANDS)
    assert len(OPTIONS) > 20
    assert len(EXAMPLES) >= 5


def test_option_tables_are_up_to_date() -> None:
    assert updated(_text(REFERENCE)) == _text(REFERENCE), "run `make docs`"


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("page", [README, REFERENCE], ids=_name)
def test_command_is_documented(page: Path, command: str) -> None:
    assert re.search(rf"vitviz {command}(?![\w-])", _text(page))


@pytest.mark.parametrize("option", sorted(set(OPTIONS) - {"-h"}))
def test_option_is_documented(option: str) -> None:
    assert re.search(rf"(?<![\w-]){option}(?![\w-])", _text(REFERENCE)), f"{option} is missing"


@pytest.mark.parametrize("word", CHOICES)
def test_choice_is_documented(word: str) -> None:
    assert re.search(rf"\b{word}\b", _text(REFERENCE))


@pytest.mark.parametrize("alias", ALIASES)
def test_alias_is_documented(alias: str) -> None:
    assert f"`{alias}`" in _text(REFERENCE)


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_page_invents_no_option(page: Path) -> None:
    for words in _calls(page):
        known = COMMANDS.get(words[0], PROGRAM)
        named = {each.partition("=")[0] for each in words if re.match(r"--?[a-zA-Z0]", each)}
        assert named <= known, words
    spans = [span for span in _SPAN.findall(_prose(page)) if re.match(r"--?\w", span)]
    assert {span.split()[0] for span in spans} <= set(OPTIONS)


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_page_invents_no_command(page: Path) -> None:
    for words in _calls(page):
        assert words[0] in COMMANDS or words[0].startswith("-"), words


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_links_lead_somewhere(page: Path) -> None:
    for link in _LINK.findall(_prose(page)):
        if not link.startswith("https://"):
            path, _, anchor = link.partition("#")
            target = (page.parent / path).resolve() if path else page
            assert target.exists(), link
            assert not anchor or anchor in _anchors(target), link


@pytest.mark.parametrize("page", [*DOCS, *CARDS], ids=_name)
def test_page_is_one_click_from_the_readme(page: Path) -> None:
    assert f"]({_name(page)})" in _text(README)


@pytest.mark.parametrize("page", DOCS, ids=_name)
def test_page_begins_with_the_question_that_it_answers(page: Path) -> None:
    assert _text(page).split("\n\n")[1].endswith("?")


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_files_that_are_named_exist(page: Path) -> None:
    for word in {word for code in _code(page) for word in code.split()}:
        if word.split("/")[0] in _OUR_FOLDERS and "/" in word and "*" not in word:
            assert (ROOT / word).exists(), word


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_targets_and_modules_that_are_named_exist(page: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", _text(ROOT / "Makefile"), re.MULTILINE))
    for code in _code(page):
        assert set(re.findall(r"\bmake ([a-z-]+)", code)) <= targets, code
        for module in re.findall(r"python -m ([\w.]+)", code):
            path = ROOT / module.replace(".", "/")
            assert path.is_dir() or path.with_suffix(".py").is_file(), code


def test_readme_is_a_front_page() -> None:
    assert README.stat().st_size <= LARGEST_README


@pytest.mark.slow
@pytest.mark.usefixtures("clone")
@pytest.mark.parametrize(
    "command",
    [
        pytest.param(each, marks=[pytest.mark.long] if " evaluate " in each else [])
        for each in EXAMPLES
        if FOREIGN not in each
    ],
)
def test_output_that_is_shown_is_real(command: str, nursery: Nursery) -> None:
    columns = max(80, *map(len, EXAMPLES[command]))
    done = nursery.on_a_terminal(*shlex.split(command)[1:], cwd=Path.cwd(), columns=columns)
    assert done.code == 0
    printed = [_timeless(line) for line in done.lines]
    shown = [_timeless(line) for line in EXAMPLES[command] if line != "…"]
    assert [line for line in shown if line not in printed] == []


def _timeless(line: str) -> str:
    """Leave out what differs from machine to machine: devices, times and costs."""
    line = re.sub(r"^Using .*", "Using a device", line)
    line = re.sub(r" in [\d.]+ s, [\d.]+ images/s", "", line)
    return re.sub(r"^(\S+(?: +\S+){5}) +\d+\.\d$", r"\1", line)


@pytest.mark.slow
@pytest.mark.usefixtures("clone")
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("page", [README, ROOT / "docs" / "python.md"], ids=_name)
def test_python_that_is_shown_runs(page: Path) -> None:
    names: dict[str, object] = {}
    blocks = [block for kind, block in _FENCE.findall(_text(page)) if kind == "python"]
    assert blocks
    for block in blocks:
        exec(block, names)
