// Rows that are moved as they are, named by an index.
#pragma once
#include "groups.cuh"
#include "pack.cuh"

// How rows of `width` elements are moved: as vectors where all of them are aligned, else by elements.
template <typename T>
INLINE bool in_vectors(u32 width) {
    return width % WIDTH<T> == 0;
}

// Whether an index names one of `rows` rows.
INLINE bool names(int index, u32 rows) { return index >= 0 && u32(index) < rows; }
