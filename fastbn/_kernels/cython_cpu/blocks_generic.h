/* The block primitives for one element type T; blocks.h includes this once per type and says what it is. */

#define VEC FN(vec)
#define NARROW FN(vec16)
#define WIDTH ((idx)(VECTOR_BYTES / sizeof(T)))   /* elements of a native vector */
#define NARROW_WIDTH ((idx)(16 / sizeof(T)))
#define UNIT ((idx)(UNIT_BYTES / sizeof(T)))
#define LANES ((idx)(LANE_BYTES / sizeof(T)))

typedef T VEC __attribute__((vector_size(VECTOR_BYTES), aligned(sizeof(T)), may_alias));
typedef T NARROW __attribute__((vector_size(16), aligned(sizeof(T)), may_alias));

static inline T FN(load1)(const T *p) { return *p; }
static inline NARROW FN(load16)(const T *p) { return *(const NARROW *)p; }
static inline VEC FN(load)(const T *p) { return *(const VEC *)p; }
static inline void FN(store1)(T *p, T v) { *p = v; }
static inline void FN(store16)(T *p, NARROW v) { *(NARROW *)p = v; }
static inline void FN(store)(T *p, VEC v) { *(VEC *)p = v; }

/* Stores that do not read the line first; p is aligned. */
static inline void FN(stream16)(T *p, NARROW v)
{
#if defined(__x86_64__)
    _mm_stream_si128((void *)p, (__m128i)v);
#else
    FN(store16)(p, v);
#endif
}

static inline void FN(stream)(T *p, VEC v)
{
#if defined(__AVX512F__)
    _mm512_stream_si512((void *)p, (__m512i)v);
#elif defined(__AVX2__)
    _mm256_stream_si256((void *)p, (__m256i)v);
#else
    FN(stream16)(p, v);
#endif
}

/* Elements before p + i is aligned to `bytes`, at most len; len where it never is. */
static inline idx FN(misaligned)(const T *p, idx len, uintptr_t bytes)
{
    uintptr_t off = -(uintptr_t)p % bytes;
    return off % sizeof(T) ? len : least(len, (idx)(off / sizeof(T)));
}

/* The element-wise loop: out[at] = FORMULA(load, at, i) for `rows` rows that go together, at = row·ld + i, i from 0 to len. Single
 * elements and narrow vectors until the output is aligned, whole vectors, and the same at the end: a store or load that
 * straddles two cache lines costs two. PREPARE(load, i) is what the rows have in common; AHEAD(i) asks for what the
 * hardware does not foresee. */
#define STEP(LOAD, STORE, count)                                                                                       \
    {                                                                                                                  \
        PREPARE(LOAD, i)                                                                                               \
        for (idx row = 0; row < rows; row++) STORE(out + row * ld + i, FORMULA(LOAD, row * ld + i));                   \
        i += count;                                                                                                    \
    }
#define SWEEP(STORE, STORE16)                                                                                          \
    {                                                                                                                  \
        idx i = 0, few = FN(misaligned)(out, len, 16), head = FN(misaligned)(out, len, VECTOR_BYTES);                  \
        while (i < few) STEP(FN(load1), FN(store1), 1)                                                                 \
        while (i + NARROW_WIDTH <= head) STEP(FN(load16), STORE16, NARROW_WIDTH)                                       \
        while (i + WIDTH <= len) {                                                                                     \
            AHEAD(i)                                                                                                   \
            STEP(FN(load), STORE, WIDTH)                                                                               \
        }                                                                                                              \
        while (i + NARROW_WIDTH <= len) STEP(FN(load16), STORE16, NARROW_WIDTH)                                        \
        while (i < len) STEP(FN(load1), FN(store1), 1)                                                                 \
    }
#define SWEEP_STORE SWEEP(FN(store), FN(store16))
#define SWEEP_STREAM SWEEP(FN(stream), FN(stream16))

