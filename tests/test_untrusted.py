"""Checkpoints, configs and labels from anybody: one clear line, no code, nothing obeyed."""

from __future__ import annotations

import json
import os
import pickle
import random
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from fixtures_io import (
    CLASSES,
    NAME,
    SIZE,
    Shell,
    at_most,
    save_pictures,
    tiny_module,
    tiny_state,
)
from fixtures_processes import Nursery
from vitviz.errors import VitvizError, WeightsError
from vitviz.models.checkpoints import read_checkpoint
from vitviz.models.labels import Labels
from vitviz.models.model import load_model

pytestmark = pytest.mark.usefixtures("one_thread")

STATE = tiny_state(seed=1)
HEAD = STATE["head.weight"]


class Payload:
    """Leaves a mark when it is unpickled by anything that runs code."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.mark}",)


@pytest.fixture
def shell(shell: Shell, tmp_path: Path) -> Shell:
    save_pictures(tmp_path, ["a.png"])
    return shell


def refusal(shell: Shell, *words: str) -> str:
    """Run, expect exit code 2 and one line on stderr, and return that."""
    done = shell("grad-rollout", "a.png", *words)
    assert done.code == 2, done.err
    assert done.out == b""
    (line,) = done.complaints
    assert line.startswith("Error: ")
    assert line.isprintable()
    assert not list(Path("vitviz-out").rglob("*.png"))
    return line


def refused_weights(shell: Shell, path: Path) -> str:
    line = refusal(shell, "-m", NAME, "--img-size", str(SIZE), "--weights", str(path))
    assert path.name in line
    return line


def saved(content: object, path: str = "w.pth") -> Path:
    torch.save(content, path)
    return Path(path)


# Checkpoints


def nested(depth: int) -> dict[str, Any]:
    content: dict[str, Any] = dict(STATE)
    for _ in range(depth):
        content = {"state_dict": content}
    return content


def holding_itself() -> dict[str, Any]:
    content: dict[str, Any] = {}
    content["model"] = content
    return content


ODD_CONTENTS: dict[str, tuple[Callable[[], object], str]] = {
    "list": (lambda: [1, "a"], "holds a list"),
    "string": (lambda: "weights", "holds a str"),
    "strings for tensors": (lambda: dict.fromkeys(STATE, "0.5"), "no tensors"),
    "lists for tensors": (lambda: {name: [0.5] for name in STATE}, "no tensors"),
    "nested too deep": (lambda: nested(50), "no tensors"),
    "itself": (holding_itself, "no tensors"),
    "complex": (lambda: {**STATE, "head.weight": HEAD.to(torch.complex64)}, "complex64"),
    "sparse": (lambda: {**STATE, "head.weight": HEAD.to_sparse()}, "sparse"),
    "without data": (lambda: {**STATE, "head.weight": HEAD.to("meta")}, "without data"),
    "head without width": (lambda: {**STATE, "head.weight": torch.ones(10**9, 0)}, "head"),
    "shape beyond data": (
        lambda: {**STATE, "head.weight": torch.ones(1, 1).expand(10**9, 64)},
        "would fill 256,0",
    ),
    "position beyond data": (
        lambda: {**STATE, "pos_embed": torch.ones(1, 1, 1).expand(1, 10**8 + 1, 64)},
        "would fill 25,6",
    ),
    "not a number": (
        lambda: {**STATE, "blocks.2.attn.qkv.weight": STATE["blocks.2.attn.qkv.weight"] / 0 * 0},
        "blocks.2.attn.qkv.weight has NaN",
    ),
    "infinite": (lambda: {**STATE, "head.bias": STATE["head.bias"] * float("inf")}, "head.bias"),
    "other shape": (lambda: {**STATE, "norm.weight": torch.ones(3)}, "norm.weight is (3,)"),
    "escape in a name": (lambda: {**STATE, "\x1b[2J\n[red]x": torch.ones(1)}, r"\x1b[2J\n[red]x"),
}


@pytest.mark.parametrize("name", ODD_CONTENTS)
def test_odd_content_ends_in_one_line(shell: Shell, name: str) -> None:
    content, says = ODD_CONTENTS[name]
    with at_most(60):
        assert says in refused_weights(shell, saved(content()))


@pytest.mark.parametrize("new_format", [True, False])
def test_pickled_code_is_refused_by_the_command_and_does_not_run(
    shell: Shell, new_format: bool
) -> None:
    mark = Path.cwd() / "mark"
    content = {"state_dict": STATE, "optimizer": [Payload(mark)]}
    torch.save(content, "w.pth", _use_new_zipfile_serialization=new_format)
    assert "can run code" in refused_weights(shell, Path("w.pth"))
    assert not mark.exists()


def test_reader_of_damaged_checkpoints_raises_nothing_else(tmp_path: Path) -> None:
    saved(STATE, str(tmp_path / "new.pth"))
    torch.save(STATE, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    save_file(STATE, tmp_path / "w.safetensors")
    rng = random.Random(0)
    for path in list(tmp_path.iterdir()):
        whole = path.read_bytes()
        # Where the structure is: at the start, and of an archive at the end, too.
        places = [*range(4000), *range(len(whole) - 4000, len(whole))]
        for _ in range(80):
            damaged = bytearray(whole)
            for place in rng.sample(places, rng.choice([1, 4, 20])):
                damaged[place] ^= 1 << rng.randrange(8)
            path.write_bytes(damaged)
            try:
                read_checkpoint(path)
            except WeightsError as error:
                assert "\n" not in str(error)


def rezipped(path: Path) -> Path:
    """Compress the members of a torch checkpoint."""
    packed = path.with_name("packed.pth")
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    return packed


@pytest.mark.slow
def test_zip_bomb_is_refused_before_it_is_unpacked(
    shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    bomb = rezipped(saved({**STATE, "more": torch.zeros(1 << 25)}))
    assert bomb.stat().st_size < 3e6

    def unpack(*_: object, **__: object) -> None:
        raise AssertionError("is unpacked")

    monkeypatch.setattr(torch, "load", unpack)
    assert "would fill 135," in refused_weights(shell, bomb)


def test_checkpoint_that_somebody_has_compressed_is_read(shell: Shell) -> None:
    packed = rezipped(saved(STATE))
    done = shell("rollout", "a.png", "-m", NAME, "--img-size", str(SIZE), "--weights", str(packed))
    assert done.code == 0


def lying(header: dict[str, Any] | bytes, length: int | None = None, data: int = 64) -> bytes:
    """Write a safetensors file with any header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + bytes(data)


