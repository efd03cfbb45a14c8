/* Merge methods and random numbers; skillvec/ops/merge_methods.py says what they are.

   Work goes by tiles of 512 values on the stack: widened, exceptions put in place, made 0 where not
   kept, scaled and merged in fp64, rounded once. */

#define TILE 512
#define MOST_PARTS 6
#define BINS 32768 /* of the upper 15 bits of magnitudes */
#define MAGNITUDE 0x7FFFFFFF

enum { KEEP, TRIM, DROP, MAGPRUNE };
enum { ADD, ELECT, ELECT_MEAN, SHARE, PROJECT };

/* What is done to one vector, as skillvec/ops/merge_kernels.py packs it. */
typedef struct {
    double weight, factor; /* TRIM multiplies by the factor, DROP divides by it */
    int64_t dtype, kind, low, high; /* TRIM: magnitudes to keep; DROP: the highest draw to keep */
    uint64_t key[2];
} Part;

/* ------------------------------------------------------------------------------------- fp64 lanes */

#define HALF_WIDTH (WIDTH / 2)
typedef int64_t vq __attribute__((vector_size(4 * WIDTH))); /* as many as doubles */

ALWAYS vd all_of(double x) { return (vd){0} + x; }
ALWAYS vd chosen(vq mask, vd x) { return (vd)(mask & (vq)x); }
ALWAYS vd size_of(vd x) { return (vd)((vq)x & INT64_MAX); }

#if defined(__AVX512F__)
ALWAYS vd fused64(vd a, vd b, vd c) { return _mm512_fmadd_pd(a, b, c); }
ALWAYS vd larger(vd a, vd b) { return _mm512_max_pd(a, b); }
ALWAYS vd load_f64(const float *from) { return _mm512_cvtps_pd(_mm256_loadu_ps(from)); }
ALWAYS void store_f64(vd x, float *to) { _mm256_storeu_ps(to, _mm512_cvtpd_ps(x)); }
ALWAYS vd f64_of_u32(const uint32_t *from)
{
    return _mm512_cvtepu32_pd(_mm256_loadu_si256((const __m256i *)from));
}
#elif defined(__AVX2__)
ALWAYS vd fused64(vd a, vd b, vd c) { return _mm256_fmadd_pd(a, b, c); }
ALWAYS vd larger(vd a, vd b) { return _mm256_max_pd(a, b); }
ALWAYS vd load_f64(const float *from) { return _mm256_cvtps_pd(_mm_loadu_ps(from)); }
ALWAYS void store_f64(vd x, float *to) { _mm_storeu_ps(to, _mm256_cvtpd_ps(x)); }
ALWAYS vd f64_of_u32(const uint32_t *from) /* the lower bits of 2^52 + x */
{
    __m256i bits = _mm256_cvtepu32_epi64(_mm_loadu_si128((const __m128i *)from));
    return (vd)((vq)bits | (vq)all_of(0x1p52)) - 0x1p52;
}
#else
ALWAYS vd fused64(vd a, vd b, vd c)
{
    for (int i = 0; i < HALF_WIDTH; i++) c[i] = __builtin_fma(a[i], b[i], c[i]);
    return c;
}
ALWAYS vd larger(vd a, vd b) { return chosen(a > b, a) + chosen(~(a > b), b); }
ALWAYS vd load_f64(const float *from)
{
    vd out;
    for (int i = 0; i < HALF_WIDTH; i++) out[i] = from[i];
    return out;
}
ALWAYS void store_f64(vd x, float *to)
{
    for (int i = 0; i < HALF_WIDTH; i++) to[i] = (float)x[i];
}
ALWAYS vd f64_of_u32(const uint32_t *from)
{
    vd out;
    for (int i = 0; i < HALF_WIDTH; i++) out[i] = from[i];
    return out;
}
#endif

/* a / b, given the nearest 1 / b, as Markstein's theorem has it: no operand or result near an end
   of the range of fp64, which skillvec/ops/merge_kernels.py sees to. */
ALWAYS vd quotient(vd a, vd b, vd inverse)
{
    vd q = a * inverse;
    q = fused64(fused64(-q, b, a), inverse, q);
    return fused64(fused64(-q, b, a), inverse, q);
}

