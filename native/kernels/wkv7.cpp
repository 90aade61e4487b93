// WKV-7 forward, per head:  S_t = S_{t-1} (diag(exp(log_w_t)) + a_t b_t^T) + v_t k_t^T,  y_t = S_t r_t.
// One pass over the state per token: while S_t is in registers it also meets a_{t+1}, so that the next token finds
// removed_{t+1} = S_t a_{t+1} ready.
#include "matrix_forward.h"

namespace wkv::WKV_ISA {
namespace {

template <class T>
class Wkv7 {
 public:
  static constexpr Name names[] = {ROW_R, ROW_LOG_W, ROW_K, ROW_V, ROW_A, ROW_B};

  Wkv7(const MatrixCall&, int64_t, Scratch<T>& scratch) : removed_(scratch.take(1)) {}

  void token(const Segment<T>& x, int64_t i, TransposedState<T>& state, T* y) {
    if (x.reset[i]) {
      state.clear();
      std::memset(removed_, 0, state.stride * sizeof(T));
    } else if (i == 0) {
      for_lanes<T>(state.stride, [&](int64_t lane, auto vectors) { remove<vectors()>(x.row(ROW_A, 0), state, lane); });
    }
    // The last token of a segment does not know its successor: what it prepares is not used.
    const T* next_a = x.row(ROW_A, i + 1 < x.count ? i + 1 : i);
    for_lanes<T>(state.stride, [&](int64_t lane, auto vectors) { step<vectors()>(x, i, next_a, state, lane, y); });
  }

 private:
  template <int VECTORS>
  WKV_INLINE void remove(const T* a, const TransposedState<T>& state, int64_t lane) {
    Vec<T> removed[VECTORS] = {};
    for (int64_t c = 0; c < state.size; ++c)
#pragma GCC unroll 4
      for (int j = 0; j < VECTORS; ++j) removed[j] += load(state.S + c * state.stride + lane + j * LANES<T>) * a[c];
    for (int j = 0; j < VECTORS; ++j) store(removed_ + lane + j * LANES<T>, removed[j]);
  }

  template <int VECTORS>
  WKV_INLINE void step(const Segment<T>& x, int64_t i, const T* next_a, TransposedState<T>& state, int64_t lane, T* y) {
    const T *r = x.row(ROW_R, i), *decay = x.row(ROW_LOG_W, i), *k = x.row(ROW_K, i), *b = x.row(ROW_B, i);
    const T* v = x.row(ROW_V, i) + state.first + lane;
    Vec<T> removed[VECTORS], value[VECTORS], read[VECTORS] = {}, next[VECTORS] = {};
    for (int j = 0; j < VECTORS; ++j) {
      removed[j] = load(removed_ + lane + j * LANES<T>);
      value[j] = load(v + j * LANES<T>);
    }
    T* S = state.S + lane;
    for (int64_t c = 0; c < state.size; ++c, S += state.stride) {
#pragma GCC unroll 4
      for (int j = 0; j < VECTORS; ++j) {
        Vec<T> s = load(S + j * LANES<T>) * decay[c];
        s += removed[j] * b[c];
        s += value[j] * k[c];
        store(S + j * LANES<T>, s);
        read[j] += s * r[c];
        next[j] += s * next_a[c];
      }
    }
    for (int j = 0; j < VECTORS; ++j) {
      store(y + lane + j * LANES<T>, read[j]);
      store(removed_ + lane + j * LANES<T>, next[j]);
    }
  }

  T* removed_;
};

}  // namespace

void wkv7_forward(const MatrixCall& call, int64_t index, int64_t first_row, int64_t rows, void* scratch) {
  if (call.wide) return forward<double, Wkv7<double>>(call, index, first_row, rows, scratch);
  forward<float, Wkv7<float>>(call, index, first_row, rows, scratch);
}

}  // namespace wkv::WKV_ISA
