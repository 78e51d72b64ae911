"""The classification example: its objective, recipes, cost and record, Partial Forward Blocking, and other methods."""

import itertools
import json
import math
import sys
from math import comb
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
import other_methods
from classification_adapter import Classification, larger_shares, partners, random_shifts
from fit import Training
from other_methods import METHODS

from pretrain.adapters import Batch, Losses
from pretrain.config.schema import Blocking, Data
from pretrain.core.errors import UserError
from pretrain.core.rng import SampleRNG, generator
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


# -- other methods ---------------------------------------------------------------------------------------


def simulated(name: str, seed: int = 0, size: int = 97, epochs: int = 9, **more: Any) -> tuple[list[Tensor], Any]:
    """The indices of each epoch, of a training whose losses are random, and the method."""
    found: list[Tensor] = []
    method = METHODS[name](size, epochs=epochs, seed=seed, **more)
    for epoch in method.epochs():
        rng, place, used = SampleRNG(seed, epoch, index=torch.arange(size)), 0, []
        loss = (2 * rng.normal() - 0.3 * epoch).exp()
        order = torch.tensor([*method])
        assert len(method) == len(order) and [*method] == order.tolist()
        for index in order.split(16):
            own = loss[index].clone().requires_grad_()
            before = method.forward_only
            mean = method(own, index, own.detach())
            mean.backward()
            count = len(index) - (method.forward_only - before)
            assert own.grad is not None and int((own.grad > 0).sum()) == count
            assert own.grad.sum() == pytest.approx(min(count, 1)) and len({*own.grad[own.grad > 0].tolist()}) <= 1
            used.append(index[own.grad > 0])
            place += len(index)
            assert method.progress == pytest.approx((epoch + place / len(order)) / epochs)
        assert torch.equal(method.last[order], loss[order]) and len(order.unique()) == len(order)
        assert method.mean() == pytest.approx(loss[order].mean().item(), rel=1e-5)
        found.append(torch.cat(used))
    assert method.progress == 1
    return found, method


BUDGETS: dict[str, dict[str, Any]] = {name: {"budget": 0.6} if METHODS[name].budgeted else {} for name in METHODS}


@pytest.mark.parametrize("name", METHODS)
def test_a_method_uses_what_it_selects_and_is_a_function_of_the_seed(name: str) -> None:
    (one, first), (two, second), (other, _) = (simulated(name, seed, **BUDGETS[name]) for seed in (0, 0, 1))
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True)) and first.samples_used == second.samples_used
    assert not all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert first.samples_used - first.forward_only == sum(map(len, one))


def test_padding_counts_for_nothing() -> None:
    method = METHODS["ies"](4, epochs=1)
    for _ in method.epochs():
        loss = torch.tensor([1.0, 3.0, 100.0], requires_grad=True)
        assert method(loss, torch.tensor([0, 1, ~2])).item() == 2.0
        assert method.last.tolist() == [1, 3, 3, 3] and method.forward_only == 0


def test_orderdp_uses_each_rank_as_often_as_it_says() -> None:
    """Over seeds, at given last losses; and as many samples as the budget in every epoch."""
    n, epochs, trials = 12, 1, 3000
    method = METHODS["orderdp"](n, epochs=epochs, budget=0.5, top=0.6)
    assert isinstance(method, other_methods.OrderDP)
    s, q = method.pool, method.used
    assert (s, q) == (10, 6)
    method.last = torch.arange(n).float()  # the last sample is of rank 1
    count = torch.zeros(n)
    for seed in range(trials):
        method.seed = seed
        count[method.select()] += 1
    rank = [
        sum(comb(j - 1, l - 1) * comb(n - j, s - l) for l in range(1, q + 1)) / comb(n, s)  # noqa: E741
        for j in range(1, n + 1)
    ]
    assert sum(rank) == pytest.approx(q)
    error = 4 * math.sqrt(0.25 / trials)
    assert (count.flip(0) / trials - torch.tensor(rank)).abs().max() < error
    used, made = simulated("orderdp", size=200, budget=0.7)
    assert [len(each) for each in used] == [140] * 9 and made.samples_used == 9 * 140


def test_the_window_of_seta_slides_over_groups_from_easy_to_hard() -> None:
    size, epochs = 500, 16
    method = METHODS["seta"](size, epochs=epochs, keep=0.8, groups=5, window=0.4)
    assert isinstance(method, other_methods.SeTa)
    method.last = torch.randn(size, generator=generator(3)).exp()
    for epoch in range(epochs):
        method.epoch = epoch
        found = method.select()
        assert len(found.unique()) == len(found) <= 400
        if epoch in (0, 14, 15):
            assert len(found) == 400
            continue
        drawn = torch.randperm(size, generator=method.draws(1))[:400]
        group = other_methods.intervals(method.last[drawn], 5)
        ends = [(method.last[drawn][group == g].min(), method.last[drawn][group == g].max()) for g in range(5)]
        assert all(a[1] < b[0] for a, b in itertools.pairwise(ends))
        inside = (method.last >= ends[epoch % 4][0]) & (method.last <= ends[epoch % 4 + 1][1])
        assert sorted(found.tolist()) == sorted(i for i in drawn.tolist() if inside[i])


