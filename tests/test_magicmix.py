"""The whole thing on the embedded weights: against diffusers' pipelines, against an independent loop, and invariants.

Pictures are compared in grey levels (0..255), latents by relative error.
"""

import dataclasses

import diffusers
import numpy as np
import pytest
import torch
import transformers
from conftest import ROOT, TINY, relative_error
from hypothesis import given, settings
from hypothesis import strategies as st

import weights
from magicmix import Noise, decode, denoiser, fit, in_steps, magicmix, mix, open_layout, token_weights, trajectory
from scheduler import Schedule

SIZE = (96, 160)  # height, width: not square, and not the size the model was trained at
STEPS, GUIDANCE = 20, 4.0


@pytest.fixture(scope="module")
def models():
    return weights.load()


@pytest.fixture(scope="module")
def pipe():
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(TINY, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def layout():
    return fit(open_layout(ROOT / "docs" / "layouts" / "teapot.png")[0], SIZE)


def last(steps):
    *_, final = steps
    return final


def grey(pictures):
    return np.stack([np.asarray(p, dtype=np.int16) for p in pictures])


def eps(seeds):
    return Noise(seeds, SIZE[0] // 8, SIZE[1] // 8, torch.device("cpu"))()


# ------------------------------------------------------------------------------- parity with the embedded weights


@torch.no_grad()
def test_each_model_with_the_embedded_weights(models, pipe):
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(0, len(models.tokenizer), (2, 32), generator=g)
    assert relative_error(models.text_encoder(ids), pipe.text_encoder(ids)[0]) <= 1e-5
    x, t, context = torch.randn(2, 4, 12, 20, generator=g), torch.tensor([981, 1]), models.text_encoder(ids)
    assert relative_error(models.unet(x, t, context), pipe.unet(x, t, context).sample) <= 1e-5
    picture = torch.rand(2, 3, *SIZE, generator=g) * 2 - 1
    assert relative_error(models.vae.encode(picture)[0], pipe.vae.encode(picture).latent_dist.mean) <= 1e-5
    assert relative_error(models.vae.decode(x), pipe.vae.decode(x).sample) <= 1e-5


def test_text_to_image_equals_the_pipeline(models, pipe):
    theirs = pipe(["a tiger"] * 2, num_inference_steps=STEPS, guidance_scale=GUIDANCE, latents=eps([3, 4]),
                  height=SIZE[0], width=SIZE[1]).images  # fmt: skip
    options = dict(steps=STEPS, guidance=GUIDANCE, seeds=[3, 4], size=SIZE)
    for step in (
        last(magicmix(models, "a tiger", "", k_max=1.0, k_min=1.0, **options)),  # no mixing at all
        last(magicmix(models, "", "a tiger", k_max=0.0, k_min=0.0, **options)),  # the layout's own trajectory
    ):
        assert abs(grey(decode(models, step.x)) - grey(theirs)).max() <= 1


@pytest.mark.parametrize("k_max", [0.4, 0.6, 1.0])
def test_nu_one_equals_image_to_image(models, pipe, layout, k_max, monkeypatch):
    """diffusers samples the posterior and draws its own noise; both are replaced by what MagicMix defines."""
    theirs = diffusers.StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)
    theirs.set_progress_bar_config(disable=True)
    module = "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_img2img"
    monkeypatch.setattr(f"{module}.retrieve_latents", lambda out, **_: out.latent_dist.mean)
    monkeypatch.setattr(f"{module}.randn_tensor", lambda *_, **__: eps([3]))
    expected = theirs("a tiger", image=layout, strength=k_max, num_inference_steps=STEPS, guidance_scale=GUIDANCE,
                      negative_prompt="a dog").images  # fmt: skip
    ours = last(magicmix(models, "a tiger", layout, k_max=k_max, k_min=0.2, nu=1.0, steps=STEPS, guidance=GUIDANCE,
                         negative="a dog", seeds=[3]))  # fmt: skip
    assert abs(grey(decode(models, ours.x)) - grey(expected)).max() <= 1


# ---------------------------------------------------------------------------------- parity with another loop


class ExplicitMap:
    """diffusers attention processor with the softmax map in the open, its columns multiplied for the conditional
    half of the batch (the second one)."""

    def __init__(self, s):
        self.s = s  # (L,)

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, **_):
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        q, k, v = (attn.head_to_batch_dim(f(y)) for f, y in
                   ((attn.to_q, hidden_states), (attn.to_k, context), (attn.to_v, context)))  # fmt: skip
        m = torch.softmax(torch.bmm(q, k.transpose(1, 2)) * attn.scale, dim=-1)  # (2B h, N, L)
        if encoder_hidden_states is not None:
            half = len(m) // 2
            m = torch.cat([m[:half], m[half:] * self.s])
        return attn.to_out[0](attn.batch_to_head_dim(torch.bmm(m, v)))


