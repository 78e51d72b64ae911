"""Exported models on the Hugging Face Hub."""

from pathlib import Path
from shlex import quote
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from pretrain.config.schema import Config
from pretrain.core.errors import UserError
from pretrain.export import model_card


def check(name: str) -> None:
    """Raise if a repository can't have this name.

    Raises:
        UserError: it can't.
    """
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise UserError(f"--push-to-hub {name}: {' '.join(str(error).split())}") from None


def push(name: str, config: Config, summary: dict[str, Any], licence: str | None = None) -> str:
    """Upload an exported model with its card.

    Args:
        name: of the repository, with or without its owner's; it is created if it does not exist.
        config: the run's settings.
        summary: the run's summary, see `model_card.write`.
        licence: its identifier on the Hub; None: unknown.

    Returns:
        The repository's URL.

    Raises:
        UserError: the upload failed; the files are unchanged.
    """
    folder = Path(summary["model"])
    for path in (folder, *sorted(folder.rglob("*"))):
        if path.is_symlink():
            raise UserError(
                f"--push-to-hub {name}: {path} is a link, and what it leads to would be uploaded; remove it, or put a "
                "copy in its place"
            )
    try:
        repository = HfApi().create_repo(name, exist_ok=True)  # it has the owner's name
        model_card.write(config, summary, name=repository.repo_id, licence=licence)
        HfApi().upload_folder(
            repo_id=repository.repo_id, folder_path=summary["model"], commit_message="Upload a trained model"
        )
    except Exception as error:  # network, token, quota, the library: exceptions of any type
        message = " ".join(str(error).split()) or "no reason given"
        raise UserError(
            f"--push-to-hub {name} failed ({type(error).__name__}: {message}); the model is complete in "
            f"{summary['model']}, upload it again with: pretrain export {quote(str(config.output_dir))} "
            f"--push-to-hub {name}"
        ) from None
    return str(repository)
