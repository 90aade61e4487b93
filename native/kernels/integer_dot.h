// Integer products of weight codes with fixed-point activations, 16 rows x 4 columns at a time.
#pragma once
#include "weights.h"
#include "vec.h"

#if defined(__AVX512BW__)
#include <immintrin.h>
#elif defined(__ARM_FEATURE_DOTPROD)
#include <arm_neon.h>
#endif

// Weights are stored as code = value + OFFSET. `Sum` gathers sum_k value[row][k] * x[k] for 16 rows, over one group of
// 4-bit codes (`group_result`) or up to 512 columns of 8-bit codes (`block_result`). The variants with VNNI and AVX2
// (integer_avx2.h) multiply the codes as they are and take the offsets of the FixedRow away in the end; the others
// subtract OFFSET first.
#if defined(WKV_ISA_avx2)
#include "integer_avx2.h"
#else

namespace wkv::WKV_ISA {

// Where column j of every four stands in FixedRow::both.
constexpr int PLACE[4] = {0, 1, 2, 3};

// 64 codes: 16 rows x 4 columns.
typedef uint8_t Codes __attribute__((vector_size(64)));
// One float per row of a tile.
typedef float Row16 __attribute__((vector_size(64)));

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

WKV_INLINE void set_part(Row16& y, int i, Vec<float> v) {
  std::memcpy(reinterpret_cast<char*>(&y) + VECTOR_BYTES * i, &v, sizeof v);
}

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

// Codes of 64 rows x 4 columns, column by column -> four tiles of 16 rows x 4 columns. Byte 16 l + 4 i + q of a column
// holds row 16 i + 4 l + q: interleaving four columns then gives whole tiles.
constexpr int sparse_row(int byte) { return byte % 16 / 4 * 16 + byte / 16 * 4 + byte % 4; }

WKV_INLINE void interleave(const Codes column[4], Codes tile[4]) {
#if defined(__AVX512BW__)
  __m512i c[4];
  for (int i = 0; i < 4; ++i) c[i] = reinterpret_cast<__m512i>(column[i]);
  const __m512i a = _mm512_unpacklo_epi8(c[0], c[1]), b = _mm512_unpackhi_epi8(c[0], c[1]);
  const __m512i d = _mm512_unpacklo_epi8(c[2], c[3]), e = _mm512_unpackhi_epi8(c[2], c[3]);
  tile[0] = reinterpret_cast<Codes>(_mm512_unpacklo_epi16(a, d));
  tile[1] = reinterpret_cast<Codes>(_mm512_unpackhi_epi16(a, d));
  tile[2] = reinterpret_cast<Codes>(_mm512_unpacklo_epi16(b, e));
  tile[3] = reinterpret_cast<Codes>(_mm512_unpackhi_epi16(b, e));
#else
  uint8_t in[4][64], out[4][64];
  std::memcpy(in, column, sizeof in);
  for (int byte = 0; byte < 64; ++byte)
    for (int j = 0; j < 4; ++j) out[sparse_row(byte) / 16][sparse_row(byte) % 16 * 4 + j] = in[j][byte];
  std::memcpy(tile, out, sizeof out);
#endif
}

}  // namespace wkv::WKV_ISA

#endif

namespace wkv::WKV_ISA {

// Where column j of a row stands in FixedRow::both.
constexpr int64_t place(int64_t column) { return column / 4 * 4 + PLACE[column % 4]; }

}  // namespace wkv::WKV_ISA
