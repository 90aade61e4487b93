// Integer products of weight codes with fixed-point activations, 16 rows x 4 columns at a time.
#pragma once
#include "weights.h"
#include "vec.h"

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__ARM_FEATURE_DOTPROD)
#include <arm_neon.h>
#endif

namespace wkv::WKV_ISA {

// 64 codes: 16 rows x 4 columns.
typedef uint8_t Codes __attribute__((vector_size(64)));
// One float or integer per row of a tile.
typedef float Row16 __attribute__((vector_size(64)));
typedef int32_t Int16 __attribute__((vector_size(64)));

WKV_INLINE Codes load_codes(const void* p) {
  Codes c;
  std::memcpy(&c, p, sizeof c);
  return c;
}

WKV_INLINE Codes low_nibbles(Codes c) { return c & 15; }
WKV_INLINE Codes high_nibbles(Codes c) {
#if defined(__AVX512BW__)
  const __m512i v = reinterpret_cast<__m512i>(c);
  return reinterpret_cast<Codes>(_mm512_and_si512(_mm512_srli_epi16(v, 4), _mm512_set1_epi8(15)));
#else
  return c >> 4;
#endif
}

// Two bits of every byte, those `shift` above bits 4 and 5 (or below, if negative), brought to bits 4 and 5.
WKV_INLINE Codes upper_bits(Codes c, int shift) {
#if defined(__AVX512BW__)
  const __m512i v = reinterpret_cast<__m512i>(c);
  const __m512i moved = shift < 0 ? _mm512_slli_epi16(v, -shift) : _mm512_srli_epi16(v, shift);
  return reinterpret_cast<Codes>(_mm512_and_si512(moved, _mm512_set1_epi8(0x30)));
#else
  return (shift < 0 ? c << -shift : c >> shift) & 0x30;
#endif
}

// Weights are stored as code = value + OFFSET. `Sum` gathers sum_k value[row][k] * x[k] for 16 rows, over one group of
// 4-bit codes (`group_result`) or up to 512 columns of 8-bit codes (`block_result`). The variant with VNNI multiplies the
// codes as they are and takes the offsets of the FixedRow away in the end; the others subtract OFFSET first.

#if defined(__AVX512VNNI__)

template <int OFFSET>
struct Sum {
  __m512i high = _mm512_setzero_si512(), low = _mm512_setzero_si512();

  WKV_INLINE void add(Codes codes, const FixedRow& x, int64_t column) {
    int32_t h, l;
    std::memcpy(&h, x.halves + 2 * column, 4);
    std::memcpy(&l, x.halves + 2 * column + 4, 4);
    const __m512i c = reinterpret_cast<__m512i>(codes);
    high = _mm512_dpbusd_epi32(high, c, _mm512_set1_epi32(h));
    low = _mm512_dpbusd_epi32(low, c, _mm512_set1_epi32(l));
  }
  WKV_INLINE void add(const Sum& other) {
    high = _mm512_add_epi32(high, other.high);
    low = _mm512_add_epi32(low, other.low);
  }
  WKV_INLINE Row16 group_result(int32_t offset) const {
    const __m512i l = _mm512_sub_epi32(low, _mm512_set1_epi32(offset));
    return reinterpret_cast<Row16>(_mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_slli_epi32(high, 8), l)));
  }
  WKV_INLINE Row16 block_result(const int32_t* offsets) const {
    const __m512i h = _mm512_sub_epi32(high, _mm512_set1_epi32(offsets[0]));
    const __m512i l = _mm512_sub_epi32(low, _mm512_set1_epi32(offsets[1]));
    return reinterpret_cast<Row16>(
        _mm512_fmadd_ps(_mm512_cvtepi32_ps(h), _mm512_set1_ps(256.0f), _mm512_cvtepi32_ps(l)));
  }
};

#elif defined(__AVX512BW__)

template <int OFFSET>
struct Sum {
  __m512i rows_0_7 = _mm512_setzero_si512(), rows_8_15 = _mm512_setzero_si512();  // two partial sums per row

  WKV_INLINE void add(Codes codes, const FixedRow& x, int64_t column) {
    int64_t four;
    std::memcpy(&four, x.both + column, 8);
    const __m512i c = reinterpret_cast<__m512i>(codes), offset = _mm512_set1_epi16(OFFSET);
    const __m512i a = _mm512_sub_epi16(_mm512_cvtepu8_epi16(_mm512_castsi512_si256(c)), offset);
    const __m512i b = _mm512_sub_epi16(_mm512_cvtepu8_epi16(_mm512_extracti64x4_epi64(c, 1)), offset);
    rows_0_7 = _mm512_add_epi32(rows_0_7, _mm512_madd_epi16(a, _mm512_set1_epi64(four)));
    rows_8_15 = _mm512_add_epi32(rows_8_15, _mm512_madd_epi16(b, _mm512_set1_epi64(four)));
  }
  WKV_INLINE void add(const Sum& other) {
    rows_0_7 = _mm512_add_epi32(rows_0_7, other.rows_0_7);
    rows_8_15 = _mm512_add_epi32(rows_8_15, other.rows_8_15);
  }
  WKV_INLINE Row16 group_result(int32_t) const { return result(); }
  WKV_INLINE Row16 block_result(const int32_t*) const { return result(); }
  WKV_INLINE Row16 result() const {
    const __m512i even = _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
    const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
    const __m512i total = _mm512_add_epi32(_mm512_permutex2var_epi32(rows_0_7, even, rows_8_15),
                                           _mm512_permutex2var_epi32(rows_0_7, odd, rows_8_15));
    return reinterpret_cast<Row16>(_mm512_cvtepi32_ps(total));
  }
};

