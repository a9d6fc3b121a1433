"""The model of the records #1394, #1493 and #1855: gates, lanes, the layer loop, smearing, hashed pairs."""

import json
import os
import shlex
import shutil
from dataclasses import replace
from pathlib import Path
from signal import SIGTERM

import pytest
import sentencepiece
import torch

import train_gpt
from tests.conftest import BOS, TINY, Traced, env_of, random_ids, random_model, train_tokenizer
from tests.support import frontier
from tests.support.stops import Folder, in_step, steady
from train_gpt import (
    GPT,
    Config,
    Optimisers,
    Run,
    RunError,
    RunLog,
    Runtime,
    TokenStream,
    batches,
    plan_step,
    token_nats,
    train,
    train_step,
    training_loss,
    weights_of,
)

LOOP = dict(num_loops=2, loop_start=2, loop_end=3)
GATES = dict(sparse_attn_gate_enabled=True, sparse_attn_gate_scale=0.5, smear_gate_enabled=True)
BASE = dict(mlp_act="leaky_relu2", leaky_slope=0.5, xsa_last_n=-1, num_layers=7, num_heads=4, gate_window=6)
PR_1394 = BASE | LOOP | dict(skip_gates_enabled=True, rope_dims=4, ln_scale=True)
PR_1493 = PR_1394 | dict(parallel_residual_start=4)
PR_1855 = PR_1394 | GATES | dict(parallel_start_layer=5)
CONFIGS = {
    "base": BASE,
    "rope": BASE | dict(rope_dims=2),
    "rope_whole": BASE | dict(rope_dims=8),
    "ln_scale": BASE | dict(ln_scale=True),
    "skip_gates": BASE | dict(skip_gates_enabled=True),
    "parallel_from": BASE | dict(parallel_residual_start=4),
    "parallel_from_all": BASE | dict(parallel_residual_start=0),
    "lanes": BASE | dict(parallel_start_layer=5),
    "lanes_last": BASE | dict(parallel_start_layer=6),
    "lanes_whole_decoder": BASE | dict(parallel_start_layer=1, parallel_final_lane="attn"),
    "lanes_mlp": BASE | dict(parallel_start_layer=4, parallel_final_lane="mlp"),
    "attn_gate": BASE | dict(sparse_attn_gate_enabled=True),
    "smear": BASE | dict(smear_gate_enabled=True),
    "loop": BASE | LOOP,
    "loop_once": BASE | LOOP | dict(num_loops=1, loop_start=3),
    "loop_of_all": BASE | dict(num_loops=1, loop_start=0, loop_end=6),
    "loop_in_lanes": BASE | LOOP | dict(parallel_start_layer=2),
    "bigram": BASE | dict(bigram_vocab_size=50, bigram_dim=8),
    "bigram_wide": BASE | dict(bigram_vocab_size=50, bigram_dim=32),
    "bigram_smear": BASE | dict(bigram_vocab_size=50, bigram_dim=8, smear_gate_enabled=True),
    "1394": PR_1394,
    "1493": PR_1493,
    "1855": PR_1855,
    "1855_bigram": PR_1855 | dict(bigram_vocab_size=50, bigram_dim=8),
}
PREEMPTED = train_gpt.PREEMPTED
EVERYTHING = CONFIGS["1855_bigram"] | dict(ortho_init=True)
SMALL = EVERYTHING | dict(num_layers=3, loop_start=1, loop_end=1, parallel_start_layer=2)
SMALLEST = SMALL | dict(num_layers=2, num_loops=1, parallel_start_layer=1)  # for what takes long: three turns


def documents(cfg: Config) -> torch.Tensor:
    """Token ids [2, 24] with BOS in both."""
    ids = random_ids(cfg, 2, 24)
    ids[0, [0, 7, 8]] = BOS
    ids[1, 13] = BOS
    return ids


# --- the forward pass and its gradients ---


