"""A denoiser is initialised from files of diffusers, of runs and from state dicts, or refused in one sentence."""

import itertools
import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from damaged_weights import damage
from diffusers import DDPMPipeline, DDPMScheduler, DiTTransformer2DModel, UNet2DModel
from pretrain.models.dit import DiTConfig
from pretrain.models.nm import NMConfig
from pretrain.models.unet import UNetConfig
from safetensors.torch import save_file
from torch import nn

from pretrain.adapters.ddpm import DDPM
from pretrain.adapters.edm import EDM
from pretrain.adapters.flow import Flow
from pretrain.core.errors import UserError
from pretrain.export.denoiser_weights import start_from
from pretrain.export.to_diffusers import to_diffusers

UNET = UNetConfig(channels=(8, 16), layers=1, attention=1, head_dim=4)
DIT = DiTConfig(patch=2, width=16, depth=2, heads=2)
ROPE = DiTConfig(patch=2, width=16, depth=2, heads=2, position="rope", qk_norm=True)
CONFIGS = {"unet": UNET, "dit": DIT, "rope": ROPE}
OF_THE_IMAGES = {"unet": ("conv_in", "conv_out", "class_embedding"), "dit": ("embed", "out", "label")}
OF_THE_IMAGES["rope"] = OF_THE_IMAGES["dit"]


def fresh(config: Any, shape=(1, 8, 8), classes: int = 0, seed: int = 0) -> nn.Module:
    """With random values in all parameters, also in those that are initially 0."""
    torch.manual_seed(seed)
    model = config.build(shape, classes).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model


def values(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same_outputs(one: nn.Module, other: nn.Module, shape=(1, 8, 8), classes: int = 0) -> bool:
    x, time = torch.randn(3, *shape), torch.tensor([0.0, 400.5, 999.0])
    label = torch.tensor([0, classes - 1, -1]) if classes else torch.full((3,), -1)
    with torch.no_grad():
        return torch.equal(one(x, time, label), other(x, time, label))


@pytest.mark.parametrize("saved", ["model", "shards", "bin", "pipeline", "file"])
@pytest.mark.parametrize("classes", [0, 4])
def test_a_unet_that_diffusers_saved_gives_the_outputs_of_diffusers(saved: str, classes: int, tmp_path: Path) -> None:
    """With images of any size: the UNet here is for other ones than the UNet there."""
    blocks: Any = {
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    }
    torch.manual_seed(1)
    theirs = UNet2DModel(
        sample_size=32,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8, 16),
        layers_per_block=1,
        attention_head_dim=4,
        norm_num_groups=4,
        num_class_embeds=classes + 1 if classes else None,
        dropout=0.1,
        **blocks,
    ).eval()
    path, said = tmp_path, ""
    if saved == "pipeline":
        DDPMPipeline(theirs, DDPMScheduler(prediction_type="v_prediction")).save_pretrained(tmp_path)
        said = "; it predicted v_prediction of a diffusion, and this run trains the velocity of a flow"
    else:
        theirs.save_pretrained(
            tmp_path,
            safe_serialization=saved != "bin",
            max_shard_size="20KB" if saved == "shards" else "1GB",
        )
        assert any(tmp_path.glob("*.index.json")) == (saved == "shards")
        path = tmp_path / "diffusion_pytorch_model.safetensors" if saved == "file" else tmp_path
    ours = fresh(UNET, (1, 8, 12), classes)
    assert start_from(ours, Flow(), path) == f"--model.init {path}: initialised the network{said}"
    x, time = torch.randn(3, 1, 8, 12), torch.tensor([0, 500, 999])
    label = torch.tensor([0, 2, -1])
    with torch.no_grad():
        expected = theirs(x, time, class_labels=label.where(label >= 0, torch.tensor(classes)) if classes else None)
        assert torch.equal(ours(x, time, label), expected.sample)


