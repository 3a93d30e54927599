"""The page: in a real Chromium, against the trace that it shows. Skipped where there is no Chromium."""

import base64
import html
import io
import json
import re

import numpy as np
import pytest
import torch
from axe_playwright_python.sync_playwright import Axe
from conftest import LAYOUT, ROOT, needs_chromium, wait_until
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lab.explain import page as pages
from lab.explain.__main__ import main
from lab.explain.trace import Stop, read
from magicmix import decode

HOSTILE = "</script><img src=x onerror=\"document.title='owned'\"> \u2028 <!-- & 'a' \"tiger\""
PROMPT, S = "a red xylophonist strawberry", {"red": -1.5}  # the third word has several tokens


def explain(folder, *arguments):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main([*map(str, arguments), "--quiet"]) == 0


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """A folder with the traces and pages of all tests here."""
    folder = tmp_path_factory.mktemp("pages")
    weights = [f"--token-weight={word}={s}" for word, s in S.items()]
    explain(folder, PROMPT, "--layout", LAYOUT, *weights, "--trace", "mix.safetensors", "--page", "mix.html")
    shared = ["--steps", "10", "--size", "64x72", "--every", "2"]
    explain(folder, "a tiger", "--layout-prompt", "a car", "--negative", "a dog", *shared, "--k-min", "0.2",
            "--trace", "text.safetensors", "--page", "text.html")  # fmt: skip
    explain(folder, HOSTILE, "--layout-prompt", HOSTILE, "--negative", HOSTILE, *shared, "--page", "hostile.html")
    for name, nu, k_max in (("a", 0.5, 0.6), ("b", 0.9, 0.8)):
        explain(folder, "a frog", "--layout", LAYOUT, "--steps", "10", "--size", "64", "--nu", nu, "--k-max", k_max,
                "--k-min", "0.2", "--guidance", "1", "--trace", f"{name}.safetensors")  # fmt: skip
    explain(folder, "--traces", "a.safetensors", "b.safetensors", "--page", "two.html")
    return folder


@pytest.fixture
def open_page(here, open_tab):
    """open_page(name, ...): one of the pages, opened in a tab that is watched."""
    return lambda name, **more: open_tab(here / f"{name}.html", "#maps canvas, #maps .note", **more)


def k_of(tab):
    return int(re.match(r"k = (\d+)", tab.inner_text("#readout"))[1])


def go(tab, index):
    """Moves the slider."""
    tab.evaluate("i => { slider.value = i; slider.dispatchEvent(new Event('input')); }".replace(
        "slider", "document.getElementById('slider')"), index)  # fmt: skip


def go_to(tab, run, k):
    """Moves the slider to a step of the trace."""
    places = tab.evaluate("JSON.parse(document.getElementById('data').textContent).positions")
    go(tab, places.index({"run": run, "k": k}))
    assert k_of(tab) == k


def picture(tab, selector):
    """The pixels of an <img>, as the file holds them."""
    source = tab.get_attribute(f"{selector} img", "src")
    kind, _, content = source.partition(",")
    assert kind == "data:image/jpeg;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(content))).convert("RGB"), dtype=int)


def grey(models, x):
    return np.asarray(decode(models, x)[0], dtype=int)


def apart(a, b):
    """The mean difference in grey levels."""
    return abs(a - b).mean()


# ------------------------------------------------------------------------------------------------------- moving about


def test_a_page_of_fifty_steps_is_small(here):
    assert len(read(here / "mix.safetensors").stops) == 31
    assert (here / "mix.html").stat().st_size < 8e6


