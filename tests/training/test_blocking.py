"""Partial Forward Blocking: which samples go on, with which weight, and that a run with it is one run."""

import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pretrain.models.dit import DiTConfig
from pretrain.models.mae import MAEConfig
from programs import common, final, refused, same, train
from torch import Tensor, nn

from pretrain.adapters import Batch, Losses
from pretrain.adapters.flow import Flow
from pretrain.adapters.mae import MAE
from pretrain.config.schema import Blocking
from pretrain.core.errors import UserError
from pretrain.core.rng import SampleRNG, generator
from pretrain.training import blocking
from pretrain.training.blocking import (
    FeatureDensity,
    PartialForwardBlocking,
    build_blocking,
    probabilities_above_floor,
    systematic_sample,
)

NETWORKS = {
    "dit": (Flow(), DiTConfig(patch=4, width=16, depth=4, heads=2), (1, 8, 8)),
    "mae": (MAE(), MAEConfig(patch=4, width=16, depth=4, heads=2, decoder_width=16, decoder_depth=1), (1, 8, 8)),
    "mae, cross decoder, masks of many sizes": (
        MAE(mask_ratio=0.3, max_mask_ratio=0.8),
        MAEConfig(patch=2, width=16, depth=4, heads=2, decoder="cross", decoder_width=16, decoder_depth=1),
        (1, 8, 8),
    ),
}


@given(st.lists(st.floats(1e-3, 1e3), min_size=2, max_size=60), st.floats(0.05, 0.95), st.floats(0, 0.999))
@settings(deadline=None, max_examples=30)
def test_as_many_as_planned_are_drawn_each_with_its_probability(sizes: list[float], share: float, start: float) -> None:
    """Over all starting points the draws of a sample are its probability, to the resolution of the points."""
    size = torch.tensor(sizes, dtype=torch.float64)
    count = max(1, round(share * len(size)))
    probability = probabilities_above_floor(size, count)
    assert probability.sum() == pytest.approx(count, abs=1e-9) and (probability <= 1).all()
    assert (probability >= min(1, blocking.FLOOR * count / len(size)) - 1e-12).all()
    assert (probability[size.argsort()].diff() >= -1e-12).all()
    order = torch.randperm(len(size), generator=generator(len(size)))
    assert len(systematic_sample(probability, order, start)) == count
    points, drawn = 100, torch.zeros(len(size))
    for point in range(points):
        kept = systematic_sample(probability, order, (point + 0.5) / points)
        assert len(kept) == len(kept.unique()) == count
        drawn[kept] += 1
    torch.testing.assert_close(drawn.double() / points, probability, rtol=0, atol=1 / points + 1e-9)


def one(share: float, method: str, progress: float = 0.5) -> PartialForwardBlocking:
    """With the centres of two clusters: a large one at 0 and a small one at 5."""
    made = PartialForwardBlocking(Flow(), Blocking(share, method), lambda: progress)  # type: ignore[arg-type]
    centre = torch.randn(blocking.CENTRES, 4, generator=generator(1)) * 0.3
    centre[-5:] += 5
    made.density.update(centre)
    return made


def test_rare_samples_are_the_important_ones() -> None:
    feature = torch.randn(50, 4, generator=generator(2)) * 0.3
    feature[[7, 21, 40]] += 5
    made = one(0.9, "topk")
    kept, weight = made._select(feature, torch.rand(50, 3, generator=generator(3)))
    assert {7, 21, 40} <= {*kept.tolist()} and len(kept) == 5
    assert (weight[kept] == 10).all() and weight.sum() == 50
    brute = torch.zeros(50, dtype=torch.float64)
    centre, assigned = made.density.centre.double(), made.density.assigned
    width = (4 / (6 * len(centre))) ** (1 / 8) * centre.std(dim=0)
    for i in range(50):
        for j in range(len(centre)):
            brute[i] += assigned[j] * (-((feature[i].double() - centre[j]) / width).square().sum() / 2).exp()
    torch.testing.assert_close(made.density.importance(feature, 0.01), 1 / (brute / brute.max() + 0.01))


def test_the_weighted_losses_are_unbiased() -> None:
    """Over all starting points a sample's mean weight is 1, whatever the features; of topk it is not."""
    feature, points = torch.randn(40, 4, generator=generator(4)) * 2, 400
    random = torch.rand(40, 3, generator=generator(5))
    means = {}
    for method in ("unbiased", "topk"):
        made, total = one(0.4, method), torch.zeros(40, dtype=torch.float64)
        for point in range(points):
            random[0, 2] = (point + 0.5) / points
            total += made._select(feature, random)[1]
        means[method] = total / points
    torch.testing.assert_close(means["unbiased"], torch.ones(40).double(), rtol=0, atol=0.025)
    assert (means["topk"] - 1).abs().max() > 0.5


