"""Which model a weights file is for: said by the file, or asked for; never just the default."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from fixtures_io import NAME, SIZE, Shell, save_pictures, save_tiny, tiny_state
from vitviz.errors import OptionError, WeightsError
from vitviz.models.model import load_model

pytestmark = pytest.mark.usefixtures("one_thread")

STATE = tiny_state(seed=1)
SIDE = (SIZE, SIZE)


@pytest.fixture
def shell(shell: Shell, tmp_path: Path) -> Shell:
    save_pictures(tmp_path, ["a.png"])
    return shell


def folder_config(folder: Path, **changes: Any) -> None:
    config = {
        "architecture": NAME,
        "num_classes": 7,
        "label_names": [f"n{i}" for i in range(7)],
        "model_args": {"img_size": SIZE},
        "pretrained_cfg": {
            "input_size": [3, SIZE, SIZE],
            "mean": [0.1, 0.2, 0.3],
            "classifier": "head",
        },
    }
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


METADATA = {
    "arch": {"arch": NAME},
    "args": {"args": argparse.Namespace(model=NAME, lr=1)},
    "hyper_parameters": {"hyper_parameters": {"model_name": f"timm/{NAME}.r160_in1k"}},
    "nested config": {"cfg": {"model": {"arch": NAME}}},
}


@pytest.mark.parametrize("kind", METADATA)
def test_model_is_taken_from_the_checkpoints_metadata(tmp_path: Path, kind: str) -> None:
    torch.save({"state_dict": STATE, **METADATA[kind]}, tmp_path / "w.pth")
    model = load_model(weights=tmp_path / "w.pth", device="cpu", img_size=SIDE)
    assert model.name.startswith(NAME)
    assert any(f"taken as {NAME}" in note and "metadata" in note for note in model.notes)


def test_model_is_taken_from_the_metadata_of_safetensors(tmp_path: Path) -> None:
    save_file(STATE, tmp_path / "w.safetensors", metadata={"architecture": NAME})
    model = load_model(weights=tmp_path / "w.safetensors", device="cpu", img_size=SIDE)
    assert model.name.startswith(NAME)


@pytest.mark.parametrize(
    "name",
    [
        f"{NAME}.safetensors",
        f"{NAME}.r160_in1k.safetensors",
        f"{NAME}-a1311bcf.safetensors",
        f"best_{NAME}_ep30.safetensors",
    ],
)
def test_model_is_taken_from_the_files_name(tmp_path: Path, name: str) -> None:
    path = save_tiny(tmp_path / name)
    assert load_model(weights=path, device="cpu", img_size=SIDE).name.startswith(NAME)


def test_config_beside_the_file_brings_its_means_and_labels(tmp_path: Path) -> None:
    folder_config(tmp_path)
    model = load_model(weights=save_tiny(tmp_path / "best.safetensors"), device="cpu")
    assert model.preprocessing.mean == (0.1, 0.2, 0.3)
    assert model.labels[3] == "n3"


@pytest.mark.parametrize(
    "name", ["w.safetensors", "deit_tiny_against_vit_tiny.safetensors", f"{NAME}2000.safetensors"]
)
def test_file_that_does_not_say_its_model_is_not_taken_for_the_default(
    tmp_path: Path, name: str
) -> None:
    path = save_tiny(tmp_path / name)
    with pytest.raises(OptionError, match="says nowhere which model it is for.*-m NAME --weights"):
        load_model(weights=path, device="cpu")


def test_transformers_config_is_no_name_of_timms(tmp_path: Path) -> None:
    folder_config(tmp_path, architecture="ViTForImageClassification")
    with pytest.raises(OptionError, match="says nowhere"):
        load_model(weights=save_tiny(tmp_path / "model.safetensors"), device="cpu")


def test_file_that_says_two_models_is_refused_with_both(tmp_path: Path) -> None:
    torch.save({"model": STATE, "arch": "deit_tiny_patch16_224"}, tmp_path / f"{NAME}.pth")
    with pytest.raises(OptionError, match=rf"deit_tiny_patch16_224 by its metadata.*and {NAME} by"):
        load_model(weights=tmp_path / f"{NAME}.pth", device="cpu")


def test_short_name_of_another_codebase_is_not_taken_for_an_alias(tmp_path: Path) -> None:
    torch.save({"teacher": STATE, "args": argparse.Namespace(arch="vit_small")}, tmp_path / "w.pth")
    with pytest.raises(OptionError, match="says nowhere"):
        load_model(weights=tmp_path / "w.pth", device="cpu")


def test_missing_file_is_missed_before_its_model(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="not a file"):
        load_model(weights=tmp_path / f"{NAME}.pth", device="cpu")


@pytest.mark.parametrize("place", ["metadata", "config", "name"])
def test_another_model_than_the_one_asked_for_is_said(tmp_path: Path, place: str) -> None:
    path = tmp_path / ("test_vit2.pth" if place == "name" else "w.pth")
    torch.save({"model": STATE, **({"arch": "test_vit2"} if place == "metadata" else {})}, path)
    if place == "config":
        folder_config(tmp_path, architecture="test_vit2")
    notes = load_model(NAME, weights=path, device="cpu", img_size=SIDE).notes
    assert any("is test_vit2 by its" in n or "is test_vit2 by the" in n for n in notes), notes


@pytest.mark.parametrize("name", [f"{NAME}.pth", f"{NAME}.r160_in1k.pth", "w.pth"])
def test_the_same_model_is_nothing_to_speak_of(tmp_path: Path, name: str) -> None:
    torch.save(STATE, tmp_path / name)
    model = load_model(NAME, weights=tmp_path / name, device="cpu", img_size=SIDE)
    assert model.notes == ()


def test_other_weights_of_the_same_architecture_are_said(tmp_path: Path) -> None:
    state = tiny_state(name="vit_tiny_patch16_224", img_size=224)
    path = tmp_path / "vit_tiny_patch16_224.augreg_in21k.safetensors"
    save_file(state, path)
    (note,) = load_model("vit_tiny", weights=path, device="cpu").notes
    assert "vit_tiny_patch16_224.augreg_in21k by its file's name" in note


# What is said of it


def test_command_takes_the_files_model_and_says_what_it_computes_with(shell: Shell) -> None:
    torch.save({"model": STATE, "arch": NAME}, "w.pth")
    done = shell("rollout", "a.png", "--weights", "w.pth", "--img-size", str(SIZE), "--json")
    assert done.code == 0, done.err
    (using,) = [line for line in done.err.splitlines() if line.startswith(f"Using {NAME}")]
    assert "weights w.pth, mean 0.5 0.5 0.5, std 0.5 0.5 0.5" in using
    options = done.records[0]["run"]["options"]
    assert options["mean"] == options["std"] == [0.5, 0.5, 0.5]


def test_command_asks_for_the_model_of_a_file_that_does_not_say_it(shell: Shell) -> None:
    torch.save(STATE, "w.pth")
    done = shell("rollout", "a.png", "--weights", "w.pth")
    assert done.code == 2
    (line,) = done.complaints
    assert "-m NAME --weights w.pth" in line


def test_python_is_told_in_its_own_words(tmp_path: Path) -> None:
    import vitviz

    path = save_tiny(tmp_path / "w.safetensors")
    with pytest.raises(OptionError, match="with model=NAME, weights="):
        vitviz.load_model(weights=path)


# Normalisation


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("0.4", (0.4,) * 3),
        ("0.1,0.2,0.3", (0.1, 0.2, 0.3)),
        (0.4, (0.4,) * 3),
        ([0, 0.5, 1], (0, 0.5, 1)),
    ],
    ids=str,
)
def test_own_normalisation_is_computed_with(given: Any, expected: tuple[float, ...]) -> None:
    from fixtures_io import tiny_module

    assert load_model(tiny_module(), mean=given, device="cpu").preprocessing.mean == expected


@pytest.mark.parametrize(
    "wrong",
    [{"mean": "0.1,0.2"}, {"std": 0}, {"mean": "red"}, {"mean": [123.7, 116.3, 103.5]},
     {"std": float("nan")}, {"std": [0.5, -1, 0.5]}, {"mean": ""}],
    ids=str,
)  # fmt: skip
def test_numbers_that_are_no_normalisation_are_refused(wrong: dict[str, Any]) -> None:
    from fixtures_io import tiny_module

    with pytest.raises(OptionError, match=r"pixels in \[0, 1\]"):
        load_model(tiny_module(), device="cpu", **wrong)


def test_normalisation_of_the_command_is_recorded_and_makes_another_picture(shell: Shell) -> None:
    torch.save(STATE, f"{NAME}.pth")
    words = ("rollout", "a.png", "--weights", f"{NAME}.pth", "--img-size", str(SIZE), "--json")
    shell(*words)
    again = shell(*words, "--skip-existing", "--mean", "0.1,0.2,0.3", "--std", "0.25")
    (record,) = again.records
    assert record["status"] == "written"
    assert record["run"]["options"]["mean"] == [0.1, 0.2, 0.3]
    assert record["run"]["options"]["std"] == [0.25] * 3
    assert (
        shell(*words, "--skip-existing", "--mean", "0.1,0.2,0.3", "--std", "0.25").records[0][
            "status"
        ]
        == "skipped"
    )
