"""A tiny run for every test: knobs, a learnable dataset with its tokenizer, and the script as a process."""

import gc
import io
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterable
from contextlib import redirect_stdout
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import torch

import train_gpt
from tests.support import reference
from train_gpt import GPT, SHARD_MAGIC, SHARD_VERSION, Config, Runtime, fields

ROOT = Path(__file__).resolve().parent.parent

# What `nohup` or a shell's & has made this process ignore would be ignored by the runs that the tests start.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)

# Files whose tests are all quick: pure functions, config, bytes, schedules, a model's forward pass. They are
# marked `fast`. Seconds of one core beside the imports stand behind each, where there are more than a few.
FAST_FILES = {
    "test_bytes.py",
    "test_config.py",
    "test_data_tools.py",
    "test_docs.py",  # 6
    "test_effects.py",  # 6
    "test_lint.py",
    "test_model.py",  # 6
    "test_optim.py",  # 5
    "test_scale.py",  # 6
    "test_schedules.py",  # 11
    "test_settle.py",
    "test_significance.py",
    "test_stream.py",
    "test_style.py",  # 6
    "test_wave.py",
}

# Files of a quarter of a minute and more on one core, roughly the longest first; tests/run.sh gives files out
# in this order.
LONG_FILES = (
    "test_requirements.py",  # which waits for a package index
    "test_legality.py",
    "test_resume.py",
    "test_run.py",
    "test_ranks.py",
    "test_pack_script.py",
    "test_run_best.py",  # which waits for processes
    "test_bad_input.py",
    "test_ideas.py",
    "test_records.py",
    "test_document_lora.py",
    "test_engine.py",
    "test_frontier.py",
    "test_gptq.py",
    "test_hedge.py",
    "test_golden.py",
    "test_artifact.py",
    "test_depth.py",
    "test_context.py",
    "test_schedules.py",
)

PAD, BOS, EOS, UNK = range(4)
VOCAB = 320  # 4 controls, 256 bytes, the letters and some pairs
TINY = dict(
    vocab_size=VOCAB, num_layers=2, model_dim=32, num_heads=4, num_kv_heads=2, train_seq_len=32,
    train_batch_tokens=512, iterations=20, warmdown_iters=5, muon_momentum_warmup_steps=5,
    max_wallclock_seconds=0.0, warmup_steps=1, val_loss_every=0, train_log_every=5,
    device="cpu", dtype="fp32", compile="0",
)  # fmt: skip

GRAMMAR = """
the old miller,a young clerk,our neighbour,the café owner,Zoë,the night train,her brother
counts,carries,paints,forgets,repairs,sells,follows
the bread,seven lamps,a letter,the wheel,twelve apples,the naïve plan,a map
at dawn,by the river,in the market,without a word,near Ålesund,after 1902,in 漢字
"""


def make_texts(count: int, seed: int) -> list[str]:
    """Short documents of a small grammar: after a few steps a model does much better than uniform."""
    rng, columns = random.Random(seed), [line.split(",") for line in GRAMMAR.strip().splitlines()]

    def sentence() -> str:
        return " ".join(rng.choice(words) for words in columns).capitalize() + "."

    return [" ".join(sentence() for _ in range(rng.randint(2, 9))) + "\n" for _ in range(count)]


def train_tokenizer(texts: Iterable[str], vocab_size: int = VOCAB, **options) -> bytes:
    """A SentencePiece model laid out as the challenge's; `options` go to the trainer."""
    model = io.BytesIO()
    layout = dict(pad_id=PAD, bos_id=BOS, eos_id=EOS, unk_id=UNK, byte_fallback=True, split_digits=True)
    identity = dict(
        normalization_rule_name="identity", add_dummy_prefix=False, remove_extra_whitespaces=False
    )
    quiet = dict(character_coverage=0.999, hard_vocab_limit=False, num_threads=1, minloglevel=2)
    kind = dict(model_type="bpe", vocab_size=vocab_size)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=model, **(layout | identity | quiet | kind | options)
    )
    return model.getvalue()


def write_shard(path: Path, tokens, magic=SHARD_MAGIC, version=SHARD_VERSION, count=None) -> Path:
    """An official shard; with a wrong header where one is given."""
    header = np.zeros(256, dtype="<i4")
    header[:3] = magic, version, len(tokens) if count is None else count
    path.write_bytes(header.tobytes() + np.asarray(tokens, dtype="<u2").tobytes())
    return path


def encode_documents(tokenizer, texts: Iterable[str]) -> list[int]:
    return [token for text in texts for token in [BOS, *tokenizer.encode(text)]]


