"""Stage 2: the tokenizer and the text encoder.

    python -m lab.training.text

trains a small byte-level BPE in CLIP's file format, then the text encoder contrastively against an image tower, as
CLIP was trained (Radford et al. 2021, figure 3). The text encoder is frozen afterwards, as in Stable Diffusion.
"""

import json
import random

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import CLIPTokenizer

from clip import CLIPTextConfig, CLIPTextModel
from lab.training.common import RUNS, Trainer, arguments, autocast, load_average, parameters
from lab.training.data import COLOURS, STYLES, Pictures, concepts, held_out
from lab.training.tower import ImageTower

TOKENIZER = RUNS / "tokenizer"
ENCODER = RUNS / "text" / "encoder.safetensors"
LENGTH = 32  # text tokens L; the longest caption has about 20
MERGES = 2000


def train_tokenizer(names: list[str]) -> None:
    """Writes vocab.json and merges.txt, in CLIP's order: 256 bytes, 256 bytes that end a word, merges, specials."""
    words = " ".join([*COLOURS, *STYLES, "a an the on of in and with picture emoji background"]).split()
    corpus = names + [w for w in words for _ in range(300)] + [n for n in concepts() for _ in range(100)]
    # The same normalisation and splitting that CLIPTokenizer will apply, so that training sees what it will see.
    clip = CLIPTokenizer().backend_tokenizer
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.normalizer, bpe.pre_tokenizer = clip.normalizer, clip.pre_tokenizer
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=MERGES + 512,
        initial_alphabet=alphabet,
        end_of_word_suffix="</w>",
        special_tokens=[],
        show_progress=False,
    )
    bpe.train_from_iterator(corpus, trainer)
    merges = [m.split(" ") if isinstance(m, str) else m for m in json.loads(bpe.to_str())["model"]["merges"]]
    tokens = alphabet + [a + "</w>" for a in alphabet] + ["".join(m) for m in merges]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    assert len(set(tokens)) == len(tokens)
    TOKENIZER.mkdir(parents=True, exist_ok=True)
    (TOKENIZER / "vocab.json").write_text(json.dumps({t: i for i, t in enumerate(tokens)}, ensure_ascii=False))
    (TOKENIZER / "merges.txt").write_text("\n".join(["#version: 0.2", *(" ".join(m) for m in merges)]) + "\n")
    special = {
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
    }
    config = {
        "model_max_length": LENGTH,
        "tokenizer_class": "CLIPTokenizer",
        "do_lower_case": True,
        "add_prefix_space": False,
        "errors": "replace",
        **special,
    }
    (TOKENIZER / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    (TOKENIZER / "special_tokens_map.json").write_text(json.dumps(special, indent=2) + "\n")


def tokenize(tokenizer: CLIPTokenizer, texts: list[str]) -> Tensor:
    """(B, LENGTH) ids, padded and cut."""
    return tokenizer(texts, padding="max_length", max_length=LENGTH, truncation=True, return_tensors="pt").input_ids


def text_config(vocab_size: int) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=vocab_size,
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=LENGTH,
    )


def load_text(device: torch.device) -> tuple[CLIPTokenizer, CLIPTextModel]:
    """The tokenizer and the text encoder that this stage has made, the encoder in eval mode without gradients."""
    tokenizer = CLIPTokenizer.from_pretrained(TOKENIZER)
    encoder = CLIPTextModel(text_config(len(tokenizer)))
    encoder.load_state_dict(load_file(ENCODER), strict=True)
    return tokenizer, encoder.eval().requires_grad_(False).to(device)


class Contrastive(nn.Module):
    def __init__(self, vocab_size: int):
        super().__init__()
        self.text = CLIPTextModel(text_config(vocab_size))
        self.tower = ImageTower()
        self.text_projection = nn.Linear(128, 128, bias=False)
        self.log_temperature = nn.Parameter(torch.tensor(2.66))  # CLIP's start: 1 / 0.07
        for name, p in self.text.named_parameters():
            if "embedding" in name:
                nn.init.normal_(p, std=0.02)


