"""A W&B server on this machine that knows just enough of runs, artifacts and workspaces, and keeps what it hears."""

import json
import re
import threading
from collections import defaultdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class FakeWandb(ThreadingHTTPServer):
    """The requests that W&B's own client sends, by kind.

    Attributes:
        operations: `(name, variables)` of each GraphQL operation.
        files: Lines of each streamed file of each run, such as `wandb-history.jsonl`.
        views: The saved workspaces, by their name.
    """

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.operations, self.views, self.refuse, self.projects = [], {}, False, {"rlhf-recipes"}
        self.files = defaultdict(lambda: defaultdict(list))
        self.artifacts = {}

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"

    @property
    def settings(self):
        """Environment of a client that has a key."""
        return {"WANDB_BASE_URL": self.url, "WANDB_API_KEY": "0" * 40}

    def __enter__(self):
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *details):
        self.shutdown()
        self.server_close()

    def handle_error(self, request, client_address):
        """A client that hangs up is nothing to report."""

    def sent(self, name):
        """Variables of all operations of one name."""
        return [variables for operation, variables in self.operations if operation == name]

    def answer(self, name, variables):
        """The answer to a GraphQL operation, with the fields that the client reads."""
        answers = {
            "Viewer": lambda: {"viewer": {"id": "U", "entity": "me", "username": "me", "teams": {"edges": []}}},
            "UpsertBucket": lambda: self._run(variables),
            "CreateRunFiles": lambda: self._files(variables),
            "CreateArtifact": lambda: self._make_artifact(variables["input"]),
            "ArtifactMembershipByName": lambda: self._artifact(variables),
            "UseArtifact": lambda: {"useArtifact": {"artifact": {"id": variables["artifactID"]}}},
            "View": lambda: self._views(variables),
            "UpsertView2": lambda: self._save_view(variables),
        }
        return answers[name]() if name in answers else {"serverInfo": {"features": []}, "project": None, "model": None}

    def _run(self, variables):
        project = {"id": "P", "name": variables["project"], "entity": {"id": "E", "name": "me"}}
        bucket = {"id": "R", "name": variables["name"], "displayName": variables["displayName"], "project": project}
        return {"upsertBucket": {"bucket": bucket | {"config": "{}", "historyLineCount": 0}, "inserted": True}}

    def _files(self, variables):
        files = [{"name": name, "uploadUrl": f"{self.url}/upload/{name}"} for name in variables["files"]]
        return {"createRunFiles": {"runID": "R", "uploadHeaders": [], "files": files}}

    def _make_artifact(self, given):
        collection, kind = given["artifactCollectionName"], given["artifactTypeName"]
        number = len(self.artifacts)
        for alias in given["aliases"]:
            self.artifacts[f"{collection}:{alias['alias']}"] = (f"A{number}", collection, kind)
        known = {"id": f"A{number}", "state": "COMMITTED", "artifactSequence": {"id": "S", "latestArtifact": None}}
        return {"createArtifact": {"artifact": known}}  # committed: there is nothing to upload

    def _artifact(self, variables):
        if variables["name"] not in self.artifacts:
            return {"project": {"artifactCollectionMembership": None}}
        number, name, kind = self.artifacts[variables["name"]]
        project = {"id": "P", "internalId": "P", "name": variables["project"], "entity": {"name": "me"}}
        same = {"id": number, "versionIndex": 0, "createdAt": "2026-01-01T00:00:00Z", "aliases": []}
        empty = dict.fromkeys(("description", "metadata", "historyStep", "commitHash", "updatedAt"))
        numbers = {"ttlDurationSeconds": -1, "ttlIsInherited": False, "size": 1, "fileCount": 1}
        about = {"artifactType": {"name": kind}, "state": "COMMITTED", "digest": "x", "tags": []}
        sequence = {"__typename": "ArtifactSequence", "name": name, "project": project}
        artifact = {"__typename": "Artifact", "artifactSequence": sequence, **same, **empty, **numbers, **about}
        found = {"__typename": "ArtifactCollectionMembership", "artifactCollection": sequence, "artifact": artifact}
        return {"project": {"artifactCollectionMembership": same | found}}

    def _views(self, variables):
        if variables["name"] not in self.projects:
            return {"project": None}
        view = self.views.get(variables["viewName"])
        edges = [] if view is None else [{"node": {key: view[key] for key in ("id", "displayName", "spec")}}]
        return {"project": {"allViews": {"edges": edges}}}

    def _save_view(self, variables):
        found = [name for name, view in self.views.items() if view["id"] == variables.get("id")]
        name = found[0] if found else variables["name"]
        self.views[name] = {**variables, "id": variables.get("id") or f"V{len(self.views)}"}
        return {"upsertView": {"view": {"id": self.views[name]["id"], "name": name}, "inserted": not found}}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        if self.server.refuse:
            return self._reply({"errors": [{"message": "not logged in"}]}, 401)
        if self.path == "/graphql":
            query = json.loads(body)
            name = re.search(r"(?:query|mutation) (\w+)", query["query"])[1]
            self.server.operations.append((name, query.get("variables") or {}))
            return self._reply({"data": self.server.answer(name, query.get("variables") or {})})
        if self.path.endswith("/file_stream"):
            for file, chunk in (json.loads(body).get("files") or {}).items():
                if file != "output.log":
                    self.server.files[self.path.split("/")[-2]][file] += map(json.loads, chunk["content"])
        return self._reply({})

    def do_PUT(self):
        self.rfile.read(int(self.headers.get("content-length", 0)))
        self._reply({})

    def do_GET(self):
        self._reply({}, 404)

    def _reply(self, answer, status=200):
        content = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *arguments):
        pass
