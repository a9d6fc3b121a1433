"""A wave: one question, a base, arms that change a few knobs of it, seeds. It is read from words, checked
as a whole before anything runs, and expanded into runs. sweeps/lib.sh says how a wave is written."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path

from data.user_error import UserError
from sweeps.lab.paths import PRESETS
from train_gpt import Config, RunError, needs_of, parse_knob, unmet_needs

Env = dict[str, str]

CONTROL = "control"
KNOBS = {f.name.upper(): f for f in fields(Config)}
DEFAULTS = {name: f.default for name, f in KNOBS.items()}
OVERLAYS = "cpu", "proxy"
# Knobs that the engine sets for each run.
PLACES = "SEED", "RUN_ID", "OUT_DIR", "RESUME", "EVAL_ONLY", "DATA_PATH", "TOKENIZER_PATH"
# How long a run is, and on what batch: not an idea that could be taken out.
LENGTH = "ITERATIONS", "MAX_WALLCLOCK_SECONDS", "TRAIN_BATCH_TOKENS", "TRAIN_SEQ_LEN"
WARMDOWN_SHARE = "0.087"  # the official 1,200 of 13,780 steps
WORDS = dict(
    question=(1, 1), base=(1, 999), arm=(3, 999), control_every=(1, 1), seeds=(1, 999), decide=(1, 1),
    leave_one_out=(0, 999), add_one_in=(0, 1), horizons=(2, 999),
)  # fmt: skip


@dataclass(frozen=True)
class Arm:
    """A change of the base, and what it should show."""

    name: str
    hypothesis: str
    change: Env


@dataclass(frozen=True)
class Wave:
    """What a wave script says. own: the knobs on its base line; generators: (word, its arguments)."""

    name: str
    question: str = ""
    preset: str = ""
    own: tuple[tuple[str, str], ...] = ()
    arms: tuple[Arm, ...] = ()
    control_every: int = 0
    seeds: tuple[int, ...] = (1337,)
    decide: str = ""
    horizons: tuple[int, ...] = ()
    generators: tuple[tuple[str, tuple[str, ...]], ...] = ()


@dataclass(frozen=True)
class Sizes:
    """Which sizes are laid over a preset: none on a GPU, the CPU's without one, the proxy's if asked for."""

    cpu: bool = False
    proxy: bool = False


@dataclass(frozen=True)
class Run:
    """One training: an arm, a seed, and everything that is set. env has no knob of PLACES but SEED."""

    wave: Wave
    arm: Arm
    seed: int
    rerun: int
    env: Env
    cfg: Config
    duplicate_of: str = ""

    @property
    def run_id(self) -> str:
        again = f".r{self.rerun}" if self.rerun else ""
        return f"{self.wave.name}.{self.arm.name}.{self.seed}{again}"

    @property
    def is_control(self) -> bool:
        return self.arm.name == CONTROL


# ------------------------------------------------------------------------------------------ words


def assignments(words: Iterable[str], where: str) -> Env:
    """KNOB=VALUE words as a dict; UserError on anything else, or a knob named twice."""
    found: Env = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals or not re.fullmatch(r"[A-Z][A-Z0-9_]*", name):
            raise UserError(f"{where}: not KNOB=VALUE: {word}")
        if name in found:
            raise UserError(f"{where}: {name} is set twice")
        if name in PLACES:
            raise UserError(f"{where}: {name} is set by the engine for each run, not by a wave")
        found[name] = value
    return found


def whole_numbers(words: Iterable[str], what: str, low: int = 0) -> tuple[int, ...]:
    words = list(words)
    if not all(re.fullmatch(r"\d{1,10}", word) and low <= int(word) < 2**32 for word in words):
        raise UserError(f"{what} wants whole numbers of at least {low}, not {' '.join(words)}")
    numbers = tuple(map(int, words))
    if len(set(numbers)) < len(numbers):
        raise UserError(f"{what} names a number twice: {' '.join(words)}")
    return numbers


def sentences(words: list[str]) -> Iterator[tuple[str, list[str]]]:
    """(word, its arguments), from `@word argument ...`."""
    tags = {f"@{word}" for word in WORDS}
    starts = [i for i, word in enumerate(words) if word in tags]
    if words and (not starts or starts[0] > 0):
        raise UserError(f"not a word of a wave: {words[0]}")
    for start, stop in zip(starts, [*starts[1:], len(words)], strict=True):
        word, arguments = words[start][1:], words[start + 1 : stop]
        low, high = WORDS[word]
        if not low <= len(arguments) <= high:
            raise UserError(f"{word} has {len(arguments)} arguments: {' '.join(arguments)}")
        yield word, arguments


def parse_wave(name: str, words: list[str]) -> Wave:
    """The wave that these words say; UserError with a line for every fault that the words alone show."""
    found, arms, generators, errors = {}, [], [], []
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name):
        errors.append(f"a wave's name holds letters, digits, _ and -, not {name!r}")
    for word, arguments in sentences(words):
        try:
            if word == "arm":
                arms.append(parse_arm(*arguments[:2], arguments[2:]))
            elif word in ("leave_one_out", "add_one_in"):
                generators.append((word, tuple(arguments)))
            elif word in found:
                errors.append(f"{word} is said twice")
            else:
                found[word] = parse_word(word, arguments)
        except UserError as error:
            errors += error.lines
    missing = [word for word in ("question", "base") if word not in found and f"{word} " not in str(errors)]
    errors += [f"the wave has no {word}" for word in missing]
    if errors:
        raise UserError(*errors)
    preset, own = found.pop("base")
    said = dict(found, arms=tuple(arms), generators=tuple(generators))
    return Wave(name, preset=preset, own=tuple(own.items()), **said)


def parse_word(word: str, arguments: list[str]):
    """The value of a word that is said once."""
    if word == "base":
        return arguments[0], assignments(arguments[1:], "base")
    if word == "control_every":
        return whole_numbers(arguments, word)[0]
    if word in ("seeds", "horizons"):
        return whole_numbers(arguments, word, low=int(word == "horizons"))
    return arguments[0]


def parse_arm(name: str, hypothesis: str, words: list[str]) -> Arm:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name) or name == CONTROL:
        wanted = "letters, digits, _ and -, and is not `control`"
        raise UserError(f"arm {name!r}: a name holds {wanted}")
    if "=" in hypothesis.split(" ")[0] and re.match(r"[A-Z][A-Z0-9_]*=", hypothesis):
        raise UserError(f"arm {name}: no hypothesis before {hypothesis}")
    return Arm(name, hypothesis, assignments(words, f"arm {name}"))


# ---------------------------------------------------------------------------------------- presets


def preset_names() -> list[str]:
    return sorted(path.stem for path in PRESETS.glob("*.env") if path.stem not in OVERLAYS)


def read_preset(path: Path) -> Env:
    """What a file of KNOB=VALUE words sets; its later words win, lines that start with # are comments."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    words = [word for line in lines if not line.lstrip().startswith("#") for word in line.split()]
    return dict(word.split("=", 1) for word in words)