@needs_chromium
def test_slider_keys_and_buttons(open_page):
    tab = open_page("mix")
    assert k_of(tab) == 29, "the first step of the mix is shown first"
    for key, k in (
        ("ArrowRight", 28),
        ("ArrowRight", 27),
        ("ArrowLeft", 28),
        ("End", 0),
        ("ArrowRight", 0),
        ("Home", 30),
    ):
        tab.keyboard.press(key)
        assert k_of(tab) == k
        assert tab.inner_text("#live").startswith(f"k = {k}, ")
        assert tab.get_attribute("#slider", "aria-valuetext").startswith(f"k = {k}, ")
    assert tab.is_disabled("#previous") and not tab.is_disabled("#next")
    tab.click("#next")
    tab.click("#next")
    tab.click("#previous")
    assert k_of(tab) == 29
    tab.focus("#slider")
    tab.keyboard.press("ArrowRight")  # once, though both the slider and the page know this key
    assert k_of(tab) == 28
    tab.focus("input[name=steps][value=this]")
    tab.keyboard.press("ArrowRight")  # chooses among the word maps, and leaves the step alone
    assert k_of(tab) == 28 and tab.is_checked("input[name=steps][value=all]")
    tab.click("#marks button >> nth=1")
    assert k_of(tab) == 4 and "mixing" in tab.inner_text("#readout")
    tab.click("#marks button >> nth=0")
    assert k_of(tab) == 30 and "start" in tab.inner_text("#readout")
    box = tab.locator("#bar").bounding_box()
    tab.mouse.click(box["x"] + 0.9 * box["width"], box["y"] + box["height"] / 2)
    assert k_of(tab) in (2, 3, 4) and "content" in tab.inner_text("#readout")
    tab.click(".strip button >> nth=0")
    assert k_of(tab) == 29


@needs_chromium
def test_playing_begins_when_asked_and_ends(open_page):
    tab = open_page("text", reduced_motion="reduce")
    tab.wait_for_timeout(500)
    first = tab.inner_text("#readout")
    assert tab.evaluate("document.getAnimations().length") == 0
    assert tab.evaluate("getComputedStyle(document.documentElement).scrollBehavior") == "auto"
    tab.keyboard.press(" ")
    assert tab.get_attribute("#play", "aria-label") == "Pause"
    wait_until(lambda: tab.inner_text("#readout") != first)
    tab.click("#play")
    there = tab.inner_text("#readout")
    tab.wait_for_timeout(500)
    assert tab.inner_text("#readout") == there and tab.get_attribute("#play", "aria-label") == "Play"
    tab.click("#play")
    wait_until(lambda: tab.get_attribute("#play", "aria-pressed") == "false")
    assert k_of(tab) == 0, "it stops at the end"


@needs_chromium
def test_touch(open_page):
    tab = open_page("mix", width=360, height=740, has_touch=True)
    tab.tap("#next")
    assert k_of(tab) == 28
    box = tab.locator("#bar").bounding_box()
    assert box["y"] > 500, "on a phone the slider lies where the thumb is"
    tab.touchscreen.tap(box["x"] + 0.5 * box["width"], box["y"] + box["height"] / 2)
    assert k_of(tab) in (14, 15, 16)


# ---------------------------------------------------------------------------------------- what it shows is the trace's


@needs_chromium
def test_pictures_are_the_decoded_trace(open_page, here, models):
    """At three steps of each phase: nearest to the decoded latent of this k, among those of the k's around, and as near
    as JPEG gets. The clean pictures come from a closed form."""
    tab, trace = open_page("mix"), read(here / "mix.safetensors")
    for k in (29, 12, 3):
        go_to(tab, "mix", k)
        stop = Stop("mix", k, "")
        a = trace.tensors["abar"][k + 1]
        before = trace.get(Stop("mix", k + 1, ""), "x")
        expected = {name: trace.get(stop, name) for name in ("x", "x_content", "x0", "layout")}
        for half in ("uncond", "cond"):
            expected[half] = (before - (1 - a) ** 0.5 * trace.get(stop, f"e_{half}")) / a**0.5
        for name, selector in (("x", ".x"), ("x_content", ".x-content"), ("layout", ".row .layout"),
                               ("x0", ".expected"), ("x0", ".guided"), ("uncond", ".uncond"),
                               ("cond", ".cond")):  # fmt: skip
            if expected[name] is None:  # below K_min
                assert "no layout is mixed in any more" in tab.inner_text(f"{selector} .empty")
                continue
            shown = picture(tab, selector)
            own = apart(shown, grey(models, expected[name]))
            assert own <= 3, (k, name)
            if name in ("x", "x_content", "x0"):
                others = [trace.get(Stop("mix", n, ""), name) for n in (k + 1, k - 1)] if k < 29 else []
                assert all(apart(shown, grey(models, x)) > 1.2 * own for x in others), (k, name)
        if k == 3:
            assert "nothing was blended" in tab.inner_text(".apart .empty")
        else:
            difference = abs(grey(models, expected["x"]) - grey(models, expected["x_content"]))
            gain = int(re.search(r"(\d+) × brighter", tab.inner_text(".apart"))[1])
            assert gain > 1 and apart(picture(tab, ".apart"), (difference * gain).clip(max=255)) <= 5  # one level is 16
    go_to(tab, "mix", 30)
    assert apart(picture(tab, ".x"), grey(models, trace.tensors["mix/030/x"])) <= 3
    assert (picture(tab, ".x") == picture(tab, ".row .layout")).all(), "x at K_max is the layout"


