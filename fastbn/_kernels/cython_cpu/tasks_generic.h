/* The tasks for one type (S in memory, T in registers); tasks.h includes this once per type and says what a tile and a part are. */

static inline FN(coefs) FN(coefs_from)(const call_t *k, idx c)
{
    T *base = (T *)k->coefs + c;
    idx apart = coefs_apart(k->channels);
    FN(coefs) v = {base, base + apart, base + 2 * apart};
    return v;
}

/* The tile's vectors with a value a column, if they are not that already. */
static inline FN(coefs) FN(spread)(FN(coefs) v, tile_t t, T (*room)[APART], int all)
{
    if (t.inner == 1) return v;
    FN(coefs) wide = {room[0], room[1], room[2]};
    FN(spread_columns)(v.hi, t, wide.hi);
    if (all) {
        FN(spread_columns)(v.a, t, wide.a);
        FN(spread_columns)(v.b, t, wide.b);
    }
    return wide;
}

/* An array that a call may not have, from element `at` on. */
static inline S *FN(from)(const void *array, idx at) { return array ? (S *)array + at : NULL; }

static inline FN(slopes) FN(slopes_from)(const call_t *k, idx c)
{
    T *base = (T *)k->coefs + c;
    idx apart = coefs_apart(k->channels);
    FN(slopes) g = {{base, base + apart, base + 2 * apart}, base + 3 * apart, base + 4 * apart};
    return g;
}

/* ---- wide channels: float64, element by element; blocks_generic.h says which ---- */

static inline int FN(is_wide)(const call_t *k, idx c) { return FN(wide)(FN(coefs_from)(k, 0).hi[c]); }

static inline int FN(any_wide)(const call_t *k, idx first, idx channels)
{
    const T *hi = FN(coefs_from)(k, first).hi;
    int any = 0;
    for (idx c = 0; c < channels; c++) any |= FN(wide)(hi[c]);
    return any;
}

/* A channel's coefficients, and z as the forward pass had it: in T, where that was enough for it. */
typedef struct { double mean, a, b; T hi, ta, tb; } FN(wide_t);

static FN(wide_t) FN(wide_of)(const call_t *k, idx c)
{
    FN(wide_t) w = {param_at(k->at_mean, c), 0, param_at(k->bias, c), 0, 0, 0};
    double var = param_at(k->at_var, c), weight = param_at(k->weight, c);
    FN(coefs) v = {&w.hi, &w.ta, &w.tb};
    w.a = weight * inverse_std(var, k->eps);
    FN(coefs_set)(v, 1, &w.mean, &var, &weight, &w.b, k->eps);
    return w;
}

static inline T FN(wide_z)(const FN(wide_t) *w, T x)
{
    return FN(wide)(w->hi) ? (T)(((double)x - w->mean) * w->a + w->b) : (x - w->hi) * w->ta + w->tb;
}

static __attribute__((noinline)) void FN(apply_wide)(const call_t *k, idx c, idx at, idx len)
{
    const FN(wide_t) w = FN(wide_of)(k, c);
    for (idx i = at; i < at + len; i++) {
        T z = FN(wide_z)(&w, FN(load1)((const S *)k->x + i));
        if (k->added) z += FN(load1)((const S *)k->added + i);
        FN(store1)((S *)k->out + i, FN(gate1)(kind_of(k), z, z, (T)k->slope));
    }
}

/* The same of channels that wrap around. */
static inline int FN(any_wide_of)(const call_t *k, idx channel, idx planes)
{
    idx here = least(planes, k->channels - channel);
    return FN(any_wide)(k, channel, here) || FN(any_wide)(k, 0, least(planes - here, k->channels));
}

/* ---- forward ---- */