def preset_env(preset: str, sizes: Sizes) -> Env:
    """A preset under its sizes, as run_best.sh lays them: those of its own name win over the general ones."""
    if preset not in preset_names():
        raise UserError(f"unknown preset: {preset} (presets: {' '.join(preset_names())})")
    layers = [PRESETS / f"{preset}.env"]
    if sizes.cpu or sizes.proxy:
        own = PRESETS / f"proxy/{preset}.env"
        named = own if sizes.proxy and own.is_file() else PRESETS / f"cpu/{preset}.env"
        layers += [PRESETS / "cpu.env", *([PRESETS / "proxy.env"] if sizes.proxy else []), named]
    env: Env = {}
    for layer in layers:
        env |= read_preset(layer)
    return env


def configured(env: Mapping[str, str], where: str) -> Config:
    """The config of these knobs; UserError with one line if they are wrong, clash, or do nothing."""
    unknown = [name for name in env if name not in KNOBS]
    try:
        cfg = Config.from_env(dict(env))
        if unknown:  # from_env refuses only what is close to a knob: a shell's variables pass it
            raise RunError(f"{unknown[0]} is not a knob; see python train_gpt.py --help")
        if not cfg.train_log_every:
            raise RunError("TRAIN_LOG_EVERY=0 hides the training loss, which tells whether a run trained")
    except RunError as error:
        raise UserError(f"{where}: {error}") from None
    return cfg


