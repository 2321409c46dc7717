"""Training by several processes, one a device, on one node or many: what torchrun starts, and what the loop asks of it.

The processes of a training share its steps: the batch of a step is the one that a single process would take, and each gets
an equal part of it, in order. Crops and flips are drawn for the whole batch and each takes its own, so that a network without
batch normalisation and dropout trains as in one process, up to the order of float additions. (RandAugment, mixup, CutMix and
dropout draw afresh in each process.) The same split, one after the other in one process, is gradient accumulation.

Importing this loads no torch.
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading

from convx.manifest import Failure
from convx.seeds import derive

STOP_SECONDS = 25  # that processes wait for the first one to save, once they are told to end
WORDS = "CONVX_WORDS"  # of the environment: the command line of the processes, as JSON
_world: "World | None" = None
_rows: tuple[int, int, int] | None = None  # (first, behind the last, of how many): the rows of the batch at work


# ----------------------------------------------------------------------------------------------------------------- launching


def launched() -> bool:
    """Return whether torchrun started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def words() -> list[str] | None:
    """Return the words that :func:`launch` was given, in a process that it started; None elsewhere: those of the command line."""
    return json.loads(os.environ[WORDS]) if launched() and WORDS in os.environ else None


def leads() -> bool:
    """Return whether this is the process that writes progress, weights and metrics."""
    return not launched() or os.environ["RANK"] == "0"


