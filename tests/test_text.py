"""Text as classes: scores, maps and commands of CLIP's and SigLIP's towers, given embeddings."""

from __future__ import annotations

import json
import math
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

import oracles
from fixtures_io import Shell, save_pictures
from fixtures_methods import make_method
from vitviz.errors import OptionError, VitvizError
from vitviz.explaining.batch import explain_batch
from vitviz.models.model import Model, load_model
from vitviz.models.prompts import _repository, embed_prompts, phrases

pytestmark = pytest.mark.usefixtures("one_thread")

WIDTH, SIZE = 24, 32
NAMES = ("a dog", "a cat", "grass, lawn")
SIZES: dict[str, Any] = {"img_size": SIZE, "patch_size": 8, "embed_dim": 48, "depth": 3}
TOWERS: dict[str, tuple[str, dict[str, Any]]] = {
    "clip": ("vit_base_patch16_clip_224", {**SIZES, "num_heads": 3, "num_classes": WIDTH}),
    "siglip": ("vit_base_patch16_siglip_224", {**SIZES, "num_heads": 4, "num_classes": 0}),
    "eva": ("eva02_base_patch16_clip_224", {**SIZES, "num_heads": 3, "num_classes": WIDTH}),
}


def tower(kind: str) -> nn.Module:
    """Build a small tower with weights under which it tells images apart."""
    name, arguments = TOWERS[kind]
    torch.manual_seed(1)
    module: nn.Module = timm.create_model(name, **arguments)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            spread = 0.3 if parameter.dim() > 1 else 0.1
            parameter.add_(spread * torch.randn_like(parameter))
            if name == "head.bias":
                parameter.zero_()
    return module.eval()


def width(kind: str) -> int:
    return TOWERS[kind][1]["num_classes"] or 48


def vectors(kind: str, templates: int = 1) -> Tensor:
    """Draw (names, templates, width), of any length."""
    generator = torch.Generator().manual_seed(5)
    return 3 * torch.randn(len(NAMES), templates, width(kind), generator=generator)


def save_named(path: Path, kind: str, **others: float) -> Path:
    named = {name: vector[0].clone() for name, vector in zip(NAMES, vectors(kind), strict=True)}
    save_file(named | {name: torch.tensor(value) for name, value in others.items()}, path)
    return path


def images() -> Tensor:
    return torch.randn(3, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(3))


def cosines(module: nn.Module, kind: str) -> Tensor:
    """Compute cosines (images, names) in float64."""
    with torch.no_grad():
        embedded = deepcopy(module).double()(images().double())
    return F.cosine_similarity(embedded[:, None], vectors(kind)[None, :, 0].double(), dim=-1)


def logits(model: Model) -> Tensor:
    with torch.no_grad():
        return model.output(images()).double()


def close(found: Tensor, expected: Tensor) -> bool:
    return bool((found - expected).abs().max() <= 1e-5 * expected.abs().max())


# Scores


@pytest.mark.parametrize("kind", TOWERS)
def test_logits_are_scaled_cosines(tmp_path: Path, kind: str) -> None:
    module, path = tower(kind), save_named(tmp_path / "t.safetensors", kind, logit_scale=3.5)
    model = load_model(module, text_embeddings=path)
    order = [
        NAMES.index(name) for name in model.labels.names
    ]  # safetensors has an order of its own
    assert sorted(order) == [0, 1, 2]
    assert close(logits(model), (math.exp(3.5) * cosines(module, kind))[:, order])
    assert (model.num_classes, model.score_kind) == (3, "softmax")
    assert model.labels.source == str(path)


def test_bias_is_added_and_its_classes_do_not_exclude_each_other(tmp_path: Path) -> None:
    module = tower("siglip")
    path = save_named(tmp_path / "t.safetensors", "siglip", logit_scale=4.0, logit_bias=-12.5)
    model = load_model(module, text_embeddings=path)
    order = [NAMES.index(name) for name in model.labels.names]
    assert close(logits(model), (math.exp(4) * cosines(module, "siglip") - 12.5)[:, order])
    assert model.score_kind == "sigmoid"
    assert any("3 prompts as classes, scored by cosine × 54.5982 - 12.5" in n for n in model.notes)


