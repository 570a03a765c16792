"""What the Hugging Face Hub, or its cache on this machine, says of a repository, before anything is downloaded."""

from functools import cache
from pathlib import Path

from huggingface_hub import constants, get_hf_file_metadata, get_session, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HTTPError, OfflineModeIsEnabled


def unreachable_hub() -> str | None:
    """Why the Hub cannot be reached, or None where it answers, whatever the answer."""
    try:
        get_session().head(constants.ENDPOINT, timeout=10)
    except (HTTPError, OfflineModeIsEnabled) as error:
        reason = next(iter(str(error).splitlines()), "no answer")
        return f"{constants.ENDPOINT}: {type(error).__name__}: {reason}"
    return None


@cache
def _hub_answers() -> bool:
    return unreachable_hub() is None


def etag(repo: str, names: list[str]) -> str | None:
    """Of the first of these files that a repository has; None where neither the Hub nor the cache knows."""
    repo, _, revision = repo.partition("@")
    for name in names:
        url = hf_hub_url(repo, name, revision=revision or None)
        try:
            return get_hf_file_metadata(url, timeout=10).etag if _hub_answers() else _cached_etag(repo, name, revision)
        except EntryNotFoundError:
            continue
        except (HTTPError, HfHubHTTPError, OfflineModeIsEnabled):  # gone, private, or cut off: loading it will say so
            return _cached_etag(repo, name, revision)
    return None


def _cached_etag(repo: str, name: str, revision: str) -> str | None:
    file = try_to_load_from_cache(repo, name, revision=revision or None)
    return Path(file).resolve().name if isinstance(file, str) else None  # the cache calls blobs by their ETag


def in_cache(repo: str, filename: str) -> bool:
    repo, _, revision = repo.partition("@")
    return isinstance(try_to_load_from_cache(repo, filename, revision=revision or None), str)
