"""Is a port of the reference right, and if not, which of its modules is the first that is wrong?

    python lab/port/check.py DUMP             DUMP is a .npz or .safetensors file with the kit's output names
    python lab/port/check.py DUMP --json      the same for a machine
    python lab/port/check.py --list           every output that the kit knows: name, shape, module, inputs

Needs numpy and safetensors alone. README.md, beside this file, says how a dump is made. Pictures and feature maps may
come channels first, (B, C, H, W), or channels last, (B, H, W, C), and with H and W as one axis in either order. An
output may also be given as its values at the kit's positions alone, in their order.

The error of an output is the largest absolute difference at the kit's positions over the reference's largest absolute
value. Exit code: 0 when every output is there and right; 1 when one is wrong, or missing without --partial; 2 for
files that cannot be read.
"""

import argparse
import difflib
import json
import os
import sys
import zipfile
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

KIT = Path(__file__).resolve().parent / "kit"
OPTIONAL = ("noise, tiny", "noise, sd2")  # a port may take eps from the kit


@dataclass(frozen=True)
class Finding:
    """What was found about one output: error and bound, and where it is wrong what there is to say about it."""

    name: str
    module: str  # what it is the output of, in words
    error: float | None  # None where there is nothing to compare
    bound: float
    unit: str  # of error and bound
    is_right: bool
    place: str = ""  # of the largest error, with both values
    looks_like: tuple[str, ...] = ()  # the mistakes that give these very numbers


