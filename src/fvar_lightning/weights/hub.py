"""The Hugging Face hub (extra `hub`): files of a repository in, files of a folder out."""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

TOKEN = "HF_TOKEN"
"""Environment variable of the token that may write."""


def is_repository(name: str) -> bool:
    """Whether a name is of the form ``owner/name``."""
    return re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name, re.ASCII) is not None


def download(repository: str, files: Sequence[str], revision: str | None = None) -> Path:
    """Folder in the hub's cache, named after the commit, with those files of a repository that there are.

    Args:
        repository: ``owner/name``.
        files: names, or patterns such as ``vae*.pth``.
        revision: branch, tag or commit.

    Raises:
        ValueError: if the repository cannot be read and is not in the cache.
        ImportError: if huggingface_hub is not installed.
    """
    client = _client(f"{repository!r} is no local folder, and the Hugging Face hub")
    try:
        return Path(client.snapshot_download(repository, revision=revision, allow_patterns=list(files)))
    except Exception as error:
        raise ValueError(
            f"{repository!r} is neither a local folder nor a repository of the hub whose {' and '.join(files)} can be "
            f"had (without a network, give a folder that holds them): {_brief(error)}"
        ) from error


def check_push(repository: str) -> None:
    """Refuse, before any work, what `push` will not do.

    Raises:
        ValueError: if the name is not ``owner/name``, or the environment holds no token.
        ImportError: if huggingface_hub is not installed.
    """
    if not is_repository(repository):
        raise ValueError(f"push must be a repository of the hub, 'owner/name', got {repository!r}")
    if not os.environ.get(TOKEN):
        raise ValueError(
            f"push needs a token that may write, in the environment variable {TOKEN} "
            "(https://huggingface.co/settings/tokens)"
        )
    _client("pushing")


def push(folder: str | Path, repository: str, files: Sequence[str]) -> str:
    """Commit files of a folder to a repository, which is made if there is none; returns the commit's address.

    Args:
        folder: that holds the files.
        repository: ``owner/name``.
        files: their names.

    Raises:
        ValueError: see `check_push`, and if the hub refuses or cannot be reached.
        ImportError: if huggingface_hub is not installed.
    """
    check_push(repository)
    hub = _client("pushing").HfApi(token=os.environ[TOKEN])
    try:
        hub.create_repo(repository, exist_ok=True)
        commit = hub.upload_folder(
            repo_id=repository, folder_path=folder, allow_patterns=list(files), commit_message="Add the model"
        )
    except Exception as error:
        raise ValueError(f"{str(folder)!r} is written, but {repository!r} did not take it: {_brief(error)}") from error
    return str(commit.commit_url)


def _brief(error: Exception) -> str:
    """The hub's messages are long and end in advice."""
    first, *_ = (str(error).strip() or "no more is known").splitlines()
    return f"{type(error).__name__}: {first}"


def _client(what: str) -> Any:
    try:
        import huggingface_hub
    except ImportError as error:
        raise ImportError(f"{what} needs the extra `hub`: pip install 'fvar-lightning[hub]'") from error
    return huggingface_hub
