"""Weights of big_vision and of Google's ViTs: the same model as timm's, or a refusal."""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fixtures_io import NAME, SIZE, Shell, save_pictures, tiny_module, tiny_state
from vitviz.errors import WeightsError
from vitviz.models.checkpoints import digest_weights, read_checkpoint
from vitviz.models.model import Model, load_model

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def shell(capfdbinary: pytest.CaptureFixture[bytes], monkeypatch: pytest.MonkeyPatch) -> Shell:
    return Shell(capfdbinary, monkeypatch)


Arrays = dict[str, NDArray[Any]]
BLOCKS, HEADS, WIDTH = 6, 2, 64


def as_jax(state: dict[str, Tensor], *, big_vision: bool, stacked: bool = False) -> Arrays:
    """Write a state dict as Flax does: kernels (in, out), heads apart, queries, keys and values."""
    old = {"mha": "1", "mlp": "3", "norm2": "2"}
    numbers = {"mha": "0", "mlp": "0", "norm2": "1"} if big_vision else old
    s = {name: tensor.numpy() for name, tensor in state.items()}
    arrays: Arrays = {
        "embedding/kernel": s["patch_embed.proj.weight"].transpose(2, 3, 1, 0),
        "embedding/bias": s["patch_embed.proj.bias"],
        "cls": s["cls_token"],
        "Transformer/encoder_norm/scale": s["norm.weight"],
        "Transformer/encoder_norm/bias": s["norm.bias"],
        "head/kernel": s["head.weight"].T,
        "head/bias": s["head.bias"],
    }
    if big_vision:  # its class token has no position: what timm adds is in the token
        arrays["pos_embedding"] = s["pos_embed"][:, 1:]
        arrays["cls"] = s["cls_token"] + s["pos_embed"][:, :1]
    else:
        arrays["Transformer/posembed_input/pos_embedding"] = s["pos_embed"]
    blocks = []
    for index in range(BLOCKS):
        p = f"blocks.{index}."
        heads = (HEADS, WIDTH // HEADS)
        block = {
            "LayerNorm_0/scale": s[f"{p}norm1.weight"],
            "LayerNorm_0/bias": s[f"{p}norm1.bias"],
            f"LayerNorm_{numbers['norm2']}/scale": s[f"{p}norm2.weight"],
            f"LayerNorm_{numbers['norm2']}/bias": s[f"{p}norm2.bias"],
        }
        mha, mlp = (f"MultiHeadDotProductAttention_{numbers['mha']}", f"MlpBlock_{numbers['mlp']}")
        for place, name in enumerate(("query", "key", "value")):
            rows = slice(place * WIDTH, (place + 1) * WIDTH)
            block[f"{mha}/{name}/kernel"] = s[f"{p}attn.qkv.weight"][rows].T.reshape(WIDTH, *heads)
            block[f"{mha}/{name}/bias"] = s[f"{p}attn.qkv.bias"][rows].reshape(heads)
        block[f"{mha}/out/kernel"] = s[f"{p}attn.proj.weight"].T.reshape(*heads, WIDTH)
        block[f"{mha}/out/bias"] = s[f"{p}attn.proj.bias"]
        for place, name in enumerate(("fc1", "fc2")):
            block[f"{mlp}/Dense_{place}/kernel"] = s[f"{p}mlp.{name}.weight"].T
            block[f"{mlp}/Dense_{place}/bias"] = s[f"{p}mlp.{name}.bias"]
        blocks.append(block)
    if stacked:
        for name in blocks[0]:
            arrays[f"Transformer/encoderblock/{name}"] = np.stack([each[name] for each in blocks])
    else:
        for index, block in enumerate(blocks):
            arrays |= {f"Transformer/encoderblock_{index}/{n}": a for n, a in block.items()}
    return arrays


def save(path: Path, arrays: Arrays, prefix: str = "") -> Path:
    np.savez(path, **{prefix + name: array for name, array in arrays.items()})
    return path


def load(path: Path, **arguments: Any) -> Model:
    return load_model(NAME, weights=path, device="cpu", **{"img_size": SIZE, **arguments})


STATE = tiny_state(seed=1)
OLD = as_jax(STATE, big_vision=False)
NEW = as_jax(STATE, big_vision=True)


def images() -> Tensor:
    return torch.randn(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(3))


def logits(module: nn.Module) -> Tensor:
    with torch.no_grad():
        output: Tensor = module(images())
    return output


@pytest.mark.parametrize("prefix", ["", "opt/target/"])
def test_arrays_of_google_s_vits_are_the_weights_that_timm_makes_of_them(
    tmp_path: Path, prefix: str
) -> None:
    model = load(save(tmp_path / "w.npz", OLD, prefix))
    assert model.digest == digest_weights(tiny_module(seed=1))
    assert any(note.endswith("JAX's names brought to timm's") for note in model.notes)


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("prefix", ["params/", "params/img/"])
def test_arrays_of_big_vision_give_the_same_logits(
    tmp_path: Path, prefix: str, stacked: bool
) -> None:
    arrays = as_jax(STATE, big_vision=True, stacked=stacked)
    path = save(tmp_path / "w.npz", arrays, prefix)
    if prefix == "params/img/":
        text = {"params/t": np.ones(1), "params/txt/Embed_0/embedding": np.ones((9, 4))}
        save(path, {prefix + name: array for name, array in arrays.items()} | text)
    model = load(path)
    torch.testing.assert_close(logits(model.module), logits(tiny_module(seed=1)))
    (note,) = [each for each in model.notes if "JAX" in each]
    assert f"the model at {prefix.strip('/').replace('/', ' → ')}" in note
    assert ("leaving out params/t, params/txt" in note) == (prefix == "params/img/")


def test_map_head_of_big_vision_is_read(tmp_path: Path) -> None:
    options: dict[str, Any] = {"global_pool": "map", "class_token": False, "classes": 0}
    state = tiny_state(seed=2, **options)
    arrays = as_jax(
        {
            "cls_token": torch.zeros(1, 1, WIDTH),
            "head.weight": torch.ones(1, 1),
            "head.bias": torch.ones(1),
            **state,
            "pos_embed": torch.nn.functional.pad(state["pos_embed"], (0, 0, 1, 0)),
        },
        big_vision=True,
    )
    for name in ("cls", "head/kernel", "head/bias"):
        del arrays[name]
    s = {name: tensor.numpy() for name, tensor in state.items()}
    heads = (-1, 64 // int(tiny_module(**options).attn_pool.num_heads))  # type: ignore[union-attr]
    heads = (64 // heads[1], heads[1])
    kv, bias = s["attn_pool.kv.weight"], s["attn_pool.kv.bias"]
    mha = "MAPHead_0/MultiHeadDotProductAttention_0"
    arrays |= {
        "MAPHead_0/probe": s["attn_pool.latent"],
        f"{mha}/query/kernel": s["attn_pool.q.weight"].T.reshape(WIDTH, *heads),
        f"{mha}/query/bias": s["attn_pool.q.bias"].reshape(heads),
        f"{mha}/key/kernel": kv[:WIDTH].T.reshape(WIDTH, *heads),
        f"{mha}/key/bias": bias[:WIDTH].reshape(heads),
        f"{mha}/value/kernel": kv[WIDTH:].T.reshape(WIDTH, *heads),
        f"{mha}/value/bias": bias[WIDTH:].reshape(heads),
        f"{mha}/out/kernel": s["attn_pool.proj.weight"].T.reshape(*heads, WIDTH),
        f"{mha}/out/bias": s["attn_pool.proj.bias"],
        "MAPHead_0/LayerNorm_0/scale": s["attn_pool.norm.weight"],
        "MAPHead_0/LayerNorm_0/bias": s["attn_pool.norm.bias"],
    }
    for place, name in enumerate(("fc1", "fc2")):
        mlp = f"MAPHead_0/MlpBlock_0/Dense_{place}"
        arrays[f"{mlp}/kernel"] = s[f"attn_pool.mlp.{name}.weight"].T
        arrays[f"{mlp}/bias"] = s[f"attn_pool.mlp.{name}.bias"]
    module = tiny_module(**options)
    found = read_checkpoint(save(tmp_path / "w.npz", arrays, "params/"), module).tensors
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], state[name]) for name in state)


