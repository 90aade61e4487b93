// Activations to 15-bit fixed point (see FixedRow).
#include "weights.h"
#include "vec.h"

#include <algorithm>

namespace wkv::WKV_ISA {

// x [K] -> the block `out`; returns nothing, never fails: an infinite or NaN input gives a NaN scale.
void to_fixed_point(const float* x, int64_t k, char* out) {
  const FixedLayout layout(k);
  float* scale = reinterpret_cast<float*>(out);
  int8_t* high = reinterpret_cast<int8_t*>(out + layout.high);
  int8_t* low = reinterpret_cast<int8_t*>(out + layout.low);
  int16_t* both = reinterpret_cast<int16_t*>(out + layout.both);
  int32_t* sums = reinterpret_cast<int32_t*>(out + layout.sums);

  float largest = 0, poison = 0;
  for (int64_t i = 0; i < k; ++i) {
    largest = std::max(largest, std::fabs(x[i]));
    poison += x[i] * 0.0f;
  }
  // 32512 = 127 * 256, so that both halves stay within int8.
  *scale = largest / 32512.0f + poison;
  const float inverse = largest > 0 && poison == 0 ? 32512.0f / largest : 0.0f;
  for (int64_t i = 0; i < k; ++i) {
    // Adding and taking away 1.5 * 2^23 rounds to the nearest integer.
    const float magic = 12582912.0f;
    const float rounded = (x[i] * inverse + magic) - magic;
    both[i] = static_cast<int16_t>(poison == 0 ? rounded : 0.0f);
  }
  for (int64_t i = k; i < layout.cols; ++i) both[i] = 0;
  for (int64_t i = 0; i < layout.cols; ++i) {
    const int h = (both[i] + 128) >> 8;
    high[i] = static_cast<int8_t>(h);
    low[i] = static_cast<int8_t>(both[i] - 256 * h);
  }
  for (int64_t g = 0; g < layout.cols / GROUP; ++g) {
    int32_t sum_high = 0, sum_low = 0;
    for (int i = 0; i < GROUP; ++i) {
      sum_high += high[g * GROUP + i];
      sum_low += low[g * GROUP + i];
    }
    sums[2 * g] = sum_high;
    sums[2 * g + 1] = sum_low;
  }
}

}  // namespace wkv::WKV_ISA
