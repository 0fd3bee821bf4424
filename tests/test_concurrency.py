"""Many Python threads, forks and spawned processes: right numbers, to the bit, and no crash, abort or hang.

The jobs run in processes of their own, which a mistake may end; a hang ends with every thread's traceback. One
fork, one spawned worker and the first calls at once are in `test_backends.py`, Numba's OpenMP layer in
`test_numba_cpu.py`.
"""

import os
import textwrap

import pytest
from conftest import load_kernels, run_python, runnable_sets

# A step of training and one of evaluation, their backward passes, and moments, of arrays large enough for a team.
PRELUDE = """
import faulthandler, multiprocessing, os, signal, sys, threading, time, traceback, types, warnings
faulthandler.dump_traceback_later(100, exit=True)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=lambda: signal.alarm(60))
warnings.simplefilter("ignore", DeprecationWarning)  # from 3.12 on: a process with threads forks

import numpy as np, fastbn
from fastbn import backends

CHANNELS = 24
rng = np.random.default_rng(20150211)
weight, bias, mean = rng.standard_normal((3, CHANNELS)).astype(np.float32)
var = rng.uniform(0.5, 2, CHANNELS).astype(np.float32)

def batch(seed, rows=64, inner=70):
    x, dy = np.random.default_rng(seed).standard_normal((2, rows, CHANNELS, inner)).astype(np.float32)
    return x + 3, dy

def work(x, dy, threads=None):
    y, saved = fastbn.batch_norm_forward(x, weight, bias, num_threads=threads)
    e, fixed = fastbn.batch_norm_eval_forward(x, mean, var, weight, bias, num_threads=threads)
    m = fastbn.moments(x, num_threads=threads)
    results = [y, saved.mean, saved.var, e, m.mean, m.m2]
    for s in (saved, fixed):
        results += fastbn.batch_norm_backward(dy, s, num_threads=threads)
    return [result.tobytes() for result in results]

def together(calls):  # in one Python thread each, at once; their results, in order
    results, barrier = [None] * len(calls), threading.Barrier(len(calls))
    def run(i):
        barrier.wait()
        results[i] = calls[i]()
    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results

def in_child(call):  # forks; whether what the child computed was true
    child = os.fork()
    if child == 0:
        code = 1
        try:
            code = 0 if call() else 2
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code:
        print("a child ended with", code, file=sys.stderr)
    return code == 0
"""

JOBS = {
    # Eight at once, half of them on one read-only batch, each with a team and without.
    "threads on the same and on other arrays": """
        data = [batch(seed) for seed in range(5)]
        for arrays in data:
            for array in arrays:
                array.flags.writeable = False
        want = [work(*arrays, 1) for arrays in data]

        def several(i):
            return all(work(*data[min(i, 4)], 1 + (i + turn) % 2) == want[min(i, 4)] for turn in range(3))

        assert together([lambda i=i: several(i) for i in range(8)]) == [True] * 8
    """,
    # Backward passes over one forward pass, and one layer in eval mode, into arrays of each thread's own.
    "threads on one saved and one layer": """
        x, dy = batch(0)
        layer = fastbn.BatchNorm(CHANNELS).eval()
        layer.running_mean[...], layer.running_var[...] = mean, var
        saved = fastbn.batch_norm_forward(x, weight, bias)[1]

        def several(threads):
            dx, y, seen = np.empty_like(x), np.empty_like(x), set()
            for _ in range(4):
                gradients = fastbn.batch_norm_backward(dy, saved, out=dx, num_threads=threads)
                seen.add(b"".join(result.tobytes() for result in (*gradients, layer(x, out=y))))
            return seen

        assert len(set.union(*together([lambda i=i: several(1 + i % 2) for i in range(8)]))) == 1
    """,
    # With the interpreter's own switching turned off, another thread gets on only where a call gives up the GIL: in the
    # kernels, and, as stubs in their place show, nowhere else. A kernel may be done before the other thread has woken
    # up, so each may try many times; one that holds the GIL never succeeds.
    "no kernel holds the GIL": """
        x, dy = batch(0, 256, 196)
        saved = fastbn.batch_norm_forward(x)[1]
        fixed = fastbn.batch_norm_eval_forward(x, mean, var)[1]
        calls = {
            "moments": lambda n: fastbn.moments(x, num_threads=n),
            "forward": lambda n: fastbn.batch_norm_forward(x, num_threads=n),
            "normalize": lambda n: fastbn.batch_norm(x, mean, var, num_threads=n),
            "backward": lambda n: fastbn.batch_norm_backward(dy, saved, num_threads=n),
            "backward, fixed statistics": lambda n: fastbn.batch_norm_backward(dy, fixed, num_threads=n),
        }
        for call in calls.values():  # compiled, and the team measured
            call(1), call(2)
        module = backends.kernels()
        stub = types.SimpleNamespace(**{name: getattr(module, name) for name in dir(module)})
        stub.moments = stub.forward = stub.normalize = stub.backward = lambda *arguments: None
        stub.normalize_usual = lambda x, *arguments: x
        stub.forward_usual = lambda *arguments: None
        count, end = 0, False

        def counting():
            global count
            while not end:
                count += 1
                time.sleep(0)

        def gets_on(call, tries):
            for _ in range(tries):
                before = count
                call()
                if count > before:
                    return True
            return False

        interval = sys.getswitchinterval()
        sys.setswitchinterval(1e6)
        counter = threading.Thread(target=counting, daemon=True)
        counter.start()
        try:
            stuck = [(name, n) for name, call in calls.items() for n in (1, 2) if not gets_on(lambda: call(n), 2000)]
            backends._backend = stub
            elsewhere = [name for name, call in calls.items() if gets_on(lambda: call(1), 20)]
        finally:
            end = True
            sys.setswitchinterval(interval)
            backends._backend = module
        counter.join()
        assert not stuck and not elsewhere, (stuck, elsewhere)
    """,
    # As a data loader's: the forked workers normalize, and so does the parent, which had a team before and has one now.
    "a forked pool beside its parent": """
        def job(seed):
            return work(*batch(seed))

        want = [job(seed) for seed in range(6)]
        with multiprocessing.get_context("fork").Pool(2) as pool:
            results = pool.map_async(job, list(range(6)) * 2, chunksize=1)
            while True:
                assert [work(*batch(seed), 2) for seed in range(3)] == want[:3]
                if results.ready():
                    break
            assert results.get(60) == want * 2
    """,
    # From two threads, while two others are in the kernels; each child forks again. One thread each, and the same bits.
    "forks from threads, and from forks": """
        x, dy = batch(0)
        want = work(x, dy, 2)
        assert work(x, dy, 1) == want

        def right():
            return work(x, dy, 2) == want and backends.num_threads(2) == 1

        def forks():
            return all(in_child(lambda: right() and in_child(right)) for _ in range(3))

        def busy():
            return all(work(x, dy, 2) == want for _ in range(12))

        assert together([forks, busy, busy, forks]) == [True] * 4
        assert work(x, dy, 2) == want and backends.num_threads(2) == 2
    """,
    "a fork that starts threads": """
        data = [batch(seed) for seed in range(4)]
        want = [work(*arrays, 2) for arrays in data]
        calls = [lambda arrays=arrays: work(*arrays, 2) for arrays in data] * 2
        assert in_child(lambda: together(calls) == want * 2)
    """,
}

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
PARAMETERS = [pytest.param(job, id=job, marks=needs_fork if "fork" in job else ()) for job in JOBS]


