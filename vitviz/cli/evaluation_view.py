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

__all__ = ["show_evaluation"]


def show_evaluation(evaluation: Evaluation, console: Console) -> None:
    """Print methods side by side: how faithful, how well located, and what the numbers mean.

    Args:
        evaluation: What was measured.
        console: Where to.
    """
    title = f"{evaluation.settings['model']}, {_images(evaluation.images)}"
    console.print(Text(printable(title), "bold"), soft_wrap=True)
    groups = {False: "Faithfulness", True: f"Localisation, {_images(evaluation.masked)} with masks"}
    for located, heading in groups.items():
        metrics = [metric for metric in evaluation.metrics if metric.located is located]
        if metrics:
            console.print()
            console.print(Text(heading, "bold cyan"))
            console.print(_score_table(evaluation.methods, metrics, with_cost=not located))
    console.print("* better than both baselines: no 0 in the 95 % intervals of the differences")
    console.print()
    convention = {"convention": evaluation.convention.value}
    show_rows(console, [*convention.items(), *evaluation.explanations.items()], indent=0, width=13)


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
    summary = method.summaries[metric.name]
    ends = (summary.interval.low, summary.interval.high)
    interval = "" if math.isnan(ends[0]) else "–".join(_decimals(end, 2) for end in ends)
    marked = summary.better and not method.is_baseline
    mean = _decimals(summary.interval.mean, 3) + ("*" if marked else " ")
    return Text.assemble((mean, "bold" if marked else ""), (f"\n{interval} ", "dim"))


def _decimals(value: float, digits: int) -> str:
    """Write .597, 1.000, -.012."""
    return re.sub(r"^(-?)0\.", r"\1.", f"{value:.{digits}f}")


def _images(count: int) -> str:
    return f"{count:,} image{'' if count == 1 else 's'}"
