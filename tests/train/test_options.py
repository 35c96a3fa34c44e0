"""Every option of [train] does what it says."""

from __future__ import annotations

import io
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mbqueue.errors import CheckpointMisfit
from mbqueue.experiment import TrainSpec
from mbqueue.history import is_out_of_patience
from mbqueue.train import chgnet
from mbqueue.train.arrivals import arriving
from mbqueue.train.chgnet import depth, load_pretrained, trained_parameters
from mbqueue.train.feeds import GraphFeed, pack
from mbqueue.train.gated import PRODUCTS
from mbqueue.train.objective import Objective
from mbqueue.train.optim import WeightAverage, WeightSoup, learning_rate, make_optimizer, open_for_training
from mbqueue.train.state import serialise
from mbqueue.train.step import Guard, begin_step


@pytest.mark.parametrize(
    ("kind", "expected"), [("l1", 0.05 + 0.3), ("l2", 0.05**2 + 0.3**2), ("huber", 0.05**2 / 2 + 0.1 * (0.3 - 0.05))]
)
def test_losses_follow_their_textbook_formulas(kind: str, expected: float) -> None:
    predicted, target = torch.tensor([1.05, 1.0]), torch.tensor([1.0, 1.3])
    assert float(
        Objective(TrainSpec(loss=kind, huber_delta=0.1), "energy").loss_sum(predicted, target)
    ) == pytest.approx(expected, rel=1e-5)


def test_the_rate_rises_linearly_and_falls_as_a_cosine() -> None:
    spec = TrainSpec(lr=1.0, warmup=0.1, final_lr=0.01)
    rates = [learning_rate(spec, step, 100) for step in range(100)]
    assert rates[:10] == pytest.approx([0.1 * n for n in range(1, 11)])
    assert rates[10] == 1.0
    assert rates[-1] == pytest.approx(0.01)
    assert all(before >= after for before, after in itertools.pairwise(rates[10:]))


def test_a_constant_rate_stays() -> None:
    spec = TrainSpec(lr=0.5, warmup=0.1, schedule="constant")
    assert {learning_rate(spec, step, 100) for step in range(10, 100)} == {0.5}


def test_without_warm_up_the_first_rate_is_the_peak() -> None:
    assert learning_rate(TrainSpec(lr=0.5, warmup=0.0), 0, 10) == 0.5


def one_step(bench: Any, rows: np.ndarray, batches: int = 1, **options: Any) -> tuple[Any, Any]:
    """Take one step over ``rows`` in ``batches`` batches; return the model and the result of the step."""
    spec = TrainSpec(**{"lr": 1e-3, "batch_size": 16, **options})
    model = load_pretrained("0.3.0")
    trained = trained_parameters(model, "all")
    open_for_training(chgnet, model, trained, head_only=False)
    optimizer = make_optimizer(chgnet, model, trained, spec)
    feed = GraphFeed(chgnet, bench.cache)
    device = torch.device("cpu")
    step = begin_step(
        model,
        feed,
        next(arriving([[feed.load(part) for part in np.array_split(rows, batches)]], device)),
        objective=Objective(spec, "energy"),
        optimizer=optimizer,
        guard=Guard(optimizer, device),
        parameters=list(trained.values()),
        rate=spec.lr,
    )
    result = step.result(bench.crystals.ids)
    return model, result


def test_clipping_limits_the_gradient_and_0_turns_it_off(bench: Any) -> None:
    rows = np.arange(8)
    for clip_norm in (0.0, 1e-3):
        model, result = one_step(bench, rows, clip_norm=clip_norm)
        norm = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
        assert result.grad_norm > 1e-2
        assert float(norm) == pytest.approx(clip_norm or result.grad_norm, rel=1e-3)


def test_gradients_of_parts_add_up_to_the_gradient_of_the_batch(bench: Any) -> None:
    rows = np.arange(12)
    whole, whole_result = one_step(bench, rows)
    parts, parts_result = one_step(bench, rows, batches=5)
    assert parts_result.loss == pytest.approx(whole_result.loss, rel=1e-5)
    assert parts_result.grad_norm == pytest.approx(whole_result.grad_norm, rel=1e-4)
    assert parts_result.structures == whole_result.structures == 12
    for (name, a), b in zip(whole.named_parameters(), parts.parameters(), strict=True):
        if a.grad is not None:
            assert float((a.grad - b.grad).norm()) <= 1e-4 * float(a.grad.norm()) + 1e-9, name


