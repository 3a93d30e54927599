"""Look inside a mix: a trace of every step, for machines, and a page that shows it, for people.

    python -m lab.explain PROMPT --layout IMAGE --trace mix.safetensors --page mix.html
    python -m lab.explain --traces A [B] --page both.html         the page of one recorded trace, or of two side by side
    python -m lab.explain --compare A B                           where two traces part

The first takes every option of magicmix.py and makes the same picture. docs/explain.md says more.
"""

from command import machine

if __name__ == "__main__":
    machine.begin()  # before torch's import, which Ctrl-C would abort with a traceback

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

import clip
import weights
from command import noise as noise_files
from command import options, pictures, request
from lab.explain import compare, page
from lab.explain.trace import Recorder, Trace, read
from magicmix import Noise, decode, magicmix
from weights import memory

SUFFIXES = {"trace": (".safetensors",), "page": (".html", ".htm")}
OWN = ("trace", "page", "map_dtype", "heads", "modules", "every", "row", "traces", "compare", "tolerance")
LOADING = ("weights", "unet", "vae", "no_ema", "prediction", "upcast_attention", "device", "dtype", "vae_dtype")


def add_own(parser: argparse.ArgumentParser) -> None:
    """The options that magicmix.py does not have."""
    whole, number = options.Number(0, 1000, whole=True), options.Number(0, options.LARGE)
    group = parser.add_argument_group("looking inside")
    group.add_argument("--trace", metavar="FILE", help="write the trace to this .safetensors file")
    group.add_argument("--page", metavar="FILE", help="write the page to this .html file")
    group.add_argument(
        "--map-dtype", choices=["fp32", "fp16"], help="of the cross-attention maps; fp16 halves the trace [fp32]"
    )
    group.add_argument("--heads", action="store_true", help="keep the maps of each head as well as their mean")
    group.add_argument(
        "--modules",
        type=whole.parse,
        metavar="K",
        help="keep the inputs and outputs of all modules of the step to k = K",
    )
    group.add_argument("--every", type=whole.parse, metavar="N", help="show every N-th step on the page only [1]")
    group.add_argument(
        "--row", type=whole.parse, metavar="N", help="show this picture of a --count on the page, from 0 [0]"
    )
    group.add_argument(
        "--traces", nargs="+", metavar="TRACE", help="show one recorded trace, or two side by side, on the --page"
    )
    group.add_argument(
        "--compare", nargs=2, metavar="TRACE", help="name the first step and tensor where two traces part"
    )
    group.add_argument(
        "--tolerance", type=number.parse, metavar="R", help="of --compare, relative to a tensor's largest value [0]"
    )


def check_own(own: dict, asked: dict) -> None:
    """Raises ValueError or OSError for what cannot be done, before anything slow begins."""
    uses = {
        "compare": {"compare", "tolerance"},
        "traces": {"traces", "page", "every", "row"},
        "mix": {"trace", "page", "map_dtype", "heads", "modules", "every", "row"},
    }
    use = next((name for name in ("compare", "traces") if name in own), "mix")
    if unused := sorted(own.keys() - uses[use]):
        with_what = f"together with --{use}" if use != "mix" else "here"
        raise ValueError(f"--{unused[0].replace('_', '-')} cannot be used {with_what}; leave it out")
    if use != "mix":
        allowed = {"quiet", "debug"} | (set(LOADING) if use == "traces" else set())
        if unused := sorted(asked.keys() - allowed):
            raise ValueError(
                f"{unused[0]} cannot be given together with --{use}: it stands in the traces; leave it out"
            )
    if use == "mix" and not own.keys() & {"trace", "page"}:
        raise ValueError("nothing to write; give --trace FILE, --page FILE or both")
    if use == "traces" and "page" not in own:
        raise ValueError("no page to write the traces to; give --page FILE")
    if len(own.get("traces", ())) > 2:
        raise ValueError(f"traces: {len(own['traces'])} were given; a page shows one, or two side by side")
    for name in ("every", "row"):
        kind = options.Number(int(name == "every"), 1000, whole=True)
        try:
            kind.check(own.get(name, 1))
        except ValueError as error:
            raise ValueError(f"{name} {error}") from None
    for name in SUFFIXES.keys() & own.keys():
        path = Path(own[name])
        if path.suffix not in SUFFIXES[name]:
            raise ValueError(f"{name} {str(path)!r} is no name for it; let it end in {' or '.join(SUFFIXES[name])}")
        pictures.check_writable(path, name)


# --------------------------------------------------------------------------------------------------- what it can do


