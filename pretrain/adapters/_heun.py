"""Heun's method for EDM, which diffusers lacks."""

from typing import Any

import torch
from diffusers import EDMEulerScheduler
from diffusers.schedulers.scheduling_edm_euler import EDMEulerSchedulerOutput
from torch import Tensor


class EDMHeunScheduler(EDMEulerScheduler):
    """Heun's second-order method on the noise levels of `EDMEulerScheduler` (Karras et al., 2022, algorithm 1).

    Each step follows the mean of the slopes at its start and at the end of an Euler step; the last one, to sigma 0, is
    an Euler step. So n steps call the network 2 n - 1 times, at the times in `timesteps`. The method is deterministic
    (S_churn = 0).
    """

    def set_timesteps(self, num_inference_steps: int, device: Any = None, sigmas: Any = None) -> None:
        """Set the noise levels and restart; arguments as for `EDMEulerScheduler`."""
        super().set_timesteps(num_inference_steps, device, sigmas)
        self.timesteps = torch.cat([self.timesteps[:1], self.timesteps[1:].repeat_interleave(2)])
        self.sigma_index = 0
        self.start: tuple[Tensor, Tensor] | None = (
            None  # image and slope at the start of a step, between its two halves
        )

    def scale_model_input(self, sample: Tensor, timestep: float | Tensor) -> Tensor:
        """The network's input for a noisy image [B, C, H, W]: c_in * sample."""
        return self.precondition_inputs(sample, self.sigmas[self.sigma_index])

    def step(self, model_output: Tensor, timestep: float | Tensor, sample: Tensor) -> EDMEulerSchedulerOutput:
        """Do the first or the second half of a step.

        Args:
            model_output: [B, C, H, W]; of the network, not preconditioned.
            timestep: not used; the order of the calls determines the noise level.
            sample: [B, C, H, W]; the noisy image.

        Returns:
            The noisy image [B, C, H, W] for the next call.
        """
        sigma = self.sigmas[self.sigma_index]
        slope = (sample - self.precondition_outputs(sample, model_output, sigma)) / sigma
        if self.start is not None:
            sample, first_slope = self.start
            self.start, slope, step = None, (first_slope + slope) / 2, sigma - self.sigmas[self.sigma_index - 1]
        else:
            self.sigma_index += 1
            step = self.sigmas[self.sigma_index] - sigma
            self.start = (sample, slope) if self.sigmas[self.sigma_index] > 0 else None
        return EDMEulerSchedulerOutput(prev_sample=sample + step * slope)
