/* float16 and bfloat16 in memory, float in registers: one element (1), four (16), or a native vector of them at a time.
 *
 *     half    IEEE 754 binary16, by the processor's conversion where the instruction set has one
 *     brain   the upper half of a float
 *
 * Stores round to nearest, ties to even; a NaN stays one, and becomes quiet. The integer formulas give the bits of the processor's
 * instructions, so every instruction set gives the same results. */
#ifndef FASTBN_HALF_H
#define FASTBN_HALF_H

#define DEFINE_VECTORS(W, BYTES)                                                                                       \
    typedef float floats##W __attribute__((vector_size(BYTES), aligned(1), may_alias));                                \
    typedef uint32_t words##W __attribute__((vector_size(BYTES), aligned(1), may_alias));                              \
    typedef uint16_t halves##W __attribute__((vector_size(BYTES / 2), aligned(1), may_alias));

DEFINE_VECTORS(16, 16)
#if VECTOR_BYTES > 16
DEFINE_VECTORS(, VECTOR_BYTES)
#else
DEFINE_VECTORS(, 16)
#endif

/* 16 bits to 32 and back; what is narrowed fits. By name where gcc would do it in pieces. */
INLINE words16 widen16(const uint16_t *p) { return __builtin_convertvector(*(const halves16 *)p, words16); }
INLINE halves16 narrow16(words16 v) { return __builtin_convertvector(v, halves16); }
#if VECTOR_BYTES == 32
INLINE words widen(const uint16_t *p) { return (words)_mm256_cvtepu16_epi32(_mm_loadu_si128((const void *)p)); }
INLINE halves narrow(words v)
{
    __m256i w = (__m256i)v;
    return (halves)_mm_packus_epi32(_mm256_castsi256_si128(w), _mm256_extracti128_si256(w, 1));
}
#elif VECTOR_BYTES == 16
INLINE words widen(const uint16_t *p) { return __builtin_convertvector(*(const halves *)p, words); }
INLINE halves narrow(words v) { return __builtin_convertvector(v, halves); }
#endif

#define DEFINE_BRAIN(W)                                                                                                \
    INLINE floats##W brain_load##W(const uint16_t *p) { return (floats##W)(widen##W(p) << 16); }                       \
    INLINE words##W brain_bits##W(floats##W v)                                                                         \
    {                                                                                                                  \
        words##W f = (words##W)v, up = f + 0x7fff + (f >> 16 & 1), nan = (words##W)(v != v);                           \
        return ((nan & (f | 0x400000)) | (~nan & up)) >> 16;                                                           \
    }                                                                                                                  \
    INLINE halves##W brain_round##W(floats##W v) { return narrow##W(brain_bits##W(v)); }
DEFINE_BRAIN(16)
#if VECTOR_BYTES == 64
INLINE floats brain_load(const uint16_t *p) /* the upper words' places, in one step */
{
    const __m512i places = _mm512_slli_epi32(_mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0), 16);
    __m512i halves = _mm512_castsi256_si512(_mm256_loadu_si256((const void *)p));
    return (floats)_mm512_maskz_permutexvar_epi16(0xaaaaaaaa, places, halves);
}
INLINE halves brain_round(floats v)
{
    const __m512i upper = _mm512_set_epi32(0, 0, 0, 0, 0, 0, 0, 0, 0x1f001d, 0x1b0019, 0x170015, 0x130011, 0xf000d,
                                           0xb0009, 0x70005, 0x30001);
    __m512i f = (__m512i)v, up = _mm512_add_epi32(f, _mm512_set1_epi32(0x7fff));
    up = _mm512_mask_add_epi32(up, _mm512_test_epi32_mask(f, _mm512_set1_epi32(0x10000)), up, _mm512_set1_epi32(1));
    __mmask16 nan = _mm512_cmp_ps_mask((__m512)v, (__m512)v, _CMP_UNORD_Q);
    up = _mm512_mask_or_epi32(up, nan, f, _mm512_set1_epi32(0x400000));
    return (halves)_mm512_castsi512_si256(_mm512_permutexvar_epi16(upper, up));
}
#else
DEFINE_BRAIN()
#endif

