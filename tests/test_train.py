"""The training of the demo model, in small: a tiny model, few scenes, a few dozen steps."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from timm.models import VisionTransformer
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

import vitviz
from tests.demo_model import CLASSES
from tests.demo_model import train as room
from tests.demo_model.scenes import HELD_OUT, Scene, SceneStyle, as_input, paint_scene
from tests.demo_model.train import CURRICULUM, Round, train
from vitviz.models.model import load_model

BUNDLED = Path(vitviz.__file__).parent / "demo"

# What has hardly learned yet may look nowhere.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:no heat at all")]

STYLE = SceneStyle(max_objects=1, radius=(0.35, 0.42), clutter=0)
ROUNDS = (
    Round(size=24, scenes=64, passes=2, style=STYLE),
    Round(size=32, scenes=64, passes=40, style=STYLE, rates=(1.0, 0.0)),
)

SHORT = tuple(replace(stage, passes=1) for stage in ROUNDS)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Make the model tiny, its warm-up, its memory and its reports short."""
    folder = tmp_path_factory.mktemp("home")
    config = json.loads((room._HOME / "config.json").read_text(encoding="utf-8"))
    config["model_args"] |= {"img_size": 32, "embed_dim": 48, "depth": 2}
    config["num_features"] = 48
    config["pretrained_cfg"]["input_size"] = [3, 32, 32]
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch, torch.random.fork_rng():
        for name, value in {
            "_HOME": folder,
            "_WARMUP": 20,
            "_EMA_DECAY": 0.9,
            "_REPORTED": 6,
        }.items():
            patch.setattr(room, name, value)
        torch.set_num_threads(1)
        yield folder
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def written(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train as the command line does, painters in processes of their own."""
    path = tmp_path_factory.mktemp("trained") / "w.safetensors"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train", "--output", str(path), "--seed", "3"])
        patch.setattr(room, "train", partial(train, curriculum=ROUNDS))
        room.main()
    return path


def trained_in_threads(seed: int, monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    monkeypatch.setattr(room, "painters", ThreadPoolExecutor)
    return train(seed, ROUNDS).state_dict()


def test_weights_are_written_in_half_precision_for_the_model_that_was_trained(
    home: Path, written: Path
) -> None:
    tensors = load_file(written)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}
    model = load_model(str(home), weights=written, device="cpu")
    assert model.labels.names == CLASSES
    assert model.layout.grid == (4, 4)
    for name, tensor in model.module.state_dict().items():
        assert torch.equal(tensor, tensors[name].float()), name


def test_training_makes_the_classes_likelier(home: Path, written: Path) -> None:
    model = load_model(str(home), weights=written, device="cpu").module
    scenes = [paint_scene(seed, style=STYLE) for seed in range(32)]  # of the held-out stream
    images = np.stack([as_input(scene.image, 32) for scene in scenes])
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
    labels = torch.from_numpy(np.stack([scene.labels for scene in scenes]))
    with torch.no_grad():
        loss = binary_cross_entropy_with_logits(model(pixels), labels).item()
    assert loss < 0.45  # 0.69 at the start, 0.38 for whoever knows that one in eight is right


def test_same_seed_gives_the_same_weights_whoever_paints(
    written: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    again = trained_in_threads(3, monkeypatch)
    tensors = load_file(written)
    assert set(again) == set(tensors)
    for name, tensor in again.items():
        assert torch.equal(tensor.half(), tensors[name]), name
    reports = [line for line in capsys.readouterr().err.splitlines() if line.startswith("exact ")]
    assert len(reports) == len(ROUNDS)


@pytest.mark.usefixtures("home")
def test_another_seed_gives_other_weights(written: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = trained_in_threads(4, monkeypatch)
    assert not torch.equal(other["head.weight"].half(), load_file(written)["head.weight"])


@pytest.mark.usefixtures("home")
def test_at_full_size_training_sees_the_tokens_that_the_model_sees() -> None:
    model = room._Learner().averaged()
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.allclose(room._tokens(model, pixels), model.forward_features(pixels))


@pytest.mark.usefixtures("home")
def test_smaller_image_is_placed_on_a_window_of_the_grid() -> None:
    model = room._Learner().averaged()
    model.blocks = torch.nn.Sequential()  # tokens as they enter
    pixels = torch.zeros(1, 3, 24, 24)
    with torch.no_grad():
        windows = {room._tokens(model, pixels).numpy().tobytes() for _ in range(40)}
        placed = windows_of(model)
    assert windows == placed


def windows_of(model: VisionTransformer) -> set[bytes]:
    """Return the tokens of a black 3×3 image at all four places of the 4×4 grid."""
    assert model.pos_embed is not None
    assert model.cls_token is not None
    grid = model.pos_embed[:, 1:].reshape(4, 4, -1)
    start = model.cls_token + model.pos_embed[:, :1]
    patch = model.patch_embed(torch.zeros(1, 3, 24, 24))[0, 0, 0]
    found = set()
    for top, left in ((0, 0), (0, 1), (1, 0), (1, 1)):
        window = grid[top : top + 3, left : left + 3].reshape(1, 9, -1)
        tokens = model.norm(torch.cat([start, patch + window], dim=1))
        found.add(tokens.numpy().tobytes())
    return found


def test_patch_is_labelled_with_the_object_that_fills_a_fifth_of_it() -> None:
    mask = np.zeros((20, 30), np.uint8)[:, :20]
    mask[:4, :5] = 3  # 20 of 100
    mask[:4, 10:14] = 5  # 16 of 100
    mask[10:20, :6] = 1  # 60 of 100, beside
    mask[10:20, 6:10] = 8  # 40 of 100
    assert room._cells(mask, 2).tolist() == [[3, 0], [1, 0]]


def test_mirrored_image_keeps_labels_on_their_patches() -> None:
    torch.manual_seed(0)
    cells = torch.arange(9 * 64).reshape(64, 3, 3) % 9
    images = cells.to(torch.uint8).repeat_interleave(8, 1).repeat_interleave(8, 2)
    shifts = torch.tensor([0, 50, 100], dtype=torch.uint8)  # tells channels apart
    batch = room.Examples(images[..., None] + shifts, torch.zeros(64, 8), cells)
    varied = room._varied(batch)
    plain = varied.images.sort(dim=3).values
    assert torch.equal(plain[:, ::8, ::8, 0].long(), varied.cells)
    assert torch.equal(plain - plain[..., :1], shifts.expand_as(plain))
    mirrored = (varied.cells != cells).flatten(1).any(dim=1)
    assert 16 < mirrored.sum() < 48
    orders = {tuple(image[0, 0].argsort().tolist()) for image in varied.images}
    assert len(orders) == 6


def test_curriculum_ends_at_the_bundled_models_size_with_a_rate_of_zero() -> None:
    config = json.loads((BUNDLED / "config.json").read_text(encoding="utf-8"))
    assert CURRICULUM[-1].size == config["model_args"]["img_size"]
    assert CURRICULUM[-1].rates[1] == 0
    assert sum(stage.steps for stage in CURRICULUM) == 2_998  # as the model card says


@pytest.mark.usefixtures("home")
@pytest.mark.parametrize("seed", [0, 1])
def test_no_scene_to_learn_from_is_a_held_out_one(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    painted = []

    def noted(number: int, **options: Any) -> Scene:
        painted.append((options.get("stream", HELD_OUT), number))
        return paint_scene(number, **options)

    monkeypatch.setattr(room, "paint_scene", noted)
    monkeypatch.setattr(room, "_report", lambda model: "")  # which looks at held-out ones
    monkeypatch.setattr(room, "painters", ThreadPoolExecutor)
    train(seed, SHORT)
    assert {stream for stream, _ in painted} == {seed + 1} != {HELD_OUT}  # a stream for each seed
    assert len(set(painted)) == len(painted) == sum(stage.scenes for stage in SHORT)
