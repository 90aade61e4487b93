// WKV-5 and WKV-6 forward, per head:
//   y_t = S_{t-1} r_t + v_t (r_t . u k_t),   S_t = S_{t-1} diag(exp(log_w_t)) + v_t k_t^T
// WKV-5 differs in that no token changes log_w.
#include "matrix_forward.h"

namespace wkv::WKV_ISA {
namespace {

template <class T>
class Linear {
 public:
  static constexpr Name names[] = {ROW_R, ROW_LOG_W, ROW_K, ROW_V};

  Linear(const MatrixCall& call, int64_t head, Scratch<T>& scratch) : u_(scratch.take(1)), bonus_(scratch.take(1)) {
    read_row(call.inputs[ROW_U], head * call.size, call.size, u_);
  }

  void token(const Segment<T>& x, int64_t i, TransposedState<T>& state, T* y) {
    if (x.reset[i]) state.clear();
    const T *r = x.row(ROW_R, i), *k = x.row(ROW_K, i);
    for (int64_t c = 0; c < x.stride; c += LANES<T>) store(bonus_ + c, load(r + c) * load(u_ + c));
    const T bonus = dot(bonus_, k, x.stride);
    for_lanes<T>(state.stride, [&](int64_t lane, auto vectors) { step<vectors()>(x, i, bonus, state, lane, y); });
  }

 private:
  template <int VECTORS>
  WKV_INLINE void step(const Segment<T>& x, int64_t i, T bonus, TransposedState<T>& state, int64_t lane, T* y) {
    const T *r = x.row(ROW_R, i), *decay = x.row(ROW_LOG_W, i), *k = x.row(ROW_K, i);
    const T* v = x.row(ROW_V, i) + state.first + lane;
    Vec<T> value[VECTORS], read[VECTORS];
    for (int j = 0; j < VECTORS; ++j) {
      value[j] = load(v + j * LANES<T>);
      read[j] = value[j] * bonus;
    }
    T* S = state.S + lane;
    for (int64_t c = 0; c < state.size; ++c, S += state.stride) {
#pragma GCC unroll 4
      for (int j = 0; j < VECTORS; ++j) {
        const Vec<T> s = load(S + j * LANES<T>);
        read[j] += s * r[c];
        Vec<T> next = s * decay[c];
        next += value[j] * k[c];
        store(S + j * LANES<T>, next);
      }
    }
    for (int j = 0; j < VECTORS; ++j) store(y + lane + j * LANES<T>, read[j]);
  }

  T *u_, *bonus_;
};

}  // namespace

void linear_forward(const MatrixCall& call, int64_t index, int64_t first_row, int64_t rows, void* scratch) {
  if (call.wide) return forward<double, Linear<double>>(call, index, first_row, rows, scratch);
  forward<float, Linear<float>>(call, index, first_row, rows, scratch);
}

}  // namespace wkv::WKV_ISA
