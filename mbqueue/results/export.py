"""The submission folder for the matbench leaderboard.

matbench's own form (https://matbench.materialsproject.org/How%20To%20Use/3submit/): a folder
``matbench_v0.1_ALGORITHM`` with results.json.gz, info.json and source code; here the code is the experiment's spec
and a script that runs it through mbqueue.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mbqueue import files
from mbqueue.errors import ResultsError, UsageError
from mbqueue.results.folder import Recorded
from mbqueue.results.matbench_file import read_matbench_scores
from mbqueue.results.record import MATBENCH_FILE

_BIBTEX = (
    "@article{deng2023chgnet, title={CHGNet as a pretrained universal neural network potential for charge-informed "
    "atomistic modelling}, author={Deng, Bowen and Zhong, Peichen and Jun, KyuJung and Riebesell, Janosh and "
    "Han, Kevin and Bartel, Christopher J. and Ceder, Gerbrand}, journal={Nature Machine Intelligence}, volume={5}, "
    "pages={1031--1041}, year={2023}, doi={10.1038/s42256-023-00716-3}}"
)

_SCRIPT = '''\
"""Runs this submission's experiment again, in as many sessions as it takes: start it until it says it is done.

Needs mbqueue{version} (and, for matbench's file, `pip install --no-deps matbench==0.6`).
"""

import subprocess
import sys
from pathlib import Path

here = Path(__file__).resolve().parent
project = here / "project"
for command in (["init", str(project)], ["--project", str(project), "enqueue", str(here / "experiment.toml")]):
    subprocess.run([sys.executable, "-m", "mbqueue", *command], check=True)
sys.exit(subprocess.run([sys.executable, "-m", "mbqueue", "--project", str(project), "work"], check=False).returncode)
'''


def export_submission(recorded: Recorded, parent: Path, *, authors: str, algorithm: str = "", notes: str = "") -> Path:
    """Write the submission folder below ``parent`` and return it.

    Args:
        recorded: a verified results folder.
        parent: where the folder ``matbench_v0.1_ALGORITHM`` is made.
        authors: as they shall stand on the leaderboard.
        algorithm: short name on the leaderboard; by default that of the experiment.
        notes: said before the note on the overlap with the pretraining data, which is always there.

    Raises:
        ResultsError: with every reason, when the results are not all five official folds, or matbench refuses them.
        UsageError: when the authors are empty, or the folder is there and is not an earlier export.
    """
    reasons = list(recorded.content["leaderboard"]["reasons_against"])
    if not recorded.is_complete:
        reasons.append("the experiment is not recorded yet")
    if reasons:
        why = "\n".join(f"  - {reason}" for reason in reasons)
        raise ResultsError(
            f"The results of {recorded.name} cannot go to the leaderboard:\n{why}\n"
            "It takes all five folds of the whole official file: dataset matbench_mp_e_form, limit 0, and "
            "drop_invalid false."
        )
    if not authors.strip():
        raise UsageError("The leaderboard names authors. Give them with --authors.")
    _compare_with_matbench(recorded)
    algorithm = algorithm or recorded.name
    target = parent / f"matbench_v0.1_{re.sub(r'[^A-Za-z0-9._-]+', '_', algorithm)}"
    if target.exists() and not (target / "info.json").is_file():
        raise UsageError(f"{target} is there already and is not an export. Give another folder.")
    versions = recorded.content["run"]["versions"]
    files.write_bytes(target / "results.json.gz", (recorded.folder / MATBENCH_FILE).read_bytes())
    files.write_text(target / "experiment.toml", spec_as_toml(recorded.content["spec"]))
    version = f" {versions['mbqueue']}" if "mbqueue" in versions else ""
    files.write_text(target / "run_experiment.py", _SCRIPT.format(version=version))
    files.write_json(target / "info.json", _info(recorded, authors=authors, algorithm=algorithm, notes=notes))
    return target


def spec_as_toml(spec: Mapping[str, Any]) -> str:
    """A spec as a TOML file that ``load_spec`` reads back to the same spec."""
    top = [f"{key} = {_toml(value)}" for key, value in spec.items() if not isinstance(value, Mapping)]
    sections = [
        "\n".join([f"\n[{name}]", *(f"{key} = {_toml(value)}" for key, value in section.items())])
        for name, section in spec.items()
        if isinstance(section, Mapping)
    ]
    return "\n".join([*top, *sections]) + "\n"


def _toml(value: Any) -> str:
    """JSON is TOML for strings, numbers, booleans and lists of them, except for the raw DEL character."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False).replace("\x7f", "\\u007f")


def _info(recorded: Recorded, *, authors: str, algorithm: str, notes: str) -> dict[str, Any]:
    spec, run = recorded.content["spec"], recorded.content["run"]
    what = {
        "none": "The pretrained weights are used as they are; only the element reference energies are fitted, in "
        "closed form, on each fold's training part.",
        "head": "The read-out layers are finetuned on the frozen atom features of the pretrained backbone.",
        "all": "All weights are finetuned, starting from the pretrained ones.",
    }[spec["model"]["trainable"]]
    description = f"{spec['description']}. " if spec["description"] else ""
    return {
        "authors": authors.strip(),
        "algorithm": algorithm,
        "algorithm_long": f"{description}CHGNet {spec['model']['pretrained']}, a graph neural network potential "
        f"pretrained on MPtrj. {what} The best epoch of each fold is chosen on a part of its training data.",
        "bibtex_refs": _BIBTEX,
        "notes": " ".join(filter(None, [notes.strip(), recorded.content["notes"]["pretraining_overlap"]])),
        "requirements": {
            "python": [f"{name}=={version}" for name, version in run["versions"].items() if name != "python"]
        },
    }


def _compare_with_matbench(recorded: Recorded) -> None:
    path = recorded.folder / MATBENCH_FILE
    theirs = read_matbench_scores(path)["mae"]["mean"]
    ours = recorded.content["summary"]["mae"]["mean"]
    if abs(theirs - ours) > 1e-9:
        raise ResultsError(
            f"{path} scores {theirs:.6f} by matbench, results.json says {ours:.6f}: the files are of different "
            "runs. Restore them from a copy, or enqueue the experiment under another name."
        )