/* A chunk of rows: block after block. */
static void FN(moments_chunk)(const call_t *k, idx chunk, idx first, tile_t t, double *mean, double *m2)
{
    double count = 0, block_mean[MAX_COLUMNS], block_m2[MAX_COLUMNS];
    idx row = chunk * k->chunk, end = least(row + k->chunk, k->outer), block = rows_a_block(t);
    for (; row < end; row += block) {
        idx rows = least(block, end - row);
        const S *x = (const S *)k->x + row * t.ld + first * t.inner;
        if (count == 0) {
            FN(moments_columns)(x, rows, t, mean, m2);
            count = (double)(rows * t.inner);
        } else {
            FN(moments_columns)(x, rows, t, block_mean, block_m2);
            count = merge_columns(t.channels, count, mean, m2, (double)(rows * t.inner), block_mean, block_m2);
        }
    }
}

static inline double FN(chunk_count)(const call_t *k, idx chunk)
{
    return (double)(least(k->chunk, k->outer - chunk * k->chunk) * k->inner);
}

static void FN(moments_part)(const call_t *k, idx i)
{
    if (k->columns) {
        idx chunk = i / k->tiles, first;
        tile_t t = tile_of(k, i % k->tiles, &first);
        idx at = chunk * k->channels + first;
        FN(moments_chunk)(k, chunk, first, t, k->part_mean + at, k->part_second + at);
    } else {
        idx channel = i / k->runs.blocks, block = i % k->runs.blocks;
        block_t b = block_at(&k->runs, channel, block);
        moments_t m = FN(moments_runs)((const S *)k->x + b.offset, b);
        k->part_mean[block * k->channels + channel] = m.mean;
        k->part_second[block * k->channels + channel] = m.m2;
    }
}

static inline void FN(moments_done)(const call_t *k, idx first, idx channels)
{
    if (k->to_var)
        for (idx c = first; c < first + channels; c++) k->second[c] /= (double)(k->outer * k->inner);
}

static void FN(merge_moments_tile)(const call_t *k, idx i)
{
    idx first;
    tile_t t = tile_of(k, i, &first);
    if (k->columns) {
        double count = 0;
        for (idx chunk = 0; chunk < k->chunks; chunk++) {
            idx at = chunk * k->channels + first;
            count = merge_columns(t.channels, count, k->mean + first, k->second + first, FN(chunk_count)(k, chunk),
                                  k->part_mean + at, k->part_second + at);
        }
    } else {
        moments_t m = {0, 0, 0};
        for (idx block = 0; block < k->runs.blocks; block++) {
            block_t b = block_at(&k->runs, first, block);
            idx at = block * k->channels + first;
            moments_t part = {(double)(b.runs * b.len), k->part_mean[at], k->part_second[at]};
            m = merge(m, part);
        }
        k->mean[first] = m.mean;
        k->second[first] = m.m2;
    }
    FN(moments_done)(k, first, t.channels);
}

static void FN(moments_tile)(const call_t *k, idx i)
{
    idx first;
    tile_t t = tile_of(k, i, &first);
    if (k->columns) {
        double count = 0, chunk_mean[MAX_COLUMNS], chunk_m2[MAX_COLUMNS];
        for (idx chunk = 0; chunk < k->chunks; chunk++) {
            FN(moments_chunk)(k, chunk, first, t, chunk_mean, chunk_m2);
            count = merge_columns(t.channels, count, k->mean + first, k->second + first, FN(chunk_count)(k, chunk),
                                  chunk_mean, chunk_m2);
        }
    } else {
        moments_t m = {0, 0, 0};
        for (idx block = 0; block < k->runs.blocks; block++) {
            block_t b = block_at(&k->runs, first, block);
            m = merge(m, FN(moments_runs)((const S *)k->x + b.offset, b));
        }
        k->mean[first] = m.mean;
        k->second[first] = m.m2;
    }
    FN(moments_done)(k, first, t.channels);
}

static void FN(coefs_of)(const call_t *k, idx first, idx channels)
{
    double room[4][SOME];
    for (idx c = first; c < first + channels; c += SOME) {
        idx n = least(SOME, first + channels - c);
        FN(coefs_set)(FN(coefs_from)(k, c), n, params_at(k->at_mean, c, n, room[0]), params_at(k->at_var, c, n, room[1]),
                      params_at(k->weight, c, n, room[2]), params_at(k->bias, c, n, room[3]), k->eps);
    }
}

