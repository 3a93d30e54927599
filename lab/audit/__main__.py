"""What public MagicMix programs do differently: a table of numbers, and a sheet of pictures.

    python -m lab.audit                                         three mixes by the embedded checkpoint
    python -m lab.audit PROMPT --layout IMAGE -o sheet.png      a mix of your own, by any checkpoint (--weights SOURCE)

The first draws docs/audit.png and writes the table into docs/audit.md, which says what is in them. The second takes the
options of magicmix.py, but for those that make several pictures and for other samplers than DDIM.
"""

from command import machine

if __name__ == "__main__":
    machine.begin()  # before torch's import, which Ctrl-C would abort with a traceback

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from tqdm import tqdm

import clip
import weights
from command import options, pictures, request, sheet
from command.options import Options
from lab.audit import table
from lab.audit.scene import Scene
from lab.audit.table import Made, Numbers
from lab.audit.variants import DEPARTURES, PAPER, PROGRAMS, START, truncated
from lab.bench import page
from lab.sheets import DOCS, LAYOUTS, PROMPTS, layout_path
from lab.training.judge import Judge
from magicmix import Noise, decode
from weights import memory

SHARED = {"steps": 50, "guidance": 4.0, "device": "cpu", "dtype": "fp32"}
# What the public programs' own latents were made with: see tests/test_audit.py.
CASES = [
    SHARED | {"prompt": "a tiger", "layout": layout_path("teapot"), "k_min": 0.3, "k_max": 0.6, "nu": 0.7, "seed": 1},
    SHARED | {"prompt": "a panda", "layout": layout_path("mug"), "k_min": 0.0, "k_max": 0.58, "nu": 0.8, "seed": 3,
              "guidance": 6.0},
    SHARED | {"prompt": "a frog", "layout_prompt": "a house", "k_min": 0.2, "k_max": 0.6, "nu": 0.7, "seed": 4},
]  # fmt: skip
# Ten mixes with the programs' own defaults: those of diffusers' pipeline and of nipunjindal's are the same.
MORE = [
    SHARED | {"prompt": f"a {PROMPTS[i % len(PROMPTS)]}", "layout": layout_path(name), "k_min": 0.3, "k_max": 0.6,
              "nu": 0.5, "seed": i}
    for i, name in enumerate(LAYOUTS)
]  # fmt: skip
VARIANTS = (PAPER, *PROGRAMS, *DEPARTURES, START)
SECOND = 1000  # a second noise is that of the seed and this
REFUSED = {
    "concepts": "makes no mix; ask magicmix.py for it",
    "count": "makes several mixes; an audit is of one, so give each --seed alone",
    "sheet": "would be a second one; the audit's output is a sheet",
    "keep_noise": "is not written by an audit; magicmix.py writes it",
}
PAGE = DOCS / "audit.md"


def check(asked: dict) -> None:
    """Raises ValueError for options of magicmix.py that an audit has no use for, and for values that cannot be."""
    options.check(asked)
    for name in REFUSED.keys() & asked.keys():
        raise ValueError(f"{name} {REFUSED[name]}; leave it out")


def check_mixing(o: Options) -> None:
    """Raises ValueError for a mixing that the public programs do not do."""
    if o.sampler != "ddim" or o.eta:
        raise ValueError(f"sampler {o.sampler} with eta {o.eta} draws noise at each step; an audit needs ddim, eta 0")
    K_max, K_min = truncated(o.k_max, o.k_min, o.steps)
    if K_max == K_min:
        raise ValueError(
            f"k_max {o.k_max} and k_min {o.k_min} are both {K_max} of {o.steps} steps, so nothing is mixed; "
            "use a larger k_max or a smaller k_min"
        )


# -------------------------------------------------------------------------------------------------------------- a mix


class Audit(NamedTuple):
    """A mix as every loop makes it."""

    title: str
    concept: str  # the judge's name for the prompt; "" where there is no judge
    made: dict[str, Made]  # loop -> what it makes, in the order of the sheet
    numbers: dict[str, Numbers]


def prepare(r: request.Request) -> Scene:
    """The checkpoint, the options and the latents that were asked for."""
    models = weights.load(**r.loading())
    r.check_checkpoint(models.identity)
    r.tell(*models.notes)
    o = options.of_mix(models.defaults, r.mixing())
    check_mixing(o)
    size = models.latent_size(o.size)
    machine.check_memory(memory.decoding_bytes(models.vae, size, 1), models.device)
    layout = pictures.fit(r.layout.picture, o.size).to(models.device) if r.layout else r["layout_prompt"]
    clip.token_weights(models.tokenizer, r["prompt"], o.token_weights or {})  # a wrong word shows before the bar
    models.warn_if_untrained(size, r["prompt"], layout, o.negative)
    r.tell(*pictures.changes(r.layout, o.size))
    r.tell(*r.cut_off(lambda text: clip.cut_off(models.tokenizer, text), models.tokenizer.model_max_length))
    first, second = (Noise(seed, size, models.device) for seed in (r["seed"], r["seed"] + SECOND))
    scene = Scene(models, o, r["prompt"], layout, r.noise_of(first).eps, second())
    scene.schedule.warn_if_not_noise()
    return scene


