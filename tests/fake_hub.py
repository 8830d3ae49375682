"""A server on this machine that answers like the Hugging Face hub, for models in a folder."""

import contextlib
import hashlib
import importlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

COMMIT = "0" * 39 + "1"


class FakeHub:
    """Serves ``folder/OWNER/NAME``; with ``status``, answers everything with that status.

    Attributes:
        folder: of the models.
        url: of the server.
        asked: the paths of all requests.
        status: an error status, or ``None``.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.asked = []
        self.status = None
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def stop(self) -> None:
        """Closes the server; its port refuses connections from then on."""
        if self._thread.is_alive():
            self._server.shutdown()
            self._thread.join()
            self._server.server_close()

    def _handler(hub):  # noqa: N805 - self is the handler
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                hub.asked.append(urlsplit(self.path).path)
                headers, content = hub._answer(urlsplit(self.path).path)
                self.send_response(headers.pop("status", 200))
                for name, value in {**headers, "Content-Length": str(len(content))}.items():
                    self.send_header(name, value)
                self.end_headers()
                if self.command == "GET":
                    # The client may leave before the answer.
                    with contextlib.suppress(ConnectionError):
                        self.wfile.write(content)

            do_HEAD = do_GET  # noqa: N815

            def log_message(self, *_):
                pass

        return Handler

    def _answer(self, path):
        if self.status is not None:
            return {"status": self.status}, b""
        parts = path.strip("/").split("/")
        if parts == [""]:
            return {}, b"hello"
        if parts[:2] == ["api", "models"]:
            repository = self.folder.joinpath(*parts[2:4])
            files = [
                {"type": "file", "path": file.name, "rfilename": file.name, **_sizes(file)}
                for file in sorted(repository.glob("*"))
            ]
            if not files:
                return {"status": 404, "X-Error-Code": "RepoNotFound"}, b"{}"
            name = "/".join(parts[2:4])
            info = {"id": name, "modelId": name, "sha": COMMIT, "siblings": files}
            body = files if "tree" in parts else info
            return {"Content-Type": "application/json"}, json.dumps(body).encode()
        owner, name, _, _, *file = parts
        content = self.folder.joinpath(owner, name, *file)
        if not content.is_file():
            return {"status": 404, "X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT}, b""
        etag = f'"{_sizes(content)["oid"]}"'
        return {"ETag": etag, "X-Repo-Commit": COMMIT}, content.read_bytes()


def _sizes(file):
    content = file.read_bytes()
    return {"size": len(content), "oid": hashlib.sha1(content).hexdigest()}


def point_to(monkeypatch, url):
    """What HF_ENDPOINT does where huggingface_hub is imported."""
    constants = importlib.import_module("huggingface_hub.constants")
    file_download = importlib.import_module("huggingface_hub.file_download")
    monkeypatch.setattr(constants, "ENDPOINT", url)
    files = url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", files)
    # Old versions have a second name for it.
    monkeypatch.setattr(file_download, "HUGGINGFACE_CO_URL_TEMPLATE", files, raising=False)
