"""The page of a sweep: in a real Chromium, against the folder that it shows. Skipped where there is no Chromium."""

import base64
import html
import io
import json
import re
import shlex

import numpy as np
import pytest
from axe_playwright_python.sync_playwright import Axe
from conftest import LAYOUT, ROOT, needs_chromium, wait_until
from PIL import Image

from lab.sweep import page as pages
from lab.sweep.__main__ import main

HOSTILE = "</script><img src=x onerror=\"document.title='owned'\"> \u2028 <!-- & 'a' \"tiger\""
FAST = ["--steps", "4", "--size", "32", "--quiet"]


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """A folder with the sweeps of all tests here: one with failed cells and two prompts, and one of a single cell."""
    folder = tmp_path_factory.mktemp("sweeps")
    grid = ["a tiger", HOSTILE, "--layout", LAYOUT, "--nu", "0.2,0.5,0.8", "--k-min", "0.2,0.7", "--seeds", "0..2"]
    assert main([*map(str, grid), *FAST, "-o", str(folder / "grid")]) == 1  # K_min 0.7 is above K_max
    assert main(["a tiger", "--layout", str(LAYOUT), *FAST, "--k-min", "0.2", "-o", str(folder / "one")]) == 0
    return folder


@pytest.fixture
def open_page(here, open_tab):
    """open_page(name, ...): one of the pages, opened in a tab that is watched."""
    return lambda name, **more: open_tab(here / name / "page.html", "#grid .tile", **more)


def index(folder):
    return [json.loads(line) for line in (folder / "index.jsonl").read_text().splitlines()]


def pixels(source):
    kind, _, content = source.partition(",")
    assert kind == "data:image/jpeg;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(content))).convert("RGB"), dtype=int)


def table(tab):
    """The labels of the columns and rows, and the alternative texts of what stands in each cell."""
    return tab.evaluate(
        """() => ({
            columns: [...document.querySelectorAll("thead th")].map((th) => th.textContent),
            rows: [...document.querySelectorAll("tbody th")].map((th) => th.textContent),
            cells: [...document.querySelectorAll("tbody tr")].map((tr) => [...tr.querySelectorAll("td")].map((td) =>
              [...td.querySelectorAll(".tile")].map((t) => t.querySelector("img")?.alt ?? t.textContent))),
        })"""
    )


def choose(tab, **axes):
    for name, label in axes.items():
        tab.focus(f"#{name}")
        tab.select_option(f"#{name}", label=label)


@needs_chromium
def test_the_table_at_first(open_page, here):
    """The two innermost axes but for the seeds, with the picture of each cell."""
    tab = open_page("grid")
    shown = table(tab)
    assert shown["columns"] == ["nu 0.2", "nu 0.5", "nu 0.8"] and shown["rows"] == ["k-min 0.2", "k-min 0.7"]
    assert shown["cells"][0][1] == ["a tiger, k-min 0.2, nu 0.5, seed 0"]
    assert tab.inner_text("#count") == "6 of 36 cells, with a tiger, seed 0."
    (line,) = [x for x in index(here / "grid") if x["options"].items() >= {
        "prompt": "a tiger", "k_min": 0.2, "nu": 0.5, "seed": 0}.items()]  # fmt: skip
    ours = np.asarray(Image.open(here / "grid" / line["picture"]), dtype=int)
    src = tab.get_attribute("tbody tr >> nth=0 >> td >> nth=1 >> img", "src")
    assert abs(pixels(src) - ours).mean() <= 4


@needs_chromium
def test_axes_and_filters(open_page):
    tab = open_page("grid")
    choose(tab, down="seed")
    shown = table(tab)
    assert shown["rows"] == ["seed 0", "seed 1", "seed 2"] and len(shown["cells"][2][2]) == 1
    tab.click("#turn")
    assert table(tab)["columns"] == ["seed 0", "seed 1", "seed 2"]
    tab.uncheck(f"input[data-axis='{axis(tab, 'nu')}'][data-value='1']")
    assert table(tab)["rows"] == ["nu 0.2", "nu 0.8"]
    tab.click("button[aria-label='all of prompt']")
    assert [len(cell) for cell in table(tab)["cells"][0]] == [2, 2, 2], "both prompts stand side by side"
    tab.click("button[aria-label='only the first of prompt']")
    choose(tab, across="nothing")
    shown = table(tab)
    assert shown["columns"] == []
    assert shown["cells"] == [[["a tiger, k-min 0.2, nu 0.2, seed 0"]], [["a tiger, k-min 0.2, nu 0.8, seed 0"]]]
    choose(tab, across="nu")  # it leaves the rows
    assert table(tab)["rows"] == [] and tab.input_value("#down") == "-1"


def axis(tab, name):
    names = tab.evaluate("JSON.parse(document.getElementById('data').textContent).axes.map((axis) => axis.name)")
    return names.index(name)


@needs_chromium
def test_zoom(open_page):
    tab = open_page("grid")
    width = lambda: tab.locator(".tile").first.bounding_box()["width"]
    before = width()
    tab.focus("#side")
    tab.keyboard.press("End")
    assert width() == 2 * 288 > before