static void FN(coefs_tile)(const call_t *k, idx i)
{
    idx first;
    tile_t t = tile_of(k, i, &first);
    FN(coefs_of)(k, first, t.channels);
}

static void FN(coefs_all)(const call_t *k, idx i) { FN(coefs_of)(k, 0, k->channels); }

/* A stretch that ends in the middle of a line: see EACH_ROW. */
INLINE void FN(ask_for_ragged_end)(const call_t *k, idx at, idx len)
{
    if (k->streaming && len % (UNIT_BYTES / (idx)sizeof(S))) __builtin_prefetch((S *)k->out + at + FN(some_rows_on)(len), 1);
}

/* Not for SWEEP_PLANES: planes shorter than a vector, those of wide channels, and an output that no vector is aligned to. */
static inline int FN(one_plane_at_a_time)(const call_t *k, idx channel, idx planes, idx inner)
{
    return inner < SHORTEST_PLANE || (uintptr_t)k->out % sizeof(S) || FN(any_wide_of)(k, channel, planes);
}

/* `planes` planes of `inner` elements (or one piece of a plane), one behind the other from element `at` on; the first is of `channel`. */
static void FN(apply_planes_at)(const call_t *k, idx channel, idx at, idx planes, idx inner)
{
    if (planes > 1 && FN(one_plane_at_a_time)(k, channel, planes, inner)) {
        for (idx p = 0; p < planes; p++) FN(apply_planes_at)(k, (channel + p) % k->channels, at + p * inner, 1, inner);
        return;
    }
    if (FN(is_wide)(k, channel)) {
        FN(apply_wide)(k, channel, at, inner);
        return;
    }
    FN(ask_for_ragged_end)(k, at, planes * inner);
    FN(apply_planes)(kind_of(k), (const S *)k->x + at, FN(from)(k->added, at), (S *)k->out + at, planes, inner,
                     FN(coefs_from)(k, 0), channel, k->channels, (T)k->slope, k->streaming, k->ahead);
}

static void FN(apply_stretch)(const call_t *k, idx at, idx rows, idx ld, idx cols, FN(coefs) v)
{
    FN(apply_columns)(kind_of(k), (const S *)k->x + at, FN(from)(k->added, at), (S *)k->out + at, rows, ld, cols, v,
                      (T)k->slope, k->streaming, k->ahead);
}

/* Columns before the first from which on the output's vectors are aligned; 0 if none is. */
static inline idx FN(to_aligned)(const S *out, idx cols)
{
    idx head = FN(misaligned)(out, cols, (uintptr_t)(VECTOR_BYTES / sizeof(T) * sizeof(S)));
    return head < cols ? head : 0;
}

/* Whole rows, one behind the other, may as well begin where the output is aligned, and wrap around: each does so where the next. */
static inline int FN(wraps_around)(idx ld, idx cols)
{
    return cols == ld && cols <= SHORT_ROW && cols % (VECTOR_BYTES / (idx)sizeof(T)) == 0;
}

/* Elsewhere coefficients are copied to where they lie beside the output's aligned vectors, given rows enough: by how much. */
static inline idx FN(shift_beside)(idx head, idx rows, idx ld)
{
    return rows >= 8 && ld % (VECTOR_BYTES / (idx)sizeof(T)) == 0 ? FN(to_line)(head) : 0;
}

static inline T *FN(turn)(const T *values, idx n, idx by, T *moved)
{
    memcpy(moved, values + by, (size_t)(n - by) * sizeof(T));
    memcpy(moved + n - by, values, (size_t)by * sizeof(T));
    return moved;
}

/* For the same reason so many whole rows are taken for one that it is a whole number of vectors, and not a short one: rows with
 * ragged ends are slow, and where they are streamed, very slow. 1 where that would be too long. */
