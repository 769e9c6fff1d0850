"""Every adapter there is, by the ``kind`` that a config names. One line each."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from providers import openai, sandbox
from providers.kit.contract import Account, Provider
from providers.kit.wire import Tools

PROVIDERS: Mapping[str, Callable[[Account, Tools], Provider]] = {
    "openai": openai.connect,
    "sandbox": sandbox.connect,
}
