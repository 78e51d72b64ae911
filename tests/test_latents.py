"""Latents: encoded once, read as any other data set, decoded wherever a person looks."""

import json
import shutil
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import tyro
from conftest import PRUNED, draw_images
from diffusers import AutoencoderKL, AutoencoderTiny
from fidelity import by_hand
from PIL import Image
from programs import common, refused, same, train

from pretrain.adapters._sampling import generate
from pretrain.checkpoint.load_run import load_run
from pretrain.config.schema import Data, Evaluate
from pretrain.core.errors import UserError
from pretrain.core.rng import SampleRNG
from pretrain.data import encode_latents, latents
from pretrain.data.autoencoder import Autoencoder, open_autoencoder
from pretrain.data.grid import pixels
from pretrain.data.images import Images, collate, on_device
from pretrain.data.loader import make_loader
from pretrain.data.sources import Source, open_data
from pretrain.evaluation import evaluate, evaluators
from pretrain.evaluation.context import EvalContext


def kl(**more: Any) -> AutoencoderKL:
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    given = {"in_channels": 1, "out_channels": 1, "latent_channels": 4, "scaling_factor": 0.4} | more
    return AutoencoderKL(**blocks, block_out_channels=(4, 8), norm_num_groups=2, **given)


def tiny() -> AutoencoderTiny:
    torch.manual_seed(0)
    blocks = {"encoder_block_out_channels": (4, 4), "decoder_block_out_channels": (4, 4)}
    numbers = {"num_encoder_blocks": (1, 1), "num_decoder_blocks": (1, 1)}
    return AutoencoderTiny(1, 1, **blocks, **numbers, scaling_factor=2.0, shift_factor=0.25)


@pytest.fixture(scope="module")
def vaes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Autoencoders with a distribution of latents; with a shift, too; with one for each channel; and without one."""
    folder = tmp_path_factory.mktemp("vaes")
    kl().save_pretrained(folder / "kl")
    kl(shift_factor=0.3).save_pretrained(folder / "shifted")
    kl(latents_mean=[0.1, 0.2, 0.3, 0.4], latents_std=[1.0, 2.0, 3.0, 4.0]).save_pretrained(folder / "by channel")
    tiny().save_pretrained(folder / "pipeline" / "vae")
    return folder


def encode(vae: Path, data: Path, output: Path, **settings: Any) -> Path:
    encode_latents.main(vae, output, Data(source=str(data), **settings), batch_size=16)
    return output


def opened(folder: Path, seed: int = 0, **settings: Any) -> Source:
    return open_data(Data(source=str(folder), **settings), seed)


@pytest.fixture(scope="module")
def cached(vaes: Path, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both views of all pictures, by the shifted autoencoder, in shards of 16."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encode_latents, "SHARD", 16)
        return encode(vaes / "shifted", pictures, tmp_path_factory.mktemp("cached") / "latents", flip=True)


@pytest.fixture(scope="module")
def plain(vaes: Path, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One view of them, by the one without a shift."""
    return encode(vaes / "kl", pictures, tmp_path_factory.mktemp("plain") / "latents")


def images(source: Images) -> torch.Tensor:
    return torch.cat([on_device(batch, torch.device("cpu")).image for batch in source.batches(range(len(source)), 16)])


def scaled(network: Any, raw: torch.Tensor) -> torch.Tensor:
    """As diffusers' pipelines do it."""
    config = network.config
    if config.get("latents_mean"):
        mean, std = (torch.tensor(config[name]).view(1, 4, 1, 1) for name in ("latents_mean", "latents_std"))
        return (raw - mean) * config.scaling_factor / std
    return (raw - (config.shift_factor or 0.0)) * config.scaling_factor


