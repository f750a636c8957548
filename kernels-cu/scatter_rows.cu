// Rows put into a table, base[index[r]] = src[r], in place, and the gradient of the rows that stay. An index
// that names no row is unused. Indices name different rows.
//   dbase[n] = dy[n], or 0 where an index names n
// Backward, `mark` writes a one into `marks`, zero before, for every row that is named; `rest` then copies or
// clears.
//
// entry                      grid             block  shared  arguments                   bytes
// scatter_rows_fwd_bf16      min(R/8,8*sms)   256    0       y | src index | R N C |     4RC+4R
// scatter_rows_fwd_f32       min(R/8,8*sms)   256    0       y | src index | R N C |     8RC+4R
// scatter_rows_bwd_mark_i32  R/256            256    0       marks | index | R N |       4R+4R
// scatter_rows_bwd_bf16      min(N/8,8*sms)   256    0       dbase | dy marks | N C |    4NC+4N
// scatter_rows_bwd_f32       min(N/8,8*sms)   256    0       dbase | dy marks | N C |    8NC+4N
//
// Needs   Operands begin at multiples of 16 bytes.
// Rounds  never.
#include "common/rows.cuh"

constexpr int THREADS = 256;

template <typename Word>
INLINE void scatter(Word* y, const Word* src, const int* index, u32 count, u32 rows, u32 words) {
    const Groups groups(words);
    groups.for_rows(count, [&](u32 r, bool there) {
        int n = groups.from_first(there && groups.lane == 0 ? index[r] : -1);
        if (!names(n, rows)) return;
        const Word* from = src + u64(r) * words;
        Word* to = y + u64(n) * words;
        for (u32 w = groups.lane; w < words; w += groups.lanes) to[w] = from[w];
    });
}

template <typename T>
INLINE void forward(T* y, const T* src, const int* index, u32 count, u32 rows, u32 width) {
    in_words<T>(width, [&](auto word, u32 words) {
        using Word = decltype(word);
        scatter(words_of<Word>(y), words_of<Word>(src), index, count, rows, words);
    });
}

template <typename Word>
INLINE void rest(Word* dbase, const Word* dy, const int* marks, u32 rows, u32 words) {
    const Groups groups(words);
    groups.for_rows(rows, [&](u32 n, bool there) {
        const int marked = groups.from_first(there && groups.lane == 0 ? marks[n] : 0);
        if (!there) return;
        const u64 row = u64(n) * words;
        for (u32 w = groups.lane; w < words; w += groups.lanes) dbase[row + w] = marked ? Word{} : dy[row + w];
    });
}

template <typename T>
INLINE void backward(T* dbase, const T* dy, const int* marks, u32 rows, u32 width) {
    in_words<T>(width, [&](auto word, u32 words) {
        using Word = decltype(word);
        rest(words_of<Word>(dbase), words_of<Word>(dy), marks, rows, words);
    });
}

extern "C" __global__ void __launch_bounds__(THREADS)
    scatter_rows_fwd_bf16(bf16* y, const bf16* src, const int* index, u32 count, u32 rows, u32 width) {
    forward(y, src, index, count, rows, width);
}

extern "C" __global__ void __launch_bounds__(THREADS)
    scatter_rows_fwd_f32(float* y, const float* src, const int* index, u32 count, u32 rows, u32 width) {
    forward(y, src, index, count, rows, width);
}

extern "C" __global__ void __launch_bounds__(THREADS)
    scatter_rows_bwd_mark_i32(int* marks, const int* index, u32 count, u32 rows) {
    const u32 r = blockIdx.x * THREADS + threadIdx.x;
    if (r < count && names(index[r], rows)) marks[index[r]] = 1;
}

extern "C" __global__ void __launch_bounds__(THREADS)
    scatter_rows_bwd_bf16(bf16* dbase, const bf16* dy, const int* marks, u32 rows, u32 width) {
    backward(dbase, dy, marks, rows, width);
}

extern "C" __global__ void __launch_bounds__(THREADS)
    scatter_rows_bwd_f32(float* dbase, const float* dy, const int* marks, u32 rows, u32 width) {
    backward(dbase, dy, marks, rows, width);
}
