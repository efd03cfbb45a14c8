/* Merge methods and random numbers; skillvec/ops/merge_methods.py says what they are.

   Work goes by tiles of 512 values on the stack: widened, exceptions put in place, sparsified into
   fp64, merged, rounded once. */

#define TILE 512
#define MOST_PARTS 6
#define UPPER 32768
#define MAGNITUDE 0x7FFFFFFF

enum { KEEP, TRIM, DROP, MAGPRUNE };
enum { ADD, ELECT, ELECT_MEAN, SHARE, PROJECT };

/* What is done to one vector, as skillvec/ops/merge_kernels.py packs it. */
typedef struct {
    double weight, factor; /* TRIM multiplies by the factor, DROP divides by it */
    int64_t dtype, kind, low, high; /* TRIM: magnitudes to keep; DROP: the highest draw to keep */
    uint64_t key[2];
} Part;

typedef int64_t vq __attribute__((vector_size(4 * WIDTH))); /* as many as doubles */

/* ---------------------------------------------------------------------------------- random numbers */

#define FACTOR_0 0xD2E7470EE14C6C93
#define FACTOR_1 0xCA5A826395121157
#define WEYL_0 0x9E3779B97F4A7C15
#define WEYL_1 0xBB67AE8584CAA73B

#if defined(__AVX512F__)
/* Both halves of products of 64 bits, of four of 32; a multiplier of 64 bits is slower. */
ALWAYS void multiply(__m512i x, uint64_t by, __m512i *upper, __m512i *lower)
{
    __m512i low = _mm512_set1_epi64(by & UINT32_MAX), high = _mm512_set1_epi64(by >> 32);
    __m512i above = _mm512_srli_epi64(x, 32), first = _mm512_mul_epu32(x, low);
    __m512i mid = _mm512_mul_epu32(x, high) + _mm512_srli_epi64(first, 32);
    __m512i sum = _mm512_mul_epu32(above, low) + (mid & _mm512_set1_epi64(UINT32_MAX));
    *upper = _mm512_mul_epu32(above, high) + _mm512_srli_epi64(mid, 32) + _mm512_srli_epi64(sum, 32);
    *lower = _mm512_mask_shuffle_epi32(first, 0xAAAA, sum, _MM_PERM_CCAA);
}

ALWAYS void draw_eight(const uint64_t *key, uint64_t step, uint64_t *out)
{
    __m512i c[4] = {_mm512_set1_epi64(step) + _mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7)}, a[2], b[2];
#pragma GCC unroll 10
    for (int round = 0; round < 10; round++) {
        multiply(c[0], FACTOR_0, a + 1, a);
        multiply(c[2], FACTOR_1, b + 1, b);
        c[0] = b[1] ^ c[1] ^ _mm512_set1_epi64(key[0] + round * WEYL_0);
        c[2] = a[1] ^ c[3] ^ _mm512_set1_epi64(key[1] + round * WEYL_1);
        c[1] = b[0];
        c[3] = a[0];
    }
    /* from a register a word to four words a counter */
    __m512i even[2], odd[2];
    for (int i = 0; i < 2; i++) {
        even[i] = _mm512_unpacklo_epi64(c[2 * i], c[2 * i + 1]);
        odd[i] = _mm512_unpackhi_epi64(c[2 * i], c[2 * i + 1]);
    }
#define HALF(i, lanes) \
    a[i] = _mm512_shuffle_i64x2(even[0], even[1], lanes); \
    b[i] = _mm512_shuffle_i64x2(odd[0], odd[1], lanes); \
    _mm512_storeu_si512(out + 16 * i, _mm512_shuffle_i64x2(a[i], b[i], 0x88)); \
    _mm512_storeu_si512(out + 16 * i + 8, _mm512_shuffle_i64x2(a[i], b[i], 0xDD));
    HALF(0, 0x44) HALF(1, 0xEE)
#undef HALF
}
#endif

