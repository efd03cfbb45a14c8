/* Vectors of the processor this file is compiled for, and what all kernels do with them.

   A row is 16 values, the unit of every loop and of every sum: product i of a group goes to lane
   i mod 16, in fp32, in order of position; lanes are folded 8, 4, 2, 1 in fp64, and groups are
   added in order. numpy does the same in skillvec/ops/lanes.py, so no digit depends on the
   processor.

   Compiled once for each instruction set, with -ffp-contract=off: a fused multiply-add is one only
   where it is called by name. */

#ifndef SKILLVEC_TILES_H
#define SKILLVEC_TILES_H

#include "face.h"

#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#define ALWAYS static inline __attribute__((always_inline))
#define ROW 16
#define GROUP 1024
#if defined(__AVX512F__)
#define WIDTH 16 /* fp32 values a register */
#elif defined(__AVX2__)
#define WIDTH 8
#else
#define WIDTH 4
#endif
#define PARTS (ROW / WIDTH)

enum { BF16, F16, F32, F64 };

typedef float vf __attribute__((vector_size(4 * WIDTH)));
typedef int32_t vi __attribute__((vector_size(4 * WIDTH)));
typedef uint32_t vu __attribute__((vector_size(4 * WIDTH)));
typedef uint16_t vh __attribute__((vector_size(2 * WIDTH)));
typedef double vd __attribute__((vector_size(4 * WIDTH))); /* half as many as fp32 */
typedef struct { vf v[PARTS]; } row32;
typedef struct { vd v[2 * PARTS]; } row64;

ALWAYS vf fused(vf a, vf b, vf c) /* a * b + c, rounded once */
{
#if defined(__AVX512F__)
    return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__)
    return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__aarch64__)
    return (vf)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
    for (int i = 0; i < WIDTH; i++) c[i] = __builtin_fmaf(a[i], b[i], c[i]);
    return c;
#endif
}

ALWAYS void to_f64(vf x, vd out[2])
{
#if defined(__AVX512F__)
    out[0] = (vd)_mm512_cvtps_pd(_mm512_castps512_ps256((__m512)x));
    out[1] = (vd)_mm512_cvtps_pd(_mm512_extractf32x8_ps((__m512)x, 1));
#elif defined(__AVX2__)
    out[0] = (vd)_mm256_cvtps_pd(_mm256_castps256_ps128((__m256)x));
    out[1] = (vd)_mm256_cvtps_pd(_mm256_extractf128_ps((__m256)x, 1));
#elif defined(__aarch64__)
    out[0] = (vd)vcvt_f64_f32(vget_low_f32((float32x4_t)x));
    out[1] = (vd)vcvt_high_f64_f32((float32x4_t)x);
#else
    for (int i = 0; i < WIDTH; i++) out[i / (WIDTH / 2)][i % (WIDTH / 2)] = x[i];
#endif
}

ALWAYS row64 widened(row32 x)
{
    row64 out;
    for (int p = 0; p < PARTS; p++) to_f64(x.v[p], out.v + 2 * p);
    return out;
}

/* ------------------------------------------------------------------- fp32 rows from and to memory */

ALWAYS vf from_bf16(const uint16_t *at)
{
#if defined(__AVX512F__)
    static const uint16_t PLACES[32] = {0, 0, 0, 1, 0, 2, 0, 3, 0, 4, 0, 5, 0, 6, 0, 7,
                                        0, 8, 0, 9, 0, 10, 0, 11, 0, 12, 0, 13, 0, 14, 0, 15};
    __m512i half = _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i *)at));
    return (vf)_mm512_maskz_permutexvar_epi16(0xAAAAAAAA, _mm512_loadu_si512(PLACES), half);
#elif defined(__AVX2__)
    return (vf)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)at)), 16);
#else
    vh half;
    memcpy(&half, at, sizeof half);
    return (vf)(__builtin_convertvector(half, vu) << 16);
#endif
}

