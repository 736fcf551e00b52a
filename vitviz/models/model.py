"""A model ready to explain: its weights, tokens, preprocessing, labels and device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import timm.data
import torch
from torch import Tensor, nn

from vitviz.errors import OptionError, UnsupportedModelError
from vitviz.models.adapters import Adapter, read_adapter
from vitviz.models.building import LoadedModule, build_model, build_skeleton
from vitviz.models.checkpoints import digest_weights, require_finite
from vitviz.models.devices import select_device
from vitviz.models.labels import Labels, is_label, read_labels
from vitviz.models.layouts import Layout, prove_layout, read_any_layout
from vitviz.models.names import DEFAULT, resolve_name
from vitviz.models.origins import disagreement, model_stated
from vitviz.models.preprocessing import (
    Normalisation,
    Preprocessing,
    normalised_by,
    preprocessing_of,
)
from vitviz.models.prompts import embed_prompts, phrases, require_open_clip
from vitviz.models.record import ModelRecord, versions
from vitviz.models.structure import has_classifier, input_channels, pretrained_config
from vitviz.models.text import (
    TextEmbeddings,
    read_text_embeddings,
    with_learnt_scale,
    with_text,
)
from vitviz.models.translation import object_config, translate_object
from vitviz.models.weight_files import WeightFile
from vitviz.models.wrapping import logits_of, make_ordinary, own_numbers, unwrapped
from vitviz.options import Fit, Precision, whole

__all__ = ["Model", "Prompts", "load_model"]

Prompts = Sequence[str] | Mapping[str, Sequence[str]]

_DTYPES = {
    Precision.FP32: torch.float32,
    Precision.BF16: torch.bfloat16,
    Precision.FP16: torch.float16,
}
_LUMA = torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)  # of Rec. 601, as in Pillow


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Model:
    """A model with its weights, on its device, and all that is known about it.

    Attributes:
        module: The timm model.
        name: Its timm name, with the tag of its weights.
        weights: Where the weights come from, in words.
        layout: Its tokens and readout; of a model without attention maps that chain, its stages.
        preprocessing: What it expects of images.
        labels: The names of its classes.
        num_classes: Number of logits; 0 for a model without a head.
        multi_label: Whether classes do not exclude each other, or there is one alone
            (scores by sigmoid).
        notes: What a user should be told about how it was loaded.
    """

    module: nn.Module
    name: str
    weights: str
    layout: Layout
    preprocessing: Preprocessing
    labels: Labels
    num_classes: int
    multi_label: bool = False
    notes: tuple[str, ...] = ()

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.module.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """What the weights are made of."""
        return next(self.module.parameters()).dtype

    @cached_property
    def sees_grey(self) -> bool:
        """Whether its images have one channel."""
        return input_channels(self.module) == 1

    def output(self, images: Tensor) -> Tensor:
        """Run images (batch, 3, height, width), in grey where it sees no colours.

        Returns:
            (batch, classes), or (batch, features) of a model without a head.
        """
        if self.sees_grey:
            # Its mean and deviation are the same for all colours, so grey can come after them.
            images = (images * _LUMA.to(images)).sum(dim=1, keepdim=True)
        return logits_of(self.module, self.module(images))

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the weights, as they are computed with."""
        return digest_weights(self.module)

    @cached_property
    def record(self) -> ModelRecord:
        """What records and files say of it."""
        return ModelRecord(
            name=self.name,
            weights=self.weights,
            weights_sha256=self.digest,
            score_kind=self.score_kind,
            dtype=str(self.dtype).removeprefix("torch."),
            preprocessing=asdict(self.preprocessing),
            labels_source=self.labels.source,
            labels_digest=self.labels.digest,
            versions=versions(),
        )

    def __repr__(self) -> str:
        """Say which model it is, what its head reads and what maps it has."""
        outline = f"{self.layout.outline}, {self.num_classes:,} classes"
        return f"<Model {self.name} on {self.device}: {outline}>"

    def describe(self) -> str:
        """Say what is computed with: the model, its weights, and what pixels are brought to."""
        mean, std = (
            " ".join(f"{value:g}" for value in values)
            for values in (self.preprocessing.mean, self.preprocessing.std)
        )
        return f"Using {self.name}, weights {self.weights}, mean {mean}, std {std}"

    @property
    def score_kind(self) -> str:
        """How scores are made from logits: "softmax" or "sigmoid"."""
        return "sigmoid" if self.multi_label else "softmax"


