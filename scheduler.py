"""The noise schedule and its samplers, in MagicMix's indexing.

k counts the sampler steps that are left: k = T is where denoising from noise starts, k = 0 is clean. t[k] is the
timestep at which the UNet is called to go from k to k - 1, and abar_k = alphas_cumprod[t[k]]. Spacing is Stable
Diffusion's "leading" one; for models of zero terminal SNR it is "trailing", which starts at the last timestep. Sources:
DDPM (Ho et al. 2020, arXiv 2006.11239), DDIM (Song et al. 2020, arXiv 2010.02502), v prediction (Salimans & Ho 2022,
arXiv 2202.00512), zero terminal SNR (Lin et al. 2023, arXiv 2305.08891). Field names are those of the published
scheduler_config.json.
"""

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """Defaults are Stable Diffusion's, not diffusers': the first published configs lacked some of them.

    Raises ValueError for a value that these samplers cannot use.
    """

    num_train_timesteps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.012
    beta_schedule: str = "scaled_linear"
    trained_betas: tuple[float, ...] | None = None  # one per training timestep, in place of the schedule
    rescale_betas_zero_snr: bool = False
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
        betas, n = self.trained_betas, self.num_train_timesteps
        if betas is not None and not (len(betas) == n and all(0 < beta < 1 for beta in betas)):
            raise ValueError(f"trained_betas must be {n} numbers between 0 and 1, one per training timestep")
        if self.rescale_betas_zero_snr and self.prediction_type != "v_prediction":
            raise ValueError(f"zero terminal SNR needs v_prediction; {self.prediction_type} would divide by abar_T = 0")

    @property
    def timestep_spacing(self) -> str:
        """Leading spacing never reaches the last timestep, where zero terminal SNR is."""
        return "trailing" if self.rescale_betas_zero_snr else "leading"


def alphas_cumprod(config: ScheduleConfig) -> Tensor:
    """abar at every training timestep: (num_train_timesteps,), float32, falling from about 1. DDPM, equation 4."""
    start, end, n = config.beta_start, config.beta_end, config.num_train_timesteps
    if config.trained_betas is not None:
        betas = torch.tensor(config.trained_betas, dtype=torch.float32)
    elif config.beta_schedule == "scaled_linear":  # linear in sqrt(beta); the original code calls this "linear"
        betas = torch.linspace(start**0.5, end**0.5, n, dtype=torch.float32) ** 2
    else:
        betas = torch.linspace(start, end, n, dtype=torch.float32)
    abar = torch.cumprod(1 - betas, dim=0)
    if config.rescale_betas_zero_snr:  # Lin et al., algorithm 1: shifted so that the last is 0, the first as before
        root = abar**0.5
        abar = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
    return abar


class Schedule:
    """The noise levels of a run of `steps` = T sampler steps.

    Args:
        config: the checkpoint's schedule.
        steps: T, at least 1; t[T] must stay below num_train_timesteps, so at most 999 for Stable Diffusion with leading
            spacing.

    Raises ValueError for a T out of range.
    """

    def __init__(self, config: ScheduleConfig, steps: int):
        self.config, self.T = config, steps
        n = config.num_train_timesteps
        stride = n // steps if steps > 0 else 0
        if config.timestep_spacing == "trailing":  # halves go to the even neighbour, as in numpy, which diffusers uses
            called = [round(n * i / steps) - 1 for i in range(1, steps + 1)]
        else:
            called = [i * stride + config.steps_offset for i in range(steps)]
        # t[0] is never given to the UNet; it stands for the clean end, where the samplers look up abar(0).
        self.t = [0, *called]
        if stride < 1 or self.t[-1] >= n:
            largest = n if config.timestep_spacing == "trailing" else n - config.steps_offset
            raise ValueError(f"steps {steps} is out of range; use 1 to {largest}, with t[T] of at most {n - 1}")
        self.alphas_cumprod = alphas_cumprod(config)

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
        # clamp: at abar = 0 and eta = 1 the difference is 0, and rounding may leave it just below.
        x_prev = abar_prev**0.5 * x0 + (1 - abar_prev - sigma**2).clamp(min=0) ** 0.5 * eps
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
