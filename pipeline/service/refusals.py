"""What a request can be refused for, as HTTP tells it: OpenAI's error envelope, never a stack trace."""

import json
from collections.abc import Mapping
from typing import Any

from starlette.responses import Response

KINDS = {
    401: "authentication_error",
    404: "not_found_error",
    408: "timeout_error",
    429: "overloaded_error",
    500: "server_error",
    503: "overloaded_error",
}
RETRY_AFTER_S = 1
"""A full queue of 256 short queries is encoded in about a second."""


class RefusedError(Exception):
    """A request that gets no answer. ``param``: the field that is wrong; ``code``: for machines."""

    def __init__(self, status: int, code: str, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.param = param

    def __reduce__(self) -> tuple[type["RefusedError"], tuple[int, str, str, str | None]]:
        return RefusedError, (self.status, self.code, str(self), self.param)

    def renamed(self, names: Mapping[str, str]) -> "RefusedError":
        """The same, of a request that has other ``names`` for its fields."""
        name = names.get(self.param or "", self.param)
        return RefusedError(self.status, self.code, str(self).replace(f"{self.param}:", f"{name}:", 1), name)

    def response(self) -> Response:
        """The envelope with its status; 429 and 503 say when to come again."""
        error: dict[str, Any] = {"message": str(self), "type": KINDS.get(self.status, "invalid_request_error")}
        headers = {"Retry-After": str(RETRY_AFTER_S)} if self.status in {429, 503} else {}
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        body = json.dumps(
            {"error": error | {"param": self.param, "code": self.code}}
        )  # escaped: names may hold half a surrogate
        return Response(body, self.status, headers, "application/json")


def wrong(param: str, message: str) -> RefusedError:
    """A value that cannot be answered, 422."""
    return RefusedError(422, "invalid_value", f"{param}: {message}", param)