@needs_chromium
def test_keys_and_the_command_to_copy(open_page, here):
    tab = open_page("grid", permissions=["clipboard-read", "clipboard-write"])
    tab.focus(".tile >> nth=0")
    for key, alt in (
        ("ArrowRight", "nu 0.5"),
        ("ArrowRight", "nu 0.8"),
        ("ArrowRight", "nu 0.8"),
        ("ArrowLeft", "nu 0.5"),
    ):
        tab.keyboard.press(key)
        assert alt in tab.evaluate("document.activeElement.querySelector('img').alt")
    tab.keyboard.press("ArrowDown")
    assert "k-min 0.7" in tab.evaluate("document.activeElement.textContent")
    tab.keyboard.press("ArrowUp")
    tab.keyboard.press("Enter")
    assert tab.locator("#one").is_visible() and "nu 0.5" in tab.inner_text("#one-title")
    (line,) = [x for x in index(here / "grid") if x["options"].items() >= {
        "prompt": "a tiger", "k_min": 0.2, "nu": 0.5, "seed": 0}.items()]  # fmt: skip
    command = tab.inner_text("#command")
    assert shlex.split(command) == shlex.split(line["command"])
    tab.click("#copy")
    wait_until(lambda: tab.inner_text("#copied") == "copied")
    assert tab.evaluate("navigator.clipboard.readText()") == line["command"]
    assert "2 of 3" in tab.inner_text("#batch"), "two calls with the three seeds"
    tab.keyboard.press("ArrowRight")
    assert "nu 0.8" in tab.inner_text("#one-title")
    tab.keyboard.press("ArrowRight")
    assert "k_min 0.7 is above k_max 0.6" in tab.inner_text("#large"), "a failed cell has its reason"
    tab.keyboard.press("Escape")
    assert not tab.locator("#one").is_visible()
    # The cell seen last has the focus; the dialog's end is told to the page a moment later.
    wait_until(lambda: "k-min 0.7" in tab.evaluate("document.activeElement.textContent"))


@needs_chromium
def test_failed_cells_are_listed(open_page):
    tab = open_page("grid")
    assert tab.locator("#failed").is_visible()
    reasons = tab.locator("#reasons li").all_inner_texts()
    assert len(reasons) == 18 and all("k_min 0.7 is above k_max 0.6" in reason for reason in reasons)
    assert tab.locator(".tile .none").count() == 3
    assert open_page("one").locator("#failed").is_hidden()


@needs_chromium
@pytest.mark.parametrize("name", ["grid", "one"])
def test_accessible(open_page, name):
    """axe-core: nothing serious, in light and dark, at a desk and on a phone, and in the dialog."""
    for scheme, width in (("light", 1280), ("dark", 1280), ("light", 360)):
        tab = open_page(name, width=width, height=800, color_scheme=scheme)
        for is_open in (False, True):
            if is_open:
                tab.click(".tile >> nth=0")
            found = Axe().run(tab).response["violations"]
            assert [(v["id"], v["nodes"][0]["html"]) for v in found if v["impact"] in ("serious", "critical")] == []


@needs_chromium
def test_light_and_dark(open_page):
    paper = {}
    for scheme in ("light", "dark"):
        tab = open_page("one", color_scheme=scheme)
        colour = tab.evaluate("getComputedStyle(document.documentElement).backgroundColor")
        paper[scheme] = sum(map(int, re.findall(r"\d+", colour))) / 3
    assert paper["light"] > 200 and paper["dark"] < 60


@needs_chromium
@pytest.mark.parametrize("width", [360, 800, 1600])
def test_no_width_overflows(open_page, width):
    tab = open_page("grid", width=width, height=740)
    tab.click("button[aria-label='all of prompt']")
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    tab.click(".tile >> nth=1")
    assert tab.evaluate("document.querySelector('dialog').scrollWidth") <= width


@needs_chromium
def test_a_hostile_prompt_stays_text(open_page):
    tab = open_page("grid")
    tab.click("button[aria-label='all of prompt']")
    tab.click(".tile >> nth=1")
    assert "onerror" in tab.inner_text("#options") and "onerror" in tab.inner_text("#command")
    assert tab.title().startswith("A sweep of mixes") and tab.locator("img[src=x]").count() == 0
    assert tab.locator("script").count() == 2


def test_nothing_but_the_file(here):
    """No address in it, and a policy that forbids any."""
    text = (here / "grid" / "page.html").read_text()
    outside = re.sub(r'<script type="application/json".*?</script>', "", text, flags=re.DOTALL)
    assert not re.findall(r"https?://|//[a-z]+\.|@import|url\(", outside)
    assert "default-src 'none'; img-src data:; style-src 'sha256-" in html.unescape(outside)


def test_the_same_folder_makes_the_same_page(here):
    before = (here / "one" / "page.html").read_bytes()
    assert main(["a tiger", "--layout", str(LAYOUT), *FAST, "--k-min", "0.2", "-o", str(here / "one")]) == 0
    assert (here / "one" / "page.html").read_bytes() == before


def test_pages_of_many_pictures_stay_small(tmp_path):
    """Smaller pictures the more there are; measured on noise, which compresses worst."""
    assert pages.side_of(1) == 288 and pages.side_of(100_000) == 32
    sides = [pages.side_of(count) for count in (1, 10**3, 10**4, 10**5)]
    assert sides == sorted(sides, reverse=True)
    noise = np.random.default_rng(0).integers(0, 256, (512, 512, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "noise.png")
    picture = Image.open(ROOT / "docs" / "layouts" / "castle.png").convert("RGB")
    picture.resize((512, 512), Image.Resampling.LANCZOS).save(tmp_path / "picture.png")
    for name, per_pixel in (("noise", 3), ("picture", pages.PER_PIXEL)):
        coded = base64.b64decode(pages.encoded(tmp_path / f"{name}.png", 192))
        assert Image.open(io.BytesIO(coded)).size == (192, 192) and len(coded) <= per_pixel * 192**2
