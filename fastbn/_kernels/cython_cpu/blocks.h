/* The block primitives: all arithmetic on elements, for one thread, on data that fits a cache.
 *
 *     moments     s = Σ (x − p),  q = Σ (x − p)²;  mean = p + s/n,  m2 = q − s²/n      (p: a pivot near the mean)
 *     merge       Chan, Golub and LeVeque (1983): two (count, mean, m2) into one, in float64
 *     normalize   y  = (x − hi)·a + b                      a = weight/σ,  hi + lo = mean,  b = bias − lo·a
 *     gradient    Σ dy,  Σ dy·(x − mean)
 *     input grad. dx = ((dy − m) − (x − hi)·k)·a           (../README.md derives m and k)
 *     activation  act(z) = z ≤ 0 ? slope·z : z;  a gradient passes it as z ≤ 0 ? slope·dy : dy
 *
 * Design:
 * - Same bits from every instruction set. Sums run in a fixed number of lanes (128 bytes' worth) or, for columns, in
 *   one accumulator a column; how many native vectors make the lanes is the compiler's affair. No fused
 *   multiply-add, no reassociation: see setup.py's flags.
 * - Sums are kept in the data's own type, about a pivot taken from the block itself, and leave the block as float64.
 *   One sweep is enough where the pivot was good; a block where it was not (m2 < q/4, q/3 for a pivot from 8 values, q/2 from
 *   16), or where a square overflowed or vanished, is done again in two sweeps of float64. The choice depends on the data alone.
 * - mean = hi + lo: subtracting hi is exact where it matters (x near the mean), and lo's share is folded into b.
 * - Two shapes of data. RUNS: a channel's values lie contiguous, `len` at a time (NCHW with large planes). COLUMNS: `rows` rows
 *   of `cols` values, where one column belongs to one channel and `inner` neighbouring columns share one (NHWC: inner = 1; NCHW
 *   with small planes: a column a pixel, so that no plane pays for a horizontal sum or a remainder).
 * - An activation costs no memory traffic: the backward pass computes z again from x, by the same formula with the same
 *   bits, or reads its sign from y where a residual was added to it.
 * - The generic code below is included once per type: S is what lies in memory, T what is computed in, FN(name) is name with the
 *   type in front. Half types (float16, bfloat16) are converted vector by vector, as they are loaded and stored. */
#ifndef FASTBN_BLOCKS_H
#define FASTBN_BLOCKS_H

#include <float.h>
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

typedef ptrdiff_t idx; /* Py_ssize_t: a tensor may hold more than 2³¹ elements */

#if defined(__AVX512F__) && defined(__AVX512BW__)
#define VECTOR_BYTES 64
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define VECTOR_BYTES 32
#else
#define VECTOR_BYTES 16
#endif

#define LANE_BYTES 128                            /* the lanes of a run's sums, on every instruction set */
#define UNIT_BYTES 64                             /* half of them: the step in which a run is cut up */
#define VECTORS_A_UNIT (UNIT_BYTES / VECTOR_BYTES)

#define BLOCK 8192                                /* elements a block of runs sums before it merges */
#define BLOCK_ROWS 256                            /* rows (joined, if short) that a block of columns sums before it merges */
#define SHORTEST_PLANE 16                         /* a vector of no instruction set spans three of these */
#define SHORTEST_ROW 64                           /* columns: shorter rows are joined */
#define MAX_COLUMNS 1024                          /* columns of a tile: their sums stay in L1, or near it */
#define APART (MAX_COLUMNS + 80)                  /* vectors that are read together must not all fall into one set of L1 */

/* A (count, mean, m2); counts are exact in a double up to 2⁵³. */
typedef struct { double count, mean, m2; } moments_t;

static inline moments_t merge(moments_t a, moments_t b)
{
    if (a.count == 0) return b;
    if (b.count == 0) return a;
    double count = a.count + b.count, delta = b.mean - a.mean;
    moments_t m = {count, a.mean + delta * (b.count / count), a.m2 + b.m2 + delta * delta * (a.count * (b.count / count))};
    return m;
}

