// y = W x for weights in float32, bfloat16 or float16; arithmetic in float32.
#include "convert.h"
#include "transpose.h"
#include "weights.h"

#include <algorithm>
#include <type_traits>

namespace wkv::WKV_ISA {
namespace {

constexpr int W = LANES<float>;

// Dot products of R rows of W with M rows of x.
template <int R, int M, class T>
WKV_INLINE void dots(const T* w, int64_t k, const float* x, int64_t stride, float* y, int64_t ld) {
  Vec<float> sums[R][M] = {};
  int64_t c = 0;
  for (; c + W <= k; c += W) {
    Vec<float> weight[R];
    for (int r = 0; r < R; ++r) weight[r] = load_floats(w + r * k + c);
    for (int m = 0; m < M; ++m) {
      const Vec<float> v = load(x + m * stride + c);
      for (int r = 0; r < R; ++r) sums[r][m] += weight[r] * v;
    }
  }
  for (int r = 0; r < R; ++r)
    for (int m = 0; m < M; ++m) {
      float total = sum<float>(sums[r][m]);
      for (int64_t i = c; i < k; ++i) total += to_float(w[r * k + i]) * x[m * stride + i];
      y[m * ld + r] = total;
    }
}

// One row of x, where memory is the limit. With vectors of 64 bytes one chain of additions reads it faster than
// several: loads that run too far ahead take the place of the processor's own prefetching (measured: 32 against
// 26 GB/s). With shorter vectors one chain would be slower than the memory.
constexpr int CHAINS = W == 16 ? 1 : 4;

template <class T>
void matvec_rows(const T* w, int64_t k, const float* x, int64_t begin, int64_t end, float* y) {
  for (int64_t n = begin; n < end; ++n) {
    const T* row = w + n * k;
    Vec<float> sums[CHAINS] = {};
    int64_t c = 0;
    for (; c + CHAINS * W <= k; c += CHAINS * W)
      for (int i = 0; i < CHAINS; ++i) {
        // float32 is read as it comes, without waiting for anything else (19 against 16 GB/s without this).
        if (sizeof(T) < 4 && i * W * sizeof(T) % 64 == 0) prefetch_ahead(row + c + i * W);
        sums[i] += load_floats(row + c + i * W) * load(x + c + i * W);
      }
    for (; c + W <= k; c += W) sums[0] += load_floats(row + c) * load(x + c);
    for (int i = 1; i < CHAINS; ++i) sums[0] += sums[i];
    float total = sum<float>(sums[0]);
    for (; c < k; ++c) total += to_float(row[c]) * x[c];
    y[n] = total;
  }
}

template <class T>
void few_rows(const T* w, int64_t k, const Operand& x, int64_t count, int64_t begin, int64_t end, float* y,
              int64_t ld) {
  for (int64_t n = begin; n < end; n += 4) {
    const int64_t rows = std::min<int64_t>(4, end - n);
    int64_t m = 0;
    for (; m + 4 <= count && rows == 4; m += 4)
      dots<4, 4>(w + n * k, k, x.x + m * x.stride, x.stride, y + m * ld + n, ld);
    for (; m < count; ++m)
      for (int64_t r = 0; r < rows; ++r) dots<1, 1>(w + (n + r) * k, k, x.x + m * x.stride, 0, y + m * ld + n + r, 0);
  }
}

// Many rows of x: W is brought into panels [K block][PANEL rows], so that the inner loop is broadcast, load, multiply.
constexpr int PANEL = 2 * W;
constexpr int ROWS = W == 16 ? 12 : W == 8 ? 6 : 4;  // accumulators: 2 x ROWS vectors
constexpr int64_t K_BLOCK = 256;

template <class T>
void pack(const T* w, int64_t k, int64_t rows, int64_t c0, int64_t c1, float* panel) {
  for (int64_t r = 0; r < PANEL; r += W) {
    int64_t c = c0;
    for (; c + W <= c1 && r + W <= rows; c += W) {
      Vec<float> v[W];
      for (int i = 0; i < W; ++i) v[i] = load_floats(w + (r + i) * k + c);
      transpose(v);
      for (int i = 0; i < W; ++i) store<float>(panel + (c + i - c0) * PANEL + r, v[i]);
    }
    for (; c < c1; ++c)
      for (int64_t i = r; i < r + W; ++i) panel[(c - c0) * PANEL + i] = i < rows ? to_float(w[i * k + c]) : 0;
  }
}

template <int M>
WKV_INLINE void panel_times(const float* panel, int64_t depth, const float* x, int64_t stride, float* y, int64_t ld,
                            bool first) {
  Vec<float> sums[M][2];
  for (int m = 0; m < M; ++m)
    for (int i = 0; i < 2; ++i) sums[m][i] = first ? Vec<float>{} : load(y + m * ld + i * W);
  for (int64_t c = 0; c < depth; ++c) {
    const Vec<float> w0 = load(panel + c * PANEL), w1 = load(panel + c * PANEL + W);
    for (int m = 0; m < M; ++m) {
      const Vec<float> v = splat<float>(x[m * stride + c]);
      sums[m][0] += w0 * v;
      sums[m][1] += w1 * v;
    }
  }
  for (int m = 0; m < M; ++m)
    for (int i = 0; i < 2; ++i) store<float>(y + m * ld + i * W, sums[m][i]);
}

// The same for rows n .. n + PANEL of a matrix in blocks of 16 rows.
template <class T>
void pack_columns(const T* w, int64_t k, int64_t n, int64_t rows, int64_t c0, int64_t c1, float* panel) {
  for (int64_t r = 0; r < PANEL; r += W) {
    const T* block = w + (n + r) / TILE_ROWS * TILE_ROWS * k + (n + r) % TILE_ROWS;
    for (int64_t c = c0; c < c1; ++c)
      store<float>(panel + (c - c0) * PANEL + r, r < rows ? load_floats(block + c * TILE_ROWS) : Vec<float>{});
  }
}

template <class T>
void many_rows(const T* w, int64_t k, bool columns, const Operand& x, int64_t count, int64_t begin, int64_t end,
               float* y, int64_t ld) {
  alignas(64) float panel[K_BLOCK * PANEL];
  // Results that do not fill a panel are gathered in `rest` first.
  alignas(64) float rest[ROWS * PANEL];
  for (int64_t n = begin; n < end; n += PANEL) {
    const int64_t rows = std::min<int64_t>(PANEL, end - n);
    for (int64_t c0 = 0; c0 < k; c0 += K_BLOCK) {
      const int64_t c1 = std::min(c0 + K_BLOCK, k);
      if (columns) pack_columns(w, k, n, rows, c0, c1, panel);
      else pack(w + n * k, k, rows, c0, c1, panel);
      const auto run = [&](auto size, int64_t m) {
        constexpr int M = decltype(size)::value;
        const float* in = x.x + m * x.stride + c0;
        if (rows == PANEL) {
          panel_times<M>(panel, c1 - c0, in, x.stride, y + m * ld + n, ld, c0 == 0);
          return;
        }
        for (int i = 0; i < M; ++i)
          for (int64_t r = 0; r < rows; ++r) rest[i * PANEL + r] = c0 == 0 ? 0 : y[(m + i) * ld + n + r];
        panel_times<M>(panel, c1 - c0, in, x.stride, rest, PANEL, false);
        for (int i = 0; i < M; ++i)
          for (int64_t r = 0; r < rows; ++r) y[(m + i) * ld + n + r] = rest[i * PANEL + r];
      };
      int64_t m = 0;
      for (; m + ROWS <= count; m += ROWS) run(std::integral_constant<int, ROWS>{}, m);
      if (ROWS > 4)
        for (; m + 4 <= count; m += 4) run(std::integral_constant<int, 4>{}, m);
      for (; m < count; ++m) run(std::integral_constant<int, 1>{}, m);
    }
  }
}

// A block of 16 rows, column by column, for M rows of x.
template <int M, class T>
WKV_INLINE void column_block(const T* w, int64_t k, const float* x, int64_t stride, float* y, int64_t ld) {
  constexpr int B = TILE_ROWS / W;
  // The maps are short: what follows in memory is the next block, wanted soon.
  constexpr int64_t AHEAD = 3072 / sizeof(T);
  constexpr int CHAIN = M == 1 && B == 2 ? 2 : 1;  // two vectors alone would wait for their additions
  Vec<float> sums[CHAIN][M][B] = {};
  const auto add = [&](int64_t c, auto& to) {
    if (M == 1 && c * TILE_ROWS * sizeof(T) % 64 == 0) __builtin_prefetch(w + c * TILE_ROWS + AHEAD);
    for (int b = 0; b < B; ++b) {
      const Vec<float> weight = load_floats(w + c * TILE_ROWS + b * W);
      for (int m = 0; m < M; ++m) to[m][b] += weight * x[m * stride + c];
    }
  };
  int64_t c = 0;
  for (; c + CHAIN <= k; c += CHAIN)
    for (int i = 0; i < CHAIN; ++i) add(c + i, sums[i]);
  for (; c < k; ++c) add(c, sums[0]);
  for (int m = 0; m < M; ++m)
    for (int b = 0; b < B; ++b) {
      if (CHAIN == 2) sums[0][m][b] += sums[CHAIN - 1][m][b];
      store<float>(y + m * ld + b * W, sums[0][m][b]);
    }
}

template <class T>
void columns(const T* w, int64_t k, const Operand& x, int64_t count, int64_t begin, int64_t end, float* y, int64_t ld) {
  for (int64_t n = begin; n < end; n += TILE_ROWS) {
    int64_t m = 0;
    for (; m + 4 <= count; m += 4) column_block<4>(w + n * k, k, x.x + m * x.stride, x.stride, y + m * ld + n, ld);
    for (; m < count; ++m) column_block<1>(w + n * k, k, x.x + m * x.stride, 0, y + m * ld + n, 0);
  }
}

template <class T>
void run(const Matrix& w, const Operand& x, int64_t count, int64_t begin, int64_t end, float* y, int64_t ld) {
  const T* data = static_cast<const T*>(w.data);
  if (is_columns(w.format)) {
    if (count < 8) return columns(data, w.cols, x, count, begin, end, y, ld);
    return many_rows(data, w.cols, true, x, count, begin, end, y, ld);
  }
  if (count == 1) return matvec_rows(data, w.cols, x.x, begin, end, y);
  if (count < 8) return few_rows(data, w.cols, x, count, begin, end, y, ld);
  many_rows(data, w.cols, false, x, count, begin, end, y, ld);
}

}  // namespace

// Rows [begin, end) of y [M][ld] = W x for the formats in floating point.
void float_matmul(const Matrix& w, const Operand& x, int64_t count, int64_t begin, int64_t end, float* y, int64_t ld) {
  switch (w.format) {
    case Format::f32:
    case Format::f32_columns: return run<float>(w, x, count, begin, end, y, ld);
    case Format::bf16:
    case Format::bf16_columns: return run<bf16>(w, x, count, begin, end, y, ld);
    default: return run<f16>(w, x, count, begin, end, y, ld);
  }
}

}  // namespace wkv::WKV_ISA