@given(st.lists(st.floats(0, 50, width=32), min_size=6, max_size=60), st.integers(1, 6))
@settings(max_examples=25, deadline=None)
def test_groups_are_a_fixed_point_of_k_means(values: list[float], groups: int) -> None:
    value = torch.tensor(values)
    group = other_methods.intervals(value, groups)
    assert (group[value.argsort()].diff() >= 0).all()
    means = {int(g): value[group == g].double().mean() for g in group.unique()}
    for x, g in zip(value.double(), group.tolist(), strict=True):
        assert (x - means[g]).abs() <= min((x - mean).abs() for mean in means.values()) + 1e-6


def test_ies_excludes_samples_whose_second_differences_are_small() -> None:
    size, epochs, window, threshold = 40, 14, 2, 0.3
    method = METHODS["ies"](size, epochs=epochs, threshold=threshold, window=window)
    steps = torch.rand(size, generator=generator(1)) * 0.8
    history: list[Tensor] = []
    excluded = 0
    for epoch in method.epochs():
        expected = torch.zeros(size, dtype=torch.bool)
        if len(history) >= window + 3:
            change = [history[-k] - 2 * history[-k - 1] + history[-k - 2] for k in range(1, window + 2)]
            expected = torch.stack(change[:window]).abs().mean(dim=0) < threshold
        loss = 5 - 0.2 * epoch + steps * torch.randn(size, generator=generator(2, epoch))
        before = method.forward_only
        own = loss.clone().requires_grad_()
        method(own, torch.arange(size)).backward()
        assert own.grad is not None and torch.equal(own.grad == 0, expected)
        assert method.forward_only - before == expected.sum()
        excluded += int(expected.sum())
        history.append(loss)
    assert 0 < excluded < size * epochs / 2


def test_selective_backprop_prefers_large_losses_and_keeps_to_its_budget() -> None:
    size, budget = 4000, 0.25
    method = METHODS["selective-backprop"](size, epochs=1, budget=budget, recent=2000)
    count, large = torch.zeros(4), torch.zeros(4)
    for _ in method.epochs():
        for index in torch.arange(size).split(50):
            loss = torch.rand(len(index), generator=generator(4, int(index[0]))).requires_grad_()
            method(loss, index).backward()
            quarter = (4 * loss.detach()).long()
            count += torch.bincount(quarter, minlength=4)
            large += torch.bincount(quarter[loss.grad > 0], minlength=4)  # type: ignore[operator]
    assert 1 - method.forward_only / size == pytest.approx(budget, abs=0.03)
    edges = torch.arange(5) / 4  # the mean of u ** 3 over each quarter
    assert (large / count - (edges**4).diff()).abs().max() < 0.05


def test_the_flops_of_a_sample_that_is_not_used_are_those_of_its_forward_pass(whole: fit.Fitted) -> None:
    found = trained("selective-backprop", budget=0.5)
    share = found.cost["samples_used"] / 384
    assert 0.3 < share < 0.7 and found.skipped == 1 - share
    ratio = found.cost["flops"] / whole.cost["flops"]
    assert ratio == pytest.approx(share + (1 - share) / 3, abs=0.03)  # the first layer has no gradient of its input


def test_methods_train(tmp_path: Path) -> None:
    """The loop of the examples takes each; a loss that is not used has no gradient."""

    def losses(model: nn.Module, batch: Batch, rng: SampleRNG) -> Losses:
        return Losses(model(batch.image).squeeze(1).square())

    x = torch.randn(64, 3)

    def batches(method: Any) -> Any:
        for index in torch.tensor([*method]).split(16):
            yield Batch(x[index], index, index, torch.zeros(len(index)))

    for name in METHODS:
        torch.manual_seed(0)
        model = nn.Linear(3, 1)
        before = losses(model, Batch(x, *[torch.arange(64)] * 3), None).loss.mean()  # type: ignore[arg-type]
        fit.fit(Training(epochs=8, lr=0.05, policy=name, **BUDGETS[name]), model, losses, 64, batches)
        assert losses(model, Batch(x, *[torch.arange(64)] * 3), None).loss.mean() < 0.2 * before  # type: ignore[arg-type]
