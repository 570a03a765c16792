"""Look up files of a repository on the Hugging Face Hub, or in its local cache, without downloading them."""

from functools import cache
from pathlib import Path

from huggingface_hub import constants, get_hf_file_metadata, get_session, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HTTPError, OfflineModeIsEnabled


def unreachable_hub() -> str | None:
    """Return why the Hub cannot be reached, or None if it answers, even with an error."""
    try:
        get_session().head(constants.ENDPOINT, timeout=10)
    except (HTTPError, OfflineModeIsEnabled) as error:
        reason = next(iter(str(error).splitlines()), "no answer")
        return f"{constants.ENDPOINT}: {type(error).__name__}: {reason}"
    return None


@cache
def _hub_answers() -> bool:
    return unreachable_hub() is None


def etag(repo: str, names: list[str]) -> tuple[str | None, str | None]:
    """Return the ETag of the first of these files that a repository has, or None; and why it is unknown, or None."""
    repo, _, revision = repo.partition("@")
    why = f"{repo} has none of {', '.join(names)}" if _hub_answers() else f"{constants.ENDPOINT} does not answer"
    for name in names if _hub_answers() else ():
        try:
            found = get_hf_file_metadata(hf_hub_url(repo, name, revision=revision or None), timeout=10).etag
            return found, None if found else f"{constants.ENDPOINT} gives no ETag of {repo}'s {name}"
        except EntryNotFoundError:
            continue
        except (HTTPError, HfHubHTTPError, OfflineModeIsEnabled) as error:  # gone, private, or cut off
            why = f"{type(error).__name__}: {next(iter(str(error).splitlines()), 'no answer')}"
            break
    files = (try_to_load_from_cache(repo, name, revision=revision or None) for name in names)
    cached = next((Path(file) for file in files if isinstance(file, str)), None)
    return (cached.resolve().name, None) if cached else (None, why)  # the cache names blobs by their ETag


def in_cache(repo: str, filename: str) -> bool:
    repo, _, revision = repo.partition("@")
    return isinstance(try_to_load_from_cache(repo, filename, revision=revision or None), str)
