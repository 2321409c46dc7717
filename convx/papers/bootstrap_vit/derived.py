"""What follows from several runs of a study: how soon a ViT is as accurate as the plain one ends. No torch.

The report adds these rows to the table of runs, so that claims can rest on them.
"""

REFERENCE = "vit"
COLUMN = "validation_top1"


def rows(results) -> list[dict]:
    """Return ``convergence`` of every ViT of this paper that left a validation curve, seed by seed, in percent of its epochs.

    The first epoch whose validation accuracy is at least the last one of the plain ViT with the same seed, over the epochs
    that the run trains; of the plain ViT itself too. A run that never gets there counts as all its epochs, and its method
    says so. ``results`` is a :class:`convx.report.results.Results`.
    """
    from convx import config

    found = []
    if REFERENCE not in results.variants:
        return found
    for name in results.variants:
        if config.declaration(results.study, name)["paper"] != "bootstrap_vit":
            continue
        for seed in results.seeds(name):
            reached = _reached(_curve(results, REFERENCE, seed), _curve(results, name, seed))
            if reached is None:
                continue
            value, method = reached
            row = {"metric": "convergence", "value": value, "unit": "% of epochs", "n": None, "split": "validation"}
            found.append({"variant": name, "seed": seed, "method": method, "conditions": {}} | row)
    return found


def _curve(results, name: str, seed: int):
    history = results.history(name, seed)
    if history is None or COLUMN not in history or len(history) < 2:
        return None
    return history[COLUMN].to_numpy(dtype=float)


def _reached(reference, curve) -> tuple[float, str] | None:
    """Return (percent of the epochs, how), or None where there is no curve; the entry of epoch 0 stands first."""
    if reference is None or curve is None:
        return None
    target, epochs = reference[-1], len(curve) - 1
    reached = [epoch for epoch, top1 in enumerate(curve) if top1 >= target]
    if not reached:
        return 100.0, f"the plain ViT's final {target:.2f} % on validation was never reached in {epochs} epochs"
    return 100 * reached[0] / epochs, f"first epoch at the plain ViT's final {target:.2f} % on validation, of {epochs}"
