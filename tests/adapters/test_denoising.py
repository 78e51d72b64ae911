"""Losses and generated images of diffusion adapters with a known optimal denoiser."""

import dataclasses

import pytest
import torch
from denoisers import SHAPE, Best, batch, signal

from pretrain.adapters import Batch, Generative
from pretrain.adapters._sampling import SAMPLERS, generate, make_scheduler
from pretrain.adapters.ddpm import DDPM
from pretrain.adapters.edm import EDM
from pretrain.adapters.flow import Flow
from pretrain.core.rng import SampleRNG

ADAPTERS = [
    Flow(),
    Flow(shift=3.0),
    Flow(times="logit_normal", mean=-0.5, std=1.5),
    *(
        DDPM(prediction=prediction, noise_schedule=schedule)
        for prediction in ("epsilon", "sample", "v_prediction")
        for schedule in ("linear", "squaredcos_cap_v2", "sigmoid")
    ),
    DDPM(prediction="v_prediction", noise_schedule="linear", timesteps=100, zero_terminal_snr=True),
    DDPM(prediction="sample", noise_schedule="sigmoid", zero_terminal_snr=True),
    EDM(),
    EDM(sigma_data=0.25, mean=0.0),
]
MEAN, STD = 0.1, 0.2  # of pixels; far enough within [-1, 1] that nothing is clipped


def differing(adapter) -> str:
    """Its name, and the fields that are not as they are by default."""
    fields = dataclasses.fields(adapter)
    values = (str(getattr(adapter, field.name)) for field in fields if getattr(adapter, field.name) != field.default)
    return "-".join([type(adapter).__name__, *values])


named = pytest.mark.parametrize("adapter", ADAPTERS, ids=differing)


@named
def test_the_loss_of_the_optimal_denoiser_is_its_error_in_closed_form(adapter) -> None:
    level = ((torch.arange(16) + 0.5) / 16).repeat_interleave(256)
    index = torch.arange(len(level))
    image = MEAN + STD * SampleRNG(1, index=index).normal(*SHAPE)
    best, asked = Best(adapter, MEAN, STD), []
    best.register_forward_hook(lambda _, given, __: asked.append(given[1]))
    loss = adapter(best, Batch(image, torch.full_like(index, -1), index, level), SampleRNG(0, index=index)).loss
    ratio = (loss / best.error(asked[0])).view(16, 256)
    # Mean squares of 256 * 64 normal numbers: standard deviation sqrt(2 / 16384) = 0.011.
    torch.testing.assert_close(ratio.mean(dim=1), torch.ones(16), atol=0.05, rtol=0)
    torch.testing.assert_close(ratio.mean(), torch.ones(()), atol=0.0125, rtol=0)


@named
def test_images_of_the_optimal_denoiser_have_the_mean_and_spread_of_the_data(adapter) -> None:
    assert isinstance(adapter, Generative)
    noise = SampleRNG(0, index=torch.arange(1000)).normal(*SHAPE)
    label = torch.full((1000,), -1)
    few, many = (generate(Best(adapter, MEAN, STD), adapter, noise, label, steps=steps) for steps in (50, 100))
    assert many.mean().item() == pytest.approx(MEAN, abs=0.002)
    assert many.std().item() == pytest.approx(STD, rel=0.07)
    # The error of a first-order solver is proportional to 1 / steps, so extrapolate.
    assert 2 * many.std().item() - few.std().item() == pytest.approx(STD, rel=0.01)


@pytest.mark.parametrize("name", ["ddim", "euler", "heun", "dpm++"])
@named
def test_other_samplers_remove_the_same_noise(adapter, name: str) -> None:
    known = SAMPLERS[type(adapter.scheduler()).__name__]
    if name not in known or (getattr(adapter, "zero_terminal_snr", False) and name != "ddim"):
        with pytest.raises(ValueError, match=f"got {name.replace('+', '[+]')}"):
            make_scheduler(adapter, name)
        return
    noise = SampleRNG(0, index=torch.arange(1000)).normal(*SHAPE)
    label = torch.full((1000,), -1)
    few, many = (
        generate(Best(adapter, MEAN, STD), adapter, noise, label, steps=steps, sampler=name) for steps in (50, 100)
    )
    assert many.mean().item() == pytest.approx(MEAN, abs=0.003)
    order = 1 if name in ("ddim", "euler") else 2  # of the solver: its error is proportional to 1 / steps^order
    # diffusers' dpm++ rounds straight paths' times to thousandths; its first and last steps are of first order.
    off = 0.025 if isinstance(adapter, Flow) and name == "dpm++" else 0.015
    assert many.std().item() + (many.std() - few.std()).item() / (2**order - 1) == pytest.approx(STD, rel=off)


@named
def test_generation_removes_the_noise(adapter) -> None:
    """With the exact denoiser of a data set of one image, generation gives that image, even in a few steps."""
    image = torch.linspace(-0.9, 0.9, 64).view(1, *SHAPE)
    noise = SampleRNG(0, index=torch.arange(3)).normal(*SHAPE)
    made = generate(Best(adapter, image, 0.0), adapter, noise, torch.full((3,), -1), steps=10)
    torch.testing.assert_close(made, image.expand(3, -1, -1, -1), atol=2e-3, rtol=0)


@named
def test_losses_and_gradients_are_finite_at_the_first_and_last_level(adapter) -> None:
    b = batch(2)._replace(level=torch.tensor([0.0, 1 - 2**-24]))
    scale = torch.nn.Parameter(torch.ones(()))

    class Finite(torch.nn.Module):
        def forward(self, x, time, label):
            assert x.isfinite().all() and time.isfinite().all()
            return scale * x

    loss = adapter(Finite(), b, SampleRNG(0, index=b.index)).loss
    loss.sum().backward()
    assert loss.isfinite().all() and scale.grad is not None and scale.grad.isfinite()


@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("timesteps", [10, 1000, 4000])
@pytest.mark.parametrize("schedule", ["linear", "squaredcos_cap_v2", "sigmoid"])
def test_ddpm_generates_on_the_schedule_it_trains_on_and_that_is_the_papers(schedule, timesteps, zero) -> None:
    adapter = DDPM("v_prediction", noise_schedule=schedule, timesteps=timesteps, zero_terminal_snr=zero)
    scheduler = adapter.scheduler()
    assert scheduler.config.num_train_timesteps == timesteps
    assert torch.equal(scheduler.alphas_cumprod, adapter.ddpm_scheduler.alphas_cumprod)
    expected = signal(schedule, timesteps, zero)
    # diffusers' is about ten float32 operations on numbers up to 1, whose last bits differ from CPU to CPU.
    bound = 32 * torch.finfo(torch.float32).eps
    torch.testing.assert_close(adapter.ddpm_scheduler.alphas_cumprod.double(), expected, atol=bound, rtol=0)
    assert (adapter.ddpm_scheduler.alphas_cumprod[-1] == 0) == zero
    scheduler.set_timesteps(5)
    assert scheduler.timesteps[0] == timesteps - 1  # sampling starts where next to nothing of the image is left
