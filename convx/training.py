"""The training loop, one for all objectives: resume, schedule, EMA, history.

Same seed, device, versions, thread count, precision and memory format give the same bits, also when the run was killed and
continued: all random draws are keyed by (seed, purpose, epoch, step), and the state of the rest is kept in the progress
directory. Nothing in a step waits for the device; sums are read once an epoch.
"""

import csv
import hashlib
import os
import shutil
import signal
import time
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from convx import distributed, objectives
from convx.locking import acquire
from convx.manifest import Failure, atomic
from convx.runs import RunData, build_model, build_teacher, pick_device, save_weights, set_numerics
from convx.seeds import derive

SAVE_SECONDS = float(os.environ.get("CONVX_SAVE_SECONDS", "30"))  # between two states on disk
VALIDATION_BATCH = 1000
VALIDATION_PIXELS = 2**23  # of one batch, where large images make it smaller


def parameter_groups(model: nn.Module, training: dict) -> list[dict]:
    """Return the optimiser's groups; every parameter that needs a gradient is in exactly one.

    A module's ``param_groups()`` hook comes first (learning-rate factor, weight decay); the others decay, except
    normalisation parameters and biases where the recipe says so. Shared parameters count once.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    taken: set[int] = set()

    def put(parameter: nn.Parameter, decay: float, factor: float) -> None:
        if parameter.requires_grad and id(parameter) not in taken:
            taken.add(id(parameter))
            groups.setdefault((decay, factor), []).append(parameter)

    decay = training["weight_decay"]
    for module in model.modules():
        for group in module.param_groups() if hasattr(module, "param_groups") else []:
            own = group.get("weight_decay")
            for parameter in group["params"]:
                put(parameter, decay if own is None else own, group.get("lr_factor", 1.0))
    for parameter in model.parameters():
        small = parameter.ndim <= 1 and not training["decay_norm_and_bias"]
        put(parameter, 0.0 if small else decay, 1.0)
    return [{"params": p, "weight_decay": d, "lr_scale": f} for (d, f), p in groups.items()]


def make_optimizer(model: nn.Module, training: dict) -> torch.optim.Optimizer:
    """Build the optimiser through timm's factory, fused where torch has it."""
    from timm.optim import create_optimizer_v2

    groups = parameter_groups(model, training)
    if not groups:
        raise Failure("nothing to train: no parameter needs a gradient")
    name = training["optimizer"]
    fused = {"fused": True} if name in ("sgd", "momentum", "nesterov", "adam", "adamw") else {}
    optimizer = create_optimizer_v2(
        groups,
        opt=name,
        lr=training["lr"],
        weight_decay=training["weight_decay"],
        momentum=training["momentum"],
        **fused,
    )
    return optimizer


def make_scheduler(optimizer, training: dict, steps: int):
    """Build the schedule through timm's factory, counted in updates."""
    from timm.scheduler import create_scheduler_v2

    milestones = training["decay_milestones"]
    if training["schedule"] == "constant":
        milestones = [training["epochs"] + 1]
    scheduler, _ = create_scheduler_v2(
        optimizer,
        sched="multistep" if milestones else training["schedule"],
        num_epochs=max(1, training["epochs"]),
        decay_epochs=training["decay_epochs"],
        decay_milestones=milestones,
        decay_rate=training["decay_rate"],
        min_lr=training["min_lr"],
        warmup_lr=training["warmup_lr"],
        warmup_epochs=training["warmup_epochs"],
        step_on_epochs=False,
        updates_per_epoch=steps,
    )
    scheduler.step_update(0)
    return scheduler


