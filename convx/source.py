"""What the code says, read as text: source digests of a run, and the signatures of the surgery verbs. No torch.

A digest covers the syntax tree, so comments, docstrings and white space change nothing. It covers the core that every run
uses and, of models, objectives, surgery and layers, what the run's recipe names: an edit in one paper's layer reruns the
variants of that paper and no others. An evaluation also rests on the evaluator of its variant's paper and what that imports.
"""

import ast
import hashlib
import re
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

from convx import VERBS
from convx.arguments import LIMITS

PACKAGE = Path(__file__).resolve().parent
CORE = {
    "train": [
        "training.py",
        "distributed.py",
        "seeds.py",
        "runs.py",
        "data/batches.py",
        "data/loader.py",
        "models/__init__.py",
        "objectives/__init__.py",
    ],
    "evaluate": [
        *(
            f"evaluate/{name}.py"
            for name in ("__init__", "run", "payload", "accuracy", "corruption", "attacks", "cost", "kernels")
        ),
        "runs.py",
        "models/__init__.py",
    ],
    "measure": [
        *(f"evaluate/{name}.py" for name in ("__init__", "run", "latency", "energy")),
        "runs.py",
        "models/__init__.py",
    ],
    "data": [f"data/{name}.py" for name in ("prepare", "readers", "sets", "splits", "pixels", "folder")],
    "corrupt": ["data/corruptions"],
    "report": [
        "report",
        "papers",
        *(
            f"{name}.py"
            for name in ("claims", "ledger", "evidence", "verdicts", "statistics", "intervals", "resampling")
        ),
    ],
    "exact": ["claims.py", "papers", "layers", "models", "surgery.py"],
}


class _Strip(ast.NodeTransformer):
    """Drop docstrings, so that editing one reruns nothing."""

    def _visit(self, node):
        self.generic_visit(node)
        body = node.body
        if body and isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant):
            node.body = body[1:] or [ast.Pass()]
        return node

    visit_Module = visit_FunctionDef = visit_ClassDef = visit_AsyncFunctionDef = _visit


@lru_cache
def _tree(relative: str) -> ast.Module:
    return _Strip().visit(ast.parse((PACKAGE / relative).read_text(encoding="utf-8")))


@lru_cache
def _file_digest(relative: str) -> str:
    path = PACKAGE / relative
    if path.is_dir():
        parts = [_file_digest(p.relative_to(PACKAGE).as_posix()) for p in sorted(path.rglob("*.py"))]
        return hashlib.sha256("".join(parts).encode()).hexdigest()
    return hashlib.sha256(ast.dump(_tree(relative)).encode()).hexdigest()


def _imported(node: ast.AST, package: str) -> set[str]:
    """Return the files of ``convx/<package>/`` (``a/b`` is a package too) that a piece of code imports, relative to convx."""
    files, dotted = set(), f"convx.{package}".replace("/", ".").rstrip(".")
    folder = f"{package}/" if package else ""
    for entry in ast.walk(node):
        if isinstance(entry, ast.ImportFrom):
            module = entry.module or ""
            if entry.level == 1:
                names = [module.split(".")[0]] if module else [alias.name for alias in entry.names]
            elif module == dotted:
                names = [alias.name for alias in entry.names]
            elif module.startswith(f"{dotted}."):
                names = [module.removeprefix(f"{dotted}.").split(".")[0]]
            else:
                continue
        elif isinstance(entry, ast.Import):
            starts = [alias.name for alias in entry.names if alias.name.startswith(f"{dotted}.")]
            names = [name.removeprefix(f"{dotted}.").split(".")[0] for name in starts]
        else:
            continue
        files |= {f"{folder}{name}.py" for name in names if (PACKAGE / package / f"{name}.py").exists()}
    return files


@lru_cache
def _layers_of(relative: str) -> frozenset[str]:
    """Return the layer files that a file imports, directly or through other layer files."""
    found, queue = set(), [relative]
    while queue:
        new = _imported(_tree(queue.pop()), "layers") - found
        found |= new
        queue += new
    return frozenset(found)


@lru_cache
def _data_of(relative: str) -> frozenset[str]:
    """Return the files of data/ that an objective imports, directly or through other ones."""
    found, queue = set(), [relative]
    while queue:
        new = _imported(_tree(queue.pop()), "data") - found
        found |= new
        queue += new
    return frozenset(found)


@lru_cache
def _evaluator_of(paper: str, which: str = "evaluate") -> frozenset[str]:
    """Return evaluate.py (or measure.py) of a paper's folder, if it has one, with what it imports that decides numbers.

    That is: of its folder, of evaluate/, of layers/, and the two files at the top that are no bookkeeping.
    """
    folder = f"papers/{paper}"
    queue = [f"{folder}/{which}.py"] if (PACKAGE / folder / f"{which}.py").exists() else []
    found = set(queue)
    while queue:
        tree = _tree(queue.pop())
        new = {file for package in (folder, "evaluate", "layers") for file in _imported(tree, package)}
        new = (new | (_imported(tree, "") & {"replacing.py", "seeds.py"})) - found
        found |= new
        queue += new
    return frozenset(found)


