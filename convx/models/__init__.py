"""Models by name: small backbones that timm lacks, and every timm model as ``timm/<name>``. Importing this needs no torch."""

import ast
import difflib
import re
from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

# family -> (pattern of its names, an example, one line of description); the module convx/models/<family>.py has
# ``create(name, num_classes, in_channels, image_size, **settings)``.
FAMILIES = {
    "resnet_cifar": (
        r"resnet(\d+)_(\d+)(_k\d+)?(_dw)?",
        "resnet20_16",
        "CIFAR ResNet of depth D and width W, option-B shortcuts; kernel _kN, depthwise _dw",
    ),
    "bottleneck_cifar": (
        r"bottleneck(\d+)_(\d+)",
        "bottleneck29_16",
        "CIFAR ResNet with bottleneck blocks, depth D = 9n + 2, width W",
    ),
    "mobile_cifar": (
        r"mobilenet(\d+)_(\d+)",
        "mobilenet20_16",
        "Small MobileNetV2, depth D = 3n + 2, width W",
    ),
    "convmixer": (
        r"convmixer(\d+)_(\d+)(_k\d+)?(_p\d+)?",
        "convmixer128_8",
        "ConvMixer of width W and depth D; kernel _kN, patch _pN",
    ),
    "convnext_cifar": (
        r"convnext_cifar(_k\d+)?",
        "convnext_cifar",
        "Two-stage ConvNeXt for 32 px images; kernel _kN",
    ),
    "vit_small": (
        r"vit(_[sb]|\d+_\d+_h\d+)(_p\d+)?",
        "vit_s_p4",
        "timm's ViT of size S or B, or of width W, depth D and H heads (vitW_D_hH); patch _pN, 16 without",
    ),
}


def family(name: str) -> str | None:
    """Return the family that a model name belongs to, or None."""
    return next((key for key, (pattern, _, _) in FAMILIES.items() if re.fullmatch(pattern, name)), None)


@lru_cache
def timm_names() -> frozenset[str]:
    """Return the names that the installed timm registers, read from its source (importing timm would import torch)."""
    spec = find_spec("timm")
    if spec is None:
        return frozenset()
    folder = Path(spec.origin).parent / "models"
    pattern = re.compile(r"^@register_model\s*\n(?:@.*\n)*def (\w+)", re.MULTILINE)
    return frozenset(name for file in folder.glob("*.py") for name in pattern.findall(file.read_text(encoding="utf-8")))


def user_function(name: str) -> tuple[Path, str] | None:
    """Return (file, function) for a name of the form ``path/to/file.py:function``, else None."""
    match = re.fullmatch(r"(.+\.py):(\w+)", name)
    return (Path(match.group(1)), match.group(2)) if match else None


def check_user_function(name: str, what: str) -> None:
    """Raise ``ValueError`` when ``file.py:function`` names no function of an existing file; the file is not run."""
    if (found := user_function(name)) is None:
        raise ValueError(f"{what} {name!r} should be file.py:function")
    file, function = found
    if not file.is_file():
        raise ValueError(f"{what} {name!r}: there is no file {file}")
    try:
        tree = ast.parse(file.read_text(encoding="utf-8"))
    except SyntaxError as error:
        raise ValueError(f"{what} {name!r}: {file} is not valid Python (line {error.lineno}: {error.msg})") from None
    functions = [node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    if function not in functions:
        raise ValueError(f"{what} {name!r}: {file} defines no {function}, only {', '.join(functions) or 'nothing'}")


def load_user_function(name: str):
    """Run the user's file and return the function."""
    from importlib.util import module_from_spec, spec_from_file_location

    file, function = user_function(name)
    spec = spec_from_file_location(f"convx_user_{file.stem}", file)
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, function)


def check_name(name: str) -> None:
    """Raise ``ValueError`` with the nearest valid word when no such model exists."""
    if user_function(name):
        check_user_function(name, "model")
        return
    if family(name) or (name.startswith("timm/") and name[5:].split(".")[0] in timm_names()):
        return
    known = [example for _, example, _ in FAMILIES.values()] + [f"timm/{n}" for n in timm_names()]
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    raise ValueError(
        f"model {name!r} is unknown"
        + (f"; did you mean {near[0]!r}?" if near else "")
        + " (`convx list models` shows all)"
    )


def create_model(
    name: str,
    num_classes: int,
    in_channels: int = 3,
    image_size: int | None = None,
    input_size: int | None = None,
    **settings,
):
    """Build a model by name.

    ``resnet20_16`` and the like come from convx, ``timm/<name>`` from timm (``settings`` go to ``timm.create_model``;
    ``image_size`` is passed as ``img_size`` where the model takes it, i.e. to transformers), and ``file.py:function`` from a
    user's own file: ``function(num_classes, in_channels, image_size, **settings) -> nn.Module``.
    ``input_size``: images are enlarged to this side in pixels first, on their device and wherever the model is called (see
    :class:`convx.models.enlarge.Enlarge`); the model is built for that size.
    """
    if input_size is not None:
        from convx.models.enlarge import Enlarge

        return Enlarge(input_size).attach(create_model(name, num_classes, in_channels, input_size, **settings))
    check_name(name)
    if user_function(name):
        create = load_user_function(name)
        return create(num_classes=num_classes, in_channels=in_channels, image_size=image_size, **settings)
    if key := family(name):
        module = import_module(f"convx.models.{key}")
        return module.create(name, num_classes=num_classes, in_channels=in_channels, image_size=image_size, **settings)
    import timm

    if image_size and "img_size" not in settings and "vit" in name.split("/")[1].split("_")[0]:
        settings["img_size"] = image_size
    return timm.create_model(name[5:], num_classes=num_classes, in_chans=in_channels, **settings)