@pytest.mark.parametrize("name", CONFIGS)
def test_losses_and_gradients_are_the_reference(tiny, name):
    cfg = tiny(**CONFIGS[name])
    model, ids = random_model(cfg, torch.float64).double(), documents(cfg)
    targets = ids.flip(1)
    phases = [(-1, True), (-2, False)] if cfg.num_loops else [(-1, False)]
    for phase, looped in phases:
        weights = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
        expected = frontier.loss(weights, ids, targets, cfg, looped)
        expected.backward()
        model.zero_grad()
        found = training_loss(cfg, model)(ids, targets, None, phase)[0]
        found.backward()
        assert found.item() == pytest.approx(expected.item(), rel=1e-5)
        for name, p in model.named_parameters():
            pair = [
                torch.zeros_like(p) if tensor.grad is None else tensor.grad for tensor in (p, weights[name])
            ]
            torch.testing.assert_close(*pair, rtol=1e-4, atol=1e-6, msg=f"{name}, looped {looped}")


@pytest.mark.parametrize("name", ["1855_bigram", "loop_of_all"])
def test_evaluation_computes_what_training_does(tiny, name):
    """Smearing and pairs are in both; a window that slides gets the same as a whole one."""
    cfg = tiny(**CONFIGS[name])
    model, ids = random_model(cfg), documents(cfg)
    targets = ids.flip(1)
    with torch.no_grad():
        nats = token_nats(model, ids, targets)
        assert training_loss(cfg, model)(ids, targets)[0] == pytest.approx(nats.mean().item(), rel=1e-6)
        places = torch.tensor([[3, 23], [13, 14]])
        found = token_nats(model, ids, targets.take_along_dim(places, 1), places)
    torch.testing.assert_close(found, nats.take_along_dim(places, 1))


def test_no_position_sees_a_later_token(tiny):
    cfg = tiny(**EVERYTHING)
    model, ids = random_model(cfg), documents(cfg)
    changed = ids.clone()
    changed[:, 15:] = (changed[:, 15:] + 7) % cfg.vocab_size
    with torch.no_grad():
        before, after = model(ids), model(changed)
    torch.testing.assert_close(after[:, :15], before[:, :15], rtol=0, atol=1e-5)
    assert (after[:, 15:] - before[:, 15:]).abs().amax(-1).min() > 1e-3


def test_smearing_stops_at_the_border_of_documents(tiny):
    cfg = tiny(**BASE, smear_gate_enabled=True)
    model, ids = random_model(cfg), documents(cfg)
    plain = model.tok_emb(ids)
    moved = (model.embed(ids) - plain).abs().amax(-1) > 0
    assert not moved[:, 0].any() and torch.equal(moved[:, 1:], ids[:, 1:] != BOS)


def test_at_the_start_gates_are_half_and_smearing_and_pairs_are_nothing(tiny):
    gated, plain = (GPT(tiny(**BASE, **knobs)) for knobs in (GATES | dict(bigram_vocab_size=50), {}))
    gated.load_state_dict(plain.state_dict(), strict=False)
    ids = documents(plain.cfg)
    assert torch.equal(gated.embed(ids), plain.embed(ids))
    attention = [model.blocks[0].attn for model in (gated, plain)]
    for part in attention:
        torch.nn.init.ones_(part.proj.weight)
    x, cos, sin = torch.randn(2, 24, 32), plain.cos[:24], plain.sin[:24]
    torch.testing.assert_close(attention[0](x, cos, sin)[0], attention[1](x, cos, sin)[0] / 2)


def test_hashed_pairs_learn_from_the_first_step(tiny):
    """With table and projection at zero, as published, neither would ever get a gradient."""
    cfg = tiny(**BASE, bigram_vocab_size=50, bigram_dim=8, iterations=4)
    model, ids = GPT(cfg), documents(cfg)
    optimisers = Optimisers(cfg, model, Runtime())
    for step in range(2):
        optimisers.flat.zero_()
        training_loss(cfg, model)(ids, ids.flip(1))[0].backward()
        optimisers.step(plan_step(cfg, step, 0.0, 0.0))
    assert model.bigram.embed.weight.any(dim=1).sum() > 20
    grads = [p.grad.abs().max() for p in model.bigram.parameters()]
    assert min(grads) > 0


