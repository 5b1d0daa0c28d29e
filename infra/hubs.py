"""Model hubs: whether what a recipe takes from one can be had, asked before anything starts.

Their libraries ask again and again before they give up, even where the file lies in their own cache:
told that the hub cannot be reached, they take what is there at once.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path

from configs.errors import UserError, brief
from infra import reach, servers

OFFLINE = "HF_HUB_OFFLINE"
_NOT_KEPT = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES)
_FILES = ("model.safetensors", "pytorch_model.bin")


def refusal() -> str | None:
    """Why the Hugging Face hub cannot be asked from here; None where it can."""
    from huggingface_hub import constants

    if constants.is_offline_mode():
        return f"{OFFLINE} is set"
    return reach.refusal(constants.ENDPOINT)


def errors() -> tuple[type[Exception], ...]:
    """What the hub's library raises: of answers, connections and names, and of large files."""
    from httpx import HTTPError

    return HTTPError, OSError, ValueError, RuntimeError


def answered(error: Exception, repository: str, file: str = "", revision: str = "") -> str | None:
    """What is wrong about a file of the hub, with the way out; None where it did not answer."""
    from huggingface_hub import errors as kinds

    match error:
        case kinds.LocalEntryNotFoundError():
            return None
        case kinds.RepositoryNotFoundError():  # gated ones too
            return (
                f"the hub shows no repository {repository} to this token: check the name; where it is "
                "private or gated, ask for access on its page, then set HF_TOKEN or log in with "
                "`hf auth login`"
            )
        case kinds.RevisionNotFoundError():
            return f"{repository} has no revision {revision}; check the name after the @"
        case kinds.EntryNotFoundError():
            return f"the hub has no {file} in {repository}; check the name"
        case kinds.HfHubHTTPError() | ValueError() | RuntimeError():
            return f"the hub refuses it ({brief(error)})"
        case OSError() if error.errno in _NOT_KEPT:
            mend = "set HF_HOME to a folder with room where you may write"
            return f"it cannot be kept here ({error.strerror}): {mend}"
    return None


def check_timm(field: str, name: str) -> None:
    """Refuse a network whose weights neither lie here nor can be had from timm's hub.

    Where they lie here and the hub cannot be reached, processes started from now on do not ask it.

    Raises:
        UserError: naming the field, why the hub cannot be reached, and the way out.
    """
    if servers.elsewhere() or (said := refusal()) is None:
        return
    if not _timm_kept(name):
        raise UserError(
            f"{field} is hub, but the weights of {name} are not on this machine and {said}; or fetch them "
            f"elsewhere and give their path or URL in {field}"
        )
    os.environ[OFFLINE] = "1"


def check_torch(field: str, url: str) -> None:
    """Refuse torchvision's weights that neither lie here nor can be had. Raises UserError."""
    import torch

    kept = Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]
    if servers.elsewhere() or kept.is_file() or (said := reach.refusal(url)) is None:
        return
    raise UserError(
        f"{field} is hub, but {kept.name} is not on this machine and {said}; or fetch it elsewhere and give its "
        f"path or URL in {field}"
    )


def _timm_kept(name: str) -> bool:
    import timm
    import torch
    from huggingface_hub import try_to_load_from_cache

    config = timm.get_pretrained_cfg(name)
    if config is None:  # timm has no weights of this network: it tells
        return True
    named = getattr(config, "hf_hub_id", None) or ""
    files = [getattr(config, "hf_hub_filename", None) or "", *_FILES]
    if named and any(isinstance(try_to_load_from_cache(named, file), str) for file in files if file):
        return True
    file = (getattr(config, "url", None) or "").rpartition("/")[2]
    return bool(file) and (Path(torch.hub.get_dir()) / "checkpoints" / file).is_file()
