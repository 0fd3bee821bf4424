"""Which kernels serve, on how many threads; what the environment, a missing package, a fork or other threads change."""

import json
import multiprocessing
import os
import re
import sys
import threading

import numpy as np
import pytest
from conftest import BACKENDS, load_kernels, run_python, runnable_sets, sample

import fastbn
from fastbn import backends

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")

CONFIG = "import json; from fastbn import backends; print(json.dumps(backends.config()))"


def first_available():
    for name in ("cython", "numba", "reference"):
        try:
            return backends.load(name).NAME
        except ImportError:
            continue


# ---- choosing ----


def test_default():
    assert first_available() == backends.kernels().NAME


def test_set_backend():
    fastbn.set_backend("reference")
    assert backends.kernels().NAME == "reference"
    for name, error in [("cuda", ValueError), ("", ValueError), (None, ValueError), (3, ValueError)]:
        with pytest.raises(error, match=f"backend is {name!r}, and must be one of cython, numba, reference"):
            fastbn.set_backend(name)
    assert backends.kernels().NAME == "reference"


@pytest.mark.parametrize("name", [[], {}], ids=str)
def test_set_backend_unhashable(name):
    with pytest.raises((TypeError, ValueError), match="backend is"):
        fastbn.set_backend(name)


def test_set_num_threads():
    fastbn.set_num_threads(5)
    assert backends.num_threads() == 5
    for n, error, words in [
        (0, ValueError, "at least 1"),
        (-2, ValueError, "at least 1"),
        (2.0, TypeError, "an integer"),
        ("2", TypeError, "an integer"),
        (None, TypeError, "an integer"),
    ]:
        with pytest.raises(error, match=f"n is {re.escape(repr(n))}, and must be {words}"):
            fastbn.set_num_threads(n)
    assert backends.num_threads() == 5


def test_threads_of_a_call():
    """A call's own number, then the context's, then the process's."""
    fastbn.set_num_threads(5)
    with fastbn.config_context(num_threads=4):
        assert backends.num_threads() == 4
        assert backends.num_threads(3) == 3
    assert backends.num_threads() == 5


def test_contexts_nest():
    fastbn.set_num_threads(5)
    outside = backends.kernels()
    with fastbn.config_context(backend="reference"):
        assert backends.kernels().NAME == "reference" and backends.num_threads() == 5
        with fastbn.config_context(num_threads=2):
            assert backends.kernels().NAME == "reference" and backends.num_threads() == 2
        fastbn.set_num_threads(7)  # the process's; no context says otherwise here
        assert backends.num_threads() == 7
    assert backends.kernels() is outside and backends.num_threads() == 7


def test_context_beats_set_backend():
    with fastbn.config_context(backend="reference"):
        fastbn.set_backend(first_available())
        assert backends.kernels().NAME == "reference"


def test_context_ends_with_an_exception():
    outside = backends.kernels()
    with pytest.raises(RuntimeError, match="on purpose"), fastbn.config_context(backend="reference", num_threads=3):
        raise RuntimeError("on purpose")
    assert backends.kernels() is outside and backends.num_threads() == 2


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"backend": "cuda"}, ValueError, "backend is 'cuda', and must be one of"),
        ({"num_threads": 0}, ValueError, "num_threads is 0, and must be at least 1"),
        ({"num_threads": 1.5}, TypeError, "num_threads is 1.5, and must be an integer"),
        ({"backend": "reference", "num_threads": 0}, ValueError, "num_threads is 0"),
    ],
    ids=str,
)
def test_bad_context(arguments, error, words):
    outside = backends.kernels()
    with pytest.raises(error, match=re.escape(words)), fastbn.config_context(**arguments):
        pytest.fail("entered")
    assert backends.kernels() is outside and backends.num_threads() == 2


def test_context_is_this_threads_alone():
    seen = []
    with fastbn.config_context(backend="reference", num_threads=7):
        other = threading.Thread(target=lambda: seen.append((backends.kernels().NAME, backends.num_threads())))
        other.start()
        other.join()
    assert seen == [(first_available(), 2)]


