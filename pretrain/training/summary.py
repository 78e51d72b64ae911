"""The summary of a run: cost and quality."""

import os
import platform
from typing import Any

import torch
from torch import nn

from pretrain import __version__
from pretrain.adapters import bare
from pretrain.checkpoint.storage import State
from pretrain.config.schema import Config
from pretrain.core.console import duration
from pretrain.training.optim import step_flops, steps_in_epoch


def summarise(
    config: Config,
    state: State,
    *,
    model: nn.Module,
    evaluations: list[dict[str, Any]],
    peak: float | None = None,
) -> dict[str, Any]:
    """Summarise a run, for summary.json and the model card.

    Args:
        config: settings of the run.
        state: of a checkpoint; cost is counted up to it.
        model: the network.
        evaluations: records of metrics.jsonl, oldest first.
        peak: FLOP/s of all devices of the run, None if unknown. The share of it that is used for samples is the model
            FLOPs utilization (MFU; Chowdhery et al. 2022, appendix B).

    Returns:
        Numbers, strings, lists and dicts that JSON can hold; `seconds` are seconds of training, `full_*` the cost of
        using every sample in every epoch so far.
    """
    values, size = state.values, len(state.tensors["infobatch"]["score"])
    used, seconds = values["infobatch"]["used_before"] + values["infobatch"]["seen"], values["seconds"]
    full = round(size * config.epochs * values["progress"])
    (flops, first), per_step = values["flops"], step_flops(model, config.optim)
    blocked = int(state.tensors["blocking"]["blocked"]) if "blocking" in state.tensors else 0
    of_samples = flops * (used - blocked) + first * blocked
    full_steps = round(config.epochs * values["progress"] * steps_in_epoch(size, config.batch_size))
    quality = [
        {name: value for name, value in record.items() if name not in ("kind", "epoch")} for record in evaluations
    ]
    return {
        "program": "train_mae.py" if hasattr(bare(model), "encoder") else "train_diffusion.py",
        "adapter": config.adapter.name,
        "policy": config.policy,
        "epochs": config.epochs,
        "progress": values["progress"],
        "dataset_size": size,
        "subset": values["images"].get("subset"),
        "samples_used": used,
        "samples_blocked": blocked,
        "full_samples": full,
        "saved_fraction": 1 - used / full if full else 0.0,
        "steps": values["step"],
        "seconds": seconds,
        "images_per_second": used / seconds if seconds else None,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "train_flops": of_samples + per_step * values["step"],
        "full_train_flops": flops * full + per_step * full_steps,
        "mfu": of_samples / seconds / peak if seconds and peak else None,
        "bad_images": sorted({*values["bad_images"], *values["bad_heldout_images"]}),
        "quality_before": quality[0] if quality and not evaluations[0].get("epoch") else {},
        "quality": quality[-1] if quality else {},
        "pictures": str(config.output_dir / "pictures"),
        "model": str(config.output_dir / "model"),
    }


def environment(device: torch.device, processes: int) -> dict[str, str]:
    """Where a run is trained, for summary.json."""
    card = (
        torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()}, {os.cpu_count()} CPUs"
    )
    return {
        "device": card,
        "processes": str(processes),
        "Python": platform.python_version(),
        "torch": torch.__version__,
        "pretrain": __version__,
    }


def summary_rows(summary: dict[str, Any]) -> list[tuple[str, str]]:
    """The summary as rows (name, text) for the terminal; it must have `open_model_with`."""
    before, after = summary["quality_before"], summary["quality"]
    epochs = f"{summary['progress'] * summary['epochs']:g} epochs"
    speed = f"{summary['images_per_second'] or 0:,.0f} images/s"
    if summary["mfu"] is not None:
        speed += f", {summary['mfu']:.1%} of the devices' peak (MFU)"
    rows = [
        (
            "samples",
            f"{summary['samples_used']:,} used, {1 - summary['saved_fraction']:.1%} of the {summary['full_samples']:,} "
            f"of {epochs} of the {'subset' if summary.get('subset') else 'full data set'}",
        ),
        ("time", f"{duration(summary['seconds'])} of training, {speed}"),
        ("cost", f"{summary['train_flops']:.3g} training FLOPs instead of {summary['full_train_flops']:.3g}"),
    ]
    for name, value in after.items():
        if not isinstance(value, list):
            change = f" (before training {before[name]:.4f})" if name in before else ""
            rows.append(("quality", f"{name} {value:.4f}{change}"))
    if summary["bad_images"]:
        rows.append(("bad images", f"{len(summary['bad_images'])} skipped, the first: {summary['bad_images'][0]}"))
    return [
        *rows,
        *((name, summary[name]) for name in ("pictures", "model")),
        ("open with", summary["open_model_with"]),
    ]
