"""The trained parameters, their learning rates, and weight averages."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mbqueue.errors import CheckpointMisfit
from mbqueue.experiment import TrainSpec
from mbqueue.train.family import ModelFamily

#: The advice in an error about an intact checkpoint whose parameters do not match its spec.
ADVICE = (
    "Another version of mbqueue wrote this checkpoint. Use that version, then run mbqueue retry. "
    "Or train under a new name (--name)."
)


def open_for_training(
    family: ModelFamily, model: nn.Module, trained: dict[str, nn.Parameter], *, head_only: bool
) -> None:
    """Require gradients only for the trained parameters or, with ``head_only``, only for the head's parameters."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for name, parameter in trained.items():
        parameter.requires_grad_(not head_only or family.is_head(name))


def make_optimizer(
    family: ModelFamily, model: nn.Module, trained: dict[str, nn.Parameter], spec: TrainSpec
) -> torch.optim.AdamW:
    """Make an AdamW optimizer with one group of parameters per learning-rate scale and weight decay.

    Each group's ``scale`` multiplies the scheduled learning rate. Parameters with equal settings share a group, because
    a GPU launches several kernels for each group.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in trained.items():
        decay = spec.weight_decay if family.decays(name) else 0.0
        scale = spec.layer_lr_decay ** family.depth(model, name)
        groups.setdefault((scale, decay), []).append(parameter)
    return torch.optim.AdamW(
        [
            {"params": parameters, "weight_decay": decay, "scale": scale}
            for (scale, decay), parameters in sorted(groups.items(), key=lambda item: item[0])
        ],
        lr=spec.lr,
        fused=True,
    )


def learning_rate(spec: TrainSpec, step: int, total_steps: int) -> float:
    """Return the learning rate of step ``step`` (from 0) of ``total_steps``; it depends only on the arguments."""
    warmup_steps = int(spec.warmup * total_steps)
    if step < warmup_steps:
        return spec.lr * (step + 1) / warmup_steps
    if spec.schedule == "constant":
        return spec.lr
    progress = (step - warmup_steps) / max(1, total_steps - 1 - warmup_steps)
    return spec.lr * (spec.final_lr + (1 - spec.final_lr) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate * group["scale"]


def optimizer_tensors(
    optimizer: torch.optim.Optimizer, trained: dict[str, nn.Parameter]
) -> dict[str, dict[str, Tensor]]:
    """Return the optimizer's state by parameter name, leaving out parameters that no step has updated yet."""
    return {name: dict(optimizer.state[p]) for name, p in trained.items() if optimizer.state.get(p)}


def restore_optimizer(
    optimizer: torch.optim.Optimizer, trained: dict[str, nn.Parameter], tensors: dict[str, dict[str, Tensor]]
) -> None:
    """Restore the tensors that `optimizer_tensors` returned.

    Raises:
        CheckpointMisfit: if a name is not among the trained parameters.
    """
    foreign = tensors.keys() - trained.keys()
    if foreign:
        raise CheckpointMisfit(
            f"The checkpoint has optimizer state for parameters that this experiment does not train: "
            f"{sorted(foreign)}. {ADVICE}"
        )
    content: dict[str, Any] = optimizer.state_dict()
    index = {id(p): i for i, p in enumerate(p for group in optimizer.param_groups for p in group["params"])}
    content["state"] = {index[id(trained[name])]: dict(state) for name, state in tensors.items()}
    optimizer.load_state_dict(content)