def show(page: str) -> str:
    """What `train_gpt.py PAGE` prints of the knobs."""
    printed = io.StringIO()
    with redirect_stdout(printed):
        assert train_gpt.load_tool("sweeps/lab/show.py")[page[2:].replace("-", "_")]({}) == 0
    return printed.getvalue().strip()


def pytest_collection_modifyitems(config, items) -> None:
    """Mark what is fast, skip what is slow unless it is asked for, and begin with the long files, so that no
    worker is left with one at the end."""
    for item in items:
        if item.path.name in FAST_FILES:
            item.add_marker("fast")
        if item.get_closest_marker("slow") and "slow" not in config.option.markexpr:
            item.add_marker(pytest.mark.skip(reason="slow; `bash tests/run.sh slow` runs it"))
    long_first = {name: place for place, name in enumerate(LONG_FILES)}
    items.sort(key=lambda item: long_first.get(item.path.name, len(long_first)))


def pytest_ignore_collect(collection_path: Path, config) -> bool | None:
    """With `-m fast` no other file is read: importing all of them takes longer than many of the tests."""
    is_slow_file = collection_path.suffix == ".py" and collection_path.name not in FAST_FILES
    return True if is_slow_file and config.option.markexpr == "fast" else None


@pytest.fixture(scope="session")  # so that hypothesis can use it
def tiny():
    """tiny(knob=value, ...) -> Config of a run that takes a second."""
    return lambda **knobs: replace(Config(), **{**TINY, **knobs})


def make_dataset(folder: Path) -> Path:
    """Into it: toy_train_000000.bin, toy_train_000001.bin, toy_val_000000.bin and tokenizer.model."""
    train, val = make_texts(400, seed=1), make_texts(40, seed=2)
    (folder / "tokenizer.model").write_bytes(train_tokenizer(train))
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    assert tokenizer.vocab_size() == VOCAB
    write_shard(folder / "toy_train_000000.bin", encode_documents(tokenizer, train[:250]))
    write_shard(folder / "toy_train_000001.bin", encode_documents(tokenizer, train[250:]))
    write_shard(folder / "toy_val_000000.bin", encode_documents(tokenizer, val))
    return folder


@pytest.fixture(scope="session")
def dataset(tmp_path_factory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("dataset"))


@pytest.fixture(scope="session")
def short_dataset(dataset, tmp_path_factory) -> Path:
    """The same with a short validation text."""
    folder = shutil.copytree(dataset, tmp_path_factory.mktemp("short") / "data")
    (path,) = folder.glob("*_val_*")
    write_shard(path, train_gpt.open_shard(path)[:800])
    return folder


@pytest.fixture(scope="session")
def fork_server():
    from tests.support.forkserver import ForkServer

    server = ForkServer()
    yield server
    server.close()


@pytest.fixture(scope="session")
def new(fork_server, short_dataset, tmp_path_factory):
    """new(knobs, ranks) -> an empty Folder to start runs in."""
    from tests.support.stops import Folder

    def make(knobs: dict, ranks: int = 1) -> Folder:
        return Folder(tmp_path_factory.mktemp("run"), fork_server, short_dataset, knobs, ranks)

    return make


@pytest.fixture(scope="session")
def tokenizer(dataset) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_file=str(dataset / "tokenizer.model"))


@pytest.fixture(params=["blocked", "sdpa"])
def path(request, monkeypatch):
    """Each of the two attention paths on short sequences; blocks of 12, so that 32 is no multiple."""
    monkeypatch.setattr(train_gpt, "QUERY_BLOCK", 12)
    if request.param == "sdpa":
        monkeypatch.setattr(train_gpt, "LONGEST_BLOCKED", 0)
    return request.param


def random_model(cfg: Config, dtype=torch.float32) -> GPT:
    torch.manual_seed(0)
    return reference.randomise(GPT(cfg, dtype))


def random_ids(cfg: Config, *shape: int) -> torch.Tensor:
    return torch.randint(cfg.vocab_size, shape, generator=torch.Generator().manual_seed(5))


class Traced(Runtime):
    """Compiles as a run does, but to eager kernels: graph breaks and recompilations show without a wait."""

    def __init__(self):
        torch._dynamo.reset()
        super().__init__(compiles=True, backend=self.count)
        self.graphs = 0

    def count(self, graph, inputs):
        self.graphs += 1
        return graph.forward


