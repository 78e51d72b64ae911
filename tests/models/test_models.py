"""Networks are deterministic functions of tensors, of any shape that fits, and raise for others."""

from dataclasses import replace

import pytest
import timm
import torch
from einops import rearrange
from pretrain.models.dit import DiT, DiTConfig, rope_angles, rotate
from pretrain.models.mae import MAEConfig
from pretrain.models.unet import UNetConfig
from programs import profile_config

from pretrain.adapters.flow import Flow

SMALL_DIT = {"patch": 2, "width": 16, "depth": 2, "heads": 2}
SMALL_MAE = {"encoder": "vit_tiny_patch16_224", "width": 32, "depth": 2, "heads": 2}
SMALL_DECODER = {"decoder_width": 16, "decoder_depth": 1, "decoder_heads": 2}


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 8, 16), (4, 12, 8)])
@pytest.mark.parametrize("classes", [0, 5])
@pytest.mark.parametrize(
    "config",
    [
        UNetConfig(channels=(8, 16), layers=1, head_dim=4),
        DiTConfig(**SMALL_DIT),
        DiTConfig(**SMALL_DIT, position="rope", qk_norm=True),
    ],
    ids=["unet", "dit", "dit rope"],
)
def test_a_denoiser_returns_its_input_shape(config, shape, classes: int) -> None:
    model = config.build(shape, classes).eval()
    x, time, label = torch.randn(3, *shape), torch.tensor([0.0, 10.5, 999.0]), torch.tensor([-1, -1, -1])
    with torch.no_grad():
        assert model(x, time, label).shape == x.shape
        if not classes:
            assert torch.equal(model(x, time, label), model(x, time, torch.tensor([0, 7, 900])))
        assert torch.equal(model(x, time, label), model(x, time, label))


@pytest.mark.parametrize("more", [{}, {"position": "rope", "qk_norm": True}], ids=["plain", "rope"])
def test_a_new_dit_returns_zero_and_all_parameters_get_gradients(more) -> None:
    model = DiTConfig(**SMALL_DIT, **more).build((1, 8, 8), 3)
    x, time = torch.randn(4, 1, 8, 8), torch.rand(4) * 1000
    assert model(x, time, torch.tensor([0, 1, 2, -1])).abs().max() == 0  # adaLN-zero
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(3):  # zero gates open one after another
        optimizer.zero_grad()
        (model(x, time, torch.tensor([0, 1, 2, -1])) - 1).square().mean().backward()
        optimizer.step()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    label = model(x, time, torch.tensor([0, 0, 0, 0])) - model(x, time, torch.tensor([-1, -1, -1, -1]))
    assert label.abs().max() > 0


def awake(model: DiT) -> DiT:
    """With open gates, as after training."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


@pytest.mark.parametrize(("size", "millions"), [("S", 33), ("B", 130), ("L", 458), ("XL", 675)])
@pytest.mark.parametrize("patch", [2, 4, 8])
def test_dit_sizes_are_the_papers(size, millions: int, patch: int) -> None:
    """Peebles and Xie 2023, table 1, at 4x32x32 latents."""
    with torch.device("meta"):
        model = DiTConfig(size=size, patch=patch).build((4, 32, 32), 1000)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, rel=0.015)
    assert len(model.blocks) == DiTConfig(size=size).dimensions[1]
    with torch.device("meta"):
        narrow = DiTConfig(size=size, width=96, heads=2).build((4, 32, 32), 0)
    assert len(narrow.blocks) == len(model.blocks) and narrow.embed.out_features == 96


@pytest.mark.parametrize("position", ["sincos", "rope"])
def test_dit_tokens_are_patches_in_their_places(position) -> None:
    """Moving patches (by a row, a column, transposed) changes the output's patches, not only their places."""
    model = awake(DiTConfig(**SMALL_DIT, position=position).build((1, 8, 8), 0))
    x, time, label = torch.randn(1, 1, 8, 8), torch.tensor([400.0]), torch.tensor([-1])

    moves = (
        lambda image: image.roll(2, dims=2),
        lambda image: image.roll(2, dims=3),
        lambda image: rearrange(image, "b c (h p) (w q) -> b c (w p) (h q)", p=2, q=2),
    )
    with torch.no_grad():
        for move in moves:
            assert (model(move(x), time, label) - move(model(x, time, label))).abs().max() > 1e-3


