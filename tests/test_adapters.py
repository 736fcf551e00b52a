"""LoRA adapters: merged as PEFT computes them, or refused in one line."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from fixtures_io import NAME, SIZE, Shell, save_pictures, save_tiny, tiny_module
from vitviz.errors import OptionError, WeightsError
from vitviz.models.model import Model, load_model

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def shell(capfdbinary: pytest.CaptureFixture[bytes], monkeypatch: pytest.MonkeyPatch) -> Shell:
    return Shell(capfdbinary, monkeypatch)


RANK = 4
LAYERS = [f"blocks.{block}.{part}" for block in range(6) for part in ("attn.qkv", "mlp.fc1")]
CONFIG: dict[str, Any] = {"peft_type": "LORA", "r": RANK, "lora_alpha": 16}


def matrices(seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Draw A and B for all layers, by PEFT's names."""
    generator, module = torch.Generator().manual_seed(seed), tiny_module()
    found = {}
    for name in LAYERS:
        layer = module.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        for letter, shape in (("A", (RANK, layer.in_features)), ("B", (layer.out_features, RANK))):
            drawn = 0.2 * torch.randn(shape, generator=generator)
            found[f"base_model.model.{name}.lora_{letter}.weight"] = drawn.to(dtype)
    return found


def save_adapter(
    folder: Path, tensors: Mapping[str, Tensor] | None = None, /, **config: Any
) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps({**CONFIG, **config}))
    save_file(
        dict(matrices() if tensors is None else tensors), folder / "adapter_model.safetensors"
    )
    return folder


def load(tmp_path: Path, adapter: Path, **arguments: Any) -> Model:
    weights = save_tiny(tmp_path / "base.safetensors", seed=1)
    return load_model(
        NAME, weights=weights, adapter=adapter, device="cpu", img_size=SIZE, **arguments
    )


def images() -> Tensor:
    return torch.randn(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(3))


def beside(
    module: nn.Module, tensors: Mapping[str, Tensor], factor: Callable[[str], float]
) -> Tensor:
    """Compute logits in float64 with each layer's s·B(A x) beside it, as the paper has it."""
    module = deepcopy(module).double()
    for name in LAYERS:
        first, second = (
            tensors[f"base_model.model.{name}.lora_{letter}.weight"].double() for letter in "AB"
        )

        def add(
            layer: nn.Module,
            inputs: tuple[Tensor],
            output: Tensor,
            first: Tensor = first,
            second: Tensor = second,
            scale: float = factor(name),
        ) -> Tensor:
            return output + scale * F.linear(F.linear(inputs[0], first), second)

        module.get_submodule(name).register_forward_hook(add)
    with torch.no_grad():
        logits: Tensor = module(images().double())
    return logits


def close(model: Model, expected: Tensor) -> bool:
    """Compare with the merged weights, in float64: single passes differ by more than merging."""
    with torch.no_grad():
        found = deepcopy(model.module).double()(images().double())
    return bool((found - expected).abs().max() <= 1e-5 * expected.abs().max())


@pytest.mark.parametrize(
    ("config", "factor"),
    [
        ({}, lambda name: 16 / RANK),
        ({"lora_alpha": 3}, lambda name: 3 / RANK),
        ({"use_rslora": True}, lambda name: 16 / math.sqrt(RANK)),
        ({"alpha_pattern": {"fc1": 2}}, lambda name: (2 if name.endswith("fc1") else 16) / RANK),
        (
            {"alpha_pattern": {"blocks.1.attn.qkv": 1}},
            lambda name: (1 if name == "blocks.1.attn.qkv" else 16) / RANK,
        ),
    ],
    ids=["plain", "alpha", "rslora", "pattern", "one layer"],
)
def test_logits_are_those_of_the_adapter_beside_its_base(
    tmp_path: Path, config: dict[str, Any], factor: Callable[[str], float]
) -> None:
    model = load(tmp_path, save_adapter(tmp_path / "lora", **config))
    expected = beside(tiny_module(seed=1), matrices(), factor)
    assert not torch.allclose(expected, tiny_module(seed=1).double()(images().double()), rtol=0.01)
    assert close(model, expected)


