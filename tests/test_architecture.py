"""The house: who may import whom, how long a room may be, and what `import jaxquant` may touch."""

import ast
import graphlib
import os
import pathlib
import subprocess
import sys

import pytest

PACKAGE = pathlib.Path(__file__).parent.parent / "jaxquant"
FILES = sorted(PACKAGE.rglob("*.py"))
# A room imports from rooms with a smaller number, or from itself.
LAYERS = {
    "errors": 0,
    "format": 1,
    "trace": 1,
    "noise": 1,
    "optim": 1,
    "stats": 1,
    "table": 1,
    "optional": 1,
    "packed": 1,
    "attention": 1,
    "values": 2,
    "lowering": 2,
    "inputs": 2,
    "qtensor": 3,
    "encode": 4,
    "turned": 4,
    "adapter": 5,
    "matmul": 6,
    "quantizers": 5,
    "cache": 5,
    "learned": 6,
    "matrices": 6,
    "finite": 1,
    "sharding": 6,
    "params": 7,
    "lora": 8,
    "static": 7,
    "files": 8,
    "transforms": 8,
    "evaluate": 9,
    "report": 9,
    "__init__": 10,
    "cli": 11,
}
CORE = {"jax", "jaxlib", "numpy", "jaxtyping"}


def module(path: pathlib.Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 2 else parts)


MODULES = {module(path) for path in FILES}


def room(name: str) -> str:
    parts = name.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def imports(path: pathlib.Path) -> list[str]:
    """The modules a file imports, `from jaxquant.trace import views` counted as `jaxquant.trace.views`."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            found += [name if name in MODULES else node.module for name in inner]
    return found


@pytest.mark.parametrize("path", FILES, ids=module)
def test_imports_go_down(path):
    here = room(module(path))
    for name in imports(path):
        if name.split(".")[0] == "jaxquant":
            assert room(name) == here or LAYERS[room(name)] < LAYERS[here], f"{here} imports {name}"


@pytest.mark.parametrize("path", FILES, ids=module)
def test_only_core_dependencies_and_only_the_walker_looks_inside_jax(path):
    for name in imports(path):
        top = name.split(".")[0]
        assert top in CORE | {"jaxquant"} | sys.stdlib_module_names, name
        assert not name.startswith("jax._src"), f"{path.name} imports the private {name}"
        assert not name.startswith("jax.extend") or room(module(path)) == "trace", f"{path.name} imports {name}"


def test_no_circles():
    graph = {module(path): [n for n in imports(path) if n.startswith("jaxquant.")] for path in FILES}
    list(graphlib.TopologicalSorter(graph).static_order())


@pytest.mark.parametrize("path", FILES, ids=module)
def test_rooms_are_small(path):
    source = path.read_text()
    assert len(source.splitlines()) <= 250
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef):
            body = node.body[1:] if ast.get_docstring(node) else node.body
            assert not body or body[-1].end_lineno - body[0].lineno < 50, f"{node.name} is too long"


@pytest.mark.parametrize("path", FILES, ids=module)
def test_no_delayed_imports_and_no_mutable_state(path):
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        assert not isinstance(node, ast.Global), f"{path.name}: global"
        if isinstance(node, ast.FunctionDef):
            inner = [n for n in ast.walk(node) if isinstance(n, ast.Import | ast.ImportFrom)]
            assert not inner, f"{path.name}: {node.name} imports when called"
    tables = {
        target.id
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict | ast.List | ast.Set)
        for target in node.targets
    }
    assert all(name.isupper() for name in tables), f"{path.name}: {tables}"
    written = {
        target.value.id
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Subscript) and isinstance(target.value, ast.Name)
    }
    assert not tables & written, f"{path.name}: a table is written to"


@pytest.mark.parametrize("path", FILES, ids=module)
def test_public_things_are_documented(path):
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree) or path.name == "__init__.py", f"{path.name} does not say what it is for"
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            nodes = [node, *(n for n in node.body if isinstance(n, ast.FunctionDef))]
        else:
            nodes = [node] if node in tree.body and isinstance(node, ast.FunctionDef) else []
        for public in nodes:
            assert public.name.startswith("_") or ast.get_docstring(public), f"{path.name}: {public.name}"


def test_import_is_light():
    """No framework, no optional package, no backend, no flag."""
    code = (
        "import os, sys; flags = os.environ.get('XLA_FLAGS'); import jaxquant;"
        "assert os.environ.get('XLA_FLAGS') == flags;"
        "heavy = {'flax', 'optax', 'rich', 'gguf', 'safetensors', 'tokenizers', 'beartype'} & set(sys.modules);"
        "assert not heavy, heavy"
    )
    # A platform that does not exist: importing would fail if it started a backend.
    environment = os.environ | {"JAX_PLATFORMS": "none_such"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
