"""Which kernels serve a call, on how many threads, and why.

Three backends compute the same operations behind one interface (`_kernels/README.md`): ``cython`` (compiled, one build
per instruction set), ``numba`` (compiled at first use) and ``reference`` (NumPy, float64 inside). The first that is
there serves, in this order.

Settings stand at three levels, the nearest winning: a call's own ``num_threads``, the `config_context` around it, and
what `set_backend` and `set_num_threads` or the environment (FASTBN_BACKEND, FASTBN_ISA, FASTBN_NUM_THREADS,
OMP_NUM_THREADS) say for the process.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from importlib import import_module
from pathlib import Path
from typing import Any

from . import checks, memory

BACKENDS = ("cython", "numba", "reference")

# Instruction set → the extension module built for it, the richest first.
INSTRUCTION_SETS = {"x86-64-v4": "x86_64_v4", "x86-64-v3": "x86_64_v3", "x86-64": "baseline", "baseline": "baseline"}

_context: ContextVar[tuple[Any, int | None]] = ContextVar("fastbn", default=(None, None))
_loaded: dict[str, Any] = {}
_why_not: dict[str, str] = {}
_backend: Any = None
_threads: int | None = None
_forked = False


def _after_fork() -> None:
    # An OpenMP run-time that has had a team in the parent hangs in the child: from here on, one thread.
    global _forked
    _forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


# ---- kernels ----


def _load_instruction_set(isa: str) -> Any:
    return import_module(f"fastbn._kernels.cython_cpu.{INSTRUCTION_SETS[isa]}")


def _absent(error: ImportError) -> bool:
    """Whether it is the kernels that are not there, and not something that they need."""
    return isinstance(error, ModuleNotFoundError) and str(error.name).startswith("fastbn._kernels.cython_cpu")


def instruction_set_reasons() -> dict[str, str]:
    """Each instruction set: "available", or why it cannot be used here. The richest first."""
    try:
        baseline = _load_instruction_set("baseline")
    except ImportError as error:
        why = "not built, for want of gcc or clang" if _absent(error) else f"built, and does not load: {error}"
        return dict.fromkeys(("x86-64-v4", "x86-64-v3", "x86-64"), why)
    runs = baseline.machine_runs()  # its last is the baseline's own name, "x86-64" or "baseline"
    reasons = {}
    for isa in ("x86-64-v4", "x86-64-v3", runs[-1]):
        if isa not in runs:
            reasons[isa] = "this processor does not have it"
            continue
        try:
            _load_instruction_set(isa)
            reasons[isa] = "available"
        except ImportError as error:
            reasons[isa] = (
                "not built: the compiler does not know it" if _absent(error) else f"built, and does not load: {error}"
            )
    return reasons


def instruction_sets() -> list[str]:
    """The instruction sets that were built here and that this machine can run, the richest first."""
    return [isa for isa, reason in instruction_set_reasons().items() if reason == "available"]


def _load_cython() -> Any:
    wanted = os.environ.get("FASTBN_ISA")
    if wanted is not None and wanted not in INSTRUCTION_SETS:
        raise ValueError(f"FASTBN_ISA is {wanted!r}, and must be one of {', '.join(INSTRUCTION_SETS)}")
    reasons = instruction_set_reasons()
    available = [isa for isa, reason in reasons.items() if reason == "available"]
    if not available:
        raise ImportError(f"the compiled kernels are not there: {'; '.join(dict.fromkeys(reasons.values()))}")
    if wanted is None:
        return _load_instruction_set(available[0])
    if wanted not in available:
        raise ImportError(
            f"FASTBN_ISA is {wanted} ({reasons.get(wanted, 'not of this machine')}), "
            f"and what was built and runs here is {', '.join(available)}"
        )
    return _load_instruction_set(wanted)


def load(name: str) -> Any:
    """The kernels of a backend.

    Raises
    ------
    ImportError
        With the reason, where it cannot serve here.
    """
    if name not in BACKENDS:
        raise ValueError(f"backend is {name!r}, and must be one of {', '.join(BACKENDS)}")
    if name not in _loaded:
        try:
            if name == "cython":
                _loaded[name] = _load_cython()
            elif name == "numba":
                _loaded[name] = import_module("fastbn._kernels.numba_cpu")
            else:
                _loaded[name] = import_module("fastbn._kernels.reference")
        except ImportError as error:
            missing = error.name == "numba" if error.name else False
            _why_not[name] = "numba is not installed: pip install 'fastbn[numba]'" if missing else str(error)
            raise ImportError(f"the {name} backend cannot be used: {_why_not[name]}") from error
    return _loaded[name]


def _choose() -> Any:
    """The process's backend at first use: FASTBN_BACKEND, or the first that is there."""
    named = os.environ.get("FASTBN_BACKEND")
    if named is not None:
        if named not in BACKENDS:
            raise ValueError(f"FASTBN_BACKEND is {named!r}, and must be one of {', '.join(BACKENDS)}")
        return load(named)
    if os.environ.get("FASTBN_ISA") is not None:
        return load("cython")  # asked for by name: a silent fallback would be a wrong answer
    for name in BACKENDS:
        try:
            return load(name)
        except ImportError:
            continue
    raise AssertionError("unreachable: the reference kernels need NumPy alone")


