"""Latency of models in one process, interleaved: every round times each of them once, in random order.

What drifts (clock, temperature, other load) hits all of them alike, so that the ratio to the baseline is far
steadier than any absolute time. Medians with a distribution-free interval; the ratio's interval resamples
rounds.
"""

import contextlib
import copy
import gc
import itertools
import os
import random
import time
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import nn

from convx.evaluate import Result, evaluation_mode, folded_form, output_of, row
from convx.manifest import failure_reason
from convx.seeds import derive, generator

MIN_ROUNDS = 6  # the fewest for a 95 % interval of a median
WARM_UP = 5
SETTLE = 1.0  # seconds: an idle GPU raises its clock over many short calls, which look steady meanwhile
BATCHES = 24  # different batches of test images, for models whose latency depends on the pixels


def run(models: dict[str, nn.Module], shape_CHW: tuple[int, int, int], settings: dict, device="cpu") -> Result:
    """Return the rows of the first model, measured beside the second (its baseline) if there is one.

    ``settings``: ``batches`` [1, 32], ``threads`` [1] (ignored on a GPU), ``dtypes`` ["float32"], ``rounds``
    (50), ``seconds`` (10; ceiling of one condition, its warm-up included), ``channels_last`` (false),
    ``seed`` (0). ``images``: test images as ``EvaluationData``, for models whose latency depends on the pixels; each round
    takes the next batch of them, the same for all models (default: fixed noise).

    Rows, for each batch, threads, dtype and folded (no, and yes where the model has something to fold):
    ``latency`` in ms by ``statistic`` (median, p10, p90, median_low, median_high), ``throughput`` in images/s
    and, with a baseline, ``latency_ratio`` = ours / baseline's (median, low, high; ``reference``) and the
    baseline's own ``reference_latency``. A condition that cannot be measured keeps its rows with value None
    and the reason. ``details``: ``timing``, a summary of the samples of each condition.
    """
    device = torch.device(device)
    names = list(models)
    entrants = {"no": models[names[0]]}
    if (folded := folded_form(entrants["no"])) is not None:
        entrants["yes"] = folded
    reference = names[1] if len(names) > 1 else None
    if reference:
        entrants["reference"] = models[reference]
    rows, timing = [], []
    for dtype in settings.get("dtypes", ["float32"]):
        ready = {
            key: _prepared(model, device, dtype, settings.get("channels_last", False))
            for key, model in entrants.items()
        }
        for threads in settings.get("threads", [1]) if device.type == "cpu" else [torch.get_num_threads()]:
            for batch in settings.get("batches", [1, 32]):
                where = {"batch": batch, "threads": threads, "dtype": dtype, "device": device.type}
                samples, method = _condition(ready, shape_CHW, settings, device, where)
                for form in [key for key in entrants if key != "reference"]:
                    rows += _rows(samples, form, reference, where | {"folded": form}, method)
                timing += [where | {"model": key} | _summary(ms) for key, ms in samples.items()]
    return Result(rows, details={"timing": timing})


