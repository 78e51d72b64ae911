"""The command `pretrain`, also `python -m pretrain`: the training programs, and commands for their runs."""

import sys
from importlib import import_module
from importlib.util import find_spec

from pretrain import __version__
from pretrain.core.errors import UserError, exit_on_user_error, writing_output

INSTALL = "pip install 'infobatch-pretrain[train]'"

# By name: the module with its function `run`, imported on use, and what it does.
COMMANDS = {
    "diffusion": ("pretrain.train_diffusion", "train a diffusion model (python train_diffusion.py)"),
    "mae": ("pretrain.train_mae", "pretrain a masked autoencoder (python train_mae.py)"),
    "generate": ("pretrain.evaluation.generate", "generate images with a run's model"),
    "evaluate": (
        "pretrain.evaluation.evaluate",
        "evaluate a run's model: validation loss, FID, k-NN, linear probe, fine-tuning",
    ),
    "visualize": (
        "pretrain.evaluation.visualize",
        "draw reconstructions, attention and features of a masked autoencoder",
    ),
    "report": ("pretrain.export.report", "write a page about runs: curves, samples over time, cost, differences"),
    "export": ("pretrain.export.export", "export a run's model to diffusers, timm or transformers, or upload it"),
    "coreset": ("pretrain.evaluation.coreset", "select a subset of the training images, for --data.subset"),
    "encode-latents": (
        "pretrain.data.encode_latents",
        "encode a data set with an autoencoder, for training on latents",
    ),
    "ema": ("pretrain.checkpoint.ema_snapshots", "reconstruct an EMA of another width from a run's snapshots"),
    "replay": ("pretrain.training.replay_step", "repeat the step at which losses or gradients were not finite"),
    "verify-resume": (
        "pretrain.checkpoint.verify_resume",
        "test that a killed and resumed run of your settings is exact",
    ),
}


def usage() -> str:
    """The text of `--help`; without the packages of the extra `train` it ends with the command that installs them."""
    rows = (f"  {name:<15} {what}" for name, (_, what) in COMMANDS.items())
    return (
        "usage: pretrain COMMAND [settings]\n\n"
        + "\n".join(rows)
        + "\n\n`pretrain COMMAND --help` lists the settings of a command."
        + ("" if find_spec("tyro") else f"\nThe commands need packages that are not installed; {INSTALL}")
    )


def main() -> None:
    """Run the command that the command line names, with the rest of the arguments."""
    with exit_on_user_error():
        name, *arguments = sys.argv[1:] or ["--help"]
        if name in ("-h", "--help", "--version"):
            with writing_output():
                sys.stdout.write((__version__ if name == "--version" else usage()) + "\n")
            return
        if name not in COMMANDS:
            raise UserError(f"pretrain {name}: there is no such command; the commands are {', '.join(COMMANDS)}")
        sys.argv = [f"pretrain {name}", *arguments]
        try:
            command = import_module(COMMANDS[name][0])
        except ModuleNotFoundError as error:
            if error.name is None or error.name.partition(".")[0] in ("pretrain", "models"):
                raise
            raise UserError(f"pretrain {name} needs {error.name}, which is not installed; {INSTALL}") from None
        command.run()


if __name__ == "__main__":
    main()
