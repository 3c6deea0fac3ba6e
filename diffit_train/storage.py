"""Read, write and commit files under a local path or any fsspec URL (s3://…).

A file appears under its final name only when it is complete: locally through a temporary file,
fsync and rename; on an object store through one upload, which is atomic there.

Transient remote errors (a lost connection, a server that is busy, restarting or silent) are retried
by botocore, and for longer by `retry`.
"""

from __future__ import annotations

import asyncio
import errno
import functools
import hashlib
import json
import os
import re
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypeVar

import fsspec
from pydantic import BaseModel, ConfigDict

from diffit_train.errors import DiffitError, UserError, first_line, redact
from diffit_train.progress import say

if TYPE_CHECKING:
    from tenacity import RetryCallState

# A call on another machine that fails for a reason that may pass is retried, with growing pauses,
# for so many seconds; an attempt without any answer ends after a part of that.
RETRY_LIMIT = "DIFFIT_RETRY_S"
DEFAULT_LIMIT_S, ATTEMPT_FRACTION = 120.0, 0.25
# A shorter wait is not logged, and a longer one now and then.
LOG_AFTER_S, LOG_EVERY_S = 5.0, 60.0
_logged_s: dict[str, float] = {}
TEMPORARY_MARK = ".tmp-"
ROOT_PREFIX = "root:"
# Data sets of the Hugging Face Hub: hf://datasets/OWNER/NAME/PATH; read only.
HUB = "hf://"
T = TypeVar("T")
GIB = 2**30
# Requests to S3 that a process has under way; botocore's default is 10.
_CONNECTIONS = 32
# A slower upload is retried: nothing else ends one whose server does not take it.
_MIN_UPLOAD_BYTES_PER_S = 2**18

# File system errors that a retry would not fix.
_PERMANENT = (
    FileNotFoundError,
    PermissionError,
    IsADirectoryError,
    NotADirectoryError,
    FileExistsError,
)
_CLIENT_LIBRARIES = ("botocore.", "aiobotocore.", "aiohttp.", "urllib3.", "httpx.", "httpx2.")
# A ConnectionError of huggingface_hub, which lasts.
_OFFLINE = "OfflineModeIsEnabled"
_CREDENTIAL_ERRORS = ("NoCredentialsError", "PartialCredentialsError", "ProfileNotFound")
# safetensors and SQLite raise their own errors with these texts.
_ENOSPC_TEXT = re.compile(r"os error (?:28|122)\b|No space left on device|disk is full")


class DiskFullError(DiffitError, OSError):
    """A file did not fit on its disk."""


class Record(BaseModel):
    """A JSON document under the root: immutable, unknown keys are rejected."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def is_local(url: str) -> bool:
    """Whether `url` is a file on this machine."""
    return "://" not in url or url.startswith("file://")


def missing_slash(url: str) -> str | None:
    """What is wrong with `s3:/bucket/x`, which would otherwise mean a local folder `s3:`."""
    match = re.match(r"([A-Za-z][A-Za-z0-9+.-]+):/(?!/)", url)
    return f"one slash is missing; write {match[1]}://…" if match else None


def odd_root(root: str) -> str | None:
    """What is wrong with a root that MLflow, globs or fsspec would take for something else."""
    odd = [sign for sign in ("?", "#", "%", "*", "[", "::") if sign in root]
    if not odd and root.isprintable():
        return None
    return (
        f"a root cannot contain {odd[0] if odd else 'control characters'}; rename the folder or "
        "prefix, or reach it by a link under another name"
    )


def local_path(url: str) -> Path:
    """The path of a local URL."""
    return Path(url.removeprefix("file://"))


def join(base: str, *parts: str) -> str:
    """`base` and `parts` with single slashes between them."""
    return "/".join([base.rstrip("/"), *(part.strip("/") for part in parts)])


def parent(url: str, levels: int = 1) -> str:
    """The folder `levels` above a file or folder."""
    return url.rstrip("/").rsplit("/", levels)[0]


def absolute(url: str) -> str:
    """The same URL, independent of the working directory."""
    return str(local_path(url).absolute()) if is_local(url) else url


def display_path(url: str) -> str:
    """The URL for display: relative if it is below the working directory."""
    if is_local(url) and local_path(url).absolute().is_relative_to(Path.cwd()):
        return str(local_path(url).absolute().relative_to(Path.cwd()))
    return url


def resolve(root: str, reference: str) -> str:
    """Expand a recipe's reference: `root:images/x` is under the project's root."""
    if reference.startswith(ROOT_PREFIX):
        return join(root, reference.removeprefix(ROOT_PREFIX))
    return reference


def filesystem(url: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The fsspec file system of `url`, and the path in it.

    Raises:
        UserError: the URL's protocol is unknown or its driver is not installed.
    """
    try:
        if is_local(url):
            # By url_to_fs, a path with `::` would be a chain of file systems.
            return fsspec.filesystem("file"), str(local_path(url).absolute())
        if "::" in url:
            raise ValueError("`::` would be a chain of file systems")
        if url.startswith(HUB):
            if not re.match("hf://datasets/[^/]+/[^/]+", url):
                raise ValueError("the hub needs hf://datasets/OWNER/NAME/PATH")
            return _hub(), url.removeprefix(HUB)
        # Never cache listings: other processes write the files this one looks for.
        options: dict[str, Any] = {"use_listings_cache": False}
        if not url.startswith("s3://"):
            return fsspec.core.url_to_fs(url, **options)
        options["config_kwargs"] = {
            "max_pool_connections": _CONNECTIONS,
            "connect_timeout": attempt_s() / 2,
            "read_timeout": attempt_s() / 2,
            "retries": {"mode": "standard", "total_max_attempts": 2},
        }
        fs, path = fsspec.core.url_to_fs(url, **options)
        fs.retries = 1  # s3fs's own would multiply with botocore's
        return fs, path
    except (ValueError, ImportError) as error:
        raise UserError(
            f"cannot open {url!r}: {error}; use a local path or s3://bucket/prefix"
        ) from error


