"""What ``evaluate`` prints, word for word at two widths, and its first sentence case by case."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from fixtures_io import tiny_model
from vitviz.cli.evaluation_view import show_evaluation, verdict
from vitviz.evaluation.measuring import ImageScores
from vitviz.evaluation.options import EvaluationOptions
from vitviz.evaluation.perturbation import Curves
from vitviz.evaluation.scores import ClassScores
from vitviz.evaluation.summary import Evaluation, summarize
from vitviz.images.sources import Source

GOLDEN = Path(__file__).parent / "golden"
NO_CURVES = Curves(score=np.zeros((2, 9), np.float32), accuracy=np.zeros((2, 9), np.float32))

# The difference, the average precision and the correlation of each method's maps, in the mean.
MEASURED: dict[str, tuple[float, float, float | None]] = {
    "random": (-0.024, 0.064, None),
    "centre": (0.527, 0.139, None),
    "rollout": (0.431, 0.401, None),
    "relevance": (0.741, 0.803, 0.485),
    "evidence": (0.895, 0.738, -0.211),
    "evidence-shared": (0.893, 0.688, 1.0),
}


def evaluation(
    measured: dict[str, tuple[float, float, float | None]], *, images: int = 4, masked: int = 4
) -> Evaluation:
    """Put numbers together that scatter over the images around those given, by methods apart."""

    def scores(name: str, number: int) -> dict[str, float]:
        difference, precision, correlation = measured[name]
        scatter = 0.01 * np.cos(2 * np.pi * number / images + len(name))
        found = {"deletion": 0.5 - difference / 2, "insertion": 0.5 + difference / 2}
        found |= {"difference": difference + scatter, "positive": 0.1, "negative": 0.4}
        if number < masked:
            found |= {"pointing": 0.5, "energy": 0.3, "best_miou": 0.8, "specificity": 0.9}
            found["average_precision"] = precision + scatter
        return found if correlation is None else found | {"class_correlation": correlation}

    def case(number: int) -> ClassScores:
        return ClassScores(
            class_index=0,
            class_label=None,
            versus_index=None,
            versus_label=None,
            truth=None,
            scores={name: scores(name, number) for name in measured},
            curves=dict.fromkeys(measured, NO_CURVES),
            costs={name: float(number % 2 + len(name)) for name in measured},
        )

    options = EvaluationOptions(methods=tuple(measured)[2:])
    found = [
        ImageScores(source=Source(path=Path(f"{number}.png"), key=""), cases=(case(number),))
        for number in range(images)
    ]
    return summarize(tiny_model(), options, found)


def shown(found: Evaluation, width: int, *, explain: bool = False) -> str:
    stream = io.StringIO()
    show_evaluation(found, Console(file=stream, width=width), explain=explain)
    return "\n".join(map(str.rstrip, stream.getvalue().splitlines())) + "\n"


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("explain", [False, True], ids=["tables", "explained"])
def test_text_is_this_word_for_word(width: int, explain: bool) -> None:
    name = f"evaluate-{'explained' if explain else 'tables'}-{width}.txt"
    text = shown(evaluation(MEASURED), width, explain=explain)
    assert text == (GOLDEN / name).read_text(encoding="utf-8")
    assert max(map(len, text.splitlines())) <= width


def test_best_methods_and_those_that_tell_nothing_are_named() -> None:
    assert verdict(evaluation(MEASURED)) == (
        "Most faithful here: evidence or evidence-shared (not told apart); best outlines: "
        "relevance; rollout does not beat the baselines."
    )


def test_outlines_are_spoken_of_where_several_images_have_masks() -> None:
    for masked in (0, 1):
        assert "outlines" not in verdict(evaluation(MEASURED, masked=masked))
    assert "best outlines: relevance;" in verdict(evaluation(MEASURED, images=6, masked=2))


def test_many_methods_that_are_not_told_apart_are_counted() -> None:
    alike = dict.fromkeys(("relevance", "grad-rollout", "evidence", "evidence-plain"), (0.9, 0, 0))
    text = verdict(evaluation(dict(list(MEASURED.items())[:2]) | alike, masked=0))
    assert text.endswith(" or 2 others (not told apart).")
    assert text.count(",") == 1


def test_verdict_without_a_best_method() -> None:
    baselines = dict(list(MEASURED.items())[:2])
    none = evaluation(baselines | {"rollout": (0.2, 0.3, None), "evidence": (0.5, 0.3, 0.0)})
    assert verdict(none) == "No method here beats the baselines in faithfulness."
    two = evaluation(MEASURED | {"relevance": (0.2, 0.1, 0.0)})
    assert verdict(two).endswith("; rollout and relevance do not beat the baselines.")
    assert verdict(evaluation(MEASURED, images=1, masked=1)) == (
        "One image does not tell methods apart; give several."
    )
