"""The options of MagicMix, each written once: name, type, default, range and help.

The command line, the keywords of the Python functions, the parameters in a picture and a checkpoint's magicmix.json
are all read from `Options`. Where an option may be set is its scope:

    MIXING    how to mix: on the command line, in Python, in a picture's parameters, in magicmix.json
    PICTURE   what else a picture depends on: on the command line and in a picture's parameters
    RUN       what no picture records: on the command line alone
"""

import argparse
import dataclasses
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from pathlib import Path

from command.machine import one_line, run, shown, version_lines

MIXING, PICTURE, RUN = "mixing", "picture", "run"
ANYWHERE = (MIXING, PICTURE, RUN)
LARGE = 1e38  # float32, in which the samplers compute, ends at 3.4e38
URL = re.compile("(https?|ftp|file|s3|gs|hf):/|data:image/")  # one slash: a Path has lost the other
LONGEST_NAME, LONGEST_PATH = 255, 4095  # bytes; Linux's and most file systems' bounds


# ------------------------------------------------------------------------------------------------- kinds of values


class Kind:
    """What the values of an option are. Each kind has a check(value), which raises ValueError with what is wrong and
    what would be right."""

    is_repeated = False  # on the command line, as pairs of a dict

    def parse(self, text: str) -> object:
        """The command line's text -> a value. Raises ArgumentTypeError."""
        return text

    def plain(self, value: object) -> object:
        """A checked value -> the one that stands for all its spellings: 3 for numpy's 3."""
        return value


@dataclass(frozen=True)
class Number(Kind):
    """A number from low to high."""

    low: float
    high: float
    whole: bool = False

    def parse(self, text: str) -> float:
        if len(text) > 400:  # int() takes no more than 4,300 digits; float() makes inf of them
            raise argparse.ArgumentTypeError(f"{shown(text)} has {len(text):,} characters; use {self.right()}")
        try:
            return int(text) if self.whole else float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{shown(text)} is no {'whole ' * self.whole}number") from None

    def right(self) -> str:
        return f"{self.low} to {self.high}"

    def check(self, value: object) -> None:
        if not isinstance(value, Integral if self.whole else Real) or isinstance(value, bool):  # numpy's count as well
            raise ValueError(f"{shown(value)} is no {'whole ' * self.whole}number")
        if not self.low <= value <= self.high:  # NaN is in no range
            raise ValueError(f"{shown(value)} is out of range; use {self.right()}")

    def plain(self, value: object) -> float:
        return int(value) if self.whole else float(value)  # torch multiplies by no integer above 2^63 - 1


@dataclass(frozen=True)
class Text(Kind):
    """Unicode text."""

    def check(self, value: object) -> None:
        if type(value) is not str:
            raise ValueError(f"{shown(value)} is no text")
        if any("\ud800" <= c <= "\udfff" for c in value):
            raise ValueError(f"{shown(value)} holds half a character (a surrogate); write it in UTF-8")


@dataclass(frozen=True)
class Choice(Kind):
    """One of a few words."""

    values: tuple[str, ...]

    def check(self, value: object) -> None:
        if not isinstance(value, str) or value not in self.values:
            raise ValueError(f"{shown(value)} is not known; use {', '.join(self.values)}")


@dataclass(frozen=True)
class Place(Kind):
    """A file, a folder or a hub id; `right` says in words which. A file's name may hold any bytes but NUL."""

    right: str

    def check(self, value: object) -> None:
        if wrong := self.wrong(value):
            raise ValueError(f"{shown(value)} {wrong} {self.right}")

    def wrong(self, value: object) -> str:
        """What is wrong with a path, as far as it can be known without the disk; "" for nothing."""
        if not isinstance(value, str | Path):
            return "is no path; give"
        if not str(value):
            return "is no path (from a shell variable that is not set?); give"
        if URL.match(str(value)):
            return "is a URL, and nothing is fetched from one; give"
        try:
            path = os.fsencode(value)  # a name on the disk that is no UTF-8 has surrogates, which this undoes
        except UnicodeEncodeError:
            return "holds half a character (a surrogate); give"
        if b"\0" in path:
            return "holds a NUL byte, which no path can; give"
        longest = max(len(name) for name in path.split(b"/"))
        if longest > LONGEST_NAME or len(path) > LONGEST_PATH:
            return f"is too long (a name has up to {LONGEST_NAME} bytes, a path {LONGEST_PATH}); give"
        return ""


@dataclass(frozen=True)
class Flag(Kind):
    """True or false; on the command line, true where it stands."""

    def check(self, value: object) -> None:
        if type(value) is not bool:
            raise ValueError(f"{shown(value)} is neither true nor false")


