"""The hub path: the real huggingface_hub client against a small server that speaks the hub's API on this machine."""

import hashlib
import json
import os
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest
from conftest import ROOT, TINY

REPOSITORY, COMMIT = "someone/tiny-mix", "0123456789abcdef0123456789abcdef01234567"
EXTRA = {"README.md": b"a model card", "unet/diffusion_pytorch_model.bin": b"a pickle",
         "safety_checker/config.json": b"{}",
         "vae/diffusion_pytorch_model.fp16.safetensors": b"another precision"}  # fmt: skip


class Hub(BaseHTTPRequestHandler):
    """What huggingface_hub asks for: the repository's facts, its tree, and files by HEAD and GET."""

    files: dict[str, bytes]
    served: list[str]

    def log_message(self, *_):
        pass

    def answer(self, body: bytes, headers: dict[str, str], status: int = 200):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def do_GET(self):
        path = self.path.split("?")[0]
        if path.startswith(f"/api/models/{REPOSITORY}/tree/"):
            oid = lambda body: hashlib.sha1(body).hexdigest()
            tree = [{"type": "file", "path": n, "size": len(b), "oid": oid(b)} for n, b in self.files.items()]
            return self.answer(json.dumps(tree).encode(), {"Content-Type": "application/json"})
        if path.rstrip("/") in (f"/api/models/{REPOSITORY}", f"/api/models/{REPOSITORY}/revision/main"):
            facts = {"id": REPOSITORY, "sha": COMMIT, "private": False}
            facts["siblings"] = [{"rfilename": n} for n in self.files]
            return self.answer(json.dumps(facts).encode(), {"Content-Type": "application/json"})
        for revision in ("main", COMMIT):
            name = path.removeprefix(f"/{REPOSITORY}/resolve/{revision}/")
            if name in self.files:
                if self.command == "GET":
                    self.served.append(name)
                etag = f'"{hashlib.sha1(self.files[name]).hexdigest()}"'
                return self.answer(self.files[name], {"ETag": etag, "X-Repo-Commit": COMMIT})
        self.answer(b"{}", {"X-Error-Code": "RepoNotFound" if path.startswith("/api") else "EntryNotFound"}, 404)

    do_HEAD = do_GET


@pytest.fixture
def hub(tmp_path):
    files = {str(p.relative_to(TINY)): p.read_bytes() for p in TINY.rglob("*") if p.is_file() and p.name != "README.md"}
    handler = type("Handler", (Hub,), {"files": files | EXTRA, "served": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    Thread(target=server.serve_forever, daemon=True).start()
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_")} | {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_XET": "1",
    }  # fmt: skip

    def mix(name, source=REPOSITORY):
        run = [sys.executable, str(ROOT / "magicmix.py"), "a tiger", "--layout-prompt", "a house", "--steps", "4",
               "--weights", source, "-o", name]  # fmt: skip
        return subprocess.run(run, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)

    yield server, handler, mix, tmp_path
    server.shutdown()
    server.server_close()


def test_first_use_fetches_what_is_needed_and_second_use_needs_no_hub(hub):
    server, handler, mix, folder = hub
    first = mix("one.png")
    assert first.returncode == 0, first.stderr
    assert set(handler.served) == set(handler.files) - set(EXTRA), "all that is needed, and nothing else"
    server.shutdown()
    server.server_close()
    second = mix("two.png")
    assert second.returncode == 0, second.stderr
    assert (folder / "one.png").read_bytes() == (folder / "two.png").read_bytes()


def test_a_revision_is_asked_for(hub):
    _, _, mix, _ = hub
    missing = mix("one.png", f"{REPOSITORY}@gone")
    assert missing.returncode == 2 and missing.stderr.count("\n") == 1 and "gone" in missing.stderr


def test_an_unreachable_hub_is_one_line(hub):
    server, _, mix, folder = hub
    server.shutdown()
    server.server_close()
    done = mix("one.png")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and not (folder / "one.png").exists()
    assert f"hub id '{REPOSITORY}' is not in the cache and the hub cannot be reached" in done.stderr
