"""The classification example: its objective, recipes, cost and record, and Partial Forward Blocking."""

import itertools
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, draw_images
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

sys.path.insert(0, str(ROOT / "examples"))  # as for a script that is started there

import classification
import fit
from classification_adapter import Classification, larger_shares, partners, random_shifts
from fit import Training

from pretrain.adapters import Batch
from pretrain.config.schema import Blocking, Data
from pretrain.core.errors import UserError
from pretrain.core.rng import SampleRNG
from pretrain.training import blocking

RECIPES = [*sorted((ROOT / "examples" / "recipes").glob("*.yaml")), ROOT / "benchmarks/recipes/classification.yaml"]


# -- the command line --------------------------------------------------------------------------------


def started(monkeypatch: pytest.MonkeyPatch, *words: object) -> dict[str, Any]:
    """The arguments with which a command line calls the example."""
    called: dict[str, Any] = {}

    def main(**named: Any) -> None:
        called.update(named)

    main.__wrapped__ = classification.main  # type: ignore[attr-defined]
    main.__doc__ = classification.main.__doc__
    monkeypatch.setattr(sys, "argv", ["classification.py", *map(str, words)])
    fit.run(main)
    return called


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_can_be_trained(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = started(monkeypatch, "--config", recipe)
    training, shape = found["training"], (3, found["data"].size or 32, found["data"].size or 32)
    with torch.device("meta"):
        network = classification.ResNet(found["model"], shape, 10, found["width"])
        assert network(torch.zeros(2, *shape)).shape == (2, 10)
    assert len(fit._optimizer(training, network).param_groups[0]["params"]) == len([*network.parameters()])
    assert fit._selection(training, 100, found["blocking"], None, "samples").total_epochs == training.epochs
    assert found["data"].flip and training.schedule == "one-cycle" and training.optimizer == "sgd"


def test_the_command_line_is_stronger_than_the_recipe(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(
        "data:\n  flip: true\n  limit: 7\ntraining:\n  lr: 3\n  settings: [prune_ratio, 0.2]\nmodel: resnet34\n"
    )
    found = started(monkeypatch, "--training.lr", 0.5, f"--config={file}", "--data.no-flip")
    assert (found["training"].lr, found["data"].flip, found["data"].limit) == (0.5, False, 7)
    assert found["model"] == "resnet34" and found["training"].settings == {"prune_ratio": 0.2}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--config"], "--config"),
        (["--config", "missing.yaml"], "missing.yaml"),
        (["--config", "{file}"], "a recipe has settings"),
        (["--training.lr", "much"], "must be a number"),
        (["--training.rate", "1"], "--training.rate"),
        (["--adapter.mixup", "2"], "mixup"),
        (["--training.batch-size", "0"], "batch_size must be at least 1, got 0"),
        (["--training.lr", "-1"], "lr must be above 0, got -1"),
    ],
)
def test_a_wrong_command_line_is_one_sentence(
    words: list[str], message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(SystemExit) as stopped:
        started(monkeypatch, *(word.format(file=tmp_path / "list.yaml") for word in words))
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and message in error and len(error.splitlines()) == 1


@pytest.mark.parametrize(
    ("training", "share", "message"),
    [
        (Training(policy="nothing"), 0.0, "beside them orderdp, seta"),
        (Training(policy="orderdp"), 0.0, "needs a budget"),
        (Training(policy="ies", budget=0.5), 0.0, "takes no budget"),
        (Training(policy="seta", settings={"half": 2}), 0.0, "has no setting half"),
        (Training(policy="seta", settings={"groups": 5.5}), 0.0, "groups must be a whole number"),
        (Training(policy="ies", settings={"window": 1.5}), 0.0, "window must be a whole number"),
        (Training(policy="infobatch", settings={"half": 2}), 0.0, "no setting 'half'"),
        (Training(policy="infobatch"), 0.4, "--training.policy full"),
        (Training(policy="full", optimizer="sdg"), 0.0, "--training.optimizer sdg"),
    ],
)
def test_what_does_not_fit_is_refused(training: Training, share: float, message: str) -> None:
    model = nn.Linear(1, 1)
    with pytest.raises(UserError, match=message):
        fit.fit(training, model, Classification(), 10, lambda infobatch: [], Blocking(share))


@pytest.mark.parametrize("policy", ["infobatch", "ies"])
def test_a_learning_rate_that_is_too_large_is_one_sentence(
    policy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--data", draw_images(tmp_path / "images", 40), "--model", "resnet10t", "--width", 0.1]
    words += ["--training.epochs", 2, "--training.optimizer", "sgd", "--training.lr", 1e30, "--training.policy", policy]
    monkeypatch.setattr(sys, "argv", ["classification.py", *map(str, words)])
    with pytest.raises(SystemExit) as stopped:
        fit.run(classification.main)
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and "--training.lr" in error and "Traceback" not in error


def test_images_without_labels_and_other_networks_are_refused(tmp_path: Path) -> None:
    folder = draw_images(tmp_path / "images", 12, classes=1)
    flat = tmp_path / "flat"
    flat.mkdir()
    for path in folder.rglob("*.png"):
        path.rename(flat / path.name)
    with pytest.raises(UserError, match="no labels"):
        classification.main(data=Data(str(flat), held_out=4))
    rows = [f"{path.name},{'' if n == 3 else n % 2}" for n, path in enumerate(sorted(flat.iterdir()))]
    (flat / "metadata.csv").write_text("\n".join(["file_name,label", *rows]))
    with pytest.raises(UserError, match="1 of 11 training images have no label"):
        classification.main(data=Data(str(flat), held_out=4))
    for name in ("vit_tiny_patch16_224", "resnet", "densenet121"):
        with pytest.raises(UserError, match="no ResNet"):
            classification.ResNet(name, (3, 32, 32), 10)


# -- the objective -------------------------------------------------------------------------------------


def test_one_cycle_is_that_of_torch() -> None:
    for rise, start, end in ((0.3, 25, 1e4), (0.1, 10, 100)):
        steps, optimizer = 1000, torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1)
        torchs = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, 0.7, total_steps=steps, pct_start=rise, div_factor=start, final_div_factor=end
        )
        rates = []
        for _ in range(steps):
            rates.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            if len(rates) < steps:
                torchs.step()
        found = [0.7 * fit.one_cycle(step / (steps - 1), rise, start, end) for step in range(steps)]
        assert found == pytest.approx(rates, abs=0.7 * 5 / (rise * steps))  # torch's rise ends one step earlier
        assert found[0] == pytest.approx(rates[0]) and found[-1] == pytest.approx(rates[-1])


