"""Numbers that tell when a map may mislead, and when they are told."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import vitviz
from comparison import loaded, traced
from fixtures_io import picture, save_pictures, tiny_model, tiny_module
from fixtures_methods import make_method
from tiny import CASES, TinyCase
from vitviz.explaining.batch import explain_batch
from vitviz.explaining.explanation import Caveat, Diagnostics
from vitviz.images.sources import find_sources
from vitviz.methods.diagnostics import gradient_norm_product, outlier_tokens, prefix_attention
from vitviz.methods.rollout import Rollout
from vitviz.methods.table import METHODS
from vitviz.models.model import load_model
from vitviz.pictures.heat import share_on
from vitviz.runs.job import Job
from vitviz.runs.pipeline import run

pytestmark = pytest.mark.usefixtures("one_thread")
SOUND: dict[str, Any] = {
    "prefix_attention": 0.2,
    "outlier_tokens": 0,
    "contrast": 0.9,
    "gradient_norm_product": 5.0,
}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_prefix_attention_equals_reference(case: TinyCase) -> None:
    read = case.readout(case.tokens) > 0
    expected = [
        np.mean([block[image][:, read, : case.prefix_tokens].sum(-1) for block in attention])
        for attention in [traced(case).attention]
        for image in range(len(attention[0]))
    ]
    found = explain_batch(loaded(case), case.images(), Rollout()).prefix_attention
    exact = read.sum() <= 16  # more are asked in part
    np.testing.assert_allclose(found, expected, atol=1e-6 if exact else 0.05)


def test_outliers_are_found_in_each_image_and_among_patches_alone() -> None:
    tokens = torch.ones(2, 12, 4)
    tokens[:, 0] *= 100  # a class token
    tokens[1, 3] *= 5.1
    tokens[1, 7] *= 4.9
    assert outlier_tokens(tokens, 1).nonzero().tolist() == [[1, 2]]
    assert outlier_tokens(tokens, 0).nonzero().tolist() == [[0, 0], [1, 0], [1, 3]]


def test_share_of_heat_is_by_magnitude_and_over_all_cells_of_a_patch() -> None:
    places = np.array([[False, True]])
    assert share_on(np.array([[3.0, -1.0]]), places) == 0.25
    assert share_on(np.array([[1.0, 1, 1, 0], [1, 1, 1, 0]]), places) == pytest.approx(1 / 3)
    assert share_on(np.ones((2, 3, 1, 2)), places) == 0.5
    assert share_on(np.zeros((1, 2)), places) == 0


def test_outliers_are_told_of_where_they_have_much_of_the_heat() -> None:
    few = Diagnostics(**{**SOUND, "outlier_tokens": 4, "outlier_share": 0.1})
    assert not few.caveats()
    assert replace(few, outlier_share=0.11).caveats() == [Caveat.OUTLIERS]


def test_leverage_bounds_what_wiping_out_a_token_changes() -> None:
    values = torch.tensor([[3.0, 4.0], [1.0, 0.0]])
    gradient = torch.tensor([[6.0, 8.0], [0.0, 2.0]])
    assert gradient_norm_product(values, gradient).tolist() == [50.0, 2.0]


@pytest.mark.parametrize(
    ("changed", "caveat"),
    [
        ({"prefix_attention": 0.51}, Caveat.PREFIX),
        ({"outlier_tokens": 1, "outlier_share": 0.2}, Caveat.OUTLIERS),
        ({"contrast": 0.04}, Caveat.EVEN),
        ({"contrast": 1e-6}, Caveat.FLAT_FOR_CLASS),
        ({"contrast": 0.0, "gradient_norm_product": None}, Caveat.FLAT),
        ({"gradient_norm_product": 1e-4}, Caveat.POWERLESS),
    ],
)
def test_what_may_mislead_is_doubted(changed: dict[str, Any], caveat: Caveat) -> None:
    assert Diagnostics(**{**SOUND, **changed}).caveats() == [caveat]


def test_sound_map_is_not_doubted() -> None:
    assert not Diagnostics(**SOUND).caveats()
    assert not Diagnostics(**{**SOUND, "gradient_norm_product": None}).caveats()


@pytest.mark.parametrize("method", list(METHODS))
def test_each_file_of_each_method_has_its_numbers(method: str, tmp_path: Path) -> None:
    save_pictures(tmp_path, ["a.png", "b.png"])
    sources, _ = find_sources([str(tmp_path)])
    options = make_method(method, classes=("top1",))
    job = Job(method=options, output=tmp_path / "out")
    results = list(run(tiny_model(), sources, job, warn=lambda text: None))
    sanities = [output.diagnostics for result in results for output in result.outputs]
    assert len(sanities) == 2
    for sanity in sanities:
        assert sanity is not None
        assert 0 < sanity.prefix_attention < 1
        assert 0 < sanity.contrast <= 2
        assert (sanity.gradient_norm_product is not None) == options.explains_class
        assert sanity.gradient_norm_product is None or sanity.gradient_norm_product > 0


def test_tokens_of_large_norm_are_told_once(tmp_path: Path) -> None:
    module = tiny_module()

    def blow_up(block: object, inputs: object, tokens: torch.Tensor) -> torch.Tensor:
        return torch.cat([tokens[:, :-4], 1000 * tokens[:, -4:]], dim=1)

    model = load_model(module, device="cpu")
    module.blocks[-1].register_forward_hook(blow_up)
    save_pictures(tmp_path, ["a.png", "b.png", "c.png"])
    sources, _ = find_sources([str(tmp_path)])
    told: list[str] = []
    list(run(model, sources, Job(output=tmp_path / "out", batch_size=2), warn=told.append))
    (line,) = told
    assert line.startswith("patch tokens of outlying norm in 3 maps, the")
    assert "a.png" in line


def test_numbers_are_those_of_the_image_as_it_is() -> None:
    """A refined map has the numbers of the image that was not shifted."""
    coarse, fine = (
        vitviz.grad_rollout(tiny_model(), [picture(64, 64)], refine=refine)[0].diagnostics
        for refine in (1, 2)
    )
    assert coarse is not None
    assert fine is not None
    assert fine.prefix_attention == pytest.approx(coarse.prefix_attention)
    assert fine.gradient_norm_product == pytest.approx(coarse.gradient_norm_product)


def test_of_many_tokens_that_are_read_every_so_many_is_asked() -> None:
    class Record:
        asked: slice

        def probabilities(self, images: slice, queries: slice) -> torch.Tensor:
            self.asked = queries
            return torch.eye(100)[queries].expand(1, 2, -1, -1)

    record = Record()
    readout = torch.ones(100)
    readout[:3] = 0
    share = prefix_attention([record], readout, 10).item()  # type: ignore[list-item]
    assert share == pytest.approx(1 / 14)
    assert list(range(100))[record.asked] == list(range(3, 100, 7))
