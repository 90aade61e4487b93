// Weight matrices as they lie in memory (or in a mapped file), and rows of activations to multiply them with.
#pragma once
#include <cstddef>
#include <cstdint>

namespace wkv {

// A matrix W has N rows (outputs) and K columns (inputs); y = W x.
enum class Format : int32_t {
  f32 = 0,  // [N][K], row by row
  bf16 = 1,
  f16 = 2,
  f32_columns = 3,  // 16 rows at a time, column by column: [N/16][K][16], N padded with zeros
  bf16_columns = 4,
  f16_columns = 5,
  // int8: w = scale[n] * (code - 128), code in 1 .. 255. Tiles of 16 rows, then steps of 4 columns: [N/16][K/4][16][4].
  int8 = 6,
  // int4: w = scale * (code - 8), one half-precision scale per row and 32 columns. Tiles of 16 rows x 64 columns:
  // 2 groups x 16 scales, then 8 vectors of 64 bytes; byte 4 i + j of vector s is row i, columns 8 s + j (low nibble)
  // and 8 s + 4 + j (high nibble).
  int4 = 7,
  // The same values for inputs that are often zero: all rows of one column lie together, so that a column whose
  // activation is zero is not read. Rows in blocks of 64 (int8) or 128 (int4), one vector of 64 bytes each: byte
  // 16 l + 4 i + q is row 16 i + 4 l + q, in int4 the low nibble; the high nibble is the row 64 further.
  // int8: [K][N]. int4: per 32 columns the scales [N], then [32][N / 2].
  int8_sparse = 8,
  int4_sparse = 9,
  // int6: w = scale * (code - 32), as int4 with 4 vectors more per tile for the upper two bits: bits 2 t and 2 t + 1 of
  // byte 4 i + j of vector q belong to row i, column 16 q + 4 t + j.
  int6 = 10,
};

struct Matrix {
  Format format = Format::f32;
  int64_t rows = 0;  // N after padding: to 16 (columns, int8, int6, int4), 64 (int8_sparse) or 128 (int4_sparse)
  int64_t cols = 0;  // K after padding: to 64 for the integer formats
  const void* data = nullptr;
  const float* scale = nullptr;  // [N], int8 and int8_sparse
};

constexpr int TILE_ROWS = 16;
constexpr int GROUP = 32;
constexpr int64_t INT8_BLOCK = 512;  // columns of 8-bit codes whose products fit into 32-bit sums
constexpr int64_t INT4_TILE_BYTES = 2 * TILE_ROWS * 2 + 8 * 64;
constexpr int64_t INT6_TILE_BYTES = INT4_TILE_BYTES + 4 * 64;

inline bool is_integer(Format f) { return f >= Format::int8; }
inline bool is_sparse(Format f) { return f == Format::int8_sparse || f == Format::int4_sparse; }
inline bool is_columns(Format f) { return f >= Format::f32_columns && f <= Format::f16_columns; }

inline int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

// One row of activations in 15-bit fixed point: x = scale * (256 high + low). The integer products with 4- and 8-bit
// weights are exact; rounding x costs 1.5e-5 of its largest value, far below the error of the weights.
struct FixedRow {
  float scale;
  const int8_t* halves;  // [K padded to 64, / 4][2][4]: four high halves, their four low halves, and so on
  const int16_t* both;   // the same numbers as one 16-bit integer; every four in the order of PLACE (integer_dot.h)
  // What the offset of the weight codes (their zero) adds to a product, to be taken away again.
  const int32_t* group_offsets;  // 8 sum(256 high + low) per 32 columns: int4, and a quarter of int6
  const int32_t* block_offsets;  // int8: (128 sum(high), 128 sum(low)) per 512 columns
};

// Where the pieces of a FixedRow for K columns lie in one block of memory, in bytes.
struct FixedLayout {
  int64_t cols, halves, both, groups, blocks, bytes;
  explicit FixedLayout(int64_t k) {
    cols = round_up(k, 64);
    halves = 64;
    both = halves + 2 * cols;
    groups = both + 2 * cols;
    blocks = groups + cols / GROUP * 4;
    bytes = round_up(blocks + round_up(cols, INT8_BLOCK) / INT8_BLOCK * 8, 64);
  }
  FixedRow at(const void* block) const {
    const char* p = static_cast<const char*>(block);
    return {*reinterpret_cast<const float*>(p), reinterpret_cast<const int8_t*>(p + halves),
            reinterpret_cast<const int16_t*>(p + both),
            reinterpret_cast<const int32_t*>(p + groups), reinterpret_cast<const int32_t*>(p + blocks)};
  }
};

// M rows of activations: floats [M][stride], and in fixed point where the matrix is an integer one.
struct Operand {
  const float* x;
  int64_t stride;
  const char* fixed;     // [M] blocks of FixedLayout(K).bytes
  int64_t fixed_stride;  // bytes
};

}  // namespace wkv