def _place(url: str) -> str:
    """The bucket of a URL, and the server that has it, if it is not AWS."""
    scheme, _, rest = url.partition("://")
    bucket = redact(f"{scheme}://{rest.partition('/')[0]}")
    server = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    return f"{bucket} at {redact(server)}" if server and scheme == "s3" else bucket


@functools.cache
def _hub() -> fsspec.AbstractFileSystem:
    # fsspec's own cache has an instance for each thread, which would all ask for the same listings.
    return fsspec.filesystem("hf", skip_instance_cache=True)


def limit_s() -> float:
    """Seconds for which a call on another machine is tried.

    Raises:
        UserError: the variable is not a positive number.
    """
    text = os.environ.get(RETRY_LIMIT)
    if text is None:
        return DEFAULT_LIMIT_S
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0.0 < seconds < 1e6:
        raise UserError(f"{RETRY_LIMIT} is {text!r}, but must be a number of seconds above 0")
    return seconds


def attempt_s() -> float:
    """Seconds after which one attempt without an answer has failed."""
    return limit_s() * ATTEMPT_FRACTION


def retry(what: str, may_pass: Callable[[BaseException], bool]) -> Callable[[Callable[[], T]], T]:
    """Retry a call while it fails for a reason that may pass: `retry("a server", …)(call)`.

    Args:
        what: the server that is waited for, such as `s3://bucket`.
        may_pass: whether another attempt may succeed after an error; other errors are raised.
    """
    import tenacity

    def log(state: RetryCallState) -> None:
        waited_s, now_s = state.seconds_since_start or 0.0, time.monotonic()
        recent = now_s - _logged_s.get(what, float("-inf")) < LOG_EVERY_S  # by any thread
        if waited_s >= LOG_AFTER_S and not recent and state.outcome is not None:
            _logged_s[what] = now_s
            say(f"waiting for {what} ({waited_s:.0f} s): {first_line(state.outcome.exception())}")

    return tenacity.Retrying(
        retry=tenacity.retry_if_exception(may_pass),
        wait=tenacity.wait_random_exponential(multiplier=0.5, max=10.0),
        stop=tenacity.stop_after_delay(limit_s()),
        before_sleep=log,
        reraise=True,
    )


def is_transient(error: BaseException) -> bool:
    """Whether a failed remote call may succeed later."""
    if isinstance(error, _PERMANENT) or type(error).__name__ == _OFFLINE:
        return False
    response = getattr(error, "response", None)
    if type(error).__module__.startswith("huggingface_hub.") and response is not None:
        return bool(response.status_code >= 500 or response.status_code in (408, 429))
    if isinstance(error, ConnectionError | TimeoutError | asyncio.TimeoutError):
        return True
    kind = type(error)
    if f"{kind.__module__}.".startswith(_CLIENT_LIBRARIES):
        return kind.__name__ not in (*_CREDENTIAL_ERRORS, "ParamValidationError")
    # s3fs maps server responses to these: 503 and SlowDown, and any other 5xx.
    remote = getattr(errno, "EREMOTEIO", errno.EIO)
    return isinstance(error, OSError) and error.errno in (errno.EBUSY, errno.EIO, remote)


