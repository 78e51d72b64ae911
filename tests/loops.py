"""Small runs of other libraries' trainers, for tests/integrations/test_integrations.py.

Started as `loops.py FOLDER` under torchrun it makes a run with each library, and resumes it from a checkpoint inside
its second epoch; every rank leaves in FOLDER/LIBRARY the samples of its steps and the parameters of both.
"""

import sys
from pathlib import Path
from typing import Any

import lightning
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset
from torchdata.stateful_dataloader import StatefulDataLoader
from transformers import TrainingArguments

from pretrain import Indexed, InfoBatch
from pretrain.integrations.accelerate import prepare_loader
from pretrain.integrations.lightning import InfoBatchCallback
from pretrain.integrations.torchdata import StatefulSampler
from pretrain.integrations.transformers import InfoBatchTrainer

SIZE, BATCH, EPOCHS = 61, 16, 3
EVERY_STEP = {"every_n_train_steps": 1}
RESUMED = 3  # after this step, inside the second epoch of two processes


def points() -> TensorDataset:
    rng = torch.Generator().manual_seed(0)
    label = torch.randint(3, (SIZE,), generator=rng)
    return TensorDataset(torch.randn(SIZE, 4, generator=rng) + label[:, None], label)


class Net(nn.Module):
    """With the interface of a transformers model; dropout draws from the global generator."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.dropout = nn.Linear(4, 3), nn.Dropout(dropout)

    def forward(self, features: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        return {"logits": self.linear(self.dropout(features))}


class Dicts:
    def __init__(self) -> None:
        self.data = points()

    def __len__(self) -> int:
        return SIZE

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return dict(zip(("features", "labels"), self.data[index], strict=True))


class Recorded(InfoBatchTrainer):
    """Knows of each step the epoch and the samples."""

    steps: list[tuple[int, list[int]]]

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *more: Any) -> Tensor:
        self.steps.append((self.infobatch.epoch, inputs["infobatch_index"].tolist()))
        return super().training_step(model, inputs, *more)


def trainer(folder: Path, model: nn.Module | None = None, **settings: Any) -> Recorded:
    defaults = {
        "num_train_epochs": EPOCHS,
        "per_device_train_batch_size": BATCH,
        "learning_rate": 0.1,
        "optim": "sgd",
        "lr_scheduler_type": "cosine",
        "warmup_steps": 3,
        "save_steps": 1,
        "logging_steps": 1,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    data = Dicts()
    made = Recorded(
        model or Net(), TrainingArguments(str(folder), **defaults | settings), train_dataset=data, eval_dataset=data
    )
    made.steps = []
    return made


class Module(lightning.LightningModule):
    """Knows of each step the epoch and the samples."""

    infobatch: InfoBatch

    def __init__(self) -> None:
        super().__init__()
        self.net, self.steps = Net(), []

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        index, features, label = batch
        self.steps.append((self.infobatch.epoch, index.tolist()))
        return self.infobatch(F.cross_entropy(self.net(features)["logits"], label, reduction="none"), index)

    def validation_step(self, batch: list[Tensor], _: int) -> None:
        assert not self.training
        self.log("validation", F.cross_entropy(self.net(batch[0])["logits"], batch[1]))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), 0.1, momentum=0.9)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1 - self.infobatch.progress)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def fit(
    folder: Path,
    save: dict[str, Any],
    evaluate: float = 0,
    resume: Path | None = None,
    drop_last: bool = False,
    batch: int = BATCH,
    **more: Any,
) -> Module:
    module, data = Module(), points()
    callback = InfoBatchCallback(data, anneal=0.3)  # the last two epochs are longer than the second
    saving = lightning.pytorch.callbacks.ModelCheckpoint(folder, save_top_k=-1, filename="{epoch}-{step}", **save)
    defaults = {
        "accelerator": "cpu",
        "max_epochs": EPOCHS + 1,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "reload_dataloaders_every_n_epochs": 1,
        "use_distributed_sampler": False,
        "val_check_interval": evaluate or 1.0,
    }
    run = lightning.Trainer(callbacks=[callback, saving], **defaults | more)
    loaders = [callback.loader(batch, drop_last=drop_last), DataLoader(data, 30) if evaluate else None]
    run.fit(module, *loaders, ckpt_path=resume and str(resume), weights_only=True)
    return module


class Looped:
    """A loop of accelerate, with a checkpoint after each step; `resume` is one."""

    def __init__(self, folder: Path, resume: Path | None = None, accumulate: int = 1, batch: int = BATCH) -> None:
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulate)
        self.infobatch, self.steps = InfoBatch(SIZE, epochs=EPOCHS, seed=1), []
        net = Net()
        model, optimizer = accelerator.prepare(net, torch.optim.SGD(net.parameters(), 0.1, momentum=0.9))
        loader = prepare_loader(accelerator, DataLoader(Indexed(points()), batch, sampler=self.infobatch))
        if resume is not None:
            accelerator.load_state(str(resume))
        for epoch in self.infobatch.epochs():
            for index, features, label in loader:
                self.steps.append((epoch, index.tolist()))
                with accelerator.accumulate(model):
                    losses = F.cross_entropy(model(features)["logits"], label, reduction="none")
                    accelerator.backward(self.infobatch(losses, index))
                    optimizer.step()
                    optimizer.zero_grad()
                if accelerator.sync_gradients:  # accelerate does not save accumulated gradients
                    accelerator.save_state(str(folder / f"step-{len(self.steps):03d}"))
        self.net = net


class Stateful:
    """A plain loop with torchdata's loader, and a checkpoint of each rank after each step; `resume` is one."""

    def __init__(self, folder: Path, resume: Path | None = None, batch: int = BATCH, **options: Any) -> None:
        self.infobatch, self.steps, self.net = InfoBatch(SIZE, epochs=EPOCHS, seed=1), [], Net()
        model = DistributedDataParallel(self.net) if self.infobatch.world > 1 else self.net
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        loader = StatefulDataLoader(Indexed(points()), batch, sampler=StatefulSampler(self.infobatch), **options)
        parts = {"net": self.net, "optimizer": optimizer, "infobatch": self.infobatch, "loader": loader}
        if resume is not None:
            state = torch.load(resume / f"{self.infobatch.rank}.pt", weights_only=True)
            for name, part in parts.items():
                part.load_state_dict(state[name])
        for epoch in self.infobatch.epochs():
            for index, features, label in loader:
                self.steps.append((epoch, index.tolist()))
                losses = F.cross_entropy(model(features)["logits"], label, reduction="none")
                optimizer.zero_grad()
                self.infobatch(losses, index).backward()
                optimizer.step()
                self.infobatch.synchronize()
                saved = folder / f"step-{len(self.steps):03d}"
                saved.mkdir(parents=True, exist_ok=True)
                states = {name: part.state_dict() for name, part in parts.items()}
                torch.save(states, saved / f"{self.infobatch.rank}.pt")


