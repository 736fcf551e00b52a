"""The report in a real browser: what its controls change, what it draws, and that it is alone."""

from __future__ import annotations

import os
import shutil
import time
import urllib.parse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from browser import Browser, is_there
from fixtures_io import LABELS, NAME, save_pictures, save_tiny
from vitviz.cli.app import main
from vitviz.methods import diagnostics
from vitviz.options import PictureOptions

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not is_there(), reason="no Chromium with its driver here: `make browser` installs them"
    ),
]
ALPHA = PictureOptions().alpha
UNWEIGHED = """((map, options) => {
    const seen = document.createElement('canvas'), [left, top, right, bottom] = map.region;
    const [height, width] = viewed.entry.image.size;
    const [[x0, x1], [y0, y1]] = [span(left, right, width), span(top, bottom, height)];
    [seen.width, seen.height] = [x1 - x0, y1 - y0];
    const heat = heatOf(map, y1 - y0, x1 - x0, options);
    const pixels = colorHeat(heat, x1 - x0, map.is_signed, options, false);
    seen.getContext('2d').putImageData(pixels, 0, 0);
    return seen;
})(viewed.stored, drawOptions(viewedMap(), 0))"""
HOSTILE_LABEL = "</script><img src=x onerror=document.title='injected'> \"'`\u2028${1}"
HOSTILE_NAMES = (
    "<img src=x onerror=document.title='injected'>.png",
    "\"'`&amp;\u2028 <!--.png",
    "javascript:alert(1).png",
    "100% #1?.png",
    os.fsdecode(b"caf\xe9.png"),
)


