"""Visualizations of a masked autoencoder."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import draw_images
from PIL import Image
from pretrain.models.mae import MAEConfig
from programs import common, train

from pretrain.config.schema import Data
from pretrain.core.errors import UserError
from pretrain.data.sources import open_data
from pretrain.evaluation import visualize


@pytest.mark.parametrize("encoder", ["vit_tiny_patch16_224", "vit_base_patch16_reg4_gap_256"])
def test_attention_is_that_of_the_last_block(encoder: str) -> None:
    """Of the class token, or of all patches if there is none; as timm computes it without fused attention."""
    torch.manual_seed(0)
    model = MAEConfig(encoder, 4, 32, 2, 4, 16, 1, 2).build((3, 8, 16), 0).eval()
    image, seen = torch.randn(2, 3, 8, 16), []
    block = model.encoder.blocks[-1].attn
    found = visualize.attention(model, image)
    block.fused_attn = False
    block.attn_drop.register_forward_hook(lambda _, given, __: seen.append(given[0]))
    model.encoder.forward_features(image)
    rows = seen[0][:, :, :1] if model.encoder.cls_token is not None else seen[0]
    expected = rows.mean(dim=2)[..., model.encoder.num_prefix_tokens :]
    torch.testing.assert_close(found, expected.view(2, 4, 2, 4))


def test_the_nearest_neighbour_of_an_image_is_itself(tmp_path: Path) -> None:
    images = open_data(Data(source=str(draw_images(tmp_path, 20))), seed=0).train
    torch.manual_seed(0)
    columns = (torch.randn(18, 5), torch.zeros(18, dtype=torch.int64), torch.arange(18))
    sheet = visualize.neighbour_sheet(images, columns, images, columns, 4)
    cells = sheet.view(4, sheet.shape[0] // 4, 11, sheet.shape[1] // 11)
    assert torch.equal(cells[:, :, 0], cells[:, :, 2])
    assert not torch.equal(cells[:, :, 0], cells[:, :, 3])


def test_a_feature_map_separates_separate_classes() -> None:
    """Along the axis of most variance, the first to the left or the right of the second."""
    torch.manual_seed(0)
    label = torch.arange(60) % 2
    feature = torch.randn(60, 7) + 30 * label[:, None] * torch.eye(7)[3]
    picture = visualize.feature_map(feature, label, 2)[40:-40].int()  # without the text
    colours = [torch.tensor(colour) for colour in ((191, 19, 19), (24, 242, 242))]
    columns = [(picture == colour).all(dim=2).any(dim=0).nonzero().flatten() for colour in colours]
    first, second = sorted(columns, key=lambda column: int(column[0]))
    assert len(first) and first[-1] < second[0]


def test_the_visualize_command(pictures: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    train("train_mae.py", *common(pictures, tmp_path / "run", 1))
    visualize.main(tmp_path / "run", n=3, output_dir=tmp_path / "sheets")
    assert "map.png in" in capsys.readouterr().out
    for name in ("reconstructions", "attention", "neighbours", "map"):
        with Image.open(tmp_path / "sheets" / f"{name}.png") as sheet:
            assert len(sheet.convert("L").getcolors()) > 2
    with pytest.raises(UserError, match="--n must be at least 1"):
        visualize.main(tmp_path / "run", n=0)
    monkeypatch.setattr(visualize, "load_run", lambda run: SimpleNamespace(model=torch.nn.Linear(1, 1), adapter=None))
    with pytest.raises(UserError, match="is no masked autoencoder"):
        visualize.main(tmp_path / "run")