def test_context_serves_the_call(monkeypatch):
    """The kernels are taken at the call, not at import."""
    calls = []
    reference = backends.load("reference")
    monkeypatch.setattr(reference, "normalize", lambda *arguments: calls.append(arguments[-1]))
    with fastbn.config_context(backend="reference", num_threads=3):
        fastbn.batch_norm(np.ones((2, 3)), np.zeros(3), np.ones(3))
        fastbn.batch_norm(np.ones((2, 3)), np.zeros(3), np.ones(3), num_threads=4)
    assert calls == [3, 4]


@pytest.mark.parametrize("name", BACKENDS)
def test_interface(name):
    """Every backend has every kernel of the reference, by the same names of arguments."""
    kernels, reference = load_kernels(name), backends.load("reference")
    assert name.split()[0] == kernels.NAME
    if kernels.NAME == "cython":
        assert kernels.INSTRUCTION_SET in (name.split()[1], "baseline")
    names = "moments normalize forward gradient_moments input_gradient backward update_running_stats openmp"
    for function in names.split():
        assert callable(getattr(kernels, function)) and callable(getattr(reference, function))


# ---- the environment ----


@pytest.mark.parametrize("name", ["cython", "numba", "reference"])
def test_environment_backend(name):
    load_kernels(name if name != "cython" else f"cython {(runnable_sets() or ['x86-64'])[0]}")
    assert json.loads(run_python(CONFIG, FASTBN_BACKEND=name).stdout)["backend"] == name


@pytest.mark.parametrize(
    ("env", "message"),
    [
        (
            {"FASTBN_BACKEND": "cuda"},
            "ValueError: FASTBN_BACKEND is 'cuda', and must be one of cython, numba, reference",
        ),
        ({"FASTBN_ISA": "avx2"}, "ValueError: FASTBN_ISA is 'avx2', and must be one of x86-64-v4, x86-64-v3, x86-64"),
        ({"FASTBN_NUM_THREADS": "0"}, "ValueError: FASTBN_NUM_THREADS is '0', and must be an integer of at least 1"),
        (
            {"FASTBN_NUM_THREADS": "two"},
            "ValueError: FASTBN_NUM_THREADS is 'two', and must be an integer of at least 1",
        ),
        ({"FASTBN_NUM_THREADS": ""}, "ValueError: FASTBN_NUM_THREADS is '', and must be an integer of at least 1"),
        ({"FASTBN_NUM_THREADS": "-1"}, "ValueError: FASTBN_NUM_THREADS is '-1', and must be an integer of at least 1"),
    ],
    ids=str,
)
def test_environment_wrong(env, message):
    if "FASTBN_ISA" in env and not runnable_sets():
        pytest.skip("no compiled kernels here")
    done = run_python(CONFIG, check=False, **env)
    assert done.returncode != 0 and message in done.stderr


def test_environment_instruction_set_not_here():
    """Asked for by name: no silent fallback."""
    if not runnable_sets():
        pytest.skip("no compiled kernels here")
    code = f"""
from fastbn import backends
reasons = {{"x86-64-v4": "this processor does not have it", "x86-64": "available"}}
backends.instruction_set_reasons = lambda: dict(reasons)
{CONFIG}
"""
    done = run_python(code, check=False, FASTBN_ISA="x86-64-v4")
    assert done.returncode != 0
    assert "FASTBN_ISA is x86-64-v4 (this processor does not have it), and what was built" in done.stderr


@pytest.mark.parametrize(
    ("env", "threads"),
    [
        ({"FASTBN_NUM_THREADS": "3"}, 3),
        ({"OMP_NUM_THREADS": "5"}, 5),
        ({"OMP_NUM_THREADS": "5,2"}, 5),
        ({"FASTBN_NUM_THREADS": "3", "OMP_NUM_THREADS": "5"}, 3),
        ({"OMP_NUM_THREADS": "many"}, backends._available_cpus()[0]),
        ({}, backends._available_cpus()[0]),
    ],
    ids=str,
)
def test_environment_threads(env, threads):
    assert json.loads(run_python(CONFIG, **env).stdout)["threads"] == threads


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no affinity on this system")
def test_affinity():
    code = "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n" + CONFIG
    assert json.loads(run_python(code).stdout)["threads"] == 1


# ---- what is said ----


