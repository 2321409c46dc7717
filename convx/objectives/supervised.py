"""Supervised classification: cross-entropy with label smoothing on the model's own logits."""

import torch
import torch.nn.functional as F
from torch import nn

from convx.data.batches import Augment
from convx.objectives import Objective


class Supervised(Objective):
    """Cross-entropy of augmented, normalised batches."""

    splits_batch = True

    def __init__(self, model: nn.Module, training: dict, data):
        super().__init__()
        self.model = model
        self.label_smoothing = training["label_smoothing"]
        self.augment = Augment(training, data.num_classes)
        self.normalise = data.normalise

    def exported(self) -> nn.Module:
        return self.model

    def forward(self, images, labels, rng, progress):
        x = self.normalise(self.augment(images, rng))
        x, targets = self.augment.mix(x, labels, rng)
        logits = self.model(x)
        if logits.dtype in (torch.bfloat16, torch.float16):
            logits = logits.float()
        loss = F.cross_entropy(logits, targets, label_smoothing=self.label_smoothing)
        with torch.no_grad():
            correct = (logits.argmax(1) == labels).sum()
        return loss, {"loss": loss.detach() * len(labels), "correct": correct}


def create(model: nn.Module, settings: dict, training: dict, data) -> Supervised:
    """Build the objective; it has no settings of its own."""
    if settings:
        raise ValueError(f"objective.{next(iter(settings))}: the supervised objective has no settings")
    return Supervised(model, training, data)