/* Philox 4x64-10 (Salmon et al. 2011): the four words of the counters from `step` + 1 on. */
__attribute__((noinline)) static void draw_words(const uint64_t *key, uint64_t step, int64_t steps, uint64_t *out)
{
    int64_t i = 0;
#if defined(__AVX512F__)
    for (; i + 8 <= steps; i += 8) draw_eight(key, step + i + 1, out + 4 * i);
#endif
    for (; i < steps; i++) {
        uint64_t c[4] = {step + i + 1, 0, 0, 0};
        for (int round = 0; round < 10; round++) {
            unsigned __int128 a = (unsigned __int128)FACTOR_0 * c[0];
            unsigned __int128 b = (unsigned __int128)FACTOR_1 * c[2];
            c[0] = (uint64_t)(b >> 64) ^ c[1] ^ (key[0] + round * WEYL_0);
            c[2] = (uint64_t)(a >> 64) ^ c[3] ^ (key[1] + round * WEYL_1);
            c[1] = (uint64_t)b;
            c[3] = (uint64_t)a;
        }
        memcpy(out + 4 * i, c, sizeof c);
    }
}

/* The key of 16 bytes, the step before the first, and room for whole steps of 32 bytes. */
static int64_t draw(const Arg *args)
{
    uint64_t key[2];
    if (args[0].nbytes != sizeof key || args[1].whole < 0 || args[2].nbytes % 32) return -1;
    memcpy(key, args[0].data, sizeof key);
    draw_words(key, (uint64_t)args[1].whole, args[2].nbytes / 32, (uint64_t *)args[2].data);
    return 0;
}

/* fp32 values and a uint16 each, BF16 or F16, and room for the rounded ones. Returns whether there
   was a NaN to be made F16, whose bits are not settled. */
static int64_t round_randomly(const Arg *args)
{
    int64_t count = args[0].nbytes / 4, dtype = args[2].whole;
    if (args[0].nbytes % 4 || args[1].nbytes != 2 * count || args[3].nbytes != 2 * count
        || dtype < BF16 || dtype > F16)
        return -1;
    int nan = 0;
    for (int64_t at = 0; at < count; at += ROW) {
        int64_t held = at + ROW < count ? ROW : count - at;
        row32 values = load_end(args[0].data, at, at + held, F32);
        row32 drawn = load_end(args[1].data, at, at + held, BF16); /* in the upper halves */
        uint16_t out[ROW];
        for (int p = 0; p < PARTS; p++) {
            vf value = values.v[p];
            vi bits = (vi)value, size = bits & MAGNITUDE, more = (vi)((vu)drawn.v[p] >> 16);
            uint16_t *to = out + p * WIDTH;
            if (dtype == BF16) {
                vi up = (more & (size < 0x7F800000)) + bits;
                put_u16((vu)up >> 16 | (vu)((size > 0x7F800000) & 0x40), to);
                continue;
            }
            put_f16(value, to);
            for (int i = 0; i < WIDTH; i++) nan |= value[i] != value[i];
            vf near = from_f16(to), error = value - near;
            vi from = (vi)((vu)from_bf16(to) >> 16), sign = -(from >> 15), less = error < 0;
            vi step = ((sign ^ less) | 1); /* away from 0 or towards it */
            vi zero = (from & 0x7FFF) == 0;
            vi other = (zero & (1 | (less & 0x8000))) | (~zero & (from + step));
            put_u16((vu)other, to);
            vf chance = 65536.0f * (error / (from_f16(to) - near));
            vi away = (error != 0) & ((from & 0x7C00) != 0x7C00)
                      & (__builtin_convertvector(more, vf) < chance);
            put_u16((vu)((other & away) | (from & ~away)), to);
        }
        memcpy((uint16_t *)args[3].data + at, out, 2 * held);
    }
    return nan;
}

/* -------------------------------------------------------------------------------------- one vector */

/* args: values, positions, exceptions. */
ALWAYS int is_part(const Arg *args, int64_t dtype, int64_t count)
{
    return dtype >= BF16 && dtype <= F32 && args[0].nbytes == count * itemsize(dtype)
           && args[1].nbytes % 4 == 0 && args[1].nbytes == args[2].nbytes;
}