def test_packing_keeps_order_and_respects_both_limits() -> None:
    costs = np.array([5, 1, 1, 9, 2, 2, 2])
    rows = np.array([6, 5, 3, 0, 1, 2, 4])
    parts = pack(rows, costs, largest_count=3, largest_cost=6)
    assert [part.tolist() for part in parts] == [[6, 5], [3], [0, 1], [2, 4]]
    assert [part.tolist() for part in pack(rows, costs, largest_count=3, largest_cost=0)] == [[6, 5, 3], [0, 1, 2], [4]]


def test_a_cap_on_bonds_gives_the_same_training(bench: Any, helpers: Any, tmp_path: Path) -> None:
    free, capped = bench.run(tmp_path / "free"), bench.run(tmp_path / "capped", max_bonds=900)
    assert int(bench.cache.bond_counts().max()) > 500
    rows = [helpers.train_epoch(run, 1).history_row for run in (free, capped)]
    assert rows[1]["train_mae"] == pytest.approx(rows[0]["train_mae"], rel=1e-3)
    assert rows[1]["val_mae"] == pytest.approx(rows[0]["val_mae"], rel=1e-3)


def test_parameters_that_the_energy_does_not_depend_on_are_not_trained() -> None:
    names = trained_parameters(load_pretrained("0.3.0"), "all").keys()
    assert not any(name.startswith(("site_wise", "angle_layers.2")) for name in names)
    assert "composition_model.fc.weight" in names
    assert "bond_basis_expansion.rbf_expansion_ag.frequencies" in names
    assert trained_parameters(load_pretrained("0.3.0"), "none") == {}


def test_element_references_do_not_decay(bench: Any) -> None:
    groups = make_optimizer(
        chgnet, model := load_pretrained("0.3.0"), trained_parameters(model, "all"), TrainSpec(weight_decay=0.1)
    ).param_groups
    reference = model.composition_model.fc.weight
    for group in groups:
        has_reference = any(parameter is reference for parameter in group["params"])
        assert group["weight_decay"] == (0.0 if has_reference else 0.1)


@pytest.mark.parametrize(
    ("name", "blocks"),
    [
        ("mlp.layers.0.weight", 0),
        ("composition_model.fc.weight", 0),
        ("atom_conv_layers.3.mlp_out.layers.1.weight", 1),
        ("bond_conv_layers.2.mlp_out.layers.1.weight", 2),
        ("angle_layers.0.twoBody_bond.bn1.weight", 4),
        ("atom_embedding.embedding.weight", 5),
    ],
)
def test_layer_wise_decay_counts_blocks_from_the_read_out(name: str, blocks: int) -> None:
    assert depth(load_pretrained("0.3.0"), name) == blocks


def test_layer_wise_decay_scales_the_steps(bench: Any) -> None:
    first = load_pretrained("0.3.0")
    moved = []
    for decay in (1.0, 0.5):
        model, _ = one_step(bench, np.arange(8), layer_lr_decay=decay, weight_decay=0.0)
        change = model.atom_embedding.embedding.weight - first.atom_embedding.embedding.weight
        moved.append(float(change.detach().abs().max()))
    assert moved[1] == pytest.approx(moved[0] / 2**5, rel=1e-2)


def test_the_head_alone_is_trained_before_unfreezing(bench: Any, helpers: Any, tmp_path: Path) -> None:
    run = bench.run(tmp_path, unfreeze_epochs=1)
    first = load_pretrained("0.3.0").state_dict()
    changed = []
    for epoch in (1, 2):
        helpers.train_epoch(run, epoch)
        now = run._learner.model.state_dict()
        changed.append({name for name in now if not torch.equal(now[name], first[name])})
    assert {name.split(".")[0] for name in changed[0]} == {"mlp", "readout_norm", "composition_model"}
    assert "atom_conv_layers.0.mlp_out.layers.1.weight" in changed[1]


