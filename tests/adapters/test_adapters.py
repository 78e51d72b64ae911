"""Every adapter keeps the contract of the interface and computes its paper's formula."""

import dataclasses

import pytest
import torch
from denoisers import SHAPE, batch
from pretrain.models.dit import DiTConfig
from pretrain.models.mae import MAEConfig
from pretrain.models.unet import UNetConfig
from torch import Tensor, nn

from pretrain.adapters import Batch
from pretrain.adapters.ddpm import DDPM
from pretrain.adapters.edm import EDM
from pretrain.adapters.flow import Flow
from pretrain.adapters.mae import MAE
from pretrain.config import registry
from pretrain.core.rng import SampleRNG


def network(adapter: str) -> nn.Module:
    torch.manual_seed(0)
    if adapter == "mae":
        return MAEConfig("vit_tiny_patch16_224", 2, 16, 1, 2, 16, 1, 2).build(SHAPE, 0)
    model = DiTConfig(patch=2, width=16, depth=1, heads=2).build(SHAPE, 3)
    nn.init.normal_(model.out.weight, std=0.3)  # a new DiT returns 0
    return model


@pytest.mark.parametrize("name", registry.names("adapter"))
class TestContract:
    def adapter(self, name: str):
        adapter = registry.load("adapter", name)()
        assert dataclasses.is_dataclass(adapter) and adapter.__dataclass_params__.frozen
        return adapter

    def test_one_differentiable_loss_a_sample(self, name: str) -> None:
        model, b = network(name), batch()
        loss, score = self.adapter(name)(model, b, SampleRNG(0, index=b.index))
        assert loss.shape == (len(b.index),) and loss.dtype == torch.float32 and (loss > 0).all()
        assert score is None or (score.shape == loss.shape and not score.requires_grad)
        loss.sum().backward()
        assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())

    def test_a_sample_changes_its_own_loss_only(self, name: str) -> None:
        model, b, adapter = network(name).eval(), batch(), self.adapter(name)
        other = b._replace(image=b.image.clone())
        other.image[2] = -other.image[2]
        same = (
            adapter(model, b, SampleRNG(0, index=b.index)).loss
            - adapter(model, other, SampleRNG(0, index=b.index)).loss
        ) == 0
        assert same.tolist() == [True, True, False, True, True, True]

    def test_a_sample_has_its_loss_in_any_batch(self, name: str) -> None:
        model, b, adapter = network(name).eval(), batch(), self.adapter(name)
        whole = adapter(model, b, SampleRNG(4, 1, index=b.index)).loss
        for part in (slice(0, 2), slice(2, 6)):
            few = Batch(*(field[part] for field in b))
            torch.testing.assert_close(adapter(model, few, SampleRNG(4, 1, index=few.index)).loss, whole[part])

    def test_only_the_sample_rng_is_random(self, name: str) -> None:
        model, b, adapter = network(name).eval(), batch(), self.adapter(name)
        first = adapter(model, b, SampleRNG(0, index=b.index)).loss
        torch.manual_seed(99)
        assert torch.equal(first, adapter(model, b, SampleRNG(0, index=b.index)).loss)
        assert not torch.equal(first, adapter(model, b, SampleRNG(1, index=b.index)).loss)

    def test_autocast_is_around_the_network_alone(self, name: str) -> None:
        """The network's inputs stay float32, bit for bit, and so does the loss of its bfloat16 output."""
        model, b, adapter = network(name).eval(), batch(), self.adapter(name)
        asked, computed = [], set()
        model.register_forward_pre_hook(lambda _, given: asked.append([x for x in given if x is not None]))
        for module in model.modules():
            if isinstance(module, nn.Linear):
                module.register_forward_hook(lambda _, __, made: computed.add(made.dtype))
        plain = adapter(model, b, SampleRNG(0, index=b.index)).loss
        assert computed == {torch.float32}
        with torch.autocast("cpu", torch.bfloat16):
            loss = adapter(model, b, SampleRNG(0, index=b.index)).loss
        assert torch.bfloat16 in computed
        assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(*asked, strict=True))
        assert asked[1][0].dtype == loss.dtype == torch.float32
        assert not torch.equal(loss, plain)
        torch.testing.assert_close(loss, plain, rtol=0.05, atol=0)

    def test_fields_are_read_from_the_source_as_they_are(self, name: str) -> None:
        declared, loaded = (
            {field.name: field.default for field in dataclasses.fields(find("adapter", name))}
            for find in (registry.declared, registry.load)
        )
        assert declared == loaded


