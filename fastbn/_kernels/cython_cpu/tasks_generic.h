/* The tasks for one element type T; tasks.h includes this once per type and says what a tile and a part are. */

static inline FN(coefs) FN(coefs_from)(const call_t *k, idx c)
{
    T *base = (T *)k->coefs + c;
    idx apart = coefs_apart(k->channels);
    FN(coefs) v = {base, base + apart, base + 2 * apart};
    return v;
}

static inline FN(slopes) FN(slopes_from)(const call_t *k, idx c)
{
    T *base = (T *)k->coefs + c;
    idx apart = coefs_apart(k->channels);
    FN(slopes) v = {base, base + apart, base + 2 * apart, base + 3 * apart, base + 4 * apart};
    return v;
}

/* ---- forward ---- */

/* A chunk of rows: block after block. */
static void FN(moments_chunk)(const call_t *k, idx chunk, idx first, tile_t t, double *mean, double *m2)
{
    double count = 0, block_mean[MAX_COLUMNS], block_m2[MAX_COLUMNS];
    idx row = chunk * k->chunk, end = least(row + k->chunk, k->outer);
    for (; row < end; row += BLOCK_ROWS) {
        idx rows = least(BLOCK_ROWS, end - row);
        const T *x = (const T *)k->x + row * t.ld + first * t.inner;
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
        moments_t m = FN(moments_runs)((const T *)k->x + b.offset, b);
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
            m = merge(m, FN(moments_runs)((const T *)k->x + b.offset, b));
        }
        k->mean[first] = m.mean;
        k->second[first] = m.m2;
    }
    FN(moments_done)(k, first, t.channels);
}

static void FN(coefs_tile)(const call_t *k, idx i)
{
    idx first;
    tile_t t = tile_of(k, i, &first);
    FN(coefs) v = FN(coefs_from)(k, 0);
    for (idx c = first; c < first + t.channels; c++)
        FN(coef_set)(v, c, param_at(k->at_mean, c), param_at(k->at_var, c), param_at(k->weight, c), param_at(k->bias, c),
                     k->eps);
}

/* Rows [row, row + rows) of a tile of columns. */
static void FN(normalize_rows)(const call_t *k, idx row, idx rows, idx first, tile_t t)
{
    FN(coefs) v = FN(coefs_from)(k, first);
    if (t.inner >= SMALL_PLANE_TO_APPLY) {
        for (idx r = row; r < row + rows; r++)
            for (idx c = 0; c < t.channels; c++) {
                idx at = r * t.ld + (first + c) * t.inner;
                FN(apply_run)((const T *)k->x + at, (T *)k->out + at, t.inner, v, c, k->streaming);
            }
        return;
    }
    T spread[3][APART];
    if (t.inner > 1) {
        FN(spread_columns)(v.hi, t, spread[0]);
        FN(spread_columns)(v.a, t, spread[1]);
        FN(spread_columns)(v.b, t, spread[2]);
        FN(coefs) wide = {spread[0], spread[1], spread[2]};
        v = wide;
    }
    idx at = row * t.ld + first * t.inner;
    FN(apply_columns)((const T *)k->x + at, (T *)k->out + at, rows, t.ld, t.channels * t.inner, v, k->streaming,
                      k->cached);
}