def load_model(
    model: str | nn.Module | None = None,
    *,
    weights: str | Path | None = None,
    labels: str | Path | None = None,
    device: str = "auto",
    fit: Fit | str = Fit.SQUASH,
    img_size: int | tuple[int, int] | None = None,
    mean: Normalisation | None = None,
    std: Normalisation | None = None,
    precision: Precision | str | None = None,
    adapter: str | Path | None = None,
    text_embeddings: str | Path | None = None,
    text: Prompts = (),
) -> Model:
    """Load a model and find out where its tokens are and which of them its head reads.

    Args:
        model: A timm name with or without tag, an alias (``deit_tiny``), ``demo``,
            ``hf-hub:owner/name``, a folder with a config.json, ``package.module:factory``, or a
            model object of timm or transformers (copied to timm's parts), compiled or wrapped or
            not; None: as the file of ``weights`` says, else that of ``adapter``.
        weights: A checkpoint to use instead of the pretrained weights.
        labels: A file with the names of the classes.
        device: ``auto`` (an object stays where it is), ``cpu``, ``cuda``, ``cuda:1`` or ``mps``.
        fit: ``native`` builds the model so that it takes images of any aspect ratio.
        img_size: Side or (height, width) to build the model for, instead of its own.
        mean: To subtract from pixels in [0, 1], in place of its own: one number, or one a channel.
        std: Standard deviation to divide by, in place of the model's own.
        precision: ``fp32``, ``bf16`` or ``fp16``; None: as the weights are.
        adapter: A LoRA adapter of PEFT, its folder or file, to merge into the weights.
        text_embeddings: Names and vectors of prompts, the classes of a CLIP or SigLIP tower.
        text: Prompts themselves, or phrases for each name, which are averaged (needs open_clip).

    Raises:
        OptionError: An option is not usable, or a file does not say which model it is for.
        ModelError: There is no such model, or it cannot be built as asked.
        UnsupportedModelError: No method is defined for this model.
        WeightsError: Its weights are missing or do not fit.
        LabelError: The label file does not fit.
        DeviceError: The device is not on this machine.
    """
    size = _sides(img_size)
    with own_numbers():
        files = _Files.of(weights, adapter, labels, text_embeddings, text)
        built, layout = _built(model, files, device, Fit(fit), size)
        if precision is not None:
            built.module.to(_DTYPES[Precision(precision)])
        preprocessing = normalised_by(preprocessing_of(built.module, size), mean, std)
        return _proved(built, layout, preprocessing, files.labels)


class _Files(NamedTuple):
    """What of a model is in files of the user's, and the prompts that are its classes."""

    weights: Path | None
    adapter: Path | None
    labels: Path | None
    text: Path | None
    prompts: Mapping[str, Sequence[str]]

    @classmethod
    def of(cls, weights: Any, adapter: Any, labels: Any, text: Any, prompts: Prompts) -> _Files:
        """Read what is given.

        Raises:
            OptionError: Classes have several names, or there is no open_clip to embed prompts.
        """
        if not isinstance(prompts, Mapping):
            prompts = phrases([prompts] if isinstance(prompts, str) else list(prompts))
        paths = [Path(each) if each else None for each in (weights, adapter, labels, text)]
        found = cls(paths[0], paths[1], paths[2], paths[3], prompts)
        if sum(map(bool, (found.labels, found.text, found.prompts))) > 1:
            raise OptionError(
                "--labels, --text and --text-embeddings all name the classes; give one of them"
            )
        if found.prompts:
            require_open_clip()
        return found


def _built(
    model: str | nn.Module | None,
    files: _Files,
    device: str,
    fit: Fit,
    size: tuple[int, int] | None,
) -> tuple[LoadedModule, Layout]:
    """Take a model object, or build a model, on its device."""
    text = read_text_embeddings(files.text) if files.text else None
    if isinstance(model, nn.Module):
        if files.weights or files.adapter or size is not None or fit is Fit.NATIVE:
            raise OptionError("a model object is taken as it is: weights, size and fit are its own")
        if files.prompts:
            raise OptionError(
                "--text is for models by name; for a model object give --text-embeddings"
            )
        built, layout = _taken(model, device)
        return _worded(built, text), layout
    if not isinstance(model, str | None):
        raise OptionError(f"model is {model!r}; give a name, a folder as text, or a model object")
    target = select_device(device)
    file = WeightFile(files.weights) if files.weights else None
    adapter = read_adapter(files.adapter) if files.adapter else None
    built, layout = _build(model, file, adapter, fit, size)
    if files.prompts:
        tower = built.module if adapter is None else None
        text = embed_prompts(files.prompts, built.name, file, tower)
    built = _worded(built, text, file)
    built.module.to(target).eval()
    return built, layout


def _worded(
    built: LoadedModule, text: TextEmbeddings | None, file: WeightFile | None = None
) -> LoadedModule:
    """Make texts the classes of a model, if there are any."""
    if text is None:
        return built
    text = with_learnt_scale(text, file)
    return replace(
        built,
        module=with_text(built.module, text),
        labels=Labels(names=text.names, source=text.source),
        multi_label=text.bias is not None,
        notes=(*built.notes, text.describe()),
    )