/* Add NaN where a value of a tile is not finite, else 0. */
ALWAYS vf wildness(const float *v, vf sum)
{
    for (int i = 0; i < TILE; i += WIDTH) sum = fused(from_f32(v + i), (vf){0}, sum);
    return sum;
}

ALWAYS int is_wild(vf sum)
{
    float all = 0;
    for (int i = 0; i < WIDTH; i++) all += sum[i];
    return all != 0;
}

/* Read a tile as fp32, exceptions in place; `next` is the first exception not yet used. */
ALWAYS void read_tile(const Arg *args, int64_t dtype, int64_t at, int64_t count, int64_t *next,
                      float *out)
{
    const void *from = args[0].data;
    int64_t i = 0, exceptions = args[1].nbytes / 4;
    if (dtype == BF16) for (; i + ROW <= count; i += ROW) store(load(from, at + i, BF16), out, i, F32);
    else for (; i + ROW <= count; i += ROW) store(load(from, at + i, dtype), out, i, F32);
    if (i < count) store(load_end(from, at + i, at + count, dtype), out, i, F32);
    for (; *next < exceptions; ++*next) {
        uint32_t position;
        memcpy(&position, args[1].data + 4 * *next, 4);
        if (position >= at + count) break;
        if (position >= at) memcpy(out + position - at, args[2].data + 4 * *next, 4);
    }
}

ALWAYS vd fused64(vd a, vd b, vd c)
{
#if defined(__AVX512F__)
    return (vd)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
#elif defined(__AVX2__)
    return (vd)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
#else
    for (int i = 0; i < WIDTH / 2; i++) c[i] = __builtin_fma(a[i], b[i], c[i]);
    return c;
#endif
}

/* a / b, given the nearest 1 / b, as Markstein's theorem has it: no operand or result near an end
   of the range of fp64, which skillvec/ops/merge_kernels.py sees to. */
ALWAYS vd quotient(vd a, vd b, vd inverse)
{
    vd q = a * inverse;
    q = fused64(fused64(-q, b, a), inverse, q);
    return fused64(fused64(-q, b, a), inverse, q);
}

/* Where a draw is below 2^32 times its chance. */
ALWAYS vi is_below(vu draw, const double *chance)
{
    vi out;
#if defined(__AVX512F__)
    __m256i low = _mm512_castsi512_si256((__m512i)draw), high = _mm512_extracti64x4_epi64((__m512i)draw, 1);
    __mmask8 a = _mm512_cmp_pd_mask(_mm512_cvtepu32_pd(low), _mm512_mul_pd(_mm512_loadu_pd(chance), _mm512_set1_pd(0x1p32)), _CMP_LT_OQ);
    __mmask8 b = _mm512_cmp_pd_mask(_mm512_cvtepu32_pd(high), _mm512_mul_pd(_mm512_loadu_pd(chance + 8), _mm512_set1_pd(0x1p32)), _CMP_LT_OQ);
    return (vi)_mm512_movm_epi32((__mmask16)(a | b << 8));
#endif
    for (int j = 0; j < WIDTH; j++) out[j] = -(draw[j] < chance[j] * 0x1p32);
    return out;
}

