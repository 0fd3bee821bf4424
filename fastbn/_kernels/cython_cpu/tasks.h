/* A call, its plan and its tasks: what a driver hands to threads. No task knows of threads or of other tasks.
 *
 * A TILE is a few channels over the whole batch; a PART is a piece of the batch for a few channels. Statistics that
 * are gathered by tile or by part and merged in order are the same sums in the same order, so the plan may choose by speed:
 *
 *     fused   one task a tile does everything, the second step while the tile is in cache:   forward_tile, backward_tile
 *     split   all parts, then all tiles (merge), then all parts, last part first where       moments_part, merge_moments_tile,
 *             they go over the data as the first step's did:                                 normalize_part …
 *
 * Split serves where there are too few channels for the threads, where even a narrow tile would not stay in cache, and for small
 * planes of a tensor that is in cache. */
#ifndef FASTBN_TASKS_H
#define FASTBN_TASKS_H

#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>
#include "blocks.h"

typedef enum { F32, F64, F16, BF16 } type_t;

typedef struct {
    /* IN: the arrays, (outer, channels, inner) elements of one type */
    type_t type;
    idx outer, channels, inner;
    const void *x, *dy;
    const void *added, *y; /* forward's residual; backward's y, where one was added before an activation, or NULL */
    void *out; /* OUT: y or dx */
    void *dz;  /* OUT, or NULL: the residual's gradient */
    double slope; /* the activation's, 1 for none */
    /* statistics by which to normalize; where a call computes them, they are `mean` and `second` below */
    param_t at_mean, at_var;
    param_t weight, bias;
    double eps;
    int batch; /* backward: the statistics were the batch's own */
    /* OUT: the sums of a channel (mean and m2, which a forward makes var; or Σdy and Σdy·(x − mean)) */
    double *mean, *second;
    int to_var;
    result_t grad_weight, grad_bias;
    /* the plan */
    int columns, fused, streaming;
    place_t place;
    idx ahead; /* elements: how far from where it works a second step asks for data */
    runs_t runs;
    idx tile, tiles;   /* channels a tile */
    idx chunk, chunks; /* rows (or, with runs, blocks) a part of a sum */
    idx piece;         /* of columns: rows a part of a step that goes over the elements once */
    /* scratch */
    void *coefs;                 /* 5 vectors, coefs_apart(channels) elements apart */
    double *part_mean, *part_second; /* chunks × channels */
} call_t;

static call_t no_call(void)
{
    call_t k;
    memset(&k, 0, sizeof k);
    k.slope = 1;
    return k;
}

static inline double slope_of(const call_t *k) /* as the kernels see it */
{
    return k->type == F64 ? k->slope : (double)(float)k->slope;
}

static inline kind_t kind_of(const call_t *k)
{
    if (k->added) return ADDED;
    if (k->y) return GATED;
    return slope_of(k) == 1 ? PLAIN : slope_of(k) == 0 ? RELU : LEAKY;
}

/* Is a residual's gradient dz asked for that an activation cut? Without one it is dy, copied in the second step. */
static inline int dz_is_cut(const call_t *k) { return k->dz && slope_of(k) != 1; }

/* Cache sizes in bytes, read from the system once. The last level is what one group of cores shares: sysconf() adds the
 * groups of a socket up, so Linux's own table comes first. */
static idx level2_cache, last_level_cache;

static idx cache_from_table(int index)
{
    char path[64], unit = 0;
    long size = 0;
    snprintf(path, sizeof path, "/sys/devices/system/cpu/cpu0/cache/index%d/size", index);
    FILE *file = fopen(path, "r");
    if (!file) return 0;
    int fields = fscanf(file, "%ld%c", &size, &unit);
    fclose(file);
    return fields < 1 ? 0 : (idx)size << (unit == 'K' ? 10 : unit == 'M' ? 20 : 0);
}

static void read_caches(void)
{
    idx l2 = cache_from_table(2), l3 = cache_from_table(3);
#if defined(_SC_LEVEL2_CACHE_SIZE) && defined(_SC_LEVEL3_CACHE_SIZE)
    if (l2 <= 0) l2 = sysconf(_SC_LEVEL2_CACHE_SIZE);
    if (l3 <= 0) l3 = sysconf(_SC_LEVEL3_CACHE_SIZE);
#endif
    level2_cache = l2 > 0 ? l2 : (idx)1 << 19;
    last_level_cache = l3 > 0 ? l3 : l2 > 0 ? l2 : (idx)1 << 23;
}

/* Planes under this many elements are summed as columns, given the images to make that worth while. */
#define SMALL_PLANE 1024

/* A tile of fewer columns than this, in the middle of longer rows, reads and writes memory in too small pieces. */
#define NARROWEST 256

/* Channels whose coefficients are worked out together. */
#define SOME 64

/* The parts of a step that goes over the elements once: as much as memory likes to see in a row, of no more channels than keep
 * their coefficients in L1. Whole rows where a row is short, PIECE elements of them; tiles of rows else, of BLOCK_ROWS rows or fewer,
 * as many for each thread (their coefficients are fetched anew for each); pieces of planes. */
