"""A masked autoencoder is initialised from files of other libraries, whatever prefixes and extra tensors they have."""

import itertools
import json
import random
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from damaged_weights import damage
from export.test_mae_weights import CONFIG, ENCODER, as_imagenet, fresh, published
from pretrain.models.mae import MAEConfig, MaskedAutoencoder
from safetensors.torch import load_file, save_file

from pretrain.adapters.mae import MAE
from pretrain.core.errors import UserError
from pretrain.export.mae_weights import start_from, to_transformers

DINOV2 = "vit_small_patch14_reg4_dinov2.lvd142m"
PREFIXES = ("", "backbone.", "module.", "_orig_mod.", "encoder.", "teacher.", "teacher.backbone.", "student.")
SAVED_BY_5 = (("decoder.decoder_layers.", "decoder.decoder_encoder.layer."),)
IN_MEMORY_OF_5 = (
    ("vit.encoder.layer.", "vit.layers."),
    (".attention.attention.query.", ".attention.q_proj."),
    (".attention.attention.key.", ".attention.k_proj."),
    (".attention.attention.value.", ".attention.v_proj."),
    (".attention.output.dense.", ".attention.o_proj."),
    (".intermediate.dense.", ".mlp.fc1."),
    (".output.dense.", ".mlp.fc2."),
)


def transformers_state(model: MaskedAutoencoder, folder: Path, *renames: tuple[str, str]) -> dict[str, torch.Tensor]:
    to_transformers(model, MAE(), folder)
    state = load_file(folder / "model.safetensors")
    for old, new in renames:
        state = {name.replace(old, new): value for name, value in state.items()}
    return state


def without_decoder(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.removeprefix("vit."): value for name, value in state.items() if not name.startswith("decoder.")}


def encoder_state(model: MaskedAutoencoder) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.encoder.state_dict().items()}