def kernels() -> Any:
    """The kernels that serve a call made here and now."""
    global _backend
    chosen = _context.get()[0]
    if chosen is not None:
        return chosen
    if _backend is None:
        _backend = _choose()
    return _backend


def set_backend(name: str) -> None:
    """Choose the kernels for the whole process.

    Parameters
    ----------
    name : {"cython", "numba", "reference"}

    Raises
    ------
    ValueError
        If there is no backend of this name.
    ImportError
        If it cannot be used here; the message says why and what to install.
    """
    global _backend
    _backend = load(name)


# ---- threads ----


def _available_cpus() -> tuple[int, str]:
    """Processors that this process may use, by affinity and control group, and which of the two decided."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    v1 = "/sys/fs/cgroup/cpu/cpu.cfs_quota_us", "/sys/fs/cgroup/cpu/cpu.cfs_period_us"
    for files in (("/sys/fs/cgroup/cpu.max",), v1):  # version 2 has both numbers in one
        try:
            quota, period = (int(word) for name in files for word in Path(name).read_text().split())
        except (OSError, ValueError):  # no such group, or "max"
            continue
        if quota > 0 and period > 0 and -(-quota // period) < count:
            return -(-quota // period), "the control group's quota"
    return count, "the processors of this process"


def _default_threads() -> tuple[int, str]:
    """The number of threads where nobody said one, and why."""
    own = os.environ.get("FASTBN_NUM_THREADS")
    if own is not None:
        if not own.strip().isdecimal() or int(own) == 0:
            raise ValueError(f"FASTBN_NUM_THREADS is {own!r}, and must be an integer of at least 1")
        return checks.threads("FASTBN_NUM_THREADS", int(own)), "FASTBN_NUM_THREADS"
    openmp = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    if openmp.isdecimal() and int(openmp) >= 1:
        return min(int(openmp), checks.MOST_THREADS), "OMP_NUM_THREADS"
    return _available_cpus()


def num_threads(asked: int | None = None) -> int:
    """The number of threads for a call: as asked, or from the settings; one in a forked child."""
    return serving(asked)[1]


def serving(asked: int | None = None) -> tuple[Any, int]:
    """The kernels and the number of threads for a call made here and now."""
    global _threads
    chosen, threads = _context.get()
    if asked is not None:
        threads = checks.threads("num_threads", asked)
    elif threads is None:
        if _threads is None:
            _threads = _default_threads()[0]
        threads = _threads
    return chosen or _backend or kernels(), 1 if _forked else threads


def gpu(num_threads: int | None) -> Any:
    """The operations for arrays on a GPU, where threads are not ours to count: an argument is checked, and not used."""
    from . import gpu

    if num_threads is not None:
        checks.threads("num_threads", num_threads)
    return gpu


def set_num_threads(n: int) -> None:
    """Choose the number of threads for the whole process.

    Parameters
    ----------
    n : int
        At least 1. Work too small to gain from a team runs on the caller's thread whatever this says.
    """
    global _threads
    _threads = checks.threads("n", n)


@contextmanager
def config_context(*, backend: str | None = None, num_threads: int | None = None) -> Iterator[None]:
    """Backend and number of threads for the calls inside a ``with`` block, in this thread (or task) alone.

    Parameters
    ----------
    backend : {"cython", "numba", "reference"}, optional
    num_threads : int, optional

    Examples
    --------
    >>> with fastbn.config_context(backend="reference", num_threads=1):
    ...     y, saved = fastbn.batch_norm_forward(x)
    """
    outer_backend, outer_threads = _context.get()
    token = _context.set(
        (
            outer_backend if backend is None else load(backend),
            outer_threads if num_threads is None else checks.threads("num_threads", num_threads),
        )
    )
    try:
        yield
    finally:
        _context.reset(token)


# ---- what is in use ----


def config() -> dict[str, Any]:
    """What is in use and why the rest is not, as a dict: what `show_config` prints."""
    import numpy

    from . import __version__

    in_use = kernels()
    why_not = {}
    for name in BACKENDS:
        if name == in_use.NAME:
            continue
        try:
            load(name)
            why_not[name] = "available, not chosen"
        except ImportError:
            why_not[name] = _why_not[name]
        except ValueError as error:  # FASTBN_ISA names no instruction set
            why_not[name] = str(error)
    sets = instruction_set_reasons()
    if in_use.INSTRUCTION_SET in sets:
        sets[in_use.INSTRUCTION_SET] = "in use"
    return {
        "fastbn": __version__,
        "python": sys.version.split()[0],
        "numpy": numpy.__version__,
        "backend": in_use.NAME,
        "other backends": why_not,
        "instruction set": in_use.INSTRUCTION_SET,
        "compiled instruction sets": sets,
        "threads": num_threads() if in_use.has_threads() else 1,
        "threads because of": _why_threads(in_use),
        "openmp": in_use.openmp(),
        "kept memory": "{} bytes, of at most {}".format(*memory.kept()),
        "gpu": _gpu(),
    }


def _gpu() -> str:
    """Which GPU serves arrays that lie on one, or why none does."""
    if os.environ.get("NUMBA_ENABLE_CUDASIM") == "1":
        return "simulated, for tests (NUMBA_ENABLE_CUDASIM=1)"
    try:
        import_module("numba_cuda")
    except ImportError:
        return "none: numba-cuda is not installed: pip install 'fastbn[cuda]'"
    try:
        cuda: Any = import_module("numba.cuda")
        if cuda.is_available():
            device = cuda.gpus[0]  # which, unlike the current device, is seen without a context
            name = device.name.decode() if isinstance(device.name, bytes) else device.name
            return f"{name}, {device.MULTIPROCESSOR_COUNT} multiprocessors, for arrays that lie on it"
        error = cuda.cuda_error()
        if error is None:
            return "none: the CUDA toolkit's libNVVM is not there: pip install 'fastbn[cuda]'"
        return f"none: {' '.join(str(error).split())}"
    except Exception as error:  # whatever a driver may say, it must not keep the rest from being shown
        return f"none: {' '.join(str(error).split())}"


def _why_threads(in_use: Any) -> str:
    if not in_use.has_threads():
        return "these kernels run on one thread, whatever is asked"
    if _forked:
        return "a forked child, where an OpenMP team could hang"
    if _context.get()[1] is not None:
        return "config_context"
    threads, why = _default_threads()
    return why if threads == _threads else "set_num_threads"


def show_config() -> None:
    """Print which backend, instruction set, threads and OpenMP run-time are in use, and why the others are not."""
    for name, value in config().items():
        if isinstance(value, dict):
            value = "".join(f"\n    {key}: {reason}" for key, reason in value.items())
        elif isinstance(value, list):
            value = ", ".join(value) or "none"
        print(f"{name}: {value}")