@pytest.fixture
def graphs_alone(monkeypatch):
    """torch.compile captures graphs as ever but runs them as they are: no C++ compiler, some seconds."""
    torch._dynamo.reset()
    real = torch.compile

    def capture(function, **how):
        return real(function, **how | dict(backend="aot_eager"))

    monkeypatch.setattr(torch, "compile", capture)


def as_text(value) -> str:
    """A knob's value as the environment spells it."""
    if isinstance(value, tuple):
        return ",".join(value)
    return str(int(value) if isinstance(value, bool) else value)


def env_of(dataset: Path, **knobs) -> dict[str, str]:
    """The environment of a tiny run: this process's without knobs, TINY, then `knobs` (None unsets one)."""
    ours = {f.name.upper() for f in fields(Config)}
    env = {name: value for name, value in os.environ.items() if name not in ours}
    env |= dict(OMP_NUM_THREADS="1", DATA_PATH=str(dataset), TOKENIZER_PATH=str(dataset / "tokenizer.model"))
    chosen = {name.upper(): value for name, value in {**TINY, **knobs}.items()}
    env |= {name: as_text(value) for name, value in chosen.items()}
    return {name: value for name, value in env.items() if chosen.get(name, "") is not None}


@pytest.fixture
def run_main(monkeypatch, capfd, tmp_path, dataset):
    """run_main(*arguments, knob=value, ...) -> (exit code, stdout, stderr) of main() in tmp_path."""
    monkeypatch.chdir(tmp_path)
    torch.set_num_threads(1)  # as env_of gives to a process: sums in the same order

    def call(*arguments, data=dataset, **knobs):
        monkeypatch.setattr(sys, "argv", ["train_gpt.py", *arguments])
        env = env_of(data, **knobs)
        for name in os.environ.keys() - env.keys():
            monkeypatch.delenv(name)
        for name, value in env.items():  # in the real environment: compiled code reads it by getenv
            monkeypatch.setenv(name, value)
        capfd.readouterr()
        code = None
        try:
            train_gpt.main()
        except SystemExit as end:
            code = end.code
        gc.collect()  # the exception's frames hold the run's locks
        return code, *capfd.readouterr()

    return call


@dataclass
class Outcome:
    """What a run of the script left behind."""

    code: int
    stdout: str
    stderr: str
    result: dict | None = None  # the RESULT line
    events: list[dict] = field(default_factory=list)  # of the one .jsonl this run wrote
    log: str = ""  # its .txt

    def of(self, kind: str) -> list[dict]:
        return [event for event in self.events if event["event"] == kind]


def launch(tmp_path: Path, dataset: Path, expect: int = 0, script=None, args=(), **knobs) -> Outcome:
    """Run train_gpt.py in `tmp_path` with tiny knobs; its exit code must be `expect`."""
    env = env_of(dataset, **knobs)
    command = [sys.executable, str(script or ROOT / "train_gpt.py"), *args]
    logs = tmp_path / env.get("OUT_DIR", ".") / "logs"
    earlier = set(logs.glob("*"))
    run = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=240)
    assert run.returncode == expect, f"{run.returncode}\n{run.stdout[-1500:]}\n{run.stderr[-3000:]}"
    return outcome_of(run.returncode, run.stdout, run.stderr, set(logs.glob("*")) - earlier)


@pytest.fixture(scope="session")
def launch_forks(fork_server):
    """launch_forks(folder, dataset, ranks, knob=value, ...) -> Outcome, any, as of `launch`.

    Its ranks are forks of a process that has the imports: two of them are there six seconds earlier than
    torchrun's. server: another ForkServer.
    """

    def run(folder: Path, dataset: Path, ranks: int = 1, server=fork_server, **knobs) -> Outcome:
        env = env_of(dataset, **knobs)
        logs = folder / env.get("OUT_DIR", ".") / "logs"
        earlier = set(logs.glob("*"))
        code, *_ = server.run(folder, env, ranks)
        stdout, stderr = ((folder / name).read_text() for name in ("0.out", "0.err"))
        return outcome_of(code, stdout, stderr, set(logs.glob("*")) - earlier)

    return run


def outcome_of(code: int, stdout: str, stderr: str, logs: Iterable[Path]) -> Outcome:
    """The outcome of a run that wrote these logs."""
    outcome = Outcome(code, stdout, stderr)
    if found := re.search(r"^RESULT (.*)$", stdout, re.M):
        outcome.result = json.loads(found[1])
    for path in logs:
        if path.suffix == ".jsonl":
            outcome.events = [json.loads(line) for line in path.read_text().splitlines()]
        elif path.suffix == ".txt":
            outcome.log = path.read_text()
    return outcome
