"""Files of pretrained models: the hub's cache, and the hub where it answers."""

from __future__ import annotations

import http.client
import os
import threading
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

from vitviz.errors import WeightsError, first_line

__all__ = ["fetch_from_hub", "require_answer"]


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
            return Path(huggingface_hub.hf_hub_download(repo_id, name, **where))
        except huggingface_hub.errors.EntryNotFoundError:
            continue
        except (huggingface_hub.errors.HfHubHTTPError, OSError) as error:
            raise WeightsError(
                f"{repository} could not be downloaded ({first_line(error)}); "
                "try again, or give your own file with -m NAME --weights FILE"
            ) from error
    raise WeightsError(
        f"{repository} has none of {', '.join(names)}; give your own file with -m NAME "
        "--weights FILE"
    )


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
        failures.append(f"no answer within {_HUB_SECONDS} s")
        host = urllib.parse.urlsplit(url).netloc or url
        reason = f"{host} cannot be reached: {failures[0]}"
    raise WeightsError(
        f"{wanted} is not in the cache of downloaded models and {reason}; "
        "give your own file and its model with -m NAME --weights FILE, or run once where the hub "
        "can be reached"
    )


def _hub_filenames(filename: str | None) -> list[str]:
    """List the names that timm would try for a file, safetensors first."""
    if filename is None:
        return ["model.safetensors", "pytorch_model.bin"]
    if filename == "open_clip_pytorch_model.bin":
        return ["open_clip_model.safetensors", "open_clip_pytorch_model.safetensors", filename]
    if Path(filename).suffix not in (".bin", ".pth", ".pt"):
        return [filename]
    return [str(Path(filename).with_suffix(".safetensors")), filename]


def _ask(url: str, failures: list[str]) -> None:
    try:
        request = urllib.request.Request(url, method="HEAD")
        urllib.request.urlopen(request, timeout=_HUB_SECONDS).close()
    except urllib.error.HTTPError:
        pass  # an answer, whatever it says
    except (OSError, ValueError, http.client.HTTPException) as error:
        failures.append(first_line(getattr(error, "reason", error)))
