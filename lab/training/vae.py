"""Stage 3: the autoencoder, 128 x 128 pictures to 16 x 16 x 4 latents.

python -m lab.training.vae
"""

import json
import random

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from lab.training.common import RUNS, Trainer, arguments, autocast, load_average, parameters, sheet
from lab.training.data import Pictures
from vae import AutoencoderKL, VAEConfig

WIDTHS = (32, 64, 96, 96)
FACTOR = RUNS / "vae" / "scaling_factor.json"


def config(scaling_factor: float = 1.0) -> VAEConfig:
    """While this stage trains, latents are not scaled; the factor is measured at its end."""
    return VAEConfig(block_out_channels=WIDTHS, layers_per_block=1, norm_num_groups=8, scaling_factor=scaling_factor)


def trained_config() -> VAEConfig:
    return config(json.loads(FACTOR.read_text()))


def load_vae(device: torch.device) -> AutoencoderKL:
    """The autoencoder that this stage has made, in eval mode without gradients."""
    return load_average("vae", AutoencoderKL(trained_config())).to(device)


def reconstruction_loss(y: Tensor, x: Tensor) -> Tensor:
    """Absolute and squared error, and absolute error of the gradients (edges) and of the halved and quartered
    pictures (so that large areas get their exact colour)."""
    d = y - x
    gradients = (d[..., 1:, :] - d[..., :-1, :]).abs().mean() + (d[..., :, 1:] - d[..., :, :-1]).abs().mean()
    coarse = F.avg_pool2d(d, 2).abs().mean() + F.avg_pool2d(d, 4).abs().mean()
    return d.abs().mean() + 2 * (d**2).mean() + 0.35 * gradients + 0.5 * coarse


def psnr(y: Tensor, x: Tensor) -> float:
    """Mean over pictures of 10 log10(peak^2 / MSE), in dB, of pictures in [-1, 1]; y is clipped and rounded to grey
    levels, as a saved picture would be."""
    y = ((y.clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1
    return (10 * torch.log10(4 / ((y - x) ** 2).mean(dim=(1, 2, 3)))).mean().item()


@torch.no_grad()
def held_out_psnr(vae: AutoencoderKL, pictures: Pictures) -> float:
    """Over all held-out pictures, unaugmented on white, from the posterior mean."""
    chunks = [pictures.plain(rows) for rows in torch.arange(len(pictures.rows)).split(32)]
    values = [psnr(vae.decode(vae.encode(x)), x) * len(x) for x in chunks]
    return sum(values) / len(pictures.rows)


def main() -> None:
    args = arguments(__doc__, steps=6000, batch=8)
    pictures = Pictures(("concept", "other"), args.device)
    unseen = Pictures(("layout", "held-out"), args.device)
    model = AutoencoderKL(config()).to(args.device, memory_format=torch.channels_last)
    print(f"autoencoder {parameters(model):,} parameters")
    trainer = Trainer("vae", model, args, decay=0.998)
    rng, generator = random.Random(trainer.step), torch.Generator().manual_seed(trainer.step)

    def reconstruct(x: Tensor):
        mean, logvar = model.posterior(x)
        mean, logvar = mean.float(), logvar.float()
        z = mean + (0.5 * logvar).exp() * torch.randn_like(mean)
        return model.decode(z), 0.5 * (mean**2 + logvar.exp() - 1 - logvar).mean()

    forward = torch.compile(reconstruct) if args.compile else reconstruct

    def loss_of_step():
        rows = torch.randint(len(pictures.rows), (args.batch,), generator=generator)
        x, _, _ = pictures.batch(rows, rng, generator, tint=0.25, backdrop=0.4)
        x = x.contiguous(memory_format=torch.channels_last)
        with autocast(args.device):
            y, kl = forward(x)
        error = reconstruction_loss(y, x)
        return error + 2e-4 * kl, {"error": error, "kl": kl}

    trainer.run(loss_of_step, measure=lambda: {"held_out_psnr": held_out_psnr(model, unseen)})
    save_file(trainer.averaged(), RUNS / "vae" / "average.safetensors")
    load_average("vae", model)

    # The diffusion model wants latents of unit variance; SD's 0.18215 is the same quantity for its autoencoder.
    with torch.no_grad():
        rows = torch.arange(len(pictures.rows))[::2]
        batches = [pictures.batch(r, rng, generator, 0.1, 0.2)[0] for r in rows.split(64)]
        latents = torch.cat([model.posterior(x)[0] for x in batches])
        x = unseen.plain(torch.arange(0, len(unseen.rows), max(1, len(unseen.rows) // 24)))[:24]
        y = model.decode(model.encode(x))
    factor = 1 / latents.std().item()
    FACTOR.write_text(json.dumps(factor))
    sheet(torch.stack([x, y], 1).flatten(0, 1), 12, RUNS / "vae" / "sheet.png")
    deviations = [round(s, 2) for s in latents.std((0, 2, 3)).tolist()]
    print(f"scaling_factor {factor:.5f}, standard deviation per channel {deviations}")
    print(f"held-out PSNR {held_out_psnr(model, unseen):.2f} dB")


if __name__ == "__main__":
    main()
