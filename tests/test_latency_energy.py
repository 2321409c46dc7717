"""Latency by an artificial clock and by the wall; energy labels from made-up readings; CodeCarbon itself
without a network."""

import builtins
import gc
import socket
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from convx import surgery
from convx.evaluate import energy, latency
from convx.evaluate.energy import Meter, Reading
from convx.models import create_model
from convx.statistics import ratio_of_medians_interval

KEYS = {"metric", "value", "unit", "n", "split", "conditions", "method"}


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def pick(rows, metric, **conditions):
    found = [r["value"] for r in rows if r["metric"] == metric and conditions.items() <= r["conditions"].items()]
    assert len(found) == 1, (metric, conditions, found)
    return found[0]


def small(width=16):
    return nn.Sequential(
        nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )


# ---------------------------------------------------------------------------------------------------- latency


def test_every_round_times_each_call_once_in_a_seeded_random_order():
    def order(seed):
        seen = []
        calls = {name: (lambda name=name: seen.append(name)) for name in "abc"}
        samples = latency.paired(calls, rounds=40, seconds=60, seed=seed, clock=lambda call: call() or 1.0)
        assert {name: len(ms) for name, ms in samples.items()} == dict.fromkeys("abc", 40)
        return seen[-120:]

    first = order(0)
    rounds = ["".join(first[i : i + 3]) for i in range(0, 120, 3)]
    assert {"".join(sorted(r)) for r in rounds} == {"abc"} and len(set(rounds)) == 6  # all orders occur
    assert order(0) == first != order(1)


def test_drift_that_doubles_the_time_cancels_in_the_ratio():
    """The artificial machine slows down steadily; the variant is 1.5 times as slow as the baseline
    throughout."""
    ticks = iter(range(10**6))
    calls = {"ours": lambda: 1.5, "base": lambda: 1.0}
    samples = latency.paired(calls, rounds=200, seconds=60, clock=lambda call: call() * (1 + next(ticks) / 400))
    result = ratio_of_medians_interval(samples["ours"], samples["base"])
    assert samples["base"].max() / samples["base"].min() > 1.9
    assert result.estimate == pytest.approx(1.5, rel=0.02) and result.low <= 1.5 <= result.high


def test_warm_up_lasts_until_times_settle_and_ends_with_the_budget():
    def warm_up(times, seconds=60.0):
        count, stream = [0], iter(times)

        def clock(call):
            count[0] += 1
            return next(stream)

        latency.paired({"only": lambda: None}, rounds=6, seconds=seconds, clock=clock)
        return count[0] - 6

    assert warm_up([1.0] * 100) == 6  # five, and the first that can be compared
    settling = [100 / (i + 1) for i in range(30)] + [3.0] * 100
    assert 30 <= warm_up(settling) <= 36
    assert warm_up((2.0**i for i in range(1000)), seconds=1e-9) == 5


def test_an_idle_device_is_kept_busy_before_it_is_timed():
    """Steady times alone do not end the warm-up before ``settle`` seconds; the budget of the warm-up does."""
    for settle, seconds, least, most in ((0.2, 60.0, 0.2, 5.0), (30.0, 0.4, 0.1, 5.0)):
        started, calls = time.perf_counter(), []

        def clock(call, calls=calls):
            calls.append(time.perf_counter())
            time.sleep(0.005)
            return 1.0

        latency.paired({"only": lambda: None}, rounds=6, seconds=seconds, settle=settle, clock=clock)
        assert least <= calls[-6] - started <= most, (settle, seconds)


def test_rounds_end_with_the_budget_but_never_below_six():
    slow = {"a": lambda: time.sleep(0.02)}
    assert len(latency.paired(slow, rounds=1000, seconds=0.01)["a"]) == 6
    started = time.perf_counter()
    n = len(latency.paired(slow, rounds=1000, seconds=0.6)["a"])
    assert 6 <= n < 40 and time.perf_counter() - started < 3


def test_garbage_collection_is_off_while_timing_and_comes_back():
    seen = []
    assert gc.isenabled()
    latency.paired({"a": lambda: seen.append(gc.isenabled())}, rounds=6)
    assert not any(seen) and gc.isenabled()
    with pytest.raises(ZeroDivisionError):
        latency.paired({"a": lambda: 1 / 0}, rounds=6)
    assert gc.isenabled()


