"""N:M masks are exact and nested, their gradient is SR-STE's, and each sample has its own subnetwork."""

from pathlib import Path
from typing import Any

import pytest
import torch
from pretrain.models._nm import DECAY, nm_mask, shares_of_budget
from pretrain.models.dit import DiTConfig
from pretrain.models.nm import NMConfig, NMNetwork
from pretrain.models.unet import UNetConfig
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from pretrain.adapters.ddpm import DDPM
from pretrain.adapters.edm import EDM
from pretrain.adapters.flow import Flow
from pretrain.core.rng import generator
from pretrain.export.to_diffusers import to_diffusers

UNET = UNetConfig(channels=(8, 16), layers=1, attention=0)
DIT = DiTConfig(patch=2, width=16, depth=2, heads=2)
SHAPE = (1, 8, 8)


def network(base: Any = "unet", **settings: Any) -> NMNetwork:
    """A network with random weights, scales and biases."""
    torch.manual_seed(0)
    model = NMConfig(base=base, unet=UNET, dit=DIT, **settings).build(SHAPE, 3)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


def inputs(count: int = 9, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    rng = generator(seed)
    time = 1000 * torch.rand(count, generator=rng)
    return torch.randn(count, *SHAPE, generator=rng), time, torch.randint(-1, 3, (count,), generator=rng)


@pytest.mark.parametrize("seed", range(20))
def test_masks_have_n_of_every_m_and_are_nested(seed: int) -> None:
    """For weights of any shape, also with equal values; what is kept is not smaller than what is not."""
    rng = generator(seed)
    group, out, groups = (int(n) for n in torch.randint(2, 7, (3,), generator=rng))
    kernel = [(), (3,), (3, 2)][seed % 3]
    weight = torch.randn(out, groups * group, *kernel, generator=rng)
    if seed % 2:
        weight = weight.round()
    before = torch.zeros_like(weight, dtype=torch.bool)
    for keep in range(1, group + 1):
        mask = nm_mask(weight, keep, group)
        assert mask.shape == weight.shape and (mask | ~before).all()
        grouped, size = (x.transpose(0, 1).reshape(groups, group, -1) for x in (mask, weight.abs()))
        assert (grouped.sum(dim=1) == keep).all()
        dropped = size.masked_fill(grouped, -1).amax(dim=1)
        assert (size.masked_fill(~grouped, torch.inf).amin(dim=1) >= dropped).all()
        before = mask
    assert before.all()


@pytest.mark.parametrize("base", ["unet", "dit"])
def test_the_full_choice_is_the_base_network_bit_for_bit(base: str) -> None:
    model, given = network(base), inputs()
    full = torch.full((9,), model.choices.index(4))
    for train in (False, True):
        model.train(train)
        output = model(*given, choice=full)
        assert torch.equal(output, model.base(*given))
        assert not torch.allclose(output, model(*given, choice=full - 1), atol=1e-3)


@pytest.mark.parametrize("base", ["unet", "dit"])
def test_first_and_last_layers_norms_and_embeddings_have_no_mask(base: str) -> None:
    model = network(base)
    outside = {"unet": ("conv_in", "conv_out", "norm", "time_embedding"), "dit": ("embed", "norm", "label", "time.")}
    names = [name.removeprefix("network.") for name in model.layers]
    assert len(names) > 8 and not any(name.startswith((*outside[base], "out", "modulate")) for name in names)


@pytest.mark.parametrize("base", ["unet", "dit"])
@pytest.mark.parametrize("choice", [0, 1, 2])
def test_gradients_are_straight_through_with_decay(base: str, choice: int) -> None:
    """Those of a network whose weights are the masked ones, and DECAY * W where the mask is 0."""
    model, given = network(base).train(), inputs()
    model(*given, choice=torch.full((9,), choice)).square().mean().backward()
    for n in range(2):
        for parameter in (model.scale[n], model.bias[n]):
            assert parameter.grad is not None and bool(parameter.grad.any()) == (n == choice)
    keep, leaves, used = model.choices[choice], {}, {}
    scales = model.scale[choice].detach().split(model.outputs) if choice < 2 else [None] * len(model.layers)
    biases = model.bias[choice].detach().split(model.outputs) if choice < 2 else [None] * len(model.layers)
    for layer, scale, bias in zip(model.layers, scales, biases, strict=True):
        weight = model.base.get_parameter(f"{layer}.weight").detach()
        leaves[layer] = (weight * nm_mask(weight, keep, 4)).requires_grad_()
        used[f"{layer}.weight"] = leaves[layer]
        if scale is not None and bias is not None:
            used[f"{layer}.weight"] = (leaves[layer].flatten(1) * scale[:, None]).view_as(weight)
            used[f"{layer}.bias"] = model.base.get_parameter(f"{layer}.bias").detach() * scale + bias
    functional_call(model.base, used, given).square().mean().backward()
    for layer, leaf in leaves.items():
        weight = model.base.get_parameter(f"{layer}.weight")
        masked = ~nm_mask(weight, keep, 4)
        assert leaf.grad is not None and weight.grad is not None
        torch.testing.assert_close(weight.grad, leaf.grad + DECAY * masked * weight.detach(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("by", ["level", "image"])
def test_a_sample_does_not_depend_on_its_batch(by: Any) -> None:
    model = network(by=by)
    x, time, label = inputs()
    gumbel = -(-torch.rand(9, 3, generator=generator(1)).log()).log()
    more = {"gumbel": gumbel} if by == "image" else {}
    with torch.no_grad():
        for mode in [False, True] if by == "level" else [True]:
            model.train(mode)
            used = model.choice_of(x, time) if by == "level" else (model.classifier(x, time) + gumbel).argmax(dim=1)
            assert len(used.unique()) > 1, "the batch has groups"
            whole = model(x, time, label, **more)
            alone = [
                model(x[i : i + 1], time[i : i + 1], label[i : i + 1], **{k: v[i : i + 1] for k, v in more.items()})
                for i in range(9)
            ]
            each = [
                model.subnetwork(int(k), x[i : i + 1], time[i : i + 1], label[i : i + 1]) for i, k in enumerate(used)
            ]
            whole = whole[0] if more else whole
            torch.testing.assert_close(whole, torch.cat([item[0] if more else item for item in alone]))
            torch.testing.assert_close(whole, torch.cat(each))


@pytest.mark.parametrize("seed", range(10))
def test_the_budget_is_met(seed: int) -> None:
    """The mean of N / M and the FLOPs, over uniform noise levels; more noise never has an earlier choice."""
    rng = generator(seed)
    group = int(torch.randint(2, 9, (), generator=rng)) * 2
    count = int(torch.randint(2, min(group, 5) + 1, (), generator=rng))
    choices = tuple((torch.randperm(group, generator=rng)[:count] + 1).tolist())
    low, high = min(choices) / group, max(choices) / group
    budget = low + (high - low) * (0.05 + 0.9 * torch.rand((), generator=rng).item())
    shares = shares_of_budget([choice / group for choice in choices], budget)
    assert sum(share * choice / group for share, choice in zip(shares, choices, strict=True)) == pytest.approx(budget)
    unet = UNetConfig(channels=(2 * group,) * 2, layers=1, attention=0)
    model = NMConfig(unet=unet, choices=choices, group=group, budget=budget).build(SHAPE, 0)
    time = torch.arange(2000) / 2
    found = model.choice_of(torch.zeros(2000, 1), time)
    assert (found.diff() >= 0).all()
    assert torch.tensor(model.costs)[found].mean().item() == pytest.approx(budget, rel=0.02)
    given = tuple(value[:1] for value in inputs())
    with FlopCounterMode(display=False) as counter:
        model.base(*given)
    dense, flops = counter.get_total_flops(), torch.tensor(model.forward_flops(*given)).double()
    share = 1 - (flops.max() - flops.min()).item() / (high - low) / dense  # of the layers without masks
    assert 0 < share < 0.3
    assert flops[found].mean().item() == pytest.approx(dense * (share + (1 - share) * budget), rel=0.02)


def test_the_choice_of_a_classifier_has_the_gradient_of_the_softmax() -> None:
    """The output is that of the drawn choice; the logits' gradient weighs the outputs of all choices."""
    model, (x, time, label) = network(by="image").train(), inputs()
    gumbel = -(-torch.rand(9, 3, generator=generator(2)).log()).log()
    output, probability = model(x, time, label, gumbel=gumbel, temperature=2.0)
    direction = torch.randn(output.shape, generator=generator(3))
    found = torch.autograd.grad((direction * output).sum(), model.classifier.out.bias)[0]
    logits = model.classifier(x, time).detach()
    torch.testing.assert_close(probability, logits.softmax(1))
    each = torch.stack([model.subnetwork(k, x, time, label).detach() for k in range(3)], dim=1)
    drawn = (logits + gumbel).argmax(1)
    torch.testing.assert_close(output, each[torch.arange(9), drawn])
    shift = torch.zeros(3, requires_grad=True)
    soft = ((logits + shift + gumbel) / 2.0).softmax(1)
    (direction * (soft[:, :, None, None, None] * each).sum(1)).sum().backward()
    torch.testing.assert_close(found, shift.grad, rtol=1e-4, atol=1e-5)


def test_all_parameters_have_gradients_whatever_the_batch() -> None:
    """DistributedDataParallel waits for them."""
    for time in (0.0, 999.0):
        model, (x, _, label) = network().train(), inputs(2)
        model(x, torch.full((2,), time), label).sum().backward()
        assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("base", ["unet", "dit"])
@pytest.mark.parametrize("by", ["level", "image"])
def test_the_exported_parameters_are_the_networks(base: str, by: str, tmp_path: Path) -> None:
    """They are no pipeline of diffusers, which would use all weights at every noise level."""
    model, given = network(base, by=by).eval(), inputs()
    assert to_diffusers(model, Flow(), tmp_path).startswith("safetensors.torch.load_file")
    again = NMConfig(base=base, unet=UNET, dit=DIT, by=by).build(SHAPE, 3).eval()
    again.load_state_dict(load_file(tmp_path / "model.safetensors"))
    assert torch.equal(again(*given), model(*given))


def test_a_classifier_needs_an_objective_that_trains_it() -> None:
    model = network(by="image").train()
    with pytest.raises(ValueError, match="does not train the classifier"):
        model(*inputs())
    assert model.eval()(*inputs()).shape == (9, *SHAPE)
    assert not hasattr(model, "enable_gradient_checkpointing"), "it would recompute layers without masks"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"choices": ()}, "choices must be one or more different numbers from 1 to group = 4"),
        ({"choices": (2, 2)}, "different"),
        ({"choices": (1, 5)}, "from 1 to group = 4"),
        ({"choices": (0, 4)}, "from 1 to group = 4"),
        ({"budget": 0.25}, "between 0.25 and 1"),
        ({"budget": 1.0}, "between 0.25 and 1"),
        ({"thresholds": (1.0,)}, "must be 2"),
        ({"thresholds": (2.0, 1.0)}, "ascending"),
        ({"thresholds": (1.0, 2.0), "by": "image"}, "by level"),
    ],
)
def test_settings_that_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NMConfig(**settings)


def test_thresholds_must_be_given_where_times_are_not_in_0_to_1000() -> None:
    for adapter in (EDM(), DDPM(timesteps=100)):
        with pytest.raises(ValueError, match=r"give --model\.thresholds"):
            NMConfig().check_adapter(adapter)
        NMConfig(thresholds=(-0.5, 0.25)).check_adapter(adapter)
    for adapter in (DDPM(), Flow()):
        NMConfig().check_adapter(adapter)


def test_thresholds_are_times_and_a_group_must_divide_the_channels() -> None:
    model = network(thresholds=(-0.5, 0.25))
    assert model.choice_of(torch.zeros(5, 1), torch.tensor([-1.0, -0.5, 0.0, 0.25, 9.0])).tolist() == [0, 1, 1, 2, 2]
    with pytest.raises(ValueError, match="group = 5 divides the input channels of no layer"):
        NMConfig(unet=UNET, group=5).build(SHAPE, 0)
