"""The one door to the Hugging Face hub: pinned, verified, resumable downloads; and uploads.

Each file is compared with the checksum that the hub lists for it, a sha256 for files in LFS and a
git blob id for the others. A file that differs is deleted and never used.

Files are fetched one by one with `hf_hub_download`, not with `snapshot_download`: each is verified
and recorded as soon as it is complete, so that a killed job of hundreds of GB neither fetches nor
hashes what it had, and a server error is retried for one file only.
"""

import hashlib
import inspect
import json
import logging
import os
import re
import shutil
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import HfApi, constants, hf_hub_download
from huggingface_hub.hf_api import RepoFile
from tqdm import tqdm

from flame.data.archives import refuse_outside
from flame.data.hub_client import UnreachableError, endpoint, explained, with_retries
from flame.runtime import progress
from flame.runtime.checksums import sha256
from flame.runtime.disk import check_room, room
from flame.runtime.errors import known
from flame.runtime.lease import alone
from flame.runtime.resumable import write_atomic

log = logging.getLogger(__name__)

Kind = Literal["dataset", "model"]

SOURCE = ".flame-source.json"  # in a folder: repository, commit and listed checksums of its files
COMMIT = re.compile(r"[0-9a-f]{40}")
BLOCK = 1 << 20  # bytes read at a time
MB = 10**6
WORKERS = 8  # files fetched at a time


@dataclass
class _Snapshot:
    """What is known of a repository at one commit, kept beside its files."""

    repo: str
    kind: str
    revision: str
    commit: str
    tree: dict[str, dict[str, Any]]
    verified: list[str]

    def save(self, folder: Path) -> None:
        write_atomic(folder / SOURCE, json.dumps(vars(self), indent=1).encode())

    @classmethod
    def load(cls, folder: Path) -> "_Snapshot | None":
        path = folder / SOURCE
        return cls(**json.loads(path.read_text())) if path.exists() else None


def download(
    repo: str,
    revision: str,
    files: Sequence[str],
    folder: Path,
    *,
    kind: Kind = "dataset",
    optional: Sequence[str] = (),
) -> Path:
    """Verified files of a repository at a revision; `HF_ENDPOINT` and `HF_TOKEN` are honoured.

    The commit that a branch pointed to is written to `.flame-source.json`; a later call into the
    same folder stays at that commit.

    Args:
        repo: `owner/name`.
        revision: commit hash, branch or tag.
        files: glob patterns, each of which has to match a file.
        folder: where they are written, under their names in the repository.
        kind: of the repository.
        optional: glob patterns that may match nothing.

    Returns:
        The folder.

    Raises:
        ValueError: the repository is gated or unknown, a pattern matches nothing, a file does not
            have the listed checksum, or the hub cannot be reached.
        NoRoomError: the disk is full.
    """
    with alone(folder), explained(repo, revision, kind, folder):
        snapshot = _snapshot(repo, revision, folder, kind)
        names = _matching(files, optional, snapshot)
        unsure = [name for name in names if not _is_verified(folder, name, snapshot)]
        if unsure:
            for name in unsure:
                _remove_broken(folder / name, snapshot.tree[name])
            missing = [name for name in unsure if not (folder / name).is_file()]
            snapshot.verified = sorted({*snapshot.verified, *names}.difference(missing))
            snapshot.save(folder)
            _download(missing, snapshot, folder)
    return folder


def cached(
    repo: str,
    revision: str | None,
    files: Sequence[str],
    *,
    kind: Kind = "model",
    optional: Sequence[str] = (),
) -> Path:
    """The same in a folder of its own below `HF_HOME`; needs no network once it is complete.

    Args:
        repo: `owner/name`.
        revision: commit hash, branch or tag; None: the main branch. A branch is looked up again in
            every call; without network it is what it was in the last one.
        files: glob patterns, each of which has to match a file.
        kind: of the repository.
        optional: glob patterns that may match nothing.

    Returns:
        The folder.

    Raises:
        ValueError: as in `download`.
    """
    home = Path(os.environ.get("HF_HOME") or constants.HF_HOME)
    root = home / "flame" / f"{kind}s--{repo.replace('/', '--')}"
    commit = revision or "main"
    if not COMMIT.fullmatch(commit):
        commit = _resolved(repo, commit, kind, root)
    return download(repo, commit, files, root / commit, kind=kind, optional=optional)


