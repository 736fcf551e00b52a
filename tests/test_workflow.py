"""The workflow: GitHub checks both ends of what pyproject.toml claims."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
WORKFLOW = (ROOT / ".github/workflows/check.yml").read_text(encoding="utf-8")
MATRIX = re.findall(r'python: "(3\.\d+)", versions: \w+, setup: ([\w-]+)\}', WORKFLOW)


def test_workflow_checks_the_oldest_and_the_newest_python() -> None:
    named = re.findall(r'"Programming Language :: Python :: (3\.\d+)"', PROJECT)
    assert named == sorted(named, key=lambda version: int(version.partition(".")[2]))
    assert f'requires-python = ">={named[0]}"' in PROJECT
    assert [(named[0], "setup-lowest"), (named[-1], "setup")] == MATRIX
    assert WORKFLOW.count("python: ") == len(MATRIX)


@pytest.mark.parametrize("step", ["make ${{ matrix.setup }}", "make check"])
def test_workflow_sets_up_and_checks(step: str) -> None:
    assert re.search(rf"^      - run: {re.escape(step)}$", WORKFLOW, re.MULTILINE)


def test_workflow_may_only_read() -> None:
    assert re.findall(r"permissions:\n((?: .*\n)+)", WORKFLOW) == ["  contents: read\n"]
