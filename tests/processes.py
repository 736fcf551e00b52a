"""What runs beside a test, as Linux tells it in ``/proc``; starts and ends nothing."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Process", "descendants", "is_actor", "is_alive"]

_TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, kw_only=True)
class Process:
    """A process as it is now.

    Attributes:
        number: Its id.
        parent: That of its parent.
        command: How it was started, or what it calls itself.
        cpu: Seconds that it has computed.
        memory: Bytes that are its own, not those of files or shared with others.
    """

    number: int
    parent: int
    command: str
    cpu: float
    memory: int


def descendants(ancestor: int) -> list[Process]:
    """Return a process and all that descend from it, as far as they are alive."""
    found = {each.number: each for path in Path("/proc").glob("[0-9]*") if (each := _read(path))}

    def descends(process: Process) -> bool:
        while process.number != ancestor and process.parent in found:
            process = found[process.parent]
        return process.number == ancestor

    return [each for each in found.values() if descends(each)]


def is_alive(number: int) -> bool:
    """Tell whether a process runs: one that has ended may still wait for its parent to ask."""
    return _read(Path(f"/proc/{number}")) is not None


def is_actor(process: Process) -> bool:
    """Tell whether a process of Ray's holds a model."""
    return process.command.startswith("ray::") and "Map" in process.command  # by version


def _read(folder: Path) -> Process | None:
    try:
        state, parent, *_ = fields = (folder / "stat").read_text().rsplit(")")[-1].split()
        command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        status = (folder / "status").read_text()
    except OSError:  # it is gone
        return None
    if state == "Z":
        return None
    anonymous = status.partition("RssAnon:")[2].split()
    return Process(
        number=int(folder.name),
        parent=int(parent),
        command=command,
        cpu=(int(fields[11]) + int(fields[12])) / _TICKS,
        memory=int(anonymous[0]) * 1024 if anonymous else 0,
    )
