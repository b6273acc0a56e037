"""A server that wandb's real client takes for its own, on the loopback interface.

It keeps what it is sent, and can be told to refuse the key, to answer 500, to hang, to refuse rows only, or to die.
"""

from __future__ import annotations

import gzip
import json
import re
import socket
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal

ENTITY = "tester"
Mood = Literal["well", "refuses", "fails", "hangs", "refuses rows"]


@dataclass
class Kept:
    """What the server knows of one run."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    exit_code: int | None = None
    preempting: bool = False
    starts: int = 0

    @property
    def steps(self) -> list[int]:
        """The harness's steps of the rows, in the order they came."""
        return [row["trainer/global_step"] for row in self.rows]


class WandbServer:
    """Serves from its construction to `die`."""

    def __init__(self) -> None:
        self.mood: Mood = "well"
        self.runs: dict[str, Kept] = {}
        self.alerts: list[dict[str, Any]] = []
        self.bodies: list[bytes] = []
        """Of every request, unpacked."""
        self.headers: list[dict[str, str]] = []
        """Of every request, without Authorization."""
        self.paths: list[str] = []
        self._connections: list[socket.socket] = []
        server = self

        class Handler(_Handler):
            kept = server

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        """What WANDB_BASE_URL is to be."""
        return f"http://127.0.0.1:{self._http.server_port}"

    def die(self) -> None:
        """Cut every connection and stop listening, so that new ones are refused."""
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()
        for connection in self._connections:
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue  # the client was faster

    def run(self, run_id: str) -> Kept:
        """Return what is known of a run, nothing at first."""
        return self.runs.setdefault(run_id, Kept())

    def answer(self, body: dict[str, Any]) -> dict[str, Any]:
        """Answer a GraphQL request."""
        variables = body.get("variables") or {}
        match name := _operation(body):
            case "Viewer" | "GetDefaultEntity":
                teams: dict[str, Any] = {"edges": []}
                viewer = {"id": "u", "entity": ENTITY, "username": ENTITY, "email": "t@example.org", "flags": "{}"}
                return {"viewer": {**viewer, "teams": teams}}
            case "UpsertBucket":
                return {"upsertBucket": {"bucket": self._bucket(variables), "inserted": True}}
            case "RunResumeStatus":
                return {"model": self._resume_status(variables["name"])}
            case "ServerFeaturesQuery":
                return {"serverInfo": {"features": []}}
            case "Run" | "RunHistoryKeys":
                return {"project": {"run": self._public(variables["name"])}}
            case "NotifyScriptableRunAlert":
                self.alerts.append(variables)
                return {"notifyScriptableRunAlert": {"success": True}}
        raise LookupError(f"no answer to {name}")

    def _bucket(self, variables: dict[str, Any]) -> dict[str, Any]:
        run_id, project = variables["name"], variables.get("project") or "uncategorized"
        run = self.run(run_id)
        run.starts += 1
        run.config |= json.loads(variables.get("config") or "{}")
        owner = {"id": "e", "name": ENTITY}
        return {
            "id": run_id,
            "name": run_id,
            "displayName": variables.get("displayName") or run_id,
            "description": "",
            "config": json.dumps(run.config),
            "sweepName": None,
            "historyLineCount": len(run.rows),
            "project": {"id": "p", "name": project, "entity": owner},
        }

    def _public(self, run_id: str) -> dict[str, Any] | None:
        """What wandb.Api() hears of a run."""
        run = self.runs.get(run_id)
        if run is None:
            return None
        keys = {"lastStep": max(run.steps, default=-1)}
        return {"id": run_id, "name": run_id, "state": "running", "config": json.dumps(run.config), "historyKeys": keys}

    def _resume_status(self, run_id: str) -> dict[str, Any]:
        found = {"id": "p", "name": "p", "entity": {"id": "e", "name": ENTITY}, "bucket": None}
        run = self.runs.get(run_id)
        if run is None:
            return found
        last = run.rows[-1] if run.rows else {}
        bucket = {
            "name": run_id,
            "historyLineCount": len(run.rows),
            "eventsLineCount": 0,
            "logLineCount": 0,
            "historyTail": json.dumps([json.dumps(last)]),
            "eventsTail": "[]",
            "summaryMetrics": json.dumps(last),
            "config": json.dumps(run.config),
            "wandbConfig": '{"t":1}',  # without a t the client takes the run for a new one
            "tags": [],
            "stopped": False,
        }
        return {**found, "bucket": bucket}

    def stream(self, run_id: str, body: dict[str, Any]) -> None:
        """Take a piece of a run's files."""
        run = self.run(run_id)
        history = (body.get("files") or {}).get("wandb-history.jsonl")
        if history:
            rows = [json.loads(line) for line in history["content"]]
            run.rows[history["offset"] :] = rows
        run.preempting |= bool(body.get("preempting"))
        if body.get("complete"):
            run.exit_code = body.get("exitcode")


def _operation(body: dict[str, Any]) -> str:
    """Return the name of a GraphQL operation; wandb.Api() leaves it to the query's text."""
    found = re.search(r"\bquery (\w+)", body.get("query", ""))
    return body.get("operationName") or (found[1] if found else "")


class _Handler(BaseHTTPRequestHandler):
    kept: WandbServer
    protocol_version = "HTTP/1.1"

    def setup(self) -> None:
        super().setup()
        self.kept._connections.append(self.connection)

    def do_POST(self) -> None:
        body = self._keep()
        if not self._is_well():
            return
        if self.path == "/graphql":
            try:
                self._send(200, {"data": self.kept.answer(json.loads(body))})
            except LookupError as error:
                self._send(200, {"errors": [{"message": str(error)}]})
        elif self.path.endswith("/file_stream") and self.kept.mood == "refuses rows":
            self._send(403, {"error": "may not write"})
        elif self.path.endswith("/file_stream"):
            self.kept.stream(self.path.split("/")[-2], json.loads(body))
            self._send(200, {})
        else:
            self._send(200, {})

    def do_PUT(self) -> None:
        self._keep()
        if self._is_well():
            self._send(200, {})

    def do_GET(self) -> None:
        self._keep()
        if self._is_well():
            self._send(200, {})

    def _keep(self) -> bytes:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body
        self.kept.bodies.append(body)
        self.kept.paths.append(self.path)
        self.kept.headers.append({key: value for key, value in self.headers.items() if key != "Authorization"})
        return body

    def _is_well(self) -> bool:
        while self.kept.mood == "hangs":
            time.sleep(0.05)
        match self.kept.mood:
            case "refuses":
                self._send(401, {"errors": [{"message": "who are you?"}]})
            case "fails":
                self._send(500, {"errors": [{"message": "out of order"}]})
        return self.kept.mood in ("well", "refuses rows")

    def _send(self, status: int, value: dict[str, Any]) -> None:
        content = json.dumps(value).encode()
        try:
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)
        except ConnectionError:
            self.close_connection = True  # the client has given up

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


if __name__ == "__main__":
    print(WandbServer().url, flush=True)
    threading.Event().wait()
