"""Weights: the user's own files, and the model hub."""

from __future__ import annotations

import argparse
import json
import os
import pickle
import re
import socket
import time
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from fixtures_io import NAME, SIZE, at_most, run_process, save_tiny, tiny_module, tiny_state
from vitviz.errors import WeightsError
from vitviz.models.checkpoints import digest_weights, read_checkpoint
from vitviz.models.hub import fetch_from_hub
from vitviz.models.model import Model, load_model

pytestmark = pytest.mark.usefixtures("one_thread")


def load(path: Path, **arguments: Any) -> Model:
    return load_model(NAME, weights=path, device="cpu", img_size=(SIZE, SIZE), **arguments)


def saved(path: Path, content: object) -> Path:
    torch.save(content, path)
    return path


def refusal(path: Path) -> str:
    with pytest.raises(WeightsError) as caught:
        load(path)
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    return message


STATE = tiny_state(seed=1)
EXPECTED = digest_weights(tiny_module(seed=1))
OTHER = tiny_state(seed=2)


def prefixed(prefix: str) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in STATE.items()}


# Forms


def test_safetensors_are_loaded(tmp_path: Path) -> None:
    model = load(save_tiny(tmp_path / "w.safetensors", seed=1))
    assert model.digest == EXPECTED
    assert model.weights == str(tmp_path / "w.safetensors")
    assert not model.module.training


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin", ".pth.tar"])
def test_torch_checkpoint_is_loaded(tmp_path: Path, suffix: str) -> None:
    assert load(saved(tmp_path / f"w{suffix}", STATE)).digest == EXPECTED


def test_old_torch_format_is_loaded(tmp_path: Path) -> None:
    torch.save(STATE, tmp_path / "w.pth", _use_new_zipfile_serialization=False)
    assert load(tmp_path / "w.pth").digest == EXPECTED


@pytest.mark.parametrize(
    "content",
    [
        {"model": STATE},
        {"state_dict": STATE, "epoch": 3},
        {"model_state_dict": STATE, "optimizer_state_dict": {"state": {0: torch.ones(1)}}},
        {"state_dict": prefixed("module.")},
        {"state_dict": prefixed("model.")},
        {"model": prefixed("_orig_mod.")},
        prefixed("module."),
        prefixed("module._orig_mod."),
        prefixed("_orig_mod.module."),
        OrderedDict(STATE),
        {"model": {"state_dict": STATE}},
        {"state_dict": STATE, "state_dict_ema": None},
        {"state_dict": {name: torch.nn.Parameter(t) for name, t in STATE.items()}},
    ],
    ids=range(13),
)
def test_common_wrappings_are_taken_off(tmp_path: Path, content: object) -> None:
    model = load(saved(tmp_path / "w.pth", content))
    assert model.digest == EXPECTED
    assert not any("EMA" in note for note in model.notes)


@pytest.mark.parametrize(
    ("raw", "averaged"), [("state_dict", "state_dict_ema"), ("model", "model_ema")]
)
def test_averaged_weights_are_preferred_and_that_is_said(
    tmp_path: Path, raw: str, averaged: str
) -> None:
    model = load(saved(tmp_path / "w.pth", {raw: OTHER, averaged: prefixed("module.")}))
    assert model.digest == EXPECTED
    assert any("EMA" in note for note in model.notes)


def test_training_arguments_are_allowed(tmp_path: Path) -> None:
    arguments = argparse.Namespace(lr=0.1, model="vit", betas=[0.9, 0.99], none=None)
    path = saved(tmp_path / "w.pth", {"state_dict": STATE, "args": arguments, "epoch": 1})
    assert load(path).digest == EXPECTED


def test_reading_leaves_torchs_safe_list_as_it_was(tmp_path: Path) -> None:
    before = set(torch.serialization.get_safe_globals())
    load(saved(tmp_path / "w.pth", STATE))
    assert set(torch.serialization.get_safe_globals()) == before