def test_many_timings_share_one_garbage_collection(monkeypatch):
    collected = []
    monkeypatch.setattr(gc, "collect", lambda: collected.append(gc.isenabled()))
    with pytest.raises(ZeroDivisionError), latency.uncollected():
        for _ in range(3):
            latency.paired({"a": lambda: None}, rounds=6)
            assert not gc.isenabled()
        raise ZeroDivisionError
    assert collected == [True] and gc.isenabled()


def test_a_model_against_itself_has_ratio_one_and_a_wider_one_is_slower():
    """On a busy machine intervals miss now and then and bursts widen them, so a few tries are allowed."""
    model, wide = small(), small(256)
    settings = {"batches": [4], "rounds": 40, "seconds": 5}

    def tries(ours, good):
        for seed in range(5):
            models = {"ours": ours, "base": model}
            rows = latency.run(models, (3, 24, 24), settings | {"seed": seed}).rows
            ends = [pick(rows, "latency_ratio", statistic=end) for end in ("low", "high")]
            if good(*ends):
                return True
        return False

    assert tries(model, lambda low, high: low <= 1 <= high < 4 * low)
    assert tries(wide, lambda low, high: low > 1.5)
    assert not tries(wide, lambda low, high: low <= 1 <= high < 4 * low)


def test_latency_rows():
    model = create_model("resnet8_8", num_classes=10, in_channels=3, image_size=32)
    mixed = surgery.linear_combinations(model, expansion=2)
    mixed.train()
    state = {k: v.clone() for k, v in mixed.state_dict().items()}
    settings = {"batches": [1, 2], "threads": [1], "rounds": 8, "seconds": 5, "channels_last": True}
    result = latency.run({"lc": mixed, "cnn": model}, (3, 32, 32), settings)
    assert mixed.training and all(torch.equal(v, state[k]) for k, v in mixed.state_dict().items())
    assert all(r.keys() == KEYS and r["value"] > 0 and r["n"] == 8 for r in result.rows)
    assert all("wall clock, 8 interleaved" in r["method"] for r in result.rows)
    for batch in (1, 2):
        for form in ("no", "yes"):
            where = {"batch": batch, "threads": 1, "dtype": "float32", "device": "cpu", "folded": form}
            low, p10, median, p90, high = (
                pick(result.rows, "latency", statistic=s, **where)
                for s in ("median_low", "p10", "median", "p90", "median_high")
            )
            assert p10 <= median <= p90 and low <= median <= high
            assert pick(result.rows, "throughput", **where) == pytest.approx(1000 * batch / median)
            ratio = [
                pick(result.rows, "latency_ratio", statistic=s, reference="cnn", **where)
                for s in ("low", "median", "high")
            ]
            assert ratio == sorted(ratio)
            if form == "no":
                base = pick(result.rows, "reference_latency", reference="cnn", **where)
                assert ratio[1] == pytest.approx(median / base)
    assert {(t["batch"], t["model"]) for t in result.details["timing"]} == {
        (b, m) for b in (1, 2) for m in ("no", "yes", "reference")
    }
    alone = latency.run({"cnn": model}, (3, 32, 32), settings | {"batches": [1]})
    assert {r["metric"] for r in alone.rows} == {"latency", "throughput"}
    assert {r["conditions"]["folded"] for r in alone.rows} == {"no"}