@dataclass(frozen=True)
class Size(Kind):
    """(height, width) in pixels, or one number for both; written WIDTHxHEIGHT on the command line."""

    largest: int

    def parse(self, text: str) -> tuple[int, int]:
        sides = text.lower().split("x")
        if len(sides) > 2 or not all(side.isdecimal() and len(side) < 10 for side in sides):
            raise argparse.ArgumentTypeError(f"{shown(text)} is no size; use a number of pixels or WIDTHxHEIGHT")
        return int(sides[-1]), int(sides[0])

    def check(self, value: object) -> None:
        sides = value if isinstance(value, list | tuple) else (value, value)
        if len(sides) != 2 or any(not isinstance(side, Integral) or isinstance(side, bool) for side in sides):
            raise ValueError(f"{shown(value)} is no pair of whole numbers")
        if not all(1 <= side <= self.largest for side in sides):
            size = f"{shown(sides[1])}x{shown(sides[0])}"
            raise ValueError(f"{size} is out of range; use sides of up to {self.largest} pixels")

    def plain(self, value: object) -> tuple[int, int]:
        height, width = value if isinstance(value, list | tuple) else (value, value)
        return int(height), int(width)


@dataclass(frozen=True)
class TokenWeights(Kind):
    """word -> s, written WORD=S, once per word."""

    is_repeated = True
    number = Number(-LARGE, LARGE)

    def parse(self, text: str) -> tuple[str, float]:
        word, _, s = text.rpartition("=")
        if not word.strip():
            raise argparse.ArgumentTypeError(f"{shown(text)} must be WORD=S, a word of the prompt and a number")
        return word.strip(), self.number.parse(s)

    def check(self, value: object) -> None:
        if not isinstance(value, dict):
            raise ValueError(f"{shown(value)} is no table of words and numbers")
        for word, s in value.items():
            Text().check(word)
            try:
                self.number.check(s)
            except ValueError as error:
                raise ValueError(f"{word}: {error}; -2 to 2 is the useful range") from None

    def plain(self, value: object) -> dict[str, float]:
        return {word: self.number.plain(s) for word, s in value.items()}


# ----------------------------------------------------------------------------------------------------- the options


def option(
    default: object,
    kind: Kind,
    help: str,
    scope: str = MIXING,
    *,
    metavar: str | None = None,
    unset: str = "",
    flags: tuple[str, ...] = (),
    former: str = "",
) -> dataclasses.Field:
    """A field of Options.

    Args:
        default: None where leaving the option out has a meaning of its own; `unset` says in words which.
        kind: what its values are.
        help, metavar: for --help.
        scope: MIXING, PICTURE or RUN.
        flags: on the command line; --NAME unless given.
        former: its name in pictures that older versions made.
    """
    facts = dict(kind=kind, help=help, scope=scope, metavar=metavar, unset=unset, flags=flags, former=former)
    return dataclasses.field(default=default, metadata=facts)


DTYPE = Choice(("fp32", "fp16", "bf16"))


