"""The kit for porters: its numbers are diffusers', every mistake is named, and the port in NumPy passes.

The mistakes are made in the reference itself (lab/port/mistakes.py), and some again in the source of the NumPy port,
which shares no line with it.
"""

import ast
import importlib.util
import itertools
import json
import subprocess
import sys
import types

import diffusers
import numpy as np
import pytest
import torch
import transformers
from conftest import ROOT, run
from PIL import Image
from safetensors.numpy import load_file, save_file
from safetensors.torch import save_file as torch_save

from lab.port import make, reference
from lab.port.cases import KIT, MODELS
from lab.port.check import Kit, clearest, main, module_key, report
from lab.port.mistakes import MISTAKES, made, text_of

PORT = ROOT / "lab" / "port"


@pytest.fixture(scope="module")
def kit():
    return Kit()


@pytest.fixture(scope="module")
def inputs():
    return make.read_inputs(KIT)


@pytest.fixture(scope="module")
def checkpoints():
    return make.checkpoints(KIT, torch.float32)


@pytest.fixture(scope="module")
def dump(checkpoints, inputs):
    """What the reference itself gives, in float32."""
    return {name: tensor.numpy() for name, tensor in reference.outputs(checkpoints, MODELS, inputs)}


def first_wrong(kit, named):
    """Of outputs as they come, what the checker says of the first module that is wrong; None where all are right."""
    for _, group in itertools.groupby(named, key=lambda row: module_key(row[0])):
        findings = [kit.check(name, np.asarray(array)) for name, array in group]
        if wrong := [finding for finding in findings if not finding.is_right]:
            return clearest(wrong)
    return None


# -------------------------------------------------------------------------------------------------------- the numbers


def test_the_reference_is_right(kit, dump):
    result = report(kit, dump, is_partial=False)
    assert result["right"] and not result["missing"] and not result["unknown"], result["first_wrong"]
    assert set(dump) == set(kit.outputs)


THEIRS = {
    "text": lambda folder: transformers.CLIPTextModel.from_pretrained(folder / "text_encoder"),
    "encode": lambda folder: diffusers.AutoencoderKL.from_pretrained(folder / "vae"),
    "square": lambda folder: diffusers.UNet2DConditionModel.from_pretrained(folder / "unet"),
    "oblong": lambda folder: diffusers.UNet2DConditionModel.from_pretrained(folder / "unet"),
    "decode": lambda folder: diffusers.AutoencoderKL.from_pretrained(folder / "vae"),
}
CALLED = {
    "text": lambda net, of: net(of("ids")).last_hidden_state,
    "encode": lambda net, of: net.encode(of("picture")).latent_dist.mean * net.config.scaling_factor,
    "square": lambda net, of: net(of("x"), of("t"), of("context")).sample,
    "oblong": lambda net, of: net(of("x"), of("t"), of("context")).sample,
    "decode": lambda net, of: net.decode(of("x") / net.config.scaling_factor).sample,
}


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
@pytest.mark.parametrize("call", THEIRS)
@torch.no_grad()
def test_the_taps_are_those_of_diffusers(kit, inputs, model, call):
    """In float64, the result and every layer that has weights, at the kit's own bounds."""
    network = THEIRS[call](model.folder).double()
    found = {}
    for name, module in network.named_modules():
        name = name if call != "text" or name.startswith("text_model.") else f"text_model.{name}"  # transformers 5
        if (
            f"{model.name}/taps/{call}/{name}" in kit.outputs
            and next(module.parameters(recurse=False), None) is not None
        ):
            module.register_forward_hook(lambda module, _, output, name=name: found.__setitem__(name, output))
    given = lambda what: inputs[f"{model.name}/taps/{call}/{what}"]
    found["output"] = CALLED[call](
        network, lambda what: given(what).double() if given(what).is_floating_point() else given(what)
    )
    expected = [name for name in kit.outputs if name.startswith(f"{model.name}/taps/{call}/")]
    assert len(found) > len(expected) / 2
    for name, tensor in found.items():
        finding = kit.check(f"{model.name}/taps/{call}/{name}", tensor.numpy())
        assert finding.is_right, finding


def test_the_kit_is_small():
    assert sum(path.stat().st_size for path in PORT.rglob("*") if "__pycache__" not in path.parts) < 4_000_000


