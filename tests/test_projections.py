"""Values are weighed with what the model does to them, however that is written."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tiny import CASES
from vitviz.errors import CaptureError
from vitviz.explaining.batch import explain_batch
from vitviz.methods.relevance import Relevance
from vitviz.models.capture import AttentionCapture
from vitviz.models.model import load_model

pytestmark = pytest.mark.usefixtures("one_thread")

WIDTH, RANK = 48, 4
PLAIN = next(case for case in CASES if case.name == "class-token")


class _Wrapped(nn.Module):
    """Something else in the place of a projection, and the one layer that equals it."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Linear(WIDTH, RANK, bias=False)
        self.up = nn.Linear(RANK, WIDTH, bias=False)
        nn.init.normal_(self.up.weight)

    def merged(self) -> tuple[Tensor, Tensor]:
        return self.base.weight + self.up.weight @ self.down.weight, self.base.bias


class AdapterLast(_Wrapped):
    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


class AdapterFirst(_Wrapped):
    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.down(x)) + self.base(x)


class AdapterInPlace(_Wrapped):
    def forward(self, x: Tensor) -> Tensor:
        output = self.base(x)
        output += self.up(self.down(x))
        return output


class Split(_Wrapped):
    """Two layers, the first of the projection's own shape."""

    def merged(self) -> tuple[Tensor, Tensor]:
        rest = self.up.weight @ self.down.weight
        return rest @ self.base.weight, rest @ self.base.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.down(self.base(x)))


class Written(_Wrapped):
    def merged(self) -> tuple[Tensor, Tensor]:
        return self.base.weight, self.base.bias

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.base.weight.T + self.base.bias


class WrittenByHead(Written):
    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bnk,ck->bnc", x, self.base.weight).add_(self.base.bias)


class Scaled(Written):
    """A factor on either side of a layer."""

    def merged(self) -> tuple[Tensor, Tensor]:
        factor = torch.linspace(0.5, 2, WIDTH)
        return factor[:, None] * self.base.weight * factor, factor * self.base.bias

    def forward(self, x: Tensor) -> Tensor:
        factor = torch.linspace(0.5, 2, WIDTH, device=x.device)
        return factor * self.base(factor * x)


class WholeNumbers(_Wrapped):
    """Weights of 8 bits, multiplied by a scale after the product."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__(base)
        self.register_buffer("scale", base.weight.detach().abs().amax(dim=1) / 127)
        whole = (base.weight.detach() / self.scale[:, None]).round().to(torch.int8)
        self.register_buffer("whole", whole)

    def merged(self) -> tuple[Tensor, Tensor]:
        return self.whole.float() * self.scale[:, None], self.base.bias

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.whole.to(x.dtype).T) * self.scale + self.base.bias


class WholeNumbersInALayer(WholeNumbers):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.whole.to(x.dtype)) * self.scale + self.base.bias


class Bent(_Wrapped):
    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x).relu())


class Gated(_Wrapped):
    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) * x.mean(dim=-1, keepdim=True)


class RoundedInputs(_Wrapped):
    """Numbers of 8 bits between that let gradients pass as if they were not rounded."""

    def forward(self, x: Tensor) -> Tensor:
        scale = x.detach().abs().max() / 127
        return (x + ((x / scale).round() * scale - x).detach()) @ self.base.weight.T


def _model(replace: Callable[[nn.Linear], nn.Module] | None = None) -> nn.Module:
    model = PLAIN.build()
    torch.manual_seed(0)
    for block in model.blocks if replace else ():
        block.attn.proj = replace(block.attn.proj)
    return model


def _relevance(model: nn.Module) -> np.ndarray:
    method = Relevance(classes=tuple(map(str, range(7))))
    return explain_batch(load_model(model, device="cpu"), PLAIN.images(), method).relevance.numpy()


LINEAR = [
    *(AdapterLast, AdapterFirst, AdapterInPlace, Split, Written, WrittenByHead, Scaled),
    *(WholeNumbers, WholeNumbersInALayer),
]


@pytest.mark.parametrize("replace", LINEAR)
def test_linear_projection_counts_as_the_one_layer_that_it_equals(
    replace: type[_Wrapped],
) -> None:
    model = _model(replace)
    found = _relevance(model)
    for block in model.blocks:
        weight, bias = block.attn.proj.merged()
        block.attn.proj = nn.Linear(WIDTH, WIDTH)
        block.attn.proj.weight.data, block.attn.proj.bias.data = weight.detach(), bias.detach()
    expected = _relevance(model)
    assert np.ptp(expected) > 0.1
    assert np.abs(found - expected).max() <= 1e-4 * np.ptp(expected)


@pytest.mark.parametrize("replace", [Bent, Gated, RoundedInputs])
def test_projection_that_is_not_linear_is_refused(replace: type[_Wrapped]) -> None:
    with pytest.raises(CaptureError, match="no matrix that attention multiplies its values with"):
        _relevance(_model(replace))


def test_hook_that_changes_a_projection_is_part_of_it() -> None:
    doubled, hooked = _model(), _model()
    for block in doubled.blocks:
        block.attn.proj.weight.data *= 2
        block.attn.proj.bias.data *= 2
    for block in hooked.blocks:
        block.attn.proj.register_forward_hook(lambda module, inputs, output: 2 * output)
    np.testing.assert_allclose(_relevance(hooked), _relevance(doubled), rtol=1e-4)


def test_plain_projection_is_taken_as_it_is() -> None:
    """To the bit: nothing is computed where the weight of one layer is all there is."""
    model = _model()
    with (
        AttentionCapture(model, first_gradient=0, projections=True) as capture,
        torch.enable_grad(),
    ):
        model(PLAIN.images())
        records = capture.take()
    for block, record in zip(model.blocks, records, strict=True):
        assert record.projection.data_ptr() == block.attn.proj.weight.data_ptr()