# --- shapes, names, roles ---

FULL = dict(
    num_layers=11, mlp_mult=4.0, skip_gates_enabled=True, rope_dims=16, ln_scale=True, num_loops=2,
    train_seq_len=2048, train_batch_tokens=2048,
)  # fmt: skip
LANES = FULL | dict(parallel_start_layer=8)
COUNTS = [
    (FULL | dict(loop_start=4), {8192: 35_943_512, 4096: 33_846_360, 1024: 32_273_496}),
    (FULL | dict(parallel_residual_start=7), {8192: 35_944_536, 1024: 32_274_520}),
    (LANES | GATES, {8192: 35_945_671, 1024: 32_275_655}),
    (LANES, {8192: 35_944_602}),
]


@pytest.mark.parametrize("knobs, counts", COUNTS, ids=["1394", "1493", "1855", "1855_no_gates"])
def test_parameters_are_as_many_as_published(knobs, counts):
    found = {}
    for size in counts:
        with torch.device("meta"):
            found[size] = sum(p.numel() for p in GPT(Config(vocab_size=size, **knobs)).parameters())
    assert found == counts


PRESETS = Path(__file__).parents[1] / "sweeps/presets"
# At 8,192 pieces; on a CPU the same parts, smaller.
SCALED = {
    "VOCAB_SIZE", "NUM_LAYERS", "MODEL_DIM", "NUM_HEADS", "NUM_KV_HEADS", "ROPE_DIMS", "LOOP_START",
    "LOOP_END", "PARALLEL_START_LAYER", "PARALLEL_RESIDUAL_START", "TRAIN_SEQ_LEN", "TRAIN_BATCH_TOKENS",
    "MUON_MOMENTUM_WARMUP_STEPS", "EMA_DECAY", "TTT_STEPS", "TTT_COSINE_CHUNKS", "TTT_LORA_RANK",
    "TTT_BATCH_SIZE", "GPTQ_CALIBRATION_BATCHES", "GPTQ_RESERVE_SECONDS", "SIZE_TARGET",
}  # fmt: skip
PRESET_COUNTS = dict(frontier_1394=35_943_512, frontier_1493=35_944_536, frontier=35_945_671)


def preset_of(*names: str) -> Config:
    """The knobs of these files in sweeps/presets, a later one over an earlier."""
    env = {}
    for name in names:
        words = shlex.split((PRESETS / f"{name}.env").read_text(), comments=True)
        env |= dict(word.split("=", 1) for word in words)
    return Config.from_env(env)


@pytest.mark.parametrize("name", PRESET_COUNTS)
def test_presets_have_the_published_parameters(name):
    cfg = preset_of(name)
    with torch.device("meta"):
        model = GPT(cfg)
    assert sum(p.numel() for p in model.parameters()) == PRESET_COUNTS[name]
    assert cfg.train_batch_tokens == 48 * 8 * 2048


@pytest.mark.parametrize("name", PRESET_COUNTS)
def test_on_a_cpu_every_part_of_a_preset_stays_on(name):
    """Only sizes differ, and what the records count in layers or steps."""
    whole, small = preset_of(name), preset_of(name, "cpu", f"cpu/{name}")
    changed = {key for key, value in whole.overrides().items() if small.overrides().get(key) != value}
    assert changed <= SCALED and whole.overrides().keys() - small.overrides().keys() <= {"VOCAB_SIZE"}
    with torch.device("meta"):
        parts = [{name.split(".")[-1] for name, _ in GPT(cfg).named_parameters()} for cfg in (whole, small)]
    assert parts[0] == parts[1]
    plan = small.phases[-1].plan
    assert [phase.depth for phase in whole.phases] == [11, 15 if name == "frontier_1394" else 17]
    assert len(plan) > small.num_layers and len(small.phases) == 2
    lanes = [layer.block for layer in plan if layer.has_lanes or layer.is_parallel]
    assert lanes == ([] if name == "frontier_1394" else [3, 4, 5])


