"""What the frozen backbone gives: computed once, stored, shared, and worth as much as computing it each time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mbqueue.data.batch import Batch
from mbqueue.errors import CacheError
from mbqueue.train import frozen as frozen_module
from mbqueue.train.backbone import is_prepared, open_frozen, prepare_frozen
from mbqueue.train.feeds import GraphFeed
from mbqueue.train.frozen import Progress
from mbqueue.train.optim import open_for_training
from mbqueue.train.pretrained import load_pretrained, weights_hash
from mbqueue.train.references import compositions, fit_references, set_references

CPU = torch.device("cpu")


def test_training_the_head_from_stored_features_equals_running_the_backbone_each_time(
    bench: Any, helpers: Any, tmp_path: Path
) -> None:
    stored, running = bench.run(tmp_path / "stored", trainable="head"), bench.run(tmp_path / "run", trainable="head")
    running._feed = GraphFeed(bench.cache)
    running._feed.costs = np.zeros(len(bench.crystals), np.int64)
    for epoch in (1, 2):
        a, b = helpers.train_epoch(stored, epoch).history_row, helpers.train_epoch(running, epoch).history_row
        assert a["val_mae"] == pytest.approx(b["val_mae"], abs=2e-5)
    rows = stored.rows.test
    ours, theirs = (run._infer(run.best_model(), rows, lambda: False) for run in (stored, running))
    assert np.abs(ours - theirs).max() < 5e-5


def test_only_the_head_changes(bench: Any, helpers: Any, tmp_path: Path) -> None:
    run = bench.run(tmp_path, trainable="head")
    helpers.train_epoch(run, 1)
    first, now = load_pretrained("0.3.0").state_dict(), run._learner.model.state_dict()
    changed = {name.split(".")[0] for name in now if not torch.equal(now[name], first[name])}
    assert changed == {"mlp", "readout_norm", "composition_model"}


def test_preparing_goes_on_where_it_was_stopped_and_gives_the_same_bytes(
    bench: Any, helpers: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(frozen_module, "SHARD_SIZE", 10)
    spec = helpers.small_spec(trainable="head")
    contents = []
    for name, stops in (("whole", [1000]), ("pieces", [1, 1, 1, 1000])):
        frozen = open_frozen(spec, bench.crystals, tmp_path / name)
        told: list[Progress] = []
        for stop in stops:
            asked = iter(range(1000))
            done = prepare_frozen(
                spec,
                bench.cache,
                frozen,
                device=CPU,
                should_stop=lambda asked=asked, stop=stop: next(asked) >= stop,
                on_progress=told.append,
            )
            assert done == (stop == 1000)
        assert told[-1] == Progress(done=32, total=32)
        assert [p.done for p in told] == sorted(p.done for p in told)
        contents.append({path.name: path.read_bytes() for path in frozen.folder.iterdir()})
    assert len(contents[0]) == 4 * 2 * 2
    assert contents[0] == contents[1]


def test_a_damaged_shard_is_noticed_and_made_again(bench: Any, helpers: Any, tmp_path: Path) -> None:
    spec = helpers.small_spec(trainable="head")
    frozen = open_frozen(spec, bench.crystals, tmp_path)
    assert not is_prepared(spec, frozen)
    with pytest.raises(CacheError, match="Run the experiment's prepare job"):
        frozen.energies()
    prepare_frozen(spec, bench.cache, frozen, device=CPU)
    assert is_prepared(spec, frozen)
    path = next(frozen.folder.glob("features-*.npy"))
    good = path.read_bytes()
    path.write_bytes(good[:-4] + b"\0\0\0\1")
    assert frozen.missing("features", verify=True) == [0]
    prepare_frozen(spec, bench.cache, frozen, device=CPU)
    assert path.read_bytes() == good


def test_other_weights_and_other_crystals_have_another_folder(bench: Any, helpers: Any, tmp_path: Path) -> None:
    folders = {
        open_frozen(helpers.small_spec(pretrained=version), crystals, tmp_path).folder
        for version in ("0.3.0", "r2scan")
        for crystals in (bench.crystals, bench.crystals.select(np.arange(8)))
    }
    assert len(folders) == 4
    model = load_pretrained("0.3.0")
    before = weights_hash(model)
    with torch.no_grad():
        model.composition_model.fc.weight.zero_()
    assert weights_hash(model) == before, "the backbone does not include the references"


def test_references_are_the_least_squares_fit_and_absent_elements_are_reported(bench: Any) -> None:
    crystals = bench.crystals
    shares = compositions(crystals.atomic_numbers, crystals.atom_offsets)
    assert shares.sum(axis=1) == pytest.approx(1.0)
    interaction = np.linspace(-3.0, 1.0, len(crystals))
    truth = np.zeros(94)
    present = np.unique(crystals.atomic_numbers).astype(int) - 1
    truth[present] = np.linspace(-1.0, 2.0, len(present))
    fitted = fit_references(shares, interaction + shares @ truth, interaction)
    assert np.abs(shares @ fitted.energies - shares @ truth).max() < 1e-10
    assert set(fitted.absent) == set(range(1, 95)) - set((present + 1).tolist())
    assert all(fitted.energies[z - 1] == 0.0 for z in fitted.absent)


def test_references_are_those_that_chgnets_own_atomref_fits_where_the_data_determine_them(bench: Any) -> None:
    determined = bench.crystals.select([row for row in range(32) if row % 8 in {2, 3, 6}])  # Si, Mg, Fe
    for crystals, tolerance in ((determined, 1e-5), (bench.crystals, None)):
        shares = compositions(crystals.atomic_numbers, crystals.atom_offsets)
        model = load_pretrained("0.3.0")
        model.composition_model.fit([crystals.structure(row) for row in range(len(crystals))], crystals.targets)
        stock = shares @ model.composition_model.fc.weight.detach().numpy()[0]
        ours = fit_references(shares, crystals.targets, np.zeros(len(crystals)))
        mine = shares @ ours.energies
        if tolerance is not None:
            assert np.abs(mine - stock).max() < tolerance
        # Elsewhere CHGNet inverts a singular matrix in float32; a fit cannot be worse than that.
        assert ((mine - crystals.targets) ** 2).sum() <= ((stock - crystals.targets) ** 2).sum() + 1e-6
        set_references(model, ours)
        assert np.allclose(model.composition_model.fc.weight.detach().numpy()[0], ours.energies, atol=1e-6)


def test_a_frozen_head_gets_no_gradient_in_its_backbone(bench: Any) -> None:
    from mbqueue.train.optim import trained_parameters

    model = load_pretrained("0.3.0")
    open_for_training(model, trained_parameters(model, "head"), head_only=True)
    feed = GraphFeed(bench.cache)
    batch = feed.load(np.arange(4))
    assert isinstance(batch, Batch)
    feed.predict(model, batch).sum().backward()
    assert model.atom_embedding.embedding.weight.grad is None
    assert model.mlp.layers[0].weight.grad is not None
