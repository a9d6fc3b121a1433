"""data/fineweb.py against a hub written here: a loopback server with the faults real networks have."""

import contextlib
import hashlib
import json
import os
import re
import socket
import ssl
import subprocess
import sys
import threading
import urllib.error
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from data import fineweb, shards
from data.user_error import UserError

DATA = Path(__file__).resolve().parents[1] / "data"
pytest.importorskip("huggingface_hub")

REPO = "someone/golf"
NAME = "fineweb10B_sp1024"
COMMIT = "c" * 40
VAL_TOKENS, SCORED = 5000, 4096


def shard_bytes(tokens: int, seed: int) -> bytes:
    header = np.zeros(256, dtype="<i4")
    header[:3] = shards.MAGIC, shards.VERSION, tokens
    body = np.random.default_rng(seed).integers(3, 1024, tokens).astype("<u2")
    body[0] = shards.BOS
    return header.tobytes() + body.tobytes()


def hub_files() -> dict[str, bytes]:
    catalogue = {
        "datasets": [
            {"name": NAME, "tokenizer_name": "sp_bpe_1024", "stats": {"files_train": 3, "files_val": 1}}
        ],
        "tokenizers": [{"name": "sp_bpe_1024", "model_path": "tokenizers/x.model", "vocab_path": None}],
    }
    files = {
        "datasets/manifest.json": json.dumps(catalogue).encode(),
        "datasets/tokenizers/x.model": b"model" * 100,
        f"datasets/datasets/{NAME}/fineweb_val_000000.bin": shard_bytes(VAL_TOKENS, 0),
    }
    for index in range(3):
        files[f"datasets/datasets/{NAME}/fineweb_train_{index:06d}.bin"] = shard_bytes(200_000, index + 1)
    return files


