/* The block primitives for one element type T; blocks.h includes this once per type and says what it is. */

#define VEC FN(vec)
#define WIDTH ((idx)(VECTOR_BYTES / sizeof(T)))   /* elements of a native vector */
#define UNIT ((idx)(UNIT_BYTES / sizeof(T)))
#define LANES ((idx)(LANE_BYTES / sizeof(T)))

typedef T VEC __attribute__((vector_size(VECTOR_BYTES), aligned(sizeof(T)), may_alias));

static inline VEC FN(load)(const T *p) { return *(const VEC *)p; }
static inline void FN(store)(T *p, VEC v) { *(VEC *)p = v; }
static inline VEC FN(all)(T value) { return value - (VEC){0}; }

static inline void FN(stream)(T *p, VEC v)
{
#if defined(__AVX512F__)
    _mm512_stream_si512((void *)p, (__m512i)v);
#elif defined(__AVX2__)
    _mm256_stream_si256((void *)p, (__m256i)v);
#elif defined(__x86_64__)
    _mm_stream_si128((void *)p, (__m128i)v);
#else
    FN(store)(p, v);
#endif
}

/* Elements before p reaches a native vector's alignment. */
static inline idx FN(misaligned)(const T *p, idx len)
{
    idx bytes = (idx)(-(uintptr_t)p % VECTOR_BYTES);
    return bytes % (idx)sizeof(T) ? len : least(len, bytes / (idx)sizeof(T));
}

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

    VEC p = FN(all)(pivot), s[V] = {{0}}, q[V] = {{0}};
    T tail_s[16] = {0}, tail_q[16] = {0};
    for (idx r = 0; r < b.runs; r++) {
        const T *run = x + r * b.stride;
        idx i = 0;
        if (r + 1 < b.runs)
            for (int l = 0; l < 4; l++) __builtin_prefetch(run + b.stride + l * UNIT);
        for (; i + LANES <= b.len; i += LANES)
            for (int v = 0; v < V; v++) {
                VEC d = FN(load)(run + i + v * WIDTH) - p;
                s[v] += d;
                q[v] += d * d;
            }
        if (i + UNIT <= b.len) {
            for (int v = 0; v < VECTORS_A_UNIT; v++) {
                VEC d = FN(load)(run + i + v * WIDTH) - p;
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

/* What normalize needs: y = (x − hi)·a + b, a value a channel (or a column). */
typedef struct { T *hi, *a, *b; } FN(coefs);

static inline void FN(coef_set)(FN(coefs) k, idx c, double mean, double var, double weight, double bias, double eps)
{
    double a = weight * inverse_std(var, eps);
    k.hi[c] = (T)mean;
    k.a[c] = (T)a;
    k.b[c] = (T)(bias - (mean - (double)k.hi[c]) * a);
}

/* IN x, OUT y: one run of channel c. y may be x. */
static inline void FN(apply_run)(const T *x, T *y, idx len, FN(coefs) k, idx c, int streaming)
{
    VEC hi = FN(all)(k.hi[c]), a = FN(all)(k.a[c]), b = FN(all)(k.b[c]);
    idx i = 0;
    if (streaming) {
        idx head = FN(misaligned)(y, len);
        for (; i < head; i++) y[i] = (x[i] - k.hi[c]) * k.a[c] + k.b[c];
        for (; i + WIDTH <= len; i += WIDTH) FN(stream)(y + i, (FN(load)(x + i) - hi) * a + b);
    }
    for (; i + WIDTH <= len; i += WIDTH) FN(store)(y + i, (FN(load)(x + i) - hi) * a + b);
    for (; i < len; i++) y[i] = (x[i] - k.hi[c]) * k.a[c] + k.b[c];
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
    VEC h = FN(all)(hi), s[V] = {{0}}, q[V] = {{0}};
    T tail_s[16] = {0}, tail_q[16] = {0};
    for (idx r = 0; r < b.runs; r++) {
        const T *run = x + r * b.stride, *grad = dy + r * b.stride;
        idx i = 0;
        if (r + 1 < b.runs)
            for (int l = 0; l < 4; l++) {
                __builtin_prefetch(run + b.stride + l * UNIT);
                __builtin_prefetch(grad + b.stride + l * UNIT);
            }
        for (; i + LANES <= b.len; i += LANES)
            for (int v = 0; v < V; v++) {
                VEC g = FN(load)(grad + i + v * WIDTH);
                s[v] += g;
                q[v] += g * (FN(load)(run + i + v * WIDTH) - h);
            }
        if (i + UNIT <= b.len) {
            for (int v = 0; v < VECTORS_A_UNIT; v++) {
                VEC g = FN(load)(grad + i + v * WIDTH);
                s[v] += g;
                q[v] += g * (FN(load)(run + i + v * WIDTH) - h);
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

/* What the input gradient needs: dx = (dy − m)·a − (x − hi)·k + c, a value a channel (or a column). */
typedef struct { T *m, *a, *hi, *k, *c; } FN(slopes);

static inline void FN(slope_set)(FN(slopes) g, idx c, double mean, double var, double weight, double eps, double dy,
                                 double dy_xmu, double count)
{
    double invstd = inverse_std(var, eps), a = weight * invstd;
    double k = a * invstd * invstd * (dy_xmu / count), m = dy / count;
    g.m[c] = (T)m;
    g.a[c] = (T)a;
    g.hi[c] = (T)mean;
    g.k[c] = (T)k;
    g.c[c] = (T)((mean - (double)g.hi[c]) * k - a * (m - (double)g.m[c]));
}

/* IN dy, x, OUT dx: one run of channel ch. dx may be dy or x. */
static inline void FN(slope_run)(const T *dy, const T *x, T *dx, idx len, FN(slopes) g, idx ch,
                                 int streaming)
{
    VEC m = FN(all)(g.m[ch]), a = FN(all)(g.a[ch]), hi = FN(all)(g.hi[ch]), k = FN(all)(g.k[ch]), c = FN(all)(g.c[ch]);
#define SLOPE_ONE(i) (((dy[i] - g.m[ch]) * g.a[ch] - (x[i] - g.hi[ch]) * g.k[ch]) + g.c[ch])
#define SLOPE_AT(i) (((FN(load)(dy + i) - m) * a - (FN(load)(x + i) - hi) * k) + c)
    idx i = 0;
    if (streaming) {
        idx head = FN(misaligned)(dx, len);
        for (; i < head; i++) dx[i] = SLOPE_ONE(i);
        for (; i + WIDTH <= len; i += WIDTH) FN(stream)(dx + i, SLOPE_AT(i));
    }
    for (; i + WIDTH <= len; i += WIDTH) FN(store)(dx + i, SLOPE_AT(i));
    for (; i < len; i++) dx[i] = SLOPE_ONE(i);
#undef SLOPE_ONE
#undef SLOPE_AT
}

/* IN dy, OUT dx: one run with fixed statistics, dx = dy·a; x is not read. */
static inline void FN(scale_run)(const T *dy, T *dx, idx len, T scale, int streaming)
{
    VEC a = FN(all)(scale);
    idx i = 0;
    if (streaming) {
        idx head = FN(misaligned)(dx, len);
        for (; i < head; i++) dx[i] = dy[i] * scale;
        for (; i + WIDTH <= len; i += WIDTH) FN(stream)(dx + i, FN(load)(dy + i) * a);
    }
    for (; i + WIDTH <= len; i += WIDTH) FN(store)(dx + i, FN(load)(dy + i) * a);
    for (; i < len; i++) dx[i] = dy[i] * scale;
}

/* IN a, b, OUT out: out = a, or a + b where there is a b. What memory allows: the measure of everything above. */
static void FN(copy_or_add_run)(const T *a, const T *b, T *out, idx len, int streaming)
{
    idx i = 0;
    if (streaming) {
        idx head = FN(misaligned)(out, len);
        for (; i < head; i++) out[i] = b ? a[i] + b[i] : a[i];
        if (b)
            for (; i + WIDTH <= len; i += WIDTH) FN(stream)(out + i, FN(load)(a + i) + FN(load)(b + i));
        else
            for (; i + WIDTH <= len; i += WIDTH) FN(stream)(out + i, FN(load)(a + i));
    }
    if (b)
        for (; i + WIDTH <= len; i += WIDTH) FN(store)(out + i, FN(load)(a + i) + FN(load)(b + i));
    else
        for (; i + WIDTH <= len; i += WIDTH) FN(store)(out + i, FN(load)(a + i));
    for (; i < len; i++) out[i] = b ? a[i] + b[i] : a[i];
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

/* Pivots: the mean of four rows, or of the first row's columns of the channel; for a constant channel, its value. */
static void FN(pivots)(const T *x, idx rows, tile_t t, T *pivot)
{
    const T *x1 = x + t.ld, *x2 = x1 + t.ld, *x3 = x2 + t.ld, quarter = (T)0.25;
    if (t.inner > 1)
        for (idx c = 0; c < t.channels; c++) {
            double first = 0;
            for (idx j = 0; j < t.inner; j++) first += (double)x[c * t.inner + j];
            T mean = (T)(first / (double)t.inner);
            for (idx j = 0; j < t.inner; j++) pivot[c * t.inner + j] = mean;
        }
    else if (rows >= 4)
        for (idx k = 0; k < t.channels; k++)
            pivot[k] = (quarter * x[k] + quarter * x1[k]) + (quarter * x2[k] + quarter * x3[k]);
    else
        memcpy(pivot, x, (size_t)t.channels * sizeof(T));
}

#define TREE(v) (((v[0] + v[1]) + (v[2] + v[3])) + ((v[4] + v[5]) + (v[6] + v[7])))

/* IN x: `rows` ≤ BLOCK_ROWS rows of the tile. OUT mean, m2: a value a channel. */
static void FN(moments_columns)(const T *x, idx rows, tile_t t, double *mean, double *m2)
{
    T pivot[MAX_COLUMNS], s[MAX_COLUMNS], q[MAX_COLUMNS];
    double sum[MAX_COLUMNS], squares[MAX_COLUMNS];
    idx cols = t.channels * t.inner, r = 0;
    double count = (double)(rows * t.inner), inverse = 1.0 / count;

    FN(pivots)(x, rows, t, pivot);
    memset(s, 0, (size_t)cols * sizeof(T));
    memset(q, 0, (size_t)cols * sizeof(T));
    for (; r + 8 <= rows; r += 8) { /* eight rows at a time, added up as a tree */
        const T *row = x + r * t.ld;
        idx k = 0;
        for (; k + WIDTH <= cols; k += WIDTH) {
            VEC p = FN(load)(pivot + k), d[8], e[8];
            for (int j = 0; j < 8; j++) d[j] = FN(load)(row + j * t.ld + k) - p;
            for (int j = 0; j < 8; j++) e[j] = d[j] * d[j];
            FN(store)(s + k, FN(load)(s + k) + TREE(d));
            FN(store)(q + k, FN(load)(q + k) + TREE(e));
        }
        for (; k < cols; k++) {
            T d[8], e[8];
            for (int j = 0; j < 8; j++) d[j] = row[j * t.ld + k] - pivot[k];
            for (int j = 0; j < 8; j++) e[j] = d[j] * d[j];
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

/* IN x, OUT y: `rows` rows of `cols` columns, last row first (it is the likeliest to be in cache). y may be x. */
static void FN(apply_columns)(const T *x, T *y, idx rows, idx ld, idx cols, FN(coefs) k, int streaming)
{
    const T *restrict hi_ = k.hi, *restrict a_ = k.a, *restrict b_ = k.b;
    idx r = rows;
#define APPLY_VEC(out, row)                                                                                            \
    for (; i + WIDTH <= cols; i += WIDTH)                                                                              \
        out(y + (row) * ld + i, (FN(load)(x + (row) * ld + i) - FN(load)(hi_ + i)) * FN(load)(a_ + i) + FN(load)(b_ + i))
#define APPLY_ONE(row) y[(row) * ld + i] = (x[(row) * ld + i] - hi_[i]) * a_[i] + b_[i]
    if (streaming)
        for (; r > 0; r--) {
            idx i = 0, head = FN(misaligned)(y + (r - 1) * ld, cols);
            for (; i < head; i++) APPLY_ONE(r - 1);
            APPLY_VEC(FN(stream), r - 1);
            for (; i < cols; i++) APPLY_ONE(r - 1);
        }
    for (; r >= 4; r -= 4) { /* four rows share a load of the coefficients */
        idx i = 0;
        for (; i + WIDTH <= cols; i += WIDTH) {
            VEC hi = FN(load)(hi_ + i), a = FN(load)(a_ + i), b = FN(load)(b_ + i);
            for (int j = 1; j <= 4; j++)
                FN(store)(y + (r - j) * ld + i, (FN(load)(x + (r - j) * ld + i) - hi) * a + b);
        }
        for (; i < cols; i++)
            for (int j = 1; j <= 4; j++) APPLY_ONE(r - j);
    }
    for (; r > 0; r--) {
        idx i = 0;
        APPLY_VEC(FN(store), r - 1);
        for (; i < cols; i++) APPLY_ONE(r - 1);
    }
#undef APPLY_VEC
#undef APPLY_ONE
}

/* IN dy, x: `rows` ≤ BLOCK_ROWS rows of the tile; hi: a value a column. OUT sums of dy and dy·(x − hi), a value a channel. */
static void FN(gradient_columns)(const T *dy, const T *x, idx rows, tile_t t, const T *hi, double *sum_dy, double *sum_dy_x)
{
    T s[MAX_COLUMNS], q[MAX_COLUMNS];
    idx cols = t.channels * t.inner, r = 0;
    memset(s, 0, (size_t)cols * sizeof(T));
    memset(q, 0, (size_t)cols * sizeof(T));
    for (; r + 8 <= rows; r += 8) {
        const T *row = x + r * t.ld, *grad = dy + r * t.ld;
        idx k = 0;
        for (; k + WIDTH <= cols; k += WIDTH) {
            VEC h = FN(load)(hi + k), g[8], e[8];
            for (int j = 0; j < 8; j++) g[j] = FN(load)(grad + j * t.ld + k);
            for (int j = 0; j < 8; j++) e[j] = g[j] * (FN(load)(row + j * t.ld + k) - h);
            FN(store)(s + k, FN(load)(s + k) + TREE(g));
            FN(store)(q + k, FN(load)(q + k) + TREE(e));
        }
        for (; k < cols; k++) {
            T g[8], e[8];
            for (int j = 0; j < 8; j++) g[j] = grad[j * t.ld + k];
            for (int j = 0; j < 8; j++) e[j] = g[j] * (row[j * t.ld + k] - hi[k]);
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

/* IN dy, x, OUT dx: `rows` rows of `cols` columns, last row first. dx may be dy or x. */
static void FN(slope_columns)(const T *dy, const T *x, T *dx, idx rows, idx ld, idx cols, FN(slopes) g, int streaming)
{
    const T *restrict m_ = g.m, *restrict a_ = g.a, *restrict hi_ = g.hi, *restrict k_ = g.k, *restrict c_ = g.c;
    idx r = rows;
#define SLOPE_ONE(row)                                                                                                 \
    dx[(row) * ld + i] = ((dy[(row) * ld + i] - m_[i]) * a_[i] - (x[(row) * ld + i] - hi_[i]) * k_[i]) + c_[i]
#define SLOPE_VEC(row)                                                                                                 \
    (((FN(load)(dy + (row) * ld + i) - m) * a - (FN(load)(x + (row) * ld + i) - hi) * k) + c)
#define SLOPE_LOAD                                                                                                     \
    VEC m = FN(load)(m_ + i), a = FN(load)(a_ + i), hi = FN(load)(hi_ + i), k = FN(load)(k_ + i), c = FN(load)(c_ + i)
    if (streaming)
        for (; r > 0; r--) {
            idx i = 0, head = FN(misaligned)(dx + (r - 1) * ld, cols);
            for (; i < head; i++) SLOPE_ONE(r - 1);
            for (; i + WIDTH <= cols; i += WIDTH) {
                SLOPE_LOAD;
                FN(stream)(dx + (r - 1) * ld + i, SLOPE_VEC(r - 1));
            }
            for (; i < cols; i++) SLOPE_ONE(r - 1);
        }
    for (; r >= 4; r -= 4) {
        idx i = 0;
        for (; i + WIDTH <= cols; i += WIDTH) {
            SLOPE_LOAD;
            for (int j = 1; j <= 4; j++) FN(store)(dx + (r - j) * ld + i, SLOPE_VEC(r - j));
        }
        for (; i < cols; i++)
            for (int j = 1; j <= 4; j++) SLOPE_ONE(r - j);
    }
    for (; r > 0; r--) {
        idx i = 0;
        for (; i + WIDTH <= cols; i += WIDTH) {
            SLOPE_LOAD;
            FN(store)(dx + (r - 1) * ld + i, SLOPE_VEC(r - 1));
        }
        for (; i < cols; i++) SLOPE_ONE(r - 1);
    }
#undef SLOPE_ONE
#undef SLOPE_VEC
#undef SLOPE_LOAD
}

/* IN dy, OUT dx: `rows` rows of `cols` columns with fixed statistics, dx = dy·a. */
static void FN(scale_columns)(const T *dy, T *dx, idx rows, idx ld, idx cols, const T *restrict a, int streaming)
{
    for (idx r = rows; r > 0; r--) {
        const T *grad = dy + (r - 1) * ld;
        T *out = dx + (r - 1) * ld;
        idx i = 0;
        if (streaming) {
            idx head = FN(misaligned)(out, cols);
            for (; i < head; i++) out[i] = grad[i] * a[i];
            for (; i + WIDTH <= cols; i += WIDTH) FN(stream)(out + i, FN(load)(grad + i) * FN(load)(a + i));
        }
        for (; i + WIDTH <= cols; i += WIDTH) FN(store)(out + i, FN(load)(grad + i) * FN(load)(a + i));
        for (; i < cols; i++) out[i] = grad[i] * a[i];
    }
}

#undef TREE
#undef VEC
#undef WIDTH
#undef UNIT
#undef LANES
#undef T
#undef FN
#undef TINY
