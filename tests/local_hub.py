"""A stand-in for the Hugging Face Hub, for tests: one local HTTP server, standard library only.

    with LocalHub() as hub:
        hub.fail(r"^POST .*/commit/", times=2, status=503)  # the next two commits are refused
        subprocess.run([...], env={**os.environ, **hub.environment(tmp_path)}, check=True)
        assert "model_index.json" in hub.files("tester/my-model")

The real `huggingface_hub` client talks to it, so a test sees the requests a program really sends. The client
reads HF_ENDPOINT when imported: set the variables before that, run the client in a subprocess, or change the
client's constants (`use`). Limits: it does not validate like the real Hub (names, sizes, quotas, cards: all
pass). It knows one user, branches and commit ids; other requests answer 501, and datasets cannot stream from
it. Uploads go over LFS (HF_HUB_DISABLE_XET=1): the client's default Xet path is NOT covered. Seen working
with huggingface_hub 2.4.0.
"""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

USER, TOKEN, MODES = "tester", "hf_local", ("regular", "lfs")
LFS = (".safetensors", ".bin", ".pt", ".png", ".parquet")
VERBS = "revision|tree|preupload|commit|resolve|branch"  # /api/models/user/name/tree/main/folder, ...
IN_REPO = rf"(?:/api)?/((?:models/|datasets/|spaces/)?[^/]+/[^/]+)(?:/({VERBS})/([^/]+)(?:/(.+))?)?"


class Refusal(Exception):
    """(status, message, the Hub's error code, further headers); status None: drop the connection"""


