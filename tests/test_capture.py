"""Capture sees every attention call exactly, and leaves the model as it found it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from comparison import (
    GRADIENTS,
    LINEAR,
    ROLLOUTS,
    AnySetting,
    distance,
    found,
    loaded,
    requested,
    traced,
)
from tiny import CASES, TinyCase
from vitviz.errors import CaptureError
from vitviz.explaining.batch import explain_batch
from vitviz.models.capture import AttentionCapture, output_gradients
from vitviz.models.model import Model, load_model

pytestmark = pytest.mark.usefixtures("one_thread")

EVERYTHING = slice(None)
PLAIN, RELATIVE, ROPE = (
    next(case for case in CASES if case.name == name)
    for name in ("class-token", "beit", "grouped-query")
)

each_case = pytest.mark.parametrize("case", CASES, ids=str)
METHODS = [ROLLOUTS[3], GRADIENTS[1], *LINEAR]
each_method = pytest.mark.parametrize("setting", METHODS, ids=str)


def _make_odd(model: nn.Module) -> None:
    """Give a model every kind of state that a user's own may have."""
    for index, module in enumerate(model.modules()):
        module.training = index % 3 == 0
        if hasattr(module, "fused_attn"):
            module.fused_attn = index % 2 == 0
    for index, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(index % 2 == 0)
        if index % 4 == 0:
            parameter.grad = torch.full_like(parameter, index)


def _hooks(model: nn.Module) -> dict[str, list[Any]]:
    kinds = (
        "_forward_hooks",
        "_forward_pre_hooks",
        "_backward_hooks",
        "_backward_pre_hooks",
        "_forward_hooks_with_kwargs",
        "_forward_pre_hooks_with_kwargs",
    )
    return {
        f"{name}.{kind}": list(getattr(module, kind).items())
        for name, module in model.named_modules()
        for kind in kinds
    }


class _Snapshot:
    """The state of a model, to be compared with a later one."""

    def __init__(self, model: nn.Module, images: Tensor) -> None:
        self._model = model
        self._images = images
        self._flags = self._read_flags()
        self._hooks = _hooks(model)
        self._modules = dict(model.named_modules())
        self._attributes = {name: set(vars(module)) for name, module in model.named_modules()}
        self._parameters = dict(model.named_parameters())
        self._values = {name: value.clone() for name, value in model.state_dict().items()}
        self._gradients = {name: value.grad for name, value in model.named_parameters()}
        self._gradient_values = {
            name: None if gradient is None else gradient.clone()
            for name, gradient in self._gradients.items()
        }
        self._output = self._run()

    def _read_flags(self) -> dict[str, bool | None]:
        flags: dict[str, bool | None] = {}
        for name, module in self._model.named_modules():
            flags[f"{name}.training"] = module.training
            flags[f"{name}.fused_attn"] = getattr(module, "fused_attn", None)
        for name, parameter in self._model.named_parameters():
            flags[f"{name}.requires_grad"] = parameter.requires_grad
        return flags

    def _run(self) -> Tensor | None:
        try:
            with torch.no_grad():
                return self._model(self._images).clone()
        except _BrokenError:
            return None

    def assert_unchanged(self) -> None:
        assert self._read_flags() == self._flags
        assert _hooks(self._model) == self._hooks
        assert dict(self._model.named_modules()) == self._modules
        for name, module in self._model.named_modules():
            assert set(vars(module)) == self._attributes[name]
        for name, parameter in self._model.named_parameters():
            assert parameter is self._parameters[name]
            assert parameter.grad is self._gradients[name]
            values = self._gradient_values[name]
            assert values is None or torch.equal(parameter.grad, values)
        for name, value in self._model.state_dict().items():
            assert torch.equal(value, self._values[name])
        output = self._run()
        assert (output is None) == (self._output is None)
        assert output is None or torch.equal(output, self._output)
        assert torch.is_grad_enabled()


class _BrokenError(Exception):
    """What a broken model raises."""


class _Broken(nn.Module):
    def __init__(self, error: type[BaseException]) -> None:
        super().__init__()
        self.error = error

    def forward(self, tokens: Tensor) -> Tensor:
        raise self.error("on purpose")


class _Skipped(nn.Module):
    """A block that lets tokens through without attention."""

    def forward(self, tokens: Tensor, **_: Any) -> Tensor:
        return tokens