def ambiguous(attributes: list[tuple], captions: list[str]) -> Tensor:
    """(B, B), True where caption i may also fit picture j != i, so that the pair must count neither way: the same
    name, and nothing the caption says of style, colour and background contradicts the picture."""
    code = {word: i for i, word in enumerate([None, *STYLES, *COLOURS])}
    shows = torch.tensor([[code[a] for a in rest] for _, *rest in attributes])  # (B, 3), 0: nothing special
    says = torch.tensor(
        [
            [s * (STYLES[s - 1] in c if 0 < s <= len(STYLES) else 1) for s in row]
            for row, c in zip(shows.tolist(), captions, strict=True)
        ]
    )
    numbers = {name: i for i, name in enumerate({a[0] for a in attributes})}
    name = torch.tensor([numbers[a[0]] for a in attributes])
    fits = ((says[:, None] == 0) | (says[:, None] == shows[None])).all(-1) & (name[:, None] == name[None])
    return fits & ~torch.eye(len(name), dtype=torch.bool)


def main() -> None:
    args = arguments(__doc__, steps=3000, batch=192)
    pictures = Pictures(("concept", "other"), args.device)
    if not (TOKENIZER / "vocab.json").exists():
        train_tokenizer(sorted({row["name"] for row in pictures.rows}))
    tokenizer = CLIPTokenizer.from_pretrained(TOKENIZER)
    start, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    model = Contrastive(len(tokenizer)).to(args.device)
    print(f"text encoder {parameters(model.text):,} parameters, image tower {parameters(model.tower):,}")
    trainer = Trainer("text", model, args, decay=0.998)

    rng, generator = random.Random(trainer.step), torch.Generator().manual_seed(trainer.step)
    ours = [i for i, row in enumerate(pictures.rows) if row["use"] == "concept" and not held_out(row)]
    rest = [i for i, row in enumerate(pictures.rows) if row["use"] == "other"]
    empty = tokenize(tokenizer, [""]).to(args.device)
    name_ids = {row["name"]: tokenizer(row["name"]).input_ids[1:-1] for row in pictures.rows}

    def loss_of_step():
        half = args.batch * 2 // 3
        rows = torch.tensor(rng.choices(ours, k=half) + rng.choices(rest, k=args.batch - half))
        x, captions, attributes = pictures.batch(rows, rng, generator, tint=0.25, backdrop=0.25)
        # Samples of a diffusion model are softer and noisier than renderings: the judge must not mind.
        soft = torch.rand(len(x), 1, 1, 1, generator=generator).to(x.device) < 0.3
        x = torch.where(soft, F.interpolate(F.avg_pool2d(x, 2), scale_factor=2, mode="bilinear"), x)
        x = x + 0.1 * torch.rand(len(x), 1, 1, 1, device=x.device) * torch.randn_like(x)
        ids = tokenize(tokenizer, captions)
        first_end = (ids == end).int().argmax(1)
        # The text feature is the state of the end token, as in CLIP, or of the last token of the thing's name: the
        # concept must sit in its own tokens if a weight on them is to steer it.
        position = first_end.clone()
        for i, (name, *_) in enumerate(attributes):
            if rng.random() < 0.5:
                row, tokens = ids[i].tolist(), name_ids[name]
                found = [j for j in range(1, LENGTH - len(tokens)) if row[j : j + len(tokens)] == tokens]
                position[i] = found[0] + len(tokens) - 1
        assert (ids[:, 0] == start).all()
        with autocast(args.device):
            states = model.text(ids.to(args.device))
            nothing = model.text(empty)
            images = model.tower(x)
            texts = F.normalize(model.text_projection(states[torch.arange(len(ids)), position.to(args.device)]), dim=-1)
        logits = texts.float() @ images.float().T * model.log_temperature.exp().clamp(max=100)
        logits = logits.masked_fill(ambiguous(attributes, captions).to(args.device), float("-inf"))
        target = torch.arange(len(x), device=args.device)
        contrast = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        # Padding says nothing: its states are pulled to those of the empty prompt. What a prompt means then lies in
        # its words and its end token, not in a tail of copies that no weight on a word could reach.
        padding = (torch.arange(LENGTH) > first_end[:, None]).to(args.device)[:, :, None]
        quiet = ((states - nothing.detach()).float() ** 2 * padding).sum() / (padding.sum() * states.shape[-1])
        accuracy = (logits.argmax(1) == target).float().mean()
        return contrast + quiet, {"contrast": contrast, "padding": quiet, "pairs_right": accuracy}

    trainer.run(loss_of_step)
    save_file(trainer.averaged(), RUNS / "text" / "average.safetensors")
    load_average("text", model)
    save_file({k: v.contiguous() for k, v in model.text.state_dict().items()}, ENCODER)


if __name__ == "__main__":
    main()
