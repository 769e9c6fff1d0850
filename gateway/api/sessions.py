"""``/ui/session``: a key entered once in the browser, then carried by a cookie.

The cookie holds the key, sealed; no script can read it. ``Cookies`` turns it back into
the ``Authorization`` header that every route reads, and only for requests that name it
in a header of ours: no page of another origin can send that one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast
from urllib.parse import urlsplit

import msgspec
from litestar import Response, delete, get, post
from litestar.datastructures import Cookie
from litestar.enums import ScopeType
from litestar.handlers import HTTPRouteHandler
from litestar.types import ASGIApp, Receive, Scope, Send

from gateway.api.admin import AdminGate
from gateway.api.http import AnyRequest, header, header_list, note_of, read_json
from gateway.core.errors import ForbiddenError, InvalidRequestError, UnauthorizedError
from gateway.core.keys import ALPHABET, display
from gateway.core.sessions import (
    CREDENTIAL_MAX_CHARS,
    NONCE_CHARS,
    SESSION_MAX_S,
    SessionKind,
    open_sealed,
    seal,
)
from gateway.flows.keys import Authenticate
from gateway.ports import Chance, Clock

SESSION_HEADER = "x-imageway-session"
"""Says which session a request means: ``key`` or ``admin``."""
COOKIES = {SessionKind.KEY: "imageway_key", SessionKind.ADMIN: "imageway_admin"}
SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})


@dataclass(frozen=True, slots=True)
class Sessions:
    """Seals keys into cookies, and says which requests may use one."""

    secret: bytes
    public_url: str
    clock: Clock
    chance: Chance

    def cookie(self, scope: Scope, kind: SessionKind, credential: str) -> Cookie:
        """Make the cookie that carries a key for ``SESSION_MAX_S``."""
        nonce = self.chance.token(ALPHABET, NONCE_CHARS)
        expires_s = self.clock.now_ms() // 1000 + SESSION_MAX_S
        token = seal(self.secret, kind, credential, nonce=nonce, expires_s=expires_s)
        return self._cookie(scope, kind, token, SESSION_MAX_S)

    def no_cookie(self, scope: Scope, kind: SessionKind) -> Cookie:
        """Make the cookie that takes one away."""
        return self._cookie(scope, kind, "", 0)

    def credential(self, scope: Scope, kind: SessionKind) -> str | None:
        """Find the key that a request's cookie carries; None if there is none."""
        token = _cookies(scope).get(COOKIES[kind])
        if not token:
            return None
        now_s = self.clock.now_ms() // 1000
        return open_sealed(self.secret, kind, token, now_s=now_s)

    def check_origin(self, scope: Scope) -> None:
        """See that a request with a session comes from our own pages.

        Raises:
            ForbiddenError: it comes from elsewhere, or changes something and does not
                say where it comes from.
        """
        site, origin = header(scope, "sec-fetch-site"), header(scope, "origin")
        ours = origin is None or self._is_ours(scope, origin)
        if site is not None:
            ours = ours and site == "same-origin"
        elif origin is None:
            ours = _method(scope) in SAFE_METHODS
        if not ours:
            raise ForbiddenError(
                "A session works only from the gateway's own pages. Elsewhere send "
                "'Authorization: Bearer <your key>'.",
                code="cross_site_request",
            )

    def _is_ours(self, scope: Scope, origin: str) -> bool:
        if self.public_url and origin == _origin(self.public_url):
            return True
        # By host and port: who ends TLS before us need not tell.
        _, _, host = origin.partition("://")
        return bool(host) and host == header(scope, "host")

    def _cookie(
        self, scope: Scope, kind: SessionKind, value: str, max_age_s: int
    ) -> Cookie:
        origin = header(scope, "origin") or self.public_url or str(scope["scheme"])
        return Cookie(
            key=COOKIES[kind],
            value=value,
            path="/",
            max_age=max_age_s,
            secure=origin.startswith("https"),
            httponly=True,
            samesite="strict",
        )


