/* Deltas made and applied: what skillvec/ops/arithmetic.py does in numpy, for BF16, F16 and F32.

   Values that are not finite, or that base + delta does not restore, are not settled here: their
   positions are listed, and numpy looks at them one by one. */

typedef struct { uint32_t position; float value; } Exception;
enum { ROUNDED, EXCEPTIONS, WHOLE };

ALWAYS int is_narrow(const Arg *dtype) { return dtype->whole >= BF16 && dtype->whole <= F32; }

/* One side of a group, from `begin` on: where it lies, or in `room`, zeros behind its end. */
ALWAYS const void *side(const void *from, int64_t begin, int64_t end, int dtype, void *room)
{
    int size = itemsize(dtype);
    const uint8_t *at = (const uint8_t *)from + begin * size;
    if ((end - begin) % ROW == 0) return at;
    memset((uint8_t *)room + (end - begin) * size, 0, ROW * size);
    return memcpy(room, at, (end - begin) * size);
}

typedef struct {
    const uint8_t *tuned, *base;
    uint8_t *out;
    Exception *exceptions;
    uint32_t *listed;
    int64_t listed_count, exception_count, changed, unrestored;
    double square;
} Difference;

ALWAYS vm both(vm a, vm b) { return a & b; }
ALWAYS vm either(vm a, vm b) { return a | b; }
ALWAYS vm but(vm a, vm b) { return a & ~b; }

/* A row whose difference the storage dtype cannot hold everywhere: what is written, and exceptions. */
static void hold(row32 d, int dv, uint32_t inexact, uint32_t first, row32 *held, Difference *to)
{
    float all[ROW];
    memcpy(all, &d, sizeof all);
    for (int p = 0; p < PARTS; p++) {
        vf near = rounded(d.v[p], dv);
        held->v[p] = keep(but(nonzero(near), wild(near)), near);
    }
    for (; inexact; inexact &= inexact - 1) {
        int lane = __builtin_ctz(inexact);
        Exception one = {first + lane, all[lane]};
        to->exceptions[to->exception_count++] = one;
    }
}

/* Whether 32 BF16 are at most 127 steps of the grid from their base, with its sign, and none is -0:
   the difference is then at most 254 of the smaller step, which is a BF16, and base + difference is
   tuned. (NaN and infinities pass: their square tells.) Adds how many have changed. */
ALWAYS int are_near(const uint16_t *tuned, const uint16_t *base, int64_t *changed)
{
#if defined(__AVX512F__)
    __m512i b = _mm512_loadu_si512(tuned), a = _mm512_loadu_si512(base);
    __m512i steps = _mm512_add_epi16(_mm512_sub_epi16(b, a), _mm512_set1_epi16(127));
    __mmask32 far = _mm512_cmpgt_epu16_mask(steps, _mm512_set1_epi16(254));
    __mmask32 minus = _mm512_cmpeq_epi16_mask(b, _mm512_set1_epi16(INT16_MIN));
    if (!_kortestz_mask32_u8(far, minus)) return 0;
    *changed += __builtin_popcount(_mm512_cmpneq_epi16_mask(a, b));
    return 1;
#elif defined(__AVX2__)
    __m256i odd = _mm256_setzero_si256();
    int same = 0;
    for (int i = 0; i < 2 * ROW; i += ROW) {
        __m256i b = _mm256_loadu_si256((const __m256i *)(tuned + i));
        __m256i a = _mm256_loadu_si256((const __m256i *)(base + i));
        __m256i steps = _mm256_add_epi16(_mm256_sub_epi16(b, a), _mm256_set1_epi16(127));
        odd = _mm256_or_si256(odd, _mm256_subs_epu16(steps, _mm256_set1_epi16(254)));
        odd = _mm256_or_si256(odd, _mm256_cmpeq_epi16(b, _mm256_set1_epi16(INT16_MIN)));
        same += __builtin_popcount((uint32_t)_mm256_movemask_epi8(_mm256_cmpeq_epi16(a, b)));
    }
    if (!_mm256_testz_si256(odd, odd)) return 0;
    *changed += 2 * ROW - same / 2;
    return 1;
#else
    int odd = 0, other = 0;
    for (int i = 0; i < 2 * ROW; i++) {
        odd |= (uint16_t)(tuned[i] - base[i] + 127) > 254 || tuned[i] == 0x8000;
        other += tuned[i] != base[i];
    }
    if (!odd) *changed += other;
    return !odd;
#endif
}

/* tuned - base of rows 0..size of a group that begins at `begin`. Without `used` NaN and infinities
   may pass as settled, but not without a square that says so; with it they are looked for, and it
   gets the differences that the square is of. */