def paired(
    calls: dict[str, Callable[[], object]],
    rounds: int = 50,
    seconds: float = 10.0,
    seed: int = 0,
    clock: Callable | None = None,
    settle: float = 0.0,
) -> dict[str, np.ndarray]:
    """Return {name: milliseconds [rounds]} of calls that are timed in turn, in a new random order each round.

    Warm-up: at least five rounds and ``settle`` seconds, then until the sum of three rounds is within 5 % of that of
    the three before, for a quarter of ``seconds`` at most. Then ``rounds`` rounds, fewer (but six) when ``seconds`` are
    over. ``clock(call) -> ms`` times one call (default: wall clock). Garbage collection is off meanwhile (:func:`uncollected`).
    """
    clock, order = clock or _wall, list(calls)
    shuffle = random.Random(derive(seed, "latency order"))
    with uncollected():
        started, totals = time.perf_counter(), []
        while time.perf_counter() - started < seconds / 4 or len(totals) < WARM_UP:
            totals.append(sum(clock(call) for call in calls.values()))
            if time.perf_counter() - started < settle:
                continue
            if len(totals) > WARM_UP and abs(sum(totals[-3:]) / sum(totals[-6:-3]) - 1) < 0.05:
                break
        samples: dict[str, list[float]] = {name: [] for name in calls}
        for done in range(rounds):
            if done >= MIN_ROUNDS and time.perf_counter() - started > seconds:
                break
            shuffle.shuffle(order)
            for name in order:
                samples[name].append(clock(calls[name]))
    return {name: np.array(ms) for name, ms in samples.items()}


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """Collect garbage once, and no more inside; where that is done already, do nothing (a collection takes 0.2 s)."""
    if not gc.isenabled():
        yield
        return
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _wall(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return 1000 * (time.perf_counter() - start)


def _events(call: Callable[[], object]) -> float:
    """Return the milliseconds between two events on the GPU's stream around one call, waited for."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def _prepared(model: nn.Module, device: torch.device, dtype: str, channels_last: bool) -> nn.Module:
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    return copy.deepcopy(model).to(device=device, dtype=getattr(torch, dtype), memory_format=memory_format).eval()


def _condition(models: dict[str, nn.Module], shape_CHW, settings: dict, device: torch.device, where: dict):
    """Return ({model: ms [rounds]}, method) of one condition, or ({}, reason)."""
    cores = os.cpu_count() or 1
    if device.type == "cpu" and where["threads"] > cores:
        return {}, f"not measured: the machine has {cores} cores"
    inputs = _inputs(shape_CHW, settings, device, where)
    before = torch.get_num_threads()
    if device.type == "cpu":
        torch.set_num_threads(where["threads"])
    try:
        with evaluation_mode(*models.values()), torch.inference_mode():
            calls = {name: _turns(model, inputs) for name, model in models.items()}
            clock = _events if device.type == "cuda" else _wall
            limits = {key: settings[key] for key in ("rounds", "seconds", "seed") if key in settings}
            limits["settle"] = SETTLE if device.type == "cuda" else 0.0
            samples = paired(calls, clock=clock, **limits)
    except RuntimeError as error:
        reason = failure_reason(error)  # out of memory; anything else is an error in the format that all support
        if reason is None and where["dtype"] == "float32":
            raise
        return {}, f"not measured: {reason or ' '.join(str(error).split())[:160]}"
    finally:
        torch.set_num_threads(before)
    rounds = len(next(iter(samples.values())))
    timer = "CUDA events" if device.type == "cuda" else "wall clock"
    said = f"{timer}, {rounds} interleaved rounds in random order after warm-up, inference mode, 95 % intervals"
    if settings.get("images") is not None:
        said += f", {len(inputs)} batches of test images by turns"
    return samples, said


def _inputs(shape_CHW, settings: dict, device: torch.device, where: dict) -> list[tuple]:
    """Return [(x, boxes)]: batches of test images where there are some, else one of noise."""
    batch, dtype = where["batch"], getattr(torch, where["dtype"])
    if (images := settings.get("images")) is None:
        stream = generator(settings.get("seed", 0), "latency input")
        x_BCHW = torch.randn(batch, *shape_CHW, generator=stream).to(device, dtype)
        last = settings.get("channels_last", False)
        return [(x_BCHW.contiguous(memory_format=torch.channels_last) if last else x_BCHW, None)]
    sample = images.spread(min(BATCHES * batch, len(images) - len(images) % batch))
    x_NCHW = torch.cat([x for x, _ in sample.batches()]).to(device, dtype)
    mixed = torch.arange(len(x_NCHW)).view(batch, -1).T.flatten()  # a batch holds images of all classes
    boxes = [None] * BATCHES if sample.boxes is None else sample.boxes[mixed].split(batch)
    return list(zip(x_NCHW[mixed].split(batch), boxes))


def _turns(model: nn.Module, inputs: list[tuple]) -> Callable[[], object]:
    """Return a call that takes the next input every time; all models are called once a round, so they keep step."""
    turn = itertools.cycle(inputs)
    return lambda: output_of(model, *next(turn))


def _rows(samples: dict, form: str, reference: str | None, where: dict, method: str) -> list[dict]:
    """Return the rows of one form of the model under one condition, with value None without samples."""
    from convx.statistics import latency_median_interval, ratio_of_medians_interval  # SciPy: other evaluators need none

    measured = bool(samples)
    ms = samples[form] if measured else np.array([])
    n = len(ms) if measured else None
    values = dict.fromkeys(["median", "p10", "p90", "median_low", "median_high"])
    if measured:
        interval = latency_median_interval(ms)
        p10, p90 = np.quantile(ms, [0.1, 0.9])
        values = {
            "median": interval.estimate,
            "p10": p10,
            "p90": p90,
            "median_low": interval.low,
            "median_high": interval.high,
        }
    rows = [row("latency", v, "ms", n=n, method=method, **where, statistic=k) for k, v in values.items()]
    speed = 1000 * where["batch"] / values["median"] if measured else None
    rows.append(row("throughput", speed, "images/s", n=n, method=f"batch / median latency; {method}", **where))
    if reference:
        ratios, other = dict.fromkeys(["median", "low", "high"]), None
        if measured:
            interval = ratio_of_medians_interval(ms, samples["reference"])
            ratios = {"median": interval.estimate, "low": interval.low, "high": interval.high}
            other = float(np.median(samples["reference"]))
        where = where | {"reference": reference}
        rows += [row("latency_ratio", v, "ratio", n=n, method=method, **where, statistic=k) for k, v in ratios.items()]
        if form == "no":
            rows.append(row("reference_latency", other, "ms", n=n, method=method, **where, statistic="median"))
    return rows


def _summary(ms: np.ndarray) -> dict[str, float]:
    """Return what a reader needs to judge samples: number, spread, drift from first to second half."""
    half = len(ms) // 2
    drift = float(np.median(ms[half:]) / np.median(ms[:half]) - 1)
    return {
        "n": len(ms),
        "min": float(ms.min()),
        "median": float(np.median(ms)),
        "mean": float(ms.mean()),
        "max": float(ms.max()),
        "sd": float(ms.std(ddof=1)),
        "drift": drift,
    }
