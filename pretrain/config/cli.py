"""The settings of a run from its command line and a YAML file.

A YAML file is turned into command-line arguments, so both are checked by the same code (tyro). Nothing here imports
torch: `--help` and the error for a wrong setting come at once.
"""

import dataclasses
import os
import re
import sys
import types
import typing
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml

from pretrain.config import registry, trusted_code
from pretrain.config.schema import LAUNCH_ONLY, AdapterSection, Config, ModelSection, flat
from pretrain.config.tyro_parser import parse_settings, settings_of, unknown_setting
from pretrain.core.errors import UserError
from pretrain.core.files import expand, read_json

# torch prints stack traces for C++ warnings, which would bury our own message (distributed/heartbeat.py).
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")


class _PlainLoader(yaml.SafeLoader):
    """Loads mappings, lists, null and text: a number is the text as written, for the type of its setting to decide.

    YAML 1.1 reads `no` as false, 010 as 8, 1:30 as 90 and 1.10 as 1.1, also where a name is meant. There are no
    aliases, by which a small file can expand without end, no name twice, and no tags of other types.
    """

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError(f"*{self.peek_event().anchor} is an alias; write its value out")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        if isinstance(node, yaml.MappingNode):
            names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
            for name in names:
                if names.count(name) > 1:
                    raise yaml.YAMLError(f"{name} is given twice")
        return super().construct_mapping(node, deep)

    def construct_text(self, node: yaml.ScalarNode) -> str:
        text = str(self.construct_scalar(node))
        if "\0" in text:
            raise yaml.YAMLError(f"{text!r} has a null character; remove it")
        os.fsencode(text)  # a lone surrogate is a UnicodeEncodeError
        return text


_TAG = "tag:yaml.org,2002:"
_PlainLoader.yaml_constructors = {
    None: yaml.SafeLoader.construct_undefined,
    **{_TAG + kind: yaml.SafeLoader.yaml_constructors[_TAG + kind] for kind in ("map", "seq", "null")},
    **dict.fromkeys(
        [_TAG + kind for kind in ("str", "int", "float", "bool", "timestamp", "value")], _PlainLoader.construct_text
    ),
}

MAX_BYTES = 1 << 20  # of a recipe
EMPTY = object()  # in place of a section without settings
SECTIONS = {"adapter", "model"} | {
    field.name for field in dataclasses.fields(Config) if field.default_factory is not dataclasses.MISSING
}


def read_plain_yaml(path: Path) -> Any:
    """The content of a YAML file, UTF-8 or, with a byte-order mark, UTF-16: dicts, lists, None, and text as written.

    Raises:
        OSError: it can't be read.
        ValueError: it is too large, or not plain YAML.
    """
    if (size := path.stat().st_size) > MAX_BYTES:
        raise ValueError(f"a recipe has at most {MAX_BYTES:,} bytes, got {size:,}; name another file")
    try:
        return _PlainLoader(path.read_bytes()).get_single_data()
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split()).replace('in "<byte string>", line', "in line")
        raise ValueError(f"not plain YAML: {reason}") from None


