"""Fetch the challenge's published FineWeb shards and check every byte of them.

    python data/fineweb.py                                   sp1024, 80 training shards (16 GB)
    python data/fineweb.py --variant sp1024 --train-shards 1
    python data/fineweb.py --variant byte260 10              the official tool's positional form
    python data/fineweb.py --variant sp8192 --train-shards 128
    python data/fineweb.py --variant sp8192_lossless_caps_caseops_v1_reserved

Each file is checked by size, by shard header and by the hash the hub publishes, and takes its name
only then. A stopped download goes on where it was; a truncated file found on disk is fetched again.
sp4096, sp8192 and CaseOps come from the repositories that the challenge's records name. CaseOps brings
fineweb_val_bytes_*.bin, the bytes of each validation token, which train_gpt.py reads and proves.
MATCHED_FINEWEB_REPO_ID, MATCHED_FINEWEB_REMOTE_ROOT_PREFIX and HF_ENDPOINT change the source.
"""

from __future__ import annotations

import argparse
import errno
import hashlib
import http.client
import json
import os
import re
import shutil
import socket
import ssl
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TypeVar

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from data.shards import (  # noqa: E402
    command,
    describe_file,
    exclusive,
    read_header,
    read_manifest,
    shard_paths,
    write_manifest,
)
from data.user_error import UserError  # noqa: E402

DEFAULT_REPO, DEFAULT_PREFIX = "willdepueoai/parameter-golf", "datasets"
CASEOPS = "sp8192_lossless_caps_caseops_v1_reserved"
# Where the records have the other variants from: #1394 and #1493, #1855.
REPOSITORIES = {
    "sp4096": "kevclark/parameter-golf",
    "sp8192": "kevclark/parameter-golf",
    CASEOPS: "romeerp/parameter-golf-caseops-v1",
}
DEFAULT_TRAIN_SHARDS = 80
# Tokens that the records' scripts score: the validation split cut to whole windows of so many targets.
SCORED_WINDOW = {"sp1024": 1024}
LONG_WINDOW = 2048  # of every other variant
SCORED_TOKENS = {"sp1024": 62_021_632, "sp4096": 45_508_608, "sp8192": 40_540_160, CASEOPS: 47_851_520}

TRIES = 6
FIRST_PAUSE = 1.0  # seconds before the second try; doubles, at most LONGEST_PAUSE
LONGEST_PAUSE = 30.0
TIMEOUT = 60.0  # seconds without a byte
# What the server will say again. Not 403: an address that has expired is signed anew at the next try.
LASTING_STATUS = (400, 401, 404, 405, 410, 451)
# Errors of httpx and requests, whichever the hub's client uses.
BAD_ADDRESS = ("UnsupportedProtocol", "InvalidURL", "MissingSchema", "InvalidSchema")
LASTING_MEND = "check the network, HF_ENDPOINT and the proxy"
BLOCK = 1 << 20
CATALOGUE = "datasets/fineweb_manifest.json"  # our copy of the hub's manifest
STOP = threading.Event()  # set when one file has failed: the other downloads end at the next block
Result = TypeVar("Result")


@dataclass(frozen=True)
class Source:
    """Where the files are: a dataset repository on a hub, a folder in it, one commit of it."""

    repo: str
    prefix: str
    endpoint: str | None
    revision: str = "main"


@dataclass(frozen=True)
class Remote:
    """What the hub says about a file. `digest` is its sha256, or git's blob sha1, or unknown ("")."""

    url: str
    size: int
    digest: str
    revision: str
    token: str | None


@dataclass(frozen=True)
class Fetched:
    """A file that is there and checked; `how` says what it took."""

    path: Path
    size: int
    digest: str
    how: str


class Damaged(Exception):
    """The bytes that arrived are not the file; another try may bring the right ones."""


def hub():
    """The huggingface_hub package. Raises UserError with the way to install it."""
    try:
        import huggingface_hub
        import huggingface_hub.errors
    except ImportError:
        raise UserError(
            "huggingface_hub is not installed; run: pip install -r requirements-lab.txt"
        ) from None
    return huggingface_hub