def launch(arguments: list[str], processes: int, nodes: int) -> int:
    """Run ``convx <arguments>`` as ``processes`` processes on each of ``nodes`` nodes and return the exit code.

    One node is this one. Several are those of the Slurm job that this process runs in: `srun` starts one torchrun a node,
    and they meet at this one. A signal to end goes on to all.
    """
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        str(processes),
        "--nnodes",
        str(nodes),
    ]
    if nodes == 1:
        command += ["--standalone"]
    else:
        job = os.environ.get("SLURM_JOB_ID")
        if not job:
            raise ValueError(f"--nodes {nodes}: several nodes are those of a Slurm job, and this is none")
        with socket.socket() as free:
            free.bind(("", 0))
            meeting = f"{socket.gethostname()}:{free.getsockname()[1]}"
        command += ["--rdzv-backend", "c10d", "--rdzv-id", job, "--rdzv-endpoint", meeting]
        # One torchrun a node, with all that the job has there; --overlap, because this process has a step of its own.
        step = [
            "srun",
            "--overlap",
            "--jobid",
            job,
            "--nodes",
            str(nodes),
            "--ntasks",
            str(nodes),
            "--ntasks-per-node",
            "1",
        ]
        command = [*step, "--export=ALL", "--kill-on-bad-exit=1", *command]
    # The words travel in the environment: torchrun's parser takes `--start` for an abbreviation of one of its own.
    child = subprocess.Popen([*command, "-m", "convx"], env=os.environ | {WORDS: json.dumps(arguments)})
    before = {s: signal.signal(s, lambda number, _: child.send_signal(number)) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        return child.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# ------------------------------------------------------------------------------------------------------------------- batches


def share(count: int, parts: int, part: int) -> tuple[int, int]:
    """Return (first, behind the last) of the rows that one of ``parts`` equal parts of ``count`` rows has."""
    return part * count // parts, (part + 1) * count // parts


def draw(function, count: int, dim: int = 0):
    """Return ``function(n)``, random draws for n images along ``dim``, for the ``count`` images at hand.

    Where they are rows of a larger batch the draws are those of the whole batch, cut to these rows.
    """
    if _rows is None:
        return function(count)
    first, behind, whole = _rows
    assert behind - first == count, f"draws for {count} images, the rows at work are {behind - first}"
    return function(whole).narrow(dim, first, count)


@contextlib.contextmanager
def _at_work(rows: tuple[int, int, int] | None):
    global _rows
    before, _rows = _rows, rows
    try:
        yield
    finally:
        _rows = before


# --------------------------------------------------------------------------------------------------------------- the processes


class World:
    """The processes of one training as one of them sees them; ``size`` 1 where there is no other."""

    def __init__(self, wanted: str = "cpu"):
        self.rank, self.local, self.size, self.device, self.parallel = 0, 0, 1, None, None
        if not launched():
            return
        import datetime

        import torch

        self.rank, self.size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        self.local, cuda = int(os.environ["LOCAL_RANK"]), wanted != "cpu" and torch.cuda.is_available()
        if cuda and self.local >= torch.cuda.device_count():
            raise Failure(f"process {self.local} of this node has no GPU: there are {torch.cuda.device_count()}")
        self.device = torch.device("cuda", self.local) if cuda else torch.device("cpu")
        if cuda:
            torch.cuda.set_device(self.device)
        if not torch.distributed.is_initialized():
            # Long, because the first process may wait for an orphan that still trains this run.
            torch.distributed.init_process_group("nccl" if cuda else "gloo", timeout=datetime.timedelta(hours=12))

    def prepare(self, objective, splits_batch: bool):
        """Return the objective with batch normalisation over all processes, where there are several.

        A recorded failure where it could not train as in one process: an objective whose loss is no mean over images, or
        batch normalisation without GPUs, which torch cannot synchronise.
        """
        if self.size == 1:
            return objective
        from timm.layers import convert_sync_batchnorm  # torch's own loses the activation in timm's layers
        from torch import nn

        name = type(objective).__module__.rsplit(".", 1)[-1]
        if not splits_batch:
            raise Failure(f"objective {name} cannot share a batch among {self.size} processes; train it with one")
        if not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in objective.modules()):
            return objective
        if self.device.type != "cuda":
            raise Failure(
                f"batch normalisation over {self.size} processes needs GPUs; train this model with one process"
            )
        return convert_sync_batchnorm(objective)

    def parallel_step(self, objective):
        """Return what the loop calls for a step: the objective, or torch's wrapper that averages gradients."""
        if self.size == 1:
            return objective
        from torch.nn.parallel import DistributedDataParallel

        ids = [self.device.index] if self.device.type == "cuda" else None
        self.parallel = DistributedDataParallel(objective, device_ids=ids, gradient_as_bucket_view=True)
        return self.parallel

    def rows(self, index):
        """Return the part of a batch, any sequence of its rows, that this process has."""
        if self.size == 1:
            return index
        if len(index) < self.size:
            raise Failure(
                f"a batch of {len(index)} images cannot be shared by {self.size} processes; set drop_last: true"
            )
        first, behind = share(len(index), self.size, self.rank)
        return index[first:behind]

    def parts(self, images, labels, rng, whole: int, accumulate: int, purpose: str):
        """Yield (images, labels, rng, weight) of the parts of this process's rows of a batch of ``whole`` images.

        ``weight`` makes the sum of the parts' gradients, averaged over the processes, the gradient of the batch's mean.
        Gradients travel between processes once, with the last part. ``purpose`` names the step: what draws from the global
        stream draws differently in each process.
        """
        import torch

        if self.size == 1 and accumulate == 1:
            yield images, labels, rng, 1.0
            return
        first, behind = share(whole, self.size, self.rank)
        assert behind - first == len(images), f"{len(images)} images, {behind - first} expected of a batch of {whole}"
        if self.size > 1:
            torch.manual_seed(derive(self.rank, "process", purpose))
        count = min(accumulate, len(images))
        for part in range(count):
            low, high = share(len(images), count, part)
            draws = torch.Generator()
            draws.set_state(rng.get_state())
            rows, held = (first + low, first + high, whole), contextlib.nullcontext()
            if self.parallel is not None and part < count - 1:
                held = self.parallel.no_sync()
            with _at_work(rows), held:
                yield images[low:high], labels[low:high], draws, (high - low) * self.size / whole

    def total(self, sums: dict) -> dict:
        """Return named scalar tensors summed over all processes."""
        if self.size == 1 or not sums:
            return sums
        import torch

        values = torch.stack([torch.as_tensor(value, device=self.device).double() for value in sums.values()])
        torch.distributed.all_reduce(values)
        return dict(zip(sums, values.unbind()))

    def from_leader(self, value):
        """Return the leader's value of a Python object, e.g. the state it read, in every process."""
        if self.size == 1:
            return value
        import torch

        box = [value if leads() else None]
        torch.distributed.broadcast_object_list(box, device=self.device)
        return box[0]

    # Told to end, the first process saves after its step, which needs the others; they leave when it has.

    def saved(self) -> None:
        """Tell the other processes that they may leave."""
        if self.size > 1:
            _store().set("convx_saved", "yes")

    def leave_when_saved(self) -> None:
        """End this process as soon as the first one has saved, while it goes on helping with the step."""
        threading.Thread(target=_leave, args=(_store(),), daemon=True).start()


def _store():
    """Return the key-value store of the process group, which torchrun holds: it outlives the processes."""
    import torch

    return torch.distributed.distributed_c10d._get_default_store()


def _leave(store) -> None:
    import datetime

    with contextlib.suppress(Exception):  # whatever it is that keeps the answer away, it is time to go
        store.wait(["convx_saved"], datetime.timedelta(seconds=STOP_SECONDS))
    os._exit(143)


def join(wanted: str = "cpu") -> World:
    """Return the world of this process, joined once; ``wanted`` is the recipe's device (auto, cpu or cuda)."""
    global _world
    if _world is None:
        _world = World(wanted)
    return _world
