# The parallel drivers: they walk tasks over threads, and hold no arithmetic on elements. One module per instruction set
# includes this file (baseline.pyx, x86_64_v3.pyx, x86_64_v4.pyx). The interface is reference.py's.
#
# Thread t of n takes the t-th of n stretches of the tasks, worth as much each as whole tasks allow. Where both steps of a call go over
# the data in the same order, it takes about the same stretch of them in the second, walked backwards, so that it begins with what its
# own cache still holds.

cimport cython
cimport numpy as np
from cython.parallel cimport prange
from libc.math cimport INFINITY
from libc.stdint cimport uintptr_t
from libc.stdlib cimport free, malloc
from libc.string cimport memset

from fastbn._kernels.memory import output_like

np.import_array()

ctypedef Py_ssize_t idx

cdef extern from "tasks.h":
    ctypedef struct param_t:
        const float *f32
        const double *f64
        double otherwise
    ctypedef struct result_t:
        float *f32
        double *f64
    ctypedef enum type_t:
        F32, F64, F16, BF16
    ctypedef struct call_t:
        type_t type
        idx outer, channels, inner
        const void *x
        const void *dy
        const void *added
        const void *y
        void *out
        void *dz
        double slope
        param_t at_mean, at_var, weight, bias
        double eps
        bint batch
        double *mean
        double *second
        bint to_var
        result_t grad_weight, grad_bias
        bint fused
        bint streaming
        idx tiles, chunks
        void *coefs
        double *part_mean
        double *part_second
    ctypedef void (*task_t)(const call_t *, idx) noexcept nogil
    call_t no_call() noexcept nogil
    void read_caches() noexcept nogil
    idx level2_cache, last_level_cache
    void plan(call_t *, int, int, int) noexcept nogil
    bint plan_to_apply(call_t *) noexcept nogil
    ctypedef struct grid_t:
        pass
    grid_t each(idx) noexcept nogil
    grid_t sum_parts(const call_t *) noexcept nogil
    grid_t apply_parts(const call_t *) noexcept nogil
    idx tasks_of(grid_t) noexcept nogil
    idx share_from(grid_t, idx, idx) noexcept nogil
    idx coefs_apart(idx) noexcept nogil
    void walk(task_t, const call_t *, idx, idx, bint) noexcept nogil
    void moments_tile(const call_t *, idx) noexcept nogil
    void moments_part(const call_t *, idx) noexcept nogil
    void merge_moments_tile(const call_t *, idx) noexcept nogil
    bint dz_is_cut(const call_t *) noexcept nogil
    void coefs_all(const call_t *, idx) noexcept nogil
    void normalize_part(const call_t *, idx) noexcept nogil
    void forward_tile(const call_t *, idx) noexcept nogil
    void gradient_tile(const call_t *, idx) noexcept nogil
    void gradient_part(const call_t *, idx) noexcept nogil
    void merge_gradient_tile(const call_t *, idx) noexcept nogil
    void slopes_all(const call_t *, idx) noexcept nogil
    void slope_part(const call_t *, idx) noexcept nogil
    void backward_tile(const call_t *, idx) noexcept nogil
    void limit_part(const call_t *, idx) noexcept nogil
    void blend(result_t, idx, idx, const double *, double, double) noexcept nogil
    int BLOCK

