"""Images that could not be explained, kept for the page; never why one fails."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from vitviz.report.files import FILES, is_own, put

__all__ = ["Failure", "put_failures", "read_failures"]

_FAILURES = "failures.json"


@dataclass(frozen=True, kw_only=True)
class Failure:
    """An image that could not be explained.

    Attributes:
        source: As the user named it.
        source_id: Digest of its path.
        method: The method's name.
        error: Why.
        time: When, in seconds since 1970.
    """

    source: str
    source_id: str
    method: str
    error: str
    time: float = field(default_factory=time.time)

    @property
    def key(self) -> tuple[str, str]:
        """What was tried: an image with a method."""
        return self.source_id, self.method


def read_failures(folder: Path) -> list[Failure]:
    """Read what failed in runs that kept a report; nothing where that is damaged."""
    path = folder / FILES / _FAILURES
    if not is_own(path):
        return []
    try:
        record: dict[str, Any] = json.loads(path.read_text(encoding="ascii"))
        return [Failure(**each) for each in record["failures"]]
    except (OSError, ValueError, TypeError, KeyError):
        return []


def put_failures(folder: Path, failures: Iterable[Failure]) -> None:
    """Keep what failed for later pages; raises ``OutputError``."""
    record = {"vitviz": "failures", "failures": [asdict(each) for each in failures]}
    put(folder / FILES, _FAILURES, json.dumps(record).encode("ascii"))
