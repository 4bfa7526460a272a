"""What the code promises about its own shape: who imports whom, how long things are, what is typed.

Most tests read the sources (`ast`) and so cover files that no other test happens to import.
"""

import ast
import inspect
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import jaxtyping
import pytest

ROOT = Path(__file__).resolve().parent.parent
LIBRARY = ROOT / "src" / "burst_jax"
KERNELS = ROOT / "kernels" / "burst_kernels"
SOURCES = sorted([*(ROOT / "src").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")])
# The library proper: everything else in burst_jax (modules for Flax, the language model, the
# command line) is built on it and may import more.
PRIVATE_OR_INIT = re.compile(r"(__init__|_[a-z]\w*)\.py")
CORE_NAMES = {"reference.py", "inspect.py", "aot.py"}
CORE = sorted(
    p for p in LIBRARY.glob("*.py") if PRIVATE_OR_INIT.fullmatch(p.name) or p.name in CORE_NAMES
)

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
MAX_KERNEL_LINES = 120
MAX_RING_LINES = 250
MAX_PARAMETERS = 13
# One call says all there is to say of it, by names that are a published interface: folding some of
# them into an object would break callers to please a counter.
MANY_PARAMETERS = {"burst_attention", "burst_attention_shard"}

EVERYWHERE = {"jax", "numpy", "jaxtyping", "burst_kernels"} | set(sys.stdlib_module_names)
# What only makes sense with more than one device. `axis_index` is not here: inside a GPU kernel it
# also names warpgroups.
MESH_NAMES = {
    "Mesh", "NamedSharding", "PartitionSpec", "all_gather", "all_to_all", "axis_name", "make_mesh",
    "pmap", "pmax", "pmean", "pmin", "ppermute", "psum", "psum_scatter", "set_mesh", "shard_map",
    "sharding",
}  # fmt: skip
HEAVY = {
    "chex", "flax", "jax_triton", "matplotlib", "optax", "orbax", "rich", "scipy.stats", "triton",
    "tyro",
}  # fmt: skip

Function = ast.FunctionDef | ast.AsyncFunctionDef


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), filename=str(path))


def imported(tree: ast.Module) -> Iterator[str]:
    """Full dotted names of what a file imports, wherever in the file; relative ones as `.`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            yield from (f"{module}.{alias.name}" for alias in node.names)


def identifiers(tree: ast.Module) -> Iterator[str]:
    """Every name that the code of a file uses: variables, attributes, parameters, imports."""
    for node in ast.walk(tree):
        match node:
            case ast.Name():
                yield node.id
            case ast.Attribute():
                yield node.attr
            case ast.arg():
                yield node.arg
            case ast.keyword() if node.arg:
                yield node.arg
            case ast.alias():
                yield from node.name.split(".")


def functions(tree: ast.Module) -> Iterator[Function]:
    for node in ast.walk(tree):
        if isinstance(node, Function):
            yield node


def lines_without_docstring(function: Function) -> int:
    """How many lines one has to read; the docstring is for those who do not."""
    end = function.end_lineno or function.lineno
    length = end - function.lineno + 1
    if ast.get_docstring(function) is not None:
        text = function.body[0]
        length -= (text.end_lineno or text.lineno) - text.lineno + 1
    return length


def run_python(code: str) -> str:
    """The last line that a fresh interpreter prints: this one has imported much already."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


def test_there_is_something_to_look_at():
    assert {"_ring.py", "__init__.py"} <= {path.name for path in CORE}
    assert any(KERNELS in path.parents for path in SOURCES)


# Who imports whom.


def test_kernels_import_jax_and_nothing_that_knows_a_mesh():
    for path in KERNELS.rglob("*.py"):
        tree = parse(path)
        # An extra, which that backend alone needs.
        allowed = EVERYWHERE | ({"triton", "jax_triton"} if path.parent.name == "triton" else set())
        foreign = {name for name in imported(tree) if name.split(".")[0] not in allowed}
        assert not foreign, f"{name_of(path)} imports {foreign}"
        aware = MESH_NAMES & set(identifiers(tree))
        assert not aware, f"{name_of(path)} knows of more than one device: {aware}"


def test_the_core_imports_neither_flax_nor_what_is_built_on_it():
    built_on_it = {path.stem for path in LIBRARY.iterdir() if path not in CORE}
    for path in CORE:
        for name in imported(parse(path)):
            top, *rest = name.split(".")
            assert top in EVERYWHERE | {"burst_jax"}, f"{name_of(path)} imports {name}"
            if top == "burst_jax":
                assert rest[0] not in built_on_it, f"{name_of(path)} imports {name}, above itself"


