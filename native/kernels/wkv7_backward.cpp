// WKV-7 backward. With P = S_{t-1}, D = exp(log_w_t), removed = P a_t and dS the gradient of S_t, from the last token:
//   dS += dy r^T;   dr = S_t^T dy;   dv = dS k;   dk = dS^T v;   db = dS^T removed;   g = dS b;   da = P^T g
//   dlog_w = D * colsum(dS * P);   dS = dS diag(D) + g a^T
// dv and g are read before dy r^T is added, as (dS k) + dy (r . k): dS is then written once per token.
#include "matrix_backward.h"

namespace wkv::WKV_ISA {
namespace {

template <class T>
class Wkv7Backward {
 public:
  static constexpr Name names[] = {ROW_R, ROW_LOG_W, ROW_K, ROW_V, ROW_A, ROW_B, ROW_DY};

  Wkv7Backward(const MatrixCall&, int64_t, Scratch<T>& scratch) : removed_(scratch.take(SEGMENT)) {}

  void redo(const Segment<T>& x, const Tile<T>& tile) {
    for (int64_t i = 0; i < x.count; ++i) {
      const T* P = tile.met(x, i);
      T* removed = removed_ + i * LANES<T>;
      store(removed, rows_times(P, tile.stride, x.row(ROW_A, i)));
      for (int64_t c = 0; c < tile.stride; c += LANES<T>) redo_keys(x, i, tile, P, removed, c);
    }
  }

  void undo(const Segment<T>& x, const Tile<T>& tile, Segment<T>& d) {
    for (int64_t i = x.count - 1; i >= 0; --i) {
      const T *r = x.row(ROW_R, i), *k = x.row(ROW_K, i), *b = x.row(ROW_B, i);
      const Vec<T> dy = load(x.row(ROW_DY, i) + tile.first);
      const Vec<T> dv = rows_times(tile.dS, tile.stride, k) + dy * dot(r, k, tile.stride);
      const Vec<T> g = rows_times(tile.dS, tile.stride, b) + dy * dot(r, b, tile.stride);
      store(d.row(ROW_V, i) + tile.first, dv);
      T g_rows[LANES<T>];
      store(g_rows, g);
      for (int64_t c = 0; c < tile.stride; c += LANES<T>) undo_keys(x, i, tile, g_rows, c, d);
      tile.cut(x, i);
    }
  }

  void end() {}

  void finish(const Segment<T>& x, Segment<T>& d) {
    for (int64_t i = 0; i < x.count; ++i) {
      T *slope = d.row(ROW_LOG_W, i), *decay = x.row(ROW_LOG_W, i);
      for (int64_t c = 0; c < x.stride; c += LANES<T>) store(slope + c, load(slope + c) * load(decay + c));
    }
  }

 private:
  // Keys c .. c + LANES of one token, for all rows of the tile; so does undo_keys.
  WKV_INLINE void redo_keys(const Segment<T>& x, int64_t i, const Tile<T>& tile, const T* P, const T* removed,
                            int64_t c) {
    const Vec<T> decay = load(x.row(ROW_LOG_W, i) + c), b = load(x.row(ROW_B, i) + c), k = load(x.row(ROW_K, i) + c);
    const T* v = x.row(ROW_V, i) + tile.first;
    T* S = tile.after(i) + c;
    P += c;
#pragma GCC unroll 4
    for (int64_t m = 0; m < LANES<T>; ++m, P += tile.stride, S += tile.stride) {
      Vec<T> s = load(P) * decay;
      s += b * removed[m];
      s += k * v[m];
      store(S, s);
    }
  }

  WKV_INLINE void undo_keys(const Segment<T>& x, int64_t i, const Tile<T>& tile, const T* g, int64_t c, Segment<T>& d) {
    const Vec<T> decay = load(x.row(ROW_LOG_W, i) + c), r = load(x.row(ROW_R, i) + c), a = load(x.row(ROW_A, i) + c);
    Vec<T> dr = {}, dD = {}, dk = {}, da = {}, db = {};
    const T *P = tile.met(x, i) + c, *S = tile.after(i) + c, *removed = removed_ + i * LANES<T>;
    const T *v = x.row(ROW_V, i) + tile.first, *dy = x.row(ROW_DY, i) + tile.first;
    T* dS = tile.dS + c;
#pragma GCC unroll 4
    for (int64_t m = 0; m < LANES<T>; ++m, P += tile.stride, dS += tile.stride, S += tile.stride) {
      const Vec<T> before = load(P), ds = load(dS) + r * dy[m];
      dr += load(S) * dy[m];
      dD += ds * before;
      dk += ds * v[m];
      db += ds * removed[m];
      da += before * g[m];
      Vec<T> next = ds * decay;
      next += a * g[m];
      store(dS, next);
    }
    add(d.row(ROW_R, i) + c, dr);
    add(d.row(ROW_LOG_W, i) + c, dD);
    add(d.row(ROW_K, i) + c, dk);
    add(d.row(ROW_A, i) + c, da);
    add(d.row(ROW_B, i) + c, db);
  }

  T* removed_;  // [SEGMENT][LANES]: what the removal keys read in a tile
};

}  // namespace

void wkv7_backward(const MatrixCall& call, int64_t index, void* scratch) {
  if (call.wide) return backward<double, Wkv7Backward<double>>(call, index, scratch);
  backward<float, Wkv7Backward<float>>(call, index, scratch);
}

}  // namespace wkv::WKV_ISA
