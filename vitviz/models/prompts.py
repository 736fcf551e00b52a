"""Prompts → text embeddings, by the text tower that open_clip builds; never scores an image.

The whole model is described by an ``open_clip_config.json``: beside the user's weights, in the
model's folder or repository, or in the repository that open_clip itself takes for a model of
timm's. Weights are read as all others are, without running pickled code.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitviz.errors import OptionError, WeightsError, first_line
from vitviz.models.checkpoints import read_checkpoint
from vitviz.models.hub import fetch_from_hub
from vitviz.models.text import TextEmbeddings
from vitviz.models.weight_files import WeightFile, find_weights

__all__ = ["embed_prompts", "phrases", "require_open_clip"]


_CONFIG = "open_clip_config.json"
_WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
_INSTEAD = "give the prompts' vectors with --text-embeddings"
_SAME = 1e-3  # of a vector of length 1: half precision in a file makes less of a difference


@dataclass(frozen=True, kw_only=True)
class _Whole:
    """Where an image tower and its text tower are together.

    Attributes:
        config: The description of both.
        weights: A file with the weights of both.
        name: What open_clip calls the place where the tokenizer is.
    """

    config: Path
    weights: WeightFile
    name: str


def phrases(prompts: Sequence[str], templates: Sequence[str] = ()) -> dict[str, list[str]]:
    """Put each prompt into each template.

    Raises:
        OptionError: A template has no place for it, or a prompt is empty or there twice.
    """
    if odd := [each for each in templates if "{}" not in each]:
        raise OptionError(f"--template {odd[0]!r} has no {{}}, where the prompt goes")
    if templates and not prompts:
        raise OptionError("--template is for prompts; give some with --text")
    names = [prompt.strip() for prompt in prompts]
    if not all(names) or len(set(names)) < len(names):
        raise OptionError("--text is empty or the same twice; give each prompt once")
    return {name: [each.replace("{}", name) for each in templates or ("{}",)] for name in names}


def require_open_clip() -> None:
    """Make sure, before the work, that there is something to build a text tower with.

    Raises:
        OptionError: There is not.
    """
    if find_spec("open_clip") is None:
        raise OptionError(
            "--text needs open_clip_torch, which is not installed; try pip install 'vitviz[text]', "
            f"or {_INSTEAD}"
        )


def embed_prompts(
    prompts: Mapping[str, Sequence[str]],
    name: str,
    weights: WeightFile | None,
    tower: nn.Module | None,
) -> TextEmbeddings:
    """Compute where prompts lie among the images of a tower.

    Args:
        prompts: The phrases of each class, which are averaged.
        name: The model's name, with the tag of its weights.
        weights: The user's checkpoint, if it has one.
        tower: The model, to be compared with the whole model's; None: one that has been trained on.

    Raises:
        OptionError: The whole model is not to be found, or open_clip cannot build it.
        WeightsError: The whole model's weights are missing or do not fit, or are not the tower's.
    """
    found = _whole(name, weights)
    model, tokenize = _open_clip(found)
    if tower is not None:
        _require_same(model.visual, tower, found)
    vectors = [
        _direction(model, tokenize([each] if isinstance(each, str) else list(each)))
        for each in prompts.values()
    ]
    bias = getattr(model, "logit_bias", None)
    return TextEmbeddings(
        names=tuple(prompts),
        vectors=torch.stack(vectors),
        source=f"text tower of {found.weights.path}",
        scale=float(model.logit_scale.detach().exp()),
        bias=None if bias is None else float(bias.detach()),
    )


def _whole(name: str, weights: WeightFile | None) -> _Whole:
    """Find the whole model that a tower is of."""
    if weights is not None:
        return _in_folder(weights.path.parent, weights)
    if name.startswith("local-dir:"):
        return _in_folder(Path(name.removeprefix("local-dir:")), None)
    repository = name.removeprefix("hf-hub:") if name.startswith("hf-hub:") else _repository(name)
    config = fetch_from_hub(repository, _CONFIG)
    # Only a tokenizer of its own has to be looked for on the hub; CLIP's is a part of open_clip.
    own = "hf_tokenizer_name" in config.read_text(encoding="utf-8", errors="replace")
    return _Whole(
        config=config,
        weights=WeightFile(fetch_from_hub(repository, _WEIGHTS[-1])),
        name=f"hf-hub:{repository}" if own else f"local-dir:{config.parent}",
    )


def _in_folder(folder: Path, weights: WeightFile | None) -> _Whole:
    config = folder / _CONFIG
    if not config.is_file():
        raise OptionError(f"--text: {folder} has no {_CONFIG} to build a text tower by; {_INSTEAD}")
    files = (folder / each for each in _WEIGHTS)
    own = next((each for each in files if each.is_file()), None) or find_weights(folder)
    if weights is None and own is None:
        raise WeightsError(f"{folder} has no weights ({_WEIGHTS[0]}, say)")
    return _Whole(
        config=config, weights=weights or WeightFile(Path(str(own))), name=f"local-dir:{folder}"
    )


def _repository(name: str) -> str:
    """Return the repository of the whole model that open_clip knows for a tower of timm's."""
    import open_clip

    architecture, _, tag = name.partition(".")
    for model, pretrained in open_clip.list_pretrained():
        place = str(open_clip.get_pretrained_cfg(model, pretrained).get("hf_hub", "")).strip("/")
        vision = open_clip.get_model_config(model)["vision_cfg"]
        same = vision.get("timm_model_name") == architecture and pretrained == tag
        if place and (same or place == f"timm/{name}"):
            return place
    raise OptionError(f"--text: open_clip knows no text tower for {name}; {_INSTEAD}")


