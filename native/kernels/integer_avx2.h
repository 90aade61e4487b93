// Products of weight codes with fixed-point activations in AVX2; included by integer_dot.h, which says what they are.
#pragma once
#include "weights.h"
#include "vec.h"

#include <immintrin.h>

namespace wkv::WKV_ISA {

// Where column j of every four stands in FixedRow::both: even columns first, as Spread takes the codes apart.
constexpr int PLACE[4] = {0, 2, 1, 3};

// 64 codes: 16 rows x 4 columns. GCC keeps a vector of 64 bytes in memory here, two of 32 in registers.
struct Codes {
  __m256i half[2];
};

WKV_INLINE Codes load_codes(const void* p) {
  const __m256i* halves = static_cast<const __m256i*>(p);
  return {{_mm256_loadu_si256(halves), _mm256_loadu_si256(halves + 1)}};
}

WKV_INLINE Codes operator|(Codes a, Codes b) {
  return {{_mm256_or_si256(a.half[0], b.half[0]), _mm256_or_si256(a.half[1], b.half[1])}};
}

// (c >> shift) & mask in every byte; shift < 0 is to the left. The mask drops what came from the byte beside it.
WKV_INLINE Codes bits_of(Codes c, int shift, int mask) {
  Codes y;
  for (int i = 0; i < 2; ++i) {
    const __m256i moved = shift < 0 ? _mm256_slli_epi16(c.half[i], -shift) : _mm256_srli_epi16(c.half[i], shift);
    y.half[i] = _mm256_and_si256(moved, _mm256_set1_epi8(static_cast<char>(mask)));
  }
  return y;
}
WKV_INLINE Codes low_nibbles(Codes c) { return bits_of(c, 0, 15); }
WKV_INLINE Codes high_nibbles(Codes c) { return bits_of(c, 4, 15); }
WKV_INLINE Codes upper_bits(Codes c, int shift) { return bits_of(c, shift, 0x30); }

// One float per row of a tile.
struct Row16 {
  __m256 half[2];
};

WKV_INLINE Row16 load_row16(const float* p) { return {{_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}}; }
WKV_INLINE void store_row16(float* p, Row16 y) {
  _mm256_storeu_ps(p, y.half[0]);
  _mm256_storeu_ps(p + 8, y.half[1]);
}
WKV_INLINE void set_part(Row16& y, int i, Vec<float> v) { y.half[i] = v; }
WKV_INLINE Row16 operator+(Row16 a, Row16 b) { return {{a.half[0] + b.half[0], a.half[1] + b.half[1]}}; }
WKV_INLINE Row16 operator*(Row16 a, Row16 b) { return {{a.half[0] * b.half[0], a.half[1] * b.half[1]}}; }
WKV_INLINE Row16 operator*(Row16 a, float b) { return {{a.half[0] * b, a.half[1] * b}}; }
WKV_INLINE Row16& operator+=(Row16& a, Row16 b) { return a = a + b; }

// Bytes of even columns and of odd columns as 16-bit numbers: every 32-bit lane then belongs to one row.
struct Spread {
  __m256i even, odd;
  WKV_INLINE explicit Spread(__m256i codes)
      : even(_mm256_and_si256(codes, _mm256_set1_epi16(255))), odd(_mm256_srli_epi16(codes, 8)) {}
};

WKV_INLINE __m256i repeat4(const void* p) {
  int32_t four;
  std::memcpy(&four, p, 4);
  return _mm256_set1_epi32(four);
}

// The sum as it stands, in a register: GCC would put off additions until it needs more registers than there are.
WKV_INLINE __m256i now(__m256i sum) {
  __asm__("" : "+x"(sum));
  return sum;
}

// Codes of up to 8 bits. Sums may wrap around before OFFSET is taken away, never after.
template <int OFFSET>
struct Sum {
  __m256i rows[2] = {_mm256_setzero_si256(), _mm256_setzero_si256()};

  WKV_INLINE void add(Codes codes, const FixedRow& x, int64_t column) {
    const __m256i even = repeat4(x.both + column), odd = repeat4(x.both + column + 2);
    for (int i = 0; i < 2; ++i) {
      const Spread c(codes.half[i]);
      rows[i] = now(_mm256_add_epi32(rows[i], _mm256_madd_epi16(c.even, even)));
      rows[i] = now(_mm256_add_epi32(rows[i], _mm256_madd_epi16(c.odd, odd)));
    }
  }
  WKV_INLINE void add(const Sum& other) {
    for (int i = 0; i < 2; ++i) rows[i] = _mm256_add_epi32(rows[i], other.rows[i]);
  }
  WKV_INLINE Row16 group_result(int32_t offset) const {
    Row16 y;
    for (int i = 0; i < 2; ++i)
      y.half[i] = _mm256_cvtepi32_ps(_mm256_sub_epi32(rows[i], _mm256_set1_epi32(offset)));
    return y;
  }
  WKV_INLINE Row16 block_result(const int32_t* offsets) const { return group_result(256 * offsets[0] + offsets[1]); }
};

// 4-bit codes: products of up to 32 columns fit into 16-bit sums.
template <>
struct Sum<8> {
  __m256i high[2] = {_mm256_setzero_si256(), _mm256_setzero_si256()};
  __m256i low[2] = {_mm256_setzero_si256(), _mm256_setzero_si256()};

  WKV_INLINE void add(Codes codes, const FixedRow& x, int64_t column) {
    const __m256i h = repeat4(x.halves + 2 * column), l = repeat4(x.halves + 2 * column + 4);
    for (int i = 0; i < 2; ++i) {
      high[i] = now(_mm256_add_epi16(high[i], _mm256_maddubs_epi16(codes.half[i], h)));
      low[i] = now(_mm256_add_epi16(low[i], _mm256_maddubs_epi16(codes.half[i], l)));
    }
  }
  WKV_INLINE void add(const Sum& other) {
    for (int i = 0; i < 2; ++i) {
      high[i] = _mm256_add_epi16(high[i], other.high[i]);
      low[i] = _mm256_add_epi16(low[i], other.low[i]);
    }
  }
  WKV_INLINE Row16 group_result(int32_t offset) const {
    Row16 y;
    for (int i = 0; i < 2; ++i) {
      const __m256i h = _mm256_madd_epi16(high[i], _mm256_set1_epi16(256));
      const __m256i l = _mm256_madd_epi16(low[i], _mm256_set1_epi16(1));
      const __m256i total = _mm256_sub_epi32(_mm256_add_epi32(h, l), _mm256_set1_epi32(offset));
      y.half[i] = _mm256_cvtepi32_ps(total);
    }
    return y;
  }
};

WKV_INLINE void interleave(const Codes column[4], Codes tile[4]) {
  for (int i = 0; i < 2; ++i) {
    const __m256i a = _mm256_unpacklo_epi8(column[0].half[i], column[1].half[i]);
    const __m256i b = _mm256_unpackhi_epi8(column[0].half[i], column[1].half[i]);
    const __m256i c = _mm256_unpacklo_epi8(column[2].half[i], column[3].half[i]);
    const __m256i d = _mm256_unpackhi_epi8(column[2].half[i], column[3].half[i]);
    tile[0].half[i] = _mm256_unpacklo_epi16(a, c);
    tile[1].half[i] = _mm256_unpackhi_epi16(a, c);
    tile[2].half[i] = _mm256_unpacklo_epi16(b, d);
    tile[3].half[i] = _mm256_unpackhi_epi16(b, d);
  }
}

}  // namespace wkv::WKV_ISA
