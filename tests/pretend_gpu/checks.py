"""Checks of one preset on the pretended card that device.py has made; README.md says what they are."""

import collections
import contextlib
import ctypes
import json
import os
import sys

import torch
from torch._dynamo.utils import counters
from torch._inductor.compile_fx import compile_fx
from torch._inductor.graph import GraphLowering
from torch._inductor.ir import UserDefinedTritonKernel
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.runtime.driver import driver as triton_driver

import train_gpt
from train_gpt import GPT, Clock, Config, Optimisers, Run, RunLog, Runtime, Training, plan_step

SEQUENCES = 64  # of 1,024 tokens: 65,536 tokens, what a card computes at a time
ATTENTION = "_scaled_dot_product_"


def bytes_moved(graph: GraphLowering) -> int:
    """What the kernels and products of a graph read and write, by inductor's count.

    It takes what a kernel of ours writes, which it is given to write in, for read as well: not so here.
    """
    total_bytes, _, _ = graph.count_bytes()
    for node in graph.scheduler.nodes:
        if isinstance(node.node, UserDefinedTritonKernel):
            total_bytes -= node.get_write_buffer_sizes()
    return total_bytes


class Compiled:
    """What torch.compile made: for each graph its attention operations and the bytes that it moves.

    Its `backend` compiles a graph as inductor does, Triton's kernels through ptxas, and then runs the graph
    on tensors that have no contents.
    """

    def __init__(self):
        self.attention = []  # a Counter of operations for each graph
        self.megabytes = []

    def lower(self, graph: GraphLowering):
        module = self.compile_to_module(graph)
        self.megabytes.append(bytes_moved(graph) / 1e6)
        return module

    def watch(self) -> None:
        """Count in each graph that inductor lowers from now on."""
        self.compile_to_module = GraphLowering.compile_to_module
        counted = self

        def compile_to_module(graph, *inputs, **settings):
            return counted.lower(graph)

        GraphLowering.compile_to_module = compile_to_module

    def backend(self, graph, inputs):
        return compile_fx(graph, inputs, inner_compile=self.compile_inner)

    def compile_inner(self, graph, inputs, **settings):
        operations = collections.Counter()
        for node in graph.graph.nodes:
            if node.op == "call_function" and "attention" in str(node.target):
                operations[str(node.target)] += 1
        self.attention.append(operations)
        torch._inductor.compile_fx.compile_fx_inner(graph, inputs, **settings)

        def run(values):
            return graph(*values)

        run._boxed_call = True
        return run


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


def new_model(cfg: Config, dtype: torch.dtype) -> GPT:
    with torch.device("cuda"):
        return GPT(cfg, dtype)


def blank(cfg: Config, sequences: int) -> torch.Tensor:
    return torch.zeros(sequences, cfg.train_seq_len, dtype=torch.int64, device="cuda")


def blank_dials(cfg: Config) -> torch.Tensor:
    """As StepPlan.dials makes them; tensors without contents cannot be pinned."""
    return torch.zeros(len(plan_step(cfg, 0, 0.0, 0.0).layers) + 2, device="cuda")


def count_graphs(cfg: Config, dtype: torch.dtype) -> dict:
    """Graphs of the training phases and of evaluation, and of the same once more."""
    torch._dynamo.reset()
    counters.clear()
    runtime = Runtime(torch.device("cuda", 0), dtype=dtype, compiles=True, backend="aot_eager")
    run = Run(cfg, runtime, RunLog(None, ""), new_model(cfg, dtype), None)
    ids = blank(cfg, 4)
    made = []
    for repeat in range(3):
        for phase in range(-len(cfg.phases), 0):
            dials = blank_dials(cfg)
            windows = ids[:, : cfg.phases[phase].length].contiguous()
            (run.loss(windows, windows, dials, phase)[0] * (0.25 + repeat)).backward()
        made.append(graphs())
    positions = torch.zeros(4, 64, dtype=torch.int64, device="cuda")
    for _ in range(2):
        with torch.no_grad():
            run.nats(ids, ids)
            run.nats(ids, positions, positions)
        made.append(graphs())
    return dict(
        train=made[0], train_again=made[2] - made[0], eval=made[3] - made[2], eval_again=made[4] - made[3]
    )