@needs_chromium
def test_numbers_are_the_traces(open_page, here):
    tab, trace = open_page("mix"), read(here / "mix.safetensors")
    for k in (29, 12, 3):
        go_to(tab, "mix", k)
        stop, text = Stop("mix", k, ""), tab.inner_text("#equations")
        lines = {line.split("\n")[0]: line for line in tab.locator("#equations li").all_inner_texts()}
        norms = {f"x{k}": "x", f"x′{k}": "x_content", f"layout{k}": "layout", "x̂0": "x0", "ε̂": "e"}
        for name, tensor in norms.items():
            found = re.findall(rf"‖\s*{name}\s*‖\s*([\d.]+)", text.replace("\n", ""))
            expected = trace.get(stop, tensor)
            assert found == ([] if expected is None else [f"{expected.norm().item():.1f}"]), (k, name)
        a, before = trace.tensors["abar"][k].item(), trace.tensors["abar"][k + 1].item()
        assert f"{a**0.5:.3f} x̂0 + {(1 - a) ** 0.5:.3f} ε̂" in lines["one DDIM step"]
        assert f"− {(1 - before) ** 0.5:.3f} ε̂) / {before**0.5:.3f}" in lines["the clean latent that this implies"]
        assert f"the model at t = {trace.tensors['t'][k + 1]}, with guidance" in lines
        if k >= 8:
            assert f"= 0.7 x′{k} + 0.3 layout{k}" in lines["the mixture"]
            assert f"= {a**0.5:.3f} x0 + {(1 - a) ** 0.5:.3f} ε" in lines["the layout at the same noise level"]
        else:
            assert "mixing has ended: the content is alone" in lines and "the mixture" not in lines


@needs_chromium
def test_the_running_line(open_page):
    """Marked lines carry the numbers and the text that they have in magicmix.py."""
    file = (ROOT / "magicmix.py").read_text().splitlines()
    tab = open_page("text")
    marks = {
        ("layout", 9): "x, x0 = denoise(x, k)",
        ("mix", 6): "x = layout(K_max)",
        ("mix", 4): "x = nu * x_content + (1 - nu) * layout_k",
        ("mix", 0): "x = x_content",
    }
    for (run, k), line in marks.items():
        go_to(tab, run, k)
        marked = tab.locator("#source li.marked")
        number = int(marked.get_attribute("data-line"))
        assert file[number - 1].strip() == line and marked.get_attribute("aria-current") == "step"
        assert marked.inner_text().removeprefix(str(number)).strip() == line
        for row in tab.locator("#source li").all():
            number = int(row.get_attribute("data-line"))
            assert row.inner_text().strip().removeprefix(str(number)).strip() == file[number - 1].strip()
        ran = " ".join(tab.locator("#source li.ran").all_inner_texts())
        assert ('"content"' in ran) == (k == 0) and ("layout_k" in ran) == (k == 4)


def heat_of(tab, word, kind="word"):
    """How warm (above 0) or cool each pixel of a word's map is: red minus blue, where the picture below is grey."""
    return np.array(tab.evaluate(
        """([word, kind]) => {
            const canvas = [...document.querySelectorAll("#maps canvas")]
              .find((c) => c.dataset.word === word && c.dataset.kind === kind);
            const {data} = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
            return Array.from({length: canvas.height}, (_, i) => Array.from({length: canvas.width},
              (_, j) => data[4 * (i * canvas.width + j)] - data[4 * (i * canvas.width + j) + 2]));
        }""", [word, kind]), dtype=float)  # fmt: skip


def choose(tab, **choices):
    for name, value in choices.items():
        tab.check(f"input[name={name}][value='{value}']", force=True)
    tab.wait_for_timeout(150)


