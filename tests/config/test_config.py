"""Settings from recipes, the command line and components, and the objects that are built from them."""

import dataclasses
import typing
from pathlib import Path

import pytest
import yaml
from conftest import ROOT

from pretrain.config import registry
from pretrain.config.build import build_infobatch
from pretrain.config.cli import parse
from pretrain.config.schema import Config, Pruning, flat
from pretrain.core.errors import UserError

RECIPE = ROOT / "configs" / "fashion_mnist_flow.yaml"


def config(*arguments: str, recipe: Path = RECIPE) -> Config:
    return parse(arguments, adapter="flow", model="unet", recipe=recipe, output_dir="runs/x", help="Help.")


def test_the_command_line_overrides_the_recipe(tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        "optim:\n  lr: 1e-4\nepochs: 3\nadapter: ddpm\nmodel:\n  name: dit\n  depth: 2\ndata: somewhere\n"
    )
    c = config("--config", str(recipe), "--epochs", "5", "--adapter.prediction=sample", "--data.size", "8")
    assert (c.optim.lr, c.epochs, c.adapter.prediction, c.model.depth, c.seed) == (1e-4, 5, "sample", 2, 0)
    assert (c.data.source, c.data.size, c.output_dir) == ("somewhere", 8, Path("runs/x"))
    assert config("--data", "elsewhere", recipe=recipe).data.source == "elsewhere"


