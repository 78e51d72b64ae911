"""The example of instruction tuning, on a LLaMA that is made here."""

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import tyro
from conftest import ROOT
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

sys.path.insert(0, str(ROOT / "examples"))  # as for a script that is started there

import language
from fit import Training, fit
from language_adapter import Instruction
from language_data import Bytes, collate, encoded, packed_rows, prompt, read_alpaca, split

from pretrain.core.errors import UserError, exit_on_user_error
from pretrain.core.rng import generator

pytestmark = pytest.mark.filterwarnings("ignore:::transformers", "ignore:::peft")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a LLaMA of two layers and a tokenizer of bytes, with start and end tokens."""
    folder = tmp_path_factory.mktemp("llama")
    vocabulary = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({token: number for number, token in enumerate(vocabulary)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    torch.manual_seed(0)
    sizes: Any = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "max_position_embeddings": 300}
    heads: Any = {"num_attention_heads": 4, "num_key_value_heads": 2, "bos_token_id": 0, "eos_token_id": 1}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(vocabulary), **sizes, **heads)).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def alpaca(tmp_path_factory: pytest.TempPathFactory) -> str:
    """60 records, every third with an input."""
    letters = "abcdefgh"
    records = [
        {
            "instruction": f"Say {letters[i % 8]}.",
            "input": letters[i % 5] if i % 3 == 0 else "",
            "output": letters[i % 8],
        }
        for i in range(60)
    ]
    file = tmp_path_factory.mktemp("data") / "alpaca.json"
    file.write_text(json.dumps(records))
    return str(file)


def fails(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """The last line, with which the program ends at an error."""
    with pytest.raises(SystemExit) as ended, exit_on_user_error():
        tyro.cli(language.main, args=[*map(str, words)])
    assert ended.value.code == 2
    printed = capsys.readouterr().err
    assert "Traceback" not in printed
    return printed.splitlines()[-1]  # after transformers' progress bars


def texts(count: int, seed: int, longest: int = 40) -> list[tuple[int, torch.Tensor, int]]:
    """Index, random tokens and the prompt's length of sequences of random lengths."""
    rng = generator(seed)
    lengths = torch.randint(2, longest, (count,), generator=rng).tolist()
    prompts = [int(torch.randint(1, length, (), generator=rng)) for length in lengths]
    tokens = [torch.randint(200, (length,), generator=rng) for length in lengths]
    return [*zip(range(7, 7 + count), tokens, prompts, strict=True)]


def test_made_instructions_are_learned(capsys) -> None:
    training = Training(epochs=6, batch_size=32, lr=4e-3)
    trained = language.main(samples=1500, width=64, training=training)
    used, full = re.search(r"([\d,]+) samples used instead of ([\d,]+)", capsys.readouterr().out).groups()
    assert int(used.replace(",", "")) < 0.9 * int(full.replace(",", ""))
    assert trained > 0.3 > language.main(samples=100, width=64, training=Training(epochs=1))


def test_rows_hold_every_sequence_once_and_are_full_enough() -> None:
    """By first fit at most one row is half empty."""
    for seed in range(30):
        lengths = [len(tokens) for _, tokens, _ in texts(1 + seed, seed)]
        rows = packed_rows(lengths, 40)
        assert sorted(number for row in rows for number in row) == [*range(len(lengths))]
        full = sorted(sum(lengths[number] for number in row) for row in rows)
        assert full[-1] <= 40 and all(2 * some > 40 for some in full[1:])


