"""Train a diffusion model."""

from pathlib import Path

from pretrain.config.cli import from_command_line
from pretrain.config.schema import Config
from pretrain.core.errors import UserError, exit_on_user_error

START = {"adapter": "flow", "model": "unet", "recipe": Path(__file__).parent / "configs" / "fashion_mnist_flow.yaml"}


def main(config: Config) -> None:
    """Build data, adapter and model, train, and publish the result."""
    from pretrain.adapters import Generative
    from pretrain.config.build import build_model, check_policy
    from pretrain.data.sources import open_data
    from pretrain.evaluation import evaluators
    from pretrain.evaluation.context import EvalContext
    from pretrain.evaluation.previews import GeneratedImages
    from pretrain.export import hub
    from pretrain.export.export import export_model
    from pretrain.export.publish import publish
    from pretrain.export.start_from import start_from_weights
    from pretrain.training.loop import train

    check_policy(config)
    if config.push_to_hub:
        hub.check(config.push_to_hub)
    source = open_data(config.data, config.seed)
    if config.class_conditional and not source.classes:
        raise UserError(
            f"--class-conditional: the images of {config.data.source} have no labels; give each class a folder of its "
            "own, or a column of labels, or leave the setting out"
        )
    classes = source.classes if config.class_conditional else 0
    adapter, model, settings = config.component("adapter"), build_model(config, source.shape, classes), config.evaluate
    start_from_weights(config, model, adapter)
    context = EvalContext(adapter, source, classes, hasattr(model, "encoder"), settings, during_training=True)
    vae = source.autoencoder
    preview = GeneratedImages(adapter, source.shape, classes, settings, config.seed, vae)
    run, summary = train(
        config,
        adapter,
        model,
        source,
        evaluators=evaluators(settings.metrics, context),
        preview=preview if isinstance(adapter, Generative) else None,
    )
    names = source.class_names
    publish(run, summary, lambda model, folder: export_model(model, config, source.shape, folder, vae, names))


def run() -> None:
    """Train with the settings of the command line."""
    main(from_command_line(**START, output_dir="runs/diffusion", help=__doc__))


if __name__ == "__main__":
    with exit_on_user_error():
        run()