def test_the_tensors_have_the_published_names_and_shapes():
    with torch.device("meta"):
        state = GPT(Config(vocab_size=8192, **LANES | GATES)).state_dict()
        plain = GPT(Config(vocab_size=8192, num_layers=11)).state_dict()
    new = {name: tuple(tensor.shape) for name, tensor in state.items() if name not in plain}
    gates = {f"blocks.{block}.attn.attn_gate_w": (8, 12) for block in range(11)}
    lanes = dict(parallel_resid_lambdas=(11, 2), parallel_post_lambdas=(11, 2, 2))
    smear = {"smear_gate.weight": (1, 12), "smear_lambda": (1,)}
    assert new == dict(skip_gates=(8, 512)) | gates | lanes | smear
    assert tuple(state["skip_weights"].shape) == (8, 512)


def test_new_tensors_are_trained_and_packed_as_what_they_are(tiny):
    cfg = tiny(**EVERYTHING)
    model = GPT(cfg)
    roles = {weight.name: weight.role for weight in weights_of(cfg, model)}
    plain = GPT(tiny(**BASE)).state_dict()
    new = {name: role for name, role in roles.items() if name not in plain}
    bigram = {"bigram.embed.weight": "embed", "bigram.proj.weight": "matrix"}
    assert new == dict.fromkeys(new, "scalar") | bigram and len(new) == 7 + 6 + 2
    planes = {name: train_gpt.plan_tensor(cfg, name, (300, 300)).planes for name in new}
    rows = ("int8", "step")
    assert planes == dict.fromkeys(new, ("fp32",)) | dict.fromkeys(bigram, rows) | {"bigram.scale": rows}
    assert train_gpt.weight_group("bigram.embed.weight") == "embed"


def test_orthogonal_starts_are_of_large_matrices_that_do_not_start_at_zero():
    knobs = dict(num_layers=2, model_dim=128, num_heads=4, num_kv_heads=1, bigram_vocab_size=50)
    states = []
    for ortho_init in (False, True):
        torch.manual_seed(3)
        states.append(GPT(Config(**knobs, bigram_dim=64, ortho_init=ortho_init)).state_dict())
    moved = {name for name in states[0] if not torch.equal(states[0][name], states[1][name])}
    inner = ("attn.c_q", "mlp.fc")  # keys and values have 32 rows
    assert moved == {f"blocks.{i}.{name}.weight" for i in (0, 1) for name in inner} | {"bigram.proj.weight"}
    for name in moved:
        weight = states[1][name]
        weight = weight if weight.size(0) <= weight.size(1) else weight.T
        torch.testing.assert_close(weight @ weight.T, torch.eye(len(weight)), rtol=0, atol=1e-5)


# --- the loop ---

FIRST = "0 1 2 3 4"
ORDERS = {
    (0, 3, 5): (FIRST, "5 6 7 8 9 10", 5),
    (2, 4, 5): ("0 1 2 3 4 5 4", "5 4 5 6 7 8 9 10", 7),
    (2, 3, 5): ("0 1 2 3 4 5 3 4", "5 3 4 5 6 7 8 9 10", 8),
}


@pytest.mark.parametrize("loops, start, end", ORDERS)
def test_layers_run_in_the_published_order(loops, start, end):
    encoder, decoder, rows = ORDERS[loops, start, end]
    cfg = Config(num_layers=11, num_loops=loops, loop_start=start, loop_end=end)
    plan = cfg.phases[-1].plan
    assert [layer.block for layer in plan] == [int(block) for block in f"{encoder} {decoder}".split()]
    first = len(encoder.split())
    joined = [
        (place, layer.skip, layer.skip_from) for place, layer in enumerate(plan) if layer.skip is not None
    ]
    assert joined == [(first + row, row, rows - 1 - row) for row in range(rows)]
    assert cfg.phases[0].plan == Config(num_layers=11).phases[0].plan


