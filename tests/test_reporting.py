"""What a run says on a real terminal."""

from __future__ import annotations

import fcntl
import os
import pty
import signal
import subprocess
import sys
import termios
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fixtures_processes import Nursery
from vitviz.cli.leaving import discard
from vitviz.cli.reporter import Reporter
from vitviz.images.sources import Source
from vitviz.runs.records import Result

SCENES = Path(__file__).parents[1] / "sample_images" / "scenes"


@pytest.fixture(scope="module")
def session(nursery: Nursery, tmp_path_factory: pytest.TempPathFactory) -> str:
    out = tmp_path_factory.mktemp("out")
    words = ["rollout", str(SCENES), "-m", "demo", "-o", str(out), "--device", "cpu"]
    shown = nursery.on_a_terminal(*words, cwd=out)
    assert shown.code == 0, shown.text
    return shown.text


def test_each_path_stands_on_a_line_of_its_own_beside_the_bar(session: str) -> None:
    lines = session.replace("\x1b[2K", "\n").replace("\r", "\n").splitlines()
    paths = [line for line in lines if "rollout.png" in line]
    assert len(paths) == len(list(SCENES.glob("*.png")))
    assert all(line.strip().endswith(".rollout.png") for line in paths)
    assert not any("━" in line for line in paths)


def test_bar_shows_how_many_are_done_and_is_gone_in_the_end(session: str) -> None:
    assert "/10" in session
    last = session.rstrip().splitlines()[-1]
    assert last.startswith("\x1b[1A\x1b[2K10 written, 0 skipped, 0 failed")  # over the bar's line


def test_quiet_terminal_shows_paths_alone(nursery: Nursery, tmp_path: Path) -> None:
    words = ["rollout", str(SCENES / "star-ring.png"), "-m", "demo", "-o", str(tmp_path)]
    shown = nursery.on_a_terminal(*words, "--quiet", cwd=tmp_path)
    assert shown.code == 0
    (line,) = shown.text.splitlines()
    assert line.endswith("star-ring.png.rollout.png")
    assert "\x1b" not in shown.text


def test_interruption_before_the_first_result_says_what_is_not_done(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def interrupted() -> Iterator[Result]:
        raise KeyboardInterrupt
        yield

    with pytest.raises(KeyboardInterrupt):
        Reporter().show(interrupted(), 5, {"run": {"method": "rollout"}}, None)
    assert "0 written, 0 skipped, 0 failed, 5 not done in" in capsys.readouterr().err


def test_reader_that_leaves_is_no_full_disk(tmp_path: Path) -> None:
    result = Result(source=Source(path=Path("a.png"), key="a.png"), status="written")
    run = {"run": {"method": "rollout"}}
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as stdout, pytest.MonkeyPatch.context() as patch:  # noqa: PTH123
        patch.setattr(sys, "stdout", stdout)
        with pytest.raises(BrokenPipeError):
            Reporter(quiet=True, as_json=True).show([result], 1, run, None)
        discard(stdout)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("wait_for", "words"),
    [
        (b"rollout.png", ["rollout", str(SCENES), "--batch-size", "1", "-o", "out"]),
        (b"measuring", ["evaluate", str(SCENES), "--batch-size", "1"]),
        (b"Using cpu", ["evaluate", str(SCENES)]),
    ],
    ids=["maps", "measuring", "loading"],
)
def test_one_interruption_at_a_terminal_ends_a_loop_of_the_shell(
    tmp_path: Path, wait_for: bytes, words: list[str]
) -> None:
    """A shell goes on with its loop unless the command dies of the signal."""
    ours, theirs = pty.openpty()
    loop = 'for turn in 1 2 3; do echo "turn $turn"; "$@"; done; echo "after all"'
    command = [sys.executable, "-m", "vitviz", *words, "-m", "demo", "--device", "cpu"]
    shell = subprocess.Popen(
        ["bash", "-c", loop, "-", *command],
        cwd=tmp_path,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env={**os.environ, "PYTHONPATH": str(SCENES.parents[1]), "TERM": "xterm"},
        preexec_fn=own_terminal(theirs),
    )
    os.close(theirs)
    sent, pressed = b"", False
    while piece := read(ours):
        sent += piece
        if wait_for in sent and not pressed:
            os.write(ours, b"\x03")  # Ctrl-C
            pressed = True
    os.close(ours)
    assert shell.wait() in (130, -signal.SIGINT)
    assert sent.count(b"turn ") == 1, sent
    assert b"after all" not in sent
    assert b"Traceback" not in sent
    assert not list(tmp_path.rglob(".*"))


def own_terminal(descriptor: int) -> Callable[[], None]:
    """Make a terminal the one that a new session is controlled by."""

    def take() -> None:
        os.setsid()
        fcntl.ioctl(descriptor, termios.TIOCSCTTY, 0)

    return take


def read(descriptor: int) -> bytes:
    """Read from a terminal; nothing when its other end is closed."""
    try:
        return os.read(descriptor, 4096)
    except OSError:
        return b""
