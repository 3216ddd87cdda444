"""A report in a real browser: it loads from a file, asks for nothing, sliders and read-outs work, it fits a phone."""

from __future__ import annotations

import io
import re
import shutil

import numpy as np
import pytest
from report_tools import HOSTILE, arrays, toy

from gpurho.pipelines.report import report

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
PROGRAM = next((found for name in BROWSERS if (found := shutil.which(name))), None)

pytestmark = pytest.mark.skipif(PROGRAM is None, reason="no Chromium on this machine: apt-get install chromium")
sync_api = pytest.importorskip("playwright.sync_api", reason="needs the package playwright, without its browsers")


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        # No sandbox inside a container that runs as root; the page is our own.
        program = playwright.chromium.launch(executable_path=PROGRAM, args=["--no-sandbox", "--disable-gpu"])
        yield program
        program.close()


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return report(toy(HOSTILE), tmp_path_factory.mktemp("report") / "report.html", progress=False)


@pytest.fixture
def opened(browser, path):
    """Opens the report at a width; the page, what it asked for and what it complained of."""
    pages = []

    def start(width: int, **options):
        page = browser.new_page(viewport={"width": width, "height": 900}, **options)
        pages.append(page)
        asked: list[str] = []
        said: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.goto(path.as_uri())
        return page, asked, said

    yield start
    for page in pages:
        page.close()


def test_loads_alone_and_in_peace(opened, path):
    page, asked, said = opened(1280)
    page.wait_for_timeout(200)
    assert [url for url in asked if not url.startswith("data:")] == [path.as_uri()]
    assert said == []
    assert page.evaluate("window.hacked") is None
    assert page.inner_text("h1") == "AlSi2"
    # The policy of the page holds: a script that got in would neither run nor reach anything.
    page.evaluate(
        "() => { const s = document.createElement('script'); s.text = 'window.hacked = 2'; document.body.append(s); }"
    )
    assert page.evaluate("window.hacked") is None
    blocked = page.evaluate("fetch('http://127.0.0.1:9/').then(() => 'fetched', (error) => error.name)")
    assert blocked == "TypeError"
    assert any("Content Security Policy" in text for text in said)


def drawn(page, panel: str) -> np.ndarray:
    """What a panel looks like, (rows, columns, 3)."""
    from PIL import Image

    return np.array(Image.open(io.BytesIO(page.locator(panel).screenshot())).convert("RGB")).astype(int)


def differing(one: np.ndarray, other: np.ndarray) -> float:
    """Share of the pixels that differ visibly."""
    rows, columns = (min(a, b) for a, b in zip(one.shape[:2], other.shape[:2], strict=True))
    return float((np.abs(one[:rows, :columns] - other[:rows, :columns]).max(axis=2) > 12).mean())