def test_the_mean_score_is_that_of_all_samples() -> None:
    """Where rare samples, which mostly go on, have another loss; so the training loss that is shown is the one."""
    image = torch.cat([torch.randn(160, 4, generator=generator(6)) / 4, 3 + torch.randn(40, 4, generator=generator(7))])
    index = torch.arange(200)
    made, shown = one(0.4, "unbiased"), []
    made.objective = Linear()  # type: ignore[assignment]
    for seed in range(60):
        losses = made(Features(), Batch(image, index, index, index / 200), SampleRNG(seed, index=index))
        assert losses.score is not None
        shown.append(losses.score.mean())
    true, kept = float(image.square().sum(dim=1).mean()), losses.score[losses.loss > 0].mean()
    assert float(torch.stack(shown).mean()) == pytest.approx(true, rel=0.02) and kept > 1.2 * true


def test_centres_move_to_the_means_of_the_samples_nearest_to_them() -> None:
    density = FeatureDensity()
    first = torch.randn(blocking.CENTRES + 30, 3, generator=generator(6))
    for part in first.split(17):  # the first ones become the centres, whatever the batches
        before = density.centre.clone()
        density.update(part)
    assert density.is_set and density.assigned.sum() == blocking.CENTRES + 30
    feature, before, counts = (
        torch.randn(20, 3, generator=generator(7)),
        density.centre.clone(),
        density.assigned.clone(),
    )
    density.update(feature)
    nearest = [min(range(len(before)), key=lambda j, x=x: (x - before[j]).norm().item()) for x in feature]
    for j in range(len(before)):
        mine = feature[[i for i, other in enumerate(nearest) if other == j]]
        expected = before[j] if not len(mine) else before[j] + blocking.STEP * (mine.mean(dim=0) - before[j])
        torch.testing.assert_close(density.centre[j], expected)
        assert density.assigned[j] == counts[j] + len(mine)


@pytest.mark.parametrize("name", NETWORKS)
def test_samples_that_go_on_have_the_losses_that_they_have_alone(name: str) -> None:
    """Under any choice; the others have loss 0, and no gradient."""
    adapter, part, shape = NETWORKS[name]
    torch.manual_seed(0)
    model = part.build(shape, 0).train()
    for parameter in model.parameters():  # zero gates would hide the blocks
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.2)
    index = torch.arange(6)
    batch = Batch(torch.randn(6, *shape), index - 10, index, torch.rand(6))
    plain = adapter(model, batch, SampleRNG(0, index=index)).loss
    for kept in ([0, 1, 2, 3, 4, 5], [4], [1, 2, 5]):
        network: Any = blocking._Choosing(model, lambda feature, kept=kept: torch.tensor(kept))
        loss = adapter(network, batch, SampleRNG(0, index=index)).loss
        torch.testing.assert_close(loss[kept], plain[kept])
    first = blocking.blocked_flops(adapter, model, blocking.black_image(shape, 0, torch.device("meta")))
    forward = blocking_flops(adapter, model, shape)
    assert 0.1 * forward < first < 0.6 * forward  # a quarter of the blocks, of a forward pass


def blocking_flops(adapter: Any, model: nn.Module, shape: tuple[int, int, int]) -> int:
    """FLOPs of a forward pass of one sample."""
    from torch.utils.flop_counter import FlopCounterMode

    one = blocking.black_image(shape, 0, torch.device("cpu"))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        adapter(model, one, SampleRNG(0, index=one.index))
    return counter.get_total_flops()


class Linear:
    """An objective of a network of one layer."""

    def __call__(self, model: Any, batch: Batch, rng: SampleRNG) -> Losses:
        return Losses(model(batch.image).square().sum(dim=1))


class Features(nn.Module):
    def forward(self, x: Tensor, choose: Any = None) -> Tensor:
        return x if choose is None else x[choose(x)]


