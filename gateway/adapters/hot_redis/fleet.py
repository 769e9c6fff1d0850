"""The other processes, through Redis: one exchange a second, more when there is news.

What a board tells is written, what the others told is read, in one round trip. Every
record says when it was written, by the clock of Redis: that of the machines may differ.

    live       who is there, with the time of the last sign of life
    stances    breaker or pause -> time, version, where it stands
    counts:N   of the 10 s with that number: breaker|good or breaker|bad -> calls
    streaks    breaker|process -> failures in a row; breaker|proof -> last good call
    probe:B, forced:B   the process that may probe a breaker, or has just tried it
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import msgspec

from gateway.adapters.hot_redis.connection import (
    CHANNEL,
    PREFIX,
    UNANSWERED,
    Client,
    Command,
    Guard,
    closed,
)
from gateway.adapters.hot_redis.counts import (
    PROOF,
    SEEN,
    STREAKS_KEPT_MS,
    Counts,
    forgotten_streaks,
    streaks_of_others,
)
from gateway.core import fleet
from gateway.core.breaker import BUCKET_MS, FORCED_EVERY_MS, WINDOW_MS, Others
from gateway.core.fleet import Hearing, Notice, Size, Stance, Telling, Topic
from gateway.ports import Clock, Member

EXCHANGE_EVERY_MS = 1_000
EXCHANGE_APART_S = 0.02
LIVE_MS = 5_000
LIVE_KEPT_MS = 60_000
STANCE_KEPT_MS = 1_800_000
"""Twice the longest time that a breaker is open."""
COUNTS_KEPT_MS = WINDOW_MS + 2 * BUCKET_MS
PROBE_MS = 30_000
"""A probe is free again so long after its process was last heard of."""
NOTICES_MAX = 1_000
"""More than that at once are one that means all."""
PING_EVERY_S = 5.0
BUCKETS = WINDOW_MS // BUCKET_MS

_LIVE, _STANCES, _STREAKS = (f"{PREFIX}{n}" for n in ("live", "stances", "streaks"))
_PAUSE = "pause:"
_STALE, _TAKEN = -1, 1

_BEAT = """
local now = redis.call('TIME')
local ms = now[1] * 1000 + math.floor(now[2] / 1000)
redis.call('ZADD', KEYS[1], ms, ARGV[1])
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', ms - ARGV[2])
redis.call('PEXPIRE', KEYS[1], ARGV[3])
return {ms, redis.call('ZRANGE', KEYS[1], 0, -1)}
"""
_TELL = """
local told = redis.call('HGET', KEYS[1], ARGV[1])
if told and ARGV[2] ~= '*' and string.match(told, '^%S+ (%S+)') ~= ARGV[2] then
  return 0
