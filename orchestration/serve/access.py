"""Who may use a server: everyone on this machine, or who has the token."""

from __future__ import annotations

import hmac
from http.cookies import CookieError, SimpleCookie
from urllib.parse import urlencode

from fastapi import Request
from fastapi.responses import JSONResponse, RedirectResponse
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

COOKIE = "latentzoom_token"
LOOPBACK = ("127.0.0.1", "localhost", "::1")
_OPEN = ("/health",)
"""For probes, which have no token."""
_POLICY = (
    "default-src 'self'; img-src 'self' blob: data:; style-src 'self' 'unsafe-inline'; frame-ancestors 'self' "
    "http://localhost:* http://127.0.0.1:* vscode-webview:; base-uri 'none'; form-action 'self'"
)
_SAFE = ("GET", "HEAD", "OPTIONS")


class Access:
    """token: "" lets everyone in who reaches the server, which then must listen on loopback only and be called by a
    loopback name, so that no other page's name can be pointed here."""

    def __init__(self, token: str = "") -> None:
        self.token = token

    def opens(self, request: Request) -> bool:
        """Whether the request is the page's address with the right token."""
        given = request.query_params.get("token", "")
        return bool(self.token) and request.url.path == "/" and self._is_right(given)

    def problem(self, request: Request) -> str:
        """Why a request is refused; "" where it is not."""
        if request.url.path in _OPEN:
            return ""
        headers = request.headers
        if request.method not in _SAFE and headers.get("sec-fetch-site", "none") not in ("same-origin", "none"):
            return "this server takes nothing from pages of others"
        if not self.token:
            # Neither a name that somebody pointed here, nor a page of another origin that has its reader's browser ask.
            host, origin = request.url.hostname or "", headers.get("origin")
            if host not in LOOPBACK:
                return f"this server is for its own machine, not for {host[:100]!r}"
            if origin is not None and origin.partition("://")[2] != headers.get("host"):
                return f"this server is for its own page, not for {origin[:100]!r}"
            return ""
        bearer = headers.get("authorization", "").removeprefix("Bearer ")
        if self._is_right(bearer) or self._is_right(_cookie(headers.get("cookie", ""))):
            return ""
        return (
            "a token is needed: open the address that `latentzoom serve` printed, or send Authorization: Bearer TOKEN"
        )

    def _is_right(self, given: str) -> bool:
        return bool(given) and hmac.compare_digest(given.encode(), self.token.encode())


class Guard:
    """The middleware that asks `Access`, and refuses bodies of more than `most_bytes` before they are sent. It hands
    requests on as they are, so that routes see a client go away."""

    def __init__(self, app: ASGIApp, access: Access, most_bytes: int) -> None:
        self.app, self.access, self.most_bytes = app, access, most_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request = Request(scope, receive)
        if self.access.opens(request):
            kept = urlencode([(name, value) for name, value in request.query_params.multi_items() if name != "token"])
            answer = RedirectResponse(f"/?{kept}" if kept else "/", 303)
            is_https = request.url.scheme == "https"
            # Not strict: who follows the address from another site's page, a terminal in a browser, comes in as well.
            answer.set_cookie(COOKIE, self.access.token, httponly=True, samesite="lax", path="/", secure=is_https)
            await answer(scope, receive, send)
            return
        if problem := self.access.problem(request):
            status = 401 if problem.startswith("a token") else 403
            await JSONResponse({"error": problem}, status)(scope, receive, send)
            return
        length = request.headers.get("content-length", "")
        if length.isdecimal() and int(length) > self.most_bytes:
            await JSONResponse({"error": too_large(self.most_bytes)}, 413)(scope, receive, send)
            return
        if "transfer-encoding" in request.headers and request.url.path != "/pictures":  # which counts what comes
            await JSONResponse({"error": "say how long the body is: Content-Length"}, 411)(scope, receive, send)
            return

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers["Content-Security-Policy"] = _POLICY
                headers["X-Content-Type-Options"] = "nosniff"
                headers["Referrer-Policy"] = "no-referrer"
            await send(message)

        await self.app(scope, receive, with_headers)


def too_large(most_bytes: int) -> str:
    return f"the picture file is too large; at most {most_bytes >> 20} MiB"


def _cookie(header: str) -> str:
    try:
        found = SimpleCookie(header).get(COOKIE)
    except CookieError:
        return ""
    return found.value if found else ""
