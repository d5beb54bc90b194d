"""Refusals in OpenAI's form: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

KINDS: Mapping[int, str] = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error", 500: "server_error", 503: "server_error"}
"""Status -> OpenAI's `type`; all others are an invalid_request_error."""


class ApiError(Exception):
    """A request that is refused. The message is a sentence for whoever sent it.

    param: the field that is wrong. None: no single field is. code: OpenAI's name for the reason. None: it has none.
    """

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    def body(self) -> dict[str, Any]:
        """What is sent."""
        kind = KINDS.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def context_error(message: str) -> ApiError:
    """The refusal of a prompt that does not fit."""
    return ApiError(400, message, param="prompt", code="context_length_exceeded")
