// The mask of attention.
#pragma once
#include "ptx.cuh"

// The keys that query `at` sees: x <= key < y, 0..0 where that is nothing.
INLINE int2 interval(const int* row_start, const int* row_end, u64 at, u32 keys) {
    const int start = max(row_start[at], 0), end = min(row_end[at], int(keys));
    return start < end ? make_int2(start, end) : make_int2(0, 0);
}

INLINE bool sees(int2 seen, int key) { return key >= seen.x && key < seen.y; }
