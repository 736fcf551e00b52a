"""Checkpoints as people's trainers leave them: each gives the model's own weights, in one line."""

from __future__ import annotations

import argparse
import json
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from fixtures_io import NAME, SIZE, tiny_module, tiny_state
from vitviz.models.checkpoints import digest_weights
from vitviz.models.model import Model, load_model

pytestmark = pytest.mark.usefixtures("one_thread")

State = dict[str, Tensor]

STATE = tiny_state(seed=1)
OTHER = tiny_state(seed=2)
HEADLESS = {name: tensor for name, tensor in STATE.items() if not name.startswith("head.")}


def under(prefix: str, state: State = STATE) -> State:
    return {prefix + name: tensor for name, tensor in state.items()}


def lightning(prefix: str) -> dict[str, Any]:
    strays = {"criterion.weight": torch.ones(7), "train_acc.total": torch.tensor(3)}
    return {
        "epoch": 9,
        "global_step": 100,
        "pytorch-lightning_version": "2.4.0",
        "state_dict": OrderedDict(under(prefix) | strays),
        "loops": {"fit_loop": {"state_dict": {}, "epoch_progress": {"total": {"ready": 9}}}},
        "callbacks": {"ModelCheckpoint{'monitor': 'val'}": {"best_model_score": torch.tensor(0.9)}},
        "optimizer_states": [trained()[1].state_dict()],
        "lr_schedulers": [{"base_lrs": [0.1], "last_epoch": 9}],
        "hparams_name": "kwargs",
        "hyper_parameters": {"lr": 0.1},
    }


def trained() -> tuple[nn.Module, torch.optim.Optimizer]:
    """Return the tiny model and an optimizer that has taken a step, which changes nothing."""
    module = tiny_module(seed=1)
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.0, weight_decay=0.0)
    module(torch.ones(1, 3, SIZE, SIZE)).sum().backward()
    optimizer.step()
    return module, optimizer


def with_optimizer() -> dict[str, Any]:
    module, optimizer = trained()
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
    return {
        "model": module.state_dict(),
        "optimizer": optimizer.state_dict(),
        "scheduler": scheduler.state_dict(),
        "scaler": {"scale": 65536.0, "growth_factor": 2.0},
        "rng": torch.get_rng_state(),
    }


def timm_script() -> dict[str, Any]:
    averaged = ModelEmaV3(tiny_module(seed=1))
    return {
        "epoch": 3,
        "arch": NAME,
        "state_dict": OTHER,
        "state_dict_ema": averaged.module.state_dict(),
        "optimizer": trained()[1].state_dict(),
        "args": argparse.Namespace(model=NAME, lr=0.1),
        "version": 2,
    }


def dino() -> dict[str, Any]:
    projector = {f"head.mlp.{n}.weight": torch.ones(8, 64) for n in (0, 2)}
    projector["head.last_layer.weight_g"] = torch.ones(9, 1)
    return {
        "student": under("module.backbone.", {**HEADLESS}) | under("module.", projector),
        "teacher": under("backbone.", HEADLESS) | projector,
        "optimizer": trained()[1].state_dict(),
        "epoch": 100,
        "args": argparse.Namespace(arch="vit_small", out_dim=9),
        "dino_loss": {"center": torch.zeros(1, 9)},
    }


def mae() -> dict[str, Any]:
    decoder = {
        "mask_token": torch.ones(1, 1, 32),
        "decoder_pos_embed": torch.ones(1, 17, 32),
        "decoder_embed.weight": torch.ones(32, 64),
        "decoder_blocks.0.attn.qkv.weight": torch.ones(96, 32),
        "decoder_norm.weight": torch.ones(32),
        "decoder_pred.weight": torch.ones(768, 32),
    }
    return {"model": HEADLESS | decoder, "epoch": 799, "args": argparse.Namespace(mask_ratio=0.75)}


FORMS: dict[str, Callable[[], dict[str, Any]]] = {
    **{
        f"lightning {word}": lambda word=word: lightning(word)
        for word in ("model.", "net.", "backbone.", "_forward_module.model.", "anything.at.all.")  # type: ignore[misc]
    },
    "lightning compiled": lambda: lightning("model._orig_mod."),
    "compiled": lambda: dict(torch.compile(tiny_module(seed=1)).state_dict()),
    "data parallel": lambda: dict(nn.DataParallel(tiny_module(seed=1)).state_dict()),
    "compiled, data parallel": lambda: under("module._orig_mod."),
    "torch's average": lambda: dict(
        torch.optim.swa_utils.AveragedModel(tiny_module(seed=1)).state_dict()
    ),
    "optimizer and scheduler": with_optimizer,
    "timm's script": timm_script,
    "dino": dino,
    "dino, teacher alone": lambda: HEADLESS,
    "mae": mae,
    "mae, encoder alone": lambda: {"model": HEADLESS},
    "mae, fine-tuned": lambda: {"model": STATE, "epoch": 50, "scaler": {}, "args": None},
    "half": lambda: {"model": {name: tensor.half() for name, tensor in STATE.items()}},
    "bfloat16": lambda: {"model": {name: t.bfloat16() for name, t in STATE.items()}},
    "a prefix of their own": lambda: under("ours."),
    "deepspeed": lambda: {"module": under("model."), "buffer_names": [], "ds_version": "0.14"},
}


