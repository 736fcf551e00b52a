"""The model's own modules in the order in which they run, whether it has blocks or not."""

from __future__ import annotations

from dataclasses import replace

from vitviz.inspection.events import ModuleRun
from vitviz.inspection.parts import Cost, Layer
from vitviz.inspection.traced import TracedModel

__all__ = ["measure_outline", "outline_runs"]

_ALL_BUT_WHOLE = 0.8


def measure_outline(traced: TracedModel) -> tuple[Layer, ...]:
    """List the model's outermost modules in the order in which they ran, with their costs."""
    layers: dict[str, Layer] = {}
    for run in outline_runs(traced):
        if run.path not in layers and traced.does_something(run):
            layers[run.path] = replace(traced.layer(run), cost=_module_cost(traced, run))
    return tuple(layers.values())


def outline_runs(traced: TracedModel) -> list[ModuleRun]:
    """List the complete runs of the outermost modules, one after the other."""
    runs: list[ModuleRun] = []
    end = 0
    for run in traced.trace.runs:
        if not run.path or run.enter < end or run.leave is None:
            continue
        has_parts = next(traced.modules[run.path].children(), None) is not None
        if has_parts and _module_cost(traced, run).share > _ALL_BUT_WHOLE:
            continue  # the parts of a module that is nearly the whole model tell more
        end = run.leave
        runs.append(run)
    return runs


def _module_cost(traced: TracedModel, run: ModuleRun) -> Cost:
    names = [name for name in traced.sizes if name.startswith(f"{run.path}.")]
    return traced.cost(names, run.macs, run.output_shape)
