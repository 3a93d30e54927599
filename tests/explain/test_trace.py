"""The trace: against an unrecorded mix, the UNet called again, and diffusers' maps; its bytes; comparing two."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import diffusers
import pytest
import torch
from conftest import LAYOUT, PRECIOUS, ROOT, TINY, contents, randomise, relative_error
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_parity import UNETS

import attention
import weights
from command import options
from command.pictures import fit, open_layout
from lab.explain.__main__ import main
from lab.explain.compare import BEFORE, compare, names_of, parting
from lab.explain.maps import maps_of, output_of, words_of
from lab.explain.trace import LATENTS, Recorder, Stop, Trace, read
from magicmix import Denoiser, Noise, magicmix
from scheduler import Schedule
from unet import UNet2DConditionModel, UNetConfig

SIZE, SEEDS = (72, 104), (3, 4)  # height and width in pixels: latents of odd sides, 9 x 13; a batch of 2
PROMPT, NEGATIVE, S = "a red strawberry", "a watermelon", {"strawberry": -1.5, "red": 2.0}
GIVEN = dict(steps=8, k_max=0.75, k_min=0.25, nu=0.6, guidance=4.0, negative=NEGATIVE, token_weights=S)


def layout_of(source):
    return "a house" if source == "text" else fit(open_layout(LAYOUT).picture, SIZE)


def recorded(models, source="image", **given):
    """The trace of a short mix, and its Steps."""
    recorder_only = {n: given.pop(n) for n in ("modules", "heads", "map_dtype") if n in given}
    o = options.of_mix(models.defaults, GIVEN | {"size": SIZE} | given)
    noise = Noise(SEEDS, (SIZE[0] // 8, SIZE[1] // 8), models.device)
    recorder = Recorder(models, PROMPT, layout_of(source), o, Noise(SEEDS, (9, 13), models.device)(), **recorder_only)
    mixing = {n: v for n, v in o.only(options.MIXING).items() if v is not None}
    steps = list(recorder.follow(magicmix(models, PROMPT, layout_of(source), noise=noise, **mixing)))
    return recorder.trace(parameters={"prompt": PROMPT}), steps


@pytest.fixture(scope="module")
def traces(models):
    return {source: recorded(models, source) for source in ("image", "text")}


# -------------------------------------------------------------------------------------------- the second path to M


@pytest.mark.parametrize("kind", ["embedded", "sd2"])
@torch.no_grad()
def test_the_explicit_maps_give_the_fused_output(models, kind):
    """In every cross-attention of a UNet, for both halves and s of both signs: rows sum to 1 within 1e-6, and
    M diag(s) V through to_out is what the fused module returned, within 1e-5."""
    torch.manual_seed(0)
    unet = models.unet if kind == "embedded" else randomise(UNet2DConditionModel(UNetConfig(**UNETS["sd2"])), seed=1)
    length, width = 7, unet.config.cross_attention_dim
    g = torch.Generator().manual_seed(2)
    x, context = torch.randn(4, 4, 9, 13, generator=g), torch.randn(4, length, width, generator=g)
    s = torch.cat([torch.ones(2, length), torch.tensor([[1.0, -2.0, 0.5, 0.0, 3.0, -0.7, 1.0]] * 2)])
    seen, errors = [], []

    def look(module, arguments, output):
        y, text, weights = arguments
        maps = maps_of(module, y, text)
        seen.append(tuple(maps.shape))
        assert maps.dtype == torch.float32 and (maps >= 0).all()
        assert (maps.sum(dim=-1) - 1).abs().max() <= 1e-6
        errors.append([relative_error(output_of(module, maps, text, weights)[i : i + 2], output[i : i + 2])
                       for i in (0, 2)])  # fmt: skip
        without = relative_error(output_of(module, maps, text, None)[2:], output[2:])
        assert without > 1e-2, "s makes no difference: this test would not see it"

    handles = [m.register_forward_hook(look) for n, m in unet.named_modules() if n.endswith("attn2")]
    unet(x, torch.tensor([981, 1] * 2), context, s)
    for handle in handles:
        handle.remove()
    assert max(max(e) for e in errors) <= 1e-5
    cross = [m for m in unet.modules() if isinstance(m, attention.BasicTransformerBlock)]
    assert len(seen) == len(cross) > 3 and len({shape[2] for shape in seen}) > 1


@torch.no_grad()
def test_recorded_maps_are_diffusers_own(models, traces):
    """The first step's maps of both halves, mean over heads, from diffusers' UNet with its explicit softmax."""
    trace, _ = traces["image"]
    unet, found = diffusers.UNet2DConditionModel.from_pretrained(TINY / "unet"), {}

    class Look:
        def __init__(self, name):
            self.name = name

        def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, **_):
            context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
            q, k, v = (attn.head_to_batch_dim(f(y)) for f, y in
                       ((attn.to_q, hidden_states), (attn.to_k, context), (attn.to_v, context)))  # fmt: skip
            m = attn.get_attention_scores(q, k)  # (2B h, N, L)
            if encoder_hidden_states is not None:
                found[self.name.removesuffix(".processor")] = m.unflatten(0, (-1, attn.heads)).mean(dim=1)
                m[len(m) // 2 :] *= trace.tensors["prompt/weights"]
            return attn.to_out[0](attn.batch_to_head_dim(torch.bmm(m, v)))

    unet.set_attn_processor({name: Look(name) for name in unet.attn_processors})
    stop, states = trace.stops[1], [trace.tensors[f"{text}/states"] for text in ("negative", "prompt")]
    x = trace.get(trace.stops[0], "x")
    output = unet(torch.cat([x, x]), trace.tensors["t"][stop.k + 1], torch.stack(states).repeat_interleave(2, 0)).sample
    assert relative_error(trace.get(stop, "e_uncond"), output[:2]) <= 1e-5
    assert relative_error(trace.get(stop, "e_cond"), output[2:]) <= 1e-5
    assert set(found) == set(trace.facts["layers"])
    for name, maps in found.items():
        for half, m in zip(("uncond", "cond"), maps.chunk(2)):
            ours = trace.get(stop, f"maps/{half}/{name}")
            assert relative_error(ours.flatten(1, 2), m) <= 1e-5
            assert (ours.sum(dim=-1) - 1).abs().max() <= 1e-6
    apart = trace.get(stop, "maps/cond/mid_block.attentions.0.transformer_blocks.0.attn2")
    assert relative_error(apart, trace.get(stop, "maps/uncond/mid_block.attentions.0.transformer_blocks.0.attn2")) > 0.1


# ------------------------------------------------------------------------------------------------------- what is in it


@pytest.mark.parametrize("source", ["image", "text"])
@pytest.mark.parametrize("given", [{}, {"sampler": "ddpm"}, {"eta": 0.5, "guidance": 1.0, "token_weights": None}])
def test_a_trace_is_the_mix_that_nobody_records(models, traces, source, given):
    trace, _ = recorded(models, source, **given) if given else traces[source]
    mixing = {n: v for n, v in (GIVEN | given).items() if v is not None}
    steps = list(magicmix(models, PROMPT, layout_of(source), seeds=SEEDS, **mixing, size=SIZE))
    stops = [stop for stop in trace.stops if stop.phase != "start"]
    assert [(stop.k, stop.phase) for stop in stops] == [(step.k, step.phase) for step in steps]
    schedule, guidance = Schedule(models.schedule, 8), mixing["guidance"]
    assert trace.tensors["t"].tolist() == schedule.t
    assert [trace.tensors["abar"][k].item() for k in range(9)] == [schedule.abar(k).item() for k in range(9)]
    for stop, step in zip(stops, steps, strict=True):
        for name in ("x", "x_content", "layout", "x0"):
            ours, theirs = trace.get(stop, name), getattr(step, name)
            assert ours is None and theirs is None or torch.equal(ours, theirs), (stop, name)
        e_uncond, e_cond, e = (trace.get(stop, name) for name in ("e_uncond", "e_cond", "e"))
        assert torch.equal(e, e_cond if e_uncond is None else e_uncond + guidance * (e_cond - e_uncond))
        before = trace.get(Stop(stop.run, stop.k + 1, ""), "x")
        assert relative_error(schedule.predict(before, e, stop.k + 1)[0], step.x0) <= 1e-6
        assert not torch.equal(e, e_cond) or guidance == 1
    if source == "text":  # the mix begins where the layout's own run was at K_max
        assert trace.stops[0] == ("layout", 8, "start") and torch.equal(
            trace.tensors["eps"], trace.get(trace.stops[0], "x")
        )
        assert torch.equal(trace.tensors["mix/006/x"], trace.tensors["layout/006/x"])
    else:
        start = schedule.add_noise(trace.tensors["layout_x0"], trace.tensors["eps"], 6)
        assert trace.stops[0] == ("mix", 6, "start") and torch.equal(trace.tensors["mix/006/x"], start)


def test_texts(models, traces):
    trace, _ = traces["text"]
    content = Denoiser(models, Schedule(models.schedule, 8), options.of_mix({}, GIVEN), None, PROMPT, S)
    assert torch.equal(trace.tensors["negative/states"], content.context[0])
    assert torch.equal(trace.tensors["prompt/states"], content.context[1])
    assert torch.equal(trace.tensors["prompt/weights"], content.token_weights[1])
    assert torch.equal(trace.tensors["layout_prompt/weights"], torch.ones(32))
    ids = models.tokenizer(PROMPT, padding="max_length", max_length=32).input_ids
    assert trace.tensors["prompt/ids"].tolist() == ids
    assert trace.facts["words"]["prompt"] == [["a", [1]], ["red", [2]], ["strawberry", [3]]]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", []),
        ("a Coffee machine, please", ["a", "coffee", "machine", ",", "please"]),
        ("antidisestablishmentarianism of xylophonists", ["antidisestablishmentarianism", "of", "xylophonists"]),
        ("</script><img src=x>", ["</", "script", "><", "img", "src", "=", "x", ">"]),
    ],
)
def test_words(models, text, words):
    """Words of several tokens are one word; the tokens follow on from the start token without a gap."""
    found = words_of(models.tokenizer, text)
    assert [word for word, _ in found] == words
    count = len(models.tokenizer(text).input_ids) - 2
    assert [place for _, places in found for place in places] == list(range(1, count + 1))
    assert count > len(words) or "anti" not in text


def test_the_token_of_a_textual_inversion_is_a_word():
    tokenizer = weights.load_tokenizer(None)
    tokenizer.add_tokens(["<cat-toy>"])
    assert words_of(tokenizer, "a <cat-toy> tiger") == [("a", [1]), ("<cat-toy>", [2]), ("tiger", [3])]


@pytest.mark.parametrize("before", range(5))  # so that one of them is cut off in the middle of a word
def test_a_word_that_is_cut_off_is_a_word(models, before):
    found = words_of(models.tokenizer, "a " * before + "xylophonists " * 9)
    assert [p for _, places in found for p in places] == list(range(1, 31))


def hooks_of(module):
    return [h for m in module.modules() for h in (*m._forward_hooks, *m._forward_pre_hooks)]


def test_hooks_are_gone_afterwards(models, traces):
    assert not hooks_of(models.unet)
    o = options.of_mix(models.defaults, GIVEN | {"size": SIZE})
    eps = Noise(SEEDS, (9, 13), models.device)()
    following = Recorder(models, PROMPT, layout_of("image"), o, eps, modules=3).follow(
        magicmix(models, PROMPT, layout_of("image"), seeds=SEEDS, **GIVEN)
    )
    next(following)
    assert len(hooks_of(models.unet)) > 100
    following.close()  # somebody lost interest
    assert not hooks_of(models.unet)


def test_a_unet_that_runs_one_half(models):
    """At guidance 1 the negative prompt's half is left out; the trace has the prompt's alone, the same as with both."""
    found = []
    for guidance in (1.0, 1.0 + 1e-12):
        given = {"steps": 2, "k_max": 1.0, "k_min": 1.0, "guidance": guidance, "size": SIZE}
        layout, eps = layout_of("image"), Noise(SEEDS, (9, 13), models.device)()
        recorder = Recorder(models, PROMPT, layout, options.of_mix(models.defaults, given), eps)
        list(recorder.follow(magicmix(models, PROMPT, layout, seeds=SEEDS, **given)))
        found.append(recorder.trace())
    one, two = found
    shared = ["mix/001/e_cond", "mix/000/x", *(f"mix/000/maps/cond/{layer}" for layer in one.facts["layers"])]
    assert "mix/001/e" in one.tensors and not [n for n in one.tensors if "uncond" in n or "negative/s" in n]
    assert "mix/001/e_uncond" in two.tensors
    assert max(relative_error(one.tensors[name], two.tensors[name]) for name in shared) <= 1e-4


def test_heads_and_float16(models, traces):
    trace, _ = recorded(models, heads=True, map_dtype=torch.float16)
    exact, _ = traces["image"]
    for name in [n for n in trace.tensors if "/maps/" in n]:
        heads = trace.tensors[name.replace("/maps/", "/heads/")]
        assert heads.dtype == trace.tensors[name].dtype == torch.float16 and heads.shape[1] == 4
        assert relative_error(heads.float().mean(dim=1), exact.tensors[name]) <= 1e-3
        assert relative_error(trace.tensors[name].float(), exact.tensors[name]) <= 1e-3


@torch.no_grad()
def test_modules(models):
    """Every module of one step in order of execution: what it was given, given again, makes what it made."""
    trace, _ = recorded(models, "text", modules=3)
    ran = trace.facts["modules"]
    everything = {name or "unet": module for name, module in models.unet.named_modules()}
    never = [n for n in everything if n not in ran]
    assert all(isinstance(everything[n], torch.nn.ModuleList) for n in never) and ran[0] == "unet"
    assert ran.index("conv_in") < ran.index("down_blocks.0.resnets.0.norm1") < ran.index("mid_block") < len(ran) - 1
    assert ran[-1] == "conv_out" and len(set(ran)) == len(ran)
    for run in ("layout", "mix"):
        stop = Stop(run, 3, "")
        for name in ran:
            inputs, outputs = (trace.get(stop, f"modules/{name}/{kind}.0") for kind in ("input", "output"))
            assert inputs is not None and outputs is not None, name
            if not list(everything[name].children()) and "NoTransformer" not in type(everything[name]).__name__:
                assert torch.equal(everything[name](inputs), outputs), name
        assert torch.equal(trace.get(stop, "modules/unet/output.0")[2:], trace.get(stop, "e_cond"))
    assert not [n for n in trace.tensors if "/modules/" in n and "/003/" not in n]


# ------------------------------------------------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """A folder with two short traces that differ in nu."""
    folder = tmp_path_factory.mktemp("traces")
    for name, nu in (("a", 0.5), ("b", 0.9)):
        assert explain(folder, "a strawberry", "--layout", LAYOUT, "--nu", nu, "--trace", f"{name}.safetensors") == 0
    return folder


def explain(folder, *arguments):
    """`python -m lab.explain` within this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        fast = [] if arguments[0] in ("--compare", "--traces") else ["--steps", "10", "--quiet"]
        return main([*map(str, arguments), *fast])


