"""GRPO with pruned prompts and completions: laws of examples/group_policy_adapter.py, and a run of the example."""

import json
import re
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

sys.path.insert(0, str(ROOT / "examples"))  # as for a script that is started there

import group_policy
import group_policy_adapter as adapter
from group_policy_adapter import GroupPolicy, Rollouts, advantages, kept
from language_adapter import Sequences
from language_data import collate, made

from pretrain.core.errors import UserError
from pretrain.core.rng import SampleRNG, generator

ENDS: dict[str, Any] = {"bos_token_id": 0, "eos_token_id": 0}
DROPS = ("random", "dppo", "proportional")  # the unbiased rules that draw


def language_model() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    drop: dict[str, Any] = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    config = GPT2Config(vocab_size=40, n_positions=24, n_embd=16, n_layer=2, n_head=2, **ENDS, **drop)
    return GPT2LMHeadModel(config)


def batch(model: torch.nn.Module, reward: Tensor) -> Rollouts:
    """Random prompts and completions of random lengths, sampled by another policy than the model."""
    count, groups = reward.shape
    draw = generator(1)
    prompt = torch.randint(2, 8, (count,), generator=draw)
    length = prompt[:, None] + torch.randint(1, 9, (count, groups), generator=draw)
    tokens = torch.randint(1, 40, (count, groups, 16), generator=draw)
    tokens = tokens.where(torch.arange(16) < length[..., None], 0)
    with torch.no_grad():
        logits = model(tokens.flatten(0, 1)).logits.log_softmax(dim=-1).view(count, groups, 16, -1)
        old = logits[:, :, :-1].gather(3, tokens[:, :, 1:, None])[..., 0]
    return Rollouts(tokens, prompt, length, old, reward, torch.arange(count))


class Fixed(SampleRNG):
    """Random numbers that are given."""

    def __init__(self, values: Tensor) -> None:
        self.values = values

    def uniform(self, *shape: int) -> Tensor:
        return self.values.view(len(self.values), *shape)


def draws(advantage: Tensor, rule: str, share: float) -> list[tuple[float, SampleRNG]]:
    """All draws of a rule for one group, [1, G], with their probabilities: enumerated, not sampled."""
    groups = advantage.shape[1]
    if rule == "dppo":  # each uniform number is below or not below the share
        bits = torch.cartesian_prod(*[torch.tensor([False, True])] * groups)[:, None]
        chances = torch.where(bits, 1 - share, share).prod(dim=2)[:, 0].tolist()
        return [
            (chance, Fixed(torch.where(each, (1 + share) / 2, share / 2)))
            for chance, each in zip(chances, bits, strict=True)
        ]
    probability = adapter.probabilities(advantage.abs(), rule, share)
    ends = probability.cumsum(dim=1)[0] % 1  # where the draw changes with the start
    edges = torch.cat([torch.zeros(1), ends, torch.ones(1)]).sort().values.tolist()
    spans = [(first, last) for first, last in pairwise(edges) if last - first > 1e-9]
    return [(last - first, Fixed(torch.tensor([(first + last) / 2]))) for first, last in spans]


def some_advantages(groups: int) -> list[Tensor]:
    """Of binary rewards with every number of right answers, and of graded rewards."""
    binary = [(torch.arange(groups) < right).float()[None] for right in range(groups + 1)]
    graded = torch.rand(3, 1, groups, generator=generator(3))
    return [advantages(reward) for reward in [*binary, *graded]]


@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 0.7])
@pytest.mark.parametrize("rule", DROPS)
def test_the_expected_weight_of_every_completion_is_1(rule: str, share: float) -> None:
    for advantage in some_advantages(6):
        drawn = [(chance, *kept(advantage, rule, share, rng)) for chance, rng in draws(advantage, rule, share)]
        assert sum(chance for chance, _, _ in drawn) == pytest.approx(1, abs=1e-6)
        mean = torch.stack([chance * weight for chance, _, weight in drawn]).sum(dim=0)
        torch.testing.assert_close(mean, torch.ones_like(advantage), atol=1e-5, rtol=0)
        number = sum(chance * float(mask.sum()) for chance, mask, _ in drawn)
        if rule != "dppo":
            assert number == pytest.approx(6 * (1 - share), abs=1e-4)
            assert all(abs(float(mask.sum()) - 6 * (1 - share)) < 1 for _, mask, _ in drawn)


