/* SPDX-FileCopyrightText: blockgraph contributors */
/* SPDX-License-Identifier: MIT */
/*
 * The Python module blockgraph._requests: requests of an extent map (extent_map.h), each in one call.
 *
 *     requests = Requests(address of the bg_map, the object that keeps it)
 *     requests.pread_into(offset, buffer)     as bg_map_pread
 *     requests.pwrite(offset, buffer)         as bg_map_pwrite
 *     requests.pread(offset, length)          the bytes; or as bg_map_pread, when that is not 0
 *
 * All else goes through cffi, where a request takes two calls and an object to hold the buffer: 4 KiB in memory 0.68 us, here
 * 0.34, with os.preadv 0.32. The module shares a file with cffi's, because the map's functions are nobody else's.
 *
 * Units:     bytes, from the disk's start; the buffer's length is the request's. Who asks for bytes has checked how many.
 * Ownership: the owner is kept as long as the Requests are, the buffer for the request.
 * Errno:     0, BG_MAP_MISS, or -errno; an integer out of all bounds is -EINVAL, as any offset that is not on the disk. What is no
 *            integer or no buffer, not contiguous, or for pread_into not writable, raises TypeError or BufferError.
 * Threads:   any. The GIL is not held while the storage works.
 */
#define Py_LIMITED_API 0x030B0000
#include <Python.h>

#include "extent_map.h"

typedef struct {
    PyObject_HEAD
    bg_map *map;
    PyObject *owner;
} requests;

static PyObject *requests_new(PyTypeObject *type, PyObject *args, PyObject *keywords)
{
    unsigned long long address;
    PyObject *owner;
    static char *names[] = {"map", "owner", NULL};
    if (!PyArg_ParseTupleAndKeywords(args, keywords, "KO:Requests", names, &address, &owner))
        return NULL;
    requests *self = (requests *)((allocfunc)PyType_GetSlot(type, Py_tp_alloc))(type, 0);
    if (!self)
        return NULL;
    self->map = (bg_map *)(uintptr_t)address;
    self->owner = Py_NewRef(owner);
    return (PyObject *)self;
}

static void requests_free(PyObject *self)
{
    PyTypeObject *type = Py_TYPE(self);
    Py_DECREF(((requests *)self)->owner);
    ((freefunc)PyType_GetSlot(type, Py_tp_free))(self);
    Py_DECREF(type);
}

/* -1 with an exception when it is none. */
static int64_t offset_from(PyObject *integer)
{
    /* The first takes a tenth of the other's time where the integer has more than 30 bits. */
    int64_t offset = sizeof(long) == sizeof(int64_t) ? PyLong_AsLong(integer) : PyLong_AsLongLong(integer);
    if (offset == -1 && PyErr_Occurred() && PyErr_ExceptionMatches(PyExc_OverflowError))
        PyErr_Clear();
    return offset;
}

static PyObject *request(PyObject *self, PyObject *const *args, Py_ssize_t count, bool write)
{
    bg_map *map = ((requests *)self)->map;
    if (count != 2)
        return PyErr_Format(PyExc_TypeError, "takes an offset and a buffer, not %zd arguments", count);
    int64_t offset = offset_from(args[0]);
    Py_buffer buffer;
    if ((offset == -1 && PyErr_Occurred()) || PyObject_GetBuffer(args[1], &buffer, write ? PyBUF_SIMPLE : PyBUF_WRITABLE) < 0)
        return NULL;
    int ret;
    Py_BEGIN_ALLOW_THREADS
    ret = write ? bg_map_pwrite(map, offset, buffer.buf, buffer.len) : bg_map_pread(map, offset, buffer.buf, buffer.len);
    Py_END_ALLOW_THREADS
    PyBuffer_Release(&buffer);
    return PyLong_FromLong(ret);
}

static PyObject *requests_pread_into(PyObject *self, PyObject *const *args, Py_ssize_t count)
{
    return request(self, args, count, false);
}

static PyObject *requests_pwrite(PyObject *self, PyObject *const *args, Py_ssize_t count)
{
    return request(self, args, count, true);
}

static PyObject *requests_pread(PyObject *self, PyObject *const *args, Py_ssize_t count)
{
    bg_map *map = ((requests *)self)->map;
    if (count != 2)
        return PyErr_Format(PyExc_TypeError, "takes an offset and a length, not %zd arguments", count);
    int64_t offset = offset_from(args[0]);
    Py_ssize_t length = offset == -1 && PyErr_Occurred() ? -1 : PyLong_AsSsize_t(args[1]);
    if (length == -1 && PyErr_Occurred())
        return NULL;
    PyObject *bytes = PyBytes_FromStringAndSize(NULL, length); /* SystemError when negative */
    if (!bytes)
        return NULL;
    char *buf = PyBytes_AsString(bytes);
    int ret;
    Py_BEGIN_ALLOW_THREADS
    ret = bg_map_pread(map, offset, buf, length);
    Py_END_ALLOW_THREADS
    if (ret == 0)
        return bytes;
    Py_DECREF(bytes);
    return PyLong_FromLong(ret);
}

static PyMethodDef methods[] = {
    {"pread", (PyCFunction)(void (*)(void))requests_pread, METH_FASTCALL, NULL},
    {"pread_into", (PyCFunction)(void (*)(void))requests_pread_into, METH_FASTCALL, NULL},
    {"pwrite", (PyCFunction)(void (*)(void))requests_pwrite, METH_FASTCALL, NULL},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot slots[] = {
    {Py_tp_new, requests_new},
    {Py_tp_dealloc, requests_free},
    {Py_tp_methods, methods},
    {0, NULL},
};

static PyType_Spec spec = {"blockgraph._requests.Requests", sizeof(requests), 0, Py_TPFLAGS_DEFAULT, slots};

static int fill(PyObject *module)
{
    PyObject *type = PyType_FromSpec(&spec);
    int ret = type ? PyModule_AddObjectRef(module, "Requests", type) : -1;
    Py_XDECREF(type);
    return ret;
}

static PyModuleDef_Slot module_slots[] = {{Py_mod_exec, fill}, {0, NULL}};
static PyModuleDef module = {PyModuleDef_HEAD_INIT, "blockgraph._requests", NULL, 0, NULL, module_slots, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__requests(void)
{
    return PyModuleDef_Init(&module);
}
