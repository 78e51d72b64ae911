"""Reinforcement learning of a small language model by GRPO, with pruned prompts and completions.

    python examples/group_policy.py                                                  # every completion of every prompt
    python examples/group_policy.py --pruning.rule dppo --pruning.prompts 0.5 --output record.json

The instructions are those of language.py, and an answer is rewarded if it is exactly right. A short supervised training
comes first. Then prompts are the samples of InfoBatch, and group_policy_adapter.py chooses among their completions.

GRPO maximizes the expected reward of sampled completions, so that is the result, on held-out prompts. Only one
completion of a prompt is right, so its expected reward is the probability of the right answer, which one forward pass
gives without sampling. Exact match of greedy completions is reported beside it; it may fall while the expected reward
rises.
"""

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import tyro
from fit import Training, device, fit, write_json
from group_policy_adapter import GroupPolicy, Rollouts
from language_adapter import Instruction, Sequences, means
from language_data import Bytes, Sample, collate, encoded, made
from safetensors.torch import load_model, save_model
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel

from pretrain import Indexed, InfoBatch
from pretrain.core.errors import UserError, exit_on_user_error
from pretrain.core.rng import SampleRNG

END = Bytes.eos_token_id
HEADS = 4  # of the model's attention
ANSWER = 8  # maximum tokens of a completion: seven letters and the end token
LENGTH = 13 + ANSWER  # of a sequence; the longest prompts are "copy", "turn" or "sort", a space, 7 letters and "="
WARM_UP = 0.1  # share of the training in which the learning rate increases
HELD_OUT = 500  # prompts
WARM = 16000  # instructions of the supervised training
CHOICE = 1  # in the key of random numbers that choose completions; those that sample them have none


@dataclass(frozen=True)
class Pruning:
    """Settings of pruning.

    Attributes:
        rule: how completions are chosen: all, random, cppo (biased), dppo, proportional, nonzero.
        share: of the completions that the rule drops, in [0, 1); all and nonzero ignore it.
        prompts: share of the prompts with scores below the mean that an epoch skips, in [0, 1); 0: none.
    """

    rule: str = "all"
    share: float = 0.5
    prompts: float = 0.0


@dataclass(frozen=True)
class Settings:
    """Settings of the example.

    Attributes:
        pruning: of prompts and completions.
        epochs: passes over the prompts; a shorter run has fewer.
        lr: learning rate of AdamW; it increases linearly in the first tenth of the steps, then decreases linearly to 0.
        seed: of everything.
        output: JSON file for the record of the run.
        group: completions per prompt, G.
        prompts: number of prompts.
        batch_size: prompts per step.
        width: embedding dimension of the model.
        warm_epochs: epochs of the supervised training before.
        warm_lr: its learning rate.
        warm_models: folder for the models after it, one per seed; a model that is there is used.
    """

    pruning: Pruning = Pruning()
    epochs: int = 5
    lr: float = 2e-4
    seed: int = 0
    output: Path | None = None
    group: int = 8
    prompts: int = 2048
    batch_size: int = 64
    width: int = 96
    warm_epochs: int = 4
    warm_lr: float = 2e-3
    warm_models: Path | None = None


@torch.no_grad()
def evaluate(model: nn.Module, data: Sequences) -> tuple[float, float]:
    """Expected reward of a sampled completion, and share of greedy completions that are exactly right.

    Both are means over the prompts. Greedy completions are right where every token of the right answer is the most
    probable one.
    """
    logits, target, sequence = Instruction().logits(model, data)
    log_probability = -F.cross_entropy(logits, target, reduction="none")
    expected = logits.new_zeros(len(data.index)).index_add(0, sequence, log_probability).exp()
    exact = means((logits.argmax(dim=-1) == target).float(), sequence, len(data.index)) == 1
    return expected.mean().item(), exact.float().mean().item()


