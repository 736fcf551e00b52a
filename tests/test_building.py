"""Models of the user's own: folders, factories, checkpoints; and the list of what timm has."""

from __future__ import annotations

import http.client
import json
import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import timm
import timm.models
import torch
from safetensors.torch import save_file

from vitviz.cli.app import main
from vitviz.errors import ModelError, OptionError, WeightsError
from vitviz.models.catalogue import find_models, judge, survey_models
from vitviz.models.model import load_model
from vitviz.models.names import resolve_name

FACTORY = """
import timm

def tiny(**kwargs):
    return timm.create_model("test_vit", num_classes=5, **kwargs)

def nothing():
    return 3
"""


@pytest.fixture
def own_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "my_vits.py").write_text(FACTORY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "my_vits", raising=False)
    return "my_vits"


def test_factory_of_the_users_is_called(own_module: str) -> None:
    model = load_model(f"{own_module}:tiny", device="cpu")
    assert (model.name, model.num_classes, model.weights) == ("my_vits:tiny", 5, "given")


def test_factory_takes_weights_and_another_size(own_module: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    state = timm.create_model("test_vit", num_classes=5, img_size=64).state_dict()
    save_file(state, tmp_path / "w.safetensors")
    model = load_model(
        f"{own_module}:tiny", weights=tmp_path / "w.safetensors", img_size=(64, 64), device="cpu"
    )
    assert model.layout.grid == (4, 4)
    assert torch.equal(model.module.state_dict()["head.weight"], state["head.weight"])


def test_weights_that_do_not_fit_a_factory_are_refused(own_module: str, tmp_path: Path) -> None:
    save_file({"head.weight": torch.ones(5, 3)}, tmp_path / "w.safetensors")
    with pytest.raises(WeightsError, match="missing"):
        load_model(f"{own_module}:tiny", weights=tmp_path / "w.safetensors", device="cpu")


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("no_such_vits:tiny", "no module 'no_such_vits'"),
        ("my_vits:huge", "has no huge"),
        ("my_vits:nothing", "gave a int"),
    ],
)
def test_factory_that_gives_no_model_is_refused(own_module: str, name: str, says: str) -> None:
    with pytest.raises(ModelError, match=says):
        load_model(name, device="cpu")


def test_folder_as_on_the_hub_is_loaded(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = timm.create_model("test_vit", num_classes=3)
    timm.models.save_for_hf(
        module, tmp_path / "mine", model_config={"label_names": ["ant", "bee", "cow"]}
    )
    model = load_model(str(tmp_path / "mine"), device="cpu")
    assert model.labels.names == ("ant", "bee", "cow")
    assert torch.equal(model.module.state_dict()["head.weight"], module.state_dict()["head.weight"])


def test_model_without_a_head_is_loaded_and_has_no_classes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = timm.create_model("test_vit", num_classes=0)
    save_file(module.state_dict(), tmp_path / "w.safetensors")
    model = load_model("test_vit", weights=tmp_path / "w.safetensors", device="cpu")
    assert model.num_classes == 0


def test_rectangular_size_gives_a_rectangular_grid(tmp_path: Path) -> None:
    torch.manual_seed(0)
    save_file(timm.create_model("test_vit").state_dict(), tmp_path / "w.safetensors")
    model = load_model(
        "test_vit", weights=tmp_path / "w.safetensors", img_size=(64, 96), device="cpu"
    )
    assert model.layout.grid == (4, 6)
    assert any("pos_embed" in note for note in model.notes)


def test_near_names_are_offered() -> None:
    with pytest.raises(ModelError, match="deit_tiny"):
        resolve_name("deit_tyni")


def test_patterns_and_words_find_models() -> None:
    assert "deit_tiny_patch16_224" in find_models("deit_tiny")
    assert find_models("deit_tiny_patch16_22?") == ["deit_tiny_patch16_224"]
    assert find_models("no such model") == []
    assert len(find_models()) == len(timm.list_models())


def test_shipped_answers_are_what_a_look_at_the_model_says() -> None:
    names = ["deit_tiny_patch16_224", "vit_base_patch16_siglip_224", "xcit_nano_12_p16_224"]
    assert dict(survey_models(names)) == {name: judge(name) for name in names}


def test_answers_for_another_timm_are_learned_and_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(timm, "__version__", "9.9")
    ((name, support),) = survey_models(["test_vit"])
    assert (name, support.rollout) == ("test_vit", True)
    (kept,) = (tmp_path / "vitviz").iterdir()
    assert list(json.loads(kept.read_text())["models"]) == ["test_vit"]
    monkeypatch.setattr("vitviz.models.catalogue.judge", None)
    assert dict(survey_models(["test_vit"])) == {"test_vit": support}


def test_models_command_lists_names_with_what_can_be_done(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as left:
        main(["models", "deit_tiny"])
    assert left.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == find_models("deit_tiny")
    assert all("supported" in line for line in lines)


def test_models_command_speaks_json_and_leaves_out_the_unsupported(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        main(["models", "crossvit_tiny", "--json"])
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert records
    assert not any(record["rollout"] for record in records)
    with pytest.raises(SystemExit):
        main(["models", "crossvit_tiny", "--supported"])
    assert capsys.readouterr().out == ""


def test_models_command_names_no_model_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["models", "no-such-model"])
    assert left.value.code == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize(
    "option", [{"weights": "w.pth"}, {"img_size": (32, 32)}, {"fit": "native"}]
)
def test_model_object_is_taken_as_it_is(option: dict[str, object]) -> None:
    with pytest.raises(OptionError, match="model object"):
        load_model(timm.create_model("test_vit"), **option)


@pytest.mark.parametrize(
    ("content", "error"),
    [
        ("import no_such_package", ModuleNotFoundError),
        ("import my", ModuleNotFoundError),  # how the module's own name starts
        ("import timm\ntimm.no_such_thing", AttributeError),
        ("1 / 0", ZeroDivisionError),
    ],
)
def test_mistake_in_the_users_module_is_seen_as_it_is(
    own_module: str, content: str, error: type[Exception]
) -> None:
    Path("my_vits.py").write_text(content)
    with pytest.raises(error):
        load_model(f"{own_module}:tiny", device="cpu")


def test_factory_is_found_from_the_working_directory_however_often(own_module: str) -> None:
    for _ in range(2):
        load_model(f"{own_module}:tiny", device="cpu")
    assert sys.path.count(str(Path.cwd())) == 1


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("cait_xxs24_224", {"fit": "native"}, r"--fit native .* --img-size"),
        ("cait_xxs24_224", {"fit": "native", "img_size": (64, 96)}, "--fit native"),
        ("resnet18", {"img_size": (64, 64)}, "no other image size than its own"),
    ],
)
def test_model_that_cannot_be_built_for_the_images_is_refused(
    name: str, options: dict[str, Any], says: str
) -> None:
    with pytest.raises(ModelError, match=says) as caught:
        load_model(name, device="cpu", **options)
    assert name in str(caught.value)