/* Make 0 what the part does not keep of a tile; MAGPRUNE: chances and their inverses, by bin. */
static void select_kept(const Part *part, float *v, const uint32_t *drawn, const double *table,
                        double (*chance)[TILE])
{
    const vi low = (vi){0} + (int32_t)part->low, high = (vi){0} + (int32_t)part->high;
    const vu limit = (vu){0} + (uint32_t)part->high;
    uint32_t bins[TILE];
    memcpy(bins, v, sizeof bins);
    for (int i = 0; i < TILE; i++) bins[i] = bins[i] >> 16 & (UPPER - 1);
    for (int i = 0; i < TILE && part->kind == MAGPRUNE; i++) {
        chance[0][i] = table[bins[i]];
        chance[1][i] = table[UPPER + bins[i]];
    }
    for (int i = 0; i < TILE && part->kind == KEEP; i++) chance[0][i] = chance[1][i] = 1;
    for (int i = 0; i < TILE; i += WIDTH) {
        vi value, keep;
        vu draw;
        memcpy(&value, v + i, sizeof value);
        memcpy(&draw, drawn + i, sizeof draw);
        vi size = value & MAGNITUDE;
        if (part->kind == TRIM) keep = (size >= low) & (size <= high);
        else if (part->kind == DROP) keep = (vi)(draw <= limit);
        else if (part->kind == MAGPRUNE) keep = is_below(draw, chance[0] + i);
        else continue;
        value &= keep;
        memcpy(v + i, &value, sizeof value);
    }
}

/* ------------------------------------------------------------------------------------- all vectors */

ALWAYS vd chosen(vq mask, vd x) { return (vd)(mask & (vq)x); }

ALWAYS vd load_f64(const float *from)
{
#if defined(__AVX512F__)
    return (vd)_mm512_cvtps_pd(_mm256_loadu_ps(from));
#elif defined(__AVX2__)
    return (vd)_mm256_cvtps_pd(_mm_loadu_ps(from));
#else
    vd out;
    for (int i = 0; i < WIDTH / 2; i++) out[i] = from[i];
    return out;
#endif
}

ALWAYS void store_f64(vd x, float *to)
{
#if defined(__AVX512F__)
    _mm256_storeu_ps(to, _mm512_cvtpd_ps((__m512d)x));
#elif defined(__AVX2__)
    _mm_storeu_ps(to, _mm256_cvtpd_ps((__m256d)x));
#else
    for (int i = 0; i < WIDTH / 2; i++) to[i] = (float)x[i];
#endif
}

/* Merge what is kept of a tile of all vectors, scaled, and round it to fp32. */
ALWAYS void merge_tile(int how, int scaling, int n, const Part *parts, float (*v)[TILE],
                       double (*chance)[2][TILE], float *out)
{
    vd weight[MOST_PARTS], factor[MOST_PARTS], inverse[MOST_PARTS], t[MOST_PARTS];
    for (int p = 0; p < n; p++) {
        weight[p] = (vd){0} + parts[p].weight;
        factor[p] = (vd){0} + parts[p].factor;
        inverse[p] = 1 / factor[p];
    }
    for (int i = 0; i < TILE; i += WIDTH / 2) {
        vd total = {0}, sum = {0}, mass = {0}, one = total + 1;
#pragma GCC unroll 2
        for (int p = 0; p < n; p++) {
            t[p] = load_f64(v[p] + i);
            if (scaling == TRIM) t[p] *= factor[p];
            if (scaling == DROP) t[p] = quotient(t[p], factor[p], inverse[p]);
            if (scaling == MAGPRUNE) {
                vd by[2];
                memcpy(by, chance[p][0] + i, sizeof *by);
                memcpy(by + 1, chance[p][1] + i, sizeof *by);
                t[p] = quotient(t[p], by[0], by[1]);
            }
            if (how == PROJECT) total = p ? total - weight[p] * t[p] : t[p];
            else {
                t[p] *= weight[p];
                total += t[p];
            }
        }
        if (how == ELECT || how == ELECT_MEAN || how == SHARE)
#pragma GCC unroll 2
            for (int p = 0; p < n; p++) {
                vq counts = how == SHARE ? t[p] != 0
                                         : ((t[p] > 0) & (total > 0)) | ((t[p] < 0) & (total < 0));
                sum += chosen(counts, t[p]);
                mass += chosen(counts, how == SHARE ? one : (vd)((vq)weight[p] & INT64_MAX));
            }
        if (how == ELECT || how == ELECT_MEAN) total = sum;
        if (how == ELECT_MEAN || how == SHARE)
            total /= (vd)((vq)mass | ((mass == 0) & (vq)one));
        if (how == PROJECT) total *= weight[0];
        store_f64(total, out + i);
    }
}