@torch.no_grad()
def mix(asked: dict, own: dict) -> None:
    """Makes what magicmix.py makes of these options, and records it."""
    options.check(asked)
    if "concepts" in asked:
        raise ValueError("concepts makes no picture to look into; ask magicmix.py for it")
    r = request.read(asked, weights.TINY)
    if own.get("row", 0) >= len(r.seeds):
        raise ValueError(
            f"row {own['row']} is not there; --count {len(r.seeds)} makes the rows 0 to {len(r.seeds) - 1}"
        )
    models = weights.load(**r.loading())
    r.check_checkpoint(models.identity)
    r.tell(*models.notes)
    o = options.of_mix(models.defaults, r.mixing())
    size = models.latent_size(o.size)
    machine.check_memory(memory.decoding_bytes(models.vae, size, len(r.seeds)), models.device)
    noise = r.noise_of(Noise(r.seeds, size, models.device))
    layout = pictures.fit(r.layout.picture, o.size).to(models.device) if r.layout else r["layout_prompt"]
    clip.token_weights(models.tokenizer, r["prompt"], o.token_weights or {})  # a wrong word shows before the bar
    recorder = Recorder(
        models,
        r["prompt"],
        layout,
        o,
        noise.eps,
        map_dtype=torch.float16 if own.get("map_dtype") == "fp16" else torch.float32,
        heads="heads" in own,
        modules=own.get("modules"),
    )
    r.tell(*pictures.changes(r.layout, o.size))
    r.tell(*r.cut_off(lambda text: clip.cut_off(models.tokenizer, text), models.tokenizer.model_max_length))
    steps = magicmix(models, r["prompt"], layout, noise=noise, **o.only(options.MIXING))
    total = o.K_max if r.layout else o.K_max + o.steps - o.K_min
    machine.follow(recorder.follow(steps), total, r["quiet"])
    trace = recorder.trace(**r.metadata(0, o, models))
    if r["keep_noise"]:
        noise_files.write(r["keep_noise"], noise.eps)
    r.save(decode(models, trace.get(trace.stops[-1], "x").to(models.device)), o, models)
    if "trace" in own:
        trace.write(Path(own["trace"]))
        r.tell(own["trace"])
    if "page" in own:
        write_page([(trace, models)], own, r["quiet"])


@torch.no_grad()
def show(asked: dict, own: dict) -> None:
    """The page of recorded traces."""
    traces = [read(path) for path in own["traces"]]
    models = load_for(traces[0], asked)
    sides = [(traces[0], models)]
    for trace in traces[1:]:
        same = trace.facts.get("checkpoint") == traces[0].facts.get("checkpoint")
        sides.append((trace, models if same else load_for(trace, asked)))
    write_page(sides, own, "quiet" in asked)


def load_for(trace: Trace, asked: dict) -> weights.Checkpoint:
    """The checkpoint that a trace was made with. Raises ValueError where it is another one."""
    given = options.recall({n: v for n, v in trace.facts["parameters"].items() if n in LOADING}, asked)
    models = weights.load(**request.Request(given, {}, range(0), [], None, None).loading())
    recorded = trace.facts.get("checkpoint", models.identity)
    if not isinstance(recorded, dict) or not recorded.items() <= models.identity.items():
        raise ValueError("a trace was made with another checkpoint; give its folder with --weights")
    return models


def write_page(sides: list[tuple[Trace, weights.Checkpoint]], own: dict, quiet: bool) -> None:
    html = page.build(sides, every=own.get("every", 1), row=own.get("row", 0), quiet=quiet)
    pictures.replace(Path(own["page"]), "page", lambda file: file.write(html.encode()))
    if not quiet:
        print(own["page"])


def differ(own: dict) -> int:
    """Prints where two traces part; returns 0 where nowhere, else 1, as diff does."""
    same, lines = compare.compare(*map(read, own["compare"]), own.get("tolerance", 0.0))
    print("\n".join(map(machine.printable, lines)))
    return 0 if same else 1


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    argv = sys.argv[1:] if argv is None else argv
    given = options.parse(argv, __doc__, weights.own_options(weights.TINY), "lab.explain", add_own, examples="")
    own = {name: given.pop(name) for name in OWN if name in given}
    found = []  # what a comparison returned

    def work() -> None:
        check_own(own, given)
        if "compare" in own:
            found.append(differ(own))
        elif "traces" in own:
            show(given, own)
        else:
            mix(given, own)

    return machine.run("lab.explain", work, given.get("quiet", False), given.get("debug", False)) or sum(found)


if __name__ == "__main__":
    sys.exit(main())