@torch.no_grad()
def independent(pipe, prompt, layout_picture, layout_prompt, K_max, K_min, nu, s, noise, sampler="ddim"):
    """MagicMix on diffusers' modules, written from the issue's text alone: nothing of this project is called."""
    scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config)
    scheduler.set_timesteps(STEPS)
    t = {k: int(scheduler.timesteps[STEPS - k]) for k in range(1, STEPS + 1)}
    embed = lambda text: pipe.text_encoder(pipe.tokenizer(text, padding="max_length", max_length=32, truncation=True,
                                                          return_tensors="pt").input_ids)[0]  # fmt: skip

    def one_step(x, k, text, weights_):
        pipe.unet.set_attn_processor(ExplicitMap(weights_))
        states = torch.cat([embed("").expand(len(x), -1, -1), embed(text).expand(len(x), -1, -1)])
        unconditional, conditional = pipe.unet(torch.cat([x, x]), t[k], states).sample.chunk(2)
        guided = unconditional + GUIDANCE * (conditional - unconditional)
        return scheduler.step(guided, t[k], x).prev_sample

    layout = {}
    if layout_picture is not None:
        clean = pipe.vae.encode(layout_picture).latent_dist.mean * pipe.vae.config.scaling_factor
        clean = clean.expand(len(noise), -1, -1, -1)
        for k in range(1, STEPS + 1):
            layout[k] = scheduler.add_noise(clean, noise, torch.tensor([t[k]]))
        layout[0] = clean
    else:
        layout[STEPS] = noise
        for k in range(STEPS, 0, -1):
            layout[k - 1] = one_step(layout[k], k, layout_prompt, torch.ones(32))
    x = layout[K_max]
    for k in range(K_max, 0, -1):
        x = one_step(x, k, prompt, s)
        if k - 1 >= K_min:
            x = nu * x + (1 - nu) * layout[k - 1]
    y = pipe.vae.decode(x / pipe.vae.config.scaling_factor).sample
    return ((y / 2 + 0.5).clamp(0, 1) * 255).round().permute(0, 2, 3, 1).numpy().astype(np.int16)


@pytest.mark.parametrize("mode", ["image", "text"])
@pytest.mark.parametrize("s", [None, 0.0, -1.0, 2.0])
def test_mixing_equals_an_independent_loop(models, layout, mode, s):
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(TINY, torch_dtype=torch.float32)  # its own: it is changed
    prompt, k_max, k_min, nu = "a green tiger on a blue background", 0.7, 0.15, 0.6
    factors = torch.ones(32)
    if s is not None:
        ids = pipe.tokenizer(prompt).input_ids
        factors[ids.index(pipe.tokenizer("tiger").input_ids[1])] = s
    theirs = independent(pipe, prompt, layout if mode == "image" else None, "a house", 14, 3, nu, factors, eps([5, 6]))
    ours = last(magicmix(models, prompt, layout if mode == "image" else "a house", k_max=k_max, k_min=k_min, nu=nu,
                         steps=STEPS, guidance=GUIDANCE, seeds=[5, 6], size=SIZE,
                         reweight=None if s is None else {"tiger": s}))  # fmt: skip
    assert abs(grey(decode(models, ours.x)) - theirs).max() <= 1