/* The same for n channels at once, all of one count: a takes b in. */
static inline double merge_columns(idx n, double count_a, double *mean_a, double *m2_a,
                                   double count_b, const double *mean_b, const double *m2_b)
{
    if (count_a == 0) {
        memcpy(mean_a, mean_b, (size_t)n * sizeof(double));
        memcpy(m2_a, m2_b, (size_t)n * sizeof(double));
        return count_b;
    }
    double count = count_a + count_b, share = count_b / count, cross = count_a * share;
    for (idx c = 0; c < n; c++) {
        double delta = mean_b[c] - mean_a[c];
        mean_a[c] += delta * share;
        m2_a[c] += m2_b[c] + delta * delta * cross;
    }
    return count;
}

/* A parameter vector of either type, or none (its default then stands). It may begin at any byte. */
typedef float any_float __attribute__((aligned(1), may_alias));
typedef double any_double __attribute__((aligned(1), may_alias));
typedef struct { const any_float *f32; const any_double *f64; double otherwise; } param_t;

static inline double param_at(param_t p, idx c)
{
    return p.f32 ? (double)p.f32[c] : p.f64 ? p.f64[c] : p.otherwise;
}

/* n of them from c on, in double precision: as they lie, or in `room`. */
static inline const double *params_at(param_t p, idx c, idx n, double *room)
{
    if (p.f64 && (uintptr_t)p.f64 % sizeof(double) == 0) return (const double *)p.f64 + c;
    if (p.f64) memcpy(room, p.f64 + c, (size_t)n * sizeof(double));
    else if (p.f32)
        for (idx i = 0; i < n; i++) room[i] = (double)p.f32[c + i];
    else
        for (idx i = 0; i < n; i++) room[i] = p.otherwise;
    return room;
}

/* A vector of results of either type. */
typedef struct { float *f32; double *f64; } result_t;

static inline void results_set(result_t r, idx c, idx n, const double *values)
{
    if (r.f32)
        for (idx i = 0; i < n; i++) r.f32[c + i] = (float)values[i];
    else if (r.f64)
        memcpy(r.f64 + c, values, (size_t)n * sizeof(double));
}

/* IN and OUT running, `stride` bytes from one to the next: running += momentum·(scale·batch − running). */
static inline void blend(result_t running, idx stride, idx channels, const double *batch, double scale, double momentum)
{
    for (idx c = 0; c < channels; c++)
        if (running.f32) {
            float *r = (float *)((char *)running.f32 + c * stride);
            *r = (float)((1 - momentum) * (double)*r + momentum * (scale * batch[c]));
        } else {
            double *r = (double *)((char *)running.f64 + c * stride);
            *r = (1 - momentum) * *r + momentum * (scale * batch[c]);
        }
}

static inline double inverse_std(double var, double eps) { return 1.0 / sqrt(var + eps); }

static inline idx least(idx a, idx b) { return a < b ? a : b; }

/* The least share of Σ (x − p)² that Σ (x − mean)² must be, for a pivot p from so many values: few values' mean may be further off than
 * many's. */
static inline double share_of(idx values) { return values < 8 ? 1.0 / 4 : values < 16 ? 1.0 / 3 : 1.0 / 2; }

/* How a channel's runs are cut into blocks: by the shape alone. A long plane is cut into pieces,
 * short planes are taken several at a time. */
typedef struct { idx outer, channels, inner, pieces, planes, blocks; } runs_t;

static inline runs_t runs_of(idx outer, idx channels, idx inner)
{
    runs_t r = {outer, channels, inner, 1, 1, 0};
    if (inner > BLOCK) r.pieces = (inner + BLOCK - 1) / BLOCK;
    else r.planes = BLOCK / inner;
    r.blocks = r.pieces > 1 ? outer * r.pieces : (outer + r.planes - 1) / r.planes;
    return r;
}

/* One block: `runs` runs of `len` elements, the first at `offset`, `stride` apart. */
typedef struct { idx offset, runs, stride, len; } block_t;

static inline block_t block_at(const runs_t *r, idx channel, idx block)
{
    idx stride = r->channels * r->inner;
    if (r->pieces > 1) {
        idx plane = block / r->pieces, start = (block % r->pieces) * BLOCK;
        block_t b = {plane * stride + channel * r->inner + start, 1, stride, least(BLOCK, r->inner - start)};
        return b;
    }
    idx plane = block * r->planes;
    block_t b = {plane * stride + channel * r->inner, least(r->planes, r->outer - plane), stride, r->inner};
    return b;
}

/* Where a call's tensors are found: in cache, in part, or in memory. */
typedef enum { CACHED, NEAR, FAR } place_t;

/* What a sum over four rows at a time asks for: nothing, what lies further on line by line, or what lies further on in each of them.
 * IN_ORDER: it goes row by row instead, and asks for what lies further on. */
