"""Weights files as they are: safetensors, torch checkpoints and npz, whole or in shards.

Never runs pickled code: torch checkpoints are read with ``weights_only=True``, npz files with
``allow_pickle=False``.
"""

from __future__ import annotations

import argparse
import json
import pickle
import re
import types
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.serialization import safe_globals

from vitviz.errors import WeightsError, first_line

__all__ = ["INDEX_FILES", "WeightFile", "find_weights", "shards_of"]


_NAMES = ("model.safetensors", "pytorch_model.bin", "pytorch_model.pth", "model.pth")
INDEX_FILES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
"""What the lists of shards are called, the safest first."""
_SHARD = re.compile(r"(.+)-\d+-of-\d+(\.\w+)")
_MOST_EXPANSION = 16  # times its file that a checkpoint may fill; torch itself compresses nothing


@dataclass(frozen=True)
class WeightFile:
    """A weights file, read when its content is asked for, once.

    Attributes:
        path: The file, one shard of several, or the list of them.
    """

    path: Path

    @cached_property
    def files(self) -> tuple[Path, ...]:
        """The files that hold it: itself, or all its shards.

        Raises:
            WeightsError: One is missing.
        """
        if not self.path.is_file():
            link = "is a link to a file that is not there" if self.path.is_symlink() else ""
            raise WeightsError(
                f"--weights {self.path} {link or 'is not a file'}; give a .safetensors, .npz, "
                ".pth or .pt file"
            )
        index = _index_of(self.path)
        return (self.path,) if index is None else _shards(index)

    @cached_property
    def content(self) -> Mapping[str, Any]:
        """What it holds.

        Raises:
            WeightsError: It is missing, damaged, or holds code.
        """
        content: dict[str, Any] = {}
        for file in self.files:
            content |= _read(file)
        return content

    def check_size(self, size: int) -> None:
        """Refuse a file whose tensors fill many times its size.

        Raises:
            WeightsError: They do.
        """
        _check_size(self.path, size, sum(file.stat().st_size for file in self.files))


def find_weights(folder: Path) -> Path | None:
    """Find the weights of a model folder: a whole file, a list of shards, any safetensors."""
    names = [folder / name for name in (*_NAMES, *INDEX_FILES)]
    files = [*names, *sorted(folder.glob("*.safetensors"))]
    return next((file for file in files if file.is_file()), None)


def _index_of(path: Path) -> Path | None:
    """Return the list of shards that a file is or belongs to."""
    if path.name.endswith(".index.json"):
        return path
    shard = _SHARD.fullmatch(path.name)
    if shard is None:
        return None
    index = path.with_name(f"{shard[1]}{shard[2]}.index.json")
    if not index.is_file():
        raise WeightsError(
            f"{path} is one shard of several, and {index.name}, which lists them, is not beside it"
        )
    return index


def shards_of(index: Path) -> list[str]:
    """List the names of the shards that an index names.

    Raises:
        WeightsError: It is no such index.
    """
    try:
        places = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        names = sorted({str(name) for name in places})
    except (OSError, ValueError, RecursionError, LookupError, TypeError, AttributeError) as error:
        raise WeightsError(f"{index} is no list of shards ({first_line(error)})") from error
    if not names:
        raise WeightsError(f"{index} names no shard")
    return names


def _shards(index: Path) -> tuple[Path, ...]:
    """List the shards that an index names, all of them files beside it."""
    names = shards_of(index)
    for name in names:
        if Path(name).name != name or not index.with_name(name).is_file():
            raise WeightsError(
                f"{index} names the shard {name}, which is not beside it; get all {len(names)}"
            )
    return tuple(index.with_name(name) for name in names)


def _read(path: Path) -> Mapping[str, Any]:
    try:
        is_safetensors = _is_safetensors(path)
    except OSError as error:
        raise WeightsError(f"{path} cannot be read: {error.strerror or error}") from error
    if is_safetensors:
        return _read_safetensors(path)
    return _read_npz(path) if _is_npz(path) else _read_torch(path)


def _is_safetensors(path: Path) -> bool:
    """Tell by the content what a file is, by its suffix only where that leaves it open."""
    with path.open("rb") as file:
        start = file.read(9)
    if start[8:] == b"{" and int.from_bytes(start[:8], "little") < path.stat().st_size:
        return True
    return path.suffix == ".safetensors" and not start.startswith((b"PK", b"\x80"))


