"""The plan, against magicmix.py itself with a UNet that answers at once: which steps there are, and who shares them."""

import dataclasses
import itertools

import pytest
import torch
from conftest import with_unet
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

import magicmix
from command import pictures
from lab.sweep import grid, plan
from lab.sweep.run import Batch, Done, Once, Walk

pytestmark = pytest.mark.filterwarnings("ignore:steps .* starts at timestep:UserWarning")
PICTURES = {name: Image.linear_gradient("L").rotate(turn).convert("RGB") for name, turn in (("up", 0), ("side", 90))}


def answer(x, t, context, s):
    """Of each row alone, so that batches change no bit; and other for every x, t, text and token weight."""
    text = context.flatten(1)[:, ::97].sum(dim=1) if s is None else (context * s[..., None]).flatten(1)[:, ::97].sum(1)
    return 0.3 * x.roll(1, dims=-1) + 0.02 * text[:, None, None, None] + 0.001 * t[:, None, None, None]


@pytest.fixture(scope="module")
def quick(models):
    return dataclasses.replace(with_unet(models, answer, sample_size=2), text_encoder=Once(models.text_encoder))


class Steps:
    """Every step that a Denoiser takes, one per picture: what was asked, and what came of it."""

    def __init__(self, monkeypatch):
        self.taken = []
        take = magicmix.Denoiser.__call__

        def recorded(denoiser, x, k):
            made, x0 = take(denoiser, x, k)
            o, words = denoiser.options, tuple((denoiser.words or {}).items())
            under = denoiser.prompt, words, o.guidance, o.guidance != 1 and o.negative, o.sampler, o.steps
            self.taken += [(k, *under, *(row.numpy().tobytes() for row in pair)) for pair in zip(x, made)]
            return made, x0

        monkeypatch.setattr(magicmix.Denoiser, "__call__", recorded)


def alone(models, cell):
    """The final latent of a cell, by magicmix() as magicmix.py calls it."""
    given = cell.given
    kept = {name: given[name] for name in given if name not in ("prompt", "layout", "layout_prompt", "seed")}
    layout = PICTURES[given["layout"]] if "layout" in given else given["layout_prompt"]
    steps = list(magicmix.magicmix(models, given["prompt"], layout, seeds=given["seed"], **kept))
    if steps:
        return steps[-1].x[0]
    return models.vae.encode(pictures.fit(layout, given["size"]))[0]  # K_max = 0, as magicmix.py does it


def distinct(*values, most):
    return st.lists(st.sampled_from(values), min_size=1, max_size=most, unique=True)


GRIDS = st.fixed_dictionaries(
    {
        "prompt": distinct("a tiger", "a red car", most=2),
        "k_min": distinct(0.0, 0.1, 0.2, 0.4, 0.6, most=3),
        "nu": distinct(0.3, 0.55, 0.7, most=2),  # at 0 and 1 paths that differ meet by chance
        "steps": distinct(5, 6, most=1),
        "guidance": distinct(1.0, 4.0, most=1),
        "negative": distinct("", "a dog", most=2),
        "token_weights": st.sampled_from([[], [("a", [0.5, -1.0])]]),
        "sampler": distinct("ddim", "ddpm", most=1),
        "eta": distinct(0.0, 0.5, most=1),
        "size": st.just([(16, 16)]),
        "seed": distinct(0, 1, 5, most=3),
    }
)
# Below 1 for several text layouts, whose paths would all begin with the same step from eps, which the plan does not
# share; and not 0.2, which may be one step of DDPM, whose noise has no weight.
LAYOUTS = st.one_of(
    st.fixed_dictionaries(
        {"layout": distinct("up", "side", most=2), "k_max": distinct(0.0, 0.4, 0.6, 0.7, 1.0, most=2)}
    ),
    st.fixed_dictionaries(
        {"layout_prompt": distinct("a house", "a crown", most=2), "k_max": distinct(0.0, 0.4, 0.6, 0.7, most=2)}
    ),
    st.fixed_dictionaries({"layout_prompt": st.just(["a house"]), "k_max": distinct(0.6, 1.0, most=2)}),
)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(GRIDS, LAYOUTS, st.sampled_from([Batch(1, False), Batch(2, False), Batch(3, True), Batch(8, True)]))
def test_the_steps_are_those_of_the_cells_each_once(quick, options, layouts, batch):
    """Each cell goes through exactly the states that magicmix.py goes through for it; no step is taken twice in a
    trunk; and the plan knows how many there are."""
    cells = list(grid.of(options | layouts).cells())
    lanes, refused = plan.lanes(cells, quick.defaults, batch.size)
    assert {cell.number for cell, _ in refused} == {
        cell.number for cell in cells if cell.values["k_min"] > cell.values["k_max"]
    }
    sound = [cell for cell in cells if cell.values["k_min"] <= cell.values["k_max"]]
    with pytest.MonkeyPatch.context() as patch:
        steps = Steps(patch)
        expected = {cell.number: alone(quick, cell) for cell in sound}
        by_themselves, steps.taken = steps.taken, []
        reported = []
        made = list(Walk(quick, batch, PICTURES, report=reported.append).run(lanes))
        together = steps.taken
    assert all(isinstance(end, Done) for end in made)
    found = {cell.number: x for end in made for cell, x in zip(end.lane.cells, end.x)}
    assert found.keys() == expected.keys() and all(torch.equal(found[n], expected[n]) for n in found)
    assert set(together) == set(by_themselves) and len(together) == len(set(together))
    assert plan.calls(lanes) == len(together) == sum(reported)
    assert plan.calls_alone(lanes) == len(by_themselves)
    assert max(reported, default=0) <= batch.size
    for end in made:
        assert len(end.sizes) == end.lane.alone and max(end.sizes, default=1) <= batch.size


