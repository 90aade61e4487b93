#include "multiply.h"

#include "api.h"
#include "dispatch.h"
#include "threads.h"

#include <algorithm>

WKV_DISPATCH(to_fixed_point, (const float* x, int64_t k, char* out), (x, k, out))
WKV_DISPATCH(integer_matmul,
             (const Matrix& w, const Operand& x, int64_t count, int64_t begin, int64_t end, float* y, int64_t ld),
             (w, x, count, begin, end, y, ld))
WKV_DISPATCH(float_matmul,
             (const Matrix& w, const Operand& x, int64_t count, int64_t begin, int64_t end, float* y, int64_t ld),
             (w, x, count, begin, end, y, ld))
WKV_DISPATCH(sparse_matmul,
             (const Matrix& w, const Operand& x, int64_t count, int64_t begin, int64_t end, float* y, int64_t ld,
              uint8_t* scratch),
             (w, x, count, begin, end, y, ld, scratch))
WKV_DISPATCH(sparse_matvec,
             (const Matrix& w, const FixedRow& x, int64_t group_begin, int64_t group_end, float* y, int64_t* skipped),
             (w, x, group_begin, group_end, y, skipped))

namespace wkv {

int64_t row_unit(const Matrix& w) {
  switch (w.format) {
    case Format::int8_sparse: return 64;
    case Format::int4_sparse: return 128;
    default: return TILE_ROWS;
  }
}

static double bytes_per_weight(Format f) {
  switch (f) {
    case Format::f32:
    case Format::f32_columns: return 4;
    case Format::int8:
    case Format::int8_sparse: return 1;
    case Format::int4:
    case Format::int4_sparse: return 0.5625;
    case Format::int6: return 0.8125;
    default: return 2;
  }
}

int64_t rows_per_share(const Matrix& w, int64_t bytes) {
  const int64_t unit = std::max<int64_t>(row_unit(w), is_integer(w.format) ? 0 : 64);
  const int64_t rows = static_cast<int64_t>(bytes / (bytes_per_weight(w.format) * w.cols));
  return std::max(unit, rows / unit * unit);
}

void multiply(const Matrix& w, const Operand& x, int64_t count, int64_t begin, int64_t end, float* y, int64_t ld,
              std::vector<uint8_t>& scratch) {
  if (!is_integer(w.format)) return float_matmul(w, x, count, begin, end, y, ld);
  if (!is_sparse(w.format)) return integer_matmul(w, x, count, begin, end, y, ld);
  const size_t needed = static_cast<size_t>(row_unit(w) * w.cols);
  if (scratch.size() < needed) scratch.resize(needed);
  sparse_matmul(w, x, count, begin, end, y, ld, scratch.data());
}

void quantize_row(const float* x, int64_t k, char* out) { to_fixed_point(x, k, out); }

void multiply_sparse(const Matrix& w, const FixedRow& x, int64_t group_begin, int64_t group_end, float* y,
                     int64_t* skipped) {
  sparse_matvec(w, x, group_begin, group_end, y, skipped);
}

}  // namespace wkv

// y [count][w rows] = W x for contiguous float32 x [count][cols]. Columns beyond `cols` (padding) count as zero.
// Returns 0, or -1 if memory runs out.
WKV_API int64_t wkv_matmul(int64_t format, int64_t rows, int64_t padded_cols, const void* data, const float* scale,
                           const float* x, int64_t cols, int64_t count, float* y, int64_t threads) {
  using namespace wkv;
  try {
    const Matrix w{static_cast<Format>(format), rows, padded_cols, data, scale};
    Operand operand{x, cols, nullptr, 0};
    std::vector<char> fixed;
    if (is_integer(w.format)) {
      const FixedLayout layout(padded_cols);
      fixed.resize(static_cast<size_t>(layout.bytes * count + 64));
      char* base = fixed.data() + (64 - reinterpret_cast<uintptr_t>(fixed.data()) % 64);
      parallel_for(static_cast<int>(threads), count, [&](int64_t m) {
        std::vector<float> padded(static_cast<size_t>(padded_cols), 0.0f);
        std::copy(x + m * cols, x + (m + 1) * cols, padded.data());
        quantize_row(padded.data(), padded_cols, base + m * layout.bytes);
      });
      operand.fixed = base;
      operand.fixed_stride = layout.bytes;
    }
    const int64_t share = rows_per_share(w, 1 << 16), shares = (rows + share - 1) / share;
    parallel_for(static_cast<int>(threads), shares, [&](int64_t i) {
      thread_local std::vector<uint8_t> scratch;
      multiply(w, operand, count, i * share, std::min(rows, (i + 1) * share), y, rows, scratch);
    });
    return 0;
  } catch (const std::bad_alloc&) {
    return -1;
  }
}
