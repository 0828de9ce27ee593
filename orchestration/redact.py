"""Secrets never reach logs, parameters or job metadata: URLs lose their passwords, commands their secret values."""

from __future__ import annotations

import re
from typing import Any

_USERINFO = re.compile(r"(?P<scheme>[a-zA-Z][a-zA-Z0-9+.-]*://)[^/@\s]+@")
_ASSIGNED = re.compile(
    r"(?P<name>[\w.-]*(?:password|passwd|secret|token|api_?key|access_?key)[\w.-]*)"
    r"(?P<sign>[=:]\s*|\s+)(?P<value>'[^']*'|\"[^\"]*\"|(?!\*\*\*)[^\s,;]+)",
    re.IGNORECASE,
)
_QUERY = re.compile(
    r"(?P<name>[?&](?:[\w.-]*(?:signature|token|credential|secret|password|key)|sig)=)[^&#\s'\"]+",
    re.IGNORECASE,
)
"""What signs a URL: S3's X-Amz-Signature and X-Amz-Security-Token, Azure's sig, Google's X-Goog-Signature, ?token=."""


def redact(text: str) -> str:
    """`text` without user names and passwords in URLs, and without values of names that sound secret."""
    text = _QUERY.sub(r"\g<name>***", _USERINFO.sub(r"\g<scheme>***@", text))
    return _ASSIGNED.sub(lambda m: m["name"] + ("=***" if m["sign"].startswith("=") else f"{m['sign']}***"), text)


def url_without_secrets(url: str) -> str:
    """A URL without its user name and password, and without what signs it."""
    return _QUERY.sub(r"\g<name>***", _USERINFO.sub(r"\g<scheme>", url))


def plain_without_secrets(value: Any) -> Any:
    """Plain JSON with every URL in it cleaned."""
    if isinstance(value, str):
        return url_without_secrets(value)
    if isinstance(value, dict):
        return {key: plain_without_secrets(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain_without_secrets(item) for item in value]
    return value