def test_guidance_is_a_line_through_the_two_predictions() -> None:
    from pretrain.adapters._sampling import generate

    class Labelled(nn.Module):
        def forward(self, x: Tensor, time: Tensor, label: Tensor) -> Tensor:
            return torch.where(label < 0, 0.1, 0.3).view(-1, 1, 1, 1).expand_as(x)

    noise = torch.zeros(2, *SHAPE)
    made = generate(Labelled(), Flow(), noise, torch.tensor([0, 1]), steps=1, guidance=2.0)
    torch.testing.assert_close(made, torch.full_like(made, -(0.1 + 2 * 0.2)), atol=1e-3, rtol=0)


@pytest.mark.parametrize("sampler", [None, "euler", "heun", "dpm++"])
@pytest.mark.parametrize("adapter", [DDPM(), DDPM(noise_schedule="squaredcos_cap_v2"), EDM(), Flow(), Flow(shift=3.0)])
def test_guidance_is_limited_to_an_interval_of_noise_levels(adapter: DDPM | EDM | Flow, sampler: str | None) -> None:
    """The network without labels is called at the noise levels of the interval alone; they fall along the schedule."""
    from pretrain.adapters._sampling import generate, make_scheduler, sigma_of

    calls: list[tuple[float, bool]] = []

    class Labelled(nn.Module):
        def forward(self, x: Tensor, time: Tensor, label: Tensor) -> Tensor:
            calls.append((time[0].item(), bool((label < 0).all())))
            return torch.zeros_like(x)

    scheduler = make_scheduler(adapter, sampler)
    scheduler.set_timesteps(7)
    sigma = sigma_of(scheduler, scheduler.timesteps)
    assert (sigma.diff() <= 1e-9).all() and sigma[0] > 5 and sigma[-1] < 1
    if hasattr(scheduler, "sigmas") and sampler != "heun" and not isinstance(adapter, Flow):
        known = scheduler.sigmas[: len(sigma)].double()  # diffusers' own, where they are relative to the signal
        torch.testing.assert_close(sigma, known, rtol=0.02, atol=1e-3)
    low, high = 0.3, 4.0
    noise, label = torch.zeros(2, *SHAPE), torch.tensor([0, 1])
    generate(Labelled(), adapter, noise, label, steps=7, guidance=2.0, guidance_interval=(low, high), sampler=sampler)
    without = [time for time, unlabelled in calls if unlabelled]
    times = scheduler.timesteps.tolist()
    inside = [time for time, s in zip(times, sigma.tolist(), strict=True) if low <= s <= high]
    assert 0 < len(inside) < len(times) and without == pytest.approx(inside)


def test_autoguidance_extrapolates_from_the_worse_model() -> None:
    """Both are called with the labels, so the model need not know images without one."""
    from pretrain.adapters._sampling import generate

    class Constant(nn.Module):
        def __init__(self, value: float) -> None:
            super().__init__()
            self.value = value

        def forward(self, x: Tensor, time: Tensor, label: Tensor) -> Tensor:
            assert (label >= 0).all()
            return torch.full_like(x, self.value)

    noise, label = torch.zeros(2, *SHAPE), torch.tensor([0, 1])
    made = generate(Constant(0.3), Flow(), noise, label, steps=1, guidance=2.0, guide=Constant(0.1))
    torch.testing.assert_close(made, torch.full_like(made, -(0.1 + 2 * 0.2)), atol=1e-3, rtol=0)