@pytest.mark.parametrize("kind", ["float16", "bfloat16"])
def test_half_precision_keeps_its_numbers(tmp_path: Path, kind: str) -> None:
    dtype = getattr(torch, kind)
    halves = {name: tensor.to(dtype) for name, tensor in STATE.items()}
    arrays = as_jax({name: each.float() for name, each in halves.items()}, big_vision=False)
    if kind == "float16":
        arrays = {name: array.astype(np.float16) for name, array in arrays.items()}
    else:  # as NumPy writes ml_dtypes.bfloat16
        arrays = {
            name: np.ascontiguousarray(array).view(np.uint16)[..., 1::2].copy().view("V2")
            for name, array in arrays.items()
        }
    model = load(save(tmp_path / "w.npz", arrays))
    expected = tiny_module()
    expected.load_state_dict({name: each.float() for name, each in halves.items()})
    assert model.digest == digest_weights(expected)
    assert model.dtype is torch.float32


def test_number_of_classes_is_the_head_s(tmp_path: Path) -> None:
    assert load(save(tmp_path / "w.npz", OLD)).num_classes == 7
    headless = {name: array for name, array in OLD.items() if not name.startswith("head")}
    assert load(save(tmp_path / "w.npz", headless)).num_classes == 0


def test_positions_of_another_size_are_resized_and_that_is_said(tmp_path: Path) -> None:
    model = load(save(tmp_path / "w.npz", OLD), img_size=2 * SIZE)
    assert any("pos_embed (1, 17, 64) resized to (1, 65, 64)" in each for each in model.notes)


