"""What the footnotes of a table say of the hyper-parameter search behind its rows."""

from collections.abc import Iterator, Mapping, Sequence

from ctpd.core.errors import listed
from harness.record import Record
from harness.tuning import Tuning, number_text, setting


def tuning_notes(labels: Mapping[str, str], records: Sequence[Record]) -> Iterator[str]:
    """What a table must say of the search behind its rows; nothing where none was tuned.

    Args:
        labels: run -> label of its row.
        records: of the rows.
    """
    trained = {record.run: record.tuning for record in records if record.kind == "trained"}
    tuned = {run: tuning for run, tuning in trained.items() if tuning is not None}
    if not tuned:
        return
    some = next(iter(tuned.values()))
    yield (
        f"Values of the parameters: those of the trial with the highest mean Average on development documents "
        f"(suite `{some.suite}`) over the training seeds {', '.join(map(str, some.seeds))}. All trials: table `tuning`."
    )
    if shared := max(tuning.shared_documents for tuning in tuned.values()):
        yield f"{shared:,} documents of the tables are development documents, too: the choice has seen them."
    own = {run: tuning for run, tuning in tuned.items() if tuning.run == run}
    others = {tuning.run: tuning for run, tuning in tuned.items() if run not in own and tuning.run not in own}
    yield from search_notes({**{name: name for name in others}, **{run: labels[run] for run in own}}, {**own, **others})
    inherited: dict[str, list[str]] = {}
    for run, tuning in tuned.items():
        if run not in own:
            inherited.setdefault(tuning.run, []).append(labels[run])
    for base, names in inherited.items():
        yield f"With the values that were chosen for {base}, without trials of their own: {', '.join(names)}."
    if given := [labels[run] for run, tuning in trained.items() if tuning is None]:
        yield f"Not tuned; the recipe gives their values: {', '.join(given)}."


def search_notes(labels: Mapping[str, str], found: Mapping[str, Tuning]) -> Iterator[str]:
    """Of runs with trials of their own: how many, choices at an end, and those that gain nothing."""
    counts = {labels[run]: len(tuning.trials) for run, tuning in found.items()}
    if len(set(counts.values())) == 1:
        each = " each" if len(counts) > 1 else ""
        yield f"{', '.join(counts)}: {next(iter(counts.values()))} trials{each}."
    else:
        shown = ", ".join(f"{label} {count}" for label, count in counts.items())
        yield f"The number of trials is not equal: {shown}. A space with fewer points than trials was tried as a whole."
    ends = [
        f"{labels[run]} ({name} {number_text(tuning.best.values[name])}, the {end})"
        for run, tuning in found.items()
        for name, end in tuning.at_end.items()
    ]
    if ends:
        yield f"Chosen at an end of what was tried, so that a wider space could give more: {', '.join(ends)}."
    idle = [
        f"{labels[run]} (best trial {score_text(tuning.best.mean)}, start {score_text(tuning.start)})"
        for run, tuning in found.items()
        if not tuning.gains
    ]
    if idle:
        yield f"No gain at any setting, on development documents: {', '.join(idle)}."
    lost = [
        f"{labels[run]} ({listed(setting(trial.values) for trial in failed)})"
        for run, tuning in found.items()
        if (failed := [trial for trial in tuning.trials if trial.mean is None])
    ]
    if lost:
        yield f"Trials that were not finite, and count as the worst: {'; '.join(lost)}."


def score_text(score: float | None) -> str:
    """A fraction in percent, or that it was not finite."""
    return "not finite" if score is None else f"{100 * score:.2f}"
