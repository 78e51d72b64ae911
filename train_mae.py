"""Pretrain a vision transformer as a masked autoencoder."""

from pathlib import Path

from pretrain.config.cli import from_command_line
from pretrain.config.schema import Config
from pretrain.core.errors import UserError, exit_on_user_error

START = {"adapter": "mae", "model": "mae", "recipe": Path(__file__).parent / "configs" / "fashion_mnist_mae.yaml"}


def main(config: Config) -> None:
    """Build data, adapter and model, train, and publish the result."""
    from pretrain.config.build import build_model, check_policy
    from pretrain.data.sources import open_data
    from pretrain.evaluation import evaluators
    from pretrain.evaluation.context import EvalContext
    from pretrain.evaluation.previews import Reconstructions
    from pretrain.export import hub
    from pretrain.export.export import export_model
    from pretrain.export.publish import publish
    from pretrain.export.start_from import start_from_weights
    from pretrain.training.loop import train

    if config.class_conditional:
        raise UserError("--class-conditional: a masked autoencoder does not use labels; leave it out")
    check_policy(config)
    if config.push_to_hub:
        hub.check(config.push_to_hub)
    source = open_data(config.data, config.seed)
    if source.autoencoder is not None:
        raise UserError(f"--data {config.data.source}: it has latents, for train_diffusion.py; name images")
    adapter, model = config.component("adapter"), build_model(config, source.shape, 0)
    if not hasattr(model, "encoder"):
        raise UserError(
            f"--model {config.model.name}: it has no `encoder`; give --model mae or a network with one, or "
            "train_diffusion.py if it is a denoiser or a run of that program"
        )
    start_from_weights(config, model, adapter)
    context = EvalContext(adapter, source, 0, True, config.evaluate, during_training=True)
    preview = Reconstructions(adapter, source.test, config.evaluate.images) if hasattr(adapter, "reconstruct") else None
    run, summary = train(
        config,
        adapter,
        model,
        source,
        evaluators=evaluators(config.evaluate.metrics, context),
        preview=preview,
    )
    publish(run, summary, lambda model, folder: export_model(model, config, source.shape, folder))


def run() -> None:
    """Train with the settings of the command line."""
    main(from_command_line(**START, output_dir="runs/mae", help=__doc__))


if __name__ == "__main__":
    with exit_on_user_error():
        run()
