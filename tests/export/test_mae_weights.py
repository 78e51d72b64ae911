"""Weights of masked autoencoders are exported to timm and transformers and read from published files."""

import re
from pathlib import Path

import pytest
import timm
import torch
from pretrain.models.mae import MAEConfig, MaskedAutoencoder
from safetensors.torch import load_file, save_file
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from pretrain.adapters import Batch
from pretrain.adapters.mae import MAE
from pretrain.core.errors import UserError
from pretrain.core.rng import SampleRNG
from pretrain.export.mae_weights import start_from, to_timm, to_transformers

ENCODER = "vit_tiny_patch16_224"
CONFIG = MAEConfig(ENCODER, 4, 32, 2, 2, 16, 1, 2)


def fresh(config: MAEConfig = CONFIG, shape: tuple[int, int, int] = (3, 16, 16), seed: int = 0) -> MaskedAutoencoder:
    torch.manual_seed(seed)
    model = config.build(shape, 0).eval()
    for name, parameter in model.named_parameters():
        if name != "encoder.pos_embed":
            torch.nn.init.normal_(parameter, mean=float("norm" in name and "weight" in name), std=0.1)
    return model


@pytest.mark.parametrize(
    ("config", "shape"),
    [
        (CONFIG, (1, 16, 16)),
        (CONFIG, (4, 8, 16)),
        (MAEConfig("vit_small_patch14_reg4_dinov2.lvd142m", 4, 32, 1, 2, 16, 1, 2), (3, 8, 8)),
    ],
    ids=["grey", "four channels, not square", "registers"],
)
def test_timm_opens_an_encoder_in_every_way(config: MAEConfig, shape, tmp_path: Path) -> None:
    model, image = fresh(config, shape), torch.randn(2, *shape)
    arguments = config.timm_arguments(shape)
    message = to_timm(model, config.encoder, arguments, tmp_path)
    with torch.no_grad():
        expected = model.encoder(image)
        opened = eval(message, {"timm": timm}).eval()
        assert torch.equal(opened(image), expected)
        one = timm.create_model(config.encoder, checkpoint_path=str(tmp_path / "model.safetensors"), **arguments).eval()
        assert torch.equal(one(image), expected)
        del arguments["num_classes"]  # timm's default
        file = tmp_path / "with_zero_head.safetensors"
        assert file.exists() == (config is CONFIG), "DINOv2's have no head"
        if file.exists():
            headed = timm.create_model(config.encoder, checkpoint_path=str(file), **arguments).eval()
            assert torch.equal(headed.forward_features(image), model.encoder.forward_features(image))
            assert headed(image).shape == (2, 1000) and not headed(image).any()
        seen = timm.data.resolve_model_data_config(opened)
        assert [*seen["mean"]] == [*seen["std"]] == [0.5] * shape[0] and tuple(seen["input_size"]) == shape
        larger = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, img_size=32, num_classes=7).eval()
        assert larger(torch.randn(2, shape[0], 32, 32)).shape == (2, 7)
        assert torch.equal(larger.blocks[0].mlp.fc1.weight, model.encoder.blocks[0].mlp.fc1.weight)


