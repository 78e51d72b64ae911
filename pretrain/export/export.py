"""The averaged model in the formats that other people's programs open, with its model card.

pretrain export RUN --push-to-hub NAME
"""

import inspect
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import tyro
from diffusers import DDPMPipeline, LDMPipeline, ModelMixin
from safetensors.torch import save_file
from torch import nn

from pretrain.adapters import Generative, bare
from pretrain.adapters._sampling import make_scheduler
from pretrain.adapters._uncertainty import UncertaintyHead
from pretrain.checkpoint.load_run import load_run
from pretrain.config.schema import Config
from pretrain.config.tyro_parser import run_command
from pretrain.core.console import Display
from pretrain.core.errors import UserError
from pretrain.data.autoencoder import Autoencoder
from pretrain.export import hub, model_card, pipeline
from pretrain.export.to_encoder import to_timm, to_transformers
from pretrain.training.flops import profile_sample
from pretrain.training.metrics_log import MetricsLog
from pretrain.training.summary import summarise, summary_rows


def export_model(
    model: nn.Module,
    config: Config,
    shape: tuple[int, int, int],
    folder: Path,
    autoencoder: Autoencoder | None = None,
) -> str:
    """Write a run's model, and say how it is opened.

    Args:
        model: with averaged parameters.
        config: the run's.
        shape: (C, H, W) of its images.
        folder: for the files.
        autoencoder: decodes, where the images are latents.
    """
    if hasattr(model, "encoder"):
        part = config.component("model")
        to_transformers(bare(model), config.component("adapter"), folder / "transformers")
        return to_timm(bare(model), part.encoder, part.timm_arguments(shape), folder)
    return to_diffusers(model, config.component("adapter"), folder, autoencoder)


def to_diffusers(model: nn.Module, adapter: object, folder: Path, autoencoder: Autoencoder | None = None) -> str:
    """Write a denoiser as a diffusers pipeline, and say how it is opened.

    A UNet that knows no labels makes a stock `DDPMPipeline`, which takes schedulers that neither start from noise of
    another size than 1 nor scale what the network sees; or, of latents, with the autoencoder a stock `LDMPipeline`, if
    they are square and not shifted and the scheduler is one that can scale. Any other diffusers network brings its code
    and the code of the pipeline along, which `from_pretrained` runs only if told to trust it. A network that is no
    diffusers model, or an adapter without a scheduler, leaves its parameters alone.
    """
    model = model.network if isinstance(model, UncertaintyHead) else model  # nothing for who makes images
    network: Any = getattr(model, "network", model)
    if not isinstance(network, ModelMixin) or not isinstance(adapter, Generative):
        folder.mkdir(parents=True, exist_ok=True)
        _save(model, folder / "model.safetensors")
        if autoencoder is not None:
            autoencoder.network.save_pretrained(folder / "vae")
        return f"safetensors.torch.load_file({str(folder / 'model.safetensors')!r})"
    scheduler = make_scheduler(adapter, None, latents=autoencoder is not None)
    stock = type(network).__module__.startswith("diffusers.")
    stock_pipe = _stock_pipeline(network, scheduler, autoencoder) if stock else None
    if stock_pipe is not None:
        stock_pipe.save_pretrained(folder)
        return f"diffusers.DiffusionPipeline.from_pretrained({str(folder)!r})"
    network.save_pretrained(folder / "network")
    scheduler.save_pretrained(folder / "scheduler")
    shutil.copy(inspect.getfile(pipeline), folder / "pipeline.py")
    library = "diffusers"
    if not stock:
        source = Path(inspect.getfile(type(network)))
        library = f"{source.stem}_network"  # no name that diffusers itself has
        shutil.copy(source, folder / "network" / f"{library}.py")
    index = {
        "_class_name": ["pipeline", pipeline.LabelPipeline.__name__],
        "network": [library, type(network).__name__],
        "scheduler": ["diffusers", type(scheduler).__name__],
    }
    if autoencoder is not None:
        autoencoder.network.save_pretrained(folder / "vae")
        index["vae"] = ["diffusers", type(autoencoder.network).__name__]
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    return f"diffusers.DiffusionPipeline.from_pretrained({str(folder)!r}, trust_remote_code=True)"