def gradient(model: torch.nn.Module, group: Rollouts, objective: GroupPolicy, rng: SampleRNG) -> Tensor:
    parameters = list(model.parameters())
    loss = objective(model, group, rng).loss.sum()
    return torch.cat([each.flatten() for each in torch.autograd.grad(loss, parameters, allow_unused=False)])


def expected_gradient(model: torch.nn.Module, group: Rollouts, rule: str) -> Tensor:
    """Over all draws; each is made by the objective itself."""
    objective, advantage = GroupPolicy(rule, 0.5), advantages(group.reward)
    terms = [chance * gradient(model, group, objective, rng) for chance, rng in draws(advantage, rule, 0.5)]
    return torch.stack(terms).sum(dim=0)


@pytest.fixture(scope="module")
def example() -> tuple[torch.nn.Module, Rollouts, Tensor]:
    """A model, one group of four completions of which one is right, and the gradient of all four."""
    model = language_model()
    group = batch(model, torch.tensor([[0.0, 1.0, 0.0, 0.0]]))
    return model, group, gradient(model, group, GroupPolicy("all"), SampleRNG(0, index=group.index))


def test_the_expected_gradient_is_that_of_all_completions(example, monkeypatch) -> None:
    model, group, full = example
    scale = float(full.norm())
    assert scale > 0.01
    for rule in DROPS:
        assert float((expected_gradient(model, group, rule) - full).norm()) < 1e-4 * scale, rule
    right = adapter.kept
    monkeypatch.setattr(adapter, "kept", lambda *given: (right(*given)[0], right(*given)[0].float()))
    for rule in DROPS:  # weights of 1 are found out
        assert float((expected_gradient(model, group, rule) - full).norm()) > 0.1 * scale, rule


def test_cppo_is_biased_and_leaving_out_zero_advantages_is_not(example) -> None:
    model, group, full = example
    rng = SampleRNG(0, index=group.index)
    biased = gradient(model, group, GroupPolicy("cppo", 0.5), rng)
    assert float((biased - full).norm()) > 0.1 * float(full.norm())
    group = group._replace(reward=torch.tensor([[0.0, 1.0, 0.5, 0.5]]))
    assert int(kept(advantages(group.reward), "nonzero", 0.5, rng)[0].sum()) == 2
    with_all, without = (gradient(model, group, GroupPolicy(rule), rng) for rule in ("all", "nonzero"))
    torch.testing.assert_close(with_all, without, atol=1e-6, rtol=1e-4)


def test_the_loss_is_grpos(example) -> None:
    """By its formula, one completion at a time, with a policy that has moved beyond the clip range."""
    model, group, _ = example
    draw = torch.randn(group.old.shape, generator=generator(5))
    group = group._replace(old=group.old + 0.3 * draw)
    expected, gain = 0.0, advantages(group.reward)[0]
    with torch.no_grad():
        for i in range(4):
            prompt, length = int(group.prompt[0]), int(group.length[0, i])
            tokens = group.tokens[0, i, :length]
            log_probability = model(tokens[None]).logits[0].log_softmax(dim=-1)
            terms = []
            for at in range(prompt, length):
                ratio = (log_probability[at - 1, tokens[at]] - group.old[0, i, at - 1]).exp()
                terms.append(torch.minimum(ratio * gain[i], ratio.clamp(0.8, 1.2) * gain[i]))
            expected -= float(torch.stack(terms).mean()) / 4
    loss, score = GroupPolicy("all")(model, group, SampleRNG(0, index=group.index))
    assert loss.item() == pytest.approx(expected, abs=1e-5)
    assert score is not None and float(score) == pytest.approx(float(gain.abs().mean()))