def _resolved(repo: str, revision: str, kind: Kind, root: Path) -> str:
    """Commit of a branch or tag: the hub's, or the last known one if the hub is unreachable."""
    last = root / "refs" / hashlib.sha256(revision.encode()).hexdigest()[:16]
    try:
        with explained(repo, revision, kind, root):
            api = HfApi(endpoint=endpoint())
            info = with_retries(lambda: api.repo_info(repo, repo_type=kind, revision=revision))
    except UnreachableError as error:
        if not last.exists():
            raise
        log.warning("%s; using the last known commit of %s", error, revision)
        return last.read_text()
    assert info.sha is not None
    last.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(last, info.sha.encode())
    return info.sha


def list_files(repo: str, revision: str, folder: Path, *, kind: Kind = "dataset") -> list[str]:
    """Names of all files of a repository at a revision, sorted; none of them is fetched."""
    with alone(folder), explained(repo, revision, kind, folder):
        return sorted(_snapshot(repo, revision, folder, kind).tree)


def commit_of(folder: Path) -> str:
    """Commit of the files in a folder that `download` or `list_files` wrote to."""
    snapshot = _Snapshot.load(folder)
    if snapshot is None:
        raise ValueError(f"{folder} was not fetched from a hub")
    return snapshot.commit


def forget(folder: Path) -> None:
    """Delete the download records of a folder, and keep its files."""
    (folder / SOURCE).unlink(missing_ok=True)
    shutil.rmtree(folder / ".cache", ignore_errors=True)


def verify_cache(repo: str) -> None:
    """Compare what a library put into the hub's own cache with the checksums of the hub.

    For small files, such as tokenizers, that a library fetches by itself.

    Args:
        repo: a model; skipped if none of its files is cached.

    Raises:
        ValueError: a file differs; it was deleted.
    """
    cache = Path(constants.HF_HUB_CACHE)
    for folder in cache.glob(f"models--{repo.replace('/', '--')}/snapshots/*"):
        with explained(repo, folder.name, "model", folder):
            tree = _tree(repo, folder.name, "model")
        for name, listed in tree.items():
            path = folder / name
            if path.is_file():
                found, wanted = _checksums(path, listed)
                if found != wanted:
                    path.resolve().unlink()
                    path.unlink(missing_ok=True)
                    raise ValueError(_broken(repo, name, found, wanted))


def upload(folder: Path, repo: str, *, private: bool, message: str) -> None:
    """Put a folder on the hub as a model; `HF_ENDPOINT` and `HF_TOKEN` are honoured.

    Args:
        folder: whose files are uploaded.
        repo: `owner/name`; created if missing.
        private: whether a repository that is created is visible to its owner only.
        message: of the commit.

    Raises:
        ValueError: the hub refuses or cannot be reached.
    """
    with explained(repo, "main", "model", folder, "upload"):
        api = HfApi(endpoint=endpoint())
        api.create_repo(repo, private=private, exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=folder, commit_message=message)


def _snapshot(repo: str, revision: str, folder: Path, kind: Kind) -> _Snapshot:
    """What the folder's record says, or the hub if there is none."""
    old = _Snapshot.load(folder)
    if old and (old.repo, old.kind, old.revision) == (repo, kind, revision):
        return old
    if old:
        raise ValueError(
            f"{folder} holds {old.kind} {old.repo!r} at {old.revision!r}, not {repo!r} at "
            f"{revision!r}: delete it first"
        )
    api = HfApi(endpoint=endpoint())
    sha = with_retries(lambda: api.repo_info(repo, repo_type=kind, revision=revision).sha)
    assert sha is not None
    snapshot = _Snapshot(repo, kind, revision, sha, _tree(repo, sha, kind), [])
    snapshot.save(folder)
    return snapshot


def _tree(repo: str, commit: str, kind: Kind) -> dict[str, dict[str, Any]]:
    """Size and checksum of every file of a commit, by name."""
    api = HfApi(endpoint=endpoint())
    entries = with_retries(
        lambda: list(api.list_repo_tree(repo, recursive=True, revision=commit, repo_type=kind))
    )
    tree = {}
    for entry in entries:
        if isinstance(entry, RepoFile):
            refuse_outside(entry.path, repo)
            digest = {"sha256": entry.lfs.sha256} if entry.lfs else {"blob": entry.blob_id}
            tree[entry.path] = {"size": entry.lfs.size if entry.lfs else entry.size} | digest
    return tree


