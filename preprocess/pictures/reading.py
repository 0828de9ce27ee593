"""One image's bytes from its source, or why it cannot be read."""

from __future__ import annotations

import errno

from pipeline.errors import Unreachable, UserError
from preprocess.rejects import Reject
from preprocess.retry import FULL, RetryCounter, with_retries
from preprocess.sources.base import Source


def read_image(source: Source, image: str, attempts: int, counter: RetryCounter) -> bytes:
    """The encoded image. One that is gone or that the system will not read raises `Reject`; a store that refuses all or
    stays out of reach is no fault of one image and raises `UserError`."""
    try:
        return with_retries(lambda: source.read(image), f"reading {image}", attempts, counter)
    except FileNotFoundError as error:
        raise Reject("missing", "it was listed, but is gone") from error
    except UserError as error:
        if isinstance(cause := error.__cause__, OSError) and _is_of_one_file(cause):
            raise _unreadable(cause) from error
        raise
    except OSError as error:
        if not _is_of_one_file(error):
            raise
        raise _unreadable(error) from error


_OF_ONE_FILE = frozenset(
    {errno.EIO, errno.ELOOP, errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.EISDIR, errno.ENOTDIR}
    | {errno.EINVAL, errno.ENXIO, errno.ENODEV, errno.EOPNOTSUPP, errno.EOVERFLOW, errno.EFBIG, errno.EILSEQ}
    | {errno.EBADMSG, errno.EUCLEAN, errno.EREMOTEIO, errno.ENODATA}  # file systems with checksums, and disks
)


def _is_of_one_file(error: OSError) -> bool:
    """Whether an error is the local system's about one file. What a store's client raises has a cause."""
    if isinstance(error, Unreachable) or error.__cause__ is not None or error.errno in FULL:
        return False
    return error.filename is not None or error.errno in _OF_ONE_FILE


def _unreadable(error: OSError) -> Reject:
    return Reject("unreadable", error.strerror or errno.errorcode.get(error.errno or 0, "cannot be read"))
