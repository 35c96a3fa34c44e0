"""What the report tells, as numbers and words; no drawing here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mbqueue.results.record import best_epoch
from mbqueue.results.report.elements import POSITIONS, elements_of
from mbqueue.results.tables import Predictions

#: Shares of the crystals at which the error distribution is told.
QUANTILES = (0.5, 0.9, 0.99)
#: Errors below this are drawn at it, eV/atom: float32 predictions carry no more.
SMALLEST_ERROR = 1e-5
_PARITY_BINS = 160

# A fold overfits when its best epoch lies so far back (share of its epochs, and at least so many), and the
# validation MAE has risen by so much since, while the training MAE kept falling.
_LONG_AGO_SHARE, _LONG_AGO_EPOCHS = 0.2, 2
_RISE = 1.05
# Gap between validation and training at the best epoch, as a ratio.
_SMALL_GAP, _LARGE_GAP = 1.25, 2.0


@dataclass(frozen=True)
class Verdict:
    """How one fold's training went: ``kind`` is overfits, improving, settled or untrained; ``text`` says why."""

    fold: int
    kind: str
    text: str


def verdict(fold: int, history: Sequence[Mapping[str, Any]]) -> Verdict:
    """Whether a fold overfits, from the gap of training and validation MAE and the epochs since the best one.

    The training MAE is the running mean over its epoch, of a model that still changes, so early in training it is
    above the validation MAE; only a gap the other way means memorising.
    """
    best = best_epoch(history)
    if best is None:
        return Verdict(fold, "untrained", "nothing was trained, so there is nothing to overfit.")
    epoch, val_mae = best
    last = history[-1]
    at_best = history[epoch - 1]
    since = last["epoch"] - epoch
    gap = val_mae / at_best["train_mae"] if at_best["train_mae"] > 0 else float("inf")
    rise = last["val_mae"] / val_mae if val_mae > 0 else 1.0
    if gap <= _SMALL_GAP:
        gap_words = "the gap to the training MAE is small"
    elif gap < _LARGE_GAP:
        gap_words = f"validation is {gap:.1f} times the training MAE, a moderate gap"
    else:
        gap_words = f"validation is {gap:.1f} times the training MAE: the model knows its training crystals much better"
    where = f"best at epoch {epoch} of {last['epoch']} ({val_mae:.4f} eV/atom)"
    long_ago = since >= max(_LONG_AGO_EPOCHS, _LONG_AGO_SHARE * last["epoch"])
    if long_ago and rise > _RISE and last["train_mae"] < at_best["train_mae"]:
        text = f"{where}; since then validation rose by {rise - 1:.0%} while training kept falling; {gap_words}."
        return Verdict(fold, "overfits", text)
    if since == 0 and last["epoch"] > 1 and history[-2]["val_mae"] > _RISE**0.2 * val_mae:
        return Verdict(fold, "improving", f"{where}, its last; more epochs may help; {gap_words}.")
    return Verdict(fold, "settled", f"{where}, {_since(since)}; {gap_words}.")


def _since(epochs: int) -> str:
    return "its last" if epochs == 0 else f"{epochs} epoch{'s' * (epochs > 1)} before the end"


@dataclass(frozen=True)
class Density:
    """Counts on a square grid: ``counts[i, j]`` crystals with target in bin j and prediction in bin i."""

    edges: NDArray[np.float64]
    counts: NDArray[np.int64]


def parity_density(predictions: Predictions) -> Density:
    """Targets against predictions, binned, so that any number of crystals stays readable."""
    both = np.concatenate([predictions.y_true, predictions.y_pred])
    low, high = float(both.min()), float(both.max())
    pad = 0.02 * (high - low) or 0.1
    edges = np.linspace(low - pad, high + pad, _PARITY_BINS + 1)
    counts, _, _ = np.histogram2d(predictions.y_pred, predictions.y_true, bins=(edges, edges))
    return Density(edges, counts.astype(np.int64))