def test_adapter_is_said_in_one_line_and_named_with_the_weights(tmp_path: Path) -> None:
    folder = save_adapter(tmp_path / "lora")
    model = load(tmp_path, folder)
    assert f"{folder / 'adapter_model.safetensors'}: LoRA adapter merged into 12 layers" in (
        model.notes
    )
    assert (
        model.weights == f"{tmp_path / 'base.safetensors'} with {folder}/adapter_model.safetensors"
    )


def test_head_that_was_trained_with_the_adapter_takes_the_place_of_the_base_s(
    tmp_path: Path,
) -> None:
    head = {"weight": torch.randn(3, 64), "bias": torch.randn(3)}
    tensors = matrices() | {f"base_model.model.head.{name}": each for name, each in head.items()}
    folder = save_adapter(tmp_path / "lora", tensors, modules_to_save=["head"])
    model = load(tmp_path, folder)
    base = tiny_module(seed=1, classes=3)
    base.head.load_state_dict(head)  # type: ignore[union-attr, operator]
    assert model.num_classes == 3
    assert close(model, beside(base, tensors, lambda name: 16 / RANK))
    assert any("replacing head." in note for note in model.notes)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_adapter_in_half_precision_is_not_rounded_again(tmp_path: Path, dtype: torch.dtype) -> None:
    halves = matrices(dtype=dtype)
    state = {name: each.to(dtype) for name, each in tiny_module(seed=1).state_dict().items()}
    save_file(state, tmp_path / "half.safetensors")
    folder = save_adapter(tmp_path / "lora", halves)
    model = load_model(
        NAME, weights=tmp_path / "half.safetensors", adapter=folder, device="cpu", img_size=SIZE
    )
    base = tiny_module()
    base.load_state_dict({name: each.float() for name, each in state.items()})
    assert model.dtype is torch.float32
    assert close(model, beside(base, halves, lambda name: 16 / RANK))


def test_biases_that_were_trained_and_names_with_a_wrapper_are_understood(tmp_path: Path) -> None:
    tensors = {
        name.replace("model.model.", "model.model.vit."): t for name, t in matrices().items()
    }
    bias = torch.randn(192)
    tensors["base_model.model.vit.blocks.0.attn.qkv.base_layer.bias"] = bias
    model = load(tmp_path, save_adapter(tmp_path / "lora", tensors, bias="lora_only"))
    assert torch.equal(model.module.state_dict()["blocks.0.attn.qkv.bias"], bias)


def test_adapter_of_pretrained_weights_is_merged_into_them(tmp_path: Path) -> None:
    base = load_model("demo", device="cpu")
    name = "blocks.0.attn.qkv"
    weight = base.module.state_dict()[f"{name}.weight"]
    pair = {
        f"base_model.model.{name}.lora_A.weight": torch.ones(1, weight.shape[1]),
        f"base_model.model.{name}.lora_B.weight": torch.ones(weight.shape[0], 1),
    }
    folder = save_adapter(tmp_path / "lora", pair, r=1, lora_alpha=2)
    model = load_model("demo", adapter=folder, device="cpu")
    assert torch.equal(model.module.state_dict()[f"{name}.weight"], weight + 2)
    assert model.num_classes == base.num_classes
    assert model.weights.startswith("bundled with ")


def conv() -> dict[str, Tensor]:
    name = "base_model.model.patch_embed.proj"
    return {
        f"{name}.lora_A.weight": torch.ones(4, 3, 16, 16),
        f"{name}.lora_B.weight": torch.ones(64, 4, 1, 1),
    }


def changed(old: str, new: str) -> dict[str, Tensor]:
    return {name.replace(old, new): tensor for name, tensor in matrices().items()}


