"""One batch: what the engine makes of a model that fails or does not keep its promises."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fixtures_io import tiny_module
from vitviz.errors import CaptureError
from vitviz.explaining.batch import explain_batch
from vitviz.methods.rollout import Rollout
from vitviz.models.model import Model, load_model

pytestmark = pytest.mark.usefixtures("one_thread")


class Shortening(nn.Module):
    """A block that loses its last token, as token merging does."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, tokens: Tensor, *arguments: Any, **options: Any) -> Tensor:
        return self.block(tokens, *arguments, **options)[:, :-1]  # type: ignore[no-any-return]


def loaded() -> tuple[Model, Tensor]:
    model = load_model(tiny_module(), device="cpu")
    return model, torch.randn(2, 3, *model.preprocessing.size)


def test_tokens_lost_since_the_model_was_loaded_are_noticed() -> None:
    model, images = loaded()
    blocks: Any = model.module.blocks
    blocks[2] = Shortening(blocks[2])
    with pytest.raises(CaptureError, match="number of tokens changes"):
        explain_batch(model, images, Rollout())


@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), MemoryError),
        (RuntimeError("[enforce fail] can't allocate memory: you tried"), MemoryError),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), RuntimeError),
        (ZeroDivisionError("out of memory"), ZeroDivisionError),
    ],
    ids=["cuda", "cpu", "shapes", "other"],
)
def test_missing_memory_is_told_from_other_failures(
    error: Exception, raised: type[Exception]
) -> None:
    model, images = loaded()

    def fail(images: Tensor) -> Tensor:
        raise error

    model.module.forward = fail  # type: ignore[method-assign]
    with pytest.raises(raised) as caught:
        explain_batch(model, images, Rollout())
    assert type(caught.value) is raised
    assert str(error) in str(caught.value)