static inline double FN(sum_lanes)(const T *lane, idx n)
{
    double t[8] = {0};
    for (idx i = 0; i < n; i += 8)
        for (int j = 0; j < 8; j++) t[j] += (double)lane[i + j];
    return ((t[0] + t[4]) + (t[2] + t[6])) + ((t[1] + t[5]) + (t[3] + t[7]));
}

/* May s and q, taken in T about a pivot, stand for the block? Not where the pivot was far from the mean, nor where
 * squares overflowed (or the data is not finite) or lost digits to underflow. */
static inline int FN(stands)(double s, double q, double m2, double count)
{
    return (q - q == 0) & (m2 >= 0.25 * q) & ((q > TINY * count) | ((q == 0) & (s == 0)));
}

/* ---- runs ------------------------------------------------------------------------------------------------- */

/* Moments of a block in two sweeps of float64: right for any data, at half the speed. */
static __attribute__((noinline)) moments_t FN(moments_runs_slow)(const T *x, block_t b)
{
    double count = (double)(b.runs * b.len), t[8] = {0}, s[8] = {0}, q[8] = {0};
    for (idx r = 0; r < b.runs; r++)
        for (idx i = 0; i < b.len; i++) t[i & 7] += (double)x[r * b.stride + i];
    double mean = (((t[0] + t[4]) + (t[2] + t[6])) + ((t[1] + t[5]) + (t[3] + t[7]))) / count;
    for (idx r = 0; r < b.runs; r++)
        for (idx i = 0; i < b.len; i++) {
            double d = (double)x[r * b.stride + i] - mean;
            s[i & 7] += d;
            q[i & 7] += d * d;
        }
    double shift = 0, m2 = 0;
    for (int j = 0; j < 8; j++) shift += s[j], m2 += q[j];
    m2 -= shift * (shift / count);
    moments_t m = {count, mean + shift / count, m2 < 0 ? 0 : m2};
    return m;
}

/* IN x: the block's first element. */
static inline moments_t FN(moments_runs)(const T *x, block_t b)
{
    enum { V = LANE_BYTES / VECTOR_BYTES };
    double first = 0;
    idx few = least(b.len, 16);
    for (idx i = 0; i < few; i++) first += (double)x[i];
    T pivot = (T)(first / (double)few);

    VEC s[V] = {{0}}, q[V] = {{0}};
    T tail_s[16] = {0}, tail_q[16] = {0};
    const idx next = b.runs > 1 ? b.stride : 0; /* the hardware does not foresee the next plane */
    for (idx r = 0; r < b.runs; r++) {
        const T *run = x + r * b.stride;
        idx i = 0;
        for (; i + LANES <= b.len; i += LANES) {
            for (int l = 0; next && l < 2; l++) __builtin_prefetch(run + next + i + l * UNIT);
            for (int v = 0; v < V; v++) {
                VEC d = FN(load)(run + i + v * WIDTH) - pivot;
                s[v] += d;
                q[v] += d * d;
            }
        }
        if (i + UNIT <= b.len) {
            for (int v = 0; v < VECTORS_A_UNIT; v++) {
                VEC d = FN(load)(run + i + v * WIDTH) - pivot;
                s[v] += d;
                q[v] += d * d;
            }
            i += UNIT;
        }
        for (idx j = 0; j < b.len - i; j++) {
            T d = run[i + j] - pivot;
            tail_s[j] += d;
            tail_q[j] += d * d;
        }
    }
    double sum = FN(sum_lanes)((const T *)s, LANES) + FN(sum_lanes)(tail_s, 16);
    double squares = FN(sum_lanes)((const T *)q, LANES) + FN(sum_lanes)(tail_q, 16);
    double count = (double)(b.runs * b.len), shift = sum / count, m2 = squares - sum * shift;
    if (!FN(stands)(sum, squares, m2, count)) return FN(moments_runs_slow)(x, b);
    moments_t m = {count, (double)pivot + shift, m2};
    return m;
}

