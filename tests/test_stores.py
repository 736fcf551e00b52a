"""Images that are no local files: in stores, on web servers, in archives, named by lists."""

from __future__ import annotations

import io
import os
import tarfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from moto.server import ThreadedMotoServer
from pyarrow import parquet

from fixtures_io import Shell, save_pictures
from vitviz.errors import ImageError, SourceError
from vitviz.images import archives, stores
from vitviz.images.decoding import read_file
from vitviz.images.sources import find_sources
from vitviz.images.stores import StoredObject, safe_key

NAMES = [f"{number:02}.png" for number in range(12)]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning:(botocore|moto|s3fs).*"),
]


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """Be in a folder with pictures; return their contents by name."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(stores, "_PAUSE", 0.01)
    save_pictures(tmp_path / "photos", NAMES)
    return {name: (tmp_path / "photos" / name).read_bytes() for name in NAMES}


@pytest.fixture
def run(
    photos: dict[str, bytes],
    capfdbinary: pytest.CaptureFixture[bytes],
    monkeypatch: pytest.MonkeyPatch,
    one_thread: None,
) -> Shell:
    """Run vitviz in this process."""
    return Shell(capfdbinary, monkeypatch)


class _Handler(SimpleHTTPRequestHandler):
    """Serves files, some of them badly."""

    requests: Counter[str] = Counter()
    trouble: Callable[[int], str] = staticmethod(lambda number: "")

    def do_GET(self) -> None:  # noqa: N802 (http.server's name)
        self.requests["all"] += 1
        trouble = type(self).trouble(self.requests["all"])
        if trouble == "503":
            self.send_error(503)
        elif trouble == "broken":
            self.send_response(200)
            self.send_header("Content-Length", "1000000")
            self.end_headers()
            self.wfile.write(b"half")
            self.close_connection = True
        elif trouble == "stall":
            time.sleep(2)
            self.close_connection = True
        else:
            super().do_GET()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def web(photos: dict[str, bytes], tmp_path: Path) -> Iterator[tuple[str, type[_Handler]]]:
    """Serve the folder on loopback."""

    class Handler(_Handler):
        requests = Counter()

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=os.fspath(tmp_path)))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", Handler
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def bucket(photos: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Give a bucket of an S3 server on loopback that holds the pictures."""
    import boto3
    import s3fs

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()
    client = boto3.client("s3")
    client.create_bucket(Bucket="pets")
    for name, content in photos.items():
        client.put_object(Bucket="pets", Key=f"photos/{name}", Body=content)
    client.put_object(Bucket="pets", Key="photos/readme.txt", Body=b"no image")
    yield client
    s3fs.S3FileSystem.clear_instance_cache()
    server.stop()


def _digests(sources: list[Any]) -> dict[str, str]:
    return {source.key: read_file(source).digest for source in sources}


def _of_files(prefix: str) -> dict[str, str]:
    found, _ = find_sources(["photos"])
    return {f"{prefix}/{source.path.name}": read_file(source).digest for source in found}


def test_bucket_is_a_source_like_a_folder(run: Shell, bucket: Any) -> None:
    assert run("rollout", "photos", "-m", "demo", "-o", "files", "--batch-size", "1").code == 0
    done = run("rollout", "s3://pets/photos", "-m", "demo", "--json", "--batch-size", "1")
    assert done.code == 0, done.err
    assert [record["source"] for record in done.records] == [f"s3://pets/photos/{n}" for n in NAMES]
    for record in done.records:
        (output,) = record["outputs"]
        name = Path(output["path"]).name
        assert output["path"] == f"vitviz-out/pets/photos/{name}"
        local = Path("files/photos", name).read_bytes()
        assert _pixels(local) == _pixels(Path(output["path"]).read_bytes())
    again = run("rollout", "s3://pets/photos", "-m", "demo", "--json", "--skip-existing")
    assert {record["status"] for record in again.records} == {"skipped"}


def _pixels(content: bytes) -> bytes:
    from PIL import Image

    return Image.open(io.BytesIO(content)).tobytes()


@pytest.mark.parametrize(
    ("url", "names"),
    [
        ("s3://pets/photos/", NAMES),
        ("s3://pets", NAMES),
        ("s3://pets/photos/03.png", ["03.png"]),
        ("s3://pets/photos/0[1-3].png", NAMES[1:4]),
        ("s3://pets/none", []),
    ],
)
def test_urls_stand_for_objects_folders_and_globs(bucket: Any, url: str, names: list[str]) -> None:
    found, fruitless = find_sources([url])
    if not names:  # taken for an object, as a path is for a file
        with pytest.raises(ImageError, match="no such file"):
            read_file(found[0])
        return
    assert [source.name for source in found] == [f"s3://pets/photos/{name}" for name in names]
    assert not fruitless


