"""Share adapters on the Hugging Face Hub."""

import contextlib
import json
import logging
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TypeVar

import httpx2
from huggingface_hub import CommitOperationAdd, HfApi, RepoUrl, constants, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OIDCError
from huggingface_hub.utils import validate_repo_id

from samed_peft.adapters.folder import first_line
from samed_peft.errors import InputError
from samed_peft.hub.content import published_files

WAITS_S = (1.0, 4.0, 10.0)
"""Seconds before each retry of a request that the Hub did not answer, or postponed."""

_LONGEST_WAIT_S = 60.0
_TRANSIENT = (408, 429, 500, 502, 503, 504)
_log = logging.getLogger(__name__)
T = TypeVar("T")


def push_to_hub(
    directory: str | Path,
    repo_id: str,
    *,
    private: bool = False,
    token: str | None = None,
    pictures: bool = False,
    cases: bool = False,
) -> str:
    """Upload an adapter to the Hub in one commit; a missing repository is created.

    The adapter's four files are sent and, if it was evaluated, `report.json` and `report.md`. Absolute paths are cut
    to their last part, and of the report only means over cases are sent; see `content.published_files`. Local files
    are only read. Files that the Hub already has are not committed again, so that a push may be repeated.

    Args:
        directory: a folder that `save_adapter` wrote.
        repo_id: `owner/name`, or `name` for the token's own account.
        private: create the repository as private, and refuse an existing public one; otherwise a new one follows its
            owner's defaults, and an existing one stays as it is.
        token: access token; None for HF_TOKEN or the one of `hf auth login`.
        pictures: also send the report's pictures; they show scans.
        cases: also send names and scores of single cases.

    Returns:
        The address of the repository.

    Raises:
        InputError: the directory is not a complete adapter, `repo_id` is malformed, or the Hub cannot be reached or
            refuses.
    """
    files = published_files(directory, pictures=pictures, cases=cases)
    return send_files(files, repo_id, private=private, token=token)


def send_files(
    files: Mapping[str, bytes],
    repo_id: str,
    *,
    private: bool = False,
    token: str | None = None,
    waits_s: Sequence[float] = WAITS_S,
) -> str:
    """Commit files (name in the repository -> content) to the Hub; see `push_to_hub`.

    Raises:
        InputError: `repo_id` is malformed, or the Hub cannot be reached or refuses.
    """
    check_repo_id(repo_id)
    if constants.is_offline_mode():
        raise InputError(f"nothing was sent to {repo_id}: HF_HUB_OFFLINE is set; unset it to reach the Hub")
    token = _token(token)
    api = HfApi(token=token)
    with _clear_errors(repo_id, api.endpoint, token):
        repo = _open_repository(api, repo_id, waits_s, private=private)
        _commit(api, repo.repo_id, files, waits_s)
    return str(repo)


def _open_repository(api: HfApi, repo_id: str, waits_s: Sequence[float], *, private: bool) -> RepoUrl:
    """Create or find the repository; refuse a public one if it should be private."""
    make = partial(api.create_repo, repo_id, private=private or None, exist_ok=True)
    # Waiting does not help without any connection; one that is lost later may come back.
    repo = _retried(make, waits_s, hopeless=(httpx2.ConnectError,))
    if private and not _retried(partial(api.model_info, repo.repo_id), waits_s).private:
        raise InputError(
            f"expected a private repository, but {repo_id} exists and is public; nothing was sent. Make it private "
            "in its settings on the Hub, choose another name, or push without private"
        )
    return repo


def _commit(api: HfApi, repo_id: str, files: Mapping[str, bytes], waits_s: Sequence[float]) -> None:
    def additions() -> list[CommitOperationAdd]:
        return [CommitOperationAdd(name, data) for name, data in files.items()]

    uploaded = [additions()]
    api.preupload_lfs_files(repo_id, uploaded[0], free_memory=False)  # the library repeats each of its requests

    def commit() -> None:
        # A retry asks again which files are there: the commit may have arrived and only the answer been lost.
        batch = uploaded.pop() if uploaded else additions()
        api.create_commit(repo_id, batch, commit_message="Upload SAMed adapter")

    _retried(commit, waits_s)