def test_a_cache_is_the_same_data_set(cached: Path, pictures: Path) -> None:
    was, now = opened(pictures), opened(cached)
    assert now.shape == (4, 6, 6) and now.classes == was.classes == 2
    for split in ("train", "test"):
        theirs, ours = getattr(was, split), getattr(now, split)
        assert [theirs.name_of(n) for n in range(len(theirs))] == [ours.name_of(n) for n in range(len(ours))]
        assert [theirs[0, n].label for n in range(len(theirs))] == [ours[0, n].label for n in range(len(ours))]
    few = opened(cached, limit=9, held_out=2)
    assert (len(few.train), len(few.test)) == (9, 2)
    names = [few.train.name_of(n) for n in range(9)]
    assert names == sorted({*names}) and {*names} < {was.train.name_of(n) for n in range(43)}


@pytest.mark.parametrize("name", ["kl", "shifted", "by channel", "pipeline"])
def test_visits_draw_from_what_the_autoencoder_says(name: str, vaes: Path, pictures: Path, tmp_path: Path) -> None:
    """Mean and deviation over many epochs are those of its posterior, scaled; decoding them undoes the scaling."""
    small = encode(vaes / name, pictures, tmp_path / "latents", limit=3)
    source, image = opened(small), images(opened(pictures, limit=3).train)
    assert source.autoencoder is not None
    network = source.autoencoder.network
    with torch.no_grad():
        coded = network.encode(image)
        posterior = getattr(coded, "latent_dist", None)
        raw = coded.latents if posterior is None else posterior.mean
        decoded = network.decode(raw).sample.clamp(-1, 1)
    drawn = torch.stack([torch.stack([source.train[epoch, n].image for n in range(3)]) for epoch in range(400)])
    size = scaled(network, raw).abs().max().item()
    if posterior is None:
        torch.testing.assert_close(drawn, scaled(network, raw).expand_as(drawn), atol=1e-3 * size, rtol=0)
    else:
        std = scaled(network, posterior.std + raw) - scaled(network, raw)
        assert ((drawn.mean(0) - scaled(network, raw)).abs() < 6 * std / 400**0.5 + 1e-3 * size).all()
        assert ((drawn.std(0) / std - 1).abs() < 6 / 800**0.5).all()
    torch.testing.assert_close(source.autoencoder.decode(scaled(network, raw)), decoded, atol=1e-5, rtol=1e-5)
    fixed = torch.stack([source.train[None, n].image for n in range(3)])
    assert torch.equal(fixed, torch.stack([opened(small, seed=5).train[None, n].image for n in range(3)]))


def test_a_draw_is_a_function_of_seed_epoch_and_index(cached: Path) -> None:
    first, again, other = (opened(cached, seed, flip=True).train for seed in (3, 3, 4))
    for epoch, index in ((0, 5), (1, 5), (0, 6), (7, ~5)):
        assert torch.equal(first[epoch, index].image, again[epoch, index].image)
        assert not torch.equal(first[epoch, index].image, other[epoch, index].image)
    assert not torch.equal(first[0, 5].image, first[1, 5].image)
    assert not torch.equal(first[0, 5].image, first[0, 6].image)
    order: Any = [(0, n) for n in torch.randperm(len(first)).tolist()]
    ((batch, _),) = make_loader(first, order, len(first))
    for number, index in enumerate(batch.index.tolist()):
        assert torch.equal(batch.image[number], again[0, index].image)


def test_half_of_the_visits_see_the_mirrored_image(cached: Path, pictures: Path) -> None:
    train, image = opened(cached, flip=True).train, images(opened(pictures).train)
    network = open_autoencoder(cached).network
    with torch.no_grad():
        two = [scaled(network, network.encode(view).latent_dist.mean) for view in (image, image.flip(-1))]
    drawn = torch.stack([collate([train[epoch, n] for n in range(len(train))])[0].image for epoch in range(40)])
    off = torch.stack([(drawn - mean).square().mean(dim=(2, 3, 4)) for mean in two])
    share = (off[1] < off[0]).float().mean().item()
    assert 0.4 < share < 0.6
    assert not any(torch.equal(a, b) for a, b in zip(*two, strict=True))
    straight = opened(cached).train
    assert torch.equal(straight[None, 3].image, train[None, 3].image), "held-out images are not mirrored"


