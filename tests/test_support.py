"""What vitviz says that it can do with models, and how it remembers."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import timm

from vitviz.models import catalogue as support
from vitviz.models.building import build_skeleton
from vitviz.models.catalogue import Support, judge, support_of, survey_models
from vitviz.models.census import known_models

NAME = "test_vit"


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Let timm be one that this version does not know; return the folder of what is learned."""
    monkeypatch.setattr(timm, "__version__", "9.9")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "vitviz"


def survey(*names: str) -> dict[str, Support]:
    return dict(survey_models(list(names)))


def test_model_without_a_head_supports_rollout_only() -> None:
    headless = support_of(build_skeleton("vit_small_patch14_dinov2"), (518, 518))
    assert (headless.rollout, headless.grad_rollout) == (True, False)
    assert (
        "only rollout, attention, features and similarity supported: no classifier"
        in headless.describe()
    )


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b'{"timm": "9.9"}', b'{"timm": "9.9", "models": {"test_vit": {}}}', b"\xff"],
)
def test_damaged_answers_are_learned_again(kept: Path, content: bytes) -> None:
    survey(NAME)
    (file,) = kept.iterdir()
    whole = file.read_text()
    file.write_bytes(content)
    assert survey(NAME) == {NAME: judge(NAME)}
    assert file.read_text() == whole


def test_answers_for_an_earlier_timm_are_learned_again(kept: Path) -> None:
    survey(NAME)
    (file,) = kept.iterdir()
    file.write_text(file.read_text().replace("9.9", "9.8"))
    survey("test_vit2")
    assert list(json.loads(file.read_text())["models"]) == ["test_vit2"]


def test_new_answers_join_those_that_are_kept(kept: Path) -> None:
    survey(NAME)
    survey("test_vit2")
    (file,) = kept.iterdir()
    assert list(json.loads(file.read_text())["models"]) == [NAME, "test_vit2"]


def test_answers_come_though_they_cannot_be_kept(kept: Path) -> None:
    kept.write_text("a file where the folder would be")
    assert survey(NAME)[NAME].rollout
    assert kept.is_file()


def test_whoever_asks_for_few_waits_for_few_and_loses_none(kept: Path) -> None:
    answers = survey_models([NAME, "no-such-model"])
    assert next(answers)[0] == NAME
    answers.close()  # type: ignore[attr-defined]
    (file,) = kept.iterdir()
    assert list(json.loads(file.read_text())["models"]) == [NAME]


def test_census_writes_what_a_survey_reads(
    kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [NAME, "resnet18", "vit_small_patch14_dinov2"]
    monkeypatch.setattr(support, "__file__", str(tmp_path / "support.py"))
    monkeypatch.setattr(support, "find_models", lambda: names)
    support.main()
    packed = (tmp_path / "census.json.gz").read_bytes()
    support.main()
    assert (tmp_path / "census.json.gz").read_bytes() == packed
    census = json.loads(gzip.decompress(packed))
    assert census["timm"] == timm.__version__
    for name in names:
        told = {key: value for key, value in asdict(judge(name)).items() if value is not None}
        assert census["models"][name] == json.loads(json.dumps(told))


def test_shipped_answers_are_known_without_torch() -> None:
    code = (
        "import json, sys; from vitviz.models.census import known_models; "
        "print(json.dumps([known_models(), sorted({'torch', 'timm'} & set(sys.modules))]))"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout
    answers, heavy = json.loads(said)
    assert not heavy
    assert answers == known_models(timm.__version__)


def test_shipped_answers_for_another_timm_are_not_taken() -> None:
    assert known_models("9.9") == {}
