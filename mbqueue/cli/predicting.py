"""The command ``mbqueue predict``, which predicts a dataset with trained models."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mbqueue.api.base import LOADING
from mbqueue.cli.console import print_line, say
from mbqueue.cli.options import DeviceOption, DropInvalidOption, IdColumnOption, TargetColumnOption, open_project
from mbqueue.errors import counted


def predict(
    context: typer.Context,
    dataset: Annotated[
        str, typer.Argument(help="A matbench task, `sample`, or the path of your data, with or without targets.")
    ],
    models: Annotated[
        list[Path],
        typer.Argument(
            metavar="MODEL...", help="One or more model_fold_*.pth files; mbqueue averages their predictions."
        ),
    ],
    output: Annotated[Path, typer.Option(help="The CSV file to write.")] = Path("predictions.csv"),
    strains: Annotated[
        int, typer.Option(help="Average over this many pairs of opposite small strains (test-time averaging).", min=0)
    ] = 0,
    drop_invalid: DropInvalidOption = False,
    id_column: IdColumnOption = "",
    target_column: TargetColumnOption = "",
    force: Annotated[bool, typer.Option("--force", help="Overwrite an existing file.")] = False,
    device: DeviceOption = None,
) -> None:
    """Predict crystals with trained models: the mean of all models, their spread, and each model's prediction.

    Example: mbqueue predict sample results/daily/2026-01-01/chgnet_full_finetune/model_fold_0.pth
    """
    from mbqueue.cli.datasets import progress_bars
    from mbqueue.experiment import DataSpec
    from mbqueue.session.prediction_files import read_files, require_inputs, require_table

    project = open_project(context)
    require_inputs(project.folder, dataset, models)
    require_table(output, read_files(project.folder, dataset, models), force=force)
    say(f"{LOADING} …")
    with progress_bars() as progress:
        table = project.predict(
            DataSpec(dataset=dataset, drop_invalid=drop_invalid, id_column=id_column),
            models,
            target_column=target_column,
            strains=strains,
            device=device,
            progress=progress,
        )
    for crystal_id, reason in table.dropped:
        say(f"dropped {crystal_id}: {reason}")
    table.write(output, force=force)
    print_line(
        f"{table.target.axis} of {counted(len(table.crystals), 'crystal')} by {counted(len(models), 'model')}: {output}"
    )
    if table.mae is not None:
        print_line(f"MAE against the dataset's own targets: {table.target.with_unit(f'{table.mae:.4f}')}")
        print_line(
            "This is not a test score: the models were trained on most of these crystals. For the test scores, see the "
            "experiment's results.json."
            if table.is_known_data
            else "This is a test score only if no model was trained on any of these crystals."
        )