def same_place(heat, m):
    """The correlation of a drawn map with a trace's (H, W), and whether it is warmest where the trace's is within 3 %
    of its highest."""
    cell = heat.shape[0] // m.shape[0], heat.shape[1] // m.shape[1]
    middle = heat[cell[0] // 2 :: cell[0], cell[1] // 2 :: cell[1]]
    return np.corrcoef(middle.ravel(), m.numpy().ravel())[0, 1], m.flatten()[middle.argmax()] >= 0.97 * m.max()


@needs_chromium
def test_a_words_map_is_where_the_trace_says(open_page, here):
    tab, trace = open_page("mix"), read(here / "mix.safetensors")
    places = {word: places for word, places in trace.facts["words"]["prompt"]}
    assert list(places) == PROMPT.split() and len(places["xylophonist"]) > 1
    layers = trace.facts["layers"]

    def map_of(word, half, size, steps):
        maps = [trace.get(Stop("mix", k, ""), f"maps/{half}/{layer}")[0] for k in steps for layer in layers]
        return torch.stack([m[..., places[word]].sum(dim=-1) for m in maps if m.shape[0] == size]).mean(dim=0)

    for k in (25, 5):
        go_to(tab, "mix", k)
        for half, word, size in (("cond", "strawberry", 8), ("cond", "xylophonist", 16), ("cond", "strawberry", 4)):
            choose(tab, half=half, steps="this", size=f"{size}x{size}")
            correlation, same = same_place(heat_of(tab, word), map_of(word, half, size, [k]))
            assert correlation > 0.97 and same, (k, half, word, size)
        choose(tab, half="uncond", size="16x16")
        correlation, _ = same_place(heat_of(tab, "strawberry", "place"), map_of("strawberry", "uncond", 16, [k]))
        assert correlation > 0.97
        assert tab.inner_text("#maps figure >> nth=1").split("\n")[:2] == ["red", "here: padding"]
        choose(tab, half="weighted", size="8x8")
        correlation, _ = same_place(-heat_of(tab, "red"), map_of("red", "cond", 8, [k]))
        assert correlation > 0.9 and heat_of(tab, "red").mean() < 0 < heat_of(tab, "strawberry").mean()
        low, high = (-1.5 * v for v in map_of("red", "cond", 8, [k]).aminmax())
        assert f"{low.item():.3g}".replace("-", "−")[:5] in tab.inner_text("#maps figure >> nth=1")
        assert "s = −1.5" in tab.inner_text("#maps figure >> nth=1")
    choose(tab, half="cond", steps="all", size="8x8")
    correlation, same = same_place(heat_of(tab, "strawberry"), map_of("strawberry", "cond", 8, range(30)))
    assert correlation > 0.97 and same
    choose(tab, size="all")
    expected = torch.stack([
        torch.nn.functional.interpolate(m[..., places["strawberry"]].sum(dim=-1)[None, None], size=(16, 16),
                                        mode="bilinear")[0, 0]
        for k in range(30) for layer in layers for m in trace.get(Stop("mix", k, ""), f"maps/cond/{layer}")
    ]).mean(dim=0)  # fmt: skip
    correlation, same = same_place(heat_of(tab, "strawberry"), expected)
    assert correlation > 0.97 and same


@needs_chromium
def test_both_halves_of_a_negative_prompt(open_page):
    tab = open_page("text")
    choose(tab, half="uncond")
    words = [text.split("\n")[:2] for text in tab.locator("#maps figure").all_inner_texts()]
    assert [word for word, _ in words] == ["a", "tiger", "a", "dog", "start token", "end and padding"]
    assert words[1] == ["tiger", "here: dog"]
    go_to(tab, "layout", 9)
    choose(tab, half="cond")
    assert tab.locator("#maps figure").all_inner_texts()[1].startswith("car")


@needs_chromium
def test_two_traces(open_page, here, models):
    tab = open_page("two")
    traces = [read(here / f"{name}.safetensors") for name in "ab"]
    names = tab.locator("#pictures .name").all_inner_texts()
    assert [re.sub(r"\s+", "", name) for name in names] == ["Ak_max0.6,nu0.5", "Bk_max0.8,nu0.9"]
    assert tab.get_attribute("#slider", "max") == "8"
    for k, shown in ((8, (6, 8)), (7, (6, 7)), (5, (5, 5)), (1, (1, 1))):
        go_to(tab, "mix", k)
        for i, (trace, at) in enumerate(zip(traces, shown)):
            selector = f"#pictures .side >> nth={i} >> .x"
            assert apart(picture(tab, selector), grey(models, trace.tensors[f"mix/{at:03}/x"])) <= 3
    assert tab.locator("#marks button").count() == 4
    tab.click("#marks button:has-text('A') >> nth=0")
    assert k_of(tab) == 6
    assert "nu" in tab.inner_text("#options tr.differs >> nth=1")


# ----------------------------------------------------------------------------------------------------- whoever reads it


@needs_chromium
@pytest.mark.parametrize("name", ["mix", "text", "two"])
def test_accessible(open_page, name):
    """axe-core: nothing serious, in light and dark, at a desk and on a phone."""
    for scheme, width in (("light", 1280), ("dark", 1280), ("light", 360)):
        tab = open_page(name, width=width, height=800, color_scheme=scheme)
        found = Axe().run(tab).response["violations"]
        serious = [(v["id"], v["nodes"][0]["html"]) for v in found if v["impact"] in ("serious", "critical")]
        assert serious == []


@needs_chromium
def test_light_and_dark(open_page):
    paper = {}
    for scheme in ("light", "dark"):
        tab = open_page("text", color_scheme=scheme)
        colour = tab.evaluate("getComputedStyle(document.documentElement).backgroundColor")
        paper[scheme] = sum(map(int, re.findall(r"\d+", colour))) / 3
    assert paper["light"] > 200 and paper["dark"] < 60


@needs_chromium
@pytest.mark.parametrize("width", [360, 600, 800, 1000, 1600])
def test_no_width_overflows(open_page, width):
    for name in ("mix", "two", "hostile"):
        tab = open_page(name, width=width, height=740)
        for index in (0, 3, 5):
            go(tab, index)
            assert tab.evaluate("document.documentElement.scrollWidth") <= width, (name, index)


@needs_chromium
def test_a_hostile_prompt_stays_text(open_page):
    tab = open_page("hostile")
    assert tab.title().startswith("Inside a mix: </script><img src=x") and "owned" not in tab.title().split(":")[0]
    assert tab.locator("img[src=x]").count() == 0 and tab.locator("script").count() == 2
    assert tab.inner_text(".recipe .quote >> nth=1") == f"“{HOSTILE}”".replace("\u2028", tab.inner_text(
        ".recipe .quote >> nth=1")[tab.inner_text(".recipe .quote >> nth=1").index("> ") + 2])  # fmt: skip
    for index in (0, 5, 9):
        go(tab, index)
    choose(tab, half="uncond", steps="all")
    assert "onerror" in tab.inner_text("#maps") and tab.evaluate("document.title").startswith("Inside a mix")


@needs_chromium
def test_a_hostile_trace_stays_text(here, open_page):
    """A trace may come from anybody: what its metadata says is shown as text too."""
    with safe_open(here / "text.safetensors", "pt") as file:
        facts = json.loads(file.metadata()["magicmix"])
    facts["words"]["prompt"] = [[HOSTILE, [1]], ["tiger", [2]]]
    facts["parameters"] |= {"layout_prompt": HOSTILE, "negative": HOSTILE}
    save_file(load_file(here / "text.safetensors"), here / "evil.safetensors", {"magicmix": json.dumps(facts)})
    explain(here, "--traces", "evil.safetensors", "--page", "evil.html", "--every", "9")
    tab = open_page("evil")
    assert tab.locator("img[src=x]").count() == 0 and tab.locator("script").count() == 2
    assert "onerror" in tab.inner_text("#maps") and "onerror" in tab.inner_text("#options")


# -------------------------------------------------------------------------------------------------- without a browser


def data_of(path):
    text = path.read_text()
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)[1])


