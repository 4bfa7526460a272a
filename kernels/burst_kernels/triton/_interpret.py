"""Runs a kernel of `_kernels` on a CPU, by Triton's interpreter: the same source, on NumPy arrays.

Triton decides when a function is decorated whether it is compiled or interpreted, so the kernels'
module is loaded a second time. Three things of the interpreter are put right while a kernel runs:

- it wants PyTorch's tensors, of which it uses the address and the dtype: `_Pointer` has these;
- it keeps bfloat16 as integers of 16 bits, and multiplies matrices of them as integers;
- it rounds float32 to bfloat16 towards zero, where GPUs round to nearest.

A product of float32 operands in `tf32x3` is computed from parts of 10 bits, as on a tensor core,
but what is beyond them is cut off where a GPU rounds: it is a little less exact.
What Triton needs to do that is not a published interface, so that only this file touches it; the
release of Triton is bounded by `pyproject.toml`.
"""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false
import functools
import importlib.util
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import jax.numpy as jnp
import numpy as np
import triton.language as tl
from triton import knobs
from triton.runtime import interpreter

from burst_kernels.triton._sizes import Sizes

_BFLOAT16 = np.dtype(jnp.bfloat16)
# The interpreter has one state for all threads; a ring's devices call back from several.
_LOCK = threading.Lock()


def interpret(
    kernel: str,
    sizes: Sizes,
    programs: int,
    operands: Sequence[Any],
    results: Sequence[Any],
    aliases: Mapping[int, int],
) -> tuple[np.ndarray, ...]:
    """Results of one launch.

    Args:
        kernel: its name in `_kernels`.
        sizes: its constants.
        programs: how many there are.
        operands: arrays.
        results: their shapes and dtypes; what no program writes stays NaN.
        aliases: number of an operand -> number of the result that lies in its memory.
    """
    arrays = [np.asarray(x) for x in operands]
    out = [np.full(x.shape, np.nan, x.dtype) for x in results]
    for source, target in aliases.items():
        out[target] = arrays[source] = arrays[source].copy()
    function = getattr(_module(), kernel)
    with _LOCK, _put_right(), warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a GPU warns of no overflow, and no NaN
        run = _Executor(function.rewrite(), function.arg_names, (programs,))
        run(*(_Pointer(np.ascontiguousarray(x)) for x in (*arrays, *out)), sizes)
    return tuple(out)


@functools.cache
def _module() -> ModuleType:
    """The kernels' module, of interpreted functions."""
    path = Path(__file__).with_name("_kernels.py")
    spec = importlib.util.spec_from_file_location("burst_kernels_triton_interpreted", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    before = knobs.runtime.interpret
    knobs.runtime.interpret = True
    try:
        spec.loader.exec_module(module)
    finally:
        knobs.runtime.interpret = before
    return module


class _Pointer:
    """An array, as the interpreter asks for it."""

    def __init__(self, array: np.ndarray):
        self.array = array
        self.dtype = array.dtype.name

    def data_ptr(self) -> int:
        """Where it lies."""
        return self.array.ctypes.data


class _Executor(interpreter.GridExecutor):
    """Without copies between devices."""

    def _init_args_hst(self, args_dev: Any, kwargs: Any) -> Any:
        return args_dev, kwargs

    def _restore_args_dev(self, args_dev: Any, args_hst: Any, kwargs: Any, kwargs_hst: Any) -> None:
        pass


@contextmanager
def _put_right() -> Iterator[None]:
    builder = interpreter.interpreter_builder
    cast, convert = builder.cast_impl, builder.create_fp_to_fp

    def to(x: Any, target: Any, otherwise: Any) -> Any:
        if _narrow(x.dtype) == _narrow(target):
            return otherwise()
        if _narrow(target):
            data = x.data.astype(np.float32).astype(_BFLOAT16).view(np.uint16)
        else:
            data = _wide(x).astype(interpreter._get_np_dtype(target.scalar))
        return interpreter.TensorHandle(data, target.scalar)

    def dot(a: Any, b: Any, acc: Any, precision: Any, imprecise: Any) -> Any:
        product = functools.partial(np.matmul, dtype=np.float32)
        x, y = _wide(a), _wide(b)
        if a.dtype.scalar == tl.float32 and "TF32x3" in str(precision):
            (x, x_rest), (y, y_rest) = _split(x), _split(y)
            found = product(x_rest, y) + product(x, y_rest) + product(x, y)
        else:
            found = product(x.astype(np.float32), y.astype(np.float32))
        return interpreter.TensorHandle(found + acc.data, acc.dtype.scalar)

    replaced = {
        (builder, "cast_impl"): lambda x, t: to(x, t, lambda: cast(x, t)),
        (builder, "create_fp_to_fp"): lambda x, t, how: to(x, t, lambda: convert(x, t, how)),
        (builder, "create_dot"): dot,
        # Compiled functions of Triton's own.
        (tl, "max"): lambda x, axis: tl.reduce(x, axis, tl.standard._elementwise_max),
        (tl, "sum"): lambda x, axis: tl.reduce(x, axis, tl.standard._sum_combine),
    }
    before = {(where, name): getattr(where, name) for where, name in replaced}
    for (where, name), function in replaced.items():
        setattr(where, name, function)
    try:
        yield
    finally:
        for (where, name), function in before.items():
            setattr(where, name, function)


def _narrow(dtype: Any) -> bool:
    return dtype.scalar == tl.bfloat16


def _wide(x: Any) -> np.ndarray:
    return x.data.view(_BFLOAT16).astype(np.float32) if _narrow(x.dtype) else x.data


def _split(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """x as what a tensor core takes of it, and of the rest: float32 without its last 13 bits."""
    bits = np.uint32(0xFFFFE000)
    first = (x.view(np.uint32) & bits).view(np.float32)
    return first, ((x - first).view(np.uint32) & bits).view(np.float32)
