"""The frozen backbone's output is computed once, stored and shared, and equals a new computation."""

from __future__ import annotations

import errno
import resource
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mbqueue.data.batch import Batch
from mbqueue.data.graph_cache import CRYSTALS_FILE, GraphCache, folder_name
from mbqueue.errors import CacheError
from mbqueue.train import chgnet
from mbqueue.train import frozen as frozen_module
from mbqueue.train.backbone import is_prepared, open_frozen, prepare_frozen
from mbqueue.train.chgnet import load_pretrained, set_references, trained_parameters, weights_hash
from mbqueue.train.equal_shards import EqualShards
from mbqueue.train.feeds import GraphFeed
from mbqueue.train.forward import atom_features
from mbqueue.train.frozen import FrozenBackbone, Preparing
from mbqueue.train.optim import open_for_training
from mbqueue.train.references import compositions, fit_references

CPU = torch.device("cpu")


def test_training_the_head_from_stored_features_equals_running_the_backbone_each_time(
    bench: Any, helpers: Any, tmp_path: Path, device: torch.device
) -> None:
    # This learning rate is too small to change a weight. At a higher learning rate, Adam would turn rounding errors
    # into full steps.
    runs = [bench.run(tmp_path / name, trainable="head", device=device, lr=1e-12) for name in ("stored", "run")]
    stored, running = runs
    running._feed = running._inference._feed = GraphFeed(chgnet, bench.cache)
    running._feed.costs = np.zeros(len(bench.crystals), np.int64)
    rows = [helpers.train_epoch(run, 1).history_row for run in runs]
    for measure in ("train_loss", "val_mae", "grad_norm"):
        assert rows[0][measure] == pytest.approx(rows[1][measure], rel=1e-4, abs=2e-6), measure
    ours, theirs = (dict(run._learner.model.named_parameters()) for run in runs)
    trained = trained_parameters(stored._learner.model, "head")
    assert trained
    for name in trained:
        scale = float(theirs[name].grad.abs().max())
        assert scale > 0, name
        assert float((ours[name].grad - theirs[name].grad).abs().max()) < 1e-3 * scale, name
    found = [run._inference.outputs(run.best_model(), stored.rows.test, should_stop=lambda: False) for run in runs]
    assert np.abs(found[0] - found[1]).max() < 5e-6


def test_only_the_head_changes(bench: Any, helpers: Any, tmp_path: Path) -> None:
    run = bench.run(tmp_path, trainable="head")
    helpers.train_epoch(run, 1)
    first, now = load_pretrained("0.3.0").state_dict(), run._learner.model.state_dict()
    changed = {name.split(".")[0] for name in now if not torch.equal(now[name], first[name])}
    assert changed == {"mlp", "readout_norm", "composition_model"}


def test_preparing_resumes_where_it_was_stopped_and_gives_the_same_bytes(
    bench: Any, helpers: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(frozen_module, "SHARD_SIZE", 10)
    spec = helpers.small_spec(trainable="head")
    contents = []
    for name, stops in (("whole", [1000]), ("pieces", [1, 1, 1, 1000])):
        frozen = open_frozen(spec, bench.crystals, tmp_path / name)
        told: list[tuple[int, int]] = []
        for stop in stops:
            asked = iter(range(1000))
            done = prepare_frozen(
                spec,
                bench.cache,
                frozen,
                device=CPU,
                should_stop=lambda asked=asked, stop=stop: next(asked) >= stop,
                on_progress=lambda *progress, told=told: told.append(progress),
            )
            assert done == (stop == 1000)
        assert told[0][0] == 0
        assert told[-1] == (32, 32)
        contents.append({path.name: path.read_bytes() for path in frozen.folder.glob("*.*")})
    assert len(contents[0]) == 4 * 2 * 2
    assert contents[0] == contents[1]


def made(frozen: FrozenBackbone) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in frozen.folder.glob("*.npy")}