class WeightAverage:
    """Exponential moving average of the trained parameters.

    After optimizer step t (from 1), the average moves towards the weights by the fraction
    1 − min(decay, (1 + t) / (10 + t)), so that the first weights do not dominate a short run.
    """

    def __init__(self, trained: dict[str, nn.Parameter], decay: float) -> None:
        self.decay = decay
        self.tensors = {name: p.detach().clone() for name, p in trained.items()}
        self._live = trained

    def update(self, steps_done: int) -> None:
        """Update the average with the weights after optimizer step ``steps_done`` (from 1)."""
        share = 1 - min(self.decay, (1 + steps_done) / (10 + steps_done))
        torch._foreach_lerp_(list(self.tensors.values()), [p.detach() for p in self._live.values()], share)

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Restore the averaged weights from a checkpoint.

        Raises:
            CheckpointMisfit: if the names in the checkpoint do not match the trained parameters.
        """
        if tensors.keys() != self.tensors.keys():
            raise CheckpointMisfit(f"The checkpoint's averaged weights do not match the trained parameters. {ADVICE}")
        for name, tensor in self.tensors.items():
            tensor.copy_(tensors[name])

    def applied(self) -> AbstractContextManager[None]:
        """Use the averaged weights in the model within a ``with`` block, then restore the current weights."""
        return carrying(self._live, self.tensors)


class WeightSoup:
    """Mean of the trained parameters at the ends of the last or the best ``epochs`` epochs, or of fewer at first.

    A mean over the last epochs is "latest weight averaging" (Kaddour, arXiv 2209.14981). A mean over the best epochs is
    a uniform soup (Wortsman et al., arXiv 2203.05482) over the epochs of a single training run.

    Attributes:
        of_best: whether to average the epochs whose weights have the lowest validation MAE, instead of the last epochs.
        tensors: the mean; empty until the first epoch ends.
        ends: parameters at the ends of earlier epochs that a later mean may need, oldest first.
        end_maes: validation MAE of each element of `ends`; empty unless `of_best`.
    """

    def __init__(self, trained: dict[str, nn.Parameter], epochs: int, *, of_best: bool = False) -> None:
        self._live, self._epochs, self.of_best = trained, epochs, of_best
        self.tensors: dict[str, Tensor] = {}
        self.ends: list[dict[str, Tensor]] = []
        self.end_maes: list[float] = []
        self._window: list[dict[str, Tensor]] = []
        self._maes: list[float] = []

    def stir(self, own_mae: float = 0.0) -> None:
        """Update the mean in `tensors` with the current weights at the end of an epoch.

        Args:
            own_mae: validation MAE of the current weights; used only for a soup of the best epochs.
        """
        ends = [*self.ends, {name: p.detach().clone() for name, p in self._live.items()}]
        maes = [*self.end_maes, own_mae]
        # Add up the oldest weights first, because the last digits depend on the order. In a tie, earlier epochs win.
        best = sorted(range(len(maes)), key=maes.__getitem__)[: self._epochs]
        chosen = sorted(best) if self.of_best else range(len(ends))[-self._epochs :]
        self._window = [ends[number] for number in chosen]
        self._maes = [maes[number] for number in chosen] if self.of_best else []
        self.tensors = {}
        for name in self._live:
            total = self._window[0][name].clone()
            for end in self._window[1:]:
                total += end[name]
            self.tensors[name] = total / len(self._window)

    def keep(self) -> None:
        """Add the weights from the last `stir` to `ends`, and drop the weights that no later mean needs."""
        is_too_old = not self.of_best and len(self._window) == self._epochs
        self.ends, self.end_maes = self._window[1:] if is_too_old else self._window, self._maes

    def restore(self, tensors: dict[str, Tensor], ends: list[dict[str, Tensor]], end_maes: list[float]) -> None:
        """Restore the averaged weights from a checkpoint.

        Raises:
            CheckpointMisfit: if the weights in the checkpoint have different names from the trained parameters, or if
                validation MAEs are missing.
        """
        if any(part and part.keys() != self._live.keys() for part in (tensors, *ends)):
            raise CheckpointMisfit(f"The checkpoint's averaged weights do not match the trained parameters. {ADVICE}")
        if len(end_maes) != (len(ends) if self.of_best else 0):
            raise CheckpointMisfit(f"The checkpoint lacks the validation MAEs of the soup's epochs. {ADVICE}")
        self.tensors, *self.ends = (
            {name: tensor.to(self._live[name].device) for name, tensor in part.items()} for part in (tensors, *ends)
        )
        self.end_maes = list(end_maes)

    def applied(self) -> AbstractContextManager[None]:
        return carrying(self._live, self.tensors)


@contextmanager
def carrying(live: dict[str, nn.Parameter], tensors: dict[str, Tensor]) -> Iterator[None]:
    """Replace the parameters with ``tensors`` within a ``with`` block, then restore their values."""
    own = [p.data for p in live.values()]
    try:
        for name, parameter in live.items():
            parameter.data = tensors[name]
        yield
    finally:
        for parameter, data in zip(live.values(), own, strict=True):
            parameter.data = data