def test_model_that_nobody_has_trained_wants_weights() -> None:
    with pytest.raises(WeightsError, match=r"no pretrained weights.*--weights"):
        load_model("vit_giant_patch14_224", device="cpu")


# Weights that timm has at an address of their own, beside the hub
IJEPA = "vit_huge_patch14_gap_224.in1k_ijepa"


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Forbid downloads; return where torch keeps them."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    return tmp_path / "hub" / "checkpoints"


@pytest.mark.usefixtures("offline")
def test_weights_at_an_address_are_missed_before_anything_is_built() -> None:
    with pytest.raises(WeightsError, match=rf"{IJEPA} is not in the cache.*HF_HUB_OFFLINE"):
        load_model(IJEPA, device="cpu")


def test_weights_at_an_address_are_taken_from_torchs_cache(
    offline: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = timm.create_model("test_vit").pretrained_cfg
    away = {**config, "url": "https://nowhere.invalid/folder/w.pth?x=1", "hf_hub_id": None}
    create = timm.create_model

    def create_elsewhere(name: str, **arguments: Any) -> Any:
        return create(name, **arguments, pretrained_cfg=away)

    monkeypatch.setattr(timm, "create_model", create_elsewhere)
    torch.manual_seed(0)
    state = create("test_vit").state_dict()
    with pytest.raises(WeightsError, match="HF_HUB_OFFLINE"):
        load_model("test_vit", device="cpu")
    offline.mkdir(parents=True)
    torch.save(state, offline / "w.pth")
    model = load_model("test_vit", device="cpu")
    assert model.weights == "pretrained"
    assert torch.equal(model.module.state_dict()["head.weight"], state["head.weight"])


def test_download_from_an_address_that_breaks_off_ends_in_one_line(
    offline: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    create = timm.create_model

    def broken(name: str, pretrained: bool = False, **arguments: Any) -> Any:
        if pretrained:
            raise http.client.IncompleteRead(b"", 7)
        return create(name, **arguments, pretrained_cfg={**config, "url": "https://no.invalid/w"})

    config = {**create("test_vit").pretrained_cfg, "hf_hub_id": None}
    offline.mkdir(parents=True)
    (offline / "w").touch()  # so that nothing is asked before
    monkeypatch.setattr(timm, "create_model", broken)
    with pytest.raises(WeightsError, match=r"could not be had \(IncompleteRead.*-m test_vit"):
        load_model("test_vit", device="cpu")