@pytest.mark.parametrize("name", ["llama", "gpt2", "eager"])
def test_packed_losses_and_gradients_are_those_of_padded_ones(name: str, llama: str) -> None:
    """Each is the model's own loss of the sequence alone: no padding, no prompt and no other sequence is part of it."""
    torch.manual_seed(0)
    settings = {"attn_implementation": "eager"} if name == "eager" else {}
    model: Any = language.start(None, 32, 64, language.Lora())[0] if name == "gpt2" else None
    model = model or AutoModelForCausalLM.from_pretrained(llama, **settings)
    model = model.cpu().eval()
    for parameter in model.parameters():  # so that attention matters
        parameter.data *= 4 if parameter.ndim > 1 else 1
    for seed in range(5):
        items = texts(9, seed)
        padded, packed = collate(items), collate(items, 64)
        assert len(packed.tokens) < len(padded.tokens) == 9 and packed.index.tolist() == [*range(7, 16)]
        found = []
        for adapter, batch in ((Instruction(), padded), (Instruction(packed=True), packed)):
            model.zero_grad()
            losses = adapter(model, batch).loss
            (losses * torch.arange(9)).sum().backward()
            found.append((losses.detach(), [parameter.grad.clone() for parameter in model.parameters()]))
        torch.testing.assert_close(*(losses for losses, _ in found), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(*(gradients for _, gradients in found), rtol=1e-3, atol=1e-4)
        for (_, tokens, before), loss in zip(items, found[0][0], strict=True):
            labels = tokens.clone()
            labels[:before] = -100
            torch.testing.assert_close(model(tokens[None], labels=labels[None]).loss.detach(), loss)
        unmasked = Instruction()(model, packed).loss
        assert not torch.allclose(unmasked, found[0][0], rtol=0.003)


def test_alpacas_records_become_prompts(tmp_path: Path, alpaca: str) -> None:
    assert prompt("Sort.", "b a") == (
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
        "response that appropriately completes the request.\n\n### Instruction:\nSort.\n\n### Input:\nb a\n\n"
        "### Response:"
    )
    assert prompt("Go.") == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nGo.\n\n### Response:"
    )
    pairs = read_alpaca(alpaca)
    assert len(pairs) == 60 and pairs[3] == (prompt("Say d.", "d"), "d") and pairs[1] == (prompt("Say b."), "b")
    lines = tmp_path / "alpaca.jsonl"
    lines.write_text("\n".join(map(json.dumps, json.loads(Path(alpaca).read_text()))) + "\n\n")
    assert read_alpaca(str(lines)) == pairs
    for text, message in {
        '[{"instruction": "a", "output": "b"}, {"instruction": "a"}]': "record 1 must have the texts",
        '[{"instruction": "a", "output": 3}]': "record 0 must have the texts",
        "[3]": "record 0 must have the texts",
        '{"instruction": "a", ': "it can't be read as a JSON list or JSON lines",
        "": "it has no records",
    }.items():
        lines.write_text(text)
        with pytest.raises(UserError, match=message):
            read_alpaca(str(lines))


def test_long_answers_are_cut_and_counted_and_none_vanishes(capsys) -> None:
    pairs = [("ab", "c" * length) for length in range(8)]
    samples = encoded(pairs, range(1, 8), Bytes(), 6, "train")
    assert "7 sequences to train on, of 7 tokens on average; 4 are cut to --max-length 6" in capsys.readouterr().out
    assert [len(sample.tokens) for sample in samples] == [4, 5, 6, 6, 6, 6, 6] and samples[0].tokens.tolist()[-1] == 0

    class Ending(Bytes):
        """Adds the end token to prompts, as some tokenizers do."""

        def __call__(self, texts: Any, add_special_tokens: bool = True) -> dict[str, list[list[int]]]:
            return {"input_ids": [[*text.encode()] + [0] * add_special_tokens for text in texts]}

    for one, other in zip(samples, encoded(pairs, range(1, 8), Ending(), 6, "train"), strict=True):
        assert torch.equal(one.tokens, other.tokens) and one.prompt == other.prompt
    with pytest.raises(
        UserError, match="nothing is left of 1 of 2 answers, the first that of record 5; give at least 8"
    ):
        encoded([*pairs[:5], ("abcdefg", "h")], [4, 5], Bytes(), 7, "train")


def test_records_are_held_out_from_those_that_are_not_trained_on(tmp_path: Path) -> None:
    train, test = split(50, 10, None, 0)
    assert sorted([*train, *test]) == [*range(50)] and len(test) == 10 and test != split(50, 10, None, 1)[1]
    file = tmp_path / "subset.json"
    file.write_text(json.dumps({"indices": [7, 3, 30], "size": 50}))
    train, test = split(50, 10, str(file), 0)
    assert train == [3, 7, 30] and len({*test} - {3, 7, 30}) == 10
    for count, held_out, message in (
        (50, 48, "47 records can"),
        (50, 0, "at least 1"),
        (40, 2, "--subset .* 50 records"),
    ):
        with pytest.raises(UserError, match=message):
            split(count, held_out, str(file), 0)
    file.write_text(json.dumps({"indices": [1, 2], "weights": [1, 3]}))
    with pytest.raises(UserError, match="it has weights"):
        split(50, 10, str(file), 0)


