// Products of small matrices that lie in the cache: C = A B or C += A B, with A in any layout and rows of B and C whole
// vectors. Every number of C is one sum in the order of the depth, whatever tile it falls into.
#pragma once
#include "vec.h"

namespace wkv::WKV_ISA {

// A(m, k) = data[m * row + k * column]
template <class T>
struct Left {
  const T* data;
  int64_t row, column;
};

template <class T>
struct Rows {
  T* data;
  int64_t stride;
};

constexpr int TILE_HEIGHT = VECTOR_BYTES == 64 ? 12 : VECTOR_BYTES == 32 ? 6 : 4;  // times two vectors of sums

template <int M, int V, class T>
WKV_INLINE void multiply_tile(const Left<T>& a, const Rows<const T>& b, int64_t depth, const Rows<T>& c, bool add) {
  Vec<T> sums[M][V];
  for (int m = 0; m < M; ++m)
    for (int j = 0; j < V; ++j) sums[m][j] = add ? load(c.data + m * c.stride + j * LANES<T>) : Vec<T>{};
  const T *left = a.data, *right = b.data;
  for (int64_t k = 0; k < depth; ++k, left += a.column, right += b.stride) {
    Vec<T> row[V];
    for (int j = 0; j < V; ++j) row[j] = load(right + j * LANES<T>);
#pragma GCC unroll 12
    for (int m = 0; m < M; ++m) {
      const T factor = left[m * a.row];
#pragma GCC unroll 2
      for (int j = 0; j < V; ++j) sums[m][j] += row[j] * factor;
    }
  }
  for (int m = 0; m < M; ++m)
    for (int j = 0; j < V; ++j) store(c.data + m * c.stride + j * LANES<T>, sums[m][j]);
}

// The last rows, fewer than TILE_HEIGHT.
template <int M, int V, class T>
inline void multiply_rest(int64_t rows, const Left<T>& a, const Rows<const T>& b, int64_t depth, const Rows<T>& c,
                          bool add) {
  if constexpr (M > 0) {
    if (rows == M) return multiply_tile<M, V>(a, b, depth, c, add);
    multiply_rest<M - 1, V>(rows, a, b, depth, c, add);
  }
}

template <int V, class T>
inline void multiply_panel(Left<T> a, const Rows<const T>& b, int64_t rows, int64_t depth, Rows<T> c, bool add) {
  for (; rows >= TILE_HEIGHT; rows -= TILE_HEIGHT) {
    multiply_tile<TILE_HEIGHT, V>(a, b, depth, c, add);
    a.data += TILE_HEIGHT * a.row, c.data += TILE_HEIGHT * c.stride;
  }
  multiply_rest<TILE_HEIGHT - 1, V>(rows, a, b, depth, c, add);
}

// C [rows][columns] = A [rows][depth] B [depth][columns], or C += with `add`; `columns` is rounded up to whole vectors.
template <class T>
inline void multiply(Left<T> a, Rows<const T> b, int64_t rows, int64_t depth, int64_t columns, Rows<T> c, bool add) {
  constexpr int64_t W = LANES<T>;
  for (; columns > W; columns -= 2 * W, b.data += 2 * W, c.data += 2 * W) multiply_panel<2>(a, b, rows, depth, c, add);
  if (columns > 0) multiply_panel<1>(a, b, rows, depth, c, add);
}

}  // namespace wkv::WKV_ISA
