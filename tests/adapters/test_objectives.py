"""The objectives of the adapters for diffusion are their papers' formulas."""

from statistics import NormalDist

import pytest
import torch
from denoisers import SHAPE, Best, Oracle, batch, column, signal
from diffusers import EDMEulerScheduler, FlowMatchEulerDiscreteScheduler
from pretrain.models.dit import DiTConfig
from torch import Tensor, nn

from pretrain.adapters import Batch, Losses
from pretrain.adapters._sampling import generate
from pretrain.adapters._uncertainty import UncertaintyHead
from pretrain.adapters.ddpm import DDPM
from pretrain.adapters.edm import EDM
from pretrain.adapters.flow import Flow
from pretrain.core.rng import SampleRNG, generator


def asked(adapter, b: Batch, answer: Tensor | None = None) -> tuple[Losses, Tensor, Tensor]:
    """The losses, and the noisy image and time that the network was called with."""
    oracle = Oracle(torch.zeros_like(b.image) if answer is None else answer)
    losses = adapter(oracle, b, SampleRNG(0, index=b.index))
    return losses, oracle.asked[0], oracle.asked[1]


def noise_of(b: Batch) -> Tensor:
    return SampleRNG(0, index=b.index).normal(*b.image.shape[1:])


def test_flow_is_the_straight_path() -> None:
    b = batch()
    noise, t = noise_of(b), column(b.level)
    losses, x, time = asked(Flow(), b, noise - b.image)
    assert losses.loss.abs().max() == 0
    torch.testing.assert_close(x, (1 - t) * b.image + t * noise)
    torch.testing.assert_close(time, 1000 * b.level)
    torch.testing.assert_close(asked(Flow(), b, noise - b.image + 0.5)[0].loss, torch.full((6,), 0.25))


def test_flow_with_predicted_images_is_their_weighted_error_and_samples_them() -> None:
    """Error over max(t, 0.05)^2 (Li and He, 2025); a network that knows the image arrives at it, whatever the noise."""
    b, adapter = batch(40), Flow(prediction="sample")
    b = b._replace(level=torch.arange(40) / 40)
    error = 0.1 * torch.randn(b.image.shape, generator=generator(2))
    oracle = Oracle(b.image + error)
    losses = adapter(adapter.prepare(oracle), b, SampleRNG(0, index=b.index))
    expected = error.square().mean(dim=(1, 2, 3)) / b.level.clamp(min=0.05) ** 2
    torch.testing.assert_close(losses.loss, expected, rtol=1e-3, atol=1e-6)
    with pytest.raises(ValueError, match=r"pass the module that prepare\(model\) returns"):
        adapter(oracle, b, SampleRNG(0, index=b.index))
    image = b.image.clamp(-1, 1)
    for sampler in (None, "heun", "dpm++"):
        made = generate(adapter.prepare(Oracle(image)), adapter, noise_of(b), b.label, steps=30, sampler=sampler)
        torch.testing.assert_close(made, image, atol=0.1, rtol=0)