@torch.no_grad()
def make(scene: Scene, quiet: bool) -> dict[str, Made]:
    """What each loop makes, by name, with the layout first and the content alone last; those that have no such layouts
    are left out."""
    variants = [v for v in VARIANTS if scene.kind in v.takes]
    latents = {"layout": scene.finished}
    for variant in tqdm(variants, disable=quiet, unit="loop"):
        latents[variant.name] = scene.run(variant)
    latents["content alone"] = scene.alone
    return {name: Made(x, decode(scene.models, x)[0]) for name, x in latents.items()}


def audit(asked: dict, judge: Judge) -> Audit:
    """Runs every loop on what was asked for and measures what it makes. The judge knows the embedded checkpoint's
    pictures only, and prompts that are "a" or "an" and one of its concepts."""
    r = request.read(asked, weights.TINY)
    scene = prepare(r)
    made = make(scene, r["quiet"])
    concept = r["prompt"].removeprefix("a ").removeprefix("an ")
    is_embedded = not any(r[name] for name in ("weights", "unet", "vae")) and scene.options.size == scene.models.size
    is_known = is_embedded and concept in judge.names
    anchors = made[PAPER.name], made["layout"], made[START.name]
    measured = {n: table.measure(m, *anchors, judge if is_known else None, concept) for n, m in made.items()}
    o, layout = scene.options, r["layout_prompt"] or Path(r["layout"]).name
    given = f"k_max {o.k_max:g}, k_min {o.k_min:g}, nu {o.nu:g}, T {o.steps}, guidance {o.guidance:g}, seed {r['seed']}"
    title = f"{machine.shown(scene.prompt)} into {machine.shown(layout)}: {given}"
    return Audit(title, concept if is_known else "", made, measured)


# ---------------------------------------------------------------------------------------------------------- all of them


def draw(audits: list[Audit], path: Path) -> None:
    """Writes the sheet: a mix per row, a loop per column, white where a loop has no such layouts."""
    columns = ["layout", *(v.name for v in VARIANTS), "content alone"]
    cells, labels = [], []
    for a in audits:
        blank = Image.new("RGB", a.made["layout"].picture.size, "white")
        cells += [a.made[name].picture if name in a.made else blank for name in columns]
        labels += [name if name in a.made else "-" for name in columns]
    pictures.save(sheet.contact_sheet(cells, labels, len(columns)), path, None)


def section(audits: list[Audit], more: list[Audit]) -> str:
    """The tables, in Markdown."""
    parts = [line for a in audits for line in (f"{a.title}:", "", *table.lines(a.numbers), "")]
    names = [name for name in more[0].numbers if all(name in a.numbers for a in more)]
    average = {name: table.average([(a.numbers[name], a.concept) for a in more]) for name in names}
    return "\n".join([*parts, f"Averages of {len(more)} mixes:", "", *table.lines(average)])


def show_cases(asked: dict) -> None:
    """The project's own mixes, into the documentation."""
    (path,) = pictures.output_paths(asked.get("output", DOCS / "audit.png"), range(1))
    judge, given = Judge(), {"quiet": True}
    audits, more = (
        [audit(case | given, judge) for case in tqdm(cases, disable="quiet" in asked, unit="mix")]
        for cases in (CASES, MORE)
    )
    text = section(audits, more)
    page.write(PAGE, "audit", text)
    draw(audits, path)
    print(text)


def show(asked: dict) -> None:
    """One mix."""
    check(asked)
    asked = {"output": Path("audit.png")} | asked
    found = audit(asked, Judge())
    draw([found], Path(asked["output"]))
    machine.show([f"{found.title}:", "", *table.lines(found.numbers)])
    if "quiet" not in asked:
        print(asked["output"])


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    argv = sys.argv[1:] if argv is None else argv
    asked = options.parse(argv, __doc__, weights.own_options(weights.TINY), "lab.audit", examples="")
    work = show_cases if asked.keys() <= {"output", "quiet", "debug"} else show
    return machine.run("lab.audit", lambda: work(asked), asked.get("quiet", False), asked.get("debug", False))


if __name__ == "__main__":
    sys.exit(main())
