"""What a model does is the truth: no attribute and no config is believed over it."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest
from torch import nn

from tiny import CASES
from vitviz.errors import LabelError, OptionError
from vitviz.explaining.batch import class_requests
from vitviz.methods.relevance import Relevance
from vitviz.models.catalogue import support_of
from vitviz.models.model import load_model

pytestmark = pytest.mark.usefixtures("one_thread")

PLAIN = next(case for case in CASES if case.name == "class-token")


def _head(classes: int) -> nn.Module:
    return nn.Linear(48, classes) if classes else nn.Identity()


def _lying(classes: int, declared: int | None, config: int | None) -> nn.Module:
    model = PLAIN.build()
    model.head = _head(classes)
    if declared is None:
        del model.num_classes
    else:
        model.num_classes = declared
    model.pretrained_cfg = {} if config is None else {"num_classes": config}
    return model


@pytest.mark.parametrize("classes", [0, 5, 48, 1000])
def test_classes_are_the_logits_whatever_attributes_say(classes: int, tmp_path: Path) -> None:
    labels = tmp_path / "labels.txt"
    labels.write_text("\n".join(f"label {index}" for index in range(classes)))
    for declared, config in product((None, 0, 1000), (None, 1000)):
        module = _lying(classes, declared, config)
        model = load_model(module, device="cpu")
        assert model.num_classes == classes
        assert support_of(module, (32, 32)).grad_rollout == bool(classes)
        assert (model.labels[0] is not None) == (classes == 1000)
        if not classes:
            with pytest.raises(OptionError, match="no classification head"):
                class_requests(model, Relevance())
            continue
        named = load_model(module, device="cpu", labels=labels)
        assert named.labels[classes - 1] == f"label {classes - 1}"
        with pytest.raises(LabelError, match=f"0 … {classes - 1}"):
            class_requests(model, Relevance(classes=(str(classes),)))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("count", [1, 3])
def test_means_of_one_number_count_for_all_channels(channels: int, count: int) -> None:
    model = PLAIN.build()
    model.patch_embed.proj = nn.Conv2d(channels, 48, 8, stride=8)
    model.pretrained_cfg = {"mean": (0.25,) * count, "std": (0.5,) * count}
    for declared in (1, 4):
        model.pretrained_cfg["input_size"] = (declared, 32, 32)
        preprocessing = load_model(model, device="cpu").preprocessing
        assert preprocessing.mean == (0.25,) * 3
        assert preprocessing.std == (0.5,) * 3
