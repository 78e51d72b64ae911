"""Pretrain a vision transformer as a masked autoencoder."""

import os
from pathlib import Path

from pretrain.command_line import from_command_line
from pretrain.config import Config
from pretrain.errors import Refused, one_sentence

START = {"adapter": "mae", "model": "mae", "recipe": Path(__file__).parent / "configs" / "fashion_mnist_mae.yaml"}


def main(config: Config) -> None:
    """Build the parts and train."""
    from pretrain.display import Display
    from pretrain.evaluate import evaluators
    from pretrain.evaluate.subject import Subject
    from pretrain.export import export
    from pretrain.foreign import start_from
    from pretrain.loop import train
    from pretrain.pictures import Reconstructed
    from pretrain.sources import open_data
    from pretrain.training import build

    if config.conditional:
        raise Refused("--conditional: a masked autoencoder is told no labels; leave it out")
    source = open_data(config.data, config.seed)
    if source.autoencoder is not None:
        raise Refused(f"--data {config.data.source}: these are latents, for train_diffusion.py; name images")
    adapter, model = config.part("adapter"), build(config, source.shape, source.classes)
    if not hasattr(model, "encoder"):
        raise Refused(f"--model {config.model.name}: a masked autoencoder has an `encoder`, this network has none")
    if (init := getattr(config.model, "init", None)) and not config.resume:
        said = start_from(model, Path(init).expanduser(), config.model.encoder)
        Display(os.environ.get("RANK", "0") == "0").say(said)
    subject = Subject(adapter, source, 0, True, config.evaluate, "--evaluate.")
    train(
        config,
        adapter,
        model,
        source,
        evaluators=evaluators(config.evaluate.metrics, subject),
        draw=Reconstructed(adapter, source.test, config.evaluate.images) if hasattr(adapter, "reconstruct") else None,
        export=lambda model: export(model, config, source.shape, config.output_dir / "model"),
    )


if __name__ == "__main__":
    with one_sentence():
        main(from_command_line(**START, output_dir="runs/mae", help=__doc__))
