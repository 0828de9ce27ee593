"""Secrets never get out. There are four ways out, and each cleans what passes: what a command prints and logs
(`cleaned_output`), what is sent to MLflow (`tracking.client`), what a report holds, and what a job's command and
environment show (`carries_secret`).

A secret is known by its value: what stands before the @ of a URL or signs it, what an environment variable holds whose
name ends in the word for a secret, and Ray's token. A name alone makes nothing secret: `data.num_tokens=4` is a number
of tokens. Only of text by others, such as the command of some job, is a name's word taken for it (`redact`).
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import re
import sys
import traceback
import urllib.parse
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TextIO, cast

from pipeline.errors import NobodyReads

_USERINFO = re.compile(r"(?P<scheme>[a-zA-Z][a-zA-Z0-9+.-]*://)(?P<user>[^/@\s:'\"]*)(?::(?P<password>[^/\s'\"]*))?@")
_WORDS = r"(?:password|passwd|secret|token|api_?key|access_?key|secret_?key|private_?key|account_?key|credentials?)"
_ASSIGNED = re.compile(
    rf"(?P<name>(?:\b|(?<=[._-]))(?:[\w.-]*[._-])?{_WORDS}\b)(?P<sign>=|:\s*|\s+)"
    r"(?P<value>'[^']*'|\"[^\"]*\"|(?!\*\*\*)[^\s,;]+)",
    re.IGNORECASE,
)
_QUERY = re.compile(
    r"(?P<name>[?&](?:[\w.-]*(?:signature|token|credential|secret|password|key)|sig)=)(?P<value>[^&#\s'\"]+)",
    re.IGNORECASE,
)
"""What signs a URL: S3's X-Amz-Signature and X-Amz-Security-Token, Azure's sig, Google's X-Goog-Signature, ?token=."""
_VARIABLE = re.compile(rf"(?:.*_)?{_WORDS.replace('|credentials?', '')}", re.IGNORECASE)  # those are a file's name
_SHORTEST = 6
"""Shorter values are in too many words to be taken out of a text."""
_HIDDEN = "***"
_PLAIN = re.compile(r"[\d.,xe:+-]*|true|false|none|null", re.IGNORECASE)
"""A number, a size or a choice is no secret, whatever it is called."""


def is_secret_name(name: str) -> bool:
    """Whether a name ends in the word for a secret: AWS_SECRET_ACCESS_KEY, not num_tokens."""
    return _VARIABLE.fullmatch(name.replace(".", "_").replace("-", "_")) is not None


def known_secrets() -> list[str]:
    """Secret values of this process, longest first: of its environment, of URLs in it, and Ray's token."""
    found = set(_seen)
    for name, value in os.environ.items():
        if is_secret_name(name) and not _PLAIN.fullmatch(value):
            found.add(value.strip())
        elif "://" in value:
            found |= _passwords(value)
    return sorted((value for value in found if len(value) >= _SHORTEST), key=len, reverse=True)


_seen: set[str] = set()
"""Secrets that came on the command line of the command that runs now, or that it read from a file."""


def remember(secret: str) -> None:
    """A secret that was read from a file."""
    _seen.add(secret)


def remember_in(text: str) -> None:
    """The secrets in the URLs of a text, such as a file of settings."""
    _seen.update(_passwords(text))


def clean(text: str) -> str:
    """`text` without secret values; of a URL what stands before its @ goes altogether, so that it can still be used."""
    return clean_values(url_without_secrets(text))


def redact(text: str) -> str:
    """Text by others, such as a job's command: as `clean`, and without the values of names for secrets."""
    text = _QUERY.sub(r"\g<name>***", _USERINFO.sub(r"\g<scheme>***@", text))
    return _ASSIGNED.sub(_hide, clean_values(text))


def clean_values(text: str) -> str:
    """`text` without the secrets of this process; URLs stay as they are."""
    for secret in known_secrets():
        text = text.replace(secret, _HIDDEN)
    return text


def _hide(match: re.Match[str]) -> str:
    name, sign, value = match["name"], match["sign"], match["value"]
    by_space = sign.strip() == ""
    if _PLAIN.fullmatch(value) or (by_space and not _is_option(match)):
        return match[0]
    return f"{name}{sign}{_HIDDEN}"


def _is_option(match: re.Match[str]) -> bool:
    """Whether the name is that of an option: what follows a word of prose is the next word."""
    start = match.start()
    return match["name"].startswith("-") or match.string[max(0, start - 2) : start].endswith("-")


def carries_secret(text: str) -> bool:
    """Whether a word of a command, or `NAME VALUE`, holds one."""
    return redact(text) != text


def url_without_secrets(url: str) -> str:
    """A URL without its user name and password, and without what signs it."""
    return _QUERY.sub(r"\g<name>***", _USERINFO.sub(r"\g<scheme>", url))


def plain_without_secrets(value: Any, cleaned: Callable[[str], str] = clean) -> Any:
    """Plain JSON with every text in it `cleaned`."""
    if isinstance(value, str):
        return cleaned(value)
    if isinstance(value, dict):
        return {key: plain_without_secrets(item, cleaned) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(plain_without_secrets(item, cleaned) for item in value)
    return value


def _passwords(text: str) -> set[str]:
    """Passwords and signatures in the URLs of a text, as they stand there and as they are meant."""
    found = {match["password"] or "" for match in _USERINFO.finditer(text)}
    found |= {match["value"] for match in _QUERY.finditer(text)}
    return found | {urllib.parse.unquote(value) for value in found}


@contextlib.contextmanager
def cleaned_output(words: Sequence[str]) -> Iterator[None]:
    """Around a command with the arguments `words`: what it prints, logs, and says of an error holds no secret."""
    _seen.update(*(_passwords(word) for word in words))
    make_record = logging.getLogRecordFactory()

    def record(*arguments: Any, **options: Any) -> logging.LogRecord:
        made = make_record(*arguments, **options)
        with contextlib.suppress(Exception):  # a record that does not format says so where it is printed
            made.msg, made.args = clean(made.getMessage()), ()
        if made.exc_info and made.exc_info[0] is not None:
            made.exc_text = clean("".join(traceback.format_exception(*made.exc_info)).rstrip())
        return made

    logging.setLogRecordFactory(record)
    sys.excepthook = _say_exception
    streams = cast(TextIO, CleanOutput(sys.stdout)), cast(TextIO, CleanStream(sys.stderr))
    try:
        with contextlib.redirect_stdout(streams[0]), contextlib.redirect_stderr(streams[1]):
            yield
    finally:
        logging.setLogRecordFactory(make_record)
        _seen.clear()


def _say_exception(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    sys.stderr.write(clean("".join(traceback.format_exception(kind, error, trace))))


class CleanStream(io.TextIOBase):
    """A text stream that cleans what is written to it; everything else is the stream's own."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        self._stream.write(clean(text) if len(text) >= _SHORTEST else text)
        return len(text)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        self._stream.flush()

    def isatty(self) -> bool:
        return self._stream.isatty()

    def fileno(self) -> int:
        return self._stream.fileno()

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self._stream.encoding

    @property
    def buffer(self) -> Any:
        return self._stream.buffer

    @property
    def closed(self) -> bool:
        return self._stream.closed

    def close(self) -> None:
        """The stream goes on: it belongs to the process."""


class CleanOutput(CleanStream):
    """Standard output. That its reader is gone is told from other pipes that break."""

    def write(self, text: str) -> int:
        try:
            return super().write(text)
        except BrokenPipeError as error:
            raise NobodyReads from error

    def flush(self) -> None:
        try:
            super().flush()
        except BrokenPipeError as error:
            raise NobodyReads from error
