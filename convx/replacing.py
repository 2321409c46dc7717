"""Finding modules by pattern and replacing them in a copy: what all verbs of ``convx.surgery`` stand on."""

import copy
import fnmatch
import logging
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import nn

log = logging.getLogger("convx")


@dataclass(frozen=True)
class Replacement:
    """One line of ``model.surgery_log``: which verb turned which module into what."""

    verb: str
    name: str
    before: str
    after: str


def stage_names(model: nn.Module) -> list[str]:
    """Return the module names of the model's stages, first to last, from timm's ``feature_info``."""
    info = getattr(model, "feature_info", None)
    entries = getattr(info, "info", info) or []
    return [entry["module"] for entry in entries]


def _expand(model: nn.Module, layers: str | Iterable[str]) -> list[str]:
    """Return the patterns as a list, with ``{stage-k}`` replaced by the module name of the k-th stage from the end."""
    patterns = [layers] if isinstance(layers, str) else list(layers)
    if not patterns or not all(isinstance(pattern, str) and pattern for pattern in patterns):
        raise ValueError(f"layers={layers!r}: give a glob over module names such as 'layer4.*', or a list of them")

    def stage(match: re.Match) -> str:
        names, back = stage_names(model), int(match.group(1))
        if not 1 <= back <= len(names):
            raise ValueError(
                f"layers={layers!r}: the model names {len(names)} stages ({', '.join(names)}), {match.group(0)} is not one"
            )
        return names[-back]

    return [re.sub(r"\{stage-(\d+)\}", stage, pattern) for pattern in patterns]


def find(
    model: nn.Module,
    layers: str | Iterable[str],
    accepts: Callable[[nn.Module], bool],
    what: str,
    whole: bool = False,
) -> dict[str, nn.Module]:
    """Return {name: module} of the modules that match a pattern and are accepted.

    A module is also matched by a pattern that names a parent of it (``"layer4"`` matches ``"layer4.0.conv1"``), unless
    ``whole`` wants the modules that are named themselves.
    Raises ``ValueError`` when nothing matches; the message lists the names that could.
    """
    patterns = _expand(model, layers)
    could = {name: module for name, module in model.named_modules() if name and accepts(module)}
    found = {
        name: module
        for name, module in could.items()
        if any(fnmatch.fnmatchcase(name, p) or (not whole and fnmatch.fnmatchcase(name, f"{p}.*")) for p in patterns)
    }
    if not found:
        names = list(could)
        shown = ", ".join(names[:12]) + (f", ... ({len(names)} in all)" if len(names) > 12 else "")
        raise ValueError(
            f"layers={layers!r} matches no {what}; "
            + (f"these could match: {shown}" if names else "the model has none")
        )
    return found


def replace(
    model: nn.Module,
    layers: str | Iterable[str],
    accepts: Callable[[nn.Module], bool],
    make: Callable[[str, nn.Module], nn.Module],
    verb: str,
    what: str,
) -> nn.Module:
    """Return a deep copy of ``model`` in which every matching module is ``make(name, module)``.

    A module that is registered under several names is made once and stays shared. ``make`` may return the module itself,
    changed in place: it is already a copy.
    """
    new = copy.deepcopy(model)
    made: dict[int, nn.Module] = {}
    records = []
    for name, module in find(new, layers, accepts, what).items():
        before = _describe(module)
        if id(module) not in made:
            made[id(module)] = make(name, module)
        parent, _, child = name.rpartition(".")
        setattr(new.get_submodule(parent), child, made[id(module)])
        records.append(Replacement(verb, name, before, _describe(made[id(module)])))
        log.info("%s: %s: %s -> %s", verb, name, records[-1].before, records[-1].after)
    new.surgery_log = [*getattr(model, "surgery_log", []), *records]
    return new


def example_of(model: nn.Module) -> torch.Tensor:
    """Return an input that a network of images takes, [1, C, S, S]: of timm's size where it names one, else 64 pixels."""
    size = (getattr(model, "pretrained_cfg", None) or {}).get("input_size")
    first = next(m for m in model.modules() if isinstance(m, nn.Conv2d))
    side = size[-1] if size else 64
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return torch.randn(1, first.in_channels, side, side).to(first.weight)


def start_anew(module: nn.Module, seed: int, reset: Callable[[nn.Module], None]) -> None:
    """Draw the parameters of a module again, on the CPU and from a seed of their own, wherever the module stands."""
    anew = copy.deepcopy(module).cpu()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        reset(anew)
    module.load_state_dict(anew.state_dict())


def _describe(module: nn.Module) -> str:
    return f"{type(module).__name__}({module.extra_repr()})"


def is_spatial_conv(module: nn.Module) -> bool:
    """True for a plain ``nn.Conv2d`` (not a subclass with a forward of its own) whose kernel covers more than one pixel."""
    return (
        isinstance(module, nn.Conv2d)
        and type(module).forward is nn.Conv2d.forward
        and module.kernel_size[0] * module.kernel_size[1] > 1
    )
