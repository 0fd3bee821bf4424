# Memory for results. What a large one frees is kept for the next of its size: the pages of fresh memory, which the system
# clears first, cost more than most of what is computed into them (docs/performance.md).
#
# Arrays get it by NumPy's own way (NEP 49): each remembers the handler that made it and gives its memory back to it. They own
# their memory like others, and where a program has a handler of its own for its arrays, that one serves.
#
# What is kept beyond the newest blocks is marked as free to take (MADV_FREE), by whole huge pages: the system does so, without
# a word, when memory is short, and fresh pages come in their place. The newest are not marked: each huge page of a mark
# interrupts the other processors (0.8 ms for 100 MB).
#
# NumPy makes and frees its arrays' memory under the interpreter's lock: nothing else is needed. Arrays are freed while an exception
# is on its way, too: take, keep and what they call touch no Python object.

cimport numpy as np
from libc.string cimport memmove, strcpy
from cpython.pycapsule cimport PyCapsule_GetPointer, PyCapsule_New

import os
from pathlib import Path

np.import_array()

cdef extern from *:
    """
    #if defined(__unix__) || defined(__APPLE__)
    #include <sys/mman.h>
    #endif
    #include <stdint.h>
    #define HUGE_PAGE ((uintptr_t)1 << 21)

    /* Whole huge pages alone: to free a part of one would break it up. */
    static void may_be_taken(void *memory, size_t size) {
    #ifdef MADV_FREE
        uintptr_t from = ((uintptr_t)memory + HUGE_PAGE - 1) & ~(HUGE_PAGE - 1);
        uintptr_t to = ((uintptr_t)memory + size) & ~(HUGE_PAGE - 1);
        if (from < to)
            (void)madvise((void *)from, to - from, MADV_FREE);
    #else
        (void)memory, (void)size;
    #endif
    }
    """
    void may_be_taken(void *memory, size_t size) noexcept nogil

cdef extern from "numpy/arrayobject.h":
    void *PyDataMem_DefaultHandler  # a PyObject *
    object PyArray_NewLikeArray(np.ndarray prototype, np.NPY_ORDER order, void *descr, int subok)

cdef enum:
    LEAST = 1 << 22  # bytes: from there on NumPy asks for huge pages
    NEWEST = 1 << 28  # bytes that are not marked, or an eighth of what may be kept, if that is less
    SLOTS = 256

cdef struct block_t:
    void *memory
    size_t size
    bint marked

cdef block_t[SLOTS] blocks  # the oldest first
cdef int count = 0
cdef size_t total = 0
cdef size_t most = 0

cdef object numpys = <object>PyDataMem_DefaultHandler
cdef np.PyDataMem_Handler handler = (<np.PyDataMem_Handler *>PyCapsule_GetPointer(numpys, "mem_handler"))[0]
cdef np.PyDataMemAllocator usual = handler.allocator
strcpy(handler.name, "fastbn_results")
handler.allocator.malloc = take
handler.allocator.free = keep
cdef object ours = PyCapsule_New(&handler, "mem_handler", NULL)


cdef void *drop(int i) noexcept:
    """Takes the i-th block out; it is the caller's."""
    global count, total
    cdef void *memory = blocks[i].memory
    total -= blocks[i].size
    count -= 1
    memmove(&blocks[i], &blocks[i + 1], (count - i) * sizeof(block_t))
    return memory


cdef void free_oldest() noexcept:
    cdef size_t size = blocks[0].size
    usual.free(usual.ctx, drop(0), size)


cdef void mark_old() noexcept:
    cdef size_t newer = 0
    cdef int i
    for i in range(count - 1, -1, -1):
        newer += blocks[i].size
        if newer > min(<size_t>NEWEST, most // 8) and not blocks[i].marked:
            may_be_taken(blocks[i].memory, blocks[i].size)
            blocks[i].marked = True


cdef void *take(void *ctx, size_t size) noexcept:
    cdef int i
    for i in range(count - 1, -1, -1):  # the last freed is the likeliest to lie in cache
        if blocks[i].size == size:
            return drop(i)
    cdef void *memory = usual.malloc(usual.ctx, size)
    while memory == NULL and count > 0:  # a limit on the address space, of which what is kept takes some
        free_oldest()
        memory = usual.malloc(usual.ctx, size)
    return memory


cdef void keep(void *ctx, void *memory, size_t size) noexcept:
    global count, total
    if memory == NULL or size < LEAST or size > most:
        usual.free(usual.ctx, memory, size)
        return
    while count == SLOTS or total + size > most:
        free_oldest()
    blocks[count].memory, blocks[count].size, blocks[count].marked = memory, size, False
    count += 1
    total += size
    mark_old()


def output_like(np.ndarray x):
    """As `numpy.empty_like`, and always a plain ndarray."""
    if np.PyArray_NBYTES(x) < LEAST or np.PyDataMem_GetHandler() is not numpys:
        return PyArray_NewLikeArray(x, np.NPY_KEEPORDER, NULL, 0)
    np.PyDataMem_SetHandler(ours)
    try:
        return PyArray_NewLikeArray(x, np.NPY_KEEPORDER, NULL, 0)
    finally:
        np.PyDataMem_SetHandler(numpys)


def set_kept(size_t bytes):
    """At most that many bytes are kept from here on."""
    global most
    most = bytes
    while total > most:
        free_oldest()
    mark_old()


def kept():
    """How many bytes are kept now, and how many may be."""
    return total, most


def usable():
    """Bytes of memory that this process may use, by the machine, the control group and its own limits; 0 if nothing says it."""
    try:
        import resource

        least = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ImportError, AttributeError, OSError, ValueError):
        return 0
    for name in ("RLIMIT_AS", "RLIMIT_DATA"):
        limit = resource.getrlimit(getattr(resource, name))[0] if hasattr(resource, name) else resource.RLIM_INFINITY
        if limit != resource.RLIM_INFINITY:
            least = min(least, limit)
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        try:
            least = min(least, int(Path("/sys/fs/cgroup", name).read_text()))
        except (OSError, ValueError):  # no such group, or "max"
            continue
    return max(0, least)


set_kept(usable() // 8)