@pytest.mark.parametrize("alpha", [0.2, 0.6, 1.0])
def test_shares_have_the_beta_distribution_and_are_the_samples_own(alpha: float) -> None:
    index = torch.arange(20_000)
    share = larger_shares(SampleRNG(1, 2, index=index), alpha)
    torch.manual_seed(0)
    x = torch.distributions.Beta(alpha, alpha).sample((200_000,))
    expected = torch.maximum(x, 1 - x)
    at = torch.linspace(0.02, 0.98, 25)
    assert (share.quantile(at) - expected.quantile(at)).abs().max() < 0.012
    assert (share >= 0.5).all() and (share <= 1).all()
    some = index[[3, 77, 5, 19_000]]
    assert torch.equal(larger_shares(SampleRNG(1, 2, index=some), alpha), share[some])


def test_every_sample_has_another_one_as_partner_and_is_one_once() -> None:
    for size in (1, 2, 3, 64):
        for seed in range(5):
            partner = partners(SampleRNG(seed, index=torch.arange(size)))
            assert sorted(partner.tolist()) == [*range(size)]
            assert size == 1 or not (partner == torch.arange(size)).any()


def test_mixed_images_have_mixed_losses_and_the_score_of_their_own_label() -> None:
    """Also padding of label -1; with one sample in the batch nothing is mixed."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 5))
    for size, smoothing in ((8, 0.2), (1, 0.0)):
        batch = Batch(torch.randn(size, 3, 2, 2), torch.randint(5, (size,)), torch.arange(size), torch.zeros(size))
        loss, score = Classification(smoothing, 0.7)(model, batch, SampleRNG(3, index=batch.index))
        rng = SampleRNG(3, index=batch.index)
        share, partner = larger_shares(rng, 0.7), partners(rng)
        assert score is not None and not score.requires_grad
        for i in range(size):
            j, keep = int(partner[i]), float(share[i])
            logits = model((keep * batch.image[i] + (1 - keep) * batch.image[j])[None])
            own, other = (F.cross_entropy(logits, batch.label[[k]], label_smoothing=smoothing) for k in (i, j))
            torch.testing.assert_close(loss[i], keep * own + (1 - keep) * other)
            torch.testing.assert_close(score[i], F.cross_entropy(logits, batch.label[[i]]))
    padded = batch._replace(label=torch.tensor([-1]), index=torch.tensor([~0]))
    assert Classification(0.1, 0.0)(model, padded, SampleRNG(3, index=padded.index)).loss.isfinite().all()


@given(st.integers(1, 6), st.integers(1, 9), st.integers(1, 9), st.integers(0, 4), st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_a_shift_is_a_crop_of_the_padded_image(size: int, height: int, width: int, pixels: int, seed: int) -> None:
    image, index = torch.randn(size, 2, height, width), torch.arange(size) + 5
    moved = random_shifts(image, SampleRNG(seed, index=index), pixels)
    padded = F.pad(image, (pixels,) * 4, value=-1.0)
    for i in range(size):
        crops = [
            padded[i, :, y : y + height, x : x + width] for y, x in itertools.product(range(2 * pixels + 1), repeat=2)
        ]
        assert any(torch.equal(moved[i], crop) for crop in crops)
        alone = random_shifts(image[i : i + 1], SampleRNG(seed, index=index[i : i + 1]), pixels)
        assert torch.equal(alone[0], moved[i])


def test_all_shifts_occur() -> None:
    image = torch.zeros(2000, 1, 5, 5)
    image[:, :, 2, 2] = 1
    moved = random_shifts(image, SampleRNG(0, index=torch.arange(2000)), 1)
    count = (moved == 1).sum(dim=0)[0, 1:4, 1:4]
    assert count.sum() == 2000 and (count - 2000 / 9).abs().max() < 60


# -- the cost, and Partial Forward Blocking --------------------------------------------------------------


def small(width: float = 0.1) -> classification.ResNet:
    torch.manual_seed(0)
    return classification.ResNet("resnet10t", (1, 16, 16), 3, width)


def test_samples_that_go_on_have_the_logits_that_they_have_alone() -> None:
    model, image = small().eval(), torch.randn(6, 1, 16, 16)
    whole = model(image)
    torch.testing.assert_close(model.net(image), whole)
    seen: list[Tensor] = []
    for kept in ([0, 1, 2, 3, 4, 5], [4], [1, 2, 5]):
        found = model(image, choose=lambda feature, kept=kept: seen.append(feature) or torch.tensor(kept))
        torch.testing.assert_close(found, whole[kept])
    assert seen[0].shape == (6, model.net.layer1[-1].conv2.out_channels)


def trained(policy: str = "full", share: float = 0.0, method: Any = "topk", **more: Any) -> fit.Fitted:
    """A training on random images, whose FLOPs are counted in every step."""
    image, label = torch.randn(96, 1, 16, 16), torch.arange(96) % 3

    def batches(infobatch: Any) -> Any:
        for index in torch.tensor([*infobatch]).split(24):
            yield Batch(image[index], label[index], index, torch.zeros(len(index)))

    made = Training(epochs=4, lr=0.05, optimizer="sgd", schedule="one-cycle", policy=policy, **more)
    return fit.fit(made, small(), Classification(0.0), 96, batches, Blocking(share, method))


@pytest.fixture(scope="module")
def whole() -> fit.Fitted:
    return trained()


def test_the_cost_of_training_is_that_of_its_samples(whole: fit.Fitted, monkeypatch: pytest.MonkeyPatch) -> None:
    assert whole.cost["samples_used"] == 384 and whole.skipped == 0
    half = trained("random", budget=0.5)
    assert half.cost["samples_used"] == 192 and half.skipped == 0.5
    assert half.cost["flops"] == pytest.approx(whole.cost["flops"] / 2)


@pytest.mark.parametrize("method", ["topk", "unbiased"])
def test_a_blocked_sample_costs_a_third_of_the_first_stage(
    method: str, whole: fit.Fitted, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its forward pass of the first stage, no more and no less; the others cost what they do without blocking."""
    monkeypatch.setattr(blocking, "CENTRES", 8)
    share = 0.25
    found = trained(share=share, method=method)
    blocked = 384 - found.cost["samples_used"]
    assert blocked == 6 * 12  # of 24 in each of 16 steps but the first two and the last two
    model, forward = small(), []
    for part in (None, lambda feature: torch.tensor([0])):
        with fit.FlopCounterMode(display=False) as counter:
            image = torch.randn(1 if part is None else 50, 1, 16, 16)
            model(image) if part is None else model(image, choose=part)
        forward.append(counter.get_total_flops())
    first = (forward[1] - forward[0]) / 49  # what each image that stops adds
    expected = found.cost["samples_used"] / 384 * whole.cost["flops"] + blocked * first
    assert found.cost["flops"] == pytest.approx(expected, rel=1e-6)


