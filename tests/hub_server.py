"""Serve a Hub on the loopback interface: the part of the HTTP API that huggingface_hub uses, with faults on demand.

It keeps models and data sets with their commits, branches and pull requests in memory. Standard library only, so that a test
may start it before anything else is imported.

    server = HubServer().start()
    server.add_repo("ann/model", {"config.json": b"{}"})
    server.fail("lfs-upload", after=1000)            # resets the connection in the middle of the weights, once
    subprocess.run(..., env=server.environment(home))  # or, in this process: server.patch(monkeypatch, home)
"""

import base64
import hashlib
import json
import os
import re
import socket
import struct
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

_sleep = time.sleep  # tests replace that of the module, so that attempts follow each other at once
TOKEN = "hf_tokenOfAnnForTestsOnly"  # may write under ann/
READ_TOKEN = "hf_tokenOfAnnThatReadsOnly"
DATE = "2026-01-02T03:04:05.000Z"
LFS = (".safetensors", ".parquet", ".bin", ".model", ".gz", ".onnx")

# What a request is for, by which faults are placed; the first that fits counts.
PHASES = (
    ("create", "POST", r"/api/repos/create"),
    ("delete", "DELETE", r"/api/repos/delete"),
    ("whoami", "GET", r"/api/whoami-v2"),
    ("validate", "POST", r"/api/validate-yaml"),
    ("preupload", "POST", r"/api/(?P<kind>models|datasets)/(?P<id>[^/]+/[^/]+)/preupload/(?P<revision>[^/]+)"),
    ("commit", "POST", r"/api/(?P<kind>models|datasets)/(?P<id>[^/]+/[^/]+)/commit/(?P<revision>[^/]+)"),
    ("branch", "POST", r"/api/(?P<kind>models|datasets)/(?P<id>[^/]+/[^/]+)/branch/(?P<revision>[^/]+)"),
    ("paths", "POST", r"/api/(?P<kind>models|datasets)/(?P<id>[^/]+/[^/]+)/paths-info/(?P<revision>[^/]+)"),
    ("refs", "GET", r"/api/(?P<kind>models|datasets)/(?P<id>[^/]+/[^/]+)/refs"),
    ("tree", "GET", r"/api/(?P<kind>models|datasets)/(?P<id>[^/]+/[^/]+)/tree/(?P<revision>[^/]+)(?:/(?P<path>.*))?"),
    ("info", "GET", r"/api/(?P<kind>models|datasets)/(?P<id>[^/]+/[^/]+)(?:/revision/(?P<revision>[^/]+))?"),
    ("lfs-batch", "POST", r"/(?:(?P<kind>datasets)/)?(?P<id>[^/]+/[^/]+)\.git/info/lfs/objects/batch"),
    ("lfs-upload", "PUT", r"/lfs/(?P<oid>[0-9a-f]{64})"),
    ("xet-token", "GET", r"/api/(?P<kind>models|datasets)/(?P<id>[^/]+/[^/]+)/xet-write-token/(?P<revision>[^/]+)"),
    ("xet-storage", "[A-Z]+", r"/xet/(?P<path>.+)"),
    ("head", "HEAD", r"/(?:(?P<kind>datasets)/)?(?P<id>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)"),
    ("download", "GET", r"/(?:(?P<kind>datasets)/)?(?P<id>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)"),
    ("other", "[A-Z]+", r"/.*"),
)


@dataclass
class Fault:
    """A fault of the next ``times`` requests of a phase.

    Attributes:
        status: answer with this status instead of serving the request.
        after: reset the connection after this number of bytes of the request's body or, for a download, of the answer's.
        done: serve the request, then reset the connection instead of answering.
        delay: seconds to wait first.
        path: only requests whose path contains this.
    """

    phase: str
    status: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    after: int | None = None
    done: bool = False
    delay: float = 0.0
    path: str = ""
    times: int = 1


@dataclass
class Repo:
    """Files of every commit, and the commits that branches and pull requests (``refs/pr/1``) point to."""

    private: bool
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    messages: dict[str, str] = field(default_factory=dict)

    def add(self, files: dict[str, bytes], ref: str, message: str) -> str:
        text = f"{self.refs.get(ref)} {ref} {message} {sorted((path, _sha1(data)) for path, data in files.items())}"
        commit = hashlib.sha1(f"{len(self.commits)} {text}".encode()).hexdigest()
        self.commits[commit], self.refs[ref], self.messages[commit] = files, commit, message
        return commit

    def find(self, revision: str) -> str | None:
        if revision in self.refs:
            return self.refs[revision]
        return next((commit for commit in self.commits if len(revision) >= 7 and commit.startswith(revision)), None)


