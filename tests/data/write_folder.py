"""What a release of diffusers and transformers writes: run in its environment, `python write_folder.py FOLDER`.

Works from diffusers 0.10 and transformers 4.25 on; torch alone must be there besides. It needs this repository's clone
for CLIP's vocabulary, but none of its requirements. FOLDER gets

- sd1, sd2 and sd1-added: small pipelines of SD 1's and SD 2's kind, saved by save_pretrained, the last with tokens of
  textual inversions in its tokenizer and text encoder;
- tokenizers/{slow,fast}-{sd1,sd2,added}: the tokenizers that this release's two classes write;
- schedulers/CLASS.{own,sd1,sd2}.json: every scheduler class with its own defaults, and by from_config from that of an
  SD 1 (epsilon) and an SD 2 (v prediction) pipeline;
- facts.json: the versions; the ids that CLIPTokenizerFast gives for PROMPTS in each of the tokenizers' folders, and the
  prompts for which CLIPTokenizer gives others; and the schedulers that cannot be made.

pack_folders.py makes writers.json.gz of several such folders, and test_writers.py makes folders of that again.
"""

import functools
import gzip
import inspect
import json
import sys
from pathlib import Path

import diffusers
import torch
import transformers

MERGES = Path(__file__).resolve().parents[2] / "weights" / "clip_merges.txt.gz"
ADDED = ["<cat-toy>", "<cat-toy>_1", "MyStyle"]  # as diffusers' load_textual_inversion names them, and a free name
PROMPTS = [
    "", " ", "a", "!", "!!", "hello!", "a tiger", "A TIGER", "  a   tiger\t\n ", "a\u00a0tiger", "don't",
    "DON'T they're", "a photo of an astronaut riding a horse on mars, highly detailed, 8k",
    "(masterpiece:1.2), [blurry], {a|b}", "1girl, solo, long_hair", "3.14 + 2,718 = 5.86", "1234567890",
    "50% off @ $9.99 #sale", "a/b\\c", "http://a.b/c?d=e&f", "&amp; &lt;b&gt; <b>bold</b>",
    "snake_case CamelCase kebab-case", "it's the dog's, o'clock, we'll, I'm, I'd, I've", "<|startoftext|>",
    "a <|endoftext|> b", "<|STARTOFTEXT|>", "|", "``quotes'' \"double\" 'single'", "...", "?!?!", "-- - –— ―",
    "café", "cafe\u0301", "CAFÉ", "naïve façade", "Ångström", "smörgåsbord", "Zürich straße", "STRASSE ẞ",
    "ÆØÅ æøå", "İstanbul ıŞĞ", "Łódź żółć", "čšž ČŠŽ", "tiếng Việt", "Ελληνικά", "ΣΊΣΥΦΟΣ σίσυφος", "Москва",
    "МОСКВА ёлка й", "עברית", "العربية", "हिन्दी", "ไทย", "한국어", "ㅎㅏㄴ", "日本語のテキスト",
    "カタカナ ｶﾀｶﾅ", "漢字", "一只猫", "a 猫 b", "中文，标点。", "全角ＡＢＣ１２３", "ﬁ ﬂ ligature",
    "①②③ ½ ¼ x² H₂O", "Ⅷ ⅷ ㎏ №", "™ © ® € £ ¥ §", "→ ← ↔ ∞ ≠ ≤ √", "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𝓢", "😀", "😀😀 a 😀b", "👍🏽",
    "👩\u200d👩\u200d👧\u200d👦", "🏳️\u200d🌈", "🇩🇪🇯🇵", "❤️ ❤", "zero\u200bwidth", "soft\u00adhyphen",
    "bom\ufeffinside", "rtl \u202eoverride\u202c", "combining a\u0308\u0323", "a\u0323\u0308",
    "\u0344 \u2126 \u212b", "control\x07bell", "line\r\nfeed", "tab\tbed", "vertical\x0bform\x0c",
    "nul\x00byte", "\ufffd replacement", "\u2028 line \u2029 paragraph", "\u3000wide\u3000space",
    "schÃ¶n â€œmojibakeâ€\x9d", "l’amour “curly” quotes…", "x" * 100, "supercalifragilisticexpialidocious",
    "aaaaAAAAaaaaAAAA", "a " * 100, "tiger " * 75, "tiger " * 76, "word, " * 60, "😀" * 40, "字" * 90,
    "a <cat-toy> on a beach", "<cat-toy><cat-toy>_1", "a<cat-toy>b <CAT-TOY>", "in MyStyle",
    "in mystyle, MYSTYLE", "MyStyles aMyStyle MyStyle,", " <cat-toy>  _1 ",
]  # fmt: skip

SMALL = {
    "sd1": {
        "unet": dict(block_out_channels=(16, 32), down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
                     up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), attention_head_dim=4, cross_attention_dim=32,
                     norm_num_groups=8, layers_per_block=1, sample_size=16),
        "vae": dict(block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8),
        "text": dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                     hidden_act="quick_gelu"),
    },
    "sd2": {
        "unet": dict(block_out_channels=(16, 32, 32), down_block_types=("CrossAttnDownBlock2D",) * 2 + ("DownBlock2D",),
                     up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 2, attention_head_dim=(2, 4, 8),
                     cross_attention_dim=40, norm_num_groups=8, layers_per_block=2, sample_size=24,
                     use_linear_projection=True, upcast_attention=True),
        "vae": dict(block_out_channels=(8, 16, 16), layers_per_block=2, norm_num_groups=4),
        "text": dict(hidden_size=40, intermediate_size=96, num_hidden_layers=3, num_attention_heads=5,
                     hidden_act="gelu", bos_token_id=0, eos_token_id=2, pad_token_id=1),  # as published
    },
}  # fmt: skip
SCHEDULE = dict(num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
                steps_offset=1, set_alpha_to_one=False)  # fmt: skip


