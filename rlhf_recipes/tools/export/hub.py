"""Upload of an exported folder to the hub: checked before the work, private unless it is asked for otherwise."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)


def check_push(api: Any, name: str) -> None:
    """Check that an upload can succeed: the name, the token, and that nothing is there yet.

    Args:
        api: `huggingface_hub.HfApi`, or what has its methods.
        name: `ORG/NAME` of the new repository.

    Raises:
        ValueError: If the name is malformed, there is no valid token, the token may not write there, or a repository
            of this name exists.
    """
    if not _NAME.fullmatch(name) or ".." in name or "--" in name:
        raise ValueError(f"`--push` takes ORG/NAME, one slash and letters, digits, '-', '_' or '.', got {name!r}.")
    try:
        account = api.whoami()
    except OSError as error:
        raise ValueError(
            f"The hub does not know who you are ({str(error).splitlines()[0]}). Log in with `hf auth login`, or set "
            "HF_TOKEN to a token that may write."
        ) from error
    owner = name.partition("/")[0]
    owners = [account.get("name"), *(org.get("name") for org in account.get("orgs") or [])]
    if owner not in owners:
        raise ValueError(f"The token is that of {owners[0]!r}, who is not in {owner!r}. Name one of {owners}.")
    role = ((account.get("auth") or {}).get("accessToken") or {}).get("role")
    if role == "read":
        raise ValueError("The token may only read. Make one that may write at https://huggingface.co/settings/tokens.")
    if api.repo_exists(name):
        raise ValueError(f"{name} is on the hub already, and is not overwritten. Choose another name.")


def push_folder(api: Any, folder: str | Path, name: str, *, public: bool) -> str:
    """Make a repository and upload all files of a folder into it.

    Args:
        api: As of `check_push`.
        folder: The exported folder.
        name: `ORG/NAME`.
        public: Whether everybody may see it.

    Returns:
        Address of the repository.
    """
    address = api.create_repo(name, private=not public, exist_ok=False)
    api.upload_folder(repo_id=name, folder_path=str(folder), commit_message="Export of rlhf-recipes")
    return str(address)