def ask_hub(source: Source, name: str) -> Remote:
    """Size, hash and address of one file. Raises UserError if the hub does not have it."""
    library = hub()
    errors = library.errors
    path = f"{source.prefix}/{name}" if source.prefix else name
    url = library.hf_hub_url(
        source.repo, path, repo_type="dataset", revision=source.revision, endpoint=source.endpoint
    )
    try:
        facts = library.get_hf_file_metadata(url, timeout=TIMEOUT, endpoint=source.endpoint)
    except errors.EntryNotFoundError:
        raise UserError(
            f"{source.repo} has no {path}; see its file list for the variants and shards"
        ) from None
    except errors.RevisionNotFoundError:
        raise UserError(f"{source.repo}: no revision {source.revision}; start again") from None
    except errors.GatedRepoError:
        raise UserError(f"{source.repo} asks for a login; run: hf auth login") from None
    except errors.RepositoryNotFoundError:
        raise UserError(f"no dataset {source.repo} on the hub; check MATCHED_FINEWEB_REPO_ID") from None
    except errors.OfflineModeIsEnabled:
        raise UserError("the hub is switched off by HF_HUB_OFFLINE; unset it") from None
    if facts.size is None:
        raise Damaged(f"the hub does not say how large {path} is")
    # The token is for the hub alone: a signed address elsewhere neither needs it nor may see it.
    same_host = urllib.parse.urlsplit(facts.location).netloc == urllib.parse.urlsplit(url).netloc
    token = library.get_token() if same_host else None
    return Remote(facts.location, facts.size, facts.etag or "", facts.commit_hash or source.revision, token)


