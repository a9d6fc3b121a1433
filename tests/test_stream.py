"""Shards and batches: damaged files are named, and the global batch is the same on any number of ranks."""

import gzip
import itertools
import os
import shutil
import threading
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conftest import BOS, write_shard
from train_gpt import (
    RunError,
    Runtime,
    TokenStream,
    batches,
    execute,
    micro_batches,
    open_shard,
    prefetch,
    window_order,
)

VOCAB = 320


@pytest.fixture
def folder(tmp_path) -> Path:
    """1,281 different tokens over three shards: 40 windows of 32."""
    for index, part in enumerate(np.split(np.arange(1281), [500, 501])):
        write_shard(tmp_path / f"x_train_{index:06d}.bin", part)
    return tmp_path


def open_stream(folder, vocab=65_536) -> TokenStream:
    return TokenStream(str(folder), "train", vocab)


def first_batches(cfg, stream, count: int, rank: int = 0, world_size: int = 1) -> list:
    runtime = Runtime(rank=rank, world_size=world_size)
    return list(itertools.islice(batches(cfg, stream, runtime), count))


def targets_of(cfg, stream, steps: int) -> np.ndarray:
    """The windows of targets [windows, length] of the first steps, in their order."""
    return torch.cat([targets for _, targets in first_batches(cfg, stream, steps)]).numpy()


# --- shards --------------------------------------------------------------------------------------


def damage(path: Path, keep: int) -> Path:
    path.write_bytes(path.read_bytes()[:keep])
    return path