def test_conditions_that_cannot_be_measured_keep_their_rows(monkeypatch):
    class Float32Only(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1))

        def forward(self, x):
            if x.dtype != torch.float32:
                raise RuntimeError("no kernel for this format")
            return x * self.weight

    monkeypatch.setattr(latency.os, "cpu_count", lambda: 2)
    settings = {
        "batches": [1],
        "threads": [1, 64],
        "dtypes": ["float32", "bfloat16"],
        "rounds": 6,
        "seconds": 1,
    }
    result = latency.run({"ours": Float32Only(), "base": Float32Only()}, (3, 4, 4), settings)
    assert torch.get_num_threads() == 1
    one = [r for r in result.rows if r["conditions"]["threads"] == 1]
    assert all(r["value"] > 0 for r in one if r["conditions"]["dtype"] == "float32")
    missing = [r for r in one if r["conditions"]["dtype"] == "bfloat16"]
    assert len(missing) == len(one) / 2 and all(r["value"] is None and "no kernel" in r["method"] for r in missing)
    many = [r for r in result.rows if r["conditions"]["threads"] == 64]
    assert len(many) == len(one) and all(r["value"] is None and "has 2 cores" in r["method"] for r in many)

    class Large(nn.Module):
        def forward(self, x):
            raise torch.OutOfMemoryError("tried to allocate 99 GiB")

    result = latency.run({"ours": Large()}, (3, 4, 4), settings | {"threads": [1], "dtypes": ["float32"]})
    assert all(r["value"] is None and "out of memory" in r["method"] for r in result.rows) and result.rows

    class Broken(nn.Module):
        def forward(self, x):
            raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        latency.run({"ours": Broken()}, (3, 4, 4), settings)


def test_threads_and_inference_mode_are_as_the_condition_says():
    seen = []

    class Spy(nn.Module):
        def forward(self, x):
            seen.append(
                (
                    torch.get_num_threads(),
                    torch.is_inference_mode_enabled(),
                    self.training,
                    x.shape,
                    float(x.sum()),
                )
            )
            return x

    settings = {"batches": [2], "threads": [1], "rounds": 6, "seconds": 1}
    latency.run({"spy": Spy()}, (3, 4, 4), settings)
    latency.run({"spy": Spy()}, (3, 4, 4), settings)
    assert len(set(seen)) == 1 and seen[0][:4] == (
        1,
        True,
        False,
        (2, 3, 4, 4),
    )  # the input is the same each time


# ----------------------------------------------------------------------------------------------------- energy


def reading(**changes):
    facts = {
        "seconds": 2.0,
        "cpu_kwh": 4e-6,
        "ram_kwh": 1e-6,
        "gpu_kwh": 0.0,
        "cpu_mode": "intel_rapl",
        "tdp_watts": 65.0,
        "ram_watts": 10.0,
        "on_gpu": False,
        "scope": "machine",
    }
    return Reading(**facts | changes)


@pytest.mark.parametrize(
    ("changes", "source", "words"),
    [
        ({}, "RAPL", ["CPU by RAPL counter 80%", "RAM model 10 W 20%", "whole machine"]),
        ({"ram_kwh": 6e-6}, "estimate", ["CPU by RAPL counter 40%", "RAM model 10 W 60%"]),
        ({"cpu_mode": "cpu_load"}, "estimate", ["CPU load x TDP 65 W 80%", "RAM model"]),
        ({"cpu_mode": "constant"}, "estimate", ["CPU constant TDP 65 W 80%"]),
        ({"cpu_mode": "of unknown kind", "tdp_watts": None}, "estimate", ["CPU of unknown kind 80%"]),
        (
            {"on_gpu": True, "gpu_kwh": 15e-6, "cpu_mode": "cpu_load"},
            "NVML",
            ["GPU by NVML counter 75%", "CPU load"],
        ),
        ({"on_gpu": True, "gpu_kwh": 2e-6, "cpu_mode": "cpu_load"}, "estimate", ["GPU by NVML counter 29%"]),
        ({"on_gpu": True, "gpu_kwh": 2e-6}, "RAPL", ["GPU by NVML counter 29%", "CPU by RAPL counter 57%"]),
        ({"scope": "process"}, "RAPL", ["shared: counters include what ran beside it"]),
        ({"scope": "process", "cpu_mode": "cpu_load"}, "estimate", ["shared: process-level estimate"]),
        ({"pue": 1.3}, "RAPL", ["PUE 1.3"]),
    ],
)
def test_the_label_names_the_source_and_every_share(changes, source, words):
    made = reading(**changes)
    assert made.source == source and made.method.startswith(source) and made.fault == ""
    assert all(word in made.method for word in [*words, "2.0 s", "CodeCarbon"]), made.method


