"""GPU slots by file locks, tested without a GPU by fake devices and real processes."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time

import pytest

from convx import devices

CONTEXT = multiprocessing.get_context("fork")


@pytest.fixture
def gpus(monkeypatch, tmp_path):
    """Two slots-per-GPU settings are made by the tests; the devices are fake."""
    monkeypatch.setenv("CONVX_LOCKS", str(tmp_path / "locks"))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def fake(names: str, slots: int = 1):
        monkeypatch.setenv("CONVX_GPUS", names)
        monkeypatch.setenv("CONVX_GPU_SLOTS", str(slots))

    return fake


def _job(path, hold, whole):
    with devices.claim("cuda", whole=whole) as gpu:
        start = time.monotonic()
        time.sleep(hold)
        path.write_text(
            json.dumps(
                {
                    "gpu": gpu,
                    "visible": os.environ["CUDA_VISIBLE_DEVICES"],
                    "start": start,
                    "end": time.monotonic(),
                }
            )
        )


def _run(tmp_path, jobs):
    """Start jobs (hold seconds, whole) at one time and return what each recorded."""
    files = [tmp_path / f"job{i}.json" for i in range(len(jobs))]
    processes = [CONTEXT.Process(target=_job, args=(file, *job)) for file, job in zip(files, jobs)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(30)
        assert process.exitcode == 0
    return [json.loads(file.read_text()) for file in files]


def _most_at_once(records):
    events = sorted([(r["start"], 1) for r in records] + [(r["end"], -1) for r in records])
    running = most = 0
    for _, change in events:
        running += change
        most = max(most, running)
    return most


def test_two_jobs_on_one_slot_never_overlap(gpus, tmp_path):
    gpus("0")
    records = _run(tmp_path, [(0.3, False)] * 3)
    assert _most_at_once(records) == 1
    assert {r["visible"] for r in records} == {"0"}


def test_four_slots_on_one_device_overlap(gpus, tmp_path):
    gpus("0", slots=4)
    assert _most_at_once(_run(tmp_path, [(0.8, False)] * 4)) == 4


def test_jobs_spread_over_devices(gpus, tmp_path):
    gpus("0,3", slots=2)
    records = _run(tmp_path, [(0.8, False)] * 2)
    assert {r["gpu"] for r in records} == {"0", "3"}


def test_timing_takes_the_whole_device(gpus, tmp_path):
    gpus("0", slots=2)
    records = _run(tmp_path, [(0.4, True), (0.4, False), (0.4, False)])
    whole = records[0]
    for other in records[1:]:
        assert other["end"] <= whole["start"] or other["start"] >= whole["end"]


def test_two_timings_do_not_deadlock(gpus, tmp_path):
    gpus("0,1", slots=2)
    assert len(_run(tmp_path, [(0.2, True)] * 4)) == 4


def test_a_killed_job_frees_its_slot(gpus, tmp_path):
    gpus("0")
    held = CONTEXT.Process(target=_job, args=(tmp_path / "never.json", 60, False))
    held.start()
    deadline = time.monotonic() + 10
    while not list((tmp_path / "locks").glob("*")) and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(held.pid, signal.SIGKILL)
    held.join(10)
    assert _run(tmp_path, [(0.01, True)])[0]["gpu"] == "0"


def test_an_allocation_is_respected(monkeypatch):
    monkeypatch.delenv("CONVX_GPUS", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-5a1b,2")
    assert devices.visible_gpus() == ["GPU-5a1b", "2"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert devices.visible_gpus() == []


def test_no_gpu_and_cpu_claim_nothing(gpus, monkeypatch):
    gpus("0")
    with devices.claim("cpu") as gpu:
        assert gpu is None
        assert "CUDA_VISIBLE_DEVICES" not in os.environ
    monkeypatch.setenv("CONVX_GPUS", "")
    with devices.claim("auto", whole=True) as gpu:
        assert gpu is None


def test_the_environment_is_put_back(gpus, monkeypatch):
    gpus("1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    with devices.claim("auto"):
        assert os.environ["CUDA_VISIBLE_DEVICES"] == "1"
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "0,1"


@pytest.mark.parametrize("text", ["0", "two", "-1"])
def test_wrong_slots_are_named(monkeypatch, text):
    monkeypatch.setenv("CONVX_GPU_SLOTS", text)
    with pytest.raises(ValueError, match="CONVX_GPU_SLOTS"):
        devices.slots_per_gpu()


def test_freed_memory_is_kept_by_the_process():
    """In a process of its own: after the call, blocks of many MB come from the heap and stay when they are freed."""
    code = """if True:
        import os, sys
        from convx import devices
        def resident():
            return int(open('/proc/self/statm').read().split()[1]) * os.sysconf('SC_PAGE_SIZE') / 2**20
        if sys.argv[1] == 'kept':
            devices.keep_freed_memory()
        before = resident()
        block = bytearray(200 * 2**20)
        del block
        print(resident() - before)
    """
    run = lambda how: float(subprocess.run([sys.executable, "-c", code, how], capture_output=True, text=True).stdout)  # noqa: E731
    assert run("plain") < 20
    assert run("kept") > 150
