"""The hub path: the real huggingface_hub client against a small server that speaks the hub's API on this machine."""

import hashlib
import json
import os
import socket
import struct
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import numpy as np
import pytest
from conftest import TINY, run
from PIL import Image
from safetensors.torch import load, save

REPOSITORY, COMMIT = "someone/tiny-mix", "0123456789abcdef0123456789abcdef01234567"
EARLIER = "fedcba9876543210fedcba9876543210fedcba98"  # the commit of the revision v1, which has other options
OLD = "someone/old-name"  # as the repository was called before
EXTRA = {
    "README.md": b"a model card",
    "unet/diffusion_pytorch_model.bin": b"a pickle",
    "safety_checker/config.json": b"{}",
    "tokenizer/training.log": b"no file of a tokenizer",
    "vae/diffusion_pytorch_model.fp16.safetensors": b"another precision",
}
UNET, VAE = "unet/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.safetensors"


def facts(name: str, body: bytes) -> dict:
    """What the hub lists of a file. In git there is, for a large one, a pointer with its sha256."""
    in_git, listed = body, {"rfilename": name, "size": len(body)}
    if name.endswith(".safetensors"):
        sha256 = hashlib.sha256(body).hexdigest()
        in_git = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {len(body)}\n".encode()
        listed["lfs"] = {"sha256": sha256, "size": len(body), "pointerSize": len(in_git)}
    return listed | {"blobId": hashlib.sha1(b"blob %d\0" % len(in_git) + in_git).hexdigest()}


class Hub(BaseHTTPRequestHandler):
    """What huggingface_hub asks for: a revision's facts by GET, files by HEAD and GET."""

    names: dict[str, str]  # of a revision -> commit
    commits: dict[str, dict[str, bytes]]  # commit -> files
    served: list[str]
    fault: tuple[str, str, Callable] | None = None  # method, end of the path, what answers in place of the hub

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
        if self.fault and self.command == self.fault[0] and path.endswith(self.fault[1]):
            self.fault[2](self, *self.find(path))
        else:
            self.answer(*self.find(path))

    do_HEAD = do_GET

    def find(self, path: str) -> tuple[bytes, dict[str, str], int]:
        """The body, headers and status of an answer."""
        if OLD in path:
            return b"", {"Location": self.path.replace(OLD, REPOSITORY)}, 307
        for revision, commit in [*self.names.items(), *zip(self.commits, self.commits)]:
            files = self.commits[commit]
            if path == f"/api/models/{REPOSITORY}/revision/{revision}":
                all_facts = {"id": REPOSITORY, "sha": commit, "siblings": [facts(n, b) for n, b in files.items()]}
                return json.dumps(all_facts).encode(), {"Content-Type": "application/json"}, 200
            name = path.removeprefix(f"/{REPOSITORY}/resolve/{revision}/")
            if name in files:
                if self.command == "GET":
                    self.served.append(name)
                listed = facts(name, files[name])
                etag = listed["lfs"]["sha256"] if "lfs" in listed else listed["blobId"]
                return files[name], {"ETag": f'"{etag}"', "X-Repo-Commit": commit}, 200
        is_known = path.startswith(f"/api/models/{REPOSITORY}/revision/")
        return b"{}", {"X-Error-Code": "RevisionNotFound" if is_known else "RepoNotFound"}, 404


def says(status: int, **headers: str) -> Callable:
    return lambda hub, *_: hub.answer(b"{}", {name.replace("_", "-"): value for name, value in headers.items()}, status)


def page(hub: Hub, *_):
    """A network's sign-in page."""
    hub.answer(b"<html>Welcome to our wireless network", {"Content-Type": "text/html"})


