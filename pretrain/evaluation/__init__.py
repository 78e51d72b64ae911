"""What a model is worth: objects that are called as ``evaluator(model)`` and return {name: value}.

Values are numbers or lists of numbers; an evaluator's `note`, where it has one, says what they are of. Every process of
a launch calls them, does its share, and gets the same values. They see the averaged parameters in
evaluation mode. `METRICS` has them by name, and nothing here imports torch.
"""

import importlib
import importlib.util
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, NamedTuple

from pretrain.core.errors import UserError

if TYPE_CHECKING:
    from pretrain.evaluation.context import EvalContext

Evaluator = Callable[[Any], dict[str, Any]]


class Metric(NamedTuple):
    """What a metric needs.

    Attributes:
        file: the module here whose `make(subject, names)` returns the evaluator of its metrics.
        of: what is measured: any model, the images that one makes ("images"), or features of an encoder ("features").
        labels: whether the images need labels.
        package: that pip installs and `pip install` of this project alone does not.
    """

    file: str
    of: str = ""
    labels: bool = False
    package: str = ""


METRICS = {
    "loss": Metric("validation_loss"),
    "fid": Metric("fid", "images", package="torch-fidelity"),
    "kid": Metric("fid", "images", package="torch-fidelity"),
    "precision-recall": Metric("fid", "images", package="torch-fidelity"),
    "knn": Metric("knn", "features", labels=True),
    "online-probe": Metric("online_probe", "features", labels=True),
    "linear-probe": Metric("linear_probe", "features", labels=True),
    "attentive-probe": Metric("finetune", "features", labels=True),
    "finetune": Metric("finetune", "features", labels=True),
}


def allowed(subject: "EvalContext") -> list[str]:
    """The metrics that the subject's objective and data have."""
    return [name for name in METRICS if not _lacks(name, subject)]


def _lacks(name: str, subject: "EvalContext") -> str:
    """What a metric needs and the subject hasn't got, in words."""
    metric = METRICS[name]
    if name == "online-probe" and not subject.training:
        return "looks on while a model is trained; name it in --evaluate.metrics of the training"
    if metric.of == "images" and not subject.makes_images:
        return f"measures made images, which {subject.objective} does not make"
    if metric.of == "images" and subject.source.seen_shape[0] not in (1, 3):
        return f"measures images of 1 or 3 channels, and these have {subject.source.seen_shape[0]}"
    if metric.of == "features" and not subject.has_encoder:
        return f"measures an encoder's features, and a model of {subject.objective} has no encoder"
    if metric.labels and not subject.source.classes:
        return f"needs labels, which the images of {subject.source.train.data.source} have not"
    return ""


def evaluators(names: Sequence[str], subject: "EvalContext") -> list[Evaluator]:
    """The evaluators of some metrics; of none: the validation loss, and k-NN accuracy where that is to be had.

    Raises:
        UserError: there is no such metric, or it is not to be had of this model, data or installation.
    """
    flag = f"{subject.flag}metrics"
    names = names or [name for name in ("loss", "knn") if name in allowed(subject)]
    for name in names:
        if name not in METRICS:
            near = get_close_matches(name, METRICS, 1, 0.4)
            hint = f"did you mean {near[0]}? " if near else ""
            raise UserError(f"{flag} {name}: {hint}There are {', '.join(METRICS)}")
        if lack := _lacks(name, subject):
            raise UserError(f"{flag} {name}: it {lack}; of this run there are {', '.join(allowed(subject))}")
        package = METRICS[name].package
        if package and importlib.util.find_spec(package.replace("-", "_")) is None:
            raise UserError(f"{flag} {name}: it needs {package}, which is not installed; pip install {package}")
    files: dict[str, list[str]] = {}
    for name in dict.fromkeys(names):
        files.setdefault(METRICS[name].file, []).append(name)
    return [importlib.import_module(f"{__name__}.{file}").make(subject, together) for file, together in files.items()]
