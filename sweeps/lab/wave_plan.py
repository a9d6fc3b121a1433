"""From a wave to its runs: arms made by rule, the order in which all start, what they would take.

Everything is checked before anything runs: `expand` raises UserError with a line for every fault.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from statistics import median

from data.user_error import UserError
from sweeps.lab.paths import PRESETS, SHIPPED_RESULTS
from sweeps.lab.run_rows import Results
from sweeps.lab.run_state import RunState
from sweeps.lab.wave_spec import (
    CONTROL,
    KNOBS,
    Arm,
    Env,
    Sizes,
    Wave,
    base_env,
    checked_config,
    preset_env,
    read_preset,
)
from train_gpt import Config, RunError, needs_of, parse_knob, unmet_needs

Values = dict[str, object]  # the value of each knob, by its name in capitals

DEFAULTS: Values = {name: knob.default for name, knob in KNOBS.items()}
# How long a run is, and on what batch: not an idea that could be taken out.
LENGTH = "ITERATIONS", "MAX_WALLCLOCK_SECONDS", "TRAIN_BATCH_TOKENS", "TRAIN_SEQ_LEN"
WARMDOWN_SHARE = "0.087"  # the official 1,200 of 13,780 steps
MOST_ROUNDS = 9  # of changes that call for further changes


@dataclass(frozen=True)
class Run:
    """One training: an arm, a seed, and everything that is set. Of the engine's knobs, env has SEED."""

    wave: Wave
    arm: Arm
    seed: int
    rerun: int  # 0, or the how-manieth repetition of the control
    env: Env
    cfg: Config
    duplicate_of: str = ""  # the arm that is the same experiment

    @property
    def run_id(self) -> str:
        suffix = f".r{self.rerun}" if self.rerun else ""
        return f"{self.wave.name}.{self.arm.name}.{self.seed}{suffix}"

    @property
    def is_control(self) -> bool:
        return self.arm.name == CONTROL


# ------------------------------------------------------------------------------- knobs and their needs


def text_of(value: object) -> str:
    """A knob's value as the environment spells it: 15.0 as 15."""
    if isinstance(value, tuple):
        return ",".join(value)
    if isinstance(value, bool):
        return str(int(value))
    if isinstance(value, float):
        return f"{value:.10g}"
    return str(value)


def values_of(env: Mapping[str, str]) -> Values:
    """The value of every knob under this environment; nothing is checked."""
    values = dict(DEFAULTS)
    for name, text in env.items():
        if name in KNOBS:
            values[name] = parse_knob(KNOBS[name], text)
    return values


def idle_knobs(values: Values) -> set[str]:
    """Knobs whose conditions do not hold under these values, so that they do nothing, set or not."""
    by_field = {name.lower(): value for name, value in values.items()}
    fields_by_name = Config.__dataclass_fields__
    return {name for name, knob in KNOBS.items() if unmet_needs(knob, by_field, fields_by_name)}


def needed_knobs(name: str) -> list[str]:
    """The knobs whose values decide whether this one has an effect."""
    names = []
    for need in needs_of(KNOBS[name]):
        names += [either.name for either in (need, *need.instead)]
    return names


def one_changed(start: Values, goal: Values, knob: str, refill: bool) -> Values:
    """The fewest changes that take `knob` from its value in `start` to the one in `goal`.

    They leave no knob set without effect: what `knob` itself needs comes from `goal`, and another knob that
    stops acting goes to its goal too. refill: one that begins to act does so as well, e.g. the baseline's
    warm-down once Tidal is off.
    """
    values = dict(start)
    values[knob] = goal[knob]
    idle_at_start = idle_knobs(start)
    for _ in range(MOST_ROUNDS):
        idle = idle_knobs(values)
        without_effect = [name for name in idle if values[name] != DEFAULTS[name]]
        moves: Values = {}
        for name in without_effect:
            if name == knob or values[name] == goal[name]:
                moves |= {needed: goal[needed] for needed in needed_knobs(name)}
            else:
                moves[name] = goal[name]
        if refill:
            for name in idle_at_start - idle:
                moves[name] = goal[name]
        if all(values[name] == value for name, value in moves.items()):
            moves = mend_refusal(values, goal, knob)
            if not moves:
                break
        values |= moves
    changed = [name for name in (knob, *values) if values[name] != start[name]]
    return {name: values[name] for name in changed}


