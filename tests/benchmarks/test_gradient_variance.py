"""benchmarks/gradient_variance.py against a simulation."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import gradient_variance
import pytest
import torch
from conftest import ROOT

from pretrain.config.build import build_model
from pretrain.config.cli import parse
from pretrain.data.sources import open_data


def test_the_predicted_variance_is_that_of_the_estimate() -> None:
    """Against simulated epochs of a generated problem, with samples and levels drawn at random."""
    rng = torch.Generator().manual_seed(0)
    s, d, width = 60, 32, 5
    level = (torch.arange(d) / d + 0.5 / d).expand(s, -1).double()
    size = (0.2 + 3 * level) * (0.3 + torch.rand(s, 1, generator=rng).double())
    g = size[..., None] * torch.randn(s, d, width, generator=rng).double() + 0.5
    square = g.square().sum(-1)[..., None].expand(-1, -1, 2)
    mean = g.mean((0, 1)).square().sum().expand(2)
    visits = gradient_variance.Gradients(torch.arange(s), level, size, square, mean, mean)
    keep = 0.2 + 0.8 * torch.rand(s, generator=rng).double()
    density = torch.tensor([0.3, 0.8, 1.2, 1.7]).double()
    share = keep.mean().item()
    estimate = gradient_variance.Estimate(keep[:, None, None], share, density[:, None])
    predicted = (gradient_variance.second_moment(visits, estimate).mean(0) - mean)[0].item()

    chance = (density[(level[0] * 4).long()] / d).expand(s, -1)
    at = torch.multinomial(chance, 20_000, replacement=True, generator=rng)  # [S, epochs]
    kept = torch.rand(s, 20_000, generator=rng).double() < keep[:, None]
    weight = kept / keep[:, None] / density[(level[0] * 4).long()][at]
    estimates = (weight[..., None] * g.gather(1, at[..., None].expand(-1, -1, width))).mean(0)
    # A sum over samples of independent terms; the formula is per draw, as if samples were drawn independently.
    between = g.mean(1).square().sum(-1).mean() - mean[0]
    measured = estimates.var(dim=0).sum().item() * s * share + share * (between + mean[0]).item() - mean[0].item()
    assert measured == pytest.approx(predicted, rel=0.05)


def test_the_best_density_has_the_least_second_moment_of_each_kind() -> None:
    """Of densities over the same bins; squared gradients are generated, plain and preconditioned ones differently."""
    rng = torch.Generator().manual_seed(1)
    level = ((torch.rand(400, 1, generator=rng) + torch.arange(16) / 16) % 1.0).double()
    square = torch.stack([level.exp(), 2 - level], dim=-1) * torch.rand(400, 16, 2, generator=rng).double()
    gradients = gradient_variance.Gradients(torch.arange(400), level, level, square, torch.zeros(2), torch.zeros(2))

    def moment(density: torch.Tensor) -> torch.Tensor:
        whole = gradient_variance.Estimate(torch.ones(1, 1, 1).double(), 1.0, density)
        return gradient_variance.second_moment(gradients, whole).mean(0)

    best = gradient_variance.best_density(gradients)
    assert not torch.allclose(best[:, 0], best[:, 1], rtol=0.1)
    for _ in range(50):
        other = best * (1 + 0.3 * torch.randn(len(best), 2, generator=rng).double().clamp(-2, 2))
        assert (moment(other / other.mean(0)) > moment(best)).all()
    assert (moment(gradient_variance.UNIFORM) > moment(best)).all()


def test_gradients_are_those_of_the_training_with_its_posterior_means(
    pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Posterior means take noise out of the targets, so that losses are smaller than with plain ones."""
    recipe, data = ROOT / "configs" / "fashion_mnist_flow.yaml", ["--data", str(pictures)]
    config = parse(data, adapter="flow", model="unet", recipe=recipe, output_dir="x", help="")
    source = open_data(config.data, 0)
    model = build_model(config, source.shape, 0).eval()
    parameters = [p for p in model.parameters() if p.requires_grad]
    of_training = (parameters, [torch.ones_like(p) for p in parameters])
    monkeypatch.setattr(gradient_variance, "trained_parameters", lambda run: of_training)
    adapter = config.component("adapter")
    losses = []
    for each in (adapter, dataclasses.replace(adapter, posterior_mean=False)):
        run = SimpleNamespace(config=config, adapter=each, model=model, source=source)
        found = gradient_variance.gradients_of(run, 4, 8)  # type: ignore[arg-type]
        losses.append(found.loss.mean().item())
        assert (found.square > 0).all()
    assert losses[0] < 0.98 * losses[1]