#define DEFINE_HALF_BY_INTEGERS(W)                                                                                     \
    INLINE floats##W half_from##W(words##W h)                                                                          \
    {                                                                                                                  \
        words##W low = (h & 0x7fff) << 13;               \
        words##W special = (words##W)(low >= 0x0f800000), nan = (words##W)(low > 0x0f800000);                          \
        words##W f = (words##W)((floats##W)low * 0x1p112f); /* moves the exponent; denormals become normal */          \
        f |= (special & 0x7f800000) | (nan & 0x400000) | (h & 0x8000) << 16;                                           \
        return (floats##W)f;                                                                                           \
    }                                                                                                                  \
    INLINE words##W half_bits##W(floats##W v)                                                                          \
    {                                                                                                                  \
        words##W f = (words##W)v, sign = f & 0x80000000;                                                               \
        f ^= sign;                                                                                                     \
        words##W small = (words##W)(f < 0x38800000), big = (words##W)(f >= 0x47800000);                                \
        words##W nan = (words##W)(f > 0x7f800000);                                                                     \
        words##W denormal = (words##W)((floats##W)f + 0.5f) - 0x3f000000; /* the addition rounds */                    \
        words##W normal = (f - 0x38000000 + 0xfff + (f >> 13 & 1)) >> 13;                                              \
        words##W special = 0x7c00 | (nan & (0x200 | (f >> 13 & 0x3ff)));                                               \
        words##W h = (small & denormal) | (big & special) | (~(small | big) & normal);                                 \
        return h | sign >> 16;                                                                                         \
    }                                                                                                                  \
    INLINE floats##W half_load##W(const uint16_t *p) { return half_from##W(widen##W(p)); }                             \
    INLINE halves##W half_round##W(floats##W v) { return narrow##W(half_bits##W(v)); }

#if VECTOR_BYTES > 16
INLINE floats16 half_load16(const uint16_t *p) { return (floats16)_mm_cvtph_ps(_mm_loadl_epi64((const void *)p)); }
INLINE halves16 half_round16(floats16 v)
{
    __m128i h = _mm_cvtps_ph((__m128)v, _MM_FROUND_TO_NEAREST_INT);
    halves16 low;
    memcpy(&low, &h, sizeof low);
    return low;
}
#if VECTOR_BYTES == 64
INLINE floats half_load(const uint16_t *p) { return (floats)_mm512_cvtph_ps(_mm256_loadu_si256((const void *)p)); }
INLINE halves half_round(floats v) { return (halves)_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT); }
#else
INLINE floats half_load(const uint16_t *p) { return (floats)_mm256_cvtph_ps(_mm_loadu_si128((const void *)p)); }
INLINE halves half_round(floats v) { return (halves)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT); }
#endif
#else
DEFINE_HALF_BY_INTEGERS(16)
DEFINE_HALF_BY_INTEGERS()
#endif

/* One element, without a detour through memory. */
#if VECTOR_BYTES > 16
INLINE float half_from1(uint16_t h) { return _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(h))); }
INLINE uint16_t half_round1(float v)
{
    return (uint16_t)_mm_cvtsi128_si32(_mm_cvtps_ph(_mm_set_ss(v), _MM_FROUND_TO_NEAREST_INT));
}
#else
INLINE float half_from1(uint16_t h) { return half_from16((words16){h})[0]; }
INLINE uint16_t half_round1(float v) { return (uint16_t)half_bits16((floats16){v})[0]; }
#endif
INLINE float brain_from1(uint16_t h) { return ((floats16)((words16){h} << 16))[0]; }
INLINE uint16_t brain_round1(float v) { return (uint16_t)brain_bits16((floats16){v})[0]; }

#endif
