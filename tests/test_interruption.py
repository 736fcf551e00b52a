"""Runs that are killed, interrupted, short of room, not read to the end, or not alone."""

from __future__ import annotations

import hashlib
import json
import os
import random
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fixtures_io import ROOT, Run, picture, save_pictures
from fixtures_processes import Nursery
from vitviz.runs.provenance import is_whole, read_provenance

COUNT = 40
DEMO = ["-m", "demo", "--device", "cpu", "--batch-size", "4"]
SAVE = ["--save", "overlay", "--save", "npy", "--save", "panel"]
IN_A_ROW = 5  # kills, until a run is left in peace


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Keep pictures in two folders; no test may change a byte of them."""
    folder = tmp_path_factory.mktemp("photos") / "p"
    names = [f"{index % 2}/{index:02}.png" for index in range(COUNT)]
    save_pictures(folder, names, (150, 200))
    before = contents(folder)
    yield folder
    assert contents(folder) == before


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def finals(folder: Path) -> list[Path]:
    """List the files under their final names, and make sure that each is whole."""
    paths = [path for path in sorted(folder.rglob("[!.]*")) if path.is_file()]
    for path in paths:
        assert read_provenance(path), path
        assert is_whole(path), path
        if path.suffix == ".png":
            with Image.open(path) as image:
                image.load()
    return paths


def temporaries(folder: Path) -> list[Path]:
    return list(folder.rglob(".*"))


def told(out: bytes) -> list[Path]:
    return [Path(os.fsdecode(line)) for line in out.split(b"\n")[:-1]]


def assert_alike(folder: Path, other: Path) -> None:
    """Compare maps that were made in other batches, which round otherwise."""
    names = [[path.relative_to(root) for path in finals(root)] for root in (folder, other)]
    assert names[0] == names[1]
    for name in names[0]:
        one, two = read_provenance(folder / name), read_provenance(other / name)
        assert one
        assert two
        assert one.recipe == two.recipe
        if name.suffix == ".npy":
            maps = np.load(folder / name), np.load(other / name)
            assert np.abs(maps[0] - maps[1]).max() <= 1e-5 * np.ptp(maps[1]), name
        else:
            with Image.open(folder / name) as image, Image.open(other / name) as second:
                difference = np.asarray(image).astype(int) - np.asarray(second)
            assert np.abs(difference).max() <= 1, name


def assert_same_records(out: bytes, other: bytes) -> None:
    records = [[json.loads(line) for line in each.splitlines()] for each in (out, other)]
    assert len(records[0]) == len(records[1])
    for one, two in zip(*records, strict=True):
        for first, second in zip(one["outputs"], two["outputs"], strict=True):
            for number, other_number in zip(*map(numbers, (first, second)), strict=True):
                assert number == pytest.approx(other_number, rel=1e-4)
        for key in ("source", "outputs", "score_kind", "run", "error"):
            assert one[key] == two[key]
        for first, second in zip(one["predictions"], two["predictions"], strict=True):
            assert first["score"] == pytest.approx(second["score"], abs=1e-5)


def numbers(output: dict[str, Any]) -> list[float]:
    """Take the numbers out that round otherwise in other batches."""
    return [number for number in output.pop("sanity").values() if number is not None]


# Killed

SLOW_DISK = (
    "import time, vitviz.runs.writing as w\n"
    "def fill(file, content):\n"
    "    for start in range(0, len(content), 8192):\n"
    "        file.write(content[start : start + 8192])\n"
    "        time.sleep(0.002)\n"
    "w._fill = fill\n"
)


@pytest.mark.slow
@pytest.mark.parametrize("least", [3, pytest.param(20, marks=pytest.mark.long)])
def test_killed_at_any_moment_and_run_again_ends_as_if_undisturbed(
    nursery: Nursery, photos: Path, tmp_path: Path, least: int
) -> None:
    moments = random.Random(0)
    command = ["grad-rollout", "p", *DEMO, *SAVE, "--json", "--skip-existing"]
    begin = time.monotonic()
    whole = nursery.run(*command, "-o", tmp_path / "whole", cwd=photos.parent)
    lasted = time.monotonic() - begin
    assert whole.code == 0, whole.err
    kills = left = 0
    attempts = count()
    while kills < least:
        out = tmp_path / f"out{next(attempts)}"  # a finished one would leave nothing to kill
        for _ in range(IN_A_ROW):
            child = nursery.start(*command, "-o", out, cwd=photos.parent, prelude=SLOW_DISK)
            child.wait_for_output()
            time.sleep(moments.uniform(0, lasted / IN_A_ROW))
            child.send(signal.SIGKILL)
            if child.wait().code == 0:  # it was done before
                break
            kills += 1
            left += len(temporaries(out))
            finals(out)
        last = nursery.run(*command, "-o", out, cwd=photos.parent)
        assert last.code == 0, last.err
        assert temporaries(out) == []
        assert_alike(out, tmp_path / "whole")
        assert_same_records(
            last.out.replace(os.fsencode(out), os.fsencode(tmp_path / "whole")), whole.out
        )
        assert b'"skipped"' in last.out
    assert left, "no kill came while a file was being written"
    print(f"{kills} kills left {left} temporary files")


@pytest.mark.slow
def test_temporary_file_of_a_dead_process_that_nobody_has_buried_goes_too(
    nursery: Nursery, photos: Path, tmp_path: Path
) -> None:
    command = ["rollout", "p/0", *DEMO, "-o", tmp_path / "out"]
    stuck = (
        "import pathlib, time\n"
        "pathlib.Path.hardlink_to = lambda *_: time.sleep(60)\n"  # written, and not yet in place
    )
    child = nursery.start(*command, cwd=photos.parent, prelude=stuck)
    child.wait_until(lambda: temporaries(tmp_path / "out"))
    time.sleep(0.1)
    running = nursery.run(*command, cwd=photos.parent)
    assert running.code == 0, running.err
    assert temporaries(tmp_path / "out"), "a living process lost its file"
    child.send(signal.SIGKILL)
    time.sleep(0.1)  # a zombie from here on
    assert nursery.run(*command, cwd=photos.parent).code == 0
    assert temporaries(tmp_path / "out") == []
    child.wait()


# Interrupted


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["SIGINT", "SIGTERM"]
)
@pytest.mark.parametrize("trials", [3, pytest.param(6, marks=pytest.mark.long)])
def test_interruption_at_any_moment_leaves_whole_files_and_tells_of_them(
    nursery: Nursery,
    photos: Path,
    tmp_path: Path,
    number: signal.Signals,
    code: int,
    trials: int,
) -> None:
    moments = random.Random(int(number))
    untold = 0
    for trial in range(trials):
        out = tmp_path / f"{trial}"
        child = nursery.start("grad-rollout", "p", *DEMO, "-o", out, cwd=photos.parent)
        lines = moments.randrange(1, COUNT // 2)
        child.wait_until(lambda: child.out.read_bytes().count(b"\n") >= lines)  # noqa: B023
        time.sleep(moments.uniform(0, 0.05))
        child.send(number)
        done = child.wait()
        assert done.code == code, done.err
        paths = told(done.out)
        assert set(paths) <= set(finals(out))
        untold += len(set(finals(out)) - set(paths))
        assert temporaries(out) == []
        summary = done.err.splitlines()[-1]
        assert done.complaints == [summary]
        assert summary.startswith(f"{len(paths)} written, 0 skipped, 0 failed")
        assert f"{COUNT - len(paths)} not done" in summary
    assert untold <= 1  # one may be handed over in the very microsecond


@pytest.mark.slow
def test_signal_that_the_parent_ignores_stays_ignored(
    nursery: Nursery, photos: Path, tmp_path: Path
) -> None:
    # As a shell starts its jobs in the background: Ctrl-C is meant for the one in front.
    ignored = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)"
    words = ["rollout", "p", *DEMO, "-o", tmp_path / "out"]
    child = nursery.start(*words, cwd=photos.parent, prelude=ignored)
    child.wait_for_output()
    child.send(signal.SIGINT)
    done = child.wait()
    assert done.code == 0, done.err
    assert len(told(done.out)) == COUNT
    child = nursery.start(*words, cwd=photos.parent, prelude=ignored)
    child.wait_for_output()
    child.send(signal.SIGTERM)
    assert child.wait().code == 143


@pytest.mark.slow
def test_result_that_is_told_while_the_interruption_comes_costs_no_other(
    nursery: Nursery, photos: Path, tmp_path: Path
) -> None:
    interrupted = (
        "import os, signal, vitviz.cli.reporter as r\n"
        "write = r.Reporter.write\n"
        "def write_and_interrupt(*arguments):\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    write(*arguments)\n"
        "r.Reporter.write = write_and_interrupt\n"
    )
    done = nursery.run(
        "rollout", "p", *DEMO, "-o", tmp_path / "out", cwd=photos.parent, prelude=interrupted
    )
    assert done.code == 130, done.err
    assert 1 < len(told(done.out)) < COUNT
    assert set(told(done.out)) == set(finals(tmp_path / "out"))
    assert f"{len(told(done.out))} written" in done.err


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("anywhere", [1, pytest.param(4, marks=pytest.mark.long)])
def test_interruption_while_it_starts_leaves_without_a_word(
    photos: Path, tmp_path: Path, number: signal.Signals, anywhere: int
) -> None:
    moments = random.Random(int(number))
    command = [sys.executable, "-m", "vitviz", "rollout", "p", *DEMO, "-o", str(tmp_path / "out")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONPROFILEIMPORTTIME": "1"}
    for delay in (0.03, 0.1, *(moments.uniform(0.1, 2) for _ in range(anywhere))):
        with subprocess.Popen(
            command,
            cwd=photos.parent,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment,
        ) as process:
            assert process.stderr
            while line := process.stderr.readline():
                if b"vitviz.__main__" in line or b"| vitviz" in line:
                    break
            time.sleep(delay)
            process.send_signal(number)
            out, err = process.communicate(timeout=60)
        said = [line for line in err.splitlines() if not line.startswith(b"import time:")]
        assert process.returncode == 128 + number, (delay, said)
        assert b"Traceback" not in err
        assert [
            line for line in said if not line.startswith(b"Using ") and b"written" not in line
        ] == []
        assert set(told(out)) <= set(finals(tmp_path / "out"))
        assert temporaries(tmp_path / "out") == []


@pytest.mark.slow
def test_second_interruption_ends_it_at_once(
    nursery: Nursery, photos: Path, tmp_path: Path
) -> None:
    slow = (
        "import time, vitviz.runs.records as p\n"
        "write = p.write_whole\n"
        "def write_slowly(path, *rest):\n"
        "    write(path, *rest)\n"
        "    time.sleep(60 if path.name.startswith('2') else 0)\n"
        "p.write_whole = write_slowly\n"
    )
    out = tmp_path / "out"
    child = nursery.start("rollout", "p", *DEMO, "-o", out, cwd=photos.parent, prelude=slow)
    child.wait_until(lambda: (out / "p/0/20.png.rollout.png").exists())
    begin = time.monotonic()
    child.send(signal.SIGINT)
    child.send(signal.SIGTERM)  # as of `timeout`, which tells the process and its group
    time.sleep(1)
    assert Path(f"/proc/{child.pid}").exists() or sys.platform != "linux"
    child.send(signal.SIGINT)
    done = child.wait()
    assert time.monotonic() - begin < 10
    assert done.code == 130
    assert "Traceback" not in done.err
    assert set(told(done.out)) <= set(finals(out))


# No room, no folder

needs_mount = pytest.mark.skipif(
    sys.platform != "linux" or os.geteuid() != 0, reason="only root mounts a small file system"
)


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """Mount a file system of 300 kB."""
    folder = tmp_path / "small"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=300k", "none", str(folder)]
    if subprocess.run(command, check=False, capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def assert_stopped(done: Run, out: Path, why: str) -> None:
    """Make sure that one image and one line tell of what all others would have met."""
    assert done.code == 1
    lines = done.err.splitlines()
    assert lines.pop(0) == "Using cpu"
    assert lines[0].startswith("Using demo, ")
    assert [line for line in lines if line.startswith("failed: ")] == lines[1:2]
    assert why in lines[1]
    paths = told(done.out)
    assert lines[2].startswith(f"{len(paths)} written, 0 skipped, 1 failed, ")
    assert f"{COUNT - len(paths) - 1} not done" in lines[2]
    assert lines[3].startswith("Error: ")
    assert len(lines) == 4
    assert {path for path in paths if path.exists()} == set(finals(out))


@pytest.mark.slow
@needs_mount
def test_full_disk_stops_the_run(nursery: Nursery, photos: Path, small: Path) -> None:
    command = ["rollout", "p", *DEMO, "-o", small / "out"]
    done = nursery.run(*command, cwd=photos.parent)
    assert_stopped(done, small, "No space left on device")
    assert told(done.out)
    assert "--skip-existing" in done.err
    assert temporaries(small) == []
    before = contents(small)
    again = nursery.run(*command, "--skip-existing", cwd=photos.parent)
    assert again.code == 1
    assert f"{len(before)} skipped" in again.err
    assert contents(small) == before
    subprocess.run(["mount", "-o", "remount,size=50m", str(small)], check=True)
    assert nursery.run(*command, "--skip-existing", cwd=photos.parent).code == 0
    assert len(finals(small)) == COUNT


@pytest.mark.slow
@needs_mount
def test_disk_that_is_full_with_results_stops_the_run(
    nursery: Nursery, photos: Path, small: Path, tmp_path: Path
) -> None:
    (small / "ballast").write_bytes(bytes(292 << 10))
    done = nursery.run(
        *("rollout", "p", *DEMO, "--json", "-o", tmp_path / "out"),
        cwd=photos.parent,
        out=str(small / "records"),
    )
    assert done.code == 1
    assert done.err.splitlines()[-1].startswith("Error: results cannot be told on stdout: No space")
    assert "Traceback" not in done.err
    assert temporaries(tmp_path / "out") == []
    finals(tmp_path / "out")


@needs_mount
def test_folder_that_becomes_read_only_stops_the_run(
    nursery: Nursery, photos: Path, small: Path
) -> None:
    lock = f"subprocess.run(['mount', '-o', 'remount,ro', {str(small)!r}], check=True)"
    done = nursery.run(
        *("rollout", "p", *DEMO, "-o", small / "out"),
        cwd=photos.parent,
        prelude=after_two_files(lock),
    )
    assert_stopped(done, small, "Read-only file system")
    assert f"--output {small / 'out'} cannot be written to: Read-only" in done.err


def after_two_files(event: str) -> str:
    """Return a prelude that does something once, before the third file is written."""
    return (
        "import itertools, os, pathlib, shutil, subprocess, threading, vitviz.runs.records as p\n"
        "write, numbers, alone = p.write_whole, itertools.count(), threading.Lock()\n"
        "def write_until(*arguments):\n"
        "    with alone:\n"
        "        if next(numbers) == 2:\n"
        f"            {event}\n"
        "        write(*arguments)\n"
        "p.write_whole = write_until\n"
    )


def test_folder_that_is_replaced_by_a_file_stops_the_run(
    nursery: Nursery, photos: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    event = f"shutil.rmtree({str(out)!r}); pathlib.Path({str(out)!r}).write_text('mine')"
    done = nursery.run(
        *("rollout", "p", *DEMO, "-o", out), cwd=photos.parent, prelude=after_two_files(event)
    )
    assert_stopped(done, out, "cannot be written")
    assert len(told(done.out)) == 2
    assert out.read_text() == "mine"


@pytest.mark.slow
def test_folder_that_vanishes_is_made_again(nursery: Nursery, photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = nursery.run(
        *("rollout", "p", *DEMO, "-o", out),
        cwd=photos.parent,
        prelude=after_two_files(f"shutil.rmtree({str(out)!r})"),
    )
    assert done.code == 0, done.err
    assert set(finals(out)) < set(told(done.out))
    assert len(finals(out)) == COUNT - 2


def test_trouble_of_one_folder_stops_no_other(
    nursery: Nursery, photos: Path, tmp_path: Path
) -> None:
    (tmp_path / "out/p").mkdir(parents=True)
    (tmp_path / "out/p/0").write_text("mine")
    done = nursery.run("rollout", "p", *DEMO, "-o", tmp_path / "out", cwd=photos.parent)
    assert done.code == 1
    assert len(told(done.out)) == done.err.count("failed: ") == COUNT // 2
    assert f"{COUNT // 2} written, 0 skipped, {COUNT // 2} failed in" in done.err
    assert (tmp_path / "out/p/0").read_text() == "mine"


# Not read to the end


@pytest.mark.slow
@pytest.mark.parametrize("option", ["", "--json", "-0", "--quiet"])
def test_reader_that_leaves_ends_the_run_quietly(
    nursery: Nursery, photos: Path, tmp_path: Path, option: str
) -> None:
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    words = ["rollout", "p", *DEMO, "-o", tmp_path / "out", *filter(None, [option])]
    child = nursery.start(*words, cwd=photos.parent, out=str(tmp_path / "pipe"))
    select.select([reader], [], [], 30)
    assert os.read(reader, 10)
    os.close(reader)
    code = nursery.ask(wait=child.pid)
    lines = child.err.read_text().splitlines()
    assert code == 141
    assert lines[:1] == ([] if option == "--quiet" else ["Using cpu"])
    assert all("written, 0 skipped, 0 failed, " in line for line in lines[2:])
    assert temporaries(tmp_path / "out") == []
    assert 0 < len(finals(tmp_path / "out")) < COUNT


def test_stdout_that_is_closed_from_the_start_changes_nothing(
    nursery: Nursery, photos: Path, tmp_path: Path
) -> None:
    done = nursery.run(
        *("rollout", "p/0", *DEMO, "-o", tmp_path / "out"),
        cwd=photos.parent,
        prelude="import os, sys; os.close(1); sys.stdout = None",
    )
    assert done.code == 0, done.err
    assert len(finals(tmp_path / "out")) == COUNT // 2


# Not alone


@pytest.mark.slow
@pytest.mark.parametrize("skip", [[], ["--skip-existing"]], ids=["replace", "skip"])
def test_two_runs_of_the_same_images_do_not_disturb_each_other(
    nursery: Nursery, photos: Path, tmp_path: Path, skip: list[str]
) -> None:
    command = ["rollout", "p", *DEMO, *SAVE, *skip, "--json", "-o", tmp_path / "out"]
    children = [nursery.start(*command, cwd=photos.parent) for _ in range(2)]
    runs = [child.wait() for child in children]
    for run in runs:
        assert run.code == 0, run.err
        assert [record["status"] in ("written", "skipped") for record in run.records] == [
            True
        ] * COUNT
    assert_same_records(runs[0].out, runs[1].out)
    assert len(finals(tmp_path / "out")) == 3 * COUNT
    assert temporaries(tmp_path / "out") == []


@pytest.mark.slow
def test_two_runs_for_the_same_names_tell_which_files_are_theirs(
    nursery: Nursery, photos: Path, tmp_path: Path
) -> None:
    for side in ("left", "right"):
        for index in range(20):
            path = tmp_path / side / f"p/{index:02}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            picture(90, 120, seed=100 * len(side) + index).save(path)
    command = ["rollout", "p", *DEMO, "--json", "-o", tmp_path / "out"]
    children = [nursery.start(*command, cwd=tmp_path / side) for side in ("left", "right")]
    runs = [child.wait() for child in children]
    files = {path: read_provenance(path) for path in finals(tmp_path / "out")}
    claimed = []
    for run, side in zip(runs, ("left", "right"), strict=True):
        for record in run.records:
            content = (tmp_path / side / record["source"]).read_bytes()
            for output in record["outputs"]:
                made = files[Path(output["path"])]
                assert made
                assert made.recipe["source_sha256"] == hashlib.sha256(content).hexdigest()
                claimed.append(Path(output["path"]))
            if record["status"] == "failed":
                assert "already exists and was made from" in record["error"]
    assert sorted(claimed) == sorted(files)
    assert len(files) == 20
    assert temporaries(tmp_path / "out") == []