static void merge_as(int how, int scaling, int n, const Part *parts, float (*v)[TILE],
                     double (*chance)[2][TILE], float *out)
{
#define AS(method, by) \
    if (how == method && scaling == by) { \
        if (n == 2) merge_tile(method, by, 2, parts, v, chance, out); \
        else merge_tile(method, by, n, parts, v, chance, out); \
        return; \
    }
    AS(ADD, KEEP) AS(ADD, TRIM) AS(ADD, DROP) AS(ELECT, KEEP) AS(ELECT, DROP) AS(ELECT, MAGPRUNE)
    AS(ELECT_MEAN, KEEP) AS(ELECT_MEAN, DROP) AS(ELECT_MEAN, MAGPRUNE) AS(SHARE, KEEP)
    AS(PROJECT, KEEP)
#undef AS
    merge_tile(how, scaling, n, parts, v, chance, out);
}

/* The merged fp32 values, the Parts, MAGPRUNE's chances to keep (32,768 a part, then as many
   inverses; or none), the position of the first value, a multiple of 8, how to scale and how to
   merge; then values, positions and exceptions of six vectors, of which some are no Part's. Returns
   whether something is not finite. */
static int64_t merge(const Arg *args)
{
    const Arg *given = args + 6;
    int n = (int)(args[1].nbytes / (int64_t)sizeof(Part));
    int64_t count = args[0].nbytes / 4, begin = args[3].whole, next[MOST_PARTS] = {0};
    int64_t scaling = args[4].whole, how = args[5].whole, offset = args[2].nbytes ? 2 * UPPER : 0;
    Part parts[MOST_PARTS];
    float v[MOST_PARTS][TILE], merged[TILE];
    double chance[MOST_PARTS][2][TILE];
    uint64_t drawn[TILE / 2];
    if (n < 1 || args[1].nbytes > (int64_t)sizeof parts || args[1].nbytes % (int64_t)sizeof(Part)
        || args[0].nbytes % 4 || begin < 0 || begin % 8 || scaling < KEEP || scaling > MAGPRUNE
        || how < ADD || how > PROJECT
        || (offset && args[2].nbytes != n * offset * 8))
        return -1;
    memcpy(parts, args[1].data, n * sizeof(Part));
    for (int p = 0; p < n; p++)
        if (!is_part(given + 3 * p, parts[p].dtype, count) || parts[p].kind < KEEP
            || parts[p].kind > MAGPRUNE || (parts[p].kind == MAGPRUNE && !offset))
            return -1;
    vf wild = {0};
    for (int64_t at = 0; at < count; at += TILE) {
        int64_t held = at + TILE < count ? TILE : count - at;
        float *out = held < TILE ? merged : (float *)args[0].data + at;
        if (held < TILE) memset(v, 0, sizeof v);
        for (int p = 0; p < n; p++) {
            read_tile(given + 3 * p, parts[p].dtype, at, held, next + p, v[p]);
            wild = wildness(v[p], wild);
            if (parts[p].kind >= DROP)
                draw_words(parts[p].key, (uint64_t)(begin + at) / 8, TILE / 8, drawn);
            if (parts[p].kind != KEEP || scaling == MAGPRUNE)
                select_kept(parts + p, v[p], (const uint32_t *)drawn,
                            (const double *)args[2].data + p * offset, chance[p]);
        }
        merge_as((int)how, (int)scaling, n, parts, v, chance, out);
        for (int i = 0; i < TILE; i += WIDTH) {
            vf x = from_f32(out + i) + 0.0f; /* no negative zeros */
            memcpy(out + i, &x, sizeof x);
        }
        wild = wildness(out, wild);
        if (held < TILE) memcpy(args[0].data + 4 * at, merged, 4 * held);
    }
    return is_wild(wild);
}

/* ---------------------------------------------------------------------------------------- measures */