def _leaves(tree: dict[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The settings of a file by dotted name, in its order; a section without settings is `EMPTY`."""
    for name, value in tree.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", EMPTY if value == {} else value


def _read_yaml(path: Path) -> dict[str, Any]:
    """The settings of a YAML file by dotted name."""
    if not path.is_file():
        near = get_close_matches(path.name, [item.name for item in path.parent.glob("*.yaml")], 1, 0.3)
        raise UserError(f"--config {path}: there is no such file{f'; did you mean {near[0]}?' if near else ''}")
    try:
        tree = read_plain_yaml(path)
    except (OSError, ValueError) as error:
        raise UserError(f"--config {path}: {error}") from None
    if not isinstance(tree, dict):
        found = {type(None): "nothing", str: "text"}.get(type(tree), "a list")
        raise UserError(f"--config {path}: a recipe has settings, `name: value`, got {found}")
    # As on the command line, the name of a section is short for its first setting: `adapter: flow`.
    first = {"adapter": "adapter.name", "model": "model.name", "data": "data.source"}
    settings: dict[str, Any] = {}
    for name, value in _leaves(tree):
        if name in SECTIONS and (value is EMPTY or value is None):  # all its settings are comments
            continue
        long = first.get(name, name)
        if long in settings:
            raise UserError(f"--config {path}: {long} is given twice; remove one")
        settings[long] = value
    if given := [name for name in LAUNCH_ONLY if settings.pop(name, None) not in (None, "false", "")]:
        flag = f"--{given[0].replace('_', '-')}"
        raise UserError(f"--config {path}: {given[0]} is taken from the command line only; remove it, and give {flag}")
    return settings


def _arguments(settings: dict[str, Any], cls: type, source: str) -> list[str]:
    """The command-line arguments for the settings of a YAML file."""
    known = dict(settings_of(cls))
    arguments: list[str] = []
    for name, value in settings.items():
        if name not in known:
            raise unknown_setting(name, known, source)
        kinds = (known[name], *typing.get_args(known[name]))  # of `tuple[float, float] | None` too
        if known[name] is bool:
            truth = value if isinstance(value, bool) else yaml.SafeLoader.bool_values.get(str(value).lower())
            if truth is None:
                raise UserError(f"{source}{name} must be true or false, got {value!r}")
            head, _, leaf = name.rpartition(".")
            arguments.append(f"--{head}{'.' if head else ''}{'' if truth else 'no-'}{leaf}")
        elif value is EMPTY or (value is None and type(None) not in kinds):
            raise UserError(f"{source}{name} must have a value, got {'null' if value is None else '{}'}; leave it out")
        elif isinstance(value, list):
            if not any(typing.get_origin(kind) is tuple for kind in kinds):
                raise UserError(f"{source}{name} must be one value, got the list {value}")
            arguments += [f"--{name}", *(_item(item, f"{source}{name}") for item in value)]
        else:
            arguments.append(f"--{name}={_number(value)}")
    return arguments


def _number(text: Any) -> str:
    """YAML's `.inf` and `.nan` as Python spells them; anything else as it is."""
    return re.sub(r"^([-+]?)\.(inf|nan)$", r"\1\2", str(text), flags=re.IGNORECASE)


def _item(value: Any, name: str) -> str:
    """An item of a list as an argument, which must not become another flag.

    Raises:
        UserError: it is not a plain value, or begins like a flag.
    """
    flag = str(value).startswith("-") and not re.fullmatch(r"-(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?", str(value))
    if flag or not isinstance(value, (str, int, float)):
        raise UserError(f"{name} must be a list of plain values that don't begin with '-', got the item {value!r}")
    return _number(value)


def _value(arguments: list[str], *flags: str) -> str | None:
    """The last value of a flag (or of its aliases) among the arguments."""
    for position in reversed(range(len(arguments))):
        flag, equals, value = arguments[position].partition("=")
        if flag in flags:
            return value if equals else next(iter(arguments[position + 1 :]), None)
    return None


def _check_trust(in_file: str, on_command_line: str | None, flag: str, recipe: Path) -> None:
    """A .py file on the command line is trusted from now on; one in a YAML file must have been trusted before."""
    if on_command_line and on_command_line.endswith(".py"):
        trusted_code.trust(on_command_line)
    elif not on_command_line and in_file.endswith(".py"):
        trusted_code.require_trust(in_file, flag, str(recipe))


def _settings_of_run(folder: Path) -> tuple[Path, dict[str, Any]]:
    """The settings of a run to resume, and the file that has them: its config.yaml or, without one, a checkpoint.

    Raises:
        UserError: there are checkpoints, and no file has the settings.
    """
    if (folder / "config.yaml").is_file():
        try:
            return folder / "config.yaml", _read_yaml(folder / "config.yaml")
        except UserError as error:
            raise UserError(f"{error}; without that file the settings are those of the newest checkpoint") from None
    for file in sorted(folder.glob("checkpoints/step-*/state.json"), reverse=True):
        with suppress(OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
            found = flat(read_json(file)["config"])
            return file, {name: value for name, value in found.items() if name not in LAUNCH_ONLY}
    raise UserError(
        f"--resume: {folder}/config.yaml is gone, and no checkpoint there has the settings; give --config with the "
        "run's recipe"
    )


def _find_recipe(arguments: list[str], recipe: Path, output_dir: str) -> tuple[list[str], Path, dict[str, Any]]:
    """The arguments without --config, a file of settings, and these settings.

    The file is that of --config, or that of the run to resume, or `recipe`.
    """
    path = _value(arguments, "--config")
    if path is None and "--config" in arguments:
        raise UserError("--config needs the path of a YAML file")
    if path is not None:
        position = next(n for n, item in enumerate(arguments) if item.partition("=")[0] == "--config")
        width = 1 if "=" in arguments[position] else 2
        return arguments[:position] + arguments[position + width :], Path(path), _read_yaml(Path(path))
    moved = {}  # the run may have been moved since its config.yaml was written
    if resume := _value(arguments, "--resume"):
        if resume not in ("newest", "auto"):  # <run>/checkpoints/<step>
            output_dir = str(expand(resume).resolve().parent.parent)
            moved = {"output_dir": output_dir}
        folder = expand(_value(arguments, "--output-dir", "--output_dir") or output_dir)
        if any(folder.glob("checkpoints/step-*")):
            recipe, settings = _settings_of_run(folder)
            return arguments, recipe, settings | {"output_dir": str(folder)}
    return arguments, recipe, _read_yaml(recipe) | moved


def _without_section(settings: dict[str, Any], *prefixes: str) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if not name.startswith(prefixes)}


def _section(component: type, head: type) -> type:
    """The section of the settings for a component: its fields after those of `head`."""
    section = types.new_class(component.__name__, (component, head), exec_body=lambda space: None)
    section.__doc__ = component.__doc__
    return dataclass(frozen=True, kw_only=True)(section)


def _component(
    kind: str, default: str, arguments: list[str], settings: dict[str, Any], recipe: Path
) -> tuple[type, dict[str, Any]]:
    """The class of the adapter or model, and the settings of the file that hold for it.

    Those of the file's own adapter or model don't hold for another one, and its pruning not for another adapter.
    """
    in_file, on_command_line = settings.get(f"{kind}.name"), _value(arguments, f"--{kind}", f"--{kind}.name")
    _check_trust(str(in_file or default), on_command_line, f"--{kind}", recipe)
    name = on_command_line or str(in_file or default)
    if name != (in_file or default):
        own_pruning = ("pruning.", "optim.compensation") if kind == "adapter" and in_file else ()
        settings = _without_section(settings, f"{kind}.", *own_pruning)
    return registry.declared(kind, name), settings | {f"{kind}.name": name}


def _best_pruning(adapter: Any, arguments: list[str], settings: dict[str, Any]) -> dict[str, Any]:
    """What --infobatch alone means for an adapter; {} where a policy was chosen.

    A budget alone means `importance` where nothing better is known; other settings of pruning mean that there is some.
    """
    if "pruning.policy" in settings or _value(arguments, "--pruning.policy"):
        return {}
    found = getattr(adapter, "infobatch", {})
    if _value(arguments, "--pruning.budget"):
        return found if "pruning.budget" in found else {"pruning.policy": "importance"}
    prunes = any(argument.startswith("--pruning.") for argument in arguments)
    return {} if prunes and found.get("pruning.policy") == "full" else found


def parse(arguments: Sequence[str], *, adapter: str, model: str, recipe: Path, output_dir: str, help: str) -> Config:
    """The settings of a run from its command line.

    In ascending order of precedence, values come from the dataclasses, the adapter's `infobatch`, the YAML file (that
    of `--config`, or of the run that is resumed, or else `recipe`), and the command line.

    Args:
        arguments: the command line without the program's name.
        adapter, model: names of the components if neither file nor command line gives one.
        recipe: the YAML file if no other is given.
        output_dir: of the run if none is given.
        help: start of the text of `--help`.

    Raises:
        UserError: a setting is unknown, of the wrong type or out of its range.
    """
    arguments = list(arguments)
    for position, argument in enumerate(arguments):  # `--resume` without a value: the newest checkpoint
        following = arguments[position + 1 : position + 2]
        if argument == "--resume" and (not following or following[0].startswith("-")):
            arguments[position] = "--resume=newest"
    arguments, recipe, settings = _find_recipe(arguments, recipe, output_dir)
    settings = {"output_dir": output_dir} | settings

    policy = _value(arguments, "--pruning.policy")
    _check_trust(str(settings.get("pruning.policy", "")), policy, "--pruning.policy", recipe)
    if policy is not None and policy != settings.get("pruning.policy"):  # the file's settings belong to its policy
        settings = _without_section(settings, "pruning.", "optim.compensation")
    if any(argument.startswith("--pruning.") for argument in arguments):
        settings["infobatch"] = True
    if features := _value(arguments, "--evaluate.features"):
        trusted_code.trust_features(features)
    objective, settings = _component("adapter", adapter, arguments, settings, recipe)
    network, settings = _component("model", model, arguments, settings, recipe)
    sections = [("adapter", _section(objective, AdapterSection)), ("model", _section(network, ModelSection))]
    cls = dataclasses.make_dataclass("Config", sections, bases=(Config,), frozen=True, kw_only=True)
    usage = "--config FILE starts from a recipe (YAML); settings on the command line take precedence."
    cls.__doc__ = (Config.__doc__ or "").replace("One run.", f"{help} {usage}", 1)

    def parsed(pruning: dict[str, Any]) -> tuple[Config, Config]:
        """The settings without and with those of the command line."""
        base = parse_settings(cls, _arguments(pruning | settings, cls, source), None, source)
        return base, parse_settings(cls, arguments, base, "")

    source = f"{recipe}: "
    base, config = parsed(assumed := _best_pruning(objective(), arguments, settings))
    if (known := _best_pruning(config.adapter, arguments, settings)) != assumed:  # it depends on the adapter's settings
        base, config = parsed(known)
    for metric in config.evaluate.metrics:
        in_file = metric if metric in base.evaluate.metrics else ""
        _check_trust(in_file, None if in_file else metric, "--evaluate.metrics", recipe)
    return _with_absolute_paths(dataclasses.replace(config, output_dir=expand(config.output_dir)))


def _with_absolute_paths(config: Config) -> Config:
    """The settings with absolute paths of the user's own .py files and subset, to resume a run from any folder."""

    def absolute(name: str) -> str:
        return str(expand(name).resolve()) if name.endswith(".py") else name

    subset = config.data.subset and str(expand(config.data.subset).resolve())
    return dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, subset=subset),
        adapter=dataclasses.replace(config.adapter, name=absolute(config.adapter.name)),
        model=dataclasses.replace(config.model, name=absolute(config.model.name)),
        pruning=dataclasses.replace(config.pruning, policy=absolute(config.pruning.policy)),
        evaluate=dataclasses.replace(config.evaluate, metrics=tuple(map(absolute, config.evaluate.metrics))),
    )


def from_command_line(**program: Any) -> Config:
    """`parse` of this process's own command line."""
    return parse(sys.argv[1:], **program)
