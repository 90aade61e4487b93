// Linear attention and its Taylor form, forward, per head and chunk of up to C tokens:
//   y_i = (sum_{j <= i} w_ij v_j + kv phi(q_i)) / (sum_{j <= i} w_ij + z . phi(q_i) + eps)
// with w_ij = s or (1 + s)^2 / 2 + 1 / 2 of s = q_i . k_j, and kv, z the state before the chunk; then
//   kv += sum_j v_j phi(k_j)^T,   z += sum_j phi(k_j)
#include "taylor_chunk.h"

namespace wkv::WKV_ISA {
namespace {

template <class T>
void read_values(TaylorChunk<T>& x, const FeatureState<T>& state, T* y) {
  for (int64_t first = 0; first < x.count; first += BLOCK) {
    const int64_t rows = x.count - first < BLOCK ? x.count - first : BLOCK;
    multiply<T>({x.weights + first * C, C, 1}, {x.v, x.stride}, rows, first + rows, x.stride,
                {y + first * x.stride, x.stride}, false);
  }
  multiply<T>({x.phi_q, 1, C}, {state.kv, x.stride}, x.count, x.features, x.stride, {y, x.stride}, true);
}

template <class T>
void write_state(const TaylorChunk<T>& x, const FeatureState<T>& state) {
  multiply<T>({x.phi_k, C, 1}, {x.v, x.stride}, x.features, x.count, x.stride, {state.kv, x.stride}, true);
  for (int64_t e = 0; e < x.features; ++e) {
    Vec<T> total = {};
    for_tokens<T>(x.count, [&](int64_t i) { total += load(x.phi_k + e * C + i); });
    state.z[e] += sum<T>(total);
  }
}

template <class T>
void write_values(const TaylorChunk<T>& x, T* y) {
  for (int64_t i = 0; i < x.count; ++i) {
    T* row = y + i * x.stride;
    for (int64_t n = 0; n < x.call.values; ++n) row[n] /= x.den[i];
    write_row(row, x.offset(i, TAYLOR_V), x.call.values, x.call.y);
  }
}

template <class T>
void forward(const TaylorCall& call, int64_t index, void* scratch) {
  TaylorMemory<T> memory(scratch);
  TaylorChunk<T> x(call, index, memory);
  FeatureState<T> state(call, memory);
  T* y = memory.take(C * x.stride);
  state.load(call.kv, call.z, index);
  for (int64_t first = 0; first < call.time; first += C) {
    if (call.starts != nullptr) state.keep(start_of<T>(call, first / C, index));
    const Tokens tokens(call, x.batch, first);
    for (int64_t begin = 0, end; begin < tokens.count; begin = end) {
      end = tokens.end_of(begin);
      if (tokens.reset[begin]) state.clear();
      x.load(tokens, begin, end);
      x.weigh(nullptr);
      x.add_old_weights(state);
      read_values(x, state, y);
      write_values(x, y);
      write_state(x, state);
    }
    x.clear_missing(first, TAYLOR_V, call.y);
  }
  state.save(call.out_kv, call.out_z, index);
}

// ---- one token: the state is read and written once, in the layout of the call ----

template <class T>
void map_row(const TaylorCall& call, T* x, T* phi) {
  for (int64_t i = 0; i < call.size; ++i) x[i] *= static_cast<T>(call.root);
  if (!call.taylor) {
    std::memcpy(phi, x, call.size * sizeof(T));
    return;
  }
  *phi++ = 1;
  std::memcpy(phi, x, call.size * sizeof(T));
  phi += call.size;
  for (int64_t i = 0; i < call.size; phi += call.size - i, ++i) {
    phi[0] = x[i] * static_cast<T>(0.70710678118654752440) * x[i];
    for (int64_t j = i + 1; j < call.size; ++j) phi[j - i] = x[i] * x[j];
  }
}

// to = from + factor * k, and the product of `to` with q; `from` may be null.
template <class T>
T step_row(const T* from, T factor, const T* k, const T* q, int64_t size, T* to) {
  Vec<T> total = {};
  int64_t e = 0;
  for (; e + LANES<T> <= size; e += LANES<T>) {
    Vec<T> s = load(k + e) * factor;
    if (from != nullptr) s += load(from + e);
    store(to + e, s);
    total += s * load(q + e);
  }
  T rest = 0;
  for (; e < size; ++e) {
    to[e] = k[e] * factor + (from == nullptr ? 0 : from[e]);
    rest += to[e] * q[e];
  }
  return sum<T>(total) + rest;
}

template <class T>
void step(const TaylorCall& call, int64_t index, void* scratch) {
  const int64_t batch = index / call.heads, E = call.features(), N = call.values;
  TaylorMemory<T> memory(scratch);
  T *x = memory.take(call.size), *v = memory.take(N), *phi_q = memory.take(E), *phi_k = memory.take(E);
  const bool exists = call.mask == nullptr || call.mask[batch] != 0;
  const bool fresh = exists && call.reset != nullptr && call.reset[batch] != 0;
  if (exists) {
    read_row(call.inputs[TAYLOR_Q], index * call.size, call.size, x), map_row(call, x, phi_q);
    read_row(call.inputs[TAYLOR_K], index * call.size, call.size, x), map_row(call, x, phi_k);
    read_row(call.inputs[TAYLOR_V], index * N, N, v);
  }
  const T *kv = static_cast<const T*>(call.kv), *z = static_cast<const T*>(call.z);
  T *out_kv = static_cast<T*>(call.out_kv) + index * N * E, *out_z = static_cast<T*>(call.out_z) + index * E;
  const T* from_z = fresh || z == nullptr ? nullptr : z + index * E;
  const T den = step_row<T>(from_z, 1, phi_k, phi_q, E, out_z) + static_cast<T>(call.eps);
  for (int64_t n = 0; n < N; ++n) {
    const T* from = fresh || kv == nullptr ? nullptr : kv + (index * N + n) * E;
    const T read = step_row<T>(from, v[n], phi_k, phi_q, E, out_kv + n * E);
    v[n] = exists ? read / den : 0;
  }
  write_row(v, index * N, N, call.y);
}

}  // namespace

void taylor_forward(const TaylorCall& call, int64_t index, void* scratch) {
  const bool one = call.time == 1 && call.starts == nullptr;
  if (call.wide) return one ? step<double>(call, index, scratch) : forward<double>(call, index, scratch);
  return one ? step<float>(call, index, scratch) : forward<float>(call, index, scratch);
}

}  // namespace wkv::WKV_ISA