/* A scale that would overflow T becomes T's largest: 0·∞ must not make a constant channel NaN where eps is minute. */
static inline double FN(within)(double scale)
{
    return scale > LARGEST ? LARGEST : scale < -LARGEST ? -LARGEST : scale;
}

/* What normalize needs: y = (x − hi)·a + b, a value a channel (or a column). */
typedef struct { T *hi, *a, *b; } FN(coefs);

static inline void FN(coef_set)(FN(coefs) k, idx c, double mean, double var, double weight, double bias, double eps)
{
    double a = FN(within)(weight * inverse_std(var, eps));
    k.hi[c] = (T)mean;
    k.a[c] = (T)a;
    k.b[c] = (T)(bias - (mean - (double)k.hi[c]) * a);
}

#define NOTHING(...)

/* IN x, OUT y: one run of channel c. out may be x. */
static inline void FN(apply_run)(const T *x, T *out, idx len, FN(coefs) v, idx c, int streaming)
{
    const idx rows = 1, ld = 0;
    const T hi = v.hi[c], a = v.a[c], b = v.b[c];
#define AHEAD NOTHING
#define PREPARE NOTHING
#define FORMULA(load, i) (load(x + i) - hi) * a + b
    if (streaming) SWEEP_STREAM else SWEEP_STORE
#undef FORMULA
#undef AHEAD
#undef PREPARE
}

/* Gradient sums of a block about hi, in the data's type or, where that overflowed, in float64. */
typedef struct { double dy, dy_x; } FN(sums);

static __attribute__((noinline)) FN(sums) FN(gradient_runs_slow)(const T *dy, const T *x, block_t b, T hi)
{
    FN(sums) t = {0, 0};
    for (idx r = 0; r < b.runs; r++)
        for (idx i = r * b.stride; i < r * b.stride + b.len; i++) {
            t.dy += (double)dy[i];
            t.dy_x += (double)dy[i] * ((double)x[i] - (double)hi);
        }
    return t;
}

static inline FN(sums) FN(gradient_runs)(const T *dy, const T *x, block_t b, T hi)
{
    enum { V = LANE_BYTES / VECTOR_BYTES };
    VEC s[V] = {{0}}, q[V] = {{0}};
    T tail_s[16] = {0}, tail_q[16] = {0};
    const idx next = b.runs > 1 ? b.stride : 0; /* the hardware does not foresee the next plane */
    for (idx r = 0; r < b.runs; r++) {
        const T *run = x + r * b.stride, *grad = dy + r * b.stride;
        idx i = 0;
        for (; i + LANES <= b.len; i += LANES) {
            for (int l = 0; next && l < 2; l++) {
                __builtin_prefetch(run + next + i + l * UNIT);
                __builtin_prefetch(grad + next + i + l * UNIT);
            }
            for (int v = 0; v < V; v++) {
                VEC g = FN(load)(grad + i + v * WIDTH);
                s[v] += g;
                q[v] += g * (FN(load)(run + i + v * WIDTH) - hi);
            }
        }
        if (i + UNIT <= b.len) {
            for (int v = 0; v < VECTORS_A_UNIT; v++) {
                VEC g = FN(load)(grad + i + v * WIDTH);
                s[v] += g;
                q[v] += g * (FN(load)(run + i + v * WIDTH) - hi);
            }
            i += UNIT;
        }
        for (idx j = 0; j < b.len - i; j++) {
            tail_s[j] += grad[i + j];
            tail_q[j] += grad[i + j] * (run[i + j] - hi);
        }
    }
    FN(sums) t = {FN(sum_lanes)((const T *)s, LANES) + FN(sum_lanes)(tail_s, 16),
                  FN(sum_lanes)((const T *)q, LANES) + FN(sum_lanes)(tail_q, 16)};
    double probe = t.dy + t.dy_x;
    return probe - probe == 0 ? t : FN(gradient_runs_slow)(dy, x, b, hi);
}