/* A part and its dtype; adds to counts by the upper bits of magnitudes, the last bin for zeros. */
static int64_t count_magnitudes(const Arg *args)
{
    int64_t dtype = args[3].whole, count = args[0].nbytes / itemsize(dtype), next = 0;
    int64_t *counts = (int64_t *)args[4].data;
    uint32_t *bins = (uint32_t *)args[5].data;
    float v[TILE] = {0};
    if (!is_part(args, dtype, count) || args[4].nbytes != (UPPER + 1) * 8
        || args[5].nbytes != 4 * UPPER * 4 || count > UINT32_MAX)
        return -1;
    memset(bins, 0, args[5].nbytes);
    int64_t zeros = 0;
    for (int64_t at = 0; at < count; at += TILE) {
        int64_t held = at + TILE < count ? TILE : count - at;
        read_tile(args, dtype, at, held, &next, v);
        uint16_t upper[TILE];
        int empty = 0;
        const uint32_t *bits = (const uint32_t *)v;
        for (int i = 0; i < TILE; i++) {
            upper[i] = (uint16_t)(bits[i] >> 16 & 0x7FFF);
            empty += (bits[i] & MAGNITUDE) == 0;
        }
        zeros += held < TILE ? 0 : empty;
        if (held < TILE)
            for (int i = 0; i < held; i++) zeros += (bits[i] & MAGNITUDE) == 0;
        int i = 0;
        for (; i + 4 <= held; i += 4)
            for (int j = 0; j < 4; j++) bins[j * UPPER + upper[i + j]]++;
        for (; i < held; i++) bins[upper[i]]++;
    }
    for (int b = 0; b < UPPER; b++)
        counts[b] += (int64_t)bins[b] + bins[UPPER + b] + bins[2 * UPPER + b] + bins[3 * UPPER + b];
    counts[0] -= zeros;
    counts[UPPER] += zeros;
    return 0;
}

/* A part and its dtype, upper bins; adds to 65,536 counts a bin by the lower bits of its values. */
static int64_t count_within(const Arg *args)
{
    int64_t dtype = args[3].whole, count = args[0].nbytes / itemsize(dtype), next = 0;
    int64_t rows = args[4].nbytes / 8, *counts = (int64_t *)args[5].data;
    float v[TILE] = {0};
    if (!is_part(args, dtype, count) || args[4].nbytes % 8 || args[5].nbytes != rows * 65536 * 8)
        return -1;
    for (int64_t at = 0; at < count; at += TILE) {
        int64_t held = at + TILE < count ? TILE : count - at;
        read_tile(args, dtype, at, held, &next, v);
        const uint32_t *bits = (const uint32_t *)v;
        for (int64_t row = 0; row < rows; row++) {
            int64_t upper;
            memcpy(&upper, args[4].data + 8 * row, 8);
            uint32_t from = (uint32_t)upper << 16, first = 0, more = 0;
            for (int i = 0; i < held; i++) {
                uint32_t lower = (bits[i] & MAGNITUDE) - from;
                first += lower == 0;
                more |= (lower - 1) < 65535;
            }
            counts[row * 65536] += first;
            if (!more) continue;
            for (int i = 0; i < held; i++) {
                uint32_t lower = (bits[i] & MAGNITUDE) - from;
                if (lower - 1 < 65535) counts[row * 65536 + lower]++;
            }
        }
    }
    return 0;
}

ALWAYS double largest(vd x)
{
    double most = 0;
    for (int i = 0; i < WIDTH / 2; i++) most = x[i] > most ? x[i] : most;
    return most;
}

ALWAYS vd larger(vd a, vd b)
{
#if defined(__AVX512F__)
    return (vd)_mm512_max_pd((__m512d)a, (__m512d)b);
#elif defined(__AVX2__)
    return (vd)_mm256_max_pd((__m256d)a, (__m256d)b);
#else
    vq mask = a > b;
    return (vd)(((vq)a & mask) | ((vq)b & ~mask));
#endif
}

