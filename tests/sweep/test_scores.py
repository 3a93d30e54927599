"""Scores: closed forms, drawn shapes, a bootstrap's known width, encoders, and a sweep's pictures scored."""

import json
import math

import numpy as np
import pytest
import torch
from conftest import LAYOUT, ROOT
from PIL import Image, ImageDraw
from safetensors.torch import load_file, save_file

import magicmix
import weights
from command import pictures
from lab.sweep.__main__ import main as sweep
from lab.sweep.scores import (
    MARGIN,
    CLIPEncoder,
    JudgeEncoder,
    Numbers,
    anchored,
    as_saved,
    average,
    bootstrap,
    correlation,
    frequencies,
    histogram,
    main,
    mean,
    measure,
    overlap,
    scores,
    silhouettes,
)
from lab.training.judge import Judge


def given(A, B):
    """Numbers of which A and B count."""
    return Numbers(*([np.asarray(A, dtype=float), np.asarray(B, dtype=float)] + [None] * (len(Numbers._fields) - 2)))


def shapes(*boxes, size=64, colour=(255, 0, 0), kind="rectangle"):
    """A picture (1, 3, size, size) of shapes on white, the last coordinates included as PIL has them."""
    canvas = Image.new("RGB", (size, size), "white")
    for box in boxes:
        getattr(ImageDraw.Draw(canvas), kind)(box, fill=colour)
    return pictures.fit(canvas, (size, size))


# -------------------------------------------------------------------------------------------------- the anchored scores


def test_scores_in_closed_form():
    """A: layout 0.9, content alone 0.1. B: layout -0.1, content alone 0.7. A half-way picture, and a one-sided one."""
    layout, alone = given(0.9, -0.1), given(0.1, 0.7)
    found = scores(given([0.5, 0.7, 0.0, 0.9, 0.1], [0.3, 0.1, 0.5, -0.1, 0.7]), layout, alone)
    expected = {
        "a": [0.5, 0.75, -0.125, 1, 0],
        "b": [0.5, 0.25, 0.75, 0, 1],
        "both": [0.5, 0.25, -0.125, 0, 0],
        "harmonic": [0.5, 2 * 0.75 * 0.25, 0, 0, 0],
        "difference": [0, 0.5, -0.875, 1, -1],
    }
    for name, values in expected.items():
        assert np.abs(getattr(found, name) - values).max() < 1e-12, name


def test_anchors_that_are_too_near_are_left_out():
    """Where one pair is nearer than the margin, none of the five scores is there; at the margin they are."""
    m = given([0.5] * 4, [0.5] * 4)
    layout = given([1, MARGIN - 1e-6, 1, -1], [0, 0, 0, 0])
    alone = given([0, 0, 0, 0], [1, 1, MARGIN - 1e-6, 1])
    for values in scores(m, layout, alone):
        assert np.isnan(values).tolist() == [False, True, True, True]
    near = given(1, 0), given(0.85, 0.05)
    assert np.isnan(scores(given(1, 0), *near).a) and not np.isnan(scores(given(1, 0), *near, CLIPEncoder.margins).a)
    assert not np.isnan(anchored(0.1, 0.0, MARGIN, MARGIN))
    assert math.isnan(anchored(0.1, 0.0, 0.0))


@pytest.fixture(scope="module")
def tigers(models):
    """Three tigers (3, 3, 128, 128) by the embedded checkpoint."""
    with torch.no_grad():
        *_, last = magicmix.text_to_image(models, "a tiger", seeds=range(3), steps=20)
        return as_saved(models, last.x)


def test_pure_and_blank_pictures_do_not_score(models, tigers):
    """The layout has a = 1 and b = 0, the content alone a = 0 and b = 1; white, black, grey and noise have next to
    nothing of both, and the average of both pictures has something."""
    encoder = JudgeEncoder()
    layout = pictures.fit(pictures.open_layout(LAYOUT).picture, (128, 128))
    (text,) = encoder.texts(["a tiger"])

    def numbers(shown):
        return Numbers(*(x.double().numpy() for x in measure(shown, layout, text, encoder)))

    anchors = numbers(layout), numbers(tigers)
    pure, alone = scores(numbers(layout), *anchors), scores(numbers(tigers), *anchors)
    assert np.abs([pure.a - 1, pure.b, alone.a, alone.b - 1]).max() < 1e-6
    noise = torch.rand(3, 3, 128, 128, generator=torch.Generator().manual_seed(0)) * 2 - 1
    for blank in (torch.ones(3, 3, 128, 128), -torch.ones(3, 3, 128, 128), torch.zeros(3, 3, 128, 128), noise):
        assert scores(numbers(blank), *anchors).both.max() < 0.2
    assert scores(numbers((tigers + layout) / 2), *anchors).both.min() > 0.2
    assert (numbers(tigers).named == encoder.names.index("tiger")).all()


