"""Who is calling: makes keys, tells whose a key is, takes keys back."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from gateway.core import keys as rules
from gateway.core.errors import NotFoundError, UnauthorizedError, tenant_suspended
from gateway.core.fleet import Notice, Topic
from gateway.core.routing import NO_PREFERENCES, Preferences
from gateway.ports import Accounts, Chance, Clock, Key, Tenant

KEY_ID_CHARS = 16
KEY_ID_ALPHABET = "abcdefghijklmnopqrstuvwxyz0123456789"
KNOWN_FOR_MS = 2_000
"""How long a key is believed without asking the store: a revocation works by then."""
KNOWN_MAX_KEYS = 10_000


@dataclass(slots=True)
class Authenticate:
    """Tells which key a request carries."""

    accounts: Accounts
    clock: Clock
    pepper: bytes
    _known: OrderedDict[bytes, tuple[int, Key]] = field(default_factory=OrderedDict)
    _forgotten: int = 0

    def forget(self, key_id: str) -> None:
        """Ask the store again for a key that was changed; an empty id means all."""
        self._forgotten += 1
        if not key_id:
            self._known.clear()
        for digest, (_, key) in list(self._known.items()):
            if key.id == key_id:
                del self._known[digest]

    async def __call__(self, authorization: str | None) -> Key:
        """Find the key of an ``Authorization`` header.

        Raises:
            UnauthorizedError: none is given, or it is malformed, unknown or revoked.
            ForbiddenError: its tenant is suspended.
        """
        text = bearer(authorization)
        if text is None:
            raise UnauthorizedError(
                "No API key was given. Send the header "
                "'Authorization: Bearer <your key>'.",
                code="missing_api_key",
            )
        key = None
        if rules.is_well_formed(text):
            key = await self._find(rules.digest(text, self.pepper))
        if key is None:
            raise UnauthorizedError(
                "The API key is not valid. Check that it was copied whole; "
                "keys are shown once, when they are made.",
            )
        if key.revoked_ms is not None:
            raise UnauthorizedError(
                "The API key was revoked. Use another one.", code="key_disabled"
            )
        if key.suspended:
            raise tenant_suspended()
        return key

    async def _find(self, digest: bytes) -> Key | None:
        now_ms = self.clock.monotonic_ms()
        known = self._known.get(digest)
        if known is not None and now_ms - known[0] < KNOWN_FOR_MS:
            return known[1]
        forgotten = self._forgotten
        key = await self.accounts.key_by_digest(digest)
        if key is None:
            self._known.pop(digest, None)
            return None
        if forgotten != self._forgotten:
            return key  # it may have been read before the change
        self._known[digest] = (now_ms, key)
        self._known.move_to_end(digest)
        if len(self._known) > KNOWN_MAX_KEYS:
            self._known.popitem(last=False)
        return key


def bearer(authorization: str | None) -> str | None:
    """Take the credential out of an ``Authorization: Bearer`` header."""
    scheme, _, credential = (authorization or "").strip().partition(" ")
    credential = credential.strip()
    return credential if scheme.lower() == "bearer" and credential else None


@dataclass(frozen=True, slots=True)
class NewKey:
    """A key just made. ``secret`` is shown now and never again."""

    key: Key
    secret: str = field(repr=False)


async def _tell_nobody(notice: Notice) -> None:
    del notice


@dataclass(frozen=True, slots=True)
class ManageKeys:
    """Makes, lists and revokes the keys of a tenant.

    ``announce`` tells running gateways, as far as they can be reached; it never fails.
    """

    accounts: Accounts
    clock: Clock
    chance: Chance
    pepper: bytes
    announce: Callable[[Notice], Awaitable[None]] = _tell_nobody

    async def create(
        self,
        tenant: Tenant,
        *,
        delivery: str = "auto",
        routing: Preferences = NO_PREFERENCES,
    ) -> NewKey:
        """Make a key; ``delivery`` (auto, sync, async) is its default mode.

        ``routing`` is where its requests go, unless they say otherwise.
        """
        assert delivery in {"auto", "sync", "async"}, delivery
        secret = rules.key_from(self.chance.token(rules.ALPHABET, rules.RANDOM_CHARS))
        key = Key(
            id="key_" + self.chance.token(KEY_ID_ALPHABET, KEY_ID_CHARS),
            tenant_id=tenant.id,
            digest=rules.digest(secret, self.pepper),
            display=rules.display(secret),
            delivery=delivery,
            created_ms=self.clock.now_ms(),
            routing=routing,
        )
        await self.accounts.add_key(key)
        return NewKey(key, secret)

    async def revoke(self, key_id: str) -> None:
        """Take a key back; it stops working within seconds.

        Raises:
            NotFoundError: there is no such key.
        """
        if not await self.accounts.revoke_key(key_id, now_ms=self.clock.now_ms()):
            raise NotFoundError(f"There is no key {key_id}.", code="key_not_found")
        await self.announce(Notice(Topic.KEYS, key_id))