ALWAYS double subtract_rows(const void *tuned, const void *base, void *out, int64_t begin,
                            int64_t size, int dt, int db, int dv, int exactness, float *used,
                            int *nothing, Difference *to)
{
    int exact = exactness != ROUNDED, careful = used != NULL || !exact;
    int quick = dt == BF16 && db == BF16 && dv == BF16 && exactness == WHOLE && !careful;
    row32 sum = {0};
    vi changed = {0}, unrestored = {0}, any = {0};
    for (int64_t i = 0; i < size; i += ROW) {
        if (quick && i % (2 * ROW) == 0 && i + 2 * ROW <= size
            && are_near((const uint16_t *)tuned + i, (const uint16_t *)base + i, &to->changed)) {
            for (int64_t end = i + 2 * ROW;; i += ROW) {
                row32 a = load(base, i, BF16), step = load(tuned, i, BF16);
                for (int p = 0; p < PARTS; p++) {
                    step.v[p] -= a.v[p];
                    any |= (vi)step.v[p];
                    put_u16((vu)step.v[p] >> 16, (uint16_t *)out + i + p * WIDTH);
                }
                add_products(&sum, step, step);
                if (i + ROW == end) break;
            }
            continue;
        }
        row32 a = load(base, i, db), b = load(tuned, i, dt), d, held;
        uint32_t odd = 0, inexact = 0;
        for (int p = 0; p < PARTS; p++) {
            vf x = a.v[p], y = b.v[p], step = y - x, near = step, use = step;
            vm strange = careful ? wild(step) : (vm){0}, lossy = (vm){0};
            if (dv == BF16 && exact) lossy = ne_bits(step, (vf)((vi)step & ~0xFFFF));
            else if (dv != F32) {
                near = rounded(step, dv);
                lossy = ne(near, step);
            }
            if (!exact) {
                strange = either(strange, wild(near));
                use = near = keep(nonzero(near), near);
            }
            vm moved = nonzero(use), other = dt == db ? ne_bits(x, y) : ne(x, y);
            vf total = careful || dt != db || exactness != WHOLE ? choose(moved, x + use, x) : x + use;
            vm missed = ne_bits(total, y);
            if (!exact) {
                missed = but(ne_bits(rounded(total, dt), y), strange);
                unrestored = count(unrestored, missed);
            } else if (exactness == EXCEPTIONS && dt == F32) {
                vm lost = but(both(missed, nonzero(y)), strange);
                unrestored = count(unrestored, lost);
                strange = either(strange, but(missed, lost));
            } else {
                strange = either(strange, missed);
                if (!careful) strange = either(strange, other ^ moved); /* -0 in place of 0 */
            }
            changed = count(changed, but(other, strange));
            odd |= lanes(strange) << p * WIDTH;
            if (exact && dv != F32) inexact |= lanes(but(lossy, strange)) << p * WIDTH;
            any |= (vi)use;
            d.v[p] = careful ? keep(but(moved, wild(use)), use) : use;
            held.v[p] = near;
        }
        add_products(&sum, d, d);
        if (__builtin_expect(odd | inexact, 0)) {
            for (; odd; odd &= odd - 1)
                to->listed[to->listed_count++] = (uint32_t)(begin + i + __builtin_ctz(odd));
            hold(d, dv, inexact, (uint32_t)(begin + i), &held, to);
        }
        if (used) store(d, used, i, F32);
        if (dv == BF16)
            for (int p = 0; p < PARTS; p++)
                put_u16((vu)held.v[p] >> 16, (uint16_t *)out + i + p * WIDTH);
        else store(held, out, i, dv);
    }
    to->changed += counted(changed);
    to->unrestored += counted(unrestored);
    *nothing = !lanes(ne_bits((vf)any, (vf){0}));
    return folded(sum);
}

ALWAYS void subtract_all(int64_t size, int dt, int db, int dv, int exactness, Difference *to)
{
    float rooms[3][GROUP + ROW], used[GROUP + ROW];
    for (int64_t i = 0; i < size; i += GROUP) {
        int64_t end = i + GROUP < size ? i + GROUP : size, rows = (end - i + ROW - 1) / ROW * ROW;
        const void *tuned = side(to->tuned, i, end, dt, rooms[0]);
        const void *base = side(to->base, i, end, db, rooms[1]);
        void *out = rows == end - i ? (void *)(to->out + i * itemsize(dv)) : (void *)rooms[2];
        Difference before = *to;
        int nothing = 0;
        double square = subtract_rows(tuned, base, out, i, rows, dt, db, dv, exactness, NULL, &nothing,
                                      to);
        if (!is_settled(square) && !nothing) { /* once more, what is squared in a buffer */
            *to = before;
            subtract_rows(tuned, base, out, i, rows, dt, db, dv, exactness, used, &nothing, to);
            square = product(used, used, rows);
        }
        to->square += square;
        if (out == rooms[2]) memcpy(to->out + i * itemsize(dv), out, (end - i) * itemsize(dv));
    }
}