def largest(lanes, cuts):
    """The UNet calls of the largest part."""
    bounds = [0, *cuts, len(lanes)]
    return max(plan.calls(lanes[begin:end]) for begin, end in zip(bounds, bounds[1:]))


@settings(max_examples=60, deadline=None)
@given(GRIDS, LAYOUTS, st.integers(1, 4), st.integers(1, 4))
def test_ranks_share_all_lanes_evenly(options, layouts, ranks, batch):
    """Every lane once, in order; and of all ways to cut them, none has a smaller largest part."""
    lanes, _ = plan.lanes(grid.of(options | layouts).cells(), {}, batch)
    lanes = lanes[:12]
    shares = plan.share(lanes, ranks)
    assert len(shares) == ranks and [lane for share in shares for lane in share] == lanes
    ways = itertools.combinations_with_replacement(range(len(lanes) + 1), ranks - 1)
    assert max(map(plan.calls, shares)) == min(largest(lanes, cuts) for cuts in ways)


def counted(**given):
    lanes, refused = plan.lanes(grid.of({"prompt": ["a"], "steps": [50]} | given).cells(), {}, 8)
    assert not refused
    return plan.calls(lanes), plan.calls_alone(lanes)


def test_counts_by_hand():
    """K_max = 30 of 50, 8 seeds."""
    nine = {"nu": [i / 10 for i in range(1, 10)], "k_min": [0.0, 0.04, 0.1, 0.16, 0.2, 0.24, 0.3, 0.36, 0.4]}
    image, seeds = {"layout": ["x"], "k_max": [0.6]}, {"seed": range(8)}
    # One first step; per nu 29 more to K_min = 0; per nu and K_min of 2, 5, 8, 10, 12, 15, 18, 20 one less than K_min.
    assert counted(**image, **seeds, **nine) == (8 * (1 + 9 * 29 + 9 * (90 - 8)), 8 * 81 * 30)
    # A text layout: 50 down to the lowest K_min, once for two contents.
    text = {"layout_prompt": ["x"], "k_max": [0.6], "k_min": [0.2, 0.4], "nu": [0.5]}
    assert counted(prompt=["a", "b"], **text) == (40 + 2 * (30 + 19), 2 * (30 + 40) + 2 * (30 + 30))
    # DDPM draws on: contents part at once where K_min differs, and the layout's trajectory is still shared.
    assert counted(**text, sampler=["ddpm"]) == (40 + 30 + 30, 70 + 60)
    assert counted(**image, k_min=[0.2, 0.4], sampler=["ddpm"]) == (30 + 19, 60)
    # Fractions that round to the same step; nu where nothing is mixed; a negative prompt that is not read; no step.
    assert counted(**image, k_min=[0.2, 0.201]) == (30, 60)
    assert counted(**image, k_min=[0.6], nu=[0.1, 0.9]) == (30, 60)
    assert counted(**image, k_min=[0.2], guidance=[1.0], negative=["a", "b"]) == (30, 60)
    assert counted(layout=["x"], k_max=[0.0], k_min=[0.0]) == (0, 0)


def test_what_cannot_be_is_refused_by_its_reason():
    given = {"prompt": ["a"], "layout": ["x"], "k_max": [0.2, 0.6], "k_min": [0.1, 0.4], "seed": range(2)}
    lanes, refused = plan.lanes(grid.of(given).cells(), {}, 8)
    assert len(lanes) == 3 and len(refused) == 2
    assert {reason for _, reason in refused} == {
        "k_min 0.4 is above k_max 0.2; mixing runs from k_max down to k_min"
    }  # fmt: skip
