"""Who is calling: makes keys, tells whose a key is, takes keys back."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from gateway.core import keys as rules
from gateway.core.errors import (
    ConflictError,
    GatewayError,
    InvalidRequestError,
    NotFoundError,
    RateLimitedError,
    UnauthorizedError,
    tenant_suspended,
)
from gateway.core.fleet import Notice, Topic
from gateway.core.key_limits import (
    KeyScope,
    KeyUse,
    ModelNamer,
    address_group,
    check_use,
    left_nanocredits,
    limit_facts,
    moment_text,
    parse_limits,
)
from gateway.core.limits import Rate
from gateway.core.money import decimal_text
from gateway.core.preferences import parse_routing, routing_facts
from gateway.core.routing import Preferences
from gateway.core.sizes import shown
from gateway.ports import (
    Accounts,
    Chance,
    Clock,
    Key,
    KeyMark,
    Mark,
    Rates,
    Succession,
    Tenant,
)

KEY_ID_CHARS = 16
KEY_ID_ALPHABET = "abcdefghijklmnopqrstuvwxyz0123456789"
KNOWN_FOR_MS = 2_000
"""How long a key is believed without asking the store: a revocation works by then."""
KNOWN_MAX_KEYS = 10_000
DELIVERIES = ("auto", "sync", "async")
_BESIDE_LIMITS = ("delivery", "routing")
ROTATION_OVERLAP_S = 24 * 3600
ROTATION_OVERLAP_MAX_S = 90 * 24 * 3600


BAD_KEYS_PER_MIN = 20
"""Of one address; so many are told that they are unknown, all others to wait."""


@dataclass(slots=True)
class Authenticate:
    """Tells which key a request carries, and whether it may be used for that.

    ``strangers`` counts unknown keys by where they came from: they are told to wait
    after a while, and nobody else is.
    """

    accounts: Accounts
    clock: Clock
    pepper: bytes
    rates: Rates
    strangers: Rates
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

    async def __call__(
        self,
        authorization: str | None,
        needs: KeyScope | None = None,
        address: str = "",
    ) -> Key:
        """Find the key of an ``Authorization`` header.

        Args:
            authorization: the header.
            needs: what the key must open; None is satisfied with any key.
            address: where the request comes from.

        Raises:
            UnauthorizedError: none is given, or it is malformed, unknown, revoked or
                expired.
            ForbiddenError: it is not for that, or not from there, or its tenant is
                suspended.
            RateLimitedError: too many unknown keys came from there.
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
            raise await self._unknown(address)
        if key.revoked_ms is not None:
            raise UnauthorizedError(
                "The API key was revoked. Use another one.", code="key_disabled"
            )
        if key.suspended:
            raise tenant_suspended()
        check_use(key.limits, needs, address, self.clock.now_ms())
        return key

    async def rate_of(self, key: Key) -> Rate | None:
        """Count a request of a key; None where nobody limits them."""
        limit = key.limits.requests_per_min
        return None if limit is None else await self.rates.take(key.meter, limit)

    async def _unknown(self, address: str) -> GatewayError:
        group = address_group(address)
        rate = await self.strangers.take(group, BAD_KEYS_PER_MIN)
        if rate.allowed:
            return UnauthorizedError(
                "The API key is not valid. Check that it was copied whole; "
                "keys are shown once, when they are made.",
            )
        return RateLimitedError(
            "Too many unknown API keys came from this address. Use a valid key, or "
            f"wait {rate.frees_in_s} s.",
            retry_after_s=rate.frees_in_s,
            extra={"limit_scope": "unknown_keys"},
        )

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


def check_rate(rate: Rate) -> None:
    """See that a request was let through.

    Raises:
        RateLimitedError: there were too many within the minute.
    """
    if not rate.allowed:
        raise RateLimitedError(
            f"The API key may make {rate.limit} requests a minute. "
            f"Wait {rate.frees_in_s} s.",
            retry_after_s=rate.frees_in_s,
            extra={"limit_scope": "requests_per_minute"},
        )


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


def _as_it_is(name: str) -> str:
    return name


@dataclass(frozen=True, slots=True)
class KeyView:
    """A key and what it has used."""

    key: Key
    use: KeyUse


@dataclass(frozen=True, slots=True)
class KeyNames:
    """What a key's limits and routing may name: models by any name, and upstreams."""

    model_named: ModelNamer = _as_it_is
    upstreams: frozenset[str] | None = None
    """None: they are not looked at."""


