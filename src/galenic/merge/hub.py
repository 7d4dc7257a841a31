"""Models on the Hugging Face Hub: a recipe may name `owner/name`, or `owner/name@revision`.

The network is used only for a model that is no local folder, looks like a Hub id, and is not in the Hub's cache yet.
"""

from pathlib import Path

from galenic.merge.config import HUB_ID, is_hub_id
from galenic.merge.folder import COMPANIONS
from galenic.merge.io import INDEX
from galenic.runtime import UserError

WANTED = ("*.safetensors", INDEX, "LICEN*", "NOTICE*", "README.md", *(f"*{ending}" for ending in COMPANIONS))
"""What a merge reads of a repository: weights and what stands beside them, nothing pickled."""


def local_folder(model: str, download: bool = True) -> Path:
    """Returns the folder of a model: itself, or the Hub's copy of it, downloaded if it is not there yet.

    Args:
        model: a folder or a Hub id.
        download: whether the network may be used.

    Raises:
        UserError: the repository or revision does not exist, may not be read, or cannot be reached.
    """
    if not is_hub_id(model):
        return Path(model)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    found = HUB_ID.fullmatch(model)
    assert found
    repository, revision = found["repo"], found["revision"]
    try:
        return Path(
            snapshot_download(
                repository, revision=revision, allow_patterns=list(WANTED), local_files_only=not download
            )
        )
    except GatedRepoError:
        reason = "its licence must be accepted first: log in with `hf auth login` and accept it on its page"
    except RepositoryNotFoundError:
        reason = "the Hub has no such model, or it is private: log in with `hf auth login`"
    except RevisionNotFoundError:
        reason = f"it has no revision '{revision}'"
    except LocalEntryNotFoundError:
        reason = (
            "the Hub cannot be reached and has left no copy of it here"
            if download
            else f"there is no copy of it here yet; `hf download {repository}` makes one, and so does the merge"
        )
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
    raise UserError(f"{model}: no such folder, and as a Hub id: {reason}")
