"""What was taken for what in a data set: logged before training, and stored with the run."""

from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

from pretrain.core.text import listed, printable
from pretrain.data.splits import EVERYTHING
from pretrain.data.subset import describe


@dataclass
class Report:
    """How a data set was interpreted.

    Attributes:
        source: the value of --data.
        splits: of "train" and "test" each: name, number of images that are used, and number of those that there are.
        classes: number of training images by class, those without a label under "".
        labels: where labels are from.
        images: where images are from.
        shape: (C, H, W).
        size: how images are brought to one size.
        range: which values are black and white.
        subset: which training images are used, see `pretrain.data.subset.Subset.to_dict`; {}: all.
        notes: decisions and what is not used.
        passed_over: number of files and folders that are not used, by kind.
    """

    source: str
    splits: dict[str, dict[str, Any]] = field(default_factory=dict)
    classes: dict[str, int] = field(default_factory=dict)
    labels: str = ""
    images: str = ""
    shape: tuple[int, int, int] = (0, 0, 0)
    size: str = ""
    range: str = ""
    subset: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    passed_over: Counter[str] = field(default_factory=Counter)

    def note(self, message: str) -> None:
        """Add a message, once."""
        if (message := printable(message)) not in self.notes:
            self.notes.append(message)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self) | {"passed_over": dict(self.passed_over), "shape": list(self.shape)}

    def __str__(self) -> str:
        train, test = self.splits["train"], self.splits["test"]
        held_out = test["name"] == train["name"]
        left = train["images"] - train["used"] - held_out * test["used"]
        whole = train["name"] == EVERYTHING
        text = f"{train['used']:,} images " + ("" if whole else f"of {train['name']} ") + "to train on"
        text += f" ({left:,} left out)" if left else ""
        unused = "" if held_out or test["used"] == test["images"] else f" of {test['images']:,}"
        text += f", {test['used']:,}{unused} " + ("held out of them" if held_out else f"of {test['name']}")
        lines = [printable(f"data: {self.source}: {text} to evaluate on")]
        counts = {name: count for name, count in self.classes.items() if name}
        if counts:
            text = listed([f"{name} {count:,}" for name, count in counts.items()])
            text += f"; {self.classes['']:,} without a label" if self.classes.get("") else ""
            lines.append(f"  {len(counts)} classes ({self.labels}): {text}")
        else:
            lines.append("  no labels")
        shape = "x".join(map(str, self.shape))
        lines.append("  " + ", ".join(part for part in (shape, self.images, self.size, self.range) if part))
        if self.subset:
            lines.append(printable(f"  subset: {describe(self.subset)}"))
        lines += [f"  note: {note}" for note in self.notes]
        if self.passed_over:
            kinds = [f"{kind} {count:,}" for kind, count in self.passed_over.most_common()]
            lines.append(f"  passed over: {listed(kinds)}")
        return "\n".join(lines)
