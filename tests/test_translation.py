"""Models of transformers: the same logits and the same maps, whatever form they come in."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import linear_oracles
import oracles
from comparison import TOLERANCE
from fixtures_io import Shell, save_pictures
from fixtures_methods import make_method
from fixtures_transformers import CASES, CLASSES, SourceCase, outputs, source, transformers
from linear_oracles import (
    BALANCED,
    ORDINARY,
    SHARED,
    VALUE,
    ImageTrace,
    LinearTrace,
    Rules,
    linear_trace,
)
from vitviz.errors import WeightsError
from vitviz.explaining.batch import explain_batch
from vitviz.methods.method import Method
from vitviz.models.checkpoints import mismatch
from vitviz.models.model import Model, load_model
from vitviz.models.tokens import Readout
from vitviz.models.translation import object_config, translation_of
from vitviz.options import AttentionRule, ResidualRule

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
]

BY_NAME = {case.name: case for case in CASES}
VIT, DINOV2 = BY_NAME["vit"], BY_NAME["dinov2"]
READOUTS: dict[str, Callable[[SourceCase], Callable[[int], oracles.Array]]] = {
    "CLASS_TOKEN": lambda case: oracles.class_token,
    "CLASS_AND_DISTILLATION": lambda case: oracles.class_and_distillation,
    "TOKEN_AVERAGE": lambda case: oracles.all_tokens,
    "PATCH_AVERAGE": lambda case: oracles.patches_after(case.prefix_tokens),
    "CLASS_BESIDE_AVERAGE": lambda case: oracles.class_beside_patches_after(case.prefix_tokens),
}
each_case = pytest.mark.parametrize("case", CASES, ids=str)


def save(model: nn.Module, folder: Path, **options: Any) -> Path:
    model.save_pretrained(folder, **options)  # type: ignore[operator]
    return folder


def assert_same(model: Model, case: SourceCase, expected: Tensor | None = None) -> None:
    images = case.images()
    wanted = outputs(source(case), images) if expected is None else expected
    with torch.no_grad():
        found = model.output(images)
    assert found.shape == wanted.shape
    assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()


@each_case
def test_saved_model_gives_the_same_logits(case: SourceCase, tmp_path: Path) -> None:
    model = load_model(str(save(source(case), tmp_path)), device="cpu")
    assert_same(model, case)
    assert model.layout.readout is Readout[case.reads]
    assert model.layout.prefix_tokens == case.prefix_tokens
    assert model.num_classes == (CLASSES if case.classifies else model.num_classes)
    assert bool(model.labels.names) is case.classifies
    assert model.weights == "pretrained"


@each_case
def test_model_object_gives_the_same_logits(case: SourceCase) -> None:
    model = load_model(source(case), device="cpu")
    assert_same(model, case)
    assert (model.name, model.weights) == (case.architecture, "given")


@each_case
def test_names_in_memory_are_known_as_well_as_those_of_files(
    case: SourceCase, tmp_path: Path
) -> None:
    """What version 5 calls its parts in memory is what training scripts save."""
    source(case).config.save_pretrained(tmp_path)  # type: ignore[union-attr, operator]
    config = tmp_path / "config.json"
    if case.architecture not in config.read_text():
        pytest.skip("this transformers names no architecture in the config of an unsaved model")
    torch.save(dict(source(case).state_dict()), tmp_path / "best.pt")
    assert_same(load_model(weights=tmp_path / "best.pt", device="cpu"), case)


def forms(folder: Path) -> dict[str, Callable[[], Path]]:
    """Save the model in every form that its weights come in; return the file to load."""
    model = source(VIT)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def as_saved(name: str, content: object) -> Path:
        torch.save(content, folder / name)
        return folder / name

    def in_half() -> Path:
        halves = {name: tensor.bfloat16().float().bfloat16() for name, tensor in state.items()}
        save_file(halves, folder / "half.safetensors")
        return folder / "half.safetensors"

    save(model, folder, max_shard_size="60KB")
    return {
        "shards": lambda: folder / "model.safetensors.index.json",
        "one shard": lambda: sorted(folder.glob("model-0000*.safetensors"))[0],
        "bin": lambda: as_saved("pytorch_model.bin", state),
        "lightning": lambda: as_saved(
            "last.ckpt", {"epoch": 3, "state_dict": {f"net.{n}": t for n, t in state.items()}}
        ),
        "compiled": lambda: as_saved("c.pt", {f"_orig_mod.{n}": t for n, t in state.items()}),
        "data parallel": lambda: as_saved("p.pt", {f"module.{n}": t for n, t in state.items()}),
        "half": in_half,
    }


@pytest.mark.parametrize(
    "form", ["shards", "one shard", "bin", "lightning", "compiled", "data parallel", "half"]
)
def test_weights_are_found_in_every_form(form: str, tmp_path: Path) -> None:
    path = forms(tmp_path)[form]()
    model = load_model(weights=path, device="cpu")
    assert any("taken as ViTForImageClassification, by the config.json" in n for n in model.notes)
    if form == "half":
        with torch.no_grad():
            change = model.output(VIT.images()) - outputs(source(VIT), VIT.images())
        assert 0 < change.abs().max() < 0.2
    else:
        assert_same(model, VIT)
    again = load_model(str(tmp_path), weights=path, device="cpu")
    assert again.digest == model.digest
    assert not [note for note in again.notes if "loaded as" in note]


@pytest.mark.parametrize("name", ["vit", "dinov2", "dinov2-registers", "beit"])
@pytest.mark.parametrize("side", [48, 56, 24])
def test_positions_are_fitted_to_another_size_as_transformers_does(
    name: str, side: int, tmp_path: Path
) -> None:
    case = BY_NAME[name]
    model = load_model(str(save(source(case), tmp_path)), img_size=side, device="cpu")
    images = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(2))
    fitted = {"interpolate_pos_encoding": True} if name == "vit" else {}
    with torch.no_grad():
        expected = source(case)(images, **fitted).logits
        found = model.output(images)
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    patches = f"positions of 4×4 patches resized to {side // 8}×{side // 8}"
    assert any(patches in note for note in model.notes)


# Maps


@cache
def by_hand(case: SourceCase, rules: Rules) -> LinearTrace:
    """Run transformers' own model, never seen by the package, in double precision."""
    trace = linear_trace(case.build(), case.images(), rules)
    if not trace.attention:
        pytest.skip(f"transformers {transformers.__version__} has its heads in the batch")
    return trace


