"""A traced model, with the questions that all parts ask of it."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable

from torch import nn

from vitviz.inspection.events import AttentionUse, ModuleRun, Product, Shape, Trace
from vitviz.inspection.parts import Cost, Layer
from vitviz.models.structure import block_names

__all__ = [
    "TracedModel",
    "without_block_numbers",
    "norms_between",
    "outermost_layers",
    "layer_of_product",
    "relative_path",
    "sequence_length",
    "is_within",
]


class TracedModel:
    """A traced model, with the questions that all parts ask of it."""

    def __init__(self, module: nn.Module, trace: Trace) -> None:
        """Prepare what is asked again and again."""
        self.module = module
        self.trace = trace
        self.modules = dict(module.named_modules())
        self.sizes = {name: tensor.numel() for name, tensor in module.named_parameters()}
        self.tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        self.parameters = sum(self.sizes.values())
        self.block_runs = self._find_block_runs()
        # The module that computes each attention, in the order of the trace.
        self.homes = [self._home(attention) for attention in trace.attentions]

    @property
    def blocks_begin(self) -> float:
        """Step at which the first block begins; never, in a model without blocks."""
        return self.block_runs[0].enter if self.block_runs else math.inf

    @property
    def blocks_end(self) -> float:
        """Step at which the last block ends."""
        return max((run.leave or math.inf for run in self.block_runs), default=math.inf)

    def part_of(self, parameter: str) -> int | None:
        """Return which part first uses a parameter: 0 tokens, 1 blocks, 2 head; None if none."""
        if any(is_within(parameter, run.path) for run in self.block_runs):
            return 1
        step = self.trace.first_use.get(parameter)
        return None if step is None else self.stage(step)

    def stage(self, step: int) -> int:
        """Return which part a step belongs to: 0 tokens, 1 blocks, 2 head."""
        return int(step > self.blocks_begin) + int(step > self.blocks_end)

    def cost(self, names: Iterable[str], macs: int | None, output_shape: Shape | None) -> Cost:
        """Sum the parameters of these names into a cost."""
        parameters = sum(self.sizes[name] for name in names)
        share = parameters / self.parameters if self.parameters else 0.0
        return Cost(parameters=parameters, share=share, macs=macs, output_shape=output_shape)

    def part_cost(self, part: int) -> Cost | None:
        """Measure one of the three parts."""
        if not self.block_runs:
            return None
        begin, end = self.block_runs[0], self.block_runs[-1]
        whole = self.trace.run_of("")
        macs = (
            begin.macs_before,
            end.macs_after - begin.macs_before,
            self.trace.macs - end.macs_after,
        )
        shapes = (begin.input_shape, end.output_shape, whole.output_shape if whole else None)
        # By first use, not by name: a head may be called anything, and may be used twice.
        names = [name for name in self.sizes if self.part_of(name) == part]
        return self.cost(names, macs[part], shapes[part])

    def layer(self, run: ModuleRun, within: str = "") -> Layer:
        """Name a module that ran."""
        return Layer(name=relative_path(run.path, within), kind=run.kind)

    def does_something(self, run: ModuleRun) -> bool:
        """Tell whether a module that ran changes its input in evaluation mode."""
        return not isinstance(self.modules[run.path], nn.Identity) and not run.kind.startswith(
            ("Dropout", "DropPath", "PatchDropout")
        )

    def is_norm(self, run: ModuleRun) -> bool:
        """Tell whether a module that ran is a norm, not something larger that contains one."""
        parts = self.modules[run.path].children()
        leaf = not any(next(part.parameters(), None) is not None for part in parts)
        return "Norm" in run.kind and leaf and self.does_something(run)

    def _find_block_runs(self) -> list[ModuleRun]:
        """List the runs of ``blocks``, if they are one sequence of blocks that each ran once."""
        paths = block_names(self.module)
        # Containers among them are the stages of a pyramid (EfficientNet, Twins), not blocks.
        stages = (nn.Sequential, nn.ModuleList)
        if self.trace.error or any(isinstance(self.modules[path], stages) for path in paths):
            return []
        runs = [run for run in self.trace.runs if run.path in set(paths)]
        return runs if [run.path for run in runs] == paths else []

    def _home(self, attention: AttentionUse) -> str:
        """Return the module that computes an attention, not the softmax that it has for it."""
        if isinstance(self.modules[attention.path], nn.Softmax):
            return attention.path.rpartition(".")[0]
        return attention.path


def sequence_length(shape: Shape | None) -> int | None:
    """Count the tokens of (1, …, channels); more than one in front means something else."""
    plain = shape is not None and len(shape) >= 3 and shape[0] == 1
    return math.prod(shape[1:-1]) if shape and plain else None


def outermost_layers(traced: TracedModel, within: str, after: float = 0) -> list[Layer]:
    """List the outermost modules that ran in another and did something."""
    layers: list[Layer] = []
    for run in traced.trace.runs:
        inside = run.path != within and is_within(run.path, within)
        if inside and run.enter > after:
            after = run.leave or run.enter
            if traced.does_something(run):
                layers.append(traced.layer(run, within))
    return layers


def layer_of_product(traced: TracedModel, product: Product, within: str) -> Layer:
    """Name the layer of a product, by the weight that it uses."""
    # A weight may be used without running its module (BEiT adds its bias by itself).
    path = product.weight.rpartition(".")[0] if product.weight else product.path
    path = path if path in traced.modules else product.path
    return Layer(
        name=relative_path(path, within) or path.rpartition(".")[2],
        kind=type(traced.modules[path]).__name__,
        inputs=product.inputs,
        outputs=product.outputs,
    )


def norms_between(traced: TracedModel, after: float, before: float) -> list[ModuleRun]:
    """List the norms that begin between two steps, but not inside an attention's own module."""
    norms = [
        run
        for run in traced.trace.runs
        if after < run.enter < before
        and traced.is_norm(run)
        and not any(home and is_within(run.path, home) for home in traced.homes)
    ]
    # Deeper ones belong to something larger, a block of class attention, say: they are the answer
    # only where there is nothing else.
    return [run for run in norms if run.path.count(".") <= 1] or norms


def is_within(path: str, home: str) -> bool:
    """Tell whether a module is another one, or inside it."""
    return not home or path == home or path.startswith(f"{home}.")


def relative_path(path: str, home: str) -> str:
    """Name a module relative to the one that it is in."""
    return path[len(home) :].lstrip(".") if is_within(path, home) else path


def without_block_numbers(path: str) -> str:
    """Write the numbers in a path as ``i``, so that the same place in all blocks reads alike."""
    return re.sub(r"\.\d+(?=\.|$)", ".i", path)
