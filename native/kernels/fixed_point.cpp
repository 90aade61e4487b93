// Activations to 15-bit fixed point (see FixedRow).
#include "integer_dot.h"

#include <algorithm>

namespace wkv::WKV_ISA {
namespace {

constexpr int W = LANES<float>;
using Integers = typename Lanes<float>::integer;
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

// The sum of the lanes; below 2^24, so that floats hold it.
WKV_INLINE int32_t total_of(Integers v) {
  return static_cast<int32_t>(sum<float>(__builtin_convertvector(v, Vec<float>)));
}

// Writes W codes as 16-bit numbers and as halves (see FixedRow).
#if defined(WKV_ISA_avx2)
WKV_INLINE void write_codes(Integers code, int16_t* both, int8_t* halves) {
  __m256i wide;
  std::memcpy(&wide, &code, sizeof wide);
  const __m256i packed = _mm256_packs_epi32(wide, wide);
  const __m128i s = _mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08));
  const __m128i placed = _mm_shufflehi_epi16(_mm_shufflelo_epi16(s, _MM_SHUFFLE(3, 1, 2, 0)), _MM_SHUFFLE(3, 1, 2, 0));
  const __m128i high = _mm_srai_epi16(_mm_add_epi16(s, _mm_set1_epi16(128)), 8);
  const __m128i low = _mm_sub_epi16(s, _mm_slli_epi16(high, 8));
  const __m128i bytes = _mm_shuffle_epi32(_mm_packs_epi16(high, low), _MM_SHUFFLE(3, 1, 2, 0));
  std::memcpy(both, &placed, sizeof placed);
  std::memcpy(halves, &bytes, sizeof bytes);
}
#else
WKV_INLINE void write_codes(Integers code, int16_t* both, int8_t* halves) {
  const Integers high = (code + 128) >> 8;
  const Shorts s = __builtin_convertvector(code, Shorts);
  const Bytes high_bytes = __builtin_convertvector(high, Bytes);
  const Bytes low_bytes = __builtin_convertvector(code - (high << 8), Bytes);
  std::memcpy(both, &s, sizeof s);
  for (int j = 0; j < W; j += 4) {
    std::memcpy(halves + 2 * j, reinterpret_cast<const char*>(&high_bytes) + j, 4);
    std::memcpy(halves + 2 * j + 4, reinterpret_cast<const char*>(&low_bytes) + j, 4);
  }
}
#endif

}  // namespace

// x [K] -> the block `out`. A row with NaN or infinite values gets a NaN scale, and with it every product.
void to_fixed_point(const float* x, int64_t k, char* out) {
  const FixedLayout layout(k);
  int8_t* halves = reinterpret_cast<int8_t*>(out + layout.halves);
  int16_t* both = reinterpret_cast<int16_t*>(out + layout.both);
  int32_t* groups = reinterpret_cast<int32_t*>(out + layout.groups);
  int32_t* blocks = reinterpret_cast<int32_t*>(out + layout.blocks);

  const float largest = largest_of(x, k);
  // 32512 = 127 * 256, so that both halves stay within int8.
  *reinterpret_cast<float*>(out) = largest / 32512.0f;
  const float inverse = largest > 0 ? 32512.0f / largest : 0.0f;
  // Stores the codes of W values, adds them to `all` and their high halves to `upper`.
  const auto store_codes = [&](int64_t i, Vec<float> v, Integers& all, Integers& upper) {
    // 1.5 * 2^23 added rounds to the nearest integer and leaves it in the low bits.
    const Vec<float> shifted = v * inverse + 12582912.0f;
    Integers code;
    std::memcpy(&code, &shifted, sizeof code);
    code -= 0x4B400000;
    write_codes(code, both + i, halves + 2 * i);
    all += code;
    upper += (code + 128) >> 8;
  };
  const auto values = [&](int64_t i) {
    if (inverse > 0 && i + W <= k) return load(x + i);
    Vec<float> rest = {};
    for (int lane = 0; lane < W && i + lane < k && inverse > 0; ++lane) rest[lane] = x[i + lane];
    return rest;
  };
  for (int64_t begin = 0; begin < layout.cols; begin += INT8_BLOCK) {
    Integers upper = {};
    int32_t block = 0;
    const int64_t end = std::min(begin + INT8_BLOCK, layout.cols);
    for (int64_t g = begin; g < end; g += GROUP) {
      Integers all = {};
      for (int64_t i = g; i < g + GROUP; i += W) store_codes(i, values(i), all, upper);
      const int32_t total = total_of(all);
      groups[g / GROUP] = 8 * total;
      block += total;
    }
    const int32_t sum_high = total_of(upper);
    blocks[begin / INT8_BLOCK * 2] = 128 * sum_high;
    blocks[begin / INT8_BLOCK * 2 + 1] = 128 * (block - 256 * sum_high);
  }
}

}  // namespace wkv::WKV_ISA