@cache
def about_top_class(case: SourceCase, rules: Rules) -> list[ImageTrace]:
    trace = by_hand(case, rules)
    return trace.about(trace.scores.argmax(dim=1).tolist())


def rolled_out(case: SourceCase, image: int, *, by_gradient: bool) -> oracles.Array:
    """Roll attention out for one image, by the gradients of its best class or without."""
    of_class = about_top_class(case, ORDINARY)[image] if by_gradient else None
    attention = [call[image].detach().numpy() for call in by_hand(case, VALUE).attention]
    return oracles.token_relevance(
        of_class.attention if of_class else attention,
        of_class.attention_gradients if of_class else None,
        readout=READOUTS[case.reads](case)(attention[0].shape[-1]),
        discard=0.5,
    )


def classic(case: SourceCase, image: int) -> oracles.Array:
    of_class = about_top_class(case, ORDINARY)[image]
    return linear_oracles.classic_relevance(
        of_class.attention,
        of_class.attention_gradients,
        readout=READOUTS[case.reads](case)(of_class.attention[0].shape[-1]),
    )


# Each method with its options, and the tokens' relevance of one image by the formulas.
METHODS: dict[str, tuple[Method, Callable[[SourceCase, int], oracles.Array]]] = {
    "rollout": (
        make_method("rollout", discard=0.5),
        lambda case, image: rolled_out(case, image, by_gradient=False),
    ),
    "grad-rollout": (
        make_method("grad-rollout", discard=0.5),
        lambda case, image: rolled_out(case, image, by_gradient=True),
    ),
    "relevance": (
        make_method("relevance"),
        lambda case, image: linear_oracles.token_relevance(about_top_class(case, VALUE)[image]),
    ),
    "classic": (make_method("relevance", classic=True), classic),
    "evidence": (
        make_method("evidence"),
        lambda case, image: linear_oracles.token_evidence(about_top_class(case, BALANCED)[image]),
    ),
    "plain": (
        make_method("evidence", residual=ResidualRule.PLAIN),
        lambda case, image: linear_oracles.token_evidence(about_top_class(case, VALUE)[image]),
    ),
    "shared": (
        make_method("evidence", rule=AttentionRule.SHARED, residual=ResidualRule.PLAIN),
        lambda case, image: linear_oracles.token_evidence(about_top_class(case, SHARED)[image]),
    ),
}
MAPS = [
    (case, method)
    for case in CASES
    for method in (METHODS if case.classifies else ["rollout"])
    if case.classifies or case.name.startswith("dinov3")  # of which there is no classifier
]


@pytest.mark.slow
@pytest.mark.parametrize(("case", "method"), MAPS, ids=lambda each: str(each))
def test_maps_are_those_of_the_formulas_on_transformers_own_model(
    case: SourceCase, method: str
) -> None:
    model = load_model(source(case), device="cpu")
    options, formula = METHODS[method]
    found = np.asarray(explain_batch(model, case.images(), options).relevance)[:, 0]
    for image, relevance in enumerate(found):
        expected = oracles.on_grid(formula(case, image), case.prefix_tokens, (4, 4))
        span = expected.max() - expected.min()
        assert np.abs(relevance - expected).max() <= TOLERANCE * span


# What lies beside the weights