def entry(shape: list[int], start: int, stop: int, dtype: str = "F32") -> dict[str, Any]:
    return {"head.weight": {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}}


LIES = {
    "length beyond the file": lying({}, length=1 << 62),
    "offsets beyond the file": lying(entry([1 << 40], 0, 4 << 40)),
    "shape beyond its offsets": lying(entry([1 << 40], 0, 64)),
    "shape that overflows": lying(entry([1 << 33, 1 << 33, 1 << 33], 0, 64)),
    "shape below zero": lying(entry([-4, -4], 0, 64)),
    "offsets backwards": lying(entry([16], 64, 0)),
    "unknown numbers": lying(entry([16], 0, 64, "F31")),
    "numbers that torch lacks": lying(entry([64], 0, 64, "F8_E8M0")),
    "no header": lying(b""),
    "deep header": lying(b"[" * 100_000),
    "list for a header": lying(b"[]"),
    "data that nothing names": lying(entry([4], 0, 16)),
    "no data": lying(entry([16], 0, 64), data=0),
}


@pytest.mark.parametrize("lie", LIES)
def test_lying_safetensors_header_ends_in_one_line(shell: Shell, lie: str) -> None:
    Path("w.safetensors").write_bytes(LIES[lie])
    refused_weights(shell, Path("w.safetensors"))


