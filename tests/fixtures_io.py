"""What tests of files, pictures and commands share: a tiny model, pictures, a way to run vitviz."""

from __future__ import annotations

import gzip
import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest
import timm
import torch
from packaging.version import Version
from PIL import Image
from PIL import __version__ as pillow_version
from safetensors.torch import save_file
from torch import Tensor, nn

from vitviz.models.model import Model, load_model

ROOT = Path(__file__).resolve().parents[1]
NAME = "test_vit"  # timm's own test model: 64 wide, 6 blocks, 2 heads, patches of 16 pixels
SIZE = 64
CLASSES = 7
_CENSUS = json.loads(gzip.decompress((ROOT / "vitviz/models/census.json.gz").read_bytes()))
TIMM_IS_OLD = Version(timm.__version__) < Version(_CENSUS["timm"])
"""With a newer one, tests of models and of the census fail, until that is made anew."""
TORCH_IS_OLD = Version(torch.__version__) < Version("2.6")
TIFF_YCBCR = ("YCbCr",) if Version(pillow_version) >= Version("13") else ()
"""Before Pillow 13, it does not read its own TIFFs of this mode."""
LABELS = (
    "tench, Tinca tinca",
    "crane",
    "crane",
    "tabby, tabby cat",
    "tiger cat",
    "Égyptian",
    "sky",
)


def _draw(module: nn.Module, seed: int) -> None:
    """Draw weights under which attention is far from uniform."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 1:
                parameter.copy_(0.1 * noise + (1 if "norm" in name and "weight" in name else 0))
            elif "qkv" in name:
                parameter.copy_(0.3 * noise)
            else:
                parameter.copy_(noise / parameter[0].numel() ** 0.5)


def tiny_module(
    *, classes: int = CLASSES, seed: int = 0, name: str = NAME, **arguments: Any
) -> nn.Module:
    """Build the tiny model with seeded weights."""
    module: nn.Module = timm.create_model(
        name, num_classes=classes, **{"img_size": SIZE, **arguments}
    )
    _draw(module, seed)
    return module.eval()


@cache
def tiny_model() -> Model:
    """Return the tiny model, ready to explain; tests leave it as it is."""
    return load_model(tiny_module(), device="cpu")


def tiny_state(**arguments: Any) -> dict[str, Tensor]:
    """Return the tiny model's weights."""
    return {k: v.contiguous() for k, v in tiny_module(**arguments).state_dict().items()}


def save_tiny(path: Path, **arguments: Any) -> Path:
    """Save the tiny model's weights as safetensors."""
    save_file(tiny_state(**arguments), path)
    return path


def picture(height: int, width: int, seed: int = 0) -> Image.Image:
    """Draw a smooth random picture."""
    noise = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


def places(sheet: np.ndarray, part: np.ndarray) -> list[tuple[int, int]]:
    """Find a picture on a sheet: its (top, left), wherever it stands."""
    height, width = part.shape[:2]
    corners = np.argwhere((sheet[: -height + 1, : -width + 1] == part[0, 0]).all(axis=-1))
    return [
        (top, left)
        for top, left in corners.tolist()
        if np.array_equal(sheet[top : top + height, left : left + width], part)
    ]


def save_pictures(folder: Path, names: Sequence[str], size: tuple[int, int] = (48, 64)) -> None:
    """Save a different picture under each name."""
    for seed, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(*size, seed=seed).save(path)


@dataclass(frozen=True, kw_only=True)
class Run:
    """What a command did."""

    code: int
    out: bytes
    err: str

    @property
    def paths(self) -> list[str]:
        return [os.fsdecode(line) for line in self.out.split(b"\n") if line]

    @property
    def records(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.out.splitlines()]

    @property
    def complaints(self) -> list[str]:
        """Lines on stderr, without the device's."""
        return [line for line in self.err.splitlines() if line and not line.startswith("Using ")]


class Shell:
    """Runs the command line in this process."""

    def __init__(self, capture: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self._capture = capture
        self._monkeypatch = monkeypatch

    def __call__(self, *arguments: str | os.PathLike[str], stdin: bytes = b"") -> Run:
        from vitviz.cli.app import main

        self._capture.readouterr()
        with self._monkeypatch.context() as patch, pytest.raises(SystemExit) as left:
            patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
            main([os.fspath(argument) for argument in arguments])
        out, err = self._capture.readouterr()
        assert isinstance(left.value.code, int)
        return Run(code=left.value.code, out=out, err=err.decode(errors="replace"))


def run_process(
    *arguments: str, cwd: Path | None = None, stdin: bytes = b"", **environment: str
) -> Run:
    """Run Python in a process of its own."""
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        input=stdin,
        capture_output=True,
        timeout=120,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
    )
    return Run(code=done.returncode, out=done.stdout, err=done.stderr.decode(errors="replace"))


@contextmanager
def at_most(seconds: int) -> Iterator[None]:
    """Fail instead of waiting for ever."""

    def give_up(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"still busy after {seconds} s")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