/* Add TILE doubles to sums by exponent, as merge_counts.exact_sums does, up to its units. Each turn
   takes from all values what is a multiple of one unit, so that it adds up exactly in fp64: 42 bits
   below the largest, and what is left is smaller (Demmel and Nguyen 2013). */
static void add_exactly(vd *x, double most, int64_t *sums)
{
    const vq absolute = (vq){0} + INT64_MAX;
    while (most > 0) {
        int64_t bits;
        double unit, sum = 0;
        vd most_left = {0}, lanes = {0};
        memcpy(&bits, &most, 8);
        bits = ((bits >> 52) + 11) << 52 | (int64_t)1 << 51; /* 1.5 * 2^11 the power below `most` */
        memcpy(&unit, &bits, 8);
        for (int i = 0; i < TILE / (WIDTH / 2); i++) {
            vd taken = (x[i] + unit) - unit;
            lanes += taken;
            x[i] -= taken;
            most_left = larger(most_left, (vd)((vq)x[i] & absolute));
        }
        for (int i = 0; i < WIDTH / 2; i++) sum += lanes[i];
        most = largest(most_left);
        memcpy(&bits, &sum, 8);
        int64_t exponent = bits >> 52 & 2047, mantissa = bits & 0xFFFFFFFFFFFFF;
        if (exponent) mantissa |= (int64_t)1 << 52;
        int64_t upper = mantissa >> 27, lower = mantissa & 0x7FFFFFF;
        sums[exponent] += bits < 0 ? -upper : upper;
        sums[2048 + exponent] += bits < 0 ? -lower : lower;
    }
}

/* Two parts, their dtypes, two thresholds of magnitude; adds their products to int64[2, 2048], and
   where there is room for two of these, those of values of the first between the thresholds. Returns
   whether something is not finite, and sums are not whole. */
static int64_t sum_products(const Arg *args)
{
    int64_t da = args[6].whole, db = args[7].whole, count = args[0].nbytes / itemsize(da);
    int64_t next[2] = {0}, *sums = (int64_t *)args[10].data, nbytes = args[10].nbytes;
    int32_t low = (int32_t)args[8].whole, high = (int32_t)args[9].whole;
    float v[2][TILE] = {0};
    vd x[2 * TILE / WIDTH], y[2 * TILE / WIDTH];
    const vq absolute = (vq){0} + INT64_MAX;
    if (!is_part(args, da, count) || !is_part(args + 3, db, count)
        || (nbytes != 2 * 2048 * 8 && nbytes != 4 * 2048 * 8))
        return -1;
    for (int64_t at = 0; at < count; at += TILE) {
        int64_t held = at + TILE < count ? TILE : count - at;
        if (held < TILE) memset(v, 0, sizeof v);
        read_tile(args, da, at, held, next, v[0]);
        read_tile(args + 3, db, at, held, next + 1, v[1]);
        if (is_wild(wildness(v[0], wildness(v[1], (vf){0})))) return 1;
        vd most_x = {0}, most_y = {0};
        for (int i = 0; i < TILE; i += WIDTH) {
            vf a = from_f32(v[0] + i), b = from_f32(v[1] + i);
            vi size = (vi)a & MAGNITUDE, keep = (size >= low) & (size <= high);
            vd wide[3][2];
            to_f64(a, wide[0]);
            to_f64(b, wide[1]);
            to_f64((vf)((vi)a & keep), wide[2]);
            for (int j = 0; j < 2; j++) {
                vd *to = x + 2 * i / WIDTH + j, *kept = y + 2 * i / WIDTH + j;
                *to = wide[0][j] * wide[1][j];
                *kept = wide[2][j] * wide[1][j];
                most_x = larger(most_x, (vd)((vq)*to & absolute));
                most_y = larger(most_y, (vd)((vq)*kept & absolute));
            }
        }
        add_exactly(x, largest(most_x), sums);
        if (nbytes == 4 * 2048 * 8) add_exactly(y, largest(most_y), sums + 2 * 2048);
    }
    return 0;
}