def explain(folder: Path, method: str, *words: str) -> None:
    """Run a command in a folder with the tiny model."""
    options = ["-m", NAME, "--img-size", "64", "--weights", "../tiny.safetensors"]
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as left:
        patch.chdir(folder)
        main(
            [method, ".", *options, "--labels", "../labels.txt", "--report", "--json", "-q", *words]
        )
    assert left.value.code in (0, 1)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Explain pictures and give the folder of the maps, moved to where nothing else is."""
    home = tmp_path_factory.mktemp("report")
    save_tiny(home / "tiny.safetensors")
    labels = [*LABELS]
    labels[0] = HOSTILE_LABEL.replace("\u2028", " ")  # a line of its file
    (home / "labels.txt").write_text("\n".join(labels), encoding="utf-8")
    folder = home / "pictures"
    save_pictures(folder, ["a.png", "b.png", "q/c.png"])
    save_pictures(folder, HOSTILE_NAMES[:4])
    Image.new("RGB", (60, 40), (150, 90, 60)).save(folder / "even.png")
    (folder / "broken.png").write_bytes(b"no picture <b>at all</b>")
    (folder / "latin.png").write_bytes((folder / "a.png").read_bytes())
    (folder / "latin.png").rename(folder / HOSTILE_NAMES[4])
    kinds = [word for kind in ("heatmap", "overlay", "gray") for word in ("--save", kind)]
    explain(folder, "attention", "--fit", "crop")
    explain(
        folder, "grad-rollout", "--class", "top1", "--versus", "2"
    )  # which is some images' best
    explain(folder, "evidence", "--class", "0", *kinds)
    explain(folder, "features")
    explain(folder, "rollout", *kinds, "--fit", "crop")
    elsewhere = home / "un zipped #1"
    shutil.move(folder / "vitviz-out", elsewhere)
    shutil.rmtree(folder)
    return elsewhere


@pytest.fixture(scope="module")
def window() -> Iterator[Browser]:
    browser = Browser()
    yield browser
    browser.close()


@pytest.fixture
def page(window: Browser, written: Path) -> Iterator[Browser]:
    """Open the page, and see at the end that it said nothing and asked nobody."""
    window.requests()
    window.open(written / "report.html")
    window.wait("[...document.querySelectorAll('.card canvas')].some((each) => each.width)")
    yield window
    assert window.messages() == []
    asked = window.requests()
    assert len(asked) > 3
    assert [each for each in asked if not each.startswith(written.parent.as_uri())] == []


def enlarge(page: Browser, name: str) -> None:
    """Open the image of a name, and wait for its map."""
    page.run("openViewer(entries.find((each) => each.image?.name === arguments[0]))", name)
    page.wait("viewed?.stored")


def shown(page: Browser) -> list[str]:
    return list(page.run("return shown.map((each) => each.name)"))


def from_file(path: Path) -> NDArray[np.int16]:
    return np.asarray(Image.open(path).convert("RGB")).astype(np.int16)


@pytest.mark.parametrize(
    ("method", "request_", "name"),
    [
        *(("rollout", "", each) for each in ("a.png", "q/c.png", "even.png")),
        *(("evidence", ".c0", each) for each in ("a.png", "b.png")),
    ],
)
def test_canvas_agrees_with_the_png(
    page: Browser, written: Path, method: str, request_: str, name: str
) -> None:
    page.choose("map", f"{method}{' · ' * bool(request_)}{request_[1:]}")
    enlarge(page, name)
    drawn = page.pixels("find('heat')").astype(np.int16)
    png, heat = (
        from_file(written / f"{name}.{method}{request_}.{kind}.png") for kind in ("heatmap", "gray")
    )
    assert drawn.shape == (*png.shape[:2], 4)
    seen = png.any(axis=-1)
    strength = heat[..., 0] / 255
    if method == "evidence":
        strength = np.abs(2 * strength - 1)
    weight = 255 * strength * (2 - strength)
    assert np.abs(drawn[..., 3] - weight)[seen].max() <= (4 if method == "evidence" else 2)  # 8 bit
    dimmed = drawn[~seen]
    assert np.abs(dimmed - [0, 0, 0, 255 * 0.6 / ALPHA]).max(initial=0) <= 1
    strong = seen & (drawn[..., 3] == 255)  # elsewhere a canvas rounds its colours
    assert strong.any() and np.abs(drawn[..., :3] - png)[strong].max() <= 2
    whole = page.pixels(UNWEIGHED).astype(np.int16)[..., :3]
    assert np.abs(whole - png[seen].reshape(whole.shape)).max() <= 2
    assert whole.std() > 10
    page.press("Escape")


@pytest.mark.parametrize("method", ["rollout", "evidence.c0"])
def test_blend_agrees_with_the_overlay(page: Browser, written: Path, method: str) -> None:
    page.choose("map", method.replace(".", " · "))
    enlarge(page, "even.png")
    page.run("find('frame').style.width = '60px'; find('frame').style.height = '40px'")
    blended = page.screenshot("#frame").astype(np.int16)[..., :3]
    png = from_file(written / f"even.png.{method}.png")
    assert blended.shape == png.shape
    assert np.abs(blended - png).max() <= 2
    page.press("Escape")


@pytest.mark.parametrize("policy", ["mark", "mute", "show"])
def test_outliers_are_drawn_as_in_the_overlay(
    window: Browser, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, policy: str
) -> None:
    monkeypatch.setattr(diagnostics, "_OUTLIER", 1.0)  # the untrained model has no real ones
    save_tiny(tmp_path / "tiny.safetensors")
    (tmp_path / "labels.txt").write_text("\n".join(LABELS), encoding="utf-8")
    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (90, 60), (150, 90, 60)).save(tmp_path / "pictures" / "even.png")
    explain(tmp_path / "pictures", "rollout", "--outliers", policy)
    window.open(tmp_path / "pictures" / "vitviz-out" / "report.html")
    enlarge(window, "even.png")
    framed = window.run("return framedPatches(viewed.stored, null).length")
    assert (framed > 0) == (policy != "show")
    window.run("find('frame').style.width = '90px'; find('frame').style.height = '60px'")
    drawn = window.screenshot("#frame").astype(np.int16)[..., :3]
    png = from_file(tmp_path / "pictures" / "vitviz-out" / "even.png.rollout.png")
    assert np.abs(drawn - png).max() <= 2
    window.press("o")
    assert window.run("return find('frames').hidden")
    window.press("Escape")


def test_opacity_slider_lets_the_original_through(page: Browser) -> None:
    enlarge(page, "a.png")
    for value in (0, 100):
        page.choose("opacity-2", value)
        assert page.run("return getComputedStyle(find('heat')).opacity") == str(value // 100)
        assert page.run("return find('opacity').value") == str(value)
    page.press("Escape")
    page.wait("!viewed")
    assert page.run("return [...near].map((each) => each.canvas.style.opacity)[0]") == "1"


def test_o_shows_the_original_and_the_map_again(page: Browser) -> None:
    enlarge(page, "a.png")
    before = page.run("return find('heat').style.opacity")
    assert 0 < float(before) < 1
    page.press("o")
    assert page.run("return find('heat').style.opacity") == "0"
    page.press("o")
    assert page.run("return find('heat').style.opacity") == before


def test_threshold_slider_takes_away_what_is_below(page: Browser, written: Path) -> None:
    page.choose("map", "rollout")
    enlarge(page, "q/c.png")
    whole = page.pixels("find('heat')")
    page.choose("threshold-2", 60)
    cut = page.pixels("find('heat')")
    seen = from_file(written / "q/c.png.rollout.heatmap.png").any(axis=-1)
    whole, cut = whole[seen], cut[seen]
    kept = cut[..., 3] > 0
    assert (cut[kept] == whole[kept]).all()
    least = 255 * 0.6 * 1.4  # the weight of heat .6
    clear = np.abs(whole[..., 3] - least) > 1
    assert (kept == (whole[..., 3] >= least))[clear].all() and 0 < kept.sum() < kept.size
    key = page.pixels("find('key')")[0, :, 3]
    assert not key[:152].any() and key[154:].all()


def test_colormap_switch_recolours(page: Browser) -> None:
    enlarge(page, "a.png")
    page.choose("colormap-2", "viridis")
    pixels = page.pixels("find('heat')")
    hottest = np.unravel_index(pixels[..., 3].argmax(), pixels.shape[:2])
    assert np.abs(pixels[hottest][:3].astype(int) - (253, 231, 37)).max() <= 2  # viridis' end
    assert page.run("return find('colormap').value") == "viridis"


def test_scale_of_all_images_is_one_for_all(page: Browser) -> None:
    ends = []
    for name in ("a.png", "b.png"):
        enlarge(page, name)
        page.choose("scale-2", "image")
        own = page.run("return find('low').textContent + ' ' + find('high').textContent")
        page.choose("scale-2", "all")
        shared = page.run("return find('low').textContent + ' ' + find('high').textContent")
        ends.append((own, shared))
    assert ends[0][0] != ends[1][0]
    assert ends[0][1] == ends[1][1]


def test_pointer_tells_patch_and_value(page: Browser, written: Path) -> None:
    page.choose("map", "evidence · c0")
    enlarge(page, "a.png")
    box = page.run(
        "const b = find('frame').getBoundingClientRect(); return [b.x, b.y, b.width, b.height]"
    )
    page.point(box[0] + box[2] * 0.99, box[1] + box[3] * 0.3)
    told = page.run("return find('pointed').textContent")
    value = page.run("return viewed.stored.slices[0][1 * 4 + 3]")
    assert told.startswith("row 1, column 3 · ")
    number, unit = told.split(" · ")[1].split()
    assert float(number.replace("\u2212", "-")) == pytest.approx(value, rel=6e-3)
    assert unit == "logit"
    patch = page.run("return ['left', 'top', 'width'].map((each) => find('patch').style[each])")
    assert patch == ["75%", "25%", "25%"]


def test_arrow_keys_go_through_images_and_maps(page: Browser) -> None:
    enlarge(page, "a.png")
    places = page.run("return shown.filter((each) => each.image).map((each) => each.name)")
    page.press("Right")
    assert page.run("return find('viewer-path').textContent") == places[places.index("a.png") + 1]
    page.press("Left")
    assert page.run("return find('viewer-path').textContent") == "a.png"
    before = page.run("return viewed.map")
    page.press("Down")
    count = page.run("return viewed.entry.image.maps.length")
    assert page.run("return viewed.map") == (before + 1) % count
    page.press("Up", "Up")
    assert page.run("return viewed.map") == (before - 1) % count
    page.press("Escape")
    page.wait("!viewed")
    assert not page.run("return find('viewer').open")
    assert page.run("return document.activeElement.classList.contains('card')")


def test_gallery_is_used_by_keyboard_alone(page: Browser) -> None:
    page.run("shown[0].card.focus()")
    page.press("Right")
    assert page.run("return document.activeElement === shown[1].card")
    page.press("\ue007")  # Enter
    page.wait("find('viewer').open")
    assert page.run("return viewed.entry === shown[1]")
    page.press("Escape")
    page.wait("!viewed")
    page.press("/")
    assert page.run("return document.activeElement.id") == "search"


def test_click_enlarges(page: Browser) -> None:
    box = page.run("const b = shown[0].card.getBoundingClientRect(); return [b.x, b.y]")
    page.point(box[0] + 30, box[1] + 30, click=True)
    page.wait("find('viewer').open && viewed.stored")


def test_filters_and_orders(page: Browser) -> None:
    everything = shown(page)
    assert "broken.png" in everything
    page.choose("search", "Q/C")
    assert shown(page) == ["q/c.png"]
    page.choose("search", "")
    page.choose("state", "failed")
    assert set(shown(page)) == {"broken.png"}
    page.choose("state", "")
    page.choose("sort", "high")
    scores = page.run("return shown.map((each) => each.score)")
    assert scores == sorted(scores, reverse=True)
    page.choose("sort", "failed")
    assert shown(page)[0] == "broken.png"
    page.choose("sort", "name")
    label = page.run("return shown.find((each) => each.label).label")
    page.choose("class", label)
    assert set(page.run("return shown.map((each) => each.label)")) == {label}
    page.choose("search", "nothing has this name")
    assert page.run("return !find('nothing').hidden")
    page.run("find('again').click()")
    assert shown(page) == everything


def test_caveats_are_found(page: Browser) -> None:
    marked = "shown.filter((each) => each.image && !each.card.querySelector('.mark').hidden)"
    page.choose("state", "caveat")
    assert shown(page) == [] == page.run(f"return {marked}")  # of rollout, there are none
    page.choose("map", "grad-rollout · top1-vs-c2")
    found = shown(page)
    assert "a.png" in found and len(found) < page.run("return report.images.length")
    assert page.run(f"return {marked}.map((each) => each.name)") == found
    enlarge(page, "a.png")
    assert "the class is the one" in page.run("return find('caveats').textContent")
    assert page.run("return find('middle').textContent") == "constant: no heat"


def test_blocks_and_heads_of_attention_are_chosen(page: Browser) -> None:
    page.choose("map", "attention")
    enlarge(page, "a.png")
    assert page.run("return [find('block').options.length, find('head').options.length]") == [6, 3]
    last = page.pixels("find('heat')")
    page.choose("block", 0)
    first = page.pixels("find('heat')")
    page.choose("head", 1)
    head = page.pixels("find('heat')")
    assert (last != first).any() and (first != head).any()


def test_map_without_numbers_is_shown_as_it_is(page: Browser) -> None:
    page.choose("map", "features")
    page.run("openViewer(entries.find((each) => each.image?.name === 'a.png'))")
    page.wait("find('original').naturalWidth && !find('instead').hidden")
    assert page.run("return decodeURI(find('original').src)").endswith("a.png.features.heatmap.png")
    assert page.run("return find('heat').hidden")


def test_nothing_hostile_gets_through(page: Browser) -> None:
    names = page.run("return report.images.map((each) => each.name)")
    assert any("<img" in each for each in names)
    for place in range(len(names)):
        page.run("openViewer(entries[arguments[0]])", place)
        page.wait("viewed.stored || !find('instead').hidden")
        for link in page.run("return [...find('files').children].map((each) => each.href)"):
            assert link.startswith("file:")
    assert page.run("return find('predictions').textContent.includes('<img src=x')")
    assert page.run("return document.title") != "injected"
    assert page.run("return document.querySelectorAll('img[onerror], b:not(.map b)').length") == 0


def test_links_lead_to_the_files(page: Browser, written: Path) -> None:
    for image in page.run("return report.images"):
        for each in image["maps"]:
            for link in each["files"].values():
                assert (written / os.fsdecode(urllib.parse.unquote_to_bytes(link))).is_file()


def test_policy_lets_nothing_be_fetched(window: Browser, written: Path) -> None:
    window.open(written / "report.html")
    window.requests()
    window.run(
        "document.body.append(make('img', {src: 'http://127.0.0.1:9/x.png'}));"
        "document.head.append(make('script', {src: 'http://127.0.0.1:9/x.js'}));"
        "document.head.append(make('style', {}, 'body {color: red}'));"
        "fetch('http://127.0.0.1:9/').catch(() => 0)"
    )
    refused = " ".join(window.messages())
    assert refused.count("Content Security Policy") >= 3 and "img-src" in refused


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_dark_and_light_follow_the_system_and_the_switch(page: Browser, scheme: str) -> None:
    page.run("localStorage.clear()")
    page.prefer(scheme)
    page.run("location.reload()")
    page.wait("document.readyState === 'complete'")

    def is_dark() -> bool:
        ground = page.run("return getComputedStyle(document.body).backgroundColor")
        return sum(int(each) for each in ground[4:-1].split(",")) < 200

    assert is_dark() == (scheme == "dark")
    page.run("find('theme').click()")
    assert is_dark() != (scheme == "dark")
    page.run("localStorage.clear()")


def test_phone_needs_no_sideways_scrolling(written: Path) -> None:
    phone = Browser(phone=True)
    try:
        phone.open(written / "report.html")
        wide = "document.documentElement.scrollWidth <= innerWidth"
        assert phone.run(f"return {wide} && innerWidth === 390")
        enlarge(phone, "a.png")
        side = "find(arguments[0]).getBoundingClientRect()[arguments[1]]"
        assert phone.run(f"return {side}", "frame", "left") >= 0
        assert phone.run(f"return {side}", "frame", "right") <= 390
        assert phone.run(f"return {side}", "viewer-name", "top") > 200  # below the picture
    finally:
        phone.close()


@pytest.mark.parametrize("count", [60, pytest.param(1000, marks=pytest.mark.long)])
def test_many_images_stay_quick_and_small(tmp_path: Path, window: Browser, count: int) -> None:
    save_tiny(tmp_path / "tiny.safetensors")
    (tmp_path / "labels.txt").write_text("\n".join(LABELS), encoding="utf-8")
    names = [f"{number}.jpg" for number in range(count)]
    save_pictures(tmp_path / "many", names, (360, 480))
    explain(tmp_path / "many", "evidence", "--class", "top1", "--class", "top2")
    page = tmp_path / "many" / "vitviz-out" / "report.html"
    assert page.stat().st_size <= 2_000_000
    start = time.perf_counter()
    window.open(page)
    window.run("shown[20].card.click()")
    window.wait("viewed.stored")
    seconds = time.perf_counter() - start
    window.press("Escape")
    assert window.run("return shown.length") == count
    for share in (0.25, 0.5, 0.75, 1):
        window.run("scrollTo(0, arguments[0] * document.body.scrollHeight)", share)
        window.run("return new Promise((resolve) => setTimeout(resolve, 300))")
        window.wait("near.size && [...near].every((each) => each.canvas.width)")
    drawn = window.run("return entries.filter((each) => each.canvas?.width).length")
    size = page.stat().st_size / 1e6
    held = window.memory() / 1e6
    print(f"{count} images: {size:.2f} MB, in {seconds:.2f} s, {held:.0f} MB, {drawn} drawn")
    assert seconds <= 2
    assert held <= 300
    assert 0 < drawn <= 80  # those in sight
    assert window.messages() == []
