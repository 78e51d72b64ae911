r"""Instruction tuning of a causal language model, pruned by InfoBatch: LoRA on a LLaMA, or a small GPT-2 from scratch.

    python examples/language.py                                 # GPT-2 on made tasks: copying, sorting, adding
    python examples/language.py --data alpaca_data.json --model path/or/name --save adapter
    python examples/language.py --data alpaca_data.json --model huggyllama/llama-7b --subset dq.json --packed \
        --training.epochs 15 --training.batch-size 64 --training.lr 1.5e-4

The data are Alpaca's: a JSON list, or JSON lines, of {"instruction", "input", "output"}. The model is any of the LLaMA
family, with the tokenizer that lies beside it; LoRA is that of peft, and `--save` writes what it opens. `--packed` puts
several sequences into a row, with attention inside of each alone and positions from 0: the same losses at less padding.
It needs attention "sdpa" or "eager", and a model that takes position_ids.

The last line is the protocol of InfoBatch's paper, which reports 20 % less time, after a coreset of 1,000 records by
Dataset Quantization; it has not been run here. `--subset` is a JSON list of the records' numbers from 0, or what
`pretrain coreset features.npy --method graphcut` writes for features of all records.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import tyro
from fit import Training, device, fit
from language_adapter import Instruction, Sequences, means
from language_data import Bytes, Sample, collate, encoded, made, read_alpaca, split
from torch import nn
from torch.utils.data import DataLoader
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from pretrain import Indexed, InfoBatch
from pretrain.core.errors import UserError, exit_on_user_error
from pretrain.core.files import expand

HEADS = 4  # of a new model
MADE_LENGTH = 32  # tokens of the longest instruction that is made, at least


@dataclass(frozen=True)
class Lora:
    """Low-rank adaptation (Hu et al., 2021) of a model that is given; its own parameters are not trained.

    Attributes:
        rank: of the update of each matrix; 0: no LoRA, all parameters are trained.
        alpha: the update is scaled by alpha / rank.
        targets: names of the layers that are adapted, or all-linear.
    """

    rank: int = 8
    alpha: int = 16
    targets: tuple[str, ...] = ("all-linear",)


def opened(name: str, lora: bool) -> tuple[Any, Any]:
    """A causal language model and its tokenizer, by name or path.

    With LoRA it has its file's precision, but bfloat16 for float16, whose small gradients would need a scaled loss;
    without, float32, as small updates of half-precision parameters would be lost.

    Raises:
        UserError: they can't be opened.
    """
    try:
        half: Any = torch.bfloat16 if AutoConfig.from_pretrained(name).dtype == torch.float16 else "auto"
        network = AutoModelForCausalLM.from_pretrained(name, dtype=half if lora else torch.float32)
        return network, AutoTokenizer.from_pretrained(name)
    except Exception as error:  # of many types: no such name, no network, a damaged file
        message = str(error).strip().split("\n")[0]
        raise UserError(f"--model {name}: it is no causal language model with a tokenizer: {message}") from None


def with_lora(model: Any, lora: Lora) -> Any:
    """The model with adapters, which alone are trained.

    Raises:
        UserError: peft is missing, or the settings don't fit the model.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise UserError("LoRA needs peft, which is not installed; pip install peft, or --lora.rank 0") from None
    targets = "all-linear" if lora.targets == ("all-linear",) else [*lora.targets]
    config = LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=targets, task_type="CAUSAL_LM")
    try:
        adapted = get_peft_model(model, config)
    except ValueError as error:
        raise UserError(f"--lora: {' '.join(str(error).split())}") from None
    trained, total = adapted.get_nb_trainable_parameters()
    print(f"LoRA trains {trained:,} of {total:,} parameters")
    return adapted


@torch.no_grad()
def evaluate(model: nn.Module, adapter: Instruction, batches: Iterator[Sequences]) -> tuple[float, float, float]:
    """Mean loss of the answers, share of their tokens that are predicted correctly, and share of whole answers."""
    losses, tokens, answers = [], [], []
    for batch in batches:
        logits, target, sequence = adapter.logits(model, batch)
        correct = (logits.argmax(dim=-1) == target).float()
        losses.append(means(F.cross_entropy(logits, target, reduction="none"), sequence, len(batch.index)))
        tokens.append(correct)
        answers.append((means(correct, sequence, len(batch.index)) == 1).float())
    loss, by_token, by_answer = (torch.cat(some).mean().item() for some in (losses, tokens, answers))
    return loss, by_token, by_answer