def states(model: MaskedAutoencoder, folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    """A state dict for each library that names its parameters in its own way."""
    return {
        "timm": encoder_state(model),
        "published": published(model),
        "transformers 4": transformers_state(model, folder),
        "transformers 5": transformers_state(model, folder, *SAVED_BY_5),
        "transformers 5 in memory": transformers_state(model, folder, *IN_MEMORY_OF_5),
        "ViTMAEModel": without_decoder(transformers_state(model, folder)),
        "ViTMAEModel 5 in memory": without_decoder(transformers_state(model, folder, *IN_MEMORY_OF_5)),
    }


def same_features(ours: MaskedAutoencoder, theirs: MaskedAutoencoder, shown: Any, image: torch.Tensor) -> bool:
    with torch.no_grad():
        return torch.allclose(ours.encoder(image), theirs.encoder(shown), atol=1e-4, rtol=1e-4)


def test_names_of_every_library_under_every_prefix(tmp_path: Path) -> None:
    """Prefixes, also of two wrappers, heads and other tensors change nothing but what is logged as ignored."""
    theirs, image, rng = fresh(seed=1), torch.randn(2, 3, 16, 16), random.Random(0)
    (tmp_path / "config.json").write_text('{"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}')
    cases = itertools.product(states(theirs, tmp_path / "t").items(), PREFIXES)
    for (library, state), prefix in itertools.islice(cases, 0, None, 3):  # every prefix with two libraries or three
        outer = rng.choice(("", "module.", "_orig_mod.", "state_dict.", "model."))
        saved = {f"{outer}{prefix}{name}": value for name, value in state.items()}
        saved |= {f"{outer}classifier.weight": torch.ones(3)}
        if "teacher" in prefix:
            saved |= {f"student.{name}": torch.zeros_like(value) for name, value in state.items()}
        save_file(saved, tmp_path / "init.safetensors")
        ours = fresh()
        message = start_from(ours, tmp_path / "init.safetensors", ENCODER)
        case = f"{library} {outer}{prefix}: {message}"
        assert same_features(ours, theirs, image, image), case
        has_decoder = library == "published" or library.startswith("transformers")
        assert ("the encoder and the decoder" in message) == has_decoder, case
        assert "classifier" in message and ("student (" in message) == ("teacher" in prefix), case
        for name, value in ours.state_dict().items():
            assert not has_decoder or torch.equal(value, theirs.state_dict()[name]) or "patch_embed" in name, case


def test_a_nested_dictionary_is_one_of_tensors(tmp_path: Path) -> None:
    """As torch.save writes it in the middle of a training, with an optimizer and a step."""
    theirs, image = fresh(seed=1), torch.randn(2, 3, 16, 16)
    state, adam = encoder_state(theirs), {"state": {0: {"exp_avg": torch.ones(2)}}, "lr": 0.1}
    teacher = {f"backbone.{name}": value for name, value in state.items()}
    student = {f"module.backbone.{name}": value * 2 for name, value in state.items()}
    torch.save({"student": student, "teacher": teacher, "optimizer": adam, "epoch": 3}, tmp_path / "init.pth")
    ours = fresh()
    message = start_from(ours, tmp_path / "init.pth", ENCODER)
    assert same_features(ours, theirs, image, image)
    assert "ignored student (" in message and "optimizer" in message


def test_what_transformers_saves_is_read(tmp_path: Path) -> None:
    """Its own models, and our export after a training there; of the latter the normalisation survives."""
    from transformers import ViTMAEConfig, ViTMAEForPreTraining, ViTMAEModel

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128}
    decoder = {f"decoder_{name}": value for name, value in sizes.items()} | {"decoder_hidden_size": 16}
    decoder |= {"decoder_num_hidden_layers": 1, "decoder_intermediate_size": 64}
    config: Any = ViTMAEConfig(image_size=16, patch_size=4, layer_norm_eps=1e-6, mask_ratio=0.0, **sizes, **decoder)
    export = tmp_path / "export"
    to_transformers(fresh(seed=2), MAE(), export)
    torch.manual_seed(0)
    whole: Any = ViTMAEForPreTraining(config)
    whole.decoder.decoder_pos_embed.data = fresh().position  # which some versions leave at 0
    for kind, theirs in (
        ("ViTMAEForPreTraining", whole),
        ("ViTMAEModel", ViTMAEModel(config)),
        ("ours", ViTMAEForPreTraining.from_pretrained(export, mask_ratio=0.0)),
    ):
        with torch.no_grad():  # what a training there would change
            for name, parameter in theirs.named_parameters():
                parameter.add_(0.02 * torch.randn_like(parameter) * ("decoder_pos" not in name))
        theirs.save_pretrained(tmp_path / kind)
        ours, image = fresh(), torch.randn(2, 3, 16, 16)
        message = start_from(ours, tmp_path / kind / "model.safetensors", ENCODER)
        assert ("the encoder and the decoder" in message) == (kind != "ViTMAEModel"), message
        assert ("mean [0.5, 0.5, 0.5]" in message) == (kind == "ours"), message
        vit = getattr(theirs, "vit", theirs).eval()
        with torch.no_grad():
            shown = image if kind == "ours" else as_imagenet(image)
            expected = vit(shown, noise=torch.arange(16.0).expand(2, -1)).last_hidden_state
            torch.testing.assert_close(ours.encoder.forward_features(image), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("encoder", [DINOV2, DINOV2.replace("_reg4", "")])
def test_dinov2_with_and_without_register_tokens(encoder: str, tmp_path: Path) -> None:
    """By the names of the published files and by those of transformers, with the same features as there."""
    import transformers

    registers = "WithRegisters" * (encoder == DINOV2)
    config: Any = getattr(transformers, f"Dinov2{registers}Config")(
        image_size=16, patch_size=4, hidden_size=32, num_hidden_layers=2, num_attention_heads=2
    )
    torch.manual_seed(0)
    theirs = getattr(transformers, f"Dinov2{registers}Model")(config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    theirs.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    hub: dict[str, Any] = {}
    for name, value in saved.items():
        for old, new in (
            ("embeddings.patch_embeddings.projection", "patch_embed.proj"),
            ("embeddings.position_embeddings", "pos_embed"),
            ("embeddings.", ""),
            ("encoder.layer", "blocks"),
            (".attention.output.dense", ".attn.proj"),
            (".layer_scale", ".ls"),
            (".lambda1", ".gamma"),
            ("layernorm.", "norm."),
        ):
            name = name.replace(old, new)
        for part in ("query", "key", "value"):
            if f".attention.attention.{part}." in name:
                hub.setdefault(name.replace(f"attention.attention.{part}", "attn.qkv"), []).append((part, value))
                break
        else:
            hub[name] = value
    order = {"query": 0, "key": 1, "value": 2}
    for name, parts in hub.items():
        if isinstance(parts, list):
            hub[name] = torch.cat([value for _, value in sorted(parts, key=lambda item: order[item[0]])])
    assert {"mask_token", "blocks.1.ls2.gamma"} < hub.keys() and ("register_tokens" in hub) == bool(registers)
    torch.save(hub, tmp_path / "hub.pth")
    image = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        expected = theirs(as_imagenet(image)).last_hidden_state
    for file in ("model.safetensors", "hub.pth"):
        ours = fresh(MAEConfig(encoder, 4, 32, 2, 2, 16, 1, 2))
        message = start_from(ours, tmp_path / file, encoder)
        with torch.no_grad():
            found = ours.encoder.forward_features(image)
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
        assert "ignored mask_token" in message and "decoder" not in message
        (other,) = {DINOV2, DINOV2.replace("_reg4", "")} - {encoder}
        sizes = "1x4x32 in the file, missing here" if registers else "missing in the file, 1x4x32 here"
        with pytest.raises(UserError, match=rf"reg_token \({sizes}\)"):
            start_from(fresh(MAEConfig(other, 4, 32, 2, 2, 16, 1, 2)), tmp_path / file, other)


def test_an_encoder_that_does_not_fit_is_refused_with_what_does_not(tmp_path: Path) -> None:
    """Names and shapes of both sides, and the sizes of the file; the model is as it was."""
    rng = random.Random(0)
    for n in range(8):
        width, depth = rng.choice([(32, 1), (32, 3), (64, 2), (16, 2)])
        theirs = fresh(MAEConfig(ENCODER, 4, width, depth, 2, 16, 1, 2))
        names = rng.choice(list(states(theirs, tmp_path / f"{n}").values()))
        save_file(names, tmp_path / "init.safetensors")
        ours = fresh()
        before = {name: value.clone() for name, value in ours.state_dict().items()}
        with pytest.raises(UserError) as error:
            start_from(ours, tmp_path / "init.safetensors", ENCODER)
        message = str(error.value)
        assert f"to those of the file (patch 4x4, width {width}, depth {depth})" in message
        there = {name: "x".join(map(str, value.shape)) for name, value in theirs.encoder.state_dict().items()}
        here = {name: "x".join(map(str, value.shape)) for name, value in ours.encoder.state_dict().items()}
        different = {name for name in there | here if there.get(name) != here.get(name)}
        listed = re.findall(r"([\w.]+) \((\S+) in the file, (\S+) here\)", message)
        assert len(listed) == min(8, len(different)) and {name for name, _, _ in listed} <= different
        assert all(there.get(name, "missing") == one and here.get(name, "missing") == two for name, one, two in listed)
        assert (f"and {len(different) - 8} more" in message) == (len(different) > 8)
        assert all(torch.equal(before[name], value) for name, value in ours.state_dict().items())


def test_a_file_without_a_vision_transformer_names_what_it_holds(tmp_path: Path) -> None:
    save_file(
        {"conv1.weight": torch.ones(2), "conv1.bias": torch.ones(2), "fc": torch.ones(1)}, tmp_path / "a.safetensors"
    )
    with pytest.raises(UserError, match=r"holds no vision transformer, .* it holds conv1 \(2 tensors\), fc$"):
        start_from(fresh(CONFIG), tmp_path / "a.safetensors", ENCODER)


def test_a_damaged_file_is_read_or_refused_in_one_sentence(tmp_path: Path) -> None:
    """Parameters that are missing, of another shape or of another name; what is refused changes nothing."""
    rng, theirs, read = random.Random(0), fresh(seed=1), 0
    known = list(states(theirs, tmp_path / "t").values())
    ours = fresh()
    before = {name: value.clone() for name, value in ours.state_dict().items()}
    for _ in range(100):
        state = dict(rng.choice(known))
        for _ in range(rng.randrange(1, 3)):
            name = rng.choice([name for name in state if rng.random() < 0.1 or "patch" in name or "token" in name])
            damage(state, name, rng)
        save_file(state, tmp_path / "init.safetensors")
        ours.load_state_dict(before)
        try:
            start_from(ours, tmp_path / "init.safetensors", ENCODER)
            read += 1
            assert all(value.isfinite().all() for value in ours.state_dict().values())
        except UserError as error:
            assert "\n" not in str(error)
            assert all(torch.equal(before[name], value) for name, value in ours.state_dict().items())
    assert 5 < read < 95


@pytest.mark.parametrize(
    ("taken", "other"),
    [
        ("module.encoder_q.", "module.encoder_k."),
        ("module.base_encoder.", "module.momentum_encoder."),
        ("target_encoder.module.", "encoder.module."),
        ("state_dict_ema.", "state_dict."),
        ("model_ema.", "model."),
        ("target_encoder.net.", "online_encoder.net."),
        ("teacher.backbone.", "student.backbone."),
    ],
)
def test_of_two_encoders_the_one_used_elsewhere_is_taken_and_named(taken: str, other: str, tmp_path: Path) -> None:
    theirs, image = fresh(seed=1), torch.randn(2, 3, 16, 16)
    state = encoder_state(theirs)
    saved = {f"{other}{name}": value * 0 for name, value in state.items()}
    save_file(saved | {f"{taken}{name}": value for name, value in state.items()}, tmp_path / "init.safetensors")
    ours = fresh()
    message = start_from(ours, tmp_path / "init.safetensors", ENCODER)
    assert same_features(ours, theirs, image, image)
    assert f"from {taken.removeprefix('module.').replace('module.', '')!r}, one of 2 encoders in it" in message


def test_the_content_of_a_file_decides_and_not_its_name(tmp_path: Path) -> None:
    theirs, image = fresh(seed=1), torch.randn(2, 3, 16, 16)
    state = encoder_state(theirs)
    save_file(state, tmp_path / "a.pth")
    torch.save(state, tmp_path / "b.safetensors")
    torch.save(state, tmp_path / "c", _use_new_zipfile_serialization=False)
    for name in "a.pth", "b.safetensors", "c":
        ours = fresh()
        start_from(ours, tmp_path / name, ENCODER)
        assert same_features(ours, theirs, image, image), name


def test_files_of_a_split_model_and_folders_are_read(tmp_path: Path) -> None:
    """As transformers writes them; the pixel normalisation is that of the folder."""
    theirs, image, rng = fresh(seed=1), torch.randn(2, 3, 16, 16), random.Random(0)
    state = encoder_state(theirs)
    (tmp_path / "config.json").write_text('{"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}')
    names = [f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)]
    where = {name: rng.choice(names) for name in state}
    for file in names:
        save_file({name: value for name, value in state.items() if where[name] == file}, tmp_path / file)
        with pytest.raises(UserError, match=r"it is one of 3 files of a model; give their \.index\.json"):
            start_from(fresh(), tmp_path / file, ENCODER)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": where}))
    for path in (index, tmp_path):
        ours = fresh()
        start_from(ours, path, ENCODER)
        assert same_features(ours, theirs, image, image)
    for wrong in ("{}", json.dumps({"weight_map": {"a": "../a.safetensors"}}), json.dumps({"weight_map": {"a": 1}})):
        index.write_text(wrong)
        with pytest.raises(UserError, match="it names no files of weights beside it"):
            start_from(fresh(), index, ENCODER)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"there is no model\.safetensors in this folder"):
        start_from(fresh(), tmp_path / "empty", ENCODER)