#define PIECE 65536
#define SHORT_ROW 1024

static inline int whole_rows(const call_t *k) { return k->inner == 1 && k->channels <= SHORT_ROW; }

/* While a fused task writes, memory has nothing to read: the next tile is asked for, where a thread's share of the caches holds
 * both. */
static inline idx next_tile(const call_t *k, int threads, idx bytes)
{
    idx columns = k->tile * k->inner, both = 2 * columns * k->outer * bytes;
    return k->place != CACHED && (both <= level2_cache || both <= last_level_cache / (4 * threads)) ? columns : 0;
}

static inline idx size_of(const call_t *k) { return k->type == F64 ? 8 : k->type == F32 ? 4 : 2; }

/* What the last-level cache holds comes too late while stores go past it, if it is not asked for. (What memory holds comes no sooner;
 * and where stores go through the cache, that is slower. Of a forward pass x alone counts: with a residual, which that cache may
 * not hold too, it is faster as well.) */
static inline idx what_comes_soon(const call_t *k) { return k->streaming && k->place == NEAR ? LEAD / size_of(k) : 0; }

/* Tiles and parts of runs: a channel, a block. */
static void plan_runs(call_t *k, int threads)
{
    k->runs = runs_of(k->outer, k->channels, k->inner);
    k->tile = 1;
    k->tiles = k->channels;
    k->chunks = k->runs.blocks;
    k->chunk = 1;
    k->fused = k->channels >= 4 * (idx)threads;
}

/* Tiles and parts of columns; `bytes` of memory an element of the tile takes. */
static void plan_columns(call_t *k, int threads, idx bytes)
{
    idx columns = k->channels * k->inner, rows = (k->outer + 63) / 64; /* at most 64 chunks, each of whole blocks */
    k->chunk = (rows + BLOCK_ROWS - 1) / BLOCK_ROWS * BLOCK_ROWS;
    k->chunks = (k->outer + k->chunk - 1) / k->chunk;

    idx fits = level2_cache / 2 / (bytes * k->outer); /* columns of a tile that stays in cache */
    k->fused = fits >= least(columns, NARROWEST);
    idx width = MAX_COLUMNS;
    if (k->fused) {
        idx eighth = (columns / 8 + 15) / 16 * 16; /* enough tiles to share out */
        if (eighth < NARROWEST) eighth = NARROWEST;
        width = least(least(fits, eighth), MAX_COLUMNS);
        /* In cache, planes are written faster in order, from wherever the cache has them, than row by row of a tile. But not where
         * the first step writes dz: another thread would have to fetch it from this one's cache. */
        k->fused = !k->out || dz_is_cut(k) || k->place != CACHED || k->inner < SHORTEST_PLANE;
    }
    k->tile = width / k->inner > 0 ? width / k->inner : 1;
    /* Tiles whose first columns all lie alike to cache lines. */
    idx alike = k->inner % 16 == 0 ? 1 : k->inner % 8 == 0 ? 2 : k->inner % 4 == 0 ? 4 : k->inner % 2 == 0 ? 8 : 16;
    if (k->tile > alike) k->tile -= k->tile % alike;
    k->tiles = (k->channels + k->tile - 1) / k->tile;
    if (k->inner > 1) k->piece = k->chunk;
    else if (whole_rows(k)) k->piece = PIECE / k->channels;
    else {
        idx all = k->outer * k->tiles, parts = threads * ((all + BLOCK_ROWS * threads - 1) / (BLOCK_ROWS * threads));
        k->piece = (all + parts - 1) / parts;
    }
}

/* Chooses tiles and parts. `reads`: tensors read, in `passes` passes; only the work's
 * division depends on `threads`. */
static void plan(call_t *k, int threads, int reads, int passes)
{
    const idx size = size_of(k), tensor = k->outer * k->channels * k->inner * size;
    k->columns = k->inner == 1 || (k->inner < (passes > 1 ? SMALL_PLANE : SHORTEST_PLANE) && k->outer >= 8);
    k->place = tensor <= last_level_cache / 4 ? CACHED : tensor * reads <= last_level_cache ? NEAR : FAR;
    if (k->columns) plan_columns(k, threads, reads * size);
    else plan_runs(k, threads);
    /* Output goes past the cache where that does not hold it and what is read (of a backward x and dy, whatever more there is), a fifth
     * left to others; a fused step's, so that tiles stay in cache, from a quarter of it on. */
    idx tensors = least(reads, 2) + (k->added != NULL) + 1;
    k->streaming = k->fused && passes > 1 ? tensor > last_level_cache / 4 : tensor * tensors > last_level_cache / 5 * 4;
    /* What is asked for ahead: the next tile; or, where tiles are parts of rows, the next row's part; or what comes soon. */
    if (k->fused && passes > 1) k->ahead = next_tile(k, threads, reads * size);
    else k->ahead = k->columns && !whole_rows(k) ? k->channels * k->inner : what_comes_soon(k);
}