# ------------------------------------------------------------------------------------- generators


def text_of(value) -> str:
    """A knob's value as the environment spells it: 15.0 as 15."""
    if isinstance(value, tuple):
        return ",".join(value)
    return (
        f"{value:.10g}" if isinstance(value, float) else str(int(value) if isinstance(value, bool) else value)
    )


def set_values(env: Mapping[str, str]) -> dict[str, object]:
    """The value of every knob under this environment; nothing is checked."""
    return DEFAULTS | {name: parse_knob(KNOBS[name], text) for name, text in env.items() if name in KNOBS}


def unmet_knobs(values: Mapping[str, object]) -> set[str]:
    """Knobs whose conditions do not hold under these values, whether they are set or not."""
    by_field = {name.lower(): value for name, value in values.items()}
    fields_by_name = Config.__dataclass_fields__
    return {name for name, f in KNOBS.items() if unmet_needs(f, by_field, fields_by_name)}


def needed(name: str) -> list[str]:
    """The knobs whose values decide whether this one has an effect."""
    return [need.name for need in needs_of(KNOBS[name])]


def one_changed(
    start: Mapping[str, object], goal: Mapping[str, object], knob: str, refill: bool
) -> dict[str, object]:
    """The fewest changes that take `knob` from its value in `start` to the one in `goal` and leave no knob
    without effect. What `knob` itself needs comes from `goal`; another knob that stops acting goes to its
    goal too. refill: one that begins to act does so as well, e.g. the baseline's warm-down without Tidal."""
    values = dict(start) | {knob: goal[knob]}
    waiting = unmet_knobs(start)
    for _ in range(9):
        unmet = unmet_knobs(values)
        wrong = [name for name in unmet if values[name] != DEFAULTS[name]]
        moves = {need: goal[need] for need in needed(knob) if knob in wrong}
        moves |= {name: goal[name] for name in wrong if name != knob}
        if refill:
            moves |= {name: goal[name] for name in waiting - unmet}
        if all(values[name] == value for name, value in moves.items()):
            break
        values |= moves
    changed = [name for name in (knob, *values) if values[name] != start[name]]
    return {name: values[name] for name in changed}


def ideas_of(values: Mapping[str, object], plain: Mapping[str, object]) -> list[str]:
    """Knobs of a stack that act, differ from the plain one's and shape the result."""
    idle = unmet_knobs(values)
    apart = [name for name in KNOBS if values[name] != plain[name] and name not in idle]
    return [name for name in apart if name not in LENGTH and KNOBS[name].metadata["role"] != "place"]


def plain_values(wave: Wave, sizes: Sizes, base: Mapping[str, object]) -> dict[str, object]:
    """The baseline at the wave's length, with the knobs of the base line; its warm-down fits the run."""
    plain = set_values(preset_env("baseline", sizes) | dict(wave.own))
    plain |= {name: base[name] for name in LENGTH}
    if plain["WARMDOWN_ITERS"] >= plain["ITERATIONS"] and not plain["WARMDOWN_FRAC"]:
        plain |= dict(WARMDOWN_ITERS=DEFAULTS["WARMDOWN_ITERS"], WARMDOWN_FRAC=float(WARMDOWN_SHARE))
    return plain


def left_out(wave: Wave, sizes: Sizes, only: tuple[str, ...]) -> list[Arm]:
    """An arm for each knob of the base that is not the baseline's, with that knob at the baseline's value."""
    base = set_values(preset_env(wave.preset, sizes) | dict(wave.own))
    plain, own = plain_values(wave, sizes, base), dict(wave.own)
    ideas = [name for name in ideas_of(base, plain) if name not in own]
    if strange := [name for name in only if name not in ideas]:
        raise UserError(f"leave_one_out: {strange[0]} is no knob that {wave.preset} sets: {' '.join(ideas)}")
    if not ideas:
        raise UserError(f"leave_one_out: {wave.preset} sets nothing that the baseline does not")
    arms = []
    for name in (name for name in ideas if not only or name in only):
        change = one_changed(base, plain, name, refill=True)
        doc = f"{name} back from {text_of(base[name])} to {text_of(plain[name])}"
        texts = {other: text_of(value) for other, value in change.items()}
        arms.append(Arm(f"no_{name.lower()}", f"what is lost without it: {doc}", texts))
    return arms


