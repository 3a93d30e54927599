"""Stage 2b: the judge, which names what a picture shows. It measures the other stages and trains none of them.

    python -m lab.training.judge

An image tower is trained against the frozen text encoder: a picture must be nearer to the text feature of its name
than to that of any other of the 700 names. Written to lab/training/judge.safetensors, with the concepts' text
features.
"""

import random
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from lab.training.common import RUNS, Trainer, arguments, autocast, load_average, parameters
from lab.training.data import Pictures, concepts, held_out
from lab.training.text import load_text, tokenize
from lab.training.tower import ImageTower

FILE = Path(__file__).parent / "judge.safetensors"


class Tower(nn.Module):
    """What is trained here: the image tower, and the projection of the text encoder's states into its space."""

    def __init__(self):
        super().__init__()
        self.tower = ImageTower()
        self.text_projection = nn.Linear(128, 128, bias=False)

    def forward(self, x: Tensor, states: Tensor) -> Tensor:
        """Pictures (B, 3, 128, 128) and text states (names, 128) -> cosine similarities (B, names)."""
        return self.tower(x) @ F.normalize(self.text_projection(states), dim=-1).T


class Judge:
    """Names pictures among the concepts.

    Args:
        device: where it runs.

    `__call__` takes pictures (B, 3, 128, 128) in [-1, 1] and returns (B, concepts) similarities, in `self.names`'
    order; the caller takes the argmax.
    """

    def __init__(self, device: torch.device | str = "cpu"):
        state = {k: v.float() for k, v in load_file(FILE).items()}
        self.texts = state.pop("texts").to(device)  # (concepts, 128): the text side, already embedded
        self.names = list(concepts())
        self.tower = ImageTower()
        self.tower.load_state_dict(state, strict=True)
        self.tower.eval().requires_grad_(False).to(device)

    def __call__(self, pictures: Tensor) -> Tensor:
        return self.tower(pictures) @ self.texts.T


def judge_accuracy(judge: Judge, pictures: Pictures, rows: list[int], repeats: int) -> float:
    """Share of `repeats` random renderings (shift, rotation, warp; own colours, white) of each row that are named."""
    rng, generator, right, total = random.Random(1), torch.Generator().manual_seed(1), 0, 0
    for chunk in torch.tensor(rows).repeat(repeats).split(256):
        x, _, attributes = pictures.batch(chunk, rng, generator, tint=0.0, backdrop=0.0)
        named = judge(x).argmax(1).tolist()
        right += sum(judge.names[n] == a[0] for n, a in zip(named, attributes, strict=True))
        total += len(chunk)
    return right / total


def disturb(x: Tensor) -> Tensor:
    """Pictures (B, 3, H, W) in [-1, 1], disturbed: a style is not to be told by its palette, its sharpness or one
    detail. Colours are turned about the grey axis and faded, a patch is blanked, some are blurred, all get noise."""
    b, _, h, w = x.shape

    def rand(*shape: int) -> Tensor:
        return torch.rand(*shape, device=x.device)

    angle, grey = (rand(b) - 0.5) * 1.2 * (rand(b) < 0.5), torch.full((3, 3), 1 / 3, device=x.device)
    skew = torch.tensor([[0.0, -1, 1], [1, 0, -1], [-1, 1, 0]], device=x.device) / 3**0.5
    cos, sin = angle.cos()[:, None, None], angle.sin()[:, None, None]
    turn = cos * torch.eye(3, device=x.device) + (1 - cos) * grey + sin * skew  # Rodrigues about (1, 1, 1)
    fade = torch.where(rand(b, 1, 1) < 0.4, rand(b, 1, 1), torch.ones(b, 1, 1, device=x.device))
    colour = fade * turn + (1 - fade) * grey
    x = torch.einsum("bij,bjhw->bihw", colour, x - 1) + 1  # white stays white
    x = (x - 1) * (0.7 + 0.6 * rand(b, 1, 1, 1)) + 1
    soft = F.interpolate(F.avg_pool2d(x, 2), scale_factor=2, mode="bilinear")
    x = torch.where(rand(b, 1, 1, 1) < 0.3, soft, x)
    rows, columns = torch.arange(h, device=x.device)[:, None], torch.arange(w, device=x.device)
    top, left, side = rand(b, 1, 1) * h, rand(b, 1, 1) * w, rand(b, 1, 1) * h / 3
    patch = (rows - top).abs().lt(side / 2) & (columns - left).abs().lt(side / 2)
    x = torch.where(patch[:, None], rand(b, 3, 1, 1) * 2 - 1, x)
    return (x + 0.12 * rand(b, 1, 1, 1) * torch.randn_like(x)).clamp(-1, 1)