@pytest.mark.parametrize("method", ["unbiased", "topk"])
def test_processes_choose_as_one(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever their shares of a batch, and with padding."""
    image, index = torch.randn(30, 6, generator=generator(8)), torch.randperm(100, generator=generator(9))[:30]
    whole = Batch(image, index, index, index / 100)

    def run(parts: list[Batch]) -> tuple[Tensor, FeatureDensity]:
        weights = torch.zeros(100)
        for part in parts:
            made = PartialForwardBlocking(Linear(), Blocking(0.5, method), lambda: 0.5)  # type: ignore[arg-type]
            made.density.update(torch.randn(blocking.CENTRES, 6, generator=generator(10)))

            def gather(columns: list[Tensor]) -> list[Tensor]:
                if len(columns) == 2:  # of the scores
                    return columns
                both = [torch.cat([other.index for other in parts]), torch.cat([other.image for other in parts])]
                return [*both, torch.cat([SampleRNG(3, index=other.index).uniform(3) for other in parts])]

            monkeypatch.setattr(blocking, "all_gather_rows", gather)
            losses = made(Features(), part, SampleRNG(3, index=part.index))
            real = part.mask
            weights[part.index[real]] = (losses.loss / part.image.square().sum(dim=1))[real]
            assert (losses.loss[~real] == 0).all() and losses.score is not None and (losses.score > 0).all()
        return weights, made.density

    expected, density = run([whole])
    assert (expected > 0).sum() == 15 and expected.sum() == pytest.approx(30, rel=0.5)
    for cut in (1, 11, 29):
        first, second = Batch(*(field[:cut] for field in whole)), Batch(*(field[cut:] for field in whole))
        padded = Batch(*(torch.cat([field, field[:1]]) for field in second))
        padded.index[-1] = ~padded.index[-1]
        weights, other = run([first, padded])
        assert torch.equal(weights, expected) and torch.equal(other.centre, density.centre)


def test_a_batch_of_padding_alone_counts_for_nothing() -> None:
    """Of one process, or of all of them: every sample was excluded because its loss was not finite."""
    made = one(0.5, "unbiased")
    index = ~torch.arange(4)
    made.objective = Linear()  # type: ignore[assignment]
    batch = Batch(torch.randn(4, 4), index, index, torch.rand(4))
    found = made(Features(), batch, SampleRNG(0, index=index))
    assert (found.loss == 0).all() and made.density.assigned.sum() == blocking.CENTRES


@pytest.mark.parametrize("method", ["topk", "unbiased"])
def test_a_feature_that_is_not_finite_moves_no_centre_and_drops_no_other_sample(method: str) -> None:
    made = one(0.5, method)
    made.objective = Linear()  # type: ignore[assignment]
    image, index = torch.randn(20, 4, generator=generator(0)), torch.arange(20)
    image[3] = math.nan
    found = made(Features(), Batch(image, index, index, torch.rand(20)), SampleRNG(0, index=index))
    assert made.density.centre.isfinite().all() and (found.loss[index != 3] != 0).sum() >= 9


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_that_of_its_sample_alone(bad: float) -> None:
    """Also if no other sample goes on."""

    def objective(model: Any, batch: Batch, rng: SampleRNG) -> Losses:
        losses = Linear()(model, batch, rng).loss
        return Losses(losses.masked_fill(batch.index == 0, bad))

    for count in (1, 2, 40):
        made = one(0.5, "topk")
        made.objective = objective
        image, index = torch.randn(count, 4, generator=generator(count)), torch.arange(count)
        image[0] = 50  # far from all centres, so that it goes on
        found = made(Features(), Batch(image, index, index, torch.rand(count)), SampleRNG(0, index=index))
        assert found.score is not None and found.score.isfinite().tolist() == [False] + [True] * (count - 1)


def test_a_run_is_resumed_to_the_same_bits_and_its_cost_is_less(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocking, "CENTRES", 8)
    words = [
        *common(pictures, tmp_path / "run"),
        "--blocking.share",
        0.5,
        "--optim.name",
        "adamw",
        "--checkpoint.every",
        3,
        "--checkpoint.keep",
        9,
    ]
    train("train_mae.py", *words, "--evaluate.metrics", "loss")
    steps = sorted((tmp_path / "run" / "checkpoints").iterdir())
    again = tmp_path / "again"
    (again / "checkpoints").mkdir(parents=True)
    shutil.copytree(steps[2], again / "checkpoints" / steps[2].name)
    for name in ("config.yaml", "metrics.jsonl"):
        shutil.copy(tmp_path / "run" / name, again / name)
    train("train_mae.py", "--resume", "--output-dir", again)
    assert same(tmp_path / "run", again)
    assert torch.equal(final(tmp_path / "run", "blocking")["centre"], final(again, "blocking")["centre"])
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert 0.5 < summary["train_flops"] / summary["full_train_flops"] < 0.75


def test_what_can_not_be_blocked_is_refused(pictures: Path, tmp_path: Path) -> None:
    words = [*common(pictures, tmp_path / "run"), "--blocking.share", 0.5]
    assert "the forward of a UNet, which --adapter ddpm trains, has no argument `choose`" in refused(
        "train_diffusion.py", *words
    )
    flow, dit = Flow(prediction="sample"), DiTConfig(patch=4, width=16, depth=4, heads=2).build((1, 8, 8), 0)
    settings: Any = SimpleNamespace(blocking=Blocking(0.5), adapter=SimpleNamespace(name="flow"))
    with pytest.raises(UserError, match="the forward of a VelocityFromImage, which --adapter flow trains"):
        build_blocking(settings, flow, flow.prepare(dit), lambda: 0.0)
    probe = ["--evaluate.metrics", "loss,online-probe"]
    for more in (["--infobatch", "--pruning.policy", "infobatch"], ["--compile"], probe):
        assert "blocking.share excludes" in refused("train_mae.py", *words, *more)