@pytest.mark.parametrize("name", ["cython", "reference"])
@pytest.mark.parametrize("job", PARAMETERS)
def test_job(name, job):
    load_kernels(name if name != "cython" else f"cython {(runnable_sets() or ['x86-64'])[0]}")
    run_python(PRELUDE + textwrap.dedent(JOBS[job]), FASTBN_BACKEND=name)


@needs_fork
def test_numba_on_its_workqueue_layer():
    """All the jobs, in one process for the compiler's sake.

    The layer, which serves where there is no OpenMP, ends the process if two threads enter it, or a forked child does.
    """
    load_kernels("numba")
    code = PRELUDE
    for job in JOBS:
        code += f"print({job!r}, file=sys.stderr, flush=True)\n" + textwrap.dedent(JOBS[job])
    code += "import numba\nassert numba.threading_layer() == 'workqueue'\n"
    run_python(code, FASTBN_BACKEND="numba", NUMBA_THREADING_LAYER="workqueue", NUMBA_NUM_THREADS="2")


@needs_fork
def test_a_fork_while_numba_compiles():
    """The child compiles, too: it has not inherited a lock that nobody will open."""
    load_kernels("numba")
    code = """
from numba.core.compiler_lock import global_compiler_lock
backends.kernels()
x = batch(0, 8, 5)[0]
thread = threading.Thread(target=lambda: fastbn.batch_norm_forward(x))
thread.start()
while global_compiler_lock._lock.acquire(blocking=False):
    global_compiler_lock._lock.release()
    time.sleep(1e-4)
assert in_child(lambda: np.isfinite(fastbn.batch_norm_forward(x.astype(np.float64))[0]).all())
thread.join()
"""
    run_python(PRELUDE + code, FASTBN_BACKEND="numba")


SPAWNED = """
from pathlib import Path
Path("spawned_job.py").write_text('''
def job(layer, x, dy):
    results = layer(x), layer.backward(dy), layer.grad_weight, layer.grad_bias
    return layer, [result.tobytes() for result in results]
''')
import copy, numpy as np
from spawned_job import job
layer = fastbn.BatchNorm(CHANNELS, activation="relu")
before = layer.state_dict()
want, bits = job(copy.deepcopy(layer), *batch(0))
with multiprocessing.get_context("spawn").Pool(1) as pool:
    got, same = pool.apply_async(job, (layer, *batch(0))).get(90)
assert same == bits
for state, other in ((got, want.state_dict()), (layer, before)):
    for name, array in state.state_dict().items():
        assert array.tobytes() == other[name].tobytes(), name
"""


def test_a_layer_trains_in_a_spawned_process(tmp_path, monkeypatch):
    """It goes there and comes back, trained as it would have been here."""
    kept = os.environ.get("PYTHONPATH")
    monkeypatch.chdir(tmp_path)
    paths = [str(tmp_path), *([kept] if kept else [])]
    run_python(PRELUDE + SPAWNED, PYTHONPATH=os.pathsep.join(paths))
