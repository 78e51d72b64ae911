"""`python -m pretrain.evaluate`: what a run is worth, measured again."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, journal
from programs import common, train
from torch.utils.data import Dataset

from pretrain.errors import Refused
from pretrain.evaluate.__main__ import main
from pretrain.evaluate.features import load
from pretrain.pictures import pixels
from pretrain.rng import Draws
from pretrain.sampling import generate
from pretrain.trained import open_run


class TensorDataset(Dataset):
    """Tensors as torch-fidelity wants them: one by one."""

    def __init__(self, images: torch.Tensor) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.images[index]


@pytest.fixture(scope="module")
def mae(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mae") / "run"
    train("train_mae.py", *common(pictures, folder, 2))
    return folder


@pytest.fixture(scope="module")
def flow(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("flow") / "run"
    train("train_diffusion.py", *common(pictures, folder, 2))
    return folder


@pytest.fixture
def assets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where reference statistics are kept."""
    monkeypatch.setattr("huggingface_hub.constants.HF_ASSETS_CACHE", str(tmp_path / "assets"))
    monkeypatch.setattr("huggingface_hub.utils._cache_assets.HF_ASSETS_CACHE", str(tmp_path / "assets"))
    monkeypatch.setenv("HF_ASSETS_CACHE", str(tmp_path / "assets"))  # for processes that are started
    return tmp_path / "assets"


def evaluate(run: Path, *words: object) -> dict:
    """What is found."""
    main([str(run), *map(str, words)])
    return json.loads((run / "evaluation.json").read_text())[-1]["found"]


def refused(run: Path, *words: object) -> str:
    with pytest.raises(Refused) as refusal:
        main([str(run), *map(str, words)])
    assert "\n" not in str(refusal.value)
    return str(refusal.value)


def test_what_was_measured_in_training_is_measured_again(mae: Path, flow: Path, capsys) -> None:
    for run in (mae, flow):
        last = [record for record in journal(run) if record["kind"] == "evaluation"][-1]
        assert evaluate(run) == {name: value for name, value in last.items() if name not in ("kind", "epoch")}
    assert "knn_accuracy" in capsys.readouterr().out
    record = json.loads((flow / "evaluation.json").read_text())[-1]
    assert record["command"] == f"python -m pretrain.evaluate {flow}" and record["step"] == 8


def test_metrics_are_those_of_the_objective(mae: Path, flow: Path) -> None:
    assert [*evaluate(mae, "--metrics", "knn")] == ["knn_accuracy"]
    assert refused(mae, "--metrics", "heldut").startswith("--metrics heldut: did you mean heldout? There are heldout, ")
    assert "a model of Flow has no encoder; of this run there are heldout" in refused(flow, "-m", "heldout,knn")


def test_distances_are_those_of_torch_fidelity_called_by_hand(flow: Path, assets: Path) -> None:
    import torch_fidelity
    from torch_fidelity.feature_extractor_base import FeatureExtractorBase

    class Ours(FeatureExtractorBase):
        def __init__(self, name, features_list, **_):
            super().__init__(name, features_list)
            self.network = load("small")

        get_provided_features_list = staticmethod(lambda: ("all",))
        get_default_feature_layer_for_metric = staticmethod(lambda metric: "all")
        can_be_compiled = staticmethod(lambda: False)

        def forward(self, image):
            return (self.network(image),)

    torch_fidelity.register_feature_extractor("ours", Ours)
    run = open_run(flow)
    adapter: Any = run.adapter
    noise = Draws(0, index=torch.arange(70)).normal(*run.shape)
    made = generate(run.model, adapter, noise, torch.full((70,), -1), steps=2)
    real = torch.stack([run.source.train[None, n].image for n in range(43)])
    by_hand = torch_fidelity.calculate_metrics(
        input1=TensorDataset(pixels(made).movedim(-1, 1)),
        input2=TensorDataset(real),
        feature_extractor="ours",
        fid=True,
        kid=True,
        prc=True,
        kid_subset_size=43,
        cuda=False,
        verbose=False,
        cache=False,
        save_cpu_ram=True,
        batch_size=64,
    )
    found = evaluate(flow, "--metrics", "fid,kid,precision-recall", "--n", 70)
    assert found == pytest.approx(
        {
            "fid": by_hand["frechet_inception_distance"],
            "kid": by_hand["kernel_inception_distance_mean"],
            "precision": by_hand["precision"],
            "recall": by_hand["recall"],
        },
        rel=1e-4,
    )
    (kept,) = assets.rglob("*.safetensors")
    before = kept.stat().st_mtime_ns
    assert evaluate(flow, "--metrics", "fid", "--n", 70)["fid"] == found["fid"]
    assert kept.stat().st_mtime_ns == before  # read, not written
    assert evaluate(flow, "--metrics", "fid", "--n", 70, "--reference", 20)["fid"] != found["fid"]
    assert len([*assets.rglob("*.safetensors")]) == 2


@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning")
def test_a_feature_network_is_read_from_a_file(flow: Path, assets: Path, tmp_path: Path) -> None:
    class Mean(torch.nn.Module):
        def forward(self, image):
            return torch.nn.functional.adaptive_avg_pool2d(image.float(), 2).flatten(1)

    torch.jit.script(Mean()).save(str(tmp_path / "mean.pt"))
    found = evaluate(flow, "--metrics", "fid", "--n", 8, "--features", tmp_path / "mean.pt", "--seeds", 2)
    assert found["fid"] > 0 and found["fid_std"] > 0
    (tmp_path / "bad.pt").write_bytes(b"no")
    assert "the feature network can't be read" in refused(flow, "-m", "fid", "--features", tmp_path / "bad.pt")
    assert "there is no file nowhere" in refused(flow, "-m", "fid", "--features", "inception=nowhere")
    assert "a feature network is small, inception" in refused(flow, "-m", "fid", "--features", "incption")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--n 3", "--n 3: fid need at least 4 images"),
        ("--n 0", "--n must be at least 1, got 0"),
        ("--reference 2", "2 training images are too few"),
        ("--guidance 2", "--guidance 2 needs a model that knows images"),
        ("--sampler dpm++", "sampler must be one of euler, heun for Flow"),
    ],
)
def test_what_can_not_be_compared_is_one_sentence(words: str, said: str, flow: Path) -> None:
    assert said in refused(flow, "--metrics", "fid", *words.split())


def test_a_missing_package_is_one_sentence(flow: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert refused(flow, "--metrics", "fid").endswith("not installed; pip install torch-fidelity")


@pytest.mark.slow
def test_processes_together_find_what_one_finds(mae: Path, flow: Path, assets: Path) -> None:
    """Of images in three batches, and of ones in a single batch, of which one process has none."""
    for run, metrics in ((mae, "heldout,knn"), (flow, "fid,kid,precision-recall,heldout")):
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        words = ["--metrics", metrics, "--images", "130"]
        subprocess.run([*launch, "-m", "pretrain.evaluate", str(run), *words], cwd=ROOT, check=True, timeout=150)
        several = json.loads((run / "evaluation.json").read_text())[-1]
        assert several["processes"] == 2
        for kept in assets.rglob("*.safetensors"):
            kept.unlink()
        assert several["found"] == evaluate(run, *words)