class Hub(ThreadingHTTPServer):
    """Serves `files`; `faults[path]` lists what goes wrong with the next GETs of that file.

    "drop": half the bytes, then the connection breaks. "short": half the bytes, declared as all.
    "flip": the right number of wrong bytes. "error": status 503.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.faults, self.log = hub_files(), {}, []
        self.moved_to = ""  # other address that really holds the bytes
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def gets(self, part: str = "") -> list[tuple[str, dict]]:
        return [(path, headers) for method, path, headers in self.log if method == "GET" and part in path]

    def train(self, index: int) -> str:
        return f"datasets/datasets/{NAME}/fineweb_train_{index:06d}.bin"


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer(head=True)

    def do_GET(self) -> None:
        self.answer(head=False)

    def fail(self, status: int, code: str = "") -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def answer(self, head: bool) -> None:
        hub: Hub = self.server
        hub.log.append((self.command, self.path, dict(self.headers)))
        match = re.fullmatch(r"/datasets/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", self.path)
        if not match or match[1] != REPO:
            return self.fail(404, "RepoNotFound")
        body = hub.files.get(match[3])
        if body is None:
            return self.fail(404, "EntryNotFound")
        # Like the hub: sha256 for large files, git's blob hash for small ones.
        large = match[3].endswith(".bin")
        digest = hashlib.sha256(body) if large else hashlib.sha1(b"blob %d\0" % len(body) + body)
        extra = {"X-Repo-Commit": COMMIT, "ETag": f'"{digest.hexdigest()}"'}
        if head:
            extra |= {"X-Linked-Size": str(len(body)), "X-Linked-Etag": f'"{digest.hexdigest()}"'}
            if hub.moved_to:
                extra["Location"] = hub.moved_to + self.path
            return self.send(302 if hub.moved_to else 200, extra, b"", len(body))
        fault = hub.faults[match[3]].pop(0) if hub.faults.get(match[3]) else ""
        if fault == "error":
            return self.fail(503)
        start = 0
        if asked := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "")):
            start = int(asked[1])
            extra["Content-Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
        rest = body[start:]
        if fault == "flip":
            rest = rest[:-1] + bytes([rest[-1] ^ 1])
        sent = rest[: len(rest) // 2] if fault in ("drop", "short") else rest
        self.send(206 if start else 200, extra, sent, len(rest) if fault == "drop" else len(sent))

    def send(self, status: int, headers: dict, body: bytes, length: int) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(length)}.items():
            self.send_header(name, value)
        self.end_headers()
        with contextlib.suppress(ConnectionError):
            self.wfile.write(body)
        self.close_connection = True


@pytest.fixture
def hub(monkeypatch):
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "MATCHED_FINEWEB_REMOTE_ROOT_PREFIX", "http_proxy"):
        monkeypatch.delenv(name, raising=False)
    server = Hub()
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setenv("MATCHED_FINEWEB_REPO_ID", REPO)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(fineweb, "FIRST_PAUSE", 0.01)
    monkeypatch.setattr(fineweb, "SCORED_TOKENS", {"sp1024": SCORED})
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def get(hub, tmp_path, monkeypatch, capsys):
    """Runs the tool in this process; returns what it printed."""

    def run(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["fineweb.py", "--out", str(tmp_path), *arguments])
        fineweb.main()
        return capsys.readouterr().out

    return run


def local(tmp_path: Path, index: int) -> Path:
    return tmp_path / "datasets" / NAME / f"fineweb_train_{index:06d}.bin"


def test_fetches_what_was_asked_for(hub, get, tmp_path):
    output = get("--train-shards", "2")
    for name, body in hub.files.items():
        if name.endswith((".bin", ".model")) and "train_000002" not in name:
            assert (tmp_path / name.removeprefix("datasets/")).read_bytes() == body
    assert not local(tmp_path, 2).exists()
    assert "3 shards checked, 400,000 training tokens" in output
    assert f"{SCORED:,} scored: the challenge's set" in output
    assert not list(tmp_path.rglob("*.part"))


def test_everything_after_the_catalogue_comes_from_one_commit(hub, get):
    get("1")
    revisions = [path.split("/resolve/")[1].split("/")[0] for _, path, _ in hub.log]
    assert revisions[0] == "main" and set(revisions[1:]) == {COMMIT}


def test_second_run_downloads_nothing(hub, get):
    get("1")
    hub.log.clear()
    assert "already there" in get("1")
    assert all("manifest" in path for path, _ in hub.gets())


def test_resumes_after_a_broken_connection(hub, get, tmp_path):
    hub.faults[hub.train(0)] = ["drop", "error", "drop"]
    get("1")
    assert local(tmp_path, 0).read_bytes() == hub.files[hub.train(0)]
    ranges = [headers.get("Range") for _, headers in hub.gets("train_000000")]
    assert ranges[0] is None and len(ranges) == 4
    starts = [int(text[6:-1]) for text in ranges[1:]]
    assert 0 < starts[0] == starts[1] < starts[2]


def test_progress_earns_new_tries(hub, get, tmp_path, monkeypatch):
    monkeypatch.setattr(fineweb, "TRIES", 2)
    hub.faults[hub.train(0)] = ["drop"] * 6
    get("1")
    assert local(tmp_path, 0).read_bytes() == hub.files[hub.train(0)]


def test_resumes_in_a_later_run(hub, get, tmp_path, monkeypatch):
    monkeypatch.setattr(fineweb, "TRIES", 1)
    hub.faults[hub.train(0)] = ["drop", "error"]
    with pytest.raises(UserError, match="gave up"):
        get("1")
    assert not local(tmp_path, 0).exists()
    hub.faults.clear()
    hub.log.clear()
    assert "resumed" in get("1")
    assert [int(h["Range"][6:-1]) > 0 for _, h in hub.gets("train_000000")] == [True]
    assert local(tmp_path, 0).read_bytes() == hub.files[hub.train(0)]


def test_truncated_body_is_completed(hub, get, tmp_path):
    hub.faults[hub.train(0)] = ["short"]
    get("1")
    assert local(tmp_path, 0).read_bytes() == hub.files[hub.train(0)]


def test_wrong_hash_is_fetched_again(hub, get, tmp_path):
    hub.faults[hub.train(0)] = ["flip"]
    assert "is not the hub's" in get("1")
    assert local(tmp_path, 0).read_bytes() == hub.files[hub.train(0)]


def test_persistent_wrong_hash_leaves_no_file(hub, get, tmp_path):
    hub.faults[hub.train(0)] = ["flip"] * 100
    with pytest.raises(UserError, match="hash .* gave up after"):
        get("1")
    assert not local(tmp_path, 0).exists() and not list(tmp_path.rglob("*.part"))


@pytest.mark.parametrize("damage", ["empty", "truncated", "flipped", "magic"])
def test_damaged_local_file_is_never_trusted(hub, get, tmp_path, damage):
    get("1")
    path = local(tmp_path, 0)
    body = path.read_bytes()
    changed = {
        "empty": b"",
        "truncated": body[:-4000],
        "flipped": body[:-1] + bytes([body[-1] ^ 1]),
        "magic": b"\0" + body[1:],
    }[damage]
    path.write_bytes(changed)
    assert "fetching it again" in get("1")
    assert path.read_bytes() == body


def test_hub_file_with_a_bad_header_is_refused(hub, get, tmp_path):
    body = bytearray(hub.files[hub.train(0)])
    body[8:12] = (7).to_bytes(4, "little")
    hub.files[hub.train(0)] = bytes(body)
    with pytest.raises(UserError, match="its header asks for"):
        get("1")
    assert not local(tmp_path, 0).exists()


def test_other_validation_set_is_refused(hub, get):
    hub.files[f"datasets/datasets/{NAME}/fineweb_val_000000.bin"] = shard_bytes(SCORED, 0)
    with pytest.raises(UserError, match="3,072 scored tokens, sp1024 has 4,096"):
        get("0")


def test_published_counts_are_whole_windows():
    published = {"sp1024": 62_021_632, "sp4096": 45_508_608, "sp8192": 40_540_160}
    published[fineweb.CASEOPS] = 47_851_520
    assert published == fineweb.SCORED_TOKENS
    for variant, tokens in fineweb.SCORED_TOKENS.items():
        assert tokens % fineweb.SCORED_WINDOW.get(variant, fineweb.LONG_WINDOW) == 0


CASEOPS_NAME = f"fineweb10B_{fineweb.CASEOPS}"


@pytest.fixture
def caseops_hub(hub, monkeypatch):
    """The hub with the records' CaseOps export: its sidecar is in the manifest as val_bytes_glob."""
    monkeypatch.setattr(fineweb, "SCORED_TOKENS", {fineweb.CASEOPS: SCORED})
    text = hub.files["datasets/manifest.json"].decode().replace(NAME, CASEOPS_NAME)
    catalogue = json.loads(text)
    catalogue["datasets"][0]["val_bytes_glob"] = f"datasets/{CASEOPS_NAME}/fineweb_val_bytes_*.bin"
    hub.files = {name.replace(NAME, CASEOPS_NAME): body for name, body in hub.files.items()}
    hub.files["datasets/manifest.json"] = json.dumps(catalogue).encode()
    sidecar = f"datasets/datasets/{CASEOPS_NAME}/fineweb_val_bytes_000000.bin"
    hub.files[sidecar] = shard_bytes(VAL_TOKENS, 9)
    return hub