def test_rope_sees_how_far_apart_patches_are_and_nothing_else() -> None:
    torch.manual_seed(0)
    grid, width = (5, 7), 24
    angle = rope_angles(grid, width)
    assert angle.shape == (35, 12)
    q, k = torch.randn(2, width, dtype=torch.float64).unbind()
    q, k = (rotate(x.expand(35, -1), angle.double().cos(), angle.double().sin()) for x in (q, k))
    torch.testing.assert_close(q.norm(dim=-1), q.norm(dim=-1)[:1].expand(35))
    product = (q @ k.T).view(*grid, *grid)  # rows and columns of the one, then of the other; of float32 angles
    torch.testing.assert_close(product[1:, 1:, 1:, 1:], product[:-1, :-1, :-1, :-1], rtol=0, atol=1e-5)
    assert (product[1:, :, 0, 0] - product[0, 0, 0, 0]).abs().min() > 1e-4
    assert (product[0, 1:5, 0, 0] - product[1:, 0, 0, 0]).abs().min() > 1e-4  # a column is no row


def test_qk_norm_bounds_attention() -> None:
    """Queries and keys a thousand times as large give the same output, and another one without it."""
    x, time, label = torch.randn(2, 1, 8, 8), torch.tensor([3.0, 700.0]), torch.tensor([0, -1])
    for qk_norm in (True, False):
        model = awake(DiTConfig(**SMALL_DIT, qk_norm=qk_norm).build((1, 8, 8), 3))
        with torch.no_grad():
            before = model(x, time, label)
            for block in model.blocks:
                block.qkv.weight[: 2 * 16] *= 1000
                block.qkv.bias[: 2 * 16] *= 1000
            assert torch.allclose(model(x, time, label), before, atol=1e-3) == qk_norm


@pytest.mark.parametrize("more", [{}, {"position": "rope", "qk_norm": True}], ids=["plain", "rope"])
def test_dit_is_saved_and_loaded(more, tmp_path) -> None:
    model = awake(DiTConfig(**SMALL_DIT, **more).build((1, 4, 8), 3))
    model.save_pretrained(tmp_path)
    again = DiT.from_pretrained(tmp_path)
    x, time, label = torch.randn(2, 1, 4, 8), torch.tensor([1.0, 500.0]), torch.tensor([2, -1])
    assert torch.equal(model.eval()(x, time, label), again.eval()(x, time, label))


@pytest.mark.parametrize("more", [{}, {"position": "rope", "qk_norm": True}], ids=["plain", "rope"])
def test_in_training_some_tokens_skip_the_middle_blocks(more) -> None:
    """TREAD (Krause et al. 2025): a routed token leaves the second block as it enters the last but one."""
    config = DiTConfig(patch=2, width=16, depth=6, heads=2, route=0.25, **more)
    model, plain = (awake(each.build((1, 8, 8), 3)) for each in (config, replace(config, route=0.0)))
    inputs = torch.randn(3, 1, 8, 8), torch.tensor([3.0, 500.0, 700.0]), torch.tensor([0, -1, 2])
    seen: list[tuple] = []
    for block in model.blocks:
        block.register_forward_pre_hook(lambda _, given: seen.append(given))
    with torch.no_grad():
        assert torch.equal(model(*inputs), plain(*inputs)) and seen[2][0].shape[1] == 16  # not in evaluation
        seen.clear()
        first = model.train()(*inputs)
        assert [tokens.shape[1] for tokens, *_ in seen] == [16, 16, 12, 12, 16, 16]
        if more:  # each token keeps the angles of its place
            place = [[int((row == model.cosine).all(1).nonzero()) for row in image] for image in seen[3][2][:, 0]]
            assert all(row == sorted(set(row)) for row in place) and place[0] != place[1]
        assert not torch.equal(first, model(*inputs))  # other tokens in each forward pass
        for block in model.blocks[2:4]:
            block.modulate[1].weight.zero_(), block.modulate[1].bias.zero_()  # closed gates: blocks that do nothing
        torch.testing.assert_close(model(*inputs), model.eval()(*inputs))
        chosen = model.train()(*inputs, choose=lambda features: torch.tensor([2, 0]))
        torch.testing.assert_close(chosen, model(*inputs)[[2, 0]])
    routed, all_tokens = (
        profile_config(each, Flow(), (1, 8, 8), 3).flops for each in (config, replace(config, route=0))
    )
    assert routed < all_tokens  # they are counted


