"""What a wave script says: one question, a base, arms that change a few knobs of it, and seeds.

The words of the script are read and checked here; wave_plan.py turns the wave into runs. sweeps/lib.sh says
how a wave is written.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from difflib import get_close_matches
from pathlib import Path

from data.user_error import UserError
from sweeps.lab.paths import PRESETS
from train_gpt import Config, RunError

Env = dict[str, str]

CONTROL = "control"  # the name of the arm that is the base itself
KNOBS = {field.name.upper(): field for field in fields(Config)}
OVERLAYS = "cpu", "proxy"  # preset files that hold sizes and are no presets
# Knobs that the engine sets for each run.
PLACES = "SEED", "RUN_ID", "OUT_DIR", "RESUME", "EVAL_ONLY", "DATA_PATH", "TOKENIZER_PATH"
# Word -> the fewest and the most arguments it takes.
WORDS = {
    "question": (1, 1),
    "base": (1, 999),
    "arm": (3, 999),
    "control_every": (1, 1),
    "seeds": (1, 999),
    "decide": (1, 1),
    "leave_one_out": (0, 999),
    "add_one_in": (0, 1),
    "horizons": (2, 999),
}
GENERATORS = "leave_one_out", "add_one_in"  # words that stand for arms made by rule
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")


@dataclass(frozen=True)
class Arm:
    """A change of the base, and what it should show."""

    name: str
    hypothesis: str
    change: Env


@dataclass(frozen=True)
class Wave:
    """What a wave script says."""

    name: str
    question: str = ""
    preset: str = ""
    base_changes: tuple[tuple[str, str], ...] = ()  # knobs on the base line, after the preset
    arms: tuple[Arm, ...] = ()
    control_every: int = 0  # the control runs again after so many arms; 0: only once
    seeds: tuple[int, ...] = (1337,)
    decide: str = ""  # the rule by which the question is decided, said before anything runs
    horizons: tuple[int, ...] = ()  # numbers of steps; each is a wave of its own
    generators: tuple[tuple[str, tuple[str, ...]], ...] = ()  # (word, its arguments)


@dataclass(frozen=True)
class Sizes:
    """Which sizes are laid over a preset: none on a GPU, the CPU's without one, the proxy's if asked for."""

    cpu: bool = False
    proxy: bool = False


# ------------------------------------------------------------------------------------------ words


def parse_assignments(words: Iterable[str], where: str) -> Env:
    """KNOB=VALUE words as a dict. Raises UserError on anything else, or a knob named twice."""
    env: Env = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals or not re.fullmatch(r"[A-Z][A-Z0-9_]*", name):
            raise UserError(f"{where}: not KNOB=VALUE: {word}")
        if name in env:
            raise UserError(f"{where}: {name} is set twice")
        if name in PLACES:
            raise UserError(f"{where}: {name} is set by the engine for each run, not by a wave")
        env[name] = value
    return env


def parse_whole_numbers(words: list[str], what: str, low: int = 0) -> tuple[int, ...]:
    """Whole numbers from `low` to 2**32 - 1, none of them twice. Raises UserError on anything else."""
    for word in words:
        if not re.fullmatch(r"\d{1,10}", word) or not low <= int(word) < 2**32:
            raise UserError(f"{what} wants whole numbers of at least {low}, not {' '.join(words)}")
    numbers = tuple(int(word) for word in words)
    if len(set(numbers)) < len(numbers):
        raise UserError(f"{what} names a number twice: {' '.join(words)}")
    return numbers


def split_sentences(words: list[str]) -> Iterator[tuple[str, list[str]]]:
    """(word, its arguments), from `@word argument ...`. Raises UserError on a wrong number of arguments."""
    tags = {f"@{word}" for word in WORDS}
    starts = [position for position, word in enumerate(words) if word in tags]
    if words and (not starts or starts[0] > 0):
        near = get_close_matches(words[0].removeprefix("@"), WORDS, n=1)
        mend = f"; did you mean {near[0]}?" if near else ""
        raise UserError(f"not a word of a wave: {words[0]}{mend}")
    stops = [*starts[1:], len(words)]
    for start, stop in zip(starts, stops, strict=True):
        word = words[start].removeprefix("@")
        arguments = words[start + 1 : stop]
        fewest, most = WORDS[word]
        if not fewest <= len(arguments) <= most:
            raise UserError(f"{word} has {len(arguments)} arguments: {' '.join(arguments)}")
        yield word, arguments


def parse_wave(name: str, words: list[str]) -> Wave:
    """The wave that these words say. Raises UserError with a line for every fault that the words show."""
    values: dict[str, object] = {}
    arms: list[Arm] = []
    generators: list[tuple[str, tuple[str, ...]]] = []
    errors: list[str] = []
    if not NAME.fullmatch(name):
        errors.append(f"a wave's name holds letters, digits, _ and -, not {name!r}")
    for word, arguments in split_sentences(words):
        try:
            if word == "arm":
                arms.append(parse_arm(arguments[0], arguments[1], arguments[2:]))
            elif word in GENERATORS:
                generators.append((word, tuple(arguments)))
            elif word in values:
                errors.append(f"{word} is said twice")
            elif word == "base":
                values["base"] = arguments[0]  # so that it counts as said, even if its knobs are wrong
                values["preset"] = arguments[0]
                values["base_changes"] = tuple(parse_assignments(arguments[1:], "base").items())
            else:
                values[word] = parse_value(word, arguments)
        except UserError as error:
            errors += error.lines
    for word in ("question", "base"):
        if word not in values:
            errors.append(f"the wave has no {word}")
    if errors:
        raise UserError(*errors)
    del values["base"]
    return Wave(name, arms=tuple(arms), generators=tuple(generators), **values)


def parse_value(word: str, arguments: list[str]) -> str | int | tuple[int, ...]:
    """The value of a word that is said once."""
    if word == "control_every":
        return parse_whole_numbers(arguments, word)[0]
    if word == "seeds":
        return parse_whole_numbers(arguments, word)
    if word == "horizons":
        return parse_whole_numbers(arguments, word, low=1)
    return arguments[0]


def parse_arm(name: str, hypothesis: str, words: list[str]) -> Arm:
    """An arm written by hand. Raises UserError on a bad name, a missing hypothesis or a bad assignment."""
    if not NAME.fullmatch(name) or name == CONTROL:
        raise UserError(f"arm {name!r}: a name holds letters, digits, _ and -, and is not `control`")
    if re.match(r"[A-Z][A-Z0-9_]*=", hypothesis):
        raise UserError(f"arm {name}: no hypothesis before {hypothesis}")
    return Arm(name, hypothesis, parse_assignments(words, f"arm {name}"))


# ---------------------------------------------------------------------------------------- presets


def preset_names() -> list[str]:
    return sorted(path.stem for path in PRESETS.glob("*.env") if path.stem not in OVERLAYS)


def read_preset(path: Path) -> Env:
    """What a file of KNOB=VALUE words sets; its later words win, lines that start with # are comments."""
    env: Env = {}
    if not path.is_file():
        return env
    for line in path.read_text(encoding="utf-8-sig").splitlines():  # an editor's byte order mark is no knob
        if line.lstrip().startswith("#"):
            continue
        for word in line.split():
            name, is_set, value = word.partition("=")
            if not is_set:
                raise UserError(f"{path}: not KNOB=VALUE: {word!r}")
            env[name] = value
    return env