def with_retries(what: str, action: Callable[[], Result], progress: Callable[[], int] = lambda: 0) -> Result:
    """Run `action`, again after a growing pause when the network fails. A UserError is final.

    `progress` counts what has been achieved; when it grew, the tries are counted from one again.
    """
    attempt, pause, reached = 1, FIRST_PAUSE, progress()
    while True:
        try:
            return action()
        except UserError:
            raise
        except Exception as error:  # the hub's client raises its own kinds for a broken connection
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EACCES, errno.EROFS):
                raise
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            tries = tries_for(error)
        if progress() > reached:
            attempt, pause, reached = 1, FIRST_PAUSE, progress()
        if attempt >= tries:
            if tries < TRIES:
                raise UserError(f"{what}: {reason}; no retry mends that, {LASTING_MEND}")
            raise UserError(f"{what}: {reason}; gave up after {TRIES} tries, run the command again")
        attempt += 1
        print(f"{what}: {reason}; try {attempt} of {tries} in {pause:.0f} s", flush=True)
        if STOP.wait(pause):
            raise UserError(f"{what}: stopped")
        pause = min(2 * pause, LONGEST_PAUSE)


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error and those that it was raised from: clients wrap what the system said."""
    while error is not None:
        yield error
        reason = error.reason if isinstance(error, urllib.error.URLError) else None
        wrapped = reason if isinstance(reason, BaseException) else None
        error = wrapped or error.__cause__ or error.__context__


def tries_for(error: BaseException) -> int:
    """How often a question that failed so is asked: once where the answer will be the same again.

    Without a name server a name "does not resolve for now"; that is mostly a machine without a network.
    """
    for cause in causes(error):
        if isinstance(cause, socket.gaierror):
            return 2 if cause.errno == socket.EAI_AGAIN else 1
        if isinstance(cause, ssl.SSLCertVerificationError | http.client.InvalidURL):
            return 1
        if isinstance(cause, urllib.error.HTTPError) and cause.code in LASTING_STATUS:
            return 1
        if type(cause).__name__ in BAD_ADDRESS:
            return 1
    return TRIES


def download(remote: Remote, part: Path) -> None:
    """Append to `part` until it has the remote size. Raises Damaged or a network error if it cannot."""
    have = part.stat().st_size if part.exists() else 0
    if have > remote.size:
        part.unlink()
        have = 0
    if have == remote.size:
        return
    free = shutil.disk_usage(part.parent).free
    if free < remote.size - have:
        need = (remote.size - have - free) / 1e6
        raise UserError(
            f"{part.parent}: {need:,.0f} MB too little free space; free some or use --out elsewhere"
        )
    headers = {"Accept-Encoding": "identity"}
    if have:
        headers["Range"] = f"bytes={have}-"
    if remote.token:
        headers["Authorization"] = f"Bearer {remote.token}"
    request = urllib.request.Request(remote.url, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
            resumed = answer.status == 206
            if resumed and not answer.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
                raise Damaged("the server sent another part of the file than was asked for")
            with open(part, "ab" if resumed else "wb") as file:
                while block := answer.read(BLOCK):
                    file.write(block)
                    if STOP.is_set():
                        raise UserError(f"{part}: stopped")
                file.flush()
                os.fsync(file.fileno())
    except http.client.IncompleteRead as error:
        raise Damaged(f"connection closed {error.expected or 'some'} bytes early") from None
    size = part.stat().st_size
    if size < remote.size:
        raise Damaged(f"{size:,} of {remote.size:,} bytes arrived")
    if size > remote.size:
        part.unlink()
        raise Damaged(f"{size:,} bytes arrived, the hub promised {remote.size:,}")


def check_file(path: Path, remote: Remote, name: str) -> None:
    """Compare a file with what the hub says and, for a shard, with its own header. Raises Damaged."""
    if path.stat().st_size != remote.size:
        raise Damaged(f"{path.stat().st_size:,} bytes, the hub says {remote.size:,}")
    if name.endswith(".bin"):
        try:
            read_header(path)
        except UserError as problem:
            raise Damaged(str(problem)) from None
    digest = file_digest(path, remote)
    if digest and digest != remote.digest:
        raise Damaged(f"hash {digest[:16]}... is not the hub's {remote.digest[:16]}...")


def file_digest(path: Path, remote: Remote) -> str:
    """Hash of a file in the kind the hub gave: sha256 (large files), git blob sha1, or ""."""
    kind = remote.digest.lower()
    if re.fullmatch(r"[0-9a-f]{64}", kind):
        digest = hashlib.sha256()
    elif re.fullmatch(r"[0-9a-f]{40}", kind):
        digest = hashlib.sha1(f"blob {remote.size}\0".encode())
    else:
        return ""
    with open(path, "rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


def fetch(source: Source, name: str, target: Path, known: dict) -> Fetched:
    """Bring one file to `target`, whole and checked. `known`: what an earlier run recorded of it.

    A file already there is trusted only if it passes the same checks; its hash is computed anew
    unless size, date and hash are those recorded when it was last checked.
    """

    def attempt() -> Fetched:
        remote = ask_hub(source, name)
        if target.exists():
            unchanged = known.get("mtime_ns") == target.stat().st_mtime_ns
            if unchanged and (known["size"], known["digest"]) == (remote.size, remote.digest):
                return Fetched(target, remote.size, remote.digest, "already there")
            try:
                check_file(target, remote, name)
                return Fetched(target, remote.size, remote.digest, "already there, checked")
            except Damaged as damage:
                print(f"{target}: {damage}; fetching it again", flush=True)
                target.unlink()
        target.parent.mkdir(parents=True, exist_ok=True)
        # Named after the content, so that a new version upstream never continues an old download.
        tag = hashlib.sha256(f"{remote.digest} {remote.size}".encode()).hexdigest()[:12]
        part = target.with_name(f".{target.name}.{tag}.part")
        start, had = time.monotonic(), part.stat().st_size if part.exists() else 0
        download(remote, part)
        try:
            check_file(part, remote, name)
        except Damaged:
            part.unlink()
            raise
        os.replace(part, target)
        for leftover in target.parent.glob(f".{target.name}.*.part"):
            leftover.unlink()
        seconds = time.monotonic() - start
        how = f"{(remote.size - had) / 1e6:,.1f} MB in {seconds:.0f} s" + (", resumed" if had else "")
        return Fetched(target, remote.size, remote.digest, how)

    def arrived() -> int:
        return sum(part.stat().st_size for part in target.parent.glob(f".{target.name}.*.part"))

    return with_retries(name, attempt, arrived)


def safe_name(name: str) -> str:
    """A path from the remote manifest, refused if it leads out of the folder it belongs in."""
    if not name or PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts or "\\" in name:
        raise UserError(f"the hub's manifest names the path {name!r}; refusing to write there")
    return name


def read_catalogue(source: Source, out: Path) -> tuple[dict, Source]:
    """The hub's manifest, and the source pinned to the commit it came from."""
    remote = with_retries("manifest.json", lambda: ask_hub(source, "manifest.json"))
    pinned = Source(source.repo, source.prefix, source.endpoint, remote.revision)
    target = out / CATALOGUE
    with exclusive(target.parent):
        fetch(pinned, "manifest.json", target, {})
    try:
        catalogue = json.loads(target.read_bytes())
    except ValueError:
        raise UserError(f"{target}: the hub's manifest is not JSON; check MATCHED_FINEWEB_REPO_ID") from None
    return catalogue, pinned