#elif defined(__AVX2__)

template <int OFFSET>
struct Sum {
  __m256i part[4] = {_mm256_setzero_si256(), _mm256_setzero_si256(), _mm256_setzero_si256(), _mm256_setzero_si256()};

  WKV_INLINE void add(Codes codes, const FixedRow& x, int64_t column) {
    int64_t four;
    std::memcpy(&four, x.both + column, 8);
    __m128i quarter[4];
    std::memcpy(quarter, &codes, 64);
    for (int i = 0; i < 4; ++i) {
      const __m256i c = _mm256_sub_epi16(_mm256_cvtepu8_epi16(quarter[i]), _mm256_set1_epi16(OFFSET));
      part[i] = _mm256_add_epi32(part[i], _mm256_madd_epi16(c, _mm256_set1_epi64x(four)));
    }
  }
  WKV_INLINE void add(const Sum& other) {
    for (int i = 0; i < 4; ++i) part[i] = _mm256_add_epi32(part[i], other.part[i]);
  }
  WKV_INLINE Row16 group_result(int32_t) const { return result(); }
  WKV_INLINE Row16 block_result(const int32_t*) const { return result(); }
  WKV_INLINE Row16 result() const {
    Row16 y;
    for (int i = 0; i < 2; ++i) {
      const __m256i pairs = _mm256_permute4x64_epi64(_mm256_hadd_epi32(part[2 * i], part[2 * i + 1]), 0xD8);
      const __m256 rows = _mm256_cvtepi32_ps(pairs);
      std::memcpy(reinterpret_cast<char*>(&y) + 32 * i, &rows, 32);
    }
    return y;
  }
};

#elif defined(__ARM_FEATURE_DOTPROD)

template <int OFFSET>
struct Sum {
  int32x4_t high[4] = {vdupq_n_s32(0), vdupq_n_s32(0), vdupq_n_s32(0), vdupq_n_s32(0)};
  int32x4_t low[4] = {vdupq_n_s32(0), vdupq_n_s32(0), vdupq_n_s32(0), vdupq_n_s32(0)};

  WKV_INLINE void add(Codes codes, const FixedRow& x, int64_t column) {
    int32_t h, l;
    std::memcpy(&h, x.halves + 2 * column, 4);
    std::memcpy(&l, x.halves + 2 * column + 4, 4);
    const int8x16_t xh = vreinterpretq_s8_s32(vdupq_n_s32(h)), xl = vreinterpretq_s8_s32(vdupq_n_s32(l));
    uint8x16_t quarter[4];
    std::memcpy(quarter, &codes, 64);
    for (int i = 0; i < 4; ++i) {
      const int8x16_t w = vreinterpretq_s8_u8(vsubq_u8(quarter[i], vdupq_n_u8(OFFSET)));
      high[i] = vdotq_s32(high[i], w, xh);
      low[i] = vdotq_s32(low[i], w, xl);
    }
  }
  WKV_INLINE void add(const Sum& other) {
    for (int i = 0; i < 4; ++i) {
      high[i] = vaddq_s32(high[i], other.high[i]);
      low[i] = vaddq_s32(low[i], other.low[i]);
    }
  }
  WKV_INLINE Row16 group_result(int32_t) const { return result(); }
  WKV_INLINE Row16 block_result(const int32_t*) const { return result(); }
  WKV_INLINE Row16 result() const {
    Row16 y;
    for (int i = 0; i < 4; ++i) {
      const float32x4_t rows = vfmaq_n_f32(vcvtq_f32_s32(low[i]), vcvtq_f32_s32(high[i]), 256.0f);
      std::memcpy(reinterpret_cast<char*>(&y) + 16 * i, &rows, 16);
    }
    return y;
  }
};

#else

template <int OFFSET>
struct Sum {
  int32_t rows[TILE_ROWS] = {};

  WKV_INLINE void add(Codes codes, const FixedRow& x, int64_t column) {
    uint8_t c[64];
    std::memcpy(c, &codes, 64);
    for (int i = 0; i < TILE_ROWS; ++i)
      for (int j = 0; j < 4; ++j) rows[i] += (c[4 * i + j] - OFFSET) * x.both[column + j];
  }
  WKV_INLINE void add(const Sum& other) {
    for (int i = 0; i < TILE_ROWS; ++i) rows[i] += other.rows[i];
  }
  WKV_INLINE Row16 group_result(int32_t) const { return result(); }
  WKV_INLINE Row16 block_result(const int32_t*) const { return result(); }
  WKV_INLINE Row16 result() const {
    Row16 y;
    for (int i = 0; i < TILE_ROWS; ++i) y[i] = static_cast<float>(rows[i]);
    return y;
  }
};

#endif

WKV_INLINE Row16 load_row16(const float* p) {
  Row16 y;
  std::memcpy(&y, p, sizeof y);
  return y;
}
WKV_INLINE void store_row16(float* p, Row16 y) { std::memcpy(p, &y, sizeof y); }

}  // namespace wkv::WKV_ISA