def test_caseops_comes_with_its_sidecar(caseops_hub, get, tmp_path):
    output = get("--variant", fineweb.CASEOPS, "--train-shards", "1")
    folder = tmp_path / "datasets" / CASEOPS_NAME
    assert (folder / "fineweb_val_bytes_000000.bin").is_file() and "3 shards checked" in output
    assert f"val: {VAL_TOKENS:,} tokens, {SCORED:,} scored: the challenge's set" in output
    files = shards.read_manifest(folder / "manifest.json")["splits"]
    assert not [name for name in files["train"]["files"] if "bytes" in name]


def test_a_sidecar_of_another_length_is_refused(caseops_hub, get):
    sidecar = f"datasets/datasets/{CASEOPS_NAME}/fineweb_val_bytes_000000.bin"
    caseops_hub.files[sidecar] = shard_bytes(VAL_TOKENS - 1, 9)
    with pytest.raises(UserError, match="do not belong together"):
        get("--variant", fineweb.CASEOPS, "--train-shards", "0")


@pytest.mark.parametrize(
    ("variant", "repository"),
    [
        ("sp1024", "willdepueoai/parameter-golf"),
        ("sp4096", "kevclark/parameter-golf"),
        ("sp8192", "kevclark/parameter-golf"),
        (fineweb.CASEOPS, "romeerp/parameter-golf-caseops-v1"),
    ],
)
def test_each_variant_has_the_records_repository(hub, get, monkeypatch, variant, repository):
    monkeypatch.delenv("MATCHED_FINEWEB_REPO_ID")
    with pytest.raises(UserError, match=f"no dataset {repository} "):
        get("--variant", variant, "1")


@pytest.mark.parametrize("variant", ["sp8192_caseops", "sp0", "sp8192_lossless_caps_caseops_v1"])
def test_a_variant_of_another_name_is_refused(hub, get, variant, capsys):
    with pytest.raises(SystemExit):
        get("--variant", variant, "1")
    assert fineweb.CASEOPS in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["4"], "has 3 training shards, not 4"),
        (["--variant", "sp77", "1"], "may be one of sp1024"),
    ],
)
def test_impossible_wishes_get_one_line(get, arguments, message):
    with pytest.raises(UserError, match=message):
        get(*arguments)


def test_manifest_cannot_lead_out_of_the_folder(hub, get, tmp_path):
    text = hub.files["datasets/manifest.json"].decode().replace("tokenizers/x.model", "../../evil")
    hub.files["datasets/manifest.json"] = text.encode()
    with pytest.raises(UserError, match="refusing to write there"):
        get("1")


def test_unknown_repository_is_final(hub, get, monkeypatch):
    monkeypatch.setenv("MATCHED_FINEWEB_REPO_ID", "someone/else")
    with pytest.raises(UserError, match="no dataset someone/else"):
        get("1")
    assert len(hub.log) == 1


def failing(error: Exception, count: list[int]):
    """An action of with_retries that always fails so."""

    def act() -> None:
        count.append(1)
        raise error

    return act


def wrapped(error: Exception) -> OSError:
    """An error as the hub's client raises it: around what the system said."""
    outer = OSError("the client's words")
    outer.__cause__ = error
    return outer