def preset_env(preset: str, sizes: Sizes) -> Env:
    """A preset under its sizes, as run_best.sh lays them: those of its own name win over the general ones."""
    if preset not in preset_names():
        raise UserError(f"unknown preset: {preset} (presets: {' '.join(preset_names())})")
    layers = [PRESETS / f"{preset}.env"]
    if sizes.cpu or sizes.proxy:
        layers.append(PRESETS / "cpu.env")
    if sizes.proxy:
        layers.append(PRESETS / "proxy.env")
    if sizes.proxy and (PRESETS / f"proxy/{preset}.env").is_file():
        layers.append(PRESETS / f"proxy/{preset}.env")
    elif sizes.cpu or sizes.proxy:
        layers.append(PRESETS / f"cpu/{preset}.env")
    env: Env = {}
    for layer in layers:
        env |= read_preset(layer)
    return env


def base_env(wave: Wave, sizes: Sizes) -> Env:
    """The knobs of the wave's base: its preset at these sizes, then what its base line says."""
    return preset_env(wave.preset, sizes) | dict(wave.base_changes)


def checked_config(env: Mapping[str, str], where: str) -> Config:
    """The config of these knobs. Raises UserError with one line if they are wrong, clash, or do nothing."""
    try:
        config = Config.from_env(dict(env))
    except RunError as error:
        raise UserError(f"{where}: {error}") from None
    for name in env:  # from_env refuses only what is close to a knob: a shell's variables pass it
        if name not in KNOBS:
            raise UserError(f"{where}: {name} is not a knob; see python train_gpt.py --help")
    if not config.train_log_every:
        raise UserError(
            f"{where}: TRAIN_LOG_EVERY=0 hides the training loss, which tells whether a run trained"
        )
    return config