def test_a_gpu_that_was_not_used_does_not_count():
    assert reading(gpu_kwh=1.0).kwh == pytest.approx(5e-6) and reading(gpu_kwh=-1.0).fault == ""
    assert reading(gpu_kwh=1e-6, on_gpu=True).kwh == pytest.approx(6e-6)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"cpu_kwh": 0.0}, "processor reading of 0 kWh"),
        ({"cpu_kwh": -1e-9}, "processor reading of -1e-09 kWh"),
        ({"cpu_kwh": float("nan")}, "processor reading of nan"),
        ({"on_gpu": True}, "GPU reading of 0 kWh"),
        ({"ram_kwh": -1e-9}, "memory reading"),
    ],
)
def test_zero_and_negative_readings_are_no_numbers(changes, words):
    meter = Meter()
    meter.reading = reading(**changes)
    meter.reason = meter.reading.fault
    for images in (None, 100):
        rows = meter.rows("training", images)
        assert [r["value"] for r in rows] == [None, None] and all(words in r["method"] for r in rows)
        assert {r["conditions"]["source"] for r in rows} == {"none"}


def test_rows_per_run_and_per_thousand_images():
    meter = Meter({"intensity_g_per_kwh": 200, "pue": 1.0}, scope="machine")
    meter.reading, meter.reason = reading(), ""
    total = meter.rows("training")
    assert [(r["metric"], r["unit"]) for r in total] == [
        ("training_energy", "kWh"),
        ("training_carbon", "kgCO2e"),
    ]
    assert total[0]["value"] == pytest.approx(5e-6) and total[1]["value"] == pytest.approx(1e-6)
    each = meter.rows("inference", images=500, batch=32)
    assert [r["unit"] for r in each] == ["kWh per 1000 images", "kgCO2e per 1000 images"]
    assert each[0]["value"] == pytest.approx(1e-5) and each[1]["value"] == pytest.approx(2e-6)
    assert each[0]["conditions"] == {"scope": "machine", "source": "RAPL", "batch": 32} and each[0]["n"] == 500
    assert "200 gCO2e/kWh" in each[1]["method"] and all(r.keys() == KEYS for r in total + each)


class FakeTracker:
    """CodeCarbon's tracker with a given result; it notes what it was asked for."""

    made: list = []  # noqa: RUF012
    data = SimpleNamespace(duration=3.0, cpu_energy=2e-6, ram_energy=1e-6, gpu_energy=9e-6, ram_power=24.0)
    runs = True

    def __init__(self, **settings):
        type(self).made.append(settings)
        self._hardware = [type("RAM", (), {})(), type("CPU", (), {"_mode": "cpu_load", "_tdp": 8})()]

    def start(self):
        if self.runs:
            self._start_time = 0.0

    def stop(self):
        if self.data is not None:
            self.final_emissions_data = self.data


@pytest.fixture
def fake(monkeypatch):
    tracker = type("Tracker", (FakeTracker,), {"made": []})
    import codecarbon

    monkeypatch.setattr(codecarbon, "OfflineEmissionsTracker", tracker)
    return tracker