def _sha1(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _is_lfs(path: str, size: int, sample: bytes = b"") -> bool:
    return path.endswith(LFS) or size > 10_000_000 or b"\0" in sample


class Answer(Exception):
    """An answer to a request, raised as soon as it is known."""

    def __init__(self, status: int, body: object = None, **headers: str):
        self.status, self.headers = status, {name.replace("_", "-"): value for name, value in headers.items()}
        self.data = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()


class Reset(Exception):
    """The connection ends here."""


def _refuse(status: int, message: str, code: str = "", **headers: str) -> Answer:
    named = {"X_Error_Code": code} if code else {}
    return Answer(status, {"error": message}, X_Error_Message=message, **named, **headers)


class HubServer:
    """Serve repositories; see the text of the module.

    Attributes:
        xet: serve the storage of that name; see :meth:`_Handler.xet_storage`.
        requests: (phase, method, path, status) of every request so far; the status is 0 where the connection was reset.
        card_errors: errors that the check of a card's metadata reports.
    """

    def __init__(self) -> None:
        self.repos: dict[tuple[str, str], Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.tokens = {TOKEN: ("ann", "write"), READ_TOKEN: ("ann", "read")}
        self.faults: list[Fault] = []
        self.requests: list[tuple[str, str, str, int]] = []
        self.card_errors: list[str] = []
        self.xet = False
        self.lock = threading.Lock()

    # ------------------------------------------------------------------------------------------------ running

    def start(self) -> "HubServer":
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self.http.daemon_threads, self.stopped = True, False
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}"
        self.thread = threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self.thread.start()
        return self

    def stop(self) -> None:
        """Stop answering, also on open connections."""
        self.stopped = True
        self.http.shutdown()
        self.http.server_close()
        self.thread.join()

    def __enter__(self) -> "HubServer":
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def environment(self, home: object, token: str | None = TOKEN) -> dict[str, str]:
        """Return variables for a process that takes this server for the Hub, with its caches in ``home``."""
        dropped = ("HF_", "TRANSFORMERS_", "HUGGING", "XDG_CACHE")
        kept = {name: value for name, value in os.environ.items() if not name.startswith(dropped)}
        own = {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
        return {**kept, **own, "TOKENIZERS_PARALLELISM": "false", **({"HF_TOKEN": token} if token else {})}

    def patch(self, monkeypatch, home, token: str | None = TOKEN, waiting: bool = False) -> None:
        """Make huggingface_hub, transformers and datasets of this process take this for the Hub, until the test ends.

        Xet is off as long as the test does not call :meth:`use_xet`; ``waiting`` keeps the pauses between retries.
        """
        import datasets.config
        import huggingface_hub
        from huggingface_hub import HfFileSystem, constants, file_download, hf_api
        from huggingface_hub.utils import _http
        from transformers import dynamic_module_utils

        values = {"ENDPOINT": self.url, "HUGGINGFACE_CO_URL_TEMPLATE": self.url + "/{repo_id}/resolve/{revision}/{filename}"}
        values |= {"HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True, "HF_HUB_DISABLE_TELEMETRY": True}
        values |= {"HF_HOME": str(home), "HF_HUB_CACHE": f"{home}/hub", "HF_TOKEN_PATH": f"{home}/token"}
        for name, value in values.items():
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setattr(hf_api.api, "endpoint", self.url)
        monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", f"{home}/modules")
        for name, value in self.environment(home, token).items():
            monkeypatch.setenv(name, value)
        for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", *([] if token else ["HF_TOKEN"])):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setattr(datasets.config, "HF_ENDPOINT", self.url)
        monkeypatch.setattr(datasets.config, "HUB_DATASETS_URL", self.url + "/datasets/{repo_id}/resolve/{revision}/{path}")
        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", f"{home}/datasets")
        monkeypatch.setattr(datasets.config, "HF_UPDATE_DOWNLOAD_COUNTS", False)
        if not waiting:
            for module in (_http, file_download):  # only their own waits between attempts
                monkeypatch.setattr(module, "time", _Impatient())
        HfFileSystem.clear_instance_cache()  # it would remember another test's server
        huggingface_hub.utils.close_session()

    def use_xet(self, monkeypatch) -> None:
        """Let huggingface_hub send large files as it does where hf_xet is installed: not through LFS."""
        from huggingface_hub import constants
        from huggingface_hub.utils import _xet

        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
        monkeypatch.delenv("HF_HUB_DISABLE_XET")
        monkeypatch.setenv("HF_XET_XORB_COMPRESSION_POLICY", "none")  # so that the bytes can be read here
        monkeypatch.setattr(_xet, "_GLOBAL_XET_HOLDER", _xet.XetSessionHolder())
        self.xet = True

    # ---------------------------------------------------------------------------------------------- contents

    def add_repo(
        self,
        repo_id: str,
        files: dict[str, bytes] | None = None,
        *,
        kind: str = "model",
        private: bool = False,
        ref: str = "main",
    ) -> str:
        """Create a repository, or another commit of it with exactly these files, and return the commit."""
        repo = self.repos.setdefault((f"{kind}s", repo_id), Repo(private))
        for path, data in (files or {}).items():
            if _is_lfs(path, len(data), data[:512]):
                self.objects[hashlib.sha256(data).hexdigest()] = data
        return repo.add(dict(files or {}), ref, "by the test")

    def files(self, repo_id: str, revision: str = "main", *, kind: str = "model") -> dict[str, bytes]:
        """Return the files at a revision."""
        repo = self.repos[f"{kind}s", repo_id]
        return repo.commits[repo.find(revision) or ""]

    def commits(self, repo_id: str, *, kind: str = "model") -> list[str]:
        """Return all commits of all branches in their order; the first is the one that creation makes."""
        return list(self.repos[f"{kind}s", repo_id].commits)

    def fail(self, phase: str, status: int | None = None, **how) -> Fault:
        """Place a :class:`Fault` and return it."""
        assert phase in [name for name, *_ in PHASES], phase
        fault = Fault(phase, status, **how)
        with self.lock:
            self.faults.append(fault)
        return fault

    def count(self, phase: str) -> int:
        """Return the number of requests of a phase."""
        return sum(name == phase for name, *_ in self.requests)

    def take_fault(self, phase: str, path: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.phase == phase and fault.times and fault.path in path:
                    fault.times -= 1
                    return fault
        return None


class _Impatient:
    """Replace the module ``time``, without waiting."""

    def __getattr__(self, name):
        return getattr(time, name)

    def sleep(self, seconds: float) -> None:
        time.sleep(min(seconds, 0.001))


def _handler(server: HubServer) -> type[BaseHTTPRequestHandler]:
    return type("Handler", (_Handler,), {"hub": server})


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: HubServer

    def log_message(self, *_: object) -> None:
        pass

    def __getattr__(self, name: str):
        if name.startswith("do_"):
            return self.serve
        raise AttributeError(name)

    def serve(self) -> None:
        if self.hub.stopped:
            return self.reset()
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        for self.phase, method, pattern in PHASES:
            if re.fullmatch(method, self.command) and (found := re.fullmatch(pattern, url.path)):
                break
        self.named = {name: unquote(value) for name, value in found.groupdict().items() if value is not None}
        self.fault = self.hub.take_fault(self.phase, unquote(url.path))
        answer = None
        with suppress(Reset, OSError):
            answer = self.answer()
        cut = self.fault and (self.fault.done or self.fault.after is not None)
        with self.hub.lock:  # before the answer goes out, so that a test that has it finds the request
            self.hub.requests.append((self.phase, self.command, self.path, 0 if answer is None or cut else answer.status))
        try:
            if answer is None or (self.fault and self.fault.done):
                raise Reset
            self.send(answer)
        except (Reset, OSError):
            self.reset()

    def answer(self) -> Answer:
        if self.fault and self.fault.delay:
            _sleep(self.fault.delay)
        self.body = self.read()
        if self.fault and self.fault.status:
            headers = {"X-Error-Message": "as the test wants it", **self.fault.headers}
            return Answer(self.fault.status, {"error": headers["X-Error-Message"]}, **headers)
        try:
            with self.hub.lock:
                getattr(self, self.phase.replace("-", "_"))()
        except Answer as answer:
            return answer
        raise AssertionError(f"{self.phase} gave no answer")

    def read(self) -> bytes:
        """The request's body, or as much as the fault lets through before the connection is reset."""
        limit = self.fault.after if self.fault and self.phase != "download" else None
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            body = b""
            while size := int(self.rfile.readline().split(b";")[0], 16):
                body += self.rfile.read(size)
                self.rfile.readline()
                if limit is not None and len(body) >= limit:
                    raise Reset
            self.rfile.readline()
            return body
        size = int(self.headers.get("Content-Length", 0))
        if limit is not None:
            self.rfile.read(min(limit, size))
            raise Reset
        return self.rfile.read(size)

    def send(self, answer: Answer) -> None:
        self.send_response(answer.status)
        answer.headers.setdefault("Content-Length", str(len(answer.data)))
        answer.headers.setdefault("Content-Type", "application/json")
        for name, value in answer.headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.fault and self.phase == "download" and self.fault.after is not None:
            self.wfile.write(answer.data[: self.fault.after])
            self.wfile.flush()
            time.sleep(0.05)  # else what was sent is lost with the connection
            raise Reset
        self.wfile.write(answer.data)

    def reset(self) -> None:
        """Close so that the other side sees "connection reset by peer"."""
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()

    # ----------------------------------------------------------------------------------------------- who and what

    def user(self) -> tuple[str, str] | None:
        given = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if given and given not in self.hub.tokens:
            raise _refuse(401, "Invalid credentials in Authorization header")
        return self.hub.tokens.get(given)

    def check_writer(self, namespace: str) -> None:
        user = self.user()
        if user is None:
            raise _refuse(401, "Invalid username or password.")
        if user != (namespace, "write"):
            raise _refuse(403, f"You don't have the rights to write under the namespace {namespace}")

    def repo(self, write: bool = False) -> Repo:
        user = self.user()
        kind, name = self.named.get("kind", "models"), self.named["id"]
        repo = self.hub.repos.get((kind, name))
        if repo is None or (repo.private and (user or ("", ""))[0] != name.split("/")[0]):
            raise _refuse(404 if user else 401, "Repository not found", "RepoNotFound")
        if write:
            self.check_writer(name.split("/")[0])
        return repo

    def commit_of(self, repo: Repo) -> str:
        revision = self.named.get("revision", "main")
        if (commit := repo.find(revision)) is None:
            raise _refuse(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit

    # ---------------------------------------------------------------------------------------------------- answers

    def other(self) -> None:
        raise _refuse(404, "Sorry, we can't find the page you are looking for.")

    def whoami(self) -> None:
        if (user := self.user()) is None:
            raise _refuse(401, "Invalid username or password.")
        token = {"displayName": "test", "role": user[1]}
        raise Answer(200, {"type": "user", "name": user[0], "orgs": [], "auth": {"accessToken": token}})

    def create(self) -> None:
        wanted = json.loads(self.body)
        owner = wanted.get("organization") or (self.user() or ("", ""))[0]
        self.check_writer(owner)
        name, kind = f"{owner}/{wanted['name']}", f"{wanted.get('type', 'model')}s"
        if not re.fullmatch(r"[\w.-]{1,96}", wanted["name"]) or wanted["name"].endswith(".git"):
            raise _refuse(400, f"Invalid repo name: {name}")
        url = f"{self.hub.url}/{'' if kind == 'models' else kind + '/'}{name}"
        if (kind, name) in self.hub.repos:
            raise Answer(
                409, {"error": "You already created this repo", "url": url}, X_Error_Message="You already created this repo"
            )
        repo = self.hub.repos[kind, name] = Repo(wanted.get("visibility") == "private" or bool(wanted.get("private")))
        repo.add({".gitattributes": b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"}, "main", "initial commit")
        raise Answer(200, {"url": url, "name": name, "id": name})

    def delete(self) -> None:
        wanted = json.loads(self.body)
        owner = wanted.get("organization") or (self.user() or ("", ""))[0]
        self.check_writer(owner)
        self.hub.repos.pop((f"{wanted.get('type', 'model')}s", f"{owner}/{wanted['name']}"), None)
        raise Answer(200, {})

    def validate(self) -> None:
        errors = [{"message": message} for message in self.hub.card_errors]
        raise Answer(400 if errors else 200, {"errors": errors, "warnings": []})

    def branch(self) -> None:
        repo = self.repo(write=True)
        if self.named["revision"] in repo.refs:
            raise _refuse(409, "Reference already exists")
        start = json.loads(self.body or b"{}").get("startingPoint", "main")
        repo.refs[self.named["revision"]] = repo.find(start) or ""
        raise Answer(200, {})

    def refs(self) -> None:
        repo = self.repo()
        found = [
            {"name": name, "ref": name if name.startswith("refs/") else f"refs/heads/{name}", "targetCommit": commit}
            for name, commit in repo.refs.items()
        ]
        pulls = [ref for ref in found if ref["name"].startswith("refs/pr/")]
        branches = [ref for ref in found if ref not in pulls]
        raise Answer(200, {"branches": branches, "converts": [], "tags": [], "pullRequests": pulls})

    def info(self) -> None:
        repo = self.repo()
        commit = self.commit_of(repo)
        siblings = [self.entry(path, data, siblings=True) for path, data in sorted(repo.commits[commit].items())]
        name = self.named["id"]
        dates = {"lastModified": DATE, "createdAt": DATE}
        marks = {"tags": [], "downloads": 0, "likes": 0, "gated": False, "disabled": False}
        found = {"_id": "0", "id": name, "modelId": name, "author": name.split("/")[0], "sha": commit, "private": repo.private}
        raise Answer(200, {**found, "siblings": siblings, **dates, **marks})

    def entry(self, path: str, data: bytes, siblings: bool = False) -> dict[str, object]:
        lfs = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
        is_lfs = _is_lfs(path, len(data), data[:512])
        if siblings:
            with_lfs = {"lfs": {**lfs, "sha256": lfs["oid"]}} if is_lfs else {}
            return {"rfilename": path, "size": len(data), "blobId": _sha1(data), **with_lfs}
        last = {"lastCommit": {"id": "0" * 40, "title": "by the test", "date": DATE}} if self.expand() else {}
        return {"type": "file", "path": path, "size": len(data), "oid": _sha1(data), **({"lfs": lfs} if is_lfs else {}), **last}

    def folder(self, path: str) -> dict[str, object]:
        last = {"lastCommit": {"id": "0" * 40, "title": "by the test", "date": DATE}} if self.expand() else {}
        return {"type": "directory", "path": path, "size": 0, "oid": hashlib.sha1(path.encode()).hexdigest(), **last}

    def expand(self) -> bool:
        return self.query.get("expand", ["false"])[0].lower() in ("true", "1")

    def tree(self) -> None:
        repo = self.repo()
        commit = self.commit_of(repo)
        folder = self.named.get("path", "").strip("/")
        start = f"{folder}/" if folder else ""
        inside = {path: data for path, data in sorted(repo.commits[commit].items()) if path.startswith(start)}
        if folder and not inside:
            raise _refuse(404, f"{folder} does not exist on {commit}", "EntryNotFound", X_Repo_Commit=commit)
        recursive = self.query.get("recursive", ["false"])[0].lower() in ("true", "1")
        parts = [path.removeprefix(start).split("/") for path in inside]
        depths = {"/".join(part[:depth]) for part in parts for depth in range(1, len(part))}
        found = [self.folder(start + path) for path in sorted(depths) if recursive or "/" not in path]
        found += [self.entry(path, data) for path, data in inside.items() if recursive or "/" not in path.removeprefix(start)]
        raise Answer(200, found, X_Repo_Commit=commit)

    def paths(self) -> None:
        repo = self.repo()
        files = repo.commits[self.commit_of(repo)]
        is_json = "json" in self.headers.get("Content-Type", "")
        wanted = json.loads(self.body) if is_json else parse_qs(self.body.decode())
        if str(wanted.get("expand", ["false"])).strip("[]'").lower() == "true":
            self.query["expand"] = ["true"]
        found = []
        for path in (name.strip("/") for name in wanted.get("paths", [])):
            if path in files:
                found.append(self.entry(path, files[path]))
            elif any(name.startswith(f"{path}/") for name in files):
                found.append(self.folder(path))
        raise Answer(200, found)

    def preupload(self) -> None:
        repo = self.repo(write=True)
        files = repo.commits[self.commit_of(repo)]
        found = []
        for file in json.loads(self.body)["files"]:
            is_lfs = _is_lfs(file["path"], file["size"], base64.b64decode(file.get("sample", "")))
            old = files.get(file["path"])
            oid = None if old is None else hashlib.sha256(old).hexdigest() if is_lfs else _sha1(old)
            mode = "lfs" if is_lfs else "regular"
            found.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        raise Answer(200, {"files": found, "commitOid": self.commit_of(repo)})

    def lfs_batch(self) -> None:
        self.repo(write=True)
        objects = []
        for wanted in json.loads(self.body)["objects"]:
            given = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in self.hub.objects:
                given["actions"] = {"upload": {"href": f"{self.hub.url}/lfs/{wanted['oid']}", "header": {}}}
            objects.append(given)
        raise Answer(200, {"transfer": "basic", "objects": objects})

    def lfs_upload(self) -> None:
        if hashlib.sha256(self.body).hexdigest() != self.named["oid"]:
            raise _refuse(400, "The content is not what was announced")
        self.hub.objects[self.named["oid"]] = self.body
        raise Answer(200)

    def xet_token(self) -> None:
        self.repo(write=True)
        if not self.hub.xet:
            self.other()
        until = str(int(time.time()) + 3600)
        headers = {
            "X_Xet_Cas_Url": f"{self.hub.url}/xet",
            "X_Xet_Access_Token": "xet_forTestsOnly",
            "X_Xet_Token_Expiration": until,
        }
        body = {"casUrl": headers["X_Xet_Cas_Url"], "accessToken": headers["X_Xet_Access_Token"], "exp": int(until)}
        raise Answer(200, body, **headers)

    def xet_storage(self) -> None:
        """Store pieces of one file, sent together: each has a header of 8 bytes with its length and compression, here none.

        Of the storage's API there is what takes uploads in its first version; the client does without the rest.
        """
        if self.headers.get("Authorization") != "Bearer xet_forTestsOnly":
            raise _refuse(401, "no token of this storage")
        if self.command == "POST" and self.named["path"].startswith("v1/xorbs/"):
            data, at = b"", 0
            while at < len(self.body):
                length = int.from_bytes(self.body[at + 1 : at + 4], "little")
                assert self.body[at] == self.body[at + 4] == 0, "another version, or compressed"
                data += self.body[at + 8 : at + 8 + length]
                at += 8 + length
            self.hub.objects[hashlib.sha256(data).hexdigest()] = data
            raise Answer(200, {"was_inserted": True})
        if self.command == "POST" and self.named["path"].startswith("v1/shards"):
            raise Answer(200, {"result": 1})
        self.other()

    def commit(self) -> None:
        repo = self.repo(write=True)
        parent = self.commit_of(repo)
        files, message = dict(repo.commits[parent]), ""
        for line in self.body.splitlines():
            item = json.loads(line)
            key, value = item["key"], item["value"]
            if key == "header":
                message = value["summary"]
                if (wanted := value.get("parentCommit")) and not parent.startswith(wanted):
                    raise _refuse(412, "A commit has happened since. Please refresh and try again.")
            elif key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                if value["oid"] not in self.hub.objects:
                    raise _refuse(400, f"LFS object {value['oid']} does not exist")
                files[value["path"]] = self.hub.objects[value["oid"]]
            elif key == "deletedFile" and files.pop(value["path"], None) is None:
                raise _refuse(404, "A file with this name doesn't exist", "EntryNotFound")
            elif key == "deletedFolder":
                files = {path: data for path, data in files.items() if not path.startswith(value["path"].rstrip("/") + "/")}
        ref, pull = self.named["revision"], {}
        if "create_pr" in self.query:
            number = 1 + sum(name.startswith("refs/pr/") for name in repo.refs)
            ref = f"refs/pr/{number}"
            pull = {"pullRequestUrl": f"{self.hub.url}/{self.named['id']}/discussions/{number}"}
        commit = repo.add(files, ref, message)
        url = f"{self.hub.url}/{self.named['id']}/commit/{commit}"
        raise Answer(200, {"success": True, "commitUrl": url, "commitOid": commit, "hookOutput": "", **pull})

    def head(self) -> None:
        repo = self.repo()
        commit = self.commit_of(repo)
        path = self.named["path"]
        data = repo.commits[commit].get(path)
        if data is None:
            raise _refuse(404, f"Entry not found: {path}", "EntryNotFound", X_Repo_Commit=commit)
        is_lfs = _is_lfs(path, len(data), data[:512])
        etag = hashlib.sha256(data).hexdigest() if is_lfs else _sha1(data)
        headers = {"ETag": f'"{etag}"', "X_Repo_Commit": commit, "Accept_Ranges": "bytes", "Content_Type": "text/plain"}
        if is_lfs:
            headers |= {"X_Linked_Etag": f'"{etag}"', "X_Linked_Size": str(len(data)), "Content_Type": "binary/octet-stream"}
        if found := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            start, end = int(found[1]), min(int(found[2] or len(data) - 1), len(data) - 1)
            if start >= len(data):
                raise Answer(416, b"", Content_Range=f"bytes */{len(data)}", **headers)
            raise Answer(206, data[start : end + 1], Content_Range=f"bytes {start}-{end}/{len(data)}", **headers)
        raise Answer(200, data, **headers, Content_Length=str(len(data)))

    download = head
