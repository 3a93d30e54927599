"""One mix, with all that its variants share: models, options, latents and noise."""

import dataclasses
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from command.options import Options
from lab.audit.variants import PICTURE, PROMPT, RENOISED, TRAJECTORY, Layout, Variant
from magicmix import Denoiser, ImageLayout, TextLayout, trajectory
from scheduler import Schedule
from weights import Checkpoint


@dataclass
class Scene:
    """What is mixed. Latents are float32 (1, 4, H, W), scaled.

    Attributes:
        models: from weights.load.
        options: of the mixing; the sampler is DDIM with eta 0.
        prompt: the content.
        layout: a picture (1, 3, height, width) in [-1, 1], or a prompt.
        eps: the noise, (1, 4, H, W).
        second: another one, for programs that draw twice.
    """

    models: Checkpoint
    options: Options
    prompt: str
    layout: Tensor | str
    eps: Tensor
    second: Tensor

    @property
    def kind(self) -> str:
        return PROMPT if isinstance(self.layout, str) else PICTURE

    @cached_property
    def schedule(self) -> Schedule:
        return Schedule(self.models.schedule, self.options.steps)

    @cached_property
    def content(self) -> Denoiser:
        o = self.options
        return Denoiser(self.models, self.schedule, o, lambda: self.eps, self.prompt, o.token_weights)

    @cached_property
    def trajectory(self) -> dict[int, Tensor]:
        """k -> x_k of the layout prompt, from T down to 0."""
        along = Denoiser(self.models, self.schedule, self.options, lambda: self.eps, self.layout)
        steps = trajectory(along, self.eps, self.options.steps, 0, "layout")
        return {self.options.steps: self.eps} | {step.k: step.x for step in steps}

    @cached_property
    def finished(self) -> Tensor:
        """The layout's clean latent: that of the picture, or the end of the prompt's trajectory."""
        return self.trajectory[0] if self.kind == PROMPT else self.models.vae.encode(self.layout)

    @cached_property
    def alone(self) -> Tensor:
        """The content without a layout, from the same noise."""
        *_, last = trajectory(self.content, self.eps, self.options.steps, 0, "content")
        return last.x

    def layouts(self, source: str) -> Layout:
        """k -> layout_k. `source` says where a prompt's come from."""
        if self.kind == PROMPT and source == TRAJECTORY:
            return TextLayout(self.trajectory)
        is_same = self.kind == PICTURE or source == RENOISED
        return ImageLayout(self.schedule, self.finished, self.eps if is_same else self.second)

    def with_offset(self, steps_offset: int) -> "Scene":
        """The same on a schedule of another offset."""
        schedule = dataclasses.replace(self.models.schedule, steps_offset=steps_offset)
        return dataclasses.replace(self, models=dataclasses.replace(self.models, schedule=schedule))

    @torch.no_grad()
    def run(self, variant: Variant) -> Tensor:
        """x_0 as a variant makes it."""
        scene = self
        if variant.steps_offset is not None and variant.steps_offset != self.models.schedule.steps_offset:
            scene = self.with_offset(variant.steps_offset)
        return variant.run(scene.content, scene.layouts(variant.source), self.options)