class LocalHub(ThreadingHTTPServer):
    """The server; it stops at the end of `with`. `requests` lists what was asked, "METHOD /path?query"."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.endpoint = f"http://127.0.0.1:{self.server_port}"
        self.requests: list[str] = []
        self.private: set[str] = set()  # repositories, as "models/user/name"; reading them takes the token
        self._repos: dict[str, dict[str, dict[str, str]]] = {}  # repository -> commit id -> path -> blob key
        self._branches: dict[str, dict[str, str]] = {}  # repository -> branch -> commit id
        self._blobs: dict[str, bytes] = {}
        self._faults: list[tuple[str, int | None, bool, dict[str, str]]] = []
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    def __exit__(self, *exc: object) -> None:
        self.shutdown()
        self.server_close()

    def environment(self, home: object) -> dict[str, str]:
        """Variables that point the client here and put its cache in the folder `home`."""
        hub = {"HF_ENDPOINT": self.endpoint, "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0"}
        return {**hub, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}

    def use(self, monkeypatch: Any, home: Any) -> None:
        """Point the client that this process has imported here, and its cache to the folder `home`."""
        for name, value in self.environment(home).items():
            monkeypatch.setenv(name, value)
        changes = {
            "ENDPOINT": self.endpoint,
            "HUGGINGFACE_CO_URL_TEMPLATE": self.endpoint + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_CACHE": f"{home}/hub",
            "HF_HUB_DISABLE_XET": True,
            "HF_HUB_OFFLINE": False,
        }
        for name, value in changes.items():
            monkeypatch.setattr(f"huggingface_hub.constants.{name}", value)

    def files(self, repo_id: str, kind: str = "model", branch: str = "main") -> dict[str, bytes]:
        """Contents of a branch, by path."""
        repo = f"{kind}s/{repo_id}"
        return {
            path: self._blobs[key] for path, key in self._repos[repo][self._branches[repo][branch]].items()
        }

    def commits(self, repo_id: str, kind: str = "model") -> int:
        """How many commits were made, but for the empty first one."""
        return len(self._repos[f"{kind}s/{repo_id}"]) - 1

    def put(self, repo_id: str, files: dict[str, bytes], kind: str = "model") -> None:
        """A repository with these files, made by nobody."""
        repo = f"{kind}s/{repo_id}"
        keys = {path: hashlib.sha256(content).hexdigest() for path, content in files.items()}
        self._blobs |= {keys[path]: content for path, content in files.items()}
        oid = hashlib.sha1(repr(sorted(keys.items())).encode()).hexdigest()
        self._repos.setdefault(repo, {hashlib.sha1(repo.encode()).hexdigest(): {}})[oid] = keys
        self._branches[repo] = {"main": oid}

    def fail(
        self,
        pattern: str,
        times: int = 1,
        status: int | None = None,
        done: bool = False,
        headers: dict[str, str] | None = None,
    ) -> None:
        """Spoil the next `times` requests that match: answer `status`, or with None drop the connection.

        done: do what is asked first, so that only the answer is lost. headers: of the answer.
        """
        self._faults += [(pattern, status, done, headers or {})] * times

    def reply(self, method: str, target: str, body: bytes, known: bool) -> Any:
        """What to send: an object for JSON, or (bytes, headers); `known`: the token was right."""
        self.requests.append(line := f"{method} {target}")
        if fault := next((f for f in self._faults if re.search(f[0], line)), None):
            self._faults.remove(fault)
            if fault[2]:
                self._answer(method, target, line, body, known)
            raise Refusal(fault[1], "fault injected by the test", "", fault[3])
        return self._answer(method, target, line, body, known)

    def _answer(self, method: str, target: str, line: str, body: bytes, known: bool) -> Any:
        path = unquote(urlsplit(target).path)
        if path == "/api/validate-yaml":
            return {"errors": [], "warnings": []}
        if not known and (method == "POST" or path == "/api/whoami-v2"):
            raise Refusal(401, "Invalid credentials", "")
        if path == "/api/whoami-v2":
            return {"type": "user", "name": USER, "orgs": [], "auth": {"accessToken": {"role": "write"}}}
        if path == "/lfs":
            self._blobs[hashlib.sha256(body).hexdigest()] = body
            return {}
        if path.endswith(".git/info/lfs/objects/batch"):
            asked = json.loads(body)["objects"]
            upload = {"actions": {"upload": {"href": f"{self.endpoint}/lfs"}}}
            return {
                "transfer": "basic",
                "objects": [o if o["oid"] in self._blobs else {**o, **upload} for o in asked],
            }
        if path == "/api/repos/create":
            ask = json.loads(body)
            repo = f"{ask.get('type') or 'model'}s/{ask.get('organization') or USER}/{ask['name']}"
            url = f"{self.endpoint}/{repo.removeprefix('models/')}"
            if repo in self._repos:
                raise Refusal(409, url, "")  # the client reads the address from the refusal
            self.private |= {repo} if ask.get("visibility") == "private" else set()
            self._repos[repo] = {(first := hashlib.sha1(repo.encode()).hexdigest()): {}}
            self._branches[repo] = {"main": first}
            return {"url": url}
        if match := re.fullmatch(IN_REPO, path):
            return self._in_repo(*match.groups(""), body, known)
        raise Refusal(501, f"LocalHub has no route for {line}", "")

    def _in_repo(self, repo: str, verb: str, rev: str, path: str, body: bytes, known: bool) -> Any:
        repo = repo if repo.count("/") == 2 else f"models/{repo}"
        if not (commits := self._repos.get(repo)) or (repo in self.private and not known):
            raise Refusal(404, "Repository not found", "RepoNotFound")
        rev = unquote(rev or "main")
        if verb == "branch":
            if rev in self._branches[repo]:
                raise Refusal(409, "Reference already exists", "")
            self._branches[repo][rev] = self._branches[repo]["main"]
            return {}
        oid = self._branches[repo].get(rev, rev)
        if (files := commits.get(oid)) is None:
            raise Refusal(404, f"Invalid rev id: {rev}", "RevisionNotFound")
        if verb == "resolve":
            if path in files:
                return self._blobs[files[path]], {"X-Repo-Commit": oid, "ETag": f'"{files[path]}"'}
            raise Refusal(404, "Entry not found", "EntryNotFound")
        if verb == "tree":
            found = [(p, k) for p, k in files.items() if p.startswith(f"{path}/" if path else "")]
            return [{"type": "file", "path": p, "oid": k, "size": len(self._blobs[k])} for p, k in found]
        if verb == "preupload":
            asked = [(f["path"], MODES[f["path"].endswith(LFS)]) for f in json.loads(body)["files"]]
            about = [{"path": p, "uploadMode": m, "shouldIgnore": False} for p, m in asked]
            return {
                "files": [{**f, **({"oid": files[f["path"]]} if f["path"] in files else {})} for f in about]
            }
        if verb == "commit":
            oid = hashlib.sha1(oid.encode() + body).hexdigest()
            commits[oid] = self._changed(files, [json.loads(line) for line in body.splitlines()])
            self._branches[repo][rev] = oid
            return {"commitOid": oid, "commitUrl": f"{self.endpoint}/{repo}/commit/{oid}"}
        about = {"id": repo.split("/", 1)[1], "sha": oid, "private": repo in self.private, "tags": []}
        return {**about, "siblings": [{"rfilename": p} for p in files]}

    def _changed(self, files: dict[str, str], changes: list[dict[str, Any]]) -> dict[str, str]:
        for key, value in ((change["key"], change["value"]) for change in changes):
            if key == "file":
                content = base64.b64decode(value["content"])
                oid = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
                self._blobs[oid], files = content, {**files, value["path"]: oid}
            elif key == "lfsFile":
                if value["oid"] not in self._blobs:
                    raise Refusal(400, f"{value['path']} never arrived", "")
                files = {**files, value["path"]: value["oid"]}
            elif key.startswith("deleted"):
                gone = value["path"].rstrip("/") + "/"
                files = {path: oid for path, oid in files.items() if not f"{path}/".startswith(gone)}
        return files


class _Handler(BaseHTTPRequestHandler):
    server: LocalHub

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        known = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        try:
            status, content = 200, self.server.reply(self.command, self.path, body, known)
        except Refusal as refusal:
            status, message, code, *more = refusal.args
            if status is None:
                return
            headers = {"X-Error-Code": code, **(more[0] if more else {})}
            content = json.dumps({"error": message, "url": message}).encode(), headers
        data, headers = content if isinstance(content, tuple) else (json.dumps(content).encode(), {})
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(b"" if self.command == "HEAD" else data)

    do_GET = do_HEAD = do_PUT = do_POST

    def log_message(self, *args: object) -> None: ...