@dataclass(frozen=True, kw_only=True)
class Options:
    """Every option of magicmix.py, with the general defaults. Raises ValueError for the first value that cannot be
    right. k_max and k_min are fractions of the T steps; the paper's K_max and K_min are steps."""

    # fmt: off
    prompt: str | None = option(None, Text(), "the content: what the picture is to become", PICTURE)
    layout: Path | None = option(
        None, Place("a picture file"), "take the layout from this picture (image-text mixing); - reads it "
        "from standard input", PICTURE, metavar="IMAGE")
    layout_prompt: str | None = option(
        None, Text(), "take the layout from this prompt's own denoising (text-text mixing)", PICTURE, metavar="TEXT")
    output: Path = option(
        "mix.png", Place("a name that ends in .png"), "the PNG to write; with --count, the seed is added to its name",
        RUN, flags=("-o", "--output"))

    k_max: float = option(
        0.6, Number(0, 1), "K_max / T, where denoising starts: the larger, the less of the layout's detail is there")
    k_min: float = option(
        0.3, Number(0, 1), "K_min / T, where mixing stops: the smaller, the more of the layout stays")
    nu: float = option(
        0.9, Number(0, 1), "nu, the content's share in each mixture; 1 mixes nothing in")
    token_weights: dict[str, float] | None = option(
        None, TokenWeights(), "multiply the cross-attention to a word of the prompt by its token weight s; 0 or less "
        "removes it; repeatable", metavar="WORD=S", unset="1 for all words", flags=("--token-weight", "--reweight"),
        former="reweight")
    steps: int = option(50, Number(1, 999, whole=True), "T, sampler steps from noise to clean")
    guidance: float = option(7.5, Number(0, LARGE), "g of classifier-free guidance; 1 is none, in half the time")
    negative: str = option("", Text(), "what to move away from, in place of the empty prompt", metavar="TEXT")
    sampler: str = option("ddim", Choice(("ddim", "ddpm")), "the sampler")
    eta: float = option(0.0, Number(0, 1), "DDIM's noise: 0 is deterministic")
    # 4096: beyond any use of these models; a slip or a hostile file asks for terabytes.
    size: tuple[int, int] | None = option(
        None, Size(4096), "pixels per side, or WIDTHxHEIGHT", unset="the checkpoint's own")

    seed: int = option(0, Number(0, 2**64 - 1, whole=True), "the seed of the first picture's noise eps", PICTURE)
    count: int = option(
        1, Number(1, 1000, whole=True), "variations, with seeds SEED to SEED + N - 1, in one batch", RUN, metavar="N")
    sheet: bool = option(
        False, Flag(), "write a contact sheet of all pictures as well, with -sheet added to the output's name", RUN)
    noise: Path | None = option(
        None, Place("a .npy or .safetensors file"), "take eps from this .npy or .safetensors file of (B, 4, H, W)",
        PICTURE, metavar="FILE", unset="drawn from the seed")
    noise_row: int = option(
        0, Number(0, 2**63 - 1, whole=True), "the row of that file that the first picture takes", PICTURE,
        metavar="ROW")
    keep_noise: Path | None = option(
        None, Place("a name that ends in .npy or .safetensors"), "write eps to this .npy or .safetensors file", RUN,
        metavar="FILE", unset="not written")

    weights: Path | None = option(
        None, Place("a folder, a .safetensors file or a hub id"), "a checkpoint: a folder in the diffusers format, a "
        ".safetensors file in the original format, or a hub id, optionally @revision", PICTURE, metavar="SOURCE",
        unset="the embedded one")
    unet: Path | None = option(
        None, Place("a folder or a .safetensors file"), "another UNet, a folder or a file", PICTURE, metavar="PATH",
        unset="the checkpoint's")
    vae: Path | None = option(
        None, Place("a folder or a .safetensors file"), "another autoencoder, a folder or a file", PICTURE,
        metavar="PATH", unset="the checkpoint's")
    no_ema: bool = option(False, Flag(), "the raw weights, where a file has averaged ones too", PICTURE)
    prediction: str = option(
        "auto", Choice(("auto", "epsilon", "v")), "what the UNet predicts; auto: as its files say, or a probe",
        PICTURE)
    upcast_attention: str = option(
        "auto", Choice(("auto", "on", "off")), "attention in float32; auto: as the config says, on for single files "
        "of SD 2", PICTURE)
    device: str = option("auto", Text(), "cpu, cuda, mps ...; auto: a GPU where there is one", RUN)
    dtype: str | None = option(
        None, DTYPE, "precision of the text encoder and the UNet", PICTURE, unset="fp32 on a CPU, fp16 on a GPU")
    vae_dtype: str = option(
        "fp32", DTYPE, "precision of the VAE; fp16 overflows in some checkpoints", PICTURE)

    concepts: bool = option(False, Flag(), "list the words that the checkpoint knows, and make no picture", RUN)
    quiet: bool = option(False, Flag(), "no progress bar, no messages but the paths that --again follows", RUN)
    debug: bool = option(False, Flag(), "show the traceback of an error as well", RUN)
    again: Path | None = option(
        None, Place("a picture that magicmix made"), "make a picture again from the parameters in it; other options "
        "override them", RUN, metavar="PICTURE")
    # fmt: on

    def __post_init__(self):
        check({name: value for name, value in vars(self).items() if not is_left_out(name, value)})
        for name, value in vars(self).items():
            if value is not None:
                object.__setattr__(self, name, FACTS[name]["kind"].plain(value))

    @property
    def K_max(self) -> int:
        """k_max in steps, 0 .. T. Halves go to the even neighbour, as Python rounds."""
        return round(self.k_max * self.steps)

    @property
    def K_min(self) -> int:
        """k_min in steps, 0 .. K_max, rounded likewise."""
        return round(self.k_min * self.steps)

    def only(self, scope: str) -> dict:
        """The options of one scope, by name."""
        return {name: getattr(self, name) for name in names(scope)}