static void FN(normalize_part)(const call_t *k, idx i)
{
    if (k->columns) {
        idx row, rows, first;
        tile_t t = part_of(k, i, &row, &rows, &first);
        FN(normalize_rows)(k, row, rows, first, t);
    } else {
        idx plane = i / k->runs.pieces, start = (i % k->runs.pieces) * BLOCK, at = plane * k->inner + start;
        FN(apply_run)((const T *)k->x + at, (T *)k->out + at, least(BLOCK, k->inner - start), FN(coefs_from)(k, 0),
                      plane % k->channels, k->streaming);
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
        for (idx n = k->outer - 1; n >= 0; n--) {
            idx at = (n * k->channels + first) * k->inner;
            FN(apply_run)((const T *)k->x + at, (T *)k->out + at, k->inner, FN(coefs_from)(k, 0), first, k->streaming);
        }
}

/* ---- backward ---- */

static void FN(gradient_chunk)(const call_t *k, idx chunk, idx first, tile_t t, double *sum_dy, double *sum_dy_x)
{
    double block_dy[MAX_COLUMNS], block_dy_x[MAX_COLUMNS];
    T hi[MAX_COLUMNS];
    for (idx c = 0; c < t.channels; c++) {
        T mean = (T)param_at(k->at_mean, first + c);
        for (idx j = 0; j < t.inner; j++) hi[c * t.inner + j] = mean;
    }
    idx begin = chunk * k->chunk, end = least(begin + k->chunk, k->outer);
    for (idx row = begin; row < end; row += BLOCK_ROWS) {
        idx at = row * t.ld + first * t.inner;
        FN(gradient_columns)((const T *)k->dy + at, (const T *)k->x + at, least(BLOCK_ROWS, end - row), t, hi, block_dy,
                             block_dy_x);
        for (idx c = 0; c < t.channels; c++) {
            sum_dy[c] = row == begin ? block_dy[c] : sum_dy[c] + block_dy[c];
            sum_dy_x[c] = row == begin ? block_dy_x[c] : sum_dy_x[c] + block_dy_x[c];
        }
    }
}

static inline FN(sums) FN(gradient_block)(const call_t *k, idx channel, idx block)
{
    block_t b = block_at(&k->runs, channel, block);
    return FN(gradient_runs)((const T *)k->dy + b.offset, (const T *)k->x + b.offset, b,
                             (T)param_at(k->at_mean, channel));
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
    for (idx c = first; c < first + channels; c++) {
        double mean = param_at(k->at_mean, c);
        k->second[c] -= (mean - (double)(T)mean) * k->mean[c];
        result_set(k->grad_weight, c, k->second[c] * inverse_std(param_at(k->at_var, c), k->eps));
        result_set(k->grad_bias, c, k->mean[c]);
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

static void FN(slopes_tile)(const call_t *k, idx i)
{
    idx first;
    tile_t t = tile_of(k, i, &first);
    FN(slopes) g = FN(slopes_from)(k, 0);
    for (idx c = first; c < first + t.channels; c++) {
        double mean = param_at(k->at_mean, c), var = param_at(k->at_var, c), weight = param_at(k->weight, c);
        if (k->batch) FN(slope_set)(g, c, mean, var, weight, k->eps, k->mean[c], k->second[c], (double)(k->outer * k->inner));
        else g.a[c] = (T)FN(within)(weight * inverse_std(var, k->eps));
    }
}

static void FN(slope_plane)(const call_t *k, idx channel, idx at, idx len)
{
    FN(slopes) g = FN(slopes_from)(k, 0);
    const T *dy = (const T *)k->dy + at;
    if (k->batch) FN(slope_run)(dy, (const T *)k->x + at, (T *)k->out + at, len, g, channel, k->streaming);
    else FN(scale_run)(dy, (T *)k->out + at, len, g.a[channel], k->streaming);
}

static void FN(slope_rows)(const call_t *k, idx row, idx rows, idx first, tile_t t)
{
    if (t.inner >= SMALL_PLANE_TO_APPLY) {
        for (idx r = row; r < row + rows; r++)
            for (idx c = first; c < first + t.channels; c++) FN(slope_plane)(k, c, r * t.ld + c * t.inner, t.inner);
        return;
    }
    FN(slopes) g = FN(slopes_from)(k, first);
    T spread[5][APART];
    if (t.inner > 1) {
        FN(spread_columns)(g.m, t, spread[0]);
        FN(spread_columns)(g.a, t, spread[1]);
        FN(spread_columns)(g.hi, t, spread[2]);
        FN(spread_columns)(g.k, t, spread[3]);
        FN(spread_columns)(g.c, t, spread[4]);
        FN(slopes) wide = {spread[0], spread[1], spread[2], spread[3], spread[4]};
        g = wide;
    }
    idx at = row * t.ld + first * t.inner, cols = t.channels * t.inner;
    const T *dy = (const T *)k->dy + at;
    if (k->batch) FN(slope_columns)(dy, (const T *)k->x + at, (T *)k->out + at, rows, t.ld, cols, g, k->streaming, k->cached);
    else FN(scale_columns)(dy, (T *)k->out + at, rows, t.ld, cols, g.a, k->streaming, k->cached);
}

static void FN(slope_part)(const call_t *k, idx i)
{
    if (k->columns) {
        idx row, rows, first;
        tile_t t = part_of(k, i, &row, &rows, &first);
        FN(slope_rows)(k, row, rows, first, t);
    } else {
        idx plane = i / k->runs.pieces, start = (i % k->runs.pieces) * BLOCK;
        FN(slope_plane)(k, plane % k->channels, plane * k->inner + start, least(BLOCK, k->inner - start));
    }
}

static void FN(backward_tile)(const call_t *k, idx i)
{
    FN(gradient_tile)(k, i);
    FN(slopes_tile)(k, i);
    idx first;
    tile_t t = tile_of(k, i, &first);
    if (k->columns)
        FN(slope_rows)(k, 0, k->outer, first, t);
    else
        for (idx n = k->outer - 1; n >= 0; n--)
            FN(slope_plane)(k, first, (n * k->channels + first) * k->inner, k->inner);
}

/* ---- the limit ---- */

/* A stretch of memory: copied, or added to dy. */
static void FN(limit_part)(const call_t *k, idx i)
{
    idx at = i * BLOCK, len = least(BLOCK, k->outer * k->channels * k->inner - at);
    const T *dy = (const T *)k->dy;
    FN(copy_or_add_run)((const T *)k->x + at, dy ? dy + at : NULL, (T *)k->out + at, len, k->streaming);
}

#undef T
#undef FN