@pytest.mark.parametrize("max_mask_ratio", [None, 0.9])
@pytest.mark.parametrize("norm_pix", [True, False])
def test_mae_loss_and_gradient_are_the_reference_formulas(norm_pix: bool, max_mask_ratio: float | None) -> None:
    """He et al. 2022, section 3, patch by patch: squared error on hidden patches, normalised or not."""
    model, b, adapter = network("mae"), batch(), MAE(norm_pix=norm_pix, max_mask_ratio=max_mask_ratio)
    losses = []
    for i in range(6):
        order = SampleRNG(0, index=b.index[i : i + 1]).uniform(16).argsort(dim=1)
        ratio = 0.75 if max_mask_ratio is None else 0.75 + 0.15 * b.level[i].item()
        visible, hidden = order.split([16 - round(16 * ratio), round(16 * ratio)], dim=1)
        predicted = model(b.image[i : i + 1], visible, hidden)[0]
        loss = torch.zeros(())
        for place, h in enumerate(hidden[0].tolist()):
            row, column = divmod(h, 4)
            target = b.image[i, 0, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2].flatten()
            if norm_pix:
                target = (target - target.mean()) / (target.var(unbiased=True) + 1e-6) ** 0.5
            loss = loss + (predicted[place] - target).square().sum() / len(target)
        losses.append(loss / hidden.shape[1])
    reference = torch.stack(losses)
    parameters = [p for p in model.parameters() if p.requires_grad]
    gradient = torch.autograd.grad(reference.sum(), parameters)
    ours = adapter(model, b, SampleRNG(0, index=b.index)).loss
    torch.testing.assert_close(ours, reference)
    torch.testing.assert_close(torch.autograd.grad(ours.sum(), parameters), gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("decoder", ["self", "cross"])
def test_a_mask_does_not_depend_on_the_rest_of_the_batch(decoder) -> None:
    """With a varying mask ratio, which rises with the level from the lowest to the highest."""
    torch.manual_seed(0)
    model = MAEConfig("vit_tiny_patch16_224", 2, 32, 2, 2, 32, 2, 2, decoder).build(SHAPE, 0)
    b, adapter = batch()._replace(level=torch.tensor([0.0, 0.2, 0.4, 0.6, 0.8, 0.999])), MAE(0.5, max_mask_ratio=0.9)
    visible, hidden, there = adapter.masks(16, b.level, SampleRNG(0, index=b.index))
    assert there is not None
    shown, asked = there.split([visible.shape[1], hidden.shape[1]], dim=1)
    assert shown.sum(1).tolist() == [8, 7, 5, 4, 3, 2] and (shown.sum(1) + asked.sum(1) == 16).all()
    made = model(b.image, visible, hidden, there)
    for i in range(6):
        alone = model(b.image[i : i + 1], visible[i, shown[i]][None], hidden[i, asked[i]][None])
        torch.testing.assert_close(made[i, asked[i]], alone[0])


def test_predicting_some_hidden_patches_has_the_same_expected_loss() -> None:
    """With a decoder in which hidden patches do not attend to each other, and in training only."""
    torch.manual_seed(0)
    config = MAEConfig("vit_tiny_patch16_224", 2, 32, 1, 2, 32, 1, 2, "cross")
    model, b = config.build(SHAPE, 0), batch()
    whole, quarter = MAE(), MAE(predict=0.25)
    assert whole.masks(16, b.level, SampleRNG(0, index=b.index))[1].shape[1] == 12
    sums = torch.zeros(2, 6)
    for draw in range(400):
        for row, adapter in enumerate((whole, quarter)):
            with torch.no_grad():
                sums[row] += adapter(model, b, SampleRNG(draw, index=b.index)).loss
    torch.testing.assert_close(sums[1], sums[0], rtol=0.03, atol=0)
    model.eval()
    assert torch.equal(*(adapter(model, b, SampleRNG(0, index=b.index)).loss for adapter in (whole, quarter)))


@pytest.mark.parametrize("norm_pix", [True, False])
def test_a_perfect_mae_reconstructs_the_image(norm_pix: bool) -> None:
    b, adapter, model = batch(), MAE(norm_pix=norm_pix), network("mae")
    target, _, _ = adapter.targets(model.patchify(b.image))
    model.forward = lambda image, visible, hidden, there: target.gather(
        1, hidden[..., None].expand(-1, -1, target.shape[-1])
    )
    seen, completed = adapter.reconstruct(model, b, SampleRNG(0, index=b.index))
    torch.testing.assert_close(completed, b.image, atol=1e-5, rtol=0)
    assert ((seen == b.image) | (seen == 0)).all() and (seen == 0).float().mean() == 0.75


def test_labels_are_dropped_at_the_stated_rate() -> None:
    label, index = torch.zeros(20_000, dtype=torch.int64), torch.arange(20_000)
    from pretrain.adapters import drop_labels

    share = (drop_labels(label, 0.1, SampleRNG(0, index=index)) < 0).float().mean().item()
    assert abs(share - 0.1) < 5 * (0.09 / 20_000) ** 0.5


@pytest.mark.parametrize(
    ("made", "wrong"),
    [
        (MAE, {"mask_ratio": 1}),
        (DDPM, {"timesteps": 1}),
        (DDPM, {"min_snr": 0.0}),
        (DDPM, {"zero_terminal_snr": True}),
        (DDPM, {"zero_terminal_snr": True, "prediction": "sample", "min_snr": 5.0}),
        (Flow, {"label_dropout": 2}),
        (Flow, {"mean": 1.0}),
        (Flow, {"std": 0.0, "times": "logit_normal"}),
        (Flow, {"shift": 0.0}),
        (EDM, {"std": 0.0}),
        (EDM, {"sigma_data": -0.5}),
    ],
)
def test_values_out_of_range_raise(made, wrong) -> None:
    """In one sentence that names the first of them."""
    with pytest.raises(ValueError, match="must ") as refusal:
        made(**wrong)
    message = str(refusal.value)
    assert next(iter(wrong)) in message and "\n" not in message


def test_a_unet_with_labels_has_a_null_class() -> None:
    model = UNetConfig(channels=(8, 16), layers=1, attention=0).build(SHAPE, 3)
    x, time = torch.randn(2, *SHAPE), torch.tensor([3.0, 500.0])
    none, three = model(x, time, torch.tensor([-1, -1])), model(x, time, torch.tensor([2, 2]))
    assert not torch.equal(none, three)