cdef extern from *:
    """
    #ifdef _OPENMP
    #include <omp.h>
    #define OPENMP_VERSION _OPENMP
    #else
    #define OPENMP_VERSION 0
    static double omp_get_wtime(void) { return 0; }
    #endif
    #if defined(__x86_64__) && (__GNUC__ >= 12 || __clang_major__ >= 18)
    #define MACHINE_HAS_V3 __builtin_cpu_supports("x86-64-v3")
    #define MACHINE_HAS_V4 __builtin_cpu_supports("x86-64-v4")
    #define BASELINE_NAME "x86-64"
    #elif defined(__x86_64__)
    #define MACHINE_HAS_V3 (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") \\
        && __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2"))
    #define MACHINE_HAS_V4 (MACHINE_HAS_V3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") \\
        && __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    #define BASELINE_NAME "x86-64"
    #else
    #define MACHINE_HAS_V3 0
    #define MACHINE_HAS_V4 0
    #define BASELINE_NAME "baseline"
    #endif
    #if defined(__AVX512F__)
    #define BUILT_FOR "x86-64-v4"
    #elif defined(__AVX2__)
    #define BUILT_FOR "x86-64-v3"
    #else
    #define BUILT_FOR BASELINE_NAME
    #endif
    """
    double omp_get_wtime() noexcept nogil
    int OPENMP_VERSION, MACHINE_HAS_V3, MACHINE_HAS_V4
    const char *BASELINE_NAME
    const char *BUILT_FOR

read_caches()

NAME = "cython"
INSTRUCTION_SET = BUILT_FOR.decode()


def machine_runs():
    """The instruction sets that this machine's processor has, the richest first."""
    sets = ["x86-64-v4"] if MACHINE_HAS_V4 else []
    if MACHINE_HAS_V3:
        sets.append("x86-64-v3")
    return [*sets, BASELINE_NAME.decode()]


def openmp():
    """The OpenMP run-time in use."""
    if OPENMP_VERSION == 0:
        return "none: the compiler had no OpenMP, and the kernels run on one thread"
    specification = f"OpenMP {OPENMP_VERSION // 100}-{OPENMP_VERSION % 100:02d}"
    try:
        with open("/proc/self/maps") as maps:
            libraries = sorted({line.rpartition(" ")[2].strip() for line in maps if "libgomp" in line or "libomp" in line or "libiomp" in line})
    except OSError:
        libraries = []
    return f"{specification}, {', '.join(libraries) or 'run-time library not known'}"


def has_threads():
    """Whether the kernels can use more than one thread."""
    return OPENMP_VERSION != 0


def caches():
    """The sizes in bytes by which work is divided and streaming chosen: (level 2, last level)."""
    return level2_cache, last_level_cache


def set_caches(idx level2, idx last_level):
    """Other sizes, for tests and for measuring; they move no bit of a result."""
    global level2_cache, last_level_cache
    level2_cache, last_level_cache = level2, last_level


# ---- driving ----

# Fewer elements than this are done sooner by the caller alone than by a team: measured once, by the first call whose size lies
# between what never is worth a team and what always is. It moves no bit of a result.
cdef idx FEW = 4096, MANY = 1 << 18
cdef idx[64] measured_team # by threads, the last for more; 0: not yet measured
memset(measured_team, 0, sizeof(measured_team))


cdef idx worth_a_team(int threads) noexcept nogil:
    """Elements from which a team is worth its start."""
    cdef int i = min(threads, 64) - 1
    if measured_team[i] == 0:
        measured_team[i] = measure_team(threads)
    return measured_team[i]


cdef idx measure_team(int threads) noexcept nogil:
    """From the time that a team takes to start and end, and that a thread takes over an element; the least of several each."""
    cdef double team = 1, alone = 1, start
    cdef int i, t
    cdef call_t k = no_call()
    cdef float *x = <float *>malloc(2 * FEW * sizeof(float))
    cdef double[64] mean, var
    cdef double[5 * 256] coefs
    if x == NULL or OPENMP_VERSION == 0:
        free(x)
        return MANY
    memset(x, 0, 2 * FEW * sizeof(float))
    k.x, k.out, k.outer, k.channels, k.inner = x, x + FEW, FEW // 64, 64, 1
    k.mean, k.second, k.coefs = mean, var, coefs
    k.at_mean, k.at_var, k.weight, k.bias, k.eps = param_of(mean, 0), param_of(var, 1), param_of(NULL, 1), param_of(NULL, 0), 1
    plan(&k, 1, 1, 2)
    for i in range(32):
        start = omp_get_wtime()
        forward_tile(&k, 0)
        alone = min(alone, omp_get_wtime() - start)
        start = omp_get_wtime()
        for t in prange(threads, num_threads=threads, schedule="static", chunksize=1):
            walk(forward_tile, &k, 0, 0, False)
        team = min(team, omp_get_wtime() - start)
    free(x)
    if alone <= 0:  # a coarse clock
        return FEW
    # A team of n saves the (n - 1)/n-th part; half as much again, lest it be lost to a neighbour.
    return max(FEW, min(MANY, <idx>(1.5 * team / (alone / FEW) * threads / (threads - 1))))