def test_the_network_of_train_unconditional_starts_here(tmp_path: Path) -> None:
    """Its blocks, with fewer channels: attention at the second lowest resolution alone."""
    down, up = ["DownBlock2D"] * 6, ["UpBlock2D"] * 6
    down[4], up[1] = "AttnDownBlock2D", "AttnUpBlock2D"
    channels, blocks = (8, 8, 16, 16, 16, 16), {"down_block_types": (*down,), "up_block_types": (*up,)}
    torch.manual_seed(1)
    theirs: Any = UNet2DModel(block_out_channels=channels, norm_num_groups=4, **blocks).eval()
    theirs.save_pretrained(tmp_path)
    ours = fresh(UNetConfig(channels, attention_from=1), (3, 32, 32))
    start_from(ours, DDPM(), tmp_path)
    x, time = torch.randn(2, 3, 32, 32), torch.tensor([3, 500])
    with torch.no_grad():
        assert torch.equal(ours(x, time, torch.tensor([-1, -1])), theirs(x, time).sample)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(
    "adapter", [Flow(), Flow(prediction="sample"), EDM(uncertainty=True)], ids=["flow", "x", "edm"]
)
@pytest.mark.parametrize("classes", [0, 3])
def test_an_exported_model_gives_its_outputs(name: str, adapter: Any, classes: int, tmp_path: Path) -> None:
    theirs, ours = (adapter.prepare(fresh(CONFIGS[name], classes=classes, seed=seed)) for seed in (1, 0))
    to_diffusers(theirs, adapter, tmp_path)
    message = start_from(ours, adapter, tmp_path)
    assert message == f"--model.init {tmp_path}: initialised the network" and same_outputs(
        ours, theirs, classes=classes
    )
    before = start_from(fresh(CONFIGS[name], classes=classes), DDPM(), tmp_path).partition("; it predicted ")[2]
    expected = "EDM's preconditioned image" if isinstance(adapter, EDM) else f"the {adapter.prediction} of a flow"
    assert before == f"{expected.replace('sample', 'image')}, and this run trains epsilon of a diffusion"


def test_state_dicts_under_every_prefix_and_wrapper(tmp_path: Path) -> None:
    """DDP, torch.compile, FSDP, trainers; of a file with an EMA this is taken, and an optimizer is ignored."""
    rng = random.Random(0)
    for name, config in CONFIGS.items():
        theirs = fresh(config, seed=1)
        state = values(theirs)
        bare = {each.removeprefix("network."): value for each, value in state.items()}
        for prefix in (
            "",
            "module.",
            "_orig_mod.",
            "model.",
            "unet.",
            "ema_model.module.",
            "state_dict.model._orig_mod.",
        ):
            middle = rng.choice(["", "module.", "_fsdp_wrapped_module."])
            saved = {f"{prefix}{middle}{each}": value for each, value in rng.choice([state, bare]).items()}
            torch.save(saved | {"step": torch.tensor(3)}, tmp_path / "a.pt")
            ours = fresh(config)
            message = start_from(ours, Flow(), tmp_path / "a.pt")
            assert same_outputs(ours, theirs) and message.endswith("initialised the network, ignored step"), (
                name,
                message,
            )
        half = {each: value.half() for each, value in bare.items()}
        both = {
            "model": {each: value * 0 for each, value in bare.items()},
            "ema": half,
            "optimizer": {"a": torch.ones(1)},
        }
        torch.save(both, tmp_path / "a.pt")
        ours = fresh(config)
        message = start_from(ours, Flow(), tmp_path / "a.pt")
        assert "from 'ema.', one of 2 in it" in message and "optimizer" in message and "model (" in message
        assert all(torch.equal(values(ours)[each], value.half().float()) for each, value in state.items())


