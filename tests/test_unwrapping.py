"""Checkpoints of any make: the same state dict, or a refusal that names what was found."""

from __future__ import annotations

import argparse
import json
import pathlib
from collections import defaultdict
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from fixtures_io import NAME, SIZE, tiny_module, tiny_state
from vitviz.errors import WeightsError
from vitviz.models.checkpoints import digest_weights, read_checkpoint
from vitviz.models.model import load_model
from vitviz.models.unwrapping import unwrap

pytestmark = pytest.mark.usefixtures("one_thread")

STATE = tiny_state(seed=1)
OTHER = tiny_state(seed=2)
MODULE = tiny_module(seed=1)
EXPECTED = digest_weights(MODULE)
SHAPES = {name: tuple(tensor.shape) for name, tensor in STATE.items()}
KNOWN = ("teacher", "student", "module", "net", "weights", "ema", "state_dict", "model", "backbone")


def prefixed(prefix: str, state: Mapping[str, Tensor] = STATE) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in state.items()}


def same(tensors: Mapping[str, Tensor], state: Mapping[str, Tensor] = STATE) -> bool:
    return tensors.keys() == state.keys() and all(torch.equal(tensors[n], state[n]) for n in state)


def inner_wrapped(name: str, wrapper: str) -> str:
    return name.replace("blocks.1.", f"blocks.1.{wrapper}.")


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    nest=st.lists(st.sampled_from([*KNOWN, "anything", "my.own"]), max_size=3),
    prefixes=st.lists(st.sampled_from([*KNOWN, "_orig_mod", "vit", "encoder"]), max_size=3),
    inner=st.sampled_from(["", "_orig_mod", "_fsdp_wrapped_module"]),
    strays=st.sets(st.sampled_from(["criterion.weight", "queue", "head2.0.weight"])),
    metadata=st.booleans(),
    form=st.sampled_from(["safetensors", "new", "old"]),
    suffix=st.sampled_from([".safetensors", ".pth", ".bin", ".ckpt", ""]),
)
def test_any_wrapping_gives_the_same_state_dict_or_names_what_is_there(
    tmp_path: Path,
    nest: list[str],
    prefixes: list[str],
    inner: str,
    strays: set[str],
    metadata: bool,
    form: str,
    suffix: str,
) -> None:
    prefix = "".join(f"{each}." for each in prefixes)
    state = {prefix + (inner_wrapped(n, inner) if inner else n): t for n, t in STATE.items()}
    state |= {name: torch.ones(2, 3) for name in strays}
    content: dict[str, Any] = state
    path = tmp_path / f"w{suffix}"
    if form == "safetensors":
        save_file(state, path)
    else:
        for key in nest:
            content = {key: content}
        if metadata:
            content |= {
                "epoch": np.float64(3),
                "where": Path("a/b"),
                "optimizer": {"state": {0: 1}},
            }
        torch.save(content, path, _use_new_zipfile_serialization=form == "new")
    checkpoint = read_checkpoint(path, MODULE)
    bare = not any(each not in ("_orig_mod",) for each in prefixes)
    if bare and strays:  # beside the model's own names they may belong to it: it is to judge
        assert checkpoint.tensors.keys() - STATE.keys() == strays
    else:
        assert same(checkpoint.tensors)
        assert all(stray in checkpoint.unwrapped for stray in strays)
    if form != "safetensors":
        assert all(part in checkpoint.unwrapped for key in nest for part in key.split("."))


@pytest.mark.parametrize("word", KNOWN)
def test_customary_words_are_taken_off_without_a_model_too(word: str) -> None:
    for content in ({word: STATE, "epoch": 1}, prefixed(f"{word}."), {word: prefixed("module.")}):
        assert same(unwrap(content, "w").tensors)


