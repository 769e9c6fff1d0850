"""What tenants uploaded, in SQL."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gateway.adapters.sql.database import Database, Row, Transaction
from gateway.ports import FileUse, StoredFile


@dataclass(frozen=True, slots=True)
class SqlFiles:
    """The ``FileStore`` port over any SQL database."""

    database: Database

    async def add_file(
        self, file: StoredFile, *, at_most: FileUse, now_ms: int
    ) -> bool:
        """See ``FileStore``; any number of calls at once keep to the limits."""
        return await self.database.write(
            lambda tx: _add_file(tx, file, at_most, now_ms)
        )

    async def file_use(self, tenant_id: str, *, now_ms: int) -> FileUse:
        """See ``FileStore``."""
        return await self.database.read(lambda tx: _use(tx, tenant_id, now_ms))

    async def file(self, file_id: str, *, now_ms: int) -> StoredFile | None:
        """See ``FileStore``."""
        row = await self.database.read(
            lambda tx: tx.one(
                """SELECT id, tenant_id, name, original_name, upload_path, media_type,
                    size_bytes, width_px, height_px, created_ms, expires_ms
                FROM files WHERE id = $1 AND expires_ms > $2""",
                file_id,
                now_ms,
            )
        )
        return _file(row) if row else None

    async def files(
        self, tenant_id: str, *, now_ms: int, offset: int, limit: int
    ) -> tuple[int, Sequence[StoredFile]]:
        """See ``FileStore``; both are read from one snapshot."""
        return await self.database.read(
            lambda tx: _files(tx, (tenant_id, now_ms), offset, limit)
        )

    async def remove_file(self, file_id: str) -> None:
        """See ``FileStore``."""
        await self.database.write(
            lambda tx: tx.run("DELETE FROM files WHERE id = $1", file_id)
        )

    async def expired_files(self, *, now_ms: int, limit: int) -> Sequence[StoredFile]:
        """See ``FileStore``; the longest expired come first."""
        rows = await self.database.read(
            lambda tx: tx.all(
                """SELECT id, tenant_id, name, original_name, upload_path, media_type,
                    size_bytes, width_px, height_px, created_ms, expires_ms
                FROM files WHERE expires_ms <= $1
                ORDER BY expires_ms, id LIMIT $2""",
                now_ms,
                limit,
            )
        )
        return [_file(row) for row in rows]


async def _add_file(
    tx: Transaction, file: StoredFile, at_most: FileUse, now_ms: int
) -> bool:
    # Makes those who add for one tenant wait for each other, on every engine: what
    # the second one counts then includes what the first one added.
    await tx.run(
        "UPDATE tenants SET created_ms = created_ms WHERE id = $1", file.tenant_id
    )
    use = await _use(tx, file.tenant_id, now_ms)
    too_large = use.size_bytes + file.size_bytes > at_most.size_bytes
    if use.files >= at_most.files or too_large:
        return False
    await tx.run(
        """INSERT INTO files
            (id, tenant_id, name, original_name, upload_path, media_type,
            size_bytes, width_px, height_px, created_ms, expires_ms)
        VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11)""",
        file.id,
        file.tenant_id,
        file.name,
        file.original_name,
        file.upload_path,
        file.media_type,
        file.size_bytes,
        file.width_px,
        file.height_px,
        file.created_ms,
        file.expires_ms,
    )
    return True


async def _files(
    tx: Transaction, whose: tuple[str, int], offset: int, limit: int
) -> tuple[int, Sequence[StoredFile]]:
    tenant_id, now_ms = whose
    rows = await tx.all(
        """SELECT id, tenant_id, name, original_name, upload_path, media_type,
            size_bytes, width_px, height_px, created_ms, expires_ms
        FROM files WHERE tenant_id = $1 AND expires_ms > $2
        ORDER BY created_ms DESC, id DESC LIMIT $3 OFFSET $4""",
        tenant_id,
        now_ms,
        limit,
        offset,
    )
    use = await _use(tx, tenant_id, now_ms)
    return use.files, [_file(row) for row in rows]


async def _use(tx: Transaction, tenant_id: str, now_ms: int) -> FileUse:
    # Some engines add BIGINTs up to a number that is no integer any more.
    row = await tx.one(
        """SELECT COUNT(*), CAST(COALESCE(SUM(size_bytes), 0) AS BIGINT)
        FROM files WHERE tenant_id = $1 AND expires_ms > $2""",
        tenant_id,
        now_ms,
    )
    assert row is not None
    return FileUse(*row)


def _file(row: Row) -> StoredFile:
    return StoredFile(*row)
