"""InfoBatch in a loop of accelerate.

infobatch = InfoBatch(data, epochs=100)
model, optimizer = accelerator.prepare(model, optimizer)
loader = prepare_loader(accelerator, DataLoader(Indexed(data), 64, sampler=infobatch))  # not accelerator.prepare
for epoch in infobatch.epochs():
    for index, image, label in loader:
        with accelerator.accumulate(model):
            losses = F.cross_entropy(model(image), label, reduction="none")
            accelerator.backward(infobatch(losses, index))
            optimizer.step()
            optimizer.zero_grad()
        accelerator.save_state(folder)  # after any optimizer step; accelerator.load_state(folder) continues there
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportMissingTypeStubs=false

from typing import Any

from accelerate import Accelerator
from accelerate.data_loader import prepare_data_loader
from torch.utils.data import DataLoader

from pretrain.infobatch.sampler import InfoBatch


def prepare_loader(accelerator: Accelerator, loader: DataLoader[Any]) -> DataLoader[Any]:
    """Use a loader with InfoBatch in a loop of accelerate, in place of `accelerator.prepare(loader)`.

    Batches come on the accelerator's device, and `accelerator.accumulate` knows where an epoch ends. The samples are
    not split among processes a second time: InfoBatch gives each process its own. `save_state` and `load_state` include
    the scores and the position in the epoch; all processes call them.

    Don't call `skip_first_batches` after `load_state`. As always in accelerate, accumulated gradients are not saved, so
    save where `accelerator.sync_gradients` is true, and the last window of an epoch that has fewer than
    `gradient_accumulation_steps` batches has a smaller weight.

    Args:
        accelerator: of the loop.
        loader: of `Indexed(data)`, with the InfoBatch as its `sampler`.

    Raises:
        ValueError: the loader has another sampler.
    """
    infobatch = loader.sampler
    if not isinstance(infobatch, InfoBatch):
        raise ValueError(
            f"the sampler of the loader must be an InfoBatch, got {type(infobatch).__name__}; give "
            "DataLoader(Indexed(data), batch_size, sampler=infobatch)"
        )

    def synchronize(*_: object) -> None:
        infobatch.synchronize()  # the checkpoint is of the main process, the losses of all

    accelerator.register_save_state_pre_hook(synchronize)
    accelerator.register_for_checkpointing(infobatch)
    return prepare_data_loader(
        loader, accelerator.device, num_processes=1, process_index=0, put_on_device=True, rng_types=[]
    )
