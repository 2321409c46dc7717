"""Energy and carbon through CodeCarbon's offline tracker, always with how they were obtained.

A counter is read where there is one (RAPL for the processor, NVML for the GPU); everything else is
CodeCarbon's model, load times TDP for the processor and a constant for the memory. The ``source`` of a row is
the counter behind most of the energy, or "estimate" where models make up more than half of it; the ``method``
gives every part with its share. An estimate is a stopwatch with a unit: it is reported and never ranked.
Nothing here uses the network.
"""

import contextlib
import logging
import os
import sys
import time
from dataclasses import dataclass, replace

from convx.evaluate import Result, evaluation_mode, output_of, row
from convx.manifest import processor

WORLD_INTENSITY = 475.0  # gCO2e per kWh, CodeCarbon's world average
SHARED_COUNTERS = "shared: counters include what ran beside it"  # of a scope, in a method
COUNTERS = {"intel_rapl": "RAPL", "windows_emi": "RAPL", "intel_power_gadget": "Power Gadget"}


@dataclass(frozen=True)
class Reading:
    """What a tracker measured: seconds, kWh of the parts (with the PUE in them), and how the processor was
    followed."""

    seconds: float
    cpu_kwh: float
    ram_kwh: float
    gpu_kwh: float
    cpu_mode: str  # CodeCarbon's word: intel_rapl, cpu_load, constant, ...
    tdp_watts: float | None
    ram_watts: float
    on_gpu: bool
    scope: str  # "process" or "machine"
    pue: float = 1.0

    @property
    def kwh(self) -> float:
        """Return the energy of all parts that count for this device."""
        return self.cpu_kwh + self.ram_kwh + (self.gpu_kwh if self.on_gpu else 0.0)

    @property
    def fault(self) -> str:
        """Return why the reading cannot be used, or an empty string."""
        parts = {"processor": self.cpu_kwh} | ({"GPU": self.gpu_kwh} if self.on_gpu else {})
        bad = [f"{name} reading of {kwh:g} kWh" for name, kwh in parts.items() if not kwh > 0]
        if self.ram_kwh < 0:
            bad.append(f"memory reading of {self.ram_kwh:g} kWh")
        return ", ".join(bad)

    @property
    def source(self) -> str:
        """Return "RAPL", "NVML" (or another counter) where counters saw at least half of the energy, else
        "estimate"."""
        seen = {"NVML": self.gpu_kwh} if self.on_gpu else {}
        if self.cpu_mode in COUNTERS:
            seen[COUNTERS[self.cpu_mode]] = self.cpu_kwh
        return max(seen, key=seen.get) if sum(seen.values()) >= self.kwh / 2 and seen else "estimate"

    @property
    def method(self) -> str:
        """Return the source and every part with its share, the scope and the time measured."""
        if self.cpu_mode in COUNTERS:
            cpu = f"CPU by {COUNTERS[self.cpu_mode]} counter"
        elif self.cpu_mode == "cpu_load":
            cpu = f"CPU load x TDP {self.tdp_watts:g} W"
        else:
            cpu = f"CPU {self.cpu_mode}" + (f" TDP {self.tdp_watts:g} W" if self.tdp_watts else "")
        parts = [("GPU by NVML counter", self.gpu_kwh)] if self.on_gpu else []
        parts += [(cpu, self.cpu_kwh), (f"RAM model {self.ram_watts:g} W", self.ram_kwh)]
        shares = "; ".join(f"{name} {kwh / self.kwh:.0%}" for name, kwh in parts)
        if self.scope == "machine":
            scope = "whole machine"
        elif self.cpu_mode in COUNTERS or self.on_gpu:
            scope = SHARED_COUNTERS
        else:
            scope = "shared: process-level estimate"
        pue = "" if self.pue == 1 else f", PUE {self.pue:g}"
        return f"{self.source} ({shares}; {scope}{pue}; {self.seconds:.1f} s; CodeCarbon)"


