/* Inner products by groups of neighbours. */

ALWAYS double product64(const void *a, const void *b, int64_t i, int64_t end, int da, int db)
{
    row64 sum = {0};
    for (; i + ROW <= end; i += ROW)
        add_products64(&sum, widened(load(a, i, da)), widened(load(b, i, db)));
    if (i < end)
        add_products64(&sum, widened(load_end(a, i, end, da)), widened(load_end(b, i, end, db)));
    return folded64(sum);
}

ALWAYS void products_of(const void *a, const void *b, int64_t size, int64_t width, int da, int db,
                        uint8_t *out)
{
    for (int64_t begin = 0; begin < size; begin += width) {
        int64_t end = width < size - begin ? begin + width : size, i = begin;
        row32 sum = {0};
        for (; i + ROW <= end; i += ROW) add_products(&sum, load(a, i, da), load(b, i, db));
        if (i < end) add_products(&sum, load_end(a, i, end, da), load_end(b, i, end, db));
        double whole = folded(sum);
        if (!is_settled(whole)) whole = product64(a, b, begin, end, da, db);
        memcpy(out, &whole, sizeof whole);
        out += sizeof whole;
    }
}

/* Arrays a and b, the width of a group, their dtypes (no F64), and room for a double a group. */
static int64_t group_products(const Arg *args)
{
    int64_t width = args[2].whole, da = args[3].whole, db = args[4].whole;
    int64_t size = args[0].nbytes / itemsize(da);
    if (width < 1 || da < BF16 || da > F32 || db < BF16 || db > F32
        || size * itemsize(da) != args[0].nbytes || size * itemsize(db) != args[1].nbytes
        || args[5].nbytes != (size / width + (size % width != 0)) * 8)
        return -1;
    if (width > size) width = size;
    uint8_t *out = args[5].data;
    if (da == BF16 && db == BF16) products_of(args[0].data, args[1].data, size, width, BF16, BF16, out);
    else products_of(args[0].data, args[1].data, size, width, da, db, out);
    return 0;
}
