"""From sources to results: order, batches, isolation, interruption."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import vitviz
from fixtures_io import picture, save_pictures, tiny_model, tiny_module
from fixtures_methods import make_method
from vitviz.errors import ImageError, LabelError, OptionError, SourceError, VitvizError
from vitviz.images.sources import Source, find_sources
from vitviz.methods.method import Method
from vitviz.methods.rollout import GradRollout, Rollout
from vitviz.models.model import load_model
from vitviz.options import Fit, OutputKind, PictureOptions
from vitviz.runs import pipeline
from vitviz.runs import records as ledger
from vitviz.runs.job import Job
from vitviz.runs.pipeline import run
from vitviz.runs.records import Result, run_record

pytestmark = pytest.mark.usefixtures("one_thread")

GRADIENT = GradRollout(classes=("3", "top2"))
NPY = PictureOptions(kinds=(OutputKind.NPY,))


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def mixed(count: int) -> list[Source]:
    """Save pictures of three shapes, every fifth damaged, and list them."""
    Path("p").mkdir()
    shapes = [(40, 40), (30, 90), (90, 30)]
    for index in range(count):
        path = Path("p", f"{index:02}.png")
        if index % 5 == 4:
            path.write_bytes(b"damaged")
        else:
            picture(*shapes[index % 3], seed=index).save(path)
    return find_sources(["p"])[0]


def results(sources: list[Source], **options: Any) -> list[Result]:
    return list(run(tiny_model(), sources, Job(**options)))


def close(one: np.ndarray, other: np.ndarray) -> bool:
    return bool(np.abs(one - other).max() <= 1e-5 * np.ptp(other))


@pytest.mark.parametrize("fit", Fit)
@pytest.mark.parametrize("batch_size", [1, 2, 7, None])
def test_results_come_in_the_order_of_the_sources(
    here: Path, fit: Fit, batch_size: int | None
) -> None:
    sources = mixed(14)
    found = results(sources, fit=fit, batch_size=batch_size, pictures=NPY)
    assert [result.source for result in found] == sources
    expected = ["failed" if index % 5 == 4 else "written" for index in range(14)]
    assert [result.status for result in found] == expected
    assert all((result.error is None) == (result.status == "written") for result in found)
    for result in found:
        assert all(output.path.is_file() for output in result.outputs)


@pytest.mark.parametrize("method", [Rollout(), GRADIENT], ids=["rollout", "grad-rollout"])
@pytest.mark.parametrize("fit", [Fit.SQUASH, Fit.NATIVE])
def test_batch_gives_each_image_the_map_it_gets_alone(here: Path, method: Method, fit: Fit) -> None:
    sources = [source for index, source in enumerate(mixed(9)) if index % 5 != 4]
    results(sources, method=method, fit=fit, batch_size=4, pictures=NPY, output=Path("many"))
    for source in sources:
        results([source], method=method, fit=fit, pictures=NPY, output=Path("alone"))
    together = sorted(path.relative_to("many") for path in Path("many").rglob("*.npy"))
    assert len(together) == len(sources) * (1 if isinstance(method, Rollout) else 3)
    for path in together:
        assert close(np.load("many" / path), np.load("alone" / path)), path


@pytest.mark.parametrize("most", [3, 1])
def test_short_memory_halves_the_batch(
    here: Path, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    """Ask torch for more than any machine has, as soon as a batch is too large."""
    model = tiny_model()
    forward = model.module.forward
    sizes = []

    def run_short(batch: torch.Tensor) -> torch.Tensor:
        sizes.append(len(batch))
        if len(batch) > most:
            torch.empty(1 << 46)
        return forward(batch)  # type: ignore[no-any-return]

    monkeypatch.setattr(model.module, "forward", run_short)
    save_pictures(here / "p", [f"{index}.png" for index in range(17)])
    sources = find_sources(["p"])[0]
    warned: list[str] = []
    found = list(run(model, sources, Job(batch_size=8), warn=warned.append))
    assert [result.source for result in found] == sources
    assert all(result.status == "written" for result in found)
    assert sizes[0] == 8
    assert max(sizes[len(warned) :]) <= most  # it does not try again what did not work
    assert len(warned) == (2 if most == 3 else 3)
    assert "not enough memory for 8 images at once" in warned[0]
    assert "--batch-size 4" in warned[0]


def test_image_that_the_model_has_no_memory_for_fails_alone(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model()
    forward = model.module.forward

    def run_short(batch: torch.Tensor) -> torch.Tensor:
        if (batch > 0.9).any():
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return forward(batch)  # type: ignore[no-any-return]

    monkeypatch.setattr(model.module, "forward", run_short)
    (here / "p").mkdir()
    for index in range(5):
        Image.new("RGB", (40, 40), (255,) * 3 if index == 2 else (0,) * 3).save(f"p/{index}.png")
    warned: list[str] = []
    found = list(run(model, find_sources(["p"])[0], Job(), warn=warned.append))
    assert [result.status for result in found] == [*["written"] * 2, "failed", *["written"] * 2]
    assert "memory" in str(found[2].error)
    with pytest.raises(ImageError, match="memory"), pytest.warns(UserWarning, match="memory"):
        vitviz.rollout(model, [f"p/{index}.png" for index in range(5)])


@pytest.mark.parametrize(("precision", "closeness"), [("fp16", 0.99), ("bf16", 0.9)])
@pytest.mark.parametrize("name", ["rollout", "grad-rollout"])
def test_half_precision_gives_nearly_the_same_maps(
    here: Path, name: str, precision: str, closeness: float
) -> None:
    method = make_method(name, classes=("3",))
    half = load_model(tiny_module(), device="cpu", precision=precision)
    save_pictures(here / "p", ["a.png", "b.png"])
    sources = find_sources(["p"])[0]
    for model, folder in ((tiny_model(), "whole"), (half, "half")):
        for result in run(model, sources, Job(method=method, pictures=NPY, output=Path(folder))):
            assert result.status == "written"
    for path in Path("whole").rglob("*.npy"):
        whole, rough = np.load(path), np.load("half" / path.relative_to("whole"))
        assert rough.dtype == np.float32
        assert (whole != rough).any()
        assert np.corrcoef(whole.ravel(), rough.ravel())[0, 1] > closeness
    recorded = run_record(half.record, Job())["run"]["options"]["dtype"]
    assert recorded == {"fp16": "float16", "bf16": "bfloat16"}[precision]


def test_maps_of_different_images_differ(here: Path) -> None:
    images = [picture(40, 60, seed=seed) for seed in range(4)]
    maps = [made.relevance for made in vitviz.rollout(tiny_model(), images)]
    for first in range(4):
        for second in range(first):
            assert not close(maps[first], maps[second])


def test_native_grid_has_the_images_shape(here: Path) -> None:
    wide, tall = vitviz.rollout(tiny_model(), [picture(30, 90), picture(90, 30)], fit="native")
    assert wide.relevance.shape == tall.relevance.shape[::-1]
    assert wide.relevance.shape[1] > wide.relevance.shape[0]


def test_interesting_corner_is_found_in_the_right_place() -> None:
    """Show one lively corner on a flat picture: the map must move with it."""
    module = tiny_module()
    with torch.no_grad():
        module.pos_embed.zero_()  # type: ignore[operator, union-attr]
    model = load_model(module, device="cpu")
    for shape in ((64, 128), (128, 64), (96, 96)):
        for fit in ("squash", "native"):
            grids = []
            for corner in ("top-left", "top-right", "bottom-left"):
                pixels = np.full((*shape, 3), 127, np.uint8)
                rows, cols = shape[0] // 4, shape[1] // 4
                top = slice(-rows, None) if corner == "bottom-left" else slice(0, rows)
                left = slice(-cols, None) if corner == "top-right" else slice(0, cols)
                pixels[top, left] = np.asarray(picture(rows, cols, seed=3))
                (made,) = vitviz.rollout(model, [pixels], fit=fit, discard=0)
                grids.append(made.relevance)
            rows, cols = grids[0].shape
            odd = [np.abs(grid - np.median(grid)) for grid in grids]
            peaks = [np.unravel_index(values.argmax(), values.shape) for values in odd]
            assert peaks[0][0] < rows / 2
            assert peaks[0][1] < cols / 2
            assert peaks[1][0] < rows / 2 <= peaks[1][1] * rows / cols + 1
            assert peaks[1][1] >= cols / 2 - 0.5
            assert peaks[2][0] >= rows / 2 - 0.5
            assert peaks[2][1] < cols / 2


def test_results_stream_though_one_shape_is_rare(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The first image is the only tall one: it must not hold back a folder of wide ones.
    count = 120
    save_pictures(here / "p", [f"{index:03}.png" for index in range(1, count)], (30, 90))
    picture(90, 30).save(here / "p/000.png")
    read = []
    real = pipeline.read_file
    monkeypatch.setattr(pipeline, "read_file", lambda source: read.append(source) or real(source))
    job = Job(fit=Fit.NATIVE, batch_size=2, workers=1, pictures=NPY)
    stream = run(tiny_model(), find_sources(["p"])[0], job)
    first = next(stream)
    seen = len(read)
    stream.close()
    assert first.source.key == "p/000.png"
    assert seen < count / 2


def test_memory_does_not_grow_with_the_folder(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_pictures(here / "p", [f"{index:03}.png" for index in range(80)], (16, 16))
    read = []
    real = pipeline.read_file
    monkeypatch.setattr(pipeline, "read_file", lambda source: read.append(source) or real(source))
    job = Job(batch_size=2, workers=1, pictures=NPY)
    ahead = []
    for done, _ in enumerate(run(tiny_model(), find_sources(["p"])[0], job)):
        ahead.append(len(read) - done)
    assert max(ahead) < 30


class _Poison:
    """Makes the model's input not finite where an image is all black."""

    def __init__(self, module: torch.nn.Module) -> None:
        self._module = module

    def __enter__(self) -> None:
        def hook(_: object, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
            images = inputs[0].clone()
            flat = images.amax(dim=(1, 2, 3)) - images.amin(dim=(1, 2, 3)) < 1
            images[flat] = float("nan")
            return (images,)

        self._handle = self._module.register_forward_pre_hook(hook)

    def __exit__(self, *_: object) -> None:
        self._handle.remove()


@pytest.mark.parametrize("method", [Rollout(), GRADIENT], ids=["rollout", "grad-rollout"])
def test_numbers_that_are_not_finite_fail_that_image_only(here: Path, method: Method) -> None:
    names = ["0.png", "1.png", "2.png", "3.png"]
    save_pictures(here / "p", names)
    Image.new("RGB", (40, 40)).save("p/1.png")
    sources = find_sources(["p"])[0]
    with _Poison(tiny_model().module):
        found = results(sources, method=method, batch_size=4, pictures=NPY)
    assert [result.status for result in found] == ["written", "failed", "written", "written"]
    assert "not finite" in str(found[1].error)
    assert not list(Path("vitviz-out").rglob("1.png*"))


@pytest.mark.parametrize("after", [0, 3, 7])
def test_interruption_leaves_no_half_file(here: Path, after: int) -> None:
    save_pictures(here / "p", [f"{index}.png" for index in range(12)])
    stream = run(tiny_model(), find_sources(["p"])[0], Job(batch_size=2))

    def consume() -> Iterator[Result]:
        for count, result in enumerate(stream):
            if count == after:
                raise KeyboardInterrupt
            yield result

    with pytest.raises(KeyboardInterrupt):
        list(consume())
    stream.close()
    assert not [path for path in Path("vitviz-out").rglob("*") if path.name.startswith(".")]
    for path in Path("vitviz-out").rglob("*.png"):
        with Image.open(path) as image:
            image.load()
    assert not [t for t in threading.enumerate() if t.name.startswith("vitviz")]


def test_interruption_inside_the_model_leaves_it_as_it_was(here: Path) -> None:
    save_pictures(here / "p", ["0.png", "1.png"])
    model = load_model(tiny_module(), device="cpu")
    before = [parameter.requires_grad for parameter in model.module.parameters()]

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    handle = model.module.blocks[3].register_forward_pre_hook(interrupt)  # type: ignore[index, union-attr, operator]
    with pytest.raises(KeyboardInterrupt):
        list(run(model, find_sources(["p"])[0], Job(method=GRADIENT)))
    handle.remove()
    assert [parameter.requires_grad for parameter in model.module.parameters()] == before
    assert all(parameter.grad is None for parameter in model.module.parameters())
    assert [r.status for r in run(model, find_sources(["p"])[0], Job())] == ["written"] * 2


def test_failure_that_vitviz_did_not_foresee_hides_nothing(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_pictures(here / "p", ["0.png"])

    def bug(*_: object) -> None:
        raise ZeroDivisionError("bug")

    monkeypatch.setattr(pipeline, "load_sample", bug)
    with pytest.raises(ZeroDivisionError):
        results(find_sources(["p"])[0])


def test_image_too_large_for_memory_fails_alone(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_pictures(here / "p", ["0.png", "1.png", "2.png"])
    real = pipeline.load_sample

    def load(file: Any, *rest: Any) -> Any:
        if file.source.key == "p/1.png":
            raise MemoryError
        return real(file, *rest)

    monkeypatch.setattr(pipeline, "load_sample", load)
    found = results(find_sources(["p"])[0])
    assert [result.status for result in found] == ["written", "failed", "written"]


def test_output_that_would_overwrite_a_source_is_refused(here: Path) -> None:
    save_pictures(here, ["a.png", "a.png.rollout.png"])
    sources = find_sources(["a.png", "a.png.rollout.png"])[0]
    before = Path("a.png.rollout.png").read_bytes()
    with pytest.raises(SourceError, match="overwrite"):
        results(sources, output=Path())
    assert Path("a.png.rollout.png").read_bytes() == before


def test_all_classes_and_kinds_are_written(here: Path) -> None:
    save_pictures(here, ["a.png"])
    (found,) = results(
        find_sources(["a.png"])[0],
        method=GRADIENT,
        pictures=PictureOptions(kinds=tuple(OutputKind)),
    )
    endings = [".png", ".heatmap.png", ".panel.png", ".gray.png", ".npy"]
    expected = [
        f"a.png.grad-rollout.{key}{end}" for key in ("c3", "top1", "top2") for end in endings
    ]
    assert [output.path.name for output in found.outputs] == expected
    assert sorted(path.name for path in Path("vitviz-out").iterdir()) == sorted(expected)
    assert found.outputs[0].class_index == 3
    assert [output.class_index for output in found.outputs[5::5]] == [
        prediction.class_index for prediction in found.predictions[:2]
    ]
    assert len(found.predictions) == 5
    scores = [prediction.score for prediction in found.predictions]
    assert scores == sorted(scores, reverse=True)


@pytest.mark.parametrize(
    ("method", "error"),
    [
        (Rollout(start_layer=6), OptionError),
        (GradRollout(classes=("7",)), LabelError),
        (GradRollout(classes=("tabby",)), LabelError),
        (GradRollout(classes=()), LabelError),
    ],
)
def test_options_that_do_not_fit_the_model_are_refused(
    here: Path, method: Method, error: type[VitvizError]
) -> None:
    save_pictures(here, ["a.png"])
    with pytest.raises(error):
        results(find_sources(["a.png"])[0], method=method)
    assert not Path("vitviz-out").exists() or not list(Path("vitviz-out").iterdir())


# Python


def test_paths_pillow_images_and_arrays_give_the_same_map(here: Path) -> None:
    save_pictures(here, ["a.png"])
    with Image.open("a.png") as image:
        images = ["a.png", Path("a.png"), image.copy(), np.asarray(image)]
    maps = vitviz.rollout(tiny_model(), images, discard=0.9)
    assert len(maps) == 4
    for made in maps:
        assert made.relevance.dtype == np.float32
        assert made.relevance.shape == (4, 4)
        assert close(made.relevance, maps[0].relevance)
        assert made.overlay().size == (64, 48)


def test_python_gives_one_map_an_image_and_class() -> None:
    images = [picture(30, 40, seed=seed) for seed in range(2)]
    maps = vitviz.grad_rollout(tiny_model(), images, classes=[3, "top2"])
    assert [made.request for made in maps] == ["c3", "top1", "top2"] * 2
    assert {made.class_index for made in maps[::3]} == {3}


def test_python_takes_any_iterable_of_images() -> None:
    assert len(vitviz.rollout(tiny_model(), (picture(30, 40, seed=s) for s in range(3)))) == 3
    assert vitviz.rollout(tiny_model(), []) == []


def test_python_names_the_image_that_failed(here: Path) -> None:
    save_pictures(here, ["a.png"])
    with pytest.raises(ImageError, match=r"gone\.png"):
        vitviz.rollout(tiny_model(), ["a.png", "gone.png"])


@pytest.mark.parametrize(
    "options",
    [
        {"discard": 1.0},
        {"discard": float("nan")},
        {"start_layer": -1},
        {"start_layer": 6},
        {"batch_size": 0},
        {"head_fusion": "median"},
        {"fit": "stretch"},
    ],
    ids=str,
)
def test_python_refuses_options_out_of_range(options: dict[str, Any]) -> None:
    with pytest.raises(VitvizError):
        vitviz.rollout(tiny_model(), [picture(30, 40)], **options)


def test_one_image_instead_of_a_list_is_not_taken_apart(here: Path) -> None:
    save_pictures(here, ["a.png"])
    for image in ("a.png", np.asarray(picture(20, 30))):
        try:
            maps = vitviz.rollout(tiny_model(), image)  # type: ignore[arg-type]
        except (VitvizError, TypeError) as error:
            assert "list" in str(error)
        else:
            assert len(maps) == 1


def test_native_with_a_model_built_for_one_size_is_refused() -> None:
    module = tiny_module(dynamic_img_size=False)
    model = load_model(module, device="cpu")
    with pytest.raises(VitvizError, match="native"):
        vitviz.rollout(model, [picture(30, 90)], fit="native")


def test_model_is_as_it_was_afterwards() -> None:
    model = load_model(tiny_module(), device="cpu")
    module = model.module.train()
    module.blocks[0].requires_grad_(False)  # type: ignore[index, union-attr]
    modes = [child.training for child in module.modules()]
    wanted = [parameter.requires_grad for parameter in module.parameters()]
    digest = model.digest
    vitviz.grad_rollout(model, [picture(30, 40)], classes=["top2"])
    assert [child.training for child in module.modules()] == modes
    assert [parameter.requires_grad for parameter in module.parameters()] == wanted
    assert all(parameter.grad is None for parameter in module.parameters())
    assert load_model(module, device="cpu").digest == digest


def test_image_that_there_is_no_memory_to_draw_fails_alone(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_pictures(here / "p", ["0.png", "1.png", "2.png"])
    real = ledger.encode

    def encode(explanation: Any, kind: Any, provenance: Any) -> bytes:
        if provenance.source == "p/1.png" and kind is OutputKind.NPY:
            raise MemoryError
        return real(explanation, kind, provenance)

    monkeypatch.setattr(ledger, "encode", encode)
    kinds = PictureOptions(kinds=(OutputKind.OVERLAY, OutputKind.NPY))
    found = results(find_sources(["p"])[0], pictures=kinds)
    assert [result.status for result in found] == ["written", "failed", "written"]
    assert [output.kind for output in found[1].outputs] == [
        OutputKind.OVERLAY
    ]  # told, since it is there
    assert found[1].error
