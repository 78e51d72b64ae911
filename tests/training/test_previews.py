"""Images that a run writes to its folder and its tracker."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import PRUNED, read_metrics
from PIL import Image
from programs import common, final, train
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pretrain.config.schema import Data
from pretrain.core.rng import generator
from pretrain.data.sources import open_data
from pretrain.training import plots


@pytest.mark.parametrize(("script", "image"), [("train_diffusion.py", 2 * 98), ("train_mae.py", 12 * 98)])
def test_a_tracker_gets_the_images_of_the_run(script: str, image: int, pictures: Path, tmp_path: Path) -> None:
    """Every pixel, for each evaluation."""
    folder = tmp_path / "run"
    train(script, *common(pictures, folder), *PRUNED, "--tracker", "tensorboard")
    shown = EventAccumulator(str(folder / "trackers" / "run"), size_guidance={"images": 0})
    shown.Reload()
    found = {name: shown.Images(name) for name in shown.Tags()["images"]}
    assert {name: len(events) for name, events in found.items()} == {"pictures": 2, "loss-by-level": 2, "times-used": 1}
    steps = [record["step"] for record in read_metrics(folder) if record["kind"] == "epoch"]
    assert [event.step for event in found["loss-by-level"]] == [steps[1], steps[3]]
    for name, event in (("epoch-0004", found["pictures"][-1]), ("times-used", found["times-used"][-1])):
        kept = np.asarray(Image.open(folder / "pictures" / f"{name}.png").convert("RGB"))
        logged = Image.open(io.BytesIO(event.encoded_image_string)).convert("RGB")
        assert np.array_equal(kept, np.asarray(logged))
    assert found["pictures"][0].width == image


def test_uses_of_samples_are_counted(finished: Path) -> None:
    """As many as were used; each sample at least once and at most once per epoch."""
    count = final(finished, "times_used")["times_used"]
    assert count.sum() == json.loads((finished / "summary.json").read_text())["samples_used"]
    assert count.min() >= 1 and count.max() == 4


def test_the_sheet_shows_the_samples_used_least_and_most(pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Among samples used equally often, by score."""
    source = open_data(Data(str(pictures), held_out=4), 0)
    rng, asked = generator(0), []
    whole = source.train.batches
    monkeypatch.setattr(source.train, "batches", lambda index, size: [asked.append(index), whole(index, size)][1])
    count = torch.randint(2, 5, (43,), generator=rng, dtype=torch.int32)
    score = torch.rand(43, generator=rng) * 3
    assert plots.sample_counts(count, score, source) is not None
    order = sorted(range(43), key=lambda n: (count[n].item(), score[n].item()))
    assert asked == [order[:12], order[:-13:-1]]
    assert plots.sample_counts(torch.full_like(count, 3), score, source) is None


@pytest.mark.parametrize("largest", [2.0, 200.0, -2.0])
def test_the_loss_by_level_is_drawn(largest: float) -> None:
    """For any range, and with levels without a loss; each evaluation changes the plot."""
    rows = [{"epoch": n, "validation_loss_by_level": [largest / (n + 1), 1.0, None, 0.1]} for n in range(3)]
    pictures = [plots.loss_by_level(rows[: n + 1]) for n in range(3)]
    assert all(picture.shape == (396, 660, 3) and picture.dtype == torch.uint8 for picture in pictures)
    assert plots.loss_by_level([]).shape == (396, 660, 3)  # of a run whose folder was removed
    assert not torch.equal(pictures[0], pictures[1]) and not torch.equal(pictures[1], pictures[2])


def test_a_run_has_its_colour_in_every_picture() -> None:
    """Also where a run before it has no points."""
    orange = torch.tensor([255, 127, 14], dtype=torch.uint8)  # C1 of matplotlib
    for first, last in (([], [(1.0, 2.0), (2.0, 1.0)]), ([(1.0, 3.0)], [(1.0, 2.0)])):
        picture = plots.lines([("first", first), ("second", last)], "epoch", "loss")
        assert picture is not None and (picture == orange).all(dim=-1).any()