/* What the input gradient needs: dx = ((dy − m) − (x − hi)·k)·a + c, a value a channel (or a column). */
typedef struct { T *m, *a, *hi, *k, *c; } FN(slopes);

static inline void FN(slope_set)(FN(slopes) g, idx c, double mean, double var, double weight, double eps, double dy,
                                 double dy_xmu, double count)
{
    double a = FN(within)(weight * inverse_std(var, eps)), k = dy_xmu / count / (var + eps), m = dy / count;
    g.m[c] = (T)m;
    g.a[c] = (T)a;
    g.hi[c] = (T)mean;
    g.k[c] = (T)k;
    g.c[c] = (T)(a * ((mean - (double)g.hi[c]) * k - (m - (double)g.m[c])));
}

/* IN dy, x, OUT dx: one run of channel ch. out may be dy or x. */
static inline void FN(slope_run)(const T *dy, const T *x, T *out, idx len, FN(slopes) g, idx ch, int streaming)
{
    const idx rows = 1, ld = 0;
    const T m = g.m[ch], a = g.a[ch], hi = g.hi[ch], k = g.k[ch], c = g.c[ch];
#define AHEAD NOTHING
#define PREPARE NOTHING
#define FORMULA(load, i) ((load(dy + i) - m) - (load(x + i) - hi) * k) * a + c
    if (streaming) SWEEP_STREAM else SWEEP_STORE
#undef FORMULA
#undef AHEAD
#undef PREPARE
}

/* IN dy, OUT dx: one run with fixed statistics, dx = dy·a; x is not read. */
static inline void FN(scale_run)(const T *dy, T *out, idx len, T a, int streaming)
{
    const idx rows = 1, ld = 0;
#define AHEAD NOTHING
#define PREPARE NOTHING
#define FORMULA(load, i) load(dy + i) * a
    if (streaming) SWEEP_STREAM else SWEEP_STORE
#undef FORMULA
#undef AHEAD
#undef PREPARE
}

/* IN a, b, OUT out: out = a, or a + b where there is a b. What memory allows: the measure of everything above. */
static void FN(copy_or_add_run)(const T *a, const T *b, T *out, idx len, int streaming)
{
    const idx rows = 1, ld = 0;
#define AHEAD NOTHING
#define PREPARE NOTHING
#define FORMULA(load, i) load(a + i)
    if (!b) {
        if (streaming) SWEEP_STREAM else SWEEP_STORE
    }
#undef FORMULA
#define FORMULA(load, i) load(a + i) + load(b + i)
    else {
        if (streaming) SWEEP_STREAM else SWEEP_STORE
    }
#undef FORMULA
#undef AHEAD
#undef PREPARE
}

/* ---- columns ---------------------------------------------------------------------------------------------- */

/* One channel of a block of columns in two sweeps of float64. */
static __attribute__((noinline)) void FN(moments_column_slow)(const T *x, idx rows, tile_t t, idx c, double *mean,
                                                              double *m2)
{
    block_t b = {0, rows, t.ld, t.inner};
    moments_t m = FN(moments_runs_slow)(x + c * t.inner, b);
    mean[c] = m.mean;
    m2[c] = m.m2;
}

/* Column sums to channel sums, in float64: where a channel has one column, there is nothing to add. */
static void FN(fold_columns)(const T *column, tile_t t, double *sum)
{
    if (t.inner == 1)
        for (idx c = 0; c < t.channels; c++) sum[c] = (double)column[c];
    else
        for (idx c = 0; c < t.channels; c++) {
            const T *mine = column + c * t.inner;
            idx even = t.inner / 8 * 8;
            double total = FN(sum_lanes)(mine, even);
            for (idx j = even; j < t.inner; j++) total += (double)mine[j];
            sum[c] = total;
        }
}

/* One value a channel to one a column. */
static void FN(spread_columns)(const T *channel, tile_t t, T *column)
{
    for (idx c = 0; c < t.channels; c++)
        for (idx j = 0; j < t.inner; j++) column[c * t.inner + j] = channel[c];
}