@dataclass(frozen=True)
class ErrorDistribution:
    """Histogram of absolute errors in logarithmic bins (eV/atom), and quantiles (share → error)."""

    edges: NDArray[np.float64]
    counts: NDArray[np.int64]
    quantiles: dict[float, float]


def error_distribution(abs_error: NDArray[np.float64]) -> ErrorDistribution:
    """How large the errors are; those below ``SMALLEST_ERROR`` count in the first bin."""
    clipped = np.maximum(abs_error, SMALLEST_ERROR)
    top = np.ceil(np.log10(clipped.max()) * 10 + 0.5) / 10
    edges = np.logspace(np.log10(SMALLEST_ERROR), max(top, -4.0), 61)
    edges[0] = SMALLEST_ERROR
    counts, _ = np.histogram(clipped, bins=edges)
    return ErrorDistribution(edges, counts, {q: float(np.quantile(abs_error, q)) for q in QUANTILES})


@dataclass(frozen=True)
class Trend:
    """Errors in bins of some property: centres, crystals per bin, mean and quartiles; empty bins are left out."""

    centres: NDArray[np.float64]
    counts: NDArray[np.int64]
    mean: NDArray[np.float64]
    lower: NDArray[np.float64]
    median: NDArray[np.float64]
    upper: NDArray[np.float64]


def trend(values: NDArray[Any], abs_error: NDArray[np.float64], edges: NDArray[np.float64]) -> Trend:
    """Errors in the bins between ``edges`` (the last one closed); centres are the means of the values inside."""
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
    """Errors against the number of atoms in the cell, in bins that grow by half."""
    largest = int(predictions.n_atoms.max())
    edges = [1]
    while edges[-1] <= largest:
        edges.append(max(edges[-1] + 1, int(edges[-1] * 1.5)))
    return trend(predictions.n_atoms, predictions.abs_error, np.array(edges, dtype=np.float64))


def by_target(predictions: Predictions, bins: int = 30) -> Trend:
    """Errors against the formation energy, in equal bins over the middle 99.8 % (the rest joins the outer bins)."""
    low, high = np.quantile(predictions.y_true, (0.001, 0.999))
    edges = np.linspace(low, high if high > low else low + 1e-9, bins + 1)
    return trend(predictions.y_true, predictions.abs_error, edges)


def by_element_count(predictions: Predictions) -> Trend:
    """Errors by how many elements the crystal has."""
    n_elements = np.array([len(elements_of(formula)) for formula in predictions.compositions])
    edges = np.arange(n_elements.min(), n_elements.max() + 2) - 0.5
    return trend(n_elements, predictions.abs_error, edges)


def by_element(predictions: Predictions) -> dict[str, tuple[float, int]]:
    """Element → (MAE over the crystals that contain it, number of these crystals)."""
    total: dict[str, float] = dict.fromkeys(POSITIONS, 0.0)
    count: dict[str, int] = dict.fromkeys(POSITIONS, 0)
    for formula, error in zip(predictions.compositions, predictions.abs_error.tolist(), strict=True):
        for symbol in elements_of(formula) & POSITIONS.keys():
            total[symbol] += error
            count[symbol] += 1
    return {symbol: (total[symbol] / n, n) for symbol, n in count.items() if n}


@dataclass(frozen=True)
class Worst:
    """One crystal of the list of the worst."""

    fold: int
    id: str
    composition: str
    n_atoms: int
    y_true: float
    y_pred: float
    abs_error: float


def worst(predictions: Mapping[int, Predictions], count: int = 50) -> list[Worst]:
    """The crystals with the largest errors, largest first, of all folds."""
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
    """Per session in order: id, device, hours of finished epochs by fold, and the rest of its time.

    The time of an epoch that several sessions worked on (``first+second``) is divided evenly between them.
    The rest is what finished epochs do not account for: start-up, preparation, predictions, and epochs that a death
    or a deadline cut off.
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