@dataclass(frozen=True, slots=True)
class ManageKeys:
    """Makes, lists, changes, rotates and revokes the keys of tenants.

    Where a ``tenant_id`` is given it is who asks: keys of others are not there.
    ``announce`` tells running gateways, as far as they can be reached; it never fails.
    """

    accounts: Accounts
    clock: Clock
    chance: Chance
    pepper: bytes
    announce: Callable[[Notice], Awaitable[None]] = _tell_nobody
    names: KeyNames = KeyNames()
    who: str = "imageway"
    """Whom the audit trail names."""

    def acting_as(self, who: str) -> ManageKeys:
        """Return the same for somebody else."""
        return replace(self, who=who)

    async def create(
        self, tenant: Tenant, given: Mapping[str, object] | None = None
    ) -> NewKey:
        """Make a key with ``delivery``, ``routing`` and limits as given.

        Raises:
            InvalidRequestError: a field is unknown or breaks a rule.
        """
        made = self._drawn(tenant.id)
        made = NewKey(self._changed(made.key, given or {}), made.secret)
        await self.accounts.add_key(made.key, self._mark("key.create"))
        return made

    async def page(
        self, tenant_id: str | None, *, page: int, page_size: int
    ) -> tuple[int, Sequence[Key]]:
        """List keys of a tenant or of all, newest first, with their number."""
        offset = (page - 1) * page_size
        return await self.accounts.keys_page(tenant_id, offset=offset, limit=page_size)

    async def show(self, key_id: str, tenant_id: str | None = None) -> KeyView:
        """Read a key and what it has used.

        Raises:
            NotFoundError: there is no such key.
        """
        key = _found(await self.accounts.key(key_id), key_id, tenant_id)
        use = await self.accounts.key_use(key_id)
        assert use is not None, key_id
        return KeyView(key, use)

    async def change(
        self, key_id: str, given: Mapping[str, object], tenant_id: str | None = None
    ) -> Key:
        """Change what is given of a key, within seconds; null takes a limit away.

        Raises:
            NotFoundError: there is no such key.
            InvalidRequestError: a field is unknown or breaks a rule.
        """

        def change(key: Key) -> Key:
            return self._changed(_found(key, key_id, tenant_id), given)

        key = await self.accounts.change_key(key_id, change, self._mark("key.change"))
        await self.announce(Notice(Topic.KEYS, key_id))
        return _found(key, key_id, tenant_id)

    async def rotate(
        self,
        key_id: str,
        tenant_id: str | None = None,
        *,
        overlap_s: int = ROTATION_OVERLAP_S,
    ) -> tuple[NewKey, Key]:
        """Make a key that takes the place of another one, with the same limits.

        They share what they have used. The other one expires after the overlap.
        Returns the new one, and the other one as it is now.

        Raises:
            NotFoundError: there is no such key.
            ConflictError: it is not valid any more, or two are valid already.
        """
        if not 0 <= overlap_s <= ROTATION_OVERLAP_MAX_S:
            raise InvalidRequestError(
                f"overlap_s must be from 0 to {ROTATION_OVERLAP_MAX_S:,}.",
                param="overlap_s",
            )
        drawn, now_ms = self._drawn(""), self.clock.now_ms()

        def rotate(key: Key, all_of_it: Sequence[Key]) -> Succession:
            _check_rotation(_found(key, key_id, tenant_id), all_of_it, now_ms)
            end_ms = now_ms + overlap_s * 1000
            if key.limits.expires_ms is not None:
                end_ms = min(end_ms, key.limits.expires_ms)
            ends = replace(key.limits, expires_ms=end_ms)
            after = replace(
                drawn.key,
                tenant_id=key.tenant_id,
                delivery=key.delivery,
                routing=key.routing,
                limits=key.limits,
                meter_id=key.meter,
            )
            return Succession(replace(key, limits=ends, rotated_to=after.id), after)

        done = await self.accounts.rotate_key(key_id, rotate, self._mark("key.rotate"))
        if done is None:
            raise _not_found(key_id)
        await self.announce(Notice(Topic.KEYS, key_id))
        return NewKey(done.after, drawn.secret), done.before

    async def revoke(self, key_id: str, tenant_id: str | None = None) -> None:
        """Take a key back; it stops working within seconds.

        Raises:
            NotFoundError: there is no such key.
        """
        _found(await self.accounts.key(key_id), key_id, tenant_id)
        await self.accounts.revoke_key(
            key_id, now_ms=self.clock.now_ms(), mark=self._mark("key.revoke")
        )
        await self.announce(Notice(Topic.KEYS, key_id))

    def facts(self, key: Key) -> dict[str, object]:
        """Write a key, as it is now, for operators and its tenant; never its secret."""
        return key_facts(key, self.clock.now_ms())

    def _mark(self, what: str) -> KeyMark:
        change_id = "chg_" + self.chance.token(KEY_ID_ALPHABET, KEY_ID_CHARS)
        mark = Mark(change_id, self.who, self.clock.now_ms())
        return KeyMark(mark, what, self.facts)

    def _drawn(self, tenant_id: str) -> NewKey:
        secret = rules.key_from(self.chance.token(rules.ALPHABET, rules.RANDOM_CHARS))
        key = Key(
            id="key_" + self.chance.token(KEY_ID_ALPHABET, KEY_ID_CHARS),
            tenant_id=tenant_id,
            digest=rules.digest(secret, self.pepper),
            display=rules.display(secret),
            delivery="auto",
            created_ms=self.clock.now_ms(),
        )
        return NewKey(key, secret)

    def _changed(self, key: Key, given: Mapping[str, object]) -> Key:
        limits = {n: v for n, v in given.items() if n not in _BESIDE_LIMITS}
        delivery = given.get("delivery", key.delivery)
        if delivery not in DELIVERIES or not isinstance(delivery, str):
            raise InvalidRequestError(
                f"delivery must be one of {', '.join(DELIVERIES)}.", param="delivery"
            )
        routing = key.routing
        if "routing" in given:
            routing = parse_routing(given["routing"])
            check_upstreams(routing, self.names.upstreams)
        return replace(
            key,
            delivery=delivery,
            routing=routing,
            limits=parse_limits(limits, key.limits, self.names.model_named),
        )


