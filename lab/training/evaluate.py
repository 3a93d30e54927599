"""What the embedded checkpoint can do, in numbers: the table of its model card.

    python -m training.evaluate            twelve minutes on one core

Measures the exported weights/tiny, not a training state: judge on held-out pictures and on new renderings, judge on
text-to-image samples of every concept (four seeds, "a NAME"), autoencoder PSNR on held-out pictures.
"""

import torch
from tqdm import tqdm
from training.data import SIZE, Pictures, concepts, held_out
from training.judge import Judge, judge_accuracy
from training.vae import held_out_psnr

import weights
from magicmix import magicmix

SEEDS, STEPS = [0, 1, 2, 3], 30


@torch.no_grad()
def main() -> None:
    models, judge, cpu = weights.load(), Judge(), torch.device("cpu")
    pictures = Pictures(("concept",), cpu)
    unseen = [i for i, row in enumerate(pictures.rows) if held_out(row)]
    seen = [i for i in range(len(pictures.rows)) if i not in set(unseen)]
    print(f"judge, {len(unseen)} pictures in a style never shown of that concept, 4 renderings each: "
          f"{judge_accuracy(judge, pictures, unseen, 4):.1%}", flush=True)  # fmt: skip
    print(f"judge, new renderings of {len(seen)} pictures, 4 each: "
          f"{judge_accuracy(judge, pictures, seen, 4):.1%}", flush=True)  # fmt: skip
    others = Pictures(("layout", "held-out"), cpu)
    psnr = held_out_psnr(models.vae, others)
    print(f"autoencoder, {len(others.rows)} held-out pictures: PSNR {psnr:.2f} dB", flush=True)

    wrong: dict[str, list[str]] = {}
    for name in tqdm(concepts(), desc="text-to-image", mininterval=10):
        steps = magicmix(models, f"a {name}", "", k_max=1.0, k_min=1.0, steps=STEPS, seeds=SEEDS,
                         guidance=models.defaults["guidance"], size=(SIZE, SIZE))  # fmt: skip
        *_, last = steps
        samples = models.vae.decode(last.x / models.vae.config.scaling_factor).clamp(-1, 1)
        named = [judge.names[n] for n in judge(samples).argmax(1).tolist()]
        if missed := [n for n in named if n != name]:
            wrong[name] = missed
    total = len(concepts()) * len(SEEDS)
    right = total - sum(map(len, wrong.values()))
    print(f"text-to-image, {len(concepts())} concepts x {len(SEEDS)} seeds: {right}/{total} = {right / total:.1%} "
          "named as prompted")  # fmt: skip
    for name, missed in wrong.items():
        print(f"  {name}: taken for {', '.join(missed)}")


if __name__ == "__main__":
    main()
