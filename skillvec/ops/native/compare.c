/* Sums of two deltas with each other, and of one with the weights that it is added to.

   A group of 1,024 values at a time: widened to fp32 in buffers that stay in cache, exceptions put
   into their places, then rows. A sum that fp32 cannot settle is taken again in fp64, unless there
   is nothing to add up. */

#define PATTERN (GROUP / WIDTH) /* of a group: one word of bits for each register of values */
#if WIDTH == 16
typedef __mmask16 mask;
typedef uint16_t word;
#else
typedef vi mask; /* all bits of a lane, or none */
typedef uint8_t word;
#endif

ALWAYS vf kept(vf x, mask where) /* 0 elsewhere */
{
#if WIDTH == 16
    return (vf)_mm512_maskz_mov_ps(where, (__m512)x);
#else
    return (vf)((vi)x & where);
#endif
}

ALWAYS void add_kept(vf *sum, vf x, mask where)
{
#if WIDTH == 16
    *sum = (vf)_mm512_mask_add_ps((__m512)*sum, where, (__m512)*sum, (__m512)x);
#else
    *sum += kept(x, where);
#endif
}

ALWAYS mask are_set(vi x, int32_t bits) /* any of them */
{
#if WIDTH == 16
    return _mm512_test_epi32_mask((__m512i)x, _mm512_set1_epi32(bits));
#else
    return (x & bits) != 0;
#endif
}

ALWAYS mask unlike_zero(vf x) { return are_set((vi)x, 0x7FFFFFFF); }
ALWAYS mask are_finite(vf x) { return ~are_set(((vi)x & 0x7F800000) + 0x800000, INT32_MIN); }

ALWAYS word bits_of(mask of)
{
#if WIDTH == 16
    return of;
#elif WIDTH == 8
    return (word)_mm256_movemask_ps((__m256)of);
#else
    word out = 0;
    for (int i = 0; i < WIDTH; i++) out |= (word)((of[i] & 1) << i);
    return out;
#endif
}

ALWAYS int64_t count_of(const word *a, const word *b) /* how many bits both have */
{
    uint64_t one[PATTERN * sizeof(word) / 8], other[PATTERN * sizeof(word) / 8];
    int64_t count = 0;
    memcpy(one, a, sizeof one);
    memcpy(other, b, sizeof other);
    for (size_t i = 0; i < sizeof one / 8; i++) count += __builtin_popcountll(one[i] & other[i]);
    return count;
}

/* --------------------------------------------------------------------------------- groups of a delta */

typedef struct { const uint8_t *values; const uint32_t *at; const float *exact;
                 int64_t size, count, next; int dtype; } Side;

static int opened(const Arg *args, Side *side) /* values, dtype, positions, exact; 0 if they do not fit */
{
    int64_t dtype = args[1].whole;
    if (dtype < BF16 || dtype > F32 || args[0].nbytes % itemsize((int)dtype) || args[2].nbytes % 4
        || args[2].nbytes != args[3].nbytes)
        return 0;
    *side = (Side){args[0].data, (const uint32_t *)args[2].data, (const float *)args[3].data,
                   args[0].nbytes / itemsize((int)dtype), args[2].nbytes / 4, 0, (int)dtype};
    return 1;
}

ALWAYS void widen_as(const void *from, int64_t begin, int64_t end, int dtype, float *out)
{
    for (; begin + ROW <= end; begin += ROW, out += ROW) store(load(from, begin, dtype), out, 0, F32);
    if (begin < end) store(load_end(from, begin, end, dtype), out, 0, F32);
}

static void widen(const void *from, int64_t begin, int64_t end, int dtype, float *out)
{
    if (dtype == BF16) widen_as(from, begin, end, BF16, out);
    else if (dtype == F16) widen_as(from, begin, end, F16, out);
    else widen_as(from, begin, end, F32, out);
}

static int take(Side *side, int64_t begin, int64_t end, float *out) /* 0: exceptions out of order */
{
    widen(side->values, begin, end, side->dtype, out);
    for (; side->next < side->count && side->at[side->next] < end; side->next++) {
        if (side->at[side->next] < begin) return 0;
        out[side->at[side->next] - begin] = side->exact[side->next];
    }
    return end < side->size || side->next == side->count;
}

ALWAYS void store_f32(vf x, float *at) { memcpy(at, &x, sizeof x); }

