"""A small virtual API server that answers offline, by StableToolBench's protocol.

    python -m skillvec.recipes.toolbench.server --instructions FILE [--cache FOLDER] [--port 8080]

For trying things out, and for tests. It knows the APIs of instruction files and answers a call from
StableToolBench's cache of responses (CATEGORY/TOOL_for_CATEGORY/API.json) if the very same call is
there, else with the document's `template_response`, which tells types and no facts: figures
measured against templates mean nothing. An API that it does not know is an error in the reply.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

from skillvec.recipes.local_server import JsonRequest, serve
from skillvec.recipes.toolbench.apis import Api, Item, read_apis, read_items, standard_name


class OfflineServer(ThreadingHTTPServer):
    """Serve the APIs of `items` on localhost; port 0 takes a free one."""

    daemon_threads = True

    def __init__(self, items: Sequence[Item], cache: Path | None = None, port: int = 0) -> None:
        self.apis = {
            (api.category, standard_name(api.tool), standard_name(api.api)): api
            for item in items
            for api in read_apis(item.documents).values()
        }
        self.cache = cache
        super().__init__(("127.0.0.1", port), _Request)

    @property
    def url(self) -> str:
        """Return what TOOLBENCH_URL is set to."""
        return f"http://127.0.0.1:{self.server_address[1]}"

    def respond(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        """Return {error, response} for one call; KeyError where a field is missing."""
        names = asked["tool_name"], asked["api_name"]
        api = self.apis.get((asked["category"], *map(standard_name, names)))
        given = asked["tool_input"]
        if isinstance(given, str):
            try:
                given = json.loads(given or "{}")
            except ValueError:
                return {"error": "tool_input is no JSON", "response": ""}
        if api is None:
            return {"error": f"no API {names[1]!r} in tool {names[0]!r}", "response": ""}
        kept = self._cached(api).get(str(given))
        if kept is not None:
            return dict(kept)
        missing = [p.name for p in api.parameters if p.required and p.name not in given]
        if missing:
            return {"error": f"missing: {', '.join(missing)}", "response": ""}
        return {"error": "", "response": json.dumps(api.response)}

    def _cached(self, api: Api) -> dict[str, Any]:
        tool, name = standard_name(api.tool), standard_name(api.api)
        path = (self.cache or Path()) / api.category / f"{tool}_for_{api.category}" / f"{name}.json"
        kept = json.loads(path.read_text()) if self.cache and path.is_file() else {}
        return dict(kept)


class _Request(JsonRequest):
    server: OfflineServer

    def do_POST(self) -> None:  # noqa: N802
        if self.path != "/virtual":
            self.send_error(404)
            return
        try:
            answer = self.server.respond(self.read_json())
        except (KeyError, TypeError, ValueError) as error:
            self.send_error(422, f"expected the fields of a call: {error!r}")
            return
        self.send_json(answer)


def main(arguments: Sequence[str] | None = None) -> int:
    """Answer calls until interrupted."""
    parser = argparse.ArgumentParser("skillvec.recipes.toolbench.server", description=main.__doc__)
    parser.add_argument("--instructions", nargs="+", required=True, metavar="FILE")
    parser.add_argument("--cache", type=Path, help="StableToolBench's tool_response_cache.")
    parser.add_argument("--port", type=int, default=8080)
    given = parser.parse_args(arguments)
    try:
        if given.cache and not given.cache.is_dir():
            raise ValueError(f"{given.cache}: no such folder")
        server = OfflineServer(read_items(given.instructions), given.cache, given.port)
    except (ValueError, OSError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    serve(server, f"{len(server.apis)} APIs at {server.url}; TOOLBENCH_URL={server.url}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
