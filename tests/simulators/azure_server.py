"""A pretend Azure OpenAI resource on loopback, strict in Azure's own ways.

Its pictures, tokens and field rules are those of the simulated OpenAI; names,
credentials, versions and refusals are Azure's. A deployment is named in the path
(``/openai/deployments/NAME/images/...?api-version=...``) and nowhere else, or in the
body (``/openai/v1/images/...``).

By hand: ``python -m tests.simulators.azure_server --port 9002``; ``POST /_set`` takes
JSON with any of ``lenient``, ``blocked`` and ``tokens``.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import re
from dataclasses import dataclass, field
from typing import Any

from tests.simulators.openai_server import (
    EDIT_FIELDS,
    FIELDS,
    OpenAISimulator,
    check_files,
    check_names,
    check_prompt,
    check_values,
    error,
    fields_of,
    listing,
)
from tests.simulators.server import (
    Part,
    Reply,
    Seen,
    run_by_hand,
    scripted,
    send,
)

KEY = "0123456789abcdef0123456789azure0"
TOKEN = "eyJ0eXAiOiJKV1QifQ.c2ltdWxhdGVk.c2lnbmF0dXJl"
DEPLOYMENTS = {
    "gpt-image-2": "gpt-image-2",
    "prod-pictures": "gpt-image-2",
    "sharp pictures/eu": "gpt-image-2.5-flare",
}
"""The model behind each."""

PATH = re.compile(
    r"/openai/(?:v1|deployments/(?P<deployment>[^/]+))"
    r"/images/(?P<what>generations|edits)"
)
LIST = re.compile(r"/openai/(?:v1/)?models")
DATED = re.compile(r"\d{4}-\d{2}-\d{2}(?:-preview)?")


@dataclass(frozen=True)
class Call:
    """A request with its path taken apart; ``deployment`` is None in the v1 form."""

    seen: Seen
    what: str
    deployment: str | None

    @property
    def path(self) -> str:
        """The path that it would have at OpenAI."""
        return f"/v1/images/{self.what}"


@dataclass
class AzureSimulator(OpenAISimulator):
    """A running simulator, as tests see it.

    ``lenient`` forgives a model in the body that the path has named already, which the
    official client leaves there. ``blocked`` is a resource that was locked for abuse.
    ``tokens`` are the Entra tokens that hold.
    """

    key: str = KEY
    lenient: bool = False
    blocked: bool = False
    tokens: set[str] = field(default_factory=lambda: {TOKEN})

    prefix = ""

    def sells_at(self, path: str) -> bool:
        return PATH.fullmatch(path) is not None

    async def answer(self, seen: Seen, writer: asyncio.StreamWriter) -> bool:
        if seen.method == "GET" and LIST.fullmatch(seen.route):
            self.requests.append(seen)
            dated = None if "/v1/" in seen.route else "any"
            wrong = self.check_credential(seen) or check_version(
                Call(seen, "models", dated)
            )
            return await self.tell(wrong, listing(DEPLOYMENTS.values()), writer)
        if seen.method == "GET":
            return await super().answer(seen, writer)
        self.requests.append(seen)
        call = call_of(seen)
        if call is None or seen.method != "POST":
            return await send(writer, refused(404, "404", "Resource not found"))
        fault = self.fault()
        asked = self.checked(call)
        if isinstance(asked, Reply):
            return await send(writer, asked)
        if fault.status is not None:
            await asyncio.sleep(fault.delay_s)
            return await send(writer, scripted(fault))
        return await self.sell(asked, fault, writer)

    def checked(self, call: Call) -> Seen | Reply:
        """Say what is wrong with a call, or what it would be at OpenAI."""
        wrong = self.check_credential(call.seen) or check_version(call)
        if wrong is None and self.blocked:
            wrong = BLOCKED
        if wrong is not None:
            return wrong
        try:
            body = fields_of(dataclasses.replace(call.seen, path=call.path))
        except ValueError:
            return error(400, "We could not parse the JSON body of your request.")
        model = self.model_of(call, body)
        if model is None:
            return DEPLOYMENT_NOT_FOUND
        return check_fields(translated(call, body, model))

    def check_credential(self, seen: Seen) -> Reply | None:
        key = seen.headers.get("api-key")
        bearer = seen.headers.get("authorization")
        if key is not None and bearer is not None:
            return refused(401, "401", f"Two credentials at once: {key}, {bearer}.")
        if bearer is not None:
            # A key as bearer is no token.
            good = bearer.removeprefix("Bearer ") in self.tokens
            return None if good and bearer.startswith("Bearer ") else NO_TOKEN
        return None if key == self.key else NO_KEY

    def model_of(self, call: Call, body: dict[str, Any]) -> str | None:
        """Find the model behind the deployment that is named where it should be."""
        if call.deployment is None:
            return DEPLOYMENTS.get(body.get("model", ""))
        if "model" in body and not self.lenient:
            return None
        return DEPLOYMENTS.get(call.deployment)

    def steer(self, seen: Seen) -> Reply:
        if seen.path == "/_set" and seen.method == "POST":
            told = seen.json()
            self.lenient = told.get("lenient", self.lenient)
            self.blocked = told.get("blocked", self.blocked)
            self.tokens = set(told.get("tokens", self.tokens))
            return Reply.of_json(200, {})
        return super().steer(seen)


# --- what was asked ---


def call_of(seen: Seen) -> Call | None:
    found = PATH.fullmatch(seen.route)
    if found is None:
        return None
    name = found["deployment"]
    return Call(seen, found["what"], None if name is None else unquoted(name))


def unquoted(text: str) -> str:
    raw = re.sub(rb"%([0-9A-Fa-f]{2})", lambda m: bytes([int(m[1], 16)]), text.encode())
    return raw.decode()


def translated(call: Call, body: dict[str, Any], model: str) -> Seen:
    """Write a call as the simulated OpenAI knows it."""
    if call.what == "generations":
        content = json.dumps(body | {"model": model}).encode()
        return dataclasses.replace(call.seen, path=call.path, body=content)
    parts = [part for part in call.seen.form if part.name != "model"]
    parts.append(Part("model", None, None, head=model.encode()))
    return dataclasses.replace(call.seen, path=call.path, form=tuple(parts))


# --- what is wrong with it ---


def check_version(call: Call) -> Reply | None:
    version = call.seen.query.get("api-version")
    if call.deployment is None:
        bad = version not in {None, "preview", "v1"}
        return refused(400, "BadRequest", "API version not supported") if bad else None
    if version is None or not DATED.fullmatch(version):
        return refused(404, "404", "Resource not found")
    return None


def check_fields(seen: Seen) -> Seen | Reply:
    body = fields_of(seen)
    edit = bool(seen.form)
    wrong = (
        check_names(body, EDIT_FIELDS if edit else FIELDS)
        or check_values(body)
        or check_format(body)
        or (check_files(seen) if edit else None)
        or check_policy(body)
        or check_prompt(body)
    )
    return wrong or seen


def check_format(body: dict[str, Any]) -> Reply | None:
    if body.get("output_format") != "webp":
        return None
    return error(
        400,
        "Invalid value: 'webp'. Supported values are: 'png' and 'jpeg'.",
        code="invalid_value",
        param="output_format",
    )


def check_policy(body: dict[str, Any]) -> Reply | None:
    prompt = str(body.get("prompt"))
    if "[moderate]" in prompt:
        return filtered("Your task failed as a result of our safety system.")
    if "[moderate-output]" in prompt:
        return filtered(
            "Generated image was filtered as a result of our safety system."
        )
    return None


# --- answers ---


def refused(status: int, code: str, message: str, **more: Any) -> Reply:
    body = {"error": {"code": code, "message": message, **more}}
    headers = {"apim-request-id": "apim-simulated", "x-ms-region": "Nowhere"}
    return Reply.of_json(status, body, headers)


def filtered(message: str) -> Reply:
    severities = {"hate": (False, "safe"), "violence": (True, "high")}
    inner = {
        "code": "ResponsibleAIPolicyViolation",
        "content_filter_results": {
            name: {"filtered": is_filtered, "severity": severity}
            for name, (is_filtered, severity) in severities.items()
        },
    }
    return refused(
        400, "contentFilter", message, type=None, param="prompt", inner_error=inner
    )


NO_KEY = refused(
    401,
    "401",
    "Access denied due to invalid subscription key or wrong API endpoint. Make sure to "
    "provide a valid key for an active subscription and use a correct regional API "
    "endpoint for your resource.",
)
NO_TOKEN = refused(
    401,
    "401",
    "Unauthorized. Access token is missing, invalid, audience is incorrect "
    "(https://cognitiveservices.azure.com), or have expired.",
)
BLOCKED = refused(
    403,
    "Forbidden",
    "Your resource has been temporarily blocked because we detected behavior that may "
    "violate our content policy.",
)
DEPLOYMENT_NOT_FOUND = refused(
    404,
    "DeploymentNotFound",
    "The API deployment for this resource does not exist. If you created the "
    "deployment within the last 5 minutes, please wait a moment and try again.",
)


if __name__ == "__main__":
    run_by_hand(AzureSimulator, KEY)