def mend_refusal(values: Values, goal: Values, knob: str) -> Values:
    """The first knob that makes the values a config again by going to its goal too; none if they are one.

    Some knobs fit each other alone: a loop's last block needs its first, GPTQ the seconds kept for it. Those
    that act under the condition of `knob` are tried first.
    """

    def acts_otherwise(name: str) -> bool:
        return KNOBS[name].metadata["needs"] != KNOBS[knob].metadata["needs"]

    if is_refused(values):
        for name in sorted(KNOBS, key=acts_otherwise):
            if values[name] != goal[name] and not is_refused(values | {name: goal[name]}):
                return {name: goal[name]}
    return {}


def is_refused(values: Values) -> bool:
    """Whether train_gpt.py takes no config of these values; knobs without effect are not meant."""
    try:
        Config.from_env({name: text_of(value) for name, value in values.items()} | {"ALLOW_INERT": "1"})
    except RunError:
        return True
    return False


def ideas_of(values: Values, plain: Values) -> list[str]:
    """Knobs of a stack that act, differ from the plain one's and shape the result."""
    idle = idle_knobs(values)
    ideas = []
    for name, knob in KNOBS.items():
        differs = values[name] != plain[name] and name not in idle
        if differs and name not in LENGTH and knob.metadata["role"] != "place":
            ideas.append(name)
    return ideas


# ---------------------------------------------------------------------------------------- arms by rule


def plain_values(wave: Wave, sizes: Sizes, base: Values) -> Values:
    """The baseline at the wave's length, with the knobs of the base line; its warm-down fits the run."""
    plain = values_of(preset_env("baseline", sizes) | dict(wave.base_changes))
    for name in LENGTH:
        plain[name] = base[name]
    if plain["WARMDOWN_ITERS"] >= plain["ITERATIONS"] and not plain["WARMDOWN_FRAC"]:
        plain["WARMDOWN_ITERS"] = DEFAULTS["WARMDOWN_ITERS"]
        plain["WARMDOWN_FRAC"] = float(WARMDOWN_SHARE)
    return plain


def texts_of(change: Values) -> Env:
    return {name: text_of(value) for name, value in change.items()}


def arms_left_out(wave: Wave, sizes: Sizes, only: tuple[str, ...]) -> list[Arm]:
    """An arm for each knob of the base that is not the baseline's, with that knob at the baseline's value."""
    base = values_of(base_env(wave, sizes))
    plain = plain_values(wave, sizes, base)
    on_base_line = dict(wave.base_changes)
    ideas = [name for name in ideas_of(base, plain) if name not in on_base_line]
    for name in only:
        if name not in ideas:
            raise UserError(f"leave_one_out: {name} is no knob that {wave.preset} sets: {' '.join(ideas)}")
    if not ideas:
        raise UserError(f"leave_one_out: {wave.preset} sets nothing that the baseline does not")
    arms = []
    for name in ideas:
        if only and name not in only:
            continue
        change = one_changed(base, plain, name, refill=True)
        hypothesis = (
            f"what is lost without it: {name} back from {text_of(base[name])} to {text_of(plain[name])}"
        )
        arms.append(Arm(f"no_{name.lower()}", hypothesis, texts_of(change)))
    return arms