def _retried(request: Callable[[], T], waits_s: Sequence[float], hopeless: tuple[type[Exception], ...] = ()) -> T:
    """Repeat a request after each of the waits while the Hub is busy or does not answer."""
    for wait_s in waits_s:
        try:
            return request()
        except hopeless:
            raise
        except HfHubHTTPError as error:
            if error.response.status_code not in _TRANSIENT:
                raise
            reason = f"answered {error.response.status_code}"
            asked_s = error.response.headers.get("Retry-After", "")
            wait_s = min(max(wait_s, float(asked_s) if asked_s.isdigit() else 0), _LONGEST_WAIT_S)
        except (httpx2.TransportError, json.JSONDecodeError):  # the latter: a proxy's page in place of an answer
            reason = "did not answer"
        _log.warning("the Hub %s; trying again in %g s", reason, wait_s)
        time.sleep(wait_s)
    return request()


def _token(token: str | None) -> str:
    try:
        found = get_token() if token is None else token.strip()
    except OIDCError as error:
        raise InputError(f"HF_OIDC_RESOURCE gave no token for the Hub: {first_line(error)}") from error
    if not found:
        raise InputError("expected a token for the Hub, found none; run hf auth login, or set HF_TOKEN")
    if not re.fullmatch(r"[\x21-\x7e]+", found):  # libraries would quote it in their errors
        raise InputError("the token for the Hub has blanks or other characters that tokens do not have; copy it again")
    return found


@contextlib.contextmanager
def _clear_errors(repo_id: str, endpoint: str, token: str) -> Iterator[None]:
    """Turn failures into InputErrors; neither they nor logs show the token or signed addresses."""

    def conceal(text: str) -> str:
        return re.sub(r"\?\S+", "", text.replace(token, "***"))

    def concealed(record: logging.LogRecord) -> bool:
        record.msg, record.args = conceal(record.getMessage()), None
        return True

    logger = logging.getLogger("huggingface_hub.utils._http")
    logger.addFilter(concealed)
    try:
        yield
    except InputError:
        raise
    except (httpx2.HTTPError, OSError, ValueError, LookupError, RuntimeError) as error:
        # Failures of uploads are wrapped; non-HTTP errors come from xet or from malformed responses.
        cause = error.__cause__ if isinstance(error, RuntimeError) and isinstance(error.__cause__, Exception) else error
        problem = InputError(conceal(_problem(cause, repo_id, endpoint)))
        # A server may repeat the token in its answer, and addresses may be signed, which a traceback would show.
        said = f"{error} {cause}"
        raise problem from (None if token in said or "?" in said else error)
    finally:
        logger.removeFilter(concealed)


def _problem(error: Exception, repo_id: str, endpoint: str) -> str:
    advice = "files here are as they were, and the same push can be repeated"
    if isinstance(error, HfHubHTTPError):
        said = (error.server_message or "").splitlines()
        return _refusal(error.response.status_code, repo_id, "".join(said[:1]), advice)
    if isinstance(error, httpx2.TransportError):
        return f"the Hub at {endpoint} cannot be reached ({type(error).__name__}); check your connection; {advice}"
    if isinstance(error, (json.JSONDecodeError, LookupError)):
        return f"{endpoint} does not answer as a Hub does; check HF_ENDPOINT and your proxy; {advice}"
    reason = " ".join(str(error).split()) or type(error).__name__
    return f"pushing to {repo_id} failed: {reason}; {advice}"


def _refusal(status: int, repo_id: str, reason: str, advice: str) -> str:
    said = f" ({status}: {reason})" if reason else f" ({status})"
    if status == 401:
        return f"the Hub does not accept the token for {repo_id}{said}; log in anew with hf auth login, or set HF_TOKEN"
    if status == 403:
        return (
            f"the token may not write to {repo_id}{said}; use one with the right to write there, or another owner's "
            "name as owner/name"
        )
    if status == 404:
        return f"the Hub does not know {repo_id} or its owner{said}; check the name, and that the token may see it"
    if status in _TRANSIENT:
        return f"the Hub did not take the adapter for {repo_id}{said} in several tries; wait a while; {advice}"
    return f"the Hub refused the adapter for {repo_id}{said}; {advice}"


def check_repo_id(repo_id: str) -> None:
    """Refuse a `repo_id` that cannot name a repository, without asking the Hub."""
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise InputError(f"expected owner/name as repository, found {repo_id!r}: {error}") from error