@dataclass(frozen=True, slots=True)
class Cookies:
    """The layer around all routes that reads sessions."""

    inner: ASGIApp
    sessions: Sessions

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Give a request with a session the header that its key would have."""
        if scope["type"] == ScopeType.HTTP:
            kind = _kind(header(scope, SESSION_HEADER))
            if kind is not None and header(scope, "authorization") is None:
                self._authorize(scope, kind)
        await self.inner(scope, receive, send)

    def _authorize(self, scope: Scope, kind: SessionKind) -> None:
        credential = self.sessions.credential(scope, kind)
        if credential is None:
            return
        self.sessions.check_origin(scope)
        line = (b"authorization", f"Bearer {credential}".encode("latin-1"))
        cast("dict[str, object]", scope)["headers"] = [*scope["headers"], line]


@dataclass(frozen=True, slots=True)
class SessionApi:
    """What the routes of the session share."""

    sessions: Sessions
    authenticate: Authenticate
    gate: AdminGate

    async def begin(self, request: AnyRequest) -> Response[bytes]:
        """Answer a key with a session that carries it.

        Raises:
            GatewayError: the key is neither an API key in use nor the admin key.
        """
        credential = _credential(await read_json(request.receive))
        kind = SessionKind.ADMIN
        if not self.gate.opens(f"Bearer {credential}"):
            kind = SessionKind.KEY
            note = note_of(request.scope)
            key = await self.authenticate(f"Bearer {credential}", None, note.address)
            note.tenant_id, note.key_id = key.tenant_id, key.id
        held = self.held(request.scope) | {kind: credential}
        answer = await self.facts(held, request.scope)
        answer.set_cookie(self.sessions.cookie(request.scope, kind, credential))
        return answer

    def end(self, scope: Scope, answer: Response[bytes]) -> Response[bytes]:
        """Take the cookies away."""
        for kind in SessionKind:
            answer.set_cookie(self.sessions.no_cookie(scope, kind))
        return answer

    async def facts(
        self, held: Mapping[SessionKind, str | None], scope: Scope
    ) -> Response[bytes]:
        """Tell which keys a session carries, as far as they are valid here."""
        key, admin = held[SessionKind.KEY], held[SessionKind.ADMIN]
        valid = key is not None and await self._in_use(key, note_of(scope).address)
        body = {
            "object": "session",
            "key": display(key) if key is not None and valid else None,
            "admin": admin is not None and self.gate.opens(f"Bearer {admin}"),
            "admin_enabled": self.gate.admin_key is not None,
        }
        return Response(
            msgspec.json.encode(body),
            media_type="application/json",
            headers={"cache-control": "no-store"},
        )

    def held(self, scope: Scope) -> dict[SessionKind, str | None]:
        """Find the keys that the cookies of a request carry."""
        return {kind: self.sessions.credential(scope, kind) for kind in SessionKind}

    async def _in_use(self, key: str, address: str) -> bool:
        try:
            await self.authenticate(f"Bearer {key}", None, address)
        except (UnauthorizedError, ForbiddenError):
            return False
        return True


def session_routes(api: SessionApi) -> list[HTTPRouteHandler]:
    """Route the session."""

    @get("/ui/session")
    async def get_session(request: AnyRequest) -> Response[bytes]:
        """Tell which keys the browser's session carries, shortened."""
        api.sessions.check_origin(request.scope)
        return await api.facts(api.held(request.scope), request.scope)

    @post("/ui/session", status_code=200)
    async def begin_session(request: AnyRequest) -> Response[bytes]:
        """Begin a session with an API key or the admin key."""
        _check_named(api.sessions, request.scope)
        return await api.begin(request)

    @delete("/ui/session", status_code=200)
    async def end_session(request: AnyRequest) -> Response[bytes]:
        """End the session."""
        _check_named(api.sessions, request.scope)
        return api.end(
            request.scope, await api.facts(dict.fromkeys(SessionKind), request.scope)
        )

    return [get_session, begin_session, end_session]


def _check_named(sessions: Sessions, scope: Scope) -> None:
    sessions.check_origin(scope)
    if _kind(header(scope, SESSION_HEADER)) is None:
        raise ForbiddenError(
            "Send the header 'X-Imageway-Session: key', as the gateway's own pages do.",
            code="cross_site_request",
        )


def _credential(body: object) -> str:
    found = body.get("key") if isinstance(body, dict) else None
    text = found.strip() if isinstance(found, str) else ""
    fits = text.isascii() and text.isprintable()
    if not fits or not 1 <= len(text) <= CREDENTIAL_MAX_CHARS:
        raise InvalidRequestError(
            "key must be an API key or the admin key, as it was given to you.",
            param="key",
        )
    return text


def _kind(text: str | None) -> SessionKind | None:
    return SessionKind(text) if text in set(SessionKind) else None


def _cookies(scope: Scope) -> dict[str, str]:
    pairs = (
        each.partition("=")
        for each in header_list(scope, "cookie").replace(",", ";").split(";")
    )
    return {name.strip(): value.strip() for name, _, value in pairs}


def _method(scope: Scope) -> str:
    return str(cast("dict[str, object]", scope)["method"])


def _origin(url: str) -> str:
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc}"
