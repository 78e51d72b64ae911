"""Exported models on the Hugging Face hub."""

from shlex import quote
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from pretrain.config.schema import Config
from pretrain.core.errors import UserError
from pretrain.export import model_card


def check(name: str) -> None:
    """Refuse what can't be a repository's name, before hours of training.

    Raises:
        UserError: it can't.
    """
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise UserError(f"--push-to-hub {name}: {' '.join(str(error).split())}") from None


def push(name: str, config: Config, summary: dict[str, Any], licence: str | None = None) -> str:
    """Upload an exported model, its card under the repository's name; the model's address.

    Args:
        name: of the repository, which is made if it is not there, with or without its owner's.
        config: the run's settings.
        summary: what it came to, see `model_card.write`.
        licence: as the hub calls it, if it is known.

    Raises:
        UserError: it could not be uploaded; nothing on disk is lost.
    """
    try:
        repository = HfApi().create_repo(name, exist_ok=True)  # knows its owner
        model_card.write(config, summary, name=repository.repo_id, licence=licence)
        HfApi().upload_folder(
            repo_id=repository.repo_id, folder_path=summary["model"], commit_message="Upload a trained model"
        )
    except Exception as error:  # whatever it is: network, token, quota, the library itself
        said = " ".join(str(error).split()) or "no reason given"
        raise UserError(
            f"--push-to-hub {name} failed ({type(error).__name__}: {said}); the model is whole in {summary['model']}, "
            f"upload it again with: pretrain export {quote(str(config.output_dir))} --push-to-hub {name}"
        ) from None
    return str(repository)