def test_shards_of_a_bucket_are_the_whole(run: Shell, bucket: Any) -> None:
    keys: list[str] = []
    for number in (1, 2):
        done = run("rollout", "s3://pets/photos", "-m", "demo", "--json", "--shard", f"{number}/2")
        keys += [record["source"] for record in done.records]
    assert sorted(keys) == [f"s3://pets/photos/{name}" for name in NAMES]


def test_web_server_is_a_source(run: Shell, web: tuple[str, type[_Handler]]) -> None:
    url, _ = web
    done = run("rollout", f"{url}/photos/01.png", f"{url}/photos/none.png", "-m", "demo", "--json")
    good, bad = done.records
    assert good["outputs"][0]["path"].endswith("/photos/01.png.rollout.png")
    assert (bad["status"], done.code) == ("failed", 1)
    assert "cannot be read: no such file" in bad["error"]


@pytest.mark.parametrize("trouble", ["503", "broken", "stall"])
def test_store_that_fails_each_fourth_read_loses_nothing(
    run: Shell, web: tuple[str, type[_Handler]], monkeypatch: pytest.MonkeyPatch, trouble: str
) -> None:
    url, handler = web
    monkeypatch.setattr(stores, "_PATIENCE", 0.5)
    handler.trouble = staticmethod(lambda number: "" if number % 4 else trouble)
    urls = [f"{url}/photos/{name}" for name in NAMES]
    done = run("rollout", *urls, "-m", "demo", "--save", "none", "--json")
    assert {record["status"] for record in done.records} == {"written"}, done.err
    assert handler.requests["all"] > len(NAMES)


def test_store_that_always_fails_is_a_failed_record(
    run: Shell, web: tuple[str, type[_Handler]]
) -> None:
    url, handler = web
    handler.trouble = staticmethod(lambda number: "503")
    done = run("rollout", f"{url}/photos/01.png", "-m", "demo", "--json")
    assert done.code == 1
    (record,) = done.records
    assert "cannot be read after 5 attempts: 503" in record["error"]
    assert handler.requests["all"] == 5


def test_reads_are_concurrent_and_bounded(
    run: Shell, web: tuple[str, type[_Handler]], monkeypatch: pytest.MonkeyPatch
) -> None:
    url, _ = web
    running, most, lock = 0, 0, threading.Lock()
    read = StoredObject.read

    def counted(self: StoredObject) -> bytes:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.1)
        try:
            return read(self)
        finally:
            with lock:
                running -= 1

    monkeypatch.setattr(StoredObject, "read", counted)
    urls = [f"{url}/photos/{name}?copy={copy}" for copy in range(4) for name in NAMES]
    done = run("rollout", *urls, "-m", "demo", "--save", "none", "--json")
    assert len(done.records) == 48
    assert 8 < most <= 16


