"""The meaning of a model's output, and the loss that training minimises, by kind of target.

| kind | the output of the model in training | prediction |
|---|---|---|
| energy | energy, eV/atom | the output |
| scalar | the property as a multiple of ``scale`` | output · scale |
| class | logit | probability of class 1, the sigmoid of the output |
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from mbqueue.experiment import TrainSpec
from mbqueue.task import Kind


@dataclass(frozen=True)
class Objective:
    """The loss of one fold's training, and its metrics.

    Attributes:
        spec: the training options.
        kind: kind of the target.
        scale: factor of the outputs: a power of two, so that scaling is exact; 1 except for scalars.
    """

    spec: TrainSpec
    kind: Kind
    scale: float = 1.0

    def loss_sum(self, output: Tensor, target: Tensor) -> Tensor:
        """The loss of outputs [B] against targets [B], summed over the B crystals."""
        if self.kind == "class":
            return functional.binary_cross_entropy_with_logits(output, target, reduction="sum")
        if self.scale != 1.0:
            target = target / self.scale
        if self.spec.loss == "l1":
            return functional.l1_loss(output, target, reduction="sum")
        if self.spec.loss == "l2":
            return functional.mse_loss(output, target, reduction="sum")
        return functional.huber_loss(output, target, reduction="sum", delta=self.spec.huber_delta)

    def prediction(self, output: Tensor) -> Tensor:
        """Convert outputs to predictions of the target, in its unit."""
        if self.kind == "class":
            return torch.sigmoid(output)
        return output if self.scale == 1.0 else output * self.scale

    def abs_error_sum(self, output: Tensor, target: Tensor) -> Tensor:
        """Sum over B crystals of |prediction − target|, in the target's unit."""
        return (self.prediction(output) - target).abs().sum()
