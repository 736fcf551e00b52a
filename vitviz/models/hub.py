"""Files of pretrained models: the hub's cache, and the hub where it answers."""

from __future__ import annotations

import http.client
import logging
import os
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vitviz.errors import WeightsError, first_line
from vitviz.models.weight_files import INDEX_FILES

__all__ = ["fetch_from_hub", "fetch_if_there", "require_answer"]


_STATUSES = {
    429: "answers 429, too many requests from here: wait some minutes, or log in",
    **{code: f"answers {code}, it is in trouble: try again later" for code in (500, 502, 503, 504)},
}
_HUB_SECONDS = 4  # how long the hub may take to say that it is there


def fetch_from_hub(repository: str, filename: str | None) -> Path:
    """Find a file of a pretrained model in the hub's cache, or download it.

    Args:
        repository: ``owner/name``, with ``@revision`` where one is meant.
        filename: The file, or None for the usual names.

    Raises:
        WeightsError: It is not in the cache, and the hub cannot be reached or does not have it.
    """
    import huggingface_hub

    repo_id, _, tag = repository.partition("@")
    endpoint = os.environ.get("HF_ENDPOINT") or None
    where: dict[str, Any] = {"revision": tag or None, "endpoint": endpoint}
    names = _hub_filenames(filename)
    try:
        for name in names:
            cached = huggingface_hub.try_to_load_from_cache(repo_id, name, revision=tag or None)
            if isinstance(cached, str):
                return Path(cached)
        url = huggingface_hub.hf_hub_url(repo_id, names[0], **where)
    except huggingface_hub.errors.HFValidationError as error:
        raise WeightsError(
            f"{repository!r} is no name on the hub ({first_line(error)}); expected owner/name"
        ) from error
    require_answer(url, repository)
    for name in names:
        try:
            with _unheard():
                return Path(huggingface_hub.hf_hub_download(repo_id, name, **where))
        except Exception as error:  # those of whichever HTTP library the hub's client has today
            cause = _cause(error)
            if isinstance(cause, huggingface_hub.errors.EntryNotFoundError):
                continue
            raise WeightsError(
                f"{repository} could not be downloaded: {_trouble(cause)}; or give your own file "
                "with -m NAME --weights FILE"
            ) from error
    raise _NoSuchFileError(
        f"{repository} has none of {', '.join(names)}; give your own file with -m NAME "
        "--weights FILE"
    )


def fetch_if_there(repository: str, filename: str) -> Path | None:
    """Do the same for a file that a model may do without; None where it has none.

    Raises:
        WeightsError: It is not known whether it has one, and the hub cannot be reached.
    """
    import huggingface_hub

    repo_id, _, tag = repository.partition("@")
    known = huggingface_hub.try_to_load_from_cache(repo_id, filename, revision=tag or None)
    if known is not None and not isinstance(known, str):
        return None  # the cache remembers that it is not there
    try:
        return fetch_from_hub(repository, filename)
    except _NoSuchFileError:
        return None


class _NoSuchFileError(WeightsError):
    """A model on the hub does not have a file."""


def require_answer(url: str, wanted: str) -> None:
    """Ask once whether a server answers; left alone, the hub's client retries for a minute.

    Args:
        url: Where to ask.
        wanted: What is wanted from there, for the message.

    Raises:
        WeightsError: There is no answer within seconds, or asking is switched off.
    """
    from huggingface_hub import constants

    failures: list[str] = []
    if constants.HF_HUB_OFFLINE:
        reason = "HF_HUB_OFFLINE is set"
    else:
        # A thread, since looking up a name has no time limit of its own.
        asking = threading.Thread(target=_ask, args=(url, failures), daemon=True)
        asking.start()
        asking.join(_HUB_SECONDS)
        if not asking.is_alive() and not failures:
            return
        failures.append(f"cannot be reached: no answer within {_HUB_SECONDS} s")
        host = urllib.parse.urlsplit(url).netloc or url
        reason = f"{host} {failures[0]}"
    raise WeightsError(
        f"{wanted} is not in the cache of downloaded models and {reason}; "
        "give your own file and its model with -m NAME --weights FILE, or run once where the hub "
        "can be reached"
    )


def _hub_filenames(filename: str | None) -> list[str]:
    """List the names that timm would try for a file, safetensors first."""
    if filename is None:
        return ["model.safetensors", "pytorch_model.bin", *INDEX_FILES]
    if filename == "open_clip_pytorch_model.bin":
        return ["open_clip_model.safetensors", "open_clip_pytorch_model.safetensors", filename]
    if Path(filename).suffix not in (".bin", ".pth", ".pt"):
        return [filename]
    return [str(Path(filename).with_suffix(".safetensors")), filename]


def _ask(url: str, failures: list[str]) -> None:
    try:
        request = urllib.request.Request(url, method="HEAD")
        urllib.request.urlopen(request, timeout=_HUB_SECONDS).close()
    except urllib.error.HTTPError as error:  # an answer, though not always a hub at work
        if error.code in _STATUSES:
            failures.append(_STATUSES[error.code])
    except (OSError, ValueError, http.client.HTTPException) as error:
        failures.append(f"cannot be reached: {first_line(getattr(error, 'reason', error))}")


@contextmanager
def _unheard() -> Iterator[None]:
    """Keep the hub's client from logging each of its attempts: one line tells of them all."""
    log = logging.getLogger("huggingface_hub")
    before = log.level
    log.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        log.setLevel(before)


def _cause(error: BaseException) -> BaseException:
    """Return what went wrong first, where a file is only said to be nowhere for that."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    while isinstance(error, LocalEntryNotFoundError) and error.__cause__ is not None:
        error = error.__cause__
    return error


def _trouble(error: BaseException) -> str:
    """Say what is wrong with the hub, or with the way to it, and what to do about it."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, GatedRepoError) or status == 403:
        return (
            "it is gated: ask for access on its page on the hub, and log in with `hf auth login` "
            "or HF_TOKEN"
        )
    if isinstance(error, RepositoryNotFoundError) or status == 401:
        return (
            "the hub shows no such model: check the name, and if it is private, log in with "
            "`hf auth login` or HF_TOKEN"
        )
    if status in _STATUSES:
        return f"the hub {_STATUSES[status]}"
    if isinstance(error, (ImportError, ValueError)) or "proxy" in type(error).__name__.lower():
        return (
            f"the way to the hub does not work ({first_line(error)}); mend or unset the proxy in "
            "the environment (ALL_PROXY, HTTPS_PROXY)"
        )
    return f"the connection broke off ({first_line(error)}); try again"
