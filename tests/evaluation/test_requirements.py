"""A metric that can't be measured is refused in one sentence, and code that a run's settings name is not run."""

import pickle
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from programs import common, refused, train
from safetensors.torch import save_file

from pretrain.adapters.mae import MAE
from pretrain.config import trusted_code
from pretrain.config.schema import Evaluate
from pretrain.core.errors import UserError
from pretrain.evaluation import METRICS, available, evaluators, feature_extractors
from pretrain.evaluation.context import EvalContext, accuracy
from pretrain.evaluation.evaluate import main


def images(label: list[int]) -> Any:
    """Anything with a table of labels, of which rows are chosen in any order."""
    rows = np.random.default_rng(0).permutation(len(label))
    table = {"label": [label[n] for n in rows.argsort()]}
    return SimpleNamespace(table=table, rows=rows, data=SimpleNamespace(source="photos"), shape=(1, 4, 4))


class Source(tuple):
    classes = 3
    train = property(lambda self: self[0])
    test = property(lambda self: self[1])
    shape = seen_shape = (1, 4, 4)


def test_metrics_with_labels_need_enough_of_two_classes(capsys: pytest.CaptureFixture[str]) -> None:
    """Whatever the labels: what is available is constructed, and anything else is refused with the reason."""
    rng, seen = random.Random(0), set()
    for _ in range(200):
        kinds = rng.choice([[-1], [-1, 0], [2], [0, 1, 2], [-1, 0, 2]])
        train, test = ([rng.choice(kinds) for _ in range(rng.randrange(0, 9))] for _ in range(2))
        source: Any = Source((images(train), images(test)))
        context = EvalContext(MAE(), source, 0, True, Evaluate(), during_training=True)
        few = sum(label >= 0 for label in train) < 4 or not any(label >= 0 for label in test)
        one = len({*train} - {-1}) < 2
        with_labels = {name for name, metric in METRICS.items() if metric.labels}
        assert {*available(context)} == {"loss"} | (set() if few or one else with_labels)
        default = [type(evaluator).__name__ for evaluator in evaluators([], context)]
        warning = capsys.readouterr().err
        assert default == ["ValidationLoss"] + (["KNN"] if not (few or one) else [])
        assert ("the k-NN accuracy is not measured: it needs" in warning) == (few or one)
        if few or one:
            seen.add((few, one))
            name = rng.choice([*with_labels])
            reason = "it needs labels of 4 training images" if few else "it needs two classes, and all labelled"
            with pytest.raises(UserError, match=f"^--evaluate.metrics {name}: {reason}") as error:
                evaluators(["loss", name], context)
            assert "\n" not in str(error.value)
    assert seen == {(True, True), (True, False), (False, True)}


def test_an_accuracy_is_the_share_of_labelled_images() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        predicted, label = rng.integers(0, 3, 7), rng.integers(-1, 3, 7)
        known = label >= 0
        if known.any():
            expected = (predicted == label)[known].mean()
            assert accuracy(torch.tensor(predicted), torch.tensor(label)) == pytest.approx(expected, abs=1e-15)
    with pytest.raises(UserError, match="no validation image with a label could be read"):
        accuracy(torch.zeros(3), torch.full((3,), -1))


class Evil:
    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self):
        return (Path.touch, (self.proof,))


@pytest.mark.parametrize("name", ["inception", "vgg16"])
@pytest.mark.parametrize("suffix", [".pth", ".bin", ".pt"])
def test_weights_of_a_feature_network_are_not_unpickled(name: str, suffix: str, tmp_path: Path) -> None:
    proof, file = tmp_path / "proof", tmp_path / f"weights{suffix}"
    torch.save({"weight": torch.ones(2), "more": Evil(proof)}, file)
    with pytest.raises(UserError, match="holds more than tensors, which could execute code; save a state dict alone"):
        feature_extractors.load(f"{name}={file}")
    file.write_bytes(pickle.dumps(Evil(proof)))
    with pytest.raises(UserError, match=f"^--features {name}="):
        feature_extractors.load(f"{name}={file}")
    assert not proof.exists()


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_torch_fidelity_gets_the_tensors_of_a_file_alone(suffix: str, tmp_path: Path, monkeypatch) -> None:
    weights, read = {"a.weight": torch.randn(3, 2), "b": torch.arange(3)}, []
    (save_file if suffix == ".safetensors" else torch.save)(weights, tmp_path / f"a=b{suffix}")

    def create(name: str, layers: list[str], feature_extractor_weights_path: str, **_: Any) -> torch.nn.Module:
        read.append(torch.load(feature_extractor_weights_path, weights_only=False))  # as torch-fidelity does
        return torch.nn.Identity()

    monkeypatch.setattr("torch_fidelity.utils.create_feature_extractor", create)
    feature_extractors.load(f"inception={tmp_path}/a=b{suffix}")
    assert read[0].keys() == weights.keys() and all(
        torch.equal(read[0][name], value) for name, value in weights.items()
    )
    with pytest.raises(UserError, match="torch-fidelity can't read the weights of dinov2-vit-s-14 from a file"):
        feature_extractors.load(f"dinov2-vit-s-14={tmp_path}/a=b{suffix}")


class Mean(torch.nn.Module):
    def forward(self, image):
        return torch.nn.functional.adaptive_avg_pool2d(image.float(), 2).flatten(1)


@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning")
def test_torchscript_is_run_if_the_user_named_it(pictures: Path, tmp_path: Path, monkeypatch) -> None:
    """On a command line, of a training or of the evaluation; not because a recipe or a run's settings name it."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "home"))
    script, run = tmp_path / "mean.pt", tmp_path / "run"
    torch.jit.script(Mean()).save(str(script))
    (tmp_path / "recipe.yaml").write_text(f"evaluate: {{features: {script}, metrics: [fid], num_images: 8}}")
    training = [*common(pictures, run, 1), "--adapter", "flow"]
    for name in (str(script), f"clip-vit-b-32={script}"):
        with pytest.raises(UserError, match=f"--features {name}: .* names {script}, whose code would be executed"):
            feature_extractors.load(name)
    message = refused("train_diffusion.py", "--config", tmp_path / "recipe.yaml", *training)
    assert message.startswith(f"--evaluate.features {script}: the setting evaluate.features names {script}")
    assert f"give --evaluate.features {script} once on a command line" in message and not run.exists()
    monkeypatch.setenv(trusted_code.VARIABLE, str(script))
    feature_extractors.load(str(script))
    monkeypatch.delenv(trusted_code.VARIABLE)
    train("train_diffusion.py", "--config", tmp_path / "recipe.yaml", *training, "--evaluate.features", script)
    main([str(run)])  # it is trusted from now on
    (tmp_path / "home" / "infobatch-pretrain" / "named.txt").unlink()
    with pytest.raises(UserError, match=r"give --features .* once on a command line"):
        main([str(run)])
    main([str(run), "--features", str(script)])


@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning")
def test_without_a_home_directory_trust_holds_for_the_command(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "file"))
    monkeypatch.setenv(trusted_code.VARIABLE, "")
    script = tmp_path / "mean.pt"
    torch.jit.script(Mean()).save(str(script))
    with pytest.raises(UserError, match="whose code would be executed"):
        feature_extractors.load(str(script))
    trusted_code.trust_features(str(script))
    feature_extractors.load(str(script))
