"""Animations of rollouts: the numbers of their frames, and the files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence

import vitviz
from comparison import GRADIENTS, ROLLOUTS, TOLERANCE, Setting, by_hand, loaded, requested
from fixtures_io import Shell, picture, save_pictures, tiny_model
from tests.oracles import Array
from tiny import CASES, TinyCase
from vitviz.explaining.batch import explain_batch
from vitviz.explaining.explanation import Explanation
from vitviz.methods.rollout import GradRollout, Rollout, Sweep
from vitviz.options import OutputKind
from vitviz.report.collecting import find_images
from vitviz.runs.provenance import is_whole, read_provenance

OUT = Path("vitviz-out")
DISCARDS = [tenth / 10 for tenth in range(10)]
SWEPT = (
    next(each for each in ROLLOUTS if each.discard == 0.9),
    next(each for each in ROLLOUTS if each.fusion == "mean"),
    GRADIENTS[0],
)
HEADS, BLOCKS = 2, 6  # of the tiny model
SIZE = (120, 320)
BATCH = torch.zeros(2, 3, 64, 64)


def animated(case: TinyCase, setting: Setting, sweep: Sweep) -> Array:
    """Compute frames (batch, maps, frames, rows, cols) by the package."""
    method = setting.options(requested(case))
    assert isinstance(method, (Rollout, GradRollout))
    found = explain_batch(loaded(case), case.images(), replace(method, animate=sweep))
    return np.asarray(found.relevance, np.float64)


def frames_by_hand(case: TinyCase, setting: Setting, sweep: Sweep) -> Array:
    """Compute them from the formulas, each frame for itself."""
    if sweep is Sweep.DISCARD:
        frames = [by_hand(case, replace(setting, discard=share)) for share in DISCARDS]
    elif sweep is Sweep.LAYERS:
        firsts = range(setting.start_layer, case.blocks)
        frames = [by_hand(case, replace(setting, start_layer=first)) for first in firsts]
    else:
        frames = [by_hand(case, setting, mistake=only(head)) for head in range(heads_of(case))]
    return np.stack(frames, axis=2)


def heads_of(case: TinyCase) -> int:
    return next(
        module.num_heads for module in case.build().modules() if hasattr(module, "num_heads")
    )


def only(head: int):  # type: ignore[no-untyped-def]  # what by_hand takes
    def kept(attention: list[Array], gradients: list[Array] | None):  # type: ignore[no-untyped-def]
        one = slice(head, head + 1)
        alone = [block[one] for block in attention]
        return alone, None if gradients is None else [block[one] for block in gradients]

    return kept


@pytest.mark.parametrize("sweep", Sweep, ids=str)
@pytest.mark.parametrize("setting", SWEPT, ids=str)
def test_frames_are_those_of_the_formulas(setting: Setting, sweep: Sweep) -> None:
    case = CASES[0]
    frames, expected = animated(case, setting, sweep), frames_by_hand(case, setting, sweep)
    assert frames.shape == expected.shape
    span = np.ptp(expected, axis=(-2, -1), keepdims=True)
    assert (np.abs(frames - expected) / span).max() <= TOLERANCE
    assert np.abs(np.diff(expected, axis=2)).max() > 1e-3  # frames differ, and their order matters


def test_animation_of_layers_begins_at_the_start_layer() -> None:
    setting = replace(SWEPT[0], start_layer=1)
    case = CASES[0]
    frames = animated(case, setting, Sweep.LAYERS)
    assert frames.shape[2] == case.blocks - 1
    expected = frames_by_hand(case, setting, Sweep.LAYERS)
    assert np.abs(frames - expected).max() <= TOLERANCE * np.ptp(expected)


@pytest.mark.parametrize("sweep", Sweep, ids=str)
def test_animation_takes_one_forward_pass(sweep: Sweep) -> None:
    model = tiny_model()
    calls = []
    handle = model.module.register_forward_hook(lambda *_: calls.append(1))
    try:
        explain_batch(model, BATCH, Rollout(animate=sweep))
        once = len(calls)
        calls.clear()
        explain_batch(model, BATCH, Rollout())
    finally:
        handle.remove()
    assert once == len(calls) > 0


def test_frames_say_what_they_are() -> None:
    assert [Rollout(animate=Sweep.DISCARD).frame_name(at) for at in (0, 9)] == [
        "discard 0",
        "discard 0.9",
    ]
    assert Rollout(animate=Sweep.LAYERS, start_layer=2).frame_name(1) == "from block 3"
    assert GradRollout(animate=Sweep.HEADS).frame_name(2) == "head 2"


def test_record_of_a_map_is_what_it_was_without_animations() -> None:
    assert "animate" not in Rollout().to_record()
    assert GradRollout(animate=Sweep.HEADS).to_record()["animate"] == "heads"


def one_animation() -> Explanation:
    (made,) = vitviz.rollout(tiny_model(), picture(*SIZE), animate="discard")
    return made


def test_frame_is_the_picture_of_its_map_under_its_title() -> None:
    made = one_animation()
    assert made.relevance.shape == (10, *tiny_model().layout.grid)
    frames = made.animation(OutputKind.OVERLAY)
    (still,) = vitviz.rollout(tiny_model(), picture(*SIZE), discard=0.4)
    drawn = still.draw(OutputKind.OVERLAY)
    assert {frame.shape for frame in frames} == {frames[0].shape}
    top = next(
        top
        for top in range(len(frames[4]) - SIZE[0])
        if np.abs(frames[4][top : top + SIZE[0]].astype(int) - drawn).max() <= 1
    )
    assert (frames[4][:top] != frames[3][:top]).any()  # the title


def test_animation_draws_itself_as_a_sheet_of_its_frames() -> None:
    drawn = one_animation().overlay()
    assert drawn.width == 1024  # the largest side, by default
    assert np.array_equal(np.asarray(drawn), one_animation().draw(OutputKind.OVERLAY))


@pytest.fixture
def shell(shell: Shell, tmp_path: Path) -> Shell:
    save_pictures(tmp_path, ["a.png"], SIZE)
    return shell


@pytest.mark.parametrize(
    ("command", "options", "name", "frames"),
    [
        ("rollout", ["--animate", "discard"], "a.png.rollout.discard.gif", 10),
        ("rollout", ["--animate", "heads"], "a.png.rollout.heads.gif", HEADS),
        (
            "grad-rollout",
            ["--animate", "layers", "--class", "1", "--format", "webp"],
            "a.png.grad-rollout.layers.c1.webp",
            BLOCKS,
        ),
        (
            "rollout",
            ["--animate", "discard", "--save", "panel", "--format", "gif"],
            "a.png.rollout.discard.panel.gif",
            10,
        ),
    ],
)
def test_file_has_a_frame_for_each_step(
    shell: Shell, tiny: list[str], command: str, options: list[str], name: str, frames: int
) -> None:
    done = shell(command, "a.png", *options, *tiny)
    assert (done.code, done.out.decode().split()) == (0, [f"vitviz-out/{name}"])
    path = Path("vitviz-out", name)
    with Image.open(path) as image:
        shown = []
        for frame in ImageSequence.Iterator(image):
            frame.load()
            shown.append((frame.size, frame.info["duration"]))
        assert image.info["loop"] == 0
    assert len(shown) == frames
    assert [time for _, time in shown] == [500] * (frames - 1) + [1500]
    assert len({size for size, _ in shown}) == 1
    provenance = read_provenance(path)
    assert provenance is not None
    assert provenance.recipe["options"]["animate"] == options[1]
    assert is_whole(path)
    path.write_bytes(path.read_bytes()[:-3])
    assert not is_whole(path)


def test_animation_that_is_there_is_skipped_and_is_no_source(shell: Shell, tiny: list[str]) -> None:
    words = ["rollout", ".", "--animate", "heads", "--skip-existing", *tiny]
    assert "1 written, 0 skipped" in shell(*words).err
    again = shell(*words)
    assert "0 written, 1 skipped" in again.err
    assert shell("rollout", ".", *tiny).out.decode().split() == ["vitviz-out/a.png.rollout.png"]


def test_numbers_of_an_animation_are_its_frames(shell: Shell, tiny: list[str]) -> None:
    assert shell("rollout", "a.png", "--animate", "discard", "--save", "npy", *tiny).code == 0
    assert np.load("vitviz-out/a.png.rollout.discard.npy").shape == (10, 4, 4)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--format", "gif"], "--format gif is for --animate"),
        (["--animate", "heads", "--format", "jpeg"], "--format jpeg has no frames"),
        (["--animate", "heads", "--save", "gray"], "--save gray is of one map"),
        (["--animate", "blocks"], "discard"),
    ],
)
def test_what_cannot_be_animated_is_refused(
    shell: Shell, tiny: list[str], options: list[str], words: str
) -> None:
    done = shell("rollout", "a.png", *options, *tiny)
    assert done.code == 2
    assert words in done.err


def test_animation_has_a_place_of_its_own_in_a_report(shell: Shell, tiny: list[str]) -> None:
    save_pictures(Path(), ["a.png"])
    kinds = ["--save", "overlay", "--save", "npy"]
    assert shell("rollout", "a.png", *tiny, "--animate", "discard", *kinds, "--report").code == 0
    assert shell("rollout", "a.png", *tiny, *kinds, "--report").code == 0
    (image,), failures = find_images(OUT, None)
    assert not failures
    maps = {str(each.provenance.recipe["options"].get("animate")): each for each in image.maps}
    assert sorted(maps) == ["None", "discard"]
    assert maps["None"].stored is not None
    assert maps["discard"].stored is None
    assert maps["discard"].picture == OUT / "a.png.rollout.discard.gif"