def test_another_component_on_the_command_line_drops_the_recipes_settings_of_the_first(tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text("adapter: {name: ddpm, prediction: sample}\n")
    assert config("--config", str(recipe), "--adapter", "flow").adapter.label_dropout == 0.1


@pytest.mark.parametrize(
    ("arguments", "policy"),
    [
        ((), "full"),
        (("--infobatch",), "importance"),
        (("--pruning.policy", "infobatch"), "infobatch"),
        (("--infobatch", "--pruning.policy", "full"), "full"),
        (("--pruning.budget", "0.3"), "importance"),
        (("--pruning.policy=budget", "--no-infobatch"), "full"),
    ],
)
def test_infobatch_is_a_bare_flag(arguments: tuple[str, ...], policy: str) -> None:
    assert config(*arguments).policy == policy


def test_a_budget_alone_means_importance_where_no_policy_is_known(tmp_path: Path) -> None:
    mae = config("--adapter", "mae", "--pruning.budget", "0.4")
    assert (mae.policy, mae.pruning.budget) == ("importance", 0.4)
    recipe = tmp_path / "r.yaml"
    recipe.write_text("pruning: {policy: random, budget: 0.6}\n")
    assert config("--config", str(recipe), "--pruning.budget", "0.4").policy == "random"


def test_infobatch_prunes_as_the_recipe_recommends(tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        "pruning: {policy: importance, over: levels, budget: 0.6, anneal: 0}\noptim: {compensation: 0.5}\n"
    )

    def pruning(*arguments: str) -> tuple[str, str | None, float | None, float]:
        c = config("--config", str(recipe), *arguments)
        return c.policy, c.pruning.over, c.pruning.budget, c.optim.compensation

    assert pruning()[0] == "full"
    assert pruning("--infobatch") == ("importance", "levels", 0.6, 0.5)
    assert pruning("--pruning.budget", "0.5") == ("importance", "levels", 0.5, 0.5)
    assert pruning("--pruning.policy", "importance") == ("importance", "levels", 0.6, 0.5)
    assert pruning("--pruning.policy", "infobatch") == (
        "infobatch",
        None,
        None,
        0,
    )  # none of the recipe's policy settings


@pytest.mark.parametrize(
    "flags",
    [
        *registry.names("adapter"),
        "ddpm --adapter.prediction v_prediction",
        "flow --adapter.posterior-mean",
        "edm --adapter.uncertainty",
    ],
)
def test_infobatch_alone_is_what_the_objective_says(flags: str, tmp_path: Path, capsys) -> None:
    """Weaker than a recipe's policy and the command line; `full` is reported."""
    recipe, own = tmp_path / "r.yaml", ("--adapter", *flags.split(), "--infobatch")
    recipe.write_text("optim: {lr: 1e-3}\n")
    best = getattr(config("--config", str(recipe), *own).component("adapter"), "infobatch", {})
    found = flat(config("--config", str(recipe), *own).to_dict())
    assert {name: found[name] for name in best} == best
    build_infobatch(config("--config", str(recipe), *own), 1000, print)
    assert ("--infobatch uses every sample: for " in capsys.readouterr().out) == (best.get("pruning.policy") == "full")
    changed = config("--config", str(recipe), *own, "--pruning.policy", "random", "--pruning.budget", "0.5")
    assert (changed.policy, changed.pruning.over, changed.optim.compensation) == ("random", None, 0)
    if best.get("pruning.policy") == "importance":
        assert config("--config", str(recipe), *own, "--pruning.budget", "0.4").pruning.budget == 0.4
    recipe.write_text("pruning: {policy: quantile}\n")
    stronger = config("--config", str(recipe), *own)
    assert (stronger.policy, stronger.pruning.budget, stronger.optim.compensation) == ("quantile", None, 0)


def test_the_documented_policies_are_the_registered_ones() -> None:
    from pretrain.infobatch.policies import POLICIES

    assert Pruning.__doc__ is not None and f"policy: {', '.join(POLICIES)}, or the path" in Pruning.__doc__
    assert all(registry.load_policy(name) is made for name, made in POLICIES.items())


@pytest.mark.parametrize("recipe", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_a_recipe_is_valid_and_its_resolved_config_gives_the_same_one(recipe: Path, tmp_path: Path) -> None:
    one = config("--config", str(recipe), "--infobatch", "--optim.betas", "0.8", "0.9")
    again = tmp_path / "config.yaml"
    again.write_text(yaml.safe_dump(one.to_dict()))
    assert config("--config", str(again)).to_dict() == one.to_dict()
    assert recipe.read_text().startswith("# "), "a recipe opens with its command"


def test_every_setting_is_explained() -> None:
    for cls in (Config, *(hint for hint in typing.get_type_hints(Config).values() if dataclasses.is_dataclass(hint))):
        for field in dataclasses.fields(cls):
            nested = dataclasses.is_dataclass(typing.get_type_hints(cls)[field.name])
            assert nested or field.name in ("adapter", "model") or f"{field.name}: " in cls.__doc__, (cls, field.name)


def test_components_become_objects() -> None:
    c = config("--adapter.label-dropout", "0.5")
    assert c.component("adapter").label_dropout == 0.5
    assert c.component("model").channels == (16, 32, 64)


OWN = '''
from dataclasses import dataclass
import torch
from pretrain.adapters import Batch, Losses

@dataclass(frozen=True)
class Mine:
    """My own objective.

    Attributes:
        power: of the error.
    """

    power: float = 2.0

    def __call__(self, model: torch.nn.Module, batch: Batch, rng: "SampleRNG") -> Losses:
        return Losses(torch.zeros(1))
'''


def test_a_users_adapter_has_its_section(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(OWN)
    c = config("--adapter", str(path), "--adapter.power", "3")
    assert c.component("adapter").power == 3.0
    assert flat(c.to_dict())["adapter.name"] == str(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1\n", "found none"),
        (OWN.replace("frozen=True", "order=True"), "found none"),
        (OWN + OWN.replace("class Mine", "class Other"), "found Mine, Other"),
        ("def (:\n", "not a Python file"),
        (OWN.replace(": float = 2.0", ": float"), "the field 'power' needs a default"),
    ],
)
def test_a_file_without_an_adapter_raises(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        config("--adapter", str(path))


def test_a_declaration_that_needs_its_module_is_imported(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    check = "    def __post_init__(self):\n        assert self.power <= MOST\n\n    def __call__"
    path.write_text("MOST = 9\n" + OWN.replace("    def __call__", check).replace('"SampleRNG"', "object"))
    assert config("--adapter", str(path)).component("adapter").power == 2.0


def test_an_adapter_that_cant_be_imported_raises_when_used(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text("import no_such_package\n" + OWN)
    c = config("--adapter", str(path))
    with pytest.raises(UserError, match="no_such_package"):
        c.component("adapter")


@pytest.mark.parametrize("recipe", sorted(ROOT.glob("configs/*.yaml")), ids=lambda path: path.stem)
def test_a_recipe_plans_with_and_without_pruning(recipe: Path) -> None:
    full, pruned = config("--config", str(recipe)), config("--config", str(recipe), "--infobatch")
    assert full.policy == "full" and pruned.policy == pruned.pruning.policy
    assert (pruned.policy == "full") == (pruned.adapter.name == "mae")  # choosing images saves a MAE nothing
    assert build_infobatch(full, 1000, print).budget is None
    assert (build_infobatch(pruned, 1000, print).budget is None) == (pruned.pruning.budget is None)


def test_linear_scaling_of_the_learning_rate() -> None:
    """He et al. 2022: 1.5e-4 x 4096 / 256."""
    words = ("--optim.lr", "1.5e-4", "--batch-size", "4096")
    assert config(*words, "--optim.linear-scaling").peak_lr == pytest.approx(2.4e-3)
    assert config(*words).peak_lr == 1.5e-4
