"""Raw attention: what the readout, or one patch, attends to, head by head."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import oracles
import vitviz
from comparison import loaded, traced
from fixtures_io import picture, tiny_model
from fixtures_methods import make_method
from fixtures_processes import Nursery
from tiny import CASES, LARGE_CASES, TinyCase
from vitviz.cli.app import main
from vitviz.errors import OptionError
from vitviz.explaining.batch import explain_batch
from vitviz.images.sources import find_sources
from vitviz.methods.attention import RawAttention
from vitviz.options import Fit
from vitviz.pictures.tables import ColorBar
from vitviz.runs.job import Job
from vitviz.runs.pipeline import run

pytestmark = pytest.mark.usefixtures("one_thread")


def by_hand(case: TinyCase, readout: oracles.Array) -> oracles.Array:
    """Compute wᵀA (batch, blocks, heads, rows, cols)."""
    attention = np.stack(traced(case).attention, axis=1)
    rows = np.einsum("q,blhqk->blhk", readout, attention)[..., case.prefix_tokens :]
    return rows.reshape(*rows.shape[:3], *case.grid)


def found(case: TinyCase, query: tuple[int, int] | None = None) -> oracles.Array:
    options = RawAttention(query=query)
    maps = explain_batch(loaded(case), case.images(), options).relevance
    assert maps.shape[1] == 1
    return np.asarray(maps[:, 0], np.float64)


@pytest.mark.parametrize("case", CASES + LARGE_CASES, ids=str)
def test_attention_of_the_readout_equals_reference(case: TinyCase) -> None:
    expected = by_hand(case, case.readout(case.tokens))
    np.testing.assert_allclose(found(case), expected, atol=1e-6)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_attention_of_a_patch_equals_reference(case: TinyCase) -> None:
    row, col = case.grid[0] - 1, 1
    patch = np.eye(case.tokens)[case.prefix_tokens + row * case.grid[1] + col]
    np.testing.assert_allclose(found(case, (row, col)), by_hand(case, patch), atol=1e-6)


def test_sheet_has_a_cell_for_each_head_of_each_block() -> None:
    (explained,) = vitviz.attention(tiny_model(), [picture(40, 40)])
    blocks, heads = explained.relevance.shape[:2]
    sheet = np.asarray(explained.heatmap())
    foot = ColorBar.height(11)
    assert sheet.shape[0] == 44 + blocks * (40 + 2) + foot
    assert sheet.shape[1] == 36 + heads * (40 + 2)
    assert (sheet[:22] < 128).any()  # the title
    assert (sheet[22:44, :36] < 128).any()  # "block"
    hottest = np.unravel_index(explained.relevance[1, 0].argmax(), explained.relevance.shape[2:])
    cell = sheet[44 + 42 : 44 + 42 + 40, 36 : 36 + 40].astype(int)
    side = 40 // explained.relevance.shape[2]
    centre = cell[tuple(place * side + side // 2 for place in hottest)]
    assert centre[0] > centre[2] + 60  # yellow in inferno


def test_sheet_keeps_to_the_longest_side() -> None:
    pictures = vitviz.PictureOptions(max_size=200)
    (explained,) = vitviz.attention(tiny_model(), [picture(400, 300)], pictures=pictures)
    assert 150 < max(explained.overlay().size) <= 200


def test_patch_outside_of_the_grid_is_refused_before_work() -> None:
    with pytest.raises(OptionError, match=r"query is 4,0, .* from 0,0 to 3,3"):
        vitviz.attention(tiny_model(), [picture(40, 40)], query=(4, 0))


def test_patch_that_only_some_shapes_have_fails_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, size in (("tall.png", (128, 32)), ("wide.png", (32, 128))):
        picture(*size).save(name)
    method = RawAttention(query=(0, 6))
    job = Job(method=method, fit=Fit.NATIVE)
    sources, _ = find_sources(["tall.png", "wide.png"])
    tall, wide = run(tiny_model(), sources, job)
    assert (tall.status, wide.status) == ("failed", "written")
    assert "this makes 8 × 2 patches" in str(tall.error)


@pytest.mark.parametrize("word", ["3", "a,b", "1,2,3", "-1,0"])
def test_query_that_is_no_patch_ends_in_one_line(
    word: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "a.png"
    Image.new("RGB", (8, 8)).save(path)
    with pytest.raises(SystemExit) as left:
        main(["attention", str(path), "-m", "demo", f"--query={word}", "-o", str(tmp_path / "o")])
    assert left.value.code == 2
    assert "--query" in capsys.readouterr().err


@pytest.mark.slow
def test_command_writes_sheet_and_numbers_and_nothing_else_to_stderr(
    nursery: Nursery, tmp_path: Path
) -> None:
    path = tmp_path / "a.png"
    picture(96, 96).save(path)
    command = ["attention", "-q", str(path), "-m", "demo"]
    command += ["--query", "3,4", "--save", "npy", "--save", "heatmap", "-o", str(tmp_path / "o")]
    done = nursery.run(*command, cwd=tmp_path)
    assert (done.code, done.err) == (0, "")
    numbers, sheet = done.out.decode().splitlines()
    assert np.load(numbers).shape == (12, 3, 12, 12)
    with Image.open(sheet) as shown:
        assert shown.height > 3 * shown.width  # 12 blocks of 3 heads


def test_query_of_an_image_that_is_moved_is_refused() -> None:
    with pytest.raises(OptionError, match="--query names a patch.*use one of them"):
        RawAttention(query=(0, 0), refine=2)


@pytest.mark.parametrize("method", ["attention", "evidence"])
def test_all_blocks_take_part(method: str) -> None:
    plain, started = (
        explain_batch(loaded(CASES[0]), CASES[0].images(), make_method(method, start_layer=start))
        for start in (None, 1)
    )
    assert torch.equal(plain.relevance, started.relevance)
    assert torch.equal(plain.prefix_attention, started.prefix_attention)
