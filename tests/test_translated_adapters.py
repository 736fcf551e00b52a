"""LoRA adapters on models of transformers: the logits are those of PEFT's own merging."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fixtures_io import Shell, save_pictures
from fixtures_transformers import CASES, SourceCase, outputs, source, transformers
from vitviz.errors import ModelError, OptionError, WeightsError
from vitviz.models.model import Model, load_model
from vitviz.models.tokens import Readout

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
]

BY_NAME = {case.name: case for case in CASES}
VIT = BY_NAME["vit"]
# Names of linear layers in transformers 4 and 5; those of text towers are among them.
LAYERS = (
    *("query", "key", "value", "q_proj", "k_proj", "v_proj", "dense", "o_proj"),
    *("fc1", "fc2", "weights_in", "gate_proj", "up_proj", "down_proj"),
)
FEW = ["query", "value", "q_proj", "v_proj"]


def trained(
    model: nn.Module, folder: Path, heads: bool, layers: list[str] | None = None, **config: Any
) -> nn.Module:
    """Save an adapter with drawn matrices; return the model that PEFT merges it into."""
    torch.manual_seed(0)
    named = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    kept = [each for each in ("classifier", "cls_classifier", "distillation_classifier")
            if heads and each in named]  # fmt: skip
    targets = layers or [each for each in LAYERS if each in named]
    settings = peft.LoraConfig(
        r=3, lora_alpha=5, target_modules=targets, modules_to_save=kept or None,
        init_lora_weights=False, **config,
    )  # fmt: skip
    wrapped = peft.get_peft_model(model, settings)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "modules_to_save" in name:
                parameter.add_(torch.randn_like(parameter))
            elif "lora_" in name:
                parameter.mul_(0.3)
    wrapped.save_pretrained(folder)
    merged: nn.Module = wrapped.merge_and_unload()
    return merged.eval()


def assert_same(model: Model, expected: nn.Module, images: Tensor) -> None:
    with torch.no_grad():
        found = deepcopy(model.module).double()(images.double())
    wanted = outputs(deepcopy(expected).double(), images.double())
    assert found.shape == wanted.shape
    assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_merged_logits_are_those_of_peft(case: SourceCase, tmp_path: Path) -> None:
    source(case).save_pretrained(tmp_path / "base")  # type: ignore[operator]
    merged = trained(case.build(), tmp_path / "lora", heads=case.classifies)
    model = load_model(str(tmp_path / "base"), adapter=tmp_path / "lora", device="cpu")
    assert_same(model, merged, case.images())
    with torch.no_grad():
        change = model.output(case.images()) - outputs(source(case), case.images())
    assert change.abs().max() > 0.1
    assert model.layout.readout is Readout[case.reads]
    assert model.weights == f"pretrained with {tmp_path}/lora/adapter_model.safetensors"
    (note,) = [each for each in model.notes if "adapter" in each]
    assert ("replacing head." in note) is case.classifies


PAIRS = {
    "vit": ("vit-bare", "ViTForImageClassification"),
    "dinov2": ("dinov2-bare", "Dinov2ForImageClassification"),
    "deit": ("deit", "DeiTForImageClassification"),
    "clip": ("clip-both", "CLIPForImageClassification"),
    "siglip": ("siglip-both", "SiglipForImageClassification"),
}


@pytest.mark.parametrize(
    ("family", "mapped"),
    [*((family, True) for family in PAIRS), ("vit", False), ("dinov2", False), ("clip", False)],
)
def test_classifier_that_the_base_does_not_have_comes_with_the_adapter(
    family: str, mapped: bool, tmp_path: Path
) -> None:
    case, architecture = BY_NAME[PAIRS[family][0]], PAIRS[family][1]
    case.build().save_pretrained(tmp_path / "base")  # type: ignore[operator]
    loading: dict[str, Any] = {"num_labels": 3, "attn_implementation": "eager"}
    kind = getattr(transformers, architecture)
    model = kind.from_pretrained(tmp_path / "base", ignore_mismatched_sizes=True, **loading)
    merged = trained(model, tmp_path / "lora", True, FEW)
    if not mapped:
        config = tmp_path / "lora" / "adapter_config.json"
        config.write_text(json.dumps({**json.loads(config.read_text()), "auto_mapping": None}))
    found = load_model(adapter=tmp_path / "lora", device="cpu")
    assert found.num_classes == 3
    assert not found.labels.names
    assert_same(found, merged, case.images())
    assert any(f"taken as {tmp_path}/base, by its base_model" in note for note in found.notes)


def test_names_of_either_version_and_of_one_layer_alone_are_understood(tmp_path: Path) -> None:
    """What version 4 calls its layers is what adapters on the hub were trained by."""
    source(VIT).save_pretrained(tmp_path / "base")  # type: ignore[operator]
    model = VIT.build()
    query = next(n for n, _ in model.named_modules() if n.endswith(("query", "q_proj")))
    pattern = {query.rpartition(".")[2]: 7}
    merged = trained(model, tmp_path / "lora", True, FEW, use_rslora=True, alpha_pattern=pattern)
    file = tmp_path / "lora" / "adapter_model.safetensors"
    older = {
        name.replace("vit.layers.", "vit.encoder.layer.")
        .replace("attention.q_proj", "attention.attention.query")
        .replace("attention.v_proj", "attention.attention.value"): tensor.clone()
        for name, tensor in load_file(file).items()
    }
    newer = {
        name.replace("vit.encoder.layer.", "vit.layers.")
        .replace("attention.attention.query", "attention.q_proj")
        .replace("attention.attention.value", "attention.v_proj"): tensor
        for name, tensor in older.items()
    }
    assert older.keys() != newer.keys()
    config = tmp_path / "lora" / "adapter_config.json"
    for tensors, word in ((older, "query"), (newer, "q_proj")):
        save_file(tensors, file)
        named = {**json.loads(config.read_text()), "alpha_pattern": {word: 7}}
        config.write_text(json.dumps(named))
        model = load_model(str(tmp_path / "base"), adapter=tmp_path / "lora", device="cpu")
        assert_same(model, merged, VIT.images())
    assert model.labels.names == tuple(f"kind {index}" for index in range(7))


def test_gated_layers_are_joined_or_parted_as_the_adapter_has_them(tmp_path: Path) -> None:
    case = BY_NAME["dinov2-gated"]
    source(case).save_pretrained(tmp_path / "base")  # type: ignore[operator]
    first, second = torch.randn(2, 48), torch.randn(192, 2)
    home = "base_model.model.dinov2.encoder.layer.0.mlp"
    whole = {"weights_in": (first, second)}
    parts = {"gate_proj": (first, second[:96]), "up_proj": (first, second[96:])}
    weights = load_file(tmp_path / "base" / "model.safetensors")
    joined = next(name for name in weights if name.endswith("0.mlp.weights_in.weight"))
    apart = dict(zip(("gate_proj", "up_proj"), weights.pop(joined).chunk(2), strict=True))
    renamed = {joined.replace("weights_in", part): tensor.clone() for part, tensor in apart.items()}
    save_file({**weights, **renamed}, tmp_path / "base" / "apart.safetensors")
    logits = []
    for layers in (whole, parts):
        pairs = [(f"{home}.{n}.lora_{x}.weight", t) for n, ab in layers.items()
                 for x, t in zip("AB", ab, strict=True)]  # fmt: skip
        (tmp_path / "lora").mkdir(exist_ok=True)
        save_file({n: t.clone() for n, t in pairs}, tmp_path / "lora" / "adapter_model.safetensors")
        config = {"peft_type": "LORA", "r": 2, "lora_alpha": 1}
        (tmp_path / "lora" / "adapter_config.json").write_text(json.dumps(config))
        for file in ("model", "apart"):
            path = tmp_path / "base" / f"{file}.safetensors"
            found = load_model(weights=path, adapter=tmp_path / "lora", device="cpu")
            with torch.no_grad():
                logits.append(found.output(case.images()))
    assert all(torch.allclose(each, logits[0], rtol=1e-5, atol=1e-5) for each in logits[1:])
    assert not torch.allclose(logits[0], outputs(source(case), case.images()), rtol=0.01)


def test_what_no_base_or_another_one_is_given_for_is_refused_in_one_line(tmp_path: Path) -> None:
    trained(VIT.build(), tmp_path / "lora", True, FEW)
    lora = tmp_path / "lora"
    with pytest.raises(OptionError, match=r"says nowhere which model it was trained on .*-m NAME"):
        load_model(adapter=lora, device="cpu")
    config = lora / "adapter_config.json"
    for base, reason in (("nowhere", "no model is called"), ("/no/where", "no name on the hub")):
        named = {**json.loads(config.read_text()), "base_model_name_or_path": base}
        config.write_text(json.dumps(named))
        with pytest.raises(ModelError, match=reason) as caught:
            load_model(adapter=lora, device="cpu")
        assert "\n" not in str(caught.value)
    with pytest.raises(
        WeightsError, match=r"has no vit.*\.weight; give the model .* on, /no/where"
    ):
        load_model("demo", adapter=lora, device="cpu")
    source(BY_NAME["dinov2"]).save_pretrained(tmp_path / "other")  # type: ignore[operator]
    with pytest.raises(WeightsError) as caught:
        load_model(str(tmp_path / "other"), adapter=lora, device="cpu")
    assert "\n" not in str(caught.value)


def test_adapter_of_a_text_tower_alone_is_refused(tmp_path: Path) -> None:
    case = BY_NAME["clip-both"]
    source(case).save_pretrained(tmp_path / "base")  # type: ignore[operator]
    trained(case.build(), tmp_path / "lora", False, ["text_model.encoder.layers.0.mlp.fc1"])
    with pytest.raises(WeightsError, match="changes no layer of the image tower"):
        load_model(str(tmp_path / "base"), adapter=tmp_path / "lora", device="cpu")


def test_object_with_an_adapter_is_refused_until_it_is_merged() -> None:
    settings = peft.LoraConfig(r=2, target_modules=FEW, init_lora_weights=False)
    wrapped: Any = peft.get_peft_model(VIT.build(), settings)
    for model in (wrapped, wrapped.base_model.model):
        with pytest.raises(ModelError, match=r"LoRA adapter; pass what its merge_and_unload\(\)"):
            load_model(model, device="cpu")
    merged = wrapped.merge_and_unload().eval()
    assert_same(load_model(merged, device="cpu"), merged, VIT.images())


def test_command_takes_an_adapter_alone(
    tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    save_pictures(tmp_path, ["a.png"])
    source(VIT).save_pretrained("base")  # type: ignore[operator]
    kind = getattr(transformers, VIT.architecture)
    model = kind.from_pretrained("base", attn_implementation="eager")
    trained(model, Path("lora"), True, FEW)
    shell = Shell(capfdbinary, monkeypatch)
    done = shell("grad-rollout", "a.png", "--adapter", "lora", "--class", "kind 3")
    assert done.code == 0, done.err
    assert "lora/adapter_model.safetensors: taken as base, by its base_model_name_or_path" in (
        done.err
    )
    assert "LoRA adapter merged into 6 layers, replacing head." in done.err
