// Half-precision weights to floats, a vector or a fixed 16 at a time.
#pragma once
#include "vec.h"

#if defined(__F16C__)
#include <immintrin.h>
#endif

namespace wkv::WKV_ISA {

struct f16 {
  uint16_t bits;
};

WKV_INLINE float half_to_float(uint16_t h) {
#if defined(__F16C__)
  return _cvtsh_ss(h);
#else
  // Exponent and mantissa shifted into place, then scaled by 2^112: right for subnormals too.
  const uint32_t magnitude = static_cast<uint32_t>(h & 0x7FFF) << 13;
  float y;
  if ((h & 0x7C00) == 0x7C00) {
    const uint32_t special = magnitude | 0x7F800000;
    std::memcpy(&y, &special, 4);
  } else {
    std::memcpy(&y, &magnitude, 4);
    y *= 5.192296858534828e33f;
  }
  return (h & 0x8000) ? -y : y;
#endif
}

WKV_INLINE float to_float(f16 x) { return half_to_float(x.bits); }

WKV_INLINE Vec<float> load_floats(const float* p) { return load(p); }

WKV_INLINE Vec<float> load_floats(const bf16* p) {
  typedef uint16_t Narrow __attribute__((vector_size(VECTOR_BYTES / 2)));
  typedef uint32_t Wide __attribute__((vector_size(VECTOR_BYTES)));
  Narrow n;
  std::memcpy(&n, p, sizeof n);
  const Wide w = __builtin_convertvector(n, Wide) << 16;
  Vec<float> y;
  std::memcpy(&y, &w, sizeof y);
  return y;
}

WKV_INLINE Vec<float> load_floats(const f16* p) {
#if defined(__AVX512F__)
  return reinterpret_cast<Vec<float>>(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
#elif defined(__F16C__)
  return reinterpret_cast<Vec<float>>(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#else
  Vec<float> y;
  for (int i = 0; i < LANES<float>; ++i) y[i] = half_to_float(p[i].bits);
  return y;
#endif
}

}  // namespace wkv::WKV_ISA