@torch.no_grad()
def rollouts(model: nn.Module, data: Sequences, uniform: Tensor) -> Rollouts:
    """Sample a group of completions for each prompt, and reward those that are exactly right with 1.

    The prompt's keys and values are computed once per group.

    Args:
        model: a causal language model of transformers.
        data: Q prompts and their right answers, one in a row.
        uniform: float32 [Q, G, ANSWER] in [0, 1); the token of cumulative probability `uniform` is drawn.

    Returns:
        The completions; sequences are padded to LENGTH.
    """
    count, groups = uniform.shape[:2]
    right = F.pad(data.tokens, (0, LENGTH - data.tokens.shape[1]), value=END)
    prompt = data.answer.int().argmax(dim=1)
    shown = torch.arange(LENGTH, device=prompt.device) < prompt[:, None]
    question = right.where(shown, END)
    last = int(prompt.max())
    cache = DynamicCache()
    returned: Any = model(
        input_ids=question[:, :last], attention_mask=shown[:, :last].long(), cache=cache, use_cache=True
    )
    row = torch.arange(count * groups, device=prompt.device)
    cache.batch_repeat_interleave(groups)
    start, visible = prompt.repeat_interleave(groups), shown[:, :last].long().repeat_interleave(groups, dim=0)
    logits = returned.logits[torch.arange(count, device=prompt.device), prompt - 1].repeat_interleave(groups, dim=0)
    tokens = question.repeat_interleave(groups, dim=0)
    old, length = torch.zeros(count * groups, LENGTH - 1, device=prompt.device), start.clone()
    unfinished = torch.ones_like(start, dtype=torch.bool)
    for step in range(ANSWER):
        log_probability = logits.float().log_softmax(dim=-1)
        cumulative = log_probability.exp().cumsum(dim=-1)
        drawn = (cumulative <= uniform.reshape(-1, ANSWER)[:, step, None] * cumulative[:, -1:]).sum(dim=-1)
        token = drawn.clamp(max=logits.shape[-1] - 1).where(unfinished, END)
        tokens[row, start + step] = token
        old[row, start + step - 1] = log_probability[row, token].where(unfinished, 0.0)
        length += unfinished
        unfinished &= token != END
        if step == ANSWER - 1 or not unfinished.any():
            break
        visible = torch.cat([visible, torch.ones_like(visible[:, :1])], dim=1)
        position = (start + step)[:, None]
        returned = model(input_ids=token[:, None], attention_mask=visible, position_ids=position, cache=cache)
        logits = returned.logits[:, -1]
    reward = (tokens == right.repeat_interleave(groups, dim=0)).all(dim=1) & ~unfinished
    shape = (count, groups)
    tokens, old = tokens.view(*shape, -1), old.view(*shape, -1)
    return Rollouts(tokens, prompt, length.view(shape), old, reward.float().view(shape), data.index)


def batches(samples: list[Sample], batch_size: int, sampler: InfoBatch | None = None) -> Iterator[Sequences]:
    """Padded batches on the device: an epoch of the sampler, or without one all samples in their order."""
    for batch in DataLoader(Indexed(samples), batch_size, sampler=sampler, collate_fn=collate):
        yield batch.to(device())


def warmed(settings: Settings, samples: list[Sample]) -> nn.Module:
    """A new model after supervised training on instructions with their answers."""
    torch.manual_seed(settings.seed)
    ends: dict[str, Any] = {"bos_token_id": END, "eos_token_id": END}
    # No dropout, so that the samples are those of the policy that is trained.
    dropout: dict[str, Any] = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    config = GPT2Config(
        vocab_size=256, n_positions=LENGTH, n_embd=settings.width, n_layer=3, n_head=HEADS, **ends, **dropout
    )
    model: Any = GPT2LMHeadModel(config)
    model.to(device())
    key = f"seed{settings.seed}-width{settings.width}-epochs{settings.warm_epochs}-lr{settings.warm_lr:g}.safetensors"
    file = settings.warm_models / key if settings.warm_models else None
    if file and file.is_file():
        load_model(model, file)
        return model
    training = Training(settings.warm_epochs, lr=settings.warm_lr, policy="full", seed=settings.seed)
    fit(training, model, Instruction(), len(samples), partial(batches, samples, training.batch_size))
    if file:
        file.parent.mkdir(parents=True, exist_ok=True)
        save_model(model, str(file))
    return model


class Cost:
    """Floating-point operations of rollouts and updates: 2 or 6 per parameter and token, and what was skipped.

    A prompt's tokens count once per group in a rollout, as their keys and values are shared, and once per kept
    completion in an update. Padding is not counted.
    """

    def __init__(self, model: nn.Module) -> None:
        self.parameters = sum(parameter.numel() for parameter in model.parameters())
        self.rollout = self.update = self.prompts = self.completions = self.kept = 0

    def add(self, batch: Rollouts, mask: Tensor) -> None:
        """Count a step; mask, bool [Q, G], is True for completions that are kept."""
        prompt, length = batch.prompt[:, None], batch.length
        self.rollout += 2 * self.parameters * int(prompt.sum() + (length - prompt).sum())
        self.update += 6 * self.parameters * int(length[mask].sum())
        self.prompts += len(mask)
        self.completions += mask.numel()
        self.kept += int(mask.sum())


