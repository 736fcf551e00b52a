"""Class names, class requests and label files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import timm.data

import vitviz
from fixtures_io import picture, tiny_model, tiny_module
from vitviz.errors import LabelError, OptionError
from vitviz.models.labels import ClassRequest, Labels, parse_requests, read_labels
from vitviz.models.model import load_model

IMAGENET = Labels(names=tuple(timm.data.ImageNetInfo("imagenet-1k").label_descriptions()))
LABELS = Labels(
    names=("tench, Tinca tinca", "crane", "crane", "tabby, tabby cat", "cat", "tiger cat, cat")
)


def indices(*words: str, labels: Labels = LABELS, count: int | None = None) -> list[str]:
    requests = parse_requests(words, labels, len(labels.names) if count is None else count)
    return [request.key for request in requests]


def refusal(*words: str, labels: Labels = LABELS) -> str:
    with pytest.raises(LabelError) as caught:
        parse_requests(words, labels, len(labels.names))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_full_description_comes_first() -> None:
    # "cat" is all of class 4 and a synonym of class 5.
    assert indices("cat") == ["c4"]


def test_full_description_with_commas_is_one_label() -> None:
    assert indices("tabby, tabby cat") == ["c3"]
    assert indices("Tiger Cat, Cat") == ["c5"]


@pytest.mark.parametrize("word", ["tabby", "tabby cat", "TABBY", " Tabby ", "tinca TINCA"])
def test_synonyms_match_without_regard_to_case(word: str) -> None:
    assert indices(word) == ["c0" if "inca" in word.lower() else "c3"]


@pytest.mark.parametrize("word", ["tab", "tabb", "abby", "tiger", "tabby,", ", tabby cat", "tinca"])
def test_no_part_of_a_label_matches(word: str) -> None:
    assert "no label" in refusal(word)


def test_ambiguous_label_lists_the_indices() -> None:
    message = refusal("Crane")
    assert "1 =" in message
    assert "2 =" in message
    assert "index" in message


def test_imagenet_has_two_cranes() -> None:
    message = refusal("crane", labels=IMAGENET)
    assert "134" in message
    assert "517" in message


def test_imagenet_labels_are_found() -> None:
    assert indices("tabby", "tabby, tabby cat", "281", labels=IMAGENET) == ["c281"]


def test_near_labels_are_offered() -> None:
    assert "'tabby'" in refusal("taby")
    message = refusal("egyptian", labels=IMAGENET)
    assert "Egyptian cat".lower() in message.lower()
    assert "285" in message


def test_label_like_nothing_says_what_to_give() -> None:
    assert "index" in refusal("xyzzyxyzzy")


def test_model_without_labels_wants_an_index() -> None:
    with pytest.raises(LabelError, match="--labels"):
        parse_requests(["tabby"], Labels(), 7)
    assert indices("3", labels=Labels(), count=7) == ["c3"]


@pytest.mark.parametrize("word", ["6", "-1", "1000", "99999999999999999999", "9" * 5000])
def test_index_outside_the_classes_is_refused(word: str) -> None:
    assert "0 … 5" in refusal(word)


@pytest.mark.parametrize("word", ["0", "5", "05", " 5 "])
def test_digits_mean_an_index(word: str) -> None:
    assert indices(word) == [f"c{int(word)}"]


def test_digits_mean_an_index_even_where_a_label_has_digits() -> None:
    assert indices("1", labels=Labels(names=("1", "2", "3"))) == ["c1"]


def test_ranks() -> None:
    assert indices("top1") == ["top1"]
    assert indices("top3") == ["top1", "top2", "top3"]
    assert indices("TOP2") == ["top1", "top2"]


def test_ranks_end_with_the_classes() -> None:
    assert len(indices("top99")) == 6


@pytest.mark.parametrize(
    "word", ["top0", "top", "top-1", "top1.5", "top 1", "", "top" + "9" * 5000], ids=len
)
def test_odd_ranks_are_refused(word: str) -> None:
    refusal(word)


def test_same_class_asked_for_twice_gives_one_map() -> None:
    assert indices("tabby", "3", "tabby cat", "top1", "top2", "top1") == ["c3", "top1", "top2"]


def test_order_is_the_one_asked_for() -> None:
    assert indices("cat", "top1", "0") == ["c4", "top1", "c0"]


def test_fixed_class_and_rank_differ() -> None:
    assert ClassRequest(class_index=1) != ClassRequest(rank=1)


# Label files


def write(folder: Path, text: str | bytes) -> Path:
    path = folder / "labels"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


@pytest.mark.parametrize(
    "text",
    [
        "cat, tabby\nÉgypt\nc\n",
        "cat, tabby\r\nÉgypt\r\nc",
        "\ufeffcat, tabby\nÉgypt\nc\n",
        json.dumps(["cat, tabby", "Égypt", "c"]),
        " \n" + json.dumps(["cat, tabby", "Égypt", "c"], indent=2),
        json.dumps({"2": "c", "0": "cat, tabby", "1": "Égypt"}),
    ],
    ids=["lines", "windows", "bom", "list", "indented", "object"],
)
def test_label_file_in_any_form(tmp_path: Path, text: str) -> None:
    path = write(tmp_path, text)
    labels = read_labels(path, 3)
    assert labels.names == ("cat, tabby", "Égypt", "c")
    assert not labels.assumed
    assert str(path) in labels.source


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a\nb\n", "2 labels.*3 classes"),
        ("", "0 labels"),
        (json.dumps(["a"] * 4), "4 labels.*3 classes"),
        ('["a", "b"', "JSON"),
        ('{"0": "a", "1": "b", "x": "c"}', "indices"),
        ('{"0": "a", "1": "b", "3": "c"}', "without gaps"),
        ('{"1": "a", "2": "b", "3": "c"}', "without gaps"),
        (b"\xff\xfe\x00", "UTF-8"),
        ('["a", ["b"], null]', "labels"),
        ('{"0": ["n01440764", "tench"], "1": ["n1", "b"], "2": ["n2", "c"]}', "labels"),
        ("[" * 100_000, "JSON"),
        ('["a", null]', "null is no label"),
        ('["a", []]', r"\[\] is no label"),
        ('["a", true]', "true is no label"),
        ('["a", {}]', r"\{\} is no label"),
        ('{"0": "a", "1": null}', "null is no label"),
    ],
)
def test_label_file_that_does_not_fit_is_refused(
    tmp_path: Path, text: str | bytes, says: str
) -> None:
    path = write(tmp_path, text)
    with pytest.raises(LabelError, match=says) as caught:
        read_labels(path, 3)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_half_characters_are_escaped(tmp_path: Path) -> None:
    names = read_labels(write(tmp_path, r'["a\ud83d", "b", "c"]'), 3).names
    assert names == (r"a\ud83d", "b", "c")


def test_missing_label_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LabelError, match="cannot be read"):
        read_labels(tmp_path / "gone", 3)
    with pytest.raises(LabelError, match="cannot be read"):
        read_labels(tmp_path, 3)


def test_labels_know_what_they_do_not_know() -> None:
    assert LABELS[3] == "tabby, tabby cat"
    assert LABELS[99] is None
    assert LABELS[-1] is None


@pytest.mark.parametrize("classes", [b"tabby", bytearray(b"tabby"), b""], ids=str)
def test_bytes_are_no_classes(classes: object) -> None:
    with pytest.raises(OptionError, match="classes is .*; give an index, a label"):
        vitviz.grad_rollout(tiny_model(), [picture(8, 8)], classes=classes)


def test_config_with_a_label_that_is_none_names_no_class() -> None:
    module = tiny_module()
    names = [*"abcdef", None]
    module.pretrained_cfg = {**module.pretrained_cfg, "label_names": names}  # type: ignore[dict-item]
    assert load_model(module, device="cpu").labels.names == ()