def team_from(int threads):
    """Elements from which a call uses that many threads; 0 as long as no call was in doubt."""
    return measured_team[min(threads, 64) - 1]


cdef void run(task_t task, const call_t *k, grid_t grid, int threads, bint backwards) noexcept nogil:
    cdef idx tasks = tasks_of(grid)
    cdef int t
    if threads > tasks:
        threads = <int>tasks
    if threads <= 1:
        walk(task, k, 0, tasks, backwards)
        return
    for t in prange(threads, num_threads=threads, schedule="static", chunksize=1):
        walk(task, k, share_from(grid, t, threads), share_from(grid, t + 1, threads), backwards)


cdef int prepare(call_t *k, idx outer, idx channels, idx inner, int threads, int reads,
                 int passes) noexcept nogil:
    """The plan, and the number of threads that the work is worth."""
    k.outer, k.channels, k.inner = outer, channels, inner
    cdef idx elements = outer * channels * inner
    if threads > 1 and elements < MANY and (elements < FEW or elements < worth_a_team(threads)):
        threads = 1
    plan(k, threads, reads, passes)
    return threads


cdef enum:
    LINE = 64


cdef double *scratch(call_t *k, bint parts) except NULL:
    """Coefficients (from a cache line on), the parts' sums, the channels' sums; one allocation, of channels and not of elements."""
    cdef idx sums = 2 * k.chunks * k.channels if parts else 0
    cdef idx coefs = 5 * coefs_apart(k.channels)
    cdef double *memory = <double *>malloc((sums + coefs + 2 * k.channels) * sizeof(double) + LINE)
    if memory == NULL:
        raise MemoryError("fastbn: no memory for a call's scratch")
    cdef double *lined = <double *>(<uintptr_t>memory + LINE - <uintptr_t>memory % LINE)
    k.coefs = lined
    k.part_mean, k.part_second = lined + coefs, lined + coefs + sums // 2
    if k.mean == NULL:  # a backward's own sums
        k.mean, k.second = lined + coefs + sums, lined + coefs + sums + k.channels
    return memory


# ---- arrays: checked by the caller, contiguous, of the right length ----

cdef inline void *data(np.ndarray array) noexcept:
    return np.PyArray_DATA(array)


cdef inline param_t param(np.ndarray array, double otherwise) noexcept:
    cdef param_t p = param_of(NULL, otherwise)
    if array is not None:
        if np.PyArray_TYPE(array) == np.NPY_FLOAT32:
            p.f32 = <const float *>data(array)
        else:
            p.f64 = <const double *>data(array)
    return p


cdef inline param_t param_of(const double *values, double otherwise) noexcept nogil:
    cdef param_t p
    p.f32, p.f64, p.otherwise = NULL, values, otherwise
    return p


cdef inline result_t result(np.ndarray array) noexcept:
    cdef result_t r
    r.f32, r.f64 = NULL, NULL
    if np.PyArray_TYPE(array) == np.NPY_FLOAT32:
        r.f32 = <float *>data(array)
    else:
        r.f64 = <double *>data(array)
    return r


cdef inline void *data_or_null(np.ndarray array) noexcept:
    return NULL if array is None else data(array)


