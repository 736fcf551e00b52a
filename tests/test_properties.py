"""What holds for every image and every choice of options."""

from __future__ import annotations

import io
import os
import tempfile
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image

from fixtures_io import SIZE, TIFF_YCBCR, picture, tiny_model, tiny_module
from fixtures_methods import make_method
from vitviz.api import explain
from vitviz.errors import ImageError, printable
from vitviz.explaining.batch import class_requests
from vitviz.explaining.explanation import Explanation
from vitviz.explaining.samples import input_transform
from vitviz.images.decoding import ImageFile
from vitviz.images.fitting import InputTransform
from vitviz.images.samples import ImageSample, load_sample
from vitviz.images.sources import Source, find_sources
from vitviz.methods.method import Method
from vitviz.methods.rollout import GradRollout, Rollout
from vitviz.methods.table import METHODS
from vitviz.models.model import Model, load_model
from vitviz.options import Fit, HeadFusion, OutputKind, PictureOptions
from vitviz.pictures.heat import normalize
from vitviz.runs.job import Job
from vitviz.runs.names import output_path
from vitviz.runs.pipeline import run

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("one_thread"),
    # A class whose gradient speaks for nothing is drawn now and then, and told of.
    pytest.mark.filterwarnings("ignore:.*, the first of "),
]


def examples(number: int) -> settings:
    return settings(
        max_examples=number,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )


MODES = ("1", "L", "P", "LA", "RGB", "RGBA", "CMYK", "I;16", "I", "F", *TIFF_YCBCR, "HSV")
sides = st.integers(1, 60)
seeds = st.integers(0, 2**16)
fits = st.sampled_from(list(Fit))
methods = st.one_of(
    st.builds(
        Rollout,
        discard=st.floats(0, 1, exclude_max=True),
        start_layer=st.integers(0, 5),
        head_fusion=st.sampled_from(list(HeadFusion)),
    ),
    st.builds(
        GradRollout,
        discard=st.floats(0, 1, exclude_max=True),
        start_layer=st.integers(0, 5),
        classes=st.lists(st.sampled_from(["top1", "top3", "0", "5"]), min_size=1).map(tuple),
    ),
)


@st.composite
def images(draw: st.DrawFn) -> Image.Image:
    """Draw noise of any mode and size, in the range of its type."""
    height, width, mode = draw(sides), draw(sides), draw(st.sampled_from(MODES))
    noise = np.random.default_rng(draw(seeds)).integers(0, 256, (height, width, 4), dtype=np.uint8)
    grey = noise[..., 0]
    if mode == "I;16":
        return Image.fromarray(grey.astype(np.uint16) * draw(st.sampled_from([128, 257])))
    if mode == "I":
        return Image.fromarray(grey.astype(np.int32) * draw(st.sampled_from([1 << 21, 1 << 22])))
    if mode == "F":
        return Image.fromarray(
            grey.astype(np.float32) * draw(st.sampled_from([0, 1 / 999, 1 / 255]))
        )
    return Image.fromarray(noise, "RGBA").convert("RGB" if mode == "HSV" else "RGBA").convert(mode)


def model_for(fit: Fit) -> Model:
    global _NATIVE
    if fit is not Fit.NATIVE:
        return tiny_model()
    if _NATIVE is None:
        _NATIVE = load_model(tiny_module(dynamic_img_size=True), device="cpu")
    return _NATIVE


_NATIVE: Model | None = None


def explained(image: Image.Image, fit: Fit, method: Method, **options: Any) -> Explanation:
    return explain(model_for(fit), [image], method, fit=fit, **options)[0]