def choose(catalogue: dict, variant: str, train_shards: int) -> tuple[str, list[str], list[str]]:
    """What to fetch for a variant: (dataset name, shard names, tokenizer names), all relative."""
    name = f"fineweb10B_{variant}"
    try:
        datasets = {entry["name"]: entry for entry in catalogue["datasets"]}
        tokenizers = {entry["name"]: entry for entry in catalogue["tokenizers"]}
        if name not in datasets:
            raise UserError(f"the hub has no {name}; --variant may be one of {variants(datasets)}")
        entry = datasets[name]
        files_train, files_val = int(entry["stats"]["files_train"]), int(entry["stats"]["files_val"])
        tokenizer = tokenizers[entry["tokenizer_name"]]
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"the hub's manifest is not as expected ({error!r}); a newer layout?") from None
    if train_shards > files_train:
        raise UserError(f"{name} has {files_train} training shards, not {train_shards}; ask for fewer")
    if files_val < 1:
        raise UserError(f"{name} has no validation shard on the hub; choose another --variant")
    shards = [f"datasets/{name}/fineweb_val_{index:06d}.bin" for index in range(files_val)]
    if entry.get("val_bytes_glob"):
        shards += [f"datasets/{name}/fineweb_val_bytes_{index:06d}.bin" for index in range(files_val)]
    shards += [f"datasets/{name}/fineweb_train_{index:06d}.bin" for index in range(train_shards)]
    paths = [tokenizer[key] for key in ("model_path", "vocab_path", "path") if tokenizer.get(key)]
    return safe_name(name), shards, [safe_name(path) for path in dict.fromkeys(paths)]


def variants(datasets: dict) -> str:
    """The variants a catalogue offers, for an error line."""
    return ", ".join(sorted(name.partition("_")[2] for name in datasets)) or "none"


def check_validation(variant: str, tokens: int) -> None:
    """Compare the validation split with the published count. Raises UserError where it is another set."""
    window = SCORED_WINDOW.get(variant, LONG_WINDOW)
    scored = (tokens - 1) // window * window
    expected = SCORED_TOKENS.get(variant)
    if expected is None:
        print(f"val: {tokens:,} tokens, {scored:,} scored; no published count to compare for {variant}")
    elif scored != expected:
        raise UserError(
            f"validation split has {scored:,} scored tokens, {variant} has {expected:,}; "
            "this is not the challenge's set, scores on it compare with nothing"
        )
    else:
        print(f"val: {tokens:,} tokens, {scored:,} scored: the challenge's set")


def fetch_all(
    source: Source, names: list[str], out: Path, receipts: dict[str, dict], jobs: int
) -> dict[str, Fetched]:
    """Fetch files, several at a time, with a line for each. Returns name -> result, in order."""
    results: dict[str, Fetched] = {}
    pool = ThreadPoolExecutor(jobs)
    try:
        waiting = [pool.submit(fetch, source, name, out / name, receipts.get(name, {})) for name in names]
        for index, (name, future) in enumerate(zip(names, waiting, strict=True), 1):
            results[name] = future.result()
            print(f"[{index}/{len(names)}] {name}: {results[name].how}", flush=True)
    finally:
        STOP.set()
        pool.shutdown(cancel_futures=True)
    return results