def with_retries(url: str, call: Callable[[], T]) -> T:
    """The value of a call on `url`; transient remote errors are retried.

    Raises:
        UserError: the credentials or the bucket are wrong.
    """
    if is_local(url):
        return call()
    try:
        return retry(_place(url), is_transient)(call)
    except Exception as error:
        raise _explained(url, error) from error


def _explained(url: str, error: Exception) -> Exception:
    """A remote failure with advice if the user can fix it, else the error itself."""
    if type(error).__name__ in _CREDENTIAL_ERRORS:
        return UserError(
            f"no credentials for {url} ({error}); set AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
        )
    if type(error).__name__ == _OFFLINE:
        return UserError(
            f"{url} cannot be read, since HF_HUB_OFFLINE is set; unset it, or download the data set"
        )
    if isinstance(error, PermissionError):
        return UserError(f"access to {url} is denied ({error}); check the credentials")
    if isinstance(error, FileNotFoundError) and "bucket does not exist" in str(error).lower():
        return UserError(f"{url}: {error}; create the bucket, or fix its name")
    if is_transient(error):
        return DiffitError(
            f"could not reach {url} ({type(error).__name__}: {error}); rerun the same command to "
            "resume"
        )
    return error


def _upload_timeout(url: str, size: int) -> dict[str, float]:
    """The time limit of an upload, as an argument of fsspec's."""
    if not url.startswith("s3://"):
        return {}
    return {"timeout": attempt_s() + size / _MIN_UPLOAD_BYTES_PER_S}


def exists(url: str) -> bool:
    """Whether a file or folder exists."""
    fs, path = filesystem(url)
    if url.startswith(HUB):  # whose `exists` takes an unreachable server for a missing file
        try:
            with_retries(url, lambda: fs.info(path))
        except FileNotFoundError:
            return False
        return True
    return bool(with_retries(url, lambda: fs.exists(path)))


def is_folder(url: str) -> bool:
    """Whether a folder exists."""
    fs, path = filesystem(url)
    return bool(with_retries(url, lambda: fs.isdir(path)))


def size_bytes(url: str) -> int:
    """Size of a file in bytes; FileNotFoundError if it does not exist."""
    fs, path = filesystem(url)
    return int(with_retries(url, lambda: fs.info(path))["size"])


def require_regular(url: str) -> None:
    """Refuse what has no end, or waits for a writer: a FIFO, a device, a socket.

    Raises:
        UserError: a local `url` is neither a regular file nor a folder.
    """
    if is_local(url):
        path = local_path(url)
        if path.exists() and not path.is_file() and not path.is_dir():
            raise UserError(f"{path} is neither a regular file nor a folder; remove it")


def fingerprint(url: str) -> str:
    """Changes when a file is rewritten; from its size, time and, remotely, ETag."""
    fs, path = filesystem(url)
    return str(with_retries(url, lambda: fs.ukey(path)))


def list_names(url: str) -> list[str]:
    """Sorted names directly in a folder, without temporary files; empty if it does not exist."""
    fs, path = filesystem(url)
    if not is_folder(url):
        return []
    entries = with_retries(url, lambda: fs.ls(path, detail=True))
    names = (entry["name"].rstrip("/").rsplit("/", 1)[-1] for entry in entries)
    return sorted(name for name in names if TEMPORARY_MARK not in name and name)


def sizes(url: str) -> dict[str, int]:
    """Sizes in bytes of all files below a folder, by relative path; empty if it does not exist.

    A file itself is at path "".
    """
    fs, path = filesystem(url)
    base = path.rstrip("/")
    try:
        entries = with_retries(url, lambda: fs.find(base, detail=True))
    except FileNotFoundError:
        return {}
    files = {str(name)[len(base) + 1 :]: info for name, info in entries.items()}
    # Some servers also list folders, as empty objects.
    return {
        name: int(info["size"])
        for name, info in files.items()
        if not name.endswith("/") and info.get("type") != "directory"
    }


def read_bytes(url: str) -> bytes:
    """The whole file; FileNotFoundError if it does not exist."""
    fs, path = filesystem(url)
    return bytes(with_retries(url, lambda: fs.cat_file(path)))


