"""Train a diffusion model."""

from pathlib import Path

from pretrain.config import Config, from_command_line
from pretrain.errors import Refused, one_sentence


def main(config: Config) -> None:
    """Build the parts and train."""
    import torch

    from pretrain.adapter import Generative
    from pretrain.data import open_data
    from pretrain.evaluate.heldout import HeldOutLoss
    from pretrain.export import to_diffusers
    from pretrain.generate import generate, grid
    from pretrain.loop import train
    from pretrain.rng import Draws, key

    source = open_data(config.data, config.seed)
    classes = source.classes if config.conditional else 0
    if config.conditional and not classes:
        raise Refused(f"--conditional: {config.data.source} has no labels")
    adapter = config.part("adapter")
    torch.manual_seed(key(config.seed))
    try:
        model = config.part("model").build(source.shape, classes)
    except ValueError as error:
        raise Refused(str(error)) from None

    def draw(model: torch.nn.Module) -> torch.Tensor:
        which = torch.arange(config.evaluate.images, device=next(model.parameters()).device)
        noise = Draws(config.seed, index=which).normal(*source.shape)
        label = which % classes if classes else torch.full_like(which, -1)
        images = generate(model, adapter, noise, label, steps=config.evaluate.steps, guidance=config.evaluate.guidance)
        return grid(images, columns=round(len(images) ** 0.5))

    train(
        config,
        adapter,
        model,
        source,
        evaluators=[HeldOutLoss(adapter, source.test)],
        draw=draw if isinstance(adapter, Generative) else None,
        export=lambda model: to_diffusers(model, adapter, config.output_dir / "model"),
    )


if __name__ == "__main__":
    with one_sentence():
        recipe = Path(__file__).parent / "configs" / "fashion_mnist_flow.yaml"
        main(from_command_line(adapter="flow", model="unet", recipe=recipe, output_dir="runs/diffusion", help=__doc__))
