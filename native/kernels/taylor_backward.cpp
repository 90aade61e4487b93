// Linear attention and its Taylor form, backward, per head and chunk from the last. With num and den of the forward
// pass, d = dy / den and e = -(d . y) / den are their gradients, and d . y is gathered from the products with d that
// are needed in any case:
//   d . num = sum_j w_ij (d_i . v_j) + phi(q_i) . kv^T d_i
//   ds_ij = (d_i . v_j + e_i) dw/ds,   dphi(q_i) = kv^T d_i + z e_i,   dphi(k_j) = dkv^T v_j + dz
//   dv_j = dkv phi(k_j) + sum_i w_ij d_i,   dkv += sum_i d_i phi(q_i)^T,   dz += sum_i e_i phi(q_i)
// where kv, z are the state before the chunk and dkv, dz the gradients of the one behind it.
#include "taylor_chunk.h"

namespace wkv::WKV_ISA {
namespace {

template <class T>
class TaylorBackward {
 public:
  TaylorBackward(const TaylorCall& call, int64_t index, void* scratch)
      : call_(call), index_(index), memory_(scratch), x_(call, index, memory_), state_(call, memory_),
        d_state_(call, memory_), E_(x_.features), N_(call.values), stride_(x_.stride) {
    slope_ = memory_.take(C * C), ds_ = memory_.take(C * C), ds_turned_ = memory_.take(C * C);
    d_ = memory_.take(C * stride_), d_turned_ = memory_.take(N_ * C), v_turned_ = memory_.take(N_ * C);
    d_den_ = memory_.take(C), d_phi_ = memory_.take(E_ * C), dv_ = memory_.take(C * stride_);
    dq_ = memory_.take(call.size * C), dk_ = memory_.take(call.size * C);
  }

  void run() {
    d_state_.load(call_.kv, call_.z, index_);
    for (int64_t number = (call_.time - 1) / C; number >= 0; --number) {
      const Tokens tokens(call_, x_.batch, number * C);
      for (int64_t end = tokens.count, begin; end > 0; end = begin) {
        begin = tokens.begin_of(end);
        if (tokens.reset[begin]) state_.clear();
        else state_.restore(start_of<T>(call_, number, index_));
        x_.load(tokens, begin, end);
        undo_division();
        undo_weights();
        undo_queries();
        undo_values_and_keys();
        undo_reading();
        write();
        if (tokens.reset[begin]) d_state_.clear();
      }
      for (TaylorName name : {TAYLOR_Q, TAYLOR_K, TAYLOR_V}) x_.clear_missing(number * C, name, call_.gradients[name]);
    }
    d_state_.save(call_.out_kv, call_.out_z, index_);
  }

 private:
  // d, and both d and v with tokens along the lanes; ds = d . v for now.
  void undo_division() {
    x_.weigh(slope_);
    x_.add_old_weights(state_);
    std::memset(d_turned_, 0, N_ * C * sizeof(T)), std::memset(v_turned_, 0, N_ * C * sizeof(T));
    for (int64_t i = 0; i < x_.count; ++i) {
      T* d = d_ + i * stride_;
      x_.read_token(TAYLOR_DY, i, d);
      for (int64_t n = 0; n < N_; ++n) d[n] /= x_.den[i];
      to_lanes<T>(d, N_, 1, i, d_turned_), to_lanes<T>(x_.v + i * stride_, N_, 1, i, v_turned_);
    }
    for_blocks([&](int64_t first, int64_t rows) {
      multiply<T>({d_ + first * stride_, stride_, 1}, {v_turned_, C}, rows, N_, first + BLOCK, {ds_ + first * C, C},
                  false);
    });
    multiply<T>({state_.kv, stride_, 1}, {d_turned_, C}, E_, N_, x_.count, {d_phi_, C}, false);
  }

  // d_den, then the whole of dphi(q) and of ds.
  void undo_weights() {
    for (int64_t i = 0; i < x_.count; ++i) d_den_[i] = -dot(x_.weights + i * C, ds_ + i * C, i / BLOCK * BLOCK + BLOCK);
    for (int64_t i = x_.count; i < C; ++i) d_den_[i] = 0;
    for_tokens<T>(x_.count, [&](int64_t i) {
      Vec<T> total = load(d_den_ + i);
      for (int64_t e = 0; e < E_; ++e) total -= load(x_.phi_q + e * C + i) * load(d_phi_ + e * C + i);
      store(d_den_ + i, total);
    });
    for (int64_t i = 0; i < x_.count; ++i) d_den_[i] /= x_.den[i];
    for (int64_t i = x_.count; i < C; ++i) d_den_[i] = 0;
    for (int64_t e = 0; e < E_; ++e)
      for_tokens<T>(x_.count, [&](int64_t i) { add(d_phi_ + e * C + i, load(d_den_ + i) * state_.z[e]); });
    for (int64_t i = 0; i < x_.count; ++i) undo_weights_of(i);
  }