@pytest.mark.parametrize("wrong", [{"route": 1.0}, {"route": -0.1}, {"route": 0.5, "depth": 4}])
def test_routing_needs_a_share_and_blocks_between_the_outer_four(wrong) -> None:
    with pytest.raises(ValueError, match="route"):
        DiTConfig(**{"patch": 2, "width": 16, "depth": 6, "heads": 2} | wrong)


NETWORKS = {
    "unet": UNetConfig(channels=(8, 16), layers=1, head_dim=4, dropout=0.2),
    "dit": DiTConfig(**SMALL_DIT),
    "dit rope": DiTConfig(**SMALL_DIT, position="rope", qk_norm=True),
    "mae": MAEConfig(patch=2, **SMALL_MAE, **SMALL_DECODER),
    "mae cross": MAEConfig(patch=2, decoder="cross", **SMALL_MAE, **SMALL_DECODER),
}


def asked(name: str) -> tuple:
    """A network and its inputs."""
    torch.manual_seed(0)
    model = NETWORKS[name].build((3, 8, 4), 3).train()
    if name.startswith("mae"):
        order = torch.stack([torch.randperm(8) for _ in range(2)])
        return model, (torch.randn(2, 3, 8, 4), order[:, :3], order[:, 3:7])
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model, (torch.randn(2, 3, 8, 4), torch.tensor([1.5, 900.0]), torch.tensor([2, -1]))


@pytest.mark.parametrize("name", NETWORKS)
def test_gradient_checkpointing_stores_less_and_changes_nothing(name: str) -> None:
    """Gradients are the same to the bit, also with dropout; fewer numbers are stored."""
    found = []
    for recompute in (False, True):
        model, inputs = asked(name)
        if recompute:
            model.enable_gradient_checkpointing()
        kept: list[int] = []
        torch.manual_seed(1)
        with torch.autograd.graph.saved_tensors_hooks(lambda x, kept=kept: kept.append(x.numel()) or x, lambda x: x):
            loss = model(*inputs).square().sum()
        loss.backward()
        found.append((sum(kept), loss, {key: p.grad for key, p in model.named_parameters() if p.requires_grad}))
    (much, loss, gradient), (little, loss_again, gradient_again) = found
    assert little < 0.7 * much
    assert torch.equal(loss, loss_again) and all(g is not None for g in gradient.values())
    assert all(torch.equal(gradient[key], gradient_again[key]) for key in gradient)


@pytest.mark.parametrize(
    ("name", "recompute"),
    [
        pytest.param(name, recompute, marks=pytest.mark.slow if recompute or name in ("dit", "mae") else ())
        for name in NETWORKS
        for recompute in (False, True)
    ],
)
def test_a_network_compiles_into_one_graph(name: str, recompute: bool) -> None:
    """Without a graph break (fullgraph), with the same output."""
    model, inputs = asked(name)
    model.eval()
    if recompute:
        model.enable_gradient_checkpointing()
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(*inputs), model(*inputs))


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 8, 16), (4, 12, 8)])
@pytest.mark.parametrize("encoder", ["vit_tiny_patch16_224", "vit_small_patch14_reg4_dinov2"])
def test_mae_encodes_visible_patches_as_timm_does_the_whole_image(encoder: str, shape) -> None:
    config = MAEConfig(**{**SMALL_MAE, **SMALL_DECODER, "encoder": encoder, "patch": 4})
    model = config.build(shape, 0).eval()
    image = torch.randn(2, *shape)
    everything = torch.arange(model.patches).expand(2, -1)
    with torch.no_grad():
        torch.testing.assert_close(model.encode(image, everything), model.encoder.forward_features(image))
        some = everything[:, ::2]
        assert model.encode(image, some).shape[1] == some.shape[1] + model.encoder.num_prefix_tokens
        assert model(image, some, everything[:, 1:3]).shape == (2, 2, 16 * shape[0])
    torch.testing.assert_close(model.unpatchify(model.patchify(image)), image)


