"""Linear and attentive probes, fine-tuning and the online probe."""

import copy
import dataclasses
import json
import math
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import read_metrics
from pretrain.models.mae import MAEConfig
from programs import common, final, train
from timm.optim import create_optimizer_v2
from torchvision.transforms.v2.functional import to_pil_image

from pretrain.adapters import Batch
from pretrain.checkpoint.load_run import load_run
from pretrain.core.errors import UserError
from pretrain.core.rng import SampleRNG, generator
from pretrain.evaluation import evaluators, finetune, finetune_augment, heads, linear_probe, online_probe
from pretrain.evaluation.context import EvalContext
from pretrain.evaluation.evaluate import main


def evaluate(run: Path, *words: object) -> dict:
    """The metrics of the last record."""
    main([str(run), *map(str, words)])
    return json.loads((run / "evaluation.json").read_text())[-1]["found"]


def opened(run: Path, **settings: Any) -> EvalContext:
    """The context that evaluators get."""
    trained = load_run(run)
    chosen = dataclasses.replace(trained.config.evaluate, **settings)
    return EvalContext(trained.adapter, trained.source, trained.classes, hasattr(trained.model, "encoder"), chosen)


def refused(run: Path, *words: object) -> str:
    with pytest.raises(UserError) as refusal:
        main([str(run), *map(str, words)])
    assert "\n" not in str(refusal.value)
    return str(refusal.value)


def test_a_linear_probe_is_logistic_regression() -> None:
    """Overlapping classes, features of different scales; 3,000 samples for training and 2,000 for testing."""
    from sklearn.linear_model import LogisticRegression

    noise = torch.randn(5000, 24, generator=generator(0))
    label = torch.randint(5, (5000,), generator=generator(1))
    place = torch.randn(5, 24, generator=generator(2)) * 0.55
    feature = (noise + place[label]) * torch.logspace(-2, 2, 24) + 3
    known, asked = feature.split((3000, 2000))
    head = linear_probe.fit(known, label[:3000], 5, epochs=30, seed=0)
    ours = (head(asked).argmax(1) == label[3000:]).float().mean().item()
    mean, std = known.mean(0), known.std(0)
    theirs = LogisticRegression(max_iter=1000).fit(((known - mean) / std).numpy(), label[:3000].numpy())
    assert ours == pytest.approx(theirs.score(((asked - mean) / std).numpy(), label[3000:].numpy()), abs=0.01)
    assert 0.5 < ours < 0.95


def test_probes_and_fine_tuning_learn_and_leave_the_model_alone(mae: Path, monkeypatch) -> None:
    subject = opened(mae, probe_epochs=2, seeds=2)
    model = load_run(mae).model
    before = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(1)
    state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    names = ["linear-probe", "attentive-probe", "finetune"]
    found: dict[str, float] = {}
    for evaluator in evaluators(names, subject):
        found |= evaluator(model)
    assert {f"{name.replace('-', '_')}_accuracy" for name in names} < found.keys()
    assert all(0 <= value <= 1 for value in found.values()) and "finetune_accuracy_std" in found
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert torch.equal(state, torch.get_rng_state())
    assert (numpy_state == np.random.get_state()[1]).all()  # noqa: NPY002
    seen = subject.source._replace(test=subject.source.train)  # training accuracy shows that it learns
    monkeypatch.setattr(heads, "FINE_TUNING", (heads.FineTuning(99, 1e-2, 0.65, 0.1),))  # 200 steps of a small network
    again = dataclasses.replace(opened(mae, probe_epochs=20), source=seen)
    assert min(finetune.make(again, ["finetune", "attentive-probe"]).measure(model, 0).values()) > 0.7


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_base_patch16_plus_240", "vit_base_patch16_rpn_224"])
def test_the_fine_tuned_classifier_is_encoder_mean_norm_and_head(name: str) -> None:
    config = MAEConfig(name, patch=4, width=32, depth=3, heads=2)
    encoder: Any = config.build((1, 12, 16), 0).encoder
    before, image = copy.deepcopy(encoder), torch.randn(5, 1, 12, 16)
    network: Any = heads.as_classifier(encoder, 7).eval()
    tokens = before.norm_pre(before._pos_embed(before.patch_embed(image)))
    patches = before.blocks(tokens)[:, before.num_prefix_tokens :].mean(dim=1)
    last = before.norm if isinstance(before.fc_norm, torch.nn.Identity) else before.fc_norm
    torch.testing.assert_close(network(image), network.head(last(patches)))
    groups = create_optimizer_v2(network, "adamw", 1.0, weight_decay=0.05, layer_decay=0.65).param_groups
    scale = {id(parameter): group["lr_scale"] for group in groups for parameter in group["params"]}
    assert {*map(id, network.parameters())} == scale.keys()
    assert scale[id(network.patch_embed.proj.weight)] == pytest.approx(0.65**4)
    assert scale[id(network.blocks[2].mlp.fc1.weight)] == pytest.approx(0.65)
    assert scale[id(network.head.weight)] == 1
    paths = [module for module in network.modules() if isinstance(module, heads.DropPath)]
    assert len(paths) >= 3 and [paths[0].rate, paths[-1].rate] == [0, pytest.approx(0.1)]