def test_a_stopped_run_is_no_cache_and_goes_on_where_it_was(
    vaes: Path, cached: Path, pictures: Path, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr(encode_latents, "SHARD", 16)
    write, written = encode_latents._write, []

    def stops(rows, path: Path) -> None:
        if len(written) == 2:
            path.with_suffix(".part").mkdir()
            raise KeyboardInterrupt
        written.append(path)
        write(rows, path)

    folder = tmp_path / "latents"
    monkeypatch.setattr(encode_latents, "_write", stops)
    with pytest.raises(KeyboardInterrupt):
        encode(vaes / "shifted", pictures, folder, flip=True)
    with pytest.raises(UserError, match="not finished"):
        opened(folder)
    with pytest.raises(UserError, match="unfinished cache with another autoencoder"):
        encode(vaes / "kl", pictures, folder, flip=True)
    with pytest.raises(UserError, match="unfinished cache with another image, shape, images"):
        encode(vaes / "shifted", pictures, folder, flip=True, size=8, limit=20)
    monkeypatch.setattr(encode_latents, "_write", lambda rows, path: (written.append(path), write(rows, path)))
    encode(vaes / "shifted", pictures, folder, flip=True)
    assert len({*written}) == len(written) == 4  # 43 = 16 + 16 + 11, and 4 held out
    one, other = (opened(which, flip=True).train for which in (folder, cached))
    assert all(torch.equal(one[2, n].image, other[2, n].image) for n in range(43))
    with pytest.raises(UserError, match="not an empty folder"):
        encode(vaes / "shifted", pictures, folder, flip=True)


def test_a_disk_that_is_full_is_one_sentence(vaes: Path, pictures: Path, tmp_path: Path, monkeypatch) -> None:
    def full(rows, path: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(encode_latents, "_write", full)
    with pytest.raises(UserError, match=r"--output-dir .*: can't be written to: .*No space left"):
        encode(vaes / "kl", pictures, tmp_path / "latents")


def test_what_a_cache_says_of_itself(cached: Path, pictures: Path) -> None:
    manifest = json.loads((cached / latents.MANIFEST).read_text())
    assert manifest["source"] == str(pictures) and manifest["image"] == [1, 12, 12] and manifest["dtype"] == "float16"
    assert manifest["autoencoder"]["class"] == "AutoencoderKL" and len(manifest["autoencoder"]["sha256"]) == 64
    assert manifest["autoencoder"]["config"]["shift_factor"] == 0.3
    drawn = torch.stack([opened(cached).train[0, n].image for n in range(16)])
    assert manifest["std"] == pytest.approx(drawn.std().item(), rel=0.1)


def test_an_image_that_cant_be_read(vaes: Path, pictures: Path, tmp_path: Path) -> None:
    shutil.copytree(pictures, tmp_path / "data")
    victim = sorted((tmp_path / "data").rglob("*.png"))[20]
    victim.write_bytes(b"")
    with pytest.raises(UserError, match="can't be used"):
        encode(vaes / "kl", tmp_path / "data", tmp_path / "latents")
    shutil.rmtree(tmp_path / "latents")
    encode(vaes / "kl", tmp_path / "data", tmp_path / "latents", on_bad_image="skip")
    found = opened(tmp_path / "latents")
    names = {split.name_of(n) for split in (found.train, found.test) for n in range(len(split))}
    assert len(names) == 46 and str(victim) not in names


def test_what_does_not_fit_is_refused(vaes: Path, pictures: Path, plain: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for vae, data, settings, said in (
        ("kl", pictures, {"channels": 3}, "encodes images of 1 channels, these have 3; say --data.channels 1"),
        ("kl", pictures, {"size": 9}, "whose sides 2 divides, got 9x9"),
        ("kl", pictures, {"crop": 0.5}, "a random crop can't be encoded once"),
        ("kl", plain, {}, "these are latents already"),
        ("nowhere", pictures, {}, "there is no autoencoder there"),
    ):
        with pytest.raises(UserError, match=said):
            encode(vaes / vae, data, tmp_path / "latents", **settings)
        assert not (tmp_path / "latents").exists()
    for settings, said in (
        ({"flip": True}, "--data.flip: .* encode the images with --data.flip"),
        ({"crop": 0.5}, "--data.crop"),
        ({"size": 8}, "--data.size"),
        ({"channels": 3}, "--data.channels"),
    ):
        with pytest.raises(UserError, match=said):
            opened(plain, **settings)
    assert "these are latents" in refused("train_mae.py", *common(plain, tmp_path / "run"))


def test_a_folder_that_is_no_autoencoder(vaes: Path, tmp_path: Path) -> None:
    shutil.copytree(vaes / "kl", tmp_path / "vae")
    (tmp_path / "vae" / "diffusion_pytorch_model.safetensors").write_bytes(b"cut off")
    with pytest.raises(UserError, match="can't be read"):
        open_autoencoder(tmp_path / "vae")
    (tmp_path / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(UserError, match=r"has no diffusion_pytorch_model\.safetensors there"):
        open_autoencoder(tmp_path / "vae")
    (tmp_path / "vae" / "config.json").write_text('{"_class_name": "UNet2DModel"}')
    with pytest.raises(UserError, match="must be an AutoencoderKL or AutoencoderTiny, got UNet2DModel"):
        open_autoencoder(tmp_path / "vae")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"scaling_factor": 0}, "scaling_factor, .* must be numbers"),
        ({"scaling_factor": None}, "scaling_factor, .* must be numbers"),
        ({"latents_mean": [0.0] * 3, "latents_std": [1.0] * 3}, "one for each latent channel"),
        ({"block_out_channels": [8, 8]}, r"can't be read: .*expected shape torch.Size\(\[8\]\)"),
        ({"norm_num_groups": 3}, "can't be read: "),
    ],
)
def test_a_config_that_says_what_can_not_be(change: dict[str, Any], said: str, vaes: Path, tmp_path: Path) -> None:
    shutil.copytree(vaes / "kl", tmp_path / "vae")
    file = tmp_path / "vae" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(UserError, match=said) as refusal:
        open_autoencoder(tmp_path / "vae")
    assert "\n" not in str(refusal.value)


