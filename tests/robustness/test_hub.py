"""The hub path: the real huggingface_hub client against a small server that speaks the hub's API on this machine."""

import hashlib
import json
import os
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import numpy as np
import pytest
from conftest import TINY, run
from PIL import Image
from safetensors.torch import load, save

REPOSITORY, COMMIT = "someone/tiny-mix", "0123456789abcdef0123456789abcdef01234567"
EARLIER = "fedcba9876543210fedcba9876543210fedcba98"  # the commit of the revision v1, which has other options
EXTRA = {
    "README.md": b"a model card",
    "unet/diffusion_pytorch_model.bin": b"a pickle",
    "safety_checker/config.json": b"{}",
    "vae/diffusion_pytorch_model.fp16.safetensors": b"another precision",
}


class Hub(BaseHTTPRequestHandler):
    """What huggingface_hub asks for: a revision's facts, its tree, and files by HEAD and GET."""

    revisions: dict[str, tuple[str, dict[str, bytes]]]  # name or commit -> commit, files
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
        path = self.path.split("?")[0].rstrip("/")
        path = path.replace(f"/api/models/{REPOSITORY}/revision/", f"/api/models/{REPOSITORY}@")
        path = f"{path}@main" if path == f"/api/models/{REPOSITORY}" else path
        json_answer = lambda value: self.answer(json.dumps(value).encode(), {"Content-Type": "application/json"})
        for revision, (commit, files) in self.revisions.items():
            if path == f"/api/models/{REPOSITORY}/tree/{revision}":
                oid = lambda body: hashlib.sha1(body).hexdigest()
                return json_answer(
                    [{"type": "file", "path": n, "size": len(b), "oid": oid(b)} for n, b in files.items()]
                )
            if path == f"/api/models/{REPOSITORY}@{revision}":
                siblings = [{"rfilename": n} for n in files]
                return json_answer({"id": REPOSITORY, "sha": commit, "private": False, "siblings": siblings})
            name = path.removeprefix(f"/{REPOSITORY}/resolve/{revision}/")
            if name in files:
                if self.command == "GET":
                    self.served.append(name)
                etag = f'"{hashlib.sha1(files[name]).hexdigest()}"'
                return self.answer(files[name], {"ETag": etag, "X-Repo-Commit": commit})
        error = "RevisionNotFound" if path.startswith(f"/api/models/{REPOSITORY}@") else "EntryNotFound"
        self.answer(b"{}", {"X-Error-Code": error}, 404)

    do_HEAD = do_GET


def parameters(path):
    return json.loads(Image.open(path).info["magicmix"])["parameters"]


@pytest.fixture
def hub(tmp_path):
    files = {str(p.relative_to(TINY)): p.read_bytes() for p in TINY.rglob("*") if p.is_file() and p.name != "README.md"}
    now, earlier = files | EXTRA, files | {"magicmix.json": b'{"nu": 0.2}'}
    revisions = {"main": (COMMIT, now), COMMIT: (COMMIT, now), "v1": (EARLIER, earlier), EARLIER: (EARLIER, earlier)}
    handler = type("Handler", (Hub,), {"revisions": revisions, "served": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    Thread(target=server.serve_forever, daemon=True).start()
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_")} | {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_XET": "1",
    }

    def mix(name, source=REPOSITORY, *more):
        options = ("--layout-prompt", "a house", "--steps", "8", "--size", "64", "--weights", source, "-o", name)
        return run("a tiger", *options, *more, cwd=tmp_path, environment=environment)

    yield server, handler, mix, tmp_path
    server.shutdown()
    server.server_close()


def test_first_use_fetches_what_is_needed_and_second_use_needs_no_hub(hub):
    server, handler, mix, folder = hub
    first = mix("one.png")
    assert first.code == 0, first.err
    assert set(handler.served) == set(handler.revisions["main"][1]) - set(EXTRA), "all that is needed, no more"
    server.shutdown()
    server.server_close()
    second = mix("two.png")
    assert second.code == 0, second.err
    assert (folder / "one.png").read_bytes() == (folder / "two.png").read_bytes()


def test_a_revision_is_asked_for(hub):
    _, _, mix, folder = hub
    for name, source in (("now", REPOSITORY), ("v1", f"{REPOSITORY}@v1"), ("commit", f"{REPOSITORY}@{EARLIER}")):
        done = mix(f"{name}.png", source)
        assert done.code == 0, done.err
    assert [parameters(folder / f"{name}.png")["nu"] for name in ("now", "v1", "commit")] == [0.7, 0.2, 0.2]
    missing = mix("one.png", f"{REPOSITORY}@gone")
    assert missing.code == 2 and missing.err.count("\n") == 1 and not (folder / "one.png").exists()
    assert f"hub id '{REPOSITORY}@gone': the hub answers 404" in missing.err


def test_the_raw_weights_and_shards_are_fetched_where_they_are_asked_for(hub):
    """--no-ema takes the file of the raw weights; a part in shards needs its index and all of them."""
    _, handler, mix, folder = hub
    _, files = handler.revisions["main"]
    stem = "unet/diffusion_pytorch_model"
    state, shards = load(files.pop(f"{stem}.safetensors")), {}
    for i in (0, 1):
        part = {name: state[name] for name in sorted(state)[i::2]}
        name = f"{stem}-0000{i + 1}-of-00002.safetensors"
        files[name] = save(part)
        shards |= dict.fromkeys(part, name.removeprefix("unet/"))
    files[f"{stem}.safetensors.index.json"] = json.dumps({"metadata": {}, "weight_map": shards}).encode()
    files[f"{stem}.non_ema.safetensors"] = save({name: 0.5 * tensor for name, tensor in state.items()})
    done = mix("raw.png", REPOSITORY, "--no-ema")
    assert done.code == 0, done.err
    index = f"{stem}.safetensors.index.json"
    assert {name for name in handler.served if stem in name} == {f"{stem}.non_ema.safetensors", index}
    handler.served.clear()
    done = mix("averaged.png")
    assert done.code == 0, done.err
    shards = {f"{stem}-0000{i}-of-00002.safetensors" for i in (1, 2)}
    assert {name for name in handler.served if stem in name} == shards, "the index is there already"
    assert run("a tiger", "--layout-prompt", "a house", "--steps", "8", "--size", "64", cwd=folder).code == 0
    assert np.array_equal(*(np.asarray(Image.open(folder / name)) for name in ("mix.png", "averaged.png")))


def test_an_unreachable_hub_is_one_line(hub):
    server, _, mix, folder = hub
    server.shutdown()
    server.server_close()
    done = mix("one.png")
    assert done.code == 2 and done.err.count("\n") == 1 and not (folder / "one.png").exists()
    assert f"hub id '{REPOSITORY}' is not in the cache and the hub cannot be reached" in done.err
