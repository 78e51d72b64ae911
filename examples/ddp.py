"""InfoBatch with DistributedDataParallel: several processes take the same steps as one.

torchrun --standalone --nproc_per_node 2 examples/ddp.py
"""

import torch
import torch.distributed
import torch.nn.functional as F
import tyro
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from toy import data, learning_rate, network, report

from pretrain import Indexed, InfoBatch


def main(epochs: int = 20, batch_size: int = 60, save: str = "") -> None:
    """Train a small classifier.

    Args:
        epochs: passes over the data.
        batch_size: samples per step, over all processes.
        save: file that rank 0 writes the parameters to.
    """
    gpu = torch.cuda.is_available()
    torch.distributed.init_process_group("nccl" if gpu else "gloo")
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    device = torch.device("cuda", rank % torch.cuda.device_count()) if gpu else torch.device("cpu")
    if gpu:
        torch.cuda.set_device(device)
    samples = data()
    model = DistributedDataParallel(network().to(device))
    optimizer = torch.optim.SGD(model.parameters(), learning_rate(0.0), momentum=0.9)
    infobatch = InfoBatch(samples, epochs=epochs)  # after init_process_group, which gives it rank and world size
    # InfoBatch divides the samples among the ranks itself, so there is no DistributedSampler. If their number is not a
    # multiple of the world size, some ranks get padding (a negative index): all ranks take the same number of steps.
    loader = DataLoader(Indexed(samples), batch_size // world, sampler=infobatch)
    for _ in infobatch.epochs():
        for index, features, label in loader:
            optimizer.param_groups[0]["lr"] = learning_rate(infobatch.progress)
            losses = F.cross_entropy(model(features.to(device)), label.to(device), reduction="none")
            optimizer.zero_grad()
            infobatch(losses, index).backward()  # DDP's average over ranks is the mean over the global batch
            optimizer.step()
    if rank == 0:
        print(report(model.module.cpu(), infobatch.samples_used, epochs))
        if save:
            torch.save({"score": infobatch.score, **model.module.state_dict()}, save)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    tyro.cli(main)
