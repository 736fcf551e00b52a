"""A run at scale, measured, killed and fed by a bad store: ``make scale``."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from PIL import Image
from pyarrow import parquet
from rich.console import Console

from tests.processes import Process, descendants, is_actor, is_alive

_ROOT = Path(__file__).parents[1]
_CLUSTER = "--engine", "ray"
_TABLE = "--save", "table", "--records"
_WARM = 0.2  # share of a run after which memory and throughput are looked at
_console = Console(highlight=False, soft_wrap=True)
_broken: list[str] = []


@dataclass
class Command:
    """A running command of vitviz: what it has told, and what it and its workers use."""

    process: subprocess.Popen[bytes]
    told: list[tuple[float, dict[str, Any]]] = field(default_factory=list)
    used: list[tuple[float, list[Process]]] = field(default_factory=list)
    begun: float = field(default_factory=time.monotonic)
    ended: float = 0.0

    @classmethod
    def start(cls, *words: str, threads: int | None = None, **environment: str) -> Command:
        """Start it, in the folder where this process is."""
        known = {"OMP_WAIT_POLICY": "PASSIVE", **os.environ, "PYTHONPATH": str(_ROOT)}
        if threads:
            known["OMP_NUM_THREADS"] = str(threads)
        line = [sys.executable, "-m", "vitviz", "rollout", *words, "-m", "demo", "--json", "-q"]
        process = subprocess.Popen(line, stdout=subprocess.PIPE, env={**known, **environment})
        command = cls(process)
        for target in (command._listen, command._watch):
            threading.Thread(target=target, daemon=True).start()
        return command

    def wait(self) -> Command:
        """Wait until it has ended."""
        self.process.wait()
        self.ended = time.monotonic()
        time.sleep(0.5)  # for what it said last
        return self

    def wait_for(self, results: int) -> None:
        """Wait until it has told of some images."""
        while len(self.told) < results and self.process.poll() is None:
            time.sleep(0.01)

    @property
    def statuses(self) -> Counter[str]:
        """How many images ended how."""
        return Counter(record["status"] for _, record in self.told)

    @property
    def seconds(self) -> float:
        """How long it took."""
        return self.ended - self.begun

    @property
    def rate(self) -> float:
        """Images a second, once it was warm."""
        first = int(_WARM * len(self.told))
        return (len(self.told) - first) / (self.told[-1][0] - self.told[first][0])

    @property
    def cpu(self) -> float:
        """Seconds of computing an image, once it was warm, of all its processes."""
        first = int(_WARM * len(self.told))
        early = max(at for at, _ in self.used if at <= self.told[first][0])
        highest: dict[int, float] = {}
        before: dict[int, float] = {}
        for at, processes in self.used:
            for each in processes:
                highest[each.number] = each.cpu
                if at <= early:
                    before[each.number] = each.cpu
        used = sum(highest.values()) - sum(before.values())
        last = self.used[-1][0]
        return used / sum(early < at <= last for at, _ in self.told)

    def memory(self, kind: Callable[[Process], bool]) -> tuple[float, float]:
        """Return the most memory of one process of a kind, in MB: in the middle, and at the end."""
        begin, end = self.told[int(_WARM * len(self.told))][0], self.told[-1][0]
        middle = (begin + end) / 2
        halves: tuple[list[int], list[int]] = [], []
        for at, processes in self.used:
            if begin <= at <= end:
                halves[at > middle].extend(each.memory for each in processes if kind(each))
        return max(halves[0], default=0) / 1e6, max(halves[1], default=0) / 1e6

    def _listen(self) -> None:
        for line in self.process.stdout or ():
            self.told.append((time.monotonic(), json.loads(line)))

    def _watch(self) -> None:
        while self.process.poll() is None:
            self.used.append((time.monotonic(), descendants(self.process.pid)))
            time.sleep(0.5)


def measure(
    images: Annotated[int, typer.Option(help="How many the long runs explain.")] = 20_000,
    few: Annotated[int, typer.Option(help="How many those explain that are disturbed.")] = 2_000,
) -> None:
    """Prove and measure runs of many small images with the bundled model, here and on Ray."""
    with tempfile.TemporaryDirectory(prefix="vitviz-scale-") as folder:
        os.chdir(folder)
        _paint(Path("photos"), images)
        _paint(Path("few"), few)
        _compare(images)
        _kill_actor(few)
        _lose_node(few)
        _end_driver(few, signal.SIGKILL, -9)
        _end_driver(few, signal.SIGINT, 130)
        _read_badly(few)
        os.chdir(_ROOT)
    if _broken:
        _console.print("[red]does not hold:[/red]", "; ".join(_broken))
        raise typer.Exit(1)


def _compare(images: int) -> None:
    """Compare engines and outputs at the same number of threads, and runs that skip all."""
    threads = min(4, len(os.sched_getaffinity(0)))
    cluster = (*_CLUSTER, "--actors", "1")

    def run(*words: str) -> Command:
        done = Command.start("photos", *words, threads=threads).wait()
        _require(len(done.told) == images, f"{' '.join(words)}: all {images:,} images")
        return done

    here = run("--save", "none")
    table = run(*_TABLE, "here.parquet")
    ray = run(*cluster, *_TABLE, "ray.parquet")
    cores = f"{threads} cores"
    _say(f"embedded, no output: {here.rate:.0f} images/s, {here.cpu * 1e3:.1f} ms of CPU an image")
    _say(f"embedded, table: {table.rate:.0f} images/s, {table.cpu * 1e3:.1f} ms of CPU an image")
    _say(f"1 actor of {cores}, table: {ray.rate:.0f} images/s, {ray.cpu * 1e3:.1f} ms of CPU")
    _say(f"table ÷ no output: {table.rate / here.rate:.2f} (by CPU {here.cpu / table.cpu:.2f})")
    _say(f"Ray ÷ embedded: {ray.rate / table.rate:.2f} (by CPU {table.cpu / ray.cpu:.2f})")
    _require(table.cpu <= 1.05 * here.cpu, "a table costs at most 5 %")
    _require(table.cpu >= 0.8 * ray.cpu, "Ray has .8 of the throughput a core")
    _tell_memory(table, "embedded", lambda each: each.number == table.process.pid)
    _tell_memory(ray, "driver", lambda each: each.number == ray.process.pid)
    _tell_memory(ray, "actor", is_actor)
    for name, words in {
        "embedded": (*_TABLE, "here.parquet"),
        "Ray": (*cluster, *_TABLE, "ray.parquet"),
    }.items():
        skipped = run(*words, "--skip-existing")
        _require(skipped.statuses == {"skipped": images}, f"{name}: rerun skips all")
        _say(f"{name}, rerun that skips all: {skipped.seconds:.0f} s")
        _require(skipped.seconds <= 30, f"{name}: rerun takes at most 30 s")


def _kill_actor(images: int) -> None:
    run = Command.start("few", *_CLUSTER, "--actors", "2", *_TABLE, "actor.parquet")
    run.wait_for(images // 4)
    victims = [each for each in descendants(run.process.pid) if is_actor(each)]
    os.kill(victims[0].number, signal.SIGKILL)
    _require(run.wait().process.returncode == 0, "exit code 0 after the death of an actor")
    _require(_once(run, images, "actor.parquet"), "a killed actor costs no image, doubles none")


def _lose_node(images: int) -> None:
    """Join a cluster of two nodes, of which one goes in mid-run."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    node = cluster.add_node(num_cpus=1)
    run = Command.start("few", *_CLUSTER, "--ray-address", cluster.address, *_TABLE, "node.parquet")
    run.wait_for(images // 4)
    cluster.remove_node(node, allow_graceful=False)
    run.wait()
    cluster.shutdown()
    _require(run.process.returncode == 0, "exit code 0 after the loss of one node of two")
    _require(_once(run, images, "node.parquet"), "a lost node costs no image, doubles none")


def _end_driver(images: int, number: signal.Signals, code: int) -> None:
    """End the driver in mid-run: its actors end, too, and a rerun finishes the rest."""
    table = f"{number.name}.parquet"
    words = "few", *_CLUSTER, "--actors", "2", *_TABLE, table
    first = Command.start(*words)
    first.wait_for(images // 2)
    actors = [each for each in descendants(first.process.pid) if is_actor(each)]
    first.process.send_signal(number)
    first.wait()
    while any(is_alive(each.number) for each in actors) and time.monotonic() < first.ended + 60:
        time.sleep(0.1)
    took = time.monotonic() - first.ended
    _require(took < 60, f"driver ended by {number.name}; its actors, {took:.1f} s later")
    _require(first.process.returncode == code, f"its exit code is {code}")
    again = Command.start(*words, "--skip-existing").wait()
    _require(again.statuses["skipped"] > 0, f"rerun skips what was done: {dict(again.statuses)}")
    _require(_once(again, images, table), "and finishes the rest")


def _read_badly(images: int) -> None:
    with _bad_store(Path("few")) as (environment, reads):
        words = "s3://pets/few/", *_CLUSTER, "--actors", "2", *_TABLE, "store.parquet"
        run = Command.start(*words, **environment).wait()
    _say(f"store: {reads['all']:,} requests for {images:,} images, {reads['failed']:,} failed, "
         f"{reads['stalled']} stalled")  # fmt: skip
    _require(run.statuses == {"written": images}, "a store that fails every tenth read")
    _require(_once(run, images, "store.parquet"), "loses nothing and doubles nothing")


@contextmanager
def _bad_store(photos: Path) -> Iterator[tuple[dict[str, str], Counter[str]]]:
    """Serve pictures by S3 on loopback, but fail every tenth read, and stall at the 500th."""
    import boto3
    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import WSGIRequestHandler, make_server

    good = DomainDispatcherApplication(create_backend_app)
    reads: Counter[str] = Counter()

    class Silent(WSGIRequestHandler):
        def log(self, *words: object) -> None:
            pass

    def bad(environ: dict[str, Any], start: Any) -> Any:
        if environ["REQUEST_METHOD"] == "GET" and environ["PATH_INFO"].endswith(".jpg"):
            reads["all"] += 1
            if reads["all"] == 500:
                reads["stalled"] += 1
                time.sleep(90)
            if reads["all"] % 10 == 0:
                reads["failed"] += 1
                start("500 Internal Server Error", [])
                return [b""]
        return good(environ, start)

    server = make_server("127.0.0.1", 0, bad, threaded=True, request_handler=Silent)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    environment = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.server_port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    os.environ.update(environment)
    client = boto3.client("s3")
    client.create_bucket(Bucket="pets")
    for path in photos.iterdir():
        client.put_object(Bucket="pets", Key=f"few/{path.name}", Body=path.read_bytes())
    yield environment, reads
    server.shutdown()


def _once(run: Command, images: int, table: str) -> bool:
    """Tell whether each image was told of once, and has one row."""
    told = Counter(record["source"] for _, record in run.told)
    rows = Counter(parquet.read_table(table, columns=["key"]).column("key").to_pylist())
    return len(told) == len(rows) == images and set(told.values()) == set(rows.values()) == {1}


def _tell_memory(run: Command, name: str, kind: Callable[[Process], bool]) -> None:
    middle, end = run.memory(kind)
    _say(f"memory, {name}: at most {middle:.0f} MB in the first half, {end:.0f} MB in the second")
    _require(end <= 1.1 * middle + 20, f"memory of {name} is flat")


def _paint(folder: Path, count: int) -> None:
    """Save small pictures, no two alike."""
    folder.mkdir()
    random = np.random.default_rng(0)
    for number in range(count):
        pixels = random.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((96, 96)).save(folder / f"{number:06}.jpg")


def _say(text: str) -> None:
    _console.print(f"{time.strftime('%H:%M:%S')}  {text}")


def _require(holds: bool, what: str) -> None:
    if not holds:
        _broken.append(what)
    _say(f"{'holds' if holds else '[red]does not hold[/red]'}: {what}")


if __name__ == "__main__":
    typer.run(measure)