def test_an_autoencoder_whose_channels_do_not_fit() -> None:
    for channels, said in (((2, 2), r"2 channels, these have 1; give another"), ((1, 3), "makes images of 3 channels")):
        network = kl(in_channels=channels[0], out_channels=channels[1])
        with pytest.raises(UserError, match=said):
            Autoencoder(network).latent_shape((1, 12, 12))


@pytest.mark.parametrize(
    "change",
    [{"shape": [4, 6]}, {"shape": "abc"}, {"moments": [1]}, {"moments": None}, {"classes": "two"}, {"splits": {}}],
    ids=str,
)
def test_a_manifest_that_says_what_can_not_be(change: dict[str, Any], plain: Path, tmp_path: Path) -> None:
    """The fields that a reader goes by."""
    shutil.copytree(plain, tmp_path / "latents")
    file = tmp_path / "latents" / latents.MANIFEST
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(
        UserError, match=r"its latents\.json can't be read .*; copy it again, or encode the images again"
    ):
        opened(tmp_path / "latents")


def test_a_cache_that_is_cut_off_or_has_another_autoencoder(plain: Path, vaes: Path, tmp_path: Path) -> None:
    def broken(name: str) -> Path:
        return Path(shutil.copytree(plain, tmp_path / name))

    (shard,) = (broken("short") / "train").rglob("*.arrow")
    shard.write_bytes(shard.read_bytes()[:-1000])
    with pytest.raises(UserError, match="is cut off"):
        opened(tmp_path / "short")
    shutil.rmtree(broken("less") / "test")
    with pytest.raises(UserError, match="is cut off"):
        opened(tmp_path / "less")
    shutil.rmtree(broken("without") / "vae")
    with pytest.raises(UserError, match="the autoencoder that made its latents is gone"):
        opened(tmp_path / "without")
    (broken("manifest") / latents.MANIFEST).write_text("{")
    with pytest.raises(UserError, match="can't be read"):
        opened(tmp_path / "manifest")
    other = kl()
    with torch.no_grad():
        other.decoder.conv_out.bias += 1e-3
    other.save_pretrained(broken("other") / "vae")
    with pytest.raises(UserError, match="made by another autoencoder"):
        opened(tmp_path / "other")