def _stock_pipeline(network: Any, scheduler: Any, autoencoder: Autoencoder | None) -> Any:
    """A pipeline of diffusers' own for a UNet2DModel, if there is one that does it right."""
    if network.config.get("num_class_embeds") is not None:
        return None
    if autoencoder is None:
        pipe: Any = DDPMPipeline  # made for a DDPMScheduler, it takes any whose `step` is like it
        return pipe(network, scheduler) if getattr(scheduler, "init_noise_sigma", 1.0) == 1.0 else None
    height, width = network.config.sample_size
    if height != width or autoencoder.shift.any() or autoencoder.scale.numel() > 1:
        return None
    if not hasattr(scheduler, "scale_model_input"):
        return None
    network.register_to_config(sample_size=height)  # it takes no pair
    return LDMPipeline(vqvae=autoencoder.network, unet=network, scheduler=scheduler)


def _save(model: nn.Module, file: Path) -> None:
    save_file(
        {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}, file, {"format": "pt"}
    )


def _measured(run: Path, step: int, sigma_rel: float | None) -> tuple[list[dict[str, Any]], list[str]]:
    """What was measured in training (if of the plain average), what `pretrain evaluate` found since, and its notes.

    Raises:
        UserError: a file of it can't be read.
    """
    file = run / "metrics.jsonl"
    try:
        trained = MetricsLog(file, writes=False).read("evaluation") if sigma_rel is None else []
        file = run / "evaluation.json"
        records = json.loads(file.read_text()) if file.exists() else []
        later = [one for one in records if (one["step"], one.get("sigma_rel")) == (step, sigma_rel)]
        found = {name: value for one in later for name, value in one["found"].items()}
        notes = {note: None for one in later for note in one.get("notes", [])}  # each once
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{file}: can't be read ({type(error).__name__}: {error}); mend it, or move it away") from None
    trained = trained or [{}]
    return [*trained, trained[-1] | found] if found else trained, [*notes]


def main(
    run: tyro.conf.Positional[Path],
    sigma_rel: float | None = None,
    license: str | None = None,
    push_to_hub: str | None = None,
) -> None:
    """Export a run's model again, from its newest checkpoint: of a run that was stopped, or another average.

    Args:
        run: the run's folder; the model goes into its model/.
        sigma_rel: of the power-function EMA to export, made from the run's snapshots; the plain average where not
            given.
        license: of the model, for its card, as the Hugging Face hub calls it, for example apache-2.0.
        push_to_hub: name of a model repository on the hub to upload the model to.
    """
    if push_to_hub:
        hub.check(push_to_hub)
    trained = load_run(run, sigma_rel)
    values = trained.state.values
    config = replace(trained.config, output_dir=run)  # it may have been moved
    evaluations, notes = _measured(run, values["step"], sigma_rel)
    summary = summarise(
        config,
        trained.state,
        model=trained.model,
        evaluations=evaluations,
        flops=profile_sample(trained.adapter, trained.model, trained.shape, trained.classes).flops,
    )
    summary |= {"sigma_rel": sigma_rel, "notes": notes}
    try:
        summary["open_model_with"] = export_model(
            trained.model, config, trained.shape, run / "model", trained.autoencoder
        )
        model_card.write(config, summary, licence=license)
    except OSError as error:
        raise UserError(f"{run / 'model'}: can't be written to: {error}") from None
    display = Display(True)
    display.print_summary(summary_rows(summary))
    if push_to_hub:
        display.print(f"uploaded     {hub.push(push_to_hub, config, summary, license)}")


def run() -> None:
    """The command."""
    run_command(main, "pretrain export")