def start(model: str | None, width: int, positions: int, lora: Lora) -> tuple[Any, Any]:
    """The network, on its device, and its tokenizer."""
    if model is None:
        config = GPT2Config(
            vocab_size=256, n_positions=positions, n_embd=width, n_layer=3, n_head=HEADS, bos_token_id=0, eos_token_id=0
        )
        network: Any = GPT2LMHeadModel(config)
        return network.to(device()), Bytes()
    network, tokenizer = opened(model, lora.rank != 0)
    return (with_lora(network, lora) if lora.rank else network).to(device()), tokenizer


def made_folder(name: str) -> Path:
    """A folder for `--save`; raise UserError if it can't be made."""
    try:
        expand(name).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--save {name}: it can't be made: {error.strerror}; give another folder") from None
    return expand(name)


def check_positions(model: Any, texts: list[Sample]) -> None:
    """Raise UserError if a sequence is longer than those the model can read."""
    most, longest = getattr(model.config, "max_position_embeddings", None), max(len(text.tokens) for text in texts)
    if most is not None and longest > most:
        raise UserError(f"a sequence has {longest} tokens, and the model's most are {most}; give --max-length {most}")


def main(
    model: str | None = None,
    data: str | None = None,
    subset: str | None = None,
    held_out: int = 500,
    max_length: int = 512,
    packed: bool = False,
    samples: int = 4000,
    width: int = 96,
    lora: Lora = Lora(),
    save: str | None = None,
    training: Training = Training(),
) -> float:
    """Train a language model and print its accuracy on held-out instructions.

    Args:
        model: name or path of a causal language model to start from; default: a new GPT-2 whose tokens are bytes.
        data: Alpaca's JSON; default: instructions that are made.
        subset: JSON file of the records of the data to train on; held out are some of the others.
        held_out: number of instructions to evaluate on.
        max_length: tokens of a sequence, and of a packed row, at most; longer answers are cut.
        packed: put several sequences into a row.
        samples: number of made instructions to train on.
        width: embedding dimension of a new model.
        lora: adapters of a model that is given.
        save: folder to write the trained model to, or with LoRA its adapters.
        training: settings of the training.
    """
    torch.manual_seed(training.seed)
    if min(samples, held_out) < 1 or width < 1 or width % HEADS:
        raise UserError(f"--samples and --held-out must be at least 1, and --width a multiple of {HEADS}")
    folder = made_folder(save) if save else None  # before the training, not after it
    if data:
        pairs = read_alpaca(data)
        numbers = split(len(pairs), held_out, subset, training.seed)
    elif subset is None:
        pairs = made(samples + held_out, training.seed)
        numbers = [*range(samples)], [*range(samples, samples + held_out)]
    else:
        raise UserError(f"--subset {subset} needs --data, whose records it names")
    network, tokenizer = start(model, width, max_length if data else MADE_LENGTH, lora)
    uses = zip(("train", "evaluate"), numbers, strict=True)
    train, test = (encoded(pairs, some, tokenizer, max_length, use) for use, some in uses)
    check_positions(network, [*train, *test])
    collated = partial(collate, width=max_length if packed else 0)

    def batches(texts: list[Sample], sampler: InfoBatch | None = None) -> Iterator[Sequences]:
        for batch in DataLoader(Indexed(texts), training.batch_size, sampler=sampler, collate_fn=collated):
            yield batch.to(device())

    adapter = Instruction(packed)
    fit(training, network, adapter, len(train), partial(batches, train))
    loss, by_token, by_answer = evaluate(network, adapter, batches(test))
    print(f"loss {loss:.4f}, accuracy of the answers' tokens {by_token:.3f}, of whole answers {by_answer:.3f}")
    if folder:
        network.save_pretrained(folder)
        if model:
            tokenizer.save_pretrained(folder)
        print(f"saved in {folder}")
    return by_token


if __name__ == "__main__":
    with exit_on_user_error():
        tyro.cli(main)
