// What queries see: an interval of the keys of a cache.
#pragma once
#include "ptx.cuh"

// The keys that query `at` sees: x <= key < y, 0..0 where that is nothing.
INLINE int2 interval(const int* row_start, const int* row_end, u64 at, u32 keys) {
    const int start = max(row_start[at], 0), end = min(row_end[at], int(keys));
    return start < end ? make_int2(start, end) : make_int2(0, 0);
}

INLINE bool sees(int2 seen, int key) { return key >= seen.x && key < seen.y; }

// The cache that batch row `b` reads, or -1; without caches its own keys.
INLINE int cache_of(const int* slots, u32 caches, int b) {
    if (caches == 0) return b;
    const int slot = slots[b];
    return slot >= 0 && slot < int(caches) ? slot : -1;
}
