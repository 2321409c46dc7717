"""The steps of a run, one function for each rule of the workflow: what the command line calls."""

import contextlib
import json
import os
import shutil
from pathlib import Path

from convx import devices, distributed
from convx.checks import ConfigError
from convx.manifest import Failure, MetricsFile, atomic, environment, failure_reason, read_json, write_json
from convx.records import read_recipe, read_record, weights_failure

FAILURE_FILE = "CONVX_FAILURE_FILE"  # where one of several processes leaves why the run failed
CORRUPTION_SEED = 0  # of the regenerated sets; the same for every study, so that they can be shared


def data(settings: dict, mirrors: list[str], out: str) -> None:
    """Prepare a data set as uint8 arrays."""
    from convx.data import prepare

    prepare(settings, Path(out).parent, mirrors=mirrors, progress=True)


def corrupt(wanted: dict, data: str, out: str, workers: int) -> None:
    """Build the corrupted test images of a data set once."""
    from convx.data import open_set
    from convx.data.corruptions import build, open_official, verified_folder

    images, labels = open_set(Path(data).parent).split("test")
    if wanted["protocol"] == "official":
        folder = verified_folder(wanted["path"], Path(out).parent)
        arrays = any(folder.glob("*.npy"))  # CIFAR-C: its labels must be those of the clean images
        open_official(folder, **({"clean_labels": labels, "images": len(labels)} if arrays else {}))
        write_json(out, {"official": str(folder.resolve())})
        return
    workers = min(workers, os.cpu_count() or 1)
    names, severities = wanted["corruptions"], sorted(wanted["severities"])
    build(
        images[: wanted["images"]],
        wanted["protocol"],
        names,
        severities,
        Path(out).parent,
        CORRUPTION_SEED,
        workers,
    )


def train(
    recipe_file: str,
    data: str,
    start: str | None,
    source: str,
    carbon: dict,
    out: str,
    progress_root: str,
    processes: int = 1,
    nodes: int = 1,
    teacher: str | None = None,
) -> None:
    """Train one run: weights, kept checkpoints, history, metrics. With more than one process or node they share its batches.

    Its progress goes when all of these are there.
    """
    recipe = read_recipe(recipe_file)
    model_file = Path(out)
    study_folder, variant, seed = model_file.parents[3], model_file.parents[1].name, model_file.parent.name
    history_file = study_folder / "histories" / variant / f"{seed}.csv"
    checkpoints = model_file.parent / "checkpoints"
    metrics_file = study_folder / "metrics" / variant / seed / "training.json"
    data_digest = _data_digest(data)
    digests = {"source_digest": source, "data_digest": data_digest}
    metrics = MetricsFile(metrics_file, "training", recipe, **digests)
    if processes * nodes > 1 and not distributed.launched():
        words = ["train", recipe_file, "--data", data, "--start", start or "", "--source", source]
        words += ["--carbon", json.dumps(carbon), "--out", out, "--progress", progress_root]
        _launch(words, recipe["device"], processes, nodes, metrics, model_file, history_file)
        return
    with contextlib.ExitStack() as held:
        if not distributed.launched():
            held.enter_context(devices.claim(recipe["device"]))
        from convx.evaluate.energy import Meter
        from convx.runs import save_failed, save_weights
        from convx.training import Progress, Trainer, write_history

        devices.keep_freed_memory()
        checkpoints.mkdir(parents=True, exist_ok=True)
        progress, hopeless = None, False
        with metrics if distributed.leads() else contextlib.nullcontext():
            trainer = None
            try:
                start_weights = _start_weights(recipe, start)
                progress = held.enter_context(
                    Progress(progress_root, recipe, source, data_digest, start_weights, teacher)
                )
                if progress.waited and (record := _done_meanwhile(recipe, digests, metrics_file, model_file)):
                    metrics.rows, metrics.environment = record["rows"], record["environment"]
                    progress.done()
                    return
                trainer = Trainer(recipe, Path(data).parent, start_weights, teacher)
                with Meter(carbon, device=str(trainer.device), scope="process") as meter:
                    trainer.fit(progress)
                meter.add_up(trainer.world)
                if not distributed.leads():
                    return
                save_weights(trainer.exported(), model_file)
                for name, companion in trainer.objective.companions().items():
                    save_weights(companion, checkpoints / f"{name}.safetensors")
                write_history(history_file, trainer.history)
                for file in progress.checkpoints.glob("*.safetensors"):
                    with atomic(checkpoints / file.name) as temporary:  # a copy: what is killed here is done again
                        shutil.copyfile(file, temporary)
            except Exception as error:
                if (reason := failure_reason(error)) is not None:
                    hopeless = isinstance(error, Failure) and trainer is not None  # it would fail again in the same way
                    if distributed.leads():
                        write_history(history_file, trainer.history if trainer else [])
                    if distributed.launched():
                        if hopeless:
                            progress.done()
                        _tell(reason)
                    save_failed(model_file, reason)
                raise
            last = trainer.history[-1]
            facts = {"device": str(trainer.device), "precision": recipe["training"]["precision"]}
            facts |= {"processes": trainer.world.size} if trainer.world.size > 1 else {}
            metrics.environment = environment(channels_last=recipe["training"]["channels_last"], **facts)
            seconds = last["seconds"]
            metrics.add("train_seconds", seconds, "s", method="wall clock of the updates")
            images = len(trainer.batches.images) * recipe["training"]["epochs"]
            if seconds:
                metrics.add(
                    "train_images_per_second",
                    images / seconds,
                    "images/s",
                    method="wall clock of the updates",
                )
            for name in ("train_top1", "validation_top1"):
                if name in last:
                    metrics.add(f"final_{name}", last[name], "%", split=name.split("_")[0], method="last epoch")
            metrics.rows += meter.rows("training")
        if progress is not None and (hopeless or not metrics.failed):
            progress.done()