def run(options: argparse.Namespace) -> int:
    STOP.clear()
    env = os.environ.get
    source = Source(
        env("MATCHED_FINEWEB_REPO_ID", REPOSITORIES.get(options.variant, DEFAULT_REPO)),
        env("MATCHED_FINEWEB_REMOTE_ROOT_PREFIX", DEFAULT_PREFIX).strip("/"),
        env("HF_ENDPOINT") or None,
    )
    hub()
    out: Path = options.out
    catalogue, source = read_catalogue(source, out)
    name, shards, tokenizers = choose(catalogue, options.variant, options.train_shards)
    folder = out / "datasets" / name
    folder.mkdir(parents=True, exist_ok=True)
    with exclusive(folder):
        receipts = (read_manifest(folder / "manifest.json") or {}).get("receipts", {})
        start = time.monotonic()
        results = fetch_all(source, tokenizers + shards, out, receipts, options.jobs)
        val_tokens = sum(read_header(path) for path in shard_paths(folder, "val"))
        check_validation(options.variant, val_tokens)
        bytes_tokens = sum(read_header(path) for path in shard_paths(folder, "val_bytes"))
        if bytes_tokens not in (0, val_tokens):
            raise UserError(
                f"{folder}: fineweb_val_bytes_*.bin has {bytes_tokens:,} tokens, the validation split "
                f"{val_tokens:,}; the hub's files do not belong together"
            )
        write_manifest(folder / "manifest.json", local_manifest(name, source, results, receipts, out))
    size = sum(result.size for result in results.values())
    train = sum(read_header(out / shard) for shard in shards if "_train_" in shard)
    print(
        f"{folder}: {len(shards)} shards checked, {train:,} training tokens, {size / 1e6:,.1f} MB, "
        f"{time.monotonic() - start:.0f} s"
    )
    return 0


def local_manifest(name: str, source: Source, results: dict[str, Fetched], receipts: dict, out: Path) -> dict:
    """What `verify.py` and the next run read: hashes of the shards, and receipts of every check."""
    fresh = {
        file: {"size": got.size, "digest": got.digest, "mtime_ns": got.path.stat().st_mtime_ns}
        for file, got in results.items()
    }
    receipts = {file: entry for file, entry in receipts.items() if (out / file).exists()} | fresh
    splits: dict[str, dict] = {"train": {"files": {}}, "val": {"files": {}}}
    for file, entry in receipts.items():
        if file.endswith(".bin") and len(entry["digest"]) == 64:
            split = "val" if "_val_" in file else "train"
            splits[split]["files"][PurePosixPath(file).name] = {
                "size": entry["size"],
                "sha256": entry["digest"],
            }
    manifest = {
        "name": name,
        "source": {"repo": source.repo, "prefix": source.prefix, "revision": source.revision},
        "splits": splits,
        "receipts": receipts,
    }
    models = [file for file in receipts if file.endswith(".model")]
    if len(models) == 1:  # train_gpt.py then takes no other
        manifest["tokenizer"] = {"path": models[0], **describe_file(out / models[0])}
    return manifest


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("shards", nargs="?", type=int, help="the same as --train-shards")
    parser.add_argument("--train-shards", type=int, help=f"how many; default {DEFAULT_TRAIN_SHARDS}")
    parser.add_argument("--variant", default="sp1024", help="sp1024 (default), byte260, spN or " + CASEOPS)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="default: this folder")
    parser.add_argument("--jobs", type=int, default=4, help="files fetched at a time; default 4")
    options = parser.parse_args()
    if options.shards is not None and options.train_shards is not None:
        parser.error("give the number of training shards once")
    given = options.shards if options.train_shards is None else options.train_shards
    options.train_shards = DEFAULT_TRAIN_SHARDS if given is None else given
    if options.train_shards < 0 or options.jobs < 1:
        parser.error("--train-shards must be 0 or more and --jobs 1 or more")
    if not re.fullmatch(rf"byte260|sp[1-9][0-9]*|{CASEOPS}", options.variant):
        parser.error(f"--variant {options.variant}: not byte260, sp<N>, such as sp1024, or {CASEOPS}")
    return run(options)


if __name__ == "__main__":
    command(main)