@each_case
def test_model_is_as_it_was_afterwards(case: TinyCase) -> None:
    model = load_model(case.build(), device="cpu")
    _make_odd(model.module)
    snapshot = _Snapshot(model.module, case.images(2))
    for setting in METHODS:
        explain_batch(model, case.images(2), setting.options(requested(case)))
        snapshot.assert_unchanged()


@each_method
@pytest.mark.parametrize("error", [_BrokenError, KeyboardInterrupt])
def test_model_is_as_it_was_after_an_error(setting: AnySetting, error: type[BaseException]) -> None:
    model = load_model(PLAIN.build(), device="cpu")
    whole = model.module.blocks[2].mlp
    _make_odd(model.module)
    before = _Snapshot(model.module, PLAIN.images(2))
    model.module.blocks[2].mlp = _Broken(error)
    if error is _BrokenError:
        broken = _Snapshot(model.module, PLAIN.images(2))
    with pytest.raises(error, match="on purpose"):
        explain_batch(model, PLAIN.images(2), setting.options())
    if error is _BrokenError:
        broken.assert_unchanged()
    model.module.blocks[2].mlp = whole
    before.assert_unchanged()


@each_method
def test_missing_attention_call_is_an_error_that_names_both_counts(setting: AnySetting) -> None:
    model = load_model(PLAIN.build(), device="cpu")
    _make_odd(model.module)
    model.module.blocks[1] = _Skipped()
    snapshot = _Snapshot(model.module, PLAIN.images(2))
    with pytest.raises(CaptureError, match=r"\b3\b.*\b4\b"):
        explain_batch(model, PLAIN.images(2), setting.options())
    snapshot.assert_unchanged()


@each_method
def test_surplus_attention_call_is_an_error_that_names_both_counts(setting: AnySetting) -> None:
    model = load_model(PLAIN.build(), device="cpu")
    model.module.blocks.append(PLAIN.build().blocks[0])
    with pytest.raises(CaptureError, match=r"\b5\b.*\b4\b"):
        explain_batch(model, PLAIN.images(2), setting.options())


@each_method
def test_model_works_on_after_an_error(setting: AnySetting) -> None:
    model = load_model(PLAIN.build(), device="cpu")
    whole = model.module.blocks[2].mlp
    model.module.blocks[2].mlp = _Broken(_BrokenError)
    options = setting.options(requested(PLAIN))
    with pytest.raises(_BrokenError):
        explain_batch(model, PLAIN.images(), options)
    model.module.blocks[2].mlp = whole
    maps = np.asarray(explain_batch(model, PLAIN.images(), options).relevance)
    np.testing.assert_array_equal(maps, found(PLAIN, setting))


def test_loading_leaves_a_model_object_as_it_was() -> None:
    module = PLAIN.build()
    _make_odd(module)
    snapshot = _Snapshot(module, PLAIN.images(1))
    load_model(module, device="cpu")
    snapshot.assert_unchanged()


@each_method
def test_images_are_left_as_they_were(setting: AnySetting) -> None:
    images = PLAIN.images()
    explain_batch(loaded(PLAIN), images, setting.options())
    assert torch.equal(images, PLAIN.images())
    assert not images.requires_grad
    assert images.grad is None


@each_method
def test_results_keep_no_graph(setting: AnySetting) -> None:
    maps = explain_batch(loaded(PLAIN), PLAIN.images(), setting.options())
    assert not maps.logits.requires_grad
    assert not torch.as_tensor(maps.relevance).requires_grad


@each_method
@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad, torch.inference_mode])
def test_callers_gradient_mode_does_not_matter(
    setting: AnySetting, mode: Callable[[], Any]
) -> None:
    options = setting.options(requested(PLAIN))
    with mode():
        maps = explain_batch(loaded(PLAIN), PLAIN.images(), options)
    np.testing.assert_array_equal(np.asarray(maps.relevance), found(PLAIN, setting))


@each_method
def test_trained_model_is_explained_as_in_evaluation(setting: AnySetting) -> None:
    case = PLAIN
    architecture = partial(
        case.architecture, drop_rate=0.5, attn_drop_rate=0.5, proj_drop_rate=0.5, drop_path_rate=0.5
    )
    dropping = architecture()
    dropping.load_state_dict(case.build().state_dict())
    model = load_model(dropping, device="cpu")
    dropping.train()
    maps = explain_batch(model, case.images(), setting.options(requested(case))).relevance
    np.testing.assert_array_equal(np.asarray(maps), found(case, setting))
    assert all(module.training for module in dropping.modules())


