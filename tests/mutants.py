"""Single mistakes, put into the code one at a time: does `make check` find each of them?

    python -m tests.mutants TEST ...           the table below, against these test files
    python -m tests.mutants --only 3 7 TEST    only these rows

Each mistake replaces one piece of text that stands exactly once in its file, in a scratch copy of the repository. The
tests then run in a process that was forked after the slow imports, and stop at the first failure. Writes
docs/mutants.md when the whole table was run; exits with 1 when a mistake was not found.
"""

import argparse
import io
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # two processes run side by side; and a fork does not take threads along
ROOT = Path(__file__).resolve().parent.parent

# file, what stands there, what is put in its place
MUTANTS = [
    # the algorithm
    ("magicmix.py", "if k - 1 >= K_min:", "if k - 1 > K_min:"),
    ("magicmix.py", "if k - 1 >= K_min:", "if k >= K_min:"),
    ("magicmix.py", "layout_k = layout(k - 1)", "layout_k = layout(k)"),
    ("magicmix.py", "x = nu * x_content + (1 - nu) * layout_k", "x = (1 - nu) * x_content + nu * layout_k"),
    ("magicmix.py", "x = nu * x_content + (1 - nu) * layout_k\n", "mixed = nu * x_content + (1 - nu) * layout_k; x = x_content\n"),
    ("magicmix.py", "for k in range(K_max, 0, -1):", "for k in range(K_max, 1, -1):"),
    ("magicmix.py", "for k in range(k_from, k_to, -1):", "for k in range(k_from, k_to - 1, -1):"),
    ("magicmix.py", "latents[step.k] = step.x", "latents[step.k] = step.x0"),
    ("magicmix.py", 'eps, o.steps, K_min, "layout")', 'eps, o.steps, 0, "layout")'),
    ("magicmix.py", "e_uncond, e_cond = e.chunk(2)", "e_cond, e_uncond = e.chunk(2)"),
    ("magicmix.py", "if self.options.guidance == 1 else", "if self.options.guidance != 1 else"),
    ("magicmix.py", "e = e_uncond + o.guidance * (e_cond - e_uncond)", "e = e_cond + o.guidance * (e_cond - e_uncond)"),
    ("magicmix.py", "[*negative, self.prompt]", "[self.prompt, *negative]"),
    ("magicmix.py", "else [self.options.negative]", 'else [""]'),
    ("magicmix.py", "torch.ones_like(s) for _ in negative", "s for _ in negative"),
    ("magicmix.py", "self.context.repeat_interleave(count, dim=0)", "self.context.repeat(count, 1, 1)"),
    ("magicmix.py", "self.schedule.t[k], device", "self.schedule.t[k - 1], device"),
    ("magicmix.py", "Denoiser(models, schedule, o, noise, layout), {", "Denoiser(models, schedule, o, noise, layout, o.token_weights), {"),
    ("magicmix.py", "torch.Generator(\"cpu\").manual_seed(seed) for seed in options.seeds_of(seeds)", "torch.Generator(\"cpu\").manual_seed(seeds[0]) for seed in options.seeds_of(seeds)"),
    ("command/options.py", "return round(self.k_max * self.steps)", "return int(self.k_max * self.steps)"),
    ("command/options.py", "return round(self.k_min * self.steps)", "return int(self.k_min * self.steps + 0.5)"),
    # attention
    ("attention.py", "self.norm = nn.GroupNorm(groups, channels, eps=1e-6)", "self.norm = nn.GroupNorm(groups, channels, eps=1e-5)"),
    ("attention.py", "self.norm1 = nn.LayerNorm(dim, eps=1e-5)", "self.norm1 = nn.LayerNorm(dim, eps=1e-6)"),
    ("attention.py", "self.norm2 = nn.LayerNorm(dim, eps=1e-5)", "self.norm2 = nn.LayerNorm(dim, eps=1e-6)"),
    ("attention.py", "self.norm3 = nn.LayerNorm(dim, eps=1e-5)", "self.norm3 = nn.LayerNorm(dim, eps=1e-6)"),
    ("attention.py", "if self.upcast:", "if False:"),
    ("attention.py", "value * F.gelu(gate)", 'value * F.gelu(gate, approximate="tanh")'),
    ("attention.py", "value, gate = self.proj", "gate, value = self.proj"),
    ("attention.py", "v = v * token_weights[:, :, None]", "k = k * token_weights[:, :, None]"),
    ("attention.py", "is_causal=causal)", "is_causal=causal, scale=1 / q.shape[1])"),
    ("attention.py", "(heads, -1)).transpose(1, 2) for", "(-1, heads)).transpose(1, 3) for"),
    ("attention.py", "x = x + self.attn1(self.norm1(x))", "x = x + self.attn1(self.norm2(x))"),
    ("attention.py", "return x.flatten(2).transpose(1, 2)", "return x.transpose(2, 3).flatten(2).transpose(1, 2)"),
    ("attention.py", "return x + y\n", "return y\n"),
    # clip
    ("clip.py", "1.702 * x", "1.7 * x"),
    ("clip.py", '"gelu": F.gelu', '"gelu": lambda x: F.gelu(x, approximate="tanh")'),
    ("clip.py", "heads, causal=True", "heads, causal=False"),
    ("clip.py", "self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)", "self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=1e-6)"),
    ("clip.py", "self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)", "self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=1e-6)"),
    ("clip.py", "self.final_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)", "self.final_layer_norm = nn.LayerNorm(config.hidden_size, eps=1e-6)"),
    ("clip.py", "return self.final_layer_norm(x)", "return x"),
    ("clip.py", "weight[: input_ids.shape[1]]", "weight[-input_ids.shape[1] :]"),
    ("clip.py", "weights[1 + i : 1 + i + len(tokens)] = s", "weights[i : i + len(tokens)] = s"),
    ("clip.py", "if tokens and begins[i] and", "if tokens and"),
    ("clip.py", 'padding="max_length", ', 'padding="longest", '),
    ("clip.py", "tokenizer.model_max_length - 2 :]", "tokenizer.model_max_length - 1 :]"),
    # the UNet
    ("unet.py", "c_in, eps=config.norm_eps)", "c_in, eps=1e-6)"),
    ("unet.py", "self.norm2 = nn.GroupNorm(config.norm_num_groups, c_out, eps=config.norm_eps)", "self.norm2 = nn.GroupNorm(config.norm_num_groups, c_out, eps=1e-6)"),
    ("unet.py", "self.conv_norm_out = nn.GroupNorm(config.norm_num_groups, widths[0], eps=config.norm_eps)", "self.conv_norm_out = nn.GroupNorm(config.norm_num_groups, widths[0], eps=1e-6)"),
    ("unet.py", "angles.cos(), angles.sin()", "angles.sin(), angles.cos()"),
    ("unet.py", "device=t.device) / half)", "device=t.device) / (half - 1))"),
    ("unet.py", "t.float()[:, None]", "t.half()[:, None]"),
    ("unet.py", "self.time_emb_proj(F.silu(time))", "self.time_emb_proj(time)"),
    ("unet.py", "stride=2, padding=1)", "stride=2, padding=0)"),
    ("unet.py", 'mode="nearest")', 'mode="bilinear")'),
    ("unet.py", "torch.cat([x, skip], dim=1)", "torch.cat([skip, x], dim=1)"),
    ("unet.py", "block(x, own[::-1], size", "block(x, own, size"),
    ("unet.py", "size = skips[-1].shape[2:] if skips else x.shape[2:]", "size = (2 * x.shape[2], 2 * x.shape[3])"),
    ("unet.py", "return self.resnets[1](x, time)", "return self.resnets[0](x, time)"),
    ("unet.py", 'heads=config.per_level("attention_head_dim")[level]', 'heads=config.per_level("attention_head_dim")[0]'),
    ("unet.py", "F.silu(self.conv_norm_out(x))", "self.conv_norm_out(x)"),
    # the VAE
    ("vae.py", "EPS = 1e-6", "EPS = 1e-5"),
    ("vae.py", "F.pad(x, (0, 1, 0, 1))", "F.pad(x, (1, 0, 1, 0))"),
    ("vae.py", "return mean, logvar.clamp(-30.0, 20.0)", "return mean, logvar"),
    ("vae.py", "clamp(-30.0, 20.0)", "clamp(-20.0, 20.0)"),
    ("vae.py", ".float() * self.config.scaling_factor", ".float() * 0.18215"),
    ("vae.py", "(x / self.config.scaling_factor)", "(x * self.config.scaling_factor)"),
    ("vae.py", "self.posterior(picture)[0]", "self.posterior(picture)[1]"),
    ("vae.py", "super().__init__(channels, None, heads=1, bias=True)", "super().__init__(channels, None, heads=2, bias=True)"),
    ("vae.py", "return x + to_map(y, x.shape[2:])", "return to_map(y, x.shape[2:])"),
    ("vae.py", "return self.resnets[1](self.attentions[0](self.resnets[0](x)))", "return self.resnets[1](self.resnets[0](self.attentions[0](x)))"),
    ("vae.py", "scale_factor=2, mode=\"nearest\"", "scale_factor=2, mode=\"bilinear\""),
    # the schedule
    ("scheduler.py", "[i * stride + config.steps_offset for", "[i * stride for"),
    ("scheduler.py", "n, dtype=torch.float32) ** 2", "n, dtype=torch.float32) ** 2.001"),
    ("scheduler.py", "return self.alphas_cumprod[self.t[k]]", "return self.alphas_cumprod[self.t[k]] if k else torch.tensor(1.0)"),
    ("scheduler.py", "if k == 0:\n            return x0", "if k < 0:\n            return x0"),
    ("scheduler.py", "return a * x - b * output, a * output + b * x", "return a * x - b * output, a * output - b * x"),
    ("scheduler.py", "(1 - abar_prev - sigma**2).clamp(min=0) ** 0.5 * eps", "(1 - abar_prev) ** 0.5 * eps"),
    ("scheduler.py", "(1 - abar_prev - sigma**2).clamp(min=0)", "(1 - abar_prev - sigma**2)"),
    ("scheduler.py", "round(n * i / steps) - 1", "n * i // steps - 1"),
    ("scheduler.py", "root[0] / (root[0] - root[-1])", "1 / (root[0] - root[-1])"),
    ("scheduler.py", "(root - root[-1])", "(root - 0)"),
    ("scheduler.py", "self.abar(k - 1) if k > 1 else torch.tensor(1.0)", "self.abar(k - 1)"),
    ("scheduler.py", "sigma = ((1 - abar_prev) / (1 - abar) * (1 - alpha)) ** 0.5", "sigma = (1 - alpha) ** 0.5"),
    ("scheduler.py", "kept > 0.15", "kept > 0.6"),
    # pictures
    ("command/pictures.py", "Image.Resampling.LANCZOS", "Image.Resampling.BICUBIC"),
    ("command/pictures.py", "/ 127.5 - 1", "/ 128 - 1"),
    ("command/pictures.py", "* 255).round().byte()", "* 255).byte()"),
    ("command/pictures.py", "(y / 2 + 0.5).clamp(0, 1)", "(y / 2 + 0.5)"),
]  # fmt: skip


