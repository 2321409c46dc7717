"""What a model weighs without a clock: parameters, stored bytes, multiply-accumulates, peak memory."""

import os
import resource
import sys

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from convx.evaluate import EvaluationData, Result, evaluation_mode, folded_form, output_of, row
from convx.replacing import replace

MIB = 2**20
SAMPLE = 24  # images that the MACs of a model whose cost depends on the pixels are counted on
# Operations that move or make data without arithmetic; they are not listed as uncounted.
MOVES = """
    _local_scalar_dense _to_copy _unsafe_view arange cat clone constant_pad_nd copy_ detach embedding empty
    empty_like empty_strided eye fill_ flip full full_like gather index index_select lift_fresh new_empty
    new_empty_strided new_full new_zeros ones ones_like reflection_pad2d repeat replication_pad2d roll
    scalar_tensor select_scatter slice_scatter stack view_copy zero_ zeros zeros_like
"""


def run(model: nn.Module, data: EvaluationData, settings: dict | None = None) -> Result:
    """Return parameters (and trainable ones), stored bytes, MACs, peak memory and the process's peak RSS.

    ``macs`` is of one image, as trained and (where something folds) folded into plain convolutions. An operator whose
    class has ``macs_as_folded`` is a plain convolution by its arithmetic and computes it in a way that depends on
    device and shape (an FFT has no formula, a product with a matrix of shifts has other numbers): it counts as its
    folded form in both.
    ``peak_memory`` is that of one forward pass of ``settings["batch_size"]`` images (32). Only shapes and the
    normalisation of ``data`` are used, unless the model says ``input_dependent``: then its MACs are the mean over
    ``SAMPLE`` of the images and its memory is that of a batch of them.
    """
    if getattr(model, "input_dependent", False):
        return _of_images(model, data, batch=(settings or {}).get("batch_size", 32))
    batch = (settings or {}).get("batch_size", 32)
    counts = parameter_counts(model)
    method = "nn.Parameters, and frozen kernels kept as buffers [c_out, c_in, k, k]; shared tensors once"
    rows = [
        row("parameters", counts["parameters"], "parameters", method=method),
        row("trainable_parameters", counts["trainable"], "parameters", method="those that require gradients"),
        row("stored_bytes", stored_bytes(model), "B", method="tensors of the state dict, shared ones once"),
    ]
    folded = folded_form(model)
    forms = {"no": model} | ({"yes": folded} if folded is not None else {})
    one, many = _input(data, 1), _input(data, batch)
    for name, form in forms.items():
        counted, stood_in = countable(form)
        total, uncounted = macs(counted, one)
        missing = f"; no formula for: {', '.join(uncounted)}" if uncounted else ""
        standing = f"; counted as the convolution it builds: {', '.join(stood_in)}" if stood_in else ""
        method = f"torch FlopCounterMode / 2, batch 1{standing}{missing}"
        rows.append(row("macs", total, "MAC per image", method=method, folded=name))
    where = {"batch": batch, "device": data.device.type, "dtype": str(many.dtype).removeprefix("torch.")}
    value, method = peak_memory(model, many)
    rows.append(row("peak_memory", value / MIB, "MiB", method=method, **where))
    method = "largest resident set of the whole process so far, imports and data included (getrusage)"
    rows.append(row("peak_rss", peak_rss() / MIB, "MiB", method=method))
    return Result(rows)


def _of_images(model: nn.Module, data: EvaluationData, batch: int) -> Result:
    """Return the rows of a model whose cost depends on the pixels."""
    sample, counts, found = data.spread(SAMPLE), parameter_counts(model), []
    for place, x_BCHW in enumerate(torch.cat([x for x, _ in sample.batches()]).split(1)):
        boxes = None if sample.boxes is None else sample.boxes[place : place + 1]
        found.append(macs(_Bound(model, boxes), x_BCHW)[0])
    method = f"torch FlopCounterMode / 2, batch 1, mean over {len(found)} test images, evenly spaced"
    many = data.spread(batch)
    value, how = peak_memory(_Bound(model, many.boxes), torch.cat([x for x, _ in many.batches()]))
    where = {"batch": len(many), "device": data.device.type, "dtype": "float32"}
    return Result(
        [
            row("parameters", counts["parameters"], "parameters", method="nn.Parameters; shared tensors once"),
            row("trainable_parameters", counts["trainable"], "parameters", method="those that require gradients"),
            row("stored_bytes", stored_bytes(model), "B", method="tensors of the state dict, shared ones once"),
            row("macs", sum(found) / len(found), "MAC per image", n=len(found), method=method, folded="no"),
            row("peak_memory", value / MIB, "MiB", method=f"{how}, of test images", **where),
            row("peak_rss", peak_rss() / MIB, "MiB", method="largest resident set of the whole process so far"),
        ]
    )


class _Bound(nn.Module):
    """A model together with the boxes of the batch that it will be given."""

    def __init__(self, model: nn.Module, boxes: torch.Tensor | None):
        super().__init__()
        self.model, self.boxes = model, boxes

    def forward(self, x_BCHW):
        return output_of(self.model, x_BCHW, self.boxes)