@each_method
def test_gradient_checkpointing_does_not_matter(setting: AnySetting) -> None:
    model = load_model(PLAIN.build(), device="cpu")
    model.module.set_grad_checkpointing(True)
    options = setting.options(requested(PLAIN))
    for _ in range(2):
        maps = np.asarray(explain_batch(model, PLAIN.images(), options).relevance)
        assert distance(maps, found(PLAIN, setting)).max() <= 1e-5
    assert model.module.grad_checkpointing


@cache
def _unfused(case: TinyCase) -> Model:
    module = case.build()
    for block in module.blocks:
        block.attn.fused_attn = False
    return load_model(module, device="cpu")


@each_method
@each_case
def test_unfused_attention_is_captured_and_restored(case: TinyCase, setting: AnySetting) -> None:
    model = _unfused(case)
    maps = explain_batch(model, case.images(), setting.options(requested(case))).relevance
    assert distance(np.asarray(maps), found(case, setting)).max() <= 1e-5
    assert [block.attn.fused_attn for block in model.module.blocks] == [False] * case.blocks


@each_case
@pytest.mark.parametrize("first_gradient", [None, 0, 1])
def test_output_is_bit_identical_under_capture(case: TinyCase, first_gradient: int | None) -> None:
    model = case.build()
    with torch.no_grad():
        plain = model(case.images())
    with (
        AttentionCapture(model, first_gradient=first_gradient, projections=True),
        torch.set_grad_enabled(first_gradient is not None),
    ):
        captured = model(case.images())
    assert torch.equal(captured, plain)


@each_case
def test_recorded_probabilities_equal_reference(case: TinyCase) -> None:
    model = case.build()
    with AttentionCapture(model) as capture, torch.no_grad():
        model(case.images())
        records = capture.take(case.blocks)
    for record, expected in zip(records, traced(case).attention, strict=True):
        probabilities = record.probabilities(EVERYTHING, EVERYTHING)
        assert record.shape == probabilities.shape == expected.shape
        assert (probabilities.sum(dim=-1) - 1).abs().max() < 1e-5
        assert np.abs(probabilities.numpy() - expected).max() < 1e-5
        part = record.probabilities(slice(1, 3), slice(2, 7)).numpy()
        assert part.shape[:3] == (2, 3, 5)
        assert np.abs(part - expected[1:3, :, 2:7]).max() < 1e-5


@each_case
def test_gradients_of_probabilities_equal_reference(case: TinyCase) -> None:
    model = case.build()
    index = case.classes[0]
    with AttentionCapture(model, first_gradient=0) as capture, torch.enable_grad():
        logits = model(case.images())
        records = capture.take(case.blocks)
        gradients = output_gradients(records, logits[:, index].sum(), last=True)
    reference = traced(case).gradients([index] * 3)
    for record, gradient, expected in zip(records, gradients, reference, strict=True):
        whole = record.probability_gradients(gradient, EVERYTHING, EVERYTHING).numpy()
        assert np.abs(whole - expected).max() < 1e-5 * np.abs(expected).max()
        part = record.probability_gradients(gradient, slice(1, 3), slice(2, 7)).numpy()
        assert np.abs(part - expected[1:3, :, 2:7]).max() < 1e-5 * np.abs(expected).max()


def test_wrong_count_raises_with_both_counts() -> None:
    model = PLAIN.build()
    with AttentionCapture(model) as capture, torch.no_grad():
        model(PLAIN.images(1))
        with pytest.raises(CaptureError, match=r"\b4\b.*\b12\b"):
            capture.take(12)


def test_each_forward_pass_has_records_of_its_own() -> None:
    model = PLAIN.build()
    images = PLAIN.images()
    with AttentionCapture(model) as capture, torch.no_grad():
        model(images[:1])
        first = capture.take(4)
        model(images)
        second = capture.take(4)
        assert capture.take() == []
    assert [record.shape[0] for record in first + second] == [1] * 4 + [3] * 4


def test_nothing_is_recorded_outside() -> None:
    model = PLAIN.build()
    capture = AttentionCapture(model)
    with torch.no_grad():
        model(PLAIN.images(1))
        with capture:
            pass
        model(PLAIN.images(1))
    assert capture.take() == []