def arms_added_in(wave: Wave, sizes: Sizes, preset: str) -> list[Arm]:
    """An arm for each knob of a preset that is not the wave's base's, alone on that base."""
    base = values_of(base_env(wave, sizes))
    stack = values_of(preset_env(preset, sizes))
    for name in LENGTH:
        stack[name] = base[name]
    on_base_line = dict(wave.base_changes)
    arms = []
    for name in ideas_of(stack, base):
        if name in on_base_line or stack[name] == DEFAULTS[name]:
            continue
        change = texts_of(one_changed(base, stack, name, refill=False))
        if any(change == arm.change for arm in arms):
            continue  # two knobs that go together
        hypothesis = f"what it brings alone: {name} {text_of(base[name])} -> {text_of(stack[name])}"
        arms.append(Arm(f"with_{name.lower()}", hypothesis, change))
    if not arms:
        raise UserError(f"add_one_in: {preset} sets nothing that {wave.preset} does not")
    return arms


def with_generated_arms(wave: Wave, sizes: Sizes) -> Wave:
    """The wave with the arms of its generators after its own.

    add_one_in without a preset turns the wave round: `baseline` becomes the base, and the preset that was
    the base gives the knobs. An arm written by hand takes the place of a generated one of its name.
    """
    stack = wave.preset
    if ("add_one_in", ()) in wave.generators:
        if any(word == "leave_one_out" for word, _ in wave.generators):
            raise UserError(
                "add_one_in changes the base to `baseline`: leave_one_out wants a wave of its own"
            )
        wave = replace(wave, preset="baseline")
    arms = list(wave.arms)
    names = {arm.name for arm in arms}
    for word, arguments in wave.generators:
        if word == "leave_one_out":
            new_arms = arms_left_out(wave, sizes, arguments)
        else:
            new_arms = arms_added_in(wave, sizes, arguments[0] if arguments else stack)
        arms += [arm for arm in new_arms if arm.name not in names]
        names |= {arm.name for arm in new_arms}
    return replace(wave, arms=tuple(arms), generators=())


# -------------------------------------------------------------------------------- the config of an arm


def without_idle_knobs(env: Env, said: set[str]) -> Env:
    """`env` without the knobs of a preset or its sizes that do nothing beside what the wave itself says."""
    while True:
        try:
            idle = idle_knobs(values_of(env)) - said
        except RunError:  # a value that is none: checked_config says which
            return env
        acting = {name: value for name, value in env.items() if name not in idle}
        if len(acting) == len(env):
            return acting
        env = acting


def configure_arm(wave: Wave, base: Env, arm: Arm, where: str) -> tuple[Env, Config]:
    """What is set for an arm of the wave, and its config. Raises UserError as checked_config does."""
    said_by_the_wave = {*dict(wave.base_changes), *arm.change}
    env = without_idle_knobs(base | arm.change, said_by_the_wave)
    return env, checked_config(env, where)


def fault_of(wave: Wave, sizes: Sizes, arm: Arm) -> str:
    """What is wrong with the arm's config at these sizes, or ''."""
    try:
        configure_arm(wave, base_env(wave, sizes), arm, "")
    except UserError as error:
        return error.lines[0].lstrip(": ")
    return ""


def sized_knobs(sizes: Sizes) -> set[str]:
    """The knobs of the model's shape whose values a small machine decides, whatever the preset says."""
    knobs: set[str] = set()
    if sizes.cpu or sizes.proxy:
        knobs |= read_preset(PRESETS / "cpu.env").keys()
    if sizes.proxy:
        knobs |= read_preset(PRESETS / "proxy.env").keys()
    return {name for name in knobs if name not in LENGTH and KNOBS[name].metadata["role"] == "model"}


def unfit_arms(wave: Wave, sizes: Sizes) -> dict[str, str]:
    """Arms by name that cannot be tried at these sizes, and why.

    They change a size that is neither the preset's here nor the wave's own, or are sound at the published
    sizes only. What is wrong at any size is not among them: it is told with the other faults.
    """
    sized = sized_knobs(sizes) - {*dict(wave.base_changes)}
    reasons = {}
    if not sized_knobs(sizes):
        return reasons
    for arm in wave.arms:
        if fault_of(wave, Sizes(), arm):
            continue
        changed_sizes = sorted(sized & arm.change.keys())
        fault = fault_of(wave, sizes, arm)
        if changed_sizes:
            reasons[arm.name] = f"{changed_sizes[0]} is not the preset's at these sizes"
        elif fault:
            reasons[arm.name] = fault
    return reasons


