"""The report in a real browser, with mouse, keyboard and both widths."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from draftattn.eval.report import write_report

NUM_FRAMES = 9

# The brightness that a video shows in its left half, and so the number of the frame (small_study.py).
SHOWN = """(id => {
  const video = document.getElementById(id), canvas = document.createElement('canvas');
  canvas.width = 64; canvas.height = 48;
  const context = canvas.getContext('2d');
  context.drawImage(video, 0, 0, 64, 48);
  return Math.round((context.getImageData(8, 24, 1, 1).data[1] / 255 - 0.1) / 0.08);
})"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, make_study: Callable[..., Any]) -> Path:
    """A study with four settings, two prompts and its report."""
    path = tmp_path_factory.mktemp("study")
    make_study(path, sparsity=[0.5, 0.75], warmup=[0.0, 0.25])
    write_report(path)
    return path


@pytest.fixture
def page(chromium: Any, folder: Path) -> Any:
    """The report as it opens on a laptop, its videos loaded."""
    chromium.open(folder / "report.html")
    ready(chromium)
    yield chromium
    assert chromium.problems == []


def ready(browser: Any) -> None:
    browser.wait("['dense-video', 'draft-video'].every(id => byId(id).readyState >= 2 && !byId(id).seeking)")


def test_asks_no_network(page: Any, folder: Path) -> None:
    own = (folder / "report.html").resolve().as_uri()
    assert [url for url in page.requests if url != own and not url.startswith(("blob:", "data:"))] == []
    assert own in page.requests


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize(("width", "height", "phone"), [(1280, 800, False), (390, 844, True)], ids=["laptop", "phone"])
def test_fits_the_window(chromium: Any, folder: Path, width: int, height: int, phone: bool, dark: bool) -> None:
    chromium.open(folder / "report.html", width, height, dark=dark, phone=phone)
    ready(chromium)
    assert chromium.run("document.documentElement.scrollWidth") == width
    stacked = "byId('draft-video').getBoundingClientRect().top > byId('dense-video').getBoundingClientRect().top + 20"
    assert chromium.run(stacked) is phone
    light = chromium.run("Number(getComputedStyle(document.body).backgroundColor.match(/[\\d.]+/)[0])")
    assert (light < 100) is dark
    small = "[...document.querySelectorAll('.button, select, .choices span')].filter(e => e.offsetParent)"
    assert chromium.run(f"Math.min(...{small}.map(e => e.getBoundingClientRect().height))") >= 40
    assert chromium.problems == []


def test_frames_of_both_videos_agree(page: Any) -> None:
    for frame in (0, 1, 4, NUM_FRAMES - 1, 2):
        page.run(f"player.seek({frame})")
        ready(page)
        assert [page.run(f"{SHOWN}('{name}-video')") for name in ("dense", "draft")] == [frame, frame]


def test_plays_in_step_and_stops(page: Any) -> None:
    page.run("window.drift = 0; window.seen = new Set()")
    page.run(
        "player.onFrame = (old => f => { old(f); seen.add(f);"
        " drift = Math.max(drift, Math.abs(byId('dense-video').currentTime - byId('draft-video').currentTime)); })"
        "(player.onFrame); 0"
    )
    page.click("#play")
    page.wait("seen.size >= 6")
    assert page.run("byId('play').textContent") == "Pause"
    page.click("#play")
    ready(page)
    assert page.run("byId('dense-video').paused && byId('draft-video').paused")
    assert page.run("drift") <= 1.6 / 8
    stopped = page.run("player.frame")
    assert [page.run(f"{SHOWN}('{name}-video')") for name in ("dense", "draft")] == [stopped, stopped]


def test_keys(page: Any) -> None:
    page.run("document.activeElement.blur()")
    page.press("ArrowRight")
    page.press("ArrowRight")
    assert page.run("player.frame") == 2
    page.press("ArrowLeft")
    assert page.run("byId('frame-count').textContent") == "frame 2 / 9"
    page.press(" ")
    assert page.run("player.playing")
    page.press(" ")
    assert not page.run("player.playing")
    page.press("2")
    assert page.run("byId('stage').dataset.view") == "flip"
    assert page.run("getComputedStyle(byId('dense-pane')).visibility") == "hidden"
    page.press("s")
    assert page.run("getComputedStyle(byId('dense-pane')).visibility") == "visible"
    assert page.run("getComputedStyle(byId('draft-pane')).visibility") == "hidden"


def test_every_control_has_a_name_and_is_reached(page: Any) -> None:
    nameless = page.run(
        "[...document.querySelectorAll('button, select, input, [tabindex=\"0\"]')].filter(e => e.offsetParent &&"
        " !(e.textContent.trim() || e.getAttribute('aria-label') || e.labels?.[0]?.textContent.trim()))"
        ".map(e => e.outerHTML.slice(0, 80))"
    )
    assert nameless == []
    page.run("document.activeElement.blur()")
    reached = set()
    for _ in range(36):
        page.press("Tab")
        reached.add(page.run("document.activeElement.id || document.activeElement.name || ''"))
        visible = "(e => { const s = getComputedStyle(e.matches('.choices input') ? e.nextElementSibling : e);"
        assert page.run(visible + " return s.outlineStyle !== 'none' || e.tagName === 'A'; })(document.activeElement)")
    assert {"theme", "view"} <= reached


def test_difference_view(page: Any) -> None:
    page.run("player.seek(3)")
    page.press("4")
    ready(page)
    pixel = "[...byId('difference').getContext('2d').getImageData({}, 24, 1, 1).data]"
    page.wait("byId('difference').width === 64")
    left, right = page.run(pixel.format(10)), page.run(pixel.format(54))
    assert max(left[:3]) <= 8
    assert right[1] == pytest.approx(0.15 * 255, abs=12)
    assert page.run("getComputedStyle(byId('difference')).filter") == "brightness(4)"