end
redis.call('HSET', KEYS[1], ARGV[1], ARGV[3])
redis.call('PEXPIRE', KEYS[1], ARGV[4])
return 1
"""
_TAKE = """
local told = redis.call('HGET', KEYS[1], ARGV[1])
if told and string.match(told, '^%S+ (%S+)') ~= ARGV[2] then return -1 end
if redis.call('SET', KEYS[2], ARGV[3], 'NX', 'PX', ARGV[4]) then return 1 end
return 0
"""
_KEEP = """
local owner = redis.call('GET', KEYS[1])
if owner and owner ~= ARGV[1] then return 0 end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
return 1
"""
_GIVE_BACK = """
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
return redis.call('DEL', KEYS[1])
"""


@dataclass(slots=True)
class RedisFleet:
    """Implements ``Fleet`` and ``Notices``.

    ``process`` names this one, differently at each start. ``heed`` is called for each
    notice of another process, and with an empty subject when some may have been lost.
    """

    guard: Guard
    clock: Clock
    process: str
    crashed: Callable[[BaseException, str], None]
    board: Member | None = None
    heed: dict[Topic, Callable[[str], None]] = field(default_factory=dict)
    _size: Size = field(default_factory=Size)
    _ahead_ms: int | None = None
    """What to add to our clock to have that of Redis."""
    _versions: dict[str, str] = field(default_factory=dict)
    _pending: dict[str, str] = field(default_factory=dict)
    _old: list[str] = field(default_factory=list)
    _told: int = 0
    _counts: Counts = field(default_factory=Counts)
    _streaks: set[str] = field(default_factory=set)
    _forgotten: list[str] = field(default_factory=list)
    _notices: set[Notice] = field(default_factory=set)
    _board_news: bool = False
    _exchanged_ms: int | None = None
    _news: asyncio.Event = field(default_factory=asyncio.Event)

    # --- what the board and the flows ask ---

    def stir(self) -> None:
        """Exchange soon; returns at once."""
        self._board_news = True
        self._news.set()

    def send(self, notice: Notice) -> None:
        """Tell the others soon; returns at once."""
        if len(self._notices) >= NOTICES_MAX:
            self._notices = {Notice(topic) for topic in Topic}
        self._notices.add(notice)
        self._news.set()

    async def may_probe(self, breaker: str) -> bool:
        """Take the only probe of a breaker; True where nobody can be asked."""
        return await self._may(breaker, "probe", PROBE_MS)

    async def may_force(self, breaker: str) -> bool:
        """Take the one try in 5 s; True where nobody can be asked."""
        return await self._may(breaker, "forced", FORCED_EVERY_MS)

    async def _may(self, breaker: str, what: str, kept_ms: int) -> bool:
        # Whoever does not know yet where the breaker stands now may not call either.
        keys = (2, _STANCES, _lease(what, breaker))
        known = self._versions.get(breaker, "")
        answers = await self.guard.ask(
            ("EVAL", _TAKE, *keys, breaker, known, self.process, kept_ms)
        )
        if answers is None:
            return True
        if answers[0] == _STALE:
            self.stir()
        return bool(answers[0] == _TAKEN)

    # --- what runs beside them ---

    async def run(self) -> None:
        """Exchange and listen until cancelled; then leave."""
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._keep_exchanging())
                group.create_task(self._keep_listening())
        finally:
            await self.leave()

    async def leave(self) -> None:
        """Say that this process goes, so that the others have its slots soon."""
        await self.guard.ask(("ZREM", _LIVE, self.process))
        await self.guard.close()

    async def _keep_exchanging(self) -> None:
        while True:
            try:
                await self._next_turn()
                await self._turn()
            except Exception as error:  # noqa: BLE001 - a supervisor
                self.crashed(error, "exchanging with the fleet")
                await self.clock.sleep(EXCHANGE_EVERY_MS / 1000)

    async def _next_turn(self) -> None:
        if self.guard.degraded:
            await self.clock.sleep(EXCHANGE_EVERY_MS / 1000)
            return
        await self.clock.sleep(EXCHANGE_APART_S)
        with suppress(TimeoutError):
            async with asyncio.timeout(self._due_in_ms() / 1000):
                await self._news.wait()

    async def _turn(self) -> None:
        self._news.clear()
        if self._board_news or not self._due_in_ms():
            await self.exchange()
        notices, self._notices = self._notices, set()
        if notices:
            await self.guard.ask(_publishing(self.process, notices))

    def _due_in_ms(self) -> int:
        if self._exchanged_ms is None:
            return 0
        since_ms = self.clock.monotonic_ms() - self._exchanged_ms
        return max(0, EXCHANGE_EVERY_MS - since_ms)

    # --- the exchange ---

    async def exchange(self) -> bool:
        """Tell and hear once; False if Redis did not answer.

        What could not be told is told the next time.
        """
        assert self.board is not None
        self._board_news = False
        telling = self.board.tell()
        done = await self._exchanged(telling)
        self._exchanged_ms = self.clock.monotonic_ms()
        if not done:
            self.board.keep(telling)
            self._counts.all.clear()
            self._resize(Size(), fleet.ALONE_AFTER_MS)
            self.board.hear(Hearing(self._size))
        elif telling.stances or telling.pauses:
            await self.guard.ask(_publishing(self.process, [Notice(Topic.BOARD)]))
        return done

    async def _exchanged(self, telling: Telling) -> bool:
        now_ms = await self._redis_ms()
        if now_ms is None:
            return False
        bucket = now_ms // BUCKET_MS
        # Older ones do not change any more.
        first = bucket - 1 if self._counts.all else bucket - BUCKETS
        numbers = list(range(first, bucket + 1))
        reads: list[Command] = [
            ("HGETALL", key) for key in (_STANCES, _STREAKS, *map(_bucket, numbers))
        ]
        answers = await self.guard.try_again(
            self._beat(),
            *self._stances_told(telling, now_ms),
            *self._counts_told(telling.counts, bucket),
            *self._streaks_told(telling, now_ms),
            *self._probes_told(telling),
            *reads,
        )
        if answers is None:
            return False
        self._versions |= self._pending
        live = self._beaten(answers[0])
        stances, streaks, *counts = answers[-len(reads) :]
        self._counts.all |= dict(zip(numbers, counts, strict=True))
        self._counts.forget(bucket - BUCKETS)
        rank = sorted(live).index(self.process)
        self._resize(Size(len(live), rank), fleet.GROWS_AFTER_MS)
        self._hear(telling, stances, streaks, now_ms)
        return True

    async def _redis_ms(self) -> int | None:
        if self._ahead_ms is None or self.guard.degraded:
            answers = await self.guard.try_again(self._beat())
            if answers is None:
                return None
            self._beaten(answers[0])
        assert self._ahead_ms is not None
        return self.clock.monotonic_ms() + self._ahead_ms

    def _beat(self) -> Command:
        return ("EVAL", _BEAT, 1, _LIVE, self.process, LIVE_MS, LIVE_KEPT_MS)

    def _beaten(self, answer: list[Any]) -> list[str]:
        self._ahead_ms = int(answer[0]) - self.clock.monotonic_ms()
        live: list[str] = answer[1]
        return live

    def _resize(self, seen: Size, patience_ms: int) -> None:
        now_ms = self.clock.monotonic_ms()
        self._size = fleet.sized(self._size, seen, now_ms, patience_ms)

    # --- what is told ---

    def _stances_told(self, telling: Telling, now_ms: int) -> Iterable[Command]:
        # What others told meanwhile is not written over, but taken over: an opening
        # that is late must not undo a closing. A pause undoes nothing.
        self._pending.clear()
        texts = {n: msgspec.json.encode(s).decode() for n, s in telling.stances.items()}
        texts |= {_PAUSE + name: str(ms) for name, ms in telling.pauses.items()}
        for name, text in texts.items():
            self._told += 1
            version = self._pending[name] = f"{self.process}.{self._told}"
            anyway = name in telling.by_hand or name.startswith(_PAUSE)
            known = "*" if anyway else self._versions.get(name, "")
            value = f"{now_ms} {version} {text}"
            yield ("EVAL", _TELL, 1, _STANCES, name, known, value, STANCE_KEPT_MS)
        old, self._old = self._old, []
        if old:
            yield ("HDEL", _STANCES, *old)

    def _counts_told(
        self, counts: Mapping[str, tuple[int, int]], bucket: int
    ) -> Iterable[Command]:
        ours = self._counts.ours.setdefault(bucket, Counter())
        for name, seen in counts.items():
            for what, count in zip(SEEN, seen, strict=True):
                if count:
                    ours[name + what] += count
                    yield ("HINCRBY", _bucket(bucket), name + what, count)
        if counts:
            yield ("PEXPIRE", _bucket(bucket), COUNTS_KEPT_MS)

    def _streaks_told(self, telling: Telling, now_ms: int) -> Iterable[Command]:
        told: list[str] = []
        for name, (streak, since_ago_ms) in telling.streaks.items():
            text = f"{streak} {now_ms - since_ago_ms} {now_ms}"
            told += [f"{name}|{self.process}", text]
        for name, began_ago_ms in telling.proofs.items():
            told += [name + PROOF, str(now_ms - began_ago_ms)]
        if told:
            yield ("HSET", _STREAKS, *told)
            yield ("PEXPIRE", _STREAKS, STREAKS_KEPT_MS)
        # The key lives on while others tell: what died processes told goes by hand.
        over = [f"{n}|{self.process}" for n in self._streaks - telling.streaks.keys()]
        over, self._forgotten = over + self._forgotten, []
        if over:
            yield ("HDEL", _STREAKS, *over)
        self._streaks = set(telling.streaks)

    def _probes_told(self, telling: Telling) -> Iterable[Command]:
        # After where their breakers stand: nobody else probes by what was before.
        for name in telling.probing:
            yield ("EVAL", _KEEP, 1, _lease("probe", name), self.process, PROBE_MS)
        for name in telling.probed:
            yield ("EVAL", _GIVE_BACK, 1, _lease("probe", name), self.process)

    # --- what is heard ---

    def _hear(
        self,
        telling: Telling,
        written: Mapping[str, str],
        streaks: Mapping[str, str],
        now_ms: int,
    ) -> None:
        assert self.board is not None
        stances: dict[str, Stance] = {}
        pauses: dict[str, int] = {}
        for name, text, age_ms in self._news_of(written, now_ms):
            with suppress(msgspec.MsgspecError, ValueError):
                if not name.startswith(_PAUSE):
                    stance = msgspec.json.decode(text, type=Stance)
                    stances[name] = fleet.aged(stance, age_ms)
                elif int(text) == 0 or int(text) > age_ms:
                    pauses[name.removeprefix(_PAUSE)] = max(0, int(text) - age_ms)
        for name, stance in (*telling.stances.items(), *stances.items()):
            if stance.open_ms is None:
                self._counts.void[name] = now_ms // BUCKET_MS
        self._forgotten = forgotten_streaks(streaks, now_ms)
        others = self._others(streaks_of_others(streaks, self.process, now_ms))
        self.board.hear(Hearing(self._size, stances, pauses, others))

    def _news_of(
        self, written: Mapping[str, str], now_ms: int
    ) -> Iterable[tuple[str, str, int]]:
        for name, value in written.items():
            at, _, rest = value.partition(" ")
            version, _, text = rest.partition(" ")
            if not at.isdecimal() or now_ms - int(at) > STANCE_KEPT_MS:
                self._old.append(name)
            elif self._versions.get(name) != version:
                self._versions[name] = version
                yield name, text, max(0, now_ms - int(at))

    def _others(self, streaks: Mapping[str, int]) -> dict[str, Others]:
        fields = {field for bucket in self._counts.all.values() for field in bucket}
        names = {field.rpartition("|")[0] for field in fields} | streaks.keys()
        return {
            name: Others(*self._counts.others(name), streaks.get(name, 0))
            for name in names
        }

    # --- notices ---

    async def _keep_listening(self) -> None:
        while True:
            client = self.guard.open()
            try:
                await self._listen(client)
            except UNANSWERED:
                pass  # the exchange tells of it
            except Exception as error:  # noqa: BLE001 - a supervisor
                self.crashed(error, "listening to the fleet")
            finally:
                await closed(client)
            await self.clock.sleep(EXCHANGE_EVERY_MS / 1000)

    async def _listen(self, client: Client) -> None:
        # Until it breaks, or does not answer: a connection may die without a word.
        await client.initialize()
        pubsub: Any = client.pubsub()
        try:
            await pubsub.subscribe(CHANNEL)
            asked = False
            self._heed_all()
            while True:
                message = await pubsub.get_message(timeout=PING_EVERY_S)
                if message is not None:
                    asked = False
                    self._heed(message)
                elif asked:
                    return
                else:
                    await pubsub.ping()
                    asked = True
        finally:
            with suppress(*UNANSWERED):
                await pubsub.aclose()

    def _heed_all(self) -> None:
        self.stir()
        for heed in self.heed.values():
            heed("")

    def _heed(self, message: Mapping[str, Any]) -> None:
        if message["type"] != "message":
            return
        process, *lines = str(message["data"]).split("\n")
        if process == self.process:
            return
        for line in lines:
            topic, _, subject = line.partition(" ")
            if topic == Topic.BOARD.value:
                self.stir()
            elif topic in Topic._value2member_map_ and Topic(topic) in self.heed:
                self.heed[Topic(topic)](subject)


def notices_text(process: str, notices: Iterable[Notice]) -> str:
    """Write notices as one message."""
    lines = (f"{n.topic.value} {n.subject}".rstrip() for n in notices)
    return "\n".join([process, *sorted(lines)])


def _publishing(process: str, notices: Iterable[Notice]) -> Command:
    return ("PUBLISH", CHANNEL, notices_text(process, notices))


def _lease(what: str, breaker: str) -> str:
    return f"{PREFIX}{what}:{breaker}"


def _bucket(number: int) -> str:
    return f"{PREFIX}counts:{number}"
