"""Every adapter keeps the contract of the seam, and each computes its paper's formula."""

import dataclasses

import pytest
import torch
from torch import Tensor, nn

from models.dit import DiTConfig
from models.mae import MAEConfig
from models.unet import UNetConfig
from pretrain import parts
from pretrain.adapter import Batch, Generative
from pretrain.adapters.ddpm import DDPM
from pretrain.adapters.flow import Flow
from pretrain.adapters.mae import MAE
from pretrain.rng import Draws

SHAPE = (1, 8, 8)


def batch(size: int = 6) -> Batch:
    rng = torch.Generator().manual_seed(0)
    image = torch.rand(size, *SHAPE, generator=rng) * 2 - 1
    return Batch(image, torch.arange(size) % 3, torch.arange(size) + 10, (torch.arange(size) + 0.5) / size)


def network(adapter: str) -> nn.Module:
    torch.manual_seed(0)
    if adapter == "mae":
        return MAEConfig("vit_tiny_patch16_224", 2, 16, 1, 2, 16, 1, 2).build(SHAPE, 0)
    model = DiTConfig(patch=2, width=16, depth=1, heads=2).build(SHAPE, 3)
    nn.init.normal_(model.out.weight, std=0.3)  # a fresh DiT answers 0
    return model


class Oracle(nn.Module):
    """A denoiser that answers what it is told to and remembers what it was asked."""

    def __init__(self, answer: Tensor) -> None:
        super().__init__()
        self.answer = answer

    def forward(self, x: Tensor, time: Tensor, label: Tensor) -> Tensor:
        self.asked = x, time, label
        return self.answer


@pytest.mark.parametrize("name", parts.names("adapter"))
class TestContract:
    def adapter(self, name: str):
        adapter = parts.load("adapter", name)()
        assert dataclasses.is_dataclass(adapter) and adapter.__dataclass_params__.frozen
        return adapter

    def test_one_differentiable_loss_a_sample(self, name: str) -> None:
        model, b = network(name), batch()
        loss, score = self.adapter(name)(model, b, Draws(0, index=b.index))
        assert loss.shape == (len(b.index),) and loss.dtype == torch.float32 and (loss > 0).all()
        assert score is None or (score.shape == loss.shape and not score.requires_grad)
        loss.sum().backward()
        assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())

    def test_a_sample_moves_its_own_loss_alone(self, name: str) -> None:
        model, b, adapter = network(name).eval(), batch(), self.adapter(name)
        other = b._replace(image=b.image.clone())
        other.image[2] = -other.image[2]
        same = (
            adapter(model, b, Draws(0, index=b.index)).loss - adapter(model, other, Draws(0, index=b.index)).loss
        ) == 0
        assert same.tolist() == [True, True, False, True, True, True]

    def test_a_sample_has_its_loss_in_any_batch(self, name: str) -> None:
        model, b, adapter = network(name).eval(), batch(), self.adapter(name)
        whole = adapter(model, b, Draws(4, 1, index=b.index)).loss
        for part in (slice(0, 2), slice(2, 6)):
            few = Batch(*(field[part] for field in b))
            torch.testing.assert_close(adapter(model, few, Draws(4, 1, index=few.index)).loss, whole[part])

    def test_nothing_but_the_draws_is_random(self, name: str) -> None:
        model, b, adapter = network(name).eval(), batch(), self.adapter(name)
        first = adapter(model, b, Draws(0, index=b.index)).loss
        torch.manual_seed(99)
        assert torch.equal(first, adapter(model, b, Draws(0, index=b.index)).loss)
        assert not torch.equal(first, adapter(model, b, Draws(1, index=b.index)).loss)

    def test_fields_are_read_from_the_source_as_they_are(self, name: str) -> None:
        declared, loaded = (
            {field.name: field.default for field in dataclasses.fields(find("adapter", name))}
            for find in (parts.declared, parts.load)
        )
        assert declared == loaded