# Model folders

CONFIG: dict[str, Any] = {
    "architecture": NAME,
    "num_classes": CLASSES,
    "model_args": {"img_size": SIZE},
    "pretrained_cfg": {"input_size": [3, SIZE, SIZE], "classifier": "head"},
}


def model_folder(config: dict[str, Any] | str | None = None, **changes: Any) -> Path:
    """Make a folder with a model, as on the hub."""
    folder = Path("model")
    folder.mkdir()
    text = config if isinstance(config, str) else json.dumps({**CONFIG, **changes})
    (folder / "config.json").write_text(text, encoding="utf-8")
    save_file(STATE, folder / "model.safetensors")
    return folder


def preprocessing(**changes: Any) -> dict[str, Any]:
    return {"pretrained_cfg": {**CONFIG["pretrained_cfg"], **changes}}


CONFIGS: dict[str, str | dict[str, Any]] = {
    "no JSON": "{nope",
    "deep JSON": "[" * 100_000,
    "list": "[1]",
    "no architecture": "{}",
    "unknown architecture": {"architecture": "no\x1b[2J[red]"},
    "number for an architecture": {"architecture": 3},
    "word for a number": {"num_classes": "many"},
    "unknown argument": {"model_args": {"nonsense": 1}},
    "word for an argument": {"model_args": {"depth": "x"}},
    "giant": {"model_args": {"embed_dim": 10**9}},
    "giant image": {"model_args": {"img_size": 10**6}},
    "no preprocessing": {"pretrained_cfg": [1]},
    "word for a mean": preprocessing(mean="x"),
    "mean of two channels": preprocessing(mean=[0.5, 0.5]),
    "division by zero": preprocessing(std=[0, 0, 0]),
    "not a number": preprocessing(std=[float("nan")] * 3),
    "unknown filter": preprocessing(interpolation="[red]\x1b[2J"),
    "word for a share": preprocessing(crop_pct="all"),
    "negative share": preprocessing(crop_pct=-1),
    "number for a classifier": preprocessing(classifier=3),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_odd_config_ends_in_one_line(shell: Shell, name: str) -> None:
    config = CONFIGS[name]
    folder = model_folder(config) if isinstance(config, str) else model_folder(**config)
    with at_most(60):
        refusal(shell, "-m", str(folder))


@pytest.mark.parametrize("labels", [7, {"a": 1}, [["a"]] * CLASSES, [None] * CLASSES], ids=str)
def test_odd_labels_of_a_config_do_no_harm(shell: Shell, labels: object) -> None:
    folder = model_folder(label_names=labels, label_descriptions=["x"])
    done = shell("grad-rollout", "a.png", "-m", str(folder), "--json")
    assert done.code == 0, done.err


@pytest.mark.parametrize("file", ["pytorch_model.bin", "model.pth"])
def test_code_pickled_in_a_model_folder_does_not_run(shell: Shell, file: str) -> None:
    folder, mark = model_folder(), Path.cwd() / "mark"
    (folder / "model.safetensors").unlink()
    saved({**STATE, "x": Payload(mark)}, str(folder / file))
    assert "can run code" in refusal(shell, "-m", str(folder))
    (folder / file).write_bytes(pickle.dumps(Payload(mark)))
    refusal(shell, "-m", str(folder))
    assert not mark.exists()


def test_damaged_weights_of_a_model_folder_end_in_one_line(shell: Shell) -> None:
    file = model_folder() / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-99])
    assert "model.safetensors" in refusal(shell, "-m", "model")
    file.unlink()
    assert "has no weights" in refusal(shell, "-m", "model")
    save_file({**STATE, "head.bias": torch.full((CLASSES,), float("nan"))}, file)
    assert "head.bias has NaN" in refusal(shell, "-m", "model")


# Texts that a terminal would obey