@pytest.mark.parametrize("name", CONFIGS)
def test_other_channels_and_classes_keep_their_initialisation(name: str, tmp_path: Path) -> None:
    """All other parameters are those of the file, and the message lists what is new, with both shapes."""
    for number, (there, here) in enumerate(
        [((3, 0), (1, 0)), ((1, 5), (1, 3)), ((1, 0), (1, 3)), ((1, 3), (1, 0)), ((4, 7), (2, 4)), ((2, 3), (2, 3))]
    ):
        theirs = fresh(CONFIGS[name], (there[0], 8, 8), there[1], seed=1)
        to_diffusers(theirs, Flow(), tmp_path / str(number))
        ours = fresh(CONFIGS[name], (here[0], 12, 8), here[1])
        before, old = values(ours), values(theirs)
        message = start_from(ours, Flow(), tmp_path / str(number))
        first, last, label = (f"{'network.' * (name == 'unet')}{layer}." for layer in OF_THE_IMAGES[name])
        for each, value in values(ours).items():
            new = each.startswith((first, last)) and there[0] != here[0]
            new |= each.startswith(label) and there[1] != here[1]
            assert torch.equal(value, (before if new else old)[each]), (each, message)
        listed = [layer for layer in OF_THE_IMAGES[name] if f"{layer} (" in message.partition("but not")[2]]
        wanted = [layer for layer in OF_THE_IMAGES[name][:2] if there[0] != here[0]]
        wanted += [OF_THE_IMAGES[name][2]] * (there[1] != here[1] and (here[1] > 0 or name != "unet"))
        assert listed == wanted and ("which start from scratch" in message) == bool(wanted)
        assert ("ignored class_embedding" in message) == (name == "unet" and there[1] > 0 and not here[1])


@pytest.mark.parametrize("position", ["sincos", "rope"])
def test_a_dit_starts_at_another_size(position: Any, tmp_path: Path) -> None:
    """The positions are those that it would have at that size; all parameters are taken."""
    config = DiTConfig(patch=2, width=16, depth=2, heads=2, position=position)
    theirs, ours, plain = fresh(config, seed=1), fresh(config, (1, 12, 16)), fresh(config, (1, 12, 16), seed=2)
    to_diffusers(theirs, Flow(), tmp_path)
    assert start_from(ours, Flow(), tmp_path).endswith("initialised the network")
    plain.load_state_dict(theirs.state_dict())
    assert same_outputs(ours, plain, (1, 12, 16))


def saved(config: Any, folder: Path, what: str) -> Path:
    """A network as an export, which has its settings, or as a bare file, which has not."""
    model: Any = fresh(config, seed=1)
    path = folder / "".join(filter(str.isalnum, repr(config)))
    if what == "export":
        if not path.exists():
            to_diffusers(model, Flow(), path)
        return path
    save_file(values(getattr(model, "network", model)), path)
    return path


def obeyed(config: Any, message: str) -> Any:
    """The config with the flags that a message names."""
    flags = message.partition("; give --model.")[2].split(" --model.")
    changed: dict[str, Any] = {}
    for flag, *words in map(str.split, flags):
        name = flag.removeprefix("no-").replace("-", "_")
        kind = type(getattr(config, name))
        numbers = [int(word) if word.isdigit() else word for word in words]
        changed[name] = not flag.startswith("no-") if kind is bool else tuple(numbers) if kind is tuple else numbers[0]
    return replace(config, **changed)


@pytest.mark.parametrize("what", ["export", "file"])
def test_another_network_is_refused_with_the_flags_that_make_it_fit(what: str, tmp_path: Path) -> None:
    """Nothing changes before, and with these flags the network gives the outputs of the one in the file."""
    unets = [UNET, UNetConfig((8, 16), 2, 2, 4), UNetConfig((8, 32, 16), 1, 1, 4), UNetConfig((16, 24), 3, 0, 4)]
    unets += [UNetConfig((8, 8, 16), 1, 1, 4, attention_from=1)]
    dits = [DIT, ROPE, DiTConfig(patch=2, width=32, depth=3, heads=2), DiTConfig(width=16, depth=1, heads=2)]
    if what == "export":  # which tells what shapes don't
        unets += [UNetConfig((8, 16), 1, 1, 8)]
        dits += [DiTConfig(patch=4, width=16, depth=2, heads=4)]
    else:
        dits.remove(ROPE)
    for configs in unets, dits:
        for here, there in random.Random(0).sample([*itertools.permutations(configs, 2)], 6):
            path, ours = saved(there, tmp_path, what), fresh(here)
            before = values(ours)
            with pytest.raises(UserError) as error:
                start_from(ours, Flow(), path)
            assert all(torch.equal(before[name], value) for name, value in values(ours).items())
            ours = fresh(obeyed(here, str(error.value)))
            assert start_from(ours, Flow(), path).endswith(": initialised the network")
            assert same_outputs(ours, fresh(there, seed=1))