ALWAYS double settled(vf *sum, int64_t count, const float *a, const float *b, int64_t rows)
{
    row32 lanes;
    memcpy(&lanes, sum, sizeof lanes);
    double total = count ? folded(lanes) : 0;
    return !count || is_settled(total) ? total : product64(a, b, 0, rows * ROW, F32, F32);
}

/* ---------------------------------------------------------------------------------------- two deltas */

enum { PRODUCT, SQUARE_A, SQUARE_B, MET_A, MET_B, CLASH_A, CLASH_B, SUMS }; /* then supports, shared, clashes */

static void turn(float *values, int64_t rows, const uint8_t *signs) /* by bits, highest first */
{
    static const uint32_t PLACES[ROW] = {16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31};
    for (int64_t i = 0; i < rows * ROW; i += WIDTH) {
        const uint8_t *at = signs + i / ROW * 2;
        vu places, word = (vu){0} + ((uint32_t)at[0] << 8 | at[1]);
        memcpy(&places, PLACES + i % ROW, sizeof places);
        store_f32((vf)((vu)from_f32(values + i) ^ (word << places & 0x80000000)), values + i);
    }
}

static void mask_out(const float *x, const float *other, int64_t rows, int clash, float *out)
{
    for (int64_t i = 0; i < rows * ROW; i++)
        out[i] = other[i] != 0 && (!clash || (x[i] < 0) != (other[i] < 0)) ? x[i] : 0;
}

static void meet(const float *a, const float *b, int64_t rows, double *sums, int64_t *counts)
{
    word in_a[PATTERN], in_b[PATTERN], against[PATTERN];
    vf sum[SUMS][PARTS];
    _Alignas(64) float held[GROUP];
    memset(in_a, 0, sizeof in_a);
    memset(in_b, 0, sizeof in_b);
    memset(against, 0, sizeof against);
    for (int p = 0; p < PARTS; p++) {
        vf s[SUMS] = {0};
        for (int64_t i = p * WIDTH; i < rows * ROW; i += ROW) {
            vf x = from_f32(a + i), y = from_f32(b + i), product = x * y, of_x = x * x, of_y = y * y;
            mask has_x = unlike_zero(x), has_y = unlike_zero(y), clash = are_set((vi)product, INT32_MIN) & has_y;
            s[PRODUCT] += product;
            s[SQUARE_A] += of_x;
            s[SQUARE_B] += of_y;
            add_kept(&s[MET_A], of_x, has_y);
            add_kept(&s[MET_B], of_y, has_x);
            add_kept(&s[CLASH_A], of_x, clash);
            add_kept(&s[CLASH_B], of_y, clash & has_x);
            in_a[i / WIDTH] = bits_of(has_x);
            in_b[i / WIDTH] = bits_of(has_y);
            against[i / WIDTH] = bits_of(clash);
        }
        for (int n = 0; n < SUMS; n++) sum[n][p] = s[n];
    }
    counts[0] = count_of(in_a, in_a);
    counts[1] = count_of(in_b, in_b);
    counts[2] = count_of(in_a, in_b);
    counts[3] = count_of(in_a, against);
    const int64_t of[SUMS] = {counts[2], counts[0], counts[1], counts[2], counts[2], counts[3], counts[3]};
    const float *one[SUMS] = {a, a, b, a, b, a, b}, *two[SUMS] = {b, a, b, b, a, b, a};
    for (int n = 0; n < SUMS; n++) {
        row32 lanes;
        memcpy(&lanes, sum[n], sizeof lanes);
        sums[n] = of[n] ? folded(lanes) : 0;
        if (!of[n] || is_settled(sums[n])) continue;
        if (n > SQUARE_B) mask_out(one[n], two[n], rows, n > MET_B, held);
        sums[n] = product64(n > SQUARE_B ? held : two[n], one[n], 0, rows * ROW, F32, F32);
    }
}

/* Two deltas (values, dtype, positions, exact values), bits that turn signs of the first or none,
   the width of a group, room for a double a group, and for 12: the sum of the groups and of their
   squares, both squares, met, clash, both supports, shared, values of opposed signs. */