def _sides(size: object) -> tuple[int, int] | None:
    """Read the (height, width) of images, of which squares may be given as one number.

    Raises:
        OptionError: It is neither.
    """
    if size is None:
        return None
    given = list(size) if isinstance(size, (tuple, list)) else [size]
    sides = [whole("--img-size", side) for side in given]
    if len(sides) not in (1, 2) or min(sides) < 1:
        raise OptionError(f"--img-size is {size!r}; give one side, or height and width")
    return sides[0], sides[-1]


def _taken(module: nn.Module, device: str) -> tuple[LoadedModule, Layout]:
    """Take a model object as it is, moved in place."""
    module = unwrapped(module)
    make_ordinary(module)
    if device != "auto":
        module.to(select_device(device))
    config = object_config(module)
    notes: tuple[str, ...] = ()
    if config is not None:
        module, translation = translate_object(module, config)
        notes = translation.notes
    built = LoadedModule(module=module, name=_own_name(module), weights="given", notes=notes)
    try:
        return built, read_any_layout(module, preprocessing_of(module).size)
    except UnsupportedModelError as error:
        maker = type(module).__module__.partition(".")[0]
        if maker in ("timm", "__main__"):
            raise
        raise UnsupportedModelError(
            f"{error}. It is a {type(module).__name__} of {maker}, not of timm, by whose names "
            "vitviz knows the parts of models: make it with timm.create_model"
        ) from error


def _build(
    model: str | None,
    file: WeightFile | None,
    adapter: Adapter | None,
    fit: Fit,
    img_size: tuple[int, int] | None,
) -> tuple[LoadedModule, Layout]:
    notes = []
    source = file or adapter
    if model is None and source is not None:
        stated = model_stated(source)
        model = stated.model or stated.name
        notes.append(f"{source.path}: taken as {stated.name}, by {stated.where}")
    name = resolve_name(model or DEFAULT)
    native = fit is Fit.NATIVE
    skeleton = build_skeleton(name, img_size, native=native, adapter=adapter)
    # What cannot work is refused before anything is downloaded.
    layout = read_any_layout(skeleton, preprocessing_of(skeleton, img_size).size)
    built = build_model(name, skeleton, file, img_size, native=native, adapter=adapter)
    if model is not None and file is not None and not notes:
        notes += filter(None, [disagreement(file, _full_name(built.module))])
    return replace(built, notes=(*notes, *built.notes)), layout


def _proved(
    built: LoadedModule,
    layout: Layout,
    preprocessing: Preprocessing,
    labels: Path | None,
) -> Model:
    """Make sure that a model with its weights is what its attributes say, and name its classes."""
    module = built.module
    require_finite(module, f"weights of {built.name} ({built.weights})")
    layout, width = prove_layout(module, layout, preprocessing.size)
    num_classes = width if has_classifier(module) else 0
    known = built.labels or _labels(module, num_classes, labels)
    notes = list(built.notes)
    if known.assumed and built.weights != "pretrained":
        notes.append(f"no labels given: {known.source} labels assumed for {num_classes} classes")
    if num_classes == 1:
        notes.append(
            "the model has one output: its score is a sigmoid of it, and maps show what raises it"
        )
    return Model(
        module=module,
        name=built.name,
        weights=built.weights,
        layout=layout,
        preprocessing=preprocessing,
        labels=known,
        num_classes=num_classes,
        multi_label=built.multi_label or num_classes == 1,
        notes=tuple(notes),
    )


def _full_name(module: nn.Module) -> str:
    """Return timm's name of a model, with the tag of its config."""
    tag = pretrained_config(module).get("tag")
    return _own_name(module) + (f".{tag}" if tag else "")


def _own_name(module: nn.Module) -> str:
    return str(pretrained_config(module).get("architecture") or type(module).__name__)


def _labels(module: nn.Module, num_classes: int, path: Path | None) -> Labels:
    if path is not None:
        return read_labels(path, num_classes)
    config = pretrained_config(module)
    names, described = config.get("label_names"), config.get("label_descriptions")
    usable = isinstance(names, (list, tuple)) and all(map(is_label, names))
    if usable and names and len(names) == num_classes:
        described = described if isinstance(described, dict) else {}
        texts = tuple(str(described.get(str(name), name)) for name in names)
        return Labels(names=texts, source="the model's config")
    if num_classes == 1:
        return Labels(names=("output",), source="the model's one output")
    subset = timm.data.infer_imagenet_subset({"num_classes": num_classes})
    if not subset:
        return Labels()
    texts = tuple(timm.data.ImageNetInfo(subset).label_descriptions())
    return Labels(names=texts, source=subset, assumed=True)
