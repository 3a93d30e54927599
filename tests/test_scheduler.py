"""The samplers against diffusers' schedulers, and the noise schedule against its closed form."""

import warnings

import diffusers
import pytest
import torch
from conftest import relative_error
from hypothesis import given
from hypothesis import strategies as st

from scheduler import Schedule, ScheduleConfig

BOUND = 1e-6
PUBLISHED = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1, clip_sample=False)
SHAPE = (2, 4, 6, 10)


def whole_run(steps, prediction, oracle, step, noise_seed=None, **fields):
    """Every step of a run, ours and theirs from the same x_k and output; the largest relative error."""
    schedule = Schedule(ScheduleConfig(prediction_type=prediction, **fields), steps)
    oracle.set_timesteps(steps)
    assert oracle.timesteps.tolist() == schedule.t[:0:-1]
    g = torch.Generator().manual_seed(steps)
    x, worst = torch.randn(SHAPE, generator=g), 0.0
    for k in range(steps, 0, -1):
        output, noise = torch.randn(SHAPE, generator=g), torch.randn(SHAPE, generator=torch.Generator().manual_seed(k))
        before = x.clone(), output.clone(), noise.clone()
        ours, x0 = step(schedule, x, output, k, noise)
        assert all(map(torch.equal, (x, output, noise), before)), "an input was modified"
        theirs = oracle.step(output, schedule.t[k], x, generator=torch.Generator().manual_seed(k), **(noise_seed or {}))
        worst = max(worst, relative_error(ours, theirs.prev_sample), relative_error(x0, theirs.pred_original_sample))
        x = theirs.prev_sample
    return worst


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("steps", [10, 20, 30, 50])
@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
def test_ddim(steps, prediction, eta):
    oracle = diffusers.DDIMScheduler(prediction_type=prediction, set_alpha_to_one=False, **PUBLISHED)
    step = lambda schedule, x, output, k, noise: schedule.ddim(x, output, k, eta, noise)
    assert whole_run(steps, prediction, oracle, step, {"eta": eta}) <= BOUND


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("steps", [10, 20, 30, 50])
def test_ddpm(steps, prediction):
    oracle = diffusers.DDPMScheduler(prediction_type=prediction, timestep_spacing="leading", **PUBLISHED)
    assert whole_run(steps, prediction, oracle, Schedule.ddpm) <= BOUND


ZERO_SNR = dict(rescale_betas_zero_snr=True, timestep_spacing="trailing", prediction_type="v_prediction")


@pytest.mark.parametrize("steps", [10, 20, 25, 50])
@pytest.mark.parametrize("eta", [0.0, 0.4, 0.9])
def test_ddim_with_zero_terminal_snr(steps, eta):
    """Where T divides 1000. Elsewhere diffusers steps to timestep t - 1000 // T, which is not its next one."""
    oracle = diffusers.DDIMScheduler(set_alpha_to_one=False, **PUBLISHED, **ZERO_SNR)
    step = lambda schedule, x, output, k, noise: schedule.ddim(x, output, k, eta, noise)
    assert whole_run(steps, "v_prediction", oracle, step, {"eta": eta}, rescale_betas_zero_snr=True) <= BOUND


@pytest.mark.parametrize("steps", [10, 20, 25, 50])
def test_ddpm_with_zero_terminal_snr(steps):
    oracle = diffusers.DDPMScheduler(**PUBLISHED, **ZERO_SNR)
    assert whole_run(steps, "v_prediction", oracle, Schedule.ddpm, rescale_betas_zero_snr=True) <= BOUND


@pytest.mark.parametrize("steps", [3, 10, 20, 25, 50])
def test_ddim_with_eta_1_is_ddpm(steps):
    """But for the last step, which ends at abar_0 here and at 1 there. diffusers' DDIM gives NaN at abar = 0. The
    bound is the root of float32's rounding: at abar = 0 the factor of eps is a root of what should be 0."""
    schedule = Schedule(ScheduleConfig(prediction_type="v_prediction", rescale_betas_zero_snr=True), steps)
    for k in range(steps, 1, -1):
        x, output, noise = (torch.randn(SHAPE, generator=torch.Generator().manual_seed(i)) for i in (k, 1, 2))
        assert relative_error(schedule.ddim(x, output, k, 1.0, noise)[0], schedule.ddpm(x, output, k, noise)[0]) <= 3e-4


@pytest.mark.parametrize("steps", [3, 7, 16, 30, 999, 1000])
def test_trailing_timesteps(steps):
    oracle = diffusers.DDIMScheduler(**PUBLISHED, **ZERO_SNR)
    oracle.set_timesteps(steps)
    schedule = Schedule(ScheduleConfig(prediction_type="v_prediction", rescale_betas_zero_snr=True), steps)
    assert oracle.timesteps.tolist() == schedule.t[:0:-1]
    x0, eps = torch.randn(SHAPE), torch.randn(SHAPE)
    assert schedule.t[steps] == 999 and torch.equal(schedule.add_noise(x0, eps, steps), eps), "nothing of x0 is left"
    with pytest.raises(ValueError, match="use 1 to 1000"):
        Schedule(schedule.config, 1001)


def test_trained_betas():
    betas = tuple(torch.linspace(0.001, 0.3, 40).tolist())
    oracle = diffusers.DDIMScheduler(num_train_timesteps=40, trained_betas=list(betas))
    schedule = Schedule(ScheduleConfig(num_train_timesteps=40, trained_betas=betas), 10)
    assert relative_error(schedule.alphas_cumprod, oracle.alphas_cumprod) <= BOUND


