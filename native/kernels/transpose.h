// Transposition of a square of floats in registers.
#pragma once
#include "vec.h"

#include <utility>

namespace wkv::WKV_ISA {

// One stage: exchanges blocks of D lanes between two vectors.
template <int D, int... I>
WKV_INLINE void exchange(Vec<float>& a, Vec<float>& b, std::integer_sequence<int, I...>) {
  constexpr int W = LANES<float>;
  const Vec<float> low = __builtin_shufflevector(a, b, (I & D ? I - D + W : I)...);
  const Vec<float> high = __builtin_shufflevector(a, b, (I & D ? I + W : I + D)...);
  a = low;
  b = high;
}

template <int D = LANES<float> / 2>
WKV_INLINE void transpose(Vec<float> v[LANES<float>]) {
  for (int i = 0; i < LANES<float>; ++i)
    if ((i & D) == 0) exchange<D>(v[i], v[i + D], std::make_integer_sequence<int, LANES<float>>{});
  if constexpr (D > 1) transpose<D / 2>(v);
}

// The sum of every vector, one per lane.
WKV_INLINE Vec<float> sums_of(const Vec<float> vectors[LANES<float>]) {
  Vec<float> v[LANES<float>];
  std::memcpy(v, vectors, sizeof v);
  transpose(v);
  for (int width = LANES<float> / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) v[i] += v[i + width];
  return v[0];
}

}  // namespace wkv::WKV_ISA