def check_upstreams(routing: Preferences, known: frozenset[str] | None) -> None:
    """See that what a key keeps of routing names upstreams that there are.

    Raises:
        InvalidRequestError: one is unknown.
    """
    for name in (routing.only or ()) + (routing.ignore or ()) + (routing.order or ()):
        if known is not None and name.partition("/")[0] not in known:
            raise InvalidRequestError(
                f"routing: there is no upstream {shown(name)[1:-1]}; there are "
                f"{', '.join(sorted(known))}",
                param="routing",
            )


def key_state(key: Key, now_ms: int) -> str:
    """Say what a key is: active, expired or revoked."""
    if key.revoked_ms is not None:
        return "revoked"
    expires_ms = key.limits.expires_ms
    return "expired" if expires_ms is not None and now_ms >= expires_ms else "active"


def key_facts(key: Key, now_ms: int) -> dict[str, object]:
    """Write a key for operators and its tenant; never the key itself."""
    revoked_ms = key.revoked_ms
    return {
        "key_id": key.id,
        "key": key.display,
        "tenant_id": key.tenant_id,
        "state": key_state(key, now_ms),
        "delivery": key.delivery,
        "routing": routing_facts(key.routing),
        **limit_facts(key.limits),
        "created_at": moment_text(key.created_ms),
        "revoked_at": None if revoked_ms is None else moment_text(revoked_ms),
        "rotated_to": key.rotated_to,
    }


def use_facts(view: KeyView) -> dict[str, object]:
    """Write what a key has used: amounts as decimal strings, held ones included."""
    use, left = view.use, left_nanocredits(view.key.limits, view.use)
    return {
        "tasks_in_flight": use.open_tasks,
        "total_credits": decimal_text(use.total_nanocredits),
        "daily_credits": decimal_text(use.daily_nanocredits),
        "monthly_credits": decimal_text(use.monthly_nanocredits),
        "remaining_credits": None if left is None else decimal_text(left),
        "day": use.day,
    }


def _found(key: Key | None, key_id: str, tenant_id: str | None) -> Key:
    if key is None or tenant_id not in {None, key.tenant_id}:
        raise _not_found(key_id)
    return key


def _not_found(key_id: str) -> NotFoundError:
    return NotFoundError(f"There is no key {key_id[:64]}.", code="key_not_found")


def _check_rotation(key: Key, all_of_it: Sequence[Key], now_ms: int) -> None:
    if key_state(key, now_ms) != "active":
        raise ConflictError(
            f"The key {key.id} is {key_state(key, now_ms)}. Make another one.",
            code="key_not_active",
        )
    others = [k for k in all_of_it if k.id != key.id]
    valid = [k.id for k in others if key_state(k, now_ms) == "active"]
    if valid or key.rotated_to is not None:
        raise ConflictError(
            f"Two keys are valid already: {key.id} and {', '.join(valid)}. "
            "Revoke one of them first, or wait until it expires."
            if valid
            else f"The key {key.id} was rotated to {key.rotated_to}. Rotate that one.",
            code="key_already_rotated",
        )
