// Several arrays of any lengths, shared out to the whole grid as if they lay behind one another.
#pragma once
#include "lots.cuh"

// Calls f(lot, i) for the lots of this thread in an array of `count` elements. `lot` is the first of them: for the first
// array the thread's number in the grid, afterwards the one in the array behind it. What is left over is a lot too, taken
// one by one.
template <int N, typename F>
INLINE void for_lots_of_next(u32& lot, u32 count, F f) {
    const u32 threads = gridDim.x * blockDim.x, whole = count / N, lots = (count + N - 1) / N;
    for (; lot < whole; lot += threads) f(Lot<N>{}, lot * N);
    if (lot < lots) {
#pragma unroll 1
        for (u32 i = whole * N; i < count; i++) f(Lot<1>{}, i);
        lot += threads;
    }
    lot -= lots;
}