# -------------------------------------------------------------------------------------------- expansion


def at_horizon(wave: Wave, steps: int, base: Env) -> Wave:
    """The wave at another length. It reports as often, in shares of the run."""
    changes = dict(wave.base_changes)
    changes["ITERATIONS"] = str(steps)
    usual_steps = int(base.get("ITERATIONS", DEFAULTS["ITERATIONS"]))
    for name in ("VAL_LOSS_EVERY", "TRAIN_LOG_EVERY"):
        if name in base and name not in dict(wave.base_changes) and int(base[name]):
            changes[name] = str(max(1, round(int(base[name]) * steps / usual_steps)))
    return replace(wave, name=f"{wave.name}_h{steps}", base_changes=tuple(changes.items()), horizons=())


def waves_of(wave: Wave, sizes: Sizes) -> list[Wave]:
    """The wave itself, or one for each horizon, the shortest first."""
    if not wave.horizons:
        return [wave]
    if "ITERATIONS" in dict(wave.base_changes) or any("ITERATIONS" in arm.change for arm in wave.arms):
        raise UserError("horizons sets ITERATIONS: take it off the base line and the arms")
    base = base_env(wave, sizes)
    return [at_horizon(wave, steps, base) for steps in sorted(wave.horizons)]


def in_order(wave: Wave) -> Iterator[tuple[str, int]]:
    """(arm's name, rerun) of one seed: the control first and again after every so many arms."""
    yield CONTROL, 0
    for count, arm in enumerate(wave.arms, 1):
        yield arm.name, 0
        if wave.control_every and count % wave.control_every == 0:
            yield CONTROL, count // wave.control_every


@dataclass(frozen=True)
class CheckedArm:
    """An arm with everything that is set for it."""

    arm: Arm
    env: Env
    cfg: Config
    duplicate_of: str  # an earlier arm that is the same experiment, or ''


def check_arms(wave: Wave, base: Env) -> dict[str, CheckedArm]:
    """Every arm by name, the control first. Raises UserError with all faults."""
    errors: list[str] = []
    checked: dict[str, CheckedArm] = {}
    first_of_hash: dict[str, str] = {}
    for arm in (Arm(CONTROL, "", {}), *wave.arms):
        where = f"base {wave.preset}" if arm.name == CONTROL else f"arm {arm.name}"
        try:
            if arm.name in checked:
                raise UserError(f"two arms are named {arm.name}")
            env, cfg = configure_arm(wave, base, arm, where)
        except UserError as error:
            errors += error.lines
            if arm.name == CONTROL:
                break  # every arm would say the same
            continue
        first = first_of_hash.setdefault(cfg.hash, arm.name)
        checked[arm.name] = CheckedArm(arm, env, cfg, duplicate_of="" if first == arm.name else first)
    if errors:
        raise UserError(*(f"{wave.name}: {line}" for line in errors))
    return checked


def expand(wave: Wave, sizes: Sizes) -> list[Run]:
    """All runs of a wave, in the order they start: all arms with one seed, then all with the next.

    So a wave that is stopped is balanced. A duplicate is among them, marked. Raises UserError with a line for
    every fault.
    """
    runs: list[Run] = []
    for one_wave in waves_of(wave, sizes):
        one_wave = with_generated_arms(one_wave, sizes)
        unfit = unfit_arms(one_wave, sizes)
        one_wave = replace(one_wave, arms=tuple(arm for arm in one_wave.arms if arm.name not in unfit))
        checked = check_arms(one_wave, base_env(one_wave, sizes))
        for seed in one_wave.seeds:
            for name, rerun in in_order(one_wave):
                arm = checked[name]
                env = arm.env | {"SEED": str(seed)}
                runs.append(Run(one_wave, arm.arm, seed, rerun, env, arm.cfg, arm.duplicate_of))
    return runs