def parameter_counts(model: nn.Module) -> dict[str, int]:
    """Return {"parameters", "trainable"}: numbers of weights, a shared tensor once.

    A frozen bank of filters that is a buffer (so that no optimiser and no checkpoint holds it) is a weight
    like any other; it is recognised by its four dimensions, [c_out, c_in / groups, k_h, k_w].
    """
    parameters = list(model.parameters())
    kernels = [b for b in model.buffers() if b.ndim == 4 and b.is_floating_point()]
    return {
        "parameters": sum(p.numel() for p in parameters) + sum(b.numel() for b in kernels),
        "trainable": sum(p.numel() for p in parameters if p.requires_grad),
    }


def stored_bytes(model: nn.Module) -> int:
    """Return the bytes that a checkpoint of the model needs: its state dict, shared tensors once.

    A module that stores itself in another way than by its state dict has a method ``stored_bytes() -> int``,
    which is asked instead.
    """
    prefixes: tuple[str, ...] = ()
    total, seen = 0, set()
    for name, module in model.named_modules():  # a module comes before those inside it
        if hasattr(module, "stored_bytes") and not name.startswith(prefixes):
            prefixes += (f"{name}." if name else "",)
            total += int(module.stored_bytes())
    for name, tensor in model.state_dict(keep_vars=True).items():
        if not isinstance(tensor, torch.Tensor) or name.startswith(prefixes):
            continue
        key = (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride())
        if tensor.numel() and key in seen:
            continue
        seen.add(key)
        total += tensor.numel() * tensor.element_size()
    return total


def countable(model: nn.Module) -> tuple[nn.Module, list[str]]:
    """Return (model to count, class names): operators with ``macs_as_folded`` are folded in a copy, the rest stays."""

    def accepts(module: nn.Module) -> bool:
        return getattr(module, "macs_as_folded", False)

    names = sorted({type(module).__name__ for module in model.modules() if accepts(module)})
    if not names:
        return model, names
    if accepts(model):
        return model.fold(), names
    return replace(model, "*", accepts, lambda name, module: module.fold(), "count", "operator"), names


class _Recorder(TorchDispatchMode):
    """Notes the names of the operations that reach the dispatcher."""

    def __init__(self):
        super().__init__()
        self.operations: set = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.operations.add(func)
        return func(*args, **(kwargs or {}))


def macs(model: nn.Module, x_BCHW: torch.Tensor) -> tuple[int, list[str]]:
    """Return (multiply-accumulates of one image, names of arithmetic operations without a formula).

    Counted by torch's ``FlopCounterMode``, which takes two operations for a multiply-accumulate:
    convolutions, matrix products and fused attention. All else that computes (additions, normalisation,
    activations, pooling) is named, not counted.
    """
    # The counter is the inner mode: it takes composite operations apart first and the recorder sees what it
    # really ran. Inference mode is left because it hides composite operations from both.
    with (
        evaluation_mode(model),
        torch.inference_mode(False),
        torch.no_grad(),
        _Recorder() as recorder,
        FlopCounterMode(display=False) as counter,
    ):
        model(x_BCHW)
    names, moves = set(), set(MOVES.split())
    for operation in recorder.operations:
        packet = getattr(operation, "overloadpacket", operation)
        name = str(packet).removeprefix("aten.")
        if packet not in flop_registry and name not in moves and not getattr(operation, "is_view", False):
            names.add(name)
    return counter.get_total_flops() // (2 * len(x_BCHW)), sorted(names)


def peak_memory(model: nn.Module, x_BCHW: torch.Tensor) -> tuple[int, str]:
    """Return (bytes, method): weights, input and the peak of what one forward pass allocates besides.

    The mark comes from the allocator itself: on the CPU the running sum of the profiler's allocation records,
    on CUDA the caching allocator's statistics. A first, unmeasured pass leaves out what is allocated once
    (oneDNN, cuDNN).
    """
    weights = {(t.data_ptr(), t.numel()): t for t in [*model.parameters(), *model.buffers()]}
    fixed = sum(t.numel() * t.element_size() for t in [*weights.values(), x_BCHW])
    with evaluation_mode(model), torch.inference_mode():
        model(x_BCHW)
        if x_BCHW.is_cuda:
            torch.cuda.synchronize(x_BCHW.device)
            before = torch.cuda.memory_allocated(x_BCHW.device)
            torch.cuda.reset_peak_memory_stats(x_BCHW.device)
            model(x_BCHW)
            torch.cuda.synchronize(x_BCHW.device)
            extra = torch.cuda.max_memory_allocated(x_BCHW.device) - before
            return fixed + extra, "weights, input and max_memory_allocated above them in one forward pass"
        # Not torch.profiler.profile: its first use in a process takes seconds, this one milliseconds.
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else its first use reports a missing GPU as an error
        with torch.autograd.profiler.profile(profile_memory=True) as profile:
            model(x_BCHW)
    changes = [event for event in profile.kineto_results.events() if event.name() == "[memory]"]
    used = extra = 0
    for change in sorted(changes, key=lambda event: event.start_ns()):
        used += change.nbytes()
        extra = max(extra, used)
    assert extra > 0, "the profiler recorded no allocation"
    return fixed + extra, "weights, input and the profiler's running sum of allocations in one forward pass"


def peak_rss() -> int:
    """Return the largest resident set of this process so far in bytes."""
    value = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return value if sys.platform == "darwin" else value * 1024


def _input(data: EvaluationData, count: int) -> torch.Tensor:
    """Return a normalised batch of mid-grey images: costs depend on shapes, not on pixels."""
    grey = torch.full((count, *data.shape_CHW), 128, dtype=torch.uint8, device=data.device)
    return data.normalise(grey)