ATTACKS = ("\x1b[2J", "\x1b]0;title\x07", "\x9b31m", "\x07", "\r", "\u202e")
NASTY = ["[red]" + "".join(ATTACKS) + "[/blink]\nend", "half \ud800", "b", "c", "d", "e", "f"]


def nasty_labels() -> Path:
    path = Path("labels\x1b[2J[red].json")
    path.write_text(json.dumps(NASTY), encoding="utf-8")
    return path


@pytest.mark.slow
def test_nasty_texts_are_shown_and_not_obeyed_in_a_pipe(shell: Shell) -> None:
    labels, folder = nasty_labels(), model_folder(label_names=NASTY, architecture=NAME)
    words = ["grad-rollout", "a.png", "-m", str(folder), "--save", "panel", "--class", "0"]
    for more in ([], ["--json"], ["--labels", str(labels)], ["--labels", str(labels), "--json"]):
        done = shell(*words, *more, "-o", f"out{len(more)}{'--json' in more}")
        assert done.code == 0, done.err
        for attack in ATTACKS[:4]:
            assert attack.encode() not in done.out
            assert attack not in done.err
        if "--json" in more:
            (record,) = done.records
            assert record["outputs"][0]["class_label"] == NASTY[0]
    assert "[red]" in refusal(shell, *words[2:-1], "[red]\x1b[2J[/blink]")
    labels.write_text("one label")
    assert "[red]" in refusal(shell, "-m", str(folder), "--labels", str(labels))


@pytest.mark.usefixtures("shell")
def test_nasty_texts_are_shown_and_not_obeyed_on_a_terminal(nursery: Nursery) -> None:
    Path("p").mkdir()
    Path("p/\x1b[2J\x1b]0;title\x07[red].png").write_bytes(b"no image")
    save_pictures(Path(), ["p/\x9b31m[blue]\r.png"])
    folder = model_folder(label_names=NASTY)
    words = ["grad-rollout", "p", "-m", str(folder), "--class", "0"]
    done = nursery.on_a_terminal(*words, cwd=Path.cwd(), columns=200)
    assert done.code == 1, done.text
    for attack in ("\x1b[2J", "\x1b]", "\x07", "\x9b"):
        assert attack not in done.text
    assert r"\x1b[2J\x1b]0;title\x07[red].png" in done.text
    assert r"\x9b31m[blue]\r.png" in done.text
    words = ["grad-rollout", "a.png", "-m", str(folder), "--class", "[red]\x1b[2J[/]"]
    done = nursery.on_a_terminal(*words, cwd=Path.cwd(), columns=200)
    assert done.code == 2
    assert "\x1b[2J" not in done.text
    assert "[red]" in done.text


@pytest.mark.parametrize("words", [[], ["--json"], ["--full"]], ids=str)
def test_nasty_config_is_shown_and_not_obeyed_by_inspect(shell: Shell, words: list[str]) -> None:
    folder = model_folder(label_names=NASTY).rename("model\x1b[2J[red]")
    done = shell("inspect", str(folder), *words)
    assert done.code == 0, done.err
    assert b"\x1b" not in done.out
    assert "\x1b" not in done.err
    if not words:
        assert b"[red]" in done.out


def test_labels_may_name_half_characters() -> None:
    labels = Labels(names=tuple(NASTY), source="here")
    assert len(labels.digest) == 16
    assert Labels(names=("a", "\ud800")).digest != Labels(names=("a", "\ud801")).digest


def test_infinite_buffers_are_no_reason_to_refuse() -> None:
    module = tiny_module()
    module.register_buffer("bound", torch.tensor(float("inf")))
    assert load_model(module, device="cpu")
    with torch.no_grad():
        module.norm.weight[0] = float("nan")  # type: ignore[union-attr, index, operator]
    with pytest.raises(VitvizError, match=r"norm\.weight has NaN"):
        load_model(module, device="cpu")