@pytest.mark.parametrize("start, lanes", [
    (1, [5, 3, 4, 5, 6, 7, 8, 9, 10]), (4, [5, 3, 4, 5, 6, 7, 8, 9, 10]), (6, [6, 7, 8, 9, 10]),
    (8, [8, 9, 10]), (10, [10]),
])  # fmt: skip
def test_lanes_once_begun_go_on_to_the_end(start, lanes):
    plan = Config(num_layers=11, num_loops=2, parallel_start_layer=start).phases[-1].plan
    assert [layer.block for layer in plan if layer.has_lanes] == lanes


BY_STEPS = dict(iterations=100, max_wallclock_seconds=0.0)
BY_CLOCK = dict(iterations=10**6, max_wallclock_seconds=100.0)


@pytest.mark.parametrize("limits, step, seconds, phase", [
    (BY_STEPS, 34, 0, -2), (BY_STEPS, 35, 0, -1), (BY_STEPS, 99, 0, -1),
    (BY_CLOCK, 9, 34.999, -2), (BY_CLOCK, 9, 35.0, -1), (BY_CLOCK, 9, 101.0, -1),
])  # fmt: skip
def test_the_loop_begins_at_its_progress_and_never_ends(tiny, limits, step, seconds, phase):
    cfg = tiny(**PR_1394, **limits)
    assert plan_step(cfg, step, seconds, 0.0).phase == phase


def test_a_loop_from_the_start_is_one_phase(tiny):
    phases = tiny(**PR_1394, enable_looping_at=0.0).phases
    assert [phase.depth for phase in phases] == [11]


def in_first_step_of_phase(phase: int) -> str:
    """Each rank sends itself SIGTERM in the first step of that phase."""
    return f"""
later = train_gpt.train_step
def stopped(run, optimisers, batch, plan, limit):
    if run.runtime.defers_stop and plan.phase == {phase}:
        die({int(SIGTERM)})
    return later(run, optimisers, batch, plan, limit)
train_gpt.train_step = stopped
"""


class Kept(RunLog):
    """Keeps what is logged."""

    def __init__(self):
        super().__init__(None, "x")
        self.lines = []

    def line(self, text, echo=True):
        self.lines.append(text)


def finished(dataset, runtime: Runtime | None = None, **knobs) -> tuple[Run, train_gpt.Trained]:
    """A run of the toy data that has ended."""
    env = env_of(dataset, **SMALL | dict(iterations=6, train_batch_tokens=256) | knobs)
    cfg = Config.from_env(
        {f.name.upper(): env[f.name.upper()] for f in train_gpt.fields(Config) if f.name.upper() in env}
    )
    data = train_gpt.load_validation(cfg, train_gpt.load_tokenizer(cfg))
    run = Run(cfg, runtime or Runtime(), Kept(), random_model(cfg), data)
    stream = TokenStream(cfg.data_path, "train", cfg.vocab_size)
    return run, train(run, Optimisers(cfg, run.model, run.runtime), stream)


@pytest.mark.slow  # with lengths that change too in test_context.py, without a warm-up in test_run.py
@pytest.mark.parametrize("warm_up, late", [(1, 0), (0, 2)])
def test_both_plans_are_compiled_before_the_clock(dataset, warm_up, late):
    """Training and validation of each, and the windows that slide."""
    cadence = dict(warmup_steps=warm_up, val_loss_every=2, eval_stride=8)
    run, trained = finished(dataset, Traced(), **SMALLEST, **cadence)
    assert trained.late_graphs == late and run.runtime.graphs == 5
    switches = [line for line in run.log.lines if line.startswith("layer_loop: switched")]
    assert switches == ["layer_loop: switched to 3 layers at step:3 frac:0.50"]


@pytest.mark.parametrize("at, warned", [(0.35, 0), (1.0, 1)])
def test_a_run_that_ends_before_the_switch_says_so(dataset, at, warned):
    run, trained = finished(dataset, enable_looping_at=at, iterations=3)
    found = [line for line in run.log.lines if "ended before its last switch of layers" in line]
    assert len(found) == warned and trained.phase == (-2 if warned else -1)
    assert not warned or "runs 5 layers, the last step trained 3" in found[0]