def test_half_precision_weights_give_a_map(tmp_path: Path) -> None:
    state = {name: tensor.half() for name, tensor in STATE.items()}
    model = load(saved(tmp_path / "w.pth", state))
    assert model.num_classes == 7


# Classes


@pytest.mark.parametrize("classes", [1, 2, 7, 1000])
def test_number_of_classes_follows_the_head(tmp_path: Path, classes: int) -> None:
    model = load(save_tiny(tmp_path / "w.safetensors", classes=classes))
    assert model.num_classes == classes
    assert len(model.labels.names) in (0, classes)


def test_imagenets_labels_are_assumed_for_a_thousand_classes_and_that_is_said(
    tmp_path: Path,
) -> None:
    model = load(save_tiny(tmp_path / "w.safetensors", classes=1000))
    assert model.labels[281] == "tabby, tabby cat"
    assert any("labels" in note and "1000" in note for note in model.notes)


def test_own_labels_are_not_called_assumed(tmp_path: Path) -> None:
    (tmp_path / "labels").write_text("\n".join(f"class {i}" for i in range(1000)))
    path = save_tiny(tmp_path / "w.safetensors", classes=1000)
    model = load(path, labels=tmp_path / "labels")
    assert model.labels[281] == "class 281"
    assert not any("labels" in note for note in model.notes)


def test_checkpoint_without_a_head_has_no_classes(tmp_path: Path) -> None:
    state = {name: tensor for name, tensor in STATE.items() if not name.startswith("head.")}
    model = load(saved(tmp_path / "w.pth", state))
    assert model.num_classes == 0
    assert torch.equal(model.module.state_dict()["cls_token"], STATE["cls_token"])


def test_model_keeps_no_copy_of_the_checkpoint(tmp_path: Path) -> None:
    model = load(saved(tmp_path / "w.pth", STATE))
    assert "state_dict" not in model.module.pretrained_cfg  # type: ignore[operator]


# What does not fit


def test_missing_key_is_named(tmp_path: Path) -> None:
    state = dict(STATE)
    del state["blocks.2.attn.qkv.weight"], state["norm.weight"]
    message = refusal(saved(tmp_path / "w.pth", state))
    assert "2 missing (blocks.2.attn.qkv.weight" in message
    assert "unexpected" not in message


def test_unexpected_key_is_named(tmp_path: Path) -> None:
    message = refusal(saved(tmp_path / "w.pth", {**STATE, "neck.weight": torch.ones(2)}))
    assert "1 unexpected (neck.weight)" in message
    assert "missing" not in message


def test_misshaped_key_is_named_with_both_shapes(tmp_path: Path) -> None:
    state = {**STATE, "blocks.0.mlp.fc1.weight": torch.ones(5, 64)}
    message = refusal(saved(tmp_path / "w.pth", state))
    assert "1 mis-shaped (blocks.0.mlp.fc1.weight is (5, 64), expected (192, 64))" in message


def test_all_kinds_of_mismatch_are_named_at_once(tmp_path: Path) -> None:
    state = {**STATE, "neck.weight": torch.ones(2), "cls_token": torch.ones(1, 1, 3)}
    del state["norm.bias"]
    message = refusal(saved(tmp_path / "w.pth", state))
    for part in ("missing (norm.bias)", "unexpected (neck.weight)", "mis-shaped (cls_token"):
        assert part in message


def test_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    message = refusal(save_tiny(tmp_path / "w.safetensors", name="test_vit2"))
    assert "-m" in message


def test_checkpoint_without_a_head_must_fit_in_all_else(tmp_path: Path) -> None:
    state = {name: tensor for name, tensor in STATE.items() if not name.startswith("head.")}
    del state["norm.bias"]
    assert "norm.bias" in refusal(saved(tmp_path / "w.pth", state))


def test_head_of_another_name_is_refused(tmp_path: Path) -> None:
    state = {name.replace("head.", "fc."): tensor for name, tensor in STATE.items()}
    assert "fc." in refusal(saved(tmp_path / "w.pth", state))


