/* All kernels for one instruction set: compiled once for each, KERNELS being the table's name. */

#include "tiles.h"

#include "sums.c"
#include "pairs.c"
#include "compare.c"

extern const Entry KERNELS[];
const Entry KERNELS[] = {
    {"group_products", "rrqqqw", group_products},
    {"subtract", "rrqqqqwwww", subtract},
    {"add", "rrrrqqqdwqqw", add},
    {"pair_sums", "rqrrrqrrrqww", pair_sums},
    {"vector_sums", "rqrrrqw", vector_sums},
    {"flipped_sums", "rrw", flipped_sums},
    {NULL, NULL, NULL},
};