@pytest.mark.parametrize("rule", adapter.RULES)
def test_groups_of_equal_rewards_have_zero_advantages(rule: str) -> None:
    reward = torch.tensor([[0.0], [1.0], [0.1], [1 / 3]]).expand(4, 8)
    advantage = advantages(reward)
    assert (advantage == 0).all()
    model, rng = language_model(), SampleRNG(0, index=torch.arange(4))
    mask, weight = kept(advantage, rule, 0.5, rng)
    assert weight.isfinite().all() and ((weight > 0) == mask).all()
    losses = GroupPolicy(rule, 0.5)(model, batch(model, reward), rng)
    assert losses.score is not None and (losses.score == 0).all() and (losses.loss == 0).all()


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31), st.floats(0, 0.8), st.sampled_from(adapter.RULES), st.integers(1, 4))
def test_the_kept_completions_do_not_depend_on_the_batch(seed: int, share: float, rule: str, world: int) -> None:
    index = torch.randperm(50, generator=generator(seed))[:12]
    advantage = advantages((torch.rand(12, 8, generator=generator(seed, 1)) < 0.4).float())
    mask, weight = kept(advantage, rule, share, SampleRNG(seed, 3, 1, index=index))
    for rank in range(world):
        part = slice(rank, None, world)
        found = kept(advantage[part], rule, share, SampleRNG(seed, 3, 1, index=index[part]))
        assert torch.equal(found[0], mask[part]) and torch.equal(found[1], weight[part])
    assert rule == "nonzero" or (mask.sum(dim=1) >= max(1, int(8 * (1 - share) - 1e-6))).all() or rule == "dppo"


def sequences(pairs: list[tuple[str, str]], rows: slice = slice(None)) -> Sequences:
    """Some of the prompts with their answers, one in a row."""
    texts = [(a, torch.tensor([*f"{a}{b}".encode(), group_policy.END])) for a, b in pairs]
    return collate([(i, tokens, len(a)) for i, (a, tokens) in [*enumerate(texts)][rows]])


def test_sampled_completions_have_the_models_probabilities() -> None:
    """Right-padded prompts and cached keys change nothing; neither do the other prompts of the batch."""
    torch.manual_seed(1)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=256, n_positions=32, n_embd=16, n_layer=2, n_head=2, **ENDS)).eval()
    for parameter in model.parameters():
        parameter.data *= 3  # far from uniform
    pairs = made(12, 0)

    def sampled(rows: slice) -> Rollouts:
        part = sequences(pairs, rows)
        return group_policy.rollouts(model, part, SampleRNG(0, index=part.index).uniform(4, group_policy.ANSWER))

    found, half = sampled(slice(None)), sampled(slice(0, None, 2))
    assert torch.equal(found.tokens[::2], half.tokens) and torch.equal(found.length[::2], half.length)
    for q, (instruction, answer) in enumerate(pairs):
        assert int(found.prompt[q]) == len(instruction)
        for i in range(4):
            tokens, prompt, length = found.tokens[q, i], int(found.prompt[q]), int(found.length[q, i])
            with torch.no_grad():
                expected = model(tokens[None, :length]).logits[0].log_softmax(dim=-1)
            expected = expected[:-1].gather(1, tokens[1:length, None])[prompt - 1 :, 0]
            torch.testing.assert_close(found.old[q, i, prompt - 1 : length - 1], expected, atol=1e-4, rtol=0)
            assert (tokens[length:] == 0).all() and (found.old[q, i, length - 1 :] == 0).all()
            said = bytes(tokens[prompt:length].tolist())
            assert float(found.reward[q, i]) == (said == answer.encode() + b"\0")


class Peaked(torch.nn.Module):
    """Adds `scale` to the logit of the right next token of the only prompt, by position; all other logits are 0."""

    def __init__(self, tokens: Tensor, scale: float) -> None:
        super().__init__()
        self.scale, self.next = scale, torch.nn.functional.pad(tokens[0, 1:], (0, group_policy.ANSWER))

    def forward(self, input_ids, attention_mask=None, position_ids=None, cache=None, use_cache=True):
        at = torch.arange(input_ids.shape[1])[None] if position_ids is None else position_ids
        logits = torch.nn.functional.one_hot(self.next[at], 256) * self.scale
        return SimpleNamespace(logits=logits.expand(len(input_ids), -1, -1))