@pytest.mark.parametrize("decoder", ["self", "cross"])
def test_mae_does_not_depend_on_hidden_patches(decoder) -> None:
    model = MAEConfig(patch=4, decoder=decoder, **SMALL_MAE, **SMALL_DECODER).build((1, 16, 16), 0).eval()
    image, visible = torch.randn(1, 1, 16, 16), torch.tensor([[0, 5, 3]])
    patch = model.patchify(image)
    hidden = torch.tensor([[1, 2, 4, *range(6, 16)]])
    patch[:, hidden[0]] = 7.0
    with torch.no_grad():
        predicted = model(image, visible, hidden)
        torch.testing.assert_close(predicted, model(model.unpatchify(patch), visible, hidden))
        alone = torch.cat([model(image, visible, one) for one in hidden.split(1, dim=1)], dim=1)
        assert torch.allclose(alone, predicted, atol=1e-6) == (decoder == "cross")


def test_mae_prediction_does_not_depend_on_the_order_of_the_visible() -> None:
    model = MAEConfig(patch=4, **SMALL_MAE, **SMALL_DECODER).build((1, 16, 16), 0).eval()
    image = torch.randn(1, 1, 16, 16)
    with torch.no_grad():
        a, b = (model(image, torch.tensor([order]), torch.tensor([[7]])) for order in ([0, 5, 3], [3, 0, 5]))
    torch.testing.assert_close(a, b)


def test_every_encoder_parameter_has_timms_name() -> None:
    config = MAEConfig(patch=4, **SMALL_MAE, **SMALL_DECODER)
    mine = config.build((1, 16, 16), 0).encoder.state_dict()
    theirs = timm.create_model(config.encoder, **config.timm_arguments((1, 16, 16))).state_dict()
    assert {k: v.shape for k, v in mine.items()} == {k: v.shape for k, v in theirs.items()}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (lambda: UNetConfig(channels=(8, 16, 32, 32), attention=0).build((1, 28, 28), 0), "8 divides"),
        (lambda: DiTConfig(patch=8).build((1, 28, 28), 0), "8 divides"),
        (lambda: MAEConfig(patch=16).build((1, 28, 28), 0), "patch"),
        (lambda: MAEConfig(encoder="vit_tinny_patch16_224").build((1, 32, 32), 0), "did you mean vit_tiny"),
        (lambda: UNetConfig(channels=(6,)), "multiples of 4"),
        (lambda: DiTConfig(width=10, heads=3), "multiple of 4"),
        (lambda: DiTConfig(size="XL", width=100), "heads = 64, got 100"),
        (lambda: MAEConfig(decoder_width=10, decoder_heads=4), "multiple of 4"),
    ],
)
def test_impossible_sizes_raise(config, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config()


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_mae_gradients_have_the_strides_of_their_parameters(channels: int) -> None:
    """Otherwise DistributedDataParallel copies each of them once more, and warns."""
    model = MAEConfig(decoder_width=16, decoder_depth=1, decoder_heads=2, patch=4, width=16, depth=1, heads=2).build(
        (channels, 8, 8), 0
    )
    model(torch.randn(2, channels, 8, 8), torch.tensor([[0], [3]]), torch.tensor([[1, 2], [0, 1]])).sum().backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            assert parameter.grad.stride() == parameter.stride(), name


def test_where_a_unet_has_attention_is_checked() -> None:
    for wrong in ({"attention": 0, "attention_from": 1}, {"attention": 2, "attention_from": 2}, {"attention_from": -1}):
        with pytest.raises(ValueError, match="attention_from"):
            UNetConfig(channels=(8, 8, 8), **wrong)
