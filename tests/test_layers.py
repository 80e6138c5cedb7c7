"""The arrows of import, what may be imported at a module's top, and rules on tests themselves."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "glabench"
HEAVY = {"torch", "triton", "transformers", "matplotlib", "numpy", "pandas", "psutil", "rich"}
HEAVY |= {"datasets", "lm_eval"}
HEAVY_FILES = {
    "inputs",
    "measure",
    "ceilings",
    "footprint",
    "oracle",
    "oracle_long",
    "kernels",
    "models",
    "runners/cells",
    "runners/checking",
    "runners/tune_cells",
    "runners/step_models",
    "runners/steps",
    "corpus/manifest",
    "corpus/shards",
    "corpus/tokenizer",
    "quality/documents",
    "quality/intervals",
    "quality/repeats",
    "quality/loading",
    "quality/scoring",
    "quality/mqar",
    "quality/recall",
    "quality/recall_model",
    "training/checkpoint",
    "training/loop",
    "training/optimizer",
    "training/order",
    "training/processes",
    "training/segments",
    "quality/harness",
    "quality/vocabulary",
}
ARROWS = {  # layer: what it may import; docs/ARCHITECTURE.md draws the same
    "__init__": "",
    "errors": "",
    "stats": "",
    "tables": "",
    "worker": "",
    "nvml": "",
    "oracle_long": "",
    "installed": "errors",
    "cases": "errors",
    "suite": "errors cases",
    "cost": "errors cases",
    "rows": "errors",
    "results": "errors rows",
    "env": "errors results rows installed kernels",
    "registry": "errors installed",
    "pool": "worker",
    "progress": "cases rows",
    "meter": "",
    "corpus": "errors installed meter results",
    "training": "errors installed meter results corpus models",
    "quality": "errors results rows paper installed registry worker corpus models training",
    "measure": "nvml stats",
    "ceilings": "",
    "footprint": "errors nvml",
    "inputs": "errors cases",
    "oracle": "errors oracle_long",
    "kernels": "errors installed",
    "models": "errors installed registry kernels",
    "impls": "registry installed kernels",
    "paper": "",
    "figures": "errors results rows quality paper",
    "report": "errors results rows figures quality paper",
    "runners": "errors cases suite cost results env registry installed pool worker stats tables "
    "measure ceilings footprint nvml inputs oracle models meter corpus training "
    "quality report rows kernels",
    "cli": "errors runners report progress",
    "__main__": "cli",
}


def layer(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def modules(tree: ast.AST):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module
            if node.module == "glabench":
                yield from (f"glabench.{alias.name}" for alias in node.names)


FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_follow_the_arrows(path):
    mine = layer(path)
    assert mine in ARROWS, f"{mine} has no line in ARROWS"
    allowed = set(ARROWS[mine].split()) | {mine}
    used = {m.split(".")[1] for m in modules(ast.parse(path.read_text())) if m.startswith("glabench.")}
    used.discard("__version__")
    assert used <= allowed, f"{path.name} imports {sorted(used - allowed)}"


def test_the_arrows_have_no_cycle():
    def reach(start, seen=()):
        for name in ARROWS[start].split():
            assert name not in seen, (*seen, name)
            reach(name, (*seen, name))

    for name in ARROWS:
        reach(name, (name,))


def is_heavy(path: Path) -> bool:
    spot = str(path.relative_to(PACKAGE).with_suffix(""))
    return any(spot == heavy or spot.startswith(heavy + "/") for heavy in HEAVY_FILES)


LIGHT_FILES = [path for path in FILES if not is_heavy(path)]


@pytest.mark.parametrize("path", LIGHT_FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_light_files_import_nothing_heavy_at_the_top(path):
    tree = ast.parse(path.read_text())
    top = {m.split(".")[0] for node in tree.body for m in modules(node) if not _is_def(node)}
    assert not top & HEAVY


def _is_def(node: ast.AST) -> bool:
    return isinstance(node, ast.FunctionDef | ast.ClassDef)


def test_modules_keep_their_size():
    long = {
        p.name: n
        for p in FILES
        if (n := len(p.read_text().splitlines())) > (600 if layer(p) == "kernels" else 400)
    }
    assert not long
    lengths = {p.name: len(p.read_text().splitlines()) for p in FILES if layer(p) == "impls"}
    assert not {name: lines for name, lines in lengths.items() if lines > 80}


@pytest.mark.parametrize("path", sorted((ROOT / "tests").glob("test_*.py")), ids=lambda p: p.name)
def test_every_test_asserts_and_none_returns(path):
    """A test without an assertion, or one that returns early, reads as a pass."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
            inner = list(ast.walk(node))
            nested = [
                n
                for f in inner
                if isinstance(f, ast.FunctionDef | ast.Lambda) and f is not node
                for n in ast.walk(f)
            ]
            own = [n for n in inner if n not in nested]
            asserts = any(isinstance(n, ast.Assert) for n in inner) or any(
                isinstance(n, ast.Call) and _called(n) in ("raises", "assert_close", "reach", "check")
                for n in inner
            )
            assert asserts, f"{path.name}:{node.name} asserts nothing"
            assert not any(isinstance(n, ast.Return) for n in own), f"{path.name}:{node.name} returns"


def _called(node: ast.Call) -> str:
    return node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