def cut(hub: Hub, body: bytes, headers: dict[str, str], status: int):
    """Half a file, then the connection is reset."""
    hub.answer(body[: len(body) // 2], headers | {"Content-Length": str(len(body))}, status)
    hub.wfile.flush()
    hub.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    hub.connection.close()


def stutter(hub: Hub, body: bytes, headers: dict[str, str], status: int):
    """Half a file and an end; all of it when the client comes back."""
    part = body[: len(body) // 2] if hub.served.count(UNET) == 1 else body
    hub.answer(part, headers | {"Content-Length": str(len(body))}, status)
    hub.close_connection = True


def flipped(hub: Hub, body: bytes, headers: dict[str, str], status: int):
    """A file of the right size with one bit that is another."""
    hub.answer(body[:-9] + bytes([body[-9] ^ 1]) + body[-8:], headers, status)


def huge(hub: Hub, body: bytes, headers: dict[str, str], status: int):
    """The facts, with one file larger than any disk."""
    listed = json.loads(body)
    next(file for file in listed["siblings"] if file["rfilename"] == UNET)["size"] = 10**18
    hub.answer(json.dumps(listed).encode(), headers, status)


def parameters(path):
    return json.loads(Image.open(path).info["magicmix"])["parameters"]


@pytest.fixture
def hub(tmp_path):
    files = {str(p.relative_to(TINY)): p.read_bytes() for p in TINY.rglob("*") if p.is_file() and p.name != "README.md"}
    commits = {COMMIT: files | EXTRA, EARLIER: files | {"magicmix.json": b'{"nu": 0.2}'}}
    names = {"main": COMMIT, "v1": EARLIER}
    handler = type("Handler", (Hub,), {"names": names, "commits": commits, "served": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    Thread(target=server.serve_forever, daemon=True).start()
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_")} | {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_XET": "1",
    }

    def mix(name, source=REPOSITORY, *more, **variables):
        options = ("--layout-prompt", "a house", "--steps", "4", "--size", "64", "--weights", source, "-o", name)
        return run("a tiger", *options, *more, cwd=tmp_path, environment=environment | variables)

    yield server, handler, mix, tmp_path
    server.shutdown()
    server.server_close()


def line(done, folder, name="one.png", source=REPOSITORY) -> str:
    """The one line of a run that was refused, from the hub id on."""
    start = f"magicmix: hub id {source!r}: "
    assert done.code == 2 and done.err.count("\n") == 1 and done.err.startswith(start), done.err
    assert not (folder / name).exists()
    return done.err.removeprefix(start).rstrip()


# ------------------------------------------------------------------------------------------------------ what is fetched


def test_first_use_fetches_what_is_needed_and_second_use_needs_no_hub(hub):
    server, handler, mix, folder = hub
    first = mix("one.png")
    assert first.code == 0, first.err
    assert set(handler.served) == set(handler.commits[COMMIT]) - set(EXTRA), "all that is needed, no more"
    server.shutdown()
    server.server_close()
    second = mix("two.png")
    assert second.code == 0, second.err
    assert "the hub cannot be reached (ConnectError); the copy in the cache is used" in second.err
    assert (folder / "one.png").read_bytes() == (folder / "two.png").read_bytes()


def test_a_revision_is_asked_for(hub):
    _, _, mix, folder = hub
    for name, source in (("now", REPOSITORY), ("v1", f"{REPOSITORY}@v1"), ("commit", f"{REPOSITORY}@{EARLIER}")):
        done = mix(f"{name}.png", source)
        assert done.code == 0, done.err
    assert [parameters(folder / f"{name}.png")["nu"] for name in ("now", "v1", "commit")] == [0.7, 0.2, 0.2]
    source = f"{REPOSITORY}@gone"
    error = line(mix("one.png", source), folder, source=source)
    assert error == "it has no revision 'gone'; give a branch, a tag or a commit after the @"


def test_the_raw_weights_and_shards_are_fetched_where_they_are_asked_for(hub):
    """--no-ema takes the file of the raw weights; a part in shards needs its index and all of them."""
    _, handler, mix, folder = hub
    files = handler.commits[COMMIT]
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
    assert {name for name in handler.served if stem in name} == {f"{stem}.non_ema.safetensors"}
    handler.served.clear()
    handler.fault = ("GET", "-00002-of-00002.safetensors", cut)
    assert "broke off" in line(mix("one.png"), folder)
    assert "no whole copy of it is in the cache" in line(mix("one.png", HF_HUB_OFFLINE="1"), folder)
    handler.fault = None
    done = mix("averaged.png")
    assert done.code == 0, done.err
    shards = {f"{stem}-0000{i}-of-00002.safetensors" for i in (1, 2)}
    assert {name for name in handler.served if stem in name} == {index, *shards}
    assert run("a tiger", "--layout-prompt", "a house", "--steps", "4", "--size", "64", cwd=folder).code == 0
    assert np.array_equal(*(np.asarray(Image.open(folder / name)) for name in ("mix.png", "averaged.png")))


def test_a_renamed_repository_is_found(hub):
    """The hub redirects from the old name."""
    _, _, mix, folder = hub
    for name, variables in (("one", {}), ("two", {"HF_HUB_OFFLINE": "1"})):
        done = mix(f"{name}.png", OLD, **variables)
        assert done.code == 0 and "hub" not in done.err, done.err
    assert (folder / "one.png").read_bytes() == (folder / "two.png").read_bytes()


# ----------------------------------------------------------------------------------------- when the hub does not answer

LOG_IN = "log in (hf auth login, or HF_TOKEN)"
REFUSALS = {
    "missing": (says(404, X_Error_Code="RepoNotFound"), f"check the name, or {LOG_IN} if it is private"),
    "missing, not logged in": (says(401, X_Error_Code="RepoNotFound"), f"check the name, or {LOG_IN} if it is private"),
    "gated, not logged in": (says(401, X_Error_Code="GatedRepo"), f"/{REPOSITORY} and {LOG_IN}"),
    "gated, no access": (says(403, X_Error_Code="GatedRepo"), "it is gated; accept its licence at http"),
    "token": (says(401, X_Error_Message="Invalid credentials in Authorization header"), f"your token; {LOG_IN} again"),
    "forbidden": (says(403), f"the hub refuses (403); {LOG_IN} as someone with access, or take another"),
    "closed": (says(403, X_Error_Message="Access to this resource is disabled."), "it is closed; take another"),
}
TROUBLES = {
    "busy": (says(429), "the hub is busy (429)", "; wait five minutes and try again, or log in"),
    "down": (says(503), "the hub is in trouble (503)", "; try again later, or give a folder that is there"),
    "page": (page, "is not the hub", "; sign in to this network, or check HF_ENDPOINT"),
}


@pytest.mark.parametrize("kind", REFUSALS)
def test_the_hub_says_no(hub, kind):
    """One line says what to do."""
    _, handler, mix, folder = hub
    handler.fault = ("GET", "/revision/main", REFUSALS[kind][0])
    assert REFUSALS[kind][1] in line(mix("one.png"), folder)


@pytest.mark.parametrize("kind", TROUBLES)
def test_the_hub_is_in_trouble(hub, kind):
    """One line says what to do; a whole copy in the cache is used, and one line says that."""
    _, handler, mix, folder = hub
    fault, problem, fix = TROUBLES[kind]
    handler.fault = ("GET", "/revision/main", fault)
    error = line(mix("one.png"), folder)
    assert f"{problem}, and no whole copy of it is in the cache{fix}" in error
    handler.fault = None
    assert mix("one.png").code == 0
    handler.fault = ("GET", "/revision/main", fault)
    done = mix("two.png")
    assert done.code == 0 and done.err.count("magicmix: hub id") == 1, done.err
    assert f"{problem}; the copy in the cache is used" in done.err
    assert (folder / "one.png").read_bytes() == (folder / "two.png").read_bytes()


def test_an_unreachable_hub_is_one_line(hub):
    server, _, mix, folder = hub
    server.shutdown()
    server.server_close()
    error = line(mix("one.png"), folder)
    problem = "the hub cannot be reached (ConnectError), and no whole copy of it is in the cache"
    assert error == f"{problem}; connect once, or give a folder that is there"


def test_offline(hub):
    """Without a copy, with a copy of another revision, and with one."""
    _, handler, mix, folder = hub
    none = "HF_HUB_OFFLINE is set, and no whole copy of it is in the cache"
    fix = "; unset it and connect once, or give a folder that is there"
    assert line(mix("one.png", HF_HUB_OFFLINE="1"), folder) == none + fix
    assert mix("v1.png", f"{REPOSITORY}@v1").code == 0
    assert line(mix("one.png", HF_HUB_OFFLINE="1"), folder) == f"{none} (there is one of v1){fix}"
    done = mix("two.png", f"{REPOSITORY}@v1", HF_HUB_OFFLINE="1")
    assert done.code == 0 and "hub" not in done.err, done.err
    assert parameters(folder / "two.png")["nu"] == 0.2


@pytest.mark.parametrize("source", ["models/sd15", "../sd15", "sd15/v1.git"])
def test_a_path_that_is_not_there(hub, source):
    """It may be a hub id as well; the line names both."""
    _, _, mix, folder = hub
    error = line(mix("one.png", source), folder, source=source)
    assert error.startswith("there is no such folder, and ") and "; check the " in error


# ----------------------------------------------------------------------------------------------- when a download fails

FAILURES = {
    "gated": (("HEAD", UNET, says(401, X_Error_Code="GatedRepo")), "it is gated; accept its licence at "),
    "listed only": (
        ("HEAD", "unet/config.json", says(404, X_Error_Code="EntryNotFound", X_Repo_Commit=COMMIT)),
        "the hub lists unet/config.json and does not have it; try again, or take another revision",
    ),
    "no hub": (("HEAD", UNET, page), "is not the hub; sign in to this network, or check HF_ENDPOINT"),
    "cut": (("GET", UNET, cut), f"the download of {UNET} broke off (ReadError); try again"),
    "page": (("GET", VAE, page), f"the download of {VAE} broke off (OSError); try again"),
    "weights": (("GET", VAE, flipped), f"{VAE} does not match its checksum and was deleted; try again"),
    "config": (
        ("GET", "tokenizer_config.json", flipped),
        "tokenizer/tokenizer_config.json does not match its checksum",
    ),
    "full disk": (("GET", "/revision/main", huge), "it takes 1,000,000,0"),
}


@pytest.mark.parametrize("kind", FAILURES)
def test_a_download_fails(hub, kind):
    """One line; the earlier copy still works without the hub, and the next run with it."""
    _, handler, mix, folder = hub
    files = handler.commits[COMMIT]
    for name in (UNET, VAE):  # changed, so that they are fetched again
        files[name] = save({n: 0.99 * tensor for n, tensor in load(files[name]).items()})
    files |= {name: files[name] + b"\n" for name in ("tokenizer/tokenizer_config.json", "unet/config.json")}
    handler.names["main"] = EARLIER
    assert mix("earlier.png").code == 0
    handler.names["main"], (handler.fault, expected) = COMMIT, FAILURES[kind]
    error = line(mix("one.png"), folder)
    assert expected in error and error.endswith("; HF_HUB_OFFLINE=1 uses the copy in the cache"), error
    assert mix("again.png", HF_HUB_OFFLINE="1").code == 0
    assert (folder / "again.png").read_bytes() == (folder / "earlier.png").read_bytes()
    of_commit = f"{REPOSITORY}@{COMMIT}"
    assert "no whole copy" in line(mix("one.png", of_commit, HF_HUB_OFFLINE="1"), folder, source=of_commit)
    handler.fault = None
    done = mix("now.png")
    assert done.code == 0 and "hub" not in done.err, done.err
    assert parameters(folder / "now.png")["nu"] == 0.7


def test_a_cut_that_the_client_mends_is_no_line(hub):
    _, handler, mix, folder = hub
    handler.fault = ("GET", UNET, stutter)
    done = mix("one.png")
    assert done.code == 0 and handler.served.count(UNET) == 2
    assert "resume" not in done.err and "hub" not in done.err, done.err


def test_a_cache_that_cannot_be_used(hub):
    _, _, mix, folder = hub
    (folder / "file").write_bytes(b"")
    error = line(mix("one.png", HF_HOME=str(folder / "file" / "home")), folder)
    assert error.endswith("cannot be used (Not a directory); make room there or allow it, or set HF_HOME elsewhere")


def test_a_file_that_became_shorter_in_the_cache_is_fetched_again(hub):
    _, handler, mix, folder = hub
    assert mix("one.png").code == 0
    (vae,) = (folder / "home").glob(f"hub/*/snapshots/{COMMIT}/{VAE}")
    with open(vae, "r+b") as file:
        file.truncate(1000)
    handler.served.clear()
    done = mix("two.png")
    assert done.code == 0 and handler.served == [VAE], done.err
    assert (folder / "one.png").read_bytes() == (folder / "two.png").read_bytes()


# ------------------------------------------------------------------------------------------- what a repository may lack

SINGLE = f"give the path that 'hf download {REPOSITORY} v1-5.safetensors' prints"
LACKING = {
    "pickles": (
        lambda files: {n.replace(".safetensors", ".bin"): b for n, b in files.items()},
        "it has pickles (text_encoder/model.bin) and no safetensors, and pickles run code when they are opened; "
        "take another, or write it as safetensors with diffusers' save_pretrained and give that",
    ),
    "one pickle": (lambda files: {"v1-5.ckpt": b"a pickle"}, "it has pickles (v1-5.ckpt) and no safetensors, and "),
    "scheduler": (
        lambda files: {n: b for n, b in files.items() if "scheduler" not in n},
        "it lacks scheduler/scheduler_config.json; take another, or make it whole in a folder and give that",
    ),
    "vae": (
        lambda files: {n: b for n, b in files.items() if "vae" not in n},
        f"it lacks vae/config.json, {VAE}; take another, or make it whole in a folder and give that",
    ),
    "single": (
        lambda files: {"README.md": b"", "v1-5.safetensors": b"", "v1-5-pruned.ckpt": b""},
        f"it holds single files only: v1-5.safetensors; {SINGLE}",
    ),
    "single beside pickles": (
        lambda files: {n.replace(".safetensors", ".bin"): b for n, b in files.items()} | {"v1-5.safetensors": b""},
        "it has pickles (text_encoder/model.bin) and no safetensors, and pickles run code when they are opened; "
        + SINGLE,
    ),
    "another thing": (
        lambda files: {"config.json": b"{}", "model.gguf": b""},
        "it has no model in the diffusers format, and no single file; take another, ",
    ),
}


@pytest.mark.parametrize("kind", LACKING)
def test_a_repository_that_is_not_whole(hub, kind):
    """It is refused before anything is fetched."""
    _, handler, mix, folder = hub
    change, expected = LACKING[kind]
    handler.commits[COMMIT] = change(handler.commits[EARLIER])
    assert line(mix("one.png"), folder).startswith(expected)
    assert handler.served == []


def test_a_repository_without_a_tokenizer_is_fetched(hub):
    """CLIP's own may do: that is decided when the folder is opened."""
    _, handler, mix, _ = hub
    handler.commits[COMMIT] = {n: body for n, body in handler.commits[EARLIER].items() if "tokenizer" not in n}
    mix("one.png")
    assert set(handler.served) == set(handler.commits[COMMIT])