@pytest.mark.parametrize(
    ("content", "place"),
    [
        ({"student": OTHER, "teacher": STATE}, ("teacher",)),
        ({"student": prefixed("m.", OTHER), "teacher": prefixed("m.")}, ("teacher", "m")),
        ({**prefixed("student.", OTHER), **prefixed("teacher.")}, ("teacher",)),
        ({"model": OTHER, "ema": prefixed("module.")}, ("ema", "module")),
        ({**OTHER, "model_ema": STATE}, ("model_ema",)),
        (
            {"model": STATE, "discriminator": prefixed("x.", {"a.weight": torch.ones(2)})},
            ("model",),
        ),
    ],
    ids=range(6),
)
@pytest.mark.parametrize("shapes", [SHAPES, None], ids=["model", "words"])
def test_of_several_models_the_average_and_the_teacher_go_first(
    content: dict[str, Any], place: tuple[str, ...], shapes: Any
) -> None:
    if shapes is None and "m" in place:
        pytest.skip("no word of trainers")
    found = unwrap(content, "w", shapes)
    assert found.place == place
    assert same(found.tensors)
    assert "leaving out" in found.describe() or "model_ema" in place


def test_student_of_a_larger_teacher_is_found_by_its_shapes() -> None:
    larger = {name: torch.ones(*(2 * side for side in t.shape)) for name, t in STATE.items()}
    assert same(unwrap({"teacher": larger, "student": STATE}, "w", SHAPES).tensors)


def test_two_models_without_a_reason_to_prefer_one_are_refused_by_name() -> None:
    with pytest.raises(WeightsError, match="several models that fit, at left and at right"):
        unwrap({"left": STATE, "right": OTHER}, "w", SHAPES)


def test_tensor_that_is_there_twice_is_refused() -> None:
    with pytest.raises(WeightsError, match=r"holds \S+ twice"):
        unwrap({**prefixed("_orig_mod.", OTHER), **STATE}, "w", SHAPES)


def test_what_is_there_in_place_of_tensors_is_named() -> None:
    with pytest.raises(WeightsError, match=r"no tensors by name, but epoch \(int\), best \(dict\)"):
        unwrap({"epoch": 1, "best": {}}, "w", SHAPES)


def test_loaded_model_says_in_one_line_what_was_taken_off(tmp_path: Path) -> None:
    torch.save({"teacher": prefixed("net."), "student": OTHER}, tmp_path / "w.pth")
    model = load_model(NAME, weights=tmp_path / "w.pth", device="cpu", img_size=(SIZE, SIZE))
    assert model.digest == EXPECTED
    (note,) = [each for each in model.notes if "taking" in each]
    assert note.endswith(
        f"taking the model at teacher → net, leaving out student ({len(OTHER)} tensors)"
    )


METADATA: dict[str, Any] = {
    "float": np.float64(0.5),
    "integer": np.int64(3),
    "bool": np.bool_(True),
    "array": np.arange(3),
    "path": Path("runs/best"),
    "pure": pathlib.PureWindowsPath("c:/runs"),
    "time": datetime(2024, 1, 1),
    "counts": defaultdict(int, {"a": 1}),
    "lists": defaultdict(list),
    "arguments": argparse.Namespace(output=Path("x"), lr=np.float32(0.1), model="vit"),
    "type": torch.float16,
}


@pytest.mark.parametrize("new_format", [True, False])
@pytest.mark.parametrize("name", METADATA)
def test_harmless_values_beside_the_tensors_are_no_damage(
    tmp_path: Path, name: str, new_format: bool
) -> None:
    content = {"model": STATE, name: METADATA[name]}
    torch.save(content, tmp_path / "w.pth", _use_new_zipfile_serialization=new_format)
    assert same(read_checkpoint(tmp_path / "w.pth").tensors)


def test_object_that_is_not_read_is_named(tmp_path: Path) -> None:
    torch.save({"model": STATE, "x": pathlib.Path.home}, tmp_path / "w.pth")
    with pytest.raises(WeightsError, match=r"holds Python objects \(\w+"):
        read_checkpoint(tmp_path / "w.pth")


def test_state_in_a_kind_of_dict_is_read(tmp_path: Path) -> None:
    torch.save({"model": defaultdict(list, STATE)}, tmp_path / "w.pth")
    assert same(read_checkpoint(tmp_path / "w.pth").tensors)


# Numbers

QUANTISED = (torch.int8, torch.uint8, torch.int32, torch.int64, torch.bool)