LIBRARIES = ("transformers", "torchdata", "accelerate", "lightning")


def run_and_resume(library: str, folder: Path) -> None:
    if library == "transformers":
        runs = [trainer(folder / name, ddp_backend="gloo") for name in ("whole", "resumed")]
        runs[0].train()
        runs[1].train(resume_from_checkpoint=str(folder / "whole" / f"checkpoint-{RESUMED}"))
        models = [run.model for run in runs]
    elif library == "torchdata":
        runs = [Stateful(folder / "whole", num_workers=2)]
        runs += [Stateful(folder / "resumed", folder / "whole" / f"step-{RESUMED:03d}", num_workers=2)]
        models = [run.net for run in runs]
    elif library == "accelerate":
        runs = [Looped(folder / "whole")]
        runs += [Looped(folder / "resumed", resume=folder / "whole" / f"step-{RESUMED:03d}")]
        models = [run.net for run in runs]
    else:
        more = {"strategy": "ddp", "devices": 2}
        runs = [fit(folder / "whole", EVERY_STEP, **more)]
        (checkpoint,) = (folder / "whole").glob(f"*step={RESUMED}.ckpt")
        runs += [fit(folder / "resumed", EVERY_STEP, resume=checkpoint, **more)]
        models = [run.net for run in runs]
    found = {"steps": [run.steps for run in runs], "models": [model.state_dict() for model in models]}
    torch.save(found, folder / f"{torch.distributed.get_rank()}.pt")


if __name__ == "__main__":
    torch.distributed.init_process_group("gloo")
    for library in LIBRARIES:
        run_and_resume(library, Path(sys.argv[1], library))
    torch.distributed.destroy_process_group()