static inline idx FN(rows_to_join)(const call_t *k, tile_t t)
{
    idx vector = VECTOR_BYTES / (idx)sizeof(T), joined = t.channels, n = 1;
    if (t.inner > 1 || t.channels != k->channels) return 1;
    while (joined % vector || joined < SHORTEST_ROW) joined += t.channels, n++;
    return joined <= SHORT_ROW ? n : 1;
}

static void FN(normalize_stretch)(const call_t *k, idx at, idx rows, idx ld, idx cols, FN(coefs) v)
{
    T moved[3][APART] LINED;
    idx head = FN(to_aligned)((S *)k->out + at, cols), shift = FN(shift_beside)(head, rows, ld);
    if (head && rows > 0 && FN(wraps_around)(ld, cols)) {
        FN(coefs) w = {FN(turn)(v.hi, cols, head, moved[0]), FN(turn)(v.a, cols, head, moved[1]),
                       FN(turn)(v.b, cols, head, moved[2])};
        FN(apply_stretch)(k, at, 1, ld, head, v);
        FN(apply_stretch)(k, at + head, rows - 1, ld, cols, w);
        FN(apply_stretch)(k, at + head + (rows - 1) * ld, 1, ld, cols - head, w);
    } else {
        if (shift) v = FN(repeat_coefs)(v, cols, 1, shift, moved, 1);
        FN(apply_stretch)(k, at, rows, ld, cols, v);
    }
}

/* Rows [row, row + rows) of a tile of columns. */
static void FN(normalize_rows)(const call_t *k, idx row, idx rows, idx first, tile_t t)
{
    if (t.inner >= SHORTEST_PLANE || FN(any_wide)(k, first, t.channels)) {
        for (idx r = row; r < row + rows; r++)
            FN(apply_planes_at)(k, first, r * t.ld + first * t.inner, t.channels, t.inner);
        return;
    }
    T room[3][APART] LINED;
    FN(coefs) v = FN(spread)(FN(coefs_from)(k, first), t, room, 1);
    idx at = row * t.ld + first * t.inner, cols = t.channels * t.inner, join = FN(rows_to_join)(k, t);
    if (join == 1) {
        FN(normalize_stretch)(k, at, rows, t.ld, cols, v);
        return;
    }
    T repeated[3][APART] LINED;
    FN(coefs) w = FN(repeat_coefs)(v, cols, join, 0, repeated, 1);
    idx joined = rows / join, rest = rows % join * cols;
    FN(normalize_stretch)(k, at, joined, join * cols, join * cols, w);
    if (rest) FN(apply_stretch)(k, at + joined * join * cols, 1, rest, rest, w);
}

static void FN(normalize_part)(const call_t *k, idx i)
{
    if (k->columns) {
        idx row, rows, first;
        tile_t t = part_of(k, i, &row, &rows, &first);
        FN(normalize_rows)(k, row, rows, first, t);
    } else {
        idx some = planes_a_part(k), plane = i / k->runs.pieces * some, start = (i % k->runs.pieces) * BLOCK;
        FN(apply_planes_at)(k, plane % k->channels, plane * k->inner + start, least(some, k->outer * k->channels - plane),
                          least(BLOCK, k->inner - start));
    }
}

static void FN(forward_tile)(const call_t *k, idx i)
{
    FN(moments_tile)(k, i);
    FN(coefs_tile)(k, i);
    idx first;
    tile_t t = tile_of(k, i, &first);
    if (k->columns)
        FN(normalize_rows)(k, 0, k->outer, first, t);
    else
        for (idx n = k->outer - 1; n >= 0; n--)
            FN(apply_planes_at)(k, first, (n * k->channels + first) * k->inner, 1, k->inner);
}

/* ---- backward ---- */

/* The first step writes dz, and the second then has less to read and to do: in cache, and where both go over whole rows. But not where
 * a tile stays in cache between them: y and dy then cost less to read again than dz to write through the cache. Half types would be
 * rounded by it: their second step always begins with dy. */
static inline int FN(dz_first)(const call_t *k)
{
    return dz_is_cut(k) && sizeof(S) == sizeof(T) && (k->place == CACHED || (whole_rows(k) && !k->fused));
}