def foreign(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


BAD_SHARDS = dict(
    empty=(lambda path: damage(path, 0), "0 bytes do not hold a header"),
    short_header=(lambda path: damage(path, 1000), "1000 bytes do not hold a header"),
    header_only=(lambda path: write_shard(path, []), "holds no tokens"),
    magic=(lambda path: write_shard(path, [1, 2], magic=7), "magic 7, not 20240520"),
    version=(lambda path: write_shard(path, [1, 2], version=2), "shard version 2; this reads 1"),
    truncated=(lambda path: damage(path, 1024 + 150), "1174 bytes, its header says 1224"),
    half_a_token=(lambda path: damage(path, 1024 + 199), "1223 bytes, its header says 1224"),
    longer=(lambda path: write_shard(path, range(100), count=99), "1224 bytes, its header says 1222"),
    negative=(lambda path: write_shard(path, range(100), count=-5), "its header says 1014"),
    no_count=(lambda path: write_shard(path, range(100), count=0), "its header says 0, 100 follow"),
    four_bytes=(
        lambda path: write_shard(path, range(200), count=100),
        "4 bytes a token (uint32); this reads 2",
    ),
    llama=(
        lambda path: write_shard(path, range(200), magic=20240801, count=100),
        "llm.c wrote it for Llama 3",
    ),
    other_order=(lambda path: foreign(path, np.full(256, 20240520, ">i4").tobytes()), "big-endian"),
    bare=(lambda path: foreign(path, np.arange(2000, dtype="<u2").tobytes()), "bare tokens without a header"),
    gzip=(lambda path: foreign(path, gzip.compress(os.urandom(3000))), "packed with gzip; unpack it first"),
    numpy=(lambda path: np.save(path.open("wb"), np.zeros(999)), "a NumPy array"),
    page=(lambda path: foreign(path, b"<!DOCTYPE html>" + b"x" * 2000), "a web page"),
    pointer=(lambda path: foreign(path, b"version https://git-lfs.github.com/spec/v1\n"), "git lfs pull"),
    text=(lambda path: path.write_text("404: not found\n" * 200), "no token shard: magic"),
)


@pytest.mark.parametrize("kind", BAD_SHARDS)
def test_a_damaged_shard_is_refused_by_name(tmp_path, kind):
    spoil, reason = BAD_SHARDS[kind]
    write_shard(tmp_path / "x_train_000000.bin", range(50))
    path = write_shard(tmp_path / "x_train_000001.bin", range(100))
    spoil(path)
    with pytest.raises(RunError) as caught:
        open_stream(tmp_path)
    assert caught.value.code == 2 and str(path) in str(caught.value) and reason in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_shard_that_is_a_folder_is_refused_by_name(tmp_path):
    (tmp_path / "x_train_000000.bin").mkdir()
    with pytest.raises(RunError, match=r"cannot read .*x_train_000000\.bin"):
        open_stream(tmp_path)


@pytest.mark.parametrize("vocab, fits", [(300, True), (299, False)])
def test_a_token_beyond_the_vocabulary_names_its_shard(tmp_path, vocab, fits):
    write_shard(tmp_path / "x_train_000000.bin", [5, 6, 7])
    path = write_shard(tmp_path / "x_train_000001.bin", [5, 299, 7])
    stream = open_stream(tmp_path, vocab)
    if fits:
        assert stream.read(0, 6).tolist() == [5, 6, 7, 5, 299, 7]
    else:
        assert stream.read(0, 4).tolist() == [5, 6, 7, 5]
        with pytest.raises(RunError, match=rf"{path.name} holds token 299 at position 1, beyond VOCAB"):
            stream.read(0, 6)


def test_no_shards_say_how_to_get_some(tmp_path):
    write_shard(tmp_path / "x_val_000000.bin", [1, 2])
    with pytest.raises(RunError, match=r"no \*_train_\*\.bin in DATA_PATH=.*pydocs\.py.*fineweb\.py"):
        open_stream(tmp_path)
    with pytest.raises(RunError, match="no .* in DATA_PATH=/no/such/folder"):
        open_stream("/no/such/folder")


def test_two_datasets_in_a_folder_are_refused(tmp_path):
    for name in ("a_train_000000", "b_train_000000", "a_val_000000"):
        write_shard(tmp_path / f"{name}.bin", [1, 2])
    with pytest.raises(RunError, match=r"mixes datasets \['a', 'b'\]"):
        open_stream(tmp_path)
    assert len(TokenStream(str(tmp_path), "val", 320)) == 2


def test_what_other_programs_leave_in_a_folder_is_no_shard(tmp_path):
    write_shard(tmp_path / "x_train_000000.bin", [5, 6])
    litter = "._x_train_000000.bin .x_train_000001.bin .DS_Store Thumbs.db desktop.ini .nfs0001"
    litter += " x_train_000001.bin~ x_train_000001.bin.part x_train_000001.bin.tmp-7"
    litter += " x_train_000001.bin.crdownload"
    for name in litter.split():
        foreign(tmp_path / name, b"\0\5\x16\7" * 300)
    (tmp_path / ".ipynb_checkpoints").mkdir()
    foreign(tmp_path / ".ipynb_checkpoints/x_train_000000-checkpoint.bin", b"?")
    assert open_stream(tmp_path).read(0, 2).tolist() == [5, 6]


COPIES = ["{} (1)", "{} copy", "{}-Copy1", "{}_backup", "{}.sync-conflict-20261126", "{} (conflicted copy)"]


@pytest.mark.parametrize("name", COPIES)
def test_a_copy_of_a_shard_is_not_read_as_more_text(tmp_path, name):
    write_shard(tmp_path / "x_train_000000.bin", [5, 6])
    write_shard(tmp_path / f"{name.format('x_train_000000')}.bin", [5, 6])
    with pytest.raises(RunError, match=r"seems a copy of x_train_000000\.bin .* move one of them away"):
        open_stream(tmp_path)


def test_shards_with_numbers_of_any_length_or_names_are_no_copies(tmp_path):
    for index in ("1", "10", "100", "a", "a_b"):
        write_shard(tmp_path / f"x_train_{index}.bin", [5])
    assert len(open_stream(tmp_path)) == 5


def test_shards_are_read_in_the_order_of_their_numbers(tmp_path):
    for index in (10, 2, 0):
        write_shard(tmp_path / f"x_train_{index:06d}.bin", [index])
    assert open_stream(tmp_path).read(0, 3).tolist() == [0, 2, 10]


def test_a_whole_shard_is_its_tokens(tmp_path):
    tokens = open_shard(write_shard(tmp_path / "x.bin", [1, 65_535, 0]))
    assert tokens.tolist() == [1, 65_535, 0] and tokens.dtype == np.uint16


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=6), st.data())
def test_reading_across_shards_is_reading_their_concatenation(tmp_path_factory, sizes, data):
    folder, whole = tmp_path_factory.mktemp("shards"), np.arange(sum(sizes)) * 7 % 320
    for index, part in enumerate(np.split(whole, np.cumsum(sizes)[:-1])):
        write_shard(folder / f"x_train_{index:06d}.bin", part)
    stream = open_stream(folder)
    start = data.draw(st.integers(0, len(whole) - 1))
    count = data.draw(st.integers(1, len(whole) - start))
    assert len(stream) == len(whole)
    assert stream.read(start, count).tolist() == whole[start : start + count].tolist()