def test_the_command(models, here, tmp_path):
    """The picture of magicmix.py, and a trace whose bytes are the same in another process."""
    import magicmix as module

    shared = ["a strawberry", "--layout", LAYOUT, "--nu", "0.5", "--steps", "10", "--quiet"]
    assert module.main([*map(str, shared), "-o", str(tmp_path / "plain.png")]) == 0
    line = [sys.executable, "-m", "lab.explain", *map(str, shared), "-o", tmp_path / "mix.png"]
    done = subprocess.run([*line, "--trace", tmp_path / "again.safetensors"], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert (tmp_path / "mix.png").read_bytes() == (tmp_path / "plain.png").read_bytes()
    assert (tmp_path / "again.safetensors").read_bytes() == (here / "a.safetensors").read_bytes()
    with safe_open(here / "a.safetensors", "pt") as file:
        assert set(file.metadata()) == {"magicmix"}
        facts = json.loads(file.metadata()["magicmix"])
    assert facts["parameters"]["nu"] == 0.5 and facts["checkpoint"] == models.identity
    assert (facts["T"], facts["K_max"], facts["K_min"]) == (10, 6, 1) and facts["versions"]["torch"]


def test_every_option_of_magicmix(tmp_path, capsys):
    """The same pictures, lines and files as magicmix.py makes, for options of each kind; --again too."""
    import magicmix as module

    fast = ["--layout-prompt", "a car " * 40, "--steps", "4", "--size", "64x72", "--count", "2", "--seed", "5"]
    more = ["--sampler", "ddpm", "--negative", "a dog", "--keep-noise", "eps.npy", "--dtype", "bf16"]
    made = []
    for folder, command, own in (("plain", module.main, []), ("traced", main, ["--trace", "t.safetensors"])):
        (tmp_path / folder).mkdir()
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(tmp_path / folder)
            assert command(["a strawberry", *fast, *more, *own]) == 0
            lines = [line for line in capsys.readouterr().out.splitlines() if line != "t.safetensors"]
            assert command(["--again", "mix-6.png", "-o", "again.png", "--quiet", *own]) == 0
            capsys.readouterr()
            made.append(
                (lines, {p.name: p.read_bytes() for p in sorted(Path().iterdir()) if p.suffix != ".safetensors"})
            )
    assert made[0] == made[1] and "cut off" in made[0][0][0]
    assert sorted(made[0][1]) == ["again.png", "eps.npy", "mix-5.png", "mix-6.png"]


@pytest.mark.parametrize("layout", [["--layout", LAYOUT], ["--layout-prompt", "a car"]])
def test_a_trace_of_fifty_steps_is_small(tmp_path, layout):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        assert main(["a strawberry", *map(str, layout), "--trace", "t.safetensors", "--quiet"]) == 0
    assert (tmp_path / "t.safetensors").stat().st_size < 25e6
    assert len([stop for stop in read(tmp_path / "t.safetensors").stops if stop.phase != "start"]) == (
        30 if layout[0] == "--layout" else 76
    )


def test_the_format_is_written_down(traces):
    """docs/trace.md names every tensor that a trace has, with its axes and its dtype, and no other."""
    text = (ROOT / "docs" / "trace.md").read_text()
    rows = re.findall(r"^\| `([^`]+)` \| `\(([^`]*)\)` \| (\w+)", text, re.MULTILINE)
    patterns = {name: (axes, dtype) for name, axes, dtype in rows}
    used = set()
    for source in ("image", "text"):
        trace, _ = traces[source]
        for name, tensor in trace.tensors.items():
            short = re.sub(r"^(layout|mix)/\d{3}/", "RUN/K/", name)
            short = re.sub(r"/maps/(cond|uncond)/.*", "/maps/HALF/LAYER", short)
            short = re.sub(r"^(prompt|negative|layout_prompt)/", "TEXT/", short)
            axes, dtype = patterns[short]
            assert str(tensor.dtype) == f"torch.{dtype}" and tensor.ndim == len(axes.split(",")) - axes.endswith(","), (
                name
            )
            used.add(short)
    assert patterns.keys() - used == {"RUN/K/heads/HALF/LAYER"}
    assert (
        set(re.findall(r"^\| `(\w+)` \| ", text[text.index("## Metadata") :], re.MULTILINE))
        >= traces["image"][0].facts.keys()
    )


# --------------------------------------------------------------------------------------------------------- comparing


def test_compare_names_the_first_difference(here, capsys):
    assert explain(here, "--compare", "a.safetensors", "a.safetensors") == 0
    assert re.fullmatch(r"\d+ tensors are equal\n", capsys.readouterr().out)
    assert explain(here, "--compare", "a.safetensors", "b.safetensors") == 1
    out = capsys.readouterr().out
    assert out.startswith("parameters: nu 0.5 and 0.9\nin the mix, k = 5 (mixing): x\n  at (0, ")
    a, b = (load_file(here / f"{name}.safetensors")["mix/005/x"] for name in "ab")
    place, x, y = re.search(r"at \(([\d, ]+)\): (\S+) and (\S+),", out).groups()
    place = tuple(map(int, place.split(", ")))
    assert float(x) == pytest.approx(a[place].item(), rel=1e-7) and float(y) == pytest.approx(b[place].item(), rel=1e-7)
    assert abs(a - b).max() == abs(a[place] - b[place])
    assert explain(here, "--compare", "a.safetensors", "b.safetensors", "--tolerance", "10") == 0


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_changed_value_is_found(traces, data):
    """Whatever tensor and place: it is named, and with two changes the earlier one."""
    trace, _ = traces[data.draw(st.sampled_from(["image", "text"]))]
    names = names_of(trace)
    first, second = sorted(data.draw(st.lists(st.sampled_from(range(len(names))), min_size=2, max_size=2)))
    changed = dict(trace.tensors)
    for i in (second, first):
        tensor = changed[names[i]].clone()
        at = data.draw(st.integers(0, tensor.numel() - 1))
        tensor.view(-1)[at] = 77 if data.draw(st.booleans()) or not tensor.is_floating_point() else torch.nan
        changed[names[i]] = tensor
    found, equal = parting(trace, Trace(changed, trace.facts), 0.0)
    place = tuple(torch.unravel_index(torch.tensor(at), trace.tensors[names[first]].shape))
    assert found.name == names[first] and equal == first
    if first != second:
        assert f"at {tuple(map(int, place))}: " in found.reason and found.reason.endswith("values differ")


def test_the_order_is_that_of_execution(models):
    trace, _ = recorded(models, "text", modules=3)
    names = names_of(trace)
    assert set(names) == set(trace.tensors) and len(names) == len(trace.tensors)
    assert names[0] == "eps" and {n for n in names[: len(BEFORE) - 1]} <= set(BEFORE)
    place = {name: i for i, name in enumerate(names)}
    assert place["layout/002/x"] < place["mix/006/x"] < place["mix/005/e_uncond"] < place["mix/004/x"]
    first, last = (f"mix/005/maps/cond/{trace.facts['layers'][i]}" for i in (0, -1))
    assert place[first] < place[last] < place["mix/005/e_uncond"] < place["mix/005/e"] < place["mix/005/x0"]
    assert place["mix/003/modules/conv_in/input.0"] < place["mix/003/modules/conv_out/input.0"] < place[
        f"mix/003/maps/cond/{trace.facts['layers'][0]}"]  # fmt: skip
    assert [n.rpartition("/")[2] for n in names if n.startswith("mix/005/") and "maps" not in n] == list(LATENTS)


def test_compare_tells_what_one_lacks(traces):
    trace, _ = traces["image"]
    fewer = Trace({n: t for n, t in trace.tensors.items() if "maps" not in n}, trace.facts)
    same, lines = compare(trace, fewer)
    assert (
        not same and len(lines) == 2 and "are not in the second, such as in the mix, k = 5 (mixing): maps/" in lines[1]
    )
    shape = Trace(trace.tensors | {"eps": torch.zeros(1)}, trace.facts)
    assert "shape (2, 4, 9, 13) and (1,)" in compare(trace, shape)[1][1]
    half = Trace(trace.tensors | {"eps": trace.tensors["eps"].half()}, trace.facts)
    assert "dtype float32 and float16" in compare(trace, half)[1][1]


# --------------------------------------------------------------------------------------------------------- bad input


@pytest.fixture
def damaged(here, tmp_path):
    """Files that are no traces, beside one that is."""
    tensors = load_file(here / "a.safetensors")
    with safe_open(here / "a.safetensors", "pt") as file:
        facts = json.loads(file.metadata()["magicmix"])
    save_file(tensors, tmp_path / "sound.safetensors", {"magicmix": json.dumps(facts)})
    save_file(tensors, tmp_path / "plain.safetensors")
    save_file(tensors, tmp_path / "later.safetensors", {"magicmix": json.dumps(facts | {"format": 2})})
    save_file(tensors, tmp_path / "steps.safetensors", {"magicmix": json.dumps(facts | {"steps": [{"run": 1}]})})
    save_file(tensors, tmp_path / "deep.safetensors", {"magicmix": "[" * 100000})
    lacking = {n: t for n, t in tensors.items() if n != "mix/003/x"}
    save_file(lacking, tmp_path / "lacking.safetensors", {"magicmix": json.dumps(facts)})
    (tmp_path / "cut.safetensors").write_bytes((here / "a.safetensors").read_bytes()[:5000])
    (tmp_path / "page.html").write_bytes(PRECIOUS)
    (tmp_path / "mix.png").write_bytes(PRECIOUS)
    return tmp_path


MIX = ["a strawberry", "--layout", LAYOUT]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (MIX, "nothing to write; give --trace FILE, --page FILE or both"),
        ([*MIX, "--trace", "t.png"], "let it end in .safetensors"),
        ([*MIX, "--page", "page.png"], "let it end in .html or .htm"),
        ([*MIX, "--trace", "nowhere/t.safetensors"], "trace folder 'nowhere' does not exist"),
        (
            [*MIX, "--trace", "t.safetensors", "--modules", "6"],
            "modules 6 is no step of this mix; its steps are 5 to 0",
        ),
        ([*MIX, "--page", "page.html", "--every", "0"], "every 0 is out of range; use 1 to 1000"),
        ([*MIX, "--page", "page.html", "--row", "1"], "row 1 is not there"),
        ([*MIX, "--page", "page.html", "--tolerance", "1"], "--tolerance cannot be used here"),
        ([*MIX, "--page", "page.html", "--nu", "2"], "nu 2.0 is out of range"),
        ([*MIX, "--page", "page.html", "--token-weight", "tiger=2"], "'tiger' is not in the prompt"),
        (["--compare", "sound.safetensors", "none.safetensors"], "trace 'none.safetensors' does not exist"),
        (["--compare", "sound.safetensors", "plain.safetensors"], "it is no trace of format 1"),
        (["--compare", "sound.safetensors", "later.safetensors"], "it is no trace of format 1"),
        (["--compare", "sound.safetensors", "steps.safetensors"], "trace 'steps.safetensors' cannot be read"),
        (["--compare", "sound.safetensors", "deep.safetensors"], "trace 'deep.safetensors' cannot be read"),
        (["--compare", "sound.safetensors", "lacking.safetensors"], "lacks 'mix/003/x'"),
        (["--compare", "sound.safetensors", "cut.safetensors"], "trace 'cut.safetensors' cannot be read"),
        (["--compare", "sound.safetensors", "."], "it is not a file"),
        (["--compare", "sound.safetensors", "sound.safetensors", "--page", "page.html"], "--page cannot be used"),
        (["--compare", "sound.safetensors", "sound.safetensors", "--nu", "1"], "nu cannot be given together"),
        (["--traces", "sound.safetensors"], "no page to write the traces to; give --page FILE"),
        (["--traces", "sound.safetensors", "--page", "page.html", "--seed", "1"], "seed cannot be given together"),
        (["--traces", *["sound.safetensors"] * 3, "--page", "page.html"], "3 were given; a page shows one, or two"),
        (["--traces", "cut.safetensors", "--page", "page.html"], "trace 'cut.safetensors' cannot be read"),
    ],
)
def test_bad_input(damaged, capsys, arguments, message):
    before = contents(damaged)
    assert explain(damaged, *arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("lab.explain: ") and error.count("\n") == 1 and message in error, error
    assert contents(damaged) == before, "files were changed, left behind or lost"


def test_what_cannot_be_parsed(capsys):
    with pytest.raises(SystemExit) as left:
        main(["a strawberry", "--every", "many"])
    assert (
        left.value.code == 2 and capsys.readouterr().err == "lab.explain: argument --every: 'many' is no whole number\n"
    )


def test_ctrl_c(tmp_path):
    """Ends with 130 and leaves nothing half written."""
    (tmp_path / "t.safetensors").write_bytes(PRECIOUS)
    line = [sys.executable, "-m", "lab.explain", "a tiger", "--layout", LAYOUT, "-o", tmp_path / "mix.png"]
    process = subprocess.Popen(
        [*map(str, line), "--trace", str(tmp_path / "t.safetensors")], cwd=ROOT, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
    )  # fmt: skip
    while "mixing" not in process.stderr.read(40):
        pass
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    process.stderr.close()
    assert contents(tmp_path) == {tmp_path / "t.safetensors": PRECIOUS}