static inline FN(gate_t) FN(gate_at)(const call_t *k, idx at)
{
    FN(gate_t) gate = {kind_of(k), (T)k->slope, FN(from)(k->y, at), FN(dz_first)(k) ? FN(from)(k->dz, at) : NULL, k->streaming};
    return gate;
}

static inline FN(gate_t) FN(gate_again)(const call_t *k, idx at)
{
    FN(gate_t) gate = {FN(dz_first)(k) ? PLAIN : kind_of(k), (T)k->slope, FN(from)(k->y, at),
                       FN(dz_first)(k) ? NULL : FN(from)(k->dz, at), k->streaming};
    return gate;
}

/* Does the second step write dz before dx? Where both go past the cache and lie unlike to vectors; but not where dz overwrites the dy
 * that dx needs. */
static inline int FN(dz_before_dx)(const call_t *k)
{
    return k->dz && !FN(dz_first)(k) && k->streaming && k->dz != k->dy && !FN(lie_alike)(k->dz, k->out);
}

static inline const S *FN(dy_again)(const call_t *k, idx at) { return (const S *)(FN(dz_first)(k) ? k->dz : k->dy) + at; }

/* Of a wide channel: dz of element i, from dy as far as the activation passed it, or as the first step wrote it. */
static inline T FN(wide_dz)(const call_t *k, const FN(wide_t) *w, idx i, int written)
{
    if (written) return FN(load1)((const S *)k->dz + i);
    T z = k->y ? FN(load1)((const S *)k->y + i) : FN(wide_z)(w, FN(load1)((const S *)k->x + i));
    return FN(gate1)(kind_of(k), FN(load1)((const S *)k->dy + i), z, (T)k->slope);
}

/* Its sums over a block, about the mean. `written`: dz is there. */
static __attribute__((noinline)) FN(sums) FN(gradient_wide)(const call_t *k, idx c, block_t b, int written)
{
    const FN(wide_t) w = FN(wide_of)(k, c);
    FN(sums) t = {0, 0};
    for (idx r = 0; r < b.runs; r++)
        for (idx i = b.offset + r * b.stride; i < b.offset + r * b.stride + b.len; i++) {
            T dz = FN(wide_dz)(k, &w, i, written);
            if (FN(dz_first)(k) && !written) FN(store1)((S *)k->dz + i, dz);
            t.dy += (double)dz;
            t.dy_x += (double)dz * ((double)FN(load1)((const S *)k->x + i) - w.mean);
        }
    return t;
}

static __attribute__((noinline)) void FN(slope_wide)(const call_t *k, idx c, idx at, idx len)
{
    const FN(wide_t) w = FN(wide_of)(k, c);
    const int written = FN(dz_first)(k);
    double count = (double)(k->outer * k->inner), m = 0, slope = 0;
    if (k->batch) {
        m = k->mean[c] / count;
        slope = k->second[c] / count / (param_at(k->at_var, c) + k->eps);
    }
    for (idx i = at; i < at + len; i++) {
        double d = k->batch ? (double)FN(load1)((const S *)k->x + i) - w.mean : 0;
        T dz = FN(wide_dz)(k, &w, i, written);
        if (k->dz && !written) FN(store1)((S *)k->dz + i, dz);
        FN(store1)((S *)k->out + i, (T)((((double)dz - m) - d * slope) * w.a));
    }
}

