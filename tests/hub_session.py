"""A session with a model hub on this machine, in a process of its own; prints what happened.

The hub's client reads its endpoint and cache while it is imported, hence the process.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

CONTENT = Path(sys.argv[1]).read_bytes()
CONFIG = json.dumps(
    {
        "architecture": "test_vit",
        "num_classes": 7,
        "label_names": [f"n{i}" for i in range(7)],
        "label_descriptions": {f"n{i}": f"thing {i}, stuff {i}" for i in range(7)},
        "problem_type": "multi_label_classification",
        "pretrained_cfg": {
            "input_size": [3, 64, 64],
            "mean": [0.5, 0.5, 0.5],
            "std": [0.5, 0.5, 0.5],
            "interpolation": "bicubic",
            "crop_pct": 1.0,
            "num_classes": 7,
            "classifier": "head",
            "first_conv": "patch_embed.proj",
        },
        "model_args": {"img_size": 64},
    }
).encode()
FILES = {
    "/timm/test_vit.r160_in1k/resolve/main/model.safetensors": CONTENT,
    "/someone/tuned/resolve/main/model.safetensors": Path(sys.argv[2]).read_bytes(),
    "/someone/tuned/resolve/main/config.json": CONFIG,
    "/someone/bare/resolve/main/config.json": CONFIG,
}
asked: list[str] = []


class Hub(BaseHTTPRequestHandler):
    """Serves two models and a config alone; is broken for another, and silent for the last."""

    def log_message(self, *_: object) -> None:
        """Keep quiet."""

    def do_HEAD(self) -> None:  # noqa: N802 (the server's name for it)
        self._answer(with_body=False)

    def do_GET(self) -> None:  # noqa: N802
        self._answer(with_body=True)

    def _answer(self, *, with_body: bool) -> None:
        asked.append(self.path)
        if "test_vit4" in self.path:
            self.send_response(503)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        if "test_vit2" in self.path:
            time.sleep(30)
            return
        trouble = next((each for each in TROUBLES if f"/{each}/" in self.path), None)
        if trouble in ("busy", "crowded", "gated"):
            self.send_response({"busy": 503, "crowded": 429, "gated": 403}[trouble])
            if trouble == "gated":
                self.send_header("X-Error-Code", "GatedRepo")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        content = CONFIG if trouble else FILES.get(self.path, b"")
        self.send_response(200 if content or self.path == "/" else 404)
        if not content and self.path != "/":
            repository = any(self.path.startswith(f"/{name}/") for name in KNOWN)
            self.send_header("X-Error-Code", "EntryNotFound" if repository else "RepoNotFound")
        self.send_header("X-Repo-Commit", "a" * 40)
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if with_body:
            self.wfile.write(content[:20] if trouble in ("cut", "stalled") else content)
            self.wfile.flush()
            if trouble == "stalled":
                time.sleep(30)


TROUBLES = ("busy", "crowded", "gated", "cut", "stalled", "proxied")
KNOWN = ("timm/test_vit.r160_in1k", "someone/tuned", "someone/bare")
server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
server.daemon_threads = True
serving = threading.Thread(target=server.serve_forever, daemon=True)
serving.start()
os.environ["HF_ENDPOINT"] = f"http://127.0.0.1:{server.server_port}"
os.environ["HF_HUB_CACHE"] = sys.argv[3]
os.environ["HF_HUB_DISABLE_XET"] = "1"
os.environ.pop("HF_HUB_OFFLINE", None)

import huggingface_hub  # noqa: E402
from huggingface_hub import constants, file_download  # noqa: E402

from vitviz.errors import VitvizError  # noqa: E402
from vitviz.models.model import load_model  # noqa: E402

constants.HF_HUB_DOWNLOAD_TIMEOUT = 0.3
file_download.time = SimpleNamespace(**{**vars(time), "sleep": lambda _: None})  # between attempts
close_session = getattr(huggingface_hub, "close_session", lambda: None)


class TooLongError(BaseException):
    """An attempt takes too long; no OSError, which would be tried again."""


def give_up(*_: object) -> None:
    """End an attempt."""
    raise TooLongError(f"still busy after {LIMIT} s")


LIMIT = 10
signal.signal(signal.SIGALRM, give_up)


def attempt(name: str) -> dict[str, object]:
    """Load a model and say what came of it."""
    before, start = len(asked), time.perf_counter()
    outcome: dict[str, object] = {}
    signal.alarm(LIMIT)
    try:
        model = load_model(name, device="cpu")
        outcome |= {
            "name": model.name,
            "digest": model.digest,
            "classes": model.num_classes,
            "label": model.labels[3],
            "notes": model.notes,
            "score_kind": model.score_kind,
        }
    except VitvizError as error:
        outcome |= {"error": str(error)}
    except (Exception, TooLongError) as error:
        outcome |= {"crash": f"{type(error).__name__}: {error}"}
    signal.alarm(0)
    seconds = time.perf_counter() - start
    return {**outcome, "seconds": seconds, "asked": len(asked) - before}


story = {
    "first": attempt("test_vit"),
    "again": attempt("test_vit.r160_in1k"),
    "tuned": attempt("hf-hub:someone/tuned"),
    "unknown": attempt("hf-hub:someone/unknown"),
    "bare": attempt("hf-hub:someone/bare"),
    "invalid": attempt("hf-hub:not/a/valid/name"),
    "nameless": attempt("hf-hub:"),
    "broken": attempt("test_vit4"),
    "silent": attempt("test_vit2"),
}
story |= {each: attempt(f"hf-hub:someone/{each}") for each in TROUBLES[:-1]}
close_session()  # which knows the proxies of when it was opened
with_proxy = {"ALL_PROXY": "socks5://127.0.0.1:9", "NO_PROXY": "", "no_proxy": ""}
before = dict(os.environ)
os.environ.update(with_proxy)
story["proxied"] = attempt("hf-hub:someone/proxied")
os.environ.clear()
os.environ.update(before)
close_session()
server.shutdown()
server.server_close()
story |= {
    "offline": attempt("test_vit"),
    "offline tuned": attempt("hf-hub:someone/tuned"),
    "offline new": attempt("vit_tiny_patch16_224"),
}
print(json.dumps(story))
sys.stdout.flush()
os._exit(0)  # without waiting for the silent connection
