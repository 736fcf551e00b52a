"""``compare``: several methods and classes of an image on one sheet."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import vitviz
from fixtures_io import ROOT, Shell, picture, places
from vitviz.errors import OptionError
from vitviz.methods.comparison import Comparison
from vitviz.options import PictureOptions
from vitviz.runs.provenance import read_provenance

pytestmark = pytest.mark.usefixtures("one_thread")

SCENE = ROOT / "sample_images/scenes/star-ring.png"
CLASSES = ["--class", "star", "--class", "ring"]


@pytest.fixture
def shell(shell: Shell, tmp_path: Path) -> Shell:
    (tmp_path / "scene.png").write_bytes(SCENE.read_bytes())
    return shell


def test_sheet_has_classes_as_rows_and_methods_as_columns(shell: Shell) -> None:
    done = shell("compare", "-m", "demo", "scene.png", *CLASSES, "--max-size", "96")
    assert done.code == 0
    assert done.paths == ["vitviz-out/scene.png.compare.panel.png"]
    sheet = np.asarray(Image.open(done.paths[0]))
    model, pictures = vitviz.load_model("demo"), PictureOptions(max_size=96)
    rollout, *relevance = (
        np.asarray(each.overlay())
        for each in (
            *vitviz.rollout(model, ["scene.png"], pictures=pictures),
            *vitviz.relevance(model, ["scene.png"], classes=["star", "ring"], pictures=pictures),
        )
    )
    evidence = [
        np.asarray(each.overlay())
        for each in vitviz.evidence(
            model, ["scene.png"], classes=["star", "ring"], pictures=pictures
        )
    ]
    original = np.asarray(vitviz.rollout(model, ["scene.png"], pictures=pictures)[0].sample.picture)
    (tops, lefts) = zip(*places(sheet, original), strict=True)
    assert set(lefts) == {0}
    assert len(tops) == 2
    assert places(sheet, rollout) == [(tops[0], 96 + 8)]
    for column, maps in ((2, relevance), (3, evidence)):
        for top, each in zip(tops, maps, strict=True):
            assert places(sheet, each) == [(top, column * (96 + 8))]
    assert sheet.shape[1] == 4 * 96 + 3 * 8


def test_methods_can_be_repeated_or_parted_by_commas() -> None:
    made = Comparison.of(("relevance, evidence", "rollout@2", "evidence"), ("top2",))
    assert [each.name for each in made.columns] == ["relevance", "evidence", "rollout@2"]
    assert [getattr(each.method, "classes", None) for each in made.columns] == [
        *(("top2",), ("top2",), None)
    ]
    assert made.refine == 2


@pytest.mark.parametrize("words", [("nosuch",), ("relevance,",), ("attention",), ()])
def test_unknown_method_is_refused(words: tuple[str, ...]) -> None:
    with pytest.raises(OptionError, match="--methods"):
        Comparison.of(words, ("top1",))


def test_record_tells_of_methods_classes_and_predictions(shell: Shell) -> None:
    options = ["--methods", "relevance,evidence@2", "--json"]
    done = shell("compare", "-m", "demo", "scene.png", *CLASSES, *options)
    (record,) = done.records
    assert record["run"]["method"] == "compare"
    assert list(record["run"]["options"]["methods"]) == ["relevance", "evidence@2"]
    assert record["run"]["options"]["methods"]["evidence@2"]["refine"] == 2
    assert record["run"]["options"]["classes"] == ["star", "ring"]
    assert {each["class_label"] for each in record["predictions"][:2]} == {"star", "ring"}
    (output,) = record["outputs"]
    assert (output["kind"], output["class_index"]) == ("panel", None)
    found = read_provenance(Path(output["path"]))
    assert found is not None
    assert found.recipe["options"]["classes"] == ["star", "ring"]


@pytest.mark.slow
def test_sheet_of_the_same_recipe_alone_is_skipped(shell: Shell) -> None:
    call = ["compare", "-m", "demo", "scene.png", "--skip-existing", "--json"]
    statuses = []
    for extra in ([], [], CLASSES, CLASSES, [*CLASSES, "--methods", "rollout"], ["--scale=0:9"]):
        (record,) = shell(*call, *extra).records
        statuses.append(record["status"])
    assert statuses == ["written", "skipped", "written", "skipped", "written", "written"]


def test_image_that_fails_leaves_the_others(shell: Shell) -> None:
    Path("broken.png").write_bytes(b"\x89PNG broken")
    picture(30, 40).save("other.png")
    done = shell("compare", "-m", "demo", "broken.png", "scene.png", "other.png")
    assert done.code == 1
    assert [Path(path).name for path in done.paths] == [
        *("scene.png.compare.panel.png", "other.png.compare.panel.png")
    ]
    assert "failed: broken.png" in done.err


def test_methods_of_no_class_need_no_class(shell: Shell) -> None:
    done = shell("compare", "-m", "demo", "scene.png", "--methods", "rollout")
    assert done.code == 0
    sheet = np.asarray(Image.open(done.paths[0]))
    assert sheet.shape[1] == 2 * 384 + 8


def test_class_that_is_none_is_a_usage_error(shell: Shell) -> None:
    done = shell("compare", "-m", "demo", "scene.png", "--class", "unicorn")
    assert done.code == 2
    assert "unicorn" in done.err
    assert not list(Path().rglob("*.compare.panel.png"))
