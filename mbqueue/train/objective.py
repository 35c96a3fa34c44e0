"""Define what a model's output means, and the loss that training minimises, for each kind of target.

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
    """The loss and the metrics of one fold's training.

    Attributes:
        scale: the factor that turns outputs into predictions; 1 unless the target is a scalar. The factor is a power of
            two, so that scaling is exact.
    """

    spec: TrainSpec
    kind: Kind
    scale: float = 1.0

    def loss_sum(self, output: Tensor, target: Tensor) -> Tensor:
        """Sum the loss of outputs [B] for targets [B] over the B crystals."""
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
        """Sum |prediction − target| over the B crystals, in the target's unit."""
        return (self.prediction(output) - target).abs().sum()