static void FN(gradient_chunk)(const call_t *k, idx chunk, idx first, tile_t t, double *sum_dy, double *sum_dy_x)
{
    double block_dy[MAX_COLUMNS], block_dy_x[MAX_COLUMNS];
    T room[3][APART] LINED;
    kind_t kind = kind_of(k);
    FN(coefs) v = FN(spread)(FN(coefs_from)(k, first), t, room, kind == RELU || kind == LEAKY);
    const int any = FN(any_wide)(k, first, t.channels);
    idx begin = chunk * k->chunk, end = least(begin + k->chunk, k->outer), block = rows_a_block(t);
    for (idx row = begin; row < end; row += block) {
        idx at = row * t.ld + first * t.inner;
        FN(gradient_columns)(FN(gate_at)(k, at), (const S *)k->dy + at, (const S *)k->x + at,
                             least(block, end - row), t, v, block_dy, block_dy_x);
        for (idx c = 0; any && c < t.channels; c++)
            if (FN(is_wide)(k, first + c)) {
                block_t b = {at + c * t.inner, least(block, end - row), t.ld, t.inner};
                FN(sums) again = FN(gradient_wide)(k, first + c, b, FN(dz_first)(k));
                block_dy[c] = again.dy;
                block_dy_x[c] = again.dy_x;
            }
        for (idx c = 0; c < t.channels; c++) {
            sum_dy[c] = row == begin ? block_dy[c] : sum_dy[c] + block_dy[c];
            sum_dy_x[c] = row == begin ? block_dy_x[c] : sum_dy_x[c] + block_dy_x[c];
        }
    }
}

static inline FN(sums) FN(gradient_block)(const call_t *k, idx channel, idx block)
{
    block_t b = block_at(&k->runs, channel, block);
    if (FN(is_wide)(k, channel)) return FN(gradient_wide)(k, channel, b, 0);
    return FN(gradient_runs)(FN(gate_at)(k, b.offset), (const S *)k->dy + b.offset, (const S *)k->x + b.offset, b,
                             FN(coefs_from)(k, 0), channel);
}

static void FN(gradient_part)(const call_t *k, idx i)
{
    if (k->columns) {
        idx chunk = i / k->tiles, first;
        tile_t t = tile_of(k, i % k->tiles, &first);
        idx at = chunk * k->channels + first;
        FN(gradient_chunk)(k, chunk, first, t, k->part_mean + at, k->part_second + at);
    } else {
        idx channel = i / k->runs.blocks, block = i % k->runs.blocks;
        FN(sums) part = FN(gradient_block)(k, channel, block);
        k->part_mean[block * k->channels + channel] = part.dy;
        k->part_second[block * k->channels + channel] = part.dy_x;
    }
}

/* The sums were taken about hi; the mean's low part is put right here. Then the parameters' gradients. */
static inline void FN(gradient_done)(const call_t *k, idx first, idx channels)
{
    double room[2][SOME], grad_weight[SOME];
    for (idx c = first; c < first + channels; c += SOME) {
        const idx n = least(SOME, first + channels - c);
        const double *restrict mean = params_at(k->at_mean, c, n, room[0]), *restrict var = params_at(k->at_var, c, n, room[1]);
        const double *restrict dy = k->mean + c;
        const T *restrict hi = FN(coefs_from)(k, c).hi;
        double *restrict dy_xmu = k->second + c;
        for (idx j = 0; j < n; j++) {
            double right = dy_xmu[j] - (mean[j] - (double)(T)mean[j]) * dy[j];
            dy_xmu[j] = FN(wide)(hi[j]) ? dy_xmu[j] : right;
            grad_weight[j] = dy_xmu[j] * inverse_std(var[j], k->eps);
        }
        results_set(k->grad_weight, c, n, grad_weight);
        results_set(k->grad_bias, c, n, dy);
    }
}

static void FN(merge_gradient_tile)(const call_t *k, idx i)
{
    idx first;
    tile_t t = tile_of(k, i, &first);
    for (idx c = first; c < first + t.channels; c++) {
        k->mean[c] = k->part_mean[c];
        k->second[c] = k->part_second[c];
    }
    for (idx chunk = 1; chunk < k->chunks; chunk++)
        for (idx c = first; c < first + t.channels; c++) {
            k->mean[c] += k->part_mean[chunk * k->channels + c];
            k->second[c] += k->part_second[chunk * k->channels + c];
        }
    FN(gradient_done)(k, first, t.channels);
}

