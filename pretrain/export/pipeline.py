"""A diffusers pipeline for networks that know labels. It stands alone: exported models carry this file."""

from typing import Any

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor


class LabelPipeline(DiffusionPipeline):
    """Generate images, with or without a class label.

    Args:
        network: called as ``network(x, t, label)``, or a UNet2DModel with one class more than there are labels.
        scheduler: any diffusers scheduler with `step`.
        vae: an autoencoder of diffusers that decodes latents, where the network is one of latents.
    """

    _optional_components = ["vae"]  # noqa: RUF012

    def __init__(self, network, scheduler, vae=None) -> None:
        super().__init__()
        self.register_modules(network=network, scheduler=scheduler, vae=vae)

    def decode(self, latents):
        """Images of scaled latents."""
        config = self.vae.config
        scale, shift = config.scaling_factor, config.get("shift_factor") or 0.0
        if config.get("latents_mean") is not None and config.get("latents_std") is not None:
            shift, std = (
                torch.tensor(x, device=self.device).view(-1, 1, 1) for x in (config.latents_mean, config.latents_std)
            )
            scale = scale / std
        return self.vae.decode(latents / scale + shift).sample

    def predict(self, x, t, label):
        """The network's output; label int64 [B], -1 where there is none."""
        config = self.network.config
        if "num_class_embeds" not in config:
            return self.network(x, t, label)
        if config.num_class_embeds is not None:
            label = torch.where(label < 0, config.num_class_embeds - 1, label)
            return self.network(x, t, class_labels=label, return_dict=False)[0]
        return self.network(x, t, return_dict=False)[0]

    @torch.no_grad()
    def __call__(
        self,
        batch_size=1,
        label=None,
        guidance=1.0,
        generator=None,
        num_inference_steps=25,
        output_type="pil",
        return_dict=True,
    ):
        """Generate `batch_size` images.

        Args:
            batch_size: how many.
            label: one label or a list of them; None: without.
            guidance: classifier-free guidance scale; 1 is none.
            generator: a torch.Generator, or one per image.
            num_inference_steps: steps of the scheduler.
            output_type: "pil", "np" or "pt" (float [B, C, H, W] in [0, 1]).
            return_dict: return an ImagePipelineOutput, else a tuple.
        """
        config = self.network.config
        if "shape" in config:
            shape = tuple(config.shape)
        else:
            size = config.sample_size
            shape = (config.in_channels, *((size, size) if isinstance(size, int) else size))
        labels = [-1 if label is None else label] * batch_size if not isinstance(label, list) else label
        labels = torch.tensor(labels, device=self.device)
        x = randn_tensor((len(labels), *shape), generator=generator, device=self.device, dtype=self.network.dtype)
        self.scheduler.set_timesteps(num_inference_steps, device=self.device)
        x = x * getattr(self.scheduler, "init_noise_sigma", 1.0)
        bar: Any = self.progress_bar
        for t in bar(self.scheduler.timesteps):
            scaled = self.scheduler.scale_model_input(x, t) if hasattr(self.scheduler, "scale_model_input") else x
            output = self.predict(scaled, t.expand(len(x)), labels)
            if guidance != 1.0:
                without = self.predict(scaled, t.expand(len(x)), torch.full_like(labels, -1))
                output = without + guidance * (output - without)
            x = self.scheduler.step(output, t, x).prev_sample
        x = x if self.vae is None else self.decode(x)
        images: Any = (x.clamp(-1, 1) + 1) / 2
        if output_type != "pt":
            images = images.float().cpu().permute(0, 2, 3, 1).numpy()
            images = self.numpy_to_pil(images) if output_type == "pil" else images
        return ImagePipelineOutput(images=images) if return_dict else (images,)
