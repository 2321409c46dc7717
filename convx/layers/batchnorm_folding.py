"""Batch normalisation folded into the convolution before it, in any network that can be run once.

y = gamma (w * x + b - mean) / sqrt(var + eps) + beta is one convolution with w' = w gamma / sqrt(var + eps) and
b' = beta + (b - mean) gamma / sqrt(var + eps). Which layer follows which is seen in a forward pass, not guessed from names.
"""

import copy

import torch
from torch import nn

BATCH_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm)


def _is_norm(module: nn.Module) -> bool:
    """True for a batch normalisation with running statistics, timm's ``BatchNormAct2d`` included."""
    return isinstance(module, BATCH_NORMS) and module.running_mean is not None


@torch.no_grad()
def follows(model: nn.Module, x_BCHW: torch.Tensor) -> dict[str, str]:
    """Return {norm: convolution} of the batch normalisations whose input is what one convolution alone has just made.

    A convolution or a norm that runs twice, or whose output something else reads too in a module, is left out.
    """
    made: dict[int, tuple[str, torch.Tensor]] = {}  # the tensors are kept alive: an id is taken again otherwise
    read: dict[str, int] = {}
    ran: dict[str, int] = {}
    pairs: dict[str, str] = {}

    def before(name, module, args):
        if args and isinstance(args[0], torch.Tensor) and id(args[0]) in made:
            source = made[id(args[0])][0]
            read[source] = read.get(source, 0) + 1
            if _is_norm(module):
                pairs[name] = source

    def after(name, module, args, out):
        ran[name] = ran.get(name, 0) + 1
        if isinstance(module, nn.Conv2d) and isinstance(out, torch.Tensor):
            made[id(out)] = (name, out)

    handles = []
    for name, module in model.named_modules():
        if _is_norm(module) or not list(module.children()):
            handles.append(module.register_forward_pre_hook(lambda m, a, n=name: before(n, m, a)))
            handles.append(module.register_forward_hook(lambda m, a, o, n=name: after(n, m, a, o)))
    try:
        model(x_BCHW)
    finally:
        for handle in handles:
            handle.remove()
    return {norm: conv for norm, conv in pairs.items() if ran[norm] == ran[conv] == read[conv] == 1}


@torch.no_grad()
def fold_batchnorm(model: nn.Module, x_BCHW: torch.Tensor) -> nn.Module:
    """Return a copy in evaluation mode with every batch normalisation folded that directly follows a convolution.

    The norm becomes an identity, or, with an activation of its own (timm's ``BatchNormAct2d``), that activation. Other norms
    stay. ``x_BCHW`` is any input that the network takes. Raises ``ValueError`` where the copy does not agree with the model.
    """
    new = copy.deepcopy(model).eval()
    if not any(_is_norm(module) for module in new.modules()):
        return new
    wanted = new(x_BCHW)
    for norm_name, conv_name in follows(new, x_BCHW).items():
        norm, conv = new.get_submodule(norm_name), new.get_submodule(conv_name)
        scale = (norm.running_var.double() + norm.eps).rsqrt()
        shift = norm.running_mean.double()
        if norm.weight is not None:
            scale = scale * norm.weight.double()
        beta = 0.0 if norm.bias is None else norm.bias.double()
        bias = 0.0 if conv.bias is None else conv.bias.double()
        weight = conv.weight
        conv.bias = nn.Parameter((beta + (bias - shift) * scale).to(weight.dtype), requires_grad=weight.requires_grad)
        weight.copy_(weight.double() * scale.view(-1, 1, 1, 1))
        parent, _, child = norm_name.rpartition(".")
        rest = [part for part in (getattr(norm, "drop", None), getattr(norm, "act", None)) if part is not None]
        rest = [part for part in rest if not isinstance(part, nn.Identity)]
        setattr(new.get_submodule(parent), child, nn.Sequential(*rest) if rest else nn.Identity())
    found = new(x_BCHW)
    if not torch.allclose(wanted, found, rtol=1e-3, atol=1e-3 * float(wanted.abs().max())):
        raise ValueError("batch normalisation could not be folded: outputs would change; is a convolution used twice?")
    return new