static void FN(gradient_tile)(const call_t *k, idx i)
{
    idx first;
    tile_t t = tile_of(k, i, &first);
    if (k->columns) {
        double chunk_dy[MAX_COLUMNS], chunk_dy_x[MAX_COLUMNS];
        FN(gradient_chunk)(k, 0, first, t, k->mean + first, k->second + first);
        for (idx chunk = 1; chunk < k->chunks; chunk++) {
            FN(gradient_chunk)(k, chunk, first, t, chunk_dy, chunk_dy_x);
            for (idx c = 0; c < t.channels; c++) {
                k->mean[first + c] += chunk_dy[c];
                k->second[first + c] += chunk_dy_x[c];
            }
        }
    } else {
        FN(sums) total = FN(gradient_block)(k, first, 0);
        for (idx block = 1; block < k->runs.blocks; block++) {
            FN(sums) part = FN(gradient_block)(k, first, block);
            total.dy += part.dy;
            total.dy_x += part.dy_x;
        }
        k->mean[first] = total.dy;
        k->second[first] = total.dy_x;
    }
    FN(gradient_done)(k, first, t.channels);
}

static void FN(slopes_of)(const call_t *k, idx first, idx channels)
{
    if (!k->batch) return; /* fixed statistics: the scale is all */
    double room[2][SOME];
    for (idx c = first; c < first + channels; c += SOME) {
        idx n = least(SOME, first + channels - c);
        FN(slopes_set)(FN(slopes_from)(k, c), n, params_at(k->at_mean, c, n, room[0]), params_at(k->at_var, c, n, room[1]), k->eps,
                       k->mean + c, k->second + c, (double)(k->outer * k->inner));
    }
}

static void FN(slopes_tile)(const call_t *k, idx i)
{
    idx first;
    tile_t t = tile_of(k, i, &first);
    FN(slopes_of)(k, first, t.channels);
}

static void FN(slopes_all)(const call_t *k, idx i) { FN(slopes_of)(k, 0, k->channels); }

/* As apply_planes_at. */
static void FN(slope_planes_at)(const call_t *k, idx channel, idx at, idx planes, idx inner)
{
    if (planes > 1 && FN(one_plane_at_a_time)(k, channel, planes, inner)) {
        for (idx p = 0; p < planes; p++) FN(slope_planes_at)(k, (channel + p) % k->channels, at + p * inner, 1, inner);
        return;
    }
    if (FN(is_wide)(k, channel)) {
        FN(slope_wide)(k, channel, at, inner);
        return;
    }
    const int dz_before = FN(dz_before_dx)(k);
    if (dz_before && inner > BLOCK) { /* dx finds in cache what dz was made of */
        for (idx i = 0; i < inner; i += BLOCK) FN(slope_planes_at)(k, channel, at + i, 1, least(BLOCK, inner - i));
        return;
    }
    FN(ask_for_ragged_end)(k, at, planes * inner);
    FN(gate_t) gate = FN(gate_again)(k, at);
    if (dz_before) {
        FN(pass_alone)(gate, (const S *)k->dy + at, planes * inner);
        gate.dz = NULL;
    }
    FN(slope_planes)(gate, k->batch, FN(dy_again)(k, at), (const S *)k->x + at, (S *)k->out + at, planes,
                     inner, FN(slopes_from)(k, 0), channel, k->channels, k->ahead);
}

static void FN(slope_stretch)(const call_t *k, idx at, idx rows, idx ld, idx cols, FN(slopes) g)
{
    const int dz_before = FN(dz_before_dx)(k);
    const idx some = !dz_before ? rows : cols == ld ? BLOCK / cols : 1; /* rows that are one run, and stay in cache */
    for (idx r = 0; r < rows; r += some, at += some * ld) {
        FN(gate_t) gate = FN(gate_again)(k, at);
        const idx now = least(some, rows - r);
        if (dz_before) {
            FN(pass_alone)(gate, (const S *)k->dy + at, now * cols);
            gate.dz = NULL;
        }
        FN(slope_columns)(gate, k->batch, FN(dy_again)(k, at), (const S *)k->x + at, (S *)k->out + at, now, ld, cols, g, k->ahead);
    }
}