def _done_meanwhile(recipe: dict, digests: dict, metrics_file: Path, model_file: Path) -> dict | None:
    """Return the record of this very training where the process that was waited for has finished it."""
    if distributed.launched() or not (metrics_file.exists() and model_file.exists()):
        return None  # of several processes the others wait for this one
    record = read_record(metrics_file)
    same = record["recipe_digest"] == recipe["digest"] and all(record.get(k) == v for k, v in digests.items())
    return record if same and record["status"] == "ok" else None


def _launch(
    words: list[str],
    device: str,
    processes: int,
    nodes: int,
    metrics: MetricsFile,
    model_file: Path,
    history_file: Path,
) -> None:
    """Let several processes train the run; the first of them writes its results, and a failure of any is recorded here."""
    told = model_file.with_name(".failure")  # beside the weights: processes on other nodes must reach it
    told.parent.mkdir(parents=True, exist_ok=True)
    told.unlink(missing_ok=True)
    os.environ[FAILURE_FILE] = str(told.absolute())
    # On several nodes the batch system gives each its devices.
    with devices.claim(device, count=processes) if nodes == 1 else contextlib.nullcontext():
        code = distributed.launch(words, processes, nodes)
    if code == 0:
        return
    if not told.exists():
        raise SystemExit(code if code > 0 else 128 - code)
    from convx.runs import save_failed
    from convx.training import write_history

    with metrics:
        reason = told.read_text(encoding="utf-8")
        told.unlink()
        save_failed(model_file, reason)
        if not history_file.exists():
            write_history(history_file, [])
        raise Failure(reason)


def _tell(reason: str) -> None:
    """Leave the reason of a failure for the process that started this one, and end; the first reason stays."""
    told = Path(os.environ[FAILURE_FILE])
    if not told.exists():
        with atomic(told) as temporary:
            temporary.write_text(reason, encoding="utf-8")
    raise SystemExit(1)


