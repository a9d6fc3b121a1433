"""The knobs as tables: `python train_gpt.py --list-ideas` and `--knob-table` print what is made here."""

from train_gpt import knob_rows


def idea_list() -> str:
    """Every published idea: how it fared at its source, and what it does here."""
    head = "p: progress 0..1, LR: multiplier of all learning rates, g: gradient, w: weight, z: logit.\n"
    rows = [("idea", "", "", "here", "there", "source"), *(row for row in knob_rows() if row[4])]
    return "\n".join([head, *(f"{n:17} {there:9} {source:9} {doc}" for n, _, _, doc, there, source in rows)])


def knob_table() -> str:
    """The README's table, in Markdown."""
    rows = [f"| {n} | {f'`{d}`' if d else ''} | {a} | {doc} |" for n, d, a, doc, *_ in knob_rows()]
    return "\n".join(["| knob | default | allowed | meaning |", "|---|---|---|---|", *rows])