typedef enum { SILENT, IN_LINES, IN_ROWS, IN_ORDER } asks_t;

/* How far ahead is asked for, in bytes: in sums over rows, of four rows together (see lead_of: less where L1 would not hold it); in a step
 * that goes over the elements once, see what_comes_soon. */
#define LEAD 8192

/* A tile of columns: `channels` channels of `inner` columns each; rows are `ld` elements apart. */
typedef struct { idx channels, inner, ld; place_t place; } tile_t;

/* Short rows that lie one behind the other are summed several as one, of whole vectors on every instruction set; each channel then
 * has as many columns. */
static inline idx rows_to_sum_as_one(tile_t t)
{
    idx rows = 1;
    if (t.inner > 1 || t.channels != t.ld || t.channels >= SHORTEST_ROW) return 1;
    while (rows * t.channels % 16 || rows * t.channels < SHORTEST_ROW) rows++;
    return rows;
}

static inline tile_t joined(tile_t t, idx rows)
{
    tile_t w = {t.channels * rows, t.inner, rows > 1 ? t.ld * rows : t.ld, t.place};
    return w;
}

/* Rows of a tile that are summed before they are merged. */
static inline idx rows_a_block(tile_t t) { return BLOCK_ROWS * rows_to_sum_as_one(t); }

/* What becomes of z, or of a gradient on its way back. ADDED (forward): a residual is added, then as LEAKY. GATED (backward): the
 * sign of z is read from y. For slope 0 LEAKY gives exactly 0, also where z = −∞. */
typedef enum { PLAIN, RELU, LEAKY, ADDED, GATED } kind_t;

#define LINED __attribute__((aligned(64)))        /* what is read again and again: a load that straddles two lines is two */
#define UNROLLED _Pragma("GCC unroll 8")
#define INLINE static inline __attribute__((always_inline))

#define CAT_(a, b) a##b
#define CAT(a, b) CAT_(a, b)

#include "half.h"

#define LARGEST FLT_MAX
#define SMALLEST FLT_MIN
#define TINY 1e-30                                /* mean squares under this have lost digits in T */
#define T float
#define BITS int32_t
#if VECTOR_BYTES == 64
#define FMSUB(a, b, c) _mm512_fmsub_ps((__m512)(a), (__m512)(b), (__m512)(c))
#define ABOVE(z) _mm512_cmp_ps_mask((__m512)(z), _mm512_setzero_ps(), _CMP_NLE_UQ)
#define CHOOSE(mask, a, b) _mm512_mask_mov_ps((__m512)(b), mask, (__m512)(a))
#elif VECTOR_BYTES == 32
#define FMSUB(a, b, c) _mm256_fmsub_ps((__m256)(a), (__m256)(b), (__m256)(c))
#endif

#define S float
#define FN(name) CAT(f32_, name)
#include "blocks_generic.h"

#define S uint16_t
#define FN(name) CAT(f16_, name)
#define HALF(name) CAT(half_, name)
#include "blocks_generic.h"

#define S uint16_t
#define FN(name) CAT(bf16_, name)
#define HALF(name) CAT(brain_, name)
#include "blocks_generic.h"

#undef T
#undef BITS
#undef FMSUB
#undef ABOVE
#undef CHOOSE
#undef LARGEST
#undef SMALLEST
#undef TINY

#define LARGEST DBL_MAX
#define SMALLEST DBL_MIN
#define TINY 1e-290
#define T double
#define BITS int64_t
#if VECTOR_BYTES == 64
#define FMSUB(a, b, c) _mm512_fmsub_pd((__m512d)(a), (__m512d)(b), (__m512d)(c))
#define ABOVE(z) _mm512_cmp_pd_mask((__m512d)(z), _mm512_setzero_pd(), _CMP_NLE_UQ)
#define CHOOSE(mask, a, b) _mm512_mask_mov_pd((__m512d)(b), mask, (__m512d)(a))
#elif VECTOR_BYTES == 32
#define FMSUB(a, b, c) _mm256_fmsub_pd((__m256d)(a), (__m256d)(b), (__m256d)(c))
#endif
#define S double
#define FN(name) CAT(f64_, name)
#include "blocks_generic.h"

#undef T
#undef BITS
#undef FMSUB
#undef ABOVE
#undef CHOOSE
#undef LARGEST
#undef SMALLEST
#undef TINY

#endif
