"""The upload to the Hugging Face Hub, with the user's own login; only what `model/` holds, only when asked."""

from pathlib import Path
from typing import Any

from galenic.corpus.synthesis.client import http_library
from galenic.runtime import UserError


def push(folder: Path, repository: str, private: bool) -> str:
    """Uploads a model folder in one commit; makes the repository if there is none.

    Args:
        folder: of the model, with its card.
        repository: `USER/NAME`.
        private: make it private; one that is public already is left alone.

    Returns:
        The repository's address.

    Raises:
        UserError: no card, not logged in, not allowed, not reached, or public where private was asked for.
    """
    if not (folder / "README.md").is_file():
        raise UserError(
            f"{folder}: no README.md; a model goes to the Hub with a card that says what it is for"
        )
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

    api = HfApi()
    try:
        _make(api, repository, private)
        api.upload_folder(
            repo_id=repository,
            folder_path=folder,
            commit_message="Export with Galenic",
            ignore_patterns=[".*"],
        )
        return f"{api.endpoint}/{repository}"
    except LocalTokenNotFoundError:
        reason = "you are not logged in: run `hf auth login` first"
    except OfflineModeIsEnabled:
        reason = "the Hub is switched off (HF_HUB_OFFLINE)"
    except HfHubHTTPError as error:
        reason = _reason(error)
    except (OSError, ValueError, http_library().HTTPError) as error:
        if isinstance(error, UserError):
            raise
        reason = f"the Hub cannot be reached ({' '.join(str(error).split())[:200]})"
    raise UserError(f"push_to_hub: {repository}: {reason}; the export in {folder} is whole")


def _make(api: Any, repository: str, private: bool) -> None:
    """Makes the repository; refuses one that others can see where that was not wanted."""
    api.create_repo(repository, private=private, exist_ok=True)
    if private and not api.model_info(repository).private:
        raise UserError(
            f"push_to_hub: {repository} exists and is public, and --private was given; nothing was uploaded"
        )


def _reason(error: Any) -> str:
    status = getattr(error.response, "status_code", None)
    said = " ".join(str(getattr(error, "server_message", "") or "").split())[:200]
    if status == 401:
        return "you are not logged in, or the token is not valid any more: run `hf auth login`"
    if status == 403:
        return f"your token may not write there; make one with write access ({said})"
    return f"the Hub answers {status} ({said})"