def test_processor_labels_and_problem_are_honoured(tmp_path: Path) -> None:
    model = VIT.build()
    model.config.problem_type = "multi_label_classification"  # type: ignore[union-attr]
    save(model, tmp_path)
    processor = transformers.ViTImageProcessor(
        size={"height": 32, "width": 32}, image_mean=[0.1, 0.2, 0.3], image_std=[0.4, 0.5, 0.6],
        resample=3,
    )  # fmt: skip
    processor.save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path), device="cpu")
    seen = loaded.preprocessing
    assert (seen.size, seen.interpolation, seen.crop_pct) == ((32, 32), "bicubic", 1)
    assert np.allclose(seen.mean, (0.1, 0.2, 0.3)) and np.allclose(seen.std, (0.4, 0.5, 0.6))
    assert loaded.labels.names == tuple(f"kind {index}" for index in range(CLASSES))
    assert loaded.score_kind == "sigmoid"
    assert not loaded.notes


def test_dinov2_is_built_for_what_its_processor_crops(tmp_path: Path) -> None:
    save(source(DINOV2), tmp_path)
    transformers.BitImageProcessor(
        size={"shortest_edge": 64}, crop_size={"height": 48, "width": 48}
    ).save_pretrained(tmp_path)
    model = load_model(str(tmp_path), device="cpu")
    assert (model.preprocessing.size, model.layout.grid) == ((48, 48), (6, 6))
    assert model.preprocessing.crop_pct == 0.75
    images = torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(2))
    assert_same_images(model, DINOV2, images)


def assert_same_images(model: Model, case: SourceCase, images: Tensor) -> None:
    expected = outputs(source(case), images)
    with torch.no_grad():
        assert (model.output(images) - expected).abs().max() <= 1e-5 * expected.abs().max()


# Objects


def test_object_stays_as_it_was_in_its_own_numbers_and_wrapper() -> None:
    model = VIT.build().double().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    loaded = load_model(nn.DataParallel(model), device="cpu", mean=0.5)
    assert loaded.dtype is torch.float64
    assert model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_object_inside_of_a_module_with_weights_of_its_own_is_refused() -> None:
    from vitviz.errors import UnsupportedModelError

    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.vit, self.extra = VIT.build(), nn.Linear(7, 3)

    with pytest.raises(UnsupportedModelError, match=r"weights of its own \(extra.weight\)"):
        load_model(Own(), device="cpu")


# Refusals and commands

ODD_SHAPES = ((), (0,), (1,), (3,), (47, 5), (0, 48), (1, 1, 1, 1, 1))


@pytest.mark.slow
@each_case
def test_tensor_of_any_odd_shape_is_named_with_its_place(case: SourceCase, tmp_path: Path) -> None:
    config = object_config(source(case))
    (tmp_path / "config.json").write_text(json.dumps(config, default=str))
    translation = translation_of(tmp_path)
    assert translation is not None
    with torch.device("meta"):
        skeleton = translation.build()
    state = dict(source(case).state_dict())
    assert not mismatch(translation.state(translation.renamed(state, "w"), skeleton), skeleton)
    read = [name for name in state if translation.renamed({name: 0}, "w")]
    first = [name for name in read if ".1." not in name and ".2." not in name]
    for name, shape in itertools.product(first, ODD_SHAPES):
        if shape != state[name].shape and state[name].numel():
            odd = translation.renamed({**state, name: torch.ones(shape)}, "w")
            assert mismatch(translation.state(odd, skeleton), skeleton), (name, shape)


@pytest.mark.parametrize("name", ["vit", "siglip-bare", "deit-one-head"])
@pytest.mark.parametrize("odd", ["qkv", "scalars", "none"])
def test_file_of_odd_tensors_ends_in_one_line(name: str, odd: str, tmp_path: Path) -> None:
    save(source(BY_NAME[name]), tmp_path)
    file = tmp_path / "model.safetensors"
    state = load_file(file)
    if odd == "none":
        state = {}
    for each in state:
        if odd == "scalars" or "query" in each or "q_proj" in each:
            state[each] = torch.ones(())
    save_file(state, file)
    with pytest.raises(WeightsError, match=rf"^{file} ") as caught:
        load_model(str(tmp_path), device="cpu")
    assert "\n" not in str(caught.value)


def test_weights_that_lack_a_part_are_refused(tmp_path: Path) -> None:
    save(source(VIT), tmp_path)
    state = dict(source(VIT).state_dict())
    missing = next(name for name in state if name.endswith(("k_proj.bias", "key.bias")))
    del state[missing]
    torch.save(state, tmp_path / "w.pt")
    with pytest.raises(WeightsError, match=r"does not fit ViTForImageClassification: 1 missing"):
        load_model(weights=tmp_path / "w.pt", device="cpu")


def test_commands_take_a_saved_folder(
    tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    save_pictures(tmp_path, ["a.png"])
    save(source(DINOV2), tmp_path / "mine")
    shell = Shell(capfdbinary, monkeypatch)
    done = shell("grad-rollout", "a.png", "-m", "mine", "--class", "kind 3", "--json")
    assert done.code == 0, done.err
    assert done.records[0]["outputs"][0]["class_label"] == "kind 3"
    alone = shell("rollout", "a.png", "--weights", "mine/model.safetensors", "--json")
    assert alone.code == 0, alone.err
    told = shell("inspect", "mine")
    assert told.code == 0, told.err
    assert b"reads the class token beside the average of the patch tokens" in told.out
