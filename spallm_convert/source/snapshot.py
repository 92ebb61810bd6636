"""Find the folder of a checkpoint of the Hub in the cache, with the small files that describe it.

transformers downloads the weights that it loads. If a repository has a single shard, it never asks
for an index, so a repository with both looks in the cache like one with a single shard.
"""

from __future__ import annotations

import contextlib
import re
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

from spallm_convert.errors import FormatError
from spallm_formats import CONFIG_FILE, INDEX_FILE

#: The folder of a revision in the cache of huggingface_hub, and a folder of the repository in it.
_SNAPSHOT = re.compile(
    r"(?P<cache>.*)/models--(?P<repo>[^/]+)/snapshots/(?P<commit>[0-9a-f]{40})(/(?P<inside>.+))?"
)


def download_description(model: str, **options: Any) -> Path:
    """Download the config of a model, and its index if it has one.

    Args:
        model: Id on the Hub.
        options: Options of `hf_hub_download`, such as `revision`, `subfolder` or `token`.

    Returns:
        The folder in the cache that holds them.

    Raises:
        FormatError: If the repository has no config.
        Exception: Any error of huggingface_hub.
    """
    try:
        folder = Path(hf_hub_download(model, CONFIG_FILE, **options)).parent
    except LocalEntryNotFoundError:  # the Hub was not asked
        raise
    except EntryNotFoundError as error:
        raise FormatError(f"{model}: no {CONFIG_FILE} in the repository") from error
    ask_for_index(folder, token=options.get("token"))
    return folder


def ask_for_index(folder: Path, **options: Any) -> None:
    """Download the index of a checkpoint in the cache if the repository has one.

    This is one request, or none if the cache knows. Do nothing for any other folder.

    Args:
        folder: Folder of the checkpoint.
        options: Options of `hf_hub_download`, such as `token`.

    Raises:
        Exception: Any error of huggingface_hub, except that it cannot find the index.
    """
    found = _SNAPSHOT.fullmatch(folder.as_posix())
    if found is None:
        return
    repo = found["repo"].replace("--", "/")
    name = "/".join(filter(None, [found["inside"], INDEX_FILE]))
    place: dict[str, Any] = {"cache_dir": found["cache"], "revision": found["commit"]}
    if try_to_load_from_cache(repo, name, **place) is None:
        with contextlib.suppress(EntryNotFoundError):
            hf_hub_download(repo, name, **place, **options)