def test_averaged_weights_follow_their_formula() -> None:
    live = {"w": torch.nn.Parameter(torch.tensor([0.0]))}
    average = WeightAverage(live, decay=0.5)
    expected = 0.0
    for step in range(1, 8):
        live["w"].data += 1.0
        average.update(step)
        keep = min(0.5, (1 + step) / (10 + step))
        expected = keep * expected + (1 - keep) * step
    assert float(average.tensors["w"].detach()) == pytest.approx(expected)
    with average.applied():
        assert float(live["w"].detach()) == pytest.approx(expected)
    assert float(live["w"].detach()) == 7.0


def test_averaged_weights_are_validated_and_kept(bench: Any, helpers: Any, tmp_path: Path) -> None:
    run = bench.run(tmp_path, ema_decay=0.9)
    outcome = helpers.train_epoch(run, 1)
    rows = run.rows.validation
    best = run.best_model()
    predicted = run._inference.outputs(best, rows, should_stop=lambda: False)
    assert float(np.abs(predicted - bench.crystals.targets[rows]).mean()) == outcome.history_row["val_mae"]
    weight = run._learner.model.mlp.layers[0].weight
    assert not torch.equal(best.mlp.layers[0].weight, weight)


def test_a_soup_is_the_mean_of_the_weights_at_the_ends_of_the_last_epochs() -> None:
    live = {"w": torch.nn.Parameter(torch.tensor([0.0]))}
    soup = WeightSoup(live, epochs=3)
    found = []
    for weight in (1.0, 2.0, 6.0, 10.0):
        live["w"].data.fill_(weight)
        soup.stir()
        soup.stir()  # if a validation was interrupted, the session that repeats it calls `stir` again
        with soup.applied():
            found.append(float(live["w"].detach()))
        assert float(live["w"].detach()) == weight
        soup.keep()
    assert found == [1.0, 1.5, 3.0, 6.0]
    assert [float(end["w"]) for end in soup.ends] == [6.0, 10.0]


def test_a_soup_of_the_best_epochs_is_the_mean_of_those_with_the_lowest_error_of_their_own() -> None:
    live = {"w": torch.nn.Parameter(torch.tensor([0.0]))}
    soup = WeightSoup(live, epochs=2, of_best=True)
    found = []
    for weight, mae in ((1.0, 0.5), (2.0, 0.3), (6.0, 0.9), (10.0, 0.3), (20.0, 0.3), (30.0, 0.1)):
        live["w"].data.fill_(weight)
        soup.stir(mae)
        soup.stir(mae)
        with soup.applied():
            found.append(float(live["w"].detach()))
        soup.keep()
    assert found == [1.0, 1.5, 1.5, 6.0, 6.0, 16.0]
    assert ([float(end["w"]) for end in soup.ends], soup.end_maes) == ([2.0, 30.0], [0.3, 0.1])
    with pytest.raises(CheckpointMisfit, match="lacks the validation MAEs of the soup's epochs"):
        soup.restore(soup.tensors, soup.ends, [0.3])


def test_the_best_epochs_of_a_soup_are_those_whose_own_weights_validate_best(
    bench: Any, helpers: Any, tmp_path: Path
) -> None:
    # This learning rate is so high that the best two epochs are not always the last two.
    options = {"epochs": 4, "lr": 3e-2, "schedule": "constant", "trainable": "head"}
    run, plain = bench.run(tmp_path / "soup", soup=2, soup_of="best", **options), bench.run(tmp_path / "own", **options)
    name, ends, maes, is_of_last = "mlp.layers.0.weight", [], [], []
    for epoch in range(1, 5):
        helpers.train_epoch(run, epoch)
        maes.append(helpers.train_epoch(plain, epoch).history_row["val_mae"])
        ends.append(run._learner.trained[name].detach().clone())
        assert torch.equal(ends[-1], plain._learner.trained[name]), "a soup changed the training"
        best = sorted(sorted(range(epoch), key=maes.__getitem__)[:2])
        mean = sum((ends[one] for one in best[1:]), ends[best[0]]) / len(best)
        assert torch.equal(run._learner.soup.tensors[name], mean)
        assert run._learner.soup.end_maes == [maes[one] for one in best]
        is_of_last.append(best[-1] == epoch - 1)
    assert not all(is_of_last)
    kept = run._learner.best["epoch"]
    assert run.history()[kept - 1]["val_mae"] == min(row["val_mae"] for row in run.history())


