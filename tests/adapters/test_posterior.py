"""Posterior-mean targets have the expected gradient of ordinary ones, and less noise."""

import pytest
import torch
from torch import nn

from pretrain.adapters import Batch
from pretrain.adapters._posterior import References
from pretrain.adapters.ddpm import DDPM
from pretrain.adapters.flow import Flow
from pretrain.core.rng import SampleRNG, generator


class Linear(nn.Module):
    """A network whose gradient is a moment of its input and its error."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((4,), 0.3))

    def forward(self, x, time, label):
        return x * self.weight.view(1, 1, 2, 2) * (1 + (label >= 0) * 0.5).view(-1, 1, 1, 1)


ADAPTERS = [Flow(label_dropout=0.3), DDPM("v_prediction", label_dropout=0.3), DDPM("epsilon", "linear", min_snr=5.0)]


def gradients(adapter, level: float, conditional: bool, references: References | None, image, label) -> torch.Tensor:
    """Gradient per sample, [B, 4], of an objective whose images are drawn uniformly from `image`."""
    count = 100_000
    index = torch.arange(count)
    draw = torch.randint(len(image), (count,), generator=generator(7))
    batch = Batch(
        image[draw], label[draw] if conditional else torch.full((count,), -1), index, torch.full((count,), level)
    )
    found = []
    model = Linear()

    def spy(x, time, given):
        out = model(x, time, given)
        found.append((out, x, given))
        return out

    losses = adapter(spy, batch, SampleRNG(0, index=index), references)
    out, x, given = found[0]
    (error,) = torch.autograd.grad(losses.loss.sum(), out)
    return (error * x * (1 + (given >= 0) * 0.5).view(-1, 1, 1, 1)).flatten(1).detach()


@pytest.mark.parametrize("adapter", ADAPTERS, ids=lambda adapter: f"{type(adapter).__name__}")
@pytest.mark.parametrize(("level", "conditional"), [(0.1, True), (0.5, False), (0.9, True)])
def test_the_expected_gradient_is_that_of_ordinary_targets(adapter, level: float, conditional: bool) -> None:
    image = torch.randn(9, 1, 2, 2, generator=generator(1))
    label = torch.arange(9) % 3
    references = References.of(image, label if conditional else None)
    plain = gradients(adapter, level, conditional, None, image, label)
    mean = gradients(adapter, level, conditional, references, image, label)
    difference = plain - mean
    assert (difference.mean(0).abs() <= 4.5 * difference.std(0) / len(plain) ** 0.5 + 1e-6).all()
    if level == 0.5:
        assert (mean.var(0) < plain.var(0)).all()
        wrong = References.of(image[:5], label[:5] if conditional else None)  # a pruned set is no uniform prior
        biased = plain - gradients(adapter, level, conditional, wrong, image, label)
        assert (biased.mean(0).abs() > 4.5 * biased.std(0) / len(plain) ** 0.5).any()


@pytest.mark.parametrize("seed", range(4))
def test_weights_are_those_of_the_normal_densities(seed: int) -> None:
    image = torch.randn(7, 3, 2, 2, generator=generator(seed)).double()
    signal, noise = torch.rand(5, generator=generator(seed, 1)), 0.1 + torch.rand(5, generator=generator(seed, 2))
    noisy = signal.view(-1, 1, 1, 1) * image[:5] + noise.view(-1, 1, 1, 1) * torch.randn(
        5, 3, 2, 2, generator=generator(seed, 3)
    )
    label = torch.tensor([0, 1, -1, 0, 1])
    found = References.of(image, torch.tensor([0, 1, 0, 1, 0, 1, 1])).weights(noisy, signal, noise, label)
    for row in range(5):
        density = torch.distributions.Normal(signal[row] * image, noise[row]).log_prob(noisy[row]).sum((1, 2, 3)).exp()
        density[(label[row] >= 0) & (torch.tensor([0, 1, 0, 1, 0, 1, 1]) != label[row])] = 0
        assert torch.allclose(found[row].double(), density / density.sum(), atol=1e-5)
