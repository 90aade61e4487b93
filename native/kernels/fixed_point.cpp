// Activations to 15-bit fixed point (see FixedRow).
#include "vec.h"
#include "weights.h"

#include <algorithm>

namespace wkv::WKV_ISA {
namespace {

constexpr int W = LANES<float>;
typedef int16_t Shorts __attribute__((vector_size(VECTOR_BYTES / 2)));
typedef int8_t Bytes __attribute__((vector_size(VECTOR_BYTES / 4)));

// The largest magnitude of x [k]; NaN if any value is NaN or infinite.
float largest_of(const float* x, int64_t k) {
  Vec<float> most = {}, poison = {};
  int64_t i = 0;
  for (; i + W <= k; i += W) {
    const Vec<float> v = load(x + i);
    most = vmax(most, vmax(v, -v));
    poison += v * 0.0f;
  }
  float largest = 0, bad = sum<float>(poison);
  for (int lane = 0; lane < W; ++lane) largest = std::max(largest, most[lane]);
  for (; i < k; ++i) {
    largest = std::max(largest, std::fabs(x[i]));
    bad += x[i] * 0.0f;
  }
  return largest + bad;
}

}  // namespace

// x [K] -> the block `out`. A row with NaN or infinite values gets a NaN scale, and with it every product.
void to_fixed_point(const float* x, int64_t k, char* out) {
  const FixedLayout layout(k);
  int8_t* high = reinterpret_cast<int8_t*>(out + layout.high);
  int8_t* low = reinterpret_cast<int8_t*>(out + layout.low);
  int16_t* both = reinterpret_cast<int16_t*>(out + layout.both);
  int32_t* groups = reinterpret_cast<int32_t*>(out + layout.groups);
  int32_t* blocks = reinterpret_cast<int32_t*>(out + layout.blocks);

  const float largest = largest_of(x, k);
  // 32512 = 127 * 256, so that both halves stay within int8.
  *reinterpret_cast<float*>(out) = largest / 32512.0f;
  const float inverse = largest > 0 ? 32512.0f / largest : 0.0f;
  const auto store_codes = [&](int64_t i, Vec<float> v) {
    // 1.5 * 2^23 added rounds to the nearest integer and leaves it in the low bits.
    const Vec<float> shifted = v * inverse + 12582912.0f;
    typename Lanes<float>::integer code;
    std::memcpy(&code, &shifted, sizeof code);
    code -= 0x4B400000;
    const auto h = (code + 128) >> 8;
    const Shorts s = __builtin_convertvector(code, Shorts);
    const Bytes upper = __builtin_convertvector(h, Bytes), lower = __builtin_convertvector(code - (h << 8), Bytes);
    std::memcpy(both + i, &s, sizeof s);
    std::memcpy(high + i, &upper, sizeof upper);
    std::memcpy(low + i, &lower, sizeof lower);
  };
  int64_t i = 0;
  if (inverse > 0)
    for (; i + W <= k; i += W) store_codes(i, load(x + i));
  for (; i < layout.cols; i += W) {
    Vec<float> rest = {};
    for (int lane = 0; lane < W && i + lane < k && inverse > 0; ++lane) rest[lane] = x[i + lane];
    store_codes(i, rest);
  }
  for (int64_t b = 0; b * INT8_BLOCK < layout.cols; ++b) blocks[2 * b] = blocks[2 * b + 1] = 0;
  for (int64_t g = 0; g < layout.cols / GROUP; ++g) {
    int32_t sum_high = 0, sum_low = 0;
    for (int j = 0; j < GROUP; ++j) {
      sum_high += high[g * GROUP + j];
      sum_low += low[g * GROUP + j];
    }
    groups[g] = 8 * (256 * sum_high + sum_low);
    int32_t* block = blocks + g * GROUP / INT8_BLOCK * 2;
    block[0] += 128 * sum_high;
    block[1] += 128 * sum_low;
  }
}

}  // namespace wkv::WKV_ISA
