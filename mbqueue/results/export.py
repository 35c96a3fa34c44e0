"""The submission folder for the matbench leaderboard.

matbench asks for a folder ``matbench_v0.1_ALGORITHM`` with results.json.gz, info.json and source code
(https://matbench.materialsproject.org/How%20To%20Use/3submit/). The source code consists of each experiment's spec, and
a script that runs the experiments. If an algorithm was run on several tasks, one folder contains the results for all of
them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from mbqueue import files
from mbqueue.errors import ResultsError, UsageError
from mbqueue.outputs import replacing_folder, require_folder
from mbqueue.results.folder import Recorded
from mbqueue.results.matbench_file import merge_matbench_files, read_matbench_scores
from mbqueue.results.members import enumerated, families_of, family_names, members_of, unknown_weights
from mbqueue.results.record import MATBENCH_FILE
from mbqueue.results.tables import is_blend

_SCRIPT = '''\
"""Run this submission's experiments again. If a session ends early, start the script again.

Needs mbqueue{version} (and, for matbench's file, `pip install --no-deps matbench==0.6`).
"""

import subprocess
import sys
from pathlib import Path

here = Path(__file__).resolve().parent
project = here / "project"


def mbqueue(*command: str) -> None:
    done = subprocess.run([sys.executable, "-m", "mbqueue", *command], check=False)
    if done.returncode:
        sys.exit(done.returncode)


mbqueue("init", str(project))
for experiment in sorted(here.glob("experiment*.toml")):
    mbqueue("--project", str(project), "enqueue", str(experiment))
mbqueue("--project", str(project), "work")
for made in {made}:
    mbqueue("--project", str(project), *made)
    mbqueue("--project", str(project), "work")
'''


def export_submission(
    recorded: Sequence[Recorded],
    parent: Path,
    *,
    authors: str,
    algorithm: str = "",
    notes: str = "",
    force: bool = False,
) -> Path:
    """Write the submission folder to ``parent``, and return its path. If an error occurs, nothing is written.

    Args:
        recorded: verified results folders, one per task.
        parent: where to create the folder ``matbench_v0.1_ALGORITHM``.
        authors: authors as the leaderboard should show them.
        algorithm: short name on the leaderboard, required for several tasks; by default the experiment's name.
        notes: text before the note on the overlap with the pretraining data, which is always included.
        force: replace an earlier export.

    Raises:
        ResultsError: if the results do not cover all five official folds, or matbench rejects them. The error lists
            every reason.
        UsageError: if ``authors`` is empty, or the folder exists and may not be replaced.
    """
    for one in recorded:
        _require_comparable(one)
    if not authors.strip():
        raise UsageError("A leaderboard submission needs its authors' names. Give them with --authors.")
    if len(recorded) > 1 and not algorithm:
        raise UsageError("An export of several tasks needs the algorithm's name. Give the name with --algorithm.")
    algorithm = algorithm or recorded[0].name
    target = parent / f"matbench_v0.1_{re.sub(r'[^A-Za-z0-9._-]+', '_', algorithm)}"
    require_folder(target, force=force, reads=[one.folder for one in recorded], makes=_is_ours)
    for one in recorded:
        _compare_with_matbench(one)
    with replacing_folder(target) as folder:
        _write(folder, recorded, _info(recorded, authors=authors, algorithm=algorithm, notes=notes))
    return target


def _is_ours(name: str) -> bool:
    return name in ("results.json.gz", "info.json", "run_experiment.py") or fnmatch(name, "experiment*.toml")


def _write(folder: Path, recorded: Sequence[Recorded], info: Mapping[str, Any]) -> None:
    if len(recorded) == 1:
        files.write_bytes(folder / "results.json.gz", (recorded[0].folder / MATBENCH_FILE).read_bytes())
    else:
        merge_matbench_files(
            folder / "results.json.gz",
            [one.folder / MATBENCH_FILE for one in recorded],
            models=family_names(*(one.content["spec"] for one in recorded)),
        )
    enqueued: dict[str, Mapping[str, Any]] = {}
    made: list[list[str]] = []
    for one in recorded:
        name = "experiment.toml" if len(recorded) == 1 else f"experiment_{one.content['dataset']['name']}.toml"
        _add_steps(one.content["spec"], name, enqueued, made)
    for name, spec in enqueued.items():
        files.write_text(folder / name, spec_as_toml(spec))
    versions = recorded[0].content["run"]["versions"]
    version = f" {versions['mbqueue']}" if "mbqueue" in versions else ""
    files.write_text(folder / "run_experiment.py", _SCRIPT.format(version=version, made=json.dumps(made)))
    files.write_json(folder / "info.json", info)


def _add_steps(
    spec: Mapping[str, Any], file: str, enqueued: dict[str, Mapping[str, Any]], made: list[list[str]]
) -> None:
    """Add the steps that reproduce an experiment: files to enqueue, then commands that blend or average."""
    made_from = spec.get("made_from")
    if made_from is None:
        enqueued[file] = spec
        return
    for member in made_from["members"]:
        _add_steps(member["spec"], f"experiment_{member['experiment']}.toml", enqueued, made)
    names, options = members_of(spec), ["--name", spec["name"]]
    if is_blend(spec):
        command = ["blend", *names, "--weights", made_from["weights"], *options]
    else:
        command = ["predict-again", *names, "--test-strains", str(spec["train"]["test_strains"]), *options]
    if command not in made:
        made.append(command)


def _require_comparable(recorded: Recorded) -> None:
    reasons = list(recorded.content["leaderboard"]["reasons_against"])
    if not recorded.is_complete:
        reasons.append("the experiment has not been recorded yet")
    if reasons:
        why = "\n".join(f"  - {reason}" for reason in reasons)
        raise ResultsError(
            f"The results of {recorded.name} cannot be submitted to the leaderboard:\n{why}\n"
            "The leaderboard needs all five folds of the whole official file of a task, with limit 0 and drop_invalid "
            "false. `mbqueue tasks` lists the tasks."
        )


def spec_as_toml(spec: Mapping[str, Any]) -> str:
    """Format a spec as a TOML file that ``load_spec`` reads back unchanged."""
    top = [f"{key} = {_toml(value)}" for key, value in spec.items() if not isinstance(value, Mapping)]
    sections = [
        "\n".join([f"\n[{name}]", *(f"{key} = {_toml(value)}" for key, value in section.items())])
        for name, section in spec.items()
        if isinstance(section, Mapping)
    ]
    return "\n".join([*top, *sections]) + "\n"


def _toml(value: Any) -> str:
    """Format a string, number, boolean or list as TOML: as JSON, with the DEL character escaped."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False).replace("\x7f", "\\u007f")


def _info(experiments: Sequence[Recorded], *, authors: str, algorithm: str, notes: str) -> dict[str, Any]:
    recorded = experiments[0]
    spec, run = recorded.content["spec"], recorded.content["run"]
    overlaps = dict.fromkeys(one.overlap for one in experiments)
    members = members_of(spec)
    trained = {
        "none": "Only a linear model of the composition is fitted, in closed form, on each fold's training set. For "
        "energies, this model consists of the element references of the pretrained potential.",
        "head": "The read-out layers are finetuned on the frozen atom features of the pretrained backbone.",
        "all": "All weights are finetuned, starting from the pretrained ones.",
    }
    own = spec["model"]["pretrained"]
    known = [
        f"{family.name}{f' {own}' if own in family.pretrained else ''}, {family.description}"
        for family in families_of(spec)
    ]
    models = enumerated([*known, *unknown_weights(spec)])
    what = f"Made from {enumerated(members)}." if members else trained[spec["model"]["trainable"]]
    description = f"{spec['description']}. " if spec["description"] else ""
    return {
        "authors": authors.strip(),
        "algorithm": algorithm,
        "algorithm_long": f"{description}{models}. {what} The best epoch of each fold is chosen on a held-out part of "
        "its training set.",
        "bibtex_refs": "\n".join(
            family.citation for family in families_of(*(one.content["spec"] for one in experiments))
        ),
        "notes": " ".join(filter(None, [notes.strip(), *overlaps])),
        "requirements": {
            "python": [f"{name}=={version}" for name, version in run["versions"].items() if name != "python"]
        },
    }


def _compare_with_matbench(recorded: Recorded) -> None:
    path = recorded.folder / MATBENCH_FILE
    scores = read_matbench_scores(path)[recorded.content["dataset"]["name"]]
    # For classes, matbench computes rocauc from predicted labels, not from probabilities.
    theirs = scores["rocauc" if recorded.target.is_class else "mae"]["mean"]
    ours = recorded.content["summary"][recorded.board_measure.key]["mean"]
    if abs(theirs - ours) > 1e-9:
        raise ResultsError(
            f"matbench scores {path} at {theirs:.6f}, but results.json has {ours:.6f}: the files come from different "
            "runs. Restore them from a copy, or enqueue the experiment under another name."
        )
