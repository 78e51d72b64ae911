"""A diffusers pipeline for networks with labels. Exported models contain this file, so it imports nothing of ours."""

import inspect
import json
import math
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor


class LabelPipeline(DiffusionPipeline):
    """Generate images, with or without class labels.

    Args:
        network: a diffusers model that is called as ``network(x, t, label)``, or a UNet2DModel with a class embedding
            whose last class means "no label".
        scheduler: a noise scheduler of diffusers.
        vae: an autoencoder of diffusers, if the network is one of latents.
        class_names: of the classes, in their order.
        prediction: "sample" if the network predicts images of a rectified flow, from which velocities are computed.
    """

    _optional_components = ["vae"]  # noqa: RUF012
    model_cpu_offload_seq = "network->vae"

    def __init__(self, network, scheduler, vae=None, class_names=None, prediction=None) -> None:
        super().__init__()
        for buffer in network.buffers():  # from_pretrained(torch_dtype=...) casts only what a file contains
            if buffer.is_floating_point():
                buffer.data = buffer.data.to(network.dtype)
        self.register_modules(network=network, scheduler=scheduler, vae=vae)
        self.register_to_config(class_names=class_names, prediction=prediction)

    @property
    def classes(self) -> int | None:
        """Number of classes; 0: the network has no labels; None: its config does not tell."""
        config = self.network.config
        if "num_class_embeds" in config:
            return (config.num_class_embeds or 1) - 1
        return config.get("classes")

    def labels(self, label, batch_size: int) -> torch.Tensor:
        """Labels, int64 [B], -1 for no label, of the argument `label` of a call.

        Raises:
            ValueError: it is no whole number, name or sequence of these, or out of range.
        """
        label = self.numbers(label)
        allowed = f"give one of the {self.classes} classes from 0, a list of them, or None"
        if self.classes is None:
            allowed = "give a class, a list of classes, or None"
        elif self.classes == 0:
            allowed = "this model has no classes, give None"
        if label is None:
            return torch.full((batch_size,), -1, device=self.device)
        try:
            labels = torch.as_tensor(label)
        except (TypeError, ValueError, RuntimeError, OverflowError):
            labels = torch.empty(0)
        if labels.dtype == torch.bool or labels.is_floating_point() or labels.is_complex() or labels.ndim > 1:
            got = " ".join(repr(label).split())[:80]
            raise ValueError(f"label must be a whole number or a list of them, got {got}; {allowed}")
        labels = labels.to(self.device, torch.int64)
        if labels.ndim == 0:
            labels = labels.expand(batch_size)
        if batch_size not in (1, len(labels)):
            raise ValueError(f"label must have batch_size = {batch_size} entries, got {len(labels)}; omit batch_size")
        last = torch.iinfo(torch.int64).max if self.classes is None else self.classes - 1
        if wrong := [number for number in labels.tolist() if not 0 <= number <= last]:
            raise ValueError(f"there is no label {wrong[0]}; {allowed}")
        return labels

    def numbers(self, label):
        """A label, or a sequence of them, with the numbers of classes in place of their names.

        Raises:
            ValueError: there is no class of this name.
        """
        if isinstance(label, (list, tuple)):
            return [self.numbers(item) if isinstance(item, str) else item for item in label]
        names = self.config.get("class_names")
        if not isinstance(label, str) or not names:
            return label
        if label not in names:
            known = ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")
            raise ValueError(f"there is no class {label[:80]!r}; the classes are {known}")
        return names.index(label)

    def predict(self, x, t, label):
        """The prediction for the scheduler, float32 like x; label int64 [B], -1: no label."""
        output = self.call(x, t, label)
        if self.config.get("prediction") != "sample":
            return output
        return (x - output) / (t / self.scheduler.config.num_train_timesteps).clamp(min=0.05).view(-1, 1, 1, 1)

    def call(self, x, t, label):
        """The network's output, float32 like x."""
        config, inputs = self.network.config, x.to(self.network.dtype)
        if "num_class_embeds" not in config:
            return self.network(inputs, t, label).float()
        if config.num_class_embeds is None:
            return self.network(inputs, t, return_dict=False)[0].float()
        label = torch.where(label < 0, config.num_class_embeds - 1, label)
        return self.network(inputs, t, class_labels=label, return_dict=False)[0].float()

    def interval(self, given) -> tuple[float, float]:
        """Noise levels between which guidance is used, of the argument `guidance_interval` of a call.

        Raises:
            ValueError: it is not two numbers, the first one smaller and not negative.
        """
        try:
            low, high = (0.0, math.inf) if given is None else map(float, given)
        except (TypeError, ValueError, OverflowError):
            low, high = 1.0, 0.0
        if not 0 <= low < high:
            allowed = "two noise levels sigma, 0 <= low < high, or None"
            raise ValueError(f"guidance_interval must be {allowed}, got {str(given)[:80]}")
        return low, high

    def sigma(self, timestep) -> torch.Tensor:
        """Standard deviations of the noise, relative to the signal's scale 1, at timesteps of the scheduler."""
        timestep = timestep.double().cpu()
        alphas = getattr(self.scheduler, "alphas_cumprod", None)
        if alphas is not None and not self.scheduler.config.get("use_flow_sigmas"):
            low, alphas = timestep.floor().long(), torch.cat([alphas, alphas[-1:]]).double().cpu()
            alpha = alphas[low].lerp(alphas[low + 1], timestep - low)
            return ((1 - alpha) / alpha).sqrt()
        if "EDM" in type(self.scheduler).__name__:
            return (4 * timestep).exp()
        time = timestep / self.scheduler.config.num_train_timesteps
        return time / (1 - time)

    def decode(self, latents):
        """Images of scaled latents."""
        config = self.vae.config
        scale, shift = config.scaling_factor, config.get("shift_factor") or 0.0
        if config.get("latents_mean") is not None and config.get("latents_std") is not None:
            shift, std = (
                torch.tensor(values, device=latents.device).view(-1, 1, 1)
                for values in (config.latents_mean, config.latents_std)
            )
            scale = scale / std
        return self.vae.decode((latents / scale + shift).to(self.vae.dtype)).sample.float()

    @torch.no_grad()
    def __call__(
        self,
        batch_size=1,
        label=None,
        guidance=1.0,
        guidance_interval=None,
        generator=None,
        num_inference_steps=25,
        output_type="pil",
        return_dict=True,
    ):
        """Generate images. The scheduler works in float32, whatever the dtype of the network.

        Args:
            batch_size: number of images, if `label` does not give it.
            label: a class, by number or name, for all images, or a list, tuple, array or tensor with the class of
                each; None: no labels.
            guidance: scale of classifier-free guidance; 1: none.
            guidance_interval: noise levels sigma, low and high, between which guidance is used (Kynkäänniemi et al.,
                2024); None: all.
            generator: a torch.Generator, or one per image.
            num_inference_steps: sampling steps.
            output_type: "pil", "np" (float32 [B, H, W, C] in [0, 1]) or "pt" (float32 [B, C, H, W] in [0, 1]).
            return_dict: return an ImagePipelineOutput; False: a tuple.

        Raises:
            ValueError: `label` is not of the model's classes, or another argument is out of its range.
        """
        config = self.network.config
        for name, value, good, allowed in (
            ("batch_size", batch_size, isinstance(batch_size, Integral) and batch_size >= 1, "a whole number >= 1"),
            ("guidance", guidance, isinstance(guidance, Real) and math.isfinite(guidance), "a finite number"),
            (
                "num_inference_steps",
                num_inference_steps,
                isinstance(num_inference_steps, Integral) and num_inference_steps >= 1,
                "a whole number >= 1",
            ),
            ("output_type", output_type, output_type in ("pil", "np", "pt"), "pil, np or pt"),
        ):
            if not good:
                raise ValueError(f"{name} must be {allowed}, got {str(value)[:80]}")
        if "shape" in config:
            shape = tuple(config.shape)
        else:
            size = config.sample_size
            shape = (config.in_channels, *((size, size) if isinstance(size, int) else size))
        if output_type == "pil" and self.vae is None and shape[0] > 4:
            raise ValueError(f"images of {shape[0]} channels can't be PIL images; give output_type 'np' or 'pt'")
        labels = self.labels(label, batch_size)
        generators = generator if isinstance(generator, list) else [generator] * len(labels)
        right = all(item is None or isinstance(item, torch.Generator) for item in generators)
        if len(generators) != len(labels) or not right:
            raise ValueError(
                f"generator must be a torch.Generator, or a list of one for each of the {len(labels)} images"
            )
        x = randn_tensor((len(labels), *shape), generator=generator, device=self.device, dtype=torch.float32)
        self.scheduler.set_timesteps(num_inference_steps, device=self.device)
        x = x * getattr(self.scheduler, "init_noise_sigma", 1.0)
        low, high = self.interval(guidance_interval)
        sigma = self.sigma(self.scheduler.timesteps)
        guided = ((sigma >= low) & (sigma <= high)).tolist() if guidance != 1 else [False] * len(sigma)
        bar: Any = self.progress_bar
        for t, is_guided in zip(bar(self.scheduler.timesteps), guided, strict=True):
            scaled = self.scheduler.scale_model_input(x, t) if hasattr(self.scheduler, "scale_model_input") else x
            output = self.predict(scaled, t.expand(len(x)), labels)
            if is_guided:
                without = self.predict(scaled, t.expand(len(x)), torch.full_like(labels, -1))
                output = without + guidance * (output - without)
            x = self.scheduler.step(output, t, x).prev_sample
        x = x if self.vae is None else self.decode(x)
        images: Any = (x.clamp(-1, 1) + 1) / 2
        if output_type != "pt":
            images = images.cpu().permute(0, 2, 3, 1).numpy()
            images = self.numpy_to_pil(images) if output_type == "pil" else images
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def to_json_string(self) -> str:
        """The index of a saved pipeline, which names the code that is saved with it."""
        index = json.loads(super().to_json_string())
        network_class, code = self._network_code()
        index["_class_name"] = [Path(__file__).stem, LabelPipeline.__name__]
        index["network"] = [code.stem if code else "diffusers", network_class.__name__]
        return json.dumps(index, indent=2, sort_keys=True) + "\n"

    def save_config(self, save_directory, push_to_hub=False, **kwargs) -> None:
        """Write the index, and the code of the pipeline and of a network that is not diffusers' own."""
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        network_class, code = self._network_code()
        # Read before it is written: a file may be its own source.
        (folder / Path(__file__).name).write_bytes(Path(__file__).read_bytes())
        if code:
            (folder / "network").mkdir(exist_ok=True)
            (folder / "network" / code.name).write_bytes(Path(inspect.getfile(network_class)).read_bytes())
        super().save_config(save_directory, push_to_hub, **kwargs)

    def _network_code(self) -> tuple[type, Path | None]:
        """The network's class, and the name of the file with its code; None: it is a class of diffusers."""
        network_class = type(getattr(self.network, "_orig_mod", self.network))  # torch.compile wraps it
        if network_class.__module__.partition(".")[0] == "diffusers":
            return network_class, None
        stem = Path(inspect.getfile(network_class)).stem.removesuffix("_network")
        return network_class, Path(f"{stem}_network.py")  # diffusers has no module of that name
