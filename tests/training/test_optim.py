"""Muon: which parameters it updates, its updates, and its state."""

import copy

import pytest
import torch
from pretrain.models.dit import DiTConfig
from pretrain.models.mae import MAEConfig
from pretrain.models.unet import UNetConfig
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from pretrain.config.schema import Optim
from pretrain.core.rng import generator
from pretrain.training.optim import build_optimizer, hidden_matrices, orthogonalized, step_flops

NETWORKS = {
    "dit": DiTConfig(patch=2, width=16, depth=2, heads=2),
    "unet": UNetConfig(channels=(8, 16), layers=1, attention=0),
    "mae": MAEConfig(patch=4, width=16, depth=2, heads=2, decoder_width=16, decoder_depth=1, decoder_heads=2),
}


def network(name: str) -> nn.Module:
    torch.manual_seed(0)
    return NETWORKS[name].build((1, 8, 8), 3 if name == "dit" else 0)


def with_gradients(model: nn.Module, seed: int) -> None:
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator(seed, parameter.numel()))


@pytest.mark.parametrize("name", NETWORKS)
def test_the_matrices_of_the_blocks_and_nothing_else_take_muons_steps(name: str) -> None:
    model = network(name)
    matrices = {id(parameter) for parameter in hidden_matrices(model)}
    chosen = {key for key, parameter in model.named_parameters() if id(parameter) in matrices}
    inside = {
        key
        for key, parameter in model.named_parameters()
        if ".weight" in key and parameter.ndim > 1 and any(part.isdigit() for part in key.split(".")[:-2])
    }
    assert chosen and chosen <= inside
    left = {key for key in inside - chosen if "time" not in key and "embed" not in key and "modulate" not in key}
    assert not left, left


@pytest.mark.parametrize("name", NETWORKS)
def test_other_parameters_take_adamws_steps(name: str) -> None:
    model = network(name)
    plain = copy.deepcopy(model)
    optimizers = [build_optimizer(m, Optim(name=kind, lr=0.01)) for m, kind in ((model, "muon"), (plain, "adamw"))]
    for seed in range(3):
        for each, optimizer in zip((model, plain), optimizers, strict=True):
            with_gradients(each, seed)
            optimizer.step()
    matrices = {id(parameter) for parameter in hidden_matrices(model)}
    for one, other in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(one, other) != (id(one) in matrices)


@pytest.mark.parametrize("seed", range(6))
def test_an_update_is_nearly_orthogonal_and_points_where_the_momentum_does(seed: int) -> None:
    rows, columns = torch.randint(4, 40, (2,), generator=generator(seed)).tolist()
    matrix = torch.randn(3, rows, columns, generator=generator(seed, 1)) * 10.0 ** (seed - 3)
    found = orthogonalized(matrix)
    u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
    clear = s / s.norm(dim=1, keepdim=True) > 0.02  # smaller singular values are not brought up to 1
    values = torch.diagonal(u.mT @ found @ vt.mT, dim1=1, dim2=2)
    assert values[clear].min() > 0.6 and values[clear].max() < 1.25
    rest = u.mT @ found @ vt.mT - torch.diag_embed(values)
    assert rest.abs().max() < 1e-3  # the singular vectors stay


def test_a_saved_optimizer_continues_bit_identically() -> None:
    model = network("dit")
    optimizer = build_optimizer(model, Optim(name="muon", lr=0.01))
    with_gradients(model, 0)
    optimizer.step()
    other = copy.deepcopy(model)
    resumed = build_optimizer(other, Optim(name="muon", lr=0.01))
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for each, one in ((model, optimizer), (other, resumed)):
        with_gradients(each, 1)
        one.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_the_matrix_products_of_muon_are_counted() -> None:
    model = network("dit")
    optimizer = build_optimizer(model, Optim(name="muon"))
    with_gradients(model, 0)
    with FlopCounterMode(display=False) as counter:
        optimizer.step()
    assert counter.get_total_flops() == step_flops(model, Optim(name="muon")) > 0
    assert step_flops(model, Optim()) == 0
