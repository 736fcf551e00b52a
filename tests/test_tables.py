"""Tables of records: what is in their rows, who can read them, and what survives."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pandas as pd
import polars
import pytest
from pyarrow import parquet

from fixtures_io import ROOT, Shell, save_pictures
from vitviz.errors import OptionError, OutputError
from vitviz.runs import tables
from vitviz.runs.job import require_parquet
from vitviz.runs.tables import RecordsTable

NAMES = [f"{name}.png" for name in "abcdef"]


@pytest.fixture
def run(
    capfdbinary: pytest.CaptureFixture[bytes],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    one_thread: None,
) -> Shell:
    """Run vitviz in this process, in a folder with some pictures."""
    monkeypatch.chdir(tmp_path)
    save_pictures(tmp_path / "photos", NAMES)
    return Shell(capfdbinary, monkeypatch)


TABLE = ["-m", "demo", "--records", "maps.parquet", "--save"]


def _rows(folder: str | Path = "maps.parquet") -> list[dict[str, Any]]:
    rows = parquet.read_table(folder).to_pylist()
    return sorted(
        rows, key=lambda row: (row["key"], row["class_request"] or "", row["error"] or "")
    )


def _keys(rows: list[dict[str, Any]]) -> list[str]:
    return [Path(row["key"]).name for row in rows]


def test_rows_say_what_records_and_files_say(run: Shell) -> None:
    done = run("grad-rollout", "photos", *TABLE, "table", "--save", "npy", "--json", "--class",
               "star", "--class", "top1", "--batch-size", "1")  # fmt: skip
    assert done.code == 0
    records = {record["source"]: record for record in done.records}
    rows = _rows()
    assert len(rows) == 12
    for row in rows:
        record = records[row["source"]]
        assert row["key"] == row["source"]
        assert row["predictions"] == record["predictions"]
        assert row["score_kind"] == record["score_kind"]
        assert json.loads(row["options"]) == record["run"]["options"]
        assert json.loads(row["versions"]) == record["run"]["versions"]
        assert row["weights_sha256"] == record["run"]["weights"]["sha256"]
        (output,) = [each for each in record["outputs"] if each["path"] in row["files"]]
        assert row["files"] == [output["path"]]
        assert f".{row['class_request']}." in output["path"]
        assert (row["class_index"], row["class_label"]) == (
            output["class_index"],
            output["class_label"],
        )
        leverage = output["sanity"].pop("leverage")
        assert row["diagnostics"] == {**output["sanity"], "gradient_norm_product": leverage}
        saved = np.load(output["path"])
        assert row["shape"] == list(saved.shape)
        assert np.array_equal(np.float32(row["relevance"]).reshape(row["shape"]), saved)
        assert (row["height"], row["width"], row["error"]) == (48, 64, None)


@pytest.mark.slow
def test_duckdb_pandas_and_polars_read_it(run: Shell) -> None:
    run("rollout", "photos", *TABLE, "table")
    frame = pd.read_parquet("maps.parquet").set_index("key").sort_index()
    others = polars.read_parquet("maps.parquet/*.parquet").sort("key")
    found = duckdb.sql(
        "select key, relevance from 'maps.parquet/*.parquet' order by key"
    ).fetchall()
    assert list(frame.index) == others["key"].to_list() == [key for key, _ in found]
    assert len(found) == len(NAMES)
    for row, other, (_, relevance) in zip(
        frame["relevance"], others["relevance"].to_list(), found, strict=True
    ):
        assert list(row) == other == relevance
        assert np.ptp(relevance) > 0
    assert others.schema["relevance"] == polars.List(polars.Float32)


def test_maps_of_heads_have_their_shape(run: Shell) -> None:
    assert run("attention", "photos/a.png", *TABLE, "table", "--save", "npy").code == 0
    (row,) = _rows()
    saved = np.load("vitviz-out/photos/a.png.attention.npy")
    assert len(saved.shape) == 4
    assert np.array_equal(np.float32(row["relevance"]).reshape(row["shape"]), saved)


def test_save_none_writes_no_file(run: Shell) -> None:
    done = run("rollout", "photos", *TABLE, "none")
    assert (done.code, done.out) == (0, b"")
    assert not Path("vitviz-out").exists()
    rows = _rows()
    assert {row["relevance"] is None and row["files"] == [] for row in rows} == {True}
    assert _keys(rows) == NAMES


@pytest.mark.slow
def test_rerun_skips_what_was_made_from_the_same_bytes_by_the_same_recipe(run: Shell) -> None:
    run("rollout", "photos", *TABLE, "none")
    before = _rows()
    shutil.copy("photos/b.png", "photos/a.png")
    again = run("rollout", "photos", *TABLE, "none", "--skip-existing", "--json")
    assert [record["status"] for record in again.records] == ["written"] + ["skipped"] * 5
    after = _rows()
    assert after[1:] == before[1:]
    assert after[0]["sha256"] == after[1]["sha256"] != before[0]["sha256"]
    other = run("rollout", "photos", *TABLE, "none", "--skip-existing", "--json", "--discard", "0")
    assert {record["status"] for record in other.records} == {"written"}
    assert _keys(_rows()) == NAMES  # replaced
    table = run("rollout", "photos", *TABLE, "table", "--skip-existing", "--json", "--discard", "0")
    assert {record["status"] for record in table.records} == {"written"}


@pytest.mark.slow
def test_rows_of_other_methods_and_images_stay(run: Shell) -> None:
    run("rollout", "photos/a.png", *TABLE, "none")
    run("rollout", "photos/b.png", *TABLE, "none")
    run("grad-rollout", "photos/a.png", *TABLE, "none", "--class", "star")
    run("grad-rollout", "photos/a.png", *TABLE, "none", "--class", "ring")
    run("rollout", "photos/a.png", *TABLE, "none")
    assert [(Path(r["key"]).name, r["method"], r["class_label"]) for r in _rows()] == [
        ("a.png", "rollout", None),
        ("a.png", "grad-rollout", "star"),
        ("a.png", "grad-rollout", "ring"),
        ("b.png", "rollout", None),
    ]


def test_skipping_looks_for_the_files_of_a_row(run: Shell) -> None:
    run("rollout", "photos", *TABLE, "overlay")
    Path("vitviz-out/photos/c.png.rollout.png").unlink()
    again = run("rollout", "photos", *TABLE, "overlay", "--skip-existing")
    assert again.paths == ["vitviz-out/photos/c.png.rollout.png"]
    assert _keys(_rows()) == NAMES


def test_failure_is_a_row_until_its_image_is_explained(run: Shell) -> None:
    Path("photos/b.png").write_bytes(b"no image")
    assert run("rollout", "photos", *TABLE, "none").code == 1
    (failed,) = [row for row in _rows() if row["error"]]
    assert (failed["key"], failed["error"]) == ("photos/b.png", "is no image that Pillow can read")
    assert run("rollout", "photos", *TABLE, "none", "--skip-existing").code == 1
    assert _keys(_rows()) == NAMES  # one failure, not two
    save_pictures(Path("photos"), ["b.png"])
    assert run("rollout", "photos", *TABLE, "none", "--skip-existing").code == 0
    assert _keys(_rows()) == NAMES
    assert not [row for row in _rows() if row["error"]]


def test_failure_leaves_what_there_was(run: Shell) -> None:
    run("rollout", "photos", *TABLE, "none")
    Path("photos/b.png").write_bytes(b"no image")
    assert run("rollout", "photos", *TABLE, "none").code == 1
    assert [row["error"] is None for row in _rows() if row["key"] == "photos/b.png"] == [
        True,
        False,
    ]


@pytest.mark.slow
def test_shards_fill_one_table(run: Shell) -> None:
    run("rollout", "photos", *TABLE, "table", "--batch-size", "1")
    for number in (1, 2, 3):
        run("rollout", "photos", "-m", "demo", "--save", "table", "--records", "parts.parquet",
            "--batch-size", "1", "--shard", f"{number}/3")  # fmt: skip
    assert _rows("parts.parquet") == _rows()
    again = run("rollout", "photos", "-m", "demo", "--save", "table", "--records", "parts.parquet",
                "--skip-existing", "--json")  # fmt: skip
    assert {record["status"] for record in again.records} == {"skipped"}


def test_names_that_are_no_text_are_spelt_out(run: Shell) -> None:
    Path("photos/a.png").rename(os.fsdecode(b"photos/\xff.png"))
    assert run("rollout", "photos", *TABLE, "none").code == 0
    assert "photos/\\xff.png" in {row["source"] for row in _rows()}
    again = run("rollout", "photos", *TABLE, "none", "--skip-existing", "--json")
    assert {record["status"] for record in again.records} == {"skipped"}


def test_rows_of_a_run_that_was_killed_before_it_took_old_ones_out(run: Shell) -> None:
    run("rollout", "photos", *TABLE, "none")
    (part,) = Path("maps.parquet").iterdir()
    shutil.copy(part, part.with_name("part-0.parquet"))
    assert len(_rows()) == 12
    run("rollout", "photos", *TABLE, "none", "--skip-existing")
    assert _keys(_rows()) == NAMES


def test_small_parts_are_one_table(run: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "_PART_BYTES", 1)
    monkeypatch.setattr(tables, "_GROUP_ROWS", 2)
    run("rollout", "photos", *TABLE, "table")
    assert len(list(Path("maps.parquet").iterdir())) == 3
    assert _keys(_rows()) == NAMES
    shutil.copy("photos/b.png", "photos/a.png")
    run("rollout", "photos", *TABLE, "table", "--skip-existing")
    assert _keys(_rows()) == NAMES


def test_rows_are_taken_out_only_when_others_are_in(
    run: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    run("rollout", "photos", *TABLE, "none")
    before = _rows()

    def fail(path: Path, *_: object) -> None:
        raise OutputError(f"{path} cannot be written: no reason")

    with monkeypatch.context() as patch:
        patch.setattr(tables, "write_own", fail)
        failed = run("rollout", "photos", *TABLE, "none")
    assert failed.code == 1
    assert "cannot be written" in failed.complaints[-1]
    assert _rows() == before


def test_row_that_cannot_be_written_is_a_failure(
    run: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "_GROUP_ROWS", 1)
    monkeypatch.setattr(tables, "_PART_BYTES", 1)
    run("rollout", "photos", *TABLE, "none")
    before = len(list(Path("maps.parquet").iterdir()))

    def fail(path: Path, *_: object) -> None:
        raise OutputError("no room") from OSError(28, "No space left on device")

    monkeypatch.setattr(tables, "write_own", fail)
    failed = run("rollout", "photos", *TABLE, "none")
    assert failed.code == 1
    assert "no room is left for maps.parquet" in failed.complaints[-1]
    assert len(list(Path("maps.parquet").iterdir())) == before


def _start(folder: Path, *, pause: float = 0.05) -> subprocess.Popen[bytes]:
    """Start a run whose parts are small, and which takes its time."""
    program = f"""
