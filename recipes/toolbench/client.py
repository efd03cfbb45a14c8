"""Talk to StableToolBench's virtual API server: POST /virtual, {error, response} back.

Hides HTTP, retries and pauses. Invariants: an error that an API reports is an answer, returned as
text; a server that cannot be reached, is too slow or talks nonsense raises ToolServerError after
bounded tries, and every later call fails at once with the same error, because TRL turns exceptions
of a tool into messages and would go on asking. A call that always ends in a 5xx counts as a failed
call, but after `tolerated` of them in a row the server itself is taken to be broken.
"""

from __future__ import annotations

import http.client
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from skillvec.recipes.toolbench.apis import Api


class ToolServerError(RuntimeError):
    """The tool server gave no usable answer: unreachable, too slow, refused, or nonsense."""


@dataclass
class ToolServer:
    """A virtual API server at `url`, without /virtual; `timeout` in seconds, for one try.

    `pause` in seconds is doubled from try to try.
    """

    url: str
    key: str = field(default="", repr=False)
    timeout: float = 30.0
    retries: int = 4
    pause: float = 1.0
    tolerated: int = 8
    failure: ToolServerError | None = field(default=None, init=False)
    _broken_in_a_row: int = field(default=0, init=False, repr=False)

    def __post_init__(self) -> None:
        if not self.url.startswith(("http://", "https://")):
            raise ValueError(f"tool server: expected a URL with http://, found {self.url!r}")
        self.url = self.url.rstrip("/").removesuffix("/virtual")

    @classmethod
    def from_environment(cls, **fields: Any) -> ToolServer:
        """Take url and key from TOOLBENCH_URL and TOOLBENCH_KEY (may be empty)."""
        given = {"url": os.environ.get("TOOLBENCH_URL", ""),
                 "key": os.environ.get("TOOLBENCH_KEY", "")} | fields  # fmt: skip
        if not given["url"]:
            raise ValueError(
                "TOOLBENCH_URL is not set: start StableToolBench's server (or, to try things out, "
                "skillvec.recipes.toolbench.server) and set it to something like http://localhost:8080"
            )
        return cls(**given)

    def check(self) -> None:
        """Raise ToolServerError unless something answers HTTP at the URL."""
        try:
            urllib.request.urlopen(self.url, timeout=self.timeout).close()
        except urllib.error.HTTPError:
            return  # an error page is an answer: the server only knows /virtual
        except (OSError, http.client.HTTPException) as error:
            raise self._fail(f"no answer ({error}); is it running?") from None

    def call(self, api: Api, arguments: Mapping[str, Any]) -> tuple[str, str]:
        """Return (error, response) of one call; error is empty where the call succeeded.

        Raises ToolServerError.
        """
        if self.failure is not None:
            raise self.failure
        asked = {"category": api.category, "tool_name": api.tool, "api_name": api.api,
                 "tool_input": dict(arguments), "strip": "truncate",
                 "toolbench_key": self.key}  # fmt: skip
        status, body = self._post(json.dumps(asked).encode())
        if status >= 500:
            self._broken_in_a_row += 1
            what = f"HTTP {status} from {api.name} in {1 + self.retries} tries"
            if self._broken_in_a_row >= self.tolerated:
                raise self._fail(f"{what}, {self._broken_in_a_row} such calls in a row")
            return what, ""
        try:
            answer = json.loads(body)
            error, response = answer["error"], answer["response"]
        except (ValueError, KeyError, TypeError):
            shown = body[:200].decode(errors="replace")
            raise self._fail(f"expected JSON with error and response, found {shown!r}") from None
        self._broken_in_a_row = 0
        return _text(error), _text(response)

    def _post(self, data: bytes) -> tuple[int, bytes]:
        """Return status and body; raises for refusals, and where no try was answered."""
        request = urllib.request.Request(f"{self.url}/virtual", data, method="POST")
        request.add_header("Content-Type", "application/json")
        for attempt in range(1 + self.retries):
            if attempt:
                time.sleep(self.pause * 2 ** (attempt - 1))
            status, why = 0, ""
            try:
                with urllib.request.urlopen(request, timeout=self.timeout) as reply:
                    return reply.status, reply.read()
            except urllib.error.HTTPError as error:
                status, why = error.code, error.read()[:200].decode(errors="replace")
                if status < 500 and status != 429:
                    raise self._fail(f"HTTP {status}, {why!r}; is it StableToolBench's?") from None
            except (OSError, http.client.HTTPException) as error:
                why = str(error) or type(error).__name__
        if status >= 500:
            return status, b""
        why = f"HTTP {status} {why}".strip() if status else why
        tries = f"{1 + self.retries} tries of {self.timeout:g} s"
        raise self._fail(f"no answer in {tries} ({why}); is it running, or too slow?")

    def _fail(self, what: str) -> ToolServerError:
        self.failure = ToolServerError(f"tool server at {self.url}: {what}")
        return self.failure


def _text(value: Any) -> str:
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
