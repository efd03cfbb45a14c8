/* Which values are not 0, as a bitmap and the values alone, and back; values as planes of bytes.

   Values are unsigned integers of 2, 4 or 8 bytes, wherever they begin. Loads come before stores
   and the ends of what is written are kept, so that values may be spread where they lie. */

/* What AVX2 has no instruction for: for 8 lanes of 16 bits, the bytes that a shuffle moves. */
typedef struct { uint8_t bytes[256][16]; } Moves;

ALWAYS uint64_t get(const uint8_t *from, int64_t i, int width)
{
    uint16_t two;
    uint32_t four;
    uint64_t eight;
    from += i * width;
    if (width == 2) return memcpy(&two, from, 2), two;
    if (width == 4) return memcpy(&four, from, 4), four;
    return memcpy(&eight, from, 8), eight;
}

ALWAYS void put(uint64_t value, uint8_t *to, int64_t i, int width)
{
    memcpy(to + i * width, &value, width); /* the low bytes: every processor here has them first */
}

ALWAYS int64_t count_bits(const uint8_t *bitmap, int64_t nbytes)
{
    int64_t count = 0, i = 0;
    for (; i + 8 <= nbytes; i += 8) count += __builtin_popcountll(get(bitmap, i / 8, 8));
    for (; i < nbytes; i++) count += __builtin_popcount(bitmap[i]);
    return count;
}

#if defined(__AVX512VBMI2__)
/* A register of values: mask, pack and spread by its lanes of `width` bytes. */
ALWAYS uint64_t marks(__m512i x, int width)
{
    return width == 2   ? _mm512_test_epi16_mask(x, x)
           : width == 4 ? _mm512_test_epi32_mask(x, x)
                        : _mm512_test_epi64_mask(x, x);
}

ALWAYS __m512i packed(__m512i x, uint64_t mask, int width)
{
    return width == 2   ? _mm512_maskz_compress_epi16((__mmask32)mask, x)
           : width == 4 ? _mm512_maskz_compress_epi32((__mmask16)mask, x)
                        : _mm512_maskz_compress_epi64((__mmask8)mask, x);
}

ALWAYS __m512i spread(__m512i x, uint64_t mask, int width)
{
    return width == 2   ? _mm512_maskz_expand_epi16((__mmask32)mask, x)
           : width == 4 ? _mm512_maskz_expand_epi32((__mmask16)mask, x)
                        : _mm512_maskz_expand_epi64((__mmask8)mask, x);
}
#elif defined(__AVX2__)
#define LANES 0x0706050403020100u

/* For lanes of 4 or 8 bytes: those that are not 0, and a byte of ones for each 4 bytes of them. */
ALWAYS uint32_t marks(__m256i x, int width)
{
    __m256i zero = _mm256_setzero_si256();
    return width == 4 ? ~_mm256_movemask_ps(_mm256_castsi256_ps(_mm256_cmpeq_epi32(x, zero))) & 255
                      : ~_mm256_movemask_pd(_mm256_castsi256_pd(_mm256_cmpeq_epi64(x, zero))) & 15;
}

ALWAYS uint64_t lane_bytes(uint32_t mask, int width)
{
    return width == 4 ? _pdep_u64(mask, 0x0101010101010101u) * 255
                      : _pdep_u64(mask, 0x0001000100010001u) * 0xFFFF;
}

/* In entry m, the lanes that m marks come first, or go back to where they were, zeros between. */
ALWAYS void fill_moves(Moves *to, int back)
{
    for (uint32_t mask = 0; mask < 256; mask++) {
        uint64_t bytes = lane_bytes(mask, 4);
        uint64_t lanes = back ? _pdep_u64(LANES, bytes) : _pext_u64(LANES, bytes);
        __m128i at = _mm_cvtepu8_epi16(_mm_cvtsi64_si128((int64_t)lanes));
        at = _mm_add_epi16(_mm_mullo_epi16(at, _mm_set1_epi16(0x0202)), _mm_set1_epi16(0x0100));
        if (back) at = _mm_or_si128(at, _mm_cvtepi8_epi16(_mm_cvtsi64_si128((int64_t)~bytes)));
        _mm_storeu_si128((__m128i *)to->bytes[mask], at);
    }
}
#endif