@torch.no_grad()
def main() -> None:
    args = arguments(__doc__, steps=4000, batch=256)
    tokenizer, encoder = load_text(args.device)
    pictures = Pictures(("concept", "other"), args.device)
    names = list(concepts())
    names += sorted({row["name"] for row in pictures.rows} - set(names))
    ids = tokenize(tokenizer, [f"a {name}" for name in names])
    ends = (ids == tokenizer.eos_token_id).int().argmax(1)
    states = encoder(ids.to(args.device))[torch.arange(len(ids)), ends.to(args.device)]  # (names, 128)

    # Renderings are cached at the 64 x 64 that the tower looks at: on two cores, rendering would cost most of the time.
    shown = torch.tensor([i for i, row in enumerate(pictures.rows) if not held_out(row)])
    rng, generator = random.Random(0), torch.Generator().manual_seed(0)
    cache = [
        F.avg_pool2d(pictures.batch(chunk, rng, generator, tint=0.2, backdrop=0.3)[0], 2).mul(127).char()
        for chunk in tqdm(shown.repeat(args.variants).split(128), desc="renderings", mininterval=10)
    ]
    cache = torch.cat(cache)  # (variants * rows, 3, 64, 64) int8
    number = {name: i for i, name in enumerate(names)}
    labels = torch.tensor([number[pictures.rows[i]["name"]] for i in shown]).repeat(args.variants).to(args.device)
    # A concept is drawn three times as often as one of the other names.
    weight = torch.where(labels < len(concepts()), 3.0, 1.0).cpu()

    model = Tower().to(args.device)
    print(f"image tower {parameters(model.tower):,} parameters, {len(names)} names, {len(cache):,} renderings")
    trainer = Trainer("judge", model, args, decay=0.998)

    def loss_of_step():
        pick = torch.multinomial(weight, args.batch, replacement=True, generator=generator)
        x = F.interpolate(disturb(cache[pick].float() / 127), scale_factor=2.0)  # the tower averages it back to 64
        with autocast(args.device):
            similarity = model(x.to(args.device), states).float()
        target = labels[pick]
        accuracy = (similarity.argmax(1) == target).float().mean()
        return F.cross_entropy(similarity * 20, target, label_smoothing=0.05), {"accuracy": accuracy}

    with torch.enable_grad():
        trainer.run(loss_of_step)
    save_file(trainer.averaged(), RUNS / "judge" / "average.safetensors")
    load_average("judge", model)
    texts = F.normalize(model.text_projection(states[: len(concepts())]), dim=-1)
    save_file({k: v.cpu().half().contiguous() for k, v in {**model.tower.state_dict(), "texts": texts}.items()}, FILE)

    judge = Judge(args.device)
    unseen = [i for i, row in enumerate(pictures.rows) if held_out(row)]
    seen = [i for i, row in enumerate(pictures.rows) if row["use"] == "concept" and not held_out(row)]
    print(f"{judge_accuracy(judge, pictures, unseen, 4):.1%} of held-out pictures")
    print(f"{judge_accuracy(judge, pictures, seen, 4):.1%} of new renderings of trained pictures")


if __name__ == "__main__":
    main()
