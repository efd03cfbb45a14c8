/* Sums of two deltas with each other, and of one with the weights that it is added to.

   A group of 1,024 values at a time: widened to fp32 in buffers that stay in cache, exceptions put
   into their places, then rows. skillvec/ops/comparison.py says what is summed up, and by numpy. */

#define WORDS (GROUP / WIDTH) /* bits of a group: a word for each register */

#if WIDTH == 16
typedef uint16_t Bits;
ALWAYS vm negative(vf x) { return _mm512_test_epi32_mask((__m512i)x, _mm512_set1_epi32(INT32_MIN)); }
ALWAYS vf plus(vf sum, vm m, vf x) { return (vf)_mm512_mask_add_ps((__m512)sum, m, (__m512)sum, (__m512)x); }
ALWAYS vi most_of(vi a, vi b) { return (vi)_mm512_max_epi32((__m512i)a, (__m512i)b); }
ALWAYS vi least_of(vi a, vi b) { return (vi)_mm512_min_epi32((__m512i)a, (__m512i)b); }
ALWAYS vi one_at(vi place) { return (vi)_mm512_sllv_epi32(_mm512_set1_epi32(1), (__m512i)place); }
#else
typedef uint8_t Bits;
ALWAYS vm negative(vf x) { return (vi)x >> 31; }
ALWAYS vf plus(vf sum, vm m, vf x) { return sum + keep(m, x); }
#if WIDTH == 8
ALWAYS vi most_of(vi a, vi b) { return (vi)_mm256_max_epi32((__m256i)a, (__m256i)b); }
ALWAYS vi least_of(vi a, vi b) { return (vi)_mm256_min_epi32((__m256i)a, (__m256i)b); }
ALWAYS vi one_at(vi place) { return (vi)_mm256_sllv_epi32(_mm256_set1_epi32(1), (__m256i)place); }
#else
ALWAYS vi most_of(vi a, vi b) { return (a & (a > b)) | (b & (a <= b)); }
ALWAYS vi least_of(vi a, vi b) { return (a & (a < b)) | (b & (a >= b)); }
ALWAYS vi one_at(vi place) { return (((vi){0} + 1) << (place & 31)) & (vi)((vu)place < 32); }
#endif
#endif

ALWAYS int64_t count_of(const Bits *a, const Bits *b) /* bits that are in both */
{
    uint64_t one[WORDS * sizeof(Bits) / 8], other[WORDS * sizeof(Bits) / 8];
    int64_t count = 0;
    memcpy(one, a, sizeof one);
    memcpy(other, b, sizeof other);
    for (size_t i = 0; i < sizeof one / 8; i++) count += __builtin_popcountll(one[i] & other[i]);
    return count;
}

ALWAYS void put_f32(vf x, float *at) { memcpy(at, &x, sizeof x); }

/* --------------------------------------------------------------------------------- groups of a delta */

typedef struct { const uint8_t *values; const uint32_t *at; const float *exact;
                 int64_t size, count, next; int dtype; } Side;

static int opened(const Arg *args, Side *side) /* values, dtype, positions, exact; 0: they do not fit */
{
    int64_t dtype = args[1].whole, width = dtype == F32 ? 4 : 2;
    *side = (Side){args[0].data, (const uint32_t *)args[2].data, (const float *)args[3].data,
                   args[0].nbytes / width, args[2].nbytes / 4, 0, (int)dtype};
    return dtype >= BF16 && dtype <= F32 && args[0].nbytes % width == 0 && args[2].nbytes % 4 == 0
           && args[2].nbytes == args[3].nbytes;
}