@pytest.mark.parametrize(
    ("config", "tensors", "reason"),
    [
        ({"use_dora": True}, None, "use_dora is True, which is more than plain LoRA"),
        ({"peft_type": "LOHA"}, None, "peft_type is 'LOHA', and LORA alone"),
        ({"init_lora_weights": "pissa"}, None, "'pissa', which changes the base"),
        ({"fan_in_fan_out": True}, None, "fan_in_fan_out is True"),
        ({"some_new_thing": [1]}, None, r"some_new_thing is \[1\]"),
        ({"lora_alpha": None}, None, "no factor"),
        ({"lora_alpha": "x"}, None, "no factor"),
        ({"lora_alpha": float("nan")}, None, "the factor nan"),
        ({"alpha_pattern": {"(": 4}}, None, "no factor"),
        ({}, conv(), "which is no linear layer's"),
        ({}, changed("lora_A", "lora_embedding_A"), "is no plain LoRA on a linear layer"),
        ({}, changed("mlp.fc1", "mlp.fc9"), "the base has no blocks.0.mlp.fc9.weight"),
        ({}, changed("attn.qkv", "attn.proj"), r"changes a \(192, 64\) matrix"),
        ({}, {"base_model.model.head.weight": torch.ones(7, 64)}, "no lora_A and lora_B"),
    ],
    ids=range(14),
)
def test_what_is_no_plain_lora_on_linear_layers_is_refused_by_name(
    tmp_path: Path, config: dict[str, Any], tensors: dict[str, Tensor] | None, reason: str
) -> None:
    folder = save_adapter(tmp_path / "lora", tensors, **config)
    with pytest.raises(WeightsError, match=reason) as caught:
        load(tmp_path, folder)
    assert "\n" not in str(caught.value)


def test_adapter_without_its_config_or_without_its_base_is_refused(tmp_path: Path) -> None:
    folder = save_adapter(tmp_path / "lora")
    with pytest.raises(WeightsError, match="is a LoRA adapter, no whole model.*--adapter"):
        load_model(NAME, weights=folder / "adapter_model.safetensors", device="cpu")
    with pytest.raises(OptionError, match="taken as it is"):
        load_model(tiny_module(), adapter=folder)
    (folder / "adapter_config.json").unlink()
    with pytest.raises(WeightsError, match=r"adapter_config.json cannot be read"):
        load(tmp_path, folder)
    with pytest.raises(WeightsError, match="has no adapter_model.safetensors or"):
        load(tmp_path, tmp_path)


def test_command_line_merges_an_adapter(
    tmp_path: Path, shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    save_pictures(tmp_path, ["a.png"])
    save_adapter(tmp_path / "lora")
    save_tiny(tmp_path / "base.safetensors")
    common = ("-m", NAME, "--weights", "base.safetensors", "--img-size", str(SIZE), "-o", "out")
    run = shell("rollout", "a.png", *common, "--adapter", "lora")
    assert run.code == 0
    assert run.paths == ["out/a.png.rollout.png"]
    assert "lora/adapter_model.safetensors: LoRA adapter merged into 12 layers" in run.err
    run = shell("rollout", "a.png", *common, "--adapter", "nowhere")
    assert run.code == 2
    assert len(run.complaints) == 1


def test_peft_itself_computes_the_same(tmp_path: Path) -> None:
    import peft

    torch.manual_seed(0)
    config = peft.LoraConfig(
        r=3,
        lora_alpha=5,
        target_modules=["qkv", "fc2"],
        modules_to_save=["head"],
        rank_pattern={"fc2": 2},
        alpha_pattern={"blocks.1.mlp.fc2": 7},
        init_lora_weights=False,
        bias="all",
    )
    wrapped = peft.get_peft_model(tiny_module(seed=1), config)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "modules_to_save" in name or name.endswith("bias"):
                parameter.add_(torch.randn_like(parameter))
    wrapped.save_pretrained(tmp_path / "lora")
    model = load(tmp_path, tmp_path / "lora")
    with torch.no_grad():
        expected = wrapped.eval().double()(images().double())
    assert close(model, expected)