def train(settings: Settings, model: nn.Module, data: list[Sample], held_out: Sequences) -> dict[str, Any]:
    """GRPO with one update per rollout; returns the record."""
    pruning, started = settings.pruning, time.perf_counter()
    adapter = GroupPolicy(pruning.rule, pruning.share)
    policy: dict[str, Any] = (
        {"policy": "infobatch", "prune_ratio": pruning.prompts} if pruning.prompts else {"policy": "full"}
    )
    infobatch = InfoBatch(settings.prompts, epochs=settings.epochs, anneal=0.0, seed=settings.seed, **policy)
    optimizer = torch.optim.AdamW(model.parameters(), settings.lr, weight_decay=0.0)
    cost, history = Cost(model), []

    def report(reward: float | None) -> None:
        expected, exact = evaluate(model, held_out)
        flops = {"rollout_flops": cost.rollout, "update_flops": cost.update}
        history.append({"expected_reward": expected, "exact_match": exact, "reward": reward, **flops})
        print(
            f"after {(cost.rollout + cost.update) / 1e9:,.1f} GFLOPs  expected reward {expected:.4f}  "
            f"greedy exact match {exact:.3f}  mean reward of the rollouts {reward}"
        )

    report(None)
    for epoch in infobatch.epochs():
        rewards = []
        for prompts in batches(data, settings.batch_size, infobatch):
            index = prompts.index
            progress = infobatch.progress
            optimizer.param_groups[0]["lr"] = settings.lr * min(progress / WARM_UP, 1) * (1 - progress)
            rng = SampleRNG(settings.seed, epoch, index=index)
            batch = rollouts(model, prompts, rng.uniform(settings.group, ANSWER))
            cost.add(batch, adapter.chosen(batch, SampleRNG(settings.seed, epoch, CHOICE, index=index))[1])
            losses = adapter(model, batch, SampleRNG(settings.seed, epoch, CHOICE, index=index))
            loss = infobatch(losses.loss, index, losses.score)
            if loss.requires_grad:  # else no completion of the batch was kept
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            rewards.append(batch.reward.mean().item())
        report(round(sum(rewards) / len(rewards), 4))
    return {
        "settings": {**asdict(settings), "output": None, "warm_models": None},
        "cost": {
            "samples_used": cost.kept,
            "flops": cost.rollout + cost.update,
            "seconds": time.perf_counter() - started,
        },
        "quality": {metric: history[-1][metric] for metric in ("expected_reward", "exact_match")},
        "before": {metric: history[0][metric] for metric in ("expected_reward", "exact_match")},
        "rollout_flops": cost.rollout,
        "update_flops": cost.update,
        "prompts_skipped": 1 - cost.prompts / (settings.prompts * settings.epochs),
        "completions_skipped": 1 - cost.kept / cost.completions,
        "history": history,
    }


def check(settings: Settings) -> None:
    """Raise a UserError where a setting is out of its range."""
    pruning = settings.pruning
    for name, value, good, allowed in (
        ("pruning.prompts", pruning.prompts, 0 <= pruning.prompts < 1, "in [0, 1)"),
        ("epochs", settings.epochs, settings.epochs >= 1, "at least 1"),
        ("lr", settings.lr, settings.lr > 0, "above 0"),
        ("group", settings.group, settings.group >= 2, "at least 2 (the advantage of a single completion is 0)"),
        ("prompts", settings.prompts, settings.prompts >= 1, "at least 1"),
        ("batch-size", settings.batch_size, settings.batch_size >= 1, "at least 1"),
        ("width", settings.width, settings.width >= 1 and settings.width % HEADS == 0, f"a multiple of {HEADS}"),
        ("warm-epochs", settings.warm_epochs, settings.warm_epochs >= 1, "at least 1"),
        ("warm-lr", settings.warm_lr, settings.warm_lr > 0, "above 0"),
    ):
        if not good:
            raise UserError(f"--{name} must be {allowed}, got {value}")
    try:
        GroupPolicy(pruning.rule, pruning.share)
    except ValueError as error:
        raise UserError(str(error)) from None


def main(settings: Settings) -> dict[str, Any]:
    """Train a language model, print its expected reward on held-out prompts and the cost, and return the record.

    Raises:
        UserError: a setting is out of its range.
    """
    check(settings)
    pairs = made(WARM + settings.prompts + HELD_OUT, settings.seed)
    ends = (0, WARM, WARM + settings.prompts, len(pairs))
    uses = zip(("warm up", "train", "evaluate"), pairwise(ends), strict=True)
    warm, data, held_out = (encoded(pairs, range(*span), Bytes(), LENGTH, use) for use, span in uses)
    model = warmed(settings, warm)
    record = train(settings, model, data, next(batches(held_out, HELD_OUT)))
    before, after = record["before"], record["quality"]
    print(
        f"expected reward {before['expected_reward']:.4f} -> {after['expected_reward']:.4f}, "
        f"greedy exact match {before['exact_match']:.3f} -> {after['exact_match']:.3f}, "
        f"rollouts {record['rollout_flops'] / 1e9:,.1f} GFLOPs, updates {record['update_flops'] / 1e9:,.1f} GFLOPs, "
        f"skipped {record['prompts_skipped']:.1%} of prompts, {record['completions_skipped']:.1%} of completions"
    )
    write_json(settings.output, record)
    return record


if __name__ == "__main__":
    with exit_on_user_error():
        try:
            main(tyro.cli(Settings))
        except FloatingPointError as error:
            raise UserError(f"{error}; try a smaller --lr or --warm-lr") from None
