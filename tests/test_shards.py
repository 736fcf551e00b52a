"""Parts of a run: together the whole, disjoint, and the same whatever other images there are."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fixtures_io import Shell, save_pictures
from vitviz.errors import OptionError
from vitviz.runs.shards import Shard

NAMES = [f"{name}.png" for name in "abcdefghijkl"]


@pytest.fixture
def run(
    capfdbinary: pytest.CaptureFixture[bytes], monkeypatch: pytest.MonkeyPatch, one_thread: None
) -> Shell:
    """Run vitviz in this process."""
    return Shell(capfdbinary, monkeypatch)


def _shards(count: int) -> list[Shard]:
    return [Shard(number=number, count=count) for number in range(1, count + 1)]


@given(st.sets(st.text(min_size=1), max_size=60), st.integers(1, 9))
def test_every_key_is_in_one_shard(keys: set[str], count: int) -> None:
    for key in keys:
        assert sum(shard.holds(key) for shard in _shards(count)) == 1


def test_shard_of_a_key_never_changes() -> None:
    held = [next(s.number for s in _shards(8) if s.holds(key)) for key in ("a/b.png", "é.jpg", "x")]
    assert held == [4, 5, 5]  # by sha256sum: the first 16 hex digits modulo 8, plus 1


def test_shards_are_of_like_size() -> None:
    keys = [f"images/{number:07}.jpg" for number in range(20_000)]
    sizes = [sum(map(shard.holds, keys)) for shard in _shards(8)]
    assert sum(sizes) == len(keys)
    assert min(sizes) > 2300
    assert max(sizes) < 2700


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("0/4", "1/4 to 4/4"),
        ("5/4", "1/4 to 4/4"),
        ("1/0", "1/1 to 1/1"),
        ("-1/4", "give I/N"),
        ("2", "give I/N"),
        ("auto/0", "give I/N"),
        ("1/2/3", "give I/N"),
    ],
)
def test_shard_that_is_none_is_refused(word: str, said: str) -> None:
    with pytest.raises(OptionError, match=said):
        Shard.parse(word, {})


_ARRAY = {
    "SLURM_ARRAY_TASK_ID": "7",
    "SLURM_ARRAY_TASK_MIN": "1",
    "SLURM_ARRAY_TASK_MAX": "9",
    "SLURM_ARRAY_TASK_STEP": "2",
    "SLURM_ARRAY_TASK_COUNT": "5",
}
_STEP = {"SLURM_PROCID": "2", "SLURM_STEP_NUM_TASKS": "3", "SLURM_NTASKS": "3"}


@pytest.mark.parametrize(
    ("word", "environment", "number", "count"),
    [
        ("auto", _ARRAY, 4, 5),
        ("auto/5", _ARRAY, 4, 5),
        ("auto", _STEP, 3, 3),
        ("auto", {**_ARRAY, **_STEP}, 12, 15),
        ("auto", {"RANK": "0", "WORLD_SIZE": "4"}, 1, 4),
        ("auto", {"RANK": "3", "WORLD_SIZE": "4", **_STEP}, 4, 4),
        ("auto/6", {"JOB_COMPLETION_INDEX": "5"}, 6, 6),
        ("auto/6", {"PARALLEL_SEQ": "6"}, 6, 6),
        ("2/3", {"RANK": "0", "WORLD_SIZE": "4"}, 2, 3),
    ],
)
def test_shard_is_read_from_what_started_the_process(
    word: str, environment: dict[str, str], number: int, count: int
) -> None:
    shard = Shard.parse(word, environment)
    assert (shard.number, shard.count) == (number, count)


def test_tasks_of_an_array_are_the_whole() -> None:
    found = set()
    for task in range(1, 10, 2):
        for process in range(3):
            environment = {
                **_ARRAY,
                **_STEP,
                "SLURM_ARRAY_TASK_ID": str(task),
                "SLURM_PROCID": str(process),
            }
            found.add(Shard.parse("auto", environment).number)
    assert found == set(range(1, 16))


@pytest.mark.parametrize(
    ("word", "environment", "said"),
    [
        ("auto", {}, "none of SLURM_ARRAY_TASK_ID"),
        # What a batch script has that starts a single process without srun.
        ("auto", {"SLURM_PROCID": "0", "SLURM_NTASKS": "4"}, "none of"),
        ("auto", {**_ARRAY, "SLURM_ARRAY_TASK_COUNT": "2"}, "no plain range"),
        ("auto/4", _ARRAY, "auto/4 finds 4/5"),
        ("auto", {"JOB_COMPLETION_INDEX": "0"}, "auto/8"),
        ("auto/2", {"PARALLEL_SEQ": "3"}, "1/2 to 2/2"),
        ("auto/5", {**_ARRAY, "PARALLEL_SEQ": "3"}, "say which part"),
        ("auto", {"RANK": "x", "WORLD_SIZE": "4"}, "RANK='x'"),
    ],
)
def test_environment_that_does_not_tell_is_refused(
    word: str, environment: dict[str, str], said: str
) -> None:
    with pytest.raises(OptionError, match=said):
        Shard.parse(word, environment)


def _files(folder: Path) -> dict[str, bytes]:
    return {str(each.relative_to(folder)): each.read_bytes() for each in folder.rglob("*.png")}


@pytest.mark.slow
@pytest.mark.parametrize(
    "command", [["rollout"], ["features"], ["similarity", "photos/c.png", "--patch", "1,1", "--to"]]
)
def test_shards_together_write_what_one_run_writes(
    run: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    save_pictures(tmp_path / "photos", NAMES)
    command = [
        *command,
        "photos",
        "-m",
        "demo",
        "--batch-size",
        "1",
    ]  # so that not even rounding differs
    assert run(*command, "-o", "whole").code == 0
    told = []
    for number in (1, 2, 3):
        shard = run(*command, "-o", "parts", "--shard", f"{number}/3")
        assert shard.code == 0
        assert f"Shard {number}/3: {len(shard.paths)} of 12 images" in shard.err
        told += shard.paths
    assert len(told) == len(set(told)) == len(NAMES)
    assert _files(tmp_path / "parts") == _files(tmp_path / "whole")


def test_empty_shard_is_no_error(run: Shell, tmp_path: Path) -> None:
    save_pictures(tmp_path, ["a.png"])
    results = [
        run("rollout", tmp_path / "a.png", "-m", "demo", "-o", tmp_path, "--shard", f"{number}/2")
        for number in (1, 2)
    ]
    assert [each.code for each in results] == [0, 0]
    (empty,) = [each for each in results if not each.paths]
    assert empty.complaints == [f"Shard {1 + results.index(empty)}/2: 0 of 1 images"]
    assert "Using" not in empty.err  # no model is loaded for it


def test_shard_overwrites_no_image_of_another(
    run: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    save_pictures(tmp_path, ["a.png", "a.png.rollout.png"])
    for number in (1, 2):
        both = run("rollout", "a.png", "a.png.rollout.png", "-m", "demo", "-o", ".", "--shard",
                   f"{number}/2")  # fmt: skip
        assert both.code == 2
        assert "would overwrite the source" in both.err


def test_shard_that_is_found_is_told(
    run: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_pictures(tmp_path, ["a.png"])
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    done = run("rollout", tmp_path / "a.png", "-m", "demo", "-o", tmp_path, "--shard", "auto")
    assert "Shard 1/1 (RANK=0, WORLD_SIZE=1): 1 of 1 images" in done.err
    quiet = run("rollout", tmp_path / "a.png", "-m", "demo", "-o", tmp_path, "--shard", "1/1", "-q")
    assert quiet.err == ""