def added_in(wave: Wave, sizes: Sizes, preset: str) -> list[Arm]:
    """An arm for each knob of a preset that is not the wave's base's, alone on that base."""
    base = set_values(preset_env(wave.preset, sizes) | dict(wave.own))
    stack = set_values(preset_env(preset, sizes)) | {name: base[name] for name in LENGTH}
    own, arms = dict(wave.own), []
    for name in (name for name in ideas_of(stack, base) if name not in own and stack[name] != DEFAULTS[name]):
        change = one_changed(base, stack, name, refill=False)
        doc = f"{name} {text_of(base[name])} -> {text_of(stack[name])}"
        texts = {other: text_of(value) for other, value in change.items()}
        arms.append(Arm(f"with_{name.lower()}", f"what it brings alone: {doc}", texts))
    if not arms:
        raise UserError(f"add_one_in: {preset} sets nothing that {wave.preset} does not")
    return arms


def generated(wave: Wave, sizes: Sizes) -> Wave:
    """The wave with the arms of its generators after its own; add_one_in without a preset turns it round."""
    arms, given = list(wave.arms), {arm.name for arm in wave.arms}
    kinds = [word for word, _ in wave.generators]
    turned = ("add_one_in", ()) in wave.generators
    if turned and "leave_one_out" in kinds:
        raise UserError("add_one_in changes the base to `baseline`: leave_one_out wants a wave of its own")
    stack = wave.preset
    wave = replace(wave, preset="baseline") if turned else wave
    for word, arguments in wave.generators:
        if word == "leave_one_out":
            new = left_out(wave, sizes, arguments)
        else:
            new = added_in(wave, sizes, arguments[0] if arguments else stack)
        arms += [arm for arm in new if arm.name not in given]  # one written by hand takes its place
        given |= {arm.name for arm in new}
    return replace(wave, arms=tuple(arms), generators=())


# -------------------------------------------------------------------------------------- expansion


def acting(env: Env, said: Iterable[str]) -> Env:
    """`env` without the knobs of a preset or its sizes that do nothing beside what the wave itself says."""
    try:
        idle = unmet_knobs(set_values(env)) - {*said}
    except RunError:  # a value that is none: `configured` says which
        return env
    left = {name: value for name, value in env.items() if name not in idle}
    return left if len(left) == len(env) else acting(left, said)


def of_arm(wave: Wave, base: Env, arm: Arm, where: str) -> tuple[Env, Config]:
    """What is set for an arm of the wave, and its config; UserError as from `configured`."""
    env = acting(base | arm.change, {*dict(wave.own), *arm.change})
    return env, configured(env, where)


def sized_knobs(sizes: Sizes) -> set[str]:
    """The knobs of the model's shape whose values a small machine decides, whatever the preset says."""
    names = ["cpu"] * (sizes.cpu or sizes.proxy) + ["proxy"] * sizes.proxy
    knobs = {knob for name in names for knob in read_preset(PRESETS / f"{name}.env")}
    return {knob for knob in knobs - {*LENGTH} if KNOBS[knob].metadata["role"] == "model"}


def unfit(wave: Wave, sizes: Sizes) -> dict[str, str]:
    """Arms by name that cannot be tried at these sizes, and why: they change a size that is not the preset's
    here, nor the wave's own, or are sound at the published sizes only."""
    sized, found = sized_knobs(sizes), {}
    for arm in wave.arms if sized else ():
        if fault(wave, Sizes(), arm):
            continue  # wrong at any size: it is told with the other faults
        if theirs := sorted(sized & {*arm.change} - {*dict(wave.own)}):
            found[arm.name] = f"{theirs[0]} is not the preset's at these sizes"
        elif why := fault(wave, sizes, arm):
            found[arm.name] = why
    return found


def fault(wave: Wave, sizes: Sizes, arm: Arm) -> str:
    """What is wrong with the arm's config at these sizes, or ''."""
    try:
        of_arm(wave, preset_env(wave.preset, sizes) | dict(wave.own), arm, "")
    except UserError as error:
        return error.lines[0].lstrip(": ")
    return ""


