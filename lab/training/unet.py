"""Stage 4: the UNet, epsilon prediction on cached latents, with the frozen text encoder.

python -m lab.training.unet
"""

import random

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm
from transformers import CLIPTokenizer

from lab.training.common import RUNS, Trainer, arguments, autocast, load_average, parameters, sheet
from lab.training.data import Pictures
from lab.training.text import load_text, tokenize
from lab.training.vae import load_vae
from magicmix import text_to_image
from scheduler import Schedule, ScheduleConfig
from unet import UNet2DConditionModel, UNetConfig
from vae import AutoencoderKL
from weights import Checkpoint

CONFIG = UNetConfig(
    block_out_channels=(96, 128, 160),
    down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    layers_per_block=1,
    attention_head_dim=4,
    cross_attention_dim=128,
    norm_num_groups=8,
    sample_size=16,
)
GAMMA = 5.0  # min-SNR weighting (Hang et al. 2023, equation 8): speeds up the start, where the layout is decided
PROMPTS = (
    "tiger, dog, rabbit, penguin, owl, frog, octopus, elephant, strawberry, pizza, burger, cactus, "
    "rocket, car, house, robot, guitar, crown, cake, mushroom, sunflower, whale, blue rose, green cat"
).split(", ")


@torch.no_grad()
def cache(args, vae: AutoencoderKL, tokenizer: CLIPTokenizer) -> tuple[Tensor, Tensor]:
    """Scaled latents (M, 4, 16, 16) in float16 and caption ids (M, L), args.variants of each concept picture."""
    pictures = Pictures(("concept",), args.device)
    rng, generator = random.Random(0), torch.Generator().manual_seed(0)
    latents, captions = [], []
    rows = torch.arange(len(pictures.rows)).repeat(args.variants)
    for chunk in tqdm(rows.split(256 if args.device.type == "cuda" else 32), desc="latents", mininterval=5):
        x, texts, _ = pictures.batch(chunk, rng, generator, tint=0.15, backdrop=0.15)
        with autocast(args.device):
            latents.append(vae.encode(x).half())
        captions += texts
    return torch.cat(latents), tokenize(tokenizer, captions).to(args.device)


def samples(trained: Checkpoint) -> Tensor:
    """One picture per prompt, "a ..." and "a 3d ...": (B, 3, H, W), about [-1, 1]."""
    pictures = []
    for prompt in [f"a {p}" for p in PROMPTS] + [f"a 3d {p}" for p in PROMPTS]:
        *_, last = text_to_image(trained, prompt, steps=30, guidance=4.0)
        pictures.append(trained.vae.decode(last.x))
    return torch.cat(pictures)


def main() -> None:
    args = arguments(__doc__, steps=8000, batch=32)
    tokenizer, encoder = load_text(args.device)
    vae = load_vae(args.device)
    model = UNet2DConditionModel(CONFIG).to(args.device, memory_format=torch.channels_last)
    print(f"UNet {parameters(model):,} parameters")
    trainer = Trainer("unet", model, args, decay=0.9995)
    latents, ids = cache(args, vae, tokenizer)
    abar = Schedule(ScheduleConfig(), 1).alphas_cumprod.to(args.device)
    empty = encoder(tokenize(tokenizer, [""]).to(args.device))
    positions = torch.arange(ids.shape[1], device=args.device)
    random_ = torch.Generator(args.device).manual_seed(trainer.step)

    def rand(*shape: int) -> Tensor:
        return torch.rand(*shape, device=args.device, generator=random_)

    def contexts(ids: Tensor) -> Tensor:
        """Text states for training: a tenth are the empty prompt's (for guidance); half of the rest keep only the
        words and take all later states from the empty prompt, so that a concept is read from its own tokens."""
        states = encoder(ids)
        after = positions > (ids == tokenizer.eos_token_id).int().argmax(1, keepdim=True) - 1
        states = torch.where((after & (rand(len(ids), 1) < 0.5))[:, :, None], empty, states)
        return torch.where(rand(len(ids), 1, 1) < 0.1, empty, states)

    def noised(x0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        a = abar[t][:, None, None, None]
        return a.sqrt() * x0 + (1 - a).sqrt() * eps

    forward = torch.compile(model) if args.compile else model

    def loss_of_step():
        pick = torch.randint(len(latents), (args.batch,), device=args.device, generator=random_)
        x0, t = latents[pick].float(), torch.randint(1000, (args.batch,), device=args.device, generator=random_)
        eps = torch.randn(x0.shape, device=args.device, generator=random_)
        with autocast(args.device):
            context = contexts(ids[pick])
            output = forward(noised(x0, t, eps).contiguous(memory_format=torch.channels_last), t, context)
        error = ((output.float() - eps) ** 2).mean(dim=(1, 2, 3))
        snr = abar[t] / (1 - abar[t])
        return (error * snr.clamp(max=GAMMA) / snr).mean(), {"epsilon": error.mean()}

    fixed = torch.Generator().manual_seed(7)
    some = torch.randint(len(latents), (192 if args.device.type == "cuda" else 48,), generator=fixed).to(args.device)
    noise = torch.randn(latents[some].shape, generator=fixed).to(args.device)

    def measure() -> dict[str, Tensor]:
        """Epsilon error with the right, a shuffled and the empty caption: a gap means that the text is read."""
        out = {}
        states = encoder(ids[some])
        for t in (500, 800):
            times = torch.full((len(some),), t, device=args.device)
            x = noised(latents[some].float(), times, noise)
            cases = {"right": states, "shuffled": states.roll(1, 0), "empty": empty.expand_as(states)}
            for kind, context in cases.items():
                with autocast(args.device):
                    out[f"{kind}@{t}"] = F.mse_loss(model(x, times, context).float(), noise)
        return out

    trainer.run(loss_of_step, measure)
    save_file(trainer.averaged(), RUNS / "unet" / "average.safetensors")
    load_average("unet", model)

    trained = Checkpoint(
        tokenizer=tokenizer,
        text_encoder=encoder,
        unet=model,
        vae=vae,
        schedule=ScheduleConfig(),
        device=args.device,
    )
    sheet(samples(trained), 12, RUNS / "unet" / "sheet.png")


if __name__ == "__main__":
    main()