ALWAYS int64_t pick_of(const uint8_t *from, int64_t numel, uint8_t *bitmap, uint8_t *kept, int width)
{
    int64_t count = 0, i = 0;
#if defined(__AVX512VBMI2__)
    const int lanes = 64 / width;
    for (; i + lanes <= numel; i += lanes) {
        __m512i x = _mm512_loadu_si512(from + i * width);
        uint64_t mask = marks(x, width);
        memcpy(bitmap + i / 8, &mask, lanes / 8);
        _mm512_storeu_si512(kept + count * width, packed(x, mask, width));
        count += __builtin_popcountll(mask);
    }
#elif defined(__AVX2__)
    Moves moves;
    if (width == 2) fill_moves(&moves, 0);
    for (; width == 2 && i + 16 <= numel; i += 16) {
        __m256i x = _mm256_loadu_si256((const __m256i *)(from + 2 * i));
        __m256i zero = _mm256_cmpeq_epi16(x, _mm256_setzero_si256());
        __m128i low = _mm256_castsi256_si128(x), high = _mm256_extracti128_si256(x, 1);
        __m128i both = _mm_packs_epi16(_mm256_castsi256_si128(zero), _mm256_extracti128_si256(zero, 1));
        uint32_t mask = ~(uint32_t)_mm_movemask_epi8(both) & 0xFFFF;
        memcpy(bitmap + i / 8, &mask, 2);
        low = _mm_shuffle_epi8(low, _mm_loadu_si128((const __m128i *)moves.bytes[mask & 255]));
        high = _mm_shuffle_epi8(high, _mm_loadu_si128((const __m128i *)moves.bytes[mask >> 8]));
        _mm_storeu_si128((__m128i *)(kept + 2 * count), low);
        count += __builtin_popcount(mask & 255);
        _mm_storeu_si128((__m128i *)(kept + 2 * count), high);
        count += __builtin_popcount(mask >> 8);
    }
    for (; width > 2 && i + 8 <= numel; i += 8) {
        bitmap[i / 8] = 0;
        for (int half = 0; half < width / 4; half++) {
            __m256i x = _mm256_loadu_si256((const __m256i *)(from + i * width + 32 * half));
            uint32_t mask = marks(x, width);
            bitmap[i / 8] |= (uint8_t)(mask << 4 * half);
            uint64_t first = _pext_u64(LANES, lane_bytes(mask, width));
            __m256i order = _mm256_cvtepu8_epi32(_mm_cvtsi64_si128((int64_t)first));
            x = _mm256_permutevar8x32_epi32(x, order);
            _mm256_storeu_si256((__m256i *)(kept + count * width), x);
            count += __builtin_popcount(mask);
        }
    }
#endif
    for (; i < numel; i += 8) {
        int most = numel - i < 8 ? (int)(numel - i) : 8;
        uint32_t mask = 0;
        for (int k = 0; k < most; k++) {
            uint64_t value = get(from, i + k, width);
            put(value, kept, count, width);
            mask |= (uint32_t)(value != 0) << k;
            count += value != 0;
        }
        bitmap[i / 8] = (uint8_t)mask;
    }
    return count;
}