@pytest.mark.parametrize("channels", [1, 3, 5])
@pytest.mark.parametrize("norm_pix", [True, False])
def test_transformers_has_the_same_loss_and_features(norm_pix: bool, channels: int, tmp_path: Path) -> None:
    """And the same predictions; what it saves again starts a run with the same ones."""
    from transformers import AutoModel, ViTMAEForPreTraining

    shape = (channels, 16, 16)
    model, adapter, image = fresh(shape=shape), MAE(norm_pix=norm_pix), torch.randn(3, *shape)
    assert to_transformers(model, adapter, tmp_path / "transformers")
    to_timm(model, ENCODER, CONFIG.timm_arguments(shape), tmp_path)
    index = torch.arange(3)
    noise = SampleRNG(0, index=index).uniform(16)  # both masks are its order
    theirs = ViTMAEForPreTraining.from_pretrained(tmp_path / "transformers").eval()
    with torch.no_grad():
        loss = adapter(model, Batch(image, index, index, index / 3), SampleRNG(0, index=index)).loss
        found = theirs(image, noise=noise)
        torch.testing.assert_close(found.loss, loss.mean())
        order = noise.argsort(dim=1)
        predicted = model(image, order[:, :4], order[:, 4:])
        torch.testing.assert_close(found.logits.gather(1, order[:, 4:, None].expand_as(predicted)), predicted)
        theirs.save_pretrained(tmp_path / "again")
        again = fresh(shape=shape, seed=1)
        assert "and the decoder; its pixels were normalised by mean [0.5" in start_from(
            again, tmp_path / "again", ENCODER
        )
        torch.testing.assert_close(again(image, order[:, :4], order[:, 4:]), predicted)
        everything = torch.arange(16.0).expand(3, -1)
        encoder = AutoModel.from_pretrained(tmp_path / "transformers", mask_ratio=0.0).eval()
        found = encoder(image, noise=everything).last_hidden_state
        torch.testing.assert_close(found, model.encoder.forward_features(image))
        wrapped = AutoModel.from_pretrained(tmp_path).eval()
        torch.testing.assert_close(wrapped(image).last_hidden_state, model.encoder.forward_features(image))


@pytest.mark.parametrize("channels", [1, 5])
def test_files_for_other_channels_are_taken_as_they_are(channels: int, tmp_path: Path) -> None:
    """By a network for as many: no usual normalisation is known for their pixels, and the message says so."""
    shape = (channels, 16, 16)
    theirs, image = fresh(shape=shape, seed=1), torch.randn(2, *shape)
    (tmp_path / "preprocessor_config.json").write_text('{"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}')
    order = torch.arange(16).expand(2, -1)
    for state in (published(theirs), theirs.encoder.state_dict()):
        torch.save(state, tmp_path / "mae.pth")
        ours = fresh(shape=shape)
        message = start_from(ours, tmp_path / "mae.pth", ENCODER)
        assert f"normalised by mean [{', '.join(['0.5'] * channels)}] and std" in message
        with torch.no_grad():
            assert torch.equal(ours.encode(image, order), theirs.encode(image, order))


def test_transformers_export_is_skipped_where_impossible(tmp_path: Path) -> None:
    for config, shape in (
        (MAEConfig(ENCODER, 4, 32, 1, 2, 16, 1, 2, "cross"), (3, 16, 16)),
        (CONFIG, (3, 8, 16)),
        (MAEConfig("vit_small_patch14_reg4_dinov2", 4, 32, 1, 2, 16, 1, 2), (3, 16, 16)),
        (MAEConfig("deit3_small_patch16_224", 4, 32, 1, 2, 16, 1, 2), (3, 16, 16)),
        (MAEConfig("vit_base_patch16_clip_224", 4, 32, 1, 2, 16, 1, 2), (3, 16, 16)),
    ):
        assert not to_transformers(fresh(config, shape), MAE(), tmp_path / "no") and not (tmp_path / "no").exists()


def published(model: MaskedAutoencoder) -> dict[str, torch.Tensor]:
    """Named as published masked autoencoders are."""
    state = {**model.state_dict(), "decoder_pos_embed": model.position}
    for ours, theirs in (
        (r"^(embed|norm)\.", r"decoder_\1."),
        (r"^decoder\.", "decoder_blocks."),
        (r"^out\.", "decoder_pred."),
        (r"^encoder\.", ""),
    ):
        state = {re.sub(ours, theirs, key): value.clone() for key, value in state.items()}
    return state