def test_a_network_without_routing_starts_from_one_with_it(tmp_path: Path) -> None:
    config = replace(DIT, depth=5)
    path, ours = saved(replace(config, route=0.5), tmp_path, "export"), fresh(config)
    assert start_from(ours, Flow(), path).endswith(": initialised the network")
    assert same_outputs(ours, fresh(config, seed=1))


def test_what_no_setting_changes_is_refused(tmp_path: Path) -> None:
    """Networks with the same shapes that compute something else, and networks of other classes."""
    theirs = fresh(UNET, seed=1)
    to_diffusers(theirs, Flow(), tmp_path)
    card = tmp_path / "unet" / "config.json"
    given = json.loads(card.read_text())
    for name, value in (
        ("flip_sin_to_cos", False),
        ("freq_shift", 1),
        ("norm_eps", 1e-6),
        ("norm_num_groups", 2),
        ("attention_head_dim", None),
        ("act_fn", "gelu"),
        ("down_block_types", ["AttnDownBlock2D", "DownBlock2D"]),
        ("downsample_padding", {"a": [1] * 99}),
    ):
        card.write_text(json.dumps(given | {name: value}))
        with pytest.raises(
            UserError, match=rf"its network has .*{name} .* \(here .*no setting changes .*{name}"
        ) as error:
            start_from(fresh(UNET), Flow(), tmp_path)
        assert "\n" not in str(error.value) and len(str(error.value)) < 600
    for kind in ("UNet2DConditionModel", "DiT"):
        card.write_text(json.dumps(given | {"_class_name": kind}))
        with pytest.raises(
            UserError, match=f"it is a {kind} and the network here a UNet2DModel; give weights of a UNet2D"
        ):
            start_from(fresh(UNET), Flow(), tmp_path)


def test_the_dit_of_diffusers_is_another_network(tmp_path: Path) -> None:
    """It has an embedding of the time in every block, and other frequencies in it; so it is refused by its class."""
    theirs = DiTTransformer2DModel(2, 8, in_channels=1, num_layers=2, sample_size=32, num_embeds_ada_norm=3)
    theirs.save_pretrained(tmp_path / "transformer")
    with pytest.raises(
        UserError, match="it is a DiTTransformer2DModel and the network here a DiT; give weights of a DiT"
    ):
        start_from(fresh(DIT), Flow(), tmp_path)
    first, second = (theirs.get_submodule(f"transformer_blocks.{n}.norm1.emb") for n in range(2))
    assert first is not second
    ours: Any = fresh(DIT)
    time = torch.tensor([900.0])
    features = first.get_submodule("time_proj")(time)
    assert (features - ours.time_features(time)).abs().max() > 0.1


def test_a_network_is_taken_into_and_out_of_modules_around_it(tmp_path: Path) -> None:
    """A head of the objective, N:M masks: with their own parameters where both have them."""
    kinds = {
        "headed": ("network.", lambda seed: EDM(uncertainty=True).prepare(fresh(DIT, seed=seed))),
        "plain": ("", lambda seed: fresh(DIT, seed=seed)),
        "masked": ("base.", lambda seed: fresh(NMConfig("dit", dit=DIT), seed=seed)),
    }
    rest = {"headed": "log_error (2 tensors)", "plain": "", "masked": "scale ("}
    for there, here in itertools.product(kinds, kinds):
        (prefix, make), (own_prefix, make_own) = kinds[there], kinds[here]
        theirs, ours = make(1), make_own(0)
        for name, parameter in theirs.named_parameters():
            nn.init.normal_(parameter, mean=float("log_error" in name))
        torch.save(theirs.state_dict(), tmp_path / "a.pt")
        expected = values(theirs) if there == here else values(ours)
        inside = {name: value for name, value in theirs.state_dict().items() if name.startswith(prefix)}
        inside = {f"{own_prefix}{name.removeprefix(prefix)}": value for name, value in inside.items()}
        expected |= {name: value for name, value in inside.items() if name in expected}
        message = start_from(ours, Flow(), tmp_path / "a.pt")
        assert all(torch.equal(value, expected[name]) for name, value in values(ours).items()), (there, here)
        assert ("ignored" in message) == (there != here and bool(rest[there])) and (
            there == here or rest[there] in message
        )


