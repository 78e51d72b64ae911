"""Instructions with answers: Alpaca's file or made ones, as tokens, in padded or packed batches."""

import json
import random
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from language_adapter import Sequences
from torch import Tensor

from pretrain.core.errors import UserError
from pretrain.core.files import expand
from pretrain.core.rng import generator
from pretrain.data.subset import read_subset

# Alpaca's prompts (github.com/tatsu-lab/stanford_alpaca), without and with an input.
TASK = "Below is an instruction that describes a task{}. Write a response that appropriately completes the request.\n\n"
CONTEXT = ", paired with an input that provides further context"


class Sample(NamedTuple):
    """An instruction with its answer."""

    tokens: Tensor  # int64 [L]; the answer's last one is the end token, unless it was cut
    prompt: int  # tokens before the answer


class Bytes:
    """A tokenizer whose tokens are bytes; 0 is the end token."""

    eos_token_id = 0

    def __call__(self, texts: Sequence[str], add_special_tokens: bool = True) -> dict[str, list[list[int]]]:
        """The tokens of texts."""
        return {"input_ids": [[*text.encode()] for text in texts]}


def made(count: int, seed: int) -> list[tuple[str, str]]:
    """Pairs of an instruction and its answer: copying, reversing and sorting letters, adding numbers."""
    rng = random.Random(seed)
    pairs = []
    for _ in range(count):
        word = "".join(rng.choices("abcdefgh", k=rng.randint(2, 7)))
        a, b = rng.randint(0, 20), rng.randint(0, 20)
        tasks = {"copy " + word: word, "turn " + word: word[::-1], "sort " + word: "".join(sorted(word))}
        instruction, answer = rng.choice([*tasks.items(), (f"add {a} {b}", str(a + b))])
        pairs.append((f"{instruction}=", answer))
    return pairs


def prompt(instruction: str, context: str = "") -> str:
    """Alpaca's prompt, which the answer follows."""
    parts = [TASK.format(CONTEXT if context else ""), f"### Instruction:\n{instruction}\n\n"]
    parts += [f"### Input:\n{context}\n\n"] if context else []
    return "".join([*parts, "### Response:"])


def read_alpaca(file: str) -> list[tuple[str, str]]:
    """Prompts and answers of a JSON list, or JSON lines, of {"instruction", "input", "output"}; "input" may be absent.

    Raises:
        UserError: the file can't be read, or a record is not of this form.
    """
    try:
        text = expand(file).read_text(encoding="utf-8-sig")
        lines = [line for line in text.split("\n") if line.strip()]
        records = json.loads(text) if text.lstrip().startswith("[") else [json.loads(line) for line in lines]
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"--data {file}: it can't be read as a JSON list or JSON lines: {error}") from None
    if not records:
        raise UserError(f"--data {file}: it has no records; give a JSON list or JSON lines of Alpaca's form")
    pairs = []
    for number, record in enumerate(records):
        fields = {"input": "", **record} if isinstance(record, dict) else {}
        texts: Any = [fields.get(name) for name in ("instruction", "input", "output")]
        if not all(isinstance(text, str) for text in texts):
            raise UserError(
                f'--data {file}: record {number} must have the texts "instruction" and "output", and "input" if any'
            )
        pairs.append((prompt(*texts[:2]), texts[2]))
    return pairs


def split(count: int, held_out: int, subset: str | None, seed: int) -> tuple[list[int], list[int]]:
    """Records to train on, of `count`, and `held_out` others that are drawn uniformly from those outside the subset.

    Raises:
        UserError: the subset can't be used, or too few records are left.
    """
    chosen = list(range(count))
    if subset is not None:
        try:
            found = read_subset(subset, count)
        except UserError as error:
            text = str(error).replace("--data.subset", "--subset").replace(" with the same --data.* settings", "")
            raise UserError(text.replace("training images", "records")) from None
        if found.weights is not None:
            raise UserError(f"--subset {subset}: it has weights, which this program does not use; give one without")
        chosen = found.index.tolist()
    others = sorted({*range(count)} - {*chosen}) if subset is not None else chosen
    left = len(others) - (subset is None)
    if not 0 < held_out <= left:
        raise UserError(
            f"--held-out {held_out}: it must be at least 1, and {left:,} records can be held out; give fewer"
        )
    order = torch.randperm(len(others), generator=generator(seed))[:held_out].tolist()
    test = sorted(others[i] for i in order)
    return sorted({*chosen} - {*test}), test


