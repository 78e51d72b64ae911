"""Write the EMA model of a run for other libraries, with a model card.

pretrain export RUN --push-to-hub NAME
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import tyro
from safetensors import SafetensorError
from torch import nn

from pretrain.adapters import bare
from pretrain.checkpoint.load_run import load_run
from pretrain.config.schema import Config
from pretrain.config.tyro_parser import run_command
from pretrain.core.console import Display
from pretrain.core.errors import UserError
from pretrain.core.files import read_json, require_plain, usual_mode
from pretrain.data.autoencoder import Autoencoder
from pretrain.export import hub, model_card
from pretrain.export.mae_weights import to_timm, to_transformers
from pretrain.export.weights import parameters_alone
from pretrain.training.metrics_log import MetricsLog
from pretrain.training.summary import summarise, summary_rows


def export_model(
    model: nn.Module,
    config: Config,
    shape: tuple[int, int, int],
    folder: Path,
    autoencoder: Autoencoder | None = None,
    class_names: Sequence[str] = (),
) -> str:
    """Write the model of a run: an encoder for timm and transformers, a denoiser for diffusers.

    Of a network that these libraries don't have the parameters alone are written.

    Args:
        model: with EMA parameters.
        config: of the run.
        shape: (C, H, W) of its images or latents.
        folder: where to write.
        autoencoder: decodes latents.
        class_names: of the data set.

    Returns:
        A Python expression that opens it.

    Raises:
        OSError: it can't be written, or the folder holds a link.
    """
    require_plain(folder)
    how = _exported(model, config, shape, folder, autoencoder, class_names if config.class_conditional else ())
    usual_mode(folder)
    return how


def _exported(
    model: nn.Module,
    config: Config,
    shape: tuple[int, int, int],
    folder: Path,
    autoencoder: Autoencoder | None,
    class_names: Sequence[str],
) -> str:
    component, adapter = config.component("model"), config.component("adapter")
    if hasattr(component, "timm_arguments"):
        if hasattr(adapter, "mask_ratio") and hasattr(adapter, "norm_pix"):
            to_transformers(bare(model), adapter, folder / "transformers")
        return to_timm(bare(model), component.encoder, component.timm_arguments(shape), folder)
    if hasattr(model, "encoder"):
        return parameters_alone(bare(model), folder)
    from pretrain.export.to_diffusers import to_diffusers  # diffusers' pipelines take seconds to import

    try:
        return to_diffusers(model, adapter, folder, autoencoder, class_names)
    except SafetensorError as error:  # for example on a full disk
        raise OSError(str(error)) from None


def _measured(run: Path, step: int, sigma_rel: float | None) -> tuple[list[dict[str, Any]], list[str]]:
    """What is known of the quality of an EMA model.

    Args:
        run: folder of the run.
        step: of the checkpoint.
        sigma_rel: of a power-function EMA; None: the plain EMA, which is the one measured in training.

    Returns:
        The evaluations in training, to the last of which the values of `pretrain evaluate` are added; and the notes of
        the latter.

    Raises:
        UserError: a file can't be read.
    """
    file = run / "metrics.jsonl"
    try:
        log = MetricsLog(file, writes=False, log=Display(True).print)
        evaluations = log.read("evaluation") if sigma_rel is None else []
        file = run / "evaluation.json"
        records = read_json(file) if file.exists() else []
        records = [record for record in records if record.get("data_settings") is None]  # on the run's own data set
        later = [record for record in records if (record["step"], record.get("sigma_rel")) == (step, sigma_rel)]
        found = {name: value for record in later for name, value in record["found"].items()}
        notes = {str(note): None for record in later for note in record.get("notes", [])}  # each once
        if not all(isinstance(value, int | float | list) for value in found.values()):
            raise ValueError("a metric's value is no number")
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{file}: can't be read ({type(error).__name__}: {error}); repair it or move it away") from None
    evaluations = evaluations or [{}]
    return [*evaluations, evaluations[-1] | found] if found else evaluations, [*notes]


def main(
    run: tyro.conf.Positional[Path],
    sigma_rel: float | None = None,
    license: str | None = None,
    push_to_hub: str | None = None,
) -> None:
    """Export the model of a run's newest checkpoint, for example of a run that was stopped, or with another EMA.

    Args:
        run: folder of the run; the model is written to its model/.
        sigma_rel: export the power-function EMA of this relative width, made of the run's snapshots; default: the plain
            EMA.
        license: license of the model for its card, by its identifier on the Hugging Face Hub, for example apache-2.0.
        push_to_hub: name of the model repository on the Hub to upload the model to.
    """
    if push_to_hub:
        hub.check(push_to_hub)
    trained = load_run(run, sigma_rel)
    values = trained.state.values
    config = replace(trained.config, output_dir=run)  # the run may have been moved
    evaluations, notes = _measured(run, values["step"], sigma_rel)
    summary = summarise(
        config,
        trained.state,
        model=trained.model,
        evaluations=evaluations,
    )
    summary |= {"sigma_rel": sigma_rel, "notes": notes, "class_names": [*trained.class_names]}
    try:
        summary["open_model_with"] = export_model(
            trained.model, config, trained.shape, run / "model", trained.autoencoder, trained.class_names
        )
        model_card.write(config, summary, licence=license)
    except OSError as error:
        raise UserError(f"{run / 'model'}: can't be written to: {error}") from None
    display = Display(True)
    display.print_summary(summary_rows(summary))
    if push_to_hub:
        display.print(f"uploaded     {hub.push(push_to_hub, config, summary, license)}")


def run() -> None:
    """The command `pretrain export`."""
    run_command(main, "pretrain export")
