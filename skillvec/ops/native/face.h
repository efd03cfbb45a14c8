/* What module.c and the kernels know of each other. */

#ifndef SKILLVEC_FACE_H
#define SKILLVEC_FACE_H

#include <stdint.h>

/* One argument: a buffer (which may start at any address), an integer or a float. */
typedef struct { uint8_t *data; int64_t nbytes, whole; double real; } Arg;
typedef int64_t (*Kernel)(const Arg *args);
typedef struct { const char *name, *takes; Kernel run; } Entry;

#endif