def test_the_right_answer_is_rewarded() -> None:
    data = sequences([("copy abc=", "abc")])
    model = Peaked(data.tokens, 100.0)
    found = group_policy.rollouts(model, data, torch.full((1, 1, group_policy.ANSWER), 0.5))
    assert float(found.reward) == 1 and int(found.length) == len("copy abc=abc") + 1


@pytest.mark.parametrize(("answer", "scale"), [("7", 5.5), ("abc", 7.0), ("abcdefg", 8.0), ("abcdefg", 9.0)])
def test_the_expected_reward_is_the_mean_reward_of_sampled_completions(answer: str, scale: float) -> None:
    data = sequences([(f"copy {answer}=", answer)])
    model, count = Peaked(data.tokens, scale), 2000
    expected, exact = group_policy.evaluate(model, data)
    uniform = SampleRNG(7, index=data.index).uniform(count, group_policy.ANSWER)
    reward = float(group_policy.rollouts(model, data, uniform).reward.mean())
    assert 0.1 < expected < 0.9 and exact == 1
    assert abs(reward - expected) < 4 * (expected * (1 - expected) / count) ** 0.5
    with_a_wrong_one = sequences([(f"copy {answer}=", answer), (f"copy {answer}=", f"{answer[:-1]}h")])
    assert group_policy.evaluate(model, with_a_wrong_one) == (pytest.approx(expected / 2, rel=0.01), 0.5)


SMALL = group_policy.Settings(
    group_policy.Pruning("dppo", prompts=0.5), prompts=32, batch_size=8, epochs=2, width=16, warm_epochs=1, group=4
)


@pytest.fixture
def tiny(monkeypatch) -> None:
    monkeypatch.setattr(group_policy, "WARM", 64)
    monkeypatch.setattr(group_policy, "HELD_OUT", 20)


def test_the_example_runs_and_reports_its_cost(tiny, tmp_path: Path, capsys) -> None:
    file = tmp_path / "record.json"
    record = group_policy.main(replace(SMALL, output=file, warm_models=tmp_path / "warm"))
    line = capsys.readouterr().out.splitlines()[-1]
    cost = "rollouts .* GFLOPs, updates .* GFLOPs, skipped .* of prompts, .* of completions"
    assert re.fullmatch(f"expected reward .* -> .*, greedy exact match .* -> .*, {cost}", line)
    assert json.loads(file.read_text()) == record
    assert len(record["history"]) == 3 and record["rollout_flops"] > 0 and record["update_flops"] > 0
    assert record["cost"]["flops"] == record["rollout_flops"] + record["update_flops"]
    assert record["quality"] == {metric: record["history"][-1][metric] for metric in ("expected_reward", "exact_match")}
    assert 0 <= record["prompts_skipped"] < 1 and 0 <= record["completions_skipped"] < 1
    again = group_policy.main(replace(SMALL, epochs=1, warm_models=tmp_path / "warm"))
    assert again["before"] == record["before"]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"rule": "best"}, "rule must be one of all, random"),
        ({"share": 1.0}, r"share must be in \[0, 1\), got 1.0"),
        ({"prompts": -0.5}, r"--pruning.prompts must be in \[0, 1\), got -0.5"),
    ],
)
def test_a_wrong_setting_is_an_error(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        group_policy.main(replace(SMALL, pruning=replace(SMALL.pruning, **wrong)))


@pytest.mark.parametrize("name", ["epochs", "lr", "group", "prompts", "batch_size", "width", "warm_epochs", "warm_lr"])
def test_a_number_out_of_its_range_is_an_error_before_any_training(name: str) -> None:
    wrong: dict[str, Any] = {name: 97 if name == "width" else 0}
    with pytest.raises(UserError, match=f"--{name.replace('_', '-')} must be "):
        group_policy.main(replace(SMALL, **wrong))