def test_nothing_imports_privates_of_jax():
    for path in SOURCES:
        tree = parse(path)
        private = [name for name in imported(tree) if "_src" in name.split(".")]
        assert not private, f"{name_of(path)} imports {private}"
        assert "_src" not in set(identifiers(tree)), f"{name_of(path)} reaches into _src"


def test_nothing_can_run_code_that_it_reads():
    """SECURITY.md promises it: no pickle, no eval, no exec."""
    for path in SOURCES:
        tree = parse(path)
        unsafe = {"pickle", "cloudpickle", "dill", "marshal", "shelve", "joblib"}
        found = unsafe & {name.split(".")[0] for name in imported(tree)}
        called = {
            node.func.id
            for node in ast.walk(tree)
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
        }
        found |= {"eval", "exec", "compile"} & called
        found |= {"allow_pickle"} & set(identifiers(tree))
        assert not found, f"{name_of(path)} uses {found}"


# How things are written.


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_files_and_functions_are_short(path):
    lines = len(path.read_text().splitlines())
    limit = MAX_RING_LINES if path == LIBRARY / "_ring.py" else MAX_FILE_LINES
    assert lines <= limit, f"{lines} lines; the limit is {limit}"
    for function in functions(parse(path)):
        is_kernel = KERNELS in path.parents and "kernel" in function.name
        limit = MAX_KERNEL_LINES if is_kernel else MAX_FUNCTION_LINES
        lines = lines_without_docstring(function)
        assert lines <= limit, f"{function.name} has {lines} lines; the limit is {limit}"


def test_no_file_is_a_drawer_for_odds_and_ends():
    drawers = {"utils", "util", "misc", "helpers", "common"}
    found = [name_of(path) for path in SOURCES if path.stem.strip("_") in drawers]
    assert not found


def test_annotations_stay_visible_to_the_shape_checker():
    for path in SOURCES:
        assert "__future__.annotations" not in set(imported(parse(path))), name_of(path)


def test_annotations_are_checked_while_tests_run():
    import burst_jax

    with pytest.raises(jaxtyping.TypeCheckError):
        burst_jax.merge(1, 2)


def test_public_functions_take_few_parameters():
    for path in SOURCES:
        for function in functions(parse(path)):
            if function.name.startswith("_") or function.name in MANY_PARAMETERS:
                continue
            # A Triton kernel takes an address for each array.
            if path.parent.name == "triton" and function.name.endswith("_kernel"):
                continue
            a = function.args
            count = len(a.posonlyargs) + len(a.args) + len(a.kwonlyargs)
            assert count <= MAX_PARAMETERS, f"{name_of(path)}: {function.name} takes {count}"


def test_there_is_one_custom_vjp():
    uses = [
        name_of(path)
        for path in SOURCES
        for node in ast.walk(parse(path))
        if isinstance(node, ast.Attribute | ast.Name)
        and (node.attr if isinstance(node, ast.Attribute) else node.id) == "custom_vjp"
    ]
    assert uses == ["src/burst_jax/_ring.py"]


def test_every_public_name_is_documented():
    import burst_jax

    assert burst_jax.__all__
    for name in burst_jax.__all__:
        thing = getattr(burst_jax, name)
        if isinstance(thing, str):  # __version__
            continue
        assert inspect.getdoc(thing), f"{name} has no docstring"
        if inspect.isclass(thing):
            for member, value in vars(thing).items():
                if not member.startswith("_") and inspect.isroutine(value):
                    assert inspect.getdoc(value), f"{name}.{member} has no docstring"


# What `import burst_jax` does.


def test_importing_it_loads_jax_numpy_and_jaxtyping_alone():
    code = """
import json, sys
import jax, jaxtyping, numpy
before = set(sys.modules)
import burst_jax
print(json.dumps([sorted(set(sys.modules) - before), sorted(sys.modules)]))
"""
    new, everything = json.loads(run_python(code))
    assert not HEAVY & set(everything)
    # jax loads parts of itself late (pallas brings jaxlib's compiler bindings), others' code never.
    allowed = EVERYWHERE | {"burst_jax", "jaxlib"}
    assert {name.split(".")[0] for name in new} <= allowed


def test_importing_it_starts_no_backend():
    # jax refuses to change the number of devices once a backend runs, so this is a public witness.
    code = """
import burst_jax, jax
jax.config.update("jax_num_cpu_devices", 3)
print(jax.device_count("cpu"))
"""
    assert run_python(code) == "3"


def test_the_witness_for_a_started_backend_does_speak_up():
    code = """
import jax
jax.devices()
try:
    jax.config.update("jax_num_cpu_devices", 3)
except RuntimeError:
    print("refused")
"""
    assert run_python(code) == "refused"