import sys, time
from vitviz.runs import rows, tables
tables._PART_SECONDS = 0.2
add = rows.RowWriter.add
def slowly(self, maps, result):
    time.sleep({pause})
    return add(self, maps, result)
rows.RowWriter.add = slowly
from vitviz.__main__ import main
sys.argv = ["vitviz", "rollout", "photos", "-m", "demo", "--save", "none", "--workers", "1",
            "--records", "maps.parquet", "--skip-existing", "--batch-size", "1", "--json"]
main()
"""
    return subprocess.Popen(
        [sys.executable, "-c", program], cwd=folder, stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip


def _wait_for_parts(folder: Path, count: int) -> None:
    for _ in range(600):
        if len(list(folder.glob("*.parquet"))) >= count:
            return
        time.sleep(0.1)
    raise TimeoutError(f"no {count} parts in {folder}")


@pytest.mark.slow
def test_kill_costs_a_part_and_a_rerun_makes_it_whole(tmp_path: Path) -> None:
    names = [f"{number:03}.png" for number in range(60)]
    save_pictures(tmp_path / "photos", names)
    killed = _start(tmp_path)
    _wait_for_parts(tmp_path / "maps.parquet", 2)
    killed.kill()
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL
    kept = _keys(_rows(tmp_path / "maps.parquet"))
    assert 2 <= len(kept) < len(names)
    rerun = _start(tmp_path, pause=0)
    records = [json.loads(line) for line in rerun.communicate(timeout=120)[0].splitlines()]
    assert rerun.returncode == 0
    skipped = [each["source"] for each in records if each["status"] == "skipped"]
    assert sorted(Path(each).name for each in skipped) == sorted(kept)
    assert _keys(_rows(tmp_path / "maps.parquet")) == names
    assert not list((tmp_path / "maps.parquet").glob(".*"))


@pytest.mark.slow
def test_interruption_loses_no_row_that_was_told(tmp_path: Path) -> None:
    save_pictures(tmp_path / "photos", [f"{number:03}.png" for number in range(60)])
    stopped = _start(tmp_path)
    _wait_for_parts(tmp_path / "maps.parquet", 1)
    stopped.terminate()
    told = [json.loads(line)["source"] for line in stopped.communicate(timeout=60)[0].splitlines()]
    assert stopped.returncode == 143
    assert sorted(told) == [row["source"] for row in _rows(tmp_path / "maps.parquet")]
    assert 0 < len(told) < 60


@pytest.mark.slow
def test_what_vitviz_did_not_write_is_left_alone(run: Shell) -> None:
    Path("maps.parquet").mkdir()
    pd.DataFrame({"key": ["photos/a.png"]}).to_parquet("maps.parquet/mine.parquet")
    content = Path("maps.parquet/mine.parquet").read_bytes()
    refused = run("rollout", "photos", *TABLE, "none")
    assert refused.code == 1
    assert "mine.parquet was not written by vitviz; choose another name" in refused.complaints[-1]
    Path("maps.parquet/mine.parquet").write_bytes(b"PAR1")
    refused = run("rollout", "photos", *TABLE, "none")
    assert "mine.parquet cannot be read" in refused.complaints[-1]
    shutil.rmtree("maps.parquet")
    Path("maps.parquet").write_bytes(content)
    refused = run("rollout", "photos", *TABLE, "none")
    assert "--records maps.parquet cannot be written to" in refused.complaints[-1]
    assert Path("maps.parquet").read_bytes() == content


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--save", "table"], "--records maps.parquet"),
        (["--save", "none"], "--save none leaves nothing"),
        (["--save", "none", "--save", "npy", "--json"], "none and npy are both given"),
        (["--records", "maps"], "ends in .parquet"),
        (["--save", "tabel"], "did you mean table?"),
    ],
)
def test_options_that_make_no_sense_are_refused(run: Shell, options: list[str], said: str) -> None:
    refused = run("rollout", "photos", "-m", "demo", *options)
    assert refused.code == 2
    assert said in refused.complaints[0]
    assert len(refused.complaints) == 1


def test_missing_pyarrow_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vitviz.runs.job.find_spec", lambda name: None)
    with pytest.raises(OptionError, match=r"pyarrow.*vitviz\[parquet\]"):
        require_parquet(Path("maps.parquet"))


def test_predictions_alone_need_no_table(run: Shell) -> None:
    done = run("rollout", "photos", "-m", "demo", "--save", "none", "--json")
    assert [record["outputs"] for record in done.records] == [[]] * 6
    assert all(record["predictions"] for record in done.records)


@pytest.mark.slow
def test_run_without_a_table_imports_no_pyarrow(tmp_path: Path) -> None:
    save_pictures(tmp_path, ["a.png"])
    program = (
        "import sys; from vitviz.cli.app import main\n"
        "try: main(['rollout', 'a.png', '-m', 'demo'])\n"
        "except SystemExit as left: assert left.code == 0\n"
        "assert not {'pyarrow', 'fsspec.core', 'ray'} & set(sys.modules), sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, check=True, timeout=120,
                   env={**os.environ, "PYTHONPATH": str(ROOT)})  # fmt: skip


def test_memory_does_not_grow_with_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "_PART_BYTES", 1 << 20)
    table = RecordsTable(tmp_path / "maps.parquet", "rollout", set())
    noise = np.random.default_rng(0)
    held = []
    for number in range(20_000):
        row = {"key": str(number), "relevance": noise.random(196, dtype=np.float32)}
        table.add([row])
        part = table._part
        held.append(len(part._waiting) * 196 * 4 + part.size if part else 0)
    table.close()
    assert max(held) < 3 << 20
    assert parquet.read_table(tmp_path / "maps.parquet", columns=["key"]).num_rows == 20_000
