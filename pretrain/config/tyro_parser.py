"""Parsing with tyro; its error boxes become one sentence.

tyro prints its errors in a frame and exits (version 1.0 has no structured form of them), so the sentence is extracted
from the text; tests/config/test_cli.py holds it for each kind of error.
"""

import contextlib
import dataclasses
import functools
import io
import os
import re
import shutil
import sys
import typing
from collections.abc import Callable, Iterator, Mapping
from difflib import get_close_matches
from typing import Any

import tyro

from pretrain.core.errors import UserError, exit_on_user_error, writing_output

# Texts for --help come from docstrings alone: without them tyro would tokenize the source for comments, at each start.
DOCSTRINGS = (tyro.conf.HelptextFromCommentsOff,)
MIN_COLUMNS = 20  # below 10 tyro never ends to break lines


def settings_of(cls: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted name and type of every setting of a dataclass."""
    hints = typing.get_type_hints(cls)
    for item in dataclasses.fields(cls):
        if dataclasses.is_dataclass(hints[item.name]):
            yield from settings_of(hints[item.name], f"{prefix}{item.name}.")
        else:
            yield prefix + item.name, hints[item.name]


def unknown_setting(name: str, known: Mapping[str, Any], source: str) -> UserError:
    """The error for a setting that does not exist, with the most similar one of the known (types by name)."""
    words = name.replace("-", "_")
    near = get_close_matches(words, known, 1, 0.5)
    head, _, flag = words.removeprefix("no_").rpartition(".")
    if not source and known.get(f"{head}.{flag}") is bool:  # on the command line
        near = [f"{head}.no_{flag}"]
    near = near or [other for other in known if other.split(".")[-1] == name.split(".")[-1]]
    return UserError(
        f"{source}there is no setting {name!r}{f'; did you mean {near[0]!r}?' if near else ''} (--help lists them)"
    )


def _sentence(box: str) -> str:
    """The first paragraph of tyro's error box, without the frame and in plain words."""
    lines = [re.sub(r"^[│|]\s?|\s*[│|]$", "", line).strip() for line in box.splitlines()]
    text: list[str] = []
    for line in lines[1:]:
        if not line.strip("─-╰╯+"):  # a horizontal line of the frame, whose characters depend on the terminal
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
    for kind, words in (("FLOAT", "a number"), ("INT", "a whole number")):
        sentence = re.sub(
            rf": no type matching .*\b{kind}(?:\|{{(\w+)}})? could be instantiated from \['(.*)'\]",
            lambda found, words=words: f" must be {words}{f' or {found[1]}' if found[1] else ''}, got '{found[2]}'",
            sentence,
        )
    return sentence or box.strip()


def _show_help(function: Callable[..., Any], **options: Any) -> None:
    """Print the help, and exit."""
    if shutil.get_terminal_size().columns < MIN_COLUMNS:
        os.environ["COLUMNS"] = str(MIN_COLUMNS)
    with writing_output():
        tyro.cli(function, config=DOCSTRINGS, **options)
    raise SystemExit(0)  # nothing could be written


def parse_settings(cls: type, arguments: list[str], default: Any, source: str) -> Any:
    """An instance of a dataclass from arguments.

    Args:
        cls: the dataclass.
        arguments: of the command line.
        default: an instance whose values hold where no argument is given; None: those of the class.
        source: start of error messages, for example "recipe.yaml: ".

    Raises:
        UserError: an argument is unknown or has a wrong value.
    """
    if {"-h", "--help"} & set(arguments):
        _show_help(cls, args=arguments, default=default)
    message = io.StringIO()
    try:
        with contextlib.redirect_stderr(message):
            config, unknown = tyro.cli(
                cls, args=arguments, default=default, return_unknown_args=True, config=DOCSTRINGS
            )
    except SystemExit:
        raise UserError(source + _sentence(message.getvalue())) from None
    except ValueError as error:  # older versions of tyro don't catch what __post_init__ raises
        raise UserError(source + str(error)) from None
    if unknown:
        if not unknown[0].startswith("--"):
            raise UserError(
                f"{source}unexpected argument {unknown[0]!r}; settings are --name value, flags --name alone"
            )
        name = unknown[0].removeprefix("--").partition("=")[0]
        raise unknown_setting(name, dict(settings_of(cls)), source)
    return config


def call_with_options(function: Callable[..., Any], prog: str, arguments: list[str]) -> Any:
    """Call a function, or construct a dataclass, with the options of a command line.

    Args:
        function: its parameters are the options, its docstring is the help.
        prog: the command's name in the help.
        arguments: of the command line.

    Raises:
        UserError: an argument is unknown, missing or has a wrong value.
    """
    if {"-h", "--help"} & set(arguments):
        _show_help(function, prog=prog, args=arguments)
    message = io.StringIO()
    try:
        with contextlib.redirect_stderr(message):
            return tyro.cli(function, prog=prog, args=arguments, config=DOCSTRINGS)
    except SystemExit:
        raise UserError(f"{_sentence(message.getvalue())} (--help lists the options)") from None


def run_command(function: Callable[..., Any], prog: str, line: list[str] | None = None) -> None:
    """Call a function with the options of a command line; an error is one sentence and exit status 2.

    Args:
        function: its parameters are the options, its docstring is the help.
        prog: the command's name in the help.
        line: the command line; None: that of this process.
    """
    with exit_on_user_error():

        @functools.wraps(function)
        def arguments(*positional: Any, **named: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
            return positional, named

        positional, named = call_with_options(arguments, prog, sys.argv[1:] if line is None else line)
        function(*positional, **named)
