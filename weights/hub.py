"""Checkpoints by hub id: the files that are needed, through huggingface_hub and its cache.

Files are fetched for the commit that the revision names today, and compared with the hub's checksums. Only when all are
there does the revision name that commit in the cache too: a fetch that fails leaves the earlier copy in use.
"""

import hashlib
import re
import shutil
import warnings
from pathlib import Path

from weights.files import STEMS, CheckpointError

HUB_ID = re.compile(r"(?P<id>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w./-]+))?")
CONFIG = "unet/config.json"
NEEDED = {"scheduler/scheduler_config.json", *(f"{part}/config.json" for part in STEMS)}
TAKEN = re.compile(r"(model_index|magicmix|concepts)\.json|tokenizer/[\w.-]+\.(json|txt)")  # where they are there
PICKLED = re.compile(r"(?P<folder>[^/]*?)/?[^/]+\.(ckpt|bin|pt|pth)")
LOG_IN = "log in (hf auth login, or HF_TOKEN)"


def fetch(source: str, half: bool, ema: bool) -> Path:
    """A hub id, optionally @revision, as a local folder: the needed files are fetched into huggingface_hub's cache
    with its progress bars. When the hub cannot be asked, a whole copy in the cache is used, with a warning.

    Raises CheckpointError that says what to do.
    """
    from huggingface_hub import HfApi, errors, logging

    logging.set_verbosity_error()  # the client has a line for each of its retries; one at the end is enough
    m = HUB_ID.fullmatch(source)
    repository, revision = m["id"], m["revision"] or "main"
    copy = None
    try:
        copy = cached_copy(repository, revision, half, ema)
        facts = HfApi().model_info(repository, revision=revision, files_metadata=True, timeout=10)
        files = {file.rfilename: file for file in facts.siblings}
    except Exception as error:  # whatever the client's HTTP library of the day raises when there is no connection
        problem, fix = explain(error, repository, revision)
        if is_refusal(error):
            raise CheckpointError(f"hub id {source!r}: {problem}; {fix}{hint(copy)}") from None
        if copy is None:
            problem += f", and no whole copy of it is in the cache{others(repository, half, ema)}"
            raise CheckpointError(f"hub id {source!r}: {problem}; {fix}") from None
        if not isinstance(error, errors.OfflineModeIsEnabled):
            warnings.warn(f"hub id {source!r}: {problem}; the copy in the cache is used", stacklevel=2)
        return copy
    wanted, lacking = choose(set(files), half, ema)
    if lacking:
        raise CheckpointError(f"hub id {source!r}: {obstacle(repository, revision, sorted(files), lacking)}")
    try:
        return download(repository, revision, facts.sha, [files[name] for name in wanted])
    except CheckpointError as error:
        raise CheckpointError(f"hub id {source!r}: {error}{hint(copy)}") from None


# ------------------------------------------------------------------------------------------------ a repository's files


def choose(names: set[str], half: bool, ema: bool) -> tuple[list[str], list[str]]:
    """Which of a repository's files are read, the small ones first, and which it lacks for that."""
    wanted = sorted(name for name in names if name in NEEDED or TAKEN.fullmatch(name))
    lacking = sorted(NEEDED - names)
    variants = ([] if ema else [".non_ema"]) + ([".fp16", ""] if half else ["", ".fp16"])
    for part, stem in STEMS.items():
        for variant in variants:
            whole, index = f"{part}/{stem}{variant}.safetensors", f"{part}/{stem}.safetensors.index{variant}.json"
            if whole in names:
                wanted.append(whole)
                break
            shard = re.compile(rf"{part}/{re.escape(stem + variant)}-\d+-of-(\d+)\.safetensors")
            shards = [m for m in map(shard.fullmatch, sorted(names)) if m]
            if index in names and {len(shards)} == {int(m[1]) for m in shards}:
                wanted += [index, *(m[0] for m in shards)]
                break
        else:
            lacking.append(f"{part}/{stem}.safetensors")
    return wanted, lacking