def warnings_of(runs: list[Run], wave: Wave | None = None, sizes: Sizes | None = None) -> list[str]:
    """What is allowed but seldom meant, and the wave's arms that do not fit the sizes, a line each."""
    lines: dict[str, None] = {}  # a set that keeps its order
    if wave and sizes:
        for name, reason in unfit_arms(wave, sizes).items():
            lines[f"{wave.name}.{name}: not run: {reason}"] = None
    for run in runs:
        cfg = run.cfg
        decays_by_steps = cfg.schedule == "warmdown" and not cfg.warmdown_frac
        if decays_by_steps and cfg.warmdown_iters >= cfg.iterations > 0:
            share = cfg.iterations / cfg.warmdown_iters
            line = (
                f"{run.wave.name}.{run.arm.name}: WARMDOWN_ITERS={cfg.warmdown_iters} is longer than "
                f"the run: the learning rate starts at {share:.2f}; WARMDOWN_FRAC={WARMDOWN_SHARE}?"
            )
            lines[line] = None
    return list(lines)


def select_arms(runs: list[Run], only: list[str]) -> list[Run]:
    """The runs of these arms and of the control; all where none is named."""
    if not only:
        return runs
    names = {run.arm.name for run in runs}
    for name in only:
        if name not in names:
            raise UserError(f"--only {name}: no such arm ({' '.join(sorted(names - {CONTROL}))})")
    return [run for run in runs if run.arm.name in only or run.is_control]


def without_exact_reruns(runs: list[Run]) -> list[Run]:
    """The runs without those of the control that would give the bits of its first run of the same seed.

    On the CPU of one machine a run that ends by its steps does so (README.md, "The law of reproducibility"),
    so that its repetition says nothing about noise. A run that a clock ends is not repeatable.
    """
    return [run for run in runs if not (run.rerun and is_repeatable(run.cfg))]


def is_repeatable(cfg: Config) -> bool:
    """Whether a run with this config gives the same bits again on one machine's CPU."""
    return cfg.max_wallclock_seconds == 0 and cfg.deterministic != "0"


# ---------------------------------------------------------------------------------- what it would take


def size_key(config: Mapping[str, object]) -> tuple:
    """What decides how long a run takes, on one machine. A knob that is younger than the run was off."""
    defaults = {knob.name: knob.default for knob in KNOBS.values()}
    names = [knob.name for knob in KNOBS.values() if knob.metadata["role"] == "model"]
    names += ["iterations", "max_wallclock_seconds", "train_batch_tokens", "eval_stride", "device"]
    return tuple(config.get(name, defaults[name]) for name in names)


def earlier_seconds(results: Path) -> dict[tuple, list[float]]:
    """Seconds of every run in the results that was never stopped, by size."""
    seconds: dict[tuple, list[float]] = {}
    for path in sorted(results.glob("*.jsonl")):
        for row in Results(results, path.stem).latest().values():
            if row.get("state") == RunState.OK and row.get("run_seconds") and not row.get("resumed"):
                seconds.setdefault(size_key(row["config"]), []).append(row["run_seconds"])
    return seconds


def predict_seconds(
    todo: list[Run], results: Path, seconds_per_run: float | None
) -> tuple[float | None, str]:
    """(seconds of all runs one after another or None, where that is from).

    From runs that were made here; else as was given; else from the runs that came with the project.
    """
    if not todo:
        return 0.0, "nothing is left to do"
    own = earlier_seconds(results)
    count = count_alike(todo, own)
    if count:
        return seconds_like(todo, own), f"from {count} earlier runs of the same sizes"
    if seconds_per_run:
        return seconds_per_run * len(todo), f"at {seconds_per_run:g} s a run, as given"
    shipped = earlier_seconds(SHIPPED_RESULTS)
    count = count_alike(todo, shipped)
    if count:
        source = f"from {count} runs of the same sizes that came with the project, made on another machine"
        return seconds_like(todo, shipped), source
    clocks = [run.cfg.max_wallclock_seconds for run in todo]
    if all(clocks):
        return sum(clocks), "the training clocks alone; compiling and scoring come on top"
    return None, "unknown: no earlier run of this size (--seconds-per-run says how long one takes)"