ALWAYS void spread_of(const uint8_t *bitmap, const uint8_t *kept, int64_t count, uint8_t *to,
                      int64_t numel, int width)
{
    int64_t next = 0, i = 0;
#if defined(__AVX512VBMI2__)
    const int lanes = 64 / width;
    for (; i + lanes <= numel && next + lanes <= count; i += lanes) {
        uint64_t mask = 0;
        memcpy(&mask, bitmap + i / 8, lanes / 8);
        __m512i x = _mm512_loadu_si512(kept + next * width);
        _mm512_storeu_si512(to + i * width, spread(x, mask, width));
        next += __builtin_popcountll(mask);
    }
#elif defined(__AVX2__)
    Moves moves;
    if (width == 2) fill_moves(&moves, 1);
    for (; width == 2 && i + 8 <= numel && next + 8 <= count; i += 8) {
        __m128i x = _mm_loadu_si128((const __m128i *)(kept + 2 * next));
        x = _mm_shuffle_epi8(x, _mm_loadu_si128((const __m128i *)moves.bytes[bitmap[i / 8]]));
        _mm_storeu_si128((__m128i *)(to + 2 * i), x);
        next += __builtin_popcount(bitmap[i / 8]);
    }
    for (; width > 2 && i + 8 <= numel && next + 8 <= count; i += 8)
        for (int half = 0; half < width / 4; half++) {
            uint32_t mask = width == 4 ? bitmap[i / 8] : bitmap[i / 8] >> 4 * half & 15;
            uint64_t bytes = lane_bytes(mask, width), back = _pdep_u64(LANES, bytes);
            __m256i order = _mm256_cvtepu8_epi32(_mm_cvtsi64_si128((int64_t)back));
            __m256i set = _mm256_cvtepi8_epi32(_mm_cvtsi64_si128((int64_t)bytes));
            __m256i x = _mm256_loadu_si256((const __m256i *)(kept + next * width));
            x = _mm256_and_si256(_mm256_permutevar8x32_epi32(x, order), set);
            _mm256_storeu_si256((__m256i *)(to + i * width + 32 * half), x);
            next += __builtin_popcount(mask);
        }
#endif
    for (; i < numel && next < count; i++) {
        uint64_t set = bitmap[i / 8] >> i % 8 & 1;
        put(get(kept, next, width) & -set, to, i, width);
        next += (int64_t)set;
    }
    memset(to + i * width, 0, (numel - i) * width);
}

#define BY_WIDTH(call, width) /* call with each width as a constant */ \
    switch (width) {          \
    case 2: call(2); break;   \
    case 4: call(4); break;   \
    case 8: call(8); break;   \
    default: return -1;       \
    }

/* Values, their width, room for a bitmap and for as many values; returns how many are not 0. */
static int64_t pick(const Arg *args)
{
    int64_t width = args[1].whole, count = 0;
    if (width < 1) return -1;
    int64_t numel = args[0].nbytes / width;
    if (numel * width != args[0].nbytes || args[2].nbytes != (numel + 7) / 8
        || args[3].nbytes < args[0].nbytes)
        return -1;
#define PICK(w) count = pick_of(args[0].data, numel, args[2].data, args[3].data, w)
    BY_WIDTH(PICK, width)
    return count;
}

/* A bitmap, values, their width, room for a value a bit (the values may lie at its end); returns how
   many bits are set, and writes nothing where that is not how many values there are. */
static int64_t scatter(const Arg *args)
{
    int64_t width = args[2].whole;
    if (width < 1) return -1;
    int64_t numel = args[3].nbytes / width, count = args[1].nbytes / width;
    if (numel * width != args[3].nbytes || count * width != args[1].nbytes
        || args[0].nbytes != (numel + 7) / 8 || (numel % 8 && args[0].data[numel / 8] >> numel % 8))
        return -1;
    int64_t marked = count_bits(args[0].data, args[0].nbytes);
    if (marked != count) return marked;
#define SPREAD(w) spread_of(args[0].data, args[1].data, count, args[3].data, numel, w)
    BY_WIDTH(SPREAD, width)
    return marked;
}

/* Plane k of values that are turned left by one bit is byte k of each; it is taken from a run of
   values, or added to one, plane 0 first. */