def encoded(
    pairs: Sequence[tuple[str, str]], numbers: Sequence[int], tokenizer: Any, max_length: int, use: str
) -> list[Sample]:
    """Tokens of the prompts and answers of these numbers, with end tokens; prints how many are cut, and their use.

    Prompts and answers become tokens separately, so that the prompt's are those that a user will generate from.

    Raises:
        UserError: the tokenizer has no end token, or nothing is left of an answer.
    """
    end = tokenizer.eos_token_id
    if end is None:
        raise UserError("--model: its tokenizer has no end token (eos_token); give a model whose tokenizer has one")
    prompts = tokenizer([pairs[number][0] for number in numbers])["input_ids"]
    prompts = [tokens[:-1] if tokens[-1] == end else tokens for tokens in prompts]  # some tokenizers add one
    answers = tokenizer([pairs[number][1] for number in numbers], add_special_tokens=False)["input_ids"]
    lost = [number for number, tokens in zip(numbers, prompts, strict=True) if len(tokens) >= max_length]
    if lost:
        raise UserError(
            f"--max-length {max_length}: nothing is left of {len(lost):,} of {len(numbers):,} answers, the first that "
            f"of record {lost[0]}; give at least {max(map(len, prompts)) + 1}, or remove these records"
        )
    samples = [Sample(torch.tensor([*a, *b, end]), len(a)) for a, b in zip(prompts, answers, strict=True)]
    cut = sum(len(sample.tokens) > max_length for sample in samples)
    mean = sum(len(sample.tokens) for sample in samples) / len(samples)
    print(
        f"{len(samples):,} sequences to {use} on, of {mean:.0f} tokens on average; {cut:,} are cut to --max-length "
        f"{max_length}"
    )
    return [Sample(sample.tokens[:max_length], sample.prompt) for sample in samples]


def packed_rows(lengths: Sequence[int], width: int) -> list[list[int]]:
    """Rows of sequences, at most `width` tokens in each: first fit, the longest first."""
    rows: list[list[int]] = []
    free: list[int] = []  # tokens that still fit
    for number in sorted(range(len(lengths)), key=lambda number: -lengths[number]):
        fits = [row for row, tokens in enumerate(free) if tokens >= lengths[number]]
        if not fits:
            rows.append([])
            free.append(width)
        row = fits[0] if fits else len(rows) - 1
        rows[row].append(number)
        free[row] -= lengths[number]
    return rows


def collate(items: Sequence[tuple[int, Tensor, int]], width: int = 0) -> Sequences:
    """A batch of (index, tokens, prompt): padded on the right, or with a width packed into rows of at most so many."""
    lengths = [len(tokens) for _, tokens, _ in items]
    rows = packed_rows(lengths, width) if width else [[number] for number in range(len(items))]
    shape = (len(rows), max(sum(lengths[number] for number in row) for row in rows))
    tokens, sequence, position = torch.zeros(3, *shape, dtype=torch.int64)
    sequence.fill_(-1)
    answer = torch.zeros(shape, dtype=torch.bool)
    for row, members in enumerate(rows):
        start = 0
        for number in members:
            _, text, before = items[number]
            place = (row, slice(start, start + len(text)))
            tokens[place], sequence[place], position[place] = text, number, torch.arange(len(text))
            answer[row, start + before : start + len(text)] = True
            start += len(text)
    return Sequences(tokens, sequence, position, answer, torch.tensor([index for index, _, _ in items]))
