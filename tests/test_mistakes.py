"""Mistakes of hand: each is answered with what was meant."""

from __future__ import annotations

import pytest
import torchvision

import vitviz
from fixtures_io import Shell, picture, tiny_model
from vitviz.errors import LabelError, ModelError, OptionError
from vitviz.models.labels import Labels, parse_requests
from vitviz.models.model import load_model
from vitviz.models.names import require_name

pytestmark = pytest.mark.usefixtures("one_thread")


# Typed


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("rollout a --class 3", "--class; it is an option of relevance, grad-rollout, evidence, c"),
        ("relevance a --head-fusion max", "has no --head-fusion; it is an option of rollout"),
        ("inspect a --weights b", "inspect has no --weights; it is an option of relevance, "),
        ("rollout a --heda-fusion max", "--head-fusion"),
        ("rollout a --fit sqash", "--fit: 'sqash' is not one of squash, crop, native; did you "),
        ("rollout a --fit=SQUASH", "did you mean squash?"),
        ("rollout a --save overlays", "did you mean overlay?"),
        ("rollout a --head-fusion maximum", "not one of mean, max, min; did you mean max?"),
        ("rollout a --colormap turb", "did you mean turbo?"),
        ("evaluate a --convention chefer", "did you mean chefer2021?"),
        ("rollout a --precision fp31", "did you mean fp32?"),
        ("rollout a --discard x", "--discard is 'x'; give a number"),
        ("rollout a --refine 1.5", "--refine is '1.5'; give a whole number"),
        ("evaluate a --bootstrap=many", "--bootstrap is 'many'; give a whole number"),
        ("rollout a -discard 0.5", "-discard has one dash; did you mean --discard?"),
        ("rollout a -model demo", "-model has one dash; did you mean --model?"),
        ("rollout a -output=b", "did you mean --output?"),
        ("inspect -json", "did you mean --json?"),
    ],
)
def test_what_was_meant_is_named(shell: Shell, words: str, expected: str) -> None:
    done = shell(*words.split())
    assert (done.code, done.out) == (2, b"")
    (line,) = done.complaints
    assert expected in line
    assert "Value error" not in line
    assert "Input should" not in line


def test_one_dash_may_stand_before_what_is_no_option(shell: Shell) -> None:
    for words in (["rollout", "--", "-model"], ["rollout", "a.png", "-mdemo"]):
        assert "one dash" not in shell(*words).err


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("google/vit-base-patch16-224", "is called hf-hub:google/vit-base-patch16-224"),
        ("google/vit-base-patch16-224", "did you mean vit_base_patch16_224"),
        ("vit_b_16", "that is torchvision's name; timm's is vit_base_patch16_224"),
        ("vit_h_14", "timm's is vit_huge_patch14_224"),
    ],
)
def test_names_of_other_libraries_are_told_timms(name: str, expected: str) -> None:
    known = ["vit_base_patch16_224", "vit_huge_patch14_224"]
    with pytest.raises(ModelError) as caught:
        require_name(name, known)
    assert expected in str(caught.value)


def test_models_of_other_libraries_are_told_to_be_that() -> None:
    theirs = torchvision.models.VisionTransformer(32, 16, 2, 2, 32, 32)
    with pytest.raises(ModelError, match=r"of torchvision, not of timm.*timm\.create_model"):
        load_model(theirs)


def test_few_labels_are_all_named() -> None:
    few = Labels(names=("star", "ring", "cross"))
    with pytest.raises(LabelError, match=r"'star' \(0\), 'ring' \(1\), 'cross' \(2\)"):
        parse_requests(["tabby"], few, 3)
    many = Labels(names=tuple(f"class {number}" for number in range(1000)))
    with pytest.raises(LabelError) as caught:
        parse_requests(["tabby"], many, 1000)
    assert len(str(caught.value)) < 200


def test_word_of_python_that_is_none_is_answered_with_the_near_one() -> None:
    with pytest.raises(OptionError, match=r"'sqash' is not one of squash, .*; did you mean squash"):
        vitviz.rollout(tiny_model(), [picture(64, 64)], fit="sqash")