#define PLANES(type, bits)                                                                        \
    ALWAYS void take_plane##bits(const uint8_t *restrict from, int64_t numel, int k,              \
                                 uint8_t *restrict plane)                                         \
    {                                                                                             \
        for (int64_t i = 0; i < numel; i++) {                                                     \
            type x;                                                                               \
            memcpy(&x, from + i * (bits / 8), sizeof x);                                          \
            plane[i] = (uint8_t)(k ? x >> (8 * k - 1) : x << 1 | x >> (bits - 1));                \
        }                                                                                         \
    }                                                                                             \
    ALWAYS void add_plane##bits(const uint8_t *restrict plane, int64_t numel, int k,              \
                                uint8_t *restrict to)                                             \
    {                                                                                             \
        for (int64_t i = 0; i < numel; i++) {                                                     \
            type x = plane[i], held;                                                              \
            memcpy(&held, to + i * (bits / 8), sizeof x);                                         \
            x = (type)(k ? held | x << (8 * k - 1) : x >> 1 | x << (bits - 1));                   \
            memcpy(to + i * (bits / 8), &x, sizeof x);                                            \
        }                                                                                         \
    }                                                                                             \
    ALWAYS void split##bits(const uint8_t *from, int64_t numel, uint8_t *to)                      \
    {                                                                                             \
        for (int64_t i = 0; i < numel; i += GROUP)                                                \
            for (int k = 0; k < bits / 8; k++)                                                    \
                take_plane##bits(from + i * bits / 8, numel - i < GROUP ? numel - i : GROUP, k,   \
                                 to + k * numel + i);                                             \
    }                                                                                             \
    ALWAYS void join##bits(const Arg *planes, int64_t numel, uint8_t *to)                         \
    {                                                                                             \
        for (int64_t i = 0; i < numel; i += GROUP)                                                \
            for (int k = 0; k < bits / 8; k++)                                                    \
                add_plane##bits(planes[k].data + i, numel - i < GROUP ? numel - i : GROUP, k,     \
                                to + i * bits / 8);                                               \
    }

PLANES(uint16_t, 16)
PLANES(uint32_t, 32)
PLANES(uint64_t, 64)

/* Values, their width, room for their planes end to end. */
static int64_t split(const Arg *args)
{
    int64_t width = args[1].whole;
    if (width < 1 || args[0].nbytes % width || args[2].nbytes != args[0].nbytes) return -1;
    int64_t numel = args[0].nbytes / width;
    if (width == 2) split16(args[0].data, numel, args[2].data);
    else if (width == 4) split32(args[0].data, numel, args[2].data);
    else if (width == 8) split64(args[0].data, numel, args[2].data);
    else return -1;
    return 0;
}

/* Eight planes, those from the width on empty, the width, room for the values. */
static int64_t join(const Arg *args)
{
    int64_t width = args[8].whole, numel = args[0].nbytes;
    if (args[9].nbytes != numel * width) return -1;
    for (int k = 0; k < 8; k++)
        if (args[k].nbytes != (k < width ? numel : 0)) return -1;
    if (width == 2) join16(args, numel, args[9].data);
    else if (width == 4) join32(args, numel, args[9].data);
    else if (width == 8) join64(args, numel, args[9].data);
    else return -1;
    return 0;
}

#define PATTERNS 65536
#define ESCAPE 255 /* the rank of values that have none */

/* Values of 2 bytes, room for a count of each pattern, and for 8 bytes of each that occurs: how often,
   times 65,536, plus the pattern, which rises; returns how many patterns occur. */
