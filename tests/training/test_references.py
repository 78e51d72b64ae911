"""Where posterior-mean targets are used, and why they are not."""

import dataclasses
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import ROOT

from pretrain.config.build import build_model
from pretrain.config.cli import parse
from pretrain.data.sources import open_data
from pretrain.training import references
from pretrain.training.flops import profile_sample
from pretrain.training.references import with_references

CPU = torch.device("cpu")


@pytest.mark.parametrize("flip", [False, True])
def test_references_are_all_training_images_or_the_run_says_why_not(
    flip: bool, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["--data", str(pictures), "--data.flip" if flip else "--data.no-flip"]
    recipe = ROOT / "configs" / "fashion_mnist_flow.yaml"
    config = parse(words, adapter="flow", model="unet", recipe=recipe, output_dir="x", help="")
    adapter, source, messages = config.component("adapter"), open_data(config.data, 0), []
    cost = 4 * 12 * 12 * 43 * (1 + flip)  # FLOPs of a sample

    def objective(flops: int):
        messages.clear()
        return with_references(config, adapter, source, CPU, flops, messages.append)

    found, flops = objective(10 * cost + 1)
    model = build_model(config, source.shape, 0)
    profiled = [profile_sample(each, model, source.shape, 0).flops for each in (found, adapter)]
    assert flops == 11 * cost + 1 and profiled[0] - profiled[1] == cost
    assert isinstance(found, partial) and "from level" in messages[0]
    assert len(found.keywords["references"].image) == 43 * (1 + flip)
    assert objective(9 * cost) == (adapter, 9 * cost) and "they would cost 11% of the network's FLOPs" in messages[0]
    monkeypatch.setattr(references, "MAX_BYTES", cost - 1)
    assert objective(10**12)[0] is adapter and "GiB as float32" in messages[0]
    monkeypatch.setattr(source.train, "data", dataclasses.replace(config.data, crop=0.5))
    assert objective(10**12)[0] is adapter and "cropped at random" in messages[0]
    plain = dataclasses.replace(adapter, posterior_mean=False)
    assert with_references(config, plain, source, CPU, 0, messages.append) == (plain, 0) and len(messages) == 1


def test_images_without_a_label_beside_labelled_ones_have_no_posterior_means(pictures: Path) -> None:
    """To the network they look like images whose label was dropped, which the references of a label don't count."""
    recipe = ROOT / "configs" / "fashion_mnist_flow.yaml"
    words = ["--data", str(pictures), "--class-conditional"]
    config = parse(words, adapter="flow", model="unet", recipe=recipe, output_dir="x", help="")
    adapter, source, messages = config.component("adapter"), open_data(config.data, 0), []
    batches = source.train.batches

    def without(rows, size):
        for batch in batches(rows, size):
            yield batch._replace(label=batch.label.index_fill(0, torch.tensor([0]), -1))

    found = with_references(config, adapter, source, CPU, 10**12, messages.append)
    assert isinstance(found[0], partial)
    source.train.batches = without  # type: ignore[method-assign]
    assert with_references(config, adapter, source, CPU, 10**12, messages.append) == (adapter, 10**12)
    assert messages[1].endswith("set: 1 images have no label")


@pytest.mark.parametrize(
    ("adapter", "words", "advised"),
    [("flow", ["--infobatch"], True), ("flow", [], False), ("ddpm", ["--infobatch"], False)],
)
def test_a_run_without_references_says_where_choosing_levels_is_for_nothing(
    adapter: str, words: list[str], advised: bool, pictures: Path
) -> None:
    """Flow matching on plain targets; noise prediction gains by levels with any targets."""
    words = ["--data", str(pictures), "--adapter", adapter, "--adapter.posterior-mean", "--data.crop", "0.5", *words]
    recipe = ROOT / "configs" / "fashion_mnist_flow.yaml"
    config = parse(words, adapter="flow", model="unet", recipe=recipe, output_dir="x", help="")
    messages: list[str] = []
    with_references(config, config.component("adapter"), open_data(config.data, 0), CPU, 10**12, messages.append)
    assert ("give --pruning.policy full" in messages[0]) == advised
