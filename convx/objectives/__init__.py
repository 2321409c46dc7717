"""How a run is trained. An objective turns a batch into a loss; the one loop in ``convx.training`` does the rest.

An objective is an ``nn.Module`` that holds everything trained. ``convx/objectives/<name>.py`` has
``create(model, settings, training, data) -> Objective``, with ``teacher=None`` at the end where it can learn from a trained model.
"""

from importlib import import_module

import torch
from torch import nn

from convx.seeds import derive


class Objective(nn.Module):
    """What the loop needs of an objective.

    ``forward(images, labels, rng, progress) -> (loss, {name: detached tensor})``: uint8 images [B, C, H, W] and integer
    labels on the device; ``rng`` is the CPU generator of this batch, ``progress`` the share of training done, in [0, 1).
    The tensors are summed over the epoch and stand in the history divided by the number of images; "correct" is counted.

    ``splits_batch``: whether the loss is a mean over the images of a batch, so that the mean of the gradients of its parts
    is the gradient of the whole; only then can processes share a batch, or gradients be accumulated.
    """

    splits_batch = False

    def exported(self) -> nn.Module:
        """Return the model that is saved and evaluated."""
        raise NotImplementedError

    def companions(self) -> dict[str, nn.Module]:
        """Return further models by name that are saved beside the exported one, for the evaluator of the paper."""
        return {}

    def after_step(self, progress: float) -> None:
        """Called after each optimiser step (e.g. an EMA teacher)."""

    def backward(self, loss: torch.Tensor) -> None:
        """Write the gradients of ``loss``, what ``forward`` returned plus the auxiliary losses of modules."""
        loss.backward()

    def before_step(self, optimizer: torch.optim.Optimizer, progress: float) -> None:
        """Called before each optimiser step, behind clipping (e.g. a schedule of its groups, a gradient dropped)."""

    def clip_gradients(self, max_norm: float) -> None:
        """Clip the gradients where the recipe has ``clip_grad``: by their global norm."""
        nn.utils.clip_grad_norm_(self.parameters(), max_norm)

    def validation(self, model: nn.Module, data, images: torch.Tensor, labels: torch.Tensor) -> dict | None:
        """Return the columns that the history gets from the validation split, or None for accuracy and cross-entropy.

        ``model`` is the one that would be saved, ``data`` the run's ``convx.runs.RunData``, ``images`` uint8 [N, C, H, W].
        """
        return None

    def check(self, row: dict) -> None:
        """Raise ``convx.manifest.Failure`` when a row of the history shows that the run is lost (e.g. collapsed)."""

    def forward(self, images: torch.Tensor, labels: torch.Tensor, rng: torch.Generator, progress: float):
        raise NotImplementedError


def create(model: nn.Module, recipe: dict, data, teacher: nn.Module | None = None) -> Objective:
    """Build the objective that a recipe names around a model; ``data`` is the run's ``convx.runs.RunData``.

    ``teacher`` is the trained model of the variant's ``teacher``, for an objective whose ``create`` takes one. What an
    objective draws while it is built comes from a stream of its own.
    """
    settings = dict(recipe["objective"])
    name = settings.pop("name")
    try:
        module = import_module(f"convx.objectives.{name}")
    except ModuleNotFoundError:
        raise ValueError(f"objective {name!r} is unknown: there is no convx/objectives/{name}.py") from None
    torch.manual_seed(derive(recipe["seed"], "objective"))
    given = {} if teacher is None else {"teacher": teacher}
    return module.create(model, settings, recipe["training"], data, **given)


def classifier(model: nn.Module, recipe: dict, train) -> nn.Module | None:
    """Return what gives logits for a model that gives features, or None where its own output is logits.

    An objective without labels has ``classifier(model, settings, train) -> nn.Module`` in its file, ``train`` being the
    training images without augmentation (:class:`convx.evaluate.EvaluationData`). The module's ``method`` says in words how it
    decides; every accuracy of it carries that sentence.
    """
    settings = dict(recipe["objective"])
    module = import_module(f"convx.objectives.{settings.pop('name')}")
    return module.classifier(model, settings, train) if hasattr(module, "classifier") else None
