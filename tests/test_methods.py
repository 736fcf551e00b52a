"""A method is one object: a sixth one, registered only here, runs from command to PNG."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from PIL import Image

import vitviz
from fixtures_io import Shell, picture, save_pictures, save_tiny, tiny_model
from vitviz.errors import OptionError
from vitviz.explaining.samples import Explained, Failed, explain_samples
from vitviz.images.sources import Source
from vitviz.methods.forward import ForwardPass, Target
from vitviz.methods.method import Method, TokenMap, option
from vitviz.methods.relevance import Relevance
from vitviz.methods.rollout import Rollout
from vitviz.methods.table import METHODS, named_method, variants
from vitviz.runs.job import Job
from vitviz.runs.provenance import read_provenance
from vitviz.runs.records import Writer

pytestmark = pytest.mark.usefixtures("one_thread")


@dataclass(frozen=True, kw_only=True)
class TokenNorms(Method):
    """The norms of the tokens behind the last block."""

    name: ClassVar[str] = "token-norms"
    help: ClassVar[str] = "Draw the norms of the patch tokens."

    power: float = option(1.0, "Exponent of the norms.", metavar="P")

    def compute(self, forward: ForwardPass, target: Target | None) -> TokenMap:
        return TokenMap(forward.tokens[-1].norm(dim=-1) ** self.power)


@pytest.fixture
def sixth(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with monkeypatch.context() as patch:
        patch.setitem(METHODS, TokenNorms.name, TokenNorms)
        yield


@pytest.mark.usefixtures("sixth")
def test_sixth_method_runs_from_the_command_line_to_a_picture(shell: Shell) -> None:
    save_pictures(Path(), ["a.png"])
    tiny = [
        "-m",
        "test_vit",
        "--img-size",
        "64",
        "--weights",
        str(save_tiny(Path("t.safetensors"))),
    ]
    done = shell(
        "token-norms", "a.png", *tiny, "--power", "2", "--save", "overlay", "--save", "npy"
    )
    assert done.code == 0, done.err
    assert done.paths == ["vitviz-out/a.png.token-norms.png", "vitviz-out/a.png.token-norms.npy"]
    with Image.open(done.paths[0]) as drawn:
        assert drawn.size == (64, 48)
    norms = np.load(done.paths[1])
    assert norms.shape == (4, 4)
    assert norms.min() > 0
    provenance = read_provenance(Path(done.paths[0]))
    assert provenance is not None
    assert provenance.recipe["method"] == "token-norms"
    assert provenance.recipe["options"]["power"] == 2.0
    assert "--power" in shell("token-norms", "--help").out.decode()


@pytest.mark.usefixtures("sixth")
def test_sixth_method_can_be_measured_beside_the_others() -> None:
    found = vitviz.evaluate(tiny_model(), [picture(64, 64)], methods=["token-norms", "rollout"])
    assert [each.name for each in found.methods] == ["random", "centre", "token-norms", "rollout"]
    assert not found.failed


def test_sixth_method_is_registered_nowhere_else() -> None:
    assert TokenNorms.name not in METHODS
    assert set(METHODS) == {"rollout", "grad-rollout", "relevance", "evidence", "attention"}


def test_names_to_measure_are_read_into_methods() -> None:
    assert named_method("rollout@3").method == Rollout(refine=3)
    for name, method in variants().items():
        assert named_method(name).method == method
    for wrong in ("nothing", "rollout@", "rollout@x", "attention"):
        with pytest.raises(OptionError, match="--methods"):
            named_method(wrong)


@pytest.mark.parametrize("name", METHODS)
def test_method_can_be_pickled_compared_and_recorded(name: str) -> None:
    method = METHODS[name]()
    assert pickle.loads(pickle.dumps(method)) == method
    assert method.to_record()["refine"] == 1
    assert "classes" not in method.to_record()


def samples(count: int) -> list[Any]:
    return list(vitviz.load_samples(tiny_model(), [picture(30 + n, 40, n) for n in range(count)]))


@pytest.mark.parametrize("name", METHODS)
def test_samples_are_explained_in_order_and_failures_passed_on(name: str) -> None:
    gone = Failed(source=Source(path=Path("gone"), key="gone"), error="is gone")
    given = [*samples(3), gone, *samples(2)]
    found = list(explain_samples(tiny_model(), given, METHODS[name](), batch_size=2))
    assert found[3] is gone
    explained = [each for each in found if isinstance(each, Explained)]
    assert [each.sample for each in explained] == [each for each in given if each is not gone]


def test_samples_are_taken_no_further_ahead_than_batches_need() -> None:
    taken: list[int] = []

    def endless() -> Iterator[Any]:
        for number, sample in enumerate(samples(1) * 1000):
            taken.append(number)
            yield sample

    stream = explain_samples(tiny_model(), endless(), Rollout(), batch_size=4)
    for _ in range(5):
        next(stream)
    assert len(taken) <= 8


def test_class_of_each_sample_may_be_given() -> None:
    wanted = [3, 0, 5]
    method = METHODS["grad-rollout"]()
    given = list(explain_samples(tiny_model(), samples(3), method, class_indices=wanted))
    for place, (sample, class_index) in enumerate(zip(samples(3), wanted, strict=True)):
        asked = METHODS["grad-rollout"](classes=(str(class_index),))  # type: ignore[call-arg]
        (alone,) = explain_samples(tiny_model(), [sample], asked)
        found = given[place]
        assert isinstance(found, Explained)
        assert isinstance(alone, Explained)
        assert found.maps[0].class_index == class_index
        assert found.maps[0].request == alone.maps[0].request == f"c{class_index}"
        np.testing.assert_allclose(found.maps[0].relevance, alone.maps[0].relevance, rtol=1e-4)


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ([0, 5000], r"class_indices has 5000; give indices from 0 to \d+"),
        ([0, -1], "class_indices has -1"),
        ([0, 2.7], "class_indices is 2.7; give a whole number"),
        ([0, "star"], "class_indices is 'star'"),
        ([0], "end after 1; give as many of both"),
        ([0, 1, 2], "end after 2; give as many of both"),
    ],
)
def test_odd_classes_of_samples_are_refused(wanted: list[Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        list(explain_samples(tiny_model(), samples(2), Relevance(), class_indices=wanted))


def test_batches_hold_an_image() -> None:
    with pytest.raises(OptionError, match="batch_size is -1; give a number from 1 up"):
        explain_samples(tiny_model(), samples(2), Rollout(), batch_size=-1)


def test_what_a_sink_needs_of_a_model_can_be_pickled(tmp_path: Path) -> None:
    writer = Writer(model=tiny_model().record, job=Job(output=tmp_path), requests=(None,))
    assert pickle.loads(pickle.dumps(writer)) == writer
    assert not any(isinstance(each, torch.nn.Module) for each in vars(writer.model).values())


def test_errors_in_python_speak_of_pythons_names() -> None:
    with pytest.raises(OptionError, match=r"^discard is 2, "):
        vitviz.rollout(tiny_model(), [], discard=2)
    with pytest.raises(OptionError, match=r"^start_layer is 9, "):
        vitviz.grad_rollout(tiny_model(), [picture(30, 40)], start_layer=9)
    with pytest.raises(vitviz.VitvizError, match=r"^classes 'nobody' "):
        vitviz.evidence(tiny_model(), [picture(30, 40)], classes="nobody")
    with pytest.raises(
        TypeError, match=r"rollout\(\) got an unexpected keyword argument 'discrad'"
    ):
        vitviz.rollout(tiny_model(), [], discrad=0.5)


def test_representations_are_one_short_line() -> None:
    (sample,) = samples(1)
    for each in (tiny_model(), sample, vitviz.evaluate(tiny_model(), [picture(30, 40)])):
        assert len(repr(each)) <= 100, repr(each)
        assert "\n" not in repr(each)


def test_explanation_names_its_source(tmp_path: Path) -> None:
    picture(30, 40).save(tmp_path / "a.png")
    of_file, of_image = vitviz.rollout(tiny_model(), [tmp_path / "a.png", picture(30, 40)])
    assert of_file.source == tmp_path / "a.png"
    assert str(of_image.source) == "image 1"