static int64_t tally(const Arg *args)
{
    if (args[0].nbytes % 2 || args[1].nbytes != 4 * PATTERNS || args[2].nbytes != 8 * PATTERNS
        || (uintptr_t)args[1].data % sizeof(uint32_t))
        return -1;
    uint32_t *counts = (uint32_t *)args[1].data;
    int64_t numel = args[0].nbytes / 2, found = 0;
    memset(counts, 0, 4 * PATTERNS);
    for (int64_t i = 0; i < numel; i++) counts[get(args[0].data, i, 2)]++;
    for (int64_t i = 0; i < PATTERNS; i += 8) {
        uint64_t any = 0;
        for (int k = 0; k < 4; k++) any |= get(args[1].data + 4 * i, k, 8);
        for (int64_t p = i; any && p < i + 8; p++) {
            put((uint64_t)counts[p] << 16 | (uint64_t)p, args[2].data, found, 8);
            found += counts[p] != 0;
        }
    }
    return found;
}

/* Values of 2 bytes, the rank of each pattern, room for a rank a value, and for all values that have
   none, in order; returns how many those are. */
static int64_t rank(const Arg *args)
{
    int64_t numel = args[0].nbytes / 2, room = args[3].nbytes / 2, escaped = 0;
    if (args[0].nbytes != 2 * numel || args[1].nbytes != PATTERNS || args[2].nbytes != numel) return -1;
    const uint8_t *restrict values = args[0].data, *restrict rank_of = args[1].data;
    uint8_t *restrict ranks = args[2].data, *restrict escapes = args[3].data;
    for (int64_t i = 0; i < numel; i++) {
        uint64_t value = get(values, i, 2);
        uint8_t found = rank_of[value];
        ranks[i] = found;
        if (__builtin_expect(found == ESCAPE, 0)) {
            if (escaped == room) return -1;
            put(value, escapes, escaped++, 2);
        }
    }
    return escaped;
}

/* How many ranks are ESCAPE, and one more than the largest of the others; 0 if there is none. */
ALWAYS void count_ranks(const uint8_t *ranks, int64_t numel, int64_t *escaped, int64_t *most)
{
    typedef uint8_t bytes __attribute__((vector_size(32)));
    *escaped = *most = 0;
    for (int64_t i = 0; i < numel;) {
        bytes found = {0}, largest = {0}, next;
        for (int turn = 0; turn < 255 && i < numel; turn++, i += 32) {
            memset(&next, ESCAPE, 32);
            if (numel - i < 32) memcpy(&next, ranks + i, numel - i);
            else memcpy(&next, ranks + i, 32);
            next += 1; /* ESCAPE gets 0 */
            found -= (bytes)(next == 0);
            bytes more = (bytes)(next > largest);
            largest = (next & more) | (largest & ~more);
        }
        for (int k = 0; k < 32; k++) {
            *escaped += found[k];
            *most = largest[k] > *most ? largest[k] : *most;
        }
    }
    *escaped -= -numel & 31; /* those that filled up the last turn */
}

/* Ranks, the values that have some and then those that have none, how many have one, room for a value a
   rank. Returns how many ranks are ESCAPE, more than all where one has no value; writes nothing where
   those that have none are not as many. */
static int64_t unrank(const Arg *args)
{
    int64_t numel = args[0].nbytes, ranked = args[2].whole, escaped, most;
    const uint8_t *restrict ranks = args[0].data, *restrict values = args[1].data;
    uint8_t *restrict to = args[3].data;
    if (ranked < 0 || ranked > ESCAPE || args[1].nbytes < 2 * ranked || args[3].nbytes != 2 * numel)
        return -1;
    count_ranks(ranks, numel, &escaped, &most);
    if (most > ranked) return numel + 1;
    if (args[1].nbytes != 2 * (ranked + escaped)) return escaped;
    uint16_t table[ESCAPE + 1] = {0};
    memcpy(table, values, 2 * ranked);
    for (int64_t i = 0, next = ranked; i < numel; i++) {
        uint64_t value = table[ranks[i]];
        if (__builtin_expect(ranks[i] == ESCAPE, 0)) value = get(values, next++, 2);
        put(value, to, i, 2);
    }
    return escaped;
}