cdef inline void take(call_t *k, np.ndarray x) noexcept:
    cdef int type = np.PyArray_TYPE(x)
    # Where a long double has 8 bytes, it is a float64. bfloat16 has no number of its own in NumPy: it is what is left.
    k.type = (
        F32 if type == np.NPY_FLOAT32 else F64 if type in (np.NPY_FLOAT64, np.NPY_LONGDOUBLE) else F16 if type == np.NPY_FLOAT16
        else BF16)
    k.x = data(x)


# ---- are the arguments as most are? ----


cdef inline bint plain(object array) noexcept:
    """An ndarray itself, aligned, native."""
    return type(array) is np.ndarray and np.PyArray_ISBEHAVED_RO(<np.ndarray>array)


cdef inline bint vector(object array, idx channels) noexcept:
    return array is None or (
        plain(array) and np.PyArray_NDIM(<np.ndarray>array) == 1 and np.PyArray_DIM(<np.ndarray>array, 0) == channels
        and np.PyArray_IS_C_CONTIGUOUS(<np.ndarray>array)
        and np.PyArray_TYPE(<np.ndarray>array) in (np.NPY_FLOAT32, np.NPY_FLOAT64))


cdef bint dense(np.ndarray x, int axis, idx *outer, idx *inner) noexcept:
    """Whether x has at most 5 axes, elements, and no gaps; if so, its memory in order is (outer, the axis, inner)."""
    cdef int[5] order
    cdef int d, i, ndim = np.PyArray_NDIM(x), count = 0, at = -1
    cdef idx expected = np.PyArray_ITEMSIZE(x)
    if ndim > 5 or np.PyArray_SIZE(x) == 0:
        return False
    for d in range(ndim):  # by stride, the longest first; an axis of length 1 has none
        if np.PyArray_DIM(x, d) == 1:
            continue
        i = count
        while i > 0 and np.PyArray_STRIDE(x, order[i - 1]) < np.PyArray_STRIDE(x, d):
            order[i] = order[i - 1]
            i -= 1
        order[i] = d
        count += 1
    for i in range(count - 1, -1, -1):
        if np.PyArray_STRIDE(x, order[i]) != expected:
            return False
        expected *= np.PyArray_DIM(x, order[i])
        if order[i] == axis:
            at = i
    outer[0] = inner[0] = 1
    for i in range(count):
        if i < at:
            outer[0] *= np.PyArray_DIM(x, order[i])
        elif i > at:
            inner[0] *= np.PyArray_DIM(x, order[i])
    return True


cdef inline bint alike(np.ndarray x, object array) noexcept:
    """As x: plain, of the same type and shape, and in the same order in memory."""
    cdef int d
    if not plain(array) or np.PyArray_TYPE(<np.ndarray>array) != np.PyArray_TYPE(x):
        return False
    if np.PyArray_NDIM(<np.ndarray>array) != np.PyArray_NDIM(x):
        return False
    for d in range(np.PyArray_NDIM(x)):
        if np.PyArray_DIM(<np.ndarray>array, d) != np.PyArray_DIM(x, d):
            return False
        if np.PyArray_DIM(x, d) > 1 and np.PyArray_STRIDE(<np.ndarray>array, d) != np.PyArray_STRIDE(x, d):
            return False
    return True


cdef inline bint apart(np.ndarray out, object array) noexcept:
    """Of arrays without gaps."""
    if array is None:
        return True
    cdef char *a = <char *>data(out)
    cdef char *b = <char *>data(<np.ndarray>array)
    return a + np.PyArray_NBYTES(out) <= b or b + np.PyArray_NBYTES(<np.ndarray>array) <= a