def test_attached_capture_records_what_runs_inside_recording_alone() -> None:
    model, images = PLAIN.build(), PLAIN.images(1)
    with AttentionCapture(model).attached() as capture, torch.no_grad():
        model(images)
        assert capture.take() == []
        with capture.recording():
            model(images)
            assert len(capture.take()) == 4
        model(images)
        assert capture.take() == []


def test_model_run_in_another_thread_is_an_error() -> None:
    model = PLAIN.build()
    with AttentionCapture(model) as capture:
        thread = threading.Thread(target=lambda: model(PLAIN.images(1)))
        thread.start()
        thread.join()
        with pytest.raises(CaptureError, match=r"\b0\b.*\b4\b"):
            capture.take(4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_probabilities_of_a_half_precision_model_sum_to_one(dtype: torch.dtype) -> None:
    model = PLAIN.build().to(dtype)
    with AttentionCapture(model) as capture, torch.no_grad():
        model(PLAIN.images(1).to(dtype))
        records = capture.take(4)
    for record in records:
        sums = record.probabilities(EVERYTHING, EVERYTHING).sum(dim=-1)
        assert (sums - 1).abs().max() < 1e-5


@pytest.mark.parametrize("case", [PLAIN, RELATIVE, ROPE], ids=str)
def test_double_precision_model_is_explained(case: TinyCase) -> None:
    model = load_model(case.build().double(), device="cpu")
    for setting in (ROLLOUTS[3], GRADIENTS[1]):
        options = setting.options(requested(case))
        maps = explain_batch(model, case.images().double(), options).relevance
        assert distance(np.asarray(maps), found(case, setting)).max() <= 1e-4


class _Attend(nn.Module):
    """One call of attention, as a module of somebody else's might make it."""

    def __init__(self, *positional: Any, **named: Any) -> None:
        super().__init__()
        self.positional = positional
        self.named = named

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, *self.positional, **self.named)


BATCH, HEADS, TOKENS, WIDTH = 2, 4, 6, 5


