// WKV-5 and WKV-6 backward. With P = S_{t-1}, D = exp(log_w_t) and dS the gradient of S_t, per token from the last:
//   dr = P^T dy + u k (dy . v);   dk = dS^T v + u r (dy . v);   dv = dS k + dy (r . u k);   du += r k (dy . v)
//   dlog_w = D * colsum(dS * P);   dS = dS diag(D) + dy r^T
// du, and with a constant decay dlog_w, are summed over the tokens of the head.
#include "matrix_backward.h"

namespace wkv::WKV_ISA {
namespace {

template <class T>
class LinearBackward {
 public:
  static constexpr Name names[] = {ROW_R, ROW_LOG_W, ROW_K, ROW_V, ROW_DY};

  LinearBackward(const MatrixCall& call, int64_t index, Scratch<T>& scratch)
      : call_(call), index_(index), u_(scratch.take(1)), du_(scratch.take(1)), dw_(scratch.take(1)) {
    read_row(call.inputs[ROW_U], index % call.heads * call.size, call.size, u_);
  }

  void redo(const Segment<T>& x, const Tile<T>& tile) {
    for (int64_t i = 0; i + 1 < x.count; ++i)  // nobody reads the state behind the last token
      for (int64_t c = 0; c < tile.stride; c += LANES<T>) redo_keys(x, i, tile, c);
  }

  void undo(const Segment<T>& x, const Tile<T>& tile, Segment<T>& d) {
    for (int64_t i = x.count - 1; i >= 0; --i) {
      store(d.row(ROW_V, i) + tile.first, rows_times(tile.dS, tile.stride, x.row(ROW_K, i)));
      for (int64_t c = 0; c < tile.stride; c += LANES<T>) undo_keys(x, i, tile, c, d);
      tile.cut(x, i);
    }
  }

  void finish(const Segment<T>& x, Segment<T>& d) {
    T dy_v[SEGMENT], bonus[SEGMENT];
    for (int64_t i = 0; i < x.count; ++i) {
      dy_v[i] = dot(x.row(ROW_DY, i), x.row(ROW_V, i), x.stride);
      bonus[i] = bonus_of(x.row(ROW_R, i), x.row(ROW_K, i), x.stride);
    }
    for (int64_t c = 0; c < x.stride; c += LANES<T>) {
      const Vec<T> u = load(u_ + c);
      Vec<T> du = {}, dw = {};
      for (int64_t i = 0; i < x.count; ++i) {
        const Vec<T> r = load(x.row(ROW_R, i) + c), k = load(x.row(ROW_K, i) + c);
        T* slope = d.row(ROW_LOG_W, i) + c;
        add(d.row(ROW_R, i) + c, u * k * dy_v[i]);
        add(d.row(ROW_K, i) + c, u * r * dy_v[i]);
        add(d.row(ROW_V, i) + c, load(x.row(ROW_DY, i) + c) * bonus[i]);
        store(slope, load(slope) * load(x.row(ROW_LOG_W, i) + c));
        dw += load(slope);
        du += r * k * dy_v[i];
      }
      add(du_ + c, du);
      add(dw_ + c, dw);
    }
  }

  void end() {
    const int64_t offset = index_ * call_.size;
    write_row(du_, offset, call_.size, call_.gradients[ROW_U]);
    if (call_.constant_decay) write_row(dw_, offset, call_.size, call_.gradients[ROW_LOG_W]);
  }

 private:
  WKV_INLINE T bonus_of(const T* r, const T* k, int64_t stride) {
    Vec<T> total = {};
    for (int64_t c = 0; c < stride; c += LANES<T>) total += load(r + c) * load(u_ + c) * load(k + c);
    return sum<T>(total);
  }

  // Keys c .. c + LANES of one token, for all rows of the tile; so does undo_keys.
  WKV_INLINE void redo_keys(const Segment<T>& x, int64_t i, const Tile<T>& tile, int64_t c) {
    const Vec<T> decay = load(x.row(ROW_LOG_W, i) + c), k = load(x.row(ROW_K, i) + c);
    const T *P = tile.met(x, i) + c, *v = x.row(ROW_V, i) + tile.first;
    T* S = tile.after(i) + c;
#pragma GCC unroll 4
    for (int64_t m = 0; m < LANES<T>; ++m, P += tile.stride, S += tile.stride) {
      Vec<T> s = load(P) * decay;
      s += k * v[m];
      store(S, s);
    }
  }

  WKV_INLINE void undo_keys(const Segment<T>& x, int64_t i, const Tile<T>& tile, int64_t c, Segment<T>& d) {
    const Vec<T> decay = load(x.row(ROW_LOG_W, i) + c), r = load(x.row(ROW_R, i) + c);
    Vec<T> dr = {}, dD = {}, dk = {};
    const T *P = tile.met(x, i) + c, *v = x.row(ROW_V, i) + tile.first, *dy = x.row(ROW_DY, i) + tile.first;
    T* dS = tile.dS + c;
#pragma GCC unroll 4
    for (int64_t m = 0; m < LANES<T>; ++m, P += tile.stride, dS += tile.stride) {
      const Vec<T> before = load(P), ds = load(dS);
      dr += before * dy[m];
      dD += ds * before;
      dk += ds * v[m];
      Vec<T> next = ds * decay;
      next += r * dy[m];
      store(dS, next);
    }
    add(d.row(ROW_R, i) + c, dr);
    add(d.row(ROW_LOG_W, i) + c, dD);
    add(d.row(ROW_K, i) + c, dk);
  }

  const MatrixCall& call_;
  const int64_t index_;
  T *u_, *du_, *dw_;
};

}  // namespace

void linear_backward(const MatrixCall& call, int64_t index, void* scratch) {
  if (call.wide) return backward<double, LinearBackward<double>>(call, index, scratch);
  backward<float, LinearBackward<float>>(call, index, scratch);
}

}  // namespace wkv::WKV_ISA
