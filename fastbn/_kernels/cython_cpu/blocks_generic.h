/* The block primitives for one type: S in memory, T in registers; blocks.h includes this once per type and says what it is. */

#define VEC FN(vec)
#define NARROW FN(vec16)
#define MASK FN(mask)
#define MASK16 FN(mask16)
#define WIDTH ((idx)(VECTOR_BYTES / sizeof(T)))   /* elements of a native vector */
#define NARROW_WIDTH ((idx)(16 / sizeof(T)))
#define UNIT ((idx)(UNIT_BYTES / sizeof(T)))
#define LANES ((idx)(LANE_BYTES / sizeof(T)))
#define LINE ((idx)(64 / sizeof(S)))              /* elements of a cache line */

/* aligned(1): data may begin at any byte, as a view into a file's bytes does. */
typedef S FN(element) __attribute__((aligned(1), may_alias));
typedef T VEC __attribute__((vector_size(VECTOR_BYTES), aligned(1), may_alias));
typedef T NARROW __attribute__((vector_size(16), aligned(1), may_alias));
typedef BITS MASK __attribute__((vector_size(VECTOR_BYTES), aligned(1), may_alias));
typedef BITS MASK16 __attribute__((vector_size(16), aligned(1), may_alias));

/* T from and to memory: coefficients and sums. */
INLINE T FN(get1)(const T *p) { return *p; }
INLINE NARROW FN(get16)(const T *p) { return *(const NARROW *)p; }
INLINE VEC FN(get)(const T *p) { return *(const VEC *)p; }
INLINE void FN(put1)(T *p, T v) { *p = v; }
INLINE void FN(put16)(T *p, NARROW v) { *(NARROW *)p = v; }
INLINE void FN(put)(T *p, VEC v) { *(VEC *)p = v; }

/* S from and to memory: data. */
#ifdef HALF
INLINE T FN(load1)(const S *p) { return HALF(from1)(*(const FN(element) *)p); }
INLINE NARROW FN(load16)(const S *p) { return (NARROW)HALF(load16)(p); }
INLINE VEC FN(load)(const S *p) { return (VEC)HALF(load)(p); }
INLINE void FN(store1)(S *p, T v) { *(FN(element) *)p = HALF(round1)(v); }
INLINE void FN(store16)(S *p, NARROW v) { *(halves16 *)p = HALF(round16)((floats16)v); }
INLINE void FN(store)(S *p, VEC v) { *(halves *)p = HALF(round)((floats)v); }
#else
INLINE T FN(load1)(const S *p) { return *(const FN(element) *)p; }
INLINE NARROW FN(load16)(const S *p) { return *(const NARROW *)p; }
INLINE VEC FN(load)(const S *p) { return *(const VEC *)p; }
INLINE void FN(store1)(S *p, T v) { *(FN(element) *)p = v; }
INLINE void FN(store16)(S *p, NARROW v) { *(NARROW *)p = v; }
INLINE void FN(store)(S *p, VEC v) { *(VEC *)p = v; }
#endif

/* Stores that do not read the line first; p is aligned to the vector's bytes. */
#if !defined(__x86_64__)
INLINE void FN(stream16)(S *p, NARROW v) { FN(store16)(p, v); }
INLINE void FN(stream)(S *p, VEC v) { FN(store)(p, v); }
#elif defined(HALF)
INLINE void FN(stream16)(S *p, NARROW v)
{
    long long four;
    halves16 h = HALF(round16)((floats16)v);
    memcpy(&four, &h, sizeof four);
    _mm_stream_si64((void *)p, four);
}
INLINE void FN(stream)(S *p, VEC v)
{
#if VECTOR_BYTES == 64
    _mm256_stream_si256((void *)p, (__m256i)HALF(round)((floats)v));
#elif VECTOR_BYTES == 32
    _mm_stream_si128((void *)p, (__m128i)HALF(round)((floats)v));
#else
    FN(stream16)(p, v);
#endif
}
#else
INLINE void FN(stream16)(S *p, NARROW v) { _mm_stream_si128((void *)p, (__m128i)v); }
INLINE void FN(stream)(S *p, VEC v)
{
#if VECTOR_BYTES == 64
    _mm512_stream_si512((void *)p, (__m512i)v);
#elif VECTOR_BYTES == 32
    _mm256_stream_si256((void *)p, (__m256i)v);
#else
    _mm_stream_si128((void *)p, (__m128i)v);
#endif
}
#endif

/* a − b, by the units that multiply: a·1 − b rounds once, as a − b does. */
INLINE T FN(less1)(T a, T b) { return a - b; }
INLINE NARROW FN(less16)(NARROW a, NARROW b) { return a - b; }
INLINE VEC FN(less)(VEC a, VEC b)
{
#ifdef FMSUB
    VEC one = (VEC){0} + 1;
    __asm__("" : "+v"(one)); /* lest the compiler see through it */
    return (VEC)FMSUB(a, one, b);
#else
    return a - b;
#endif
}

/* Held in a register: gcc would load it anew for each use. Rows are found from a held pointer to the first: gcc would keep one to each,
 * more than there are registers. */
#ifdef __x86_64__
#define HOLD(vector) __asm__("" : "+v"(vector))
#define HOLD_POINTER(p) __asm__("" : "+r"(p))
#else
#define HOLD(vector)
#define HOLD_POINTER(p)
#endif