def _open_clip(whole: _Whole) -> tuple[Any, Any]:
    """Build the whole model with its weights, and what makes tokens of texts."""
    import open_clip
    from open_clip.model import convert_to_custom_text_state_dict

    try:
        model = open_clip.create_model(
            f"local-dir:{whole.config.parent}",
            load_weights=False,
            pretrained_image=False,
            pretrained_text=False,
        ).eval()
        tokenize = open_clip.get_tokenizer(whole.name)
    except Exception as error:  # whatever a config says, and a tokenizer may be of any library
        raise OptionError(
            f"--text: open_clip cannot build the text tower of {whole.config} "
            f"({first_line(error)}); {_INSTEAD}"
        ) from error
    origin = str(whole.weights.path)
    tensors = read_checkpoint(whole.weights, model).tensors
    if hasattr(model, "text"):
        tensors = convert_to_custom_text_state_dict(tensors)
    try:
        missing = model.load_state_dict(tensors, strict=False).missing_keys
    except RuntimeError as error:
        raise WeightsError(f"{origin} does not fit {whole.config}: {first_line(error)}") from error
    if missing:
        raise WeightsError(
            f"{origin} has no {missing[0]}, which {whole.config} speaks of: expected the weights "
            f"of both towers; {_INSTEAD}"
        )
    return model, tokenize


def _direction(model: Any, tokens: Tensor) -> Tensor:
    """Return the mean of some phrases' vectors, all of length 1."""
    with torch.no_grad():
        vectors: Tensor = model.encode_text(tokens, normalize=True)
    return F.normalize(vectors.mean(dim=0), dim=-1)


def _require_same(visual: Any, tower: nn.Module, whole: _Whole) -> None:
    """Prove on an image that a tower is the one that the texts were trained with."""
    size = visual.image_size if isinstance(visual.image_size, tuple) else (visual.image_size,) * 2
    embed: Any = getattr(tower, "patch_embed", None)
    if tuple(getattr(embed, "img_size", None) or ()) != tuple(size):
        return  # it was resized, which changes what it sees
    image = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        its, own = visual(image), tower.eval()(image)
    if its.shape != own.shape:
        return  # as where vectors are found not to fit
    distance = float((F.normalize(its, dim=-1) - F.normalize(own, dim=-1)).abs().max())
    if not distance <= _SAME:
        raise WeightsError(
            f"the model sees an image otherwise than the whole model of {whole.config} does (by "
            f"{distance:.2g} of a vector of length 1): prompts would be compared with other images "
            "than they were trained with; name the tower as it was trained with -m (of OpenAI's "
            "CLIP, with quickgelu)"
        )