def test_the_bytes_do_not_depend_on_which_experiment_asked_first(bench: Any, helpers: Any, tmp_path: Path) -> None:
    contents = []
    for name, train in (("plain", {}), ("other", {"max_bonds": 500, "batch_size": 3})):
        spec = helpers.small_spec(trainable="head", **train)
        frozen = open_frozen(spec, bench.crystals, tmp_path / name)
        assert prepare_frozen(spec, bench.cache, frozen, device=CPU)
        contents.append(made(frozen))
    assert contents[0] == contents[1]


def test_after_running_out_of_memory_for_one_shard_other_shards_are_computed_as_usual(
    bench: Any, helpers: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(frozen_module, "SHARD_SIZE", 16)
    spec = helpers.small_spec(trainable="head")
    plain = open_frozen(spec, bench.crystals, tmp_path / "plain")
    prepare_frozen(spec, bench.cache, plain, device=CPU)
    batches: list[list[int]] = []

    def full_at_first(model: Any, batch: Batch) -> torch.Tensor:
        batches.append(batch.rows.tolist())
        if len(batches) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return atom_features(model, batch)

    monkeypatch.setattr(chgnet, "atom_features", full_at_first)
    cut = open_frozen(spec, bench.crystals, tmp_path / "cut")
    assert prepare_frozen(spec, bench.cache, cut, device=CPU)
    assert [len(batch) for batch in batches] == [16, 8, 8, 16]
    rows = np.arange(32)
    assert np.allclose(plain.features(rows), cut.features(rows), atol=1e-5)
    assert made(plain)["features-00001.npy"] == made(cut)["features-00001.npy"]


def test_the_digest_changes_only_with_the_bytes_that_an_experiment_uses(
    bench: Any, helpers: Any, tmp_path: Path
) -> None:
    spec = helpers.small_spec(trainable="head")
    one, two = (open_frozen(spec, bench.crystals, tmp_path / name) for name in ("one", "two"))
    with pytest.raises(CacheError):
        one.digest(["energies"])
    for frozen in (one, two):
        prepare_frozen(spec, bench.cache, frozen, device=CPU)
    kinds = ["energies", "features"]
    assert one.digest(kinds) == two.digest(kinds)
    two.write("features", 0, np.nextafter(one.features(np.arange(32)), np.float32(9)))
    assert one.digest(kinds) != two.digest(kinds)
    assert one.digest(["energies"]) == two.digest(["energies"])


PREPARING = """
import pathlib, sys, time
import numpy as np
from mbqueue.train import frozen as module
module.SHARD_SIZE = 2
folder, name, other = pathlib.Path(sys.argv[1]), *sys.argv[2:]
frozen = module.FrozenBackbone(folder / "frozen", atom_offsets=np.arange(9), dataset_hash="d", weights="w")
def compute(rows, tell):
    with (folder / f"{name}.log").open("a") as log:
        log.write(f"{rows[0]}\\n")
    deadline = time.monotonic() + 60
    while not (folder / f"{other}.log").exists() and time.monotonic() < deadline:
        time.sleep(0.01)  # none continues before both run
    return np.full((len(rows), 64), len(name), np.float32), np.full(len(rows), len(name), np.float32)
assert module.Preparing(frozen=frozen, compute=compute, kinds=("energies", "features")).run()
print(frozen.digest(["energies", "features"]))
"""


def test_two_processes_that_prepare_at_once_share_the_work_and_end_with_the_same_bytes(tmp_path: Path) -> None:
    command = [sys.executable, "-c", PREPARING, str(tmp_path)]
    both = [
        subprocess.Popen([*command, *names], stdout=subprocess.PIPE, text=True) for names in (("a", "bb"), ("bb", "a"))
    ]
    digests = [process.communicate(timeout=120)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert digests[0] == digests[1]
    computed = [int(line) for name in ("a", "bb") for line in (tmp_path / f"{name}.log").read_text().split()]
    assert sorted(computed) == [0, 2, 4, 6]


def test_waiting_for_another_process_can_be_stopped(tmp_path: Path) -> None:
    def opened() -> FrozenBackbone:
        return FrozenBackbone(tmp_path, atom_offsets=np.arange(9), dataset_hash="d", weights="w")

    with opened().making(0):
        preparing = Preparing(
            frozen=opened(),
            compute=lambda *_: pytest.fail("computed"),
            kinds=("energies", "features"),
            should_stop=lambda: True,
        )
        assert not preparing.run()


def test_a_damaged_shard_is_found_and_rebuilt(bench: Any, helpers: Any, tmp_path: Path) -> None:
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


def test_the_same_crystals_with_other_ids_targets_or_companions_are_not_computed_again(
    bench: Any, helpers: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(frozen_module, "SHARD_SIZE", 10)
    crystals = bench.crystals
    shutil.copytree(bench.folder / "graphs", tmp_path / folder_name(crystals))
    crystals.save(tmp_path / folder_name(crystals) / CRYSTALS_FILE)
    spec = helpers.small_spec(trainable="head")
    first = open_frozen(spec, crystals, tmp_path)
    assert prepare_frozen(spec, bench.cache, first, device=CPU)
    monkeypatch.setattr(chgnet, "atom_features", lambda *_: pytest.fail("the backbone ran"))
    others = {
        "part": (crystals.select(np.arange(10, 30)), np.arange(10, 30)),
        "target": (replace(crystals, targets=crystals.targets + 1.0), np.arange(32)),
        "ids": (replace(crystals, ids=[f"other-{row}" for row in range(32)]), np.arange(32)),
    }
    for name, (some, rows) in others.items():
        frozen = open_frozen(spec, some, tmp_path)
        notes: list[str] = []
        cache = GraphCache.build(some, tmp_path / "graphs" / name, workers=1)
        assert prepare_frozen(spec, cache, frozen, device=CPU, on_note=notes.append)
        assert notes == [
            f"The cache already had the backbone's outputs for {len(rows)} crystals. "
            "The backbone ran on 0 more crystals."
        ]
        assert np.array_equal(frozen.energies(), first.energies()[rows])
        assert np.array_equal(frozen.features(np.arange(len(rows))), first.features(rows))


def test_other_datasets_in_the_cache_change_no_bit(
    bench: Any, helpers: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(frozen_module, "SHARD_SIZE", 10)
    crystals, spec = bench.crystals, helpers.small_spec(trainable="head")
    part = crystals.select(np.arange(25))
    part.save(tmp_path / folder_name(part) / CRYSTALS_FILE)
    first = open_frozen(spec, part, tmp_path)
    cache = GraphCache.build(part, tmp_path / folder_name(part), workers=1)
    assert prepare_frozen(spec, cache, first, device=CPU)
    path = first.folder / "features-00001.npy"
    path.write_bytes(path.read_bytes()[:-4] + b"\0\0\0\1")
    computed: list[int] = []

    def counted(model: Any, batch: Batch) -> torch.Tensor:
        computed.extend(batch.rows.tolist())
        return atom_features(model, batch)

    monkeypatch.setattr(chgnet, "atom_features", counted)
    whole = open_frozen(spec, crystals, tmp_path)
    assert prepare_frozen(spec, bench.cache, whole, device=CPU)
    assert sorted(computed) == list(range(10, 32)), "the damaged shard, and those with other companions"
    alone = open_frozen(spec, crystals, tmp_path / "alone")
    assert prepare_frozen(spec, bench.cache, alone, device=CPU)
    assert whole.digest(("energies", "features")) == alone.digest(("energies", "features"))
    moved = replace(
        crystals, frac_coords=crystals.frac_coords + (np.arange(len(crystals.frac_coords)) == 0)[:, None] * 1e-9
    )
    moved_frozen = open_frozen(spec, moved, tmp_path)
    assert EqualShards(moved_frozen, moved).find(0, ("energies",)) is None, (
        "an atom moved by less than a float32 can say"
    )
    assert EqualShards(moved_frozen, moved).find(1, ("energies",)) is not None


def test_one_pass_gives_energies_and_features_if_the_disk_has_room(
    bench: Any, helpers: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretrained, head = helpers.small_spec(trainable="none", epochs=0), helpers.small_spec(trainable="head")
    size = int(bench.crystals.atom_offsets[-1]) * 64 * 4
    for name, free in (("room", 4 * size), ("none", 4 * size - 1)):
        usage = shutil.disk_usage(tmp_path)._replace(free=free)
        monkeypatch.setattr(shutil, "disk_usage", lambda _path, usage=usage: usage)
        frozen = open_frozen(pretrained, bench.crystals, tmp_path / name)
        notes: list[str] = []
        assert prepare_frozen(pretrained, bench.cache, frozen, device=CPU, on_note=notes.append)
        assert is_prepared(head, frozen) == (name == "room")
        assert ("does not need a second pass" in notes[0]) == (name == "room")


def test_features_are_computed_only_if_an_experiment_needs_them(
    bench: Any, helpers: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An experiment that needs only energies can use a different machine's energies."""
    pretrained = helpers.small_spec(trainable="none", epochs=0)
    frozen = open_frozen(pretrained, bench.crystals, tmp_path)
    assert prepare_frozen(pretrained, bench.cache, frozen, device=CPU)
    for path in frozen.folder.glob("features-*"):
        path.unlink()
    monkeypatch.setattr(chgnet, "atom_features", lambda *_: pytest.fail("the backbone ran"))
    assert prepare_frozen(pretrained, bench.cache, frozen, device=CPU)


def test_a_partly_written_shard_reports_the_errno(tmp_path: Path) -> None:
    values = np.arange(30_000, dtype=np.float32).reshape(100, 300)
    frozen = FrozenBackbone(tmp_path, atom_offsets=np.arange(101), dataset_hash="d" * 64, weights="w" * 64)
    frozen.write("features", 0, values)
    np.save(tmp_path / "as_numpy.npy", values)
    assert next(tmp_path.glob("features*.npy")).read_bytes() == (tmp_path / "as_numpy.npy").read_bytes()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
    try:
        with pytest.raises(OSError, match="File too large") as caught:
            frozen.write("features", 0, values + 1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert caught.value.errno == errno.EFBIG


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
    assert np.abs(shares @ fitted.values - shares @ truth).max() < 1e-10
    assert set(fitted.absent) == set(range(1, 95)) - set((present + 1).tolist())
    assert all(fitted.values[z - 1] == 0.0 for z in fitted.absent)


def test_references_are_those_that_chgnets_own_atomref_fits_where_the_data_determine_them(bench: Any) -> None:
    determined = bench.crystals.select([row for row in range(32) if row % 8 in {2, 3, 6}])  # Si, Mg, Fe
    for crystals, tolerance in ((determined, 1e-5), (bench.crystals, None)):
        shares = compositions(crystals.atomic_numbers, crystals.atom_offsets)
        model = load_pretrained("0.3.0")
        model.composition_model.fit([crystals.structure(row) for row in range(len(crystals))], crystals.targets)
        stock = shares @ model.composition_model.fc.weight.detach().numpy()[0]
        ours = fit_references(shares, crystals.targets, np.zeros(len(crystals)))
        mine = shares @ ours.values
        if tolerance is not None:
            assert np.abs(mine - stock).max() < tolerance
        # mbqueue's fit must be at least as good as CHGNet's. If the data do not determine the references, CHGNet
        # inverts a singular matrix in float32.
        assert ((mine - crystals.targets) ** 2).sum() <= ((stock - crystals.targets) ** 2).sum() + 1e-6
        set_references(model, ours)
        assert np.allclose(model.composition_model.fc.weight.detach().numpy()[0], ours.values, atol=1e-6)


def test_a_frozen_head_gets_no_gradient_in_its_backbone(bench: Any) -> None:

    model = load_pretrained("0.3.0")
    open_for_training(chgnet, model, trained_parameters(model, "head"), head_only=True)
    feed = GraphFeed(chgnet, bench.cache)
    batch = feed.load(np.arange(4))
    assert isinstance(batch, Batch)
    feed.predict(model, batch).sum().backward()
    assert model.atom_embedding.embedding.weight.grad is None
    assert model.mlp.layers[0].weight.grad is not None