def test_numbers_of_the_layout_itself(tigers):
    """All similarities are 1 and the difference is 0; the seeds' distance is that of each to the others."""
    encoder = JudgeEncoder()
    found = measure(tigers, tigers, encoder.texts(["a tiger"])[0], encoder)
    for name in ("A", "overlap", "low", "high", "colours"):
        assert (getattr(found, name) - 1).abs().max() < 1e-5, name
    assert found.grey.abs().max() == 0
    tower, texts = Judge().tower(tigers), Judge().texts
    apart = [1 - np.mean([float(tower[i] @ tower[j]) for j in range(3) if j != i]) for i in range(3)]
    assert (found.apart - torch.tensor(apart)).abs().max() < 1e-5
    assert (found.B - tower @ texts[Judge().names.index("tiger")]).abs().max() < 1e-6


# -------------------------------------------------------------------------------------------------- without an encoder


def test_silhouettes_of_drawn_shapes():
    """Two squares of 20 pixels that share a half: 200 of 600. A ring is filled, also one of diagonal lines."""
    a, b = shapes((10, 10, 29, 29)), shapes((20, 10, 39, 29))
    ours, theirs = silhouettes(a), silhouettes(b)
    assert ours.sum() == 400 and ours[0, 10, 10] and not ours[0, 9, 10]
    assert abs(overlap(ours, theirs).item() - 1 / 3) < 1e-6
    ring = shapes((10, 10, 29, 29))
    ring[:, :, 12:28, 12:28] = 1
    assert silhouettes(ring).sum() == 400
    diamond = torch.ones(1, 3, 64, 64)
    for i in range(-10, 11):
        diamond[:, :, 30 + i, [30 - (10 - abs(i)), 30 + (10 - abs(i))]] = -1
    assert silhouettes(diamond).sum() == sum(2 * (10 - abs(i)) + 1 for i in range(-10, 11))
    open_ring = ring.clone()
    open_ring[:, :, 20, 26:32] = 1  # a gap in its side lets the white in
    assert silhouettes(open_ring).sum() == 400 - 16 * 16 - 2
    both = torch.cat([a, b])
    assert torch.equal(silhouettes(both), torch.cat([ours, theirs]))


def test_the_foreground_threshold():
    """25 grey levels below white are white, 26 are not, in the darkest colour; a blank has no silhouette."""
    for level, is_there in ((230, False), (229, True)):
        shown = shapes((10, 10, 29, 29), colour=(255, level, 255))
        assert bool(silhouettes(shown).any()) == is_there
    blank = silhouettes(torch.ones(2, 3, 64, 64))
    assert not blank.any() and overlap(blank, blank).tolist() == [0, 0]
    assert silhouettes(-torch.ones(1, 3, 64, 64)).all()


def test_frequencies():
    """Block averages and the rest make up the picture; the correlation is that of the definition."""
    x = torch.rand(2, 3, 64, 32, generator=torch.Generator().manual_seed(0))
    low, high = frequencies(x)
    assert low.shape == (2, 3, 8, 4)
    assert (low[1, 2, 3, 1] - x[1, 2, 24:32, 8:16].mean()).abs() < 1e-6
    blocks = low.numpy().repeat(8, axis=2).repeat(8, axis=3)
    assert np.abs(blocks + high.numpy() - x.numpy()).max() < 1e-6
    y = torch.rand(2, 3, 64, 32, generator=torch.Generator().manual_seed(1)) + x
    expected = [np.corrcoef(x[i].ravel(), y[i].ravel())[0, 1] for i in range(2)]
    assert np.abs(correlation(x, y).numpy() - expected).max() < 1e-5
    assert correlation(x, torch.ones_like(x)).tolist() == [0, 0]