def test_show_config(kernels, capsys):
    fastbn.show_config()
    text = capsys.readouterr().out
    for line in (
        f"fastbn: {fastbn.__version__}", f"numpy: {np.__version__}", f"backend: {kernels.NAME}",
        f"instruction set: {kernels.INSTRUCTION_SET}", f"threads: {2 if kernels.has_threads() else 1}",
        f"openmp: {kernels.openmp()}",
    ):  # fmt: skip
        assert line in text.splitlines()
    for name in {"cython", "numba", "reference"} - {kernels.NAME}:  # each of the others with a reason
        assert re.search(rf"^    {name}: \S.+$", text, re.MULTILINE)


def test_config_survives_a_wrong_environment():
    """The reference is in use; a wrong FASTBN_ISA is why cython is not, and no reason for show_config to fail."""
    done = run_python(CONFIG, FASTBN_BACKEND="reference", FASTBN_ISA="avx2")
    assert "FASTBN_ISA is 'avx2'" in json.loads(done.stdout)["other backends"]["cython"]


# ---- what is missing ----

BLOCK = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.startswith(BLOCKED):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Block())
"""


def test_import_needs_numpy_alone():
    """Nothing but NumPy and the standard library is loaded, not even by a first call."""
    code = """
import sys
import numpy
before = set(sys.modules)
import fastbn
loaded = {name.partition(".")[0] for name in set(sys.modules) - before}
loaded -= sys.stdlib_module_names | {"fastbn", "numpy"}
fastbn.batch_norm(numpy.ones((4, 3)), training=True)
heavy = {"numba", "llvmlite", "scipy", "torch", "tqdm", "matplotlib", "sklearn", "mlxtend", "Cython", "pytest", "onnx"}
print(sorted(loaded), sorted(heavy & set(sys.modules)))
"""
    env = {} if runnable_sets() else {"FASTBN_BACKEND": "reference"}
    assert run_python(code, **env).stdout == "[] []\n"


def test_without_compiled_kernels():
    code = BLOCK.replace("BLOCKED", "'fastbn._kernels.cython_cpu.'") + CONFIG
    found = json.loads(run_python(code).stdout)
    assert found["backend"] in ("numba", "reference")
    assert all("not built" in reason for reason in found["compiled instruction sets"].values())
    assert "not built" in found["other backends"]["cython"]


def test_without_numba():
    code = "import sys; sys.modules['numba'] = None\n" + CONFIG
    found = json.loads(run_python(code).stdout)
    assert "pip install 'fastbn[numba]'" in found["other backends"]["numba"]
    done = run_python(code, check=False, FASTBN_BACKEND="numba")
    assert (
        "ImportError: the numba backend cannot be used: numba is not installed: pip install 'fastbn[numba]'"
        in done.stderr
    )


def test_with_numpy_alone():
    """The last fallback serves, and set_backend says why the others do not."""
    code = (
        BLOCK.replace("BLOCKED", "('fastbn._kernels.cython_cpu.', 'numba')")
        + """
import numpy as np, fastbn
x = np.arange(12.0).reshape(4, 3)
y, saved = fastbn.batch_norm_forward(x)
print(np.allclose(y, (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5)), fastbn.batch_norm_backward(x, saved)[0].shape)
for name in ("cython", "numba"):
    try:
        fastbn.set_backend(name)
    except ImportError as error:
        print(error)
fastbn.show_config()
"""
    )
    out = run_python(code).stdout
    assert out.startswith("True (4, 3)\nthe cython backend cannot be used: the compiled kernels are not there")
    assert "the numba backend cannot be used: numba is not installed" in out
    assert "backend: reference" in out


# ---- processes and threads ----

# A call large enough for a team, in the parent; then the same in a child.
FORK = """
import os, sys, signal
import numpy as np, fastbn
from fastbn import backends
x = np.random.default_rng(0).standard_normal((16, 32, 40, 40)).astype(np.float32)
def work():
    return fastbn.batch_norm(x, training=True, num_threads=2).tobytes()
want = work()
child = os.fork()
if child == 0:
    signal.alarm(60)  # a hang is a failure
    os._exit(0 if work() == want and backends.num_threads(2) == 1 else 3)
