"""What tables say of hyper-parameter search: a table of all trials."""

from collections.abc import Sequence

import pandas as pd

from harness.formats import Styled, View
from harness.record import Record
from harness.search_notes import score_text, search_notes
from harness.tuning import Tuning, setting

CAPTION = "Trials on development documents"
START = "start"


def tunings(records: Sequence[Record]) -> list[Tuning]:
    """The search of each run with trials of its own, once, in the order of the records."""
    found: dict[str, Tuning] = {}
    for record in records:
        if record.tuning is not None:
            found.setdefault(record.tuning.run, record.tuning)
    return list(found.values())


def tuning_view(records: Sequence[Record]) -> View | None:
    """All trials as a table; None where nothing was tuned."""
    found = tunings(records)
    if not found:
        return None
    seeds = found[0].seeds
    rows = []
    for tuning in found:
        start = [score_text(tuning.start), *["–"] * len(seeds)]
        rows.append([Styled(tuning.run), Styled(START), Styled("–"), *map(Styled, start)])
        for number, trial in enumerate(tuning.trials):
            rank = 1 if number == tuning.chosen else None
            scores = [score_text(trial.mean), *map(score_text, trial.scores)]
            cells = [str(number + 1), setting(trial.values), *scores]
            rows.append([Styled(tuning.run), *(Styled(cell, rank) for cell in cells)])
    header = ["", "Trial", "Values", "Average", *(f"seed {seed}" for seed in seeds)]
    notes = (
        f"Average of the columns of `{found[0].suite}` in percent: the mean over the training seeds, and each. "
        "Best (bold): chosen; of equal ones the first. `start`: the model that every trial starts from.",
        *search_notes({tuning.run: tuning.run for tuning in found}, {tuning.run: tuning for tuning in found}),
    )
    return View(CAPTION, header, rows, notes, None)


def tuning_frame(records: Sequence[Record]) -> pd.DataFrame:
    """All trials as numbers: a line for each, scores in percent, empty where they are not finite."""
    lines = []
    for tuning in tunings(records):
        start = {"run": tuning.run, "trial": 0, "chosen": False, "average": _hundredfold(tuning.start)}
        lines.append(start)
        for number, trial in enumerate(tuning.trials):
            scores = dict(zip((f"seed {seed}" for seed in tuning.seeds), map(_hundredfold, trial.scores), strict=True))
            head = {"run": tuning.run, "trial": number + 1, "chosen": number == tuning.chosen}
            lines.append(head | {"average": _hundredfold(trial.mean)} | scores | dict(trial.values))
    return pd.DataFrame(lines)


def tuning_rows(records: Sequence[Record]) -> list[dict[str, object]]:
    """The same for JSON, which knows no NaN: null where nothing was measured; no lines where nothing was tuned."""
    lines = tuning_frame(records).to_dict(orient="records")
    return [{str(name): None if pd.isna(value) else value for name, value in line.items()} for line in lines]


def _hundredfold(score: float | None) -> float | None:
    return None if score is None else 100 * score