def test_every_and_row(here, tmp_path):
    """Of the steps every N-th is kept, with the first and the last of each phase; of a batch one picture."""
    stops = data_of(here / "text.html")["sides"][0]["stops"]
    assert [(stop["run"], stop["k"]) for stop in stops] == [
        *(("layout", k) for k in (10, 9, 8, 6, 4, 2)), *(("mix", k) for k in (6, 5, 4, 2, 1, 0))]  # fmt: skip
    shared = ["a frog", "--layout", LAYOUT, "--steps", "3", "--size", "64", "--every", "3"]
    explain(tmp_path, *shared, "--count", "2", "--seed", "7", "--row", "1", "--page", "row.html")
    explain(tmp_path, *shared, "--seed", "8", "--page", "alone.html")
    row, alone = (data_of(tmp_path / f"{name}.html")["sides"][0] for name in ("row", "alone"))
    assert row["stops"][-1]["norms"] == pytest.approx(alone["stops"][-1]["norms"], rel=1e-3)


def test_the_same_trace_makes_the_same_page(here, tmp_path):
    for name in ("one", "two"):
        explain(tmp_path, "--traces", here / "a.safetensors", "--every", "4", "--page", f"{name}.html")
    assert (tmp_path / "one.html").read_bytes() == (tmp_path / "two.html").read_bytes()


