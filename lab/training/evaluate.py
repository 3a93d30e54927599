"""What the embedded checkpoint can do, in numbers: the table of its model card.

    python -m lab.training.evaluate            twelve minutes on one core

Measures the exported weights/tiny, not a training state: judge on held-out pictures and on new renderings, judge on
text-to-image samples of every concept (four seeds, "a NAME"), autoencoder PSNR on held-out pictures.
"""

import torch
from tqdm import tqdm

import weights
from lab.training.data import Pictures, concepts, held_out
from lab.training.judge import Judge, judge_accuracy
from lab.training.vae import held_out_psnr
from magicmix import text_to_image

SEEDS, STEPS = [0, 1, 2, 3], 30


@torch.no_grad()
def main() -> None:
    models, judge, cpu = weights.load(), Judge(), torch.device("cpu")
    pictures = Pictures(("concept",), cpu)
    unseen = [i for i, row in enumerate(pictures.rows) if held_out(row)]
    seen = [i for i in range(len(pictures.rows)) if i not in set(unseen)]
    share = judge_accuracy(judge, pictures, unseen, 4)
    print(
        f"judge, {len(unseen)} pictures in a style never shown of that concept, 4 renderings each: {share:.1%}",
        flush=True,
    )
    share = judge_accuracy(judge, pictures, seen, 4)
    print(f"judge, new renderings of {len(seen)} pictures, 4 each: {share:.1%}", flush=True)
    others = Pictures(("layout", "held-out"), cpu)
    psnr = held_out_psnr(models.vae, others)
    print(f"autoencoder, {len(others.rows)} held-out pictures: PSNR {psnr:.2f} dB", flush=True)

    wrong: dict[str, list[str]] = {}
    for name in tqdm(concepts(), desc="text-to-image", mininterval=10):
        *_, last = text_to_image(models, f"a {name}", steps=STEPS, seeds=SEEDS)
        samples = models.vae.decode(last.x).clamp(-1, 1)
        named = [judge.names[n] for n in judge(samples).argmax(1).tolist()]
        if missed := [n for n in named if n != name]:
            wrong[name] = missed
    total = len(concepts()) * len(SEEDS)
    right = total - sum(map(len, wrong.values()))
    share = f"{right}/{total} = {right / total:.1%}"
    print(f"text-to-image, {len(concepts())} concepts x {len(SEEDS)} seeds: {share} named as prompted")
    for name, missed in wrong.items():
        print(f"  {name}: taken for {', '.join(missed)}")


if __name__ == "__main__":
    main()