# ------------------------------------------------------------------------------------------------------- the mistakes


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.__name__)
def test_every_mistake_is_named(kit, inputs, checkpoints, mistake):
    with made(mistake, checkpoints) as changed:
        named = reference.outputs(changed, MODELS, inputs)
        if MISTAKES[mistake] is None:  # whole mixes take long; make.py runs those too
            named = itertools.takewhile(lambda row: "/loop/" not in row[0], named)
        finding = first_wrong(kit, named)
    assert (finding.name if finding else None) == MISTAKES[mistake]
    if finding and finding.error is not None:
        assert text_of(mistake) in finding.looks_like
        is_picture = finding.unit == "grey levels"  # judged by the mean too
        assert is_picture or finding.error > 2 * finding.bound, "too near to what is right"


# What is changed in the NumPy port's source: (old, new, the output that is named, what is said of it).
IN_NUMPY = [
    ("EPS = 1e-6  # of the transformers", "EPS = 1e-5  #", "attentions.0.norm/quiet", "eps 1e-5 for 1e-6 in the UNet"),
    ("pad=(0, 1)", "pad=(1, 1)", "encoder.down_blocks.2.downsamplers.0", "All four sides padded"),
    ("[np.cos(angles), np.sin(angles)]", "[np.sin(angles), np.cos(angles)]", "unet/time_proj", "Sines before cosines"),
    ("value, gate = np.split", "gate, value = np.split", "ff.net.0", "halves swapped"),
    ("[x, skips.pop()]", "[skips.pop(), x]", "up_blocks.0.resnets.0.norm1", "The skip before x"),
    ("causal=True)", "causal=False)", "layers.0.self_attn", "No causal mask"),
    ("nu * x_content + (1 - nu) * layout_k", "x_content", "steps/image/x", "The mixture shown to the UNet and then"),
    ("layout(k - 1) if k - 1", "layout(k) if k - 1", "steps/image/layout", "layout_k mixed into"),
    ("return np.round(np", "return np.floor(np", "loop/image/picture", "rounded down"),
]


def changed_port(old, new, monkeypatch):
    """numpy_dump.py on a NumPy port with a mistake in its source."""
    source = (PORT / "numpy_port.py").read_text()
    assert source.count(old) == 1, f"{source.count(old)} times in the port: {old}"
    port = types.ModuleType("numpy_port")
    port.__file__ = str(PORT / "numpy_port.py")
    exec(compile(source.replace(old, new), port.__file__, "exec"), port.__dict__)
    monkeypatch.setitem(sys.modules, "numpy_port", port)
    spec = importlib.util.spec_from_file_location("numpy_dump", PORT / "numpy_dump.py")
    dumper = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(dumper)
    return dumper


@pytest.mark.parametrize(("old", "new", "where", "said"), IN_NUMPY)
def test_a_mistake_in_another_program_is_named(kit, monkeypatch, old, new, where, said):
    dumper = changed_port(old, new, monkeypatch)
    stored = load_file(KIT / "inputs.safetensors")
    named = (
        (f"{name}/{output}", array)
        for name, folder in dumper.FOLDERS.items()
        for output, array in dumper.dump_of(dumper.port.Model(folder), name, stored)
    )
    finding = first_wrong(kit, named)
    assert finding is not None and finding.name.endswith(where)
    assert any(said in text for text in finding.looks_like), finding


# ------------------------------------------------------------------------------------------------------- the NumPy port


@pytest.fixture(scope="module")
def numpy_dump(tmp_path_factory):
    path = tmp_path_factory.mktemp("port") / "numpy.safetensors"
    subprocess.run([sys.executable, PORT / "numpy_dump.py", path], check=True)
    return path


def test_the_numpy_port_is_right(kit, numpy_dump):
    result = report(kit, load_file(numpy_dump), is_partial=False)
    assert result["right"] and not result["missing"] and not result["unknown"], result


@pytest.mark.parametrize(
    "arguments", [("--layout", ROOT / "docs/layouts/mug.png"), ("--layout-prompt", "a car", "--seed", "3")]
)
def test_the_numpy_port_makes_the_same_picture(tmp_path, arguments):
    assert run("a panda", *arguments, "-o", "theirs.png", cwd=tmp_path).code == 0
    ours = [sys.executable, PORT / "numpy_port.py", "a panda", *arguments, "-o", tmp_path / "ours.png"]
    subprocess.run(ours, check=True)
    pictures = (np.asarray(Image.open(tmp_path / f"{side}.png"), float) for side in ("ours", "theirs"))
    differences = np.abs(np.subtract(*pictures))
    assert differences.max() <= 1 and differences.mean() < 0.001


