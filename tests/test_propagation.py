"""The algebra of propagation, piece by piece, against the same in float64 by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from vitviz.methods import discard
from vitviz.methods.fusion import Fusion, fuse_heads
from vitviz.methods.row_form import attention_rollout, pooled_readout
from vitviz.models import attention as attention_room
from vitviz.models.attention import AttentionRecord, MaterializedAttention
from vitviz.options import HeadFusion

EVERYTHING = slice(None)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def attention(batch: int, heads: int, tokens: int, seed: int = 0) -> AttentionRecord:
    query, key = (3 * drawn(batch, heads, tokens, 8, seed=seed + part) for part in (1, 2))
    return AttentionRecord(query=query, key=key, value=None, output=None, bias=None, scale=1.0)


def call_of(row: Tensor) -> Fusion:
    """Make a call of one query from its rows (batch, maps, keys)."""
    return lambda images, queries: row.unsqueeze(2)[images, :, queries]


@pytest.mark.parametrize("maps", [1, 3])
def test_pooling_attention_is_the_mean_of_its_maps_over_its_sum(maps: int) -> None:
    row = drawn(2, maps, 5)
    found = pooled_readout([call_of(row)], tokens=7)  # which leaves out two prefix tokens
    fused = row.double().mean(dim=1)
    expected = torch.cat([torch.zeros(2, 2), fused / fused.sum(dim=1, keepdim=True)], dim=1)
    torch.testing.assert_close(found.double(), expected.double())


@pytest.mark.parametrize("calls", [1, 2, 3])
def test_class_attention_composes_as_blocks_do(calls: int) -> None:
    """Multiply the whole matrices, in which tokens other than the class token stay as they are."""
    tokens = 5
    rows = [drawn(2, 1, 1 + tokens, seed=seed) for seed in range(calls)]
    found = pooled_readout([call_of(row) for row in rows], tokens)
    for image in range(2):
        product = np.eye(1 + tokens)
        for row in rows:
            matrix = np.eye(1 + tokens)
            matrix[0] += row[image, 0].double().numpy()
            product = matrix / matrix.sum(axis=1, keepdims=True) @ product
        gathered = product[0, 1:]
        np.testing.assert_allclose(found[image].numpy(), gathered / gathered.sum(), rtol=1e-5)


def test_pooling_attention_of_nothing_is_not_a_number() -> None:
    assert pooled_readout([call_of(torch.zeros(1, 1, 4))], tokens=4).isnan().all()


def test_what_talking_heads_made_negative_gathers_nothing() -> None:
    given = MaterializedAttention(attention=drawn(2, 3, 4, 4) - 0.5, output=None)
    fused = fuse_heads(given, HeadFusion.MAX)(EVERYTHING, EVERYTHING)
    expected = given.attention.clamp(min=0).amax(dim=1, keepdim=True)
    assert torch.equal(fused, expected)
    assert (given.attention < 0).any()  # and the model's own is as it was


@pytest.mark.parametrize("discard", [0, 0.5])
@pytest.mark.parametrize("fusion", HeadFusion)
@pytest.mark.parametrize("entries", [1, 40, 300, 1000, 1 << 20])
def test_pieces_of_any_size_give_the_same(
    monkeypatch: pytest.MonkeyPatch, entries: int, fusion: HeadFusion, discard: float
) -> None:
    records = [attention(3, 2, 9, seed=seed) for seed in (10, 20)]
    fusions = [fuse_heads(record, fusion) for record in records]
    readout = drawn(9, seed=3) * torch.tensor([0, 0, 1, 0, 1, 1, 0, 0, 0])
    readout /= readout.sum()
    monkeypatch.setattr(attention_room, "_CHUNK_ENTRIES", entries)
    found = attention_rollout(records, fusions, readout, discard=discard)
    expected = readout.double().numpy()
    for image in range(3):
        product = np.eye(9)
        for record in records:
            heads = record.probabilities(EVERYTHING, EVERYTHING)[image].double().numpy()
            fused = getattr(np, fusion.value)(heads, axis=0)
            fused[fused < np.sort(fused, axis=None)[int(discard * 81)]] = 0
            matrix = fused + np.eye(9)
            product = matrix / matrix.sum(axis=1, keepdims=True) @ product
        np.testing.assert_allclose(found[image].numpy(), expected @ product, rtol=1e-4, atol=1e-7)


def test_only_rows_that_are_read_are_computed_in_the_last_block() -> None:
    asked: list[slice] = []
    record = attention(1, 2, 9)
    fuse = fuse_heads(record, HeadFusion.MEAN)

    def noted(images: slice, queries: slice) -> Tensor:
        asked.append(queries)
        return fuse(images, queries)

    readout = torch.eye(9)[2:4].mean(dim=0)
    attention_rollout([record, record], [noted, noted], readout, discard=0)
    assert asked == [slice(2, 4), slice(0, 9)]


def _discard(fused: Tensor, ratio: float, rows: int = 3) -> None:
    """Discard in place, the maps in pieces of some rows each."""
    pieces = fused.split(rows, dim=1)
    lowest = discard.lowest_kept(pieces, ratio, map)
    assert lowest is not None
    for piece in pieces:
        discard.keep_from(piece, lowest)


def test_nearest_ratio_to_1_keeps_an_entry() -> None:
    fused = drawn(2, 5, 5)
    highest = fused.flatten(1).amax(dim=1)
    _discard(fused, math.nextafter(1, 0))
    assert torch.equal(fused.flatten(1).sum(dim=1), highest)


ENTRIES = {
    "uniform": np.full(5000, 0.25, np.float32),
    "two values": np.repeat(np.float32([0, 1]), 2500),
    "ascending": np.arange(5000, dtype=np.float32),
    "random": drawn(5000).numpy(),
    "steep": (drawn(5000) ** 20).numpy(),
    "rare": np.where(np.arange(5000) == 4321, 1, 0).astype(np.float32),
    "few": np.float32([3, 1, 2]),
    "one": np.float32([3]),
}


@pytest.mark.parametrize("share", [0, 0.001, 0.3, 0.9, 0.9999])
@pytest.mark.parametrize("entries", ENTRIES.values(), ids=ENTRIES)
def test_order_statistic_is_that_of_the_sorted_entries(entries: np.ndarray, share: float) -> None:
    index = int(share * entries.size)
    before = entries.copy()
    for pieces in ([entries], np.array_split(entries, 3)):
        assert discard._order_statistic(pieces, index) == np.sort(entries)[index]
    assert np.array_equal(entries, before)


def test_order_statistic_survives_a_sample_that_tells_lies(monkeypatch: pytest.MonkeyPatch) -> None:
    entries = np.arange(5000, dtype=np.float32)
    monkeypatch.setattr(discard, "_sample_positions", lambda size, part: np.arange(100))
    assert discard._order_statistic([entries], 4000) == 4000
    assert discard._order_statistic([entries[:3000], entries[3000:]], 4000) == 4000


def test_entries_that_are_not_numbers_are_not_hidden() -> None:
    fused = drawn(2, 20, 20)
    fused[0, 0, 7] = torch.nan
    _discard(fused, 0.75)
    assert fused[0, 0, 7].isnan()
    assert int((fused[1] == 0).sum()) == 300


@pytest.mark.parametrize("ratio", [0.0025, 0.5, 0.9975])
@pytest.mark.parametrize("rows", [3, 20])
def test_processor_and_accelerator_discard_the_same(
    monkeypatch: pytest.MonkeyPatch, ratio: float, rows: int
) -> None:
    here, there = drawn(3, 20, 20), drawn(3, 20, 20)
    _discard(here, ratio, rows)
    monkeypatch.setattr(discard, "_is_on_processor", lambda maps: False)
    _discard(there, ratio, rows)
    assert torch.equal(here, there)
    assert ((here == 0).flatten(1).sum(dim=1) == round(400 * ratio)).all()


def test_entries_on_an_accelerator_are_discarded_there() -> None:
    """The meta device stands for any but the processor; it computes shapes, and moves nothing."""
    _discard(torch.empty(2, 5, 5, device="meta"), 0.5)


@pytest.mark.parametrize("discard", [0, 0.5])
def test_one_block_alone_is_read_through_its_own_attention(discard: float) -> None:
    record = attention(2, 3, 6)
    fuse = fuse_heads(record, HeadFusion.MAX)
    found = attention_rollout([record], [fuse], torch.eye(6)[0], discard=discard)
    for image in range(2):
        fused = record.probabilities(EVERYTHING, EVERYTHING)[image].double().numpy().max(axis=0)
        fused[fused < np.sort(fused, axis=None)[int(discard * 36)]] = 0
        row = fused[0] + np.eye(6)[0]
        np.testing.assert_allclose(found[image].numpy(), row / row.sum(), rtol=1e-5)


def test_block_without_its_fusion_is_an_error() -> None:
    records = [attention(1, 2, 4, seed=seed) for seed in (10, 20)]
    fusions = [fuse_heads(records[1], HeadFusion.MEAN)]
    with pytest.raises(ValueError, match="argument"):
        attention_rollout(records, fusions, torch.eye(4)[0], discard=0)


@pytest.mark.parametrize("entries", [1, 40, 100, 170, 400, 1000])
def test_no_piece_is_larger_than_asked_for(monkeypatch: pytest.MonkeyPatch, entries: int) -> None:
    """One row of all heads is the least that there can be."""
    record = attention(3, 2, 9)
    fuse = fuse_heads(record, HeadFusion.MEAN)
    sizes: list[int] = []

    def noted(images: slice, queries: slice) -> Tensor:
        piece = fuse(images, queries)
        sizes.append(piece.numel())
        return piece

    monkeypatch.setattr(attention_room, "_CHUNK_ENTRIES", entries)
    attention_rollout([record], [noted], torch.full((9,), 1 / 9), discard=0)
    assert sum(sizes) == 3 * 2 * 9 * 9
    assert max(sizes) <= max(entries, 2 * 9)