def read_range(url: str, start: int, stop: int) -> bytes:
    """Bytes `start` to `stop` of a file, fewer where it ends before."""
    fs, path = filesystem(url)
    # Without these, the hub's reads megabytes ahead, and asks for the size first.
    options: dict[str, Any] = {"cache_type": "none", "size": stop} if url.startswith(HUB) else {}
    return bytes(with_retries(url, lambda: fs.cat_file(path, start=start, end=stop, **options)))


def read_sized(url: str, size: int) -> bytes:
    """A file of known size, at most `size` bytes of it: remotely one request, not two."""
    if not size:
        return b""
    try:
        return read_range(url, 0, size)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return b""  # an empty object has no range


@contextmanager
def open_file(url: str, read_ahead: bool = True) -> Iterator[IO[bytes]]:
    """Open a local or remote file for reading.

    Args:
        read_ahead: whether a remote file is fetched ahead in large pieces, for sequential reading.
    """
    fs, path = filesystem(url)
    options = {} if read_ahead or is_local(url) else {"cache_type": "none"}
    with with_retries(url, lambda: fs.open(path, "rb", **options)) as file:
        cache = getattr(file, "cache", None)  # of remote files, and what makes their requests
        if cache is not None:
            fetch = cache.fetcher
            cache.fetcher = lambda *span: with_retries(url, lambda: fetch(*span))
        yield file


def read_json(url: str) -> Any:
    """The JSON value of a file.

    Raises:
        DiffitError: the file is not JSON.
    """
    try:
        return json.loads(read_bytes(url))
    except ValueError as error:
        raise DiffitError(f"{url} is not valid JSON ({error}); delete it and rerun") from error


@contextmanager
def explain_enospc(path: Path, needed: int | None = None, name: str = "") -> Iterator[None]:
    """Report what is needed and what is free if the disk is full that the block writes a file to.

    Args:
        path: of the file, which is removed if it does not fit.
        needed: its size in bytes, if that is known before it is written.
        name: for the message, if that is not the path.

    Raises:
        DiskFullError: the disk is full.
    """
    try:
        yield
    except DiskFullError:
        raise
    except Exception as error:
        if not _is_enospc(error):
            raise
        written = path.stat().st_size if path.exists() else 0
        size = f"more than {written:,}" if needed is None else f"{needed:,}"
        path.unlink(missing_ok=True)
        free = shutil.disk_usage(existing(path)).free
        raise DiskFullError(
            f"the disk of {name or path} is full: it needs {size} bytes, and {free:,} are free; "
            "make room, and rerun the same command to resume"
        ) from error


def _is_enospc(error: Exception) -> bool:
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    return _ENOSPC_TEXT.search(str(error)) is not None


@contextmanager
def atomic_file(url: str, needed: int | None = None) -> Iterator[Path]:
    """A local path to write to; becomes `url` on a clean exit, and is removed on an error.

    Args:
        needed: size of the file in bytes, if that is known before, for the message of a full disk.

    Raises:
        UserError: the path cannot be written.
        DiskFullError: its disk, or that of the temporary folder for a remote one, is full.
    """
    if is_local(url):
        final = local_path(url).absolute()
        with _temporary(final, needed) as temporary:
            yield temporary
            with temporary.open("rb") as written:
                os.fsync(written.fileno())
            temporary.replace(final)
        return
    fs, path = filesystem(url)
    with _temporary_folder("diffit-upload-") as folder:
        temporary = folder / path.rsplit("/", 1)[-1]
        with explain_enospc(temporary, needed):
            yield temporary
        timeout = _upload_timeout(url, temporary.stat().st_size)
        with_retries(url, lambda: fs.put_file(str(temporary), path, **timeout))


@contextmanager
def _temporary(final: Path, needed: int | None) -> Iterator[Path]:
    """A new, empty file in the same folder, which is removed at the end."""
    temporary = final.with_name(f"{final.name}{TEMPORARY_MARK}{uuid.uuid4().hex}")
    try:
        with explain_enospc(temporary, needed, str(final)):
            try:
                final.parent.mkdir(parents=True, exist_ok=True)
                temporary.touch()
            except OSError as error:
                if _is_enospc(error):
                    raise
                raise UserError(
                    f"cannot write {final}: {error.strerror}; choose another --root"
                ) from error
            yield temporary
    finally:
        if temporary.exists():
            temporary.unlink()