/* tuned, base, their dtypes and that of the delta, the exactness; its values, exceptions, listed
   positions and the numbers found. Returns how many positions are listed. */
static int64_t subtract(const Arg *args)
{
    int dt = (int)args[2].whole, db = (int)args[3].whole, dv = (int)args[4].whole;
    int exactness = (int)args[5].whole;
    if (!is_narrow(args + 2) || !is_narrow(args + 3) || !is_narrow(args + 4)) return -1;
    int64_t size = args[0].nbytes / itemsize(dt);
    int64_t most = exactness != ROUNDED && dv != F32 ? size : 0;
    if (size > UINT32_MAX || args[0].nbytes != size * itemsize(dt) || args[5].whole < ROUNDED
        || args[5].whole > WHOLE || args[1].nbytes != size * itemsize(db)
        || args[6].nbytes != size * itemsize(dv) || args[7].nbytes < most * (int64_t)sizeof(Exception)
        || args[8].nbytes < size * 4 || args[9].nbytes != 4 * 8)
        return -1;
    Difference to = {args[0].data, args[1].data, args[6].data, (Exception *)args[7].data,
                     (uint32_t *)args[8].data, 0, 0, 0, 0, 0};
    if (dt == BF16 && db == BF16 && dv == BF16 && exactness != ROUNDED)
        subtract_all(size, BF16, BF16, BF16, WHOLE, &to);
    else if (dt == F16 && db == F16 && dv == F16 && exactness != ROUNDED)
        subtract_all(size, F16, F16, F16, WHOLE, &to);
    else if (dt == F32 && db == F32 && dv == F32 && exactness == WHOLE)
        subtract_all(size, F32, F32, F32, WHOLE, &to);
    else subtract_all(size, dt, db, dv, exactness, &to);
    double found[4] = {(double)to.changed, to.square, (double)to.exception_count,
                       (double)to.unrestored};
    memcpy(args[9].data, found, sizeof found);
    return to.listed_count;
}

/* ----------------------------------------------------------------------- target + lam * delta */

typedef struct {
    const uint8_t *target, *delta;
    uint8_t *out;
    const uint32_t *positions;
    const float *exact;
    int64_t exact_count, next, changed, target_wild, out_wild;
    double sums[3];
    float lam;
    int measure, write;
} Sum;

/* Rows of a group: `out` is written, or read where it stands. Without `used` the sums are right if
   they are finite and nothing is returned; with it, what is not finite is counted and counts as not
   moved, and it gets what moved and the delta. */
ALWAYS uint32_t add_rows(const void *target, const void *delta, void *out, int64_t size, int dt,
                         int dd, int dout, int measure, int write, double *sums,
                         float (*used)[GROUP + ROW], int *nothing, Sum *to)
{
    row32 sum[3] = {0};
    vi changed = {0}, target_wild = {0}, out_wild = {0};
    vi any = {0};
    vm seen = {0};
    vf lam = to->lam - (vf){0};
    vm asked = nonzero(lam);
    for (int64_t i = 0; i < size; i += ROW) {
        row32 a = load(target, i, dt), d = load(delta, i, dd), after, moved;
        if (write) {
            for (int p = 0; p < PARTS; p++) {
                vm adds = both(nonzero(d.v[p]), asked);
                after.v[p] = choose(adds, fused(lam, d.v[p], a.v[p]), a.v[p]);
                if (dout == BF16) { /* what is not finite here is written by numpy */
                    vu bits = (vu)after.v[p];
                    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
                    put_u16(bits, (uint16_t *)out + i + p * WIDTH);
                    after.v[p] = (vf)(bits << 16);
                }
            }
            if (dout != BF16) store(after, out, i, dout);
            if (dout == F16) after = load(out, i, F16);
        } else after = load(out, i, dout);
        for (int p = 0; p < PARTS; p++) {
            vf x = a.v[p], y = after.v[p], step = y - x;
            vm other = dt == dout ? ne_bits(x, y) : ne(x, y);
            if (used) {
                vm strange = wild(x);
                target_wild = count(target_wild, strange);
                out_wild = count(out_wild, wild(y));
                other = but(other, strange);
                step = keep(but(but(nonzero(step), wild(step)), strange), step);
            } else seen = either(seen, either(wild(x), wild(y)));
            changed = count(changed, other);
            any |= (vi)step | (vi)d.v[p];
            moved.v[p] = step;
        }
        if (measure) {
            add_products(sum, moved, moved);
            add_products(sum + 1, moved, d);
            add_products(sum + 2, d, d);
        }
        if (used) { store(moved, used[0], i, F32); store(d, used[1], i, F32); }
    }
    if (lanes(seen)) return 1;
    to->changed += counted(changed);
    to->target_wild += counted(target_wild);
    to->out_wild += counted(out_wild);
    for (int n = 0; n < 3; n++) sums[n] = folded(sum[n]);
    *nothing = !lanes(ne_bits((vf)any, (vf){0}));
    return 0;
}