def at_horizon(wave: Wave, steps: int, base: Mapping[str, str]) -> Wave:
    """The wave at another length. It reports as often, in shares of the run."""
    own = dict(wave.own) | dict(ITERATIONS=str(steps))
    usual = int(base.get("ITERATIONS", DEFAULTS["ITERATIONS"]))
    for name in ("VAL_LOSS_EVERY", "TRAIN_LOG_EVERY"):
        if name in base and name not in dict(wave.own) and int(base[name]):
            own[name] = str(max(1, round(int(base[name]) * steps / usual)))
    return replace(wave, name=f"{wave.name}_h{steps}", own=tuple(own.items()), horizons=())


def waves_of(wave: Wave, sizes: Sizes) -> list[Wave]:
    """The wave itself, or one for each horizon, the shortest first."""
    if not wave.horizons:
        return [wave]
    if "ITERATIONS" in dict(wave.own) or any("ITERATIONS" in arm.change for arm in wave.arms):
        raise UserError("horizons sets ITERATIONS: take it off the base line and the arms")
    base = preset_env(wave.preset, sizes) | dict(wave.own)
    return [at_horizon(wave, steps, base) for steps in sorted(wave.horizons)]


def order(wave: Wave, arms: list[Arm]) -> Iterator[tuple[Arm, int]]:
    """(arm, rerun) of one seed: the control first and again after every so many arms."""
    control = Arm(CONTROL, "", {})
    yield control, 0
    for place, arm in enumerate(arms, 1):
        yield arm, 0
        if wave.control_every and place % wave.control_every == 0:
            yield control, place // wave.control_every


def checked_arms(wave: Wave, base: Env) -> dict[str, tuple[Arm, Env, Config, str]]:
    """Every arm by name with its knobs, its config and the name it duplicates; UserError with all faults."""
    errors, checked, hashes = [], {}, {}
    for arm in (Arm(CONTROL, "", {}), *wave.arms):
        where = f"arm {arm.name}" if arm.name != CONTROL else f"base {wave.preset}"
        try:
            if arm.name in checked:
                raise UserError(f"two arms are named {arm.name}")
            env, cfg = of_arm(wave, base, arm, where)
        except UserError as error:
            errors += error.lines
            if arm.name == CONTROL:
                break  # every arm would say the same
            continue
        twin = hashes.setdefault(cfg.hash, arm.name)
        checked[arm.name] = arm, env, cfg, twin if twin != arm.name else ""
    if errors:
        raise UserError(*(f"{wave.name}: {line}" for line in errors))
    return checked


def expand(wave: Wave, sizes: Sizes) -> list[Run]:
    """All runs of a wave, in the order they start: seeds outer, arms inner, so that a stopped wave is
    balanced. A duplicate is among them, marked."""
    runs: list[Run] = []
    for part in waves_of(wave, sizes):
        part = generated(part, sizes)
        left = unfit(part, sizes)
        part = replace(part, arms=tuple(arm for arm in part.arms if arm.name not in left))
        base = preset_env(part.preset, sizes) | dict(part.own)
        checked = checked_arms(part, base)
        for seed in part.seeds:
            for arm, rerun in order(part, [*part.arms]):
                _, env, cfg, twin = checked[arm.name]
                runs.append(Run(part, arm, seed, rerun, env | dict(SEED=str(seed)), cfg, twin))
    return runs


def warnings_of(runs: list[Run], wave: Wave | None = None, sizes: Sizes | None = None) -> list[str]:
    """What is allowed but seldom meant, and the wave's arms that do not fit the sizes, a line each."""
    said = {}
    if wave and sizes:
        said = {f"{wave.name}.{name}: not run: {why}": None for name, why in unfit(wave, sizes).items()}
    for run in runs:
        cfg, last = run.cfg, run.cfg.warmdown_iters
        late = cfg.schedule == "warmdown" and not cfg.warmdown_frac and last >= cfg.iterations > 0
        if late:
            share = cfg.iterations / last
            line = f"WARMDOWN_ITERS={last} is longer than the run: the learning rate starts at {share:.2f}"
            said[f"{run.wave.name}.{run.arm.name}: {line}; WARMDOWN_FRAC={WARMDOWN_SHARE}?"] = None
    return list(said)
