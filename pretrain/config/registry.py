"""Finding components (adapters, models, policies) by name or path, without importing torch before they are used.

An adapter or a model is the one frozen dataclass of its file that has the kind's method. Its fields are a section of
the settings, which `--help` lists: they are read from the source, because importing torch takes seconds.
"""

import ast
import dataclasses
import importlib
import importlib.util
import sys
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple

from pretrain import HOME
from pretrain.core.errors import UserError


class Kind(NamedTuple):
    """Where components of a kind are, and the method by which their class is recognized."""

    package: str
    folder: Path
    method: str


PRETRAIN = Path(__file__).parents[1]
KINDS = {
    "adapter": Kind("pretrain.adapters", PRETRAIN / "adapters", "__call__"),
    "model": Kind("pretrain.models", HOME / "models", "build"),
}


def names(kind: str) -> list[str]:
    """The components of a kind that come with the project."""
    return sorted(path.stem for path in KINDS[kind].folder.glob("[!_]*.py"))


def find(kind: str, name: str) -> Path:
    """The file of a component.

    Raises:
        UserError: there is no such component.
    """
    if name.endswith(".py"):
        if not Path(name).is_file():
            raise UserError(f"--{kind} {name}: there is no such file")
        return Path(name).resolve()
    if name not in names(kind):
        near = get_close_matches(name, names(kind), 1, 0.3)
        hint = f"did you mean {near[0]}? " if near else ""
        raise UserError(f"--{kind} {name}: {hint}There are {', '.join(names(kind))}, or give the path of a .py file")
    return KINDS[kind].folder / f"{name}.py"


def _parsed(path: Path, source: str) -> ast.Module:
    try:
        return ast.parse(path.read_bytes(), str(path))
    except (SyntaxError, UnicodeDecodeError) as error:
        raise UserError(f"{source}: not a Python file: {error}") from None


def _component_class(kind: str, path: Path) -> tuple[ast.Module, ast.ClassDef]:
    """The syntax tree of a file and of its component.

    Raises:
        UserError: the file is not Python, or has no component or several.
    """
    tree = _parsed(path, f"--{kind} {path}")
    method = KINDS[kind].method
    found = [
        node
        for node in tree.body
        if isinstance(node, ast.ClassDef)
        and any("dataclass" in ast.unparse(line) and "frozen=True" in ast.unparse(line) for line in node.decorator_list)
        and any(isinstance(item, ast.FunctionDef) and item.name == method for item in node.body)
    ]
    if len(found) != 1:
        count = ", ".join(node.name for node in found) or "none"
        raise UserError(
            f"--{kind} {path}: the file must have exactly one class with `@dataclass(frozen=True)` and a method "
            f"`{method}`, found {count}; docs/objectives.md has an example"
        )
    return tree, found[0]


def _without_types(node: ast.ClassDef) -> ast.ClassDef:
    """The class without the annotations of its methods, whose names may not be imported."""
    for item in ast.walk(node):
        if isinstance(item, ast.FunctionDef):
            item.returns = None
            arguments = item.args
            every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg]
            for argument in filter(None, every):
                argument.annotation = None
    return node


def declared(kind: str, name: str) -> type:
    """A component's dataclass for its fields, defaults and their checks; its methods may lack their imports.

    Raises:
        UserError: it can't be constructed without arguments.
    """
    path = find(kind, name)
    try:
        component = _read(kind, path)
        _check_defaults(component, f"--{kind} {path}")
    except NameError:  # the class uses another name of its file
        component = load(kind, name)
        _check_defaults(component, f"--{kind} {path}")
    return component


def _read(kind: str, path: Path) -> type:
    """The component's class, made of its own lines and the standard library alone."""
    tree, node = _component_class(kind, path)
    imports = [
        item
        for item in tree.body
        if (isinstance(item, ast.Import) and all(alias.name in sys.stdlib_module_names for alias in item.names))
        or (isinstance(item, ast.ImportFrom) and item.module in sys.stdlib_module_names - {"__future__"})
    ]
    module = ast.Module(body=[*imports, _without_types(node)], type_ignores=[])
    scope: dict[str, Any] = {"__name__": f"pretrain.declared.{path.stem}"}
    exec(compile(module, str(path), "exec"), scope)
    return scope[node.name]


def _check_defaults(component: Any, source: str) -> None:
    for item in dataclasses.fields(component):
        if item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING:
            raise UserError(f"{source}: the field {item.name!r} needs a default")
    try:
        component()
    except ValueError as error:
        raise UserError(f"{source}: its defaults are invalid: {error}") from None


def load_policy(name: str) -> Any:
    """Import a policy: one of the project's by its name, or the one function (score, stats, ...) of a file.

    Raises:
        UserError: there is no such policy.
    """
    ours = _policies(PRETRAIN / "infobatch" / "policies.py")
    if name in ours:
        return getattr(importlib.import_module("pretrain.infobatch.policies"), name)
    if not name.endswith(".py"):
        near = get_close_matches(name, ours, 1, 0.3)
        raise UserError(
            f"--pruning.policy {name}: {f'did you mean {near[0]}? ' if near else ''}There are {', '.join(ours)}, "
            "or give the path of a .py file"
        )
    if not Path(name).is_file():
        raise UserError(f"--pruning.policy {name}: there is no such file")
    found = _policies(Path(name))
    if len(found) != 1:
        raise UserError(
            f"--pruning.policy {name}: the file must have exactly one function whose arguments begin with "
            f"(score, stats), found {', '.join(found) or 'none'}; docs/policies.md has an example"
        )
    return getattr(import_file("policy", Path(name).resolve(), f"--pruning.policy {name}"), found[0])


def _policies(path: Path) -> list[str]:
    """The names of the policies in a file."""
    return [
        node.name
        for node in _parsed(path, f"--pruning.policy {path}").body
        if isinstance(node, ast.FunctionDef)
        and not node.name.startswith("_")
        and [argument.arg for argument in node.args.args[:2]] == ["score", "stats"]
    ]


def load(kind: str, name: str) -> type:
    """Import a component's class.

    Raises:
        UserError: the user's file can't be imported.
    """
    path = find(kind, name)
    class_name = _component_class(kind, path)[1].name
    if not name.endswith(".py"):
        return getattr(importlib.import_module(f"{KINDS[kind].package}.{name}"), class_name)
    return getattr(import_file(kind, path, f"--{kind} {path}"), class_name)


def import_file(kind: str, path: Path, source: str) -> Any:
    """Import the user's file as a module.

    Raises:
        UserError: there is no such file, or importing it fails.
    """
    if not path.is_file():
        raise UserError(f"{source}: there is no such file")
    spec = importlib.util.spec_from_file_location(f"{kind}_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look up their module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise UserError(f"{source}: importing it failed with {type(error).__name__}: {error}") from error
    return module