/* The group of a delta in fp32, its exceptions in place; NULL where there are none. */
ALWAYS const void *patched(int64_t begin, int64_t end, int dd, float *room, Sum *to)
{
    if (to->next >= to->exact_count || to->positions[to->next] >= end) return NULL;
    uint8_t held[4 * (GROUP + ROW)];
    const void *delta = side(to->delta, begin, end, dd, held);
    for (int64_t i = 0; i < end - begin; i += ROW) store(load(delta, i, dd), room, i, F32);
    for (; to->next < to->exact_count && to->positions[to->next] < end; to->next++)
        if (to->positions[to->next] >= begin)
            room[to->positions[to->next] - begin] = to->exact[to->next];
    return room;
}

ALWAYS void add_group(const void *target, const void *delta, void *out, int64_t rows, int dt, int dd,
                      int dout, int measure, int write, Sum *to)
{
    double sums[3];
    float used[2][GROUP + ROW];
    int64_t changed = to->changed;
    int nothing = 0;
    uint32_t again = add_rows(target, delta, out, rows, dt, dd, dout, measure, write, sums, NULL,
                              &nothing, to);
    for (int n = 0; n < 3 && !again && measure && !nothing; n++) again = !is_settled(sums[n]);
    if (again) {
        to->changed = changed;
        add_rows(target, delta, out, rows, dt, dd, dout, 0, 0, sums, used, &nothing, to);
        sums[0] = product(used[0], used[0], rows);
        sums[1] = product(used[0], used[1], rows);
        sums[2] = product(used[1], used[1], rows);
    }
    for (int n = 0; n < 3 && measure; n++) to->sums[n] += sums[n];
}

ALWAYS void add_all(int64_t size, int dt, int dd, int dout, int measure, int write, Sum *to)
{
    float rooms[3][GROUP + ROW], room[GROUP + ROW];
    for (int64_t i = 0; i < size; i += GROUP) {
        int64_t end = i + GROUP < size ? i + GROUP : size, rows = (end - i + ROW - 1) / ROW * ROW;
        const void *target = side(to->target, i, end, dt, rooms[0]);
        const void *delta = patched(i, end, dd, room, to);
        uint8_t *out = to->out + i * itemsize(dout);
        void *place = write && rows != end - i ? (void *)rooms[2] : (void *)out;
        if (!write) place = (void *)side(to->out, i, end, dout, rooms[2]);
        if (delta == NULL)
            add_group(target, side(to->delta, i, end, dd, rooms[1]), place, rows, dt, dd, dout,
                      measure, write, to);
        else add_group(target, delta, place, rows, dt, F32, dout, measure, write, to);
        if (write && place != out) memcpy(out, place, (end - i) * itemsize(dout));
    }
}

/* target, delta, its positions and fp32 values there, dtypes of target, delta and output, lam; the
   output; whether sums are wanted, whether the output is written here; the numbers found. Where the
   target is not finite, what is written holds no more than that. */
static int64_t add(const Arg *args)
{
    int dt = (int)args[4].whole, dd = (int)args[5].whole, dout = (int)args[6].whole;
    int measure = args[9].whole != 0, write = args[10].whole != 0;
    if (!is_narrow(args + 4) || !is_narrow(args + 5) || !is_narrow(args + 6)) return -1;
    int64_t size = args[0].nbytes / itemsize(dt);
    if (args[0].nbytes != size * itemsize(dt) || args[1].nbytes != size * itemsize(dd)
        || args[2].nbytes != args[3].nbytes || args[8].nbytes != size * itemsize(dout)
        || args[11].nbytes != 6 * 8)
        return -1;
    Sum to = {args[0].data, args[1].data, args[8].data, (const uint32_t *)args[2].data,
              (const float *)args[3].data, args[3].nbytes / 4, 0, 0, 0, 0, {0},
              (float)args[7].real, 0, 0};
    if (dt == BF16 && dd == BF16 && dout == BF16 && write && measure)
        add_all(size, BF16, BF16, BF16, 1, 1, &to);
    else if (dt == F16 && dd == F16 && dout == F16 && write && measure)
        add_all(size, F16, F16, F16, 1, 1, &to);
    else if (dt == F32 && dd == F32 && dout == F32 && write && measure)
        add_all(size, F32, F32, F32, 1, 1, &to);
    else add_all(size, dt, dd, dout, measure, write, &to);
    double found[6] = {(double)to.changed, (double)to.target_wild, (double)to.out_wild,
                       to.sums[0], to.sums[1], to.sums[2]};
    memcpy(args[11].data, found, sizeof found);
    return 0;
}