def test_scale_that_is_not_given_is_assumed_and_that_is_said(tmp_path: Path) -> None:
    model = load_model(
        tower("clip"), text_embeddings=save_named(tmp_path / "t.safetensors", "clip")
    )
    (note,) = model.notes
    assert note.endswith("cosine × 100, as logit_scale is not given")


@pytest.mark.parametrize("form", ["npz", "safetensors"])
@pytest.mark.parametrize("templates", [1, 4])
def test_names_and_vectors_are_read_and_templates_averaged(
    tmp_path: Path, form: str, templates: int
) -> None:
    module, drawn = tower("clip"), vectors("clip", templates)
    given = drawn[:, 0] if templates == 1 else drawn
    path = tmp_path / f"t.{form}"
    if form == "npz":
        np.savez(path, names=np.array(NAMES), vectors=given.numpy(), logit_scale=np.float32(2))
    else:
        content = {"vectors": given.contiguous(), "logit_scale": torch.tensor(2.0)}
        save_file(content, path, {"names": json.dumps(NAMES)})
    model = load_model(module, text_embeddings=path)
    assert model.labels.names == NAMES
    mean = F.normalize(F.normalize(drawn.double(), dim=-1).mean(dim=1), dim=-1)
    with torch.no_grad():
        embedded = F.normalize(deepcopy(module).double()(images().double()), dim=-1)
    assert close(logits(model), math.exp(2) * embedded @ mean.T)


def test_half_precision_is_kept(tmp_path: Path) -> None:
    path = save_named(tmp_path / "t.safetensors", "clip", logit_scale=2.0)
    model = load_model(tower("clip").bfloat16(), text_embeddings=path)
    with torch.no_grad():
        assert model.output(images().bfloat16()).dtype is torch.bfloat16


def test_model_object_is_left_as_it_was(tmp_path: Path) -> None:
    module = tower("clip")
    before, head = module(images()), module.head
    load_model(module, text_embeddings=save_named(tmp_path / "t.safetensors", "clip"))
    assert module.head is head
    assert torch.equal(module(images()), before)


# Maps


def test_gradient_map_of_a_prompt_is_that_of_its_cosine(tmp_path: Path) -> None:
    module, text = tower("clip"), vectors("clip")[:, 0]

    class Cosines(type(module)):  # type: ignore[misc]
        def forward(self, x: Tensor) -> Tensor:
            return 100 * F.cosine_similarity(super().forward(x)[:, None], text[None], dim=-1)

    reference = deepcopy(module)
    reference.__class__ = Cosines
    np.savez(tmp_path / "t.npz", names=np.array(NAMES), vectors=text.numpy())
    model = load_model(module, text_embeddings=tmp_path / "t.npz")
    method = make_method("grad-rollout", discard=0.0, start_layer=0, classes=("a cat",))
    found = explain_batch(model, images(), method).relevance[:, 0].numpy()
    trace = oracles.trace(reference, images(), blocks=3)
    gradients = trace.gradients([1, 1, 1])
    for image, relevance in enumerate(found):
        tokens = oracles.token_relevance(
            [each[image] for each in trace.attention],
            [each[image] for each in gradients],
            readout=oracles.class_token(17),
            discard=0.0,
        )
        expected = oracles.on_grid(tokens, 1, (4, 4))
        assert np.abs(relevance - expected).max() < 1e-4 * np.ptp(expected)


@pytest.mark.parametrize("kind", TOWERS)
@pytest.mark.parametrize("name", ["evidence", "relevance"])
def test_length_of_the_embedding_counts_as_constant_in_linearised_maps(
    tmp_path: Path, kind: str, name: str
) -> None:
    module, text = tower(kind), F.normalize(vectors(kind)[:, 0], dim=-1)
    np.savez(tmp_path / "t.npz", names=np.array(NAMES), vectors=text.numpy())
    model = load_model(module, text_embeddings=tmp_path / "t.npz")
    image = images()[:1]
    with torch.no_grad():
        length = module(image).norm()
    fixed = deepcopy(module)
    scores = nn.Linear(width(kind), 3, bias=False)
    scores.weight = nn.Parameter(100 * text / length)
    fixed.head = nn.Sequential(fixed.head, scores)
    fixed.num_classes = 3  # type: ignore[assignment]
    method = make_method(name, classes=("0", "1", "2"))
    found = explain_batch(model, image, method).relevance
    expected = explain_batch(load_model(fixed), image, method).relevance
    assert (found - expected).abs().max() < 1e-5 * (expected.max() - expected.min())


