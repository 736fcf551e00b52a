"""Terminals and streams as they come: encodings, closed streams, a folder that is gone."""

from __future__ import annotations

import ast
import io
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from fixtures_io import Run, run_process, save_pictures
from vitviz.cli.app import main
from vitviz.cli.surroundings import SPELT_OUT

pytestmark = pytest.mark.usefixtures("one_thread")

ENCODINGS = ["cp1252", "cp437", "cp932", "iso8859-1", "ascii"]
Typed = Callable[..., Run]


@pytest.fixture
def typed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Typed:
    """Run a command with streams of an encoding."""
    monkeypatch.chdir(tmp_path)

    def run(encoding: str, *arguments: str) -> Run:
        streams = {name: io.TextIOWrapper(io.BytesIO(), encoding) for name in ("stdout", "stderr")}
        with monkeypatch.context() as patch, pytest.raises(SystemExit) as left:
            for name, stream in streams.items():
                patch.setattr(sys, name, stream)
            main(arguments)
        for stream in streams.values():
            stream.flush()
        out, err = (stream.buffer.getvalue() for stream in streams.values())  # type: ignore[attr-defined]
        assert isinstance(left.value.code, int)
        return Run(code=left.value.code, out=out, err=err.decode(encoding))

    return run


def spelt(text: str, encoding: str) -> str:
    """Write text as a stream of this encoding has it."""
    return text.encode(encoding, SPELT_OUT).decode(encoding)


def bare(text: str) -> str:
    """Leave out what only lays text out, and numbers: some are of time."""
    return re.sub(r"[\d.]+", "#", "".join(text.split()))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("encoding", "command"),
    [
        *(("cp437", ["inspect", "deit_tiny"]), ("iso8859-1", ["inspect", "deit_tiny"])),
        *((encoding, ["models", "deit3_small*"]) for encoding in ENCODINGS),
        *((encoding, ["evaluate", "-h"]) for encoding in ENCODINGS),
    ],
)
def test_text_is_spelt_out_where_the_encoding_ends(
    typed: Typed, encoding: str, command: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    whole, done = typed("utf-8", *command), typed(encoding, *command)
    assert whole.code == done.code == 0
    if "-h" not in command and encoding != "ascii":  # there, Rich draws other frames; click, UTF-8
        assert bare(done.out.decode(encoding)) == bare(spelt(whole.out.decode(), encoding))


@pytest.mark.slow
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_evaluation_is_told_in_any_encoding(typed: Typed, tiny: list[str], encoding: str) -> None:
    save_pictures(Path(), ["p/a.png"])
    words = ["evaluate", "p", *tiny, "--methods", "rollout", "--bootstrap", "10"]
    whole, done = typed("utf-8", *words), typed(encoding, *words)
    assert (whole.code, done.code) == (0, 0)
    expected = spelt(whole.out.decode(), encoding)
    assert bare(done.out.decode(encoding)) == bare(expected)
    assert "UnicodeEncodeError" not in done.err


@pytest.mark.parametrize("encoding", ENCODINGS[:-1])  # where it is ASCII, click takes UTF-8
def test_complaints_keep_all_that_they_say(typed: Typed, tiny: list[str], encoding: str) -> None:
    save_pictures(Path(), ["猫.png"])
    done = typed(encoding, "grad-rollout", "猫.png", *tiny, "--class", "égyptien ×")
    assert done.code == 2
    assert spelt("égyptien ×", encoding) in done.err


def test_every_sign_that_we_write_has_a_spelling() -> None:
    package = Path(__file__).parents[1] / "vitviz"
    texts = set()
    for path in package.rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        constants = {node for node in ast.walk(tree) if isinstance(node, ast.Constant)}
        prose = {node.value for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        texts |= {str(node.value) for node in constants - prose}
    signs = {char for char in "".join(texts) if not char.isascii()}
    assert "→" in signs
    assert {char for char in signs if "\\" in spelt(char, "ascii")} == set()


@pytest.fixture(scope="module")
def latin(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Make a locale of ISO-8859-1."""
    if shutil.which("localedef") is None:
        pytest.skip("no localedef here")
    folder = tmp_path_factory.mktemp("locales")
    words = ["localedef", "-c", "-i", "en_US", "-f", "ISO-8859-1", str(folder / "latin.iso88591")]
    subprocess.run(words, check=False, capture_output=True)
    if not (folder / "latin.iso88591").exists():
        pytest.skip("no sources of locales here")
    return {"LOCPATH": str(folder), "LC_ALL": "latin.iso88591", "PYTHONUTF8": "0"}


@pytest.mark.slow
def test_locale_of_iso_8859_1(latin: dict[str, str], tiny: list[str], tmp_path: Path) -> None:
    save_pictures(tmp_path, ["a.png"])
    (tmp_path / "a.png").rename(tmp_path / os.fsdecode(b"caf\xe9.png"))
    words = ["evaluate", ".", *tiny, "--methods", "rollout", "--bootstrap", "10"]
    done = run_process("-m", "vitviz", *words, cwd=tmp_path, **latin)
    assert done.code == 0, done.err
    assert " v " in done.out.decode("latin-1")


def test_closed_stdin_is_told(typed: Typed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    for command in ("rollout", "evaluate"):
        done = typed("utf-8", command, "-", "-m", "demo")
        assert (done.code, done.out) == (2, b"")
        assert "stdin, which is closed" in done.err


@pytest.mark.parametrize("command", ["rollout a.png", "evaluate p", "inspect demo", "models deit"])
def test_working_directory_that_is_gone_is_told(
    typed: Typed, command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    with monkeypatch.context() as patch:
        patch.chdir(gone)
        gone.rmdir()
        done = typed("utf-8", *command.split())
        patch.chdir(tmp_path)
    assert (done.code, done.out) == (2, b"")
    assert "the working directory cannot be found" in done.err


@pytest.mark.slow
@pytest.mark.parametrize("width", ["0", "00", ""])
def test_terminal_of_no_width_is_one_of_the_usual(
    typed: Typed, width: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    usual = typed("utf-8", "inspect", "demo").out
    monkeypatch.setenv("COLUMNS", width)
    assert typed("utf-8", "inspect", "demo").out == usual
    assert len(usual) > 1000