def test_colour_histograms():
    """Half red and half blue against all red share a half, wherever they are; a blank has no colours."""
    red = shapes((0, 0, 31, 31))
    mixed = torch.cat([shapes((32, 32, 47, 63)), shapes((48, 32, 63, 63), colour=(0, 0, 255))]).amin(0, keepdim=True)
    blank = torch.ones(1, 3, 64, 64)
    found = [histogram(x, silhouettes(x)) for x in (red, mixed, blank)]
    assert abs(torch.minimum(found[0], found[1]).sum() - 0.5) < 1e-6
    assert found[0].sum() == 1 and found[2].sum() == 0


# -------------------------------------------------------------------------------------------------------- the bootstrap


def test_bootstrap_of_a_normal_mean():
    """The interval of a mean of n numbers is 1.96 s / sqrt(n) to either side, within a tenth of that."""
    data = np.random.default_rng(1).normal(3, 2, 400)
    found = average(data, 1, resamples=4000)
    half = 1.96 * data.std() / 20
    assert abs(found.value - data.mean()) < 1e-12
    assert np.abs([found.low - (data.mean() - half), found.high - (data.mean() + half)]).max() < 0.1 * half


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_bootstrap_of_crossed_factors(axis):
    """Where one factor alone makes all the difference, the interval is that of its few values, not of all pictures."""
    shape = [30, 20, 25]
    effect = np.random.default_rng(axis).normal(0, 1, shape[axis])
    data = np.broadcast_to(effect.reshape([-1 if i == axis else 1 for i in range(3)]), shape)
    found = average(data, 3, resamples=2000)
    half = 1.96 * effect.std() / math.sqrt(shape[axis])
    assert abs((found.high - found.low) / 2 / half - 1) < 0.1


def test_bootstrap_keeps_pictures_together():
    """Differences between points are per picture: equal ones have no spread, however much the pictures differ."""
    data = np.random.default_rng(0).normal(0, 5, (20, 10, 8, 1)) + np.array([0.0, 1.0])
    found = bootstrap(lambda d: np.diff(mean(d, 3))[0], data, 3, resamples=200)
    assert np.abs([found.value - 1, found.low - 1, found.high - 1]).max() < 1e-12


def test_what_is_left_out_does_not_count():
    data = np.array([[1.0, np.nan, 3.0], [np.nan, np.nan, np.nan], [5.0, 7.0, np.nan]])
    assert mean(data, 2) == 4
    assert np.isnan(mean(data, (1,))).tolist() == [False, True, False]
    found = average(np.stack([data, np.full_like(data, np.nan)], axis=-1), 2)
    assert found.value[0] == 4 and found.low[0] <= 4 <= found.high[0]
    assert np.isnan([found.value[1], found.low[1], found.high[1]]).all()


# ------------------------------------------------------------------------------------------------------------- encoders


