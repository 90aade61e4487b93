// One head of an RWKV-7 layer: from the projections to the gated output (see kernels/rwkv7_head.cpp).
#pragma once
#include <cstdint>

namespace wkv {

// All pointers are already those of the head's first channel; rows are `stride` floats apart.
struct Rwkv7Head {
  int64_t size, stride;
  bool first_layer;
  float eps;
  // Per channel.
  const float *w0, *a0, *v0, *k_k, *k_a, *r_k, *norm_weight, *norm_bias;
  // Per row: projections, the outputs of the low-rank maps, the first layer's values (written in the first layer).
  const float *r, *k, *w, *a, *v_mix, *g;
  float *v, *first_value, *y;
};

}  // namespace wkv
