"""Processes of the command line that start at once: children of one that has imported all of it."""

from __future__ import annotations

import importlib
import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import IO

import pyte

from fixtures_io import ROOT, Run

_ROOMS = ("cli.app", "cli.reporter", "runs.pipeline", "models.building")


@dataclass(frozen=True, kw_only=True)
class Child:
    """A running command, whose streams are files."""

    nursery: Nursery
    pid: int
    out: Path
    err: Path

    def wait_until(self, condition: Callable[[], object], seconds: float = 30) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, self.err.read_text()
            time.sleep(0.002)

    def wait_for_output(self) -> None:
        self.wait_until(lambda: self.out.stat().st_size)

    def send(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def wait(self) -> Run:
        code = self.nursery.ask(wait=self.pid)
        out = self.out.read_bytes() if self.out.is_file() else b""
        return Run(code=code, out=out, err=self.err.read_text(errors="backslashreplace"))


@dataclass(frozen=True, kw_only=True)
class Shown:
    """What a command left: its exit code, and what a terminal was sent."""

    code: int
    text: str
    columns: int

    @property
    def lines(self) -> list[str]:
        """What stands on the terminal in the end, line by line."""
        screen = pyte.Screen(self.columns, 1000)
        pyte.Stream(screen).feed(self.text)
        return "\n".join(line.rstrip() for line in screen.display).rstrip().splitlines()


class Nursery:
    """Starts commands without the seconds that importing torch takes."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._numbers = count()
        self._executor = ThreadPoolExecutor(1)

    def __enter__(self) -> Nursery:
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200"},
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: object, trace: TracebackType | None
    ) -> None:
        self._process.communicate(timeout=60)

    def ask(self, **order: object) -> int:
        _stream(self._process.stdin).write(json.dumps(order).encode() + b"\n")
        _stream(self._process.stdin).flush()
        return int(_stream(self._process.stdout).readline())

    def start(
        self, *arguments: str | os.PathLike[str], cwd: Path, prelude: str = "", out: str = ""
    ) -> Child:
        """Start a command.

        Args:
            arguments: Of the command line.
            cwd: Where it runs.
            prelude: Python that it executes first, to slow something down.
            out: Where its stdout goes; empty: to a new file.
        """
        number = next(self._numbers)
        streams = [self._folder / f"{number}.{name}" for name in ("out", "err")]
        words = list(map(os.fspath, arguments))
        pid = self.ask(
            arguments=words,
            cwd=str(cwd),
            prelude=prelude,
            out=out or str(streams[0]),
            err=str(streams[1]),
        )
        child = Child(nursery=self, pid=pid, out=Path(out or streams[0]), err=streams[1])
        child.wait_until(child.err.exists)
        return child

    def run(
        self, *arguments: str | os.PathLike[str], cwd: Path, prelude: str = "", out: str = ""
    ) -> Run:
        return self.start(*arguments, cwd=cwd, prelude=prelude, out=out).wait()

    def on_a_terminal(
        self,
        *arguments: str,
        cwd: Path,
        columns: int = 80,
        variables: Mapping[str, str] | None = None,
    ) -> Shown:
        """Run a command with stdout and stderr on one terminal."""
        ours, theirs = pty.openpty()
        settings = {"COLUMNS": str(columns), "TERM": "xterm", **(variables or {})}
        pid = self.ask(
            arguments=arguments,
            cwd=str(cwd),
            prelude=f"import os; os.environ.update({settings!r})",
            out=os.ttyname(theirs),
            err=os.ttyname(theirs),
        )
        code = self._executor.submit(self.ask, wait=pid)
        sent = b""
        while not code.done() or select.select([ours], [], [], 0)[0]:
            if select.select([ours], [], [], 0.02)[0]:
                sent += os.read(ours, 1 << 16)
        os.close(theirs)
        os.close(ours)
        return Shown(code=code.result(), text=sent.decode(), columns=columns)


def _stream(stream: IO[bytes] | None) -> IO[bytes]:
    assert stream is not None
    return stream


def _serve() -> None:
    for room in _ROOMS:
        importlib.import_module(f"vitviz.{room}")
    answers = os.fdopen(os.dup(1), "wb", buffering=0)
    while line := sys.stdin.buffer.readline():
        order = json.loads(line)
        if "wait" in order:
            answer = os.waitstatus_to_exitcode(os.waitpid(order["wait"], 0)[1])
        elif not (answer := os.fork()):
            return _become(order)
        answers.write(b"%d\n" % answer)
    return None


def _become(order: dict[str, str]) -> None:
    """Be the command, with streams of its own."""
    os.chdir(order["cwd"])
    writing = os.O_WRONLY | os.O_CREAT | os.O_APPEND
    for number, (path, flags) in enumerate(
        [(os.devnull, os.O_RDONLY), (order["out"], writing), (order["err"], writing)]
    ):
        os.dup2(os.open(path, flags, 0o600), number)
    # What the parent's streams know of its files (whether they can be wound back) is wrong here.
    sys.stdout, sys.stderr = (os.fdopen(number, "w", closefd=False) for number in (1, 2))
    sys.argv = ["vitviz", *order["arguments"]]
    exec(order["prelude"], {})
    from vitviz.__main__ import main

    main()


if __name__ == "__main__":
    _serve()