@pytest.mark.parametrize("form", FORMS)
def test_model_in_what_a_trainer_leaves_is_found(tmp_path: Path, form: str) -> None:
    content = FORMS[form]()
    torch.save(content, tmp_path / "w.pth")
    model = load_model(NAME, weights=tmp_path / "w.pth", device="cpu", img_size=SIZE)
    kept = {"half": torch.half, "bfloat16": torch.bfloat16}.get(form, torch.float32)
    expected = tiny_module(seed=1, classes=model.num_classes)
    own = HEADLESS if form.startswith(("dino", "mae")) and form != "mae, fine-tuned" else STATE
    assert model.num_classes == (0 if own is HEADLESS else 7)
    expected.load_state_dict({name: tensor.to(kept).float() for name, tensor in own.items()})
    assert model.digest == digest_weights(expected)
    assert model.dtype is torch.float32
    (said,) = [note for note in model.notes if "w.pth: " in note] or [""]
    assert bool(said) == (content.keys() != own.keys())
    assert ("_orig_mod" in said) == ("compiled" in form)
    assert ("decoder_pos_embed" in said) == (form == "mae")


# Official files, by the names that they have: made by timm's own models, renamed back.


def folder(tmp_path: Path, name: str, **arguments: Any) -> tuple[Path, nn.Module]:
    """Describe a small model of a family as on the hub; return the folder and such a model."""
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}
    arguments = {**sizes, **arguments}
    torch.manual_seed(0)
    module = timm.create_model(name, num_classes=5, **arguments)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    config = {
        "architecture": name,
        "num_classes": 5,
        "model_args": arguments,
        "pretrained_cfg": {"input_size": [3, 32, 32], "first_conv": "patch_embed.proj"},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path, module.eval()


def same_logits(model: Model, module: nn.Module) -> bool:
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return bool(torch.allclose(model.module(images), module(images), rtol=1e-5, atol=1e-5))


def load(home: Path, content: dict[str, Any]) -> Model:
    torch.save(content, home / "official.pth")
    return load_model(str(home), weights=home / "official.pth", device="cpu")


@pytest.mark.parametrize("name", ["deit_tiny_patch16_224", "deit_tiny_distilled_patch16_224"])
def test_official_deit_is_loaded(tmp_path: Path, name: str) -> None:
    home, module = folder(tmp_path, name)
    assert same_logits(load(home, {"model": module.state_dict()}), module)


def test_official_deit3_is_loaded_with_its_names_of_layer_scale(tmp_path: Path) -> None:
    home, module = folder(tmp_path, "deit3_small_patch16_224")
    state = {
        name.replace("ls1.gamma", "gamma_1").replace("ls2.gamma", "gamma_2"): tensor
        for name, tensor in module.state_dict().items()
    }
    assert "blocks.0.gamma_1" in state
    assert same_logits(load(home, {"model": state, "epoch": 1}), module)


@pytest.mark.parametrize("wrapping", ["model", "module"])
def test_official_beit_is_loaded_with_its_indices(tmp_path: Path, wrapping: str) -> None:
    home, module = folder(tmp_path, "beit_base_patch16_224")
    state = dict(module.state_dict())
    for index, block in enumerate(module.blocks):  # type: ignore[arg-type]
        name = f"blocks.{index}.attn.relative_position_index"
        state[name] = block.attn.relative_position_index.clone()
    model = load(home, {wrapping: state})
    assert same_logits(model, module)


def test_official_dinov2_is_loaded_without_its_mask(tmp_path: Path) -> None:
    home, module = folder(tmp_path, "vit_small_patch14_dinov2", patch_size=8)
    state = {n: t for n, t in module.state_dict().items() if not n.startswith("head.")}
    module.reset_classifier(0)  # type: ignore[operator]
    model = load(home, {**state, "mask_token": torch.zeros(1, 48)})
    assert same_logits(model, module)