def block(arrays: Arrays, index: int, new: int) -> Arrays:
    old, name = f"encoderblock_{index}/", f"encoderblock_{new}/"
    return {n.replace(old, name): array for n, array in arrays.items() if old in n}


@pytest.mark.parametrize(
    ("arrays", "reason"),
    [
        (OLD | block(OLD, 5, 6), "numbers, and .* are of use"),
        ({n: a for n, a in OLD.items() if "encoderblock_3" not in n}, "encoderblock_3"),
        (OLD | {"pre_logits/kernel": np.ones((64, 64))}, "numbers, and .* are of use"),
        (OLD | {"head/kernel": np.ones((3, 3), np.float32)}, "do not fit"),
        (OLD | {"embedding/kernel": np.ones((8, 8, 3, 64), np.float32)}, "another patch size"),
    ],
    ids=["more blocks", "fewer blocks", "a layer between", "odd head", "patches"],
)
def test_arrays_that_do_not_fit_are_refused_in_one_line(
    tmp_path: Path, arrays: Arrays, reason: str
) -> None:
    with pytest.raises(WeightsError, match=reason) as caught:
        load(save(tmp_path / "w.npz", arrays))
    assert "\n" not in str(caught.value)
    assert str(tmp_path / "w.npz") in str(caught.value)


def test_model_that_timm_loads_no_such_arrays_into_is_refused(tmp_path: Path) -> None:
    save(tmp_path / "w.npz", OLD)
    with pytest.raises(WeightsError, match=r"timm loads into no Eva.*-m"):
        load_model("eva02_tiny_patch14_224", weights=tmp_path / "w.npz", device="cpu")


class Payload:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, tuple[str]]:
        import os

        return os.system, (f"touch {self.target}",)


def test_pickled_code_in_arrays_never_runs(tmp_path: Path) -> None:
    odd: Arrays = {**OLD, "head/bias": np.array([Payload(tmp_path / "touched")], dtype=object)}
    path = save(tmp_path / "w.npz", odd)
    assert pickle.PROTO in zipfile.ZipFile(path).read("head/bias.npy")
    with pytest.raises(WeightsError, match="no readable npz file"):
        load(path)
    assert not (tmp_path / "touched").exists()


@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
def test_damaged_archive_is_refused(tmp_path: Path, share: float) -> None:
    path = save(tmp_path / "w.npz", OLD)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(WeightsError):
        load(path)


def test_archive_that_fills_many_times_its_size_is_refused(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "w.npz", **{"embedding/kernel": np.zeros(10_000_000)})
    with pytest.raises(WeightsError, match="would fill"):
        load(tmp_path / "w.npz")


def test_torch_s_own_names_in_an_archive_are_read_too(tmp_path: Path) -> None:
    np.savez(tmp_path / "w.npz", **{name: each.numpy() for name, each in STATE.items()})
    assert load(tmp_path / "w.npz").digest == digest_weights(tiny_module(seed=1))


def test_command_line_takes_an_archive(
    tmp_path: Path, shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    save_pictures(tmp_path, ["a.png"])
    save(tmp_path / "w.npz", NEW, "params/")
    run = shell("relevance", "a.png", "-m", NAME, "--weights", "w.npz", "--img-size", str(SIZE))
    assert run.code == 0
    assert "w.npz: taking the model at params, JAX's names brought to timm's" in run.err
