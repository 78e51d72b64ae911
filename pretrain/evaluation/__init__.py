"""Evaluators measure a model: objects that are called as ``evaluator(model)`` and return {name: value}.

Values are numbers or lists of numbers; an optional attribute `note` describes how they were measured. All processes
call an evaluator, compute a share, and get the same values. The model has the EMA parameters and is in evaluation mode.
`METRICS` lists the evaluators by name; importing this module does not import torch.
"""

import importlib
import importlib.util
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, NamedTuple

from pretrain.config.registry import import_file
from pretrain.core.errors import UserError, warn
from pretrain.core.files import expand

if TYPE_CHECKING:
    from pretrain.evaluation.context import EvalContext

Evaluator = Callable[[Any], dict[str, Any]]


class Metric(NamedTuple):
    """Where a metric is implemented, and its requirements.

    Attributes:
        module: the module of this package whose `make(context, names)` returns the evaluator.
        of: what is measured: any model (""), generated images ("images"), or features of an encoder ("features").
        labels: whether the images need labels.
        package: an optional dependency that it needs, by its name on PyPI.
    """

    module: str
    of: str = ""
    labels: bool = False
    package: str = ""


METRICS = {
    "loss": Metric("validation_loss"),
    "fid": Metric("fid", "images", package="torch-fidelity"),
    "kid": Metric("fid", "images", package="torch-fidelity"),
    "precision-recall": Metric("fid", "images", package="torch-fidelity"),
    "memorization": Metric("memorization", "images"),
    "knn": Metric("knn", "features", labels=True),
    "online-probe": Metric("online_probe", "features", labels=True),
    "linear-probe": Metric("linear_probe", "features", labels=True),
    "attentive-probe": Metric("finetune", "features", labels=True),
    "finetune": Metric("finetune", "features", labels=True),
}


def available(context: "EvalContext") -> list[str]:
    """The metrics that this objective and data allow."""
    return [name for name in METRICS if not _obstacle(name, context)]


def _obstacle(name: str, context: "EvalContext") -> str:
    """Why a metric can't be measured, as the end of "the metric ..."; "" if it can."""
    metric = METRICS[name]
    if name == "online-probe" and not context.during_training:
        return "observes the training; set it in --evaluate.metrics of a training"
    if context.is_other_data and (obstacle := _other_data_obstacle(name, context)):
        return obstacle
    if metric.of == "images" and not context.generates:
        return f"measures generated images, and a model of {context.objective} generates none"
    if metric.module == "fid" and context.source.seen_shape[0] not in (1, 3):
        return f"measures images of 1 or 3 channels, and these have {context.source.seen_shape[0]}"
    if metric.of == "features" and not context.has_encoder:
        return f"measures an encoder's features, and a model of {context.objective} has no encoder"
    return _label_obstacle(context) if metric.labels else ""


def _other_data_obstacle(name: str, context: "EvalContext") -> str:
    """The same for a data set that the model was not trained on."""
    from pretrain.evaluation.context import labels_of

    if name == "memorization":
        return "compares with the images that the model was trained on, and --data names others"
    if name == "loss" and context.classes and (count := int((labels_of(context.source.test) < 0).sum())):
        return (
            f"needs the class of each validation image, on which the network is conditioned, and {count:,} of "
            f"{len(context.source.test):,} are of none of the run's {context.classes} classes"
        )
    return ""


def _label_obstacle(context: "EvalContext") -> str:
    """The same for the requirements on labels."""
    from pretrain.evaluation.context import MIN_LABELLED, labels_of

    source = context.source
    if not source.classes:
        return f"needs labels, and the images of {source.train.data.source} have none"
    train, test = (label[label >= 0] for label in map(labels_of, source[:2]))
    if len(train) < MIN_LABELLED or not len(test):
        return (
            f"needs labels of {MIN_LABELLED} training images and 1 validation image, and {len(train)} and {len(test)} "
            "have one"
        )
    if len(train.unique()) == 1:
        return "needs two classes, and all labelled training images are of one, so an accuracy would mean nothing"
    return ""


def evaluators(names: Sequence[str], context: "EvalContext") -> list[Evaluator]:
    """Construct the evaluators of some metrics.

    Args:
        names: of `METRICS`, or paths of .py files with a function `make(context, names)`; none: the validation loss,
            and the k-NN accuracy of an encoder if the images have labels.
        context: what is evaluated.

    Raises:
        UserError: a metric does not exist, or can't be measured with this model, data or installation.
    """
    flag = context.flag("metrics")
    for name in names:
        if name.endswith(".py"):
            continue
        if name not in METRICS:
            near = get_close_matches(name, METRICS, 1, 0.4)
            hint = f"did you mean {near[0]}? " if near else ""
            raise UserError(f"{flag} {name}: {hint}There are {', '.join(METRICS)}, or give the path of a .py file")
        if obstacle := _obstacle(name, context):
            raise UserError(f"{flag} {name}: it {obstacle}; available for this run: {', '.join(available(context))}")
        package = METRICS[name].package
        if package and importlib.util.find_spec(package.replace("-", "_")) is None:
            raise UserError(f"{flag} {name}: it needs {package}, which is not installed; pip install {package}")
    if not names:
        names = [name for name in ("loss", "knn") if name in available(context)]
        if context.has_encoder and context.source.classes and "knn" not in names:
            warn(f"the k-NN accuracy is not measured: it {_label_obstacle(context)}")
    modules: dict[str, list[str]] = {}
    for name in dict.fromkeys(names):
        modules.setdefault(name if name.endswith(".py") else METRICS[name].module, []).append(name)
    return [_module(module, flag).make(context, group) for module, group in modules.items()]


def _module(name: str, flag: str) -> Any:
    """The module of a metric: one of this package, or the user's file."""
    if not name.endswith(".py"):
        return importlib.import_module(f"{__name__}.{name}")
    module = import_file("metric", expand(name).resolve(), f"{flag} {name}")
    if not hasattr(module, "make"):
        raise UserError(f"{flag} {name}: it needs a function make(context, names) that returns the evaluator")
    return module