ALWAYS void widen_as(const void *from, int64_t i, int64_t end, int dtype, float *out)
{
    for (; i + ROW <= end; i += ROW, out += ROW) store(load(from, i, dtype), out, 0, F32);
    if (i < end) store(load_end(from, i, end, dtype), out, 0, F32);
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

/* ---------------------------------------------------------------------------------------- two deltas */

enum { PRODUCT, SQUARE_A, SQUARE_B, MET_A, MET_B, CLASH_A, CLASH_B, SUMS };

static void meet(const float *a, const float *b, int64_t rows, double *sums, int64_t *counts)
{
    Bits in_a[WORDS] = {0}, in_b[WORDS] = {0}, opposed[WORDS] = {0};
    vf sum[SUMS][PARTS];
    for (int p = 0; p < PARTS; p++) {
        vf s[SUMS] = {0};
        for (int64_t i = p * WIDTH; i < rows * ROW; i += ROW) {
            vf x = from_f32(a + i), y = from_f32(b + i), product = x * y, of_x = x * x, of_y = y * y;
            vm has_x = nonzero(x), has_y = nonzero(y), clash = negative(product) & (has_x & has_y);
            s[PRODUCT] += product;
            s[SQUARE_A] += of_x;
            s[SQUARE_B] += of_y;
            s[MET_A] = plus(s[MET_A], has_y, of_x);
            s[MET_B] = plus(s[MET_B], has_x, of_y);
            s[CLASH_A] = plus(s[CLASH_A], clash, of_x);
            s[CLASH_B] = plus(s[CLASH_B], clash, of_y);
            in_a[i / WIDTH] = (Bits)lanes(has_x);
            in_b[i / WIDTH] = (Bits)lanes(has_y);
            opposed[i / WIDTH] = (Bits)lanes(clash);
        }
        for (int n = 0; n < SUMS; n++) sum[n][p] = s[n];
    }
    counts[0] = count_of(in_a, in_a);
    counts[1] = count_of(in_b, in_b);
    counts[2] = count_of(in_a, in_b);
    counts[3] = count_of(opposed, opposed);
    const int64_t terms[SUMS] = {counts[2], counts[0], counts[1], counts[2], counts[2], counts[3], counts[3]};
    for (int n = 0; n < SUMS; n++) {
        const float *one = n == SQUARE_B || n == MET_B || n == CLASH_B ? b : a, *two = one == a ? b : a;
        row32 row;
        memcpy(&row, sum[n], sizeof row);
        sums[n] = terms[n] ? folded(row) : 0;
        if (!terms[n] || is_settled(sums[n])) continue;
        float held[GROUP];
        for (int64_t i = 0; i < rows * ROW; i++) {
            int is = n < MET_A || (two[i] != 0 && (n < CLASH_A || (one[i] < 0) != (two[i] < 0)));
            held[i] = !is ? 0 : n == PRODUCT ? two[i] : one[i];
        }
        sums[n] = product64(one, held, 0, rows * ROW, F32, F32);
    }
}

static void narrow_groups(const float *a, const float *b, int64_t size, int64_t width, double *out)
{
    for (int64_t i = 0; i < size; i += ROW) { /* less than a row each: in fp32 and in fp64 */
        double sum[2][ROW];
        for (int n = 0; n < ROW; n++) {
            sum[0][n] = (double)(a[i + n] * b[i + n]) + 0.0;
            sum[1][n] = (double)a[i + n] * (double)b[i + n] + 0.0;
        }
        for (int64_t half = width / 2; half; half /= 2) /* of a group's lanes the first in the end */
            for (int64_t n = 0; n + half < ROW; n++)
                for (int k = 0; k < 2; k++) sum[k][n] += sum[k][n + half];
        for (int64_t n = 0; n < ROW && i + n < size; n += width) *out++ = sum[!is_settled(sum[0][n])][n];
    }
}

/* Two deltas (values, dtype, positions, exact values), the width of a group, room for a double a
   group, and for comparison.PAIR. */
static int64_t pair_sums(const Arg *args)
{
    Side x, y;
    int64_t width = args[8].whole, counts[4], all[4] = {0};
    if (!opened(args, &x) || !opened(args + 4, &y) || x.size != y.size || width < 1 || width > GROUP
        || (width & (width - 1)) || args[9].nbytes != (x.size + width - 1) / width * 8
        || args[10].nbytes != 12 * 8)
        return -1;
    double *groups = (double *)args[9].data, *out = (double *)args[10].data, sums[SUMS];
    _Alignas(64) float a[GROUP], b[GROUP];
    memset(out, 0, 12 * 8);
    for (int64_t begin = 0, end; begin < x.size; begin = end) {
        end = begin + GROUP < x.size ? begin + GROUP : x.size;
        int64_t rows = (end - begin + ROW - 1) / ROW;
        if (!take(&x, begin, end, a) || !take(&y, begin, end, b)) return -1;
        meet(a, b, rows, sums, counts);
        if (width == GROUP) *groups = sums[PRODUCT];
        else if (width < ROW) narrow_groups(a, b, end - begin, width, groups);
        else products_of(a, b, end - begin, width, F32, F32, (uint8_t *)groups);
        for (int64_t i = begin; i < end; i += width, groups++) {
            out[0] += *groups;
            out[1] += *groups * *groups;
        }
        for (int n = 1; n < SUMS; n++) out[n + 1] += sums[n];
        for (int n = 0; n < 4; n++) all[n] += counts[n];
    }
    for (int n = 0; n < 4; n++) out[8 + n] = (double)all[n];
    return 0;
}

/* ----------------------------------------------------------------- supports by exponents of weights */

enum { STRATA = 512, CODES = 4 * STRATA };

ALWAYS vu strata_of(vf w, int dtype)
{
    vu bits = (vu)(dtype == F16 ? w : rounded(w, BF16));
    return (bits >> 23 & 255) | ((vu)((bits & 0x7FFFFF) == 0) & 256);
}

ALWAYS vu events(vf x, vf y) /* b changes the value: 1, a does: 2, with opposite signs: 4 */
{
    vf none = {0};
    vu opposed = (vu)((x > none) & (y < none)) | (vu)((x < none) & (y > none));
    return ((vu)(y != none) & 1) | ((vu)(x != none) & 2) | (opposed & 4);
}

/* Two deltas (values, dtype, positions, exact values), weights and their dtype, room for CODES int64.
   Two tables take turns: a counter is seldom read before the write before it has arrived. */
static int64_t count_strata(const Arg *args)
{
    Side x, y;
    int64_t dtype = args[9].whole, *out = (int64_t *)args[10].data;
    if (!opened(args, &x) || !opened(args + 4, &y) || x.size != y.size || dtype < BF16 || dtype > F32
        || args[8].nbytes != x.size * itemsize((int)dtype) || args[10].nbytes != CODES * 8)
        return -1;
    uint32_t table[2][CODES] = {{0}};
    _Alignas(64) float a[GROUP], b[GROUP], w[GROUP];
    _Alignas(64) uint32_t codes[GROUP];
    for (int64_t begin = 0, end; begin < x.size; begin = end) {
        end = begin + GROUP < x.size ? begin + GROUP : x.size;
        if (!take(&x, begin, end, a) || !take(&y, begin, end, b)) return -1;
        widen(args[8].data, begin, end, (int)dtype, w);
        for (int64_t i = 0; i < end - begin; i += WIDTH) {
            vu code = strata_of(from_f32(w + i), (int)dtype) << 2;
            code |= events(from_f32(a + i), from_f32(b + i)) & 3;
            memcpy(codes + i, &code, sizeof code);
        }
        for (int64_t i = 0; i < end - begin; i++) table[i & 1][codes[i]]++;
    }
    for (int n = 0; n < CODES; n++) out[n] = (int64_t)table[0][n] + table[1][n];
    return 0;
}

typedef int32_t four32 __attribute__((vector_size(16)));
typedef int64_t four64 __attribute__((vector_size(32)));

/* Rows of two deltas in fp32, their weights in fp32 or none, the dtype of these, four scores for each
   stratum and event, room for the sums of scores of each row, and those of the columns to add to. */
static int64_t support_scores(const Arg *args)
{
    int64_t count = args[0].nbytes / 4, rows = args[5].nbytes / 32, columns = args[6].nbytes / 32;
    int dtype = (int)args[3].whole;
    if (args[0].nbytes % 4 || args[1].nbytes != args[0].nbytes || args[5].nbytes % 32
        || (args[2].nbytes && args[2].nbytes != args[0].nbytes) || args[6].nbytes % 32
        || args[4].nbytes != STRATA * 8 * 16 || rows * columns != count)
        return -1;
    const uint8_t *table = args[4].data;
    _Alignas(64) uint32_t codes[GROUP];
    for (int64_t row = 0; row < rows; row++) {
        four64 sum = {0};
        for (int64_t begin = 0, end; begin < columns; begin = end) {
            end = begin + GROUP < columns ? begin + GROUP : columns;
            int64_t first = row * columns;
            for (int64_t i = begin; i < end; i += WIDTH) {
                float held[3][WIDTH] = {{0}};
                size_t nbytes = 4 * (size_t)(i + WIDTH < end ? WIDTH : end - i);
                for (int n = 0; n < 3; n++)
                    if (args[n].nbytes) memcpy(held[n], args[n].data + 4 * (first + i), nbytes);
                vu code = events(from_f32(held[0]), from_f32(held[1]));
                if (args[2].nbytes) code |= strata_of(from_f32(held[2]), dtype) << 3;
                memcpy(codes + i - begin, &code, sizeof code);
            }
            for (int64_t i = begin; i < end; i++) {
                four32 narrow;
                four64 column;
                memcpy(&narrow, table + 16 * codes[i - begin], sizeof narrow);
                memcpy(&column, args[6].data + 32 * i, sizeof column);
                four64 scores = __builtin_convertvector(narrow, four64);
                sum += scores;
                column += scores;
                memcpy(args[6].data + 32 * i, &column, sizeof column);
            }
        }
        memcpy(args[5].data + 32 * row, &sum, sizeof sum);
    }
    return 0;
}

/* ------------------------------------------------------------------------------ a delta on its weights */

enum { EDGES = 8 }; /* of the histogram of steps */

/* The sum of lanes, of `count` terms that are not 0: in fp64 if fp32 cannot settle it. */
ALWAYS double settled(const vf *sum, int64_t count, const float *a, const float *b, int64_t rows)
{
    row32 held;
    memcpy(&held, sum, sizeof held);
    double total = count ? folded(held) : 0;
    return !count || is_settled(total) ? total : product64(a, b, 0, rows * ROW, F32, F32);
}

ALWAYS vf to_grid(vf x, int grid) /* a NaN of fp32 may get lost if the grid is BF16 */
{
    vu bits = (vu)x;
    return grid == F16 ? rounded(x, F16) : (vf)((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000);
}

ALWAYS void measure(const float *v, const float *w, int64_t rows, int dtype, vi *steps, double *out)
{
    const int grid = dtype == F16 ? F16 : BF16, fraction = grid == F16 ? 10 : 7;
    const int32_t least = grid == F16 ? 113 << 23 : 1 << 23, infinite = 0x7F800000;
    Bits has[WORDS] = {0}, stay[WORDS] = {0};
    vf sum[4][PARTS];
    _Alignas(64) float arrived[GROUP], step[GROUP];
    for (int p = 0; p < PARTS; p++) {
        vf s[4] = {0}, zero = {0};
        vu packed = {0}; /* eight counters of four bits */
        int room = 15;
        for (int64_t i = p * WIDTH; i < rows * ROW; i += ROW) {
            vf x = from_f32(v + i), y, held, moved, one;
            vm changed = nonzero(x);
            s[0] += x * x;
            has[i / WIDTH] = (Bits)lanes(changed);
            if (dtype == F64) continue; /* no weights */
            put_f32(zero, arrived + i);
            put_f32(zero, step + i);
            if (!(Bits)lanes(changed)) continue;
            y = from_f32(w + i);
            held = dtype == F32 ? rounded(y, BF16) : y;
            vi power = most_of((vi)held & infinite, (vi){0} + least);
            moved = to_grid(y + x, grid) - held;
            moved = keep(~wild(moved), moved); /* 0 where nothing changed */
            one = keep(changed & ~wild(held), (vf)most_of(power - (fraction << 23), (vi){0}));
            s[1] += moved * x;
            s[2] += moved * moved;
            s[3] += one * one;
            stay[i / WIDTH] = (Bits)lanes(nonzero(moved));
            put_f32(moved, arrived + i);
            put_f32(one, step + i);
            vi place = ((((vi)x & infinite) - power) >> 21) + 4 * (fraction + 2);
            packed += (vu)keep(changed, (vf)one_at(least_of(place, (vi){0} + 4 * (EDGES - 1))));
            if (--room) continue;
            for (int n = 0; n < EDGES; n++) steps[n] += (vi)(packed >> 4 * n & 15);
            packed = (vu){0};
            room = 15;
        }
        for (int n = 0; n < EDGES; n++) steps[n] += (vi)(packed >> 4 * n & 15);
        for (int n = 0; n < 4; n++) sum[n][p] = s[n];
    }
    int64_t changed = count_of(has, has), arrive = count_of(stay, stay);
    out[0] += settled(sum[0], changed, v, v, rows);
    out[1] += (double)changed;
    if (dtype == F64) return;
    out[2] += settled(sum[1], arrive, arrived, v, rows);
    out[3] += settled(sum[2], arrive, arrived, arrived, rows);
    out[4] += (double)(changed - arrive);
    out[5] += settled(sum[3], changed, step, step, rows);
}

/* A delta (values, dtype, positions, exact values), weights or none with their dtype, and room for
   comparison.VECTOR and the steps. */
static int64_t vector_sums(const Arg *args)
{
    Side x;
    int64_t dtype = args[5].whole;
    if (!opened(args, &x) || args[6].nbytes != 15 * 8 || dtype < BF16 || dtype > F32
        || (args[4].nbytes && args[4].nbytes != x.size * itemsize((int)dtype)))
        return -1;
    double *out = (double *)args[6].data;
    _Alignas(64) float v[GROUP], w[GROUP];
    vi steps[EDGES] = {0};
    memset(out, 0, 15 * 8);
    for (int64_t begin = 0, end; begin < x.size; begin = end) {
        end = begin + GROUP < x.size ? begin + GROUP : x.size;
        int64_t rows = (end - begin + ROW - 1) / ROW;
        if (!take(&x, begin, end, v)) return -1;
        if (args[4].nbytes) widen(args[4].data, begin, end, (int)dtype, w);
        if (!args[4].nbytes) measure(v, w, rows, F64, steps, out);
        else if (dtype == BF16) measure(v, w, rows, BF16, steps, out);
        else if (dtype == F16) measure(v, w, rows, F16, steps, out);
        else measure(v, w, rows, F32, steps, out);
    }
    out[6] = args[4].nbytes ? out[1] : 0;
    for (int n = 0; n < EDGES; n++)
        for (int i = 0; i < WIDTH; i++) {
            out[7 + n] += steps[n][i];
            out[6] -= steps[n][i];
        }
    return 0;
}