FACTS = {field.name: field.metadata for field in dataclasses.fields(Options)}
DEFAULTS = {field.name: field.default for field in dataclasses.fields(Options)}


def names(*scopes: str) -> list[str]:
    """The names of the options of these scopes."""
    return [name for name, facts in FACTS.items() if facts["scope"] in scopes]


def places(*scopes: str) -> list[str]:
    """Those of them that name a file or a folder."""
    return [name for name in names(*scopes) if isinstance(FACTS[name]["kind"], Place)]


def check(values: dict, where: str = "", scopes: Sequence[str] = ANYWHERE) -> None:
    """Raises ValueError for the first value that cannot be right.

    Args:
        values: option -> value, of some options or of all.
        where: the file that they come from, to begin the message with.
        scopes: of the options that may stand there.
    """
    for name, value in values.items():
        if name not in names(*scopes):
            raise ValueError(f"{where}{name} = {shown(value)} may not stand there; use {', '.join(names(*scopes))}")
        try:
            FACTS[name]["kind"].check(value)
        except ValueError as error:
            raise ValueError(f"{where}{name} {error}") from None
    k_max, k_min = values.get("k_max", 1), values.get("k_min", 0)
    if k_min > k_max:
        raise ValueError(f"{where}k_min {k_min} is above k_max {k_max}; mixing runs from k_max down to k_min")
    last = values.get("seed", 0) + values.get("count", 1) - 1
    if last > FACTS["seed"]["kind"].high:
        raise ValueError(f"{where}seed {last}, the last of count {values['count']}, is out of range; use a smaller one")


def of_mix(own: dict, given: dict, unused: Sequence[str] = ()) -> Options:
    """The options of a mix: the general defaults, over them the checkpoint's own, over them what was given.

    Raises ValueError for a value that cannot be right, TypeError for a given option that is none of the mixing, or one
    that would not be used.
    """
    check(own, "magicmix.json: ", (MIXING,))
    given = todays_names(given)
    known = [name for name in names(MIXING) if name not in unused]
    if unknown := sorted(given.keys() - set(known)):
        raise TypeError(f"{unknown[0]!r} is no option of the mixing; those are {', '.join(known)}")
    given = {name: value for name, value in given.items() if not is_left_out(name, value)}
    check_defaults(own, given)
    return Options(**(own | given))


def check_defaults(own: dict, given: dict) -> None:
    """Raises ValueError for the first given value that cannot be right, and for a k_max or a k_min that does not go
    with the default of the other, which nobody typed."""
    check(given)
    k_max, k_min = (given.get(name, own.get(name, DEFAULTS[name])) for name in ("k_max", "k_min"))
    if k_min > k_max and "k_min" not in given:
        whose = "the checkpoint's own" if "k_min" in own else "the default"
        raise ValueError(f"k_max {k_max} is below k_min {k_min}, {whose}; give a k_min of 0 to {k_max} as well")
    if k_min > k_max and "k_max" not in given:
        whose = "the checkpoint's own" if "k_max" in own else "the default"
        raise ValueError(f"k_min {k_min} is above k_max {k_max}, {whose}; give a k_max of {k_min} to 1 as well")


def own(models: object) -> dict:
    """A checkpoint's own defaults. Raises TypeError for what is no checkpoint."""
    if not isinstance(getattr(models, "defaults", None), dict):
        raise TypeError(f"models is of the type {type(models).__name__}; give what weights.load() returns")
    return models.defaults


def seeds_of(seeds: Sequence[int] | int) -> list[int]:
    """One seed per picture. Raises TypeError for what has no length, ValueError for what are no seeds."""
    if isinstance(seeds, Integral):
        seeds = [seeds]
    try:
        check({"count": len(seeds)})  # before they are counted out: range(10**12) has a length too
        seeds = list(seeds)
    except (TypeError, OverflowError):
        raise TypeError(f"seeds is {shown(seeds)}; give a whole number, or a list or range of them") from None
    for seed in seeds:
        check({"seed": seed})
    return [int(seed) for seed in seeds]


def is_left_out(name: str, value: object) -> bool:
    """None stands for the default where that is None or empty."""
    return value is None and DEFAULTS[name] in (None, "")


# ------------------------------------------------------------------------------------------------ the command line


EXAMPLES = """examples:
  python magicmix.py "a strawberry" --layout docs/layouts/castle.png
  python magicmix.py "a tiger" --layout-prompt "a car" --count 4 --sheet -o tiger-car.png
  python magicmix.py "a panda" --layout docs/layouts/mug.png --token-weight panda=0.5 --k-max 0.8
  python magicmix.py --again tiger-car-2.png -o same.png
  python magicmix.py --concepts
"""


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        self.exit(2, f"{self.prog.removesuffix('.py')}: {one_line(message)}\n")  # without the usage

    def print_help(self, file=None):
        if code := run("magicmix", lambda: print(self.format_help(), end="")):  # argparse hides a full disk
            self.exit(code)