@pytest.mark.slow
def test_all_of_it_trains_the_same_when_really_compiled(tiny):
    wanted, why_not = train_gpt.pick_compile("auto", torch.device("cpu"))
    if not wanted or not any(shutil.which(name) for name in ("c++", "g++", "clang++")):
        pytest.skip(f"no torch.compile here: {why_not or 'no C++ compiler'}")
    torch._dynamo.reset()
    cfg = tiny(**SMALLEST, pack_documents=True)
    model, ids = random_model(cfg), documents(cfg)
    loss = training_loss(cfg, model)
    compiled = Runtime(compiles=True).compile(loss)
    dials = plan_step(cfg, 0, 0.0, 0.0).dials(ids.device)
    values, gradients = [], []
    for function in (compiled, loss):
        model.zero_grad()
        values.append(function(ids, ids.flip(1), dials)[0])  # the plan with the loop: it has all there is
        values[-1].backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    torch.testing.assert_close(*values, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-5)


def test_a_packed_model_is_scored_again_to_the_same_bits(new):
    folder = new(SMALL | dict(eval_stride=16, eval_batch_seqs=16, use_hedge=1, ttt_steps=1))
    assert folder.start() == [0], folder.text("0.err")
    again = Folder(folder.path / "again", folder.server, folder.dataset, {})
    unset = dict.fromkeys([*TINY, *folder.knobs])
    path = folder.path / "final_model.int8.ptz"
    scoring = dict(run_id="r", device="cpu", eval_only=str(path), eval_stride=16, eval_batch_seqs=16)
    assert again.start(**unset | scoring) == [0], again.text("0.err")
    bpb = [run.result()["sliding_val_bpb"] for run in (folder, again)]
    assert bpb[0] == bpb[1]


def test_weights_of_another_run_are_taken_up(tiny, tmp_path):
    cfg = tiny(**PR_1855)
    torch.save(random_model(cfg).state_dict(), tmp_path / "weights.pt")
    model = GPT(cfg)
    train_gpt.load_weights(model, train_gpt.load_initial_weights(str(tmp_path / "weights.pt")), "it")
    torch.testing.assert_close(dict(model.state_dict()), dict(random_model(cfg).state_dict()))


# Each rank writes step and phase of its steps to a file; rank 1's clock runs three times too fast.
NOTED = """
inside = train_gpt.train_step
def noted(run, optimisers, batch, plan, limit):
    if run.runtime.defers_stop:
        with open(f"{rank}.phases", "a") as file:
            print(plan.step, plan.phase, file=file)
    return inside(run, optimisers, batch, plan, limit)
train_gpt.train_step = noted
seconds = train_gpt.Clock.seconds
if rank == 1:
    train_gpt.Clock.seconds = lambda self: 3 * seconds(self)
"""


@pytest.mark.parametrize("ranks", [1, 2])
def test_under_a_clock_all_ranks_switch_at_one_step_and_never_back(new, ranks):
    """Stopped in the first phase and in the second."""
    folder = new(SMALL | dict(iterations=10**6, max_wallclock_seconds=1.2, checkpoint_seconds=1e-9), ranks)
    patch = steady() + NOTED
    assert folder.start(patch + in_step(2, SIGTERM)) == [PREEMPTED] * ranks, folder.text("0.err")
    assert folder.resume(patch + in_first_step_of_phase(-1)) == [PREEMPTED] * ranks, folder.text("0.err")
    ended = folder.resume(patch)  # its last step may overrun the clock: ranks look at it more or less often
    assert ended in ([0] * ranks, [train_gpt.OVER_TRAIN_TIME] * ranks), folder.text("0.err")
    noted = [folder.text(f"{rank}.phases") for rank in range(ranks)]
    assert noted == noted[:1] * ranks
    steps, phases = zip(
        *([int(word) for word in line.split()] for line in noted[0].splitlines()), strict=True
    )
    assert list(phases) == sorted(phases) and set(phases) == {-2, -1}
    assert sorted(set(steps)) == list(range(len(set(steps))))