ALWAYS vf from_f16(const uint16_t *at)
{
#if defined(__AVX512F__)
    return (vf)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)at));
#elif defined(__AVX2__)
    return (vf)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)at));
#elif defined(__aarch64__)
    return (vf)vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(at)));
#else
    vf out;
    for (int i = 0; i < WIDTH; i++) { _Float16 h; memcpy(&h, at + i, 2); out[i] = (float)h; }
    return out;
#endif
}

ALWAYS vf from_f32(const float *at)
{
    vf out;
    memcpy(&out, at, sizeof out);
    return out;
}

/* Patterns of BF16, nearest and ties to even; a NaN keeps its upper bits and gets quiet. */
ALWAYS vu bf16_bits(vf x)
{
    vu bits = (vu)x;
    vu rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
    vu nan = (vu)((bits & 0x7FFFFFFF) > 0x7F800000);
    return (rounded & ~nan) | (((bits >> 16) | 0x40) & nan);
}

ALWAYS void put_u16(vu bits, uint16_t *at)
{
#if defined(__AVX512F__)
    _mm256_storeu_si256((__m256i *)at, _mm512_cvtepi32_epi16((__m512i)bits));
#elif defined(__AVX2__)
    __m256i packed = _mm256_packus_epi32((__m256i)bits, (__m256i)bits); /* quarters 0 0 1 1 */
    packed = _mm256_permute4x64_epi64(packed, 0x08);
    _mm_storeu_si128((__m128i *)at, _mm256_castsi256_si128(packed));
#else
    vh half = __builtin_convertvector(bits, vh);
    memcpy(at, &half, sizeof half);
#endif
}

ALWAYS void put_f16(vf x, uint16_t *at)
{
#if defined(__AVX512F__)
    _mm256_storeu_si256((__m256i *)at, _mm512_cvtps_ph((__m512)x, 8)); /* nearest, no exceptions */
#elif defined(__AVX2__)
    _mm_storeu_si128((__m128i *)at, _mm256_cvtps_ph((__m256)x, 8));
#elif defined(__aarch64__)
    vst1_u16(at, vreinterpret_u16_f16(vcvt_f16_f32((float32x4_t)x)));
#else
    for (int i = 0; i < WIDTH; i++) { _Float16 h = (_Float16)x[i]; memcpy(at + i, &h, 2); }
#endif
}

ALWAYS row32 load(const void *from, int64_t at, int dtype)
{
    row32 out;
    for (int p = 0; p < PARTS; p++) {
        int64_t i = at + p * WIDTH;
        out.v[p] = dtype == BF16  ? from_bf16((const uint16_t *)from + i)
                   : dtype == F16 ? from_f16((const uint16_t *)from + i)
                                  : from_f32((const float *)from + i);
    }
    return out;
}

ALWAYS void store(row32 x, void *to, int64_t at, int dtype)
{
    for (int p = 0; p < PARTS; p++) {
        int64_t i = at + p * WIDTH;
        if (dtype == BF16) put_u16(bf16_bits(x.v[p]), (uint16_t *)to + i);
        else if (dtype == F16) put_f16(x.v[p], (uint16_t *)to + i);
        else memcpy((float *)to + i, &x.v[p], sizeof(vf));
    }
}

ALWAYS int itemsize(int dtype) { return dtype == F64 ? 8 : dtype == F32 ? 4 : 2; }

ALWAYS row32 load_end(const void *from, int64_t at, int64_t end, int dtype) /* zeros behind it */
{
    uint8_t held[4 * ROW] = {0};
    memcpy(held, (const uint8_t *)from + at * itemsize(dtype), (end - at) * itemsize(dtype));
    return load(held, 0, dtype);
}

/* ------------------------------------------------------------------------------ truths of a lane */

