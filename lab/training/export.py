"""Last stage: the trained parts as weights/tiny, a checkpoint folder in the diffusers format, in float16.

python -m lab.training.export
"""

import json
import shutil
from dataclasses import asdict

import torch
from safetensors.torch import load_file, save_file

from lab.training.common import RUNS
from lab.training.data import AROUND, COLOURS, SIZE, STYLES, concepts
from lab.training.text import ENCODER, TOKENIZER, text_config
from lab.training.unet import CONFIG
from lab.training.vae import trained_config
from scheduler import ScheduleConfig
from weights import TINY

VERSION = "0.42.1"  # of diffusers, whose format this is and whose pipelines load it in the tests

# What suits this checkpoint better than the general defaults, by docs/claims.md; guidance by the sheets of lab/sheets.
OPTIONS = {"guidance": 4.0, "k_max": 0.6, "k_min": 0.08, "nu": 0.7}


def write_json(path, value: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2) + "\n")


def write_weights(path, state: dict[str, torch.Tensor]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({k: v.half().contiguous() for k, v in state.items()}, path, metadata={"format": "pt"})


def known_words() -> dict[str, list[str]]:
    """What the UNet's captions are made of, for concepts.json."""
    return {"concepts": list(concepts()), "colours": list(COLOURS), "styles": list(STYLES), "other": list(AROUND)}


def main() -> None:
    vocabulary = json.loads((TOKENIZER / "vocab.json").read_text())
    start, end = vocabulary["<|startoftext|>"], vocabulary["<|endoftext|>"]
    pipeline = {
        "_class_name": "StableDiffusionPipeline",
        "_diffusers_version": VERSION,
        "requires_safety_checker": False,
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "safety_checker": [None, None],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    text_encoder = asdict(text_config(len(vocabulary))) | {
        "architectures": ["CLIPTextModel"],
        "model_type": "clip_text_model",
        "projection_dim": 128,
        "bos_token_id": start,
        "eos_token_id": end,
        "pad_token_id": end,
        "torch_dtype": "float32",
    }
    unet = asdict(CONFIG) | {"_class_name": "UNet2DConditionModel", "_diffusers_version": VERSION}
    vae = asdict(trained_config()) | {
        "_class_name": "AutoencoderKL",
        "_diffusers_version": VERSION,
        "sample_size": SIZE,
    }
    scheduler = asdict(ScheduleConfig()) | {
        "_class_name": "DDIMScheduler",
        "_diffusers_version": VERSION,
        "clip_sample": False,
        "set_alpha_to_one": False,
        "timestep_spacing": "leading",
    }
    write_json(TINY / "model_index.json", pipeline)
    write_json(TINY / "text_encoder" / "config.json", text_encoder)
    write_json(TINY / "unet" / "config.json", unet)
    write_json(TINY / "vae" / "config.json", vae)
    write_json(TINY / "scheduler" / "scheduler_config.json", scheduler)
    write_json(TINY / "magicmix.json", OPTIONS)
    write_json(TINY / "concepts.json", known_words())
    shutil.copytree(TOKENIZER, TINY / "tokenizer", dirs_exist_ok=True)
    write_weights(TINY / "text_encoder" / "model.safetensors", load_file(ENCODER))
    for part in ("unet", "vae"):
        state = load_file(RUNS / part / "average.safetensors")
        write_weights(TINY / part / "diffusion_pytorch_model.safetensors", state)
    print(f"{sum(f.stat().st_size for f in TINY.rglob('*') if f.is_file()) / 1e6:.2f} MB in {TINY}")


if __name__ == "__main__":
    main()