def test_unknown_store_and_missing_package_are_one_line(
    run: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    unknown = run("rollout", "nosuch://bucket/a.png", "-m", "demo")
    assert unknown.code == 2
    assert len(unknown.complaints) == 1
    assert "nosuch://bucket/a.png cannot be opened" in unknown.complaints[0]

    def missing(scheme: str) -> None:
        raise ImportError("Install s3fs")

    monkeypatch.setattr("fsspec.filesystem", missing)
    refused = run("rollout", "s3://bucket/a.png", "-m", "demo")
    assert refused.complaints == [
        "Error: s3:// needs s3fs, which is not installed; try pip install 'vitviz[remote]'"
    ]


def _tar(path: Path, entries: list[tuple[str, bytes]], kind: bytes = tarfile.REGTYPE) -> Path:
    with tarfile.open(path, "a" if path.exists() else "w") as tar:
        for name, content in entries:
            info = tarfile.TarInfo(name)
            info.type, info.size, info.linkname = kind, len(content), "/etc/passwd"
            tar.addfile(info, io.BytesIO(content))
    return path


def test_tar_is_read_in_order_without_unpacking(run: Shell, photos: dict[str, bytes]) -> None:
    entries = [(f"./s{name}", content) for name, content in reversed(photos.items())]
    beside = [(name.replace(".png", ".cls"), b"3") for name, _ in entries]
    _tar(Path("shard.tar"), [each for pair in zip(entries, beside, strict=True) for each in pair])
    done = run("rollout", "shard.tar", "-m", "demo", "--save", "none", "--json")
    assert [each["source"] for each in done.records] == [f"shard.tar/{name}" for name, _ in entries]
    assert done.code == 0
    assert sorted(each.name for each in Path().iterdir()) == ["photos", "shard.tar"]
    found, _ = find_sources(["*.tar"])
    expected = {key.replace("/", "/s"): value for key, value in _of_files("shard.tar").items()}
    assert _digests(found) == expected
    twice, _ = find_sources(["shard.tar", "./shard.tar", Path("shard.tar").absolute()])
    assert [each.key for each in twice] == [each.key for each in found]


def test_tar_in_stores_is_read_by_parts(
    bucket: Any, web: tuple[str, type[_Handler]], photos: dict[str, bytes]
) -> None:
    content = _tar(Path("shard.tar"), list(photos.items())).read_bytes()
    bucket.put_object(Bucket="pets", Key="shards/shard.tar", Body=content)
    in_bucket, _ = find_sources(["s3://pets/shards/*.tar"])
    assert _digests(in_bucket) == _of_files("pets/shards/shard.tar")
    url, _ = web  # which sends no parts, but always all of a file
    on_web, _ = find_sources([f"{url}/shard.tar"])
    assert _digests(on_web) == _of_files(f"{url.removeprefix('http://')}/shard.tar")


def test_hostile_members_are_harmless(run: Shell, photos: dict[str, bytes]) -> None:
    image = photos["01.png"]
    tar = _tar(Path("bad.tar"), [("../../up.png", image), ("/etc/root.png", image)])
    _tar(tar, [("link.png", b"")], tarfile.SYMTYPE)
    _tar(tar, [("hard.png", b"")], tarfile.LNKTYPE)
    _tar(tar, [("pipe.png", b"")], tarfile.FIFOTYPE)
    _tar(tar, [("disk.png", b"")], tarfile.BLKTYPE)
    _tar(tar, [("twice.png", image), ("twice.png", b"other"), ("empty.png", b""), (".png", image)])
    done = run("rollout", "bad.tar", "-m", "demo", "--json", "-o", "out")
    assert [(r["source"], r["status"], r["error"]) for r in done.records] == [
        ("bad.tar/../../up.png", "written", None),
        ("bad.tar//etc/root.png", "written", None),
        ("bad.tar/twice.png", "written", None),
        ("bad.tar/twice.png (2)", "failed", "has the name of another image in its archive"),
        ("bad.tar/empty.png", "failed", "is empty"),
    ]
    written = sorted(str(each) for each in Path("out").rglob("*.png"))
    assert written == [
        "out/bad.tar/%2E%2E/%2E%2E/up.png.rollout.png",
        "out/bad.tar/etc/root.png.rollout.png",
        "out/bad.tar/twice.png.rollout.png",
    ]


@given(st.text())
def test_key_leads_nowhere_but_down(name: str) -> None:
    path = Path("/out", safe_key(name))
    assert ".." not in path.parts
    assert path.parts[:2] == ("/", "out")[: len(path.parts)]
    assert "\0" not in str(path)


def test_tar_that_breaks_off_tells_so(run: Shell, photos: dict[str, bytes]) -> None:
    tar = _tar(Path("cut.tar"), list(photos.items()))
    content = bytearray(tar.read_bytes())
    with tarfile.open(tar) as whole:
        middle = whole.getmembers()[5].offset
    content[middle : middle + 512] = b"\xff" * 512
    tar.write_bytes(content)
    done = run("rollout", "cut.tar", "-m", "demo", "--save", "none", "--json")
    assert [record["status"] for record in done.records] == ["written"] * 5 + ["failed"]
    assert "cannot be read after 5 images" in done.records[-1]["error"]
    tar.write_bytes(content[:middle])  # a copy that ended early, between two members
    done = run("rollout", "cut.tar", "-m", "demo", "--save", "none", "--json")
    assert [record["status"] for record in done.records] == ["written"] * 5 + ["failed"]
    Path("no.tar").write_bytes(b"nothing of the kind")
    assert "cannot be read after 0 images" in run("rollout", "no.tar", "-m", "demo").err


def _table(path: Path, photos: dict[str, bytes], **columns: Any) -> None:
    table = pa.table({"label": list(range(len(photos))), **columns})
    parquet.write_table(table, path, row_group_size=5)


@pytest.mark.parametrize("keys", [[1, 2], [b"a.png", b"b.png"]], ids=["numbers", "bytes"])
def test_list_without_text_is_refused(run: Shell, keys: list[Any]) -> None:
    parquet.write_table(pa.table({"key": keys}), "list.parquet")
    done = run("rollout", "@list.parquet", "-m", "demo")
    assert (done.code, done.out) == (1, b"") or done.code == 2
    assert "in its column key; expected text" in done.err


def test_parquet_columns_of_bytes_are_sources(
    run: Shell, photos: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: list[int] = []
    read_group = archives._read_group

    def counted(cell: archives.ParquetCell) -> Any:
        reads.append(cell.group)
        return read_group(cell)

    monkeypatch.setattr(archives, "_read_group", counted)
    contents = list(photos.values())
    _table(Path("plain.parquet"), photos, png=contents)
    _table(Path("hub.parquet"), photos, other=[b"x"] * 12,
           image=[{"bytes": each, "path": "a.png"} for each in contents])  # fmt: skip
    for name in ("plain", "hub"):
        reads.clear()
        done = run("rollout", f"{name}.parquet", "-m", "demo", "--save", "none", "--json")
        assert done.code == 0
        assert done.records[7]["source"] == f"{name}.parquet/0000007"
        assert sorted(reads) == [0, 1, 2]  # each once
        found, _ = find_sources([f"{name}.parquet"])
        digests = list(_of_files("").values())
        assert list(_digests(found).values()) == digests


def test_parquet_rows_without_an_image_fail(run: Shell, photos: dict[str, bytes]) -> None:
    contents: list[bytes | None] = [*list(photos.values())[:-2], None, b"no image"]
    _table(Path("holes.parquet"), photos, png=contents)
    done = run("rollout", "holes.parquet", "-m", "demo", "--save", "none", "--json")
    errors = [record["error"] for record in done.records]
    assert errors == [None] * 10 + ["has no bytes in this row", "is no image that Pillow can read"]
    _table(Path("none.parquet"), photos)
    with pytest.raises(SourceError, match="no column of bytes"):
        find_sources(["none.parquet"])
    _table(Path("many.parquet"), photos, a=[b""] * 12, b=[b""] * 12)
    with pytest.raises(SourceError, match="columns of bytes: a, b"):
        find_sources(["many.parquet"])
    Path("bad.parquet").write_bytes(b"PAR1 or not")
    assert "bad.parquet: cannot be read" in run("rollout", "bad.parquet", "-m", "demo").err


def test_list_names_images(run: Shell, bucket: Any) -> None:
    names = ["photos/00.png", "s3://pets/photos/01.png", "photos/*.png", "s3://pets/photos/*.png"]
    Path("list.txt").write_text("\n".join(["", *names, ""]))
    done = run("rollout", "@list.txt", "-m", "demo", "--save", "none", "--json")
    assert [record["source"] for record in done.records] == names
    assert [record["status"] for record in done.records] == ["written"] * 2 + ["failed"] * 2
    pd.DataFrame({"n": [1, 2], "url": names[:2]}).to_parquet("list.parquet")
    done = run("rollout", "@list.parquet", "-m", "demo", "--save", "none", "--json")
    assert [record["source"] for record in done.records] == names[:2]
    bucket.upload_file("list.txt", "pets", "list.txt")
    done = run("rollout", "@s3://pets/list.txt", "-m", "demo", "--save", "none", "--json")
    assert len(done.records) == 4
    piped = run("rollout", "-", "-m", "demo", "--save", "none", "--json",
                stdin="\n".join(names).encode())  # fmt: skip
    assert [record["source"] for record in piped.records] == names


def test_list_that_cannot_be_read_is_refused(run: Shell) -> None:
    missing = run("rollout", "@none.txt", "-m", "demo")
    assert missing.code == 2
    assert missing.complaints == ["Error: @none.txt cannot be read: no such file"]
    pd.DataFrame({"n": [1]}).to_parquet("list.parquet")
    assert "none of the columns" in run("rollout", "@list.parquet", "-m", "demo").complaints[0]
    save_pictures(Path(), ["@list.png"])
    assert run("rollout", "@list.png", "-m", "demo").code == 0  # a file of this name


def test_rows_of_a_bucket_are_skipped_by_their_bytes(run: Shell, bucket: Any) -> None:
    table = [
        "-m",
        "demo",
        "--records",
        "maps.parquet",
        "--save",
        "none",
        "--skip-existing",
        "--json",
    ]
    run("rollout", "s3://pets/photos", *table)
    bucket.put_object(Bucket="pets", Key="photos/00.png", Body=Path("photos/01.png").read_bytes())
    again = run("rollout", "s3://pets/photos", *table)
    assert [record["status"] for record in again.records] == ["written"] + ["skipped"] * 11
    rows = parquet.read_table("maps.parquet").to_pylist()
    assert sorted(row["source"] for row in rows) == [f"s3://pets/photos/{name}" for name in NAMES]
