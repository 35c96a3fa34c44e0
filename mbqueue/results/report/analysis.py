"""Compute the report's numbers and sentences; the figures are drawn elsewhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mbqueue.errors import counted
from mbqueue.history import best_epoch
from mbqueue.results.report.elements import POSITIONS, elements_of
from mbqueue.results.scores import CLASS_THRESHOLD, roc_auc
from mbqueue.results.tables import Predictions

#: The error quantiles that the report shows, as fractions of the crystals.
QUANTILES = (0.5, 0.9, 0.99)
#: Smaller errors are drawn at this value, because float32 predictions are not more precise than this.
SMALLEST_ERROR = 1e-5
_PARITY_BINS = 160
_TARGET_BINS = 30
_ROC_POINTS = 400

# The validation MAE has risen if its last value is more than `_RISE` times its best value. A fold overfits if its
# validation MAE rose while its training MAE fell, and either the best epoch was long ago or the validation MAE rose by
# a factor of at least `_DOUBLED`.
_RISE, _DOUBLED = 1.05, 2.0
# The last epoch still improved the model if it lowered the validation MAE by more than this factor.
_STEADY = 1.01
# The best epoch was long ago if at least this fraction of all epochs, and at least this many epochs, came after it.
_LONG_AGO_SHARE, _LONG_AGO_EPOCHS = 0.2, 2
# The gap is the ratio of validation MAE to training MAE: small up to `_SMALL_GAP`, large from `_LARGE_GAP` on.
_SMALL_GAP, _LARGE_GAP = 1.25, 2.0
#: The minimum number of epochs for judging a curve.
_FEWEST_EPOCHS = 3
#: The report shows larger ratios as "more than" this value.
_LARGEST_RATIO = 100


@dataclass(frozen=True)
class Verdict:
    """A summary of one fold's training.

    Attributes:
        kind: untrained, too few epochs, diverged, overfits, unsettled (the validation MAE rose only recently, or the
            training MAE rose too), improving or settled.
        text: the reason.
        is_doubtful: whether the training deserves a closer look.
    """

    fold: int
    kind: str
    text: str
    is_doubtful: bool = False


def verdict(fold: int, history: Sequence[Mapping[str, Any]]) -> Verdict:
    """Judge whether a fold overfits, from the gap between training and validation MAE and the epochs after the best
    one.

    The training MAE is a mean over the whole epoch, while the model is still improving. So early in training, the
    training MAE is higher than the validation MAE. Only a training MAE below the validation MAE is a sign of
    memorising.
    """
    best = best_epoch(history)
    if best is None:
        return Verdict(fold, "untrained", "no epoch was trained, so the model cannot overfit.")
    epoch, val_mae = best
    last, at_best = history[-1], next(row for row in history if row["epoch"] == epoch)
    since = last["epoch"] - epoch
    rise = _ratio(last["val_mae"], val_mae)
    has_risen, training_fell = rise > _RISE, last["train_mae"] < at_best["train_mae"]
    gap, last_gap = _ratio(val_mae, at_best["train_mae"]), _ratio(last["val_mae"], last["train_mae"])
    is_long_ago = since >= max(_LONG_AGO_EPOCHS, _LONG_AGO_SHARE * last["epoch"])

    said = [f"best at epoch {epoch} of {last['epoch']} (validation MAE {val_mae:.4f}), {_since(since)}"]
    if has_risen:
        training = "kept falling" if training_fell else f"rose {_by(_ratio(last['train_mae'], at_best['train_mae']))}"
        said.append(f"since then the validation MAE rose {_by(rise)} while the training MAE {training}")
    if len(history) < _FEWEST_EPOCHS:
        kind = "too few epochs"
    elif rise >= _DOUBLED and not training_fell:
        kind = "diverged"
        said.append("the training is unstable, and a lower learning rate may help")
    elif has_risen and training_fell and (is_long_ago or rise >= _DOUBLED):
        kind = "overfits"
    elif has_risen:
        kind = "unsettled"
    elif since == 0 and history[-2]["val_mae"] > _STEADY * val_mae:
        kind = "improving"
        said.append("more epochs may help")
    else:
        kind = "settled"
        said.append(
            f"the validation MAE ended at most {_RISE - 1:.0%} above that value, so the training has settled"
            if since
            else f"it lowered the validation MAE by at most {_STEADY - 1:.0%}, so the training has settled"
        )
    said.append(f"at epoch {epoch} {_gap(gap)}")
    if since and (kind == "overfits" or last_gap >= _LARGE_GAP > gap):
        said.append(f"at epoch {last['epoch']} {_gap(last_gap)}")
    is_doubtful = kind in ("diverged", "overfits", "unsettled") or max(gap, last_gap) >= _LARGE_GAP
    return Verdict(fold, kind, "; ".join(said) + ".", is_doubtful)


def _ratio(above: float, below: float) -> float:
    if below > 0:
        return above / below
    return float("inf") if above > 0 else 1.0


def _times(ratio: float) -> str:
    return f"{ratio:.1f} times" if ratio <= _LARGEST_RATIO else f"more than {_LARGEST_RATIO} times"


def _by(ratio: float) -> str:
    """Describe how much an MAE rose, as ``by 12%`` or, from a factor of ten, as ``to 17.0 times that value``."""
    return f"by {ratio - 1:.0%}" if ratio < 10 else f"to {_times(ratio)} that value"


def _gap(ratio: float) -> str:
    if ratio <= _SMALL_GAP:
        return "the gap to the training MAE is small"
    if ratio < _LARGE_GAP:
        return f"the validation MAE is {_times(ratio)} the training MAE, a moderate gap"
    return f"the validation MAE is {_times(ratio)} the training MAE: the model fits its training crystals much better"


def _since(epochs: int) -> str:
    return "the last epoch" if epochs == 0 else f"{counted(epochs, 'epoch')} before the end"


@dataclass(frozen=True)
class Density:
    """Counts of crystals on a square grid.

    ``counts[i, j]`` is the number of crystals with target in bin j and prediction in bin i.
    """

    edges: NDArray[np.float64]
    counts: NDArray[np.int64]


def parity_density(predictions: Predictions) -> Density:
    """Bin targets against predictions, so that a plot of any number of crystals stays readable."""
    both = np.concatenate([predictions.y_true, predictions.y_pred])
    low, high = float(both.min()), float(both.max())
    pad = 0.02 * (high - low) or 0.1
    edges = np.linspace(low - pad, high + pad, _PARITY_BINS + 1)
    counts, _, _ = np.histogram2d(predictions.y_pred, predictions.y_true, bins=(edges, edges))
    return Density(edges, counts.astype(np.int64))


@dataclass(frozen=True)
class Roc:
    """A ROC curve: false and true positive rates, from (0, 0) to (1, 1), and the area under it."""

    false_positive: NDArray[np.float64]
    true_positive: NDArray[np.float64]
    area: float


def roc(predictions: Predictions) -> Roc | None:
    """The ROC curve of a class, with at most 401 points; None if the test set has only one class."""
    is_one = predictions.y_true > CLASS_THRESHOLD
    if is_one.all() or not is_one.any():
        return None
    order = np.argsort(-predictions.y_pred, kind="stable")
    ends = np.flatnonzero(np.diff(predictions.y_pred[order], append=np.inf))  # the last of each run of equal values
    true, false = np.cumsum(is_one[order])[ends], np.cumsum(~is_one[order])[ends]
    kept = np.unique(np.linspace(0, len(ends) - 1, min(len(ends), _ROC_POINTS)).astype(int))
    rates = [np.concatenate([[0.0], counts[kept] / counts[-1]]) for counts in (false, true)]
    return Roc(rates[0], rates[1], roc_auc(is_one, predictions.y_pred))


@dataclass(frozen=True)
class Reliability:
    """For each bin of predicted probabilities: the mean probability, the fraction of class 1, and the number of
    crystals."""

    predicted: NDArray[np.float64]
    observed: NDArray[np.float64]
    counts: NDArray[np.int64]


def reliability(predictions: Predictions) -> Reliability:
    """Compute the calibration of predicted probabilities in ten bins, leaving out empty bins."""
    which = np.clip((predictions.y_pred * 10).astype(int), 0, 9)
    counts = np.bincount(which, minlength=10)
    there = counts > 0
    means = [np.bincount(which, values, minlength=10)[there] for values in (predictions.y_pred, predictions.y_true)]
    return Reliability(means[0] / counts[there], means[1] / counts[there], counts[there])


def confusion(predictions: Predictions) -> NDArray[np.int64]:
    """Count the crystals by true class (row) and predicted class (column), int64 [2, 2]."""
    true, said = (values > CLASS_THRESHOLD for values in (predictions.y_true, predictions.y_pred))
    return np.bincount(2 * true + said, minlength=4).reshape(2, 2)


@dataclass(frozen=True)
class ErrorDistribution:
    """A histogram of absolute errors in logarithmic bins, and the quantiles (fraction → error)."""

    edges: NDArray[np.float64]
    counts: NDArray[np.int64]
    quantiles: dict[float, float]


def error_distribution(abs_error: NDArray[np.float64]) -> ErrorDistribution:
    """Compute the distribution of errors. Errors below ``SMALLEST_ERROR`` are in the first bin."""
    clipped = np.maximum(abs_error, SMALLEST_ERROR)
    top = np.ceil(np.log10(clipped.max()) * 10 + 0.5) / 10
    edges = np.logspace(np.log10(SMALLEST_ERROR), max(top, -4.0), 61)
    edges[0] = SMALLEST_ERROR
    counts, _ = np.histogram(clipped, bins=edges)
    return ErrorDistribution(edges, counts, {q: float(np.quantile(abs_error, q)) for q in QUANTILES})


@dataclass(frozen=True)
class Trend:
    """Errors, binned by a property of the crystals. Empty bins are left out."""

    centres: NDArray[np.float64]
    counts: NDArray[np.int64]
    mean: NDArray[np.float64]
    lower: NDArray[np.float64]
    median: NDArray[np.float64]
    upper: NDArray[np.float64]


def trend(values: NDArray[Any], abs_error: NDArray[np.float64], edges: NDArray[np.float64]) -> Trend:
    """Compute the mean and quartiles of the error in each bin. The last bin includes its upper edge.

    The centre of a bin is the mean of the values in the bin.
    """
    which = np.clip(np.searchsorted(edges, values, side="right") - 1, 0, len(edges) - 2)
    rows = []
    for index in np.unique(which):
        inside = which == index
        errors = abs_error[inside]
        lower, median, upper = np.quantile(errors, (0.25, 0.5, 0.75))
        rows.append((float(np.mean(values[inside])), len(errors), float(errors.mean()), lower, median, upper))
    columns = np.array(rows, dtype=np.float64).T
    return Trend(columns[0], columns[1].astype(np.int64), *columns[2:])


def by_atoms(predictions: Predictions) -> Trend:
    """Bin errors by the number of atoms in the cell. Each bin edge is about 1.5 times the previous edge."""
    largest = int(predictions.n_atoms.max())
    edges = [1]
    while edges[-1] <= largest:
        edges.append(max(edges[-1] + 1, int(edges[-1] * 1.5)))
    return trend(predictions.n_atoms, predictions.abs_error, np.array(edges, dtype=np.float64))


def by_target(predictions: Predictions) -> Trend:
    """Bin errors by target, in bins of equal width over the middle 99.8 % of the crystals.

    The first and the last bin also contain the remaining 0.2 % of the crystals.
    """
    low, high = np.quantile(predictions.y_true, (0.001, 0.999))
    edges = np.linspace(low, high if high > low else low + 1e-9, _TARGET_BINS + 1)
    return trend(predictions.y_true, predictions.abs_error, edges)


def by_element_count(predictions: Predictions) -> Trend:
    n_elements = np.array([len(elements_of(formula)) for formula in predictions.compositions])
    edges = np.arange(n_elements.min(), n_elements.max() + 2) - 0.5
    return trend(n_elements, predictions.abs_error, edges)


def by_element(predictions: Predictions) -> dict[str, tuple[float, int]]:
    """Compute the error of each element: symbol → (MAE over the crystals that contain it, number of these crystals)."""
    total: dict[str, float] = dict.fromkeys(POSITIONS, 0.0)
    count: dict[str, int] = dict.fromkeys(POSITIONS, 0)
    for formula, error in zip(predictions.compositions, predictions.abs_error.tolist(), strict=True):
        for symbol in elements_of(formula) & POSITIONS.keys():
            total[symbol] += error
            count[symbol] += 1
    return {symbol: (total[symbol] / n, n) for symbol, n in count.items() if n}


@dataclass(frozen=True)
class Worst:
    """One of the crystals with the largest errors."""

    fold: int
    id: str
    composition: str
    n_atoms: int
    y_true: float
    y_pred: float
    abs_error: float


def worst(predictions: Mapping[int, Predictions], count: int = 50) -> list[Worst]:
    """List the crystals with the largest errors over all folds, largest error first."""
    rows = [
        Worst(fold, t.ids[i], t.compositions[i], int(t.n_atoms[i]), float(t.y_true[i]), float(t.y_pred[i]), float(e[i]))
        for fold, t in predictions.items()
        for e in [t.abs_error]
        for i in np.argsort(e)[::-1][:count].tolist()
    ]
    return sorted(rows, key=lambda row: (-row.abs_error, row.id))[:count]


def session_hours(
    content: Mapping[str, Any], histories: Mapping[int, Sequence[Mapping[str, Any]]]
) -> list[dict[str, Any]]:
    """Return, for each session in order: id, device, hours of finished epochs by fold, and other hours.

    If several sessions worked on an epoch (``first+second``), its time is divided evenly between the sessions. Other
    hours are start-up, preparation, predictions, and epochs that a crash or a deadline cut short.
    """
    trained: dict[str, dict[int, float]] = {}
    devices: dict[str, str] = {}
    for fold, rows in histories.items():
        for row in rows:
            shared_by = row["session"].split("+")
            for session in shared_by:
                by_fold = trained.setdefault(session, {})
                by_fold[fold] = by_fold.get(fold, 0.0) + row["seconds"] / 3600 / len(shared_by)
                devices.setdefault(session, row["device"])
    known = {session["id"]: session for session in content["run"]["sessions"]}
    return [
        {
            "id": session,
            "device": known[session]["device"] if session in known else devices[session],
            "folds": trained.get(session, {}),
            "rest": max(0.0, known[session]["seconds"] / 3600 - sum(trained.get(session, {}).values()))
            if session in known
            else 0.0,
        }
        for session in [*known, *(s for s in trained if s not in known)]
    ]