/* g where z > 0 (or is not a number), slope·g elsewhere, as `kind` says: an activation (g = z), and what its gradient passes. */
INLINE T FN(gate1)(kind_t kind, T g, T z, T slope)
{
    if (kind == PLAIN || !(z <= 0)) return g;
    return kind == RELU || slope == 0 ? 0 : g * slope;
}
#define DEFINE_GATE(W, V, M)                                                                                           \
    INLINE V FN(gate##W)(kind_t kind, V g, V z, T slope)                                                               \
    {                                                                                                                  \
        if (kind == PLAIN) return g;                                                                                   \
        const BITS keep = kind != LEAKY && slope == 0 ? 0 : -1;                                                        \
        M under = (M)(z <= 0);                                                                                         \
        if (kind == RELU) return (V)(~under & (M)g);                                                                   \
        return (V)((under & keep & (M)(g * slope)) | (~under & (M)g));                                                 \
    }
DEFINE_GATE(16, NARROW, MASK16)
#ifdef ABOVE
INLINE VEC FN(gate)(kind_t kind, VEC g, VEC z, T slope)
{
    if (kind == PLAIN) return g;
    const BITS keep = kind != LEAKY && slope == 0 ? 0 : -1;
    HOLD(g); /* loaded by a mask, it would wait for z */
    VEC less = kind == RELU ? (VEC){0} : (VEC)((MASK)(g * slope) & keep);
    return (VEC)CHOOSE(ABOVE(z), g, less);
}
#else
DEFINE_GATE(, VEC, MASK)
#endif
#undef DEFINE_GATE

/* Elements before p + i is aligned to `bytes`, at most len; len where it never is. */
static inline idx FN(misaligned)(const S *p, idx len, uintptr_t bytes)
{
    uintptr_t off = -(uintptr_t)p % bytes;
    return off % sizeof(S) ? len : least(len, (idx)(off / sizeof(S)));
}

/* Keeps the compiler from making vector code of a loop of a few turns. */
#define ONE_BY_ONE __asm__ volatile("")

/* The element-wise loop: out[i] = FORMULA(W, i), i from 0 to len. W names the width: single elements and narrow vectors until the
 * output is aligned, whole vectors, and the same at the end (a store or load that straddles two cache lines costs two).
 * PREPARE(W, i) has the coefficients; AHEAD(i) asks for what is needed later. */
#define LOAD(W) FN(load##W)
#define GET(W) FN(get##W)
#define GATE(W) FN(gate##W)
#define STEP(W, STORE, count)                                                                                          \
    {                                                                                                                  \
        PREPARE(W, i)                                                                                                  \
        STORE(out + i, FORMULA(W, i));                                                                                 \
        i += count;                                                                                                    \
    }
#define SWEEP(STORE, STORE16)                                                                                          \
    {                                                                                                                  \
        idx i = 0, few = FN(misaligned)(out, len, sizeof(S) * NARROW_WIDTH);                                           \
        idx head = FN(misaligned)(out, len, sizeof(S) * WIDTH);                                                        \
        while (i < few) { ONE_BY_ONE; STEP(1, FN(store1), 1) }                                                         \
        while (!few && i + NARROW_WIDTH <= head) { ONE_BY_ONE; STEP(16, STORE16, NARROW_WIDTH) }                       \
        while (i + NARROW_WIDTH <= head) { ONE_BY_ONE; STEP(16, FN(store16), NARROW_WIDTH) }                           \
        while (i + WIDTH <= len) {                                                                                     \
            AHEAD(i)                                                                                                   \
            STEP(, STORE, WIDTH)                                                                                       \
        }                                                                                                              \
        while (i + NARROW_WIDTH <= len && (len - i) % NARROW_WIDTH) { ONE_BY_ONE; STEP(16, FN(store16), NARROW_WIDTH) } \
        while (i + NARROW_WIDTH <= len) { ONE_BY_ONE; STEP(16, STORE16, NARROW_WIDTH) }                                \
        while (i < len) { ONE_BY_ONE; STEP(1, FN(store1), 1) }                                                         \
    }
#define SWEEP_STORE SWEEP(FN(store), FN(store16))
#define SWEEP_STREAM SWEEP(FN(stream), FN(stream16))

/* A vector of which the first n elements are a's, the others b's. */
#ifdef CHOOSE
typedef unsigned FN(some);
INLINE FN(some) FN(first)(idx n) { return (1u << n) - 1; }
INLINE VEC FN(both)(FN(some) first, VEC a, VEC b) { return (VEC)CHOOSE(first, a, b); }
#else
typedef MASK FN(some);
INLINE MASK FN(first)(idx n)
{
    BITS place[VECTOR_BYTES / sizeof(T)];
    UNROLLED for (int j = 0; j < (int)(VECTOR_BYTES / sizeof(T)); j++) place[j] = j;
    return (MASK)(*(const MASK *)place < (BITS)n);
}
INLINE VEC FN(both)(MASK first, VEC a, VEC b) { return (VEC)((first & (MASK)a) | (~first & (MASK)b)); }
#endif

/* (value − 0, as 0 + value would lose the sign of a zero.) */
#define SPLAT(W, value) ((value) - (__typeof__(GET(W)((const T *)0))){0})

/* LOOPS twice, with and without asking: a look at `ahead` for each vector would cost as much as to ask. */
#define WHETHER_ASKED(LOOPS)                                                                                           \
    {                                                                                                                  \
        if (ahead) { LOOPS }                                                                                           \
        else { LOOPS }                                                                                                 \
    }

/* As SWEEP, over `planes` planes of `inner` elements, one behind the other, of channels c, c + 1, … (0 after `channels` − 1): out[i] =
 * FORMULA(W, i). Planes of fewer elements than a vector come alone, and all where `out` is never aligned; elsewhere a vector may
 * belong to two channels, and no plane has ragged ends. COEFS(EACH, W, c) has the coefficients of channel c, as EACH(W, name, value) for
 * each. Those of the next channel are made once: for the vector that it shares with this one, then for its own. */
#define ALONE(W, name, value) const __typeof__(GET(W)((const T *)0)) name = SPLAT(W, value);
#define FIRST(W, name, value) VEC name##_here = SPLAT(W, value);
#define NEXT(W, name, value) const VEC name##_next = SPLAT(W, value);
#define HERE(W, name, value) const VEC name = name##_here;
#define SHARED(W, name, value) const VEC name = FN(both)(first, name##_here, name##_next);
#define MOVE_ON(W, name, value) name##_here = name##_next;
#define SWEEP_PLANES(STORE, STORE16)                                                                                   \
    {                                                                                                                  \
        const idx len = planes * inner, few = FN(misaligned)(out, len, sizeof(S) * NARROW_WIDTH);                      \
        const idx head = FN(misaligned)(out, len, sizeof(S) * WIDTH);                                                  \
        idx i = 0, end = inner;                                                                                        \
        while (i < few) { ONE_BY_ONE; PLANE_STEP(1, FN(store1), 1) }                                                   \
        while (!few && i + NARROW_WIDTH <= head) { ONE_BY_ONE; PLANE_STEP(16, STORE16, NARROW_WIDTH) }                 \
        while (i + NARROW_WIDTH <= head) { ONE_BY_ONE; PLANE_STEP(16, FN(store16), NARROW_WIDTH) }                     \
        COEFS(FIRST, , c)                                                                                              \
        for (;;) {                                                                                                     \
            WHETHER_ASKED(for (; i + WIDTH <= end; i += WIDTH) {                                                       \
                COEFS(HERE, , c)                                                                                       \
                AHEAD(i)                                                                                               \
                STORE(out + i, FORMULA(, i));                                                                          \
            })                                                                                                         \
            if (i + WIDTH > len) break;                                                                                \
            c = c + 1 < channels ? c + 1 : 0;                                                                          \
            COEFS(NEXT, , c)                                                                                           \
            if (i < end) {                                                                                             \
                const FN(some) first = FN(first)(end - i);                                                             \
                COEFS(SHARED, , c)                                                                                     \
                AHEAD(i)                                                                                               \
                STORE(out + i, FORMULA(, i));                                                                          \
                i += WIDTH;                                                                                            \
            }                                                                                                          \
            COEFS(MOVE_ON, , c)                                                                                        \
            end += inner;                                                                                              \
        }                                                                                                              \
        while (i + NARROW_WIDTH <= len && (len - i) % NARROW_WIDTH) { ONE_BY_ONE; PLANE_STEP(16, FN(store16), NARROW_WIDTH) } \
        while (i + NARROW_WIDTH <= len) { ONE_BY_ONE; PLANE_STEP(16, STORE16, NARROW_WIDTH) }                          \
        while (i < len) { ONE_BY_ONE; PLANE_STEP(1, FN(store1), 1) }                                                   \
    }
#define PLANE_STEP(W, STORE, count)                                                                                    \
    {                                                                                                                  \
        COEFS(ALONE, W, c)                                                                                             \
        STORE(out + i, FORMULA(W, i));                                                                                 \
        i += count;                                                                                                    \
    }
#define EACH_PLANE if (streaming) SWEEP_PLANES(FN(stream), FN(stream16)) else SWEEP_PLANES(FN(store), FN(store16))

/* Four terms are added to each other before they are added to a sum: a quarter of the roundings, and none that goes one way time
 * after time, as those of squares do (which are 0 or 1 modulo 4), and of equal terms. */
#define TREE(v) ((v[0] + v[1]) + (v[2] + v[3]))

static inline double FN(sum_of_8)(const double *t)
{
    return ((t[0] + t[4]) + (t[2] + t[6])) + ((t[1] + t[5]) + (t[3] + t[7]));
}

static inline double FN(sum_lanes)(const T *lane, idx n)
{
    double t[8] = {0};
    for (idx i = 0; i < n; i += 8)
        UNROLLED for (int j = 0; j < 8; j++) t[j] += (double)lane[i + j];
    return FN(sum_of_8)(t);
}

/* A pivot is a value such as the data has, lest every x − pivot be rounded alike. */
INLINE T FN(pivot_of)(T mean)
{
    S stored;
    FN(store1)(&stored, mean);
    return FN(load1)(&stored);
}
INLINE VEC FN(pivots_of)(VEC mean)
{
    S stored[VECTOR_BYTES / sizeof(T)];
    FN(store)(stored, mean);
    return FN(load)(stored);
}

/* May s and q, taken in T about a pivot, stand for the block? Not where the pivot was far from the mean (m2 less than a share of q: see
 * share_of), nor where squares overflowed (or the data is not finite) or lost digits to underflow. */
static inline int FN(stands)(double s, double q, double m2, double count, double share)
{
    return (q - q == 0) & (m2 >= share * q) & ((q > TINY * count) | ((q == 0) & (s == 0)));
}

/* A scale that would overflow T becomes T's largest: 0·∞ must not make a constant channel NaN where eps is minute. */
static inline double FN(within)(double scale)
{
    return scale > LARGEST ? LARGEST : scale < -LARGEST ? -LARGEST : scale;
}

/* What normalize needs: y = (x − hi)·a + b, a value a channel (or a column). */
typedef struct { T *hi, *a, *b; } FN(coefs);

/* Is T enough for a channel? Not for float where x − hi may overflow (|hi| ≥ 2¹⁰³, half a unit of the largest number), or where a
 * coefficient overflows or has lost digits to underflow. Such a channel is wide: it has hi = ∞, and is worked out in float64,
 * element by element. */
static inline int FN(wide)(T hi) { return sizeof(T) < sizeof(double) && hi == (T)INFINITY; }

static inline int FN(enough)(double coefficient)
{
    return (!(fabs(coefficient) > LARGEST)) & ((coefficient == 0) | (!(fabs(coefficient) < SMALLEST)));
}

/* Of n channels at once, for a division or a root of eight costs little more than of one. */
static inline void FN(coefs_set)(FN(coefs) v, idx n, const double *restrict mean, const double *restrict var,
                                 const double *restrict weight, const double *restrict bias, double eps)
{
    T *restrict his = v.hi, *restrict as = v.a, *restrict bs = v.b;
    for (idx c = 0; c < n; c++) {
        double scale = weight[c] * inverse_std(var[c], eps), a = FN(within)(scale);
        int wide = sizeof(T) < sizeof(double) && ((fabs(mean[c]) >= 0x1p103) | !FN(enough)(scale));
        T hi = wide ? (T)INFINITY : (T)mean[c];
        his[c] = hi;
        as[c] = (T)a;
        bs[c] = (T)(bias[c] - (mean[c] - (double)hi) * a);
    }
}

/* What the input gradient needs beside them: dx = ((dy − m) − (x − hi)·k)·a. */
typedef struct { FN(coefs) v; T *m, *k; } FN(slopes);

static inline void FN(slopes_set)(FN(slopes) g, idx n, const double *restrict mean, const double *restrict var, double eps,
                                  const double *restrict dy, const double *restrict dy_xmu, double count)
{
    T *restrict his = g.v.hi, *restrict ms = g.m, *restrict ks = g.k;
    for (idx c = 0; c < n; c++) {
        double k = dy_xmu[c] / count / (var[c] + eps), m = dy[c] / count - (mean[c] - (double)his[c]) * k;
        int wide = sizeof(T) < sizeof(double) && ((fabs(m) >= 0x1p103) | !FN(enough)(k));
        ks[c] = (T)k;
        ms[c] = (T)m;
        his[c] = wide ? (T)INFINITY : his[c];
    }
}

/* What a gradient step reads and writes beside dy and x: see kind_t. And whether what it writes goes past the cache. */
typedef struct { kind_t kind; T slope; const S *y; S *dz; int streaming; } FN(gate_t);

/* dz of W elements: dy, as far as the activation passed it. d is x − hi. */
#define DZ(W, at, d, a, b) GATE(W)(gate.kind, LOAD(W)(dy + (at)), GATE_BY(W, at, LOAD(W)(dy + (at)), d, a, b), gate.slope)
/* By what a gradient g is gated: y, or z as the forward pass had it. */
#define GATE_BY(W, at, g, d, a, b)                                                                                     \
    (gate.kind == PLAIN   ? (g)                                                                                        \
     : gate.kind == GATED ? LOAD(W)(gate.y + (at))                                                                     \
                          : (__typeof__(LOAD(W)(dy)))((d) * (a) + (b)))

/* ---- runs ------------------------------------------------------------------------------------------------- */

/* Moments of a block in two sweeps of float64, the first about its first value: right for any data whose sums are float64 numbers, at
 * half the speed. Run by run, so that no sum is of many terms. Squares that overflow make m2 infinite. */
static __attribute__((noinline)) moments_t FN(moments_runs_slow)(const S *x, block_t b)
{
    double count = (double)(b.runs * b.len), s[8] = {0}, q[8] = {0}, mean = (double)FN(load1)(x);
    for (int sweep = 0; sweep < 2; sweep++) {
        memset(s, 0, sizeof s);
        for (idx r = 0; r < b.runs; r++) {
            double run_s[8] = {0}, run_q[8] = {0};
            for (idx i = 0; i < b.len; i++) {
                double d = (double)FN(load1)(x + r * b.stride + i) - mean;
                run_s[i & 7] += d;
                run_q[i & 7] += d * d;
            }
            s[r & 7] += FN(sum_of_8)(run_s);
            if (sweep) q[r & 7] += FN(sum_of_8)(run_q);
        }
        if (!sweep) mean += FN(sum_of_8)(s) / count;
    }
    double shift = FN(sum_of_8)(s), m2 = FN(sum_of_8)(q);
    if (m2 - m2 == 0) m2 -= shift * (shift / count); /* beyond float64 it is infinite, and no ∞ − ∞ */
    moments_t m = {count, mean + shift / count, m2 < 0 ? 0 : m2};
    return m;
}

/* IN x: the block's first element. */
static inline moments_t FN(moments_runs)(const S *x, block_t b)
{
    enum { V = LANE_BYTES / VECTOR_BYTES };
    const double origin = (double)FN(load1)(x); /* a constant block's pivot is exactly its value */
    double first = 0;
    idx few = 16; /* or fewer, a power of two: the mean of values of few digits then has few digits, and no x − pivot is rounded */
    while (few > b.len) few /= 2;
    for (idx i = 0; i < few; i++) first += (double)FN(load1)(x + i) - origin;
    T pivot = FN(pivot_of)((T)(origin + first / (double)few));

    VEC s[V] = {{0}}, q[V] = {{0}};
    T tail_s[16] = {0}, tail_q[16] = {0};
    const idx next = b.runs > 1 ? b.stride : 0; /* the hardware does not foresee the next plane */
    for (idx r = 0; r < b.runs; r++) {
        const S *run = x + r * b.stride;
        idx i = 0;
        for (; i + 4 * LANES <= b.len; i += 4 * LANES) {
            for (idx l = 0; next && l < 4 * LANES; l += LINE) __builtin_prefetch(run + next + i + l);
            UNROLLED for (int v = 0; v < V; v++) {
                VEC d[4], e[4];
                UNROLLED for (int j = 0; j < 4; j++)
                    d[j] = FN(less)(FN(load)(run + i + j * LANES + v * WIDTH), (VEC){0} + pivot);
                UNROLLED for (int j = 0; j < 4; j++) e[j] = d[j] * d[j];
                s[v] += TREE(d);
                q[v] += TREE(e);
            }
        }
        for (; i + LANES <= b.len; i += LANES) {
            for (idx l = 0; next && l < LANES; l += LINE) __builtin_prefetch(run + next + i + l);
            UNROLLED for (int v = 0; v < V; v++) {
                VEC d = FN(less)(FN(load)(run + i + v * WIDTH), (VEC){0} + pivot);
                s[v] += d;
                q[v] += d * d;
            }
        }
        if (i + UNIT <= b.len) {
            UNROLLED for (int v = 0; v < VECTORS_A_UNIT; v++) {
                VEC d = FN(less)(FN(load)(run + i + v * WIDTH), (VEC){0} + pivot);
                s[v] += d;
                q[v] += d * d;
            }
            i += UNIT;
        }
        for (idx j = 0; j < b.len - i; j++) {
            T d = FN(load1)(run + i + j) - pivot;
            tail_s[j] += d;
            tail_q[j] += d * d;
        }
    }
    double sum = FN(sum_lanes)((const T *)s, LANES) + FN(sum_lanes)(tail_s, 16);
    double squares = FN(sum_lanes)((const T *)q, LANES) + FN(sum_lanes)(tail_q, 16);
    double count = (double)(b.runs * b.len), shift = sum / count, m2 = squares - sum * shift;
    if (!FN(stands)(sum, squares, m2, count, share_of(few))) return FN(moments_runs_slow)(x, b);
    moments_t m = {count, (double)pivot + shift, m2};
    return m;
}

#define NOTHING(...)

/* Asks for what lies `ahead` elements on (0: for nothing), once a line: what a step needs soon, or, where a tile's data is in cache
 * and the step only writes to memory, the next tile. Into L1: from there it sinks to L2, if it was not needed soon. */
INLINE void FN(ask_ahead)(const S *p, idx i, idx ahead)
{
    if (ahead && (WIDTH >= LINE || i % LINE < WIDTH)) __builtin_prefetch(p + ahead + i);
}

INLINE void FN(ask_to_write)(const S *p, idx i, idx ahead)
{
    if (ahead && (WIDTH >= LINE || i % LINE < WIDTH)) __builtin_prefetch(p + ahead + i, 1);
}

/* z of W elements, and what becomes of it. */
#define Y(W, at, hi, a, b)                                                                                             \
    GATE(W)(kind, Z(W, at, hi, a, b), Z(W, at, hi, a, b), slope)
#define Z(W, at, hi, a, b)                                                                                             \
    (kind == ADDED ? ((LOAD(W)(x + (at)) - hi) * a + b) + LOAD(W)(added + (at)) : (LOAD(W)(x + (at)) - hi) * a + b)

/* IN x, added (or NULL), OUT y: planes from channel c on, as SWEEP_PLANES has them. out may be x or added. */
INLINE void FN(apply_planes_as)(kind_t kind, const S *x, const S *added, S *out, idx planes, idx inner, FN(coefs) v, idx c,
                                idx channels, T slope, int streaming, idx ahead)
{
#define AHEAD(i)                                                                                                       \
    FN(ask_ahead)(x, i, ahead);                                                                                        \
    if (kind == ADDED) FN(ask_ahead)(added, i, ahead);
#define COEFS(EACH, W, c) EACH(W, hi, v.hi[c]) EACH(W, a, v.a[c]) EACH(W, b, v.b[c])
#define FORMULA(W, i) Y(W, i, hi, a, b)
    EACH_PLANE
#undef FORMULA
#undef COEFS
#undef AHEAD
}

static void FN(apply_planes)(kind_t kind, const S *x, const S *added, S *out, idx planes, idx inner, FN(coefs) v, idx c,
                             idx channels, T slope, int streaming, idx ahead)
{
#define AS(kind) FN(apply_planes_as)(kind, x, added, out, planes, inner, v, c, channels, slope, streaming, ahead)
    switch (kind) {
    case PLAIN: AS(PLAIN); break;
    case RELU: AS(RELU); break;
    case LEAKY: AS(LEAKY); break;
    default: AS(ADDED);
    }
#undef AS
}

/* Gradient sums of a block about hi, in the data's type or, where that overflowed, in float64. */
typedef struct { double dy, dy_x; } FN(sums);

static __attribute__((noinline)) FN(sums) FN(gradient_runs_slow)(FN(gate_t) gate, const S *dy, const S *x, block_t b,
                                                                FN(coefs) v, idx c)
{
    FN(sums) t = {0, 0};
    if (gate.kind == GATED && gate.dz) { /* dz is there, and dy may be no more */
        gate.kind = PLAIN;
        dy = gate.dz;
    }
    for (idx r = 0; r < b.runs; r++)
        for (idx i = r * b.stride; i < r * b.stride + b.len; i++) {
            double d = (double)FN(load1)(x + i) - (double)v.hi[c];
            T dz = DZ(1, i, FN(load1)(x + i) - v.hi[c], v.a[c], v.b[c]);
            t.dy += (double)dz;
            t.dy_x += (double)dz * d;
        }
    return t;
}

INLINE FN(sums) FN(gradient_runs_as)(FN(gate_t) gate, const S *dy, const S *x, block_t b, FN(coefs) v, idx c)
{
    enum { V = LANE_BYTES / VECTOR_BYTES };
    const T hi = v.hi[c], sa = v.a[c], sb = v.b[c];
    VEC s[V] = {{0}}, q[V] = {{0}};
    T tail_s[16] = {0}, tail_q[16] = {0};
    const idx next = b.runs > 1 ? b.stride : 0; /* the hardware does not foresee the next plane */
#define UNITS(n)                                                                                                       \
    UNROLLED for (int u = 0; u < (n); u++) {                                                                           \
        idx at = r * b.stride + i + u * WIDTH;                                                                         \
        VEC d = FN(less)(FN(load)(x + at), (VEC){0} + hi), g = DZ(, at, d, sa, sb);                                    \
        if (gate.kind == GATED && gate.dz) FN(store)(gate.dz + at, g);                                                 \
        s[u] += g;                                                                                                     \
        q[u] += g * d;                                                                                                 \
    }
#define FETCH(n)                                                                                                       \
    for (idx l = 0; next && l < (n); l += LINE) {                                                                      \
        __builtin_prefetch(x + (r + 1) * next + i + l);                                                                \
        __builtin_prefetch(dy + (r + 1) * next + i + l);                                                               \
        if (gate.kind == GATED) __builtin_prefetch(gate.y + (r + 1) * next + i + l);                                   \
    }
    for (idx r = 0; r < b.runs; r++) {
        idx i = 0;
        for (; i + 4 * LANES <= b.len; i += 4 * LANES) {
            FETCH(4 * LANES)
            UNROLLED for (int u = 0; u < V; u++) {
                VEC g[4], e[4];
                UNROLLED for (int j = 0; j < 4; j++) {
                    idx at = r * b.stride + i + j * LANES + u * WIDTH;
                    VEC d = FN(less)(FN(load)(x + at), (VEC){0} + hi);
                    g[j] = DZ(, at, d, sa, sb);
                    if (gate.kind == GATED && gate.dz) FN(store)(gate.dz + at, g[j]);
                    e[j] = g[j] * d;
                }
                s[u] += TREE(g);
                q[u] += TREE(e);
            }
        }
        for (; i + LANES <= b.len; i += LANES) {
            FETCH(LANES)
            UNITS(V)
        }
        if (i + UNIT <= b.len) {
            UNITS(VECTORS_A_UNIT)
            i += UNIT;
        }
        for (idx j = 0; j < b.len - i; j++) {
            idx at = r * b.stride + i + j;
            T d = FN(load1)(x + at) - hi, g = DZ(1, at, d, sa, sb);
            if (gate.kind == GATED && gate.dz) FN(store1)(gate.dz + at, g);
            tail_s[j] += g;
            tail_q[j] += g * d;
        }
    }
#undef UNITS
#undef FETCH
    FN(sums) t = {FN(sum_lanes)((const T *)s, LANES) + FN(sum_lanes)(tail_s, 16),
                  FN(sum_lanes)((const T *)q, LANES) + FN(sum_lanes)(tail_q, 16)};
    double probe = t.dy + t.dy_x;
    return probe - probe == 0 ? t : FN(gradient_runs_slow)(gate, dy, x, b, v, c);
}

/* IN dy, x: a block of channel c. OUT gate.dz, if GATED and there. */
static FN(sums) FN(gradient_runs)(FN(gate_t) gate, const S *dy, const S *x, block_t b, FN(coefs) v, idx c)
{
    FN(gate_t) g = gate;
    switch (gate.kind) {
    case PLAIN: g.kind = PLAIN; return FN(gradient_runs_as)(g, dy, x, b, v, c);
    case RELU: g.kind = RELU; return FN(gradient_runs_as)(g, dy, x, b, v, c);
    case LEAKY: g.kind = LEAKY; return FN(gradient_runs_as)(g, dy, x, b, v, c);
    default: g.kind = GATED; return FN(gradient_runs_as)(g, dy, x, b, v, c);
    }
}

static inline int FN(lie_alike)(const S *dz, const S *out)
{
    return ((uintptr_t)dz - (uintptr_t)out) % (WIDTH * sizeof(S)) == 0;
}

/* What goes to the residual beside dx goes past the cache if dx does and both lie alike to vectors. */
static inline int FN(streams_beside)(FN(gate_t) gate, int beside, const S *out)
{
    return beside && gate.streaming && FN(lie_alike)(gate.dz, out);
}

INLINE T FN(pass1)(FN(gate_t) gate, int beside, idx at, int streams, T dz)
{
    if (beside) FN(store1)(gate.dz + at, dz);
    return dz;
}
INLINE NARROW FN(pass16)(FN(gate_t) gate, int beside, idx at, int streams, NARROW dz)
{
    if (beside) FN(store16)(gate.dz + at, dz);
    return dz;
}
INLINE VEC FN(pass)(FN(gate_t) gate, int beside, idx at, int streams, VEC dz)
{
    if (beside) {
        if (streams) FN(stream)(gate.dz + at, dz);
        else FN(store)(gate.dz + at, dz);
    }
    return dz;
}

/* IN dy, x, OUT dx, gate.dz (if `beside`): planes from channel c on; with fixed statistics (not `batch`) dx = dz·a. out or gate.dz may
 * be dy. */
INLINE void FN(slope_planes_as)(FN(gate_t) gate, int beside, int batch, const S *dy, const S *x, S *out, idx planes, idx inner,
                                FN(slopes) g, idx c, idx channels, idx ahead)
{
    const int streaming = gate.streaming, streams = FN(streams_beside)(gate, beside, out);
    const int needs_z = gate.kind == RELU || gate.kind == LEAKY;
#define AHEAD(i)                                                                                                       \
    FN(ask_ahead)(dy, i, ahead), FN(ask_ahead)(x, i, ahead);                                                           \
    if (gate.kind == GATED) FN(ask_ahead)(gate.y, i, ahead);
#define PASS(W, i, d) FN(pass##W)(gate, beside, i, streams, DZ(W, i, d, a, b))
#define COEFS(EACH, W, c)                                                                                              \
    EACH(W, hi, g.v.hi[c]) EACH(W, a, g.v.a[c]) EACH(W, m, g.m[c]) EACH(W, k, g.k[c]) EACH(W, b, (needs_z ? g.v.b : g.v.a)[c])
#define FORMULA(W, i) ((PASS(W, i, LOAD(W)(x + i) - hi) - m) - (LOAD(W)(x + i) - hi) * k) * a
    if (batch) {
        EACH_PLANE
    }
#undef FORMULA
#undef COEFS
#define COEFS(EACH, W, c) EACH(W, a, g.v.a[c]) EACH(W, hi, (needs_z ? g.v.hi : g.v.a)[c]) EACH(W, b, (needs_z ? g.v.b : g.v.a)[c])
#define FORMULA(W, i) PASS(W, i, LOAD(W)(x + i) - hi) * a
    else {
        EACH_PLANE
    }
#undef FORMULA
#undef COEFS
#undef AHEAD
}

/* What may be written beside dx: dy itself, or what the activation passed of it. */
#define EACH_GATE(AS)                                                                                                  \
    switch (gate.kind) {                                                                                               \
    case PLAIN:                                                                                                        \
        if (gate.dz) AS(PLAIN, 1);                                                                                     \
        else AS(PLAIN, 0);                                                                                             \
        break;                                                                                                         \
    case RELU: AS(RELU, 0); break;                                                                                     \
    case LEAKY: AS(LEAKY, 0); break;                                                                                   \
    default:                                                                                                           \
        if (gate.dz) AS(GATED, 1);                                                                                     \
        else AS(GATED, 0);                                                                                             \
    }

static void FN(slope_planes)(FN(gate_t) gate, int batch, const S *dy, const S *x, S *out, idx planes, idx inner, FN(slopes) g,
                             idx c, idx channels, idx ahead)
{
    FN(gate_t) as = gate;
#define AS(is, beside)                                                                                                 \
    as.kind = is, FN(slope_planes_as)(as, beside, batch, dy, x, out, planes, inner, g, c, channels, ahead)
    EACH_GATE(AS)
#undef AS
}

/* IN a, b, OUT out: out = a, or a + b where there is a b; without out they are only read. What memory allows: the measure of
 * everything above. */
static volatile T FN(seen);

static void FN(copy_or_add_run)(const S *a, const S *b, S *out, idx len, int streaming)
{
    if (!out) { /* four sums: with one, each addition would wait for the one before */
        VEC seen[4] = {{0}};
        for (idx i = 0; i + 4 * WIDTH <= len; i += 4 * WIDTH)
            UNROLLED for (int j = 0; j < 4; j++) {
                seen[j] += FN(load)(a + i + j * WIDTH);
                if (b) seen[j] += FN(load)(b + i + j * WIDTH);
            }
        VEC sum = TREE(seen);
        HOLD(sum);
        FN(seen) = sum[0];
        return;
    }
#define AHEAD NOTHING
#define PREPARE NOTHING
#define FORMULA(W, i) LOAD(W)(a + i)
    if (!b) {
        if (streaming) SWEEP_STREAM else SWEEP_STORE
    }
#undef FORMULA
#define FORMULA(W, i) LOAD(W)(a + i) + LOAD(W)(b + i)
    else {
        if (streaming) SWEEP_STREAM else SWEEP_STORE
    }
#undef FORMULA
#undef AHEAD
#undef PREPARE
}

/* IN dy, OUT gate.dz: `len` elements of it past the cache, and no dx. */
static void FN(pass_alone)(FN(gate_t) gate, const S *dy, idx len)
{
    S *out = gate.dz;
    if (gate.kind != GATED) {
        FN(copy_or_add_run)(dy, NULL, out, len, 1);
        return;
    }
#define AHEAD NOTHING
#define PREPARE NOTHING
#define FORMULA(W, i) GATE(W)(GATED, LOAD(W)(dy + i), LOAD(W)(gate.y + i), gate.slope)
    SWEEP_STREAM
#undef FORMULA
#undef AHEAD
#undef PREPARE
}

/* ---- columns ---------------------------------------------------------------------------------------------- */

/* One channel of a block of columns in two sweeps of float64. */
static __attribute__((noinline)) void FN(moments_column_slow)(const S *x, idx rows, tile_t t, idx c, double *mean,
                                                              double *m2)
{
    block_t b = {0, rows, t.ld, t.inner};
    moments_t m = FN(moments_runs_slow)(x + c * t.inner, b);
    mean[c] = m.mean;
    m2[c] = m.m2;
}

/* Column sums to channel sums, in float64: where a channel has one column, there is nothing to add. */
static void FN(fold_columns)(const T *restrict column, tile_t t, idx join, double *restrict sum)
{
    if (t.inner == 1) {
        for (idx c = 0; c < t.channels; c++) sum[c] = (double)column[c];
        for (idx j = 1; j < join; j++)
            for (idx c = 0; c < t.channels; c++) sum[c] += (double)column[j * t.channels + c];
    } else
        for (idx c = 0; c < t.channels; c++) {
            const T *mine = column + c * t.inner;
            idx even = t.inner / 8 * 8;
            double total = FN(sum_lanes)(mine, even);
            for (idx j = even; j < t.inner; j++) total += (double)mine[j];
            sum[c] = total;
        }
}

/* IN values, OUT repeated (which may be values itself): n of them, `times` times one after the other. */
static T *FN(repeat)(const T *values, idx n, idx times, T *repeated)
{
    for (idx i = repeated == values; i < times; i++) memcpy(repeated + i * n, values, (size_t)n * sizeof(T));
    return repeated;
}

/* The same of coefficients (of hi, or of all), into rooms that begin on a line, from element `shift` of each on. */
static FN(coefs) FN(repeat_coefs)(FN(coefs) v, idx n, idx times, idx shift, T (*room)[APART], int all)
{
    v.hi = FN(repeat)(v.hi, n, times, room[0] + shift);
    if (all) {
        v.a = FN(repeat)(v.a, n, times, room[1] + shift);
        v.b = FN(repeat)(v.b, n, times, room[2] + shift);
    }
    return v;
}

static FN(slopes) FN(repeat_slopes)(FN(slopes) g, idx n, idx times, idx shift, T (*room)[APART])
{
    FN(slopes) w = {FN(repeat_coefs)(g.v, n, times, shift, room, 1), FN(repeat)(g.m, n, times, room[3] + shift),
                    FN(repeat)(g.k, n, times, room[4] + shift)};
    return w;
}

/* One value a channel to one a column. */
static void FN(spread_columns)(const T *channel, tile_t t, T *column)
{
    for (idx c = 0; c < t.channels; c++)
        for (idx j = 0; j < t.inner; j++) column[c * t.inner + j] = channel[c];
}

/* Pivots: the mean of eight rows (four, one, where there are no more), or of some of the channel's columns in the first row; for a
 * constant channel, its value. Of how many values each was made. */
static idx FN(pivots)(const S *x, idx rows, tile_t t, T *pivot)
{
    if (t.inner > 1) {
        const idx some = t.inner < 16 ? 1 : 16;
        for (idx c = 0; c < t.channels; c++) {
            T mean = FN(load1)(x + c * t.inner);
            if (some == 16) {
                T row[16];
                UNROLLED for (idx j = 0; j < 16; j += NARROW_WIDTH) FN(put16)(row + j, FN(load16)(x + c * t.inner + j));
                mean = FN(pivot_of)((T)(FN(sum_lanes)(row, 16) / 16));
            }
            for (idx j = 0; j < t.inner; j++) pivot[c * t.inner + j] = mean;
        }
        return some;
    }
    const idx some = rows < 4 ? 1 : rows < 8 ? 4 : 8;
    const T quarter = (T)0.25, half = (T)0.5;
#define ROW(W, r) quarter * LOAD(W)(x + (r) * t.ld + k)
#define MEAN_OF_FOUR(W, r) ((ROW(W, r) + ROW(W, r + 1)) + (ROW(W, r + 2) + ROW(W, r + 3)))
#define MEAN(W) (some == 4 ? MEAN_OF_FOUR(W, 0) : half * MEAN_OF_FOUR(W, 0) + half * MEAN_OF_FOUR(W, 4))
    idx k = 0;
    for (; some > 1 && k + WIDTH <= t.channels; k += WIDTH) FN(put)(pivot + k, FN(pivots_of)(MEAN()));
    for (; some > 1 && k < t.channels; k++) pivot[k] = FN(pivot_of)(MEAN(1));
    for (; k < t.channels; k++) pivot[k] = FN(load1)(x + k);
#undef MEAN
#undef MEAN_OF_FOUR
#undef ROW
    return some;
}

/* How far ahead of a group a sum asks for lines of a tensor, in bytes: L1 must hold it for all of them. */
static inline idx FN(lead_in_lines)(tile_t t, int tensors) { return t.place == CACHED || tensors > 2 ? LEAD / 2 : LEAD; }

/* Rows are read in fours, but memory likes to be read in order: while one group is summed, what lies further on is asked for, line
 * after line where the tile is the whole row and rows are short against that lead (the fourth would be summed first), else in each of
 * the four rows. Into L1: asked for into L2 it came little sooner. In cache only rows of some length gain by it. Out of cache two tensors
 * and more are read row by row, where rows lie one behind the other. That has more sums to load and store: too many for narrow vectors,
 * half types (as many sums, half the data), and one tensor, which is as fast in fours. */
static inline asks_t FN(asks_of)(tile_t t, int tensors)
{
    idx row = t.ld * (idx)sizeof(S);
    int whole = t.channels * t.inner == t.ld;
    if (t.place == CACHED) return whole && row >= 512 && row <= 1024 ? IN_LINES : SILENT;
    if (t.place == FAR && whole && tensors > 1 && sizeof(S) == sizeof(T) && VECTOR_BYTES > 16) return IN_ORDER;
    return whole && row < FN(lead_in_lines)(t, tensors) / 2 ? IN_LINES : IN_ROWS;
}

/* How far ahead, in elements: of the group, of the element in its order (6 KiB of two tensors, 4 of three), or of column k in each row. */
static inline idx FN(lead_of)(asks_t asks, tile_t t, int tensors)
{
    if (asks == IN_LINES) return FN(lead_in_lines)(t, tensors) / (idx)sizeof(S);
    if (asks == IN_ORDER) return LEAD * 3 / 2 / tensors / (idx)sizeof(S);
    return least(LEAD / 4 / tensors / (idx)sizeof(S), t.channels * t.inner);
}

/* While columns from k on are summed in four rows, or in one. Where one of four rows ends, the next group's comes. (always_inline: gcc
 * drops calls of a function that does nothing but prefetch.) */
INLINE void FN(ask)(asks_t asks, const S *row, idx k, idx head, idx cols, idx ld, idx lead)
{
    if (asks == IN_LINES)
        UNROLLED for (idx l = 0; l < 4 * WIDTH; l += LINE) __builtin_prefetch(row + lead + 4 * (k - head) + l);
    else if (asks == IN_ROWS) {
        const S *later = row + k + lead + (k + lead < cols ? 0 : 4 * ld - cols);
        UNROLLED for (int j = 0; j < 4; j++) __builtin_prefetch(later + j * ld);
    } else if (asks == IN_ORDER)
        __builtin_prefetch(row + k + lead);
}

/* Columns before the one from which on x is aligned to vectors, in every row; 0 where nothing is gained by it, or rows do not all
 * lie alike. Rows apart by pages meet in one set of L1, where half lines would not last until the other half is read; and in
 * cache long rows gain. Elsewhere the ends of rows cost more than vectors that straddle lines. */
static inline idx FN(unaligned_columns)(const S *x, tile_t t)
{
    idx cols = t.channels * t.inner, head = FN(misaligned)(x, cols, sizeof(S) * WIDTH);
    const int gains = cols >= 512 && (t.place == CACHED || cols != t.ld);
    return gains && t.ld % WIDTH == 0 && head < cols ? head : 0;
}

/* The same for what is written past the cache: that goes by whole lines, or not at all. */
static inline idx FN(columns_to_line)(const S *out, tile_t t)
{
    idx cols = t.channels * t.inner, head = FN(misaligned)(out, cols, UNIT_BYTES);
    return WIDTH == UNIT && head < cols ? head : 0;
}

/* Where what is read beside column `head` begins, for that to lie on a line too: in a room that begins on one. */
static inline idx FN(to_line)(idx head) { return (UNIT - head % UNIT) % UNIT; }

/* What the sums of a block of columns have at hand: rows of `cols` columns, `ld` apart, `head` of them before the first aligned vector;
 * how far ahead is asked (see lead_of); v, a value a column (of moments, hi: the pivots); both sums, APART, and, IN_ORDER, four that
 * wait. Of gradients, dy, and whether dz goes past the cache. */
typedef struct { const S *x, *dy; idx ld, head, cols, lead; int streams; FN(coefs) v; T *sums; } FN(rows_t);

/* k over all columns of a row, as SWEEP goes over a run; vectors ask for what is needed later. */
#define SWEEP_COLUMNS(COLUMN)                                                                                          \
    {                                                                                                                  \
        idx k = 0;                                                                                                     \
        for (; k < head % NARROW_WIDTH; k++) { ONE_BY_ONE; COLUMN(1, T) }                                              \
        for (; k < head; k += NARROW_WIDTH) { ONE_BY_ONE; COLUMN(16, NARROW) }                                         \
        for (; k + WIDTH <= cols; k += WIDTH) { ASK COLUMN(, VEC) }                                                    \
        for (; k + NARROW_WIDTH <= cols; k += NARROW_WIDTH) { ONE_BY_ONE; COLUMN(16, NARROW) }                         \
        for (; k < cols; k++) { ONE_BY_ONE; COLUMN(1, T) }                                                             \
    }

/* The same of rows r to `end`, `step` at a time. Rows of whole vectors, which most are, need no look at their ends. */
#define SWEEP_ROWS(COLUMN, end, step)                                                                                  \
    if (!head && cols % WIDTH == 0)                                                                                    \
        for (; r < end; r += step)                                                                                     \
            for (idx k = 0; k + WIDTH <= cols; k += WIDTH) { ASK COLUMN(, VEC) }                                       \
    else                                                                                                               \
        for (; r < end; r += step) SWEEP_COLUMNS(COLUMN)

/* A loop for each way of asking, and for each kind of gradient, in a function of its own: what decides would cost more within, and
 * where one function has them all, gcc keeps their pointers in memory. */
#define OWN static __attribute__((noinline))

/* IN sums about pivots, INOUT mean (the pivots before), OUT m2: a value a channel. Whether all of them stand. (By a share found
 * before: with its choice in the loop gcc leaves that scalar.) */
static int FN(moments_from_sums)(idx channels, double count, double share, const double *restrict sum,
                                 const double *restrict squares, double *restrict mean, double *restrict m2)
{
    const double inverse = 1.0 / count;
    int all = 1;
    for (idx c = 0; c < channels; c++) {
        double shift = sum[c] * inverse;
        mean[c] += shift;
        m2[c] = squares[c] - sum[c] * shift;
        all &= FN(stands)(sum[c], squares[c], m2[c], count, share);
    }
    return all;
}

/* INOUT sums about the pivots: of rows, four at a time, added up as a tree. Returns how many were taken. */
INLINE idx FN(moments_rows_as)(asks_t asks, FN(rows_t) w, idx all)
{
    const S *x = w.x;
    const idx ld = w.ld, head = w.head, cols = w.cols, lead = w.lead;
    const T *pivot = w.v.hi;
    T *s = w.sums, *q = s + APART;
    idx r = 0;
#define ASK FN(ask)(asks, x + r * ld, k, head, cols, ld, lead);
#define COLUMN(W, V)                                                                                                   \
    {                                                                                                                  \
        const S *xs = x + r * ld + k;                                                                                  \
        V p = GET(W)(pivot + k), d[4], e[4];                                                                           \
        UNROLLED for (int j = 0; j < 4; j++) d[j] = FN(less##W)(LOAD(W)(xs + j * ld), p);                              \
        UNROLLED for (int j = 0; j < 4; j++) e[j] = d[j] * d[j];                                                       \
        FN(put##W)(s + k, GET(W)(s + k) + TREE(d));                                                                    \
        FN(put##W)(q + k, GET(W)(q + k) + TREE(e));                                                                    \
    }
    SWEEP_ROWS(COLUMN, all - 3, 4)
#undef COLUMN
#undef ASK
    return r;
}
OWN idx FN(moments_rows_silent)(FN(rows_t) w, idx all) { return FN(moments_rows_as)(SILENT, w, all); }
OWN idx FN(moments_rows_in_lines)(FN(rows_t) w, idx all) { return FN(moments_rows_as)(IN_LINES, w, all); }
OWN idx FN(moments_rows_in_rows)(FN(rows_t) w, idx all) { return FN(moments_rows_as)(IN_ROWS, w, all); }

/* Of row r alone. */
static void FN(moments_row)(FN(rows_t) w, idx r)
{
    const S *x = w.x + r * w.ld;
    const idx head = w.head, cols = w.cols;
    T *s = w.sums, *q = s + APART;
#define ASK
#define COLUMN(W, V)                                                                                                   \
    {                                                                                                                  \
        V d = FN(less##W)(LOAD(W)(x + k), GET(W)(w.v.hi + k));                                                         \
        FN(put##W)(s + k, GET(W)(s + k) + d);                                                                          \
        FN(put##W)(q + k, GET(W)(q + k) + d * d);                                                                      \
    }
    SWEEP_COLUMNS(COLUMN)
#undef COLUMN
#undef ASK
}

/* IN x: `rows` ≤ rows_a_block() rows of the tile. OUT mean, m2: a value a channel. */
static void FN(moments_columns)(const S *x, idx rows, tile_t t, double *mean, double *m2)
{
    T room[3][APART] LINED;
    double sum[MAX_COLUMNS], squares[MAX_COLUMNS];
    const idx join = rows_to_sum_as_one(t), all = rows / join, rest = rows % join * t.channels;
    const tile_t tile = joined(t, join);
    const idx cols = tile.channels * tile.inner, head = FN(unaligned_columns)(x, tile), shift = FN(to_line)(head);
    T *pivot = room[0] + shift, *s = room[1] + shift, *q = room[2] + shift;
    const double count = (double)(rows * t.inner);

    const double share = share_of(FN(pivots)(x, rows, t, pivot));
    FN(repeat)(pivot, t.channels, join, pivot);
    memset(s, 0, (size_t)cols * sizeof(T));
    memset(q, 0, (size_t)cols * sizeof(T));
    const asks_t asks = FN(asks_of)(tile, 1);
    FN(rows_t) w = {x, NULL, tile.ld, head, cols, FN(lead_of)(asks, tile, 1), 0, {pivot, NULL, NULL}, s};
    idx r = asks == SILENT ? FN(moments_rows_silent)(w, all)
            : asks == IN_LINES ? FN(moments_rows_in_lines)(w, all) : FN(moments_rows_in_rows)(w, all);
    for (; r < all; r++) FN(moments_row)(w, r);
    if (rest) {
        w.cols = rest, w.head = 0;
        FN(moments_row)(w, all);
    }

    FN(fold_columns)(s, t, join, sum);
    FN(fold_columns)(q, t, join, squares);
    if (t.inner == 1) /* one loop for both would be scalar */
        for (idx c = 0; c < t.channels; c++) mean[c] = (double)pivot[c];
    else
        for (idx c = 0; c < t.channels; c++) mean[c] = (double)pivot[c * t.inner];
    if (!FN(moments_from_sums)(t.channels, count, share, sum, squares, mean, m2))
        for (idx c = 0; c < t.channels; c++)
            if (!FN(stands)(sum[c], squares[c], m2[c], count, share)) FN(moments_column_slow)(x, rows, t, c, mean, m2);
}

static inline idx FN(some_rows_on)(idx ld) { return ld * (1 + 4096 / ld); }

/* Rows [0, all) of a tile, one by one: memory likes to be read and written in order, and coefficients that begin on a line cost
 * less than the cache's own pace. Where rows are streamed and end in the middle of a line, that line alone goes through the cache,
 * and all that is streamed waits for it: it is asked for in time. Rows of whole, aligned vectors, which most are, need no look at
 * their ends. SHIFT goes on to the next row. */
#define WHOLE_ROW(STORE) for (idx i = 0; i < len;) { AHEAD(i) STEP(, STORE, WIDTH) }
#define ROWS_BY(LOOP)                                                                                                  \
    for (idx r = 0; r < all; r++) {                                                                                    \
        if (streaming && ld % LINE) __builtin_prefetch(out + FN(some_rows_on)(ld), 1);                                 \
        LOOP                                                                                                           \
        SHIFT                                                                                                          \
    }
#define EACH_ROW                                                                                                       \
    if (!(len % WIDTH) && !(ld % WIDTH) && !FN(misaligned)(out, len, sizeof(S) * WIDTH))                               \
        WHETHER_ASKED(if (streaming) ROWS_BY(WHOLE_ROW(FN(stream))) else ROWS_BY(WHOLE_ROW(FN(store))))                \
    else ROWS_BY(if (streaming) SWEEP_STREAM else SWEEP_STORE)

/* IN x, added (or NULL), OUT y: `all` rows of `len` columns. out may be x or added. */
INLINE void FN(apply_columns_as)(kind_t kind, const S *x, const S *added, S *out, idx all, idx ld, idx len, FN(coefs) v,
                                 T slope, int streaming, idx ahead)
{
    const T *restrict his = v.hi, *restrict as = v.a, *restrict bs = v.b;
#define SHIFT x += ld, added += kind == ADDED ? ld : 0, out += ld;
#define PREPARE(W, i) __typeof__(GET(W)(his)) hi = GET(W)(his + i), a = GET(W)(as + i), b = GET(W)(bs + i);
#define AHEAD(i)                                                                                                       \
    FN(ask_ahead)(x, i, ahead);                                                                                        \
    if (kind == ADDED) FN(ask_ahead)(added, i, ahead);                                                                 \
    if (!streaming) FN(ask_to_write)(out, i, ahead);
#define FORMULA(W, i) Y(W, i, hi, a, b)
    EACH_ROW
#undef FORMULA
#undef AHEAD
#undef PREPARE
#undef SHIFT
}

static void FN(apply_columns)(kind_t kind, const S *x, const S *added, S *out, idx all, idx ld, idx len, FN(coefs) v,
                              T slope, int streaming, idx ahead)
{
    switch (kind) {
    case PLAIN: FN(apply_columns_as)(PLAIN, x, added, out, all, ld, len, v, slope, streaming, ahead); break;
    case RELU: FN(apply_columns_as)(RELU, x, added, out, all, ld, len, v, slope, streaming, ahead); break;
    case LEAKY: FN(apply_columns_as)(LEAKY, x, added, out, all, ld, len, v, slope, streaming, ahead); break;
    default: FN(apply_columns_as)(ADDED, x, added, out, all, ld, len, v, slope, streaming, ahead);
    }
}

/* g = dz and e = dz·(x − hi) of n rows. */
#define TERMS(W, n, V)                                                                                                 \
    V h = GET(W)(v.hi + k), a = needs_z ? GET(W)(v.a + k) : h, b = needs_z ? GET(W)(v.b + k) : h, g[n], e[n];          \
    const S *xs = x + r * ld + k, *dys = dy + r * ld + k;                                                              \
    HOLD_POINTER(xs);                                                                                                  \
    HOLD_POINTER(dys);                                                                                                 \
    UNROLLED for (int j = 0; j < n; j++) {                                                                             \
        idx at = (r + j) * ld + k;                                                                                     \
        V d = FN(less##W)(LOAD(W)(xs + j * ld), h), dyj = LOAD(W)(dys + j * ld);                                       \
        HOLD(dyj);                                                                                                     \
        g[j] = GATE(W)(gate.kind, dyj, GATE_BY(W, at, dyj, d, a, b), gate.slope);                                      \
        FN(pass##W)(gate, gate.kind == GATED && gate.dz, at, streams, g[j]);                                           \
        e[j] = g[j] * d;                                                                                               \
    }

/* INOUT sums of dz and dz·(x − hi), OUT gate.dz, if GATED and there: of rows, four at a time, or, IN_ORDER, one by one. Returns how
 * many were taken. */
INLINE idx FN(gradient_rows_as)(asks_t asks, FN(gate_t) gate, FN(rows_t) w, idx all)
{
    const S *x = w.x, *dy = w.dy;
    const idx ld = w.ld, head = w.head, cols = w.cols, lead = w.lead;
    const int streams = w.streams, needs_z = gate.kind == RELU || gate.kind == LEAKY;
    const FN(coefs) v = w.v;
    T *s = w.sums, *q = s + APART, *first_s = q + APART, *first_q = first_s + APART, *third_s = first_q + APART,
      *third_q = third_s + APART;
    idx r = 0;
#define ASK                                                                                                            \
    FN(ask)(asks, x + r * ld, k, head, cols, ld, lead);                                                                \
    FN(ask)(asks, dy + r * ld, k, head, cols, ld, lead);                                                               \
    if (gate.kind == GATED) FN(ask)(asks, gate.y + r * ld, k, head, cols, ld, lead);
    /* Row by row, the same tree of four: the first, with the second added to it, and the third wait for the fourth. All rows by the same
     * instructions (a loop for each of the four is slower): of each instruction the hardware foresees what it will load. */
#define COLUMN(W, V)                                                                                                   \
    {                                                                                                                  \
        idx turn = r % 4;                                                                                              \
        HOLD_POINTER(turn);                                                                                            \
        TERMS(W, 1, V)                                                                                                 \
        if (turn == 3) {                                                                                               \
            FN(put##W)(s + k, GET(W)(s + k) + (GET(W)(first_s + k) + (GET(W)(third_s + k) + g[0])));                   \
            FN(put##W)(q + k, GET(W)(q + k) + (GET(W)(first_q + k) + (GET(W)(third_q + k) + e[0])));                   \
        } else if (turn == 1) {                                                                                        \
            FN(put##W)(first_s + k, GET(W)(first_s + k) + g[0]);                                                       \
            FN(put##W)(first_q + k, GET(W)(first_q + k) + e[0]);                                                       \
        } else {                                                                                                       \
            FN(put##W)((turn ? third_s : first_s) + k, g[0]);                                                          \
            FN(put##W)((turn ? third_q : first_q) + k, e[0]);                                                          \
        }                                                                                                              \
    }
    if (asks == IN_ORDER) {
        SWEEP_ROWS(COLUMN, all / 4 * 4, 1)
        return r;
    }
#undef COLUMN
#define COLUMN(W, V)                                                                                                   \
    {                                                                                                                  \
        TERMS(W, 4, V)                                                                                                 \
        FN(put##W)(s + k, GET(W)(s + k) + TREE(g));                                                                    \
        FN(put##W)(q + k, GET(W)(q + k) + TREE(e));                                                                    \
    }
    SWEEP_ROWS(COLUMN, all - 3, 4)
#undef COLUMN
#undef ASK
    return r;
}

/* Of row r alone. */
INLINE void FN(gradient_row_as)(FN(gate_t) gate, FN(rows_t) w, idx r)
{
    const S *x = w.x, *dy = w.dy;
    const idx ld = w.ld, head = w.head, cols = w.cols;
    const int streams = w.streams, needs_z = gate.kind == RELU || gate.kind == LEAKY;
    const FN(coefs) v = w.v;
    T *s = w.sums, *q = s + APART;
#define ASK
#define COLUMN(W, V)                                                                                                   \
    {                                                                                                                  \
        TERMS(W, 1, V)                                                                                                 \
        FN(put##W)(s + k, GET(W)(s + k) + g[0]);                                                                       \
        FN(put##W)(q + k, GET(W)(q + k) + e[0]);                                                                       \
    }
    SWEEP_COLUMNS(COLUMN)
#undef COLUMN
#undef ASK
}
#undef TERMS

#define ROWS_OF(KIND, asks)                                                                                            \
    OWN idx FN(gradient_rows_##KIND##_##asks)(FN(gate_t) gate, FN(rows_t) w, idx all)                                  \
    {                                                                                                                  \
        gate.kind = KIND;                                                                                              \
        return FN(gradient_rows_as)(asks, gate, w, all);                                                               \
    }
#define OF_KIND(KIND)                                                                                                  \
    ROWS_OF(KIND, SILENT) ROWS_OF(KIND, IN_LINES) ROWS_OF(KIND, IN_ROWS) ROWS_OF(KIND, IN_ORDER)                       \
    OWN void FN(gradient_row_##KIND)(FN(gate_t) gate, FN(rows_t) w, idx r)                                             \
    {                                                                                                                  \
        gate.kind = KIND;                                                                                              \
        FN(gradient_row_as)(gate, w, r);                                                                               \
    }
OF_KIND(PLAIN)
OF_KIND(RELU)
OF_KIND(LEAKY)
OF_KIND(GATED)
#undef OF_KIND
#undef ROWS_OF

#define WAYS(KIND)                                                                                                     \
    [KIND] = {[SILENT] = FN(gradient_rows_##KIND##_SILENT), [IN_LINES] = FN(gradient_rows_##KIND##_IN_LINES),          \
              [IN_ROWS] = FN(gradient_rows_##KIND##_IN_ROWS), [IN_ORDER] = FN(gradient_rows_##KIND##_IN_ORDER)}
static idx (*const FN(gradient_rows)[][4])(FN(gate_t), FN(rows_t), idx) = {WAYS(PLAIN), WAYS(RELU), WAYS(LEAKY), WAYS(GATED)};
#undef WAYS
static void (*const FN(gradient_row)[])(FN(gate_t), FN(rows_t), idx) = {
    [PLAIN] = FN(gradient_row_PLAIN), [RELU] = FN(gradient_row_RELU), [LEAKY] = FN(gradient_row_LEAKY),
    [GATED] = FN(gradient_row_GATED)};

static int64_t FN(any_not_finite)(idx n, const double *sum)
{
    int64_t any = 0;
    for (idx i = 0; i < n; i++) any |= sum[i] - sum[i] != 0;
    return any;
}

/* IN dy, x: `rows` ≤ rows_a_block() rows of the tile; v: a value a column. OUT sums of dz and dz·(x − hi), a value a channel;
 * gate.dz, if GATED and there. */
static void FN(gradient_columns)(FN(gate_t) gate, const S *dy, const S *x, idx rows, tile_t t, FN(coefs) v,
                                 double *sum_dy, double *sum_dy_x)
{
    T room[6][APART] LINED, shifted[3][APART] LINED; /* both sums, and four that wait: see gradient_rows_as */
    const idx join = rows_to_sum_as_one(t), all = rows / join, rest = rows % join * t.channels;
    const tile_t tile = joined(t, join);
    const int past = gate.dz && gate.streaming && tile.ld % UNIT == 0, tensors = gate.kind == GATED ? 3 : 2;
    const idx cols = tile.channels * tile.inner;
    const idx head = past ? FN(columns_to_line)(gate.dz, tile) : FN(unaligned_columns)(x, tile), shift = FN(to_line)(head);
    const int streams = past && (uintptr_t)(gate.dz + head) % UNIT_BYTES == 0;
    T *s = room[0] + shift, *q = room[1] + shift;
    if (join > 1 || shift)
        v = FN(repeat_coefs)(v, t.channels * t.inner, join, shift, shifted, gate.kind == RELU || gate.kind == LEAKY);
    memset(s, 0, (size_t)cols * sizeof(T));
    memset(q, 0, (size_t)cols * sizeof(T));
    const asks_t asks = FN(asks_of)(tile, tensors);
    FN(rows_t) w = {x, dy, tile.ld, head, cols, FN(lead_of)(asks, tile, tensors), streams, v, s};
    idx r = FN(gradient_rows)[gate.kind][asks](gate, w, all);
    w.streams = 0;
    for (; r < all; r++) FN(gradient_row)[gate.kind](gate, w, r);
    if (rest) {
        w.cols = rest, w.head = 0;
        FN(gradient_row)[gate.kind](gate, w, all);
    }
    FN(fold_columns)(s, t, join, sum_dy);
    FN(fold_columns)(q, t, join, sum_dy_x);
    if (FN(any_not_finite)(t.channels, sum_dy) | FN(any_not_finite)(t.channels, sum_dy_x))
        for (idx c = 0; c < t.channels; c++)
            if (FN(any_not_finite)(1, sum_dy + c) | FN(any_not_finite)(1, sum_dy_x + c)) {
                block_t b = {0, rows, t.ld, t.inner};
                FN(gate_t) mine = gate;
                if (gate.kind == GATED) mine.y += c * t.inner, mine.dz += mine.dz ? c * t.inner : 0;
                FN(sums) again = FN(gradient_runs_slow)(mine, dy + c * t.inner, x + c * t.inner, b, v, c * t.inner);
                sum_dy[c] = again.dy;
                sum_dy_x[c] = again.dy_x;
            }
}

/* IN dy, x, OUT dx, gate.dz (if `beside`): `all` rows of `len` columns; with fixed statistics (not `batch`) dx = dz·a. out or gate.dz
 * may be dy. */
INLINE void FN(slope_columns_as)(FN(gate_t) gate, int beside, int batch, const S *dy, const S *x, S *out, idx all, idx ld, idx len,
                                 FN(slopes) g, idx ahead)
{
    const T *restrict ms = g.m, *restrict as = g.v.a, *restrict his = g.v.hi, *restrict ks = g.k;
    const T *restrict bs = g.v.b;
    const int streaming = gate.streaming, streams = FN(streams_beside)(gate, beside, out);
    const int needs_z = gate.kind == RELU || gate.kind == LEAKY;
#define SHIFT                                                                                                          \
    x += ld, dy += ld, out += ld;                                                                                      \
    if (gate.kind == GATED) gate.y += ld;                                                                              \
    if (beside) gate.dz += ld;
#define BESIDE_AHEAD(i)                                                                                                \
    if (gate.kind == GATED) FN(ask_ahead)(gate.y, i, ahead);                                                           \
    if (beside && !streams) FN(ask_to_write)(gate.dz, i, ahead);
#define AHEAD(i)                                                                                                       \
    FN(ask_ahead)(x, i, ahead), FN(ask_ahead)(dy, i, ahead);                                                           \
    BESIDE_AHEAD(i)                                                                                                    \
    if (!streaming) FN(ask_to_write)(out, i, ahead);
#define PREPARE(W, i)                                                                                                  \
    __typeof__(GET(W)(ms)) m = GET(W)(ms + i), a = GET(W)(as + i), hi = GET(W)(his + i), k = GET(W)(ks + i),           \
                           b = needs_z ? GET(W)(bs + i) : m;                                                           \
    if (needs_z) HOLD(a);
#define FORMULA(W, i) ((PASS(W, i, FN(less##W)(LOAD(W)(x + i), hi)) - m) - FN(less##W)(LOAD(W)(x + i), hi) * k) * a
    if (batch) {
        EACH_ROW
    }
#undef FORMULA
#undef PREPARE
#undef AHEAD
#define AHEAD(i)                                                                                                       \
    FN(ask_ahead)(dy, i, ahead);                                                                                       \
    if (needs_z) FN(ask_ahead)(x, i, ahead);                                                                           \
    BESIDE_AHEAD(i)                                                                                                    \
    if (!streaming) FN(ask_to_write)(out, i, ahead);
#define PREPARE(W, i)                                                                                                  \
    __typeof__(GET(W)(as)) a = GET(W)(as + i), hi = needs_z ? GET(W)(his + i) : a, b = needs_z ? GET(W)(bs + i) : a; \
    if (needs_z) HOLD(a);
#define FORMULA(W, i) PASS(W, i, LOAD(W)(x + i) - hi) * a
    else {
        EACH_ROW
    }
#undef FORMULA
#undef AHEAD
#undef BESIDE_AHEAD
#undef PREPARE
#undef SHIFT
}

static void FN(slope_columns)(FN(gate_t) gate, int batch, const S *dy, const S *x, S *out, idx all, idx ld, idx len,
                              FN(slopes) g, idx ahead)
{
    FN(gate_t) as = gate;
#define AS(is, beside)                                                                                                 \
    as.kind = is, FN(slope_columns_as)(as, beside, batch, dy, x, out, all, ld, len, g, ahead)
    EACH_GATE(AS)
#undef AS
}

#undef Y
#undef HOLD
#undef HOLD_POINTER
#undef Z
#undef DZ
#undef GATE_BY
#undef PASS
#undef EACH_GATE
#undef LOAD
#undef GET
#undef GATE
#undef EACH_ROW
#undef WHOLE_ROW
#undef ROWS_BY
#undef SWEEP_COLUMNS
#undef SWEEP_ROWS
#undef OWN
#undef EACH_PLANE
#undef WHETHER_ASKED
#undef ONE_BY_ONE
#undef SWEEP_STREAM
#undef SWEEP_PLANES
#undef PLANE_STEP
#undef ALONE
#undef FIRST
#undef NEXT
#undef HERE
#undef SHARED
#undef MOVE_ON
#undef SPLAT
#undef SWEEP_STORE
#undef SWEEP
#undef STEP
#undef NOTHING
#undef NARROW_WIDTH
#undef NARROW
#undef MASK
#undef MASK16
#undef TREE
#undef VEC
#undef WIDTH
#undef UNIT
#undef LANES
#undef LINE
#undef S
#undef FN
#undef HALF