@pytest.mark.parametrize("known", [True, False], ids=["model", "words"])
@pytest.mark.parametrize("dtype", QUANTISED, ids=str)
def test_quantised_weights_are_not_taken_for_real_numbers(
    tmp_path: Path, dtype: torch.dtype, known: bool
) -> None:
    state = {name: (50 * tensor).to(dtype) for name, tensor in STATE.items()}
    torch.save({"model": state}, tmp_path / "w.pth")
    kind = str(dtype).removeprefix("torch.")
    with pytest.raises(WeightsError, match=rf"is {kind}; expected real numbers"):
        read_checkpoint(tmp_path / "w.pth", MODULE if known else None)


@pytest.mark.parametrize("name", ["blocks.2.mlp.fc1.weight", "cls_token", "norm.bias"])
def test_one_quantised_tensor_is_enough_to_refuse(tmp_path: Path, name: str) -> None:
    torch.save({**STATE, name: STATE[name].to(torch.int8)}, tmp_path / "w.pth")
    with pytest.raises(WeightsError, match=f"{name} is int8"):
        read_checkpoint(tmp_path / "w.pth", MODULE)


def test_counts_that_a_model_keeps_in_integers_are_read(tmp_path: Path) -> None:
    module = torch.nn.BatchNorm2d(3)
    torch.save(module.state_dict(), tmp_path / "w.pth")
    assert same(read_checkpoint(tmp_path / "w.pth", module).tensors, module.state_dict())
    assert same(read_checkpoint(tmp_path / "w.pth").tensors, module.state_dict())


# Files


def test_safetensors_behind_a_link_are_read_as_in_the_hubs_cache(tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    save_file(STATE, tmp_path / "blobs" / "0a1b")
    (tmp_path / "w.bin").symlink_to(tmp_path / "blobs" / "0a1b")
    assert same(read_checkpoint(tmp_path / "w.bin").tensors)
    assert same(read_checkpoint(tmp_path / "blobs" / "0a1b").tensors)


def test_torch_checkpoint_called_safetensors_is_read(tmp_path: Path) -> None:
    torch.save(STATE, tmp_path / "w.safetensors")
    assert same(read_checkpoint(tmp_path / "w.safetensors").tensors)


def test_link_to_nothing_is_told_to_be_one(tmp_path: Path) -> None:
    (tmp_path / "w.pth").symlink_to(tmp_path / "gone")
    with pytest.raises(WeightsError, match="a link to a file that is not there"):
        read_checkpoint(tmp_path / "w.pth")


def shards(folder: Path, kind: str = "model.safetensors") -> Path:
    stem, _, suffix = kind.partition(".")
    names, places = list(STATE), {}
    for number in (1, 2, 3):
        part = {name: STATE[name] for name in names[number - 1 :: 3]}
        file = folder / f"{stem}-0000{number}-of-00003.{suffix}"
        save_file(part, file) if suffix == "safetensors" else torch.save(part, file)
        places |= dict.fromkeys(part, file.name)
    index = folder / f"{kind}.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return index


@pytest.mark.parametrize("kind", ["model.safetensors", "pytorch_model.bin"])
def test_all_shards_are_read_by_their_list_or_by_any_of_them(tmp_path: Path, kind: str) -> None:
    index = shards(tmp_path, kind)
    for path in (index, *sorted(tmp_path.glob("*-of-*"))):
        assert same(read_checkpoint(path).tensors)


def test_model_folder_in_shards_is_read_whole(tmp_path: Path) -> None:
    shards(tmp_path)
    config = {
        "architecture": NAME,
        "num_classes": 7,
        "model_args": {"img_size": SIZE},
        "pretrained_cfg": {"input_size": [3, SIZE, SIZE], "classifier": "head"},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert load_model(str(tmp_path), device="cpu").digest == EXPECTED


@pytest.mark.parametrize("damage", ["shard gone", "list gone", "no list", "elsewhere"])
def test_shards_that_are_not_all_there_are_refused(tmp_path: Path, damage: str) -> None:
    index = shards(tmp_path)
    first, second, _ = sorted(tmp_path.glob("*-of-*"))
    if damage == "shard gone":
        second.unlink()
    elif damage == "list gone":
        index.unlink()
    elif damage == "no list":
        index.write_text("[]")
    else:
        index.write_text(json.dumps({"weight_map": {"a": "../w.safetensors"}}))
    with pytest.raises(WeightsError, match=r"shard"):
        read_checkpoint(first)