/* --------------------------------------------------------------------------------- random numbers */

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
__attribute__((noinline)) static void draw_words(const uint64_t *key, uint64_t step, int64_t steps, void *to)
{
    const uint64_t k0 = key[0], k1 = key[1];
    uint64_t *out = to;
    int64_t i = 0;
#if defined(__AVX512F__)
    for (; i + 8 <= steps; i += 8) draw_eight(key, step + i + 1, out + 4 * i);
#endif
    for (; i < steps; i++) {
        uint64_t c[4] = {step + i + 1, 0, 0, 0};
        for (int round = 0; round < 10; round++) {
            unsigned __int128 a = (unsigned __int128)FACTOR_0 * c[0];
            unsigned __int128 b = (unsigned __int128)FACTOR_1 * c[2];
            c[0] = (uint64_t)(b >> 64) ^ c[1] ^ (k0 + round * WEYL_0);
            c[2] = (uint64_t)(a >> 64) ^ c[3] ^ (k1 + round * WEYL_1);
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
    draw_words(key, (uint64_t)args[1].whole, args[2].nbytes / 32, args[2].data);
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
        int is_whole = held == ROW;
        row32 values = is_whole ? load(args[0].data, at, F32) : load_end(args[0].data, at, count, F32);
        row32 drawn = is_whole ? load(args[1].data, at, BF16) /* in the upper halves */
                               : load_end(args[1].data, at, count, BF16);
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
        memcpy(args[3].data + 2 * at, out, is_whole ? sizeof out : 2 * (size_t)held);
    }
    return nan;
}

/* --------------------------------------------------------------------------------------- a vector */

/* Values, positions and exceptions; `next` is the first exception that no tile has had. */
typedef struct { const Arg *args; int64_t dtype, size, next; } Vector;

ALWAYS int is_aligned(const Arg *arg) { return (uintptr_t)arg->data % 8 == 0; }

ALWAYS int is_vector(const Arg *args, int64_t dtype, Vector *to)
{
    Vector found = {args, dtype, args[0].nbytes / itemsize((int)dtype), 0};
    *to = found;
    return dtype >= BF16 && dtype <= F32 && args[0].nbytes == to->size * itemsize((int)dtype)
           && args[1].nbytes % 4 == 0 && args[1].nbytes == args[2].nbytes;
}

/* Read the tile that begins at `at` as fp32, zeros behind the end. */
ALWAYS void read_tile(Vector *from, int64_t at, float *out)
{
    const void *values = from->args[0].data;
    int64_t held = at + TILE < from->size ? TILE : from->size - at, whole = held / ROW * ROW, i = 0;
    if (from->dtype == BF16)
        for (; i < whole; i += ROW) store(load(values, at + i, BF16), out, i, F32);
    else
        for (; i < whole; i += ROW) store(load(values, at + i, (int)from->dtype), out, i, F32);
    if (held < TILE) memset(out + whole, 0, 4 * (TILE - whole));
    if (whole < held)
        store(load_end(values, at + whole, at + held, (int)from->dtype), out, whole, F32);
    for (; from->next < from->args[1].nbytes / 4; from->next++) {
        uint32_t position;
        memcpy(&position, from->args[1].data + 4 * from->next, 4);
        if (position >= at + held) break;
        if (position >= at) memcpy(out + position - at, from->args[2].data + 4 * from->next, 4);
    }
}

ALWAYS int is_wild(const float *v) /* whether a value of a tile is not finite */
{
    vm found = wild(from_f32(v));
    for (int i = WIDTH; i < TILE; i += WIDTH) found |= wild(from_f32(v + i));
    return lanes(found) != 0;
}

/* ------------------------------------------------------------------------------------------ merge */

/* Make 0 what the part does not keep of a tile. */
ALWAYS void select_kept(const Part *part, float *v, const uint32_t *drawn)
{
    const int32_t low = (int32_t)part->low, high = (int32_t)part->high;
    const uint32_t limit = (uint32_t)part->high;
    for (int i = 0; i < TILE; i += WIDTH) {
        vi value = (vi)from_f32(v + i), size = value & MAGNITUDE;
        vu draw = (vu)from_f32((const float *)drawn + i);
        if (part->kind == TRIM) value &= (size >= low) & (size <= high);
        else value &= (vi)(draw <= limit);
        memcpy(v + i, &value, sizeof value);
    }
}

/* Find the chances of a tile's values, and their inverses: by single loads, faster than gathers. */
ALWAYS void look_up(const double *table, const float *v, double (*chances)[TILE])
{
    for (int i = 0; i < TILE; i++) {
        uint32_t bin;
        memcpy(&bin, v + i, 4);
        bin = bin >> 16 & (BINS - 1);
        __asm__("" : "+r"(bin)); /* or it is made of inserts */
        chances[0][i] = table[bin];
        chances[1][i] = table[BINS + bin];
    }
}

/* Scale what is kept of a tile of all vectors, merge it, and round it to fp32. */
ALWAYS void merge_tile(int how, int scale, int n, const Part *parts, float (*v)[TILE],
                       uint32_t (*drawn)[TILE], double (*chances)[2][TILE], float *out)
{
    vd weight[MOST_PARTS], factor[MOST_PARTS], inverse[MOST_PARTS], t[MOST_PARTS];
    for (int p = 0; p < n; p++) {
        weight[p] = all_of(parts[p].weight);
        factor[p] = all_of(parts[p].factor);
        inverse[p] = 1 / factor[p];
    }
    for (int i = 0; i < TILE; i += HALF_WIDTH) {
        vd total = {0}, sum = {0}, mass = {0}, one = total + 1;
#pragma GCC unroll 2
        for (int p = 0; p < n; p++) {
            t[p] = load_f64(v[p] + i);
            if (scale == TRIM) t[p] *= factor[p];
            if (scale == DROP) t[p] = quotient(t[p], factor[p], inverse[p]);
            if (scale == MAGPRUNE) {
                vd by[2];
                memcpy(by, chances[p][0] + i, sizeof *by);
                memcpy(by + 1, chances[p][1] + i, sizeof *by);
                vq keep = f64_of_u32(drawn[p] + i) < by[0] * 0x1p32;
                t[p] = quotient(chosen(keep, t[p]), by[0], by[1]);
            }
            if (how == PROJECT) total = p ? total - weight[p] * t[p] : t[p];
            else total += t[p] *= weight[p];
        }
        if (how == ELECT || how == ELECT_MEAN || how == SHARE)
#pragma GCC unroll 2
            for (int p = 0; p < n; p++) {
                vq counts = how == SHARE ? t[p] != 0
                                         : ((t[p] > 0) & (total > 0)) | ((t[p] < 0) & (total < 0));
                sum += chosen(counts, t[p]);
                mass += chosen(counts, how == SHARE ? one : size_of(weight[p]));
            }
        if (how == ELECT || how == ELECT_MEAN) total = sum;
        if (how == ELECT_MEAN || how == SHARE) total /= mass + chosen(mass == 0, one);
        if (how == PROJECT) total *= weight[0];
        store_f64(total, out + i);
    }
}

static void merge_as(int how, int scale, int n, const Part *parts, float (*v)[TILE],
                     uint32_t (*drawn)[TILE], double (*chances)[2][TILE], float *out)
{
#define AS(method, by)                                                                            \
    if (how == method && scale == by) {                                                           \
        if (n == 2) merge_tile(method, by, 2, parts, v, drawn, chances, out);                     \
        else merge_tile(method, by, n, parts, v, drawn, chances, out);                            \
        return;                                                                                   \
    }
    AS(ADD, KEEP) AS(ADD, TRIM) AS(ADD, DROP) AS(ELECT, KEEP) AS(ELECT_MEAN, KEEP)
    AS(ELECT, DROP) AS(ELECT_MEAN, DROP) AS(ELECT, MAGPRUNE) AS(ELECT_MEAN, MAGPRUNE)
    AS(SHARE, KEEP) AS(PROJECT, KEEP)
#undef AS
    merge_tile(how, scale, n, parts, v, drawn, chances, out);
}

/* The merged fp32 values, the Parts, MAGPRUNE's chances to keep (32,768 a part, then as many
   inverses; or none), the position of the first value, a multiple of 8, how to scale and how to
   merge; then values, positions and exceptions of six vectors, of which some are no Part's. Returns
   whether something is not finite. */
static int64_t merge(const Arg *args)
{
    int n = (int)(args[1].nbytes / (int64_t)sizeof(Part)), found = 0;
    int64_t count = args[0].nbytes / 4, begin = args[3].whole, scale = args[4].whole;
    int64_t how = args[5].whole;
    Part parts[MOST_PARTS];
    Vector from[MOST_PARTS];
    float v[MOST_PARTS][TILE], merged[TILE];
    uint32_t drawn[MOST_PARTS][TILE];
    double chances[MOST_PARTS][2][TILE];
    const double *table = (const double *)args[2].data;
    if (n < 1 || args[1].nbytes > (int64_t)sizeof parts || args[1].nbytes % (int64_t)sizeof(Part)
        || args[0].nbytes % 4 || begin < 0 || begin % 8 || scale < KEEP || scale > MAGPRUNE
        || how < ADD || how > PROJECT || !is_aligned(args + 2) || (scale == MAGPRUNE && args[2].nbytes != n * 16 * BINS))
        return -1;
    memcpy(parts, args[1].data, n * sizeof(Part));
    for (int p = 0; p < n; p++)
        if (!is_vector(args + 6 + 3 * p, parts[p].dtype, from + p) || from[p].size != count
            || parts[p].kind < KEEP || parts[p].kind > DROP)
            return -1;
    for (int64_t at = 0; at < count; at += TILE) {
        int is_last = at + TILE > count;
        float *out = is_last ? merged : (float *)args[0].data + at;
        for (int p = 0; p < n; p++) {
            read_tile(from + p, at, v[p]);
            found |= is_wild(v[p]);
            if (parts[p].kind == DROP || scale == MAGPRUNE)
                draw_words(parts[p].key, (uint64_t)(begin + at) / 8, TILE / 8, drawn[p]);
            if (parts[p].kind != KEEP) select_kept(parts + p, v[p], drawn[p]);
            if (scale == MAGPRUNE) look_up(table + 2 * p * BINS, v[p], chances[p]);
        }
        merge_as((int)how, (int)scale, n, parts, v, drawn, chances, out);
        for (int i = 0; i < TILE; i += WIDTH) {
            vf x = from_f32(out + i) + 0.0f; /* no negative zeros */
            memcpy(out + i, &x, sizeof x);
        }
        found |= is_wild(out);
        if (is_last) memcpy(args[0].data + 4 * at, merged, 4 * (count - at));
    }
    return found;
}

/* --------------------------------------------------------------------------------------- measures */

/* A vector and its dtype; adds to counts by the upper bits of magnitudes, the last bin for zeros.
   Four tables in turn: one would wait for itself where neighbours are equal. */
static int64_t count_magnitudes(const Arg *args)
{
    int64_t *counts = (int64_t *)args[4].data, zeros = 0, at = 0;
    uint32_t(*bins)[BINS] = (uint32_t(*)[BINS])args[5].data;
    float v[TILE];
    Vector from;
    if (!is_vector(args, args[3].whole, &from) || args[4].nbytes != (BINS + 1) * 8
        || !is_aligned(args + 4) || !is_aligned(args + 5) || args[5].nbytes != 4 * (int64_t)sizeof *bins || from.size > INT32_MAX)
        return -1;
    memset(bins, 0, 4 * sizeof *bins);
    for (; at < from.size; at += TILE) {
        uint16_t upper[TILE];
        vi changed = {0};
        read_tile(&from, at, v);
        for (int i = 0; i < TILE; i += WIDTH) changed = count(changed, nonzero(from_f32(v + i)));
        zeros += TILE - counted(changed);
        for (int i = 0; i < TILE; i++) {
            uint32_t bits;
            memcpy(&bits, v + i, 4);
            upper[i] = (uint16_t)(bits >> 16 & (BINS - 1));
        }
        for (int i = 0; i < TILE; i += 4)
            for (int j = 0; j < 4; j++) bins[j][upper[i + j]]++;
    }
    for (int b = 0; b < BINS; b++) counts[b] += (int64_t)bins[0][b] + bins[1][b] + bins[2][b] + bins[3][b];
    counts[0] -= zeros;
    counts[BINS] += zeros - (at - from.size); /* what lies behind the end */
    return 0;
}

/* A vector and its dtype, upper bins; adds to 65,536 counts a bin by the lower bits of its values. */
static int64_t count_within(const Arg *args)
{
    int64_t rows = args[4].nbytes / 8, *counts = (int64_t *)args[5].data;
    float v[TILE];
    Vector from;
    if (!is_vector(args, args[3].whole, &from) || args[4].nbytes % 8 || !is_aligned(args + 5)
        || args[5].nbytes != rows * 65536 * 8)
        return -1;
    for (int64_t at = 0; at < from.size; at += TILE) {
        uint32_t bits[TILE];
        int held = (int)(at + TILE < from.size ? TILE : from.size - at);
        read_tile(&from, at, v);
        memcpy(bits, v, sizeof bits);
        for (int64_t row = 0; row < rows; row++, counts += 65536) {
            uint32_t upper, first = 0, more = 0;
            memcpy(&upper, args[4].data + 8 * row, 4);
            for (int i = 0; i < held; i++) {
                uint32_t lower = (bits[i] & MAGNITUDE) - (upper << 16);
                first += lower == 0;
                more |= lower - 1 < 65535;
            }
            counts[0] += first; /* all of them in a 16-bit delta without exceptions here */
            for (int i = 0; i < held && more; i++) {
                uint32_t lower = (bits[i] & MAGNITUDE) - (upper << 16);
                if (lower - 1 < 65535) counts[lower]++;
            }
        }
        counts -= rows * 65536;
    }
    return 0;
}

/* Add TILE doubles to sums by exponent, as merge_counts.exact_sums does, up to its units. Each turn
   takes from all values what is a multiple of one unit, so that it adds up exactly in fp64: 42 bits
   below the largest, and what is left is smaller (Demmel and Nguyen 2013). */
static void add_exactly(vd *x, vd largest, int64_t *sums)
{
    for (;;) {
        int64_t bits;
        double unit, sum = 0, most = 0;
        for (int i = 0; i < HALF_WIDTH; i++) most = largest[i] > most ? largest[i] : most;
        if (most == 0) return;
        largest = all_of(0);
        vd all = {0};
        memcpy(&bits, &most, 8);
        bits = ((bits >> 52) + 11) << 52 | (int64_t)1 << 51; /* 1.5 * 2^11 the power below `most` */
        memcpy(&unit, &bits, 8);
        for (int i = 0; i < TILE / HALF_WIDTH; i++) {
            vd taken = (x[i] + unit) - unit;
            all += taken;
            x[i] -= taken;
            largest = larger(largest, size_of(x[i]));
        }
        for (int i = 0; i < HALF_WIDTH; i++) sum += all[i];
        memcpy(&bits, &sum, 8);
        int64_t exponent = bits >> 52 & 2047, mantissa = bits & 0xFFFFFFFFFFFFF;
        if (exponent) mantissa |= (int64_t)1 << 52;
        int64_t upper = mantissa >> 27, lower = mantissa & 0x7FFFFFF;
        sums[exponent] += bits < 0 ? -upper : upper;
        sums[2048 + exponent] += bits < 0 ? -lower : lower;
    }
}

/* Two vectors, their dtypes, two thresholds of magnitude; adds their products to int64[2, 2048], and
   where there is room for two of these, those of values of the first between the thresholds. Returns
   whether something is not finite, and the sums are of no use. */
static int64_t sum_products(const Arg *args)
{
    int64_t *sums = (int64_t *)args[10].data, each = 2 * 2048 * 8, nbytes = args[10].nbytes;
    int32_t low = (int32_t)args[8].whole, high = (int32_t)args[9].whole;
    float v[2][TILE];
    vd x[2][TILE / HALF_WIDTH];
    Vector a, b;
    if (!is_vector(args, args[6].whole, &a) || !is_vector(args + 3, args[7].whole, &b)
        || a.size != b.size || !is_aligned(args + 10) || (nbytes != each && nbytes != 2 * each))
        return -1;
    for (int64_t at = 0; at < a.size; at += TILE) {
        vd largest[2] = {{0}};
        read_tile(&a, at, v[0]);
        read_tile(&b, at, v[1]);
        if (is_wild(v[0]) || is_wild(v[1])) return 1;
        for (int i = 0; i < TILE / HALF_WIDTH; i++) {
            x[0][i] = load_f64(v[0] + i * HALF_WIDTH) * load_f64(v[1] + i * HALF_WIDTH);
            largest[0] = larger(largest[0], size_of(x[0][i]));
        }
        add_exactly(x[0], largest[0], sums);
        if (nbytes == each) continue;
        for (int i = 0; i < TILE; i += WIDTH) {
            vi value = (vi)from_f32(v[0] + i), size = value & MAGNITUDE;
            value &= (size >= low) & (size <= high);
            memcpy(v[0] + i, &value, sizeof value);
        }
        for (int i = 0; i < TILE / HALF_WIDTH; i++) {
            x[1][i] = load_f64(v[0] + i * HALF_WIDTH) * load_f64(v[1] + i * HALF_WIDTH);
            largest[1] = larger(largest[1], size_of(x[1][i]));
        }
        add_exactly(x[1], largest[1], sums + 4096);
    }
    return 0;
}
