"""Fingerprints of data sets: every change is noticed and named."""

import os
import re
import shutil
from pathlib import Path

import pytest
from conftest import draw_images
from PIL import Image

from pretrain.config.schema import Data
from pretrain.data.fingerprint import describe_changes, fingerprints
from pretrain.data.images import Images
from pretrain.data.sources import Source, open_data


def source(folder: Path, **settings) -> Source:
    return open_data(Data(source=str(folder), **settings), seed=0)


def images(folder: Path, **settings) -> Images:
    return source(folder, **settings).train


# Changes to a data set, and what the message must contain.
CHANGES = {
    "touched": (lambda victim: os.utime(victim, (0, 0)), ""),
    "removed": (lambda victim: victim.unlink(), "36 images then, 35 now|gone or changed"),
    "added": (lambda victim: shutil.copy(victim, victim.with_name("zzz.png")), "new or changed, the first: "),
    "renamed": (
        lambda victim: victim.rename(victim.with_name("zzz.png")),
        "are new or changed, the first: ",
    ),
    "relabelled": (lambda victim: victim.rename(victim.parents[1] / "class 0" / victim.name), "new or changed"),
    "replaced": (lambda victim: Image.new("L", (12, 12), 9).save(victim), "are new or changed, the first: "),
    "one bit": (lambda victim: victim.write_bytes(victim.read_bytes()[:-1] + b"x"), "are new or changed"),
}


@pytest.mark.parametrize("held_out", [False, True])
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_noticed_and_named(change: str, held_out: bool, tmp_path: Path) -> None:
    folder = draw_images(tmp_path / "images", 40)
    before = source(folder)
    part = before.test if held_out else before.train
    victim = next(name for name in map(part.name_of, range(len(part))) if "class 1" in name)
    marks = fingerprints(before)
    act, expected = CHANGES[change]
    act(Path(victim))
    now = source(folder)
    sentence = describe_changes(marks, fingerprints(now), now)
    assert bool(sentence) == bool(expected)
    assert re.search(expected, sentence)


def test_a_moved_data_set_is_the_same_one(tmp_path: Path) -> None:
    folder = draw_images(tmp_path / "images", 24)
    marks = fingerprints(source(folder))
    moved = source(shutil.move(folder, tmp_path / "elsewhere"))
    assert describe_changes(marks, fingerprints(moved), moved) == ""
