"""The linearised backward pass: forward values as they are, three constants on the way back."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from functools import cache, partial
from itertools import product

import numpy as np
import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

import linear_oracles
from comparison import (
    BALANCED_EVIDENCE,
    EVIDENCE,
    GRADIENTS,
    LINEAR,
    RELEVANCE,
    ROLLOUTS,
    SHARED_EVIDENCE,
    AnySetting,
    distance,
)
from tiny import CASES, TinyCase
from vitviz.errors import OptionError
from vitviz.explaining.batch import class_requests, explain_batch
from vitviz.models.capture import AttentionCapture
from vitviz.models.linear_backward import LinearizedBackward
from vitviz.models.model import load_model
from vitviz.models.residuals import BalancedResiduals
from vitviz.models.structure import blocks_of
from vitviz.options import AttentionRule
from zoo import Specimen, collect

pytestmark = pytest.mark.usefixtures("one_thread")

PLAIN = next(case for case in CASES if case.name == "class-token")
POOLED, TALKING = "vit_pe_core_tiny_patch16_384", "cait_xxs24_224"

each_rule = pytest.mark.parametrize("rule", AttentionRule, ids=str)
each_type = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float64], ids=["fp32", "bf16", "fp64"]
)

specimen = cache(collect)


@pytest.mark.parametrize(
    "rules",
    [
        *(linear_oracles.VALUE, linear_oracles.SHARED),
        *(linear_oracles.BALANCED, linear_oracles.BALANCED_SHARED),
    ],
    ids=["v", "qkv", "v-balanced", "qkv-balanced"],
)
def test_reference_equals_gradients_derived_on_paper(rules: linear_oracles.Rules) -> None:
    images = PLAIN.images()
    trace = linear_oracles.linear_trace(PLAIN.build(), images, rules)
    on_paper = linear_oracles.PlainVit(PLAIN.build())
    for class_index in PLAIN.classes:
        for image, by_hand in zip(images, trace.about([class_index] * 3), strict=True):
            pixels = image.double().numpy()
            depth = 0 if rules.residual is linear_oracles.unbalanced else 3
            expected = on_paper.image_trace(
                pixels, class_index, shares=rules.shares, balanced_blocks=depth
            )
            for name in ("attention", "values", "projections", "biases", "tokens"):
                _assert_close(getattr(by_hand, name), getattr(expected, name))
            _assert_close(by_hand.token_gradients, expected.token_gradients)
            if rules.shares[2] == 1:
                _assert_close(by_hand.attention_gradients, expected.attention_gradients)


def _assert_close(found: list[np.ndarray], expected: list[np.ndarray]) -> None:
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-9, atol=1e-11 * np.abs(other).max())


def _seen(model: nn.Module, images: Tensor) -> list[Tensor]:
    """Run a model; return what leaves its blocks, and its output."""
    outputs: list[Tensor] = []
    handles = [
        block.register_forward_hook(lambda block, inputs, output: outputs.append(output.detach()))
        for block in blocks_of(model)
    ]
    outputs.append(model(images).detach())
    for handle in handles:
        handle.remove()
    return outputs


def _assert_same_forward(model: nn.Module, images: Tensor, rule: AttentionRule) -> None:
    with torch.no_grad():
        plain = _seen(model, images)
    for first_gradient, balanced in product((None, 1), (False, True)):
        with (
            AttentionCapture(
                model, first_gradient=first_gradient, projections=True, blocks=blocks_of(model)
            ),
            torch.enable_grad(),
            BalancedResiduals(blocks_of(model)).followed() as residuals,
            LinearizedBackward(rule, residuals if balanced else None),
        ):
            linear = _seen(model, images)
        assert all(map(torch.equal, linear, plain))


@each_type
@each_rule
@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward_values_are_bit_identical(
    case: TinyCase, rule: AttentionRule, dtype: torch.dtype
) -> None:
    _assert_same_forward(case.build().to(dtype), case.images().to(dtype), rule)


@pytest.mark.slow
@each_type
@pytest.mark.parametrize(
    ("name", "rule"),
    [
        *((POOLED, rule) for rule in AttentionRule),
        (TALKING, AttentionRule.VALUE),
        ("vit_base_patch32_clip_quickgelu_224", AttentionRule.SHARED),
        ("aimv2_large_patch14_224", AttentionRule.SHARED),
    ],
)
def test_forward_values_of_other_families_are_bit_identical(
    name: str, rule: AttentionRule, dtype: torch.dtype
) -> None:
    chosen = specimen(name)
    # Torch chooses its products (of talking heads) by whether a weight asks for a gradient.
    model = copy.deepcopy(chosen.module).to(dtype).requires_grad_(False)
    _assert_same_forward(model, chosen.images().to(dtype), rule)


def _gradient(function: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """Return a function's value, and its linearised gradient under random weights of its output."""
    x = x.clone().requires_grad_(True)
    with LinearizedBackward(AttentionRule.VALUE):
        output = function(x * 1)
    weights = _drawn(*output.shape).to(output.dtype)
    (gradient,) = torch.autograd.grad((output * weights).sum(), x)
    return output.detach(), gradient


