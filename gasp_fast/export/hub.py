"""Uploads an exported folder to the Hugging Face hub."""

from __future__ import annotations

import re
from pathlib import Path

_NAME = re.compile(r"[\w.-]{1,96}/[\w.-]{1,96}")


def check_name(repository: str) -> None:
    if not _NAME.fullmatch(repository):
        raise ValueError(f"--push-to-hub {repository!r} must be OWNER/NAME")


def upload(folder: Path, repository: str) -> str:
    """Upload the files of `folder` to `repository`, which is created as a private one if it does not exist."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    hub = HfApi()
    try:
        hub.create_repo(repository, private=True, exist_ok=True)
        hub.upload_folder(repo_id=repository, folder_path=str(folder), commit_message="Upload an export of gasp_fast")
    except HfHubHTTPError as error:
        raise OSError(f"{folder} is complete, but the upload to {repository} failed: {error}") from error
    return f"https://huggingface.co/{repository}"