static int64_t pair_sums(const Arg *args)
{
    Side x, y;
    int64_t width = args[9].whole, counts[4], all[4] = {0};
    if (!opened(args, &x) || !opened(args + 4, &y) || x.size != y.size || width < 1 || width > GROUP
        || (width & (width - 1)) || args[10].nbytes != (x.size + width - 1) / width * 8
        || args[11].nbytes != 12 * 8 || (args[8].nbytes && args[8].nbytes < (x.size + 31) / 32 * 4))
        return -1;
    double *groups = (double *)args[10].data, *out = (double *)args[11].data, sums[SUMS];
    _Alignas(64) float a[GROUP], b[GROUP];
    memset(out, 0, 12 * 8);
    for (int64_t begin = 0; begin < x.size; begin += GROUP) {
        int64_t end = begin + GROUP < x.size ? begin + GROUP : x.size, rows = (end - begin + ROW - 1) / ROW;
        if (!take(&x, begin, end, a) || !take(&y, begin, end, b)) return -1;
        if (args[8].nbytes) turn(a, rows, args[8].data + begin / 8);
        meet(a, b, rows, sums, counts);
        int64_t count = (end - begin + width - 1) / width;
        if (width == GROUP) *groups = sums[PRODUCT];
        else products_of(a, b, end - begin, width, F32, F32, (uint8_t *)groups);
        for (int64_t i = 0; i < count; i++, groups++) {
            out[0] += *groups;
            out[1] += *groups * *groups;
        }
        for (int n = 1; n < SUMS; n++) out[n + 1] += sums[n];
        for (int n = 0; n < 4; n++) all[n] += counts[n];
    }
    for (int n = 0; n < 4; n++) out[8 + n] = (double)all[n];
    return 0;
}

/* ------------------------------------------------------------------------------ a delta on its weights */

ALWAYS vi larger_int(vi a, vi b)
{
#if WIDTH == 16
    return (vi)_mm512_max_epi32((__m512i)a, (__m512i)b);
#elif WIDTH == 8
    return (vi)_mm256_max_epi32((__m256i)a, (__m256i)b);
#else
    vi is = a > b;
    return (a & is) | (b & ~is);
#endif
}

ALWAYS vi shifted_one(vi by) /* 1 << by, 0 where that is no place of 32 */
{
#if WIDTH == 16
    return (vi)_mm512_sllv_epi32(_mm512_set1_epi32(1), (__m512i)by);
#elif WIDTH == 8
    return (vi)_mm256_sllv_epi32(_mm256_set1_epi32(1), (__m256i)by);
#else
    vi is = (vi)((vu)by < 32);
    return (1 << (by & 31)) & is;
#endif
}

ALWAYS vf to_grid(vf x, int grid)
{
    if (grid == BF16) return (vf)(bf16_bits(x) << 16);
    uint16_t half[WIDTH];
    put_f16(x, half);
    return from_f16(half);
}

enum { STEPS = 8 }; /* edges of the histogram */

ALWAYS void round_rows(const float *v, const float *w, int64_t rows, int dtype, vi *counts, double *out)
{
    const int grid = dtype == F16 ? F16 : BF16, fraction = grid == F16 ? 10 : 7;
    const int32_t least = grid == F16 ? 113 << 23 : 1 << 23, infinite = 0x7F800000;
    word has[PATTERN], stay[PATTERN];
    vf sum[4][PARTS];
    _Alignas(64) float arrived[GROUP], step[GROUP];
    memset(has, 0, sizeof has);
    memset(stay, 0, sizeof stay);
    for (int p = 0; p < PARTS; p++) {
        vf s[4] = {0};
        vi packed = {0}; /* eight counters of four bits */
        int room = 15;
        for (int64_t i = p * WIDTH; i < rows * ROW; i += ROW) {
            vf x = from_f32(v + i), y = from_f32(w + i), zero = {0};
            mask changed = unlike_zero(x);
            has[i / WIDTH] = bits_of(changed);
            if (!bits_of(changed)) {
                store_f32(zero, arrived + i);
                store_f32(zero, step + i);
                continue;
            }
            vf held = dtype == F32 ? to_grid(y, grid) : y, moved = to_grid(y + x, grid) - held;
            vi power = larger_int((vi)held & infinite, (vi){0} + least);
            moved = kept(moved, changed & are_finite(moved));
            vf one = kept((vf)larger_int(power - (fraction << 23), (vi){0}), changed & are_finite(held));
            stay[i / WIDTH] = bits_of(unlike_zero(moved));
            s[0] += x * x;
            s[1] += moved * x;
            s[2] += moved * moved;
            s[3] += one * one;
            store_f32(moved, arrived + i);
            store_f32(one, step + i);
            vi place = ((((vi)x & infinite) - power) >> 21) + 4 * (fraction + 2);
            packed += (vi)kept((vf)shifted_one(-larger_int(-place, (vi){0} - 4 * (STEPS - 1))), changed);
            if (!--room) {
                for (int n = 0; n < STEPS; n++) counts[n] += packed >> 4 * n & 15;
                packed = (vi){0};
                room = 15;
            }
        }
        for (int n = 0; n < STEPS; n++) counts[n] += packed >> 4 * n & 15;
        for (int n = 0; n < 4; n++) sum[n][p] = s[n];
    }
    int64_t changed = count_of(has, has), arrive = count_of(stay, stay);
    out[0] += settled(sum[0], changed, v, v, rows);
    out[1] += (double)changed;
    out[2] += settled(sum[1], arrive, arrived, v, rows);
    out[3] += settled(sum[2], arrive, arrived, arrived, rows);
    out[4] += (double)(changed - arrive);
    out[5] += settled(sum[3], changed, step, step, rows);
}