@pytest.mark.parametrize("kind", ["scaled_linear", "linear"])
@pytest.mark.parametrize("offset", [0, 1])
def test_every_schedule(kind, offset):
    fields = dict(beta_start=0.001, beta_end=0.02, beta_schedule=kind, steps_offset=offset, num_train_timesteps=500)
    oracle = diffusers.DDIMScheduler(set_alpha_to_one=False, clip_sample=False, **fields)
    for steps in (1, 7, 50, 499):
        schedule = Schedule(ScheduleConfig(**fields), steps)
        oracle.set_timesteps(steps)
        assert oracle.timesteps.tolist() == schedule.t[:0:-1]
        assert relative_error(schedule.alphas_cumprod, oracle.alphas_cumprod) <= BOUND


def test_adding_noise():
    oracle = diffusers.DDIMScheduler(**PUBLISHED)
    schedule = Schedule(ScheduleConfig(), 30)
    x0, eps = torch.randn(SHAPE), torch.randn(SHAPE)
    before = x0.clone(), eps.clone()
    for k in range(1, 31):
        expected = oracle.add_noise(x0, eps, torch.tensor([schedule.t[k]]))
        assert relative_error(schedule.add_noise(x0, eps, k), expected) <= BOUND
    assert torch.equal(schedule.add_noise(x0, eps, 0), x0)
    assert torch.equal(x0, before[0]) and torch.equal(eps, before[1])


def closed_form(t):
    """alphas_cumprod[t] in double precision, straight from the published betas."""
    product = 1.0
    for i in range(t + 1):
        product *= 1 - (0.00085**0.5 + (0.012**0.5 - 0.00085**0.5) * i / 999) ** 2
    return product


def test_published_facts():
    schedule = Schedule(ScheduleConfig(), 50)
    assert schedule.t[50] == 981 and schedule.t[1] == 1
    assert Schedule(ScheduleConfig(), 30).t[30] == 958
    assert schedule.abar(0).item() == pytest.approx(0.99915, abs=1e-6)  # set_alpha_to_one: false
    assert schedule.abar(50).item() == pytest.approx(closed_form(981), rel=1e-5)


@pytest.mark.parametrize(
    ("steps", "t", "kept"), [(50, 981, 0.076), (501, 501, 0.524), (750, 750, 0.237), (334, 667, 0.323), (1, 1, 0.999)]
)
def test_how_much_noise_the_start_is(steps, t, kept):
    """Leading spacing does not reach pure noise, and above T = 500 it stops at t[T] = T. sqrt(abar_T), closed form."""
    schedule = Schedule(ScheduleConfig(), steps)
    assert schedule.t[steps] == t and closed_form(t) ** 0.5 == pytest.approx(kept, abs=5e-4)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        schedule.warn_if_not_noise()
    expected = f"steps {steps}: denoising from noise starts at timestep {t}, where {kept:.2f} of a picture"
    assert [str(w.message).startswith(expected) for w in caught] == ([True] if kept > 0.15 else [])


@given(st.integers(1, 999), st.data())
def test_noising_is_undone_by_the_prediction(steps, data):
    """predict() inverts add_noise() when the UNet's output is exactly right, for both prediction types."""
    k = data.draw(st.integers(1, steps))
    g = torch.Generator().manual_seed(k)
    x0, eps = torch.randn(SHAPE, generator=g), torch.randn(SHAPE, generator=g)
    for kind in ("epsilon", "v_prediction"):
        schedule = Schedule(ScheduleConfig(prediction_type=kind), steps)
        a, b = schedule.abar(k) ** 0.5, (1 - schedule.abar(k)) ** 0.5
        x = schedule.add_noise(x0, eps, k)
        found = schedule.predict(x, eps if kind == "epsilon" else a * eps - b * x0, k)
        # x0 is divided by sqrt(abar), which is 0.07 at the noisy end, so rounding grows fifteenfold.
        assert relative_error(found[0], x0) <= 1e-5 and relative_error(found[1], eps) <= 1e-5


@pytest.mark.parametrize("steps", [0, -1, 1000, 1001])
def test_steps_out_of_range(steps):
    with pytest.raises(ValueError, match=f"steps {steps} is out of range; use 1 to 999"):
        Schedule(ScheduleConfig(), steps)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(beta_schedule="squaredcos_cap_v2"), "beta_schedule 'squaredcos_cap_v2' is not known; use scaled_linear"),
        (dict(prediction_type="sample"), "prediction_type 'sample' is not known; use epsilon or v_prediction"),
        (dict(beta_start=0.02), "must rise between 0 and 1"),
        (dict(steps_offset=1000), "steps_offset 1000 must be 0 or more and below 1000"),
        (dict(trained_betas=(0.1,) * 999), "trained_betas must be 1000 numbers between 0 and 1"),
        (dict(trained_betas=(0.1,) * 999 + (1.0,)), "trained_betas must be 1000 numbers between 0 and 1"),
        (dict(rescale_betas_zero_snr=True), "zero terminal SNR needs v_prediction; epsilon would divide"),
    ],
)
def test_configs_that_cannot_be(fields, message):
    with pytest.raises(ValueError, match=message):
        ScheduleConfig(**fields)