# Refusals


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ({}, "has no vectors"),
        ({"a dog": torch.ones(5)}, "vectors of 5 numbers, but VisionTransformer gives images 24"),
        ({"a dog": torch.ones(24), "a cat": torch.ones(23)}, r"vectors of \[23, 24\] numbers"),
        ({"a dog": torch.zeros(24)}, "'a dog' is 0"),
        ({"a dog": torch.full((24,), torch.nan)}, "'a dog' is no vector"),
        ({"a dog": torch.ones(2, 2, 24)}, "'a dog' is no vector"),
        ({"a dog": torch.ones(24, dtype=torch.int64)}, "'a dog' is no vector"),
        ({"a dog": torch.ones(24), " a dog": torch.ones(24)}, "two vectors of one name"),
        ({"a dog": torch.ones(24), "logit_scale": torch.ones(2)}, "logit_scale is no number"),
        ({"a dog": torch.ones(24), "logit_scale": torch.tensor(1000.0)}, r"by exp\(1000\)"),
    ],
    ids=range(10),
)
def test_what_are_no_embeddings_of_the_tower_is_refused_in_one_line(
    tmp_path: Path, content: dict[str, Tensor], reason: str
) -> None:
    save_file(content, tmp_path / "t.safetensors")
    with pytest.raises(VitvizError, match=reason) as caught:
        load_model(tower("clip"), text_embeddings=tmp_path / "t.safetensors")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "arrays",
    [
        {"names": np.array(NAMES), "vectors": np.ones((2, 24))},
        {"names": np.array(NAMES)},
        {"names": np.array("a dog"), "vectors": np.ones((1, 24))},
        {"names": np.array(NAMES, dtype=object), "vectors": np.ones((3, 24))},
        {"names": np.array(NAMES), "vectors": np.array(1.0)},
        {"names": np.array(NAMES), "__metadata__": np.ones(2)},
    ],
    ids=range(6),
)
def test_vectors_that_are_not_named_are_refused(tmp_path: Path, arrays: dict[str, Any]) -> None:
    np.savez(tmp_path / "t.npz", **arrays)
    with pytest.raises(VitvizError, match="does not name each|no readable npz"):
        load_model(tower("clip"), text_embeddings=tmp_path / "t.npz")


def test_model_that_brings_no_images_among_texts_is_refused(tmp_path: Path) -> None:
    path = save_named(tmp_path / "t.safetensors", "siglip")
    module = timm.create_model("vit_small_patch14_dinov2", **{**SIZES, "num_heads": 3})
    with pytest.raises(OptionError, match="brings no images among texts"):
        load_model(module.eval(), text_embeddings=path)
    with pytest.raises(OptionError, match="all name the classes"):
        load_model(tower("siglip"), text_embeddings=path, labels=path)
    with pytest.raises(OptionError, match="is not a file"):
        load_model(tower("siglip"), text_embeddings=tmp_path / "nothing")


# Commands