#if defined(__AVX512F__)
typedef __mmask16 vm;
ALWAYS vm ne_bits(vf a, vf b) { return _mm512_cmpneq_epi32_mask((__m512i)a, (__m512i)b); }
ALWAYS vm ne(vf a, vf b) { return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_NEQ_UQ); }
ALWAYS vm wild(vf a) { return _mm512_fpclass_ps_mask((__m512)a, 0x99); } /* NaN or infinite */
ALWAYS uint32_t lanes(vm m) { return m; }
ALWAYS vf keep(vm m, vf x) { return (vf)_mm512_maskz_mov_ps(m, (__m512)x); }
ALWAYS vf choose(vm m, vf x, vf y) { return (vf)_mm512_mask_mov_ps((__m512)y, m, (__m512)x); }
ALWAYS vi count(vi sum, vm m)
{
    __m512i one = _mm512_set1_epi32(1);
    return (vi)_mm512_mask_add_epi32((__m512i)sum, m, (__m512i)sum, one);
}
#else
typedef vi vm;
ALWAYS vm ne_bits(vf a, vf b) { return (vi)a != (vi)b; }
ALWAYS vm ne(vf a, vf b) { return a != b; }
ALWAYS vm wild(vf a) { return ((vi)a & 0x7F800000) == 0x7F800000; } /* NaN or infinite */
ALWAYS uint32_t lanes(vm m) /* a bit a lane */
{
#if defined(__AVX2__)
    return (uint32_t)_mm256_movemask_ps((__m256)m);
#else
    uint32_t found = 0;
    for (int i = 0; i < WIDTH; i++) found |= (uint32_t)(m[i] & 1) << i;
    return found;
#endif
}
ALWAYS vf keep(vm m, vf x) { return (vf)((vi)x & m); }
ALWAYS vf choose(vm m, vf x, vf y) { return (vf)(((vi)x & m) | ((vi)y & ~m)); }
ALWAYS vi count(vi sum, vm m) { return sum - m; }
#endif

ALWAYS vm nonzero(vf a) { return ne(a, (vf){0}); }
ALWAYS int64_t counted(vi sum)
{
    int64_t all = 0;
    for (int i = 0; i < WIDTH; i++) all += sum[i];
    return all;
}

ALWAYS vf rounded(vf x, int dtype)
{
    uint16_t held[WIDTH];
    if (dtype == BF16) return (vf)(bf16_bits(x) << 16);
    if (dtype == F16) put_f16(x, held);
    return dtype == F16 ? from_f16(held) : x;
}

/* ------------------------------------------------------------------------------ sums by 16 lanes */

ALWAYS void add_products(row32 *sum, row32 a, row32 b) /* the product is rounded, then the sum */
{
    for (int p = 0; p < PARTS; p++) sum->v[p] += a.v[p] * b.v[p];
}

ALWAYS void add_products64(row64 *sum, row64 a, row64 b)
{
    for (int p = 0; p < 2 * PARTS; p++) sum->v[p] += a.v[p] * b.v[p];
}

ALWAYS double folded64(row64 sum)
{
    double lane[ROW];
    memcpy(lane, &sum, sizeof lane);
    for (int half = ROW / 2; half; half /= 2)
        for (int i = 0; i < half; i++) lane[i] += lane[i + half];
    return lane[0];
}

ALWAYS double folded(row32 sum) { return folded64(widened(sum)); }

/* Whether a sum of fp32 products says all: else the group is added up again in fp64. */
ALWAYS int is_settled(double sum)
{
    double size = __builtin_fabs(sum);
    return size >= 1e-30 && size <= 3e38;
}

/* The product of two buffers, size a multiple of 16: what every quicker way has to give. */
ALWAYS double product(const float *a, const float *b, int64_t size)
{
    row32 sum = {0};
    row64 wide = {0};
    for (int64_t i = 0; i < size; i += ROW) add_products(&sum, load(a, i, F32), load(b, i, F32));
    double found = folded(sum);
    if (is_settled(found)) return found;
    for (int64_t i = 0; i < size; i += ROW)
        add_products64(&wide, widened(load(a, i, F32)), widened(load(b, i, F32)));
    return folded64(wide);
}

#endif
