"""Files at hf:// (Hugging Face's hub) and s3:// (Amazon's or any other object store) read as those of a folder.

    hf://datasets/OWNER/NAME[@REVISION]/PATH     token in HF_TOKEN, or as `hf auth login` leaves it; HF_ENDPOINT
                                                 names another hub
    s3://BUCKET/PATH                             AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE or ~/.aws;
                                                 without any of them, as anybody may. AWS_REGION, AWS_ENDPOINT_URL

A path is a file, a folder, or has wildcards (`*`, `?`, `[]`). Whatever fails is a UserError of one line with what
would work.
"""

import contextlib
import fnmatch
import functools
import hashlib
import os
import pathlib
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from phi1.errors import UserError

if TYPE_CHECKING:
    import pyarrow.fs

SCHEMES = ("hf://", "s3://")
_WILD = re.compile(r"[*?\[]")
_KEYS = (
    "AWS_ACCESS_KEY_ID",
    "AWS_PROFILE",
    "AWS_WEB_IDENTITY_TOKEN_FILE",
    "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
    "AWS_CONTAINER_CREDENTIALS_FULL_URI",
)
_S3_RIGHTS = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (or AWS_PROFILE) to keys that may read it"
_HF_RIGHTS = "accept the data set's terms on its page and set HF_TOKEN to a token of that account"
_ADVICE = (  # what an error's text holds -> what to do about it
    (r"GatedRepo|access to .* is restricted", _HF_RIGHTS),
    (
        r"RepositoryNotFound|repository not found|\b401\b.*hugging|Invalid username or password",
        f"check owner and name, or {_HF_RIGHTS}",
    ),
    (
        r"ACCESS_DENIED|AccessDenied|INVALID_ACCESS_KEY|SignatureDoesNotMatch|SIGNATURE|HTTP response code 403",
        _S3_RIGHTS,
    ),
    (
        r"\b401\b|\b403\b|Forbidden|Unauthorized",
        "its credentials are missing or refused: HF_TOKEN for hf://; for s3://, AWS_ACCESS_KEY_ID and "
        "AWS_SECRET_ACCESS_KEY",
    ),
    (r"NO_SUCH_BUCKET", "there is no such bucket: check its name, AWS_REGION and AWS_ENDPOINT_URL"),
    (
        r"NO_SUCH_KEY|RESOURCE_NOT_FOUND|FileNotFound|does not exist|not found|\b404\b",
        "nothing is there: check the path",
    ),
    (
        r"SLOW_DOWN|THROTTL|\b429\b|Too Many Requests|SERVICE_UNAVAILABLE|\b503\b",
        "its rate limit is reached: run the same command again later, with fewer --workers; what was finished is kept",
    ),
    (r"PermanentRedirect|\b301\b|region", "it lies in another region: set AWS_REGION"),
)


_CLIENTS = ("httpx", "httpcore", "requests", "aiohttp")


class Missing(UserError):
    """There is no such file."""


def is_url(place: str) -> bool:
    """Whether a place is at hf:// or s3://."""
    return place.startswith(SCHEMES)


@contextlib.contextmanager
def explained(url: str) -> Iterator[None]:
    """Whatever goes wrong with `url` inside of the block, as a UserError."""
    import pyarrow

    try:
        yield
    except Exception as error:
        # Those of huggingface_hub are OSErrors, RuntimeErrors, or its HTTP client's, which has changed.
        client = type(error).__module__.startswith(_CLIENTS)
        if not client and not isinstance(error, (OSError, pyarrow.ArrowException, ValueError, RuntimeError)):
            raise
        told: list[str] = []
        cause: BaseException | None = error
        while cause is not None:  # the hub's file system says "not found" of what its cause says is closed
            told.append(f"{type(cause).__name__}: {' '.join(str(cause).split())}")
            cause = cause.__cause__ or cause.__context__
        text = "; ".join(told)
        advice = next(
            (advice for pattern, advice in _ADVICE if re.search(pattern, text, re.I)), "check that it can be reached"
        )
        kind = Missing if advice.startswith("nothing is there") else UserError
        raise kind(f"{url}: cannot be read ({told[0][:160]}); {advice}") from error


def filesystem(scheme: str, anonymous: bool = False) -> "pyarrow.fs.FileSystem":
    """The files of a scheme. anonymous: without credentials, whatever there are."""
    if scheme == "hf":
        return _hub()
    known = any(os.environ.get(key) for key in _KEYS) or pathlib.Path("~/.aws/credentials").expanduser().exists()
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1"
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    return _store(anonymous or not known, region, endpoint)


@functools.cache
def _hub() -> "pyarrow.fs.FileSystem":
    import pyarrow.fs

    try:
        from huggingface_hub import HfFileSystem
    except ImportError as error:
        raise UserError("hf:// needs the package huggingface_hub: pip install huggingface_hub") from error
    return pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(HfFileSystem()))


@functools.cache
def _store(anonymous: bool, region: str, endpoint: str | None) -> "pyarrow.fs.FileSystem":
    import pyarrow.fs

    return pyarrow.fs.S3FileSystem(anonymous=anonymous, region=region, endpoint_override=endpoint)


def _split(url: str) -> tuple["pyarrow.fs.FileSystem", str]:
    scheme, _, path = url.partition("://")
    return filesystem(scheme), path


def find(url: str, endings: tuple[str, ...]) -> list[str]:
    """The files at `url`, a file, a folder or a pattern, whose names end so, as URLs in order. Raises UserError if
    none is there."""
    import pyarrow.fs

    with explained(url):
        files, path = _split(url)
        wild = _WILD.search(path)
        base = path[: wild.start()].rpartition("/")[0] if wild else path.rstrip("/")
        if url.startswith("hf://"):
            files.handler.fs.invalidate_cache()  # what it remembers of folders may be of before
            files.handler.fs.info(base)  # says why something is not there, which Arrow leaves out
        info = files.get_file_info(base)
        if info.type == pyarrow.fs.FileType.File:
            return [url]
        selector = pyarrow.fs.FileSelector(base, recursive=True)
        names = [entry.path for entry in files.get_file_info(selector) if entry.type == pyarrow.fs.FileType.File]
    scheme = url.partition("://")[0]
    found = sorted(name for name in names if name.endswith(endings) and (not wild or fnmatch.fnmatch(name, path)))
    if not found:
        raise Missing(f"{url}: no {' or '.join(endings)} file there ({len(names):,} others); check the path")
    return [f"{scheme}://{name}" for name in found]


def opened(place: str) -> Any:
    """A file to read at random, at a URL or on disk."""
    import pyarrow

    if not is_url(place):
        return pyarrow.OSFile(place)
    with explained(place):
        files, path = _split(place)
        return files.open_input_file(path)


def content_of(url: str) -> str:
    """What a file holds, as a hash. Of a parquet file that of its length and footer, where sizes, places and extremes
    of all columns stand; others are read whole."""
    digest = hashlib.sha256()
    with explained(url), opened(url) as file:
        size = file.size()
        digest.update(str(size).encode())
        if url.endswith(".parquet") and size >= 12:
            file.seek(size - 8)
            footer = min(size, 8 + int.from_bytes(file.read(4), "little"))
            file.seek(size - footer)
            digest.update(file.read(footer))
        else:
            while part := file.read(1 << 20):
                digest.update(part)
    return digest.hexdigest()


def public_object(path: str) -> bytes:
    """An object of a bucket that anybody may read. Raises Missing, or UserError."""
    with explained(f"s3://{path}"), filesystem("s3", anonymous=True).open_input_stream(path) as stream:
        return stream.read()
