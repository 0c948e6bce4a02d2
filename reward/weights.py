"""What names the weights of a model: hashes of what is loaded from a folder, the commit of a hub id."""

import contextlib
import functools
import os
from pathlib import Path

from reward.store import MANIFEST, content_key, fingerprint

_LOADED = {
    ".safetensors",
    ".json",
    ".model",
    ".txt",
    ".jinja",
    ".tiktoken",
}  # endings of what is loaded


def is_local(path: str) -> bool:
    """Whether a model path means a folder on this machine rather than a hub id."""
    return path.startswith((".", "/", "~")) or Path(os.path.expanduser(path)).is_dir()


def content(path: str, revision: str | None, cache: Path | None) -> str:
    """Hash of what is loaded from a local folder, wherever it stands; id and commit of anything on the hub.

    An adapter's base is not in it: of a reward model see `reward.classifier.identity`.
    """
    if not is_local(path):
        return f"{path}@{hub_commit(path, revision)}"
    # Not the key in its manifest: a model trained again, or edited by hand, has other bytes under the same key.
    folder = Path(os.path.expanduser(path))
    files = [file for file in folder.glob("*") if file.suffix in _LOADED and file.name != MANIFEST]
    files += folder.glob("additional_chat_templates/*.jinja")
    known = cache and cache / "fingerprints.json"
    return content_key(
        sorted((str(file.relative_to(folder)), fingerprint(file, known)) for file in files)
    )


@functools.cache
def hub_commit(repository: str, revision: str | None, kind: str = "model") -> str:
    """The commit that a hub revision means: asked from the hub, else from the local cache, else the name itself."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    if not constants.HF_HUB_OFFLINE:
        with contextlib.suppress(Exception):  # any network trouble: the cache decides
            from huggingface_hub import HfApi

            info = HfApi().repo_info(repository, revision=revision, repo_type=kind, timeout=5)
            return str(info.sha)
    folder = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repository, repo_type=kind)
    ref = folder / "refs" / (revision or "main")
    return ref.read_text().strip() if ref.is_file() else (revision or "main")