cdef inline bint fits(np.ndarray x, idx channels, object weight, object bias, object like, object out) noexcept:
    """Whether they suit x, which is plain and has no gaps. weight, bias: None or plain vectors. like, out: None or as x; out
    writeable, and apart from weight and bias, and from like if it is not exactly that."""
    if not (vector(weight, channels) and vector(bias, channels)):
        return False
    if like is not None and not alike(x, like):
        return False
    if out is None:
        return True
    return (
        alike(x, out) and np.PyArray_ISWRITEABLE(<np.ndarray>out) and apart(out, weight) and apart(out, bias)
        and (like is None or data(out) == data(like) or apart(out, like)))


cdef bint found(x, eps, axis, idx *outer, idx *channels, idx *inner):
    """The layout of an x that is plain and has no gaps; False where that, eps or axis needs a further look."""
    cdef int at, ndim
    if not plain(x) or type(axis) is not int or type(eps) is not float:
        return False
    ndim = np.PyArray_NDIM(<np.ndarray>x)
    if not (ndim >= 2 and -ndim <= axis < ndim and 0.0 < eps < INFINITY):
        return False
    if np.PyArray_TYPE(<np.ndarray>x) not in (np.NPY_FLOAT32, np.NPY_FLOAT64, np.NPY_FLOAT16):
        return False
    at = axis + ndim if axis < 0 else axis
    channels[0] = np.PyArray_DIM(<np.ndarray>x, at)
    return dense(<np.ndarray>x, at, outer, inner)


def usual(x, idx channels, weight, bias, like, out, others):
    """Whether the arguments are as most are, so that they need no further look: x plain and without gaps; the others None or as
    `fits` has it, `others` None or in C order; out apart from x and from them."""
    cdef idx outer, inner
    if not plain(x) or not dense(x, 0, &outer, &inner) or not fits(x, channels, weight, bias, like, out):
        return False
    if out is not None and not apart(out, x):
        return False
    for array in others:
        if array is None:
            continue
        if not (type(array) is np.ndarray and np.PyArray_IS_C_CONTIGUOUS(<np.ndarray>array)):
            return False
        if out is not None and not apart(out, array):
            return False
    return True


def usual_statistics(mean, var, idx channels):
    """The same for running statistics: two plain vectors, writeable and apart."""
    return (
        mean is not None and var is not None and vector(mean, channels) and vector(var, channels)
        and np.PyArray_ISWRITEABLE(<np.ndarray>mean) and np.PyArray_ISWRITEABLE(<np.ndarray>var) and apart(mean, var))


# ---- the kernels ----

def moments(np.ndarray x, idx outer, idx channels, idx inner, np.ndarray mean, np.ndarray m2, int threads):
    cdef call_t k = no_call()
    take(&k, x)
    k.mean, k.second = <double *>data(mean), <double *>data(m2)
    threads = prepare(&k, outer, channels, inner, threads, 1, 2)
    cdef double *memory = scratch(&k, not k.fused)
    with nogil:
        if k.fused:
            run(moments_tile, &k, each(k.tiles), threads, False)
        else:
            moments_split(&k, threads)
        free(memory)


cdef void moments_split(call_t *k, int threads) noexcept nogil:
    run(moments_part, k, sum_parts(k), threads, False)
    run(merge_moments_tile, k, each(k.tiles), threads if k.chunks * k.channels > MANY else 1, False)


cpdef normalize(np.ndarray x, np.ndarray y, idx outer, idx channels, idx inner, np.ndarray mean, np.ndarray var,
                np.ndarray weight, np.ndarray bias, double eps, np.ndarray residual, double slope, int threads):
    cdef call_t k = no_call()
    take(&k, x)
    k.out, k.added, k.slope = data(y), data_or_null(residual), slope
    k.at_mean, k.at_var = param(mean, 0), param(var, 1)
    k.weight, k.bias, k.eps = param(weight, 1), param(bias, 0), eps
    threads = prepare(&k, outer, channels, inner, threads, 1, 1)
    cdef double *memory = scratch(&k, False)
    with nogil:
        coefs_all(&k, 0)
        run(normalize_part, &k, apply_parts(&k), threads, False)
        free(memory)


