"""Parts of a batch side by side: the same maps, in order, and no trace left behind."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from functools import partial

import pytest
import torch
from timm.models.cait import Cait
from torch import Tensor

from fixtures_io import tiny_model, tiny_module
from vitviz.explaining import parallel
from vitviz.explaining.batch import explain_batch
from vitviz.explaining.parallel import batch_size_for, map_parts
from vitviz.methods import row_form
from vitviz.methods.fusion import fuse_heads
from vitviz.methods.method import Method
from vitviz.methods.rollout import GradRollout, Rollout
from vitviz.models import cores
from vitviz.models.attention import AttentionRecord
from vitviz.models.capture import AttentionCapture
from vitviz.models.model import Model, load_model
from vitviz.options import HeadFusion

METHODS = [
    Rollout(),
    Rollout(head_fusion=HeadFusion.MEAN, discard=0),
    GradRollout(classes=("3", "top2")),
]


@pytest.fixture(autouse=True)
def three_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    assert torch.get_num_threads() == 3
    torch.set_num_threads(before)


def talking_heads() -> Model:
    """Make a model whose attention is seen by hooks, which belong to no thread."""
    torch.manual_seed(0)
    module = Cait(
        img_size=32,
        patch_size=8,
        embed_dim=24,
        depth=3,
        num_heads=3,
        num_classes=7,
        init_values=1.0,
    )
    return load_model(module.eval(), device="cpu")


@pytest.mark.parametrize("make", [tiny_model, talking_heads])
@pytest.mark.parametrize("options", METHODS, ids=["max", "mean", "gradient"])
def test_lanes_give_the_maps_of_one_lane(
    monkeypatch: pytest.MonkeyPatch, options: Method, make: object
) -> None:
    model = make()  # type: ignore[operator]
    images = torch.randn(7, 3, *model.preprocessing.size)
    together = threading.Barrier(3)
    forward = model.module.forward

    def noted(batch: Tensor) -> Tensor:
        together.wait(timeout=30)  # raises unless three threads have a part each
        assert torch.get_num_threads() == 1
        return forward(batch)  # type: ignore[no-any-return]

    with monkeypatch.context() as patch:
        patch.setattr(model.module, "forward", noted)
        side_by_side = explain_batch(model, images, options)
    monkeypatch.setattr(cores, "_threads_are_own", lambda: False)
    monkeypatch.setattr(parallel, "_PART_TOKENS", 1 << 20)
    one_by_one = explain_batch(model, images, options)
    torch.testing.assert_close(side_by_side.logits, one_by_one.logits)
    torch.testing.assert_close(side_by_side.relevance, one_by_one.relevance)
    if isinstance(options, GradRollout):
        assert side_by_side.class_indices is not None
        assert one_by_one.class_indices is not None
        assert torch.equal(side_by_side.class_indices, one_by_one.class_indices)


def test_parts_come_back_in_order() -> None:
    parts = map_parts(lambda part: part * 2, torch.arange(100), tokens=200)
    assert torch.equal(torch.cat(parts), torch.arange(100) * 2)
    assert max(len(part) for part in parts) == 4


def test_short_batch_is_shared_evenly() -> None:
    parts = map_parts(lambda part: part, torch.arange(4), tokens=10)
    assert [len(part) for part in parts] == [2, 2]


def test_single_image_has_all_threads() -> None:
    (seen,) = map_parts(
        lambda part: (threading.current_thread(), torch.get_num_threads()),
        torch.zeros(1),
        tokens=197,
    )
    assert seen == (threading.current_thread(), 3)


def test_long_sequences_go_one_by_one() -> None:
    """Side by side, they would need the memory of several."""
    seen = map_parts(
        lambda part: (len(part), threading.current_thread(), torch.get_num_threads()),
        torch.zeros(3),
        tokens=4097,
    )
    assert seen == [(1, threading.current_thread(), 3)] * 3


def test_error_in_one_lane_is_raised_and_leaves_no_trace() -> None:
    module = tiny_module().train()
    images = torch.randn(6, 3, *load_model(module, device="cpu").preprocessing.size)
    images[4] = torch.nan

    def work(part: Tensor) -> Tensor:
        if part.isnan().any():
            raise ZeroDivisionError
        with capture.recording():
            return module(part)  # type: ignore[no-any-return]

    with pytest.raises(ZeroDivisionError), AttentionCapture(module) as capture:
        map_parts(work, images, tokens=200)
    assert module.training
    assert all(parameter.requires_grad for parameter in module.parameters())


def test_each_thread_records_its_own_calls() -> None:
    module = tiny_module()
    image = torch.randn(1, 3, *tiny_model().preprocessing.size)
    counts = []

    def other() -> None:
        with capture.recording():
            module(image)
            counts.append(len(capture.take()))
        module(image)
        counts.append(len(capture.take()))

    with AttentionCapture(module) as capture, torch.no_grad():
        module(image)
        module(image)
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        own = len(capture.take())
    assert own == 2 * counts[0] > 0
    assert counts[1] == 0


def test_batches_fill_the_lanes() -> None:
    cpu = torch.device("cpu")
    assert batch_size_for(197, cpu) == 4 * 2 * 3
    assert batch_size_for(4097, cpu) == 2 * 3
    assert batch_size_for(17, cpu) == 64
    assert batch_size_for(197, torch.device("cuda")) == 64
    assert batch_size_for(100_000, torch.device("cuda")) == 1


def test_accelerator_has_the_whole_batch_at_once() -> None:
    """The meta device stands for any but the processor."""
    batch = torch.empty(100, 3, device="meta")
    (whole,) = map_parts(lambda part: part, batch, tokens=200)
    assert whole is batch


@pytest.mark.parametrize(("tokens", "images"), [(577, 22), (1000, 12), (12800, 1), (12801, 1)])
def test_batches_on_an_accelerator_are_of_whole_images(tokens: int, images: int) -> None:
    size = batch_size_for(tokens, torch.device("cuda"))
    assert isinstance(size, int)
    assert size == images


def test_lanes_are_as_many_as_threads_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 1)
    together = threading.Barrier(3)

    def work(part: Tensor) -> str:
        together.wait(timeout=30)  # raises unless three threads have a part each
        return threading.current_thread().name

    assert len(set(map_parts(work, torch.zeros(3), tokens=800))) == 3


@pytest.mark.parametrize(("backend", "own"), [("OpenMP", True), ("native thread pool", False)])
def test_threads_are_own_where_the_backend_is_openmp(
    monkeypatch: pytest.MonkeyPatch, backend: str, own: bool
) -> None:
    """Torch names OpenMP among the libraries too, whether it runs in its threads or not."""
    info = f"OpenMP 201511\n\tomp_get_max_threads() : 3\nATen parallel backend: {backend}\n"
    monkeypatch.setattr(torch.__config__, "parallel_info", lambda: info)
    assert cores._threads_are_own() is own


@pytest.mark.parametrize("discard", [0, 0.9, None], ids=["mean", "discarding", "relevance"])
def test_threads_that_share_the_rows_of_a_long_sequence_give_the_same(
    monkeypatch: pytest.MonkeyPatch, discard: float | None
) -> None:
    drawn = torch.randn(2, 2, 1, 3, 50, 8, generator=torch.Generator().manual_seed(0))
    records = [
        AttentionRecord(query=query, key=key, value=None, output=None, bias=None, scale=1)
        for query, key in drawn
    ]
    seen: set[threading.Thread] = set()

    def fuse(record: AttentionRecord, images: slice, queries: slice) -> Tensor:
        seen.add(threading.current_thread())
        assert torch.get_num_threads() == (3 if len(seen & {threading.main_thread()}) else 1)
        return fuse_heads(record, HeadFusion.MAX)(images, queries)

    def rolled_out() -> Tensor:
        seen.clear()
        fusions = [partial(fuse, record) for record in records]
        if discard is None:
            start = torch.full((2, 50), 1 / 50)
            *_, last = row_form.gradient_relevance(records, fusions, start, weigh_values=False)
            return last
        return row_form.attention_rollout(records, fusions, torch.eye(50)[0], discard=discard)

    alone = rolled_out()
    assert seen == {threading.main_thread()}
    monkeypatch.setattr(row_form, "_WORTH_THREADS", 1)
    torch.testing.assert_close(rolled_out(), alone)
    assert threading.main_thread() not in seen