@pytest.mark.parametrize(
    ("which", "words", "stock"),
    [
        ("plain", "--adapter ddpm", "LDMPipeline"),
        ("plain", "--adapter edm", "LDMPipeline"),
        ("cached", "--adapter flow --class-conditional --data.flip --pruning.policy infobatch", None),
    ],
)
def test_a_run_of_latents_decodes_and_exports(which: str, words: str, stock, request, tmp_path: Path) -> None:
    """Pictures are of images; the pipeline gives what `generate` gives; a model outlives its data set."""
    data, run = Path(shutil.copytree(request.getfixturevalue(which), tmp_path / "latents")), tmp_path / "run"
    train("train_diffusion.py", *common(data, run, 1), *words.split())
    assert json.loads((run / "model" / "model_index.json").read_text())["_class_name"] == (
        stock or ["pipeline", "LabelPipeline"]
    )
    conditional = "--class-conditional" in words
    pipe: Any = diffusers.DiffusionPipeline.from_pretrained(run / "model", trust_remote_code=not stock)
    pipe.set_progress_bar_config(disable=True)
    more: Any = {"label": [0, 1, 1], "guidance": 2.0} if conditional else {"batch_size": 3}
    generator = torch.Generator().manual_seed(7)
    pictures = pipe(**more, num_inference_steps=4, generator=generator, output_type="np").images
    found = torch.from_numpy(pictures).permute(0, 3, 1, 2)
    assert found.shape == (3, 1, 12, 12)
    shutil.rmtree(data)
    trained = load_run(run)
    noise = torch.randn(3, 4, 6, 6, generator=torch.Generator().manual_seed(7))
    label = torch.tensor([0, 1, 1] if conditional else [-1, -1, -1])
    given: Any = {"steps": 4, "guidance": 2.0 if conditional else 1.0, "autoencoder": trained.autoencoder}
    made = generate(trained.model, trained.adapter, noise, label, **given)
    assert made.std() > 0
    torch.testing.assert_close(found, (made + 1) / 2, atol=1e-5, rtol=0)


