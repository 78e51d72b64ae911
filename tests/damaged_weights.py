"""State dicts with a tensor that is missing, renamed, of another shape or type."""

import random

import torch
from torch import Tensor


def damage(state: dict[str, Tensor], name: str, rng: random.Random) -> None:
    """Damage a tensor of a state dict in one of several ways."""
    value = state.pop(name)
    change = rng.choice(["drop", "rename", "cut", "flat", "scalar", "more", "int"])
    if change == "rename":
        state[rng.choice(["head.x", "y", f"{name}.z", f"a.{name}"])] = value
    elif change == "more":
        state |= {name: value, f"other.{name}": value.clone()}
    elif change != "drop":
        shapes = {"cut": value[:1, :2] if value.ndim > 1 else value.flatten()[:1], "flat": value.flatten()}
        shapes |= {"scalar": torch.tensor(1.0), "int": value.long()}
        state[name] = shapes[change].clone()
