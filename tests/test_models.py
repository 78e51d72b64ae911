"""Networks are deterministic functions of tensors, of any shape that fits, and say so where it does not."""

import pytest
import timm
import torch

from models.dit import DiT, DiTConfig
from models.mae import MAEConfig
from models.unet import UNetConfig

SMALL_MAE = {"encoder": "vit_tiny_patch16_224", "width": 32, "depth": 2, "heads": 2}
SMALL_DECODER = {"decoder_width": 16, "decoder_depth": 1, "decoder_heads": 2}


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 8, 16), (4, 12, 8)])
@pytest.mark.parametrize("classes", [0, 5])
@pytest.mark.parametrize(
    "config",
    [UNetConfig(channels=(8, 16), layers=1, head_dim=4), DiTConfig(patch=2, width=16, depth=2, heads=2)],
    ids=["unet", "dit"],
)
def test_a_denoiser_answers_in_its_own_shape(config, shape, classes: int) -> None:
    model = config.build(shape, classes).eval()
    x, time, label = torch.randn(3, *shape), torch.tensor([0.0, 10.5, 999.0]), torch.tensor([-1, -1, -1])
    with torch.no_grad():
        assert model(x, time, label).shape == x.shape
        if not classes:
            assert torch.equal(model(x, time, label), model(x, time, torch.tensor([0, 7, 900])))
        assert torch.equal(model(x, time, label), model(x, time, label))


def test_a_fresh_dit_answers_zero_and_all_of_it_learns() -> None:
    model = DiTConfig(patch=2, width=16, depth=2, heads=2).build((1, 8, 8), 3)
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


def test_dit_tokens_are_patches_in_their_places() -> None:
    """Moving an image by a patch moves tokens, so the position embedding must tell rows from columns."""
    model = DiTConfig(patch=2, width=16, depth=1, heads=2).build((1, 4, 8), 0)
    position = model.position[0]
    assert position.shape == (8, 16) and len({tuple(row.tolist()) for row in position}) == 8


def test_dit_comes_back_from_disk(tmp_path) -> None:
    model = DiTConfig(patch=2, width=16, depth=2, heads=2).build((1, 4, 8), 3)
    torch.nn.init.normal_(model.out.weight)
    model.save_pretrained(tmp_path)
    again = DiT.from_pretrained(tmp_path)
    x, time, label = torch.randn(2, 1, 4, 8), torch.tensor([1.0, 500.0]), torch.tensor([2, -1])
    assert torch.equal(model.eval()(x, time, label), again.eval()(x, time, label))


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
def test_mae_sees_nothing_of_hidden_patches(decoder) -> None:
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
    ("config", "said"),
    [
        (lambda: UNetConfig(channels=(8, 16, 32, 32), attention=0).build((1, 28, 28), 0), "8 divides"),
        (lambda: DiTConfig(patch=8).build((1, 28, 28), 0), "8 divides"),
        (lambda: MAEConfig(patch=16).build((1, 28, 28), 0), "patch"),
        (lambda: MAEConfig(encoder="vit_tinny_patch16_224").build((1, 32, 32), 0), "did you mean vit_tiny"),
        (lambda: UNetConfig(channels=(6,)), "multiples of 4"),
        (lambda: DiTConfig(width=10, heads=3), "multiple of 4"),
        (lambda: MAEConfig(decoder_width=10, decoder_heads=4), "multiple of 4"),
    ],
)
def test_what_does_not_fit_is_refused(config, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        config()
