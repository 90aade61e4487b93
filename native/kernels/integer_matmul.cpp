// y = W x for 8-, 6- and 4-bit weights, one row of activations or many: every weight is read once for all of them.
#include "convert.h"
#include "integer_dot.h"
#include "integer_panel.h"

#include <algorithm>

namespace wkv::WKV_ISA {
namespace {

#if defined(__AVX512VNNI__)
constexpr int INT8_ROWS = 8, INT4_ROWS = 8;  // rows of activations whose sums the registers hold
#elif defined(__AVX512BW__)
constexpr int INT8_ROWS = 8, INT4_ROWS = 6;
#elif defined(WKV_ISA_avx2)
constexpr int INT8_ROWS = 4, INT4_ROWS = 2;
constexpr int64_t PANEL_FROM = 8;  // rows from which panels pay
#else
constexpr int INT8_ROWS = 2, INT4_ROWS = 2;
#endif

// 16 half-precision numbers.
WKV_INLINE Row16 load_halves(const void* p) {
  Row16 y;
  for (int i = 0; i < TILE_ROWS; i += LANES<float>) {
    set_part(y, i / LANES<float>, load_floats(static_cast<const f16*>(p) + i));
  }
  return y;
}

// Where the codes of one tile of 16 rows come from.
struct Int8Tile {
  const uint8_t* codes;  // [K/4][16][4]
  WKV_INLINE Codes step(int64_t column) const { return load_codes(codes + 16 * column); }
  WKV_INLINE void ahead(int64_t column) const { prefetch_ahead(codes + 16 * column); }
};

// 32 columns of a tile: 8 columns are a pair of steps.
struct Int4Group {
  const uint8_t *codes, *scales;
  WKV_INLINE Row16 scale() const { return load_halves(scales); }
  WKV_INLINE void two_steps(int i, Codes& first, Codes& second) const {
    const Codes both = load_codes(codes + 64 * i);
    first = low_nibbles(both);
    second = high_nibbles(both);
  }
  WKV_INLINE void ahead(int i) const { prefetch_ahead(codes + 64 * i); }
};

struct Int4Tile {
  static constexpr int OFFSET = 8;
  const uint8_t* tile;
  WKV_INLINE Int4Group group(int64_t g) const {
    const uint8_t* block = tile + g / 2 * INT4_TILE_BYTES;
    return {block + 64 + g % 2 * 256, block + g % 2 * 32};
  }
};

struct Int6Group {
  const uint8_t *codes, *upper, *scales;
  WKV_INLINE Row16 scale() const { return load_halves(scales); }
  WKV_INLINE void two_steps(int i, Codes& first, Codes& second) const {
    const Codes lower = load_codes(codes + 64 * i), bits = load_codes(upper + i / 2 * 64);
    first = low_nibbles(lower) | upper_bits(bits, i % 2 == 0 ? -4 : 0);
    second = high_nibbles(lower) | upper_bits(bits, i % 2 == 0 ? -2 : 2);
  }
  WKV_INLINE void ahead(int i) const {
    prefetch_ahead(codes + 64 * i);
    if (i % 2 == 0) prefetch_ahead(upper + i / 2 * 64);
  }
};

struct Int6Tile {
  static constexpr int OFFSET = 32;
  const uint8_t* tile;
  WKV_INLINE Int6Group group(int64_t g) const {
    const uint8_t* block = tile + g / 2 * INT6_TILE_BYTES;
    return {block + 64 + g % 2 * 256, block + INT4_TILE_BYTES + g % 2 * 128, block + g % 2 * 32};
  }
};

// 4-bit codes of a sparse matrix, one per byte, already brought into tile order.
struct UnpackedInt4Group {
  const uint8_t *codes, *scales;
  WKV_INLINE Row16 scale() const { return load_halves(scales); }
  WKV_INLINE void two_steps(int i, Codes& first, Codes& second) const {
    first = load_codes(codes + 128 * i);
    second = load_codes(codes + 128 * i + 64);
  }
  WKV_INLINE void ahead(int) const {}
};

struct UnpackedInt4Tile {
  static constexpr int OFFSET = 8;
  const uint8_t *codes, *scales;  // scales: of the first group
  int64_t group_bytes;            // from the scales of one group to those of the next
  WKV_INLINE UnpackedInt4Group group(int64_t g) const { return {codes + g * GROUP * 16, scales + g * group_bytes}; }
};

template <int M>
WKV_INLINE void int8_tile(const Int8Tile& w, const FixedRow* x, int64_t cols, const float* scale, float* y,
                          int64_t ld) {
  Row16 total[M] = {};
  for (int64_t begin = 0; begin < cols; begin += INT8_BLOCK) {
    const int64_t end = std::min(begin + INT8_BLOCK, cols);
    Sum<128> sums[M], more[1];
    if (M == 1) {  // one row: four chains of additions hide their latency
      for (int64_t c = begin; c < end; c += 8) {
        w.ahead(c);
        w.ahead(c + 4);
        sums[0].add(w.step(c), x[0], c);
        more[0].add(w.step(c + 4), x[0], c + 4);
      }
      sums[0].add(more[0]);
    } else {
      for (int64_t c = begin; c < end; c += 4) {
        const Codes codes = w.step(c);
        for (int m = 0; m < M; ++m) sums[m].add(codes, x[m], c);
      }
    }
    for (int m = 0; m < M; ++m) total[m] += sums[m].block_result(x[m].block_offsets + begin / INT8_BLOCK * 2);
  }
  const Row16 s = load_row16(scale);
  for (int m = 0; m < M; ++m) store_row16(y + m * ld, total[m] * s * x[m].scale);
}

template <int M, class Tile>
WKV_INLINE void group_tile(const Tile& w, const FixedRow* x, int64_t cols, float* y, int64_t ld) {
  Row16 total[M] = {};
  for (int64_t g = 0; g < cols / GROUP; ++g) {
    const auto group = w.group(g);
    Sum<Tile::OFFSET> sums[M], more[1];
#pragma GCC unroll 4
    for (int i = 0; i < GROUP / 8; ++i) {
      const int64_t c = g * GROUP + 8 * i;
      Codes first, second;
      group.two_steps(i, first, second);
      if (M == 1) group.ahead(i);
      for (int m = 0; m < M; ++m) sums[m].add(first, x[m], c);
      if (M == 1)
        more[0].add(second, x[0], c + 4);
      else
        for (int m = 0; m < M; ++m) sums[m].add(second, x[m], c + 4);
    }
    if (M == 1) sums[0].add(more[0]);
    const Row16 scale = group.scale();
    for (int m = 0; m < M; ++m)
      total[m] += sums[m].group_result(Tile::OFFSET / 8 * x[m].group_offsets[g]) * scale;
  }
  for (int m = 0; m < M; ++m) store_row16(y + m * ld, total[m] * x[m].scale);
}

// Calls run.template operator()<M>(first row) for blocks of BLOCK rows, then 4, then 1 at a time.
template <int BLOCK, class Run>
WKV_INLINE void in_blocks(int64_t count, const Run& run) {
  int64_t m = 0;
  for (; m + BLOCK <= count; m += BLOCK) run(std::integral_constant<int, BLOCK>{}, m);
  if (BLOCK > 4)
    for (; m + 4 <= count; m += 4) run(std::integral_constant<int, 4>{}, m);
  if (BLOCK > 2)
    for (; m + 2 <= count; m += 2) run(std::integral_constant<int, 2>{}, m);
  for (; m < count; ++m) run(std::integral_constant<int, 1>{}, m);
}

// A tile of 16 rows with all rows of activations: y [count][ld].
template <class Tile>
WKV_INLINE void int8_rows(const Tile& w, const FixedRow* x, int64_t count, int64_t cols, const float* scale, float* y,
                          int64_t ld) {
#if defined(WKV_ISA_avx2)
  if (count >= PANEL_FROM) return int8_panel(w, x, count, cols, scale, y, ld);
#endif
  in_blocks<INT8_ROWS>(count, [&](auto size, int64_t m) {
    int8_tile<decltype(size)::value>(w, x + m, cols, scale, y + m * ld, ld);
  });
}

template <class Tile>
WKV_INLINE void group_rows(const Tile& w, const FixedRow* x, int64_t count, int64_t cols, float* y, int64_t ld) {
#if defined(WKV_ISA_avx2)
  if (count >= PANEL_FROM) return group_panel(w, x, count, cols, y, ld);
#endif
  in_blocks<INT4_ROWS>(count, [&](auto size, int64_t m) {
    group_tile<decltype(size)::value>(w, x + m, cols, y + m * ld, ld);
  });
}

constexpr int64_t SPARSE_ROWS = 64;  // rows of one vector of codes in the sparse formats

const uint8_t* bytes(const Matrix& w) { return static_cast<const uint8_t*>(w.data); }

// int4_sparse: where group g starts, and its codes.
WKV_INLINE const uint8_t* sparse_group(const Matrix& w, int64_t g) {
  return bytes(w) + g * (w.rows * 2 + GROUP * w.rows / 2);
}

}  // namespace

// Rows [row_begin, row_end) (multiples of 16) of y [M][ld] = W x, formats int8, int6 and int4.
void integer_matmul(const Matrix& w, const Operand& x, int64_t count, int64_t row_begin, int64_t row_end, float* y,
                    int64_t ld) {
  const FixedLayout layout(w.cols);
  constexpr int MOST = 64;
  for (int64_t first = 0; first < count; first += MOST) {
    const int64_t some = std::min<int64_t>(MOST, count - first);
    FixedRow rows[MOST];
    for (int64_t m = 0; m < some; ++m) rows[m] = layout.at(x.fixed + (first + m) * x.fixed_stride);
    for (int64_t n = row_begin; n < row_end; n += TILE_ROWS) {
      float* out = y + first * ld + n;
      if (w.format == Format::int8) {
        const Int8Tile tile{bytes(w) + n * w.cols};
        int8_rows(tile, rows, some, w.cols, w.scale + n, out, ld);
      } else if (w.format == Format::int6) {
        const Int6Tile tile{bytes(w) + n / TILE_ROWS * (w.cols / 64) * INT6_TILE_BYTES};
        group_rows(tile, rows, some, w.cols, out, ld);
      } else {
        const Int4Tile tile{bytes(w) + n / TILE_ROWS * (w.cols / 64) * INT4_TILE_BYTES};
        group_rows(tile, rows, some, w.cols, out, ld);
      }
    }
  }
}

// The same for the sparse formats, all columns read: `scratch` holds 64 K bytes (int8) or 128 K (int4).
// Rows are multiples of 64 (int8) or 128 (int4).
void sparse_matmul(const Matrix& w, const Operand& x, int64_t count, int64_t row_begin, int64_t row_end, float* y,
                   int64_t ld, uint8_t* scratch) {
  const bool int4 = w.format == Format::int4_sparse;
  const int64_t step = int4 ? 2 * SPARSE_ROWS : SPARSE_ROWS;
  for (int64_t n = row_begin; n < row_end; n += step) {
    // Tile t of this block of rows: scratch + t * 16 K.
    for (int64_t c = 0; c < w.cols; c += 4) {
      const int64_t halves = int4 ? 2 : 1;
      Codes column[4], tile[4];
      for (int64_t half = 0; half < halves; ++half) {
        for (int j = 0; j < 4; ++j) {
          if (int4) {
            const uint8_t* codes = sparse_group(w, c / GROUP) + 2 * w.rows + (c + j) % GROUP * (w.rows / 2);
            const Codes both = load_codes(codes + n / 2);
            column[j] = half == 0 ? low_nibbles(both) : high_nibbles(both);
          } else {
            column[j] = load_codes(bytes(w) + (c + j) * w.rows + n);
          }
        }
        interleave(column, tile);
        for (int t = 0; t < 4; ++t) std::memcpy(scratch + (4 * half + t) * 16 * w.cols + 16 * c, &tile[t], 64);
      }
    }
    const FixedLayout layout(w.cols);
    constexpr int MOST = 64;
    for (int64_t first = 0; first < count; first += MOST) {
      const int64_t some = std::min<int64_t>(MOST, count - first);
      FixedRow rows[MOST];
      for (int64_t m = 0; m < some; ++m) rows[m] = layout.at(x.fixed + (first + m) * x.fixed_stride);
      for (int64_t t = 0; t < step / TILE_ROWS; ++t) {
        const uint8_t* codes = scratch + t * 16 * w.cols;
        float* out = y + first * ld + n + t * TILE_ROWS;
        if (int4) {
          const uint8_t* scales = sparse_group(w, 0) + 2 * (n + t * TILE_ROWS);
          const int64_t group_bytes = sparse_group(w, 1) - sparse_group(w, 0);
          group_rows(UnpackedInt4Tile{codes, scales, group_bytes}, rows, some, w.cols, out, ld);
        } else {
          int8_rows(Int8Tile{codes}, rows, some, w.cols, w.scale + n + t * TILE_ROWS, out, ld);
        }
      }
    }
  }
}

// y [N] += W x over the columns of groups [group_begin, group_end) (32 columns each) for one row x, reading only
// columns whose activation is not zero. `skipped` counts the others. int8: y is still to be multiplied by scale[n].
void sparse_matvec(const Matrix& w, const FixedRow& x, int64_t group_begin, int64_t group_end, float* y,
                   int64_t* skipped) {
  const bool int4 = w.format == Format::int4_sparse;
  const int64_t column_bytes = int4 ? w.rows / 2 : w.rows;
  // Lists of the group at hand and of the next one, whose memory is fetched ahead.
  int active[2][GROUP + 3], count[2] = {0, 0};
  const auto codes_of = [&](int64_t g) {
    return int4 ? sparse_group(w, g) + 2 * w.rows : bytes(w) + g * GROUP * w.rows;
  };
  const auto collect = [&](int64_t g, int slot) {
    count[slot] = 0;
    if (g >= group_end) return;
    const int16_t* both = x.both + g * GROUP;
    for (int j = 0; j < GROUP; ++j) {
      active[slot][count[slot]] = j;
      count[slot] += both[place(j)] != 0;
    }
    *skipped += GROUP - count[slot];
    // With AVX2 it is faster to fetch the next group bit by bit while this one is multiplied, see below.
    if (VECTOR_BYTES == 32 && g > group_begin) return;
    const uint8_t* codes = codes_of(g);
    for (int i = 0; i < count[slot]; ++i)
      for (int64_t at = 0; at < column_bytes; at += 64)
        __builtin_prefetch(codes + active[slot][i] * column_bytes + at, 0, VECTOR_BYTES == 32 ? 3 : 2);
  };
  collect(group_begin, group_begin & 1);
  for (int64_t g = group_begin; g < group_end; ++g) {
    const int slot = g & 1;
    collect(g + 1, slot ^ 1);
    if (count[slot] == 0) continue;
    // Four columns at a time; the last four are filled up with column 0 and zero activations.
    int64_t quads = 0;
    const uint8_t* start[GROUP / 4][4];
    alignas(64) int8_t halves[2 * GROUP];
    alignas(64) int16_t both[GROUP];
    int32_t offsets[2] = {0, 0};
    const uint8_t* codes = codes_of(g);
    for (int i = 0; i < count[slot] || i % 4 != 0; ++i) {
      const bool real = i < count[slot];
      const int64_t j = real ? active[slot][i] : active[slot][0];
      start[i / 4][i % 4] = codes + j * column_bytes;
      const int16_t code = real ? x.both[g * GROUP + place(j)] : int16_t{0};
      both[place(i)] = code;
      const int high = (code + 128) >> 8, low = code - 256 * high;
      halves[i / 4 * 8 + i % 4] = static_cast<int8_t>(high);
      halves[i / 4 * 8 + 4 + i % 4] = static_cast<int8_t>(low);
      offsets[0] += (int4 ? 8 : 128) * high;
      offsets[1] += (int4 ? 8 : 128) * low;
      quads = i / 4 + 1;
    }
    const FixedRow packed{1.0f, halves, both, nullptr, nullptr};
    const auto add = [&](Row16 sums, int64_t n) { store_row16(y + n, load_row16(y + n) + sums * x.scale); };
    const auto finish4 = [&](const Sum<8>& sums, int64_t n) {
      const Row16 scale = load_halves(sparse_group(w, g) + 2 * n);
      add(sums.group_result(256 * offsets[0] + offsets[1]) * scale, n);
    };
    const uint8_t* next = codes_of(g + 1);
    for (int64_t at = 0; at < column_bytes; at += 64) {
      Codes column[4], tile[4];
      if (VECTOR_BYTES == 32)
        for (int i = 0; i < count[slot ^ 1]; ++i)
          __builtin_prefetch(next + active[slot ^ 1][i] * column_bytes + at, 0, 3);
      if (int4) {
        Sum<8> first[4], second[4];
        for (int64_t q = 0; q < quads; ++q) {
          Codes both_nibbles[4];
          for (int j = 0; j < 4; ++j) both_nibbles[j] = load_codes(start[q][j] + at);
          for (int j = 0; j < 4; ++j) column[j] = low_nibbles(both_nibbles[j]);
          interleave(column, tile);
          for (int t = 0; t < 4; ++t) first[t].add(tile[t], packed, 4 * q);
          for (int j = 0; j < 4; ++j) column[j] = high_nibbles(both_nibbles[j]);
          interleave(column, tile);
          for (int t = 0; t < 4; ++t) second[t].add(tile[t], packed, 4 * q);
        }
        for (int t = 0; t < 4; ++t) finish4(first[t], 2 * at + 16 * t);
        for (int t = 0; t < 4; ++t) finish4(second[t], 2 * at + 64 + 16 * t);
      } else {
        Sum<128> sums[4];
        for (int64_t q = 0; q < quads; ++q) {
          for (int j = 0; j < 4; ++j) column[j] = load_codes(start[q][j] + at);
          interleave(column, tile);
          for (int t = 0; t < 4; ++t) sums[t].add(tile[t], packed, 4 * q);
        }
        for (int t = 0; t < 4; ++t) add(sums[t].block_result(offsets), at + 16 * t);
      }
    }
  }
}

}  // namespace wkv::WKV_ISA