def normalize_usual(x, mean, var, weight, bias, eps, axis, residual, double slope, out, int threads):
    """y where all arguments, unchecked, are as most are; None where they need a further look.

    What functional.batch_norm, layout.py and checks.py find out, for the commonest arguments: of a call on 32×64 values, finding
    it out in Python takes most of the time.
    """
    cdef idx outer, channels, inner
    if not found(x, eps, axis, &outer, &channels, &inner):
        return None
    if mean is None or var is None or not (vector(mean, channels) and vector(var, channels)):
        return None
    if not fits(x, channels, weight, bias, residual, out):
        return None
    if out is None:
        out = output_like(x)
    elif not (apart(out, mean) and apart(out, var) and (data(out) == data(x) or apart(out, x))):
        return None
    normalize(x, out, outer, channels, inner, mean, var, weight, bias, eps, residual, slope, threads)
    return out


cpdef forward(np.ndarray x, np.ndarray y, idx outer, idx channels, idx inner, np.ndarray weight, np.ndarray bias,
              double eps, np.ndarray mean, np.ndarray var, np.ndarray residual, double slope, int threads):
    cdef call_t k = no_call()
    take(&k, x)
    k.out, k.added, k.slope = data(y), data_or_null(residual), slope
    k.mean, k.second, k.to_var = <double *>data(mean), <double *>data(var), True
    k.at_mean, k.at_var = param_of(k.mean, 0), param_of(k.second, 1)
    k.weight, k.bias, k.eps = param(weight, 1), param(bias, 0), eps
    threads = prepare(&k, outer, channels, inner, threads, 1, 2)
    cdef double *memory = scratch(&k, not k.fused)
    cdef bint back
    with nogil:
        if k.fused:
            run(forward_tile, &k, each(k.tiles), threads, False)
        else:
            moments_split(&k, threads)
            coefs_all(&k, 0)
            back = plan_to_apply(&k)
            run(normalize_part, &k, apply_parts(&k), threads, back)
        free(memory)


def forward_usual(x, weight, bias, eps, axis, residual, double slope, out, int threads):
    """(y, mean, var, outer, channels, inner) where all arguments, unchecked, are as most are, and x in C order; else None."""
    cdef idx outer, channels, inner
    cdef np.npy_intp[1] length
    cdef np.ndarray mean, var
    if not found(x, eps, axis, &outer, &channels, &inner) or not np.PyArray_IS_C_CONTIGUOUS(<np.ndarray>x):
        return None
    if outer * inner == 1 or not fits(x, channels, weight, bias, residual, out):
        return None
    if out is None:
        out = output_like(x)
    elif not apart(out, x):
        return None
    length[0] = channels
    mean = np.PyArray_EMPTY(1, length, np.NPY_FLOAT64, 0)
    var = np.PyArray_EMPTY(1, length, np.NPY_FLOAT64, 0)
    forward(x, out, outer, channels, inner, weight, bias, eps, mean, var, residual, slope, threads)
    return out, mean, var, outer, channels, inner


def gradient_moments(np.ndarray dy, np.ndarray x, idx outer, idx channels, idx inner, np.ndarray mean,
                     np.ndarray sum_dy, np.ndarray sum_dy_xmu, int threads):
    cdef call_t k = no_call()
    take(&k, x)
    k.dy = data(dy)
    k.at_mean, k.at_var = param(mean, 0), param(None, 1)
    k.mean, k.second = <double *>data(sum_dy), <double *>data(sum_dy_xmu)
    threads = prepare(&k, outer, channels, inner, threads, 2, 2)
    cdef double *memory = scratch(&k, not k.fused)
    with nogil:
        coefs_all(&k, 0)
        if k.fused:
            run(gradient_tile, &k, each(k.tiles), threads, False)
        else:
            gradient_split(&k, threads)
        free(memory)