static void FN(gradient_stretch)(const call_t *k, idx at, idx rows, idx ld, idx cols, FN(slopes) g)
{
    T moved[5][APART] LINED;
    idx head = FN(to_aligned)((S *)k->out + at, cols), shift = FN(shift_beside)(head, rows, ld);
    if (head && rows > 0 && FN(wraps_around)(ld, cols)) {
        FN(slopes) w = {{FN(turn)(g.v.hi, cols, head, moved[0]), FN(turn)(g.v.a, cols, head, moved[1]),
                         FN(turn)(g.v.b, cols, head, moved[2])},
                        FN(turn)(g.m, cols, head, moved[3]), FN(turn)(g.k, cols, head, moved[4])};
        FN(slope_stretch)(k, at, 1, ld, head, g);
        FN(slope_stretch)(k, at + head, rows - 1, ld, cols, w);
        FN(slope_stretch)(k, at + head + (rows - 1) * ld, 1, ld, cols - head, w);
    } else {
        if (shift) g = FN(repeat_slopes)(g, cols, 1, shift, moved);
        FN(slope_stretch)(k, at, rows, ld, cols, g);
    }
}

static void FN(slope_rows)(const call_t *k, idx row, idx rows, idx first, tile_t t)
{
    if (t.inner >= SHORTEST_PLANE || FN(any_wide)(k, first, t.channels)) {
        for (idx r = row; r < row + rows; r++)
            FN(slope_planes_at)(k, first, r * t.ld + first * t.inner, t.channels, t.inner);
        return;
    }
    FN(slopes) g = FN(slopes_from)(k, first);
    T room[5][APART] LINED;
    if (t.inner > 1) {
        g.v = FN(spread)(g.v, t, room, 1);
        if (k->batch) {
            FN(spread_columns)(g.m, t, room[3]);
            FN(spread_columns)(g.k, t, room[4]);
        }
        g.m = room[3], g.k = room[4];
    }
    idx at = row * t.ld + first * t.inner, cols = t.channels * t.inner, join = FN(rows_to_join)(k, t);
    if (join == 1) {
        FN(gradient_stretch)(k, at, rows, t.ld, cols, g);
        return;
    }
    T repeated[5][APART] LINED;
    FN(slopes) w = FN(repeat_slopes)(g, cols, join, 0, repeated);
    idx joined = rows / join, rest = rows % join * cols;
    FN(gradient_stretch)(k, at, joined, join * cols, join * cols, w);
    if (rest) FN(slope_stretch)(k, at + joined * join * cols, 1, rest, rest, w);
}

static void FN(slope_part)(const call_t *k, idx i)
{
    if (k->columns) {
        idx row, rows, first;
        tile_t t = part_of(k, i, &row, &rows, &first);
        FN(slope_rows)(k, row, rows, first, t);
    } else {
        idx some = planes_a_part(k), plane = i / k->runs.pieces * some, start = (i % k->runs.pieces) * BLOCK;
        FN(slope_planes_at)(k, plane % k->channels, plane * k->inner + start, least(some, k->outer * k->channels - plane),
                          least(BLOCK, k->inner - start));
    }
}

static void FN(backward_tile)(const call_t *k, idx i)
{
    FN(coefs_tile)(k, i);
    FN(gradient_tile)(k, i);
    FN(slopes_tile)(k, i);
    idx first;
    tile_t t = tile_of(k, i, &first);
    if (k->columns)
        FN(slope_rows)(k, 0, k->outer, first, t);
    else
        for (idx n = k->outer - 1; n >= 0; n--)
            FN(slope_planes_at)(k, first, (n * k->channels + first) * k->inner, 1, k->inner);
}

/* ---- the limit ---- */

/* A stretch of memory: copied, or added to dy. */
static void FN(limit_part)(const call_t *k, idx i)
{
    idx at = i * BLOCK, len = least(BLOCK, k->outer * k->channels * k->inner - at);
    FN(copy_or_add_run)((const S *)k->x + at, FN(from)(k->dy, at), FN(from)(k->out, at), len, k->streaming);
}

#undef S
#undef FN