def test_sliders_move_and_change_the_pictures(opened):
    page, _, said = opened(1280)
    for letter, n in zip("abc", (20, 24, 24), strict=True):
        slider = page.locator(f"#slice-{letter}")
        assert slider.get_attribute("aria-valuetext") == page.inner_text(f"#view-{letter} output")
        assert page.get_by_label(f"Across {letter}", exact=True).count() == 1
        seen = {}
        for name in ("mean", "std"):
            seen[name] = drawn(page, f"#view-{letter}-{name}")
        first = page.inner_text(f"#view-{letter} output")
        slider.focus()
        page.keyboard.press("ArrowRight")
        assert slider.input_value() == str(n // 2 + 1)
        text = page.inner_text(f"#view-{letter} output")
        assert text != first
        for _ in range(4):
            page.keyboard.press("ArrowRight")
        text = page.inner_text(f"#view-{letter} output")
        for name in ("mean", "std"):
            panel = page.locator(f"#view-{letter}-{name}")
            assert differing(drawn(page, f"#view-{letter}-{name}"), seen[name]) > 0.01, (letter, name)
            assert panel.get_attribute("aria-label").endswith(text)
        for _ in range(5):
            page.keyboard.press("ArrowLeft")
        for name in ("mean", "std"):
            assert differing(drawn(page, f"#view-{letter}-{name}"), seen[name]) < 0.002, (letter, name)
        page.keyboard.press("End")
        assert slider.input_value() == str(n - 1)
    assert said == []


def test_pointing_reads_the_field(opened):
    page, _, _ = opened(1280)
    grid, mean, aleatoric, epistemic = arrays()
    std = np.hypot(aleatoric, epistemic)
    page.locator("#slice-c").focus()
    page.keyboard.press("Home")
    plane = toy().slice(2, 0.0)
    panel = page.locator("#view-c-mean")
    panel.scroll_into_view_if_needed()
    page.wait_for_timeout(200)
    i, j = 7, 15
    x, y = (float(v[i, j]) for v in plane.coordinates())
    place = page.evaluate(
        """([x, y]) => {
          const view = JSON.parse(document.getElementById("report-data").textContent).views[2];
          const point = new DOMPoint(view.corner[0] + x * view.factor, view.corner[1] - y * view.factor);
          const seen = point.matrixTransform(document.getElementById("view-c-mean").getScreenCTM());
          return [seen.x, seen.y];
        }""",
        [x, y],
    )
    page.mouse.move(*place)
    found = re.match(r"(\S+) ± (\S+) e/Å³ at \((\S+), (\S+)\) Å", page.inner_text("#view-c .probe"))
    assert found, page.inner_text("#view-c .probe")
    value, sigma, at_x, at_y = (float(v.replace("−", "-")) for v in found.groups())
    assert value == pytest.approx(float(mean[i, j, 0]), abs=float(mean.max() - mean.min()) / 250)
    assert sigma == pytest.approx(float(std[i, j, 0]), abs=float(std.max()) / 250)
    assert (at_x, at_y) == pytest.approx((x, y), abs=0.11)
    # The colour on the screen is that of the value.
    from matplotlib import colormaps

    page.mouse.move(0, 0)
    page.evaluate("document.querySelectorAll('g.atoms').forEach((g) => g.remove())")
    box = panel.bounding_box()
    pixel = drawn(page, "#view-c-mean")[int(place[1] - box["y"]), int(place[0] - box["x"])]
    low = min(0.0, float(mean.min()))
    want = 255 * np.array(colormaps["viridis"]((mean[i, j, 0] - low) / (mean.max() - low))[:3])
    assert np.abs(pixel - want).max() < 12
    assert grid.shape == mean.shape


@pytest.mark.parametrize(("width", "scheme"), [(390, "light"), (390, "dark"), (1280, "dark")])
def test_fits_and_is_legible(opened, width, scheme):
    page, _, said = opened(width, color_scheme=scheme)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert said == []
    # Nothing but what scrolls by itself sticks out, and no text is too small to read.
    sticking = page.evaluate(
        """(width) => [...document.querySelectorAll("main *, header *")].filter((e) => !e.closest(".scroll, pre, svg")
          && e.getBoundingClientRect().right > width + 0.5).map((e) => e.outerHTML.slice(0, 80))""",
        width,
    )
    assert sticking == []
    smallest = page.evaluate(
        """() => Math.min(...[...document.querySelectorAll("p, td, th, dd, dt, li, output, svg text")]
          .filter((e) => e.getClientRects().length)
          .map((e) => parseFloat(getComputedStyle(e).fontSize) * (e.ownerSVGElement
            ? e.ownerSVGElement.getScreenCTM().a : 1)))"""
    )
    assert smallest >= 9.5
    for kind in ("--ink", "--soft", "--accent", "--grave"):
        assert _contrast(page, kind) >= 4.5, kind


def _contrast(page, name: str) -> float:
    """Contrast of a text colour with the paper, as WCAG counts it."""
    levels = []
    for variable in (name, "--paper"):
        code = page.evaluate(f"getComputedStyle(document.documentElement).getPropertyValue('{variable}')").strip()
        rgb = [int(code[k : k + 2], 16) / 255 for k in (1, 3, 5)]
        r, g, b = (v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in rgb)
        levels.append(0.2126 * r + 0.7152 * g + 0.0722 * b)
    return (max(levels) + 0.05) / (min(levels) + 0.05)
