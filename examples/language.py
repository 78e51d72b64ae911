"""Instruction tuning of a small causal language model, pruned by InfoBatch.

    python examples/language.py                      # a small GPT-2 from scratch, instructions made here
    python examples/language.py --model path/or/name # any causal model of Hugging Face whose tokens are bytes

Instructions are made by the script: copying, reversing, sorting letters, adding numbers; easy ones and hard ones.
"""

import random
from collections.abc import Iterable

import torch
import tyro
from fit import Training, device, fit
from language_adapter import Instruction, Sequences
from torch import nn
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from pretrain import Indexed, InfoBatch
from pretrain.core.errors import exit_on_user_error

LENGTH, END = 32, 0


def instructions(count: int, seed: int) -> list[tuple[str, str]]:
    """Instructions and their answers."""
    rng = random.Random(seed)
    made = []
    for _ in range(count):
        word = "".join(rng.choices("abcdefgh", k=rng.randint(2, 7)))
        a, b = rng.randint(0, 20), rng.randint(0, 20)
        tasks = {"copy " + word: word, "turn " + word: word[::-1], "sort " + word: "".join(sorted(word))}
        made.append(rng.choice([*tasks.items(), (f"add {a} {b}", str(a + b))]))
    return made


def encoded(pairs: list[tuple[str, str]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens, int64 [N, LENGTH], and which of them are the answer and its end, bool [N, LENGTH]."""
    tokens = torch.full((len(pairs), LENGTH), END)
    answer = torch.zeros(len(pairs), LENGTH, dtype=torch.bool)
    for row, (instruction, reply) in enumerate(pairs):
        text = torch.tensor([*f"{instruction}=".encode(), *reply.encode(), END])
        tokens[row, : len(text)] = text
        answer[row, len(instruction) + 1 : len(text)] = True
    return tokens, answer


@torch.no_grad()
def right(model: nn.Module, adapter: Instruction, batch: Sequences) -> tuple[float, float]:
    """Share of the answers' tokens that are the likeliest ones, and of the answers that consist of such alone."""
    logits, target, answer = adapter.tokens(model, batch)
    found = logits.argmax(dim=-1) == target
    return found[answer].float().mean().item(), (found | ~answer).all(dim=1).float().mean().item()


def main(model: str | None = None, samples: int = 4000, width: int = 96, training: Training = Training()) -> float:
    """Train and report how held-out instructions are answered.

    Args:
        model: a causal language model to start from, by name or path; a new one where not given.
        samples: instructions to train on.
        width: of a new model.
        training: how long and on whom.
    """
    torch.manual_seed(training.seed)
    new = GPT2Config(
        vocab_size=256, n_positions=LENGTH, n_embd=width, n_layer=3, n_head=4, bos_token_id=END, eos_token_id=END
    )
    network = (AutoModelForCausalLM.from_pretrained(model) if model else GPT2LMHeadModel(new)).to(device())
    pairs = instructions(samples + 500, training.seed)
    tokens, answer = encoded(pairs)
    data, adapter = Indexed(torch.utils.data.TensorDataset(tokens[:samples], answer[:samples])), Instruction()

    def batches(infobatch: InfoBatch) -> Iterable[Sequences]:
        for index, *fields in DataLoader(data, training.batch_size, sampler=infobatch):
            yield Sequences(*(field.to(device()) for field in fields), index)

    fit(training, network, adapter, samples, batches)
    held_out = Sequences(tokens[samples:].to(device()), answer[samples:].to(device()), torch.arange(500))
    tokens_right, answers_right = right(network, adapter, held_out)
    print(f"{tokens_right:.3f} of the answers' tokens right, {answers_right:.3f} of the answers")
    return tokens_right


if __name__ == "__main__":
    with exit_on_user_error():
        tyro.cli(main)
