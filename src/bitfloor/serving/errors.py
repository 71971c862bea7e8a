"""What goes wrong with a request, as OpenAI's clients expect to be told."""

from __future__ import annotations

from typing import Any

MOST_LETTERS = 1000  # of a message, which may quote what was sent
INVALID, SERVER = "invalid_request_error", "server_error"


class ApiError(Exception):
    """An answer that is an error object.

    Args:
        status: of HTTP.
        message: a sentence.
        param: the field of the request that is wrong, if it is one.
        code: what programs can tell it by.
    """

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code

    def body(self) -> dict[str, Any]:
        """The JSON document."""
        kind = {401: "authentication_error", 429: "rate_limit_error"}.get(self.status)
        kind = kind or (SERVER if self.status >= 500 else INVALID)
        return {"error": {"message": str(self)[:MOST_LETTERS], "type": kind, "param": self.param, "code": self.code}}


def wrong(param: str | None, message: str, code: str | None = None) -> ApiError:
    """A request that cannot be answered as it stands (400)."""
    return ApiError(400, message, param=param, code=code)