def as_imagenet(image: torch.Tensor) -> torch.Tensor:
    """Of pixels in [-1, 1]."""
    mean, std = (torch.tensor(given).view(3, 1, 1) for given in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
    return ((image + 1) / 2 - mean) / std


@pytest.mark.parametrize("kind", ["published", "published encoder", "timm", "transformers", "own"])
def test_a_run_starts_from_pretrained_weights(kind: str, tmp_path: Path) -> None:
    """With the same outputs for an image, normalized as in their training."""
    theirs, ours, image = fresh(seed=1), fresh(), torch.randn(2, 3, 16, 16)
    shown, encoder, path = image, ENCODER, tmp_path / "model.safetensors"
    normalised = ""
    if kind == "published":
        shown, path = as_imagenet(image), tmp_path / "mae.pth"
        torch.save({"model": published(theirs), "epoch": 1600}, path)
        normalised = "mean [0.485, 0.456, 0.406] and std [0.229, 0.224, 0.225]"
    elif kind == "published encoder":
        shown, encoder, path = as_imagenet(image), "vit_base_patch16_224.mae", tmp_path / "mae.pth"
        torch.save({"model": {f"module.{key}": value for key, value in theirs.encoder.state_dict().items()}}, path)
    elif kind == "timm":
        to_timm(theirs, ENCODER, CONFIG.timm_arguments((3, 16, 16)), tmp_path)
        path = tmp_path / "with_zero_head.safetensors"
    elif kind == "transformers":
        to_transformers(theirs, MAE(), tmp_path)
    else:
        (tmp_path / "state.json").write_text("{}")
        save_file(theirs.state_dict(), path)
    message = start_from(ours, path, encoder)
    whole = kind in ("published", "transformers", "own")
    assert ("the encoder and the decoder" in message) == whole and normalised in message
    order = torch.randperm(16).expand(2, -1)
    with torch.no_grad():
        expected = theirs.encode(shown, order[:, :5])
        torch.testing.assert_close(ours.encode(image, order[:, :5]), expected, atol=1e-4, rtol=1e-4)
        predicted = theirs(shown, order[:, :5], order[:, 5:])
        assert torch.allclose(ours(image, order[:, :5], order[:, 5:]), predicted, atol=1e-4) == whole


def test_pretrained_weights_of_another_size_are_resampled(tmp_path: Path) -> None:
    """Another patch size, image size and fewer channels; the blocks are copied."""
    theirs = fresh()
    torch.save(published(theirs), tmp_path / "mae.pth")
    ours = fresh(MAEConfig(ENCODER, 8, 32, 2, 2, 16, 1, 2), (1, 32, 64), seed=3)
    assert "but not the decoder, which does not fit (" in start_from(ours, tmp_path / "mae.pth", ENCODER)
    assert torch.equal(ours.encoder.blocks[1].attn.qkv.weight, theirs.encoder.blocks[1].attn.qkv.weight)
    assert not torch.equal(ours.encoder.pos_embed, fresh(seed=3).encoder.pos_embed[:, :1].expand(-1, 33, -1))


class Evil:
    def __reduce__(self):
        return (Path.touch, (Path("evil"),))


def test_unusable_pretrained_weights_raise(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    save_file(fresh(MAEConfig(ENCODER, 4, 64, 2, 2, 16, 1, 2)).encoder.state_dict(), "wide.safetensors")
    save_file(fresh(MAEConfig(ENCODER, 4, 32, 3, 2, 16, 1, 2)).encoder.state_dict(), "deep.safetensors")
    torch.save({"model": Evil()}, "evil.pth")
    torch.save([1, 2], "list.pth")
    Path("broken.safetensors").write_bytes(b"x" * 99)
    for file, sentence in (
        ("nowhere.pth", "there is no such file"),
        ("wide.safetensors", "cls_token (1x1x64 in the file, 1x1x32 here)"),
        ("deep.safetensors", "blocks.2.attn.proj.bias (32 in the file, missing here)"),
        ("evil.pth", "can't be read as tensors"),
        ("list.pth", "holds no named tensors"),
        ("broken.safetensors", "can't be read as tensors"),
    ):
        model = fresh()
        before = {key: value.clone() for key, value in model.state_dict().items()}
        with pytest.raises(UserError, match=re.escape(sentence)) as refusal:
            start_from(model, Path(file), ENCODER)
        assert "\n" not in str(refusal.value) and str(refusal.value).startswith(f"--model.init {file}")
        assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert not Path("evil").exists() and load_file("wide.safetensors")