def test_nothing_but_the_file(here):
    """No address in it, and a policy that forbids any."""
    text = (here / "mix.html").read_text()
    outside = re.sub(r'<script type="application/json".*?</script>', "", text, flags=re.DOTALL)
    assert not re.findall(r"https?://|//[a-z]+\.|@import|url\(", outside)
    outside = html.unescape(outside)
    assert "default-src 'none'; img-src data:; style-src 'sha256-" in outside


MAPS = "mix/003/maps/cond/mid_block.attentions.0.transformer_blocks.0.attn2"
OF_ANOTHER = {"unet": "another"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors, facts: tensors.pop("mix/003/e_cond"), "the trace lacks 'mix/003/e_cond'"),
        (lambda tensors, facts: tensors.pop(MAPS), f"the trace lacks '{MAPS}'"),
        (
            lambda tensors, facts: tensors.update({MAPS: torch.ones(1, 2, 2, 3)}),
            f"{MAPS} is not of shape (1, H, W, 32)",
        ),
        (lambda tensors, facts: tensors.update({"mix/003/x": torch.ones(2)}), "mix/003/x is not of shape (1, 4, 8, 8)"),
        (lambda tensors, facts: facts["words"]["prompt"].append(["far", [99]]), "not within its 32 tokens"),
        (lambda tensors, facts: facts.update(checkpoint=OF_ANOTHER), "was made with another checkpoint"),
        (lambda tensors, facts: facts.update(T=5000), "steps 5000 is out of range"),
    ],
)
def test_traces_that_no_page_can_be_made_of(here, tmp_path, capsys, change, message):
    with safe_open(here / "a.safetensors", "pt") as file:
        facts = json.loads(file.metadata()["magicmix"])
    tensors = load_file(here / "a.safetensors")
    change(tensors, facts)
    save_file(tensors, tmp_path / "changed.safetensors", {"magicmix": json.dumps(facts)})
    assert main(["--traces", str(tmp_path / "changed.safetensors"), "--page", str(tmp_path / "p.html"), "--quiet"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and message in error and not (tmp_path / "p.html").exists()


def test_a_mix_without_a_step_has_a_page(tmp_path):
    """K_max = 0: the result is the layout itself."""
    shared = ["a frog", "--steps", "3", "--size", "64", "--k-max", "0", "--k-min", "0"]
    explain(tmp_path, *shared, "--layout", LAYOUT, "--page", "image.html", "--trace", "t.safetensors")
    explain(tmp_path, *shared, "--layout-prompt", "a car", "--page", "text.html")
    assert [(s["run"], s["k"]) for s in data_of(tmp_path / "image.html")["sides"][0]["stops"]] == [("mix", 0)]
    assert data_of(tmp_path / "text.html")["sides"][0]["stops"][-1]["k"] == 0


@needs_chromium
def test_a_page_without_a_step_works(here, open_page):
    still = ["--steps", "3", "--size", "64", "--k-max", "0", "--k-min", "0"]
    explain(here, "a frog", "--layout", LAYOUT, *still, "--page", "still.html")
    tab = open_page("still")
    assert k_of(tab) == 0 and tab.is_disabled("#next") and tab.is_disabled("#previous")
    tab.keyboard.press(" ")
    assert k_of(tab) == 0


def test_large_maps_and_pictures_are_shrunk():
    m = torch.arange(64 * 48.0).reshape(1, 64, 48)
    assert torch.equal(pages.shrunk(m), m.unfold(1, 2, 2).unfold(2, 2, 2).mean(dim=(-1, -2)))
    assert pages.shrunk(m[:, :32, :7]).shape == (1, 32, 7)
    assert Image.open(io.BytesIO(pages.jpeg(Image.new("RGB", (512, 768))))).size == (192, 288)
    assert Image.open(io.BytesIO(pages.jpeg(Image.new("RGB", (128, 64))))).size == (128, 64)
    noise = np.random.default_rng(0).integers(0, 256, (320, 320, 3), dtype=np.uint8)
    assert Image.open(io.BytesIO(pages.jpeg(Image.fromarray(noise)))).size == (288, 288)