def test_a_run_leaves_its_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(blocking, "CENTRES", 8)
    data = Data(str(draw_images(tmp_path / "images", 80)), held_out=16)
    file = tmp_path / "deep" / "record.json"
    result = classification.main(
        data=data,
        model="resnet10t",
        width=0.1,
        shift=1,
        adapter=Classification(0.1, 0.4),
        blocking=Blocking(0.3, "topk"),
        training=Training(epochs=3, batch_size=16, policy="full"),
        output=file,
    )
    record = json.loads(file.read_text())
    assert record["quality"]["accuracy"] == result and record["samples"] == 72
    assert 0.1 < record["skipped"] < 0.3 and record["blocking"] == {"share": 0.3, "method": "topk"}
    assert f"{record['skipped']:.1%} skipped" in capsys.readouterr().out
    assert record["cost"]["samples_used"] == round((1 - record["skipped"]) * 216)
    with pytest.raises(UserError, match="--output"):
        fit.write_record(tmp_path / "images", Training(), small(), trained(), {})


def test_attention_on_a_cpu_is_counted() -> None:
    query, key, value = (torch.randn(2, 3, 8, 4, requires_grad=True) for _ in range(3))
    with fit.FlopCounterMode(display=False, custom_mapping=fit.ATTENTION) as counter:
        F.scaled_dot_product_attention(query, key, value).sum().backward()
    assert counter.get_total_flops() == 3 * 2 * (2 * 2 * 3 * 8 * 8 * 4)


def test_the_flops_of_a_sample_that_is_not_used_are_those_of_its_forward_pass(whole: fit.Fitted) -> None:
    found = trained("selective-backprop", budget=0.5)
    share = found.cost["samples_used"] / 384
    assert 0.3 < share < 0.7 and found.skipped == 1 - share
    ratio = found.cost["flops"] / whole.cost["flops"]
    assert ratio == pytest.approx(share + (1 - share) / 3, abs=0.03)  # the first layer has no gradient of its input