@pytest.fixture(scope="module")
def small_clip(tmp_path_factory):
    """A folder with a random CLIP model for 32 x 32 pixels, as transformers writes it."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

    folder = tmp_path_factory.mktemp("clip")
    tokenizer = CLIPTokenizer.from_pretrained(weights.TINY / "tokenizer")
    side = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = side | {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id, "bos_token_id": 0}
    config = CLIPConfig(text_config=text, vision_config=side | {"image_size": 32, "patch_size": 8}, projection_dim=16)
    torch.manual_seed(0)
    CLIPModel(config).save_pretrained(folder)
    processor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    CLIPProcessor(processor, tokenizer).save_pretrained(folder)
    return folder


@torch.no_grad()
def test_a_clip_model_from_a_folder(small_clip):
    """Its features are those of the model called by hand, on pictures normalised by hand, at 1e-5."""
    from transformers import CLIPModel, CLIPTokenizer

    encoder = CLIPEncoder(str(small_clip))
    model = CLIPModel.from_pretrained(small_clip).eval()
    grey = torch.randint(0, 256, (2, 3, 32, 32), generator=torch.Generator().manual_seed(0)).float()
    average_, spread = ([0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711])
    x = (grey / 255 - torch.tensor(average_)[:, None, None]) / torch.tensor(spread)[:, None, None]
    pooled = model.visual_projection(model.vision_model(pixel_values=x).pooler_output)
    expected = pooled / pooled.norm(dim=-1, keepdim=True)
    assert (encoder.images(grey / 127.5 - 1) - expected).abs().max() < 1e-5
    tokenizer = CLIPTokenizer.from_pretrained(weights.TINY / "tokenizer")
    for text, found in zip(["a tiger", "a retro car"], encoder.texts(["a tiger", "a retro car"])):
        ids = tokenizer(text, return_tensors="pt").input_ids
        pooled = model.text_projection(model.text_model(input_ids=ids).pooler_output)[0]
        assert (found - pooled / pooled.norm()).abs().max() < 1e-5
    assert (encoder.texts(["a tiger"]) - encoder.texts(["a retro car"])).abs().max() > 1e-3


def test_encoders_that_cannot_be(small_clip, tmp_path):
    with pytest.raises(ValueError, match="encoder '.*text_encoder' cannot be used: it is of the type clip_text_model"):
        CLIPEncoder(str(weights.TINY / "text_encoder"))
    with pytest.raises(ValueError, match="encoder '.*nothing' cannot be used"):
        CLIPEncoder(str(tmp_path / "nothing"))
    for file in small_clip.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    state = load_file(tmp_path / "model.safetensors")
    del state["visual_projection.weight"]
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="cannot be used: it has no visual_projection.weight"):
        CLIPEncoder(str(tmp_path))
    with pytest.raises(ValueError, match="the judge knows"):
        JudgeEncoder().texts(["a teapot"])


# --------------------------------------------------------------------------------------------------- a sweep's pictures


@pytest.mark.parametrize("kind", ["picture", "prompt"])
@torch.no_grad()
def test_a_sweep_is_scored(tmp_path, models, kind, capsys, small_clip):
    """Each line's a and b are those of the definition, with anchors by magicmix.py and features by the judge, at
    1e-5; and with a CLIP model they are others."""
    layout = ["--layout", LAYOUT] if kind == "picture" else ["--layout-prompt", "a house"]
    arguments = [
        "a tiger",
        *layout,
        "--nu",
        "0.5,1",
        "--seeds",
        "0..1",
        "--steps",
        "4",
        "-o",
        tmp_path / "s",
        "--quiet",
    ]
    assert sweep([*map(str, arguments)]) == 0
    assert main([str(tmp_path / "s")]) == 0
    lines = [json.loads(line) for line in (tmp_path / "s" / "scores.jsonl").read_text().splitlines()]
    assert len(lines) == 4
    judge = Judge()

    def plain(prompt, seed):
        *_, last = magicmix.text_to_image(models, prompt, seeds=[seed], steps=4)
        return magicmix.decode(models, last.x)[0]

    def features(picture):
        return judge.tower(pictures.fit(picture, (128, 128)))[0]

    text = judge.texts[judge.names.index("tiger")]
    castle = pictures.fit(pictures.open_layout(LAYOUT).picture, (128, 128))
    for line in lines:
        seed = line["options"]["seed"]
        own = magicmix.decode(models, models.vae.encode(castle))[0] if kind == "picture" else plain("a house", seed)
        m = features(Image.open(tmp_path / "s" / line["picture"]))
        own, alone = features(own), features(plain("a tiger", seed))
        a = (m @ own - alone @ own) / (1 - alone @ own)
        b = (m @ text - own @ text) / (alone @ text - own @ text)
        assert abs(line["scores"]["a"] - a) < 1e-5 and abs(line["scores"]["b"] - b) < 1e-5
        assert abs(line["scores"]["both"] - min(a, b)) < 1e-5
    table = capsys.readouterr().out
    assert table.count("| nu |") == 1 and "| 0.5 | 2 of 2 |" in table
    assert main([str(tmp_path / "s"), "--encoder", str(small_clip)]) == 0
    others = [json.loads(line) for line in (tmp_path / "s" / "scores.jsonl").read_text().splitlines()]
    assert all(abs(x["scores"]["A"] - y["scores"]["A"]) > 1e-3 for x, y in zip(lines, others))


def test_what_cannot_be_scored(tmp_path, capsys):
    assert main([str(tmp_path)]) == 2
    assert "has no index.jsonl; give one that lab.sweep made" in capsys.readouterr().err
    line = {"status": "failed", "reason": "x", "options": {}}
    (tmp_path / "index.jsonl").write_text(json.dumps(line) + "\n")
    assert main([str(tmp_path)]) == 2
    assert "no picture that was made" in capsys.readouterr().err
    other = {"status": "made", "picture": "p.png", "options": {"weights": str(ROOT), "prompt": "a tiger", "seed": 0}}
    (tmp_path / "index.jsonl").write_text(json.dumps(other) + "\n")
    assert main([str(tmp_path)]) == 2
    assert "encoder is missing" in capsys.readouterr().err