# --- batches -------------------------------------------------------------------------------------


def test_targets_are_the_inputs_shifted(tiny, dataset):
    stream = TokenStream(str(dataset), "train", VOCAB)
    text = stream.read(0, len(stream)).tolist()
    assert text[0] == BOS
    for step, (inputs, targets) in enumerate(first_batches(tiny(), stream, 3)):
        assert inputs.shape == targets.shape == (16, 32) and inputs.dtype == targets.dtype == torch.int64
        at = step * 512
        assert inputs.flatten().tolist() == text[at : at + 512]
        assert targets.flatten().tolist() == text[at + 1 : at + 513]


@pytest.mark.parametrize("shuffle", [False, True])
def test_every_token_but_the_first_is_a_target_once_an_epoch(tiny, folder, shuffle):
    cfg = tiny(data_shuffle=shuffle, train_batch_tokens=256)  # 8 of 40 windows a step
    seen = Counter(targets_of(cfg, open_stream(folder), 5).flatten().tolist())
    assert seen == Counter(range(1, 1281))


@pytest.mark.parametrize("shuffle", [False, True])
def test_the_stream_starts_again_after_its_last_window(tiny, folder, shuffle):
    """16 of 40 windows a step: the third step takes 8 of the first epoch and 8 of the second."""
    cfg, stream = tiny(data_shuffle=shuffle), open_stream(folder)
    first = targets_of(cfg, stream, 5)[:, 0]
    assert sorted(first[:40]) == sorted(first[40:]) == list(range(1, 1281, 32))
    assert [stream.epoch(cfg, step) for step in range(-1, 6)] == [1, 1, 1, 1, 2, 2, 3]


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("world_size", [2, 3, 5, 8, 19])
def test_the_global_batch_is_the_same_at_any_world_size(tiny, folder, world_size, shuffle):
    cfg, stream = tiny(data_shuffle=shuffle), open_stream(folder)
    alone = first_batches(cfg, stream, 4)
    ranks = [first_batches(cfg, stream, 4, rank, world_size) for rank in range(world_size)]
    for step, (inputs, targets) in enumerate(alone):
        assert torch.equal(torch.cat([batches[step][0] for batches in ranks]), inputs)
        assert torch.equal(torch.cat([batches[step][1] for batches in ranks]), targets)
        sizes = {len(batches[step][0]) for batches in ranks}
        assert max(sizes) - min(sizes) <= 1


@given(st.integers(0, 500), st.integers(1, 40))
def test_ranks_share_everything_and_nothing_twice(count, world_size):
    shares = [Runtime(rank=rank, world_size=world_size).share(count) for rank in range(world_size)]
    assert list(itertools.chain(*shares)) == list(range(count))