def test_weights_for_another_patch_size_are_refused(tmp_path: Path) -> None:
    # timm would resample them in silence: a model that nobody trained.
    state = tiny_state(patch_size=8, img_size=SIZE // 2)
    assert "patch_embed.proj.weight" in refusal(saved(tmp_path / "w.pth", state))


def test_position_embedding_of_another_size_is_not_changed_in_silence(tmp_path: Path) -> None:
    path = save_tiny(tmp_path / "w.safetensors", img_size=96)
    try:
        model = load_model(NAME, weights=path, device="cpu")  # 160, as its name says
    except WeightsError as error:
        assert "pos_embed" in str(error)
    else:
        assert any("position" in note or "pos_embed" in note for note in model.notes)


@pytest.mark.parametrize(
    "broken",
    [
        {"pos_embed": torch.ones(3)},
        {"pos_embed": torch.ones(1, 12, 64)},
        {"patch_embed.proj.weight": torch.ones(3)},
        {"patch_embed.proj.weight": torch.ones(64, 1, 16, 16)},
        {"head.weight": torch.tensor(1.0)},
        {"head.weight": torch.ones(0, 64)},
        {"encoder": torch.ones(1)},
    ],
    ids=str,
)
def test_odd_shapes_are_refused_in_one_line(tmp_path: Path, broken: dict[str, Tensor]) -> None:
    refusal(saved(tmp_path / "w.pth", {**STATE, **broken}))


# What is no checkpoint


class Payload:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.target}",)


@pytest.mark.parametrize("new_format", [True, False])
def test_pickled_code_never_runs(tmp_path: Path, new_format: bool) -> None:
    target = tmp_path / "touched"
    content = {"state_dict": STATE, "extra": Payload(target)}
    torch.save(content, tmp_path / "w.pth", _use_new_zipfile_serialization=new_format)
    assert "code" in refusal(tmp_path / "w.pth")
    assert not target.exists()


def test_bare_pickle_never_runs(tmp_path: Path) -> None:
    target = tmp_path / "touched"
    for name in ("w.pth", "w.pt", "w.safetensors", "w.pkl"):
        (tmp_path / name).write_bytes(pickle.dumps(Payload(target)))
        refusal(tmp_path / name)
    assert not target.exists()


def test_code_inside_a_namespace_never_runs(tmp_path: Path) -> None:
    target = tmp_path / "touched"
    arguments = argparse.Namespace(x=Payload(target))
    refusal(saved(tmp_path / "w.pth", {"state_dict": STATE, "args": arguments}))
    assert not target.exists()


def test_whole_pickled_model_is_refused(tmp_path: Path) -> None:
    message = refusal(saved(tmp_path / "w.pth", tiny_module()))
    assert "state_dict()" in message


def zip_bytes(path: Path) -> bytes:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a", "b")
    return path.read_bytes()


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize(
    "content",
    [b"", b"\0" * 100, b"hello there", b"{}", b"\xff" * 9, b"<html></html>", b"PK\x03\x04rest"],
    ids=str,
)
def test_garbage_is_refused(tmp_path: Path, content: bytes, suffix: str) -> None:
    (tmp_path / f"w{suffix}").write_bytes(content)
    refusal(tmp_path / f"w{suffix}")