@torch.inference_mode()
def validate(model: nn.Module, data: RunData, images: torch.Tensor, labels: torch.Tensor) -> tuple[float, float]:
    """Return (top-1 in percent, mean cross-entropy) of a model on a split that is on the device; processes share its batches."""
    was_training, world = model.training, distributed.join()
    model.eval()
    correct = torch.zeros((), dtype=torch.long, device=data.device)
    loss = torch.zeros((), dtype=torch.float64, device=data.device)
    normalise = data.normalise
    batch = max(1, min(VALIDATION_BATCH, VALIDATION_PIXELS // (images.shape[2] * images.shape[3])))
    for start in range(world.rank * batch, len(images), world.size * batch):
        logits = model(normalise(images[start : start + batch])).float()
        target = labels[start : start + batch]
        correct += (logits.argmax(1) == target).sum()
        loss += nn.functional.cross_entropy(logits, target, reduction="sum").double()
    model.train(was_training)
    found = world.total({"correct": correct, "loss": loss})
    return 100 * found["correct"].item() / len(images), found["loss"].item() / len(images)


class Progress:
    """The undeclared directory of one run's progress, owned by one process at a time: the first of those that share the run."""

    def __init__(
        self,
        root: str | Path,
        recipe: dict,
        source: str,
        data: str,
        start_weights: str | Path | None,
        teacher_weights: str | Path | None = None,
    ):
        start = hashlib.sha256(Path(start_weights).read_bytes()).hexdigest() if start_weights else ""
        parts = [recipe["digest"], source, data, start]
        if teacher_weights:
            parts.append(hashlib.sha256(Path(teacher_weights).read_bytes()).hexdigest())
        self.key = hashlib.sha256("/".join(parts).encode()).hexdigest()[:16]
        self.folder = Path(root) / self.key
        self.folder.mkdir(parents=True, exist_ok=True)
        self.leads = distributed.leads()
        self.file = self.folder / "state.pt"
        self.checkpoints = self.folder / "checkpoints"
        self.waited = False  # for another process, which may have done all

    def __enter__(self):
        if not self.leads:
            return self
        # An orphan of a killed workflow may still train this run; wait for it instead of writing beside it.
        busy = f"waiting for another process that trains this run ({self.folder})"
        self._lock = acquire(self.folder / "lock", busy)
        self.waited = self._lock.waited
        return self

    def __exit__(self, *_):
        if self.leads:
            self._lock.close()

    def save(self, state: dict) -> None:
        if not self.leads:
            return
        with atomic(self.file) as temporary, open(temporary, "wb") as file:
            torch.save(state, file)

    def load(self, device: torch.device, kept: list[int]) -> dict | None:
        """Return the state to continue from, or None: there is none, it cannot be read, or an epoch of ``kept`` is gone.

        A damaged state costs time, not the run; nothing in it is executed.
        """
        if not self.file.exists():
            return None
        try:
            state = torch.load(self.file, map_location=device, weights_only=True)
            done = state["epoch"]
        except Exception as error:  # torch raises a great many kinds for what is no archive of its own
            words = " ".join(str(error).split())[:120] or type(error).__name__
            print(f"starting over: {self.file} cannot be read ({words})", flush=True)
            return None
        gone = [epoch for epoch in kept if epoch <= done and not self.kept(epoch).exists()]
        if gone:
            print(f"starting over: the weights of epoch {gone[0]}, which are to be kept, were not", flush=True)
        return None if gone else state

    def kept(self, epoch: int) -> Path:
        """Return the file of the weights that are kept of an epoch."""
        return self.checkpoints / f"epoch{epoch}.safetensors"

    def done(self) -> None:
        """Remove the progress; the results are written."""
        if self.leads:
            shutil.rmtree(self.folder, ignore_errors=True)


def _rng_state(device: torch.device) -> dict:
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def _set_rng_state(state: dict, device: torch.device) -> None:
    torch.set_rng_state(state["cpu"].cpu())
    if device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"].cpu(), device)


class Trainer:
    """One run: model, objective, optimiser, schedule, history. ``fit`` trains it to the end of its recipe."""

    def __init__(
        self,
        recipe: dict,
        data_folder: str | Path,
        start_weights: str | Path | None = None,
        teacher_weights: str | Path | None = None,
    ):
        self.recipe, self.training = recipe, recipe["training"]
        set_numerics(self.training)
        self.world = distributed.join(recipe["device"])
        self.device = self.world.device or pick_device(recipe["device"])
        self.data = RunData.open(data_folder, recipe, self.device)
        model = build_model(recipe, self.data.meta, start_weights)
        teacher = build_teacher(recipe, self.data.meta, teacher_weights)
        objective = objectives.create(model, recipe, self.data, teacher).to(self.device)
        self.objective = self.world.prepare(objective, objective.splits_batch)
        if self.training["channels_last"]:
            self.objective.to(memory_format=torch.channels_last)
        torch.manual_seed(derive(recipe["seed"], "train"))  # dropout and the like
        self.batches = self.data.train_batches(recipe["seed"])
        self.batches.rows = self.world.rows
        self.validation = self.data.split("validation")
        self.optimizer = make_optimizer(self.objective, self.training)
        self.scheduler = make_scheduler(self.optimizer, self.training, self.batches.steps)
        self.ema = None
        if self.training["ema"]:
            from timm.utils import ModelEmaV3

            self.ema = ModelEmaV3(self.objective.exported(), decay=self.training["ema"])
        self.step_function = self.world.parallel_step(self.objective)
        if self.training["compile"] != "none":
            self.step_function = torch.compile(self.step_function, mode=self.training["compile"])
        self.after_step = [
            m.after_step for m in self.objective.modules() if m is not self.objective and hasattr(m, "after_step")
        ]
        self.auxiliary = [m.auxiliary_loss for m in self.objective.modules() if hasattr(m, "auxiliary_loss")]
        self.history: list[dict] = []
        self.epoch = self.step = 0
        self.seconds = 0.0
        self.sums: dict[str, torch.Tensor] = {}
        self._stop = False

    def exported(self) -> nn.Module:
        """Return the model that is saved: the average where the recipe keeps one."""
        return self.ema.module if self.ema else self.objective.exported()

    def state(self) -> dict:
        return {
            "objective": self.objective.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "ema": self.ema.module.state_dict() if self.ema else None,
            "rng": _rng_state(self.device),
            "history": self.history,
            "epoch": self.epoch,
            "step": self.step,
            "seconds": self.seconds,
            "sums": self.sums,
        }

    def restore(self, state: dict) -> None:
        self.objective.load_state_dict(state["objective"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.ema:
            self.ema.module.load_state_dict(state["ema"])
        _set_rng_state(state["rng"], self.device)
        for name in ("history", "epoch", "step", "seconds", "sums"):
            setattr(self, name, state[name])
        self.sums = {k: v.to(self.device) if isinstance(v, torch.Tensor) else v for k, v in self.sums.items()}
        self.scheduler.step_update(self.epoch * self.batches.steps + self.step)

    def train_step(self, images, labels, rng) -> None:
        """One update; nothing here waits for the device."""
        progress = (self.epoch + self.step / self.batches.steps) / self.training["epochs"]
        bf16 = self.training["precision"] == "bf16"
        self.optimizer.zero_grad(set_to_none=True)
        for part in self._parts(images, labels, rng):
            images, labels, rng, weight = part
            with torch.autocast(self.device.type, torch.bfloat16, enabled=bf16):
                loss, sums = self.step_function(images, labels, rng, progress)
            for term in self.auxiliary:
                extra = term(progress)
                if extra is not None:
                    loss = loss + extra
            self.objective.backward(loss if weight == 1 else weight * loss)
            self._count(sums, len(images))
        if self.training["clip_grad"]:
            self.objective.clip_gradients(self.training["clip_grad"])
        self.objective.before_step(self.optimizer, progress)
        self.optimizer.step()
        with torch.no_grad():
            for hook in self.after_step:
                hook()
            self.objective.after_step(progress)
        if self.ema:
            self.ema.update(self.objective.exported())

    def _parts(self, images, labels, rng):
        """Yield the parts that a step is done in: one, unless the recipe accumulates gradients or processes share it."""
        size, (accumulate, seed) = self.training["batch_size"], (self.training["accumulate"], self.recipe["seed"])
        whole = min(size, len(self.batches.images) - self.step * size) if self.world.size > 1 else len(images)
        return self.world.parts(images, labels, rng, whole, accumulate, f"{seed}.{self.epoch}.{self.step}")

    def _count(self, sums: dict, images: int) -> None:
        """Add what a part of a step says to the sums of the epoch, over all processes."""
        for name, value in self.world.total(sums | {"images": images}).items():
            self.sums[name] = self.sums[name] + value if name in self.sums else value

    def close_epoch(self) -> None:
        """Add one row to the history; the only place that waits for the device."""
        row = {
            "epoch": self.epoch,
            "lr": self.optimizer.param_groups[0]["lr"] / self.optimizer.param_groups[0]["lr_scale"],
        }
        images = int(self.sums.pop("images", 0))
        for name, value in self.sums.items():
            mean = float(value) / images
            row["train_top1" if name == "correct" else f"train_{name}"] = 100 * mean if name == "correct" else mean
        if images and not torch.isfinite(torch.tensor(row["train_loss"])):
            raise Failure(f"the training loss is not finite in epoch {self.epoch}")
        if len(self.validation[0]):
            row |= self._validation()
        for name, module in self.objective.named_modules():
            for key, value in (module.diagnostics() if hasattr(module, "diagnostics") else {}).items():
                row[f"{name.removeprefix('model.')}.{key}" if name else key] = value
        row["seconds"] = round(self.seconds, 3)
        self.history.append(row)
        self.objective.check(row)
        self.sums = {}

    def _validation(self) -> dict:
        own = self.objective.validation(self.exported(), self.data, *self.validation)
        if own is not None:
            return own
        top1, loss = validate(self.exported(), self.data, *self.validation)
        return {"validation_top1": top1, "validation_loss": loss}

    def fit(self, progress: Progress) -> None:
        """Train to the end, from the progress that is there.

        The weights at the recipe's ``checkpoints`` are kept below the progress directory: a declared output would be
        removed by the workflow when the job is killed.
        """
        device = self.device if self.world.size == 1 else torch.device("cpu")
        kept = self.training["checkpoints"]
        if state := self.world.from_leader(progress.load(device, kept) if progress.leads else None):
            self.restore(state)
            print(f"continuing at epoch {self.epoch}, step {self.step}", flush=True)
        previous = signal.signal(signal.SIGTERM, self._terminate)
        try:
            self._fit(progress)
        finally:
            signal.signal(signal.SIGTERM, previous)

    def _terminate(self, *_) -> None:
        if distributed.leads():
            self._stop = True
        else:
            self.world.leave_when_saved()

    def _fit(self, progress: Progress) -> None:
        epochs, steps = self.training["epochs"], self.batches.steps
        bar = tqdm(
            total=epochs * steps,
            initial=self.epoch * steps + self.step,
            unit="step",
            mininterval=2,
            desc=self.recipe["variant"],
            disable=not progress.leads,
        )
        if not self.history:
            self.close_epoch()  # epoch 0: before any update
            self._keep(progress)
        self.objective.train()
        clock = saved = time.perf_counter()
        while self.epoch < epochs:
            for step, images, labels, rng in self.batches.epoch(self.epoch, self.step):
                self.train_step(images, labels, rng)
                self.step = step + 1
                self.scheduler.step_update(self.epoch * steps + self.step)
                bar.update()
                now = time.perf_counter()
                if self._stop or now - saved > SAVE_SECONDS:
                    self.seconds += now - clock
                    progress.save(self.state())
                    clock = saved = time.perf_counter()
                    if self._stop:
                        self.world.saved()
                        raise SystemExit(143)
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            now = time.perf_counter()
            self.seconds += now - clock
            self.epoch, self.step = self.epoch + 1, 0
            self.close_epoch()
            bar.set_postfix(
                {k: f"{self.history[-1][k]:.2f}" for k in ("train_loss", "validation_top1") if k in self.history[-1]}
            )
            self._keep(progress)
            clock = time.perf_counter()
        bar.close()

    def _keep(self, progress: Progress) -> None:
        if progress.leads and self.epoch in self.training["checkpoints"]:
            save_weights(self.exported(), progress.kept(self.epoch))


def write_history(path: str | Path, history: list[dict]) -> None:
    """Write the history as CSV: one row an epoch, epoch 0 is before any update."""
    columns = list(dict.fromkeys(key for row in history for key in row)) or ["epoch"]
    with atomic(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(history)