@pytest.mark.parametrize(
    ("program", "allowed"),
    [
        ("check.py", {"numpy", "safetensors"}),
        ("numpy_port.py", {"numpy", "safetensors", "PIL"}),
        ("numpy_dump.py", {"numpy", "safetensors", "PIL", "numpy_port"}),
    ],
)
def test_a_porter_needs_nothing_of_the_project(program, allowed):
    nodes = list(ast.walk(ast.parse((PORT / program).read_text())))
    imported = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    assert {name.partition(".")[0] for name in imported} - set(sys.stdlib_module_names) <= allowed


# --------------------------------------------------------------------------------------------------------- the checker


def checked(tmp_path, dump, *arguments, suffix=".safetensors"):
    """The exit code of check.py on a dump."""
    path = tmp_path / f"dump{suffix}"
    if suffix == ".npz":
        np.savez(path, **dump)
    else:
        save_file({name: np.ascontiguousarray(array) for name, array in dump.items()}, path)
    return main([str(path), *arguments])


CONV = "tiny/taps/square/down_blocks.0.attentions.0.proj_in"  # a 1 x 1 convolution: (2, 96, 16, 16)


@pytest.mark.parametrize("suffix", [".safetensors", ".npz"])
@pytest.mark.parametrize(
    "given",
    [
        lambda array, kit: array,
        lambda array, kit: np.moveaxis(array, 1, -1),
        lambda array, kit: np.moveaxis(array, 1, -1).reshape(2, 256, 96),
        lambda array, kit: kit.sampled(CONV, array),
        lambda array, kit: array.astype(np.float64),
    ],
    ids=["channels first", "channels last", "tokens", "positions alone", "float64"],
)
def test_every_order_of_axes_is_read(tmp_path, kit, dump, given, suffix, capsys):
    assert checked(tmp_path, {CONV: given(dump[CONV], kit)}, "--partial", suffix=suffix) == 0
    turned = np.flip(dump[CONV], axis=2)
    assert checked(tmp_path, {CONV: given(turned, kit)}, "--partial", suffix=suffix) == 1


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda array: array[:, :5], "has the shape (2, 5, 16, 16); it should be (2, 16, 16, 96) or (2, 96, 16, 16)"),
        (lambda array: np.where(array == array.max(), np.nan, array), "holds 1 NaN and 0 Inf"),
        (lambda array: np.where(array == array.min(), np.inf, array), "holds 0 NaN and 1 Inf"),
        (lambda array: -array, "all values times -1"),
        (lambda array: array / 255, "all values divided by 255"),
        (lambda array: 0 * array, "all values are 0"),
        (lambda array: array.astype(np.float16), "the precision of float16"),
        (lambda array: array + (np.arange(16) == 3) * 0.1, "no mistake that the kit knows gives these numbers"),
    ],
)
def test_what_is_wrong_is_said(tmp_path, kit, dump, change, said, capsys):
    array = dump[CONV]
    assert checked(tmp_path, {CONV: change(array)}, "--partial") == 1
    assert said in capsys.readouterr().out


def test_a_dump_that_lacks_something_is_not_right(tmp_path, dump, capsys):
    less = {name: array for name, array in dump.items() if name != CONV}
    assert checked(tmp_path, less) == 1
    assert CONV in capsys.readouterr().out
    assert checked(tmp_path, less, "--partial") == 0
    assert checked(tmp_path, {}, "--partial") == 1, "an empty dump proves nothing"
    without_noise = {name: array for name, array in dump.items() if "/noise/" not in name}
    assert checked(tmp_path, without_noise) == 0, "a port may take eps from the kit"


def test_a_name_that_the_kit_does_not_know_is_told(tmp_path, dump, capsys):
    assert checked(tmp_path, {CONV: dump[CONV], CONV.replace("proj_in", "projin"): dump[CONV]}, "--partial") == 0
    assert f"is it {CONV}?" in capsys.readouterr().out