def _drawn(*shape: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


IN_PLACE = (
    *(nn.SiLU, nn.ReLU, nn.ReLU6, nn.Mish, nn.Hardswish),
    *(nn.LeakyReLU, nn.ELU, nn.CELU, nn.SELU),
)


@pytest.mark.parametrize(
    ("kind", "activation"),
    [
        (nn.GELU, nn.GELU()),
        (partial(nn.GELU, approximate="tanh"), nn.GELU("tanh")),
        *((kind, kind()) for kind in IN_PLACE),
        *((kind, kind(inplace=True)) for kind in IN_PLACE),
    ],
    ids=str,
)
def test_gate_of_an_activation_is_a_constant(
    kind: Callable[..., nn.Module], activation: nn.Module
) -> None:
    x = 3 * _drawn(40)
    x[:4] = torch.tensor([0.0, 9e-7, -9e-7, 1.1e-6])
    output, gradient = _gradient(activation, x)
    expected = kind()(x)
    assert torch.equal(output, expected)
    gate = expected / x
    gate[:3] = 0.5
    torch.testing.assert_close(gradient, gate * _drawn(40))


@pytest.mark.parametrize(
    "activation", [F.gelu, partial(torch.pow, exponent=2)], ids=["gelu", "pow"]
)
def test_operand_may_be_given_by_its_name(activation: Callable[..., Tensor]) -> None:
    found = _gradient(lambda x: activation(input=x), _drawn(40))
    for one, other in zip(found, _gradient(activation, _drawn(40)), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("kind", [nn.LayerNorm, nn.RMSNorm])
def test_deviation_is_a_constant_and_the_mean_is_not(
    kind: Callable[..., nn.Module], affine: bool
) -> None:
    norm = kind(6, elementwise_affine=affine).double()
    if affine:
        for parameter in norm.parameters():
            parameter.data = _drawn(6, seed=4)
    x = _drawn(3, 6, seed=2) + 1
    output, gradient = _gradient(norm, x)
    assert torch.equal(output, norm(x))
    weights = _drawn(3, 6) * (norm.weight if affine else 1)
    eps = norm.eps or torch.finfo(torch.float64).eps
    centre = x.mean(dim=1, keepdim=True) if kind is nn.LayerNorm else 0
    deviation = torch.sqrt(((x - centre) ** 2).mean(dim=1, keepdim=True) + eps)
    expected = weights / deviation
    if kind is nn.LayerNorm:
        expected = expected - expected.mean(dim=1, keepdim=True)
    torch.testing.assert_close(gradient, expected.detach())


def test_norm_over_several_axes_is_linear_over_all_of_them() -> None:
    x = _drawn(2, 3, 4, seed=2)
    _, gradient = _gradient(lambda x: F.layer_norm(x, (3, 4)), x)
    weights = _drawn(2, 3, 4) / (x.var(dim=(1, 2), keepdim=True, correction=0) + 1e-5).sqrt()
    torch.testing.assert_close(gradient, weights - weights.mean(dim=(1, 2), keepdim=True))


def test_gradients_are_plain_outside() -> None:
    x = _drawn(30, seed=2).requires_grad_(True)
    with LinearizedBackward(AttentionRule.VALUE):
        pass
    (gradient,) = torch.autograd.grad(F.gelu(x).sum(), x)
    (expected,) = torch.autograd.grad((x * torch.special.ndtr(x)).sum(), x)
    torch.testing.assert_close(gradient, expected)


def test_another_thread_has_plain_gradients() -> None:
    x = _drawn(30, seed=2).requires_grad_(True)
    (plain,) = torch.autograd.grad(F.gelu(x).sum(), x)
    elsewhere: list[Tensor] = []
    with LinearizedBackward(AttentionRule.VALUE):
        thread = threading.Thread(
            target=lambda: elsewhere.extend(torch.autograd.grad(F.gelu(x).sum(), x))
        )
        thread.start()
        thread.join()
        (here,) = torch.autograd.grad(F.gelu(x).sum(), x)
    assert torch.equal(elsewhere[0], plain)
    assert (here - plain).abs().max() > 0.1


class _InTheMiddle:
    """Lets another thread run the same model while this one is half way through it."""

    def __init__(self, module: nn.Module, other: Callable[[], None]) -> None:
        self._here = threading.get_ident()
        self._other = other
        self._handle = blocks_of(module)[0].register_forward_hook(self._run)
        self.ran = False

    def _run(self, *_: object) -> None:
        if self.ran or threading.get_ident() != self._here:
            return
        self.ran = True
        thread = threading.Thread(target=self._other)
        thread.start()
        thread.join()

    def remove(self) -> None:
        self._handle.remove()


@pytest.mark.parametrize("name", [POOLED, TALKING])
@pytest.mark.parametrize(
    "other", [ROLLOUTS[3], GRADIENTS[0], RELEVANCE, BALANCED_EVIDENCE], ids=str
)
@pytest.mark.parametrize("setting", [RELEVANCE, BALANCED_EVIDENCE, GRADIENTS[0]], ids=str)
def test_two_threads_with_one_model_do_not_disturb_each_other(
    name: str, setting: AnySetting, other: AnySetting
) -> None:
    chosen = specimen(name)
    alone = [_maps(chosen, each, chosen.images()) for each in (setting, other)]
    elsewhere: list[np.ndarray] = []
    middle = _InTheMiddle(
        chosen.module, lambda: elsewhere.append(_maps(chosen, other, chosen.images()))
    )
    try:
        here = _maps(chosen, setting, chosen.images())
    finally:
        middle.remove()
    assert middle.ran
    np.testing.assert_array_equal([here, *elsewhere], alone)


def test_another_thread_keeps_its_own_gradients_while_one_records() -> None:
    """A user's own pass through the model ends where theirs begins."""
    model = PLAIN.build()
    images = PLAIN.images(1).requires_grad_(True)
    (expected,) = torch.autograd.grad(model(images).sum(), images)
    elsewhere: list[Tensor] = []
    with AttentionCapture(model, blocks=blocks_of(model)):
        thread = threading.Thread(
            target=lambda: elsewhere.extend(torch.autograd.grad(model(images).sum(), images))
        )
        thread.start()
        thread.join()
    torch.testing.assert_close(elsewhere[0], expected)


def _maps(chosen: Specimen, setting: AnySetting, images: Tensor) -> np.ndarray:
    return np.asarray(explain_batch(chosen.loaded, images, setting.options(("2",))).relevance)


def test_shared_rule_is_refused_where_heads_are_mixed() -> None:
    chosen = specimen(TALKING)
    options = SHARED_EVIDENCE.options()
    for ask in (
        lambda: class_requests(chosen.loaded, options),
        lambda: explain_batch(chosen.loaded, chosen.images(), options),
    ):
        with pytest.raises(OptionError, match="--rule is shared.*talking heads.*--rule value") as e:
            ask()
        assert "\n" not in str(e.value)


def _bare(depth: int = 3, **arguments: object) -> nn.Module:
    """Build a network of attention and linear layers alone, without biases and prefix tokens."""
    model = VisionTransformer(
        img_size=(24, 32),
        patch_size=8,
        embed_dim=12,
        depth=depth,
        num_heads=3,
        num_classes=5,
        class_token=False,
        global_pool="avg",
        qkv_bias=False,
        norm_layer=nn.Identity,
        act_layer=nn.Identity,
        **arguments,
    )
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            inside = name.startswith(("blocks", "head"))
            is_bias = name.endswith("bias") and inside
            parameter.copy_(0 * noise if is_bias else noise / parameter[0].numel() ** 0.5)
    return model.double().eval()


def _evidence_and_logit(model: nn.Module, images: Tensor, setting: AnySetting) -> tuple:
    maps = explain_batch(load_model(model, device="cpu"), images, setting.options(("1", "4")))
    return maps.relevance.double().sum(dim=(2, 3)).numpy(), maps.logits[:, [1, 4]].double().numpy()


def test_evidence_of_a_linear_network_sums_to_the_logit() -> None:
    images = _drawn(2, 3, 24, 32)
    evidence, logits = _evidence_and_logit(_bare(), images, EVIDENCE)
    np.testing.assert_allclose(evidence, logits, rtol=1e-5)


def test_evidence_of_a_network_with_biases_does_not() -> None:
    model = _bare()
    with torch.no_grad():
        model.blocks[1].mlp.fc2.bias += 1
    evidence, logits = _evidence_and_logit(model, _drawn(2, 3, 24, 32), EVIDENCE)
    assert (np.abs(evidence - logits) > 0.01 * np.abs(logits)).all()


def test_shared_rule_gives_half_to_values_and_half_to_scores() -> None:
    """State what it sums to: y of the residual + ½ y of the values + ½ ⟨S, ∂y/∂S⟩.

    S are the scores, bilinear in queries and keys. In a bilinear network all would be y; softmax is
    not, so that under this rule evidence does not sum to the logit.
    """
    model = _bare(depth=1)
    with torch.no_grad():
        model.blocks[0].mlp.fc2.weight.zero_()
    images = _drawn(2, 3, 24, 32)
    evidence, logits = _evidence_and_logit(model, images, SHARED_EVIDENCE)
    weight = model.head.weight[[1, 4]]
    with torch.no_grad():
        x = model.patch_embed(images) + model.pos_embed
        query, key, value = (
            model.blocks[0].attn.qkv(x).unflatten(2, (3, 3, 4)).permute(2, 0, 3, 1, 4)
        )
    scores = (query @ key.transpose(2, 3) / 2).requires_grad_(True)
    joined = (scores.softmax(dim=-1) @ value).transpose(1, 2).flatten(2)
    attended = model.blocks[0].attn.proj(joined).mean(dim=1) @ weight.T
    passing = (x.mean(dim=1) @ weight.T).detach().numpy()
    np.testing.assert_allclose(passing + attended.detach().numpy(), logits, rtol=1e-5)
    through_scores = np.stack(
        [
            (scores * torch.autograd.grad(each, scores, retain_graph=True)[0])
            .sum(dim=(1, 2, 3))
            .detach()
            .numpy()
            for each in attended.sum(dim=0)
        ],
        axis=1,
    )
    expected = passing + attended.detach().numpy() / 2 + through_scores / 2
    np.testing.assert_allclose(evidence, expected, rtol=1e-5)
    assert (np.abs(evidence - logits) > 0.01 * np.abs(logits)).any()


def test_shared_rule_loses_half_of_what_uniform_attention_gathers() -> None:
    model = _bare(depth=1)
    with torch.no_grad():
        model.blocks[0].mlp.fc2.weight.zero_()
        model.blocks[0].attn.qkv.weight[:24] = 0
    images = _drawn(2, 3, 24, 32)
    evidence, logits = _evidence_and_logit(model, images, SHARED_EVIDENCE)
    with torch.no_grad():
        passing = model.head((model.patch_embed(images) + model.pos_embed).mean(dim=1))
    passing = passing[:, [1, 4]].numpy()
    np.testing.assert_allclose(evidence, passing + (logits - passing) / 2, rtol=1e-5)


def test_evidence_of_a_hand_made_network_sums_to_its_output() -> None:
    class Network(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            for seed in (3, 4):
                x = x + _drawn(4, 4, seed=seed) @ F.scaled_dot_product_attention(x, x, x + x) @ (
                    _drawn(6, 6, seed=seed + 10)
                )
            return x.sum()

    x = _drawn(1, 4, 6).requires_grad_(True)
    with LinearizedBackward(AttentionRule.VALUE):
        y = Network()(x)
    (gradient,) = torch.autograd.grad(y, x)
    torch.testing.assert_close((x * gradient).sum(), y)


def test_maps_of_half_precision_are_near_those_of_single() -> None:
    for setting in LINEAR:
        options = setting.options()
        exact = explain_batch(load_model(PLAIN.build(), device="cpu"), PLAIN.images(), options)
        rough = explain_batch(
            load_model(PLAIN.build().bfloat16(), device="cpu"),
            PLAIN.images().bfloat16(),
            options,
            class_indices=exact.class_indices,
        )
        assert distance(np.asarray(rough.relevance), np.asarray(exact.relevance)).max() < 0.2


FORMS: dict[str, Callable[[], dict[str, object]]] = {
    "plain": dict,
    "causal": lambda: {"is_causal": True},
    "bias": lambda: {"attn_mask": _drawn(9, 9, seed=7)},
    "a query that sees no key": lambda: {"attn_mask": torch.arange(9)[:, None].expand(9, 9) != 2},
    "scale": lambda: {"scale": 0.7},
}
SHAPES = {
    "plain": ((2, 4, 9, 6), (2, 4, 9, 6), (2, 4, 9, 5)),
    "one query": ((2, 4, 1, 6), (2, 4, 1, 6), (2, 4, 1, 5)),
    "shared queries": ((1, 4, 9, 6), (2, 4, 9, 6), (2, 4, 9, 5)),
    "shared keys": ((2, 4, 9, 6), (1, 4, 9, 6), (1, 4, 9, 5)),
    "one head of keys": ((2, 4, 9, 6), (2, 1, 9, 6), (2, 4, 9, 5)),
    "no heads": ((2, 9, 6), (2, 9, 6), (2, 9, 5)),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("form", FORMS)
def test_way_back_to_the_values_is_that_of_torch(form: str, shape: str) -> None:
    if shape == "one query" and "attn_mask" in FORMS[form]():
        pytest.skip("the mask is of nine tokens")
    query, key, value = (_drawn(*size, seed=seed) for seed, size in enumerate(SHAPES[shape]))

    def gradient() -> Tensor:
        at = value.clone().requires_grad_(True)
        y = F.scaled_dot_product_attention(query, key, at, **FORMS[form]())
        (found,) = torch.autograd.grad(y, at, _drawn(*y.shape, seed=5))
        return found

    expected = gradient()
    assert expected.isfinite().all()
    with LinearizedBackward(AttentionRule.VALUE):
        torch.testing.assert_close(gradient(), expected)


def test_way_back_to_the_values_is_as_exact_in_half_precision() -> None:
    """In pieces of few rows, sums of half precision would lose the last ones."""
    drawn = [_drawn(1, 12, 2305, 16, seed=seed) for seed in range(4)]

    def gradient(dtype: torch.dtype) -> Tensor:
        query, key, value, along = (each.bfloat16().to(dtype) for each in drawn)
        value.requires_grad_(True)
        with LinearizedBackward(AttentionRule.VALUE):
            y = F.scaled_dot_product_attention(query, key, value)
        return torch.autograd.grad(y, value, along)[0].double()

    exact, rough = gradient(torch.float64), gradient(torch.bfloat16)
    assert float((rough - exact).abs().max() / exact.abs().max()) < 4e-3