# ------------------------------------------------------------------------------------------------- invariants

SMALL = dict(steps=10, guidance=GUIDANCE, seeds=[1])


@settings(max_examples=12, deadline=None)
@given(st.floats(0, 1), st.floats(0, 1), st.sampled_from(["ddim", "ddpm"]))
def test_nu_zero_follows_the_layout(models, layout, a, b, sampler):
    k_min, k_max = sorted((a, b))
    for step in magicmix(models, "a tiger", layout, k_max=k_max, k_min=k_min, nu=0.0, sampler=sampler, **SMALL):
        if step.phase == "mixing":
            assert torch.equal(step.x, step.layout)


@settings(max_examples=8, deadline=None)
@given(st.integers(0, 10), st.integers(0, 10), st.floats(0, 1))
def test_without_mixing_it_is_image_to_image(models, layout, a, b, nu):
    """K_min = K_max with any nu, and nu = 1 with any K_min, are the same plain denoising from layout_{K_max}."""
    k_min, k_max = sorted((a / 10, b / 10))
    if k_max == 0:
        return
    equal = last(magicmix(models, "a tiger", layout, k_max=k_max, k_min=k_max, nu=nu, **SMALL))
    one = last(magicmix(models, "a tiger", layout, k_max=k_max, k_min=k_min, nu=1.0, **SMALL))
    assert torch.equal(equal.x, one.x)


def test_every_step_is_the_papers_line(models, layout):
    K_max, K_min, nu = 8, 3, 0.6
    steps = list(magicmix(models, "a tiger", layout, k_max=0.8, k_min=0.3, nu=nu, **SMALL))
    assert [s.k for s in steps] == list(range(K_max - 1, -1, -1))
    assert [s.phase for s in steps] == ["mixing"] * (K_max - K_min) + ["content"] * K_min
    for s in steps:
        mixed = nu * s.x_content + (1 - nu) * s.layout if s.phase == "mixing" else s.x_content
        assert torch.equal(s.x, mixed)


def test_the_mixture_is_carried_forward(models, layout):
    """The mistake of the public versions: to step on from the latents before mixing."""
    schedule = Schedule(models.schedule, 10)
    denoise = denoiser(models, schedule, schedule.ddim, "", GUIDANCE, 1, "a tiger", {})
    steps = list(magicmix(models, "a tiger", layout, k_max=0.8, k_min=0.3, nu=0.6, **SMALL))
    for before, after in zip(steps, steps[1:]):
        with torch.no_grad():
            assert torch.equal(denoise(before.x, before.k)[0], after.x_content)


@pytest.mark.parametrize("source", ["image", "text"])
def test_factors_of_one_change_nothing(models, layout, source):
    source = layout if source == "image" else "a house"
    plain = last(magicmix(models, "a red tiger", source, size=SIZE, **SMALL))
    factors = {w: 1.0 for w in ("a", "red", "tiger")}
    ones = last(magicmix(models, "a red tiger", source, size=SIZE, reweight=factors, **SMALL))
    assert torch.equal(plain.x, ones.x)


@pytest.mark.parametrize("options", [{}, {"eta": 1.0}, {"sampler": "ddpm"}])
@pytest.mark.parametrize("source", ["image", "text"])
def test_a_batch_equals_its_single_runs(models, layout, options, source):
    source = layout if source == "image" else "a house"
    options = dict(steps=10, guidance=GUIDANCE, size=SIZE) | options
    run = lambda seeds: last(magicmix(models, "a tiger", source, seeds=seeds, **options)).x
    batch, single = run([7, 8, 9]), torch.cat([run([seed]) for seed in (7, 8, 9)])
    # Matrix products of another batch size may sum in another order: a last-bit difference is all that is allowed.
    assert relative_error(batch, single) <= 1e-4
    assert abs(grey(decode(models, batch)) - grey(decode(models, single))).max() <= 1