def test_a_resumed_run_draws_the_same_latents(cached: Path, tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    every = ["--checkpoint.every", 1, "--checkpoint.keep", 1000]
    train("train_diffusion.py", *common(cached, one, 2), *every, "--data.flip", "--infobatch")
    shutil.copytree(one, other)
    step = sorted((other / "checkpoints").glob("step-*"))[2]
    train("train_diffusion.py", "--resume", step, "--output-dir", other)
    assert same(one, other)


def test_a_run_does_not_go_on_with_another_autoencoders_latents(
    plain: Path, cached: Path, pictures: Path, tmp_path: Path
) -> None:
    train("train_diffusion.py", *common(plain, tmp_path / "run", 1))
    sentence = refused("train_diffusion.py", "--resume", "--output-dir", tmp_path / "run", "--data", cached)
    assert f"--data {cached} has latents of another autoencoder now" in sentence
    sentence = refused("train_diffusion.py", "--resume", "--output-dir", tmp_path / "run", "--data", pictures)
    assert f"--data {pictures} has no latents now" in sentence
    shutil.rmtree(tmp_path / "run" / "model")
    trained = load_run(tmp_path / "run")
    assert trained.autoencoder is not None
    (tmp_path / "run" / "config.yaml").write_text(
        (tmp_path / "run" / "config.yaml").read_text().replace(str(plain), str(cached))
    )
    with pytest.raises(UserError, match="restore it there"):
        _ = load_run(tmp_path / "run").autoencoder


def test_the_command(vaes: Path, plain: Path, pictures: Path, tmp_path: Path, capsys) -> None:
    words = [vaes / "kl", "--data", pictures, "-o", tmp_path / "latents", "--data.limit", 5]
    tyro.cli(encode_latents.main, args=[*map(str, words)])
    assert "5 and 4 held-out latents 4x6x6" in capsys.readouterr().out
    assert torch.equal(opened(tmp_path / "latents").test[0, 2].image, opened(plain).test[0, 2].image)


@pytest.fixture(scope="module")
def run(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pruned run of latents."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    train("train_diffusion.py", *common(plain, folder, 3), *PRUNED)
    return folder


def evaluated(run: Path, *words: object) -> dict[str, Any]:
    evaluate.main([str(run), *map(str, words)])
    return json.loads((run / "evaluation.json").read_text())[-1]


def test_made_images_are_compared_with_decoded_ones_or_with_others(
    run: Path, pictures: Path, plain: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    """The record says with which."""
    monkeypatch.setattr("pretrain.evaluation.fid.cached_assets_path", lambda *names: tmp_path)
    trained = load_run(run)
    vae: Any = trained.autoencoder
    noise, label = SampleRNG(0, index=torch.arange(30)).normal(4, 6, 6), torch.full((30,), -1)
    made = generate(trained.model, trained.adapter, noise, label, steps=2, autoencoder=vae)
    for words, real, said in (
        ([], vae.decode(images(opened(plain).train)), "43 latents decoded by their autoencoder of latents"),
        (["--reference", pictures], images(opened(pictures).train), f"43 images of {pictures.name}"),
    ):
        both = [pixels(image).movedim(-1, 1) for image in (made, real)]
        record = evaluated(run, "--metrics", "fid,kid,precision-recall,heldout", "--num-images", 30, *words)
        found = record["found"]
        expected = by_hand(*both, 30)
        assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-3)
        by = "30 images, by 2 steps of DDIMScheduler with guidance 1"
        assert record["notes"] == [f"{by}, compared with {said} by the features of small"]
        assert found["heldout_loss"] == json.loads((run / "summary.json").read_text())["quality"]["heldout_loss"]


def test_what_made_images_can_not_be_compared_with(run: Path, plain: Path, pictures: Path, tmp_path: Path) -> None:
    long = draw_images(tmp_path / "long", 8)
    for path in long.rglob("*.png"):
        Image.open(path).crop((0, 0, 12, 6)).save(path)
    source = opened(plain)
    source.train.shape = source.test.shape = (4, 6, 3)
    subject = EvalContext(
        load_run(run).adapter, source._replace(shape=(4, 6, 3)), 0, False, Evaluate(reference=str(long))
    )
    with pytest.raises(
        UserError, match=r"--reference .*: its images are 1x6x12, those that the model makes 1x12x6; name"
    ):
        evaluators(["fid"], subject)
    for against, said in ((plain, "it holds latents; name images"), (tmp_path / "none", "there is no such file")):
        with pytest.raises(UserError, match=f"^--reference {against}: {said}"):
            evaluated(run, "--metrics", "fid", "--reference", against)


def test_data_that_are_no_longer_the_runs(run: Path, plain: Path, cached: Path, pictures: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    for other, said in ((cached, "latents of another autoencoder"), (pictures, "images of another shape")):
        (tmp_path / "run" / "config.yaml").write_text((run / "config.yaml").read_text().replace(str(plain), str(other)))
        with pytest.raises(UserError, match=f"the run's data, {other}, are {said} now; restore"):
            evaluated(tmp_path / "run")


def test_the_card_names_the_autoencoder_and_the_sheet_shows_images(run: Path, plain: Path) -> None:
    told = json.loads((plain / latents.MANIFEST).read_text())["autoencoder"]
    card = (run / "model" / "README.md").read_text()
    assert "the `AutoencoderKL` that encoded the images is in this folder and decodes them. SHA-256 of its" in card
    assert f"`{told['sha256']}`" in card
    assert (run / "pictures" / "visits.png").is_file()


@pytest.mark.slow
def test_processes_share_the_images(vaes: Path, plain: Path, pictures: Path, tmp_path: Path, program) -> None:
    program("pretrain/data/encode_latents.py", vaes / "kl", "--data", pictures, "-o", tmp_path / "latents", processes=2)
    one, two = opened(plain).train, opened(tmp_path / "latents").train
    assert all(torch.equal(one[3, n].image, two[3, n].image) for n in range(43))