def _start_weights(recipe: dict, start: str | None) -> Path | None:
    """Return the weights a run starts from: the file given, or the kept epoch beside it; a failed start is a failure."""
    if not recipe["start"]:
        return None
    if (at_epoch := recipe["start"]["at_epoch"]) is None:
        return Path(start)
    kept = Path(start).parent / "checkpoints" / f"epoch{at_epoch}.safetensors"
    if not kept.exists():
        why = weights_failure(start) or f"{kept} is missing; `convx retry` the start"
        raise Failure(f"the training it needs failed: {why}")
    return kept


def _data_digest(meta_file: str) -> str:
    meta = read_json(meta_file)
    if not isinstance(meta, dict) or not isinstance(meta.get("digest"), str):
        raise ConfigError(f"{meta_file}: not the meta data of a prepared set; prepare it again")
    return meta["digest"]


def evaluate(
    recipe_file: str, model: str, data: str, corrupted: str | None, settings: dict, source: str, out: str
) -> None:
    """Evaluate one run under every condition in one process."""
    recipe = read_recipe(recipe_file)
    with devices.claim(recipe["device"]):
        from convx.evaluate.run import evaluate_run
        from convx.runs import build_model, load_weights, pick_device, set_numerics

        digests = {"source_digest": source, "data_digest": _data_digest(data)}
        with MetricsFile(out, "evaluation", recipe, **digests) as metrics:
            set_numerics(recipe["training"])
            device = pick_device(recipe["device"])
            meta = read_json(data)
            network = load_weights(build_model(recipe, meta, pretrained=False), model)
            settings = settings | {"checkpoints": str(Path(model).parent / "checkpoints")}
            result = evaluate_run(
                network, recipe, Path(data).parent, corrupted and Path(corrupted).parent, settings, device
            )
            metrics.rows += result.rows
            metrics.per_image, metrics.arrays = result.per_image, result.arrays
            metrics.environment = environment(device=str(device))


def evaluate_given(model: str, weights: str, data: str, out: str | None, **settings) -> str:
    """Test any model on a folder of images; write the metrics as JSON where wanted and return them as a table."""
    with devices.claim(settings["device"]):
        from convx.evaluate import given

        found = given.run(model, weights, data, **settings)
        found["environment"] = environment(device=settings["device"])
    if out:
        write_json(out, found)
    shown = found["preprocessing"] | {"weights": f"{weights} (sha256 {found['weights_sha256'][:16]})"}
    head = f"{found['model']} on {found['images']} images of {data}"
    lines = [f"  {name}: {value}" for name, value in shown.items()]
    values = [f"{row['metric']:<12} {row['value']:>14,.6g} {row['unit']}" for row in found["rows"]]
    return "\n".join([head, *lines, *values])


def measure(
    recipe_file: str, model: str, reference: list[str], data: str, settings: dict, source: str, out: str
) -> None:
    """Measure latency, paired with the baseline, and the energy of inference, on a device that the job owns."""
    recipe = read_recipe(recipe_file)
    with devices.claim(recipe["device"], whole=True):
        from convx.evaluate.run import measure_run
        from convx.runs import build_model, load_weights, pick_device, set_numerics

        with MetricsFile(out, "cost", recipe, source_digest=source, data_digest=_data_digest(data)) as metrics:
            set_numerics(recipe["training"])
            device = pick_device(recipe["device"])
            meta = read_json(data)
            networks = {recipe["variant"]: load_weights(build_model(recipe, meta, pretrained=False), model)}
            if reference:
                base = read_recipe(reference[0])
                networks[base["variant"]] = load_weights(build_model(base, meta, pretrained=False), reference[1])
            result = measure_run(networks, recipe, meta, settings, device, Path(data).parent)
            metrics.rows += result.rows
            metrics.arrays = result.arrays
            metrics.environment = environment(device=str(device))