class Evil:
    def __reduce__(self):
        return (Path.touch, (Path("evil"),))


def test_files_that_can_not_be_used(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    good = values(fresh(DIT))
    torch.save(Evil(), "evil.pt")
    torch.save([1, 2], "list.pt")
    Path("pointer.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    Path("empty").mkdir()
    Path("half").mkdir()
    (Path("half") / "config.json").write_text("{")
    save_file(good, "half/diffusion_pytorch_model.safetensors")
    Path("index").mkdir()
    (Path("index") / "diffusion_pytorch_model.bin.index.json").write_text('{"weight_map": {"a": "b.bin"}}')
    save_file({"conv1.weight": torch.ones(2), "conv1.bias": torch.ones(2), "fc": torch.ones(1)}, "cnn.safetensors")
    save_file(good | {"out.bias": good["out.bias"] * torch.nan}, "nan.safetensors")
    save_file(good | {"out.bias": good["out.bias"].long()}, "int.safetensors")
    save_file({name: value for name, value in good.items() if name != "time.linear_1.bias"}, "lacks.safetensors")
    for file, sentence in (
        ("nowhere", "there is no such file"),
        ("empty", "there is no diffusion_pytorch_model.safetensors in this folder"),
        ("half", "config.json: can't be read"),
        ("index", "there is no b.bin beside the index that names it"),
        ("evil.pt", "it holds Python objects or code, which are not loaded"),
        ("list.pt", "it holds no named tensors"),
        ("pointer.safetensors", "can't be read as tensors (it is a Git LFS pointer)"),
        (
            "cnn.safetensors",
            "it holds no such network, of which embed.weight is a part; it holds conv1 (2 tensors), fc",
        ),
        ("nan.safetensors", "its out.bias has values that are not finite"),
        ("int.safetensors", "its out.bias has torch.int64 values"),
        ("lacks.safetensors", "it does not fit: time.linear_1.bias (missing in the file, 16 here)"),
    ):
        model = fresh(DIT, seed=1)
        before = values(model)
        with pytest.raises(UserError) as refusal:
            start_from(model, Flow(), Path(file))
        message = str(refusal.value)
        assert sentence.replace("it holds Python", "holds Python") in message, message
        assert message.startswith(f"--model.init {file}: ") and message.isprintable()
        assert all(torch.equal(before[name], value) for name, value in values(model).items())
    assert not Path("evil").exists()


def test_a_damaged_file_is_read_or_refused_in_one_sentence(tmp_path: Path) -> None:
    """Parameters that are missing, of another shape or of another name; what is refused changes nothing."""
    rng, read = random.Random(0), 0
    for _ in range(50):
        config = rng.choice([*CONFIGS.values()])
        state, ours = values(fresh(config, seed=1, classes=2)), fresh(config, classes=2)
        before = values(ours)
        for _ in range(rng.randrange(1, 3)):
            name = rng.choice([*state])
            damage(state, name, rng)
        save_file(state, tmp_path / "a.safetensors")
        try:
            start_from(ours, Flow(), tmp_path / "a.safetensors")
            read += 1
        except UserError as error:
            assert str(error).isprintable()
            assert all(torch.equal(before[name], value) for name, value in values(ours).items())
    assert 3 < read < 47