CONTROL = -1  # a run without a mistake: if a test fails there, the others mean nothing


def run(row: int, tests: list[str], report) -> None:
    """One mistake in a copy of the repository; reports the name of the first test that fails, "" for none, and s."""
    file, old, new = MUTANTS[row] if row != CONTROL else ("magicmix.py", "def mix(", "def mix(")
    tests = sorted(tests, key=lambda test: Path(file).stem not in test)  # what is most likely to find it comes first
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(scratch) / "copy"
        ignored = shutil.ignore_patterns(".*", "__pycache__", "*.png.tmp")
        shutil.copytree(ROOT, copy, ignore=ignored)
        text = (copy / file).read_text()
        assert text.count(old) == 1, f"row {row}: {old!r} stands {text.count(old)} times in {file}"
        (copy / file).write_text(text.replace(old, new))
        os.chdir(copy)
        sys.path[:] = [str(copy), *(p for p in sys.path if p and Path(p).resolve() != ROOT)]
        import pytest

        out = io.StringIO()
        with redirect_stdout(out), redirect_stderr(out):
            code = pytest.main(["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-o", "addopts=", *tests])
        failed = [line for line in out.getvalue().splitlines() if line.startswith(("FAILED", "ERROR"))]
    assert code in (0, 1, 2), out.getvalue()
    report.put((row, failed[0].split(" - ")[0] if code else "", time.monotonic() - started))


