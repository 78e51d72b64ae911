"""N:M sparse subnetworks of one denoiser, chosen by the noise level or by a classifier (ClassPruning)."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from ._nm import Classifier, MaskedWeight, inner_layers, nm_mask, shares_of_budget
from .dit import DiTConfig
from .unet import UNetConfig


@dataclass(frozen=True)
class NMConfig:
    """A UNet or DiT of which each noise level uses a part of the weights: N of every M along the input dimension.

    After ClassPruning (Zhou et al., 2022): easy images use fewer weights. It lowers the FLOPs of inference with a
    kernel for such weights; training computes all products and saves nothing.

    Attributes:
        base: the network.
        unet: settings of the network, with base unet.
        dit: settings of the network, with base dit.
        choices: the numbers N, different ones, from the least noise to the most.
        group: M; choice M is the network without a mask.
        by: what selects the choice of an image: its noise level, or a classifier of the noisy image, which needs an
            adapter that trains it (examples/restoration_adapter.py).
        budget: mean of N / M, between the smallest and the largest; with `level` over uniform times in [0, 1000].
        thresholds: times, in the units of the noise scheduler, from which each choice after the first holds, in
            ascending order; default: those that meet the budget. edm needs them: its times are ln(sigma) / 4.
    """

    base: Literal["unet", "dit"] = "unet"
    unet: UNetConfig = field(default_factory=UNetConfig)
    dit: DiTConfig = field(default_factory=DiTConfig)
    choices: tuple[int, ...] = (1, 2, 4)
    group: int = 4
    by: Literal["level", "image"] = "level"
    budget: float = 0.6
    thresholds: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        allowed = f"different numbers from 1 to group = {self.group}"
        if not self.choices or len({*self.choices}) < len(self.choices):
            raise ValueError(f"choices must be one or more {allowed}, got {self.choices}")
        if not all(1 <= choice <= self.group for choice in self.choices):
            raise ValueError(f"choices must be {allowed}, got {self.choices}")
        low, high = min(self.choices) / self.group, max(self.choices) / self.group
        if low < high and not low < self.budget < high:
            raise ValueError(f"budget must lie between {low:g} and {high:g}, of the choices, got {self.budget}")
        if self.thresholds and (self.by == "image" or len(self.thresholds) != len(self.choices) - 1):
            raise ValueError(
                f"thresholds must be {len(self.choices) - 1}, one between two choices, and by level, got "
                f"{self.thresholds} by {self.by}"
            )
        if list(self.thresholds) != sorted(self.thresholds):
            raise ValueError(f"thresholds must be in ascending order, got {self.thresholds}")

    def check_adapter(self, adapter: Any) -> None:
        """Check that the default thresholds fit the times of an objective.

        Raises:
            ValueError: its times are not in [0, 1000].
        """
        other_times = hasattr(adapter, "sigma_data") or getattr(adapter, "timesteps", 1000) != 1000
        if self.by == "level" and not self.thresholds and other_times:
            raise ValueError(
                "the default thresholds are times in [0, 1000], unlike those of edm, ln(sigma) / 4, and of ddpm with "
                "other timesteps than 1000; give --model.thresholds"
            )

    def build(self, shape: tuple[int, int, int], classes: int) -> "NMNetwork":
        """Make the network for images of `shape`, (C, H, W), and `classes` classes (0: without labels).

        Raises:
            ValueError: the base network can't be made for such images, or `group` divides no layer's input channels.
        """
        base = (self.unet if self.base == "unet" else self.dit).build(shape, classes)
        return self.wrap(base, shape[0])

    def wrap(self, base: nn.Module, channels: int) -> "NMNetwork":
        """Put masks on any denoiser, called as ``base(x, time, label)``, of images of `channels` channels.

        Raises:
            ValueError: `group` divides the input channels of none of its inner layers.
        """
        thresholds = list(self.thresholds)
        if self.by == "level" and not thresholds:
            shares = shares_of_budget([choice / self.group for choice in self.choices], self.budget)
            thresholds = [1000 * sum(shares[: n + 1]) for n in range(len(shares) - 1)]
        classifier = Classifier(channels, len(self.choices)) if self.by == "image" else None
        return NMNetwork(base, self.choices, self.group, self.budget, thresholds, classifier)


class NMNetwork(nn.Module):
    """A denoiser with nested N:M masks in its inner layers, and a scale and bias of each output channel by choice.

    Masks are computed from the current weights in every forward pass. The choice N = M has neither mask nor scale nor
    bias: it is the base network. An image's output does not depend on the others: the images of a batch are grouped by
    their choice, which needs the sizes of the groups, so each call waits for the device once.

    It has no gradient checkpointing: a recomputed layer would have the weights without the mask.

    Args:
        base: the network, called as ``base(x, time, label)``.
        choices: N of each choice.
        group: M.
        budget: largest mean of N / M, for the objective that trains the classifier.
        thresholds: K - 1 times, ascending; used without a classifier.
        classifier: returns logits [B, K] of (x, time); None: the time selects the choice.

    Raises:
        ValueError: `group` divides the input channels of no inner layer of the network.
    """

    thresholds: Tensor
    usage: Tensor

    def __init__(
        self,
        base: nn.Module,
        choices: Sequence[int],
        group: int,
        budget: float,
        thresholds: Sequence[float],
        classifier: nn.Module | None,
    ) -> None:
        super().__init__()
        layers = inner_layers(base, group)
        if not layers:
            raise ValueError(
                f"group = {group} divides the input channels of no layer inside a block of this network; give another "
                "group or other channels"
            )
        self.base, self.classifier = base, classifier
        self.choices, self.group, self.budget = tuple(choices), group, budget
        self.layers = [*layers]
        self.outputs = [len(base.get_parameter(f"{name}.weight")) for name in layers]
        total = sum(self.outputs)  # one vector for all layers: vectors have no weight decay
        self.scale = nn.ParameterList(torch.ones(total) for n in choices if n < group)
        self.bias = nn.ParameterList(torch.zeros(total) for n in choices if n < group)
        self.register_buffer("thresholds", torch.tensor(thresholds, dtype=torch.float32), persistent=False)
        if classifier is not None:
            self.register_buffer("usage", torch.full((len(choices),), 1 / len(choices)))

    @property
    def costs(self) -> list[float]:
        """N / M of each choice."""
        return [n / self.group for n in self.choices]

    def weights(self, choice: int) -> dict[str, Tensor]:
        """The parameters of the base network that a choice replaces, by name: none for N = M."""
        keep = self.choices[choice]
        if keep == self.group:
            return {}
        position = sum(n < self.group for n in self.choices[:choice])
        scales, biases = (x[position].split(self.outputs) for x in (self.scale, self.bias))
        found = {}
        for name, scale, bias in zip(self.layers, scales, biases, strict=True):
            layer = self.base.get_submodule(name)
            weight: Any = layer.weight
            masked: Any = MaskedWeight.apply(weight, nm_mask(weight, keep, self.group))
            found[f"{name}.weight"] = scale.view(-1, *[1] * (weight.ndim - 1)) * masked
            if isinstance(layer.bias, Tensor):  # the output is scale * (W x + b) + bias
                found[f"{name}.bias"] = scale * layer.bias + bias
        return found

    def subnetwork(self, choice: int, x: Tensor, time: Tensor, label: Tensor) -> Tensor:
        """The output [B, C, H, W] of one choice for all images."""
        return functional_call(self.base, self.weights(choice), (x, time, label))

    def choice_of(self, x: Tensor, time: Tensor) -> Tensor:
        """The choices of noisy images [B, C, H, W] at times [B], int64 [B]."""
        if self.classifier is not None:
            return self.classifier(x, time).argmax(dim=1)
        return torch.bucketize(time.float().contiguous(), self.thresholds, right=True)

    def forward(
        self,
        x: Tensor,
        time: Tensor,
        label: Tensor,
        choice: Tensor | None = None,
        gumbel: Tensor | None = None,
        temperature: float = 1.0,
    ) -> Any:
        """Denoise a batch.

        Args:
            x: float32 [B, C, H, W].
            time: float32 [B], or int64; in the units of the noise scheduler.
            label: int64 [B]; -1 for no label.
            choice: int64 [B]; default: that of `choice_of`.
            gumbel: float32 [B, K], Gumbel noise; with it the choice is drawn from the classifier's softmax, whose
                gradient is straight-through (Jang et al., 2017), and the probabilities are returned, too.
            temperature: of that softmax.

        Returns:
            [B, C, H, W]; with `gumbel` also the probabilities, float32 [B, K], without noise and temperature.

        Raises:
            ValueError: a classifier is to be trained, and neither `choice` nor `gumbel` is given.
        """
        if choice is None and gumbel is None and self.classifier is not None and self.training:
            raise ValueError(
                "this objective does not train the classifier of --model.by image; give --model.by level, or an "
                "objective that does, like examples/restoration_adapter.py"
            )
        if gumbel is not None:
            return self._explore(x, time, label, gumbel, temperature)
        return self._grouped(x, time, label, self.choice_of(x, time) if choice is None else choice)

    def _grouped(self, x: Tensor, time: Tensor, label: Tensor, choice: Tensor) -> Tensor:
        order = choice.argsort(stable=True)
        groups = order.split(choice.bincount(minlength=len(self.choices)).tolist())
        parts = [self.subnetwork(k, x[i], time[i], label[i]) for k, i in enumerate(groups) if len(i)]
        output = torch.cat(parts)[order.argsort()]
        if torch.is_grad_enabled():  # all parameters have a gradient, or DistributedDataParallel waits for it
            output = output + 0 * sum(p.sum() for p in (*self.scale, *self.bias))
        return output

    def _explore(
        self, x: Tensor, time: Tensor, label: Tensor, gumbel: Tensor, temperature: float
    ) -> tuple[Tensor, Tensor]:
        assert self.classifier is not None
        logits = self.classifier(x, time).float()
        soft, probability = ((logits + gumbel) / temperature).softmax(dim=1), logits.softmax(dim=1)
        output = self._grouped(x, time, label, soft.argmax(dim=1))
        with torch.no_grad():
            each = torch.stack([self.subnetwork(k, x, time, label) for k in range(len(self.choices))], dim=1)
            if self.training:
                self.usage.lerp_(probability.mean(dim=0), 0.1)
        straight = (soft - soft.detach()).view(*soft.shape, *[1] * (x.ndim - 1))  # 0, with the softmax's gradient
        return output + (straight * each).sum(dim=1), probability

    @torch.no_grad()
    def forward_flops(self, x: Tensor, time: Tensor, label: Tensor) -> list[int]:
        """FLOPs of a forward pass by choice, if masked weights cost nothing; a multiply-add counts as two.

        GPUs have kernels for 2 of 4 alone (NVIDIA, from Ampere on); the other choices are what a kernel would do.
        """
        inner: list[int] = []

        def count(layer: Any, _: Any, output: Tensor) -> None:
            inner.append(2 * output.numel() * layer.weight[0].numel())

        handles = [self.base.get_submodule(name).register_forward_hook(count) for name in self.layers]
        with FlopCounterMode(display=False) as counter:
            self.base(x, time, label)
            if self.classifier is not None:
                self.classifier(x, time)
        for handle in handles:
            handle.remove()
        return [counter.get_total_flops() - round((1 - cost) * sum(inner)) for cost in self.costs]
