"""Train a diffusion model."""

from pathlib import Path

from pretrain.command_line import from_command_line
from pretrain.config import Config
from pretrain.errors import Refused, one_sentence

START = {"adapter": "ddpm", "model": "unet", "recipe": Path(__file__).parent / "configs" / "fashion_mnist_ddpm.yaml"}


def main(config: Config) -> None:
    """Build the parts and train."""
    from pretrain.adapter import Generative
    from pretrain.evaluate import evaluators
    from pretrain.evaluate.subject import Subject
    from pretrain.export import export
    from pretrain.loop import train
    from pretrain.pictures import Generated
    from pretrain.sources import open_data
    from pretrain.training import build

    source = open_data(config.data, config.seed)
    if config.conditional and not source.classes:
        raise Refused(
            f"--conditional: the images of {config.data.source} have no labels; give each class a folder of its own, "
            "or a column of labels, or leave it out"
        )
    classes = source.classes if config.conditional else 0
    adapter, model, shown = config.part("adapter"), build(config, source.shape, classes), config.evaluate
    subject = Subject(adapter, source, classes, hasattr(model, "encoder"), shown, "--evaluate.")
    vae = source.autoencoder
    picture = Generated(adapter, source.shape, classes, shown.images, shown.steps, shown.guidance, config.seed, vae)
    train(
        config,
        adapter,
        model,
        source,
        evaluators=evaluators(shown.metrics, subject),
        draw=picture if isinstance(adapter, Generative) else None,
        export=lambda model: export(model, config, source.shape, config.output_dir / "model", vae),
    )


if __name__ == "__main__":
    with one_sentence():
        main(from_command_line(**START, output_dir="runs/diffusion", help=__doc__))