  void undo_weights_of(int64_t i) {
    T *ds = ds_ + i * C, *slope = slope_ + i * C;
    const int64_t end = i / BLOCK * BLOCK + BLOCK;
    for_tokens<T>(end, [&](int64_t j) {
      const Vec<T> dw = load(ds + j) + d_den_[i];
      store<T>(ds + j, call_.taylor ? dw * load(slope + j) : dw);
    });
    for (int64_t j = i + 1; j < end; ++j) ds[j] = 0;
    for (int64_t j = 0; j < end; ++j) ds_turned_[j * C + i] = ds[j];
  }

  void undo_queries() {
    for_blocks([&](int64_t first, int64_t rows) {
      multiply<T>({x_.k, C, 1}, {ds_turned_ + first, C}, call_.size, first + rows, rows, {dq_ + first, C}, false);
    });
    undo_features(x_.q, dq_);
  }

  // Before dkv meets the queries of the chunk.
  void undo_values_and_keys() {
    multiply<T>({x_.phi_k, 1, C}, {d_state_.kv, stride_}, x_.count, E_, stride_, {dv_, stride_}, false);
    for_blocks([&](int64_t first, int64_t rows) {
      const int64_t later = x_.count - first;
      multiply<T>({x_.weights + first * C + first, 1, C}, {d_ + first * stride_, stride_}, rows, later, stride_,
                  {dv_ + first * stride_, stride_}, true);
      multiply<T>({x_.q + first, C, 1}, {ds_ + first * C + first, C}, call_.size, later, rows, {dk_ + first, C}, false);
    });
    multiply<T>({d_state_.kv, stride_, 1}, {v_turned_, C}, E_, N_, x_.count, {d_phi_, C}, false);
    for (int64_t e = 0; e < E_; ++e)
      for_tokens<T>(x_.count, [&](int64_t i) { add(d_phi_ + e * C + i, splat<T>(d_state_.z[e])); });
    undo_features(x_.k, dk_);
  }

  void undo_reading() {
    multiply<T>({x_.phi_q, C, 1}, {d_, stride_}, E_, x_.count, stride_, {d_state_.kv, stride_}, true);
    for (int64_t e = 0; e < E_; ++e) {
      Vec<T> total = {};
      for_tokens<T>(x_.count, [&](int64_t i) { total += load(x_.phi_q + e * C + i) * load(d_den_ + i); });
      d_state_.z[e] += sum<T>(total);
    }
  }

  // dx += what d_phi says about the scaled x.
  void undo_features(const T* x, T* dx) {
    const int64_t size = call_.size;
    const T* d_phi = d_phi_ + (call_.taylor ? C : 0);
    for (int64_t f = 0; f < size; ++f, d_phi += C)
      for_tokens<T>(x_.count, [&](int64_t t) { add(dx + f * C + t, load(d_phi + t)); });
    if (!call_.taylor) return;
    for (int64_t i = 0; i < size; ++i)
      for (int64_t j = i; j < size; ++j, d_phi += C) {
        const T weight = i == j ? static_cast<T>(0.70710678118654752440) : 1;
        for_tokens<T>(x_.count, [&](int64_t t) {
          const Vec<T> d = load(d_phi + t) * weight;
          add(dx + i * C + t, d * load(x + j * C + t));
          add(dx + j * C + t, d * load(x + i * C + t));  // after the first: i and j may be the same
        });
      }
  }

  void write() {
    const T root = static_cast<T>(call_.root);
    for (int64_t i = 0; i < x_.count; ++i) {
      from_lanes(dq_, call_.size, root, i, x_.row);
      write_row(x_.row, x_.offset(i, TAYLOR_Q), call_.size, call_.gradients[TAYLOR_Q]);
      from_lanes(dk_, call_.size, root, i, x_.row);
      write_row(x_.row, x_.offset(i, TAYLOR_K), call_.size, call_.gradients[TAYLOR_K]);
      write_row(dv_ + i * stride_, x_.offset(i, TAYLOR_V), N_, call_.gradients[TAYLOR_V]);
    }
  }

  template <class Function>
  void for_blocks(Function&& function) {
    for (int64_t first = 0; first < x_.count; first += BLOCK)
      function(first, x_.count - first < BLOCK ? x_.count - first : BLOCK);
  }

  static WKV_INLINE void add(T* row, Vec<T> value) { store<T>(row, load(row) + value); }

  const TaylorCall& call_;
  const int64_t index_;
  TaylorMemory<T> memory_;
  TaylorChunk<T> x_;
  FeatureState<T> state_, d_state_;
  const int64_t E_, N_, stride_;
  T *slope_, *ds_, *ds_turned_, *d_, *d_turned_, *v_turned_, *d_den_, *d_phi_, *dv_, *dq_, *dk_;
};

}  // namespace

void taylor_backward(const TaylorCall& call, int64_t index, void* scratch) {
  if (call.wide) return TaylorBackward<double>(call, index, scratch).run();
  TaylorBackward<float>(call, index, scratch).run();
}

}  // namespace wkv::WKV_ISA
