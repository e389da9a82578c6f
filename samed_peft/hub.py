"""Sharing adapters on the Hugging Face Hub."""

from pathlib import Path

from samed_peft.adapter_files import CARD_FILE, CONFIG_FILE, PEFT_FILE, WEIGHTS_FILE
from samed_peft.errors import InputError

ADAPTER_FILES = (WEIGHTS_FILE, PEFT_FILE, CONFIG_FILE, CARD_FILE)
"""All that makes an adapter, and all that is uploaded: checkpoints and reports beside it stay here."""


def push_to_hub(directory: str | Path, repo_id: str, *, private: bool = False, token: str | None = None) -> str:
    """Upload an adapter to the Hub; the repository is made if there is none.

    Args:
        directory: what `save_adapter` wrote.
        repo_id: `owner/name`, or `name` for the token's own account.
        private: whether a new repository is private; one that exists stays as it is.
        token: access token; None for the one of `hf auth login`.

    Returns:
        The address of the repository.

    Raises:
        InputError: the directory is no complete adapter or `repo_id` is malformed; nothing was sent.
    """
    from huggingface_hub import HfApi

    directory = Path(directory)
    _check_directory(directory)
    check_repo_id(repo_id)
    api = HfApi(token=token)
    repo = api.create_repo(repo_id, private=private, exist_ok=True)
    api.upload_folder(
        repo_id=repo.repo_id,
        folder_path=directory,
        allow_patterns=list(ADAPTER_FILES),
        commit_message="Upload SAMed adapter",
    )
    return str(repo)


def _check_directory(directory: Path) -> None:
    missing = [
        name for name in ADAPTER_FILES if not (directory / name).is_file() or (directory / name).stat().st_size == 0
    ]
    if missing:
        raise InputError(
            f"expected the adapter files {', '.join(ADAPTER_FILES)} in {directory}; "
            f"missing or empty: {', '.join(missing)}. Give the folder that save_adapter wrote"
        )


def check_repo_id(repo_id: str) -> None:
    """Whether `repo_id` can name a repository, without asking the Hub.

    Raises:
        InputError: it cannot.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise InputError(f"expected owner/name as repository, found {repo_id!r}: {error}") from error