def obstacle(repository: str, revision: str, names: list[str], lacking: list[str]) -> str:
    """Why a repository that lacks these files cannot be used, and what can."""
    single = [name for name in names if "/" not in name and name.endswith(".safetensors")]
    places = {name.split("/")[0] for name in lacking if name.endswith(".safetensors")}
    if NEEDED <= set(lacking):
        places.add("")  # no folder of the diffusers format: the checkpoint may be a single file at the top
    pickles = [m[0] for m in map(PICKLED.fullmatch, names) if m and m["folder"] in places]
    if single and "" in places:
        problem = f"it holds single files only: {', '.join(single[:3])}{' ...' if len(single) > 3 else ''}"
    elif pickles:
        problem = f"it has pickles ({pickles[0]}) and no safetensors, and pickles run code when they are opened"
    elif "" in places:
        problem = "it has no model in the diffusers format, and no single file"
    else:
        problem = f"it lacks {', '.join(lacking)}"
    if single:
        at = "" if revision == "main" else f" --revision {revision}"
        return f"{problem}; give the path that 'hf download {repository} {single[0]}{at}' prints"
    how = "write it as safetensors with diffusers' save_pretrained" if pickles else "make it whole in a folder"
    return f"{problem}; take another, or {how} and give that"


def download(repository: str, revision: str, commit: str, files: list) -> Path:
    """Fetches what the cache lacks of a commit's files, then has the revision name that commit in the cache.

    Args:
        repository, revision: what was asked for.
        commit: what the revision names.
        files: huggingface_hub's RepoSibling of each file that is needed: its name, size and checksum.

    Returns the folder. Raises CheckpointError.
    """
    from huggingface_hub import constants

    folder = cached_folder(repository, commit)
    cached = {name: folder / name for name in (f.rfilename for f in files) if folder and (folder / name).is_file()}
    new = [f for f in files if f.rfilename not in cached or f.size not in (None, cached[f.rfilename].stat().st_size)]
    place = Path(constants.HF_HUB_CACHE).resolve()
    disk = next(folder for folder in (place, *place.parents) if folder.exists())
    size, free = sum(file.size or 0 for file in new), shutil.disk_usage(disk).free
    if size > free:
        raise CheckpointError(f"it takes {size:,} bytes, and {place} has room for {free:,}; make room, or set HF_HOME")
    for file in new:
        again = file.rfilename in cached  # in another size: it is replaced when the new one is whole
        path = get(repository, commit, file.rfilename, force_download=again)
        if not is_sound(path, file):
            path.resolve().unlink()
            path.unlink(missing_ok=True)
            raise CheckpointError(f"{file.rfilename} does not match its checksum and was deleted; try again")
    folder = cached_folder(repository, commit)
    if cached_folder(repository, revision) != folder:
        get(repository, revision, CONFIG)  # its file is there by now; this writes down what the revision names
    return folder


def get(repository: str, revision: str, name: str, **options) -> Path:
    """One file, from the cache or the hub. Raises CheckpointError."""
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(repository, name, revision=revision, **options))
    except Exception as error:  # as in fetch
        raise CheckpointError("; ".join(explain(error, repository, revision, name))) from None


def is_sound(path: Path, file) -> bool:
    """Whether a file has the checksum that the hub lists for it: the sha256 of a large one, git's own of a small."""
    with open(path, "rb") as content:
        if file.lfs:
            return hashlib.file_digest(content, "sha256").hexdigest() == file.lfs.sha256
        data = content.read()
    return file.blob_id in (None, hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest())


# ------------------------------------------------------------------------------------------------------------ the cache


def cached_folder(repository: str, revision: str) -> Path | None:
    """The folder in the cache that the revision names there, whatever is in it."""
    from huggingface_hub import errors, snapshot_download

    try:
        return Path(snapshot_download(repository, revision=revision, local_files_only=True, allow_patterns=[]))
    except errors.LocalEntryNotFoundError:
        return None


