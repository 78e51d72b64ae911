"""From a command line and a YAML file to a config.

A YAML file is turned into command-line arguments, so both are checked by the same code (tyro). Nothing
here imports torch: `--help` and a refused setting come at once.
"""

import contextlib
import dataclasses
import functools
import io
import os
import re
import sys
import types
import typing
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import tyro
import yaml

from pretrain.config import registry, trusted_code
from pretrain.config.schema import AdapterSection, Config, ModelSection, flat
from pretrain.core.errors import UserError, exit_on_user_error

# Of C++ warnings torch makes stack traces, which bury the sentence of what happened (distributed/heartbeat.py says it).
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")


def _settings(cls: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every setting's dotted name and type."""
    hints = typing.get_type_hints(cls)
    for item in dataclasses.fields(cls):
        if dataclasses.is_dataclass(hints[item.name]):
            yield from _settings(hints[item.name], f"{prefix}{item.name}.")
        else:
            yield prefix + item.name, hints[item.name]


def _unknown(name: str, known: Sequence[str], source: str) -> UserError:
    near = get_close_matches(name.replace("-", "_"), known, 1, 0.5)
    near = near or [other for other in known if other.split(".")[-1] == name.split(".")[-1]]
    return UserError(
        f"{source}there is no setting {name!r}{f'; did you mean {near[0]!r}?' if near else ''} (--help lists them)"
    )


class _Plain(yaml.SafeLoader):
    """Plain values: without aliases, by which a small file can be endless, and no name twice."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError(f"*{self.peek_event().anchor} stands for something else; write it out")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for name in names:
            if names.count(name) > 1:
                raise yaml.YAMLError(f"{name} is given twice")
        return super().construct_mapping(node, deep)


def _read_yaml(path: Path) -> dict[str, Any]:
    """A recipe's settings by dotted name."""
    if not path.is_file():
        near = get_close_matches(path.name, [item.name for item in path.parent.glob("*.yaml")], 1, 0.3)
        raise UserError(f"--config {path}: there is no such file{f'; did you mean {near[0]}?' if near else ''}")
    try:
        tree = _Plain(path.read_text()).get_single_data()
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"--config {path}: not plain YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise UserError(f"--config {path}: a recipe is settings, `name: value`, got {type(tree).__name__}")
    # As on the command line, a section's own name is short for its first setting: `adapter: flow`.
    first = {"adapter": "adapter.name", "model": "model.name", "data": "data.source"}
    return {first.get(name, name): value for name, value in flat({str(k): v for k, v in tree.items()}).items()}


def _arguments(settings: dict[str, Any], cls: type, source: str) -> list[str]:
    """The command line that says what a YAML file says."""
    known = dict(_settings(cls))
    arguments: list[str] = []
    for name, value in settings.items():
        if name not in known:
            raise _unknown(name, list(known), source)
        if known[name] is bool:
            if not isinstance(value, bool):
                raise UserError(f"{source}{name} must be true or false, got {value!r}")
            head, _, leaf = name.rpartition(".")
            arguments.append(f"--{head}{'.' if head else ''}{'' if value else 'no-'}{leaf}")
        elif isinstance(value, list):
            if typing.get_origin(known[name]) is not tuple:
                raise UserError(f"{source}{name} must be one value, got the list {value}")
            arguments += [f"--{name}", *map(str, value)]
        else:
            arguments.append(f"--{name}={value}")
    return arguments


def _sentence(box: str) -> str:
    """Tyro's first paragraph, out of its frame and in the user's words."""
    lines = [re.sub(r"^[│|]\s?|\s*[│|]$", "", line).strip() for line in box.splitlines()]
    text: list[str] = []
    for line in lines[1:]:
        if not line.strip("─-╰╯+"):  # a rule, of whatever characters the terminal has
            if text:
                break
            continue
        text.append(line)
    if text and text[0].startswith("Missing from"):
        return f"{text[1]} is needed: {' '.join(text[2:]).partition(' (required)')[0].rstrip('.')}"
    sentence = " ".join(text).removeprefix("Error parsing ").removeprefix("Config: ").rstrip(".")
    sentence = re.sub(r"^(\w+): (?=\1\.)", "", sentence)
    sentence = re.sub(r": could not convert string to float: (.*)", r" must be a number, got \1", sentence)
    sentence = re.sub(r": invalid literal for int\(\) with base 10: (.*)", r" must be a whole number, got \1", sentence)
    for kind, said in (("FLOAT", "a number"), ("INT", "a whole number")):
        sentence = re.sub(
            rf": no type matching .*\b{kind}(?:\|{{(\w+)}})? could be instantiated from \['(.*)'\]",
            lambda found, said=said: f" must be {said}{f' or {found[1]}' if found[1] else ''}, got '{found[2]}'",
            sentence,
        )
    return sentence or box.strip()


def _tyro(cls: type, arguments: list[str], default: Any, source: str) -> Any:
    """Parse with tyro; its complaint as one sentence."""
    if {"-h", "--help"} & set(arguments):
        return tyro.cli(cls, args=arguments, default=default)
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            config, unknown = tyro.cli(cls, args=arguments, default=default, return_unknown_args=True)
    except SystemExit:
        raise UserError(source + _sentence(complaint.getvalue())) from None
    except ValueError as error:  # as older tyros leave what Config itself says
        raise UserError(source + str(error)) from None
    if unknown:
        if not unknown[0].startswith("--"):
            raise UserError(
                f"{source}unexpected argument {unknown[0]!r}; settings are --name value, flags --name alone"
            )
        name = unknown[0].removeprefix("--").partition("=")[0]
        raise _unknown(name, [name for name, _ in _settings(cls)], source)
    return config


def options(function: Callable[..., Any], prog: str, arguments: list[str]) -> Any:
    """What a function or dataclass makes of a command's line.

    Args:
        function: its parameters are the options, its docstring is the help.
        prog: what the command is called by.
        arguments: its line.

    Raises:
        UserError: there is a mistake in it.
    """
    if {"-h", "--help"} & set(arguments):
        tyro.cli(function, prog=prog, args=arguments)
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            return tyro.cli(function, prog=prog, args=arguments)
    except SystemExit:
        raise UserError(f"{_sentence(complaint.getvalue())} (--help lists the options)") from None


def command(function: Callable[..., None], prog: str) -> None:
    """Call a command with what this process's command line says; a mistake there is one sentence and exit status 2.

    Args:
        function: its parameters are the options, its docstring is the help.
        prog: what the command is called by.
    """
    with exit_on_user_error():

        @functools.wraps(function)
        def said(*positional: Any, **options: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
            return positional, options

        positional, named = options(said, prog, sys.argv[1:])
        function(*positional, **named)


def _take(arguments: list[str], *flags: str) -> str | None:
    """The last value that one of the flags is given; it stays among the arguments."""
    for position in reversed(range(len(arguments))):
        flag, equals, value = arguments[position].partition("=")
        if flag in flags:
            return value if equals else next(iter(arguments[position + 1 :]), None)
    return None


def _may_run(written: str, named: str | None, flag: str, recipe: Path) -> None:
    """Code of the user's own: what the command line names is, what a file of settings names must have been before."""
    if named and named.endswith(".py"):
        trusted_code.note(named)
    elif not named and written.endswith(".py"):
        trusted_code.check(written, flag, str(recipe))


def parse(arguments: Sequence[str], *, adapter: str, model: str, recipe: Path, output_dir: str, help: str) -> Config:
    """The config of a run from its command line.

    The values come, the later the stronger, from the dataclasses, the YAML file (that of `--config`, or of the
    run that is resumed, or else `recipe`), and the command line.

    Args:
        arguments: the command line, without the program's name.
        adapter, model: the parts where neither file nor command line names one.
        recipe: the YAML file that is read where no other is named.
        output_dir: where the run goes if nobody says.
        help: what `--help` starts with.

    Raises:
        UserError: a setting is unknown, of the wrong type or out of its range.
    """
    arguments = list(arguments)
    for position, argument in enumerate(arguments):  # `--resume` alone: the newest checkpoint
        following = arguments[position + 1 : position + 2]
        if argument == "--resume" and (not following or following[0].startswith("-")):
            arguments[position] = "--resume=newest"
    moved: dict[str, Any] = {}
    path = _take(arguments, "--config")
    if path is None and "--config" in arguments:
        raise UserError("--config needs the path of a YAML file")
    if path is not None:
        position = next(n for n, item in enumerate(arguments) if item.partition("=")[0] == "--config")
        del arguments[position : position + (1 if "=" in arguments[position] else 2)]
        recipe = Path(path)
    elif resume := _take(arguments, "--resume"):
        if resume != "newest":  # <run>/checkpoints/<step>: that run's folder is meant where none is named
            output_dir = str(Path(resume).expanduser().resolve().parent.parent)
        folder = Path(_take(arguments, "--output-dir", "--output_dir") or output_dir).expanduser()
        if (folder / "config.yaml").is_file():
            recipe = folder / "config.yaml"
            moved = {"output_dir": str(folder)}  # the run may lie elsewhere than where it was started
    settings = {"output_dir": output_dir} | _read_yaml(recipe) | moved

    policy = _take(arguments, "--pruning.policy")
    _may_run(str(settings.get("pruning.policy", "")), policy, "--pruning.policy", recipe)
    if policy is not None and policy != settings.get("pruning.policy"):  # the file's settings are of the other one
        of_it = ("pruning.", "optim.compensation")
        settings = {key: value for key, value in settings.items() if not key.startswith(of_it)}
    if any(argument.startswith("--pruning.") for argument in arguments):
        settings["infobatch"] = True

    sections = {}
    for kind, default, head in (("adapter", adapter, AdapterSection), ("model", model, ModelSection)):
        written = str(settings.setdefault(f"{kind}.name", default))
        named = _take(arguments, f"--{kind}", f"--{kind}.name")
        _may_run(written, named, f"--{kind}", recipe)
        name = named or written
        if name != written:  # the file's other settings are of the other part
            settings = {key: value for key, value in settings.items() if not key.startswith(f"{kind}.")}
            settings[f"{kind}.name"] = name
        part = registry.declared(kind, name)
        sections[kind] = types.new_class(part.__name__, (part, head), exec_body=lambda space: None)
        sections[kind].__doc__ = part.__doc__
        sections[kind] = dataclass(frozen=True, kw_only=True)(sections[kind])
    cls = dataclasses.make_dataclass("Config", sections.items(), bases=(Config,), frozen=True, kw_only=True)
    told = "--config FILE starts from a recipe (YAML); any setting given beside it is stronger."
    cls.__doc__ = (Config.__doc__ or "").replace("One run.", f"{help} {told}", 1)

    source = f"{recipe}: "
    base = _tyro(cls, _arguments(settings, cls, source), None, source)
    config = _tyro(cls, arguments, base, "")
    return dataclasses.replace(config, output_dir=config.output_dir.expanduser())


def from_command_line(**program: Any) -> Config:
    """`parse` of this process's own command line."""
    return parse(sys.argv[1:], **program)