def test_inputs_are_not_modified(models, layout):
    kept, factors, seeds = layout.clone(), {"tiger": 0.5}, [1, 2]
    last(magicmix(models, "a tiger", layout, steps=5, seeds=seeds, reweight=factors))
    assert torch.equal(layout, kept) and factors == {"tiger": 0.5} and seeds == [1, 2]
    x0, noise = torch.randn(1, 4, 2, 2), torch.randn(1, 4, 2, 2)
    states = [x0.clone(), noise.clone()]
    list(mix(lambda x, k: (x * 0.9, x), lambda k: x0 if k == 0 else noise, 5, 1, 0.5))
    list(trajectory(lambda x, k: (x * 0.9, x), noise, 5, 0))
    assert torch.equal(x0, states[0]) and torch.equal(noise, states[1])


@given(st.integers(1, 999), st.floats(0, 1), st.floats(0, 1))
def test_step_numbers(T, a, b):
    k_min, k_max = sorted((a, b))
    K_max, K_min = in_steps(k_max, k_min, T)
    assert 0 <= K_min <= K_max <= T and abs(K_max - k_max * T) <= 0.5 and abs(K_min - k_min * T) <= 0.5


def test_a_nan_is_reported_with_its_step(models, layout):
    class Broken(torch.nn.Module):  # its weights are sound
        def forward(self, x, t, *_):
            return x * (float("nan") if t[0] < 500 else 0.1)

    broken = dataclasses.replace(models, unet=Broken())
    with pytest.raises(FloatingPointError, match=r"NaN or Inf at k = 4 \(mixing\)"):  # the call at t[5] = 401
        last(magicmix(broken, "a tiger", layout, k_max=0.8, k_min=0.1, **SMALL))


# ---------------------------------------------------------------------------------------------------- the words


def test_words_are_found_by_their_tokens(models):
    tokenizer = models.tokenizer
    chosen = lambda prompt, word: token_weights(tokenizer, prompt, {word: 0.0}).eq(0).nonzero().flatten().tolist()
    assert chosen("a tiger", "tiger") == [2]
    assert chosen("Tiger and tiger, TIGER", "tiger") == [1, 3, 5]  # every occurrence, any case
    assert chosen("a red tiger", "red tiger") == [2, 3]
    one = tokenizer("tiger", add_special_tokens=False).input_ids
    assert len(one) == 1
    assert token_weights(tokenizer, "a tiger", {}).eq(1).all()


def test_a_word_inside_another_is_not_found(models):
    """The tokens of "cat" end those of "bobcat"; only what begins a word is one."""
    tokenizer = models.tokenizer
    inner, outer = (tokenizer(w, add_special_tokens=False).input_ids for w in ("cat", "bobcat"))
    assert outer[-len(inner) :] == inner and len(outer) > len(inner), "the case that this test needs"
    with pytest.raises(ValueError, match="'cat' is not in the prompt; its words are: a, bobcat"):
        token_weights(tokenizer, "a bobcat", {"cat": 0.0})


def test_the_tokenizer_is_clips(models):
    """Our vocabulary is small, but the file format is CLIP's: transformers' slow and fast readings agree."""
    auto = transformers.AutoTokenizer.from_pretrained(TINY / "tokenizer")
    for text in ("a tiger", "Crème brûlée 3d!", "日本語 🐯", ""):
        assert auto(text).input_ids == models.tokenizer(text).input_ids
        assert models.tokenizer.unk_token_id not in models.tokenizer(text).input_ids[1:-1], "bytes cover everything"