/* Pivots: the mean of four rows, or of some of the channel's columns in the first row; for a constant channel, its value. */
static void FN(pivots)(const T *x, idx rows, tile_t t, T *pivot)
{
    const T *x1 = x + t.ld, *x2 = x1 + t.ld, *x3 = x2 + t.ld, quarter = (T)0.25;
    if (t.inner > 1)
        for (idx c = 0; c < t.channels; c++) {
            const T *row = x + c * t.inner;
            T mean = t.inner < 16 ? row[0] : (T)(FN(sum_lanes)(row, 16) / 16);
            for (idx j = 0; j < t.inner; j++) pivot[c * t.inner + j] = mean;
        }
    else if (rows >= 4)
        for (idx k = 0; k < t.channels; k++)
            pivot[k] = (quarter * x[k] + quarter * x1[k]) + (quarter * x2[k] + quarter * x3[k]);
    else
        memcpy(pivot, x, (size_t)t.channels * sizeof(T));
}

/* Rows are read in fours, but memory likes to be read in order: while one group is summed, what comes 8 KiB and more later is asked
 * for, line after line where the tile is the whole row, else row by row. */
static inline idx FN(rows_ahead)(tile_t t)
{
    idx row = t.ld * (idx)sizeof(T);
    return row >= 2048 ? 4 : 4 * ((8192 + 4 * row - 1) / (4 * row));
}

/* (always_inline: gcc drops calls of a function that does nothing but prefetch.) */
static inline __attribute__((always_inline)) void FN(ask)(const T *row, idx k, tile_t t, idx rows_ahead)
{
    const T *later = row + rows_ahead * t.ld;
    if (t.channels * t.inner == t.ld)
        for (int l = 0; l < 4 * VECTOR_BYTES; l += 64) __builtin_prefetch((const char *)(later + 4 * k) + l, 0, 2);
    else
        for (int j = 0; j < 4; j++) __builtin_prefetch(later + j * t.ld + k, 0, 2);
}

#define TREE(v) ((v[0] + v[1]) + (v[2] + v[3]))

/* IN x: `rows` ≤ BLOCK_ROWS rows of the tile. OUT mean, m2: a value a channel. */
static void FN(moments_columns)(const T *x, idx rows, tile_t t, double *mean, double *m2)
{
    T pivot[APART], s[APART], q[APART];
    double sum[MAX_COLUMNS], squares[MAX_COLUMNS];
    idx cols = t.channels * t.inner, r = 0;
    double count = (double)(rows * t.inner), inverse = 1.0 / count;

    FN(pivots)(x, rows, t, pivot);
    memset(s, 0, (size_t)cols * sizeof(T));
    memset(q, 0, (size_t)cols * sizeof(T));
    idx ahead = FN(rows_ahead)(t);
    for (; r + 4 <= rows; r += 4) { /* four rows at a time, added up as a tree */
        const T *row = x + r * t.ld;
        idx k = 0;
        for (; k + WIDTH <= cols; k += WIDTH) {
            VEC p = FN(load)(pivot + k), d[4], e[4];
            FN(ask)(row, k, t, ahead);
            for (int j = 0; j < 4; j++) d[j] = FN(load)(row + j * t.ld + k) - p;
            for (int j = 0; j < 4; j++) e[j] = d[j] * d[j];
            FN(store)(s + k, FN(load)(s + k) + TREE(d));
            FN(store)(q + k, FN(load)(q + k) + TREE(e));
        }
        for (; k < cols; k++) {
            T d[4], e[4];
            for (int j = 0; j < 4; j++) d[j] = row[j * t.ld + k] - pivot[k];
            for (int j = 0; j < 4; j++) e[j] = d[j] * d[j];
            s[k] += TREE(d);
            q[k] += TREE(e);
        }
    }
    for (; r < rows; r++)
        for (idx k = 0; k < cols; k++) {
            T d = x[r * t.ld + k] - pivot[k];
            s[k] += d;
            q[k] += d * d;
        }

    FN(fold_columns)(s, t, sum);
    FN(fold_columns)(q, t, squares);
    int64_t doubtful = 0;
    for (idx c = 0; c < t.channels; c++) {
        double shift = sum[c] * inverse;
        mean[c] = (double)pivot[c * t.inner] + shift;
        m2[c] = squares[c] - sum[c] * shift;
        doubtful |= !FN(stands)(sum[c], squares[c], m2[c], count);
    }
    if (doubtful)
        for (idx c = 0; c < t.channels; c++)
            if (!FN(stands)(sum[c], squares[c], m2[c], count)) FN(moments_column_slow)(x, rows, t, c, mean, m2);
}