@functools.cache
def clip_vocabulary() -> tuple[dict[str, int], list[str]]:
    """CLIP's vocab.json and the lines of its merges.txt, from the merges alone."""
    merges = gzip.decompress(MERGES.read_bytes()).decode().splitlines()
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]  # GPT-2's order of the bytes
    alphabet = [chr(b) for b in printable] + [chr(256 + i) for i in range(256 - len(printable))]
    tokens = [*alphabet, *(a + "</w>" for a in alphabet), *(m.replace(" ", "") for m in merges)]
    return {token: i for i, token in enumerate([*tokens, "<|startoftext|>", "<|endoftext|>"])}, merges


def published_tokenizer(folder: Path, pad: str) -> Path:
    """The four files of the published SD 1 and SD 2 folders: `pad` stands in special_tokens_map.json only."""
    folder.mkdir(parents=True)
    vocabulary, merges = clip_vocabulary()
    special = lambda text: dict(content=text, lstrip=False, normalized=True, rstrip=False, single_word=False)
    start, end = special("<|startoftext|>"), special("<|endoftext|>")
    named = {"bos_token": start, "eos_token": end, "unk_token": end}
    config = {name: {"__type": "AddedToken", **token} for name, token in named.items()} | {
        "add_prefix_space": False, "do_lower_case": True, "errors": "replace", "model_max_length": 77,
        "pad_token": "<|endoftext|>", "tokenizer_class": "CLIPTokenizer",
    }  # fmt: skip
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), "utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", "utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "special_tokens_map.json").write_text(json.dumps({**named, "pad_token": pad}))
    return folder


def make(cls, fields: dict):
    """cls(**fields), less the fields that this release does not have."""
    known = inspect.signature(cls.__init__).parameters
    return cls(**{name: value for name, value in fields.items() if name in known})


def write_pipeline(kind: str, tokenizer, folder: Path) -> None:
    small = SMALL[kind]
    config = transformers.CLIPTextConfig(vocab_size=49408, max_position_embeddings=77, **small["text"])
    text_encoder = transformers.CLIPTextModel(config)
    text_encoder.resize_token_embeddings(len(tokenizer))
    n = len(small["vae"]["block_out_channels"])
    blocks = dict(down_block_types=("DownEncoderBlock2D",) * n, up_block_types=("UpDecoderBlock2D",) * n)
    pipeline = diffusers.StableDiffusionPipeline(
        vae=make(diffusers.AutoencoderKL, dict(latent_channels=4, **blocks, **small["vae"])),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=make(diffusers.UNet2DConditionModel, small["unet"]),
        scheduler=sd_scheduler(kind),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder, safe_serialization=True)


def sd_scheduler(kind: str):
    """The published ones: SD 1 has PNDM, SD 2's v model DDIM."""
    if kind == "sd1":
        return diffusers.PNDMScheduler(skip_prk_steps=True, **SCHEDULE)
    return diffusers.DDIMScheduler(clip_sample=False, prediction_type="v_prediction", **SCHEDULE)


def write_schedulers(folder: Path) -> dict[str, str]:
    """Every scheduler class that this release exports. Returns those that cannot be made, with the reason."""
    folder.mkdir()
    failed = {}
    ways = {"own": None, "sd1": sd_scheduler("sd1").config, "sd2": sd_scheduler("sd2").config}
    for name in sorted(n for n in dir(diffusers) if n.endswith("Scheduler") and not n.startswith("Flax")):
        for way, config in ways.items():
            try:
                cls = getattr(diffusers, name)
                (cls() if config is None else cls.from_config(config)).save_pretrained(folder / "one")
            except Exception as error:
                failed[f"{name}.{way}"] = f"{type(error).__name__}: {error}".strip().splitlines()[0]
            else:
                (folder / "one" / "scheduler_config.json").rename(folder / f"{name}.{way}.json")
    return failed


def token_ids(cls, folder: Path) -> list[list[int]]:
    tokenizer = cls.from_pretrained(str(folder))
    return tokenizer(PROMPTS, padding="max_length", max_length=77, truncation=True).input_ids


def main(folder: Path) -> None:
    torch.manual_seed(0)
    slow, fast = transformers.CLIPTokenizer, transformers.CLIPTokenizerFast
    ids, others = {}, {}
    for kind, pad in (("sd1", "<|endoftext|>"), ("sd2", "!"), ("added", "<|endoftext|>")):
        published = published_tokenizer(folder / "published" / kind, pad)
        for cls, speed in ((slow, "slow"), (fast, "fast")):
            tokenizer = cls.from_pretrained(str(published))
            if kind == "added":
                tokenizer.add_tokens(ADDED)
            place = folder / "tokenizers" / f"{speed}-{kind}"
            tokenizer.save_pretrained(str(place))
            ids[place.name] = token_ids(fast, place)
            others[place.name] = [p for p, a, b in zip(PROMPTS, token_ids(slow, place), ids[place.name]) if a != b]
            if speed == "slow":  # the class that model_index.json names
                tokenizer("used", padding="max_length", max_length=77, truncation=True)  # newer releases save that too
                name = "sd1-added" if kind == "added" else kind
                write_pipeline("sd2" if kind == "sd2" else "sd1", tokenizer, folder / name)
    facts = {
        "diffusers": diffusers.__version__,
        "transformers": transformers.__version__,
        "ids": ids,
        "slow_differs": others,
        "failed": write_schedulers(folder / "schedulers"),
    }
    (folder / "facts.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