def save_folder(tmp_path: Path, kind: str) -> None:
    name, arguments = TOWERS[kind]
    arguments = {key: value for key, value in arguments.items() if key != "num_classes"}
    config = {
        "architecture": name,
        "num_classes": width(kind) if kind != "siglip" else 0,
        "model_args": arguments,
        "pretrained_cfg": {"input_size": [3, SIZE, SIZE], "first_conv": "patch_embed.proj"},
    }
    (tmp_path / "tower").mkdir()
    (tmp_path / "tower" / "config.json").write_text(json.dumps(config))
    save_file(tower(kind).state_dict(), tmp_path / "tower" / "model.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_commands_explain_prompts(tmp_path: Path, shell: Shell, kind: str) -> None:
    save_folder(tmp_path, kind)
    save_pictures(tmp_path, ["a.png"])
    save_named(tmp_path / "t.safetensors", kind, logit_scale=4.6)
    common = ("a.png", "-m", "tower", "--text-embeddings", "t.safetensors")
    for method in ("grad-rollout", "relevance", "evidence"):
        run = shell(method, *common, "--class", "a cat", "--json")
        assert run.code == 0, run.err
        (record,) = run.records
        assert record["outputs"][0]["class_label"] == "a cat"
        assert {each["class_label"] for each in record["predictions"]} == set(NAMES)
        assert "t.safetensors: 3 prompts as classes" in run.err
    run = shell("evaluate", *common, "--methods", "evidence", "--bootstrap", "10")
    assert run.code == 0, run.err
    run = shell("relevance", *common, "--class", "a horse")
    assert run.code == 2
    assert "one of: 'a cat'" in run.err


# open_clip itself


def whole_model(tmp_path: Path, kind: str, **others: Any) -> nn.Module:
    """Save a small model of open_clip with its config in a folder that is timm's tower as well."""
    import open_clip

    save_folder(tmp_path, kind)
    text = {"context_length": 12, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
    vision: dict[str, Any] = {"image_size": SIZE}
    config: dict[str, Any] = {"embed_dim": width(kind), "vision_cfg": vision, "text_cfg": text}
    torch.manual_seed(0)
    if kind == "clip":
        vision |= {"patch_size": 8, "width": 48, "layers": 3, "head_width": 16}
        model: Any = open_clip.CLIP(**config, **others)
    else:
        vision |= {"timm_model_name": "vit_base_patch16_siglip_224", "timm_pool": "map"}
        vision |= {"timm_proj": "none"}
        config["init_logit_bias"] = -10
        model = open_clip.CustomTextCLIP(**config)
        model.visual.trunk = tower(kind)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    home = tmp_path / "tower"
    config |= others
    (home / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
    (home / "model.safetensors").unlink()
    save_file(model.state_dict(), home / "open_clip_model.safetensors")
    whole: nn.Module = model.eval()
    return whole


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_logits_are_those_of_open_clip_with_its_own_checkpoint(tmp_path: Path, kind: str) -> None:
    model: Any = whole_model(tmp_path, kind)
    tokens = torch.randint(1, 50, (3, 12))
    with torch.no_grad():
        prompts = model.encode_text(tokens)
        expected, _ = model.get_logits(images(), tokens)
    np.savez(tmp_path / "t.npz", names=np.array(NAMES), vectors=prompts.numpy())
    found = load_model(
        str(tmp_path / "tower"),
        weights=tmp_path / "tower" / "open_clip_model.safetensors",
        text_embeddings=tmp_path / "t.npz",
        device="cpu",
    )
    assert close(logits(found), expected.double())
    assert found.score_kind == ("sigmoid" if kind == "siglip" else "softmax")


@pytest.mark.slow
@pytest.mark.parametrize("form", ["weights", "folder", "training"])
def test_prompts_are_scored_as_by_open_clip(tmp_path: Path, form: str) -> None:
    whole: Any = whole_model(tmp_path, "clip")
    home, weights = tmp_path / "tower", None
    if form != "folder":
        weights = home / "open_clip_model.safetensors"
    if form == "training":
        state = {f"module.{name}": tensor for name, tensor in whole.state_dict().items()}
        weights = home / "epoch_1.pt"
        torch.save({"epoch": 1, "name": "run", "state_dict": state}, weights)
    import open_clip

    templates = [str.lower, lambda name: f"a photo of {name}."]
    model = load_model(
        str(home),
        weights=weights,
        text={name: [each(name) for each in templates] for name in NAMES},
        device="cpu",
    )
    tokenizer = open_clip.SimpleTokenizer(context_length=12)
    with torch.no_grad():
        classifier = open_clip.build_zero_shot_classifier(whole, tokenizer, NAMES, templates)
        embedded = whole.encode_image(images(), normalize=True)
        expected = whole.logit_scale.exp() * embedded @ classifier
    assert close(logits(model), expected.double())
    assert model.labels.names == NAMES
    for one in ("a dog", {"a dog": "a dog"}, ["a dog"]):
        again = load_model(str(home), weights=weights, text=one, device="cpu")
        assert again.labels.names == ("a dog",)


def test_activation_of_another_tower_is_found_out(tmp_path: Path) -> None:
    whole_model(tmp_path, "clip", quick_gelu=True)
    with pytest.raises(VitvizError, match="sees an image otherwise.*quickgelu"):
        load_model(str(tmp_path / "tower"), text=NAMES, device="cpu")


def test_command_line_scores_prompts(tmp_path: Path, shell: Shell) -> None:
    whole_model(tmp_path, "clip")
    save_pictures(tmp_path, ["a.png"])
    words = ("--text", "a dog", "--text", "a cat", "--template", "a photo of {}.")
    run = shell("relevance", "a.png", "-m", "tower", *words, "--class", "a cat", "--json")
    assert run.code == 0, run.err
    assert run.records[0]["outputs"][0]["class_label"] == "a cat"
    assert "open_clip_model.safetensors: 2 prompts as classes, scored by cosine" in run.err


@pytest.mark.parametrize(
    ("name", "repository"),
    [
        ("vit_base_patch16_siglip_224.webli", "timm/ViT-B-16-SigLIP"),
        ("vit_base_patch16_clip_224.openai", "timm/vit_base_patch16_clip_224.openai"),
    ],
)
def test_whole_model_of_a_tower_of_timm_is_the_one_that_open_clip_takes(
    name: str, repository: str
) -> None:
    assert _repository(name) == repository
    with pytest.raises(OptionError, match="knows no text tower for vit_tiny"):
        _repository("vit_tiny_patch16_224")


def test_whole_model_of_the_hub_is_taken_from_its_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole: Any = whole_model(tmp_path, "clip")
    files = {"open_clip_config.json": "open_clip_config.json"}
    files["open_clip_pytorch_model.bin"] = "open_clip_model.safetensors"  # as the hub's room looks

    def cached(repository: str, filename: str) -> Path:
        assert repository == "owner/name"
        return tmp_path / "tower" / files[filename]

    monkeypatch.setattr("vitviz.models.prompts.fetch_from_hub", cached)
    found = embed_prompts({"a dog": ["a dog"]}, "hf-hub:owner/name", None, None)
    import open_clip

    with torch.no_grad():
        expected = whole.encode_text(open_clip.SimpleTokenizer(context_length=12)(["a dog"]))
    assert close(found.vectors.double(), F.normalize(expected, dim=-1).double())


def test_whole_model_without_its_text_tower_is_refused(tmp_path: Path) -> None:
    whole: Any = whole_model(tmp_path, "clip")
    state = {n: t for n, t in whole.state_dict().items() if n.startswith(("visual.", "logit"))}
    save_file(state, tmp_path / "tower" / "open_clip_model.safetensors")
    with pytest.raises(VitvizError, match="has no positional_embedding.*both towers"):
        load_model(str(tmp_path / "tower"), text=NAMES, device="cpu")


def test_whole_model_must_be_there(tmp_path: Path) -> None:
    whole_model(tmp_path, "clip")
    (tmp_path / "tower" / "open_clip_config.json").unlink()
    with pytest.raises(OptionError, match=r"has no open_clip_config.json"):
        load_model(str(tmp_path / "tower"), text=NAMES, device="cpu")


def test_prompts_without_open_clip_are_refused_with_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vitviz.models.prompts.find_spec", lambda name: None)
    save_folder(tmp_path, "clip")
    with pytest.raises(OptionError, match=r"vitviz\[text\]"):
        load_model(str(tmp_path / "tower"), text=["a dog"], device="cpu")


def test_prompts_and_templates_are_checked() -> None:
    assert phrases(["a", "b"], ["x {}", "{}!"]) == {"a": ["x a", "a!"], "b": ["x b", "b!"]}
    assert phrases(["a {b}"]) == {"a {b}": ["a {b}"]}
    for prompts, templates in ((["a"], ["a photo"]), ([], ["{}"]), (["a", " a"], []), ([""], [])):
        with pytest.raises(OptionError):
            phrases(prompts, templates)