/* Rows [0, all) of a tile, one by one: memory is read and written in order, and the next 2 KiB are asked for. Where the tensors are in
 * cache, short rows that lie one behind the other go four at a time and share a load of the coefficients. (Not rows
 * apart by pages, which would meet in one set of L1.) */
#define EACH_ROW(SHIFT)                                                                                                \
    idx r = 0;                                                                                                         \
    if (cached && len == ld && ld * (idx)sizeof(T) <= 2048)                                                        \
        for (const idx rows = 4; r + 4 <= all; r += 4) {                                                               \
            SWEEP_STORE                                                                                                \
            SHIFT(4)                                                                                                   \
        }                                                                                                              \
    for (const idx rows = 1; r < all; r++) {                                                                           \
        if (streaming) SWEEP_STREAM else SWEEP_STORE                                                                   \
        SHIFT(1)                                                                                                       \
    }

static inline __attribute__((always_inline)) void FN(ask_rows)(const T *p, idx i, idx rows, idx ld, idx len)
{
    if (rows == 1) __builtin_prefetch(p + (len == ld ? 2048 / (idx)sizeof(T) : ld) + i);
    else
        for (int l = 0; l < 4 * VECTOR_BYTES; l += 64) __builtin_prefetch((const char *)(p + 4 * ld + 4 * i) + l);
}

/* IN x, OUT y: `all` rows of `len` columns. out may be x. */
static void FN(apply_columns)(const T *x, T *out, idx all, idx ld, idx len, FN(coefs) v, int streaming,
                             int cached)
{
    const T *restrict his = v.hi, *restrict as = v.a, *restrict bs = v.b;
#define SHIFT(n) x += n * ld, out += n * ld;
#define PREPARE(load, i) __typeof__(load(his)) hi = load(his + i), a = load(as + i), b = load(bs + i);
#define AHEAD(i) FN(ask_rows)(x, i, rows, ld, len);
#define FORMULA(load, i) (load(x + i) - hi) * a + b
    EACH_ROW(SHIFT)
#undef FORMULA
#undef AHEAD
#undef PREPARE
#undef SHIFT
}