@examples(200)
@given(images(), fits, methods)
@example(Image.new("RGB", (1, 60)), Fit.CROP, Rollout())
@example(Image.new("F", (60, 1), 0.0), Fit.NATIVE, Rollout())
@example(Image.new("F", (60, 1), 1.0), Fit.SQUASH, Rollout())
def test_relevance_is_a_share_of_what_was_gathered(
    image: Image.Image, fit: Fit, method: Method
) -> None:
    explanation = explained(image, fit, method)
    relevance = explanation.relevance
    rows, cols = (side // 16 for side in explanation.sample.pixels.shape[:2])
    assert relevance.shape == (rows, cols)
    assert relevance.dtype == np.float32
    assert rows * cols <= (SIZE // 16) ** 2
    assert np.isfinite(relevance).all()
    assert (relevance >= 0).all()
    assert relevance.sum() <= 1 + 1e-5
    heat = normalize(relevance)
    assert heat.min() == 0
    assert heat.max() in (0, 1)


@examples(120)
@given(images(), fits, methods, st.integers(1, 70), st.floats(0, 1))
def test_pictures_have_the_images_shape_and_heat_where_the_model_looked(
    image: Image.Image, fit: Fit, method: Method, max_size: int, alpha: float
) -> None:
    explanation = explained(
        image, fit, method, pictures=PictureOptions(max_size=max_size, alpha=alpha)
    )
    picture, region = explanation.sample.picture, explanation.sample.region
    height, width = picture.shape[:2]
    scale = min(max_size / max(image.size), 1)
    assert (height, width) == tuple(max(round(side * scale), 1) for side in image.size[::-1])
    overlay, heatmap = explanation.draw(OutputKind.OVERLAY), explanation.draw(OutputKind.HEATMAP)
    assert overlay.shape == heatmap.shape == picture.shape
    assert explanation.draw(OutputKind.PANEL).shape[1] >= 3 * width
    unseen = np.ones((height, width), dtype=bool)
    unseen[region.pixels((height, width))] = False
    grey = picture[unseen] @ [0.299, 0.587, 0.114]
    assert (abs(overlay[unseen] - 0.4 * grey[:, None]) <= 1.01).all()
    assert not heatmap[unseen].any()
    assert heatmap[~unseen].any(axis=-1).all()  # no table begins with black


@examples(40)
@given(images(), fits, methods, st.integers(1, 5000), st.integers(1, 5000))
def test_max_size_never_changes_relevance(
    image: Image.Image, fit: Fit, method: Method, one: int, other: int
) -> None:
    maps = [
        explained(image, fit, method, pictures=PictureOptions(max_size=size)).relevance
        for size in (one, other)
    ]
    np.testing.assert_array_equal(*maps)


@examples(30)
@given(
    st.lists(images(), min_size=2, max_size=6),
    fits,
    st.sampled_from(list(METHODS)),
    st.sampled_from(list(HeadFusion)),
    st.integers(0, 5),
    st.integers(1, 6),
)
def test_batches_change_nothing(
    several: list[Image.Image],
    fit: Fit,
    method: Method,
    head_fusion: HeadFusion,
    start_layer: int,
    batch_size: int,
) -> None:
    options = make_method(
        method,
        head_fusion=head_fusion,
        start_layer=start_layer,
        discard=0.0,  # sums are rounded otherwise in a batch: at a threshold that would show
        classes=("0", "5"),
    )
    model = model_for(fit)
    together = explain(model, several, options, fit=fit, batch_size=batch_size)
    alone = [each for one in several for each in explain(model, [one], options, fit=fit)]
    assert len(together) == len(alone)
    for one, other in zip(together, alone, strict=True):
        assert one.class_index == other.class_index
        assert one.sample.source.key.startswith("image ")
        reach = np.ptp(other.relevance)
        np.testing.assert_allclose(one.relevance, other.relevance, rtol=1e-5, atol=1e-5 * reach)


@examples(25)
@given(
    st.lists(images().filter(lambda image: image.mode != "HSV"), min_size=1, max_size=6),
    st.lists(st.sampled_from(list(OutputKind)), min_size=1, unique=True).map(tuple),
    st.sampled_from([Fit.SQUASH, Fit.CROP]),
    methods,
    st.integers(1, 4),
    st.sets(st.integers(0, 5)),
)
def test_results_are_the_sources_in_order_with_all_their_files(
    several: list[Image.Image],
    kinds: tuple[OutputKind, ...],
    fit: Fit,
    method: Method,
    batch_size: int,
    broken: set[int],
) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for number, image in enumerate(several):
            path = folder / f"p/{number}.tif"
            path.parent.mkdir(exist_ok=True)
            image.save(path)
            if number in broken:
                path.write_bytes(b"II*\0broken")
        sources, _ = find_sources([folder / "p"])
        job = Job(
            method=method,
            pictures=PictureOptions(kinds=kinds),
            fit=fit,
            output=folder / "out",
            batch_size=batch_size,
        )
        results = list(run(tiny_model(), sources, job, warn=lambda text: None))
        assert [result.source for result in results] == sources
        for number, result in enumerate(results):
            assert result.status == ("failed" if number in broken else "written"), result.error
            if number not in broken:
                # A rank and an index may name one class: they are two maps all the same.
                maps = len(class_requests(tiny_model(), method)) or 1
                assert len({output.path for output in result.outputs}) == len(kinds) * maps
                assert len(result.outputs) == len(kinds) * maps
            for output in result.outputs:
                assert output.path.is_file()


names = st.text(min_size=1, max_size=300).filter(
    lambda name: "\0" not in name and not any("\ud800" <= char <= "\udfff" for char in name)
)


@examples(300)
@given(names, st.sampled_from(list(OutputKind)), st.sampled_from([None, "c281", "top1"]))
@example("..", OutputKind.OVERLAY, None)
@example("../../../etc/passwd", OutputKind.NPY, None)
@example("/etc/passwd", OutputKind.OVERLAY, None)
@example("a/..", OutputKind.PANEL, "c1")
@example("." * 255, OutputKind.OVERLAY, None)
@example("\U0001f408" * 100, OutputKind.OVERLAY, "top1")
@example("x." + "y" * 254, OutputKind.NPY, None)
def test_any_name_gives_an_output_inside_the_output_folder(
    name: str, kind: OutputKind, request: str | None
) -> None:
    if os.path.isdir(name):  # noqa: PTH112 (is searched, and is no name of a file)
        return
    (source,), _ = find_sources([Path(name)])
    folder = Path("/nowhere/out")
    path = output_path(folder, source, "rollout", request, kind)
    assert PurePosixPath(os.path.normpath(path)).is_relative_to(folder)
    assert ".." not in path.parts
    assert len(os.fsencode(path.name)) <= 255
    assert path.suffix == (".npy" if kind is OutputKind.NPY else ".png")


@examples(200)
@given(st.text(st.characters()))
def test_printable_text_is_one_line_that_no_terminal_obeys(text: str) -> None:
    shown = printable(text)
    assert shown.isprintable()
    assert shown.encode() or not text
    assert printable(shown) == shown


def decoded(content: bytes, frame: InputTransform, max_size: int) -> ImageSample:
    source = Source(path=Path("x"), key="x")
    return load_sample(ImageFile(source=source, content=content, digest=""), frame, max_size)


@examples(60)
@given(
    st.integers(1, 500),
    st.integers(1, 500),
    st.sampled_from([Fit.SQUASH, Fit.CROP]),
    st.lists(st.integers(1, 600), min_size=2, max_size=2),
)
@example(480, 480, Fit.SQUASH, [20, 600])
def test_max_size_never_changes_what_the_model_sees_of_a_jpeg(
    height: int, width: int, fit: Fit, max_sizes: list[int]
) -> None:
    buffer = io.BytesIO()
    picture(height, width).save(buffer, "JPEG")
    frame = replace(input_transform(tiny_model(), fit), size=(8, 8), patch=(4, 4))
    one, other = (decoded(buffer.getvalue(), frame, max_size).pixels for max_size in max_sizes)
    np.testing.assert_array_equal(one, other)


@examples(200)
@given(
    images().filter(lambda image: image.mode in ("1", "L", "P", "RGB", "RGBA")),
    st.sampled_from(["PNG", "TIFF", "GIF", "BMP", "WEBP", "JPEG"]),
    st.data(),
)
def test_damaged_files_give_a_sample_or_one_line(
    image: Image.Image, kind: str, data: st.DataObject
) -> None:
    buffer = io.BytesIO()
    (image.convert("RGB") if kind in ("JPEG", "BMP") else image).save(buffer, kind)
    content = bytearray(buffer.getvalue())
    for place in data.draw(st.lists(st.integers(0, len(content) - 1), max_size=5)):
        content[place] = data.draw(st.integers(0, 255))
    content = content[: data.draw(st.integers(0, len(content)))]
    frame = input_transform(tiny_model(), Fit.SQUASH)
    try:
        sample = decoded(bytes(content), frame, 64)
    except ImageError as error:
        assert str(error).isprintable()
    else:
        assert sample.pixels.shape == (SIZE, SIZE, 3)
        assert max(sample.picture.shape[:2]) <= 64
