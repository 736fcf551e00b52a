"""Where the config and the weights of a named model lie: in a folder, on the hub, in its cache."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch

import vitviz
from vitviz.errors import ModelError, WeightsError
from vitviz.models.hub import fetch_from_hub, fetch_if_there, require_answer
from vitviz.models.processor import PROCESSOR_FILE
from vitviz.models.translation import read_config, stated_architecture
from vitviz.models.weight_files import INDEX_FILES, find_weights, shards_of

__all__ = ["folder_weights", "local_name", "pretrained_source"]


def local_name(name: str) -> str:
    """Return the name that timm needs to build a model without asking the hub."""
    if name == "demo":
        return f"local-dir:{Path(vitviz.__file__).parent / 'demo'}"
    if name.startswith("local-dir:"):
        folder = Path(name.removeprefix("local-dir:"))
        if not (folder / "config.json").is_file():
            raise ModelError(f"{folder} has no config.json; expected a model folder as on the hub")
    if not name.startswith("hf-hub:"):
        return name
    repository = name.removeprefix("hf-hub:")
    config = fetch_from_hub(repository, "config.json")
    if stated_architecture(read_config(config)):
        fetch_if_there(repository, PROCESSOR_FILE)
    return f"local-dir:{config.parent}"


def folder_weights(name: str, folder: Path) -> Path:
    """Find the weights of a model folder, or download them to its config.

    They are read as the user's own are, since code may be pickled in them as well.
    """
    if name.startswith("hf-hub:"):
        return _all_shards(name.removeprefix("hf-hub:"))
    if found := find_weights(folder):
        return found
    raise WeightsError(
        f"{folder} has no weights (model.safetensors, say); give a file with -m NAME --weights FILE"
    )


def _all_shards(repository: str) -> Path:
    """Find the weights of a model on the hub, all shards of them, or download them."""
    path = fetch_from_hub(repository, None)
    if path.name in INDEX_FILES:
        for shard in shards_of(path):
            fetch_from_hub(repository, shard)
    return path


def pretrained_source(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Say where timm finds the pretrained weights: a file in the hub's cache where it can be."""
    if config.get("file"):
        return {}
    repository = config.get("hf_hub_id")
    if not repository and not config.get("url"):
        raise WeightsError(
            f"{name} has no pretrained weights; give your own file with -m {name} --weights FILE"
        )
    if not repository:
        url = str(config["url"])
        cached = Path(torch.hub.get_dir()) / "checkpoints" / Path(urlsplit(url).path).name
        if not cached.is_file():
            require_answer(url, name)
        return {}
    file = fetch_from_hub(str(repository), config.get("hf_hub_filename"))
    if config.get("custom_load") == "hf":
        return {}  # a format of its own, which timm reads from the cache
    return {"pretrained_cfg_overlay": {"file": str(file), "source": ""}}
