"""Files of the Hugging Face hub: downloaded if the hub answers, else taken from the local cache.

Without a connection, the hub's client repeats every request for about 25 seconds, also for files
that are in the cache. Here, one short request finds out first whether the hub answers.
"""

from __future__ import annotations

import os
import threading
from pathlib import Path

from captum_reflected.errors import ModelLoadError
from captum_reflected.models.weights import reason

_SECONDS = 4.0
# A proxy's answers when it cannot reach the host behind it.
_GATEWAY_ERRORS = {502, 503, 504}

# The parts of a model that are read: no pickles, and no second copy in another format.
_FILES = (
    "*.json",
    "*.txt",
    "*.model",
    "model.safetensors",
    "model-*-of-*.safetensors",
)


def hub_problem() -> str | None:
    """Why nothing can be downloaded from the hub now, or ``None`` if the hub answers.

    The hub is huggingface.co or the mirror that ``HF_ENDPOINT`` names. The request is made by the
    hub's own client, so that it takes the same proxies and certificates as a download. It may take
    4 seconds, or ``HF_HUB_ETAG_TIMEOUT`` if that is set, for slow connections.
    """
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE forbids downloads"
    is_set = "HF_HUB_ETAG_TIMEOUT" in os.environ
    seconds = float(constants.HF_HUB_ETAG_TIMEOUT) if is_set else _SECONDS
    answers: list[str | None] = []

    def ask() -> None:
        try:
            status = get_session().head(constants.ENDPOINT, timeout=seconds).status_code
        except Exception as error:  # the client and its transport raise errors of many types
            answers.append(reason(error))
        else:
            answers.append(f"status {status}" if status in _GATEWAY_ERRORS else None)

    # A thread, because looking up a host's address has no timeout.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(seconds)
    problem = answers[0] if answers else f"no answer within {seconds:g} seconds"
    return None if problem is None else f"{constants.ENDPOINT} cannot be reached ({problem})"


def hub_file(repository: str, file: str, *, instead: str) -> Path:
    """A file of the hub, in the local cache.

    Args:
        repository: ``OWNER/NAME``, with ``@REVISION`` behind it if it is not the main one.
        file: its path in the repository.
        instead: for the error, what can be given in place of a download.

    Raises:
        ModelLoadError: the file is not in the cache and cannot be downloaded.
    """
    problem = hub_problem()
    path = cached_file(repository, file) if problem else None
    if path is not None:
        return path
    if problem is not None:
        raise unreachable(f"{file} of {repository}", problem, instead)
    from huggingface_hub import hf_hub_download

    name, _, revision = repository.partition("@")
    try:
        return Path(hf_hub_download(name, file, revision=revision or None))
    except Exception as error:  # the hub client raises errors of many types
        raise ModelLoadError(
            f"cannot download {file} of {repository}: {reason(error)}; wanted: {instead}"
        ) from error


def cached_file(repository: str, file: str) -> Path | None:
    """A file of the hub, if it is in the local cache; see :func:`hub_file`."""
    from huggingface_hub import hf_hub_download

    name, _, revision = repository.partition("@")
    try:
        return Path(hf_hub_download(name, file, revision=revision or None, local_files_only=True))
    except (OSError, ValueError):  # it is not there, or the name is none that the hub takes
        return None


def hub_folder(repository: str) -> Path:
    """A folder in the local cache with a model of the hub, as ``save_pretrained`` writes it.

    Args:
        repository: as in :func:`hub_file`.

    Raises:
        ModelLoadError: the model is not in the cache and cannot be downloaded.
    """
    from huggingface_hub import snapshot_download

    problem = hub_problem()
    instead = "a local folder with the model"
    name, _, revision = repository.partition("@")
    try:
        return Path(
            snapshot_download(
                name,
                revision=revision or None,
                allow_patterns=list(_FILES),
                local_files_only=problem is not None,
            )
        )
    except Exception as error:  # the hub client raises errors of many types
        if problem is not None:
            raise unreachable(f"model {repository}", problem, instead) from error
        raise ModelLoadError(
            f"cannot download model {repository}: {reason(error)}; wanted: the name of a model on "
            f"the hub, or {instead}"
        ) from error


def unreachable(what: str, problem: str, instead: str) -> ModelLoadError:
    """The error for a file that is not in the cache while the hub does not answer.

    Args:
        what: is missing.
        problem: as :func:`hub_problem` returns it.
        instead: what can be given in place of a download.
    """
    from huggingface_hub import constants

    return ModelLoadError(
        f"cannot download {what}: {problem}, and it is not in the cache "
        f"{constants.HF_HUB_CACHE}; wanted: a connection (HF_ENDPOINT may name a mirror), or "
        f"{instead}"
    )