def test_flow_is_the_straight_path() -> None:
    b = batch()
    rng = Draws(0, index=b.index)
    noise = Draws(0, index=b.index).normal(*SHAPE)
    oracle = Oracle(noise - b.image)
    assert Flow()(oracle, b, rng).loss.abs().max() == 0
    x, time, _ = oracle.asked
    t = b.level[:, None, None, None]
    torch.testing.assert_close(x, (1 - t) * b.image + t * noise)
    torch.testing.assert_close(time, 1000 * b.level)
    wrong = Oracle(noise - b.image + 0.5)
    torch.testing.assert_close(Flow()(wrong, b, Draws(0, index=b.index)).loss, torch.full((6,), 0.25))


@pytest.mark.parametrize("schedule", ["linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
def test_ddpm_predictions_by_their_formulas(schedule: str, prediction: str) -> None:
    b = batch()
    adapter = DDPM(prediction=prediction, noise_schedule=schedule)
    noise = Draws(0, index=b.index).normal(*SHAPE)
    signal = adapter.noising.alphas_cumprod[(b.level * 1000).long()][:, None, None, None]
    target = {
        "epsilon": noise,
        "sample": b.image,
        "v_prediction": signal.sqrt() * noise - (1 - signal).sqrt() * b.image,  # Salimans and Ho 2022, section 4
    }[prediction]
    oracle = Oracle(target)
    assert adapter(oracle, b, Draws(0, index=b.index)).loss.max() < 1e-10
    torch.testing.assert_close(
        oracle.asked[0], signal.sqrt() * b.image + (1 - signal).sqrt() * noise
    )  # Ho et al., eq. 4


@pytest.mark.parametrize("adapter", [Flow(), DDPM(), DDPM(prediction="sample"), DDPM(prediction="v_prediction")])
def test_generation_undoes_the_noise(adapter) -> None:
    """With the exact answer for data that is one image, generating gives that image."""
    from pretrain.generate import generate

    assert isinstance(adapter, Generative)
    image = torch.linspace(-0.9, 0.9, 64).view(1, *SHAPE)

    class Point(nn.Module):
        def forward(self, x: Tensor, time: Tensor, label: Tensor) -> Tensor:
            if isinstance(adapter, Flow):
                return (x - image) / (time / 1000)[:, None, None, None]
            signal = adapter.noising.alphas_cumprod[time.long()][:, None, None, None]
            noise = (x - signal.sqrt() * image) / (1 - signal).sqrt()
            velocity = signal.sqrt() * noise - (1 - signal).sqrt() * image
            return {"epsilon": noise, "sample": image.expand_as(x), "v_prediction": velocity}[adapter.prediction]

    noise = Draws(0, index=torch.arange(3)).normal(*SHAPE)
    made = generate(Point(), adapter, noise, torch.full((3,), -1), steps=10)
    torch.testing.assert_close(made, image.expand(3, -1, -1, -1), atol=2e-3, rtol=0)


@pytest.mark.parametrize("timesteps", [10, 1000, 4000])
def test_ddpm_generates_on_the_schedule_it_trains_on(timesteps: int) -> None:
    adapter = DDPM(timesteps=timesteps)
    assert adapter.scheduler().config.num_train_timesteps == timesteps
    assert torch.equal(adapter.scheduler().alphas_cumprod, adapter.noising.alphas_cumprod)


def test_guidance_is_a_line_through_the_two_predictions() -> None:
    from pretrain.generate import generate

    class Labelled(nn.Module):
        def forward(self, x: Tensor, time: Tensor, label: Tensor) -> Tensor:
            return torch.where(label < 0, 0.1, 0.3).view(-1, 1, 1, 1).expand_as(x)

    noise = torch.zeros(2, *SHAPE)
    made = generate(Labelled(), Flow(), noise, torch.tensor([0, 1]), steps=1, guidance=2.0)
    torch.testing.assert_close(made, torch.full_like(made, -(0.1 + 2 * 0.2)), atol=1e-3, rtol=0)


@pytest.mark.parametrize("norm_pix", [True, False])
def test_mae_loss_is_the_reference_formula(norm_pix: bool) -> None:
    """He et al. 2022, section 3, patch by patch: squared error on hidden patches, normalised or not."""
    model, b, adapter = network("mae").eval(), batch(), MAE(norm_pix=norm_pix)
    visible, hidden = adapter.masks(16, Draws(0, index=b.index))
    assert hidden.shape == (6, 12)
    assert torch.cat([visible, hidden], 1).sort(1).values.equal(torch.arange(16).expand(6, -1))
    predicted = model(b.image, visible, hidden)
    for i in range(6):
        total = 0.0
        for place, h in enumerate(hidden[i].tolist()):
            row, column = divmod(h, 4)
            target = b.image[i, 0, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2].flatten()
            if norm_pix:
                target = (target - target.mean()) / (target.var(unbiased=True) + 1e-6) ** 0.5
            total += ((predicted[i, place] - target) ** 2).mean().item()
        assert adapter(model, b, Draws(0, index=b.index)).loss[i].item() == pytest.approx(total / 12, rel=1e-4)


def test_a_share_of_the_hidden_patches_tells_the_same_loss_on_average() -> None:
    """With a decoder in which hidden patches don't know of each other, and in training alone."""
    torch.manual_seed(0)
    config = MAEConfig("vit_tiny_patch16_224", 2, 32, 1, 2, 32, 1, 2, "cross")
    model, b = config.build(SHAPE, 0), batch()
    whole, quarter = MAE(), MAE(predict=0.25)
    assert whole.masks(16, Draws(0, index=b.index))[1].shape[1] == 12
    sums = torch.zeros(2, 6)
    for draw in range(400):
        for row, adapter in enumerate((whole, quarter)):
            with torch.no_grad():
                sums[row] += adapter(model, b, Draws(draw, index=b.index)).loss
    torch.testing.assert_close(sums[1], sums[0], rtol=0.03, atol=0)
    model.eval()
    assert torch.equal(*(adapter(model, b, Draws(0, index=b.index)).loss for adapter in (whole, quarter)))


@pytest.mark.parametrize("norm_pix", [True, False])
def test_a_perfect_mae_reconstructs_the_image(norm_pix: bool) -> None:
    b, adapter, model = batch(), MAE(norm_pix=norm_pix), network("mae")
    target, _, _ = adapter.targets(model.patchify(b.image))
    model.forward = lambda image, visible, hidden: target.gather(1, hidden[..., None].expand(-1, -1, target.shape[-1]))
    seen, completed = adapter.reconstruct(model, b, Draws(0, index=b.index))
    torch.testing.assert_close(completed, b.image, atol=1e-5, rtol=0)
    assert ((seen == b.image) | (seen == 0)).all() and (seen == 0).float().mean() == 0.75


def test_labels_are_dropped_at_the_stated_rate() -> None:
    label, index = torch.zeros(20_000, dtype=torch.int64), torch.arange(20_000)
    from pretrain.adapter import drop_labels

    share = (drop_labels(label, 0.1, Draws(0, index=index)) < 0).float().mean().item()
    assert abs(share - 0.1) < 5 * (0.09 / 20_000) ** 0.5


@pytest.mark.parametrize("wrong", [lambda: MAE(mask_ratio=1), lambda: DDPM(timesteps=1), lambda: Flow(label_dropout=2)])
def test_values_out_of_range_are_refused(wrong) -> None:
    with pytest.raises(ValueError, match="must be"):
        wrong()


def test_a_unet_with_labels_has_a_null_class() -> None:
    model = UNetConfig(channels=(8, 16), layers=1, attention=0).build(SHAPE, 3)
    x, time = torch.randn(2, *SHAPE), torch.tensor([3.0, 500.0])
    none, three = model(x, time, torch.tensor([-1, -1])), model(x, time, torch.tensor([2, 2]))
    assert not torch.equal(none, three)
