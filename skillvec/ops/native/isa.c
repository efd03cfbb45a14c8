/* All kernels for one instruction set: compiled once for each, KERNELS being the table's name. */

#include "tiles.h"

#include "planes.c"
#include "sums.c"
#include "pairs.c"
#include "compare.c"
#include "merge.c"

extern const Entry KERNELS[];
const Entry KERNELS[] = {
    {"join", "rrrrrrrrqw", join},
    {"pick", "rqww", pick},
    {"rank", "rrww", rank},
    {"scatter", "rrqw", scatter},
    {"split", "rqw", split},
    {"tally", "rww", tally},
    {"unrank", "rrqw", unrank},
    {"group_products", "rrqqqw", group_products},
    {"subtract", "rrqqqqwwww", subtract},
    {"add", "rrrrqqqdwqqw", add},
    {"pair_sums", "rqrrrqrrqww", pair_sums},
    {"count_strata", "rqrrrqrrrqw", count_strata},
    {"support_scores", "rrrqrww", support_scores},
    {"vector_sums", "rqrrrqw", vector_sums},
    {"draw", "rqw", draw},
    {"round_randomly", "rrqw", round_randomly},
    {"merge", "wrrqqqrrrrrrrrrrrrrrrrrr", merge},
    {"count_magnitudes", "rrrqww", count_magnitudes},
    {"count_within", "rrrqrw", count_within},
    {"sum_products", "rrrrrrqqqqw", sum_products},
    {NULL, NULL, NULL},
};
