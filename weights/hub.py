"""Checkpoints by hub id: the files that are needed, through huggingface_hub and its cache."""

import re
from pathlib import Path

from weights.files import STEMS, CheckpointError

HUB_ID = re.compile(r"(?P<id>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w./-]+))?")


def fetch(source: str, half: bool, ema: bool) -> Path:
    """A hub id, optionally @revision, as a local folder: the needed files are fetched into huggingface_hub's cache
    with its progress bars, and come from there when the hub cannot be reached. Raises CheckpointError."""
    from huggingface_hub import HfApi, snapshot_download, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError

    m = HUB_ID.fullmatch(source)
    repository, revision = m["id"], m["revision"]
    small = ["model_index.json", "magicmix.json", "concepts.json", "scheduler/scheduler_config.json", "tokenizer/*"]
    small += [f"{part}/config.json" for part in STEMS]
    try:
        facts = HfApi().model_info(repository, revision=revision, timeout=10)
    except Exception as error:  # whatever the client's HTTP library of the day raises when there is no connection
        if isinstance(error, HfHubHTTPError) and error.response is not None and error.response.status_code < 500:
            raise CheckpointError(f"hub id {source!r}: the hub answers {str(error).splitlines()[0]}") from None
        cached = try_to_load_from_cache(repository, "unet/config.json", revision=revision)
        if isinstance(cached, str):
            return Path(cached).parent.parent
        raise CheckpointError(
            f"hub id {source!r} is not in the cache and the hub cannot be reached ({type(error).__name__}); "
            "connect once, or give a folder"
        ) from None
    names, wanted = [file.rfilename for file in facts.siblings], []
    for part, stem in STEMS.items():
        order = [f"{stem}.fp16", stem] if half else [stem, f"{stem}.fp16"]
        order = order if ema else [f"{stem}.non_ema", *order]
        for name in order:
            shards = re.compile(rf"{part}/{re.escape(name)}(-\d+-of-\d+)?\.safetensors")
            if found := [n for n in names if shards.fullmatch(n)]:
                wanted += found + [n for n in names if n.startswith(f"{part}/") and ".index." in n]
                break
        else:
            raise CheckpointError(f"hub id {source!r} has no safetensors file for {part}; choose a repository that has")
    return Path(snapshot_download(repository, revision=revision, allow_patterns=small + wanted))
