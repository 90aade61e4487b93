// Many rows of activations with AVX2: codes become 16-bit numbers once, in panels that stay in the cache, and are then
// multiplied with four rows at a time.
#pragma once
#include "integer_dot.h"

#include <algorithm>

#if defined(WKV_ISA_avx2)
namespace wkv::WKV_ISA {

constexpr int64_t PANEL_ROWS = 4;  // rows of activations whose sums the registers hold

// 16 rows of W x up to 512 columns, 4 columns after the other: even ones of rows 0-7 and 8-15, then odd ones.
class Panel {
 public:
  WKV_INLINE void put(int64_t column, Codes codes, int offset) {
    const __m256i zero = _mm256_set1_epi16(static_cast<int16_t>(offset));
    for (int i = 0; i < 2; ++i) {
      const Spread c(codes.half[i]);
      set(column, i, _mm256_sub_epi16(c.even, zero));
      set(column, 2 + i, _mm256_sub_epi16(c.odd, zero));
    }
  }

  // sums[m] = the products of columns [begin, end) with M rows; `both` is that of column 0 of the panel. What lies
  // `ahead` bytes further, the next rows, is fetched meanwhile.
  template <int M>
  WKV_INLINE void multiply(int64_t begin, int64_t end, const int16_t* const* both, int64_t ahead,
                           __m256i sums[M][2]) const {
    for (int m = 0; m < M; ++m) sums[m][0] = sums[m][1] = _mm256_setzero_si256();
    for (int64_t c = begin; c < end; c += 4) {
      if (c % 32 == 0)
        for (int m = 0; m < M; ++m) __builtin_prefetch(reinterpret_cast<const char*>(both[m] + c) + ahead);
      const __m256i w[4] = {get(c, 0), get(c, 1), get(c, 2), get(c, 3)};
      for (int m = 0; m < M; ++m) {
        const __m256i even = repeat4(both[m] + c), odd = repeat4(both[m] + c + 2);
        for (int i = 0; i < 2; ++i) {
          sums[m][i] = now(_mm256_add_epi32(sums[m][i], _mm256_madd_epi16(w[i], even)));
          sums[m][i] = now(_mm256_add_epi32(sums[m][i], _mm256_madd_epi16(w[2 + i], odd)));
        }
      }
    }
  }

 private:
  alignas(64) int16_t values_[INT8_BLOCK * TILE_ROWS];

  WKV_INLINE void set(int64_t column, int i, __m256i v) {
    _mm256_store_si256(reinterpret_cast<__m256i*>(values_ + 16 * column) + i, v);
  }
  WKV_INLINE __m256i get(int64_t column, int i) const {
    return _mm256_load_si256(reinterpret_cast<const __m256i*>(values_ + 16 * column) + i);
  }
};

WKV_INLINE Row16 to_row16(const __m256i sums[2]) {
  return {{_mm256_cvtepi32_ps(sums[0]), _mm256_cvtepi32_ps(sums[1])}};
}

// Calls run(integral constant M, first row) for all rows, PANEL_ROWS at a time.
template <class Run>
WKV_INLINE void in_panel_rows(int64_t count, const Run& run) {
  int64_t m = 0;
  for (; m + PANEL_ROWS <= count; m += PANEL_ROWS) run(std::integral_constant<int, PANEL_ROWS>{}, m);
  for (; m < count; ++m) run(std::integral_constant<int, 1>{}, m);
}

// One tile of 16 rows of 8-bit codes: y [count][ld].
template <class Tile>
void int8_panel(const Tile& w, const FixedRow* x, int64_t count, int64_t cols, const float* scale, float* y,
                int64_t ld) {
  Panel panel;
  const int64_t ahead = PANEL_ROWS * FixedLayout(cols).bytes;
  const Row16 s = load_row16(scale);
  for (int64_t begin = 0; begin < cols; begin += INT8_BLOCK) {
    const int64_t columns = std::min(INT8_BLOCK, cols - begin);
    for (int64_t c = 0; c < columns; c += 4) panel.put(c, w.step(begin + c), 128);
    const bool last = begin + INT8_BLOCK >= cols;
    in_panel_rows(count, [&](auto size, int64_t first) {
      constexpr int M = decltype(size)::value;
      const int16_t* both[M];
      for (int m = 0; m < M; ++m) both[m] = x[first + m].both + begin;
      __m256i sums[M][2];
      panel.multiply<M>(0, columns, both, ahead, sums);
      for (int m = 0; m < M; ++m) {
        float* to = y + (first + m) * ld;
        const Row16 total = begin == 0 ? to_row16(sums[m]) : load_row16(to) + to_row16(sums[m]);
        store_row16(to, last ? total * s * x[first + m].scale : total);
      }
    });
  }
}

// One tile of 16 rows whose groups of 32 columns have scales of their own.
template <class Tile>
void group_panel(const Tile& w, const FixedRow* x, int64_t count, int64_t cols, float* y, int64_t ld) {
  Panel panel;
  const int64_t ahead = PANEL_ROWS * FixedLayout(cols).bytes;
  Row16 scales[INT8_BLOCK / GROUP];
  for (int64_t begin = 0; begin < cols; begin += INT8_BLOCK) {
    const int64_t columns = std::min(INT8_BLOCK, cols - begin);
    for (int64_t g = 0; g < columns / GROUP; ++g) {
      const auto group = w.group(begin / GROUP + g);
      scales[g] = group.scale();
      for (int i = 0; i < GROUP / 8; ++i) {
        Codes first, second;
        group.two_steps(i, first, second);
        panel.put(g * GROUP + 8 * i, first, Tile::OFFSET);
        panel.put(g * GROUP + 8 * i + 4, second, Tile::OFFSET);
      }
    }
    const bool last = begin + INT8_BLOCK >= cols;
    in_panel_rows(count, [&](auto size, int64_t first) {
      constexpr int M = decltype(size)::value;
      const int16_t* both[M];
      Row16 total[M];
      for (int m = 0; m < M; ++m) {
        both[m] = x[first + m].both + begin;
        total[m] = begin == 0 ? Row16{} : load_row16(y + (first + m) * ld);
      }
      for (int64_t g = 0; g < columns / GROUP; ++g) {
        __m256i sums[M][2];
        panel.multiply<M>(g * GROUP, (g + 1) * GROUP, both, ahead, sums);
        for (int m = 0; m < M; ++m) total[m] += to_row16(sums[m]) * scales[g];
      }
      for (int m = 0; m < M; ++m) store_row16(y + (first + m) * ld, last ? total[m] * x[first + m].scale : total[m]);
    });
  }
}

}  // namespace wkv::WKV_ISA
#endif