def test_a_machine_can_read_it(tmp_path, dump, capsys):
    assert (
        checked(tmp_path, dump | {CONV: dump[CONV] * 2, "tiny/tokens/ids": dump["tiny/tokens/ids"][:1]}, "--json") == 1
    )
    result = json.loads(capsys.readouterr().out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert not result["right"] and result["first_wrong"]["name"] == "tiny/tokens/ids"
    assert [found["name"] for found in result["wrong"]] == ["tiny/tokens/ids", CONV]


@pytest.mark.parametrize("kind", ["complex64", "U10", "datetime64[s]"])
def test_what_holds_no_numbers_is_wrong(tmp_path, dump, kind, capsys):
    array = np.zeros(dump[CONV].shape, kind) if kind != "complex64" else dump[CONV] + np.complex64(1j)
    assert checked(tmp_path, {CONV: array}, "--partial", suffix=".npz") == 1
    assert f"holds {array.dtype}" in capsys.readouterr().out


@pytest.mark.parametrize("turned", [lambda p: p, lambda p: p[None], lambda p: np.moveaxis(p, -1, 0)])
def test_pictures_may_have_their_channels_first(tmp_path, dump, turned):
    name = "tiny/loop/image/picture"
    assert checked(tmp_path, {name: turned(dump[name])}, "--partial") == 0
    assert checked(tmp_path, {name: turned(dump[name] ^ 1)}, "--partial") == 1


@pytest.mark.parametrize(
    ("name", "row", "said"),
    [
        ("tiny/steps/image/x", 3, "the step from k 27"),
        ("tiny/loop/text/x", 30, "the step from k 14"),
        ("tiny/steps/text/layout_x", 2, "the step from k 28 along the layout's prompt"),
        ("sd2/sampler/ddim", 1, "which is k 26"),
        ("tiny/schedule/K", 2, "which is T 30, k_max 0.75, k_min 0.25"),
        ("tiny/tokens/ids", 3, "the prompt 'a coffee machine'"),
    ],
)
def test_the_row_is_told_in_words(tmp_path, dump, name, row, said, capsys):
    array = dump[name].copy()
    array[row] = array[row] + 1
    assert checked(tmp_path, {name: array}, "--partial") == 1
    assert said in capsys.readouterr().out


def test_names_of_another_kind_are_told(tmp_path, dump, capsys):
    assert checked(tmp_path, {CONV.removeprefix("tiny/"): dump[CONV]}, "--partial") == 1
    assert "no output of the kit is in the dump" in capsys.readouterr().out


def test_a_folder_without_a_kit_is_refused(tmp_path, capsys):
    for text in (None, "{", "{}"):
        if text:
            (tmp_path / "kit.json").write_text(text)
        assert main(["--list", "--kit", str(tmp_path)]) == 2
        assert capsys.readouterr().err.startswith(f"check: {tmp_path} holds no kit")


@pytest.mark.parametrize(
    ("where", "said"), [("| head -1", ""), ("> /dev/full", "check: [Errno 28] No space left on device\n")]
)
def test_output_that_nobody_reads(where, said):
    command = f"{sys.executable} {PORT / 'check.py'} --list {where}"
    assert subprocess.run(command, shell=True, capture_output=True, text=True).stderr == said


@pytest.mark.parametrize(
    "name", ["absent.npz", "broken.npz", "broken.safetensors", "dump.txt", "pickled.npz", "float8.safetensors"]
)
def test_a_file_that_is_no_dump_is_refused(tmp_path, name, capsys):
    if name.startswith("broken"):
        (tmp_path / name).write_bytes(b"PK\x03\x04 nothing")
    elif name == "dump.txt":
        (tmp_path / name).write_text("1 2 3")
    elif name == "pickled.npz":
        np.savez(tmp_path / name, **{CONV: np.array([{}], dtype=object)})
    elif name.startswith("float8"):
        torch_save({CONV: torch.zeros(2, dtype=torch.float8_e4m3fn)}, tmp_path / name)
    assert main([str(tmp_path / name)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("check: ") and error.count("\n") == 1 and name in error


def test_the_list_names_every_output(kit, capsys):
    assert main(["--list"]) == 0
    listed = {line.split()[0] for line in capsys.readouterr().out.splitlines() if line}
    assert set(kit.outputs) | set(kit.calls) <= listed