@given(st.integers(0, 60), st.integers(1, 70))
def test_micro_batches_lose_nothing_and_have_at_most_two_shapes(sequences, limit):
    batch = torch.arange(sequences * 3).view(sequences, 3), -torch.arange(sequences * 3).view(sequences, 3)
    parts = micro_batches(batch, limit)
    sizes = [len(inputs) for inputs, _ in parts]
    assert len(set(sizes)) <= 2 and all(1 <= size <= limit for size in sizes)
    assert len(parts) == -(-sequences // limit)  # the fewest that respect the limit
    for whole, pieces in zip(batch, zip(*parts, strict=True), strict=False):
        assert torch.equal(torch.cat(pieces), whole)
    assert sum(sizes) == sequences


# --- order ---------------------------------------------------------------------------------------


def order_of(cfg, windows: int, steps: int) -> list[int]:
    return np.concatenate([window_order(cfg, windows, step) for step in range(steps)]).tolist()


def test_the_default_order_is_the_shards_own(tiny):
    assert order_of(tiny(), 40, 5) == [*range(40), *range(40)]


@given(st.integers(1, 100), st.integers(1, 8), st.integers(0, 2**32 - 1))
def test_shuffling_permutes_each_epoch(tiny, windows, epochs, seed):
    cfg = tiny(data_shuffle=True, seed=seed, train_batch_tokens=32 * windows)
    for epoch in range(epochs):
        assert sorted(window_order(cfg, windows, epoch).tolist()) == list(range(windows))


def test_shuffled_order_depends_on_the_seed_and_nothing_else(tiny):
    base = order_of(tiny(data_shuffle=True), 40, 5)
    same = [dict(matrix_lr=1.0), dict(num_layers=3), dict(micro_batch_tokens=64), dict(iterations=7)]
    assert all(order_of(tiny(data_shuffle=True, **knobs), 40, 5) == base for knobs in same)
    assert order_of(tiny(data_shuffle=True, train_batch_tokens=320), 40, 8) == base
    assert order_of(tiny(data_shuffle=True, seed=7), 40, 5) != base
    assert base[:40] != base[40:] and base[:40] != list(range(40))


# --- too little, and prefetching -----------------------------------------------------------------


def test_too_few_tokens_for_one_window_is_refused(tiny, tmp_path):
    write_shard(tmp_path / "x_train_000000.bin", range(32))
    with pytest.raises(RunError, match="hold 32 tokens, TRAIN_SEQ_LEN=32 needs more"):
        first_batches(tiny(), open_stream(tmp_path), 1)
    write_shard(tmp_path / "x_train_000000.bin", range(33))
    inputs, targets = first_batches(tiny(), open_stream(tmp_path), 1)[0]
    assert inputs[5].tolist() == list(range(32)) and targets[5].tolist() == list(range(1, 33))


def test_too_few_tokens_is_one_line_without_a_warm_up_too(tiny, tmp_path, dataset):
    write_shard(tmp_path / "toy_train_000000.bin", [BOS] * 20)
    shutil.copy(dataset / "toy_val_000000.bin", tmp_path)
    paths = dict(
        data_path=str(tmp_path), tokenizer_path=str(dataset / "tokenizer.model"), out_dir=str(tmp_path)
    )
    with pytest.raises(RunError, match="hold 20 tokens, TRAIN_SEQ_LEN=32 needs more"):
        execute(tiny(warmup_steps=0, **paths), {})


def test_prefetch_gives_the_same_items():
    assert list(itertools.islice(prefetch(itertools.count(), Runtime()), 50)) == list(range(50))


def test_prefetch_works_one_item_ahead():
    made, second = [], threading.Event()

    def items():
        for item in itertools.count():
            made.append(item)
            if item == 1:
                second.set()
            yield item

    ready = prefetch(items(), Runtime())
    assert next(ready) == 0
    assert second.wait(10), "nothing was made ahead"
    assert made == [0, 1]
    ready.close()


def test_prefetch_hands_an_error_on_after_the_items_before_it():
    def items():
        yield 1
        raise RunError("shard 7 is damaged")

    ready = prefetch(items(), Runtime())
    assert next(ready) == 1
    with pytest.raises(RunError, match="shard 7 is damaged"):
        next(ready)


def test_closing_prefetch_ends_its_thread():
    before = threading.active_count()
    ready = prefetch(itertools.count(), Runtime())
    assert next(ready) == 0 and threading.active_count() == before + 1
    ready.close()
    assert threading.active_count() == before