def _drawn(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _softmax_of(scores: np.ndarray) -> np.ndarray:
    powers = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


def _recorded(
    attend: _Attend, *, heads: int = HEADS, key_heads: int = HEADS, keys: int = TOKENS
) -> tuple[Any, np.ndarray, np.ndarray]:
    """Run one call; return its record, its raw scores q·k, and its output."""
    query = _drawn(BATCH, heads, TOKENS, WIDTH, seed=2)
    key = _drawn(BATCH, key_heads, keys, WIDTH, seed=3)
    value = _drawn(BATCH, key_heads, keys, WIDTH, seed=4)
    with AttentionCapture(attend, first_gradient=0) as capture, torch.no_grad():
        output = attend(query, key, value).detach()
        (record,) = capture.take(1)
    assert torch.equal(output, attend(query, key, value))
    repeated = np.repeat(key.double().numpy(), heads // key_heads, axis=1)
    values = np.repeat(value.double().numpy(), heads // key_heads, axis=1)
    scores = query.double().numpy() @ repeated.swapaxes(-1, -2)
    # The record's own probabilities lead to the output that the model saw.
    probabilities = record.probabilities(EVERYTHING, EVERYTHING).double().numpy()
    np.testing.assert_allclose(probabilities @ values, output.numpy(), atol=1e-5)
    return record, scores, values


def _assert_probabilities(record: Any, expected: np.ndarray) -> None:
    probabilities = record.probabilities(EVERYTHING, EVERYTHING).numpy()
    np.testing.assert_allclose(probabilities, expected, atol=1e-6)
    part = record.probabilities(slice(1, 2), slice(2, 5)).numpy()
    np.testing.assert_allclose(part, expected[1:2, :, 2:5], atol=1e-6)


@pytest.mark.parametrize(
    "shape",
    [
        (TOKENS, TOKENS),
        (1, TOKENS),
        (HEADS, TOKENS, TOKENS),
        (1, HEADS, TOKENS, TOKENS),
        (BATCH, 1, TOKENS, TOKENS),
        (BATCH, 1, 1, TOKENS),
        (BATCH, HEADS, TOKENS, TOKENS),
    ],
    ids=str,
)
def test_bias_of_any_shape_is_recorded(shape: tuple[int, ...]) -> None:
    bias = 2 * _drawn(*shape)
    record, scores, _ = _recorded(_Attend(attn_mask=bias))
    _assert_probabilities(record, _softmax_of(scores / WIDTH**0.5 + bias.double().numpy()))


@pytest.mark.parametrize(
    "shape", [(TOKENS, TOKENS), (BATCH, 1, 1, TOKENS), (BATCH, HEADS, TOKENS, TOKENS)], ids=str
)
def test_boolean_mask_is_recorded(shape: tuple[int, ...]) -> None:
    mask = _drawn(*shape) > 0
    mask[..., 0] = True  # no row without any key
    record, scores, _ = _recorded(_Attend(attn_mask=mask))
    hidden = np.where(mask.numpy(), 0, -np.inf)
    _assert_probabilities(record, _softmax_of(scores / WIDTH**0.5 + hidden))


def test_causal_attention_is_recorded() -> None:
    record, scores, _ = _recorded(_Attend(is_causal=True))
    later = np.triu(np.ones((TOKENS, TOKENS)), k=1) > 0
    _assert_probabilities(record, _softmax_of(scores / WIDTH**0.5 + np.where(later, -np.inf, 0)))


def test_scale_is_recorded() -> None:
    record, scores, _ = _recorded(_Attend(scale=1.0))
    _assert_probabilities(record, _softmax_of(scores))


def test_arguments_by_position_are_recorded() -> None:
    bias = _drawn(TOKENS, TOKENS)
    record, scores, _ = _recorded(_Attend(bias, 0.0, False, scale=0.3))
    _assert_probabilities(record, _softmax_of(0.3 * scores + bias.double().numpy()))


@pytest.mark.parametrize("key_heads", [1, 2])
def test_grouped_queries_are_recorded(key_heads: int) -> None:
    record, scores, values = _recorded(_Attend(enable_gqa=True), key_heads=key_heads)
    assert record.shape == (BATCH, HEADS, TOKENS, TOKENS)
    _assert_probabilities(record, _softmax_of(scores / WIDTH**0.5))
    gradient = _drawn(BATCH, HEADS, TOKENS, WIDTH, seed=5)
    found_gradient = record.probability_gradients(gradient, EVERYTHING, EVERYTHING).numpy()
    expected = gradient.double().numpy() @ values.swapaxes(-1, -2)
    np.testing.assert_allclose(found_gradient, expected, atol=1e-5)


def test_more_keys_than_queries_are_recorded() -> None:
    record, scores, _ = _recorded(_Attend(), keys=9)
    assert record.shape == (BATCH, HEADS, TOKENS, 9)
    _assert_probabilities(record, _softmax_of(scores / WIDTH**0.5))


def test_bias_of_two_queries_is_told_apart() -> None:
    query, key = _drawn(BATCH, HEADS, 2, WIDTH, seed=2), _drawn(BATCH, HEADS, TOKENS, WIDTH, seed=3)
    bias = 2 * _drawn(2, TOKENS)
    attend = _Attend(attn_mask=bias)
    with AttentionCapture(attend) as capture:
        attend(query, key, key)
        (record,) = capture.take(1)
    scores = query.double().numpy() @ key.double().numpy().swapaxes(-1, -2)
    expected = _softmax_of(scores / WIDTH**0.5 + bias.double().numpy())
    for rows in (slice(0, 1), slice(1, 2), slice(0, 2)):
        part = record.probabilities(EVERYTHING, rows).numpy()
        np.testing.assert_allclose(part, expected[:, :, rows], atol=1e-6)


@pytest.mark.parametrize("queries", [2, TOKENS])
@pytest.mark.parametrize("key_heads", [1, 2, HEADS])
def test_isolated_query_gets_the_value_of_its_own_token(key_heads: int, queries: int) -> None:
    query = _drawn(BATCH, HEADS, queries, WIDTH, seed=2)
    key, value = (_drawn(BATCH, key_heads, TOKENS, WIDTH, seed=seed) for seed in (3, 4))
    attend = _Attend(enable_gqa=True)
    with AttentionCapture(attend, isolate=True):
        output = attend(query, key, value)
    expected = np.repeat(value.numpy(), HEADS // key_heads, axis=1)[:, :, :queries]
    np.testing.assert_array_equal(output.numpy(), expected)


class _MixHeads(nn.Module):
    """Attention computed without torch's function, as with talking heads."""

    def __init__(self) -> None:
        super().__init__()
        self.attn_drop = nn.Dropout(0.5)

    def forward(self, attention: Tensor, value: Tensor) -> Tensor:
        return self.attn_drop(attention) @ value


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_isolation_replaces_a_modules_own_attention_in_its_precision(dtype: torch.dtype) -> None:
    attention = _drawn(BATCH, HEADS, TOKENS, TOKENS).softmax(dim=-1).to(dtype)
    value = _drawn(BATCH, HEADS, TOKENS, WIDTH, seed=2).to(dtype)
    mix_heads = _MixHeads()
    with AttentionCapture(mix_heads, isolate=True):
        output = mix_heads(attention, value)
    assert torch.equal(output, value)


def test_dropout_that_calls_share_is_recorded_once_a_call() -> None:
    mixing = nn.Module()
    mixing.dropout = nn.Dropout(0.5)  # a name of its own, before those of the calls
    mixing.calls = nn.ModuleList([_MixHeads(), _MixHeads()])
    for call in mixing.calls:
        call.attn_drop = mixing.dropout
    attention = _drawn(BATCH, HEADS, TOKENS, TOKENS)
    value = _drawn(BATCH, HEADS, TOKENS, WIDTH, seed=2)
    with AttentionCapture(mixing) as capture, torch.no_grad():
        for call in mixing.calls:
            call(attention, value)
        records = capture.take()
    assert len(records) == 2


@pytest.mark.parametrize("first_gradient", [None, 0, 2])
def test_graph_begins_at_the_first_call_asked_for(first_gradient: int | None) -> None:
    """What comes before holds neither graph nor values: a waste of memory on a large model."""
    model = PLAIN.build()
    first = 4 if first_gradient is None else first_gradient
    with (
        AttentionCapture(model, first_gradient=first_gradient, projections=True) as capture,
        torch.enable_grad(),
    ):
        logits = model(PLAIN.images(1))
        records = capture.take(4)
    assert logits.requires_grad == (first < 4)
    assert [record.output is not None for record in records] == [
        index >= first for index in range(4)
    ]
    assert [record.value is not None for record in records] == [
        index >= first for index in range(4)
    ]


def test_probabilities_of_a_double_precision_model_stay_double() -> None:
    model = PLAIN.build().double()
    with AttentionCapture(model) as capture, torch.no_grad():
        model(PLAIN.images().double())
        records = capture.take(4)
    for record, expected in zip(records, traced(PLAIN).attention, strict=True):
        probabilities = record.probabilities(EVERYTHING, EVERYTHING).numpy()
        assert np.abs(probabilities - expected).max() < 1e-12


@pytest.mark.parametrize(
    "attend",
    [
        _Attend(attn_mask=torch.ones(TOKENS, TOKENS, dtype=torch.bool, device="meta")),
        _Attend(is_causal=True),
    ],
    ids=["boolean", "causal"],
)
def test_mask_is_recorded_on_the_device_of_its_call(attend: _Attend) -> None:
    """The meta device stands for any but the processor; it computes shapes alone."""
    query = torch.empty(BATCH, HEADS, TOKENS, WIDTH, device="meta")
    with AttentionCapture(attend) as capture:
        attend(query, query, query)
        (record,) = capture.take(1)
    assert record.bias.device.type == "meta"
    assert record.probabilities(EVERYTHING, EVERYTHING).shape == record.shape


class _AttendAndDrop(nn.Module):
    """Torch's own attention, with a dropout behind it that bears the name of the one within."""

    def __init__(self) -> None:
        super().__init__()
        self.fused_attn = True
        self.attn_drop = nn.Dropout(0.5)

    def forward(self, query: Tensor) -> Tensor:
        return self.attn_drop(F.scaled_dot_product_attention(query, query, query))


def test_attention_with_a_dropout_behind_it_is_recorded_once() -> None:
    attend = _AttendAndDrop()
    with AttentionCapture(attend) as capture:
        attend(_drawn(BATCH, HEADS, TOKENS, WIDTH))
        (record,) = capture.take(1)
    assert record.shape == (BATCH, HEADS, TOKENS, TOKENS)


def test_wrong_count_names_the_model() -> None:
    with (
        AttentionCapture(PLAIN.build()) as capture,
        pytest.raises(CaptureError, match=r"\bVisionTransformer\b"),
    ):
        capture.take(1)


def test_first_thread_that_ends_leaves_a_model_as_the_other_needs_it() -> None:
    model = PLAIN.build().train()
    first, second = AttentionCapture(model), AttentionCapture(model)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert not any(module.training for module in model.modules())
    assert not any(parameter.requires_grad for parameter in model.parameters())
    second.__exit__(None, None, None)
    assert all(module.training for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())
