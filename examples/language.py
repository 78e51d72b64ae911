"""Instruction tuning of a small causal language model, pruned by InfoBatch.

    python examples/language.py                      # a small GPT-2 from scratch
    python examples/language.py --model path/or/name # a causal model of Hugging Face whose tokens are bytes

The script makes the instructions: copying, reversing and sorting letters, adding numbers.
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
    """Pairs of an instruction and its answer."""
    rng = random.Random(seed)
    made = []
    for _ in range(count):
        word = "".join(rng.choices("abcdefgh", k=rng.randint(2, 7)))
        a, b = rng.randint(0, 20), rng.randint(0, 20)
        tasks = {"copy " + word: word, "turn " + word: word[::-1], "sort " + word: "".join(sorted(word))}
        made.append(rng.choice([*tasks.items(), (f"add {a} {b}", str(a + b))]))
    return made


def encoded(pairs: list[tuple[str, str]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens, int64 [N, LENGTH], and a mask of the answers with their end tokens, bool [N, LENGTH]."""
    tokens = torch.full((len(pairs), LENGTH), END)
    answer = torch.zeros(len(pairs), LENGTH, dtype=torch.bool)
    for row, (instruction, reply) in enumerate(pairs):
        text = torch.tensor([*f"{instruction}=".encode(), *reply.encode(), END])
        tokens[row, : len(text)] = text
        answer[row, len(instruction) + 1 : len(text)] = True
    return tokens, answer


@torch.no_grad()
def accuracy(model: nn.Module, adapter: Instruction, batch: Sequences) -> tuple[float, float]:
    """Share of the answers' tokens that are predicted correctly, and of the answers of which all tokens are."""
    logits, target, answer = adapter.tokens(model, batch)
    correct = logits.argmax(dim=-1) == target
    return correct[answer].float().mean().item(), (correct | ~answer).all(dim=1).float().mean().item()


def main(model: str | None = None, samples: int = 4000, width: int = 96, training: Training = Training()) -> float:
    """Train a language model and print its accuracy on held-out instructions.

    Args:
        model: name or path of a causal language model to start from; default: a new one.
        samples: number of instructions to train on.
        width: embedding dimension of a new model.
        training: settings of the training.
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
    by_token, by_answer = accuracy(network, adapter, held_out)
    print(f"accuracy of the answers' tokens {by_token:.3f}, of whole answers {by_answer:.3f}")
    return by_token


if __name__ == "__main__":
    with exit_on_user_error():
        tyro.cli(main)