/* IN dy, x: `rows` ≤ BLOCK_ROWS rows of the tile; hi: a value a column. OUT sums of dy and dy·(x − hi), a value a channel. */
static void FN(gradient_columns)(const T *dy, const T *x, idx rows, tile_t t, const T *hi, double *sum_dy, double *sum_dy_x)
{
    T s[APART], q[APART];
    idx cols = t.channels * t.inner, r = 0;
    memset(s, 0, (size_t)cols * sizeof(T));
    memset(q, 0, (size_t)cols * sizeof(T));
    idx ahead = FN(rows_ahead)(t);
    for (; r + 4 <= rows; r += 4) {
        const T *row = x + r * t.ld, *grad = dy + r * t.ld;
        idx k = 0;
        for (; k + WIDTH <= cols; k += WIDTH) {
            VEC h = FN(load)(hi + k), g[4], e[4];
            FN(ask)(row, k, t, ahead);
            FN(ask)(grad, k, t, ahead);
            for (int j = 0; j < 4; j++) g[j] = FN(load)(grad + j * t.ld + k);
            for (int j = 0; j < 4; j++) e[j] = g[j] * (FN(load)(row + j * t.ld + k) - h);
            FN(store)(s + k, FN(load)(s + k) + TREE(g));
            FN(store)(q + k, FN(load)(q + k) + TREE(e));
        }
        for (; k < cols; k++) {
            T g[4], e[4];
            for (int j = 0; j < 4; j++) g[j] = grad[j * t.ld + k];
            for (int j = 0; j < 4; j++) e[j] = g[j] * (row[j * t.ld + k] - hi[k]);
            s[k] += TREE(g);
            q[k] += TREE(e);
        }
    }
    for (; r < rows; r++)
        for (idx k = 0; k < cols; k++) {
            s[k] += dy[r * t.ld + k];
            q[k] += dy[r * t.ld + k] * (x[r * t.ld + k] - hi[k]);
        }
    FN(fold_columns)(s, t, sum_dy);
    FN(fold_columns)(q, t, sum_dy_x);
    double probe = 0;
    for (idx c = 0; c < t.channels; c++) probe += (sum_dy[c] - sum_dy[c]) + (sum_dy_x[c] - sum_dy_x[c]);
    if (probe != 0)
        for (idx c = 0; c < t.channels; c++)
            if ((sum_dy[c] - sum_dy[c]) + (sum_dy_x[c] - sum_dy_x[c]) != 0) {
                block_t b = {0, rows, t.ld, t.inner};
                FN(sums) again = FN(gradient_runs_slow)(dy + c * t.inner, x + c * t.inner, b, hi[c * t.inner]);
                sum_dy[c] = again.dy;
                sum_dy_x[c] = again.dy_x;
            }
}

/* IN dy, x, OUT dx: `all` rows of `len` columns. out may be dy or x. */
static void FN(slope_columns)(const T *dy, const T *x, T *out, idx all, idx ld, idx len, FN(slopes) g, int streaming,
                             int cached)
{
    const T *restrict ms = g.m, *restrict as = g.a, *restrict his = g.hi, *restrict ks = g.k, *restrict cs = g.c;
#define SHIFT(n) x += n * ld, dy += n * ld, out += n * ld;
#define PREPARE(load, i)                                                                                               \
    __typeof__(load(ms)) m = load(ms + i), a = load(as + i), hi = load(his + i), k = load(ks + i), c = load(cs + i);
#define AHEAD(i) FN(ask_rows)(x, i, rows, ld, len), FN(ask_rows)(dy, i, rows, ld, len);
#define FORMULA(load, i) ((load(dy + i) - m) - (load(x + i) - hi) * k) * a + c
    EACH_ROW(SHIFT)
#undef FORMULA
#undef AHEAD
#undef PREPARE
#undef SHIFT
}

/* IN dy, OUT dx: `all` rows of `len` columns with fixed statistics, dx = dy·a. */
static void FN(scale_columns)(const T *dy, T *out, idx all, idx ld, idx len, const T *restrict as, int streaming,
                             int cached)
{
#define SHIFT(n) dy += n * ld, out += n * ld;
#define PREPARE(load, i) __typeof__(load(as)) a = load(as + i);
#define AHEAD(i) FN(ask_rows)(dy, i, rows, ld, len);
#define FORMULA(load, i) load(dy + i) * a
    EACH_ROW(SHIFT)
#undef FORMULA
#undef AHEAD
#undef PREPARE
#undef SHIFT
}

#undef EACH_ROW
#undef SWEEP_STREAM
#undef SWEEP_STORE
#undef SWEEP
#undef STEP
#undef NOTHING
#undef NARROW_WIDTH
#undef NARROW
#undef TREE
#undef VEC
#undef WIDTH
#undef UNIT
#undef LANES
#undef T
#undef FN
#undef TINY
#undef LARGEST