@lru_cache
def _surgery_parts() -> tuple[str, dict[str, tuple[str, frozenset[str]]]]:
    """Return the digest of what all verbs share in surgery.py, and {verb: (digest of its function, its layer files)}."""
    shared, verbs = [_file_digest("replacing.py")], {}
    for node in _tree("surgery.py").body:
        if isinstance(node, ast.FunctionDef) and node.name in VERBS:
            layers = set(_imported(node, "layers"))
            for file in set(layers):
                layers |= _layers_of(file)
            verbs[node.name] = (hashlib.sha256(ast.dump(node).encode()).hexdigest(), frozenset(layers))
        elif not isinstance(node, ast.Import | ast.ImportFrom | ast.Assign | ast.AnnAssign):
            shared.append(ast.dump(node))
    return hashlib.sha256("".join(shared).encode()).hexdigest(), verbs


def _parts(recipe: dict) -> list[str]:
    """Return the digests of what one recipe names: its model family, objective, verbs, layers, and those of its start."""
    from convx.models import family, user_function

    shared, verbs = _surgery_parts()
    files, parts = set(), []
    if own := user_function(recipe["model"]["name"]):
        parts.append(hashlib.sha256(own[0].read_bytes()).hexdigest())
    elif name := family(recipe["model"]["name"]):
        files |= {f"models/{name}.py"} | _layers_of(f"models/{name}.py")
    if recipe["model"].get("weights"):
        files.add("models/pretrained.py")
    objective = f"objectives/{recipe['objective']['name']}.py"
    own_data = {file for file in _data_of(objective) if file not in CORE["train"]}
    files |= {objective} | _layers_of(objective) | own_data
    for step in recipe["surgery"]:
        function, layers = verbs[step["verb"]]
        parts.append(function)
        files |= layers
        if step["verb"] == "custom":
            parts.append(hashlib.sha256(user_function(step["function"])[0].read_bytes()).hexdigest())
    if recipe["surgery"]:
        parts.append(shared)
    if recipe["model"]["settings"].get("input_size"):
        files.add("models/enlarge.py")
    for other in filter(None, (recipe["start"], recipe.get("teacher"))):
        parts += _parts(other["recipe"])
    return [*parts, *(_file_digest(file) for file in sorted(files))]


@lru_cache
def ledger_digest() -> str:
    """Return the digest of the claims' ledgers."""
    files = sorted((PACKAGE / "papers").glob("*/claims.yaml"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]


def source_digest(verb: str, recipe: dict | None = None) -> str:
    """Return the digest of the code that decides the numbers of one step ("train", "evaluate", ...) of one run."""
    parts = [_file_digest(file) for file in CORE[verb]]
    if recipe is not None:
        parts += _parts(recipe)
        if verb in ("evaluate", "measure"):
            parts += [_file_digest(file) for file in sorted(_evaluator_of(recipe.get("paper") or "", verb))]
    return hashlib.sha256("".join(parts).encode()).hexdigest()[:16]


@lru_cache
def surgery_signatures() -> tuple[dict[str, dict[str, list | None]], dict[str, tuple]]:
    """Return {verb: {argument: its ``Literal`` choices or None}}, from surgery.py's text, and the bounds in ``LIMITS``."""
    verbs = {}
    for node in _tree("surgery.py").body:
        if isinstance(node, ast.FunctionDef) and node.name in VERBS:
            arguments = [*node.args.args[1:], *node.args.kwonlyargs]
            verbs[node.name] = {a.arg: _choices(a.annotation) for a in arguments}
    return verbs, LIMITS


@lru_cache
def objective_settings(name: str) -> dict[str, tuple] | None:
    """Return the ``SETTINGS`` of an objective (name -> default, bounds or choices), or None where its file has none.

    Raises ``ValueError`` for an objective without a file.
    """
    file = f"objectives/{name}.py"
    if not re.fullmatch(r"[a-z]\w*", str(name)) or not (PACKAGE / file).exists():
        known = sorted(p.stem for p in (PACKAGE / "objectives").glob("*.py") if p.stem != "__init__")
        raise ValueError(f"name: {name!r} is unknown; choose one of {', '.join(known)}")
    for node in _tree(file).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "SETTINGS":
            return ast.literal_eval(node.value)
    return None


@lru_cache
def takes_teacher(objective: str) -> bool:
    """Return whether an objective can learn from a trained model: its ``create`` has an argument ``teacher``."""
    body = _tree(f"objectives/{objective}.py").body
    create = next(node for node in body if isinstance(node, ast.FunctionDef) and node.name == "create")
    return "teacher" in [argument.arg for argument in create.args.args]


def _choices(annotation: ast.expr | None) -> list | None:
    for node in ast.walk(annotation) if annotation is not None else []:
        if isinstance(node, ast.Subscript) and getattr(node.value, "id", getattr(node.value, "attr", "")) == "Literal":
            values = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
            optional = any(isinstance(n, ast.Constant) and n.value is None for n in ast.walk(annotation))
            return [v.value for v in values] + ([None] if optional else [])
    return None


@lru_cache
def optimizer_names() -> frozenset[str]:
    """Return the optimisers that timm's factory knows, read from its source; empty where that cannot be found."""
    spec = find_spec("timm")
    file = spec and Path(spec.origin).parent / "optim" / "_optim_factory.py"
    if not file or not file.exists():
        return frozenset()
    return frozenset(re.findall(r"OptimInfo\(\s*name=['\"](\w+)['\"]", file.read_text(encoding="utf-8")))


@lru_cache
def splitting_objectives() -> frozenset[str]:
    """Return the objectives that may take a batch in parts (``splits_batch = True``), read from their source."""
    files = (PACKAGE / "objectives").glob("*.py")
    pattern = re.compile(r"^    splits_batch = True$", re.MULTILINE)
    return frozenset(file.stem for file in files if pattern.search(file.read_text(encoding="utf-8")))
