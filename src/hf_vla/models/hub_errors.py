"""What goes wrong between this computer and the Hub, in a sentence that says how to mend it."""

from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub import constants, get_token
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

TOKENS = f"{constants.ENDPOINT}/settings/tokens"


@contextmanager
def hub_errors(
    repo_id: str, revision: str | None = None, token: str | bool | None = None, write: bool = False
) -> Iterator[None]:
    """Turn what the Hub, or the way there, refuses into an OSError of one sentence; no token is in it.

    Other errors, and those that were met while one of the Hub was handled, stay themselves.

    Args:
        repo_id (`str`): the repository.
        revision (`str`, *optional*): branch, tag or commit that was asked for.
        token (`str`, *optional*): the one that was given, if any.
        write (`bool`): whether something was to be pushed.

    Raises:
        OSError: the Hub refused, or cannot be reached.
        ValueError: `repo_id` is no name of a repository.
    """
    try:
        yield
    except Exception as error:
        found = next((text for each in _causes(error) if (text := _say(each, repo_id, revision, token, write))), None)
        if found is None:
            raise
        kind = ValueError if any(isinstance(each, HFValidationError) for each in _causes(error)) else OSError
        raise kind(found) from error


def _causes(error):
    """The error and what it was made of: those that the Hub answered with before those that were made of them."""
    chain = []
    while error is not None and error not in chain:
        chain.append(error)
        error = error.__cause__
    return sorted(chain, key=lambda each: not isinstance(each, HfHubHTTPError))


def _say(error, repo_id, revision, token, write):
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    said = " ".join((getattr(error, "server_message", None) or "it does not say why").split())
    has_token = bool(token or (token is None and get_token()))
    whose = "the token that was given" if token else "the token of this computer (HF_TOKEN, or `hf auth login`)"
    if isinstance(error, HFValidationError):
        return f"Expected a name on the Hub such as owner/name, came {repo_id!r}."
    if isinstance(error, LocalTokenNotFoundError) or (write and status == 401 and not has_token):
        return (
            f"Pushing to {repo_id!r} needs a token with write permission, and none was found: run `hf auth login`, or "
            f"set HF_TOKEN; tokens are made at {TOKENS}."
        )
    if isinstance(error, GatedRepoError):
        return f"{repo_id!r} is gated: ask for access on {constants.ENDPOINT}/{repo_id}, then run `hf auth login`."
    if isinstance(error, RevisionNotFoundError):
        return (
            f"{repo_id!r} has no branch, tag or commit {revision or 'main'!r}; "
            f"{constants.ENDPOINT}/{repo_id}/tree/main lists those that there are."
        )
    if isinstance(error, RepositoryNotFoundError):
        mend = f"check whether {whose} may read it" if has_token else "run `hf auth login`, or set HF_TOKEN"
        nor = "" if write else ", nor is there a folder of that name here"
        return f"{repo_id!r} is not on the Hub, or it is private{nor}: check the name, and if it is private, {mend}."
    if status == 401:
        return (
            f"The Hub does not accept {whose}: it is wrong or has expired. Run `hf auth login` with a new one from "
            f"{TOKENS}{', with write permission' if write else ', or unset it for what is public'}."
        )
    if status == 403:
        needed = "write to" if write else "read"
        return (
            f"The Hub does not let {whose} {needed} {repo_id!r} ({said.rstrip('.')}): it may need a token with "
            f"{needed.split()[0]} permission for that owner ({TOKENS}); sign in with it by `hf auth login`."
        )
    if status == 412:
        return f"Somebody else pushed to {repo_id!r} meanwhile: push again."
    if status is not None and status >= 500:
        again = "; push again, what has arrived is not sent again" if write else "; try again later"
        return f"The Hub failed for {repo_id!r} (status {status}){again}."
    if status is not None and status != 404:  # a file that is not there is often no fault
        return f"The Hub refuses {repo_id!r} (status {status}): {said}"
    is_missing = isinstance(error, LocalEntryNotFoundError)
    if isinstance(error, OfflineModeIsEnabled) or (is_missing and constants.HF_HUB_OFFLINE):
        return f"HF_HUB_OFFLINE is set, and {repo_id!r} " + (
            "can only be pushed online: unset it."
            if write
            else f"is no folder here, nor complete in the cache {constants.HF_HUB_CACHE}: check the name, or unset it."
        )
    # of the HTTP client, which huggingface_hub has exchanged before
    is_cut = any(kind.__name__ == "TransportError" for kind in type(error).__mro__)
    if is_cut or is_missing:
        return f"The Hub ({constants.ENDPOINT}) cannot be reached for {repo_id!r}" + (
            ": check the connection, and push again: what has arrived is not sent again."
            if write
            else ", which is no folder here: check the connection, or the name."
        )
    return None
