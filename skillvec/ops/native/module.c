/* The face of the kernels to Python: tables of functions on buffers, for each instruction set.

   A kernel's arguments are spelt by a string: r a buffer to read, w one to write, q an integer, d a
   float. Buffers are held, and the interpreter's lock is released, while it runs. A kernel checks
   itself that buffers have the sizes it needs; a negative result is a ValueError here. */

#define Py_LIMITED_API 0x030B0000
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "face.h"

#include <string.h>
#if defined(__x86_64__)
#include <cpuid.h>
#endif

#define MOST 24

extern const Entry kernels_avx2[], kernels_avx512[], kernels_neon[];

static int runs_here(const char *isa)
{
#if defined(__x86_64__)
    unsigned a, b, c = 0, d; /* not every compiler knows the name f16c */
    __builtin_cpu_init();
    int avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")
               && __builtin_cpu_supports("bmi2") && __get_cpuid(1, &a, &b, &c, &d) && c & bit_F16C;
    if (!strcmp(isa, "avx2")) return avx2;
    return avx2 && !strcmp(isa, "avx512") && __builtin_cpu_supports("avx512f")
           && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512cd")
           && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")
           && __builtin_cpu_supports("avx512vbmi2");
#else
    return !strcmp(isa, "neon");
#endif
}

static uint8_t nothing[1]; /* an empty buffer may have no address */

static PyObject *call(PyObject *capsule, PyObject *const *given, Py_ssize_t count)
{
    const Entry *entry = PyCapsule_GetPointer(capsule, NULL);
    if (entry == NULL) return NULL;
    Py_ssize_t wanted = (Py_ssize_t)strlen(entry->takes), held = 0;
    Py_buffer views[MOST];
    Arg args[MOST] = {0};
    int is_held[MOST] = {0};
    int64_t result = -1;
    if (count != wanted || count > MOST) {
        PyErr_Format(PyExc_TypeError, "%s takes %zd arguments, not %zd", entry->name, wanted, count);
        return NULL;
    }
    for (; held < count; held++) {
        char kind = entry->takes[held];
        if (kind == 'q') args[held].whole = PyLong_AsLongLong(given[held]);
        else if (kind == 'd') args[held].real = PyFloat_AsDouble(given[held]);
        else {
            int flags = kind == 'w' ? PyBUF_WRITABLE : PyBUF_SIMPLE;
            if (PyObject_GetBuffer(given[held], &views[held], flags) < 0) break;
            is_held[held] = 1;
            args[held].data = views[held].buf ? views[held].buf : nothing;
            args[held].nbytes = views[held].len;
        }
        if (PyErr_Occurred()) break;
    }
    if (held == count) {
        Py_BEGIN_ALLOW_THREADS
        result = entry->run(args);
        Py_END_ALLOW_THREADS
        if (result < 0)
            PyErr_Format(PyExc_ValueError, "%s: its buffers do not fit together", entry->name);
    }
    for (Py_ssize_t i = 0; i < count; i++)
        if (is_held[i]) PyBuffer_Release(&views[i]);
    return PyErr_Occurred() ? NULL : PyLong_FromLongLong(result);
}

static PyMethodDef call_def = {"kernel", (PyCFunction)(void (*)(void))call, METH_FASTCALL, NULL};

static PyObject *kernels(PyObject *module, PyObject *isa)
{
    (void)module;
    const Entry *entry = NULL;
    PyObject *name = PyUnicode_AsUTF8String(isa), *found = name ? PyDict_New() : NULL;
    const char *text = name ? PyBytes_AsString(name) : NULL;
    if (found != NULL && text != NULL && runs_here(text)) {
#if defined(__x86_64__)
        entry = strcmp(text, "avx2") ? kernels_avx512 : kernels_avx2;
#else
        entry = kernels_neon;
#endif
    }
    for (; found != NULL && entry != NULL && entry->name != NULL; entry++) {
        PyObject *capsule = PyCapsule_New((void *)entry, NULL, NULL);
        PyObject *function = capsule ? PyCFunction_NewEx(&call_def, capsule, NULL) : NULL;
        if (function == NULL || PyDict_SetItemString(found, entry->name, function) < 0)
            Py_CLEAR(found);
        Py_XDECREF(function);
        Py_XDECREF(capsule);
    }
    Py_XDECREF(name);
    return found;
}

static PyMethodDef methods[] = {
    {"kernels", kernels, METH_O, "Return the kernels of an instruction set by name; {} if not here."},
    {NULL, NULL, 0, NULL},
};
/* in two phases and without a state: each interpreter that shares the lock may have its own */
static PyModuleDef_Slot slots[] = {{0, NULL}};
static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_native", NULL, 0, methods, slots,
                                        NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__native(void) { return PyModuleDef_Init(&definition); }