class Kit:
    """The kit's outputs: what they are, and the reference's numbers at some positions of each. Raises ValueError for a
    folder that holds none."""

    def __init__(self, folder: Path = KIT):
        self.folder = folder
        try:
            facts = json.loads((folder / "kit.json").read_text())
            self.outputs = facts["outputs"]  # name -> facts, in the order in which a port is built
            self.calls = facts["calls"]  # what is computed -> {argument: the input's name}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{folder} holds no kit: {error!r}; leave --kit out for the one beside check.py"
            ) from error

    @cached_property
    def numbers(self) -> dict[str, np.ndarray]:
        return load_file(self.folder / "expected.safetensors")

    @cached_property
    def mistakes(self) -> dict[str, dict[str, np.ndarray]]:
        """output -> {mistake: its numbers}; of many values, every n-th"""
        if not (self.folder / "mistakes.json").exists():  # while the kit is being made
            return {}
        texts, found = json.loads((self.folder / "mistakes.json").read_text()), {}
        for key, values in load_file(self.folder / "mistakes.safetensors").items():
            output, _, number = key.rpartition("/")
            found.setdefault(output, {})[texts[int(number)]] = values.astype(np.float64)
        return found

    def positions(self, name: str) -> np.ndarray | None:
        """(positions, axes), the places that an output is compared at; None for all of a small one or a picture."""
        shape = "x".join(map(str, self.outputs[name]["shape"]))
        return self.numbers.get(f"positions/{shape}")

    def sampled(self, name: str, given: np.ndarray) -> np.ndarray:
        """An output of a dump, in any of the orders that are read -> its values at the kit's positions. Raises
        ValueError for what is not this output."""
        facts, positions = self.outputs[name], self.positions(name)
        if given.dtype.kind not in "biuf":
            raise ValueError(f"holds {given.dtype}; it should be float32 or integers")
        if not np.isfinite(given).all():
            raise ValueError(f"holds {np.isnan(given).sum()} NaN and {np.isinf(given).sum()} Inf")
        shape = tuple(facts["shape"])  # (B, H, W, C) for maps, (H, W, 3) for pictures
        right = [f"{shape}"]
        if facts["axes"] == "BHWC":
            b, h, w, c = shape
            right.append(f"{(b, c, h, w)}")
            if given.shape in ((b, c, h, w), (b, c, h * w)) and given.shape != (b, h * w, c):
                given = np.moveaxis(given, 1, -1)
            if given.shape == (b, h * w, c):
                given = given.reshape(shape)
        elif facts["axes"] == "HWC":
            given = given[0] if given.ndim == 4 and len(given) == 1 else given
            given = np.moveaxis(given, 0, -1) if given.shape == (3, *shape[:2]) else given
        if positions is not None:
            right.append(f"{(len(positions),)}, the values at the kit's positions")
            if given.shape == (len(positions),):
                return given
        if given.shape != shape:
            raise ValueError(f"has the shape {given.shape}; it should be {' or '.join(right)}")
        return given.reshape(-1) if positions is None else given[tuple(positions.T.astype(int))]

    def check(self, name: str, given: np.ndarray) -> Finding:
        """One output of a dump."""
        facts = self.outputs[name]
        unit = "grey levels" if facts["axes"] == "HWC" else "of the largest value" if facts["bound"] else "off"
        found = lambda error, right, **more: Finding(name, facts["module"], error, facts["bound"], unit, right, **more)
        try:
            values = self.sampled(name, given)
        except ValueError as wrong:
            return found(None, False, place=str(wrong))
        expected = self.numbers[name]
        differences = np.abs(values.astype(np.float64) - expected.astype(np.float64))
        error, mean = float(differences.max()) / facts["largest"], float(differences.mean())
        if error <= facts["bound"] and mean <= facts.get("mean_bound", float("inf")):
            return found(error, True)
        worst = int(differences.argmax())
        positions = self.positions(name)
        at = np.unravel_index(worst, facts["shape"]) if positions is None else positions[worst]
        place = ", ".join(f"{axis} {i}" for axis, i in zip(facts["axes"].lower(), at))
        row = f", which is {facts['rows'][at[0]]}" if "rows" in facts else ""
        place = f"at ({place}){row}: {values[worst]:.7g} in the dump, {expected[worst]:.7g} in the kit"
        if "mean_bound" in facts:
            place += f"; the mean difference is {mean:.4f}, and at most {facts['mean_bound']} is right"
        return found(error, False, place=place, looks_like=self.explained(name, values, error))

    def explained(self, name: str, values: np.ndarray, error: float) -> tuple[str, ...]:
        """The mistakes whose numbers these are, the nearest first, within the output's bound; or what else can be said
        of all values together."""
        facts, expected = self.outputs[name], self.numbers[name].astype(np.float64)
        mistakes = self.mistakes.get(name, {}).items()
        near = [(np.abs(values[:: -(-len(values) // len(wrong))] - wrong).max(), text) for text, wrong in mistakes]
        close = sorted(row for row in near if row[0] / facts["largest"] <= facts["bound"])
        if close:
            return tuple(text for _, text in close)
        if not values.any():
            return ("all values are 0",)
        if facts["bound"] and error < 1e-2 and len(values) > 16:
            for kind, short in {"float16": values.astype(np.float16), "bfloat16": as_bfloat16(values)}.items():
                if np.array_equal(values, short):
                    return (f"all values have the precision of {kind}",)
        factor = float(values @ expected / (expected @ expected)) if expected.any() else 1.0
        if np.abs(values - factor * expected).max() / facts["largest"] <= facts["bound"] * max(1, abs(factor)):
            is_divided = 0 < abs(factor) < 1 and abs(1 / factor - round(1 / factor)) < 1e-3
            return (f"all values divided by {1 / factor:.6g}" if is_divided else f"all values times {factor:.6g}",)
        return ()


def as_bfloat16(values: np.ndarray) -> np.ndarray:
    """float32 with the lower half of its bits 0."""
    return (values.astype(np.float32).view(np.uint32) & 0xFFFF0000).view(np.float32)


def read(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a dump. Raises FileNotFoundError or ValueError for what is none."""
    suffix = path.suffix.lower()
    if suffix not in (".npz", ".safetensors"):
        raise ValueError(f"{str(path)!r} is of no kind that is read; let its name end in .npz or .safetensors")
    if not path.is_file():
        raise FileNotFoundError(f"{path} is no file; give the dump of your port")
    try:
        if suffix == ".safetensors":
            return load_file(path)
        if not zipfile.is_zipfile(path):
            raise ValueError("it is no .npz file")
        with np.load(path, allow_pickle=False) as file:
            return dict(file)
    except Exception as error:  # whatever the libraries trip over in files that are not what they are called
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{path} cannot be read: {reason}; save arrays of float32 or of integers in it") from error


def report(kit: Kit, dump: dict[str, np.ndarray], is_partial: bool) -> dict:
    """What there is to say about a dump: the findings per level, and the first wrong output."""
    findings = [kit.check(name, dump[name]) for name in kit.outputs if name in dump]
    wrong = [finding for finding in findings if not finding.is_right]
    missing = [name for name in kit.outputs if name not in dump and level_of(name) not in OPTIONAL]
    unknown = [name for name in dump if name not in kit.outputs]
    levels = {}
    for name in kit.outputs:
        level = levels.setdefault(level_of(name), {"right": 0, "wrong": 0, "missing": 0})
        level["missing"] += name in missing
    for finding in findings:
        levels[level_of(finding.name)]["right" if finding.is_right else "wrong"] += 1
    is_right = bool(findings) and not wrong and (is_partial or not missing)
    return {
        "right": is_right,
        "levels": levels,
        "first_wrong": asdict(first_wrong(wrong)) if wrong else None,
        "wrong": [asdict(finding) for finding in wrong],
        "missing": missing,
        "unknown": unknown,
    }


def module_key(name: str) -> str:
    """The module that an output is of: its natural and its quiet output belong together."""
    return name.removesuffix("/quiet")


def clearest(findings: list[Finding]) -> Finding:
    """Of what is wrong in one module: its natural output, unless the quiet one's error is more than ten times larger,
    as a wrong eps makes it."""
    first, last = findings[0], findings[-1]
    return last if None not in (first.error, last.error) and last.error > 10 * first.error else first


def first_wrong(wrong: list[Finding]) -> Finding:
    """What to tell of the first module that is wrong; `wrong`, not empty, is in the order in which a port is built."""
    return clearest([f for f in wrong if module_key(f.name) == module_key(wrong[0].name)])


def level_of(name: str) -> str:
    """tiny/taps/decode/decoder.conv_in -> "taps, tiny: decode" """
    model, level, rest = name.split("/", 2)
    return f"{level}, {model}" + (f": {rest.split('/')[0]}" if level in ("units", "taps", "steps") else "")


def told(found: dict) -> str:
    """A finding in words."""
    lines = [f"{found['name']}  ({found['module']})"]
    if found["error"] is not None:
        lines[0] += f": {found['error']:.2g} {found['unit']}, the bound is {found['bound']:.2g}"
    lines.append(f"  {found['place']}")
    if found["looks_like"]:
        lines.append(f"  as this gives: {'; or '.join(found['looks_like'])}")
    elif found["error"] is not None:
        lines.append("  no mistake that the kit knows gives these numbers")
    return "\n".join(lines)


def show(result: dict, kit: Kit, is_partial: bool, everything: bool) -> None:
    for level, counts in result["levels"].items():
        if counts["right"] + counts["wrong"]:
            wrong = f", {counts['wrong']} WRONG" if counts["wrong"] else ""
            missing = f", {counts['missing']} not in the dump" if counts["missing"] else ""
            print(f"{level:28}{counts['right']:4} right{wrong}{missing}")
        elif counts["missing"] and not is_partial:
            print(f"{level:28}   - not in the dump")
    for name in result["unknown"][:5]:
        like = difflib.get_close_matches(name, kit.outputs, n=1)
        print(f"not in the kit: {name}" + (f"; is it {like[0]}?" if like else ""))
    if result["first_wrong"]:
        print(f"\nThe first that is wrong:\n{told(result['first_wrong'])}")
        for found in result["wrong"] if everything else []:
            print(told(found))
        if not everything and len(result["wrong"]) > 1:
            print(f"{len(result['wrong']) - 1} more are wrong; what comes later may follow from it (--all shows them)")
    elif result["right"]:
        print("\nright" + (", as far as it goes" if result["missing"] else ""))
    elif len(result["missing"]) == len(kit.outputs) - sum(level_of(name) in OPTIONAL for name in kit.outputs):
        print("\nno output of the kit is in the dump; names look like tiny/taps/square/conv_in")
    else:
        print(
            f"\nnothing is wrong, but {len(result['missing'])} of the outputs are missing: {result['missing'][0]} ..."
        )


def list_outputs(kit: Kit) -> None:
    print("calls, and the names of what they are given in inputs.safetensors:")
    for name, given in kit.calls.items():
        print(f"{name}  {' '.join(f'{argument}={source}' for argument, source in given.items())}")
    print("\noutputs:")
    for name, facts in kit.outputs.items():
        print(f"{name}  {tuple(facts['shape'])} {facts['axes']}  {facts['module']}")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dump", type=Path, nargs="?", help="what the port computed")
    parser.add_argument("--partial", action="store_true", help="outputs that are missing are no failure")
    parser.add_argument("--all", action="store_true", help="show every wrong output, not the first alone")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print one JSON object")
    form.add_argument("--list", action="store_true", help="print what the kit holds, and no dump is read")
    parser.add_argument("--kit", type=Path, default=KIT, help="another kit's folder")
    args = parser.parse_args(argv)
    try:
        kit = Kit(args.kit)
        if args.list:
            list_outputs(kit)
            return 0
        if args.dump is None:
            raise ValueError("no dump; give a .npz or .safetensors file, or --list")
        result = report(kit, read(args.dump), args.partial)
        if args.json:
            print(json.dumps(result))
        else:
            show(result, kit, args.partial, args.all)
        sys.stdout.flush()  # a full disk shows here
        return 0 if result["right"] else 1
    except BrokenPipeError:  # of `| head`: who reads has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 2
    except (OSError, ValueError) as error:
        print(f"check: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
