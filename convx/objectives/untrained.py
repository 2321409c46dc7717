"""No training: the network as its surgery made it is the run (``epochs: 0``), and nothing is computed on validation images."""

from torch import nn

from convx.manifest import Failure
from convx.objectives import Objective


class Untrained(Objective):
    """Exports the network as it is."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def exported(self) -> nn.Module:
        return self.model

    def validation(self, model, data, images, labels) -> dict:
        return {}

    def forward(self, images, labels, rng, progress):
        raise Failure("an untrained network is not trained: set training.epochs to 0")


def create(model: nn.Module, settings: dict, training: dict, data) -> Untrained:
    """Build the objective; it has no settings."""
    if settings or training["epochs"]:
        raise ValueError("objective: untrained has no settings and needs training.epochs: 0")
    return Untrained(model)