def _matching(files: Sequence[str], optional: Sequence[str], snapshot: _Snapshot) -> list[str]:
    names: set[str] = set()
    for pattern in [*files, *optional]:
        found = [name for name in snapshot.tree if fnmatchcase(name, pattern)]
        if not found and pattern in files:
            raise ValueError(
                f"{snapshot.repo!r} at {snapshot.revision!r} has no file "
                + known(pattern, sorted(snapshot.tree)[:20])
            )
        names.update(found)
    return sorted(names)


def _is_verified(folder: Path, name: str, snapshot: _Snapshot) -> bool:
    path = folder / name
    size = snapshot.tree[name]["size"]
    return name in snapshot.verified and path.is_file() and path.stat().st_size == size


def _download(names: Sequence[str], snapshot: _Snapshot, folder: Path) -> None:
    """Fetch several files at a time and verify each as soon as it is complete."""
    total = sum(snapshot.tree[name]["size"] for name in names)
    check_room(folder, total, snapshot.repo)
    for leftover in (folder / ".cache/huggingface/download").rglob("*.incomplete"):
        leftover.unlink()
    title = f"fetch {snapshot.repo}"
    with (
        room(folder, snapshot.repo),
        progress.bar(total // MB, "MB", title) as bar,
        ThreadPoolExecutor(WORKERS) as pool,
    ):
        options = _bar_option(bar)
        jobs = [pool.submit(_download_one, name, snapshot, folder, options) for name in names]
        try:
            for job in as_completed(jobs):
                snapshot.verified.append(job.result())
                snapshot.save(folder)
        finally:
            for job in jobs:
                job.cancel()


def _download_one(name: str, snapshot: _Snapshot, folder: Path, options: dict[str, Any]) -> str:
    with_retries(
        lambda: hf_hub_download(
            snapshot.repo,
            name,
            repo_type=snapshot.kind,
            revision=snapshot.commit,
            local_dir=folder,
            endpoint=endpoint(),
            **options,
        )
    )
    found, wanted = _checksums(folder / name, snapshot.tree[name])
    if found != wanted:
        (folder / name).unlink()
        raise ValueError(_broken(snapshot.repo, name, found, wanted))
    return name


def _broken(repo: str, name: str, found: str, wanted: str) -> str:
    return (
        f"{name} of {repo!r} has checksum {found}, the hub lists {wanted}: the file was deleted, "
        "run again"
    )


def _bar_option(bar: tqdm) -> dict[str, Any]:
    """Argument that shows progress; the client that vLLM's transformers needs does not take it."""
    takes_it = "tqdm_class" in inspect.signature(hf_hub_download).parameters
    return {"tqdm_class": _counter(bar)} if takes_it else {}


def _counter(bar: tqdm) -> Any:
    """A class that huggingface_hub uses as its progress bars; all instances advance one bar."""
    lock = threading.Lock()
    done = 0

    class Counter:
        def __init__(self, **options: Any) -> None:
            pass

        def __enter__(self) -> "Counter":
            return self

        def __exit__(self, *exception: object) -> None:
            pass

        def update(self, count: float | None = 1) -> None:
            nonlocal done
            with lock:
                done += int(count or 0)
                bar.update(done // MB - bar.n)

        def close(self, *words: object, **options: object) -> None:
            pass

        # Xet also reports bytes of the network, which must not be counted twice.
        refresh = set_postfix_str = update_transfer = set_transfer_postfix_str = close

    return Counter


def _remove_broken(path: Path, listed: dict[str, Any]) -> None:
    """Delete a file that differs: huggingface_hub would use it where it cannot fetch another."""
    if path.is_file():
        found, wanted = _checksums(path, listed)
        if found != wanted:
            path.unlink()


def _checksums(path: Path, listed: dict[str, Any]) -> tuple[str, str]:
    """Checksum of a file, and the one that the hub lists."""
    if "sha256" in listed:
        return sha256(path), listed["sha256"]
    return _git_blob(path), listed["blob"]


def _git_blob(path: Path) -> str:
    digest = hashlib.sha1(b"blob %d\0" % path.stat().st_size)
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()