def http_error(code: int) -> urllib.error.HTTPError:
    return urllib.error.HTTPError("http://hub", code, "no", {}, None)


LASTING = dict(
    no_such_name=(socket.gaierror(socket.EAI_NONAME, "Name or service not known"), 1),
    wrapped_name=(wrapped(socket.gaierror(socket.EAI_NONAME, "Name or service not known")), 1),
    urllib_name=(urllib.error.URLError(socket.gaierror(socket.EAI_NONAME, "not known")), 1),
    no_name_server=(socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution"), 2),
    certificate=(wrapped(ssl.SSLCertVerificationError("self-signed")), 1),
    gone=(http_error(404), 1),
    expired=(http_error(403), fineweb.TRIES),  # the next try asks for a new address
    busy=(http_error(503), fineweb.TRIES),
    refused=(ConnectionRefusedError(111, "Connection refused"), fineweb.TRIES),
    damaged=(fineweb.Damaged("half"), fineweb.TRIES),
)


@pytest.mark.parametrize("name", LASTING)
def test_what_no_retry_mends_is_not_retried(name, monkeypatch):
    monkeypatch.setattr(fineweb, "FIRST_PAUSE", 0.0)
    monkeypatch.setattr(fineweb, "LONGEST_PAUSE", 0.0)
    fineweb.STOP.clear()
    error, tries = LASTING[name]
    count: list[int] = []
    with pytest.raises(UserError) as told:
        fineweb.with_retries("shard", failing(error, count))
    assert len(count) == tries
    assert ("no retry mends that" in str(told.value)) == (tries < fineweb.TRIES)


def test_a_hub_whose_name_does_not_resolve_ends_at_once(get, monkeypatch):
    def nameless(*_args, **_kwargs):
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", nameless)
    monkeypatch.setattr(fineweb, "FIRST_PAUSE", 100.0)
    with pytest.raises(UserError, match="Name or service not known; no retry mends that, check the network"):
        get("1")


def test_other_prefix(hub, get, tmp_path, monkeypatch):
    hub.files = {"mine" + name.removeprefix("datasets"): body for name, body in hub.files.items()}
    monkeypatch.setenv("MATCHED_FINEWEB_REMOTE_ROOT_PREFIX", "mine")
    get("1")
    assert local(tmp_path, 0).exists() and (tmp_path / "tokenizers" / "x.model").exists()


def test_token_goes_to_the_hub_only(hub, get, monkeypatch):
    store = Hub()
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    hub.moved_to = store.url
    get("1")
    assert any("secret" in str(headers) for _, _, headers in hub.log)
    assert store.gets("train") and not any("secret" in str(headers) for _, _, headers in store.log)
    store.shutdown()
    store.server_close()


def test_receipts_let_verify_check_the_download(hub, get, tmp_path):
    get("1")
    command = [sys.executable, str(DATA / "verify.py"), str(tmp_path / "datasets" / NAME)]
    assert subprocess.run(command, capture_output=True).returncode == 0
    body = local(tmp_path, 0).read_bytes()
    local(tmp_path, 0).write_bytes(body[:-1] + bytes([body[-1] ^ 1]))
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 1 and "train_000000.bin: sha256" in result.stderr


def test_missing_hub_package_says_how_to_get_it(tmp_path):
    code = """import sys; sys.modules["huggingface_hub"] = None
from data import fineweb, shards
shards.command(fineweb.main)"""
    result = subprocess.run(
        [sys.executable, "-c", code, "--out", str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(DATA.parent)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 2
    assert result.stderr.strip().splitlines() == [
        "error: huggingface_hub is not installed; run: pip install -r requirements-lab.txt"
    ]


def test_all_shards_may_be_asked_for_and_no_more():
    catalogue = json.loads(hub_files()["datasets/manifest.json"])
    name, paths, tokenizers = fineweb.choose(catalogue, "sp1024", 3)
    assert (name, tokenizers) == (NAME, ["tokenizers/x.model"])
    train = [f"datasets/{NAME}/fineweb_train_{index:06d}.bin" for index in range(3)]
    assert paths == [f"datasets/{NAME}/fineweb_val_000000.bin", *train]
    with pytest.raises(UserError, match="has 3 training shards, not 4"):
        fineweb.choose(catalogue, "sp1024", 4)


def test_the_manifest_names_the_tokenizer_so_that_no_other_is_taken(hub, get, tmp_path):
    get("1")
    manifest = json.loads((tmp_path / "datasets" / NAME / "manifest.json").read_text())
    sha256 = hashlib.sha256((tmp_path / "tokenizers/x.model").read_bytes()).hexdigest()
    assert manifest["tokenizer"]["path"] == "tokenizers/x.model" and manifest["tokenizer"]["sha256"] == sha256