ALWAYS void square_rows(const float *v, int64_t rows, double *out)
{
    word has[PATTERN];
    vf sum[PARTS] = {0};
    memset(has, 0, sizeof has);
    for (int64_t i = 0; i < rows * ROW; i += ROW)
        for (int p = 0; p < PARTS; p++) {
            vf x = from_f32(v + i + p * WIDTH);
            sum[p] += x * x;
            has[i / WIDTH + p] = bits_of(unlike_zero(x));
        }
    int64_t changed = count_of(has, has);
    out[0] += settled(sum, changed, v, v, rows);
    out[1] += (double)changed;
}

/* A delta (values, dtype, positions, exact values), weights or none with their dtype, and room for
   15 doubles: square, support, kept_dot, kept_sq, absorbed, step_sq, steps. */
static int64_t vector_sums(const Arg *args)
{
    Side x;
    int64_t dtype = args[5].whole;
    if (!opened(args, &x) || args[6].nbytes != 15 * 8 || dtype < BF16 || dtype > F32
        || (args[4].nbytes && args[4].nbytes != x.size * itemsize((int)dtype)))
        return -1;
    double *out = (double *)args[6].data;
    _Alignas(64) float v[GROUP], w[GROUP];
    vi counts[STEPS] = {0};
    memset(out, 0, 15 * 8);
    for (int64_t begin = 0; begin < x.size; begin += GROUP) {
        int64_t end = begin + GROUP < x.size ? begin + GROUP : x.size, rows = (end - begin + ROW - 1) / ROW;
        if (!take(&x, begin, end, v)) return -1;
        if (!args[4].nbytes) { square_rows(v, rows, out); continue; }
        widen(args[4].data, begin, end, (int)dtype, w);
        if (dtype == BF16) round_rows(v, w, rows, BF16, counts, out);
        else if (dtype == F16) round_rows(v, w, rows, F16, counts, out);
        else round_rows(v, w, rows, F32, counts, out);
    }
    if (!args[4].nbytes) return 0;
    out[6] = out[1];
    for (int n = 0; n < STEPS; n++)
        for (int i = 0; i < WIDTH; i++) {
            out[7 + n] += counts[n][i];
            out[6] -= counts[n][i];
        }
    return 0;
}

/* ------------------------------------------------------------------------------------ signs of groups */

/* Doubles, bits for each draw (32 for each 32 doubles begun, highest first), room for a sum a draw:
   plus where the bit is 1. */
static int64_t flipped_sums(const Arg *args)
{
    int64_t size = args[0].nbytes / 8, stride = (size + 31) / 32 * 4, draws = args[2].nbytes / 8;
    if (args[0].nbytes % 8 || args[2].nbytes % 8 || args[1].nbytes != draws * stride) return -1;
    const uint8_t *bits = args[1].data;
    for (int64_t draw = 0; draw < draws; draw++, bits += stride) {
        double lane[ROW] = {0}, total;
        row64 sum;
        for (int64_t i = 0; i < size; i += ROW) {
            uint64_t held[ROW] = {0}, minus = ~((uint64_t)bits[i / 8] << 8 | bits[i / 8 + 1]);
            memcpy(held, args[0].data + 8 * i, 8 * (i + ROW < size ? ROW : size - i));
            for (int n = 0; n < ROW; n++) held[n] ^= minus << (48 + n) & (uint64_t)1 << 63;
            for (int n = 0; n < ROW; n++) { double x; memcpy(&x, held + n, 8); lane[n] += x; }
        }
        memcpy(&sum, lane, sizeof sum);
        total = folded64(sum);
        memcpy(args[2].data + 8 * draw, &total, 8);
    }
    return 0;
}
