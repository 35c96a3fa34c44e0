"""Format the content of results.json as a readable page, RESULTS.md."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mbqueue.clock import format_duration
from mbqueue.errors import counted
from mbqueue.families import family_with
from mbqueue.results.absences import absences
from mbqueue.results.cells import markdown, markdown_code, number, spread
from mbqueue.results.choice import choice_note, marked
from mbqueue.results.members import enumerated, family_names, members_of
from mbqueue.results.scores import leaderboard_measure, measures_of
from mbqueue.results.tables import FILE_NOTES, Predictions, is_blend
from mbqueue.task import Target, target_of

_CLASS_SCORES = (
    "Targets are 0 or 1, and predictions are probabilities of class 1. A crystal counts as class 1 if its probability "
    "is above 0.5. The MAE compares the probability with the target. matbench 0.6 turns probabilities into classes "
    "first, so its rocauc equals the balanced accuracy in this table."
)
#: The maximum number of dropped entries on the page; results.json lists all dropped entries.
_DROPPED_LISTED = 20


def results_markdown(
    content: dict[str, Any], file_names: Sequence[str], *, predictions: Mapping[int, Predictions]
) -> str:
    """Format the ``content`` of results.json (see mbqueue.results.record) as Markdown."""
    spec, dataset, run = content["spec"], content["dataset"], content["run"]
    target = target_of(spec)
    lines = [f"# {content['experiment']}", ""]
    if spec.get("description"):
        lines += [markdown(spec["description"]) + ".", ""]
    lines += [_headline(content, target), "", "## Scores on the test set of each fold", ""]
    lines += _scores_table(content, target)
    if stopped := [fold for fold, entry in content["folds"].items() if entry.get("stopped_early")]:
        folds = f"fold {stopped[0]}" if len(stopped) == 1 else f"folds {', '.join(stopped)}"
        lines += [
            "",
            f"Stopped early: {folds}. The validation MAE did not improve for "
            f"{counted(spec['train']['patience'], 'epoch')}, so training stopped before epoch "
            f"{spec['train']['epochs']}.",
        ]
    lines += [
        "",
        _CLASS_SCORES
        if target.is_class
        else f"All errors refer to the predicted {target.axis}. As in matbench, MAPE is a fraction, and excludes "
        "targets within ±1e-5 of 0.",
        *(["The spread is the population standard deviation over folds."] if len(content["folds"]) > 1 else []),
        "",
    ]
    if note := choice_note(spec):
        lines += [markdown(note), ""]
    if content["leaderboard"]["rows"]:
        lines += ["## Comparison with the matbench leaderboard", "", *_leaderboard(content, target), ""]
    lines += ["## Overlap with the pretraining data", "", content["notes"]["pretraining_overlap"], ""]
    lines += ["## Data", ""]
    official = "the official dataset" if dataset["official"] else "not the official benchmark dataset"
    name, source = markdown_code(dataset["name"]), markdown(dataset["source"])
    lines += [f"{name} ({official}): {counted(dataset['n'], 'crystal')}. Source: {source}.", ""]
    if dataset["widened_cutoffs"]:
        lines += [
            f"In {counted(dataset['widened_cutoffs'], 'crystal')}, an atom had no neighbour within "
            f"{family_names(spec)}'s cut-off. mbqueue widened the cut-off there, and left no crystal out.",
            "",
        ]
    for said in absences(content["folds"], predictions, target):
        lines += [said, ""]
    if dataset["dropped"]:
        n = len(dataset["dropped"])
        were = "was" if n == 1 else "were"
        lines += [f"{counted(n, 'entry', 'entries')} could not be used and {were} left out:", ""]
        lines += [
            f"- {markdown_code(entry['id'])}: {markdown(entry['reason'])}"
            for entry in dataset["dropped"][:_DROPPED_LISTED]
        ]
        if (rest := len(dataset["dropped"]) - _DROPPED_LISTED) > 0:
            lines.append(f"- … and {rest:,} more in results.json")
        lines.append("")
    lines += ["## Method", ""]
    lines += _how(content, target)
    lines += ["", "## Files", ""]
    lines += _files(file_names, spec)
    lines += [
        "",
        f"Recorded {run['recorded_at']}; spec hash `{content['spec_hash'][:16]}`, data hash `{dataset['hash'][:16]}`.",
        "",
    ]
    return "\n".join(lines)


def _headline(content: dict[str, Any], target: Target) -> str:
    measure = measures_of(target)[0]
    folds = len(content["folds"])
    count = "one fold" if folds == 1 else f"{folds} folds"
    score = target.with_unit(spread(content["summary"][measure.key], folds))
    return f"**Test {measure.label} {score}** for the {target.name}, over {count}."


def _scores_table(content: dict[str, Any], target: Target) -> list[str]:
    measures = measures_of(target)
    labels = [measure.label for measure in measures]
    head = ["Fold", "Crystals", *labels, "Epochs", "Best epoch", "Validation MAE"]
    lines = [f"| {' | '.join(head)} |", "|---|" + "---:|" * (len(head) - 1)]
    for fold, entry in content["folds"].items():
        s = entry["scores"]
        name = marked(fold, content["spec"])
        lines.append(
            f"| {name} | {entry['n_test']:,} | {' | '.join(number(s[measure.key]) for measure in measures)} | "
            f"{entry['epochs']} | {entry['best_epoch'] or '–'} | {number(entry['best_val_mae'])} |"
        )
    if len(content["folds"]) == 1:
        return lines
    cells = [spread(content["summary"][measure.key], len(content["folds"])) for measure in measures]
    return [*lines, f"| **mean ± std** | | {' | '.join(cells)} | | | |"]


def _leaderboard(content: dict[str, Any], target: Target) -> list[str]:
    board, measure = content["leaderboard"], leaderboard_measure(target)
    rows = [(row[measure.key], row["name"]) for row in board["rows"]]
    lines = []
    if board["comparable"]:
        mean = content["summary"][measure.key]["mean"]
        rows.append((mean, f"**{content['experiment']}** (this run; see the overlap below)"))
        lines += ["matbench scored all five official folds, so the number below is a leaderboard score.", ""]
    else:
        why = "; ".join(board["reasons_against"])
        lines += [f"**Not comparable with the leaderboard**: {why}. The table is only for reference.", ""]
    lines += [f"| Model | {measure.label}{target.in_unit} |", "|---|---:|"]
    return lines + [f"| {name} | {value:.4f} |" for value, name in sorted(rows, reverse=not measure.is_error)]


def _how(content: dict[str, Any], target: Target) -> list[str]:
    spec, run = content["spec"], content["run"]
    lines = _made(content) if members_of(spec) else _trained(spec, target)
    count = counted(len(run["sessions"]), "session")
    lines.append(
        f"- {count}, {format_duration(run['hours'] * 3600)} in all, on {', '.join(run['devices']) or 'no device'}"
    )
    lines.append(f"- {', '.join(f'{name} {version}' for name, version in run['versions'].items())}")
    for change in run["fingerprint_changes"]:
        changes = change["changes"].items()
        what = ", ".join(f"{key}: {markdown(str(old))} → {markdown(str(new))}" for key, (old, new) in changes)
        lines.append(
            f"- resumed under different conditions at fold {change['fold']}, epoch {change['epoch']}, "
            f"step {change['step']} ({what}): the last digits may differ from those of an uninterrupted run"
        )
    return lines


def _made(content: dict[str, Any]) -> list[str]:
    members = members_of(content["spec"])
    if not is_blend(content["spec"]):
        strains = content["spec"]["train"]["test_strains"]
        return [
            f"- the models of {members[0]}; each prediction is a mean over the crystal and {counted(strains, 'pair')} "
            "of opposite small strains"
        ]
    head = ["Fold", *members]
    lines = [f"- the weighted mean of the predictions of {enumerated(members)}; the time below is for the blend alone"]
    lines += ["", f"| {' | '.join(head)} |", "|---|" + "---:|" * len(members)]
    for fold, entry in content["folds"].items():
        weights = entry["blend"]["weights"]
        lines.append(f"| {fold} | {' | '.join(number(weights[name]) for name in members)} |")
    return [*lines, ""]


def _trained(spec: dict[str, Any], target: Target) -> list[str]:
    model, train = spec.get("model", {}), spec.get("train", {})
    trained = {
        "none": "only the element references" if target.kind == "energy" else "only the composition model",
        "head": "the read-out on frozen atom features",
        "all": "all weights",
    }.get(model.get("trainable"), "")
    lines = [f"- {family_names(spec)} {model['pretrained']}, trained: {trained}; seed {spec.get('seed')}"]
    loss = "binary cross-entropy" if target.is_class else f"{train.get('loss')} loss"
    if train.get("epochs"):
        lines.append(
            f"- {counted(train['epochs'], 'epoch')} of AdamW, {loss}, batches of {train['batch_size']}, "
            f"peak learning rate {train['lr']:g}, {train['schedule']} schedule, {train['validation']:.0%} of the "
            "training set held out to choose the best epoch"
        )
    return lines


def _files(names: Sequence[str], spec: Mapping[str, Any]) -> list[str]:
    kinds: dict[str, list[str]] = {}
    for name in names:
        kinds.setdefault(name.split("_")[0].split(".")[0], []).append(f"`{name}`")
    loader = family_with(spec["model"]["pretrained"]).loader  # a blend has no model files
    return [f"- {', '.join(sorted(group))}: {FILE_NOTES[kind].format(loader=loader)}" for kind, group in kinds.items()]
