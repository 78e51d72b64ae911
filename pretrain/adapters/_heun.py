"""A sampler that diffusers lacks."""

from typing import Any

import torch
from diffusers import EDMEulerScheduler
from diffusers.schedulers.scheduling_edm_euler import EDMEulerSchedulerOutput
from torch import Tensor


class EDMHeunScheduler(EDMEulerScheduler):
    """Heun's steps between the noise levels of `EDMEulerScheduler` (Karras et al. 2022, algorithm 1).

    Each step goes along the slope where it starts, looks at the slope where it gets to, and goes along their mean; the
    last one, to no noise, is Euler's. So n steps call the network 2 n - 1 times, at the times in `timesteps`.
    """

    def set_timesteps(self, num_inference_steps: int, device: Any = None, sigmas: Any = None) -> None:
        """Choose the levels and begin."""
        super().set_timesteps(num_inference_steps, device, sigmas)
        self.timesteps = torch.cat([self.timesteps[:1], self.timesteps[1:].repeat_interleave(2)])
        self.level = 0
        self.start: tuple[Tensor, Tensor] | None = None  # of the step that is half done: image and slope

    def scale_model_input(self, sample: Tensor, timestep: float | Tensor) -> Tensor:
        """What the network sees of a noisy image."""
        return self.precondition_inputs(sample, self.sigmas[self.level])

    def step(self, model_output: Tensor, timestep: float | Tensor, sample: Tensor) -> EDMEulerSchedulerOutput:
        """The image after half a step."""
        sigma = self.sigmas[self.level]
        slope = (sample - self.precondition_outputs(sample, model_output, sigma)) / sigma
        if self.start is not None:
            sample, first = self.start
            self.start, slope, width = None, (first + slope) / 2, sigma - self.sigmas[self.level - 1]
        else:
            self.level += 1
            width = self.sigmas[self.level] - sigma
            self.start = (sample, slope) if self.sigmas[self.level] > 0 else None
        return EDMEulerSchedulerOutput(prev_sample=sample + width * slope)
