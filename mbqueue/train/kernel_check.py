"""Check on one batch whether the fused GPU kernels agree with plain torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mbqueue.data.batch import Batch

Predict = Callable[[Any, Batch], Tensor]


def check(model: Any, batch: Batch, plain: Predict, fused: Predict, *, tolerance: float = 1e-4) -> str | None:
    """Return why ``fused`` cannot replace ``plain``, or None if their values and gradients agree.

    Values may differ by ``tolerance`` times the largest value, and the gradient of a parameter by ``tolerance`` times
    its norm. A gradient whose norm is below 1 % of the total norm is mostly rounding error, so the limit for its
    difference is ``tolerance`` times 1 % of the total norm.

    Args:
        model: the model to check; the check discards its gradients.
        batch: a batch on the device.
        plain: a function that returns the model's reference predictions for a batch, [B].
        fused: a function that returns the kernels' predictions, [B]; an exception that it raises becomes the reason.
    """
    expected = _results(model, batch, plain)
    try:
        found = _results(model, batch, fused)
    except Exception as error:  # noqa: BLE001  Triton, its compiler and the driver raise many types
        return told(error)
    values = expected.pop("")
    distance = float((found.pop("") - values).abs().max() / values.abs().max().clamp_min(1e-30))
    if not distance <= tolerance:
        return f"values differ by {distance:.1e} relative to the largest"
    size = float(torch.stack([gradient.norm() for gradient in expected.values()]).norm())
    for name, exact in expected.items():
        ours = found.get(name)
        apart = exact if ours is None else ours - exact
        distance = float(apart.norm()) / max(float(exact.norm()), 1e-2 * size, 1e-30)
        if not distance <= tolerance:
            return f"the gradient of {name} differs by {distance:.1e} relative to its norm"
    return None


def told(error: BaseException) -> str:
    """Return an error's type and first line, because errors from Triton or the driver can be pages long."""
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}"


def _results(model: Any, batch: Batch, predict: Predict) -> dict[str, Tensor]:
    """Compute the gradient of each parameter, by name, and the predictions, which get the name ""."""
    model.zero_grad(set_to_none=True)
    values = predict(model, batch)
    # Weight the values, so that errors of opposite sign do not cancel.
    weights = torch.linspace(0.5, 1.5, len(values), device=values.device)
    torch.autograd.backward((values * weights).square().mean())
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return {"": values.detach(), **found}