def test_weights_that_can_not_train_are_refused(tmp_path: Path) -> None:
    """Not finite, whole numbers, other numbers of channels or heads; each with its cause, before anything changes."""
    state, one = encoder_state(fresh(seed=1)), "blocks.1.attn.qkv.weight"
    kernel = "patch_embed.proj.weight"
    cases: list[tuple[dict[str, torch.Tensor], str]] = [
        (state | {one: state[one] * value}, f"its {one} has values that are not finite")
        for value in (torch.nan, torch.inf)
    ]
    cases += [(state | {one: state[one].to(torch.int8)}, f"its {one} has torch.int8 values")]
    cases += [
        (state | {kernel: torch.ones(32, n, 4, 4)}, f"with {n} channels, these have 3; give --data.channels {n}")
        for n in (1, 2, 4)
    ]
    for tensors, message in cases:
        save_file(tensors, tmp_path / "init.safetensors")
        with pytest.raises(UserError, match=re.escape(message)):
            start_from(fresh(), tmp_path / "init.safetensors", ENCODER)
    save_file(state, tmp_path / "init.safetensors")
    of_a_run = {"config": {"model": {"heads": 4}}}
    for card in ({"num_attention_heads": 4}, {"model_args": {"num_heads": 4}}, of_a_run):
        file = tmp_path / ("state.json" if card is of_a_run else "config.json")
        file.write_text(json.dumps(card))
        with pytest.raises(UserError, match=rf"{file.name} has 4 attention heads, the model 2; give --model\.heads 4"):
            start_from(fresh(), tmp_path / "init.safetensors", ENCODER)
        file.unlink()


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        (b"", "it is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "it is a Git LFS pointer"),
        (b"<!doctype html>", "it is a web page"),
        (b"PK\x03\x04 cut", ""),
        (b"\x80\x04cbuiltins\nprint\n.", "it is of another format, or holds Python objects or code"),
    ],
)
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_a_file_that_is_none_names_its_cause(content: bytes, cause: str, suffix: str, tmp_path: Path) -> None:
    (tmp_path / f"init{suffix}").write_bytes(content)
    with pytest.raises(UserError, match=re.escape(f"it can't be read as tensors ({cause}")) as error:
        start_from(fresh(), tmp_path / f"init{suffix}", ENCODER)
    assert "trust" not in str(error.value) and str(error.value).isprintable()
