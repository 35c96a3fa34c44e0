"""Model files, with which CHGNet predicts the same, and predictions of ensembles and averages over strains."""

from __future__ import annotations

import io
import os
import pickle
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from chgnet.model import CHGNet

from mbqueue.errors import CheckpointError, UsageError
from mbqueue.files import write_bytes
from mbqueue.train import chgnet
from mbqueue.train.chgnet import load_model, load_pretrained, model_bytes
from mbqueue.train.family import family_of
from mbqueue.train.forward import formation_energies
from mbqueue.train.predict import predict_crystals

pytestmark = pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad=True")
CPU = torch.device("cpu")


def test_a_model_file_loads_with_chgnet_and_predicts_what_the_fold_predicts(
    bench: Any, helpers: Any, tmp_path: Path, device: torch.device
) -> None:
    run = bench.run(tmp_path / "commits", device=device)
    helpers.train_epoch(run, 1)
    model = run.best_model()
    write_bytes(tmp_path / "model_fold_0.pth", model_bytes(model))
    with redirect_stdout(io.StringIO()):
        stock = CHGNet.from_file(str(tmp_path / "model_fold_0.pth"))
    structures = [bench.crystals.structure(row) for row in run.rows.test]
    theirs = [float(each["e"]) for each in stock.predict_structure(structures, task="e")]
    assert np.abs(run.predict_test(model) - theirs).max() < 1e-5


def test_predicting_alone_needs_no_epoch(bench: Any, tmp_path: Path) -> None:
    run = bench.run(tmp_path, trainable="none", epochs=0)
    predicted = run.predict_test(run.best_model())
    assert predicted.shape == run.rows.test.shape
    assert len(run.rows.validation) == 0
    assert len(run.rows.train) + len(run.rows.test) == len(bench.crystals)
    assert np.abs(predicted - bench.crystals.targets[run.rows.test]).mean() < 2.0
    assert run.predict_test(run.best_model(), should_stop=lambda: True) is None


def test_the_pretrained_model_predicts_from_stored_energies_what_chgnet_predicts(
    sample_bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = sample_bench.run(tmp_path / "commits", trainable="none", epochs=0)
    model = run.best_model()
    whole = run._inference.outputs(model, run.rows.test, should_stop=lambda: False)
    with monkeypatch.context() as patch:
        for name in ("atom_features", "formation_energies", "predict"):
            patch.setattr(chgnet, name, lambda *_: pytest.fail("the model ran"))
        predicted = run.predict_test(model)
    write_bytes(tmp_path / "model.pth", model_bytes(model))
    with redirect_stdout(io.StringIO()):
        stock = CHGNet.from_file(str(tmp_path / "model.pth"), use_device="cpu")
    stock.graph_converter.set_isolated_atom_response("ignore")
    structures = [sample_bench.crystals.structure(row) for row in run.rows.test]
    theirs = np.array([float(each["e"]) for each in stock.predict_structure(structures, task="e")])
    assert np.abs(predicted - whole).max() < 1e-6
    # On these crystals, CHGNet's own float32 and float64 results differ by up to 5e-6.
    assert np.abs(predicted - theirs).max() < 5e-6
    assert np.abs(predicted - theirs).mean() < 1e-6


def test_a_property_is_predicted_from_the_composition_alone_without_running_the_model(
    bench_of: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for kind in ("scalar", "class"):
        run = bench_of(kind).run(tmp_path / kind, trainable="none", epochs=0)
        model = run.best_model()
        with torch.no_grad():
            output = formation_energies(model, chgnet.make_batch(bench_of(kind).cache, run.rows.test, None))
        monkeypatch.setattr(chgnet, "predict", lambda *_: pytest.fail("the model ran"))
        theirs = (torch.sigmoid(output) if kind == "class" else output).numpy()
        np.testing.assert_allclose(run.predict_test(model), theirs, rtol=1e-5, atol=1e-6)


def test_test_predictions_are_averaged_over_strains_when_the_experiment_says_so(bench: Any, tmp_path: Path) -> None:
    run = bench.run(tmp_path, trainable="none", epochs=0, test_strains=2)
    model = run.best_model()
    everything = predict_crystals(chgnet, [model], bench.cache, device=CPU, strains=2)
    plain = predict_crystals(chgnet, [model], bench.cache, device=CPU)
    predicted = run.predict_test(model)
    assert np.abs(predicted - everything.mean[run.rows.test]).max() < 1e-6
    assert np.abs(predicted - plain.mean[run.rows.test]).max() > 1e-6


def test_a_prediction_tells_batch_by_batch_how_far_it_is(bench: Any, helpers: Any, tmp_path: Path) -> None:
    run = bench.run(tmp_path, batch_size=4)
    helpers.train_epoch(run, 1)
    told: list[tuple[int, int]] = []
    run.predict_test(run.best_model(), on_progress=lambda done, total: told.append((done, total)))
    assert told == [(0, 7), (4, 7), (7, 7)]


def test_a_prediction_that_is_cut_off_resumes_where_it_was_and_ends_with_the_same_bytes(
    bench: Any, helpers: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = bench.run(tmp_path / "commits", batch_size=2, test_strains=1)
    helpers.train_epoch(run, 1)
    model, kept = run.best_model(), tmp_path / "kept"
    whole = run.predict_test(model)
    told: list[tuple[int, int]] = []
    for asked in (5, 4, 1000):
        left = iter(range(1000))
        told.clear()
        found = run.predict_test(
            model,
            should_stop=lambda left=left, asked=asked: next(left) >= asked,
            on_progress=lambda done, total: told.append((done, total)),
            keep_in=kept,
        )
    assert found is not None
    assert np.array_equal(found, whole)
    assert told[1][0] > 0, "it began with what was there"
    monkeypatch.setattr(chgnet, "predict", lambda *_: pytest.fail("computed again"))
    assert np.array_equal(run.predict_test(model, keep_in=kept), whole)


def test_a_kept_prediction_resumes_only_for_its_model_and_undamaged(bench: Any, helpers: Any, tmp_path: Path) -> None:
    run = bench.run(tmp_path / "commits", batch_size=4)
    helpers.train_epoch(run, 1)
    model, kept = run.best_model(), tmp_path / "kept"
    first = run.predict_test(model, keep_in=kept)
    [file] = kept.iterdir()
    content = file.read_bytes()
    file.write_bytes(content[:-64] + bytes(64))
    assert np.array_equal(run.predict_test(model, keep_in=kept), first), "damaged: computed again"
    with torch.no_grad():
        model.composition_model.fc.weight.add_(1.0)
    assert np.abs(run.predict_test(model, keep_in=kept) - first).min() > 0.9, "another model's: computed again"


def test_the_best_model_needs_a_finished_epoch(bench: Any, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="Fold 0 has no finished epoch"):
        bench.run(tmp_path).best_model()


def test_the_best_epochs_weights_are_kept_however_long_ago(bench: Any, helpers: Any, tmp_path: Path) -> None:
    run = bench.run(tmp_path, epochs=6, lr=3e-2, schedule="constant")
    best: tuple[float, bytes] | None = None
    for epoch in range(1, 7):
        outcome = helpers.train_epoch(run, epoch)
        if outcome.improved:
            best = (outcome.history_row["val_mae"], model_bytes(run._learner.model))
    assert best is not None
    assert outcome.best["val_mae"] == best[0]
    assert model_bytes(run.best_model()) == best[1]
    assert len(list(tmp_path.glob("*.pt"))) <= 3


def test_pretrained_models_are_chgnets_own() -> None:
    for version in ("0.3.0", "r2scan"):
        with redirect_stdout(io.StringIO()):
            stock = CHGNet.load(model_name=version, use_device="cpu", verbose=False)
        ours = load_pretrained(version)
        assert ours.model_args == stock.model_args
        assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), stock.parameters(), strict=True))
    with pytest.raises(UsageError, match=r"pretrained weights are named '0\.1'"):
        family_of("0.1")