class Meter:
    """Measures the energy between entering and leaving it: ``with Meter(carbon, device="cpu") as meter: ...;
    meter.rows("training")``.

    ``carbon``: ``intensity_g_per_kwh`` (475) and ``pue`` (1). ``device``: a torch device by name; the energy
    of GPUs counts on a CUDA device only, and then that of the one used. ``scope``: "process" for a job that
    shares its machine, "machine" for one that owns it. On a GPU, wait for it before leaving. Afterwards
    ``reading`` is a :class:`Reading`, or None with the ``reason``. It never raises: energy is no reason to
    lose a run.
    """

    def __init__(self, carbon: dict | None = None, device: str = "cpu", scope: str = "process"):
        if scope not in ("process", "machine"):
            raise ValueError(f"scope: {scope!r} given; process or machine")
        carbon = carbon or {}
        self.intensity = float(carbon.get("intensity_g_per_kwh", WORLD_INTENSITY))
        self.pue, self.device, self.scope = float(carbon.get("pue", 1.0)), str(device), scope
        self.reading: Reading | None = None
        self.reason = "the meter has not run"
        self._tracker = None

    def __enter__(self) -> "Meter":
        self.reading, self.reason = None, ""
        try:
            self._tracker = self._start()
        except Exception as error:
            self._tracker, self.reason = None, f"CodeCarbon did not start: {type(error).__name__}: {error}"
        return self

    def __exit__(self, *_) -> None:
        if self._tracker is None:
            return
        try:
            self.reading = self._stop(self._tracker)
            self.reason = self.reading.fault
        except Exception as error:
            self.reason = f"CodeCarbon gave no result: {type(error).__name__}: {error}"
        self._tracker = None

    def add_up(self, world) -> None:
        """Make the reading the sum of those of all processes that share the work (``convx.distributed.World``)."""
        if world.size == 1:
            return
        import torch

        names, own = ("cpu_kwh", "ram_kwh", "gpu_kwh"), dict.fromkeys(("cpu_kwh", "ram_kwh", "gpu_kwh"), float("nan"))
        if self.reading is not None and not self.reason:
            own = {name: getattr(self.reading, name) for name in names}
            if self.reading.cpu_mode in COUNTERS and world.local:
                own["cpu_kwh"] = 0.0  # the counter is the node's, and its first process has read it
        total = {k: v.item() for k, v in world.total({k: torch.tensor(v).double() for k, v in own.items()}).items()}
        if any(value != value for value in total.values()):
            self.reason = self.reason or "another process has no reading"
        else:
            self.reading = replace(self.reading, **total)

    def rows(self, what: str, images: int | None = None, **conditions) -> list[dict]:
        """Return ``<what>_energy`` and ``<what>_carbon``; with ``images``, the number measured, per 1000.

        A reading that is missing, zero or negative gives the value None and the reason.
        """
        kwh, source, method = None, "none", f"not measured: {self.reason}"
        if self.reading is not None and not self.reason:
            kwh, source, method = self.reading.kwh, self.reading.source, self.reading.method
        where = {"scope": self.scope, "source": source} | conditions
        if kwh is not None and images is not None:
            kwh *= 1000 / images
        unit = "" if images is None else " per 1000 images"
        carbon = None if kwh is None else kwh * self.intensity / 1000
        grams = f"; {self.intensity:g} gCO2e/kWh" if kwh is not None else ""
        return [
            row(f"{what}_energy", kwh, f"kWh{unit}", n=images, method=method, **where),
            row(f"{what}_carbon", carbon, f"kgCO2e{unit}", n=images, method=method + grams, **where),
        ]

    def _start(self):
        from codecarbon import OfflineEmissionsTracker

        logging.getLogger("codecarbon").setLevel(logging.ERROR)  # it logs before it reads log_level
        # All that could write a file, call out or depend on the package's data is set here; the machine's TDP
        # may still come from the user's CodeCarbon configuration. The constructor swallows its exceptions.
        tracker = OfflineEmissionsTracker(
            tracking_mode=self.scope, gpu_ids=self._gpu_ids(), measure_power_secs=5, pue=self.pue,
            force_carbon_intensity_g_co2e_kwh=self.intensity, electricitymaps_api_token=None,
            country_iso_code=None, country_2letter_iso_code=None, region=None,
            cloud_provider=None, cloud_region=None, allow_multiple_runs=True, log_level="error",
            output_methods=[], output_handlers=[], emissions_endpoint=None,
        )  # fmt: skip
        with _known_processor():
            tracker.start()
        if getattr(tracker, "_start_time", None) is None:
            raise RuntimeError("the tracker is not running")
        return tracker

    def _stop(self, tracker) -> Reading:
        tracker.stop()
        data = getattr(tracker, "final_emissions_data", None)
        if data is None:
            raise RuntimeError("the tracker stopped without a result")
        modes = [hardware for hardware in tracker._hardware if type(hardware).__name__ == "CPU"]
        return Reading(
            seconds=data.duration,
            cpu_kwh=data.cpu_energy,
            ram_kwh=data.ram_energy,
            gpu_kwh=data.gpu_energy,
            cpu_mode=modes[0]._mode if modes else "of unknown kind",
            tdp_watts=modes[0]._tdp if modes else None,
            ram_watts=data.ram_power / self.pue,
            on_gpu=self.device.startswith("cuda"),
            scope=self.scope,
            pue=self.pue,
        )

    def _gpu_ids(self) -> list[str]:
        """Return the one GPU in use as the driver names it; none for a CPU run."""
        if not self.device.startswith("cuda"):
            return []
        index = int(self.device.partition(":")[2] or 0)
        visible = [g.strip() for g in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if g.strip()]
        return [visible[index] if index < len(visible) else str(index)]


