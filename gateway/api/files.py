"""``/api/v1/files/...``: upload pictures and manage them, in EvoLink's shapes."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime

import msgspec
from litestar import Response, delete, get, post
from litestar.handlers import HTTPRouteHandler
from litestar.params import FromPath

from gateway.api.base64_uploads import read_base64_upload
from gateway.api.door import key_of
from gateway.api.forms import Form, FormLimits, boundary_of, read_form
from gateway.api.http import AnyRequest, read_json, whole_number
from gateway.api.links import Links
from gateway.core.errors import InvalidRequestError, insufficient_credits, storage_full
from gateway.core.images import IMAGE_MAX_BYTES
from gateway.core.key_limits import KeyScope
from gateway.flows.credits import ManageTenants
from gateway.flows.files import FetchFile, Files, Naming, upload_spool
from gateway.flows.keys import Authenticate
from gateway.ports import Spools, StoredFile

URL_MAX_CHARS = 2_048
PAGE_SIZE = 20
PAGE_SIZE_MAX = 100
PAGE_MAX = 1_000_000
FORM_LIMITS = FormLimits(files=1, file_max_bytes=IMAGE_MAX_BYTES)


@dataclass(frozen=True, slots=True)
class FileApi:
    """What the routes share."""

    authenticate: Authenticate
    files: Files
    fetch: FetchFile
    spools: Spools
    links: Links
    tenants: ManageTenants
    storage_trouble: Callable[[], Awaitable[str | None]]

    async def tenant_of(self, request: AnyRequest) -> str:
        """Tell whose key the request carries."""
        key = await key_of(self.authenticate, request.scope, KeyScope.IMAGES)
        return key.tenant_id

    async def uploader_of(self, request: AnyRequest) -> str:
        """Tell whose key it is, if there is room for a file more.

        Asked before a body is read: somebody without credits stores nothing here, and
        the books keep their reserve on the disk.
        """
        tenant_id = await self.tenant_of(request)
        if await self.storage_trouble() is not None:
            raise storage_full()
        balance = await self.tenants.balance(tenant_id)
        if balance.available <= 0:
            raise insufficient_credits(1, balance.available)
        await self.files.check_room(tenant_id)
        return tenant_id

    def uploaded(self, request: AnyRequest, file: StoredFile) -> Response[bytes]:
        """Answer an upload."""
        links = self.links.to_files(request.scope)(file)
        return _answer(
            "File uploaded successfully",
            {
                "file_id": file.id,
                "file_name": file.name,
                "original_name": file.original_name,
                "file_size": file.size_bytes,
                "mime_type": file.media_type,
                "upload_path": file.upload_path,
                "file_url": links.file_url,
                "download_url": links.download_url,
                "upload_time": _moment(file.created_ms),
                "expires_at": _moment(file.expires_ms),
            },
        )


def file_routes(api: FileApi) -> list[HTTPRouteHandler]:
    """Route the file API."""
    return [*_upload_routes(api), *_keeping_routes(api)]


def _upload_routes(api: FileApi) -> list[HTTPRouteHandler]:
    @post("/api/v1/files/upload/base64", status_code=200)
    async def upload_base64(request: AnyRequest) -> Response[bytes]:
        """Keep a picture that comes as base64, or as a data URL, in JSON."""
        tenant_id = await api.uploader_of(request)
        with closing(upload_spool(api.spools)) as spool:
            fields = await read_base64_upload(request.receive, spool)
            naming = _naming(fields)
            file = await api.files.keep(tenant_id, spool, naming, param="base64_data")
        return api.uploaded(request, file)

    @post("/api/v1/files/upload/stream", status_code=200)
    async def upload_stream(request: AnyRequest) -> Response[bytes]:
        """Keep a picture that comes as the ``file`` of a multipart form."""
        tenant_id = await api.uploader_of(request)
        with closing(await _read_upload_form(api, request)) as form:
            part = next((part for part in form.files if part.name == "file"), None)
            if part is None:
                raise InvalidRequestError(
                    "The form has no file in the field 'file'.", param="file"
                )
            texts = form.texts
            naming = Naming(
                original_name=part.filename,
                file_name=texts.get("file_name") or texts.get("fileName"),
                upload_path=texts.get("upload_path") or texts.get("uploadPath"),
            )
            file = await api.files.keep(tenant_id, part.spool, naming, param="file")
        return api.uploaded(request, file)

    @post("/api/v1/files/upload/url", status_code=200)
    async def upload_url(request: AnyRequest) -> Response[bytes]:
        """Keep a picture that is fetched from a public URL."""
        tenant_id = await api.uploader_of(request)
        body = await read_json(request.receive)
        if not isinstance(body, dict):
            raise InvalidRequestError(
                "The body must be a JSON object.", code="invalid_body"
            )
        url = _text(body, "file_url")
        if not url or len(url) > URL_MAX_CHARS:
            raise InvalidRequestError(
                f"file_url must be a URL of at most {URL_MAX_CHARS:,} characters.",
                param="file_url",
            )
        file = await api.fetch(tenant_id, url, _naming(body))
        return api.uploaded(request, file)

    return [upload_base64, upload_stream, upload_url]


def _keeping_routes(api: FileApi) -> list[HTTPRouteHandler]:
    @get("/api/v1/files/list")
    async def list_files(request: AnyRequest) -> Response[bytes]:
        """List the tenant's files, newest first."""
        tenant_id = await api.tenant_of(request)
        query = request.query_params
        page = whole_number(query.get("page"), "page", default=1, at_most=PAGE_MAX)
        page_size = whole_number(
            query.get("pageSize"), "pageSize", default=PAGE_SIZE, at_most=PAGE_SIZE_MAX
        )
        total, files = await api.files.listed(tenant_id, page=page, page_size=page_size)
        listed = [
            {
                "file_id": file.id,
                "file_name": file.name,
                "file_size": file.size_bytes,
                "upload_time": _moment(file.created_ms),
            }
            for file in files
        ]
        return _answer("Success", {"total": total, "files": listed})

    @get("/api/v1/files/quota")
    async def show_quota(request: AnyRequest) -> Response[bytes]:
        """Tell how many files and bytes the tenant has, and may have."""
        quota = await api.files.quota(await api.tenant_of(request))
        used, at_most = quota.used, quota.at_most
        data = {
            "user_group": "default",
            "used_files": used.files,
            "max_files": at_most.files,
            "remain_files": max(at_most.files - used.files, 0),
            "used_bytes": used.size_bytes,
            "max_bytes": at_most.size_bytes,
            "remain_bytes": max(at_most.size_bytes - used.size_bytes, 0),
            "is_custom": False,
            "quota_reason": "default",
        }
        return _answer("Success", data)

    @delete("/api/v1/files/{file_id:str}", status_code=200)
    async def delete_file(
        request: AnyRequest, file_id: FromPath[str]
    ) -> Response[bytes]:
        """Delete a file."""
        await api.files.delete(await api.tenant_of(request), file_id)
        return _answer("File deleted successfully")

    return [list_files, show_quota, delete_file]


async def _read_upload_form(api: FileApi, request: AnyRequest) -> Form:
    boundary = boundary_of(request.headers.get("content-type"))
    if boundary is None:
        raise InvalidRequestError(
            "Send the file as multipart/form-data, in the field 'file'.",
            code="invalid_content_type",
        )
    return await read_form(request.receive, boundary, api.spools, FORM_LIMITS)


def _naming(fields: Mapping[str, object]) -> Naming:
    return Naming(
        file_name=_text(fields, "file_name"), upload_path=_text(fields, "upload_path")
    )


def _text(fields: Mapping[str, object], name: str) -> str | None:
    value = fields.get(name)
    if value is not None and not isinstance(value, str):
        raise InvalidRequestError(f"{name} must be a text.", param=name)
    return value


def _answer(msg: str, data: dict[str, object] | None = None) -> Response[bytes]:
    body: dict[str, object] = {"success": True, "code": 200, "msg": msg}
    if data is not None:
        body["data"] = data
    return Response(msgspec.json.encode(body), media_type="application/json")


def _moment(at_ms: int) -> str:
    return f"{datetime.fromtimestamp(at_ms // 1000, UTC):%Y-%m-%dT%H:%M:%SZ}"
