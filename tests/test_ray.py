"""The engine of Ray: the same files and rows as this process makes, whoever dies meanwhile."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet

from fixtures_io import ROOT, Run, Shell, save_pictures
from tests.processes import descendants, is_actor
from vitviz.cli import explaining
from vitviz.errors import DeviceError, OptionError, OutputError
from vitviz.images.remarks import Tally
from vitviz.images.sources import Source, find_sources
from vitviz.images.stores import StoredObject
from vitviz.methods.method import Method
from vitviz.methods.table import METHODS
from vitviz.models.model import Model, load_model
from vitviz.options import OutputKind, PictureOptions
from vitviz.runs import cluster, pipeline, ray_engine
from vitviz.runs.cluster import Actors, shared_out
from vitviz.runs.job import Job
from vitviz.runs.ray_actors import Actor, Order, Report
from vitviz.runs.records import Result

cloudpickle = pytest.importorskip("ray.cloudpickle")
NAMES = [f"{name}.png" for name in "abcdefghij"]
ACTORS = Actors(count=2, cores=1)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def demo() -> Model:
    return load_model("demo", device="cpu")


@pytest.fixture(autouse=True)
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None) -> None:
    monkeypatch.chdir(tmp_path)
    save_pictures(Path("photos"), NAMES)


def _sources() -> list[Source]:
    return find_sources(["photos"])[0]


def _rows(folder: str) -> list[dict[str, Any]]:
    rows = parquet.read_table(folder).to_pylist()
    for row in rows:
        row["files"] = [Path(each).name for each in row["files"] or ()]
    return sorted(rows, key=lambda row: (row["key"], row["class_request"] or ""))


def _assert_same(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    numbers = ("relevance", "predictions", "diagnostics", "class_score")
    for one, other in zip(found, expected, strict=True):
        assert {k: v for k, v in one.items() if k not in numbers} == {
            k: v for k, v in other.items() if k not in numbers
        }
        if other["relevance"]:
            ours, theirs = np.array(one["relevance"]), np.array(other["relevance"])
            assert np.abs(ours - theirs).max() <= 1e-5 * np.ptp(theirs)


class _Cluster:
    """Does what Ray does with blocks, in this process and in the order of ``plan``.

    Attributes:
        plan: What becomes of a block at each attempt: how many reports arrive before its actor
            dies; -1: all.
    """

    def __init__(self, plan: dict[int, int] | None = None) -> None:
        self.plan = plan or {}
        self.sizes: list[int] = []

    def reports(self, order: Order, blocks: Iterator[Any], count: int, ahead: int) -> Any:
        sent = cloudpickle.dumps(order)  # as Ray pickles it
        for columns in blocks:
            self.sizes.append(len(columns["place"]))
            actor = Actor(lambda: pickle.loads(sent))
            arrive = self.plan.get(columns["place"][0], -1)
            reports = actor(pa.table({**columns, "recipes": columns["recipes"]}))
            for number, sent_back in enumerate(reports):
                if number == arrive:
                    break
                yield pickle.loads(sent_back["report"][0])


@pytest.fixture
def ray_cluster(monkeypatch: pytest.MonkeyPatch) -> _Cluster:
    made = _Cluster()
    monkeypatch.setattr(ray_engine, "_reports", made.reports)
    return made


def _job(method: Method, name: str, **more: Any) -> Job:
    pictures = PictureOptions(kinds=(OutputKind.OVERLAY, OutputKind.NPY))
    return Job(
        method=method, pictures=pictures, output=Path(name), records=Path(f"{name}.parquet"),
        table=True, batch_size=2, **more,
    )  # fmt: skip


def _told(results: Iterator[Result]) -> Counter[tuple[str, str]]:
    return Counter((result.source.key, result.status) for result in results)


@pytest.mark.parametrize("name", METHODS)
def test_actors_make_what_this_process_makes(name: str, demo: Model, ray_cluster: _Cluster) -> None:
    method = METHODS[name]()
    expected = _told(pipeline.run(demo, _sources(), _job(method, "one")))
    found = _told(ray_engine.run(demo, _sources(), _job(method, "many"), actors=ACTORS))
    assert found == expected
    assert ray_cluster.sizes == [5, 5]
    _assert_same(_rows("many.parquet"), _rows("one.parquet"))
    files = {path.relative_to("one") for path in Path("one").rglob("*") if path.is_file()}
    assert files == {path.relative_to("many") for path in Path("many").rglob("*") if path.is_file()}
    for path in files:
        if path.suffix == ".npy":
            one, many = np.load("one" / path), np.load("many" / path)
            assert np.abs(one - many).max() <= 1e-5 * np.ptp(one)


@pytest.mark.parametrize("arrive", [0, 1, 3])
def test_block_that_is_lost_is_made_again_and_nothing_twice(
    arrive: int, demo: Model, ray_cluster: _Cluster
) -> None:
    ray_cluster.plan = {5: arrive}
    job = _job(METHODS["relevance"](), "out")
    results = []
    for result in ray_engine.run(demo, _sources(), job, actors=ACTORS):
        results.append(result)
        if len(results) == 6:
            ray_cluster.plan = {}
    if arrive == 0:  # dies each time: at that image alone, in the end
        assert _told(iter(results)) == Counter(
            {(f"photos/{name}", "failed" if name == "f.png" else "written"): 1 for name in NAMES}
        )
        (failed,) = [row for row in _rows("out.parquet") if row["error"]]
        assert failed["key"] == "photos/f.png"
        assert "died" in failed["error"]
    else:
        assert _told(iter(results)) == Counter({(f"photos/{name}", "written"): 1 for name in NAMES})
    assert [Path(row["key"]).name for row in _rows("out.parquet")] == NAMES


def test_rerun_skips_by_rows_and_replaces_them(demo: Model, ray_cluster: _Cluster) -> None:
    def told(**more: Any) -> Counter[str]:
        job = _job(METHODS["rollout"](), "out", **more)
        return Counter(r.status for r in ray_engine.run(demo, _sources(), job, actors=ACTORS))

    assert told() == {"written": 10}
    Path("photos/c.png").write_bytes(b"poison")
    assert told(skip_existing=True) == {"skipped": 9, "failed": 1}
    assert len(_rows("out.parquet")) == 11
    save_pictures(Path("photos"), ["c.png"])
    assert told(skip_existing=True) == {"skipped": 9, "written": 1}
    assert told() == {"written": 10}
    assert [Path(row["key"]).name for row in _rows("out.parquet")] == NAMES


def test_store_that_fails_every_tenth_read_loses_nothing(
    demo: Model, ray_cluster: _Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fsspec.implementations.memory import MemoryFileSystem

    store, reads = MemoryFileSystem(), Counter[str]()
    for path in Path("photos").iterdir():
        store.pipe(f"/photos/{path.name}", path.read_bytes())
    cat = MemoryFileSystem.cat_file

    def flaky(self: Any, path: str, **part: Any) -> Any:
        reads["all"] += 1
        if reads["all"] % 10 == 1:
            raise TimeoutError("the store does not answer")
        return cat(self, path, **part)

    monkeypatch.setattr(MemoryFileSystem, "cat_file", flaky)
    sources = find_sources([StoredObject(f"memory://photos/{name}") for name in NAMES])[0]
    job = _job(METHODS["rollout"](), "out")
    results = _told(ray_engine.run(demo, sources, job, actors=ACTORS))
    assert set(results.values()) == {1}
    assert {status for _, status in results} == {"written"}
    assert reads["all"] > len(NAMES)


def test_mistake_in_an_actor_is_told_as_it_is(
    demo: Model, ray_cluster: _Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vitviz.runs.ray_actors.explained", lambda *words: 1 / 0)
    with (
        pytest.raises(RuntimeError, match="ZeroDivisionError"),
        closing(ray_engine.run(demo, _sources(), Job(), actors=ACTORS)) as results,
    ):
        next(results)


def test_images_are_told_of_before_a_table_that_cannot_be_written(
    demo: Model, ray_cluster: _Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    def close(table: object) -> None:
        raise OutputError("no room")

    monkeypatch.setattr("vitviz.runs.ray_actors.BlockTable.close", close)
    results = ray_engine.run(demo, _sources(), _job(METHODS["rollout"](), "out"), actors=ACTORS)
    told = []
    with pytest.raises(OutputError, match="no room"):
        told.extend(result.source.key for result in results)
    assert len(told) == ray_cluster.sizes[0]


def test_reports_of_one_block_are_counted_once(
    demo: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = Result(source=_sources()[0], status="failed", error="no")
    block = [Report(block=0, results=((0, result),)), Report(block=0, tally=Tally())]
    monkeypatch.setattr(ray_engine, "_reports", lambda *words: iter(block * 2))
    assert len(list(ray_engine.run(demo, _sources()[:1], Job(), actors=ACTORS))) == 1


@pytest.mark.parametrize(
    ("nodes", "count", "device", "expected"),
    [
        ([{"CPU": 16}], None, "auto", Actors(count=4, cores=4)),
        ([{"CPU": 2}], None, "auto", Actors(count=1, cores=2)),
        ([{"CPU": 16}, {"CPU": 6}, {}], None, "cpu", Actors(count=5, cores=4)),
        ([{"CPU": 4}, {"CPU": 4}], 3, "cpu", Actors(count=3, cores=2)),
        ([{"CPU": 1}, {"CPU": 64}], None, "cpu", Actors(count=16, cores=4)),
        ([{"CPU": 16, "GPU": 2}, {"CPU": 8}], None, "auto", Actors(count=2, cores=8, on_gpu=True)),
        ([{"CPU": 16, "GPU": 2}], 1, "cpu", Actors(count=1, cores=16)),
    ],
)
def test_cluster_is_shared_out(
    nodes: list[dict[str, float]], count: int | None, device: str, expected: Actors
) -> None:
    assert shared_out(nodes, count, device) == expected


def test_cluster_that_has_less_is_refused() -> None:
    with pytest.raises(OptionError, match="--actors is 5, but the cluster has 4 cores"):
        shared_out([{"CPU": 4}], 5, "auto")
    with pytest.raises(OptionError, match="--actors is 3, but the cluster has 2 GPUs"):
        shared_out([{"CPU": 4, "GPU": 2}], 3, "auto")
    with pytest.raises(DeviceError, match="has no GPU"):
        shared_out([{"CPU": 4}], None, "cuda")
    with pytest.raises(OptionError, match="give auto, cpu or cuda"):
        shared_out([{"CPU": 4}], None, "cuda:1")


def test_options_that_do_not_go_together_are_refused(
    capfdbinary: pytest.CaptureFixture[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Shell(capfdbinary, monkeypatch)
    done = run("rollout", "photos", "-m", "demo", "--actors", "2")
    assert (done.code, done.complaints) == (
        2, ["Error: --actors is for clusters; add --engine ray"],
    )  # fmt: skip
    monkeypatch.setattr(cluster, "find_spec", lambda name: None)
    done = run("rollout", "photos", "-m", "demo", "--engine", "ray")
    assert done.code == 2
    assert done.complaints == [
        "Error: --engine ray needs ray, which is not installed; try pip install 'vitviz[ray]'"
    ]


@pytest.mark.parametrize(
    "words",
    [
        ["compare", "--methods", "rollout", "--methods", "relevance"],
        ["features"],
        ["similarity", "--patch", "1,1"],
        ["relevance", "--report"],
    ],
    ids=lambda words: words[0],
)
def test_commands_that_do_more_than_explain_run_on_actors(
    words: list[str],
    ray_cluster: _Cluster,
    capfdbinary: pytest.CaptureFixture[bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(explaining, "joined", lambda *words: nullcontext(ACTORS))
    monkeypatch.setattr(explaining, "require_ray", lambda: None)
    run = Shell(capfdbinary, monkeypatch)
    command = [words[0], "photos/a.png", "photos", "-m", "demo", *words[1:], "--json"]
    one = run(*command, "-o", "one")
    many = run(*command, "-o", "many", "--engine", "ray")
    assert (one.code, many.code) == (0, 0), many.err
    assert "Using Ray: 2 actors, each with 1 core" in many.err
    files = {path.relative_to("one") for path in Path("one").rglob("*")}
    assert files == {path.relative_to("many") for path in Path("many").rglob("*")}
    pngs = [path for path in files if path.suffix == ".png"]
    assert len(pngs) == len(NAMES) == len(many.records)
    for path in pngs:
        pictures = (np.asarray(Image.open(folder / path), int) for folder in ("one", "many"))
        assert np.abs(np.subtract(*pictures)).max() <= 1


@pytest.mark.skipif(sys.platform != "linux", reason="finds actors in /proc")
def test_real_cluster_survives_the_death_of_an_actor(
    capfdbinary: pytest.CaptureFixture[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    save_pictures(Path("photos"), [f"{number:03}.png" for number in range(140)])
    Path("photos/poison.png").write_bytes(b"poison")
    words = ["relevance", "photos", "-m", "demo", "--save", "table", "--batch-size", "1"]
    command = [sys.executable, "-m", "vitviz", *words, "--engine", "ray", "--actors", "2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with Path("out").open("wb") as out, Path("err").open("wb") as err:
        child = subprocess.Popen(
            [*command, "--records", "many.parquet", "--json"],
            stdout=out, stderr=err, env=environment,
        )  # fmt: skip
        try:
            deadline = time.monotonic() + 200
            while not Path("out").stat().st_size:
                assert child.poll() is None, Path("err").read_text()
                assert time.monotonic() < deadline
                time.sleep(0.02)
            actors = [each for each in descendants(child.pid) if is_actor(each)]
            os.kill(actors[0].number, signal.SIGKILL)
            code = child.wait(timeout=200)
        finally:
            child.kill()
    told = Run(code=code, out=Path("out").read_bytes(), err=Path("err").read_text())
    assert told.code == 1, told.err
    sources = [record["source"] for record in told.records]
    assert len(sources) == len(set(sources)) == 151
    assert [r["source"] for r in told.records if r["status"] != "written"] == ["photos/poison.png"]
    assert all(line.startswith(("failed: photos/poison.png", "150 written, 0 skipped, 1 failed"))
               for line in told.complaints), told.err  # fmt: skip
    one = Shell(capfdbinary, monkeypatch)(*words, "--records", "one.parquet")
    assert one.code == 1
    _assert_same(_rows("many.parquet"), _rows("one.parquet"))
