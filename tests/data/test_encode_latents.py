"""`pretrain encode-latents`: interrupted, resumed, refused; what it writes."""

import json
import random
import shutil
from pathlib import Path

import pytest
import torch
import tyro
from autoencoders import encode, opened
from conftest import PRUNED
from PIL import Image
from programs import common, refused, train

from pretrain.core.errors import UserError
from pretrain.data import encode_latents, latents


def test_interrupted_encoding_continues(vaes: Path, cached: Path, pictures: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(encode_latents, "SHARD_SIZE", 16)
    write, written = encode_latents._write_shard, []

    def stops(rows, path: Path) -> None:
        if len(written) == 2:
            path.with_suffix(".part").mkdir()
            raise KeyboardInterrupt
        written.append(path)
        write(rows, path)

    folder = tmp_path / "latents"
    monkeypatch.setattr(encode_latents, "_write_shard", stops)
    with pytest.raises(KeyboardInterrupt):
        encode(vaes / "shifted", pictures, folder, flip=True)
    with pytest.raises(UserError, match="not finished"):
        opened(folder)
    with pytest.raises(UserError, match="unfinished latents with another autoencoder"):
        encode(vaes / "kl", pictures, folder, flip=True)
    with pytest.raises(UserError, match="unfinished latents with another image, shape, images"):
        encode(vaes / "shifted", pictures, folder, flip=True, size=8, limit=20)
    monkeypatch.setattr(encode_latents, "_write_shard", lambda rows, path: (written.append(path), write(rows, path)))
    encode(vaes / "shifted", pictures, folder, flip=True)
    assert len({*written}) == len(written) == 4  # 43 = 16 + 16 + 11, and 4 held out
    one, other = (opened(which, flip=True).train for which in (folder, cached))
    assert all(torch.equal(one[2, n].image, other[2, n].image) for n in range(43))
    with pytest.raises(UserError, match="it holds finished latents; name another folder"):
        encode(vaes / "shifted", pictures, folder, flip=True)


def begun(vae: Path, data: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, **settings) -> None:
    """Encode all but the last shard of 16 images."""
    write, shards = encode_latents._write_shard, []

    def stops(rows, path: Path) -> None:
        if len(shards) == 2:
            raise KeyboardInterrupt
        shards.append(path)
        write(rows, path)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(encode_latents, "_write_shard", stops)
        encode(vae, data, folder, **settings)


def test_other_images_than_before_are_refused(vaes: Path, pictures: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(encode_latents, "SHARD_SIZE", 16)
    rng, data = random.Random(0), tmp_path / "data"
    shutil.copytree(pictures, data)
    begun(vaes / "kl", data, tmp_path / "latents", monkeypatch)
    files = sorted(data.rglob("*.png"))
    for _ in range(6):
        one, other = rng.sample(files, 2)
        before, after = one.read_bytes(), other.read_bytes()
        change = rng.choice(["replaced", "swapped", "other pixels"])
        if change == "other pixels":
            with Image.open(one) as image:
                image.rotate(90).save(one)
        else:
            one.write_bytes(after)
            other.write_bytes(before if change == "swapped" else after)
        if one.read_bytes() == before:
            continue
        with pytest.raises(UserError, match=r"unfinished latents made of other images.* give the same images"):
            encode(vaes / "kl", data, tmp_path / "latents")
        one.write_bytes(before)
        other.write_bytes(after)
    with pytest.raises(UserError, match="unfinished latents with another settings"):
        encode(vaes / "kl", data, tmp_path / "latents", range=(0, 200))
    encode(vaes / "kl", data, tmp_path / "latents", on_bad_image="skip")
    assert len(opened(tmp_path / "latents").train) == 43


def test_a_damaged_shard_of_finished_latents_is_made_again(
    vaes: Path, cached: Path, pictures: Path, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr(encode_latents, "SHARD_SIZE", 16)
    rng, folder = random.Random(0), tmp_path / "latents"
    shutil.copytree(cached, folder)
    whole = [opened(cached, flip=True).train[2, n].image for n in range(43)]
    for damage in ("emptied", "arrow emptied", "arrow cut", "last byte gone", "state", "gone"):
        shards = sorted((folder / "train").iterdir())
        shard = rng.choice(shards)
        (arrow,) = shard.glob("*.arrow")
        if damage == "gone":
            shutil.rmtree(shard)
        elif damage == "emptied":
            for file in shard.iterdir():
                file.unlink()
        elif damage == "state":
            (shard / "state.json").write_text("{")
        else:
            content = arrow.read_bytes()
            end = {"arrow emptied": 0, "last byte gone": len(content) - 1}.get(damage, rng.randrange(len(content)))
            arrow.write_bytes(content[:end])
        others = {path: path.stat().st_ino for path in shards if path != shard}
        with pytest.raises(UserError, match="encode the images again"):
            opened(folder)
        encode(vaes / "shifted", pictures, folder, flip=True)
        assert {path: path.stat().st_ino for path in others} == others  # they were not written again
        found = opened(folder, flip=True).train
        assert all(torch.equal(found[2, n].image, image) for n, image in enumerate(whole))
    with pytest.raises(UserError, match="finished latents; name another folder"):
        encode(vaes / "shifted", pictures, folder, flip=True)


def test_links_in_unfinished_latents_are_refused(vaes: Path, pictures: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(encode_latents, "SHARD_SIZE", 16)
    begun(vaes / "kl", pictures, tmp_path / "begun", monkeypatch)
    places = ["train", "test", "vae", "unfinished.json", "unfinished.json.part", "vae/config.json", "train/00000"]
    for place in [*places, "train/00002", "train/00002.part", "train/00000/state.json"]:
        folder, outside = tmp_path / "latents", tmp_path / "outside"
        shutil.copytree(tmp_path / "begun", folder)
        link = folder / place
        if link.exists():
            link.rename(outside)
        else:
            outside.mkdir()
        link.symlink_to(outside)
        before = {path: path.read_bytes() if path.is_file() else None for path in [outside, *outside.rglob("*")]}
        with pytest.raises(UserError, match=f"{link} is a link"):
            encode(vaes / "kl", pictures, folder)
        after = {path: path.read_bytes() if path.is_file() else None for path in [outside, *outside.rglob("*")]}
        assert after == before
        shutil.rmtree(folder)
        outside.unlink() if outside.is_file() else shutil.rmtree(outside)


def test_a_full_disk_is_one_sentence(vaes: Path, pictures: Path, tmp_path: Path, monkeypatch) -> None:
    def full(rows, path: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(encode_latents, "_write_shard", full)
    with pytest.raises(UserError, match=r"--output-dir .*: can't be written to: .*No space left"):
        encode(vaes / "kl", pictures, tmp_path / "latents")


def test_the_manifest_of_a_cache(cached: Path, pictures: Path) -> None:
    manifest = json.loads((cached / latents.MANIFEST).read_text())
    assert manifest["source"] == str(pictures) and manifest["image"] == [1, 12, 12] and manifest["dtype"] == "float16"
    assert manifest["autoencoder"]["class"] == "AutoencoderKL" and len(manifest["autoencoder"]["sha256"]) == 64
    assert manifest["autoencoder"]["config"]["shift_factor"] == 0.3
    drawn = torch.stack([opened(cached).train[0, n].image for n in range(16)])
    assert manifest["std"] == pytest.approx(drawn.std().item(), rel=0.1)


def test_encoding_skips_an_unreadable_image(vaes: Path, pictures: Path, tmp_path: Path) -> None:
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


def test_impossible_sizes_raise(vaes: Path, pictures: Path, plain: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for vae, data, settings, message in (
        ("kl", pictures, {"channels": 3}, "encodes images of 1 channels, these have 3; set --data.channels 1"),
        ("kl", pictures, {"size": 9}, "whose sides 2 divides, got 9x9"),
        ("kl", pictures, {"crop": 0.5}, "a random crop can't be encoded once"),
        ("kl", plain, {}, "these are latents already"),
        ("nowhere", pictures, {}, "there is no autoencoder there"),
    ):
        with pytest.raises(UserError, match=message):
            encode(vaes / vae, data, tmp_path / "latents", **settings)
        assert not (tmp_path / "latents").exists()
    for settings, message in (
        ({"flip": True}, "--data.flip: .* encode the images with --data.flip"),
        ({"crop": 0.5}, "--data.crop"),
        ({"size": 8}, "--data.size"),
        ({"channels": 3}, "--data.channels"),
    ):
        with pytest.raises(UserError, match=message):
            opened(plain, **settings)
    assert "it has latents, for train_diffusion.py; name images" in refused(
        "train_mae.py", *common(plain, tmp_path / "run")
    )


def test_the_encode_latents_command(vaes: Path, plain: Path, pictures: Path, tmp_path: Path, capsys) -> None:
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


@pytest.mark.slow
def test_processes_share_the_images(vaes: Path, plain: Path, pictures: Path, tmp_path: Path, program) -> None:
    program("encode-latents", vaes / "kl", "--data", pictures, "-o", tmp_path / "latents", processes=2)
    one, two = opened(plain).train, opened(tmp_path / "latents").train
    assert all(torch.equal(one[3, n].image, two[3, n].image) for n in range(43))