def cached_copy(repository: str, revision: str, half: bool, ema: bool) -> Path | None:
    """The same, if all that is needed is in it."""
    folder = cached_folder(repository, revision)
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} if folder else set()
    return None if choose(names, half, ema)[1] else folder


def hint(copy: Path | None) -> str:
    return "; HF_HUB_OFFLINE=1 uses the copy in the cache" if copy else ""


def others(repository: str, half: bool, ema: bool) -> str:
    """The revisions of a repository that the cache has whole copies of, for a message that the one asked for is none
    of them."""
    from huggingface_hub import CacheNotFound, scan_cache_dir

    try:
        found = [r for repo in scan_cache_dir().repos if repo.repo_id == repository for r in repo.revisions]
    except CacheNotFound:
        return ""
    named = sorted(name for r in found for name in r.refs or {r.commit_hash})
    whole = [name for name in named if cached_copy(repository, name, half, ema)]
    return f" (there is one of {', '.join(whole)})" if whole else ""


# ----------------------------------------------------------------------------------------------------- what goes wrong


def status(error: Exception) -> int:
    """The HTTP status of the hub's answer; 0 where there was none."""
    return getattr(getattr(error, "response", None), "status_code", 0)


def is_refusal(error: Exception) -> bool:
    """Whether the hub or this machine says no; a copy in the cache does not stand in for that."""
    from huggingface_hub.errors import HFValidationError

    is_local = isinstance(error, HFValidationError) or getattr(error, "errno", None) is not None
    return is_local or (400 <= status(error) < 500 and status(error) != 429)


def explain(error: Exception, repository: str, revision: str, name: str = "") -> tuple[str, str]:
    """An error of the client: (what it means, what to do). `name` is the file that was being fetched."""
    from huggingface_hub import constants, errors

    while type(error) in (errors.LocalEntryNotFoundError, ValueError) and error.__cause__:
        error = error.__cause__  # what the client has wrapped
    hub = constants.ENDPOINT
    match error:
        case errors.HFValidationError():
            return "there is no such folder, and the hub has no ids like it", "check the path"
        case errors.GatedRepoError():  # 401 for those who are not logged in, 403 for others
            return "it is gated", f"accept its licence at {hub}/{repository} and {LOG_IN}"
        case errors.RepositoryNotFoundError():  # 401 and 404, also for what is private
            known = f"there is no such folder, and no such repository that you may see at {hub}"
            return known, f"check the name, or {LOG_IN} if it is private"
        case errors.RevisionNotFoundError():
            return f"it has no revision {revision!r}", "give a branch, a tag or a commit after the @"
        case errors.EntryNotFoundError():
            return f"the hub lists {name} and does not have it", "try again, or take another revision"
        case errors.DisabledRepoError():
            return "it is closed", "take another"
        case errors.OfflineModeIsEnabled():
            return "HF_HUB_OFFLINE is set", "unset it and connect once, or give a folder that is there"
        case errors.HfHubHTTPError() if status(error) == 401:
            return "the hub does not accept your token", f"{LOG_IN} again"
        case errors.HfHubHTTPError() if status(error) == 429:
            return "the hub is busy (429)", f"wait five minutes and try again, or {LOG_IN}, which gets you more"
        case errors.HfHubHTTPError() if status(error) >= 500:
            return f"the hub is in trouble ({status(error)})", "try again later, or give a folder that is there"
        case errors.HfHubHTTPError():
            return f"the hub refuses ({status(error)})", f"{LOG_IN} as someone with access, or take another"
        case errors.FileMetadataError() | ValueError() | TypeError() | KeyError() | AttributeError():
            return f"what answers at {hub} is not the hub", "sign in to this network, or check HF_ENDPOINT"
        case OSError(errno=int()):
            place = f"the cache {constants.HF_HUB_CACHE} cannot be used ({error.strerror})"
            return place, "make room there or allow it, or set HF_HOME elsewhere"
    if name:
        return f"the download of {name} broke off ({type(error).__name__})", "try again"
    return f"the hub cannot be reached ({type(error).__name__})", "connect once, or give a folder that is there"
