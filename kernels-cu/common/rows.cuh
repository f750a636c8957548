// Rows that are moved as they are, named by an index.
#pragma once
#include "groups.cuh"
#include "pack.cuh"

// Moves rows of `width` elements: `f(word, words)` gets what they consist of, and how many of that. Words are vectors
// where all rows are aligned to them, else elements.
template <typename T, typename F>
INLINE void in_words(u32 width, const F& f) {
    if (width % WIDTH<T> == 0) f(Vec16{}, width / WIDTH<T>);
    else f(T{}, width);
}

// A pointer to rows as one to their words.
template <typename Word, typename T>
INLINE Word* words_of(T* rows) { return reinterpret_cast<Word*>(rows); }

template <typename Word, typename T>
INLINE const Word* words_of(const T* rows) { return reinterpret_cast<const Word*>(rows); }

// Whether an index names one of `rows` rows.
INLINE bool names(int index, u32 rows) { return index >= 0 && u32(index) < rows; }
