"""Pretrain a vision transformer as a masked autoencoder."""

from pathlib import Path
from typing import Any

from pretrain.config import Config, from_command_line
from pretrain.errors import Refused, one_sentence


def main(config: Config) -> None:
    """Build the parts and train."""
    import torch
    from einops import rearrange

    from pretrain.adapter import bare
    from pretrain.data import on_device, open_data
    from pretrain.evaluate.heldout import HeldOutLoss
    from pretrain.evaluate.knn import KNN
    from pretrain.export import to_timm
    from pretrain.generate import grid
    from pretrain.loop import train
    from pretrain.rng import Draws, key

    source = open_data(config.data, config.seed)
    adapter, size = config.part("adapter"), config.part("model")
    torch.manual_seed(key(config.seed))
    try:
        model = size.build(source.shape, source.classes)
    except ValueError as error:
        raise Refused(str(error)) from None

    @torch.no_grad()
    def draw(model: Any) -> torch.Tensor:
        (batch,) = source.test.batches(range(min(config.evaluate.images, len(source.test))), config.evaluate.images)
        batch = on_device(batch, next(model.parameters()).device)
        seen, completed = adapter.reconstruct(model, batch, Draws(0, index=batch.index))
        rows = rearrange(torch.stack([batch.image, seen, completed]), "n b c h w -> (b n) c h w")
        return grid(rows, columns=12)

    evaluators: list[Any] = [HeldOutLoss(adapter, source.test)]
    if source.classes:
        evaluators.append(KNN(lambda model, image: model.encoder(image), source.train, source.test, source.classes))
    train(
        config,
        adapter,
        model,
        source,
        evaluators=evaluators,
        draw=draw if hasattr(adapter, "reconstruct") else None,
        export=lambda model: to_timm(
            bare(model).encoder, size.encoder, size.timm_arguments(source.shape), config.output_dir / "model"
        ),
    )


if __name__ == "__main__":
    with one_sentence():
        recipe = Path(__file__).parent / "configs" / "fashion_mnist_mae.yaml"
        main(from_command_line(adapter="mae", model="mae", recipe=recipe, output_dir="runs/mae", help=__doc__))