class ShowVersions(argparse.Action):
    """--version: prints the lines and ends the process."""

    def __call__(self, parser, *_):
        parser.exit(run("magicmix", lambda: print("\n".join(self.const()))))


def parse(
    argv: Sequence[str],
    description: str,
    embedded: dict,
    program: str = "magicmix.py",
    add: Callable[[argparse.ArgumentParser], None] = lambda parser: None,
    examples: str = EXAMPLES,
) -> dict:
    """The options that were given, by name; those that were not are absent. Ends the process with exit code 2 and one
    line for what cannot be parsed.

    Args:
        argv: without the program's name.
        description: of the command, for --help.
        embedded: the embedded checkpoint's own defaults, for --help.
        program: the command, which has all options of magicmix.py.
        add: adds its own ones to the parser.
        examples: for --help.
    """
    raw = argparse.RawDescriptionHelpFormatter
    parser = Parser(
        program, description=description, epilog=examples, formatter_class=raw, argument_default=argparse.SUPPRESS
    )
    parser.add_argument(
        "--version", action=ShowVersions, nargs=0, const=version_lines, help="show the versions and end"
    )
    for name, facts in FACTS.items():
        kind, text = facts["kind"], facts["help"] + default_text(name, embedded)
        if name == "prompt":
            parser.add_argument(name, nargs="?", help=text)
        elif isinstance(kind, Flag):
            parser.add_argument(*flags(name), dest=name, action="store_true", help=text)
        else:
            action = "append" if kind.is_repeated else "store"
            metavar = "|".join(kind.values) if isinstance(kind, Choice) else facts["metavar"]
            parser.add_argument(*flags(name), dest=name, type=kind.parse, action=action, metavar=metavar, help=text)
    add(parser)
    parsed, unknown = parser.parse_known_args(argv)
    given = vars(parsed)
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}{quotes(argv, given, unknown)}")
    repeated = [name for name in given if name in FACTS and FACTS[name]["kind"].is_repeated]
    return given | {name: dict(given[name]) for name in repeated}


def quotes(argv: Sequence[str], given: dict, unknown: list[str]) -> str:
    """What to do when the unknown arguments look like the rest of a text; "" otherwise."""
    words = [given.get("prompt", "-"), *unknown]
    if any(word.startswith("-") or len(word.split()) != 1 for word in words):
        return ""
    start = argv.index(words[0])
    is_prompt = list(argv[start : start + len(words)]) == words  # and not the rest of --negative's or another's text
    return "; write a text of several words in quotes" + (f': "{" ".join(words)}"' if is_prompt else "")


def flags(name: str) -> tuple[str, ...]:
    return FACTS[name]["flags"] or (f"--{name.replace('_', '-')}",)


def default_text(name: str, embedded: dict) -> str:
    """The default of an option as --help shows it: that of the embedded checkpoint, which a first user gets, and then
    the general one where that is another."""
    default = DEFAULTS[name] if DEFAULTS[name] not in (None, "") else FACTS[name]["unset"]
    if isinstance(FACTS[name]["kind"], Flag) or default == "":
        return ""
    if embedded.get(name, default) != default:
        return f" [{embedded[name]} with the embedded checkpoint, otherwise {default}]"
    return f" [{default}]"


def todays_names(recorded: dict) -> dict:
    """Options by name, some of whose names have changed since. Raises ValueError for one that has both names."""
    formers = {facts["former"]: name for name, facts in FACTS.items() if facts["former"]}
    for former in recorded.keys() & formers.keys():
        if formers[former] in recorded:
            raise ValueError(f"{former} is the former name of {formers[former]}; give one of them")
    return {formers.get(name, name): value for name, value in recorded.items()}


def recall(recorded: dict, asked: dict) -> dict:
    """The parameters in a picture, overridden by the options asked for. A path that comes from the picture is printed
    before anybody follows it."""
    layouts = {"layout", "layout_prompt"}
    if asked.keys() & layouts:  # a layout of either kind replaces the recorded one
        recorded = {name: value for name, value in recorded.items() if name not in layouts}
    for name in places(PICTURE):
        if name in recorded and name not in asked:
            print(f"{name}: {one_line(recorded[name])}", flush=True)
    return recorded | asked