@contextmanager
def _temporary_folder(prefix: str) -> Iterator[Path]:
    """A folder on this machine for what is sent or received."""
    folder = Path(tempfile.mkdtemp(prefix=prefix))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def write_bytes(url: str, data: bytes) -> None:
    """Write a whole file at once."""
    with atomic_file(url, len(data)) as path:
        path.write_bytes(data)


def create(url: str, data: bytes) -> bool:
    """Write a small file unless it exists; of several writers, one succeeds.

    On S3 this needs conditional writes (`If-None-Match`), which AWS and most servers have.

    Returns:
        Whether it was written.
    """
    fs, path = filesystem(url)
    if is_local(url):
        final = local_path(url).absolute()
        try:
            with _temporary(final, len(data)) as temporary:
                temporary.write_bytes(data)
                os.link(temporary, final)  # a name and its contents in one step
        except FileExistsError:
            return False
        return True

    def attempt() -> bool:
        try:
            fs.pipe_file(path, data, mode="create", **_upload_timeout(url, len(data)))
        except OSError as error:
            # It may be ours all the same, if the answer to an earlier attempt was lost.
            if is_transient(error) or not (isinstance(error, FileExistsError) or fs.exists(path)):
                raise
        try:
            return bool(fs.cat_file(path) == data)
        except FileNotFoundError:  # another's, removed meanwhile
            return False

    return with_retries(url, attempt)


def existing(path: Path) -> Path:
    """A local path, or the nearest above it that exists."""
    return next(place for place in (path, *path.parents) if place.exists())


def require_writable(root: str) -> None:
    """Refuse a root that cannot be written to, before hours of work are lost; nothing remains.

    Raises:
        UserError: it names the reason.
    """
    name = f".writable-{uuid.uuid4().hex}"
    try:
        folder = root
        if is_local(root):
            above = existing(local_path(root).absolute())
            if not above.is_dir():
                raise NotADirectoryError(errno.ENOTDIR, f"{above} is not a folder")
            folder = str(above)
        url = join(folder, name)
        write_text(url, "diffit")
        read_bytes(url)
        remove(url)
    except (OSError, DiffitError) as error:
        cause = error.__cause__ if isinstance(error.__cause__, OSError) else error
        reason = getattr(cause, "strerror", None) or first_line(error)
        raise UserError(
            f"cannot write to {display_path(root)}: {reason}; make it writable, or choose another "
            "--root"
        ) from error


def write_text(url: str, text: str) -> None:
    """Write a whole UTF-8 file at once."""
    write_bytes(url, text.encode())


def write_json(url: str, value: Any) -> None:
    """Write a whole JSON file at once, indented, keys in the order given."""
    write_text(url, json.dumps(value, indent=2, allow_nan=False) + "\n")


@contextmanager
def local_copy(url: str) -> Iterator[Path]:
    """A local path to read `url` from; a remote file is downloaded and removed afterwards."""
    if is_local(url):
        yield local_path(url)
        return
    fs, path = filesystem(url)
    with _temporary_folder("diffit-download-") as folder:
        target = folder / path.rsplit("/", 1)[-1]
        _download(fs, url, path, target)
        yield target


def _download(fs: fsspec.AbstractFileSystem, url: str, path: str, target: Path) -> None:
    """Copy a remote file here."""
    with explain_enospc(target):
        with_retries(url, lambda: fs.get_file(path, str(target)))


@contextmanager
def local_folder(url: str) -> Iterator[Path]:
    """A local folder with the files of `url`; a remote one is downloaded and removed afterwards."""
    if is_local(url):
        yield local_path(url)
        return
    with _temporary_folder("diffit-download-") as folder:
        fs, path = filesystem(url)
        for name in list_names(url):
            _download(fs, url, join(path, name), folder / name)
        yield folder


def remove(url: str) -> None:
    """Remove a file, or a folder with its contents, if it exists."""
    fs, path = filesystem(url)
    if exists(url):
        with_retries(url, lambda: fs.rm(path, recursive=True))


def remove_temporary(url: str) -> None:
    """Remove temporary files left in a local folder by killed writers."""
    if is_local(url) and local_path(url).is_dir():
        for stale in local_path(url).glob(f"*{TEMPORARY_MARK}*"):
            stale.unlink(missing_ok=True)


def sha256_bytes(data: bytes) -> str:
    """Hexadecimal SHA-256 of `data`."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path) -> str:
    """Hexadecimal SHA-256 of a local file, read in chunks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest(value: Any) -> str:
    """SHA-256 of a JSON value in canonical form."""
    return sha256_bytes(json.dumps(value, sort_keys=True, separators=(",", ":")).encode())
