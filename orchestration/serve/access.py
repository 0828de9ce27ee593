"""Who may use a server: everyone on this machine, or who has the token."""

from __future__ import annotations

import hmac
from collections.abc import Awaitable, Callable
from urllib.parse import urlsplit

from fastapi import Request
from fastapi.responses import JSONResponse, RedirectResponse, Response

COOKIE = "latentzoom_token"
LOOPBACK = ("127.0.0.1", "localhost", "::1")
_OPEN = ("/health",)
"""For probes, which have no token."""
_POLICY = (
    "default-src 'self'; img-src 'self' blob: data:; style-src 'self' 'unsafe-inline'; frame-ancestors 'self' "
    "http://localhost:* http://127.0.0.1:*; base-uri 'none'; form-action 'self'"
)


class Access:
    """token: "" lets everyone in who reaches the server, which then must listen on loopback only and be called by a
    loopback name, so that no other page's name can be pointed here."""

    def __init__(self, token: str = "") -> None:
        self.token = token

    async def check(self, request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
        given = request.query_params.get("token", "")
        if self.token and request.url.path == "/" and self._is_right(given):
            answer: Response = RedirectResponse("/", 303)
            answer.set_cookie(COOKIE, given, httponly=True, samesite="strict", path="/")
            return answer
        if problem := self._problem(request):
            return JSONResponse({"error": problem}, 401 if self.token else 403)
        answer = await call_next(request)
        answer.headers["Content-Security-Policy"] = _POLICY
        answer.headers["X-Content-Type-Options"] = "nosniff"
        answer.headers["Referrer-Policy"] = "no-referrer"
        return answer

    def _problem(self, request: Request) -> str:
        if request.url.path in _OPEN:
            return ""
        if not self.token:
            # Neither a name that somebody pointed here, nor a page of another host that has its reader's browser ask.
            hosts = [request.url.hostname or "", urlsplit(request.headers.get("origin", "")).hostname or "localhost"]
            foreign = [host for host in hosts if host not in LOOPBACK]
            return f"this server is for its own machine, not for {foreign[0][:100]!r}" if foreign else ""
        bearer = request.headers.get("authorization", "").removeprefix("Bearer ")
        if self._is_right(bearer) or self._is_right(request.cookies.get(COOKIE, "")):
            return ""
        return (
            "a token is needed: open the address that `latentzoom serve` printed, or send Authorization: Bearer TOKEN"
        )

    def _is_right(self, given: str) -> bool:
        return bool(given) and hmac.compare_digest(given.encode(), self.token.encode())