/* Of a split call: planes that were summed as columns are better written as they lie, in order. Returns whether the second step goes
 * the way of the first; then it goes back, and begins with what the thread's own cache still holds. */
static int plan_to_apply(call_t *k)
{
    if (!k->columns) return k->channels == 1 || k->outer == 1; /* sums of runs go by channels */
    if (k->inner < SHORTEST_PLANE) return 1;
    k->columns = 0;
    k->runs = runs_of(k->outer, k->channels, k->inner);
    k->ahead = what_comes_soon(k);
    return 0;
}

/* From one vector of coefficients to the next, in elements: not a multiple of a page (see APART). */
static inline idx coefs_apart(idx channels) { return (channels + 15) / 16 * 16 + 80; }

static inline tile_t tile_of(const call_t *k, idx i, idx *first)
{
    *first = i * k->tile;
    tile_t t = {least(k->tile, k->channels - *first), k->inner, k->channels * k->inner, k->place};
    return t;
}

/* Planes that are no more than a block are gone over several in order, whichever way the parts are walked. */
static inline idx planes_a_part(const call_t *k) { return k->inner < BLOCK ? BLOCK / k->inner : 1; }

/* A grid of tasks, `tiles` for every `piece` of `rows`; the last piece may be short. */
typedef struct { idx rows, piece, tiles; } grid_t;

static inline grid_t each(idx tasks)
{
    grid_t g = {tasks, 1, 1};
    return g;
}

static inline idx tasks_of(grid_t g) { return (g.rows + g.piece - 1) / g.piece * g.tiles; }

/* The task with which share t of n begins (n ≤ tasks): shares of as many rows, as near as whole tasks allow, and none empty. */
static inline idx share_from(grid_t g, idx t, idx n)
{
    idx tasks = tasks_of(g), before = (g.rows - 1) / g.piece * g.piece, last = g.rows - before, at = t * (g.rows * g.tiles) / n;
    idx i = at <= before * g.tiles ? (at + g.piece / 2) / g.piece : tasks - g.tiles + (at - before * g.tiles + last / 2) / last;
    return i < t ? t : least(i, tasks - n + t);
}

/* The parts of a sum. */
static inline grid_t sum_parts(const call_t *k)
{
    grid_t g = {k->outer, k->chunk, k->tiles};
    return k->columns ? g : each(k->chunks * k->tiles);
}

/* The parts of a step that goes over the elements once. */
static inline grid_t apply_parts(const call_t *k)
{
    idx planes = planes_a_part(k);
    grid_t g = {k->outer, k->piece, whole_rows(k) ? 1 : k->tiles};
    return k->columns ? g : each((k->outer * k->channels + planes - 1) / planes * k->runs.pieces);
}

/* Part i of columns: its first row, its number of rows, its channels. */
static inline tile_t part_of(const call_t *k, idx i, idx *row, idx *rows, idx *first)
{
    idx tiles = whole_rows(k) ? 1 : k->tiles;
    *row = i / tiles * k->piece;
    *rows = least(k->piece, k->outer - *row);
    if (tiles > 1) return tile_of(k, i % tiles, first);
    *first = 0;
    tile_t all = {k->channels, k->inner, k->channels * k->inner, k->place};
    return all;
}

#define T float
#define S float
#define FN(name) CAT(f32_, name)
#include "tasks_generic.h"

#define S uint16_t
#define FN(name) CAT(f16_, name)
#include "tasks_generic.h"

#define S uint16_t
#define FN(name) CAT(bf16_, name)
#include "tasks_generic.h"
#undef T

#define T double
#define S double
#define FN(name) CAT(f64_, name)
#include "tasks_generic.h"
#undef T

typedef void (*task_t)(const call_t *, idx);

#define TASK(name)                                                                                                     \
    static void name(const call_t *k, idx i)                                                                           \
    {                                                                                                                  \
        switch (k->type) {                                                                                             \
        case F64: f64_##name(k, i); break;                                                                             \
        case F16: f16_##name(k, i); break;                                                                             \
        case BF16: bf16_##name(k, i); break;                                                                           \
        default: f32_##name(k, i);                                                                                     \
        }                                                                                                              \
    }
TASK(moments_tile)
TASK(moments_part)
TASK(merge_moments_tile)
TASK(coefs_all)
TASK(normalize_part)
TASK(forward_tile)
TASK(gradient_tile)
TASK(gradient_part)
TASK(merge_gradient_tile)
TASK(slopes_all)
TASK(slope_part)
TASK(backward_tile)
TASK(limit_part)

/* Tasks [first, last), in order or from the last to the first. */
static void walk(task_t task, const call_t *k, idx first, idx last, int backwards)
{
    for (idx i = first; i < last; i++) task(k, backwards ? first + last - 1 - i : i);
#if defined(__x86_64__)
    if (k->streaming) _mm_sfence();
#endif
}

#endif
