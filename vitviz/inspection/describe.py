"""A model measured on the meta device: its three parts, from one traced run.

Nothing here prints, needs weights, or knows models by name.
"""

from __future__ import annotations

from torch import nn

from vitviz.inspection.blocks import measure_blocks
from vitviz.inspection.head import measure_head
from vitviz.inspection.outline import measure_outline
from vitviz.inspection.parts import ModelSummary
from vitviz.inspection.tokenization import measure_tokenization
from vitviz.inspection.trace import trace_model
from vitviz.inspection.traced import TracedModel
from vitviz.models.catalogue import support_of
from vitviz.models.preprocessing import preprocessing_of
from vitviz.models.structure import input_channels, pretrained_config

__all__ = ["describe"]


def describe(module: nn.Module, name: str) -> ModelSummary:
    """Measure a model and its parts on the meta device.

    Args:
        module: The model, with or without weights (``building.build_skeleton``); left as it was.
        name: What to call it.

    Returns:
        Its summary. A model of any kind gets one, with what can be told about it.
    """
    channels, height, width = _input_shape(module)
    trace = trace_model(module, (channels, height, width))
    traced = TracedModel(module, trace)
    support = support_of(module, (height, width))
    blocks = measure_blocks(traced)
    whole = trace.run_of("")
    return ModelSummary(
        name=name,
        architecture=type(module).__name__,
        input_shape=(channels, height, width),
        parameters=traced.parameters,
        macs=None if trace.error else trace.macs,
        output_shape=whole.output_shape if whole else None,
        tokenization=measure_tokenization(traced, support),
        blocks=blocks,
        head=measure_head(traced, support),
        outline=measure_outline(traced),
        unused_parameters=sum(
            size for name, size in traced.sizes.items() if traced.part_of(name) is None
        )
        if not trace.error
        else 0,
        support=support,
        error=trace.error,
    )


def _input_shape(module: nn.Module) -> tuple[int, int, int]:
    channels = input_channels(module)
    if channels not in (1, 3):  # a stem that rearranges pixels before its first layer
        channels = int((pretrained_config(module).get("input_size") or (3,))[0])
    height, width = preprocessing_of(module).size
    return channels, height, width