def table(results: dict[int, tuple[str, float]], seconds: float) -> str:
    found = sum(bool(test) for test, _ in results.values())
    lines = [
        "# Mutants",
        "",
        f"`make mutants` put {len(results)} single mistakes into the code, one at a time; `make check` found {found}.",
        f"{seconds / 60:.0f} minutes on two cores. The last column is the first test that failed.",
        "",
        "| file | what stood there | the mistake | found by |",
        "|---|---|---|---|",
    ]
    for row, (test, _) in sorted(results.items()):
        file, old, new = (f"`{' '.join(part.split())}`" for part in MUTANTS[row])
        lines.append(f"| {file} | {old} | {new} | {test.rpartition('::')[2] or '**nothing**'} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", type=int, nargs="*", help="rows of the table")
    parser.add_argument("tests", nargs="+")
    arguments = parser.parse_args()
    rows = list(range(len(MUTANTS))) if arguments.only is None else arguments.only
    import diffusers  # noqa: F401  (what every run needs, imported once)
    import hypothesis  # noqa: F401
    import pytest  # noqa: F401
    import torch  # noqa: F401
    from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionPipeline  # noqa: F401

    forks = multiprocessing.get_context("fork")
    report, results, running, started = forks.Queue(), {}, 0, time.monotonic()
    waiting = [CONTROL, *rows]
    while waiting or running:
        while waiting and running < 2:
            forks.Process(target=run, args=(waiting.pop(0), arguments.tests, report)).start()
            running += 1
        row, test, seconds = report.get(timeout=900)
        running -= 1
        if row == CONTROL:
            assert not test, f"without any mistake {test}"
            continue
        results[row] = (test, seconds)
        print(f"{row:3} {seconds:5.0f} s  {test or 'FOUND BY NOTHING'}   {MUTANTS[row]}", flush=True)
    if arguments.only is None:
        (ROOT / "docs" / "mutants.md").write_text(table(results, time.monotonic() - started))
    return 0 if all(test for test, _ in results.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