def test_wipe_is_dragged_and_moved_by_keys(page: Any) -> None:
    page.press("3")
    page.click("#stage", at=(0.25, 0.5))
    assert page.run("byId('divider').getAttribute('aria-valuenow')") == "25"
    page.run("byId('divider').focus()")
    page.press("ArrowRight")
    assert page.run("byId('divider').getAttribute('aria-valuenow')") == "27"
    assert page.run("player.frame") == 0


def test_curves_show_and_move_the_frame(page: Any) -> None:
    page.hover(".curve .scrubbable", at=(0.99, 0.5))
    assert page.run("player.frame") == NUM_FRAMES - 1
    page.run("document.querySelector('.curve .scrubbable').focus()")
    page.press("Home")
    page.press("ArrowRight")
    assert page.run("player.frame") == 1
    value = page.run("runs[state.run].curves.psnr[1].toFixed(1)")
    assert page.run("document.querySelector('.curve .now').textContent") == f"frame 2: {value} dB"


def test_worst_frame_is_shown(page: Any) -> None:
    page.click(".card .link")
    ready(page)
    worst = page.run("settings[pageData.runs[pageData.chosen].setting].worst.psnr")
    assert page.run("[state.run, player.frame]") == [worst["run"], worst["frame"]]
    assert page.run(f"{SHOWN}('draft-video')") == worst["frame"]


def test_table_sorts_and_picks(page: Any) -> None:
    values = "[...document.querySelectorAll('#table tbody tr')].map(row => parseFloat(row.cells[1].textContent))"
    page.click('#table [data-key="speedup"]')
    fastest_first = page.run(values)
    assert fastest_first == sorted(fastest_first, reverse=True)
    assert page.run("document.querySelector('#table [aria-sort]').getAttribute('aria-sort')") == "descending"
    assert page.run("document.activeElement.dataset.key") == "speedup"
    page.press("Enter")
    assert page.run(values) == sorted(fastest_first)
    page.click("#table tbody tr:first-child th button")
    slowest = page.run("document.querySelector('#table tbody tr:first-child th').textContent")
    assert page.run("settings[runs[state.run].setting].label") == slowest
    page.click("#table-rows label:nth-of-type(2)")
    assert page.run("document.querySelectorAll('#table tbody tr').length") == 8


def test_plot_picks_by_mouse_and_keys(page: Any) -> None:
    before = page.run("byId('lede').textContent")
    page.run("document.querySelector('.mark[aria-checked=\"true\"]').focus()")
    page.press("ArrowRight")
    ready(page)
    assert page.run("byId('lede').textContent") != before
    assert page.run("document.activeElement.getAttribute('aria-checked')") == "true"
    setting = page.run("[...document.querySelectorAll('.mark')].find(m => m.ariaChecked === 'false').dataset.setting")
    page.click(f'.mark[data-setting="{setting}"]')
    assert page.run("runs[state.run].setting") == int(setting)
    better_up = page.run(
        "(() => { byId('plot-metric').querySelectorAll('input')[2].click();"
        " const at = [...document.querySelectorAll('.mark')].map(m => [+m.querySelector('.big').getAttribute('cy'),"
        " settings[m.dataset.setting].values.lpips]); at.sort((a, b) => a[0] - b[0]); return at.map(p => p[1]); })()"
    )
    assert better_up == sorted(better_up)


def test_density_map_reads(page: Any) -> None:
    page.run("document.querySelector('.heat-map').focus()")
    for key in ("ArrowRight", "ArrowRight", "ArrowDown"):
        page.press(key)
    value = page.run("runs[state.run].density_map.values[1][2]")
    assert page.run("document.querySelector('.heat-read').textContent") == (
        f"Layer 1, step 3: {100 * value:.0f} % of all scores computed"
    )


def test_pickers_keep_what_they_can(page: Any) -> None:
    page.run(
        "(s => { s.value = 1; s.dispatchEvent(new Event('change')); })(document.querySelector('[data-key=prompt]'))"
    )
    ready(page)
    assert page.run("[runs[state.run].prompt, runs[state.run].setting]") == [
        1,
        page.run("runs[pageData.chosen].setting"),
    ]
    assert page.run("byId('dense-video').dataset.path") == "videos/dense-1-0.mp4"


def test_words_explain_themselves(page: Any) -> None:
    page.click("#lede .term")
    assert "signal-to-noise" in page.run("byId('explanation').textContent")
    assert page.run("!byId('explanation').hidden")
    page.press("Escape")
    assert page.run("byId('explanation').hidden")


def test_theme_is_switched(page: Any) -> None:
    background = "getComputedStyle(document.body).backgroundColor"
    light = page.run(background)
    page.click("#theme")
    page.click("#theme")
    assert page.run("byId('theme').textContent") == "Theme: dark"
    assert page.run(background) != light
    page.click("#theme")


def test_linked_videos_play_and_missing_ones_are_named(chromium: Any, tmp_path: Path, make_study: Any) -> None:
    make_study(tmp_path, num_prompts=1, sparsity=[0.75])
    write_report(tmp_path, embed_megabytes=0)
    chromium.open(tmp_path / "report.html")
    ready(chromium)
    chromium.press("4")
    chromium.wait("byId('difference').width === 64")
    assert {url.rsplit("/", 1)[1] for url in chromium.requests if url.endswith(".mp4")} == {
        path.name for path in (tmp_path / "videos").iterdir()
    }
    for path in (tmp_path / "videos").glob("*residual*"):
        path.unlink()
    chromium.open(tmp_path / "report.html")
    chromium.wait("!byId('stage-message').hidden")
    assert "was not found beside it" in chromium.run("byId('stage-message').textContent")
