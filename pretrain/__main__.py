"""The command `pretrain`, and `python -m pretrain`: two programs that train, and what is done with their runs."""

import sys
from importlib import import_module

from pretrain import __version__
from pretrain.core.errors import UserError, exit_on_user_error

# By name: the module, whose `main` it is, and what it does. Nothing is imported to list them.
COMMANDS = {
    "diffusion": ("pretrain.train_diffusion", "train a diffusion model, as `python train_diffusion.py` does"),
    "mae": ("pretrain.train_mae", "pretrain a masked autoencoder, as `python train_mae.py` does"),
    "generate": ("pretrain.evaluation.generate", "make images with a run's model"),
    "evaluate": (
        "pretrain.evaluation.evaluate",
        "measure a run's model: FID, loss, k-NN, probes, fine-tuning",
    ),
    "visualize": ("pretrain.evaluation.visualize", "draw what a masked autoencoder has learned"),
    "export": ("pretrain.export.export", "write a run's model for diffusers, timm or transformers, or upload it"),
    "encode-latents": ("pretrain.data.encode_latents", "encode images once with an autoencoder, to train on latents"),
    "ema": ("pretrain.checkpoint.ema_snapshots", "reconstruct the average of another length from a run's snapshots"),
    "replay": ("pretrain.training.replay_step", "repeat the step whose loss or gradient was not finite"),
    "verify-resume": (
        "pretrain.checkpoint.verify_resume",
        "prove that a killed run of yours resumes exactly",
    ),
}


def usage() -> str:
    """What `--help` says."""
    rows = (f"  {name:<15} {words}" for name, (_, words) in COMMANDS.items())
    return (
        "usage: pretrain COMMAND [settings]\n\n" + "\n".join(rows) + "\n\n`pretrain COMMAND --help` lists its settings."
    )


def main() -> None:
    """Hand the rest of the command line to a command."""
    with exit_on_user_error():
        name, *arguments = sys.argv[1:] or ["--help"]
        if name in ("-h", "--help", "--version"):
            sys.stdout.write((__version__ if name == "--version" else usage()) + "\n")
            return
        if name not in COMMANDS:
            raise UserError(f"pretrain {name}: there is no such command; there are {', '.join(COMMANDS)}")
        sys.argv = [f"pretrain {name}", *arguments]
        import_module(COMMANDS[name][0]).run()


if __name__ == "__main__":
    main()