cdef void gradient_split(call_t *k, int threads) noexcept nogil:
    run(gradient_part, k, sum_parts(k), threads, False)
    run(merge_gradient_tile, k, each(k.tiles), threads if k.chunks * k.channels > MANY else 1, False)


def input_gradient(np.ndarray dy, np.ndarray x, np.ndarray dx, idx outer, idx channels, idx inner, np.ndarray mean,
                   np.ndarray var, np.ndarray weight, double eps, np.ndarray sum_dy, np.ndarray sum_dy_xmu, int threads):
    cdef call_t k = no_call()
    take(&k, x)
    k.dy, k.out, k.batch = data(dy), data(dx), True
    k.at_mean, k.at_var = param(mean, 0), param(var, 1)
    k.weight, k.eps = param(weight, 1), eps
    k.mean, k.second = <double *>data(sum_dy), <double *>data(sum_dy_xmu)
    threads = prepare(&k, outer, channels, inner, threads, 2, 1)
    cdef double *memory = scratch(&k, False)
    with nogil:
        coefs_all(&k, 0)
        slopes_all(&k, 0)
        run(slope_part, &k, apply_parts(&k), threads, False)
        free(memory)


def backward(np.ndarray dy, np.ndarray x, np.ndarray dx, idx outer, idx channels, idx inner, np.ndarray mean,
             np.ndarray var, np.ndarray weight, np.ndarray bias, double eps, np.ndarray grad_weight,
             np.ndarray grad_bias, bint batch, np.ndarray y, np.ndarray dresidual, double slope, int threads):
    cdef call_t k = no_call()
    take(&k, x)
    k.dy, k.out, k.batch, k.slope = data(dy), data(dx), batch, slope
    k.dz = data_or_null(dresidual)
    if dz_is_cut(&k):  # without an activation nothing is, whatever y says
        k.y = data(y)
    elif k.dz == k.dy:  # dy is there already
        k.dz = NULL
    k.at_mean, k.at_var = param(mean, 0), param(var, 1)
    k.weight, k.bias, k.eps = param(weight, 1), param(bias, 0), eps
    k.grad_weight, k.grad_bias = result(grad_weight), result(grad_bias)
    threads = prepare(&k, outer, channels, inner, threads, 4 if dz_is_cut(&k) else 2, 2)
    cdef double *memory = scratch(&k, not k.fused)
    cdef bint back
    with nogil:
        if k.fused:
            run(backward_tile, &k, each(k.tiles), threads, False)
        else:
            coefs_all(&k, 0)
            gradient_split(&k, threads)
            slopes_all(&k, 0)
            back = plan_to_apply(&k)
            run(slope_part, &k, apply_parts(&k), threads, back)
        free(memory)


def update_running_stats(np.ndarray running_mean, np.ndarray running_var, np.ndarray mean, np.ndarray var,
                         double momentum, double correction):
    cdef idx channels = np.PyArray_DIM(mean, 0)
    # By stride: a running statistic may be a view, and is updated in place.
    blend(result(running_mean), np.PyArray_STRIDE(running_mean, 0), channels, <const double *>data(mean), 1, momentum)
    blend(result(running_var), np.PyArray_STRIDE(running_var, 0), channels, <const double *>data(var), correction,
          momentum)


def limit(np.ndarray x, np.ndarray other, np.ndarray out, bint streaming, int threads):
    """out = x, or x + other, or (out None) only reads them: what memory allows, for benchmarks to be held against."""
    cdef call_t k = no_call()
    take(&k, x)
    k.dy = NULL if other is None else data(other)
    k.out, k.streaming = data_or_null(out), streaming
    k.outer = k.channels = 1
    k.inner = np.PyArray_SIZE(x)
    with nogil:
        run(limit_part, &k, each((k.inner + BLOCK - 1) // BLOCK), threads, False)