status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
assert work() == want  # the parent goes on, with its team
assert backends.num_threads(2) == 2
sys.exit(status)
"""


@needs_fork
@pytest.mark.parametrize("name", ["cython", "numba", "reference"])
def test_fork(name):
    """A child of a process that has had a team neither hangs nor dies; it works on one thread, to the same bits."""
    load_kernels(name if name != "cython" else f"cython {(runnable_sets() or ['x86-64'])[0]}")
    done = run_python(FORK, check=False, FASTBN_BACKEND=name)
    assert done.returncode == 0, f"{done.returncode}: {done.stderr}"


@needs_fork
def test_multiprocessing_fork():
    code = """
import multiprocessing, warnings
import numpy as np, fastbn
warnings.simplefilter("ignore", DeprecationWarning)  # from 3.12 on: a process with a team forks
x = np.random.default_rng(0).standard_normal((16, 32, 40, 40)).astype(np.float32)
def work(i):
    return fastbn.batch_norm(x + i, training=True).tobytes()
want = [work(i) for i in range(4)]
with multiprocessing.get_context("fork").Pool(2) as pool:
    assert pool.map_async(work, range(4)).get(timeout=60) == want
"""
    run_python(code)


def spawned(seed):
    return fastbn.batch_norm(sample((16, 32, 40, 40), np.float32, seed=seed), training=True, num_threads=2).tobytes()


def test_multiprocessing_spawn():
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply_async(spawned, (3,)).get(timeout=60) == spawned(3)


@pytest.mark.parametrize("name", ["cython", "numba", "reference"])
def test_many_callers(name):
    """Threads that call at once get what each would get alone. In a process of its own, which a mistake may abort."""
    load_kernels(name if name != "cython" else f"cython {(runnable_sets() or ['x86-64'])[0]}")
    code = """
import numpy as np, fastbn
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
data = np.random.default_rng(0).standard_normal((8, 8, 16, 40, 40)).astype(np.float32)
barrier = Barrier(8)
def work(x):
    return fastbn.batch_norm(x, training=True).tobytes()
def together(x):
    barrier.wait()
    return [work(x) for _ in range(10)]
want = [work(x) for x in data]
with ThreadPoolExecutor(8) as pool:
    assert list(pool.map(together, data)) == [[w] * 10 for w in want]
"""
    run_python(code, FASTBN_BACKEND=name, FASTBN_NUM_THREADS="3")


def test_first_calls_at_once():
    """Loading and choosing at first use, from many threads."""
    code = """
import numpy as np, fastbn
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
barrier = Barrier(8)
def work(_):
    barrier.wait()
    return fastbn.batch_norm(np.arange(12.0).reshape(4, 3), training=True).tobytes()
with ThreadPoolExecutor(8) as pool:
    assert len(set(pool.map(work, range(8)))) == 1
"""
    run_python(code)


def test_gil_is_released(compiled):
    """Another Python thread runs while a kernel does: in three of at most 100 calls, for it may have to wait."""
    x = np.ones((64, 64, 64, 64), np.float32)  # 64 MiB
    out, ticks, seen, done = np.empty_like(x), [], [], threading.Event()
    interval = sys.getswitchinterval()
    sys.setswitchinterval(60)  # no other thread gets the GIL but when it is given up

    def call():
        for _ in range(100):
            before = len(ticks)
            fastbn.batch_norm(x, training=True, out=out, num_threads=1)
            seen.append(len(ticks) - before > 1)
            if sum(seen) == 3:
                break
        done.set()

    try:
        caller = threading.Thread(target=call)
        caller.start()
        while not done.wait(1e-4):
            ticks.append("tick")
        caller.join()
    finally:
        sys.setswitchinterval(interval)
    assert sum(seen) == 3


def test_the_team_threshold_is_measured_once_and_moves_no_bit(compiled):
    """From a call in doubt on it is known, within its bounds; sizes on both sides of it agree with one thread."""
    if not compiled.has_threads():
        pytest.skip("built without OpenMP")
    for rows in (64, 500, 2000, 20000):
        x = np.random.default_rng(0).standard_normal((rows, 64)).astype(np.float32)
        one, two = (fastbn.batch_norm_forward(x, num_threads=n)[0] for n in (1, 2))
        assert one.tobytes() == two.tobytes()
    threshold = compiled.team_from(2)
    assert 4096 <= threshold <= 1 << 18
    fastbn.batch_norm_forward(x[:500], num_threads=2)
    assert compiled.team_from(2) == threshold
