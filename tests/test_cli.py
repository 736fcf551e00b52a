"""The command line: streams, records, exit codes, errors."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

import vitviz
from fixtures_io import (
    LABELS,
    NAME,
    ROOT,
    Run,
    Shell,
    picture,
    run_process,
    save_pictures,
    save_tiny,
    tiny_state,
)
from fixtures_processes import Nursery
from vitviz.explaining import samples as explaining
from vitviz.models import model as models
from vitviz.models.devices import describe_device
from vitviz.options import OutputKind
from vitviz.runs.provenance import Provenance, read_provenance

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="session")
def kept(kept: Path) -> Path:
    """Keep other checkpoints beside that of the tiny model."""
    save_tiny(kept / "other.safetensors", seed=5)
    save_tiny(kept / "headless.safetensors", classes=0)
    save_tiny(kept / "thousand.safetensors", classes=1000)
    return kept


def files() -> dict[str, bytes]:
    return {
        str(path): path.read_bytes()
        for path in sorted(Path("vitviz-out").rglob("*"))
        if path.is_file()
    }


# Streams and exit codes


def test_stdout_carries_one_path_a_line_and_nothing_else(shell: Shell, tiny: list[str]) -> None:
    save_pictures(Path("p"), ["a.png", "q/b.png"])
    done = shell("rollout", "p", *tiny)
    assert done.code == 0
    assert done.paths == ["vitviz-out/p/a.png.rollout.png", "vitviz-out/p/q/b.png.rollout.png"]
    assert set(files()) == set(done.paths)
    assert done.err.splitlines()[0].startswith("Using ")
    assert "2 written" in done.err.splitlines()[-1]
    assert "images/s" in done.err.splitlines()[-1]


def test_every_kind_has_its_line(shell: Shell, tiny: list[str]) -> None:
    save_pictures(Path(), ["a.png"])
    kinds = [word for kind in ("npy", "panel", "heatmap", "overlay") for word in ("--save", kind)]
    done = shell("grad-rollout", "a.png", "--class", "tabby", *kinds, "--save", "npy", *tiny)
    assert done.code == 0
    assert sorted(done.paths) == sorted(
        f"vitviz-out/a.png.grad-rollout.c3{end}"
        for end in (".png", ".heatmap.png", ".panel.png", ".npy")
    )


def test_record_has_exactly_the_contracts_keys(shell: Shell, tiny: list[str], kept: Path) -> None:
    save_pictures(Path("p"), ["a.png"])
    done = shell("grad-rollout", "p/a.png", "--class", "tabby", "--json", *tiny)
    (record,) = done.records
    assert list(record) == [
        *("source", "status", "outputs", "predictions", "score_kind", "run", "error")
    ]
    assert record["source"] == "p/a.png"
    assert record["status"] == "written"
    assert record["error"] is None
    (output,) = record["outputs"]
    assert set(output.pop("sanity")) == {
        *("prefix_attention", "outlier_tokens", "contrast", "leverage", "outlier_share")
    }
    assert output == {
        "kind": "overlay",
        "path": "vitviz-out/p/a.png.grad-rollout.c3.png",
        "class_index": 3,
        "class_label": "tabby, tabby cat",
    }
    assert len(record["predictions"]) == 5
    for prediction in record["predictions"]:
        assert set(prediction) == {"class_index", "class_label", "score"}
        assert prediction["class_label"] == LABELS[prediction["class_index"]]
    scores = [prediction["score"] for prediction in record["predictions"]]
    assert scores == sorted(scores, reverse=True)
    assert 0 < sum(scores) <= 1 + 1e-6
    assert record["score_kind"] == "softmax"
    assert list(record["run"]) == ["versions", "model", "weights", "method", "options"]
    assert record["run"]["versions"] == {
        "vitviz": vitviz.__version__,
        "timm": timm.__version__,
        "torch": torch.__version__,
    }
    assert record["run"]["model"].startswith(NAME)
    assert str(kept / "tiny.safetensors") in json.dumps(record["run"]["weights"])
    assert record["run"]["method"] == "grad-rollout"
    assert record["run"]["options"]["discard"] == 0.9
    assert record["run"]["options"]["fit"] == "squash"


def test_rollouts_record_has_no_class(shell: Shell, tiny: list[str]) -> None:
    save_pictures(Path(), ["a.png"])
    (record,) = shell("rollout", "a.png", "--json", "--head-fusion", "min", *tiny).records
    assert record["outputs"][0]["class_index"] is None
    assert record["outputs"][0]["class_label"] is None
    assert record["run"]["options"]["head_fusion"] == "min"


def test_bad_image_stops_nothing(shell: Shell, tiny: list[str]) -> None:
    save_pictures(Path("p"), ["a.png", "c.png"])
    Path("p/b.png").write_bytes(b"no image")
    done = shell("rollout", "p", "gone.jpg", *tiny)
    assert done.code == 1
    assert done.paths == ["vitviz-out/p/a.png.rollout.png", "vitviz-out/p/c.png.rollout.png"]
    failures = [line for line in done.complaints if "failed: " in line]
    assert len(failures) == 2
    assert "p/b.png" in failures[0]
    assert "gone.jpg" in failures[1]
    assert "2 written, 0 skipped, 2 failed" in done.err


def test_failed_image_has_its_record(shell: Shell, tiny: list[str]) -> None:
    Path("b.png").touch()
    done = shell("rollout", "b.png", "--json", *tiny)
    (record,) = done.records
    assert done.code == 1
    assert (record["status"], record["outputs"], record["predictions"]) == ("failed", [], [])
    assert "empty" in record["error"]


def test_every_written_path_is_told_though_a_later_one_fails(shell: Shell, tiny: list[str]) -> None:
    save_pictures(Path(), ["a.png"])
    foreign = Path("vitviz-out/a.png.rollout.heatmap.png")
    foreign.parent.mkdir()
    foreign.write_bytes(b"mine")
    done = shell("rollout", "a.png", "--save", "overlay", "--save", "heatmap", *tiny)
    assert done.code == 1
    assert foreign.read_bytes() == b"mine"
    written = sorted(set(files()) - {str(foreign)})
    assert done.paths == written


def test_quiet_says_failures_only(shell: Shell, tiny: list[str]) -> None:
    save_pictures(Path("p"), ["a.png"])
    done = shell("rollout", "p", "--quiet", *tiny)
    assert (done.code, done.err) == (0, "")
    assert done.paths
    Path("p/b.png").touch()
    done = shell("rollout", "p", "-q", *tiny)
    assert done.code == 1
    assert len(done.err.splitlines()) == 1
    assert "p/b.png" in done.err


def test_one_class_asked_for_in_three_ways_gives_one_map(shell: Shell, tiny: list[str]) -> None:
    save_pictures(Path(), ["a.png"])
    wanted = ["--class", "tabby", "--class", "3", "--class", "Tabby, tabby cat"]
    done = shell("grad-rollout", "a.png", *wanted, *tiny)
    assert done.paths == ["vitviz-out/a.png.grad-rollout.c3.png"]


def test_top_classes_have_a_map_each(shell: Shell, tiny: list[str]) -> None:
    save_pictures(Path(), ["a.png"])
    done = shell("grad-rollout", "a.png", "--class", "top2", "--json", *tiny)
    (record,) = done.records
    assert [Path(o["path"]).name for o in record["outputs"]] == [
        f"a.png.grad-rollout.top{rank}.png" for rank in (1, 2)
    ]
    assert [o["class_index"] for o in record["outputs"]] == [
        p["class_index"] for p in record["predictions"][:2]
    ]


def test_top1_is_the_default_class(shell: Shell, tiny: list[str]) -> None:
    save_pictures(Path(), ["a.png"])
    done = shell("grad-rollout", "a.png", *tiny)
    assert done.paths == ["vitviz-out/a.png.grad-rollout.top1.png"]


def test_assumed_labels_are_said(shell: Shell, kept: Path) -> None:
    save_pictures(Path(), ["a.png"])
    weights = str(kept / "thousand.safetensors")
    done = shell("rollout", "a.png", "-m", NAME, "--img-size", "64", "--weights", weights, "--json")
    assert "labels" in done.err
    assert done.records[0]["predictions"][0]["class_label"]


def test_headless_model_gives_rollouts_without_predictions(shell: Shell, kept: Path) -> None:
    save_pictures(Path(), ["a.png"])
    model = ["-m", NAME, "--img-size", "64", "--weights", str(kept / "headless.safetensors")]
    done = shell("rollout", "a.png", "--json", *model)
    assert done.code == 0
    assert done.records[0]["predictions"] == []
    refused = shell("grad-rollout", "a.png", *model)
    assert refused.code == 2
    assert "head" in one_line(refused)


def test_averaged_weights_are_said(shell: Shell, tiny: list[str], tmp_path: Path) -> None:
    save_pictures(Path(), ["a.png"])
    state = tiny_state()
    torch.save({"state_dict": state, "state_dict_ema": state}, tmp_path / "w.pth")
    done = shell("rollout", "a.png", *tiny, "--weights", "w.pth")
    assert done.code == 0
    assert "EMA" in done.err


# Paths from stdin

ODD = [
    b"new\nline.png",
    b"caf\xe9.png",
    b"-dash.png",
    "\U0001f408.png".encode(),
    b"[red]markup[bold].png",
    b"esc\x1b[31mape.png",
    b" spaces .png",
    b'tab\tquote".png',
]


def test_odd_names_travel_byte_for_byte(shell: Shell, tiny: list[str]) -> None:
    for seed, name in enumerate(ODD):
        picture(20, 30, seed).save(os.fsdecode(name), "PNG")
    done = shell("rollout", "-", "-0", *tiny, stdin=b"\0".join(ODD))
    assert done.code == 0
    assert done.out.split(b"\0") == [b"vitviz-out/" + name + b".rollout.png" for name in ODD] + [
        b""
    ]
    for path in done.out.split(b"\0")[:-1]:
        assert Path(os.fsdecode(path)).is_file()


def test_odd_names_in_records(shell: Shell, tiny: list[str]) -> None:
    for seed, name in enumerate(ODD):
        picture(20, 30, seed).save(os.fsdecode(name), "PNG")
    done = shell("rollout", "-", "-0", "--json", *tiny, stdin=b"\0".join([*ODD, b""]))
    assert len(done.out.splitlines()) == len(ODD)
    assert [os.fsencode(record["source"]) for record in done.records] == ODD
    for record in done.records:
        assert Path(record["outputs"][0]["path"]).is_file()


def test_newline_separated_paths(shell: Shell, tiny: list[str]) -> None:
    save_pictures(Path(), ["a.png", "b b.png"])
    done = shell("rollout", "-", *tiny, stdin=b"a.png\n\nb b.png")
    assert done.paths == ["vitviz-out/a.png.rollout.png", "vitviz-out/b b.png.rollout.png"]


def test_stdin_mixes_with_arguments(shell: Shell, tiny: list[str]) -> None:
    save_pictures(Path(), ["a.png", "b.png", "p/c.png"])
    done = shell("rollout", "b.png", "-", "p", *tiny, stdin=b"a.png\nb.png\n")
    assert done.paths == [f"vitviz-out/{n}.rollout.png" for n in ("b.png", "a.png", "p/c.png")]


@pytest.mark.parametrize("name", [b"[red]x[bold].png", b"e\x1b[2Jsc.png", b"a\nb.png", b"\xff.png"])
def test_names_are_shown_and_not_obeyed(shell: Shell, tiny: list[str], name: bytes) -> None:
    Path(os.fsdecode(name)).write_bytes(b"no image")
    done = shell("rollout", "-", "-0", *tiny, stdin=name)
    assert done.code == 1
    (line,) = [line for line in done.err.splitlines() if "failed:" in line]
    assert "\x1b" not in done.err
    for part in (b"[red]x[bold]", b"2Jsc", b"b.png"):
        if part in name:
            assert part.decode() in line


def test_paths_separated_by_the_wrong_character_end_in_a_message(
    shell: Shell, tiny: list[str]
) -> None:
    # find -print0 | vitviz rollout -, without -0
    save_pictures(Path(), ["a.png", "b.png"])
    done = shell("rollout", "-", *tiny, stdin=b"a.png\0b.png\0")
    assert done.code in (1, 2)
    long = b"\0".join(b"photos/%06d.png" % index for index in range(400))
    assert shell("rollout", "-", *tiny, stdin=long).code in (1, 2)


def test_paths_on_stdin_are_no_patterns(shell: Shell, tiny: list[str]) -> None:
    save_pictures(Path(), ["a.png", "b.png"])
    done = shell("rollout", "-", *tiny, stdin=b"*.png\n")
    assert (done.code, done.out) == (1, b"")


def test_empty_stdin_is_nothing_to_do(shell: Shell) -> None:
    done = shell("rollout", "-", stdin=b"")
    assert done.code == 2
    assert "stdin" in one_line(done)


# Again


def test_rerun_gives_the_same_bytes(shell: Shell, tiny: list[str]) -> None:
    save_pictures(Path("p"), ["a.png", "b.png"])
    command = ["grad-rollout", "p", "--save", "overlay", "--save", "npy", "--save", "panel", *tiny]
    assert shell(*command).code == 0
    before = files()
    assert len(before) == 6
    assert shell(*command).code == 0
    assert files() == before


@pytest.mark.slow
@pytest.mark.parametrize("command", ["rollout", "grad-rollout"])
@pytest.mark.parametrize("option", ["--batch-size", "--workers"])
def test_batches_and_threads_do_not_change_maps(
    shell: Shell, tiny: list[str], command: str, option: str
) -> None:
    save_pictures(Path("p"), [f"{index}.png" for index in range(5)])
    save = ["--save", "npy", "--save", "overlay"]
    assert shell(command, "p", "-o", "one", option, "1", *save, *tiny).code == 0
    assert shell(command, "p", "-o", "more", option, "3", *save, *tiny).code == 0
    for path in Path("one").rglob("*.npy"):
        one, more = np.load(path), np.load("more" / path.relative_to("one"))
        assert np.abs(one - more).max() <= 1e-5 * np.ptp(one)
    for path in Path("one").rglob("*.png"):
        with Image.open(path) as one_image, Image.open("more" / path.relative_to("one")) as other:
            difference = np.asarray(one_image).astype(int) - np.asarray(other)
        # Within 1/255 of relevance: one step of the colour table.
        assert np.abs(difference).max() <= 8


def skipping(shell: Shell, *arguments: str) -> str:
    done = shell(*arguments, "--skip-existing", "--json")
    assert done.code == 0, done.err
    return str(done.records[0]["status"])


def test_finished_images_are_skipped(shell: Shell, tiny: list[str]) -> None:
    save_pictures(Path(), ["a.png"])
    command = ["grad-rollout", "a.png", "--class", "top2", "--save", "overlay", "--save", "npy"]
    first = shell(*command, "--json", *tiny).records[0]
    before = files()
    done = shell(*command, "--json", "--skip-existing", *tiny)
    (record,) = done.records
    assert (done.code, record["status"]) == (0, "skipped")
    assert record["outputs"] == first["outputs"]
    assert record["predictions"] == first["predictions"]
    assert files() == before
    assert shell(*command, "--skip-existing", *tiny).out == b""
    assert skipping(shell, *command, *tiny, "--batch-size", "1", "--workers", "1") == "skipped"


CHANGES = [
    ["--discard", "0.5"],
    ["--start-layer", "1"],
    ["--head-fusion", "mean"],
    ["--fit", "crop"],
    ["--fit", "native"],
    ["--colormap", "jet"],
    ["--alpha", "0.4"],
    ["--max-size", "20"],
    ["--img-size", "32"],
    ["--weights", "other.safetensors"],
    ["--save", "heatmap"],
    ["-o", "elsewhere"],
]


@pytest.mark.slow
def test_changed_option_is_not_skipped(shell: Shell, tiny: list[str], kept: Path) -> None:
    save_pictures(Path(), ["a.png"])
    shutil.copy(kept / "other.safetensors", "other.safetensors")
    assert skipping(shell, "rollout", "a.png", *tiny) == "written"
    assert skipping(shell, "rollout", "a.png", *tiny) == "skipped"
    before = files()
    for change in CHANGES:
        # Each is made on a copy of the unchanged run.
        shutil.rmtree("vitviz-out")
        for path, content in before.items():
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            Path(path).write_bytes(content)
        assert skipping(shell, "rollout", "a.png", *tiny, *change) == "written", change


def test_changed_bytes_are_not_skipped(shell: Shell, tiny: list[str]) -> None:
    save_pictures(Path(), ["a.png"])
    assert skipping(shell, "rollout", "a.png", *tiny) == "written"
    picture(48, 64, seed=9).save("a.png")
    assert skipping(shell, "rollout", "a.png", *tiny) == "written"
    assert skipping(shell, "rollout", "a.png", *tiny) == "skipped"


def test_changed_labels_are_not_skipped(shell: Shell, tiny: list[str]) -> None:
    # The label stands in the panel's caption, and in the record.
    save_pictures(Path(), ["a.png"])
    Path("names").write_text("\n".join(f"name {index}" for index in range(7)))
    command = ["grad-rollout", "a.png", "--class", "3", "--save", "panel", *tiny]
    assert skipping(shell, *command) == "written"
    assert skipping(shell, *command, "--labels", "names") == "written"


def test_changed_class_is_not_skipped(shell: Shell, tiny: list[str]) -> None:
    save_pictures(Path(), ["a.png"])
    assert skipping(shell, "grad-rollout", "a.png", "--class", "3", *tiny) == "written"
    assert skipping(shell, "grad-rollout", "a.png", "--class", "tabby", *tiny) == "skipped"
    assert skipping(shell, "grad-rollout", "a.png", "--class", "4", *tiny) == "written"
    assert skipping(shell, "rollout", "a.png", *tiny) == "written"


def test_half_finished_image_is_not_skipped(shell: Shell, tiny: list[str]) -> None:
    save_pictures(Path(), ["a.png"])
    command = ["rollout", "a.png", "--save", "overlay", "--save", "npy", *tiny]
    assert skipping(shell, *command) == "written"
    Path("vitviz-out/a.png.rollout.npy").unlink()
    assert skipping(shell, *command) == "written"


def test_damaged_output_is_not_skipped_and_stays(shell: Shell, tiny: list[str]) -> None:
    save_pictures(Path(), ["a.png"])
    assert skipping(shell, "rollout", "a.png", *tiny) == "written"
    Path("vitviz-out/a.png.rollout.png").write_bytes(b"something else")
    done = shell("rollout", "a.png", "--skip-existing", *tiny)
    assert done.code == 1
    assert "already exists" in done.err
    assert Path("vitviz-out/a.png.rollout.png").read_bytes() == b"something else"


def test_truncated_output_is_not_taken_for_finished(shell: Shell, tiny: list[str]) -> None:
    # Its provenance is whole, its picture is not: a copy that was cut off.
    save_pictures(Path(), ["a.png"])
    assert skipping(shell, "rollout", "a.png", *tiny) == "written"
    path = Path("vitviz-out/a.png.rollout.png")
    content = path.read_bytes()
    path.write_bytes(content[: len(content) * 3 // 4])
    assert skipping(shell, "rollout", "a.png", *tiny) == "written"


def test_map_of_another_source_is_not_replaced(shell: Shell, tiny: list[str]) -> None:
    save_pictures(Path(), ["one/a.png", "two/b.png"])
    Path("two/b.png").rename("two/a.png")
    os.chdir("one")
    assert shell("rollout", "a.png", "-o", "../out", *tiny).code == 0
    os.chdir("../two")
    before = Path("../out/a.png.rollout.png").read_bytes()
    done = shell("rollout", "a.png", "-o", "../out", *tiny)
    assert done.code == 1
    assert "already exists" in done.err
    assert Path("../out/a.png.rollout.png").read_bytes() == before


def test_images_are_found_below_an_output_folder_that_holds_them(
    shell: Shell, tiny: list[str]
) -> None:
    save_pictures(Path("p"), ["a.png", "q/b.png"])
    done = shell("rollout", "p", "-o", ".", *tiny)
    assert done.code == 0
    assert done.paths == ["p/a.png.rollout.png", "p/q/b.png.rollout.png"]


def test_writing_beside_the_images_can_be_repeated(shell: Shell, tiny: list[str]) -> None:
    save_pictures(Path(), ["a.png"])
    first = shell("rollout", ".", "-o", ".", *tiny)
    assert first.code == 0
    again = shell("rollout", ".", "-o", ".", *tiny)
    assert (again.code, again.paths) == (0, first.paths)


# What made a file


def command_of(record: dict[str, Any], provenance: Provenance) -> list[str]:
    """Rebuild from a record, and from what the file itself says, the command that made a file."""
    run, recipe = record["run"], provenance.recipe
    options = dict(run["options"])
    rows, cols = recipe["preprocessing"]["size"]
    precision = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}[options.pop("dtype")]
    assert [rows, cols] == options.pop("size")
    assert (options.pop("fit"), run["method"]) == (recipe["fit"], recipe["method"])
    assert recipe["kind"] in options.pop("save")
    assert recipe["weights_sha256"] == run["weights"]["sha256"]
    assert recipe["options"].items() <= options.items()
    options.pop("class")
    words = [recipe["method"], provenance.source, "--fit", recipe["fit"], "--save", recipe["kind"]]
    words += ["-m", recipe["model"], "--weights", run["weights"]["source"]]
    words += ["--img-size", f"{rows}x{cols}", "--precision", precision]
    for name, value in options.items():
        several = isinstance(value, list)
        words += [
            f"--{name.replace('_', '-')}",
            ",".join(map(str, value)) if several else str(value),
        ]
    if recipe["class"]:
        words += ["--class", recipe["class"].removeprefix("c")]
    return words


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        ["rollout"],
        ["rollout", "--head-fusion", "min", "--discard", "0.35", "--start-layer", "2"],
        ["rollout", "--fit", "native", "--img-size", "48x80", "--alpha", "0.3"],
        ["rollout", "--precision", "bf16", "--fit", "crop", "--colormap", "bone"],
        ["rollout", "--value-range", "5%:90%"],
        ["grad-rollout", "--class", "tabby", "--class", "top2", "--max-size", "40"],
    ],
    ids=" ".join,
)
def test_record_suffices_to_make_each_file_again(
    shell: Shell, tiny: list[str], words: list[str]
) -> None:
    save_pictures(Path(), ["p/a.png"], (50, 70))
    save = [word for kind in OutputKind for word in ("--save", kind.value)]
    done = shell(words[0], "p", *save, *tiny, *words[1:], "--json", "--batch-size", "1")
    assert done.code == 0, done.err
    for record in done.records:
        for output in record["outputs"]:
            path = Path(output["path"])
            provenance = read_provenance(path)
            assert provenance
            again = shell(*command_of(record, provenance), "-o", "again")
            assert again.code == 0, again.err
            remade = Path("again", *path.parts[1:])
            if "top" not in path.name:  # for the second best, the best is made too
                assert again.paths == [str(remade)]
            assert remade.read_bytes() == path.read_bytes(), path


@pytest.mark.slow
def test_one_changed_thing_is_made_again_and_no_other(
    shell: Shell, tiny: list[str], kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_pictures(Path(), ["a.png"])
    state = tiny_state()
    state["blocks.3.mlp.fc2.weight"][1, 2] += 2**-20
    save_file(state, "weight.safetensors")
    Path("labels.txt").write_text("\n".join([*LABELS[:-1], "Sky"]), encoding="utf-8")
    shutil.copy(kept / "tiny.safetensors", "copy.safetensors")
    command = ["grad-rollout", "a.png", "--class", "3", *tiny]
    assert skipping(shell, *command) == "written"
    for same in (
        ["--batch-size", "3"],
        ["--workers", "1"],
        ["--device", "cpu"],
        ["--quiet"],
        ["--weights", "copy.safetensors"],
        ["--precision", "fp32"],
        ["--fit", "squash"],
        ["--img-size", "64x64"],
    ):
        assert skipping(shell, *command, *same) == "skipped", same
    path = Path("vitviz-out/a.png.grad-rollout.c3.png")
    before = path.read_bytes()
    for change in (
        ["--weights", "weight.safetensors"],
        ["--labels", "labels.txt"],
        ["--colormap", "jet"],
        ["--precision", "fp16"],
        ["--precision", "bf16"],
        ["--discard", "0.91"],
    ):
        assert skipping(shell, *command, *change) == "written", change
        assert skipping(shell, *command, *change) == "skipped", change
        path.write_bytes(before)
    assert skipping(shell, *command) == "skipped"
    with monkeypatch.context() as patch:
        patch.setattr(vitviz, "__version__", "9.9")
        assert skipping(shell, *command) == "written"
    path.write_bytes(before)
    with Path("a.png").open("ab") as file:
        file.write(b"\0")  # behind the picture's end
    assert skipping(shell, *command) == "written"


# Sources stay as they are


@pytest.mark.slow
@pytest.mark.parametrize("folders", [("p", "p"), ("p", "p/maps"), ("p", "."), (".", ".")], ids=str)
def test_maps_among_the_sources_are_no_sources(
    shell: Shell, tiny: list[str], folders: tuple[str, str]
) -> None:
    save_pictures(Path("p"), ["a.png", "q/b.png"])
    before = {path: path.read_bytes() for path in Path("p").rglob("*.png")}
    save = [word for kind in OutputKind for word in ("--save", kind.value)]
    command = ["rollout", folders[0], "-o", folders[1], *save, *tiny]
    first = shell(*command)
    assert (first.code, len(first.paths)) == (0, 10)
    for more in ([], ["--skip-existing"], ["--head-fusion", "mean"]):
        again = shell(*command, *more)
        assert again.code == 0
        assert again.paths == ([] if "--skip-existing" in more else first.paths)
    assert {path: path.read_bytes() for path in before} == before
    assert len([path for path in Path().rglob("*") if path.is_file()]) == 2 + 10


@pytest.mark.slow
def test_output_that_is_a_source_is_refused(shell: Shell, tiny: list[str]) -> None:
    save_pictures(Path(), ["p/a.png"])
    assert shell("rollout", "p/a.png", "-o", ".", *tiny).code == 0
    name = "p/a.png.rollout.png"
    before = Path(name).read_bytes()
    Path("linked").mkdir()
    Path("linked/soft.png").symlink_to(Path(name).absolute())
    Path("linked/hard.png").hardlink_to(name)
    Path("same").symlink_to(".")
    for source in (name, f"same/{name}", "linked/soft.png", "linked/hard.png"):
        for output in (".", "same"):
            done = shell("rollout", "p/a.png", source, "-o", output, "--discard", "0", *tiny)
            assert (done.code, done.out) == (2, b"")
            assert "would overwrite the source" in one_line(done)
            assert Path(name).read_bytes() == before
    assert Path("linked/soft.png").is_symlink()


@pytest.mark.slow
def test_output_that_is_a_source_in_another_case_is_refused(shell: Shell, tiny: list[str]) -> None:
    save_pictures(Path(), ["p/a.png"])
    if not Path("P/A.PNG").exists():
        pytest.skip("this file system tells upper from lower case")
    assert shell("rollout", "p/a.png", "-o", ".", *tiny).code == 0
    done = shell("rollout", "P/A.png", "p/a.png.rollout.png", "-o", ".", *tiny)
    assert done.code == 2
    assert "would overwrite the source" in one_line(done)


# Pictures


@pytest.mark.parametrize("fit", ["squash", "crop", "native"])
@pytest.mark.parametrize("shape", [(40, 120), (120, 40)], ids=str)
def test_pictures_have_the_originals_shape(
    shell: Shell, tiny: list[str], fit: str, shape: tuple[int, int]
) -> None:
    save_pictures(Path(), ["a.png"], shape)
    save = ["--save", "overlay", "--save", "heatmap"]
    assert shell("rollout", "a.png", "--fit", fit, *save, *tiny).code == 0
    for path in Path("vitviz-out").iterdir():
        with Image.open(path) as image:
            assert image.size == shape[::-1]


def test_heatmap_shows_the_relevance(shell: Shell, tiny: list[str]) -> None:
    save_pictures(Path(), ["a.png"], (60, 100))
    save = ["--save", "heatmap", "--save", "npy", "--colormap", "bone"]
    assert shell("rollout", "a.png", *save, *tiny).code == 0
    relevance = np.load("vitviz-out/a.png.rollout.npy")
    with Image.open("vitviz-out/a.png.rollout.heatmap.png") as image:
        brightness = np.asarray(image).astype(float).sum(axis=-1)
    rows, cols = relevance.shape
    blocks = cv2.resize(brightness, (cols, rows), interpolation=cv2.INTER_AREA)
    assert np.corrcoef(blocks.ravel(), relevance.ravel())[0, 1] > 0.95


# Errors


def one_line(done: Run) -> str:
    """Return the one line that says what is wrong; there must be no other."""
    assert "Traceback" not in done.err
    assert len(done.complaints) == 1, done.err
    return done.complaints[0]


MISTAKES: list[tuple[list[str], list[str]]] = [
    (["--discard", "1.5"], ["--discard", "1.5"]),
    (["--discard", "1"], ["--discard"]),
    (["--discard", "nan"], ["--discard"]),
    (["--discard", "-0.1"], ["--discard"]),
    (["--discard", "much"], ["--discard"]),
    (["--start-layer", "-1"], ["--start-layer"]),
    (["--start-layer", "6"], ["--start-layer", "6 blocks", "5"]),
    (["--alpha", "1.01"], ["--alpha"]),
    (["--max-size", "0"], ["--max-size"]),
    (["--batch-size", "0"], ["--batch-size"]),
    (["--batch-size", "many"], ["--batch-size", "auto"]),
    (["--workers", "-2"], ["--workers"]),
    (["--fit", "stretch"], ["--fit", "squash"]),
    (["--save", "jpeg"], ["--save"]),
    (["--colormap", "rainbow"], ["--colormap"]),
    (["--head-fusion", "median"], ["--head-fusion"]),
    (["--device", "cuda:7"], ["cuda:7"]),
    (["--device", "toaster"], ["toaster", "cpu"]),
    (["--img-size", "large"], ["--img-size"]),
    (["--img-size", "0"], ["--img-size"]),
    (["--img-size", "50"], ["50"]),
    (["--img-size", "8"], ["8"]),
    (["-m", "deit_tinny"], ["deit_tinny", "deit_tiny"]),
    (["-m", "xyzzy"], ["xyzzy"]),
    (["-m", ""], ["model"]),
    (["-m", "test_vit.nonsense"], ["nonsense", "r160_in1k"]),
    (["-m", "local-dir:/nowhere"], ["/nowhere"]),
    (["-m", "test_vit2"], ["does not fit", "missing", "unexpected"]),
    (["--weights", "gone.pth"], ["gone.pth"]),
    (["--weights", "a.png"], ["a.png"]),
    (["--labels", "gone.txt"], ["gone.txt"]),
    (["--labels", "a.png"], ["a.png"]),
    (["-o", "a.png"], ["a.png", "--output"]),
    (["-o", "a.png/out"], ["a.png/out"]),
    (["--no-such-option"], ["--no-such-option"]),
]


@pytest.mark.parametrize(("words", "says"), MISTAKES, ids=[" ".join(w) for w, _ in MISTAKES])
def test_mistake_gives_one_line_and_exit_code_2(
    shell: Shell, tiny: list[str], words: list[str], says: list[str]
) -> None:
    save_pictures(Path(), ["a.png"])
    done = shell("rollout", "a.png", *tiny, *words)
    assert done.code == 2, done.err
    assert done.out == b""
    line = one_line(done)
    for part in says:
        assert part in line
    assert not files()


@pytest.mark.usefixtures("census")
@pytest.mark.parametrize("model", ["resnet18", "swin_tiny_patch4_window7_224", "convit_tiny"])
def test_unsupported_model_is_refused_before_its_weights_are_missed(
    shell: Shell, model: str
) -> None:
    save_pictures(Path(), ["a.png"])
    done = shell("rollout", "a.png", "-m", model, "--weights", "gone.pth")
    assert done.code == 2
    line = one_line(done)
    assert "rollout" in line or "maps" in line
    assert "plain ViT" in line


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("crane", ["1", "2", "index"]),
        ("tabbi", ["tabby"]),
        ("7", ["0 … 6"]),
        ("-1", ["0 … 6"]),
        ("tab", ["tab"]),
        ("", []),
        ("top0", ["top0"]),
    ],
)
def test_class_mistake_gives_one_line_and_exit_code_2(
    shell: Shell, tiny: list[str], word: str, says: list[str]
) -> None:
    save_pictures(Path(), ["a.png"])
    done = shell("grad-rollout", "a.png", "--class", word, *tiny)
    assert (done.code, done.out) == (2, b"")
    line = one_line(done)
    for part in says:
        assert part in line


def test_nothing_to_do_is_said(shell: Shell) -> None:
    Path("empty").mkdir()
    for source in ("empty", "*.jpg"):
        done = shell("rollout", source)
        assert done.code == 2
        assert source in one_line(done)
    assert not Path("vitviz-out").exists()


def test_fruitless_source_beside_good_ones_is_said(shell: Shell, tiny: list[str]) -> None:
    save_pictures(Path(), ["a.png"])
    Path("empty").mkdir()
    done = shell("rollout", "empty", "a.png", *tiny)
    assert done.code == 0
    assert "empty" in done.err


def test_missing_source_fails_as_an_image(shell: Shell, tiny: list[str]) -> None:
    done = shell("rollout", "gone.jpg", *tiny)
    assert (done.code, done.out) == (1, b"")
    assert "gone.jpg" in done.err


def test_two_files_of_one_name_are_refused(shell: Shell, tmp_path: Path) -> None:
    save_pictures(tmp_path, ["one/a.png", "two/a.png"])
    (tmp_path / "work").mkdir()
    os.chdir(tmp_path / "work")
    done = shell("rollout", "../one/a.png", "../two/a.png")
    assert done.code == 2
    line = one_line(done)
    assert "../one/a.png" in line
    assert "../two/a.png" in line


def test_no_sources_is_a_usage_error(shell: Shell) -> None:
    done = shell("rollout")
    assert (done.code, done.out) == (2, b"")
    assert "SOURCE" in done.err


def test_no_command_shows_help(shell: Shell) -> None:
    done = shell()
    assert done.code in (0, 2)
    assert b"grad-rollout" in done.out + done.err.encode()


def test_unknown_command_is_a_usage_error(shell: Shell) -> None:
    done = shell("rolout")
    assert done.code == 2
    assert "rolout" in one_line(done)


def test_unreachable_hub_is_one_line(
    shell: Shell, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    save_pictures(Path(), ["a.png"])
    for model in (NAME, "hf-hub:someone/tuned"):
        done = shell("rollout", "a.png", "-m", model)
        assert done.code == 2
        assert "--weights" in one_line(done)


def test_invalid_hub_name_is_one_line(shell: Shell) -> None:
    save_pictures(Path(), ["a.png"])
    for model in ("hf-hub:", "hf-hub:a/b/c", "hf-hub:../x", "hf-hub:a b/c"):
        done = shell("rollout", "a.png", "-m", model)
        assert done.code == 2
        one_line(done)


def test_interruption_leaves_with_130(
    shell: Shell, tiny: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    save_pictures(Path(), ["a.png"])

    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(explaining, "explain_batch", interrupt)
        done = shell("rollout", "a.png", *tiny)
    assert done.code == 130
    assert "Traceback" not in done.err


def test_termination_leaves_with_143_and_restores_the_handler(
    shell: Shell, tiny: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    save_pictures(Path(), ["a.png"])
    before = signal.getsignal(signal.SIGTERM)
    real = explaining.explain_batch

    def terminate(*arguments: Any, **options: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return real(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(explaining, "explain_batch", terminate)
        done = shell("rollout", "a.png", *tiny)
    assert done.code == 143
    assert signal.getsignal(signal.SIGTERM) is before
    assert not [path for path in files() if ".tmp" in path]


def test_bug_keeps_its_traceback(
    shell: Shell, tiny: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    save_pictures(Path(), ["a.png"])

    def bug(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(models, "load_model", bug)
    from vitviz.cli.app import main

    with pytest.raises(ZeroDivisionError):
        main(["rollout", "a.png", *tiny])


def test_no_global_switch_outlives_a_run(shell: Shell, tiny: list[str]) -> None:
    save_pictures(Path(), ["a.png"])

    def switches() -> list[object]:
        return [
            torch.is_grad_enabled(),
            torch.get_num_threads(),
            torch.get_default_dtype(),
            torch.get_default_device(),
            torch.backends.cudnn.benchmark,
            torch.are_deterministic_algorithms_enabled(),
            cv2.getNumThreads(),
            Image.MAX_IMAGE_PIXELS,
        ]

    before = switches()
    assert shell("grad-rollout", "a.png", *tiny).code == 0
    assert switches() == before


# Help, and processes


@pytest.mark.parametrize("command", [[], ["rollout"], ["grad-rollout"], ["inspect"]], ids=str)
def test_help_is_shown(shell: Shell, command: list[str]) -> None:
    done = shell(*command, "--help")
    assert (done.code, done.err) == (0, "")
    assert b"Usage" in done.out
    if command == ["rollout"]:
        for option in (b"--discard", b"--head-fusion", b"--skip-existing", b"--batch-size"):
            assert option in done.out
        assert b"--class" not in done.out


def test_version_is_shown(shell: Shell) -> None:
    done = shell("--version")
    assert (done.code, done.out.decode().split()[-1]) == (0, vitviz.__version__)


HEAVY = ("torch", "timm", "cv2", "numpy", "PIL", "torchvision", "huggingface_hub")
TELL = f"print([n for n in {HEAVY!r} if n in sys.modules], file=sys.stderr)"


def test_help_and_version_load_nothing_heavy() -> None:
    code = (
        "import sys, atexit, runpy\n"
        "import vitviz\n"
        f"{TELL}\n"
        "for words in (['--help'], ['--version'], ['rollout', '--help'], ['inspect', '--help']):\n"
        "    sys.argv = ['vitviz', *words]\n"
        "    try:\n"
        "        runpy.run_module('vitviz', run_name='__main__')\n"
        "    except SystemExit as left:\n"
        "        assert not left.code\n"
        f"    {TELL}\n"
    )
    done = run_process("-c", code)
    assert done.code == 0, done.err
    assert done.err.splitlines() == ["[]"] * 5


@pytest.mark.slow
def test_closed_reader_ends_quietly(tmp_path: Path, tiny: list[str]) -> None:
    save_pictures(tmp_path / "p", [f"{index:02}.png" for index in range(60)], (16, 16))
    command = [sys.executable, "-m", "vitviz", "rollout", "p", "--batch-size", "1", *tiny]
    with subprocess.Popen(
        command,
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline().startswith(b"vitviz-out/")
        process.stdout.close()
        err = process.stderr.read().decode()
        code = process.wait(60)
    assert "Traceback" not in err
    assert "Broken" not in err
    assert "Exception ignored" not in err
    assert code in (0, 141)  # 1 would say that an image failed
    assert not list((tmp_path / "vitviz-out").rglob(".*"))


TELLING = (["inspect", "demo"], ["inspect", "demo", "--json"], ["models", "deit_tiny"])


@pytest.mark.slow
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
@pytest.mark.parametrize("words", [["--help"], *TELLING], ids=" ".join)
def test_full_disk_behind_stdout_is_told_in_one_line(
    nursery: Nursery, tmp_path: Path, words: list[str]
) -> None:
    done = nursery.run(*words, cwd=tmp_path, out="/dev/full")
    assert done.code == 1
    said = done.err.replace("Using cpu\n", "").splitlines()
    assert said == ["Error: no space left on the device that stdout goes to"]


@pytest.mark.slow
@pytest.mark.parametrize("words", TELLING, ids=" ".join)
def test_reader_that_wants_nothing_ends_a_telling_command_quietly(
    nursery: Nursery, tmp_path: Path, words: list[str]
) -> None:
    pipe, gone = tmp_path / "pipe", tmp_path / "gone"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    wait = f"import pathlib, time\nwhile not pathlib.Path({str(gone)!r}).exists(): time.sleep(0.01)"
    child = nursery.start(*words, cwd=tmp_path, out=str(pipe), prelude=wait)
    os.close(reader)
    gone.touch()
    done = child.wait()
    assert (done.code, done.err.replace("Using cpu\n", "")) == (141, "")


@pytest.mark.slow
def test_pipelines_of_a_shell_work(tmp_path: Path, tiny: list[str]) -> None:
    save_pictures(tmp_path / "p", ["a b.png", "c.png"])
    words = " ".join(f"'{word}'" for word in tiny)
    line = f"find p -print0 | '{sys.executable}' -m vitviz rollout - -0 -q {words} | xargs -0 ls"
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", line],
        cwd=tmp_path,
        capture_output=True,
        check=False,
        timeout=120,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr.decode()
    assert sorted(done.stdout.decode().splitlines()) == [
        "vitviz-out/p/a b.png.rollout.png",
        "vitviz-out/p/c.png.rollout.png",
    ]


def test_module_runs_as_a_command() -> None:
    executable = shutil.which("vitviz", path=str(Path(sys.executable).parent))
    if executable is None:
        pytest.skip("vitviz is not installed beside this Python")
    done = subprocess.run([executable, "--version"], capture_output=True, check=True, timeout=60)
    assert done.stdout.decode().split()[-1] == vitviz.__version__


def test_interruption_before_the_first_image_leaves_with_130_and_no_word(
    shell: Shell, tiny: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    save_pictures(Path(), ["a.png"])

    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(models, "load_model", interrupt)
        done = shell("rollout", "a.png", *tiny)
    assert (done.code, done.out, done.complaints) == (130, b"", [])


def test_gpu_is_told_with_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"Card {device.index}")
    assert describe_device(torch.device("cuda:1")) == "Using cuda:1 (Card 1)"
    assert describe_device(torch.device("cpu")) == "Using cpu"