# --- bad input ---


@pytest.mark.parametrize("name", ["smear_gate_enabled", "pack_documents"])
def test_borders_of_documents_need_a_tokenizer_that_has_bos(tiny, tmp_path, name):
    path = tmp_path / "tokenizer.model"
    texts = ["def one two three", "four five six"] * 200
    path.write_bytes(train_tokenizer(texts, vocab_size=300, bos_id=-1, eos_id=1, unk_id=2, pad_id=0))
    assert sentencepiece.SentencePieceProcessor(model_file=str(path)).bos_id() == -1
    cfg = tiny(vocab_size=300, tokenizer_path=str(path))
    train_gpt.load_tokenizer(cfg)
    expected = f"{name.upper()}=1 stops at BOS, which must be piece 1; .* is -1"
    with pytest.raises(RunError, match=expected) as error:
        train_gpt.load_tokenizer(replace(cfg, **{name: True}))
    assert error.value.code == 2


# --- step losses of the public scripts ---

LOSSES = json.loads((Path(__file__).parent / "support/frontier_losses.json").read_text())
PEER = dict(
    vocab_size=1024, num_layers=7, model_dim=128, num_heads=4, num_kv_heads=2, mlp_mult=4.0,
    mlp_act="leaky_relu2", leaky_slope=0.5, xsa_last_n=-1, qk_gain_init=4.0, ortho_init=True, seed=1,
    train_seq_len=128, train_batch_tokens=1024, iterations=40, max_wallclock_seconds=0.0, warmdown_frac=0.667,
    muon_wd=0.085, grad_clip_norm=0.3, tied_embed_lr=0.03, matrix_lr=0.02, scalar_lr=0.02, muon_momentum=0.99,
    muon_momentum_warmup_start=0.92, muon_momentum_warmup_steps=1500,
)  # fmt: skip
CHANGES = dict(
    base={}, skip_gates=dict(skip_gates_enabled=True), rope8=dict(rope_dims=8), ln_scale=dict(ln_scale=True),
    loop=LOOP | dict(enable_looping_at=0.5), parallel=dict(parallel_residual_start=4),
    row_norm=dict(muon_row_normalize=True), decays=dict(adam_wd=0.02, embed_wd=0.085),
    min_lr=dict(min_lr=0.1),
)  # fmt: skip
CHANGES["whole"] = {}
for part in ("skip_gates", "rope8", "ln_scale", "loop", "row_norm", "decays"):
    CHANGES["whole"] |= CHANGES[part]
CHANGES["whole1493"] = CHANGES["whole"] | CHANGES["parallel"] | dict(
    enable_looping_at=0.35, qk_gain_init=5.0, matrix_lr=0.022, muon_wd=0.095, warmdown_frac=0.72
)  # fmt: skip
# Only what this script has the knobs for.
COMPARED = [name for name, knobs in CHANGES.items() if knobs.keys() <= Config.__dataclass_fields__.keys()]


@pytest.mark.skipif("FRONTIER_DATA" not in os.environ, reason="FRONTIER_DATA: a folder of the English shards")
@pytest.mark.parametrize("name", COMPARED)
def test_forty_steps_have_the_losses_of_the_public_script(name):
    """From the same weights: with ORTHO_INIT our SEED=1 draws what #1394's script draws. 30 s each."""
    cfg = Config(**PEER | CHANGES[name], data_path=os.environ["FRONTIER_DATA"])
    torch.manual_seed(cfg.seed)
    run = Run(cfg, Runtime(), RunLog(None, "x"), GPT(cfg), data=None)
    optimisers = Optimisers(cfg, run.model, run.runtime)
    source = batches(cfg, TokenStream(cfg.data_path, "train", cfg.vocab_size), run.runtime)
    losses = []
    for step in range(cfg.iterations):
        losses.append(train_step(run, optimisers, next(source), plan_step(cfg, step, 0.0, 0.0), 99).item())
    assert losses == pytest.approx(LOSSES[name], abs=1e-4)
