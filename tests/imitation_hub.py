"""An imitation of the Hugging Face hub on localhost, as huggingface_hub speaks with it: made, written to, read from.

Files that the real hub keeps in LFS go the same way here (LFS batch, PUT, commit); Xet is switched off.
"""

import base64
import hashlib
import http.server
import json
import threading
import urllib.parse

import huggingface_hub.constants

from rag import hub as rag_hub

TOKEN = "hf_aToKeNoFaLiCe"
READ_TOKEN = "hf_mayreadonly"
IN_LFS = (".safetensors", ".arrow", ".faiss", ".npy")


class Repository:
    """Files by their path, as the last commit left them."""

    def __init__(self):
        self.files: dict[str, bytes] = {}
        self.commits: list[list[str]] = []  # the paths that each changed

    @property
    def head(self) -> str:
        return hashlib.sha1(f"{len(self.commits)}".encode()).hexdigest()


def blob_id(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class ImitationHub:
    """What was sent to it and asked of it.

    Attributes:
        repositories: by "models/owner/name" or "datasets/owner/name".
        objects: contents in LFS, by their sha256.
        asked: "GET /path" and so on, in order.
        uploads_left: large files that are still taken before an upload breaks; None takes all.
    """

    def __init__(self):
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.asked: list[str] = []
        self.uploads_left: int | None = None
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def uploads(self) -> int:
        return sum(line.startswith("PUT ") for line in self.asked)

    def _handler(hub) -> type:
        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def answer(self, content, status: int = 200, **headers: str) -> None:
                body = content if isinstance(content, bytes) else json.dumps(content).encode()
                self.send_response(status)
                for name, value in ({"Content-Length": str(len(body))} | headers).items():
                    self.send_header(name.replace("_", "-"), value)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(body)

            def handle_all(self) -> None:
                path = urllib.parse.unquote(self.path.partition("?")[0])
                hub.asked.append(f"{self.command} {path}")
                body = self.read_body()
                token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
                hub.answer(self, path, body, token)

            do_GET = do_HEAD = do_POST = do_PUT = handle_all

            def read_body(self) -> bytes:
                if self.headers.get("Transfer-Encoding") == "chunked":
                    chunks = []
                    while size := int(self.rfile.readline(), 16):
                        chunks.append(self.rfile.read(size))
                        self.rfile.readline()
                    self.rfile.readline()
                    return b"".join(chunks)
                return self.rfile.read(int(self.headers.get("Content-Length") or 0))

            def log_message(self, *args) -> None:
                pass

        return Handler

    def answer(self, request, path: str, body: bytes, token: str) -> None:
        if path.startswith("/objects/"):
            self.take_object(request, path.rpartition("/")[2], body)
        elif request.command in ("GET", "HEAD") and path != "/api/whoami-v2":
            self.read(request, path)
        elif token not in (TOKEN, READ_TOKEN):
            request.answer({"error": "Invalid credentials"}, 401)
        elif path == "/api/whoami-v2":
            role = "write" if token == TOKEN else "read"
            access = {"type": "access_token", "accessToken": {"displayName": "x", "role": role}}
            request.answer({"type": "user", "name": "alice", "orgs": [{"name": "lab"}], "auth": access})
        else:
            self.write(request, path, body)

    def take_object(self, request, oid: str, body: bytes) -> None:
        if self.uploads_left == 0:
            request.answer(b"the link has expired", 403)
            return
        assert hashlib.sha256(body).hexdigest() == oid
        self.uploads_left = None if self.uploads_left is None else self.uploads_left - 1
        self.objects[oid] = body
        request.answer({})

    def write(self, request, path: str, body: bytes) -> None:
        if path == "/api/repos/create":
            self.create(request, json.loads(body))
        elif path == "/api/validate-yaml":
            request.answer({"errors": [], "warnings": []})
        elif path.endswith(".git/info/lfs/objects/batch"):
            wanted = json.loads(body)["objects"]
            request.answer({"transfer": "basic", "objects": [self.lfs_object(one) for one in wanted]})
        else:
            name, what = self.parts_of(path)
            repository = self.repositories[name]
            if what.startswith("preupload/"):
                wanted = json.loads(body)["files"]
                request.answer({"files": [self.upload_mode(repository, one["path"]) for one in wanted]})
            elif what.startswith("commit/"):
                self.commit(repository, [json.loads(line) for line in body.splitlines()])
                done = {"success": True, "commitOid": repository.head, "hookOutput": ""}
                request.answer(done | {"commitUrl": f"{self.endpoint}/{name}/commit/{repository.head}"})

    def create(self, request, wanted: dict) -> None:
        kind, owner = f"{wanted.get('type') or 'model'}s", wanted.get("organization") or "alice"
        name = f"{kind}/{owner}/{wanted['name']}"
        address = f"{self.endpoint}/{name.removeprefix('models/')}"
        status = 409 if name in self.repositories else 200
        self.repositories.setdefault(name, Repository())
        request.answer({"url": address, "name": f"{owner}/{wanted['name']}", "id": "1"}, status)

    def lfs_object(self, wanted: dict) -> dict:
        if wanted["oid"] in self.objects:
            return wanted
        return wanted | {"actions": {"upload": {"href": f"{self.endpoint}/objects/{wanted['oid']}"}}}

    def upload_mode(self, repository: Repository, path: str) -> dict:
        mode = "lfs" if path.endswith(IN_LFS) else "regular"
        content = repository.files.get(path)
        oid = None if content is None else hashlib.sha256(content).hexdigest() if mode == "lfs" else blob_id(content)
        return {"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid}

    def commit(self, repository: Repository, lines: list[dict]) -> None:
        changed = {}
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                changed[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                changed[value["path"]] = self.objects[value["oid"]]
        repository.files |= changed
        repository.commits.append(sorted(changed))

    def parts_of(self, path: str) -> tuple[str, str]:
        """The repository that a path of the API is about, and what is asked of it."""
        kind, owner, name, *rest = path.removeprefix("/api/").split("/")
        return f"{kind}/{owner}/{name}", "/".join(rest)

    def read(self, request, path: str) -> None:
        if path.startswith("/api/"):
            name, what = self.parts_of(path)
        else:
            where, _, rest = path.removeprefix("/").partition("/resolve/")
            name = where if where.startswith("datasets/") else f"models/{where}"
            what = f"resolve/{rest}"
        if name not in self.repositories:
            request.answer({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")
            return
        repository = self.repositories[name]
        files, head = repository.files, {"X_Repo_Commit": repository.head}
        if what.startswith("tree/"):
            tree = [self.described(path, content) for path, content in files.items()]
            request.answer(tree, Content_Type="application/json", **head)
        elif what.startswith("resolve/"):
            file = what.split("/", 2)[2]
            if file in files:
                request.answer(files[file], ETag=f'"{blob_id(files[file])}"', **head)
            else:
                request.answer(b"", 404, X_Error_Code="EntryNotFound", **head)
        else:
            siblings = [{"rfilename": path} for path in files]
            request.answer({"id": name.partition("/")[2], "sha": repository.head, "siblings": siblings})

    @staticmethod
    def described(path: str, content: bytes) -> dict:
        return {"type": "file", "path": path, "size": len(content), "oid": blob_id(content)}


def use_hub(monkeypatch, endpoint: str, cache, token: str | None = TOKEN) -> None:
    """Let this process speak with that hub, with an empty cache of its own."""
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(cache / "no token"))
    if token is None:
        monkeypatch.delenv("HF_TOKEN", raising=False)
    else:
        monkeypatch.setenv("HF_TOKEN", token)
    rag_hub.hub_is_reachable.cache_clear()
