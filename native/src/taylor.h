// Linear attention of features, and its Taylor form with the features of 1 + s + s^2 / 2: what one call is made of.
// F is the size of a query or key, E the number of features, N the size of a value; the state is kv [N, E] and z [E].
#pragma once
#include <cstdint>

#include "matrix.h"

namespace wkv {

constexpr int64_t TAYLOR_CHUNK = 64;  // tokens that meet each other directly; a state is kept before each chunk

enum TaylorName { TAYLOR_Q, TAYLOR_K, TAYLOR_V, TAYLOR_DY, TAYLOR_COUNT };

struct TaylorCall {
  int64_t batch, time, heads, size, values;
  bool taylor;           // q and k go through the feature map, else they are features
  bool wide;             // compute in double, else in float; states have the compute type
  double root, eps;      // the square root of the scale; what the denominator gets
  const uint8_t* mask;   // [B, T] or null: 0 where a token does not exist
  const uint8_t* reset;  // [B, T] or null: the state is emptied before these tokens
  Tensor inputs[TAYLOR_COUNT];     // q, k [B, T, H, F]; v, dy [B, T, H, N]
  Tensor gradients[TAYLOR_COUNT];  // of q, k and v
  Tensor y;
  const void *kv, *z;  // [B, H, N, E] and [B, H, E]: initial state or final gradient; null: zeros
  void *out_kv, *out_z;  // final state or initial gradient
  void* starts;          // [chunks, B, H, E, padded(N) + 1]: the states before each chunk; null: not kept

  int64_t features() const { return taylor ? 1 + size + size * (size + 1) / 2 : size; }
  int64_t row(TaylorName name) const { return name < TAYLOR_V ? size : values; }
  int64_t start_numbers() const { return features() * (padded(values) + 1); }
};

// Numbers of the compute type that one head may use, forward or backward (kernels/taylor_chunk.h hands them out).
inline int64_t taylor_scratch(const TaylorCall& call) {
  const int64_t F = padded(call.size), N = padded(call.values), E = padded(call.features());
  return TAYLOR_CHUNK * (4 * F + 3 * E + 5 * N + 4 * TAYLOR_CHUNK + 4) + 2 * E * (N + 1) + 2 * E + F + N;
}

}  // namespace wkv