def count_alike(todo: list[Run], known: Mapping[tuple, list[float]]) -> int:
    """How many runs are known that have the sizes of one that is to be made."""
    keys = {size_key(vars(run.cfg)) for run in todo}
    return sum(len(known.get(key, [])) for key in keys)


def seconds_like(todo: list[Run], known: Mapping[tuple, list[float]]) -> float:
    """Seconds of all runs: for each the median of its size, or that of all where its size is not known."""
    median_of_all = median(chain.from_iterable(known.values()))
    total = 0.0
    for run in todo:
        total += median(known.get(size_key(vars(run.cfg)), [median_of_all]))
    return total


def clock_text(seconds: float) -> str:
    """Seconds in the unit that people would use."""
    minutes = seconds / 60
    if seconds < 100:
        return f"{seconds:.0f} s"
    if minutes < 100:
        return f"{minutes:.0f} min"
    return f"{minutes / 60:.1f} h"


def change_text(run: Run) -> str:
    return " ".join(f"{name}={value}" for name, value in run.arm.change.items())


def print_runs(runs: list[Run]) -> None:
    """A line a run, for --dry."""
    for run in runs:
        print(f"{run.run_id}  {change_text(run)}{'  DUPLICATE' if run.duplicate_of else ''}")


def print_arms(runs: Iterable[Run]) -> None:
    """A line an arm, by wave."""
    first_runs = [run for run in runs if run.seed == run.wave.seeds[0] and not run.rerun]
    width = max(len(run.arm.name) for run in first_runs)
    wave_name = ""
    for run in first_runs:
        if run.wave.name != wave_name:
            wave_name = run.wave.name
            print(f"\n{wave_name}")
        about = f"{change_text(run)}  # {run.arm.hypothesis}" if run.arm.change else ""
        duplicate = f"  DUPLICATE of {run.duplicate_of}, not run" if run.duplicate_of else ""
        print(f"  {run.arm.name:{width}}  {about}{duplicate}".rstrip())


def print_plan(
    runs: list[Run],
    todo: list[Run],
    jobs: int,
    results: Path,
    seconds_per_run: float | None = None,
    usd_per_hour: float | None = None,
) -> None:
    """The question, one line an arm, then the numbers of runs, the predicted time and its cost."""
    wave = runs[0].wave
    base_line = " ".join(f"{name}={value}" for name, value in wave.base_changes)
    print(f"question  {wave.question}\nbase      {wave.preset} {base_line}")
    print(f"decide    {wave.decide or '-'}\nseeds     {' '.join(map(str, wave.seeds))}")
    print_arms(runs)
    duplicates = sum(bool(run.duplicate_of) for run in runs)
    reruns = sum(run.rerun > 0 for run in runs)
    count = len(runs) - duplicates
    print(f"\nruns      {count} ({reruns} reruns of the control), {duplicates} duplicates not run")
    print(f"to do     {len(todo)}, {jobs} at once")
    seconds, source = predict_seconds(todo, results, seconds_per_run)
    if seconds is None:
        print(f"time      {source}")
        return
    wall_seconds = seconds / max(1, min(jobs, len(todo)))
    print(f"time      {clock_text(wall_seconds)} ({source})")
    if usd_per_hour:
        cost = wall_seconds / 3600 * usd_per_hour
        print(f"cost      {cost:.2f} USD at {usd_per_hour:g} an hour")
