"""Methods side by side, as people read them, with Rich; measures nothing."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from vitviz.cli.rows import show_rows
from vitviz.errors import printable
from vitviz.evaluation.summary import Evaluation, MethodSummary, Metric

__all__ = ["show_evaluation", "verdict"]


_NAMED = 3  # methods in a row of words
_NOTES = """\
* better than both baselines: no 0 in the 95 % intervals of the differences
= the best method of the column, or not told apart from it: 0 in that interval
Neither mark is corrected for how many comparisons are made."""
_CENTRED = """\
Where objects stand in the middle, as on most photographs, the blob in the
centre alone points well and has a high precision: compare with its row."""


def show_evaluation(evaluation: Evaluation, console: Console, *, explain: bool = False) -> None:
    """Print which methods are best, in a sentence, and their numbers side by side.

    Args:
        evaluation: What was measured.
        console: Where to.
        explain: Say what each number means, too.
    """
    console.print(Text(verdict(evaluation), "bold"))
    console.print()
    title = f"{evaluation.settings['model']}, {_images(evaluation.images)}"
    console.print(Text(printable(title), "bold"), soft_wrap=True)
    headings = {
        "faithfulness": "Faithfulness",
        "localisation": f"Localisation, {_images(evaluation.masked)} with masks",
        "classes": "Class sensitivity",
    }
    for table, heading in headings.items():
        metrics = [metric for metric in evaluation.metrics if metric.table == table]
        if metrics:
            methods = [each for each in evaluation.methods if metrics[0].name in each.summaries]
            console.print()
            console.print(Text(heading, "bold cyan"))
            console.print(_score_table(methods, metrics, with_cost=table == "faithfulness"))
    console.print()
    for note in (_NOTES, _CENTRED) if evaluation.masked else (_NOTES,):
        console.print(note)
    console.print()
    if explain:
        rows = {"convention": evaluation.convention.value, **evaluation.explanations}
        show_rows(console, rows.items(), indent=0, width=13)
    else:
        console.print("--explain says what each number means.")


def verdict(evaluation: Evaluation) -> str:
    """Say in one sentence which methods are best, and which are no better than the baselines.

    The most faithful have the highest difference of insertion and deletion, the best outlines the
    highest average precision; named with them is what is not told apart from the best.
    """
    methods = [each for each in evaluation.methods if not each.is_baseline]
    if evaluation.images < 2:
        return "One image does not tell methods apart; give several."
    no_better = [each.name for each in methods if not each.summaries["difference"].better]
    if len(no_better) == len(methods):
        return "No method here beats the baselines in faithfulness."
    said = [f"Most faithful here: {_best(methods, 'difference')}"]
    if evaluation.masked > 1:
        said.append(f"best outlines: {_best(methods, 'average_precision')}")
    if no_better:
        verb = "does" if len(no_better) == 1 else "do"
        said.append(f"{_listed(no_better, 'and')} {verb} not beat the baselines")
    return "; ".join(said) + "."


def _best(methods: Sequence[MethodSummary], metric: str) -> str:
    """Name the best method by a metric, and those that are not told apart from it."""
    known = {each.name: each.summaries[metric] for each in methods if metric in each.summaries}
    near = [name for name, summary in known.items() if summary.near_best]
    near.sort(key=lambda name: known[name].interval.mean, reverse=True)
    return _listed(near, "or") + (" (not told apart)" if len(near) > 1 else "")


def _listed(names: Sequence[str], conjunction: str) -> str:
    """Write "a", "a or b", "a, b or c", or of many "a, b or 3 others"."""
    if len(names) > _NAMED:
        names = [*names[: _NAMED - 1], f"{len(names) - _NAMED + 1} others"]
    *first, last = names
    return f"{', '.join(first)} {conjunction} {last}" if first else last


def _score_table(
    methods: Iterable[MethodSummary], metrics: Sequence[Metric], *, with_cost: bool
) -> Table:
    """Lay out metrics, one method a row: the mean, and its interval beneath."""
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="cyan")
    table.add_column("method\n", overflow="fold")
    for metric in metrics:
        table.add_column(f"{metric.title}\n{'↓' if metric.lower else '↑'}", justify="right")
    if with_cost:
        table.add_column("cost\n↓", justify="right")
    for method in methods:
        cells = [_score(method, metric) for metric in metrics]
        if with_cost:
            cells.append(Text(f"{method.cost:.1f}"))
        table.add_row(Text(method.name, "dim" if method.is_baseline else ""), *cells)
    return table


def _score(method: MethodSummary, metric: Metric) -> Text:
    """Write a mean, and its interval beneath; a single image has none."""
    summary = method.summaries.get(metric.name)
    if summary is None:  # what other methods' maps have, as a class to point at
        return Text()
    ends = (summary.interval.low, summary.interval.high)
    interval = "" if math.isnan(ends[0]) else "–".join(_decimals(end, 2) for end in ends)
    marked = summary.better and not method.is_baseline
    near_best = summary.near_best and metric.table != "classes"  # the lowest is not the best there
    marks = f"{'*' if marked else ''}{'=' if near_best else ''}"
    mean = f"{_decimals(summary.interval.mean, 3)}{marks:<2}"
    return Text.assemble((mean, "bold" if marked else ""), (f"\n{interval}  ", "dim"))


def _decimals(value: float, digits: int) -> str:
    """Write .597, 1.000, -.012."""
    return re.sub(r"^(-?)0\.", r"\1.", f"{value:.{digits}f}")


def _images(count: int) -> str:
    return f"{count:,} image{'' if count == 1 else 's'}"