def compile_step(cfg: Config, dtype: torch.dtype) -> dict:
    """Compile one training pass at the official size; its kernels, attention and bytes."""
    torch._dynamo.reset()
    counted = Compiled()
    counted.watch()
    runtime = Runtime(torch.device("cuda", 0), dtype=dtype, compiles=True, backend=counted.backend)
    loss = runtime.compile(train_gpt.training_loss(cfg, new_model(cfg, dtype)))
    ids = blank(cfg, SEQUENCES * 1024 // cfg.train_seq_len)
    loss(ids, ids, blank_dials(cfg), -1)[0].backward()
    forward, backward = counted.attention
    return dict(
        attention=sorted(name.removeprefix("aten.") for name in (forward | backward)),
        attention_calls=[sum(forward.values()), sum(backward.values())],
        megabytes=[round(size, 1) for size in counted.megabytes],
        kernels=len(set(triton_driver.active.utils.kernels)),
    )


def count_waits(cfg: Config, dtype: torch.dtype) -> dict:
    """How often the host waits for the card in each part of a plain step."""
    library = ctypes.CDLL(os.environ["PRETEND_RUNTIME"])
    card = torch.device("cuda", 0)
    runtime = Runtime(card, dtype=dtype)
    # There is neither cuSOLVER, which runs need on the host alone, nor cuBLAS, which never waits.
    torch.nn.init.orthogonal_ = lambda weight: weight
    train_gpt.orthogonalise = lambda x, quintics, dtype: x.to(dtype)
    model = new_model(cfg, dtype)
    optimisers = Optimisers(cfg, model, runtime)
    run = Run(cfg, runtime, RunLog(None, ""), model, None)
    training = Training(run, optimisers, 0.0)
    plan = plan_step(cfg, 0, 0.0, 0.0)
    pinned = torch.zeros(4, cfg.train_seq_len, dtype=torch.int64).pin_memory()
    loss = torch.zeros((), device=card)
    clock = Clock(runtime)
    clock.start()
    for _ in range(3):  # the first steps make states
        optimisers.step(plan)
        clock.tick()
    parts = dict(
        dials=lambda: plan.dials(card),
        batch=lambda: pinned.to(card, non_blocking=True),
        optimisers=lambda: optimisers.step(plan),
        count_step=lambda: training.count_step(plan, loss),
    )
    waits = {}
    for name, part in parts.items():
        before = library.pretend_waits()
        part()
        waits[name] = library.pretend_waits() - before
    return waits


def wrong_with(cfg: Config, found: dict) -> list[str]:
    """What of it breaks a promise, a sentence each."""
    wrong = []
    graphs_found = found["graphs"]
    phases = len(cfg.phases)
    if graphs_found["train"] != phases:
        wrong.append(f"{graphs_found['train']} training graphs for {phases} phases")
    if graphs_found["train_again"] or graphs_found["eval_again"]:
        wrong.append("a graph was compiled again")
    layers = cfg.phases[-1].depth
    if found["attention_calls"] != [layers, layers]:
        wrong.append(f"{found['attention_calls']} fused attention calls for {layers} layers")
    if any("math" in name for name in found["attention"]):
        wrong.append("attention is unfused (math)")
    # In float16 the optimisers must know on the host whether a gradient has overflown.
    expected_waits = dict.fromkeys(found["waits"], 0) | dict(optimisers=int("float16" in found["dtype"]))
    for part, waits in found["waits"].items():
        if waits > expected_waits[part]:
            wrong.append(f"{part} waits for the card {waits} times a step")
    return wrong


def main() -> None:
    knobs = dict(argument.split("=", 1) for argument in sys.argv[2:])
    cfg = Config.from_env(knobs)
    card = torch.device("cuda", 0)
    dtype = train_gpt.DTYPES[train_gpt.pick_dtype(cfg.dtype, card)]
    train_gpt.use_fused_attention(card, train_gpt.pick_deterministic(cfg.deterministic, card))
    with contextlib.redirect_stdout(sys.stderr):
        with FakeTensorMode(allow_non_fake_inputs=True):
            found = dict(preset=sys.argv[1], dtype=str(dtype), graphs=count_graphs(cfg, dtype))
            found |= compile_step(cfg, dtype)
        found["waits"] = count_waits(cfg, dtype)
    found["wrong"] = wrong_with(cfg, found)
    print(json.dumps(found), flush=True)
    os._exit(0)  # the pretended runtime has no orderly end