def test_lora_trains_adapters_alone_and_they_can_be_reopened(llama: str, alpaca: str, tmp_path: Path, capsys) -> None:
    from peft import AutoPeftModelForCausalLM

    subset = tmp_path / "subset.json"
    subset.write_text(json.dumps([*range(40)]))
    words = ["--model", llama, "--data", alpaca, "--subset", subset, "--held-out", 8, "--packed", "--save"]
    words += [tmp_path / "adapter", "--lora.rank", 4, "--training.epochs", 4, "--training.lr", 1e-2]
    tyro.cli(language.main, args=[*map(str, words)])
    printed = capsys.readouterr().out
    first, last = (float(value) for value in re.findall(r"epoch [14]/4  loss ([\d.]+)", printed))
    assert (
        last < first
        and "LoRA trains" in printed
        and "40 sequences to train on" in printed
        and "samples used instead of 160" in printed
    )
    assert {path.name for path in (tmp_path / "adapter").glob("*.safetensors")} == {"adapter_model.safetensors"}

    base: Any
    base, (network, tokenizer) = AutoModelForCausalLM.from_pretrained(llama), language.opened(llama, True)
    torch.manual_seed(0)
    network = language.with_lora(network, language.Lora(rank=4))
    samples = encoded(read_alpaca(alpaca), range(40), tokenizer, 300, "train")
    batch = collate([(i, *sample) for i, sample in enumerate(samples)])
    fit(Training(epochs=1, lr=1e-2), network, Instruction(), 40, lambda infobatch: [batch])
    for name, value in network.named_parameters():
        name = name.removeprefix("base_model.model.").replace(".base_layer", "")
        assert value.requires_grad == ("lora_" in name)
        assert "lora_" in name or torch.equal(value, base.get_parameter(name))
    assert network.get_nb_trainable_parameters()[0] == sum(
        4 * sum(layer.weight.shape) for name, layer in base.named_modules() if "_proj" in name
    )
    network.save_pretrained(tmp_path / "again")
    reopened = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "again")
    with torch.no_grad():
        expected = network(batch.tokens).logits
        torch.testing.assert_close(reopened(batch.tokens).logits, expected)
        assert not torch.allclose(base(batch.tokens).logits, expected, atol=1e-3)
    assert AutoTokenizer.from_pretrained(tmp_path / "adapter")("ab")["input_ids"] == tokenizer("ab")["input_ids"]


def test_all_parameters_are_trained_without_lora(llama: str, alpaca: str, tmp_path: Path) -> None:
    training = Training(epochs=1)
    settings: dict[str, Any] = {"held_out": 8, "training": training, "lora": language.Lora(rank=0)}
    language.main(llama, alpaca, save=str(tmp_path / "model"), **settings)
    saved, base = (AutoModelForCausalLM.from_pretrained(path) for path in (tmp_path / "model", llama))
    assert not any(torch.equal(value, base.get_parameter(name)) for name, value in saved.named_parameters())


def test_half_precision_is_for_frozen_parameters(llama: str, tmp_path: Path) -> None:
    for dtype, frozen in ((torch.float16, torch.bfloat16), (torch.bfloat16, torch.bfloat16)):
        AutoModelForCausalLM.from_pretrained(llama, dtype=dtype).save_pretrained(tmp_path)
        AutoTokenizer.from_pretrained(llama).save_pretrained(tmp_path)
        assert {value.dtype for value in language.opened(str(tmp_path), False)[0].parameters()} == {torch.float32}
        network = language.start(str(tmp_path), 32, 64, language.Lora())[0]
        kinds = {"lora_" in name: value.dtype for name, value in network.named_parameters()}
        assert kinds == {True: torch.float32, False: frozen}
        padded, packed = (collate(texts(5, 0), width).to(network.device) for width in (0, 64))
        both = Instruction()(network, padded).loss, Instruction(packed=True)(network, packed).loss
        assert both[0].dtype == torch.float32
        torch.testing.assert_close(*both, rtol=0.02, atol=0.02)


def test_what_does_not_fit_is_one_line(llama: str, alpaca: str, tmp_path: Path, capsys, monkeypatch) -> None:
    data = ["--data", alpaca, "--held-out", 5]
    assert "--width a multiple of 4" in fails(capsys, "--width", 30)
    (tmp_path / "file").write_text("")
    assert "--save" in fails(capsys, "--save", tmp_path / "file")
    assert "--subset x.json needs --data" in fails(capsys, "--subset", "x.json")
    assert f"--model {tmp_path}: it is no causal language model" in fails(capsys, *data, "--model", tmp_path)
    assert "--data x.json: it can't be read" in fails(capsys, "--data", "x.json")
    assert "--lora" in fails(capsys, *data, "--model", llama, "--lora.targets", "query")
    file = tmp_path / "long.jsonl"
    file.write_text("\n".join(json.dumps({"instruction": "Count.", "output": "1" * count}) for count in (400, 1)))
    found = fails(capsys, "--model", llama, "--data", file, "--held-out", 1, "--max-length", 600)
    assert "a sequence has" in found and "give --max-length 300" in found
    monkeypatch.setitem(sys.modules, "peft", None)
    assert "LoRA needs peft, which is not installed; pip install peft" in fails(capsys, *data, "--model", llama)