def test_loading_is_silent(capsys: pytest.CaptureFixture[str]) -> None:
    load_pretrained("0.3.0")
    assert capsys.readouterr() == ("", "")


def test_a_model_file_cannot_run_code(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "owned"),)

    path = tmp_path / "model.pth"
    for content in (pickle.dumps(Evil()), b"", b"not a model"):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match="cannot be read as a model file") as caught:
            load_model(path)
        assert "torch" not in str(caught.value), "PyTorch's advice is not for people who mistook a file"
        assert len(str(caught.value).splitlines()) == 1
    torch.save({"weights": 1}, path)
    with pytest.raises(CheckpointError, match="contains no CHGNet model"):
        load_model(path)
    assert not (tmp_path / "owned").exists()


def test_equal_models_have_equal_files(tmp_path: Path) -> None:
    write_bytes(tmp_path / "a.pth", model_bytes(load_pretrained("0.3.0")))
    write_bytes(tmp_path / "b.pth", model_bytes(load_model(tmp_path / "a.pth")))
    assert (tmp_path / "a.pth").read_bytes() == (tmp_path / "b.pth").read_bytes()


def test_an_ensemble_gives_mean_and_spread_over_its_models(bench: Any) -> None:
    models = [load_pretrained("0.3.0"), load_pretrained("r2scan")]
    found = predict_crystals(chgnet, models, bench.cache, device=CPU)
    graphs = bench.cache
    from mbqueue.data.batches import make_batch

    with torch.inference_mode():
        each = [formation_energies(model, make_batch(graphs, np.arange(32))).numpy() for model in models]
    assert np.abs(found.each - each).max() < 1e-5
    assert np.allclose(found.mean, (found.each[0] + found.each[1]) / 2)
    assert np.allclose(found.spread, np.abs(found.each[0] - found.each[1]) / 2)


def test_averaging_over_opposite_small_strains_changes_energies_little_and_always_alike(bench: Any) -> None:
    models = [load_pretrained("0.3.0")]
    told: list[tuple[int, int]] = []
    plain = predict_crystals(chgnet, models, bench.cache, device=CPU)
    first = predict_crystals(
        chgnet, models, bench.cache, device=CPU, strains=2, strain_size=1e-3, on_progress=lambda *p: told.append(p)
    )
    second = predict_crystals(chgnet, models, bench.cache, device=CPU, strains=2, strain_size=1e-3)
    assert told == [(32 * n, 160) for n in range(6)]
    assert np.array_equal(first.each, second.each)
    difference = np.abs(first.each - plain.each)
    assert 0.0 < difference.max() < 1e-2
