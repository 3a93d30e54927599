"""Each network against diffusers and transformers, float32, random weights, SD1's and SD2's kind.

The bound is 1e-5 of the reference's largest value; inputs are not square, in batches of 2, through several levels.
"""

import diffusers
import pytest
import torch
import transformers
from conftest import TINY, randomise, relative_error

import weights
from clip import CLIPTextConfig, CLIPTextModel
from unet import UNet2DConditionModel, UNetConfig
from vae import AutoencoderKL, VAEConfig

BOUND = 1e-5

UNETS = {
    "sd1": dict(
        block_out_channels=(32, 64, 96), attention_head_dim=4, cross_attention_dim=24, norm_num_groups=8,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"), layers_per_block=2,
    ),
    "sd2": dict(
        block_out_channels=(32, 64, 64), attention_head_dim=(2, 4, 8), cross_attention_dim=40, norm_num_groups=16,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"), upcast_attention=True,
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), layers_per_block=1,
        use_linear_projection=True, transformer_layers_per_block=(1, 2, 3), norm_eps=1e-4,
    ),
}  # fmt: skip
VAES = {
    "sd1": dict(block_out_channels=(16, 32, 48), layers_per_block=2, norm_num_groups=8, scaling_factor=0.18215),
    "sd2": dict(block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=16, scaling_factor=0.6),
}
TEXTS = {
    "sd1": dict(hidden_act="quick_gelu", num_hidden_layers=3, num_attention_heads=4),
    "sd2": dict(hidden_act="gelu", num_hidden_layers=2, num_attention_heads=8, layer_norm_eps=1e-4),
}


def unet_pair(kind):
    """Ours and diffusers', with the same random weights."""
    oracle = randomise(diffusers.UNet2DConditionModel(sample_size=16, **UNETS[kind]), seed=1)
    ours = UNet2DConditionModel(UNetConfig(**UNETS[kind]))
    ours.load_state_dict(oracle.state_dict(), strict=True)
    return ours, oracle


def vae_pair(kind):
    n = len(VAES[kind]["block_out_channels"])
    blocks = dict(down_block_types=("DownEncoderBlock2D",) * n, up_block_types=("UpDecoderBlock2D",) * n)
    oracle = randomise(diffusers.AutoencoderKL(latent_channels=4, **blocks, **VAES[kind]), seed=3)
    ours = AutoencoderKL(VAEConfig(**blocks, **VAES[kind]))
    ours.load_state_dict(oracle.state_dict(), strict=True)
    return ours, oracle


def text_pair(kind):
    config = dict(vocab_size=99, hidden_size=32, intermediate_size=56, max_position_embeddings=21) | TEXTS[kind]
    oracle = randomise(transformers.CLIPTextModel(transformers.CLIPTextConfig(**config)), seed=5)
    ours = CLIPTextModel(CLIPTextConfig(**config))
    state = {f"text_model.{k.removeprefix('text_model.')}": v for k, v in oracle.state_dict().items()}
    ours.load_state_dict({k: v for k, v in state.items() if not k.endswith("position_ids")}, strict=True)
    return ours, oracle


def pairs():
    return [pair(kind) for pair in (unet_pair, vae_pair, text_pair) for kind in ("sd1", "sd2")]


@pytest.mark.parametrize("kind", UNETS)
@pytest.mark.parametrize("size", [(8, 12), (9, 13)])  # odd sides too: the way up must meet its skips
@torch.no_grad()
def test_unet(kind, size):
    ours, oracle = unet_pair(kind)
    g = torch.Generator().manual_seed(2)
    x = torch.randn(2, 4, *size, generator=g)
    context = torch.randn(2, 7, UNETS[kind]["cross_attention_dim"], generator=g)
    t = torch.tensor([981, 1])
    before = x.clone(), context.clone()
    assert relative_error(ours(x, t, context), oracle(x, t, context).sample) <= BOUND
    assert torch.equal(x, before[0]) and torch.equal(context, before[1])


@pytest.mark.parametrize("kind", VAES)
@torch.no_grad()
def test_vae(kind):
    ours, oracle = vae_pair(kind)
    scale = VAES[kind]["scaling_factor"]
    g = torch.Generator().manual_seed(4)
    picture, latent = torch.randn(2, 3, 24, 40, generator=g), torch.randn(2, 4, 6, 10, generator=g)
    before = picture.clone(), latent.clone()
    posterior = oracle.encode(picture).latent_dist
    for found, expected in zip(ours.posterior(picture), (posterior.mean, posterior.logvar), strict=True):
        assert relative_error(found, expected) <= BOUND
    assert relative_error(ours.encode(picture), posterior.mean * scale) <= BOUND
    assert relative_error(ours.decode(latent), oracle.decode(latent / scale).sample) <= BOUND
    assert torch.equal(picture, before[0]) and torch.equal(latent, before[1])


@pytest.mark.parametrize("kind", TEXTS)
@torch.no_grad()
def test_text(kind):
    ours, oracle = text_pair(kind)
    for length in (21, 9):
        ids = torch.randint(0, 99, (2, length), generator=torch.Generator().manual_seed(6))
        assert relative_error(ours(ids), oracle(ids).last_hidden_state) <= BOUND


def test_parameter_names_are_diffusers_own():
    for ours, oracle in pairs()[:4]:  # the text encoders' prefix differs between releases of transformers
        assert [n for n, _ in ours.named_parameters()] != []
        assert {n: p.shape for n, p in ours.named_parameters()} == {n: p.shape for n, p in oracle.named_parameters()}


@torch.no_grad()
def test_the_embedded_weights():
    models = weights.load()
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(TINY, torch_dtype=torch.float32)
    scale = pipe.vae.config.scaling_factor
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(0, len(models.tokenizer), (2, 32), generator=g)
    assert relative_error(models.text_encoder(ids), pipe.text_encoder(ids)[0]) <= BOUND
    x, t, context = torch.randn(2, 4, 12, 20, generator=g), torch.tensor([981, 1]), models.text_encoder(ids)
    assert relative_error(models.unet(x, t, context), pipe.unet(x, t, context).sample) <= BOUND
    picture = torch.rand(2, 3, 96, 160, generator=g) * 2 - 1
    assert relative_error(models.vae.encode(picture), pipe.vae.encode(picture).latent_dist.mean * scale) <= BOUND
    assert relative_error(models.vae.decode(x), pipe.vae.decode(x / scale).sample) <= BOUND