def test_drop_path_is_per_sample_and_keeps_the_mean() -> None:
    path, branch, index = heads.DropPath(0.3), torch.ones(4000, 1, 2), torch.arange(4000)
    path.rng = SampleRNG(1, 2, index=index)
    dropped = path(branch)
    assert dropped.unique().tolist() == pytest.approx([0, 1 / 0.7])
    assert dropped.mean().item() == pytest.approx(1, abs=4 * (0.3 / 0.7 / 4000) ** 0.5)
    path.rng = SampleRNG(1, 2, index=index[1::2])  # of another process
    assert torch.equal(path(branch[1::2]), dropped[1::2])
    assert torch.equal(path.eval()(branch), branch)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_fine_tuning_augmentation_is_per_sample(channels: int) -> None:
    torch.manual_seed(3)
    image = torch.randint(256, (channels, 10, 14), dtype=torch.uint8) / 127.5 - 1
    before, change = image.clone(), finetune_augment.Augmentation(channels)
    index = torch.arange(15)
    states = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()  # noqa: NPY002
    made = torch.cat([change(image.expand(15, -1, -1, -1), index, 0, epoch) for epoch in range(4)])
    assert torch.equal(image, before) and all(each.shape == image.shape for each in made)
    assert all(each.dtype == torch.float32 and each.abs().max() < 6 for each in made)
    assert all(torch.equal(change(image[None], index[n % 15][None], 0, n // 15)[0], made[n]) for n in range(59, -1, -1))
    assert len({tuple(each.flatten().tolist()) for each in made}) > (30 if channels < 4 else 5)
    if change.rand_augment is not None:
        picture = to_pil_image(((image + 1) * 127.5).round().byte())
        with finetune_augment.seeded(0):
            for operation in change.rand_augment.ops:  # each at its maximum magnitude
                operation.prob, operation.magnitude, operation.magnitude_std = 1.0, 10, 0
                assert (found := operation(picture)).mode == picture.mode and found.size == picture.size
    assert random.getstate() == states[0] and torch.equal(torch.get_rng_state(), states[2])
    assert (np.random.get_state()[1] == states[1]).all()  # noqa: NPY002


def test_probes_need_labels(mae: Path) -> None:
    subject = opened(mae)
    bare = subject.source._replace(classes=0)
    with pytest.raises(
        UserError, match=r"--metrics finetune: it needs labels, and the images of .* have none; available"
    ):
        evaluators(["finetune"], dataclasses.replace(subject, source=bare))


def test_an_online_probe_changes_nothing_and_is_resumed(pictures: Path, mae: Path, tmp_path: Path) -> None:
    words = [*common(pictures, tmp_path / "run", 2), "--evaluate.metrics", "loss,knn,online-probe"]
    train("train_mae.py", *words, "--checkpoint.every", 1, "--checkpoint.keep", 99)
    for name, value in final(mae).items():
        assert torch.equal(value, final(tmp_path / "run")[name])  # the probe changes nothing
    whole, sums = read_metrics(tmp_path / "run"), final(tmp_path / "run", "online-probe")["sums"]
    assert sums.abs().sum() > 0 and 0 <= whole[-1]["online_probe_accuracy"] <= 1
    for step in sorted((tmp_path / "run" / "checkpoints").iterdir())[3:]:
        shutil.rmtree(step)
    train("train_mae.py", "--resume", "--output-dir", tmp_path / "run")
    assert read_metrics(tmp_path / "run") == whole
    assert torch.equal(final(tmp_path / "run", "online-probe")["sums"], sums)
    assert [*evaluate(tmp_path / "run")] == ["validation_loss", "validation_loss_by_level", "knn_accuracy"]
    assert "observes the training" in refused(tmp_path / "run", "--metrics", "online-probe")


def test_an_online_probe_is_the_regression_on_all_samples(mae: Path) -> None:
    subject, model = opened(mae), load_run(mae).model
    probe = online_probe.OnlineProbe(subject)
    probe.attach(model, torch.device("cpu"))
    probe.progress = 0.5
    label, other = torch.arange(400) % 2, torch.randn(400, 16, generator=generator(0))
    for n, rows in enumerate(torch.arange(400).split(50)):
        feature = (label[rows, None] - 0.5) * 3 * torch.eye(16)[3] + other[rows]
        probe.feature = feature
        probe.feature[rows % 11 == 0] = math.nan
        index = torch.where(rows % 7 == 0, ~rows, rows)  # padding
        probe.observe(Batch(feature, torch.where(rows % 5 == 0, -1, label[rows]), index, feature), 0.5 + (n + 1) * 1e-6)
    counted = (torch.arange(400) % 7 > 0) & (torch.arange(400) % 5 > 0) & (torch.arange(400) % 11 > 0)
    x = torch.cat([(label[:, None] - 0.5) * 3 * torch.eye(16)[3] + other, torch.ones(400, 1)], 1)[counted]
    y = torch.nn.functional.one_hot(label, 2).float()[counted]
    torch.testing.assert_close(probe.sums, x.T @ torch.cat([x, y], 1), rtol=1e-3, atol=0.1)


@pytest.mark.slow
def test_online_probes_of_several_processes_are_one(pictures: Path, tmp_path: Path, program) -> None:
    """Each process has its share of the samples; a run of two is resumed by one with the sums of both."""
    words = ["--evaluate.metrics", "online-probe", "--checkpoint.every", 1, "--checkpoint.keep", 99]
    train("train_mae.py", *common(pictures, tmp_path / "one", 2), *words)
    program("train_mae.py", *common(pictures, tmp_path / "two", 2), *words, processes=2)
    one = final(tmp_path / "one", "online-probe")["sums"]
    torch.testing.assert_close(final(tmp_path / "two", "online-probe")["sums"], one, rtol=1e-3, atol=1e-3)
    for step in sorted((tmp_path / "two" / "checkpoints").iterdir())[3:]:
        shutil.rmtree(step)
    train("train_mae.py", "--resume", "--output-dir", tmp_path / "two")
    torch.testing.assert_close(final(tmp_path / "two", "online-probe")["sums"], one, rtol=1e-3, atol=1e-3)
    assert [record.get("online_probe_accuracy") for record in read_metrics(tmp_path / "one")] == [
        record.get("online_probe_accuracy") for record in read_metrics(tmp_path / "two")
    ]
