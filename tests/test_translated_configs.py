"""Configs of transformers and of its image processors: what is honoured, and what is refused.

No transformers is needed for these: they are about text in files.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from safetensors.torch import save_file

from vitviz.errors import ModelError, UnsupportedModelError, WeightsError
from vitviz.models.building import build_skeleton
from vitviz.models.model import load_model
from vitviz.models.preprocessing import Preprocessing, preprocessing_of
from vitviz.models.translation import translation_of

pytestmark = pytest.mark.usefixtures("one_thread")

CONFIG: dict[str, Any] = {
    "model_type": "vit",
    "architectures": ["ViTForImageClassification"],
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 96,
    "image_size": 32,
    "patch_size": 8,
}
PLAIN = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6], "size": 32}
CROPPED = {**PLAIN, "size": 64, "crop_size": 48}
MEANS = ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
EDGE, SQUARE = {"shortest_edge": 64}, {"height": 32, "width": 32}


def write(folder: Path, processor: dict[str, Any] | None = None, **config: Any) -> Path:
    (folder / "config.json").write_text(json.dumps({**CONFIG, **config}))
    if processor is not None:
        (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


def seen(folder: Path) -> Preprocessing:
    return preprocessing_of(build_skeleton(f"local-dir:{folder}"))


@pytest.mark.parametrize(
    ("processor", "size", "crop_pct", "interpolation"),
    [
        (PLAIN, (32, 32), 1, "bilinear"),
        ({**PLAIN, "size": SQUARE, "resample": 3}, (32, 32), 1, "bicubic"),
        ({**PLAIN, "size": {"height": 24, "width": 48}}, (24, 48), 1, "bilinear"),
        ({**PLAIN, "size": EDGE}, (32, 32), 1, "bilinear"),
        (
            {**PLAIN, "size": EDGE, "crop_size": {"height": 48, "width": 48},
             "do_center_crop": True},
            (48, 48), 0.75, "bilinear",
        ),
        ({**CROPPED, "do_center_crop": True}, (48, 48), 0.75, "bilinear"),
        ({**CROPPED, "do_center_crop": False}, (64, 64), 1, "bilinear"),
        ({**PLAIN, "size": 64, "do_resize": False}, (32, 32), 1, "bilinear"),
    ],
)  # fmt: skip
def test_size_crop_and_filter_of_a_processor_are_taken(
    processor: dict[str, Any],
    size: tuple[int, int],
    crop_pct: float,
    interpolation: str,
    tmp_path: Path,
) -> None:
    found = seen(write(tmp_path, processor))
    assert (found.size, found.crop_pct, found.interpolation) == (size, crop_pct, interpolation)
    assert (found.mean, found.std) == MEANS


@pytest.mark.parametrize(
    ("changes", "mean", "std"),
    [
        ({"do_normalize": False}, (0,) * 3, (1,) * 3),
        ({"do_rescale": False, "image_mean": [127.5] * 3, "image_std": [51] * 3},
         (0.5,) * 3, (0.2,) * 3),
        ({"rescale_factor": 1 / 127.5}, (0.05, 0.1, 0.15), (0.2, 0.25, 0.3)),
        ({"image_mean": None, "image_std": None}, (0.5,) * 3, (0.5,) * 3),
    ],
)  # fmt: skip
def test_pixels_come_to_the_same_numbers_as_the_processors(
    changes: dict[str, Any], mean: tuple[float, ...], std: tuple[float, ...], tmp_path: Path
) -> None:
    found = seen(write(tmp_path, {**PLAIN, **changes}))
    assert found.mean == pytest.approx(mean)
    assert found.std == pytest.approx(std)


def test_processor_within_the_file_of_a_pair_is_found(tmp_path: Path) -> None:
    (write(tmp_path) / "processor_config.json").write_text(json.dumps({"image_processor": PLAIN}))
    assert seen(tmp_path).mean == MEANS[0]


BEIT = {"model_type": "beit", "architectures": ["BeitForImageClassification"]}
DINOV3 = {"model_type": "dinov3_vit", "architectures": ["DINOv3ViTModel"]}
SIGLIP = {"model_type": "siglip_vision_model", "architectures": ["SiglipVisionModel"]}
SIZES = tuple(CONFIG)[2:] + ("num_channels", "layer_norm_eps", "hidden_act")
_GATED = ("mlp_ratio", "use_swiglu_ffn", "num_register_tokens")
KEYS: dict[str, tuple[str, ...]] = {
    "vit": ("qkv_bias", "num_labels"),
    "deit": ("qkv_bias",),
    "ijepa": ("qkv_bias",),
    "dinov2": _GATED,
    "dinov2_with_registers": _GATED,
    "beit": (
        "use_absolute_position_embeddings",
        "use_relative_position_bias",
        "use_shared_relative_position_bias",
        "layer_scale_init_value",
        "use_mean_pooling",
    ),
    "dinov3_vit": (
        *("rope_theta", "num_register_tokens", "use_gated_mlp"),
        *("query_bias", "key_bias", "value_bias", "proj_bias", "mlp_bias"),
    ),
    "clip": ("projection_dim",),
    "siglip": ("vision_use_head",),
}
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"model_type": "swin"}, "'swin' is none of the plain.*it knows vit, deit, "),
    ({"architectures": ["ViTForMaskedImageModeling"]}, "no classifier and no bare encoder"),
    ({**BEIT, "architectures": ["BeitForSemanticSegmentation"]}, "BeitForSemanticSegmentation is"),
    ({"architectures": None}, "vit without a class is no classifier"),
    ({"hidden_act": "selu"}, "hidden_act is 'selu'; expected one of gelu"),
    ({"hidden_size": 50}, "hidden_size 50 is no multiple of num_attention_heads 3"),
    ({"architectures": [1]}, "vit without a class is no classifier"),
    ({"id2label": ["cat"]}, r"id2label is \['cat'\]; expected a name for each class, counted"),
    ({"id2label": {"1": "cat", "2": "dog"}}, r"id2label is \{'1': 'cat', '2': 'dog'\}; expected"),
    ({"id2label": {"one": "cat"}}, "expected a name for each class"),
    ({"num_labels": -1}, "num_labels is -1; expected a whole number"),
    ({"num_channels": 4}, r"num_channels is 4; expected 3 \(colours\) or 1"),
    (
        {"image_size": [32, 4]},
        r"image_size \(32, 4\) has no room for a patch of patch_size \(8, 8\)",
    ),
    ({"num_hidden_layers": 10**12}, "num_hidden_layers is 1000000000000; expected a whole number"),
    ({"intermediate_size": "9" * 10**5}, r"intermediate_size is '9{9,}\.\.\.9+'; expected a whole"),
    ({**BEIT, "hidden_act": "relu"}, "'relu', and timm's module for beit has gelu alone"),
    ({**BEIT, "image_size": [32, 48], "use_relative_position_bias": True}, "rows and columns"),
    ({**DINOV3, "key_bias": True}, "key_bias is true; timm's module has none"),
    ({**DINOV3, "use_gated_mlp": True}, "a gated MLP has 'gelu'; timm's has silu alone"),
    ({**SIGLIP, "vision_use_head": False}, "vision_use_head is false"),
]


@pytest.mark.parametrize(("changes", "reason"), REFUSED)
def test_config_that_timms_parts_cannot_follow_is_refused_with_the_reason(
    changes: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match=reason) as caught:
        load_model(str(write(tmp_path, PLAIN, **changes)), device="cpu")
    assert str(caught.value).startswith(f"{tmp_path}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", KEYS)
def test_every_value_of_another_kind_is_refused_by_its_name(kind: str, tmp_path: Path) -> None:
    architecture = "ViTForImageClassification" if kind == "vit" else "SomeModel"
    about = {"model_type": kind, "architectures": [architecture]}
    for key in (*SIZES, *KEYS[kind]):
        for odd in (None, "x", -1, [], {}, 1e99, float("nan"), [32, 32, 32], 10**12):
            inner = {**CONFIG, key: odd}
            config = {"vision_config": inner} if kind in ("clip", "siglip") else inner
            write(tmp_path, PLAIN, **{**config, **about})
            with pytest.raises(ModelError, match=rf"^{tmp_path}: .*\b{key} is ") as caught:
                translation_of(tmp_path)
            assert "\n" not in str(caught.value)


@pytest.mark.parametrize("tower", ["x", [1], 7], ids=str)
def test_tower_that_is_no_config_is_refused(tower: object, tmp_path: Path) -> None:
    write(tmp_path, model_type="clip", architectures=["CLIPModel"], vision_config=tower)
    with pytest.raises(ModelError, match=r"vision_config is .*; expected the config of a tower"):
        load_model(str(tmp_path), device="cpu")


def test_giant_that_a_config_promises_is_not_built(tmp_path: Path) -> None:
    write(tmp_path, PLAIN, intermediate_size=10**6, hidden_size=3 * 10**5)
    save_file({"vit.layernorm.weight": torch.ones(48)}, tmp_path / "model.safetensors")
    with pytest.raises(WeightsError, match=r"model.safetensors does not fit ViTForImage"):
        load_model(str(tmp_path), device="cpu")


@pytest.mark.parametrize(
    "processor",
    [{"size": "large"}, {"size": {"height": 3}, "crop_size": "x", "do_center_crop": True},
     {"resample": 17}, {"image_mean": "grey"}, {"rescale_factor": 0}, {"size": 7}, {"size": -1},
     {"image_std": [0, 1, 1]}, {"image_mean": [0.5]}, {"image_mean": [float("nan")] * 3},
     {"size": {"height": 10**12, "width": 32}}],
    ids=str,
)  # fmt: skip
def test_processor_that_cannot_be_followed_is_refused(
    processor: dict[str, Any], tmp_path: Path
) -> None:
    about = rf"^{tmp_path}: preprocessor_config.json is none that vitviz can"
    with pytest.raises(ModelError, match=about):
        load_model(str(write(tmp_path, processor)), device="cpu")


@pytest.mark.parametrize("text", ["", "{nope", "[1]", "{}", "[" * 100_000])
def test_processor_that_cannot_be_read_is_not_taken_for_none(text: str, tmp_path: Path) -> None:
    (write(tmp_path) / "preprocessor_config.json").write_text(text)
    with pytest.raises(ModelError, match=r"preprocessor_config.json holds no settings"):
        load_model(str(tmp_path), device="cpu")


@pytest.mark.parametrize("text", ["", "[]", '{"architecture": "test_vit", "model_type": "vit"}'])
def test_config_that_is_not_of_transformers_is_left_to_timm(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    assert translation_of(tmp_path) is None


def test_model_of_another_kind_is_refused_as_an_object_too() -> None:
    class Config:
        model_type = "swin"

        def to_dict(self) -> dict[str, Any]:
            return {"model_type": "swin"}

    module = torch.nn.Linear(2, 2)
    module.config = Config()  # type: ignore[assignment]
    with pytest.raises((ModelError, UnsupportedModelError), match="'swin' is none of the plain"):
        load_model(module, device="cpu")


def test_shape_that_no_size_fits_keeps_its_own_words(tmp_path: Path) -> None:
    write(tmp_path, PLAIN)
    save_file({"vit.layernorm.weight": torch.ones(48)}, tmp_path / "model.safetensors")
    with pytest.raises(WeightsError, match="does not fit ViTForImageClassification"):
        load_model(str(tmp_path), device="cpu")


# The hub's cache


@pytest.fixture
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Let a model without weights be in the cache of a hub that cannot be reached."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    home = tmp_path / "models--own--vit"
    snapshot = home / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text("abc")
    return write(snapshot)


def test_processor_is_fetched_beside_the_config_of_the_hub(cached: Path) -> None:
    with pytest.raises(WeightsError, match="own/vit is not in the cache"):
        build_skeleton("hf-hub:own/vit")
    (cached / "preprocessor_config.json").write_text(json.dumps(PLAIN))
    module = build_skeleton("hf-hub:own/vit")
    assert preprocessing_of(module).mean == MEANS[0]


def test_processor_that_the_hub_does_not_have_is_done_without(cached: Path) -> None:
    known = cached.parents[1] / ".no_exist" / "abc"
    known.mkdir(parents=True)
    (known / "preprocessor_config.json").touch()
    assert preprocessing_of(build_skeleton("hf-hub:own/vit")).mean == (0.5,) * 3


def test_all_shards_are_fetched_from_the_hub(cached: Path) -> None:
    (cached / "preprocessor_config.json").write_text(json.dumps(PLAIN))
    for name in ("model.safetensors", "pytorch_model.bin"):  # known to be missing
        missing = cached.parents[1] / ".no_exist" / "abc" / name
        missing.parent.mkdir(parents=True, exist_ok=True)
        missing.touch()
    shards = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    index = {"weight_map": {"vit.layernorm.weight": shards[0], "vit.layernorm.bias": shards[1]}}
    (cached / "model.safetensors.index.json").write_text(json.dumps(index))
    save_file({"vit.layernorm.weight": torch.ones(48)}, cached / shards[0])
    with pytest.raises(WeightsError, match="own/vit is not in the cache"):
        load_model("hf-hub:own/vit", device="cpu")
    save_file({"vit.layernorm.bias": torch.ones(48)}, cached / shards[1])
    with pytest.raises(WeightsError, match="does not fit ViTForImageClassification: 30 missing"):
        load_model("hf-hub:own/vit", device="cpu")