def run(model, shape_CHW: tuple[int, int, int], settings: dict, device="cpu") -> Result:
    """Return ``inference_energy`` and ``inference_carbon`` per 1000 images, on a machine that is ours alone.

    ``settings``: ``seconds`` (5) of repeated batches, ``batch_size`` (32), ``carbon`` as for :class:`Meter`,
    ``channels_last`` (false), ``images`` (test images as ``EvaluationData``, else the input is fixed noise). On the
    current number of threads. The model is moved to the device.
    """
    import torch

    from convx.seeds import generator

    device = torch.device(device)
    batch, seconds = settings.get("batch_size", 32), settings.get("seconds", 5)
    memory_format = torch.channels_last if settings.get("channels_last", False) else torch.contiguous_format
    x_BCHW = torch.randn(batch, *shape_CHW, generator=generator(0, "energy input"))
    x_BCHW = x_BCHW.to(device).contiguous(memory_format=memory_format)
    model, boxes = model.to(device=device, memory_format=memory_format), None
    if (given := settings.get("images")) is not None:
        sample = given.spread(batch)
        x_BCHW, boxes, batch = torch.cat([x for x, _ in sample.batches()]), sample.boxes, len(sample)

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    queued, images = 5 if device.type == "cuda" else 1, 0  # waiting for each batch would leave a GPU idle
    with evaluation_mode(model), torch.inference_mode():
        for _ in range(3):
            output_of(model, x_BCHW, boxes)
        wait()
        with Meter(settings.get("carbon"), device=str(device), scope="machine") as meter:
            end = time.perf_counter() + seconds
            while time.perf_counter() < end:
                for _ in range(queued):
                    output_of(model, x_BCHW, boxes)
                wait()
                images += queued * batch
    where = {"batch": batch, "threads": torch.get_num_threads(), "dtype": "float32", "device": device.type}
    return Result(meter.rows("inference", images=images, **where))


@contextlib.contextmanager
def _known_processor():
    """Tell CodeCarbon the processor's name from /proc/cpuinfo; its own way takes a subprocess and seconds."""
    try:
        import cpuinfo
    except ImportError:
        cpuinfo = None
    if cpuinfo is None or not sys.platform.startswith("linux"):
        yield
        return
    asked = cpuinfo.get_cpu_info
    cpuinfo.get_cpu_info = lambda: {"brand_raw": processor()}
    try:
        yield
    finally:
        cpuinfo.get_cpu_info = asked
