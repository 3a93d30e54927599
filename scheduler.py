"""The noise schedule and its samplers, in MagicMix's indexing.

k counts the sampler steps that are left: k = T is where denoising from noise starts, k = 0 is clean. t[k] is the
timestep at which the UNet is called to go from k to k - 1, and abar_k = alphas_cumprod[t[k]]. Spacing is Stable
Diffusion's "leading" one. Sources: DDPM (Ho et al. 2020, arXiv 2006.11239), DDIM (Song et al. 2020, arXiv 2010.02502),
v prediction (Salimans & Ho 2022, arXiv 2202.00512). Field names are those of the published scheduler_config.json.
"""

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

# Config fields that these samplers fix: another value would mean other numbers, so a loader must refuse it.
FIXED = {
    "clip_sample": False,
    "set_alpha_to_one": False,
    "timestep_spacing": "leading",
    "thresholding": False,
    "rescale_betas_zero_snr": False,
    "trained_betas": None,
    "variance_type": "fixed_small",
}


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """Defaults are Stable Diffusion's, not diffusers': the first published configs lacked some of them.

    Raises ValueError for a value that these samplers cannot use.
    """

    num_train_timesteps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.012
    beta_schedule: str = "scaled_linear"
    steps_offset: int = 1
    prediction_type: str = "epsilon"

    def __post_init__(self):
        for name, known in (
            ("beta_schedule", ("scaled_linear", "linear")),
            ("prediction_type", ("epsilon", "v_prediction")),
        ):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} {getattr(self, name)!r} is not known; use {' or '.join(known)}")
        if not 0 < self.beta_start <= self.beta_end < 1:
            raise ValueError(f"beta_start {self.beta_start} and beta_end {self.beta_end} must rise between 0 and 1")
        if not 0 <= self.steps_offset < self.num_train_timesteps:
            raise ValueError(f"steps_offset {self.steps_offset} must be 0 or more and below {self.num_train_timesteps}")


class Schedule:
    """The noise levels of a run of `steps` = T sampler steps.

    Args:
        config: the checkpoint's schedule.
        steps: T, at least 1; t[T] must stay below num_train_timesteps, so at most 999 for Stable Diffusion.

    Raises ValueError for a T out of range.
    """

    def __init__(self, config: ScheduleConfig, steps: int):
        self.config, self.T = config, steps
        stride = config.num_train_timesteps // steps if steps > 0 else 0
        # t[0] is never given to the UNet; it stands for the clean end, where the samplers look up abar(0).
        self.t = [0] + [i * stride + config.steps_offset for i in range(steps)]
        if stride < 1 or self.t[-1] >= config.num_train_timesteps:
            largest = config.num_train_timesteps - config.steps_offset
            raise ValueError(f"steps {steps} is out of range; use 1 to {largest}, with t[T] below the last timestep")
        start, end, n = config.beta_start, config.beta_end, config.num_train_timesteps
        if config.beta_schedule == "scaled_linear":  # linear in sqrt(beta); the original code calls this "linear"
            betas = torch.linspace(start**0.5, end**0.5, n, dtype=torch.float32) ** 2
        else:
            betas = torch.linspace(start, end, n, dtype=torch.float32)
        self.alphas_cumprod = torch.cumprod(1 - betas, dim=0)

    def abar(self, k: int) -> Tensor:
        """abar_k, a float32 scalar; abar_0 is alphas_cumprod[0], not 1 ("set_alpha_to_one": false)."""
        return self.alphas_cumprod[self.t[k]]

    def warn_if_not_noise(self) -> None:
        """Warns (UserWarning) when sqrt(abar_T) is above 0.15: starting from eps alone leaves out that share of x0. It
        is 0.076 at T = 50; 0.52 at T = 501, where leading spacing ends at t[T] = 501; and 1.0 at T = 1."""
        kept = self.abar(self.T).item() ** 0.5
        if kept > 0.15:
            warnings.warn(
                f"steps {self.T}: denoising from noise starts at timestep {self.t[self.T]}, where {kept:.2f} of a "
                "picture should be left; 50 steps start at 0.08",
                stacklevel=2,
            )

    def add_noise(self, x0: Tensor, eps: Tensor, k: int) -> Tensor:
        """q(x_k | x_0): sqrt(abar_k) x0 + sqrt(1 - abar_k) eps, and x0 itself at k = 0. DDPM, equation 4."""
        if k == 0:
            return x0
        return self.abar(k) ** 0.5 * x0 + (1 - self.abar(k)) ** 0.5 * eps

    def predict(self, x: Tensor, output: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The clean latent and the noise, (x0, eps), that the UNet's output at step k means for x_k."""
        a, b = self.abar(k) ** 0.5, (1 - self.abar(k)) ** 0.5
        if self.config.prediction_type == "v_prediction":  # v = a eps - b x0 (Salimans & Ho, appendix D)
            return a * x - b * output, a * output + b * x
        return (x - b * output) / a, output

    def ddim(
        self, x: Tensor, output: Tensor, k: int, eta: float = 0.0, noise: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """One DDIM step x_k -> (x_{k-1}, predicted x0). DDIM, equations 12 and 16.

        eta in [0, 1]: 0 is deterministic; otherwise `noise`, of x's shape and standard normal, is needed.
        """
        abar, abar_prev = self.abar(k), self.abar(k - 1)
        x0, eps = self.predict(x, output, k)
        sigma = eta * ((1 - abar_prev) / (1 - abar) * (1 - abar / abar_prev)) ** 0.5
        x_prev = abar_prev**0.5 * x0 + (1 - abar_prev - sigma**2) ** 0.5 * eps
        return (x_prev + sigma * noise if eta > 0 else x_prev), x0

    def ddpm(self, x: Tensor, output: Tensor, k: int, noise: Tensor) -> tuple[Tensor, Tensor]:
        """One ancestral step x_k -> (x_{k-1}, predicted x0), with the posterior variance. DDPM, equations 6 and 7.

        `noise` has x's shape and is standard normal; at the last step (k = 1) its factor sigma is 0.
        """
        # Unlike DDIM's, the last step ends at abar = 1 (diffusers' DDPM does the same): it returns x0, noise-free.
        abar, abar_prev = self.abar(k), self.abar(k - 1) if k > 1 else torch.tensor(1.0)
        alpha = abar / abar_prev
        x0, _ = self.predict(x, output, k)
        mean = abar_prev**0.5 * (1 - alpha) / (1 - abar) * x0 + alpha**0.5 * (1 - abar_prev) / (1 - abar) * x
        sigma = ((1 - abar_prev) / (1 - abar) * (1 - alpha)) ** 0.5
        return mean + sigma * noise, x0