def test_a_soup_is_validated_and_kept(bench: Any, helpers: Any, tmp_path: Path) -> None:
    run = bench.run(tmp_path, soup=2)
    ends = []
    for epoch in (1, 2):
        outcome = helpers.train_epoch(run, epoch)
        ends.append({name: p.detach().clone() for name, p in run._learner.trained.items()})
    name = "mlp.layers.0.weight"
    mean = (ends[0][name] + ends[1][name]) / 2
    assert torch.equal(run._learner.soup.tensors[name], mean)
    assert not torch.equal(mean, ends[1][name])
    with run._learner.soup.applied():
        rows = run.rows.validation
        predicted = run._inference.outputs(run._learner.model, rows, should_stop=lambda: False)
    assert float(np.abs(predicted - bench.crystals.targets[rows]).mean()) == outcome.history_row["val_mae"]
    if outcome.improved:
        assert torch.equal(run.best_model().mlp.layers[0].weight, mean)


def test_a_state_without_a_soup_has_the_bytes_that_it_always_had(bench: Any, helpers: Any, tmp_path: Path) -> None:
    run = bench.run(tmp_path)
    helpers.train_epoch(run, 1)
    parts = torch.load(io.BytesIO(serialise(run._learner.state())), weights_only=True)
    assert {"ends", "end_maes"}.isdisjoint(parts)


def test_patience_stops_training_after_epochs_without_improvement(bench: Any, helpers: Any, tmp_path: Path) -> None:
    # At this high learning rate, epochs improve only by chance, so training soon stops early.
    run = bench.run(tmp_path, epochs=8, patience=2, lr=3e-2, schedule="constant")
    outcomes = []
    for epoch in range(1, 9):
        outcomes.append(helpers.train_epoch(run, epoch))
        maes = [outcome.history_row["val_mae"] for outcome in outcomes]
        since_best = len(maes) - 1 - maes.index(min(maes))
        assert outcomes[-1].improved == (since_best == 0)
        assert outcomes[-1].best["epoch"] == maes.index(min(maes)) + 1
        best = outcomes[-1].best["epoch"]
        assert is_out_of_patience(2, epoch=epoch, best=best) == (since_best >= 2)
        assert not is_out_of_patience(0, epoch=epoch, best=best)
        if since_best >= 2:
            break
    assert since_best == 2


@pytest.mark.parametrize("lever", [{"strain": 0.02}, {"jitter": 0.05}])
def test_augmentation_changes_training_and_not_validation(
    bench: Any, helpers: Any, tmp_path: Path, lever: dict[str, float]
) -> None:
    runs = [bench.run(tmp_path / name, **options) for name, options in (("off", {}), ("on", lever))]
    rows = [helpers.train_epoch(run, 1).history_row for run in runs]
    assert rows[0]["train_mae"] != rows[1]["train_mae"]
    on, off = (
        run._inference.outputs(runs[0].best_model(), run.rows.validation, should_stop=lambda: False) for run in runs
    )
    assert np.array_equal(on, off)
    assert runs[1]._distortion(1) != runs[1]._distortion(2)


def test_float16_gradients_are_unscaled_before_use(bench: Any) -> None:
    exact, exact_result = one_step(bench, np.arange(8), clip_norm=0.0)
    token = PRODUCTS.set(torch.float16)
    try:
        half, half_result = one_step(bench, np.arange(8), clip_norm=0.0)
    finally:
        PRODUCTS.reset(token)
    assert half_result.grad_norm != exact_result.grad_norm
    assert half_result.grad_norm == pytest.approx(exact_result.grad_norm, rel=1e-2)
    for (name, a), b in zip(exact.named_parameters(), half.parameters(), strict=True):
        if a.grad is not None:
            assert float((a.grad - b.grad).norm()) <= 0.1 * float(a.grad.norm()) + 1e-9, name