@pytest.mark.parametrize("shift", [0.5, 1.0, 3.0])
def test_shifted_times_are_those_of_the_scheduler_and_so_are_the_noisy_images(shift: float) -> None:
    """Level k/1000 is the k-th of its 1000 timesteps, in order of increasing noise."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    b = batch(999)._replace(level=torch.arange(1, 1000) / 1000)
    _, x, time = asked(Flow(shift=shift), b)
    torch.testing.assert_close(time, scheduler.timesteps.flip(0)[:-1])
    noisy = scheduler.scale_noise(b.image, scheduler.timesteps.flip(0)[:-1], noise_of(b))
    torch.testing.assert_close(x, noisy, atol=1e-5, rtol=0)
    used = Flow(shift=shift).scheduler()
    for each in (used, scheduler):
        each.set_timesteps(7)
    assert torch.equal(used.timesteps, scheduler.timesteps)


@pytest.mark.parametrize(
    ("prediction", "zero"),
    [("epsilon", False), ("sample", False), ("v_prediction", False), ("sample", True), ("v_prediction", True)],
)
@pytest.mark.parametrize("schedule", ["linear", "squaredcos_cap_v2", "sigmoid"])
def test_ddpm_predictions_by_their_formulas(schedule: str, prediction: str, zero: bool) -> None:
    b, adapter = batch(), DDPM(prediction, noise_schedule=schedule, zero_terminal_snr=zero)
    share = column(signal(schedule, 1000, zero)[(b.level * 1000).long()])
    a, s, noise = share.sqrt().float(), (1 - share).sqrt().float(), noise_of(b)
    target = {"epsilon": noise, "sample": b.image, "v_prediction": a * noise - s * b.image}[prediction]
    losses, x, _ = asked(adapter, b, target)  # the velocity: Salimans and Ho 2022, section 4
    assert losses.loss.max() < 1e-10
    torch.testing.assert_close(x, a * b.image + s * noise, atol=1e-5, rtol=0)  # Ho et al., equation 4
    torch.testing.assert_close(asked(adapter, b, target + 0.5)[0].loss, torch.full((6,), 0.25))


@pytest.mark.parametrize("gamma", [5.0, 0.5])
def test_a_weighted_loss_does_not_depend_on_the_prediction_type(gamma: float) -> None:
    """One estimate of the image as each prediction type: its error times min(SNR, gamma)."""
    b = batch(32)
    noise, share = noise_of(b), signal("squaredcos_cap_v2")[(b.level * 1000).long()]
    a, s, snr = column(share.sqrt().float()), column((1 - share).sqrt().float()), share / (1 - share)
    guess = b.image + 0.1 * torch.randn(b.image.shape, generator=generator(1))
    guessed_noise = noise - a / s * (guess - b.image)  # a guess + s guessed_noise is the noisy image too
    message = {"epsilon": guessed_noise, "sample": guess, "v_prediction": a * guessed_noise - s * guess}
    error = (guess - b.image).double().square().mean(dim=(1, 2, 3))
    expected = snr.clamp(max=gamma) * error
    for prediction, answer in message.items():
        losses = asked(DDPM(prediction, min_snr=gamma), b, answer)[0]
        torch.testing.assert_close(losses.loss.double(), expected, rtol=2e-3, atol=0)
        plain = asked(DDPM(prediction), b, answer)[0]
        assert not torch.allclose(losses.loss, plain.loss, rtol=0.1)


def test_edm_is_the_weighted_error_of_the_denoiser_that_diffusers_makes_of_the_network() -> None:
    b = batch(64)
    adapter, scheduler = EDM(sigma_data=0.4), EDMEulerScheduler(sigma_data=0.4)
    answer = torch.randn(b.image.shape, generator=generator(2))
    losses, x, time = asked(adapter, b, answer)
    sigma = torch.tensor([NormalDist(-1.2, 1.2).inv_cdf(level) for level in b.level.double().tolist()]).exp()
    torch.testing.assert_close(time, scheduler.precondition_noise(sigma))
    noisy = b.image + column(sigma) * noise_of(b)
    torch.testing.assert_close(x, scheduler.precondition_inputs(noisy, column(sigma)))
    wide = [value.double() for value in (noisy, answer, column(sigma))]
    error = (scheduler.precondition_outputs(*wide) - b.image).square().mean(dim=(1, 2, 3))
    weight = (sigma.double() ** 2 + 0.4**2) / (0.4 * sigma.double()) ** 2  # Karras et al. 2022, table 1
    torch.testing.assert_close(losses.loss.double(), weight * error, rtol=2e-4, atol=0)
    assert losses.score is None


@pytest.mark.parametrize("adapter", [EDM(mean=-0.4, std=1.0), Flow(times="logit_normal", mean=0.3, std=0.7)], ids=str)
def test_levels_are_quantiles_of_the_normal_distribution(adapter) -> None:
    """Level u is the u-quantile of ln(sigma), or of the time's logit."""
    b = batch(999)._replace(level=torch.arange(1, 1000) / 1000)
    _, _, time = asked(adapter, b)
    value = 4 * time if isinstance(adapter, EDM) else (time / 1000).double().logit()
    expected = torch.tensor([NormalDist(adapter.mean, adapter.std).inv_cdf(k / 1000) for k in range(1, 1000)])
    torch.testing.assert_close(value.double(), expected.double(), atol=2e-5, rtol=0)


def heads(adapter: EDM, network: nn.Module) -> UncertaintyHead:
    prepared = adapter.prepare(network)
    assert isinstance(prepared, UncertaintyHead)
    return prepared


def test_new_uncertainty_changes_no_loss() -> None:
    b = batch()
    network = DiTConfig(patch=2, width=16, depth=1, heads=2).build(SHAPE, 3)
    plain = EDM()(EDM().prepare(network), b, SampleRNG(0, index=b.index))
    adapter = EDM(uncertainty=True)
    loss, score = adapter(heads(adapter, network), b, SampleRNG(0, index=b.index))
    assert torch.equal(loss, plain.loss) and score is not None and torch.equal(score, plain.loss)
    assert EDM().prepare(network) is network


def test_uncertainty_learns_the_error_at_every_level() -> None:
    """The error of the optimal denoiser is known in closed form, and e^u converges to it (Karras et al. 2024)."""
    adapter = EDM(uncertainty=True)
    best = Best(adapter, 0.1, 0.2)
    model = heads(adapter, best)
    optimizer = torch.optim.Adam(model.parameters(), 0.1)
    index = torch.arange(256)
    level = (index + 0.5) / 256
    for step in range(200):
        optimizer.param_groups[0]["lr"] = 0.1 * (1 - step / 200)
        image = 0.1 + 0.2 * SampleRNG(1, step, index=index).normal(*SHAPE)
        loss, score = adapter(model, Batch(image, index, index, level), SampleRNG(0, step, index=index))
        optimizer.zero_grad()
        loss.mean().backward()
        optimizer.step()
    time = (NormalDist(-1.2, 1.2).inv_cdf(0.5) + 1.2 * torch.linspace(-2, 2, 41)) / 4
    _, u = model(torch.zeros(41, *SHAPE), time, time, uncertainty=True)
    torch.testing.assert_close(u, best.error(time).log(), atol=0.05, rtol=0)
    assert best.error(time).log().std() > 0.3  # it is not the same at all levels
    assert (loss < 0).any() and score is not None and (score > 0).all() and not score.requires_grad


def test_uncertainty_keeps_its_precision_under_autocast() -> None:
    model = UncertaintyHead(Oracle(torch.zeros(2, *SHAPE)))
    nn.init.normal_(model.log_error.weight, generator=generator(3))
    time = torch.tensor([-1.0, 0.7])
    plain = model(time, time, time, uncertainty=True)[1]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model(time, time, time, uncertainty=True)[1], plain)


def test_uncertainty_without_its_head_raises() -> None:
    b = batch()
    with pytest.raises(ValueError, match=r"prepare\(model\)"):
        asked(EDM(uncertainty=True), b)