def test_the_meter_reads_what_the_tracker_returns_and_asks_for_nothing_that_calls_out(fake, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    with Meter({"intensity_g_per_kwh": 50, "pue": 1.2}, device="cuda:1", scope="machine") as meter:
        pass
    (asked,) = fake.made
    assert (
        asked["output_methods"] == []
        and asked["emissions_endpoint"] is None
        and asked["electricitymaps_api_token"] is None
    )
    assert (
        asked["force_carbon_intensity_g_co2e_kwh"] == 50 and asked["pue"] == 1.2 and asked["tracking_mode"] == "machine"
    )
    assert asked["gpu_ids"] == ["5"] and asked["cloud_provider"] is None
    assert meter.reading == Reading(3.0, 2e-6, 1e-6, 9e-6, "cpu_load", 8, 20.0, True, "machine", 1.2)
    assert pick(meter.rows("training"), "training_energy", source="NVML") == pytest.approx(12e-6)
    with Meter(device="cpu") as meter:
        pass
    assert fake.made[1]["gpu_ids"] == [] and fake.made[1]["force_carbon_intensity_g_co2e_kwh"] == 475
    assert pick(meter.rows("training"), "training_energy", source="estimate") == pytest.approx(3e-6)


def test_a_meter_that_fails_costs_no_run(fake, monkeypatch):
    fake.data = None
    with Meter() as meter:
        pass
    assert meter.reading is None and "stopped without a result" in meter.rows("training")[0]["method"]
    fake.runs = False
    with Meter() as meter:
        value = 1
    assert value == 1 and "not running" in meter.rows("training")[0]["method"]
    fake.__init__ = lambda self, **_: 1 / 0
    with Meter() as meter:
        pass
    assert meter.rows("training")[0]["value"] is None and "ZeroDivisionError" in meter.reason

    found = builtins.__import__

    def without(name, *rest, **more):
        if name == "codecarbon":
            raise ImportError("no codecarbon here")
        return found(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    with Meter() as meter:
        pass
    assert "no codecarbon here" in meter.reason
    with pytest.raises(ValueError, match="scope"):
        Meter(scope="galaxy")
    assert "has not run" in Meter().rows("training")[0]["method"]


def test_an_error_inside_the_meter_passes_through(fake):
    with pytest.raises(KeyError), Meter() as meter:
        raise KeyError("inside")
    assert meter.reading is not None


def test_the_real_tracker_works_without_network_and_files(tmp_path, monkeypatch):
    """Both scopes once on this machine, with every way out closed."""

    def refuse(*arguments, **_):
        raise AssertionError(f"network: {arguments}")

    called = []
    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, lambda *a, **k: called.append(a) or refuse(*a))
    for name in ("getaddrinfo", "create_connection"):
        monkeypatch.setattr(socket, name, lambda *a, **k: called.append(a) or refuse(*a))
    monkeypatch.chdir(tmp_path)
    intensity = {"intensity_g_per_kwh": 100.0, "pue": 1.0}
    readings = {}
    for scope in ("process", "machine"):
        with Meter(intensity, scope=scope) as meter:
            end = time.perf_counter() + 0.6
            while time.perf_counter() < end:
                torch.rand(200, 200) @ torch.rand(200, 200)
        assert meter.reason == "", meter.reason
        readings[scope] = meter.reading
        rows = meter.rows("training")
        assert 0.5 < meter.reading.seconds < 10 and meter.reading.scope == scope
        assert rows[0]["value"] > 0 and rows[1]["value"] == pytest.approx(rows[0]["value"] * 0.1)
        watts = 3.6e6 * rows[0]["value"] / meter.reading.seconds
        assert 0.5 < watts < 5000
        assert rows[0]["method"].startswith(("RAPL", "estimate", "Power Gadget"))
    assert not called and list(tmp_path.iterdir()) == []


def test_inference_energy_of_a_real_model():
    model = small().train()
    settings = {
        "seconds": 0.5,
        "batch_size": 8,
        "carbon": {"intensity_g_per_kwh": 300, "pue": 1.0},
        "channels_last": True,
    }
    started = time.perf_counter()
    result = energy.run(model, (3, 16, 16), settings)
    assert model.training and time.perf_counter() - started < 30
    where = {"batch": 8, "threads": 1, "dtype": "float32", "device": "cpu", "scope": "machine"}
    kwh = pick(result.rows, "inference_energy", **where)
    assert kwh > 0 and pick(result.rows, "inference_carbon", **where) == pytest.approx(0.3 * kwh)
    assert all(r.keys() == KEYS and r["n"] % 8 == 0 and r["n"] > 0 for r in result.rows)


def test_the_meter_needs_no_torch():
    code = "import sys, convx.evaluate.energy as e; e.Meter(); print({'torch', 'codecarbon'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], check=True, timeout=60, capture_output=True, text=True)
    assert done.stdout.strip() == "set()"


def test_samples_are_summarised():
    summary = latency._summary(np.array([1.0, 1.0, 1.0, 2.0, 2.0, 2.0]))
    assert summary["n"] == 6 and summary["drift"] == pytest.approx(1.0) and summary["median"] == 1.5