def _read_safetensors(path: Path) -> dict[str, Any]:
    import safetensors
    import safetensors.torch

    try:
        tensors: dict[str, Any] = safetensors.torch.load_file(path)
        with safetensors.safe_open(path, framework="pt") as file:
            return {"__metadata__": file.metadata() or {}, **tensors}
    except Exception as error:  # a header may promise anything
        raise WeightsError(
            f"{path} is no readable safetensors file: {first_line(error)}"
        ) from error


def _is_npz(path: Path) -> bool:
    """Tell whether a file is an archive of arrays and nothing else."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        return False
    return bool(names) and all(name.endswith(".npy") for name in names)


def _read_npz(path: Path) -> dict[str, Any]:
    """Read arrays as tensors; those of other things than numbers stay what they are."""
    _refuse_bomb(path)
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return {name: _tensor(arrays[name]) for name in arrays.files}
    except Exception as error:  # a header may promise anything
        raise WeightsError(f"{path} is no readable npz file ({first_line(error)})") from error


def _tensor(array: NDArray[Any]) -> Tensor | NDArray[Any]:
    if array.dtype.kind == "V" and array.dtype.itemsize == 2:  # NumPy has no word for bfloat16
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array) if array.dtype.kind in "fiubc" else array


def _read_torch(path: Path) -> Mapping[str, Any]:
    _refuse_bomb(path)
    try:
        # A file and not its path, of which torch would believe the suffix.
        with safe_globals(list(_HARMLESS)), warnings.catch_warnings(), path.open("rb") as file:
            warnings.simplefilter("ignore")
            content = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL ([\w.]+)", str(error))
        raise WeightsError(
            f"{path} is no plain torch checkpoint: it is damaged, or holds Python "
            f"objects{f' ({named[1]})' if named else ''} beside tensors, which are never loaded "
            "since loading them can run code; save model.state_dict() alone, as .safetensors best "
            "of all"
        ) from error
    except Exception as error:  # damaged pickles make their reader raise almost anything
        raise WeightsError(
            f"{path} is no readable torch checkpoint ({first_line(error)})"
        ) from error
    if not isinstance(content, Mapping):
        raise WeightsError(
            f"{path} holds a {type(content).__name__}; expected a model's state dict"
        )
    return content


class _StandIn:
    """Stands for a value beside the tensors that nobody needs; does nothing with what it gets."""

    def __new__(cls, *_: object) -> _StandIn:
        return object.__new__(cls)

    def __setstate__(self, state: object) -> None:
        """Take no notice."""


class _Plain:
    """Stands for a kind of dict, as a plain one: torch fills no other."""

    def __new__(cls, *_: object) -> dict[Any, Any]:  # type: ignore[misc]
        return {}


def _stand_ins() -> Iterator[type]:
    """Make the classes under whose names torch finds them in place of the real ones."""
    numpy = [
        f"numpy{core}.multiarray.{name}"
        for core in (".core", "._core")
        for name in ("scalar", "_reconstruct")
    ]
    paths = [
        f"pathlib{home}.{kind}Path"
        for home in ("", "._local")
        for kind in ("", "Posix", "Windows", "Pure", "PurePosix", "PureWindows")
    ]
    times = [f"datetime.{name}" for name in ("date", "datetime", "time", "timedelta", "timezone")]
    kinds = [f"builtins.{name}" for name in ("int", "float", "str", "bool", "list", "dict")]
    others = ("numpy.dtype", "numpy.ndarray", "uuid.UUID", "decimal.Decimal", "fractions.Fraction")
    for whole in (*numpy, *paths, *times, *kinds, *others):
        module, _, name = whole.rpartition(".")
        yield type(name, (_StandIn,), {"__module__": module})
    yield type("defaultdict", (_Plain,), {"__module__": "collections"})


# What trainers keep beside the tensors. Namespaces, as timm's training script stores its arguments,
# are data alone and kept, since they name the model; of the rest nothing is needed.
_HARMLESS = (argparse.Namespace, types.SimpleNamespace, *_stand_ins())


def _refuse_bomb(path: Path) -> None:
    """Refuse an archive that unpacks to many times its size, before anything is unpacked.

    Raises:
        WeightsError: It does, or its directory cannot be read.
    """
    try:
        if not zipfile.is_zipfile(path):
            return
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(member.file_size for member in archive.infolist())
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise WeightsError(f"{path} is a damaged archive ({first_line(error)})") from error
    _check_size(path, unpacked, path.stat().st_size)


def _check_size(path: Path, size: int, held: int) -> None:
    if size > _MOST_EXPANSION * held:
        raise WeightsError(f"{path} has {held:,} bytes and would fill {size:,}: refused")