def test_foreign_archive_is_refused(tmp_path: Path) -> None:
    zip_bytes(tmp_path / "w.pt")
    refusal(tmp_path / "w.pt")


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_truncated_checkpoint_is_refused(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"w{suffix}"
    if suffix == ".pth":
        torch.save(STATE, path)
    else:
        save_file(STATE, path)
    content = path.read_bytes()
    for share in (0.1, 0.5, 0.99):
        path.write_bytes(content[: int(share * len(content))])
        refusal(path)


@pytest.mark.parametrize(
    "content",
    [
        torch.ones(3),
        [torch.ones(3)],
        3,
        {},
        {"epoch": 3},
        {"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": []},
        {0: torch.ones(3)},
        {("a", 1): torch.ones(3)},
        {"state_dict": {}},
        {"state_dict": {0: torch.ones(3)}},
    ],
    ids=str,
)
def test_file_without_a_state_dict_is_refused(tmp_path: Path, content: object) -> None:
    refusal(saved(tmp_path / "w.pth", content))


def test_missing_file_is_refused(tmp_path: Path) -> None:
    assert "not a file" in refusal(tmp_path / "gone.pth")
    assert "not a file" in refusal(tmp_path)


def test_checkpoint_is_read_without_a_model(tmp_path: Path) -> None:
    checkpoint = read_checkpoint(saved(tmp_path / "w.pth", {"model": prefixed("module.")}))
    assert list(checkpoint.tensors) == list(STATE)


def test_digest_depends_on_values_names_and_shapes() -> None:
    module = torch.nn.Linear(2, 3)
    before = digest_weights(module)
    assert digest_weights(module) == before
    with torch.no_grad():
        module.weight[0, 0] += 1
    assert digest_weights(module) != before


# The hub


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    return tmp_path / "cache"


@pytest.fixture
def mute() -> Iterator[str]:
    """Give the address of a server that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0), backlog=50) as listener:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


@pytest.mark.usefixtures("empty_cache")
@pytest.mark.parametrize("name", [NAME, "hf-hub:someone/tuned"])
def test_hub_out_of_reach_is_said_at_once(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    start = time.perf_counter()
    with pytest.raises(WeightsError) as caught:
        load_model(name, device="cpu")
    assert time.perf_counter() - start < 5
    message = str(caught.value)
    assert "\n" not in message
    assert "--weights" in message
    assert "127.0.0.1:9" in message


@pytest.mark.slow
@pytest.mark.usefixtures("empty_cache")
def test_hub_that_never_answers_is_given_up(monkeypatch: pytest.MonkeyPatch, mute: str) -> None:
    monkeypatch.setenv("HF_ENDPOINT", mute)
    start = time.perf_counter()
    with pytest.raises(WeightsError, match="--weights"):
        load_model(NAME, device="cpu")
    # Ten seconds are for the whole command, of which torch and timm take three or four.
    assert time.perf_counter() - start < 6


@pytest.mark.usefixtures("empty_cache")
@pytest.mark.parametrize("endpoint", ["http://no-such-host.invalid", "nonsense", ""])
def test_odd_endpoint_ends_in_one_line(monkeypatch: pytest.MonkeyPatch, endpoint: str) -> None:
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    with at_most(9), pytest.raises(WeightsError) as caught:
        load_model(NAME, device="cpu")
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("empty_cache")
def test_offline_mode_is_respected(monkeypatch: pytest.MonkeyPatch, mute: str) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_ENDPOINT", mute)
    start = time.perf_counter()
    with pytest.raises(WeightsError, match="HF_HUB_OFFLINE"):
        load_model(NAME, device="cpu")
    assert time.perf_counter() - start < 3


def test_own_weights_need_no_hub(
    tmp_path: Path, empty_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert load(save_tiny(tmp_path / "w.safetensors")).num_classes == 7
    assert not empty_cache.exists()


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("hub")
    whole = save_tiny(folder / "whole.safetensors", classes=1000, img_size=160)
    tuned = save_tiny(folder / "tuned.safetensors")
    script = Path(__file__).with_name("hub_session.py")
    done = run_process(str(script), str(whole), str(tuned), str(folder / "cache"))
    assert done.code == 0, done.err
    result: dict[str, Any] = json.loads(done.out)
    return {**result, "stderr": "\n".join(line for line in done.err.splitlines() if "down" in line)}


@pytest.mark.slow
def test_pretrained_weights_are_downloaded(story: dict[str, Any]) -> None:
    first = story["first"]
    assert first.get("digest") == digest_weights(tiny_module(classes=1000, img_size=160)), first
    assert first["name"] == "test_vit.r160_in1k"
    assert first["label"]
    assert first["notes"] == []
    assert first["asked"]


@pytest.mark.slow
def test_downloaded_weights_are_not_asked_for_again(story: dict[str, Any]) -> None:
    assert story["again"]["digest"] == story["first"]["digest"]
    assert story["again"]["asked"] == 0


@pytest.mark.slow
def test_downloaded_weights_work_without_the_hub(story: dict[str, Any]) -> None:
    assert story["offline"]["digest"] == story["first"]["digest"]
    assert story["offline tuned"].get("digest") == story["tuned"].get("digest") is not None


@pytest.mark.slow
def test_hub_model_brings_its_own_labels_and_scores(story: dict[str, Any]) -> None:
    tuned = story["tuned"]
    assert tuned.get("digest") == digest_weights(tiny_module()), tuned
    assert tuned["classes"] == 7
    assert tuned["label"] == "thing 3, stuff 3"
    assert tuned["score_kind"] == "sigmoid"


@pytest.mark.slow
@pytest.mark.parametrize("case", ["unknown", "invalid", "nameless", "broken", "offline new"])
def test_hub_that_does_not_deliver_ends_in_one_line(story: dict[str, Any], case: str) -> None:
    assert "error" in story[case], story[case]
    assert "\n" not in story[case]["error"]
    assert story[case]["seconds"] < 8


TROUBLES = {
    "busy": "answers 503, it is in trouble: try again later",
    "crowded": "answers 429, too many requests",
    "gated": "it is gated: ask for access.* log in with `hf auth login`",
    "unknown": "no such model: check the name, and if it is private, log in",
    "cut": "the connection broke off",
    "stalled": "the connection broke off",
    "proxied": "SOCKS.*unset the proxy",
}


@pytest.mark.slow
@pytest.mark.parametrize("case", TROUBLES)
def test_hub_in_trouble_is_told_in_one_line_with_the_way_out(
    story: dict[str, Any], case: str
) -> None:
    error = story[case].get("error", str(story[case]))
    assert re.search(TROUBLES[case], error), error
    assert "has none of" not in error
    assert "-m NAME --weights FILE" in error
    assert "\n" not in error


@pytest.mark.slow
def test_attempts_of_the_hubs_client_are_not_told_one_by_one(story: dict[str, Any]) -> None:
    assert story["stderr"] == ""


@pytest.mark.slow
def test_hub_that_falls_silent_is_given_up(story: dict[str, Any]) -> None:
    assert "error" in story["silent"], story["silent"]
    assert story["silent"]["seconds"] < 10


@pytest.mark.slow
def test_hub_model_without_weights_is_told_which_were_looked_for(story: dict[str, Any]) -> None:
    error = story["bare"].get("error", "")
    assert "someone/bare has none of model.safetensors, pytorch_model.bin" in error
    assert "--weights" in error


@pytest.mark.parametrize(
    ("asked", "cached"),
    [
        (None, "model.safetensors"),
        (None, "pytorch_model.bin"),
        ("pytorch_model.bin", "pytorch_model.safetensors"),
        ("pytorch_model.bin", "pytorch_model.bin"),
        ("open_clip_pytorch_model.bin", "open_clip_model.safetensors"),
        ("open_clip_pytorch_model.bin", "open_clip_pytorch_model.safetensors"),
        ("augreg.npz", "augreg.npz"),
    ],
)
def test_file_of_the_cache_is_found_under_the_names_that_timm_tries(
    empty_cache: Path, monkeypatch: pytest.MonkeyPatch, asked: str | None, cached: str
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    folder = empty_cache / "models--someone--tuned"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("a" * 40)
    snapshot = folder / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "beside.txt").touch()
    with pytest.raises(WeightsError, match="HF_HUB_OFFLINE"):
        fetch_from_hub("someone/tuned", asked)
    (snapshot / cached).touch()
    assert fetch_from_hub("someone/tuned", asked) == snapshot / cached
