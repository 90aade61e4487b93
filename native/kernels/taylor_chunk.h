// What both walks of taylor.cpp and taylor_backward.cpp share: the tokens of a chunk in the compute type, their
// features, their weights, and the state between chunks.
//
// Tokens run along vector lanes wherever they can: queries, keys and features lie [feature][token], so that a feature
// map is a product of rows. Values lie [token][value], the state [feature][value]. A reset ends a chunk early: the next
// one starts from an empty state, and nothing of the old one is ever multiplied, not even by 0.
#pragma once
#include "matrix_state.h"
#include "small_matmul.h"
#include "taylor.h"

namespace wkv::WKV_ISA {

constexpr int64_t C = TAYLOR_CHUNK;
constexpr int64_t AHEAD = 6;   // tokens whose rows are asked for before they are read
constexpr int64_t BLOCK = 16;  // tokens whose weights are computed at a time: later ones are left out

// Hands out zeroed scratch memory, aligned for vectors.
template <class T>
class TaylorMemory {
 public:
  explicit TaylorMemory(void* memory) : next_(static_cast<T*>(memory)) {}
  T* take(int64_t numbers) {
    T* block = next_;
    next_ += padded(numbers);
    std::memset(block, 0, padded(numbers) * sizeof(T));
    return block;
  }

 private:
  T* next_;
};

// The tokens of a segment of C that exist.
struct Tokens {
  int64_t count = 0;
  int64_t flag[C];  // its place in [B, T]
  bool reset[C];

  Tokens(const TaylorCall& call, int64_t batch, int64_t first) {
    const int64_t end = first + C < call.time ? first + C : call.time;
    for (int64_t t = first; t < end; ++t) {
      const int64_t at = batch * call.time + t;
      if (call.mask != nullptr && call.mask[at] == 0) continue;
      reset[count] = call.reset != nullptr && call.reset[at] != 0;
      flag[count++] = at;
    }
  }

  // Where the chunk that starts with token `begin` ends.
  int64_t end_of(int64_t begin) const {
    int64_t end = begin + 1;
    while (end < count && !reset[end]) ++end;
    return end;
  }
  // Where the chunk that ends before `end` starts.
  int64_t begin_of(int64_t end) const {
    int64_t begin = end - 1;
    while (begin > 0 && !reset[begin]) --begin;
    return begin;
  }
};

// kv and z, or their gradients.
template <class T>
struct FeatureState {
  int64_t features, values, stride;
  T* kv;  // [E][stride]
  T* z;   // [E]

  FeatureState(const TaylorCall& call, TaylorMemory<T>& memory)
      : features(call.features()), values(call.values), stride(padded(call.values)),
        kv(memory.take(features * stride)), z(memory.take(features)) {}

  void clear() const {
    std::memset(kv, 0, features * stride * sizeof(T));
    std::memset(z, 0, features * sizeof(T));
  }

  // From and to the layout of a call, [N][E].
  void load(const void* from_kv, const void* from_z, int64_t index) const {
    const T* from = static_cast<const T*>(from_kv) + (from_kv == nullptr ? 0 : index * values * features);
    for (int64_t e = 0; from_kv != nullptr && e < features; ++e)
      for (int64_t n = 0; n < values; ++n) kv[e * stride + n] = from[n * features + e];
    if (from_z != nullptr) std::memcpy(z, static_cast<const T*>(from_z) + index * features, features * sizeof(T));
  }
  void save(void* to_kv, void* to_z, int64_t index) const {
    T* to = static_cast<T*>(to_kv) + index * values * features;
    for (int64_t n = 0; n < values; ++n)
      for (int64_t e = 0; e < features; ++e) to[n * features + e] = kv[e * stride + n];
    std::memcpy(static_cast<T*>(to_z) + index * features, z, features * sizeof(T));
  }

  // From and to what is kept for the backward pass.
  void keep(T* start) const {
    std::memcpy(start, kv, features * stride * sizeof(T));
    std::memcpy(start + features * stride, z, features * sizeof(T));
  }
  void restore(const T* start) const {
    std::memcpy(kv, start, features * stride * sizeof(T));
    std::memcpy(z, start + features * stride, features * sizeof(T));
  }
};

template <class T>
T* start_of(const TaylorCall& call, int64_t number, int64_t index) {
  return static_cast<T*>(call.starts) + (number * call.batch * call.heads + index) * call.start_numbers();
}

// x [rows][C] of one token after the other, out of rows [token][width], and back.
template <class T>
void to_lanes(const T* row, int64_t width, T factor, int64_t token, T* x) {
  for (int64_t f = 0; f < width; ++f) x[f * C + token] = row[f] * factor;
}
template <class T>
void from_lanes(const T* x, int64_t width, T factor, int64_t token, T* row) {
  for (int64_t f = 0; f < width; ++f) row[f] = x[f * C + token] * factor;
}

// Calls function(lane) for every vector of `count` tokens.
template <class T, class Function>
WKV_INLINE void for_tokens(int64_t count, Function&& function) {
  for (int64_t i = 0; i < count; i += LANES<T>) function(i);
}

template <class T>
struct TaylorChunk {
  const TaylorCall& call;
  const int64_t batch, head, features, stride;
  int64_t count = 0;   // tokens
  const int64_t* flag = nullptr;  // their places in [B, T]
  T *q, *k;            // [F][C], scaled
  T *v;                // [C][stride]
  T *phi_q, *phi_k;    // [E][C]; zero behind the last token
  T *weights;          // [C][C], zero where a query does not meet a key in the blocks that are used
  T *den;              // [C]
  T *row;              // one row of any tensor

  TaylorChunk(const TaylorCall& call, int64_t index, TaylorMemory<T>& memory)
      : call(call), batch(index / call.heads), head(index % call.heads), features(call.features()),
        stride(padded(call.values)) {
    q = memory.take(call.size * C), k = memory.take(call.size * C), v = memory.take(C * stride);
    phi_q = call.taylor ? memory.take(features * C) : q;
    phi_k = call.taylor ? memory.take(features * C) : k;
    weights = memory.take(C * C), den = memory.take(C);
    row = memory.take(padded(call.size) + stride);
  }

  int64_t offset(int64_t token, TaylorName name) const { return (flag[token] * call.heads + head) * call.row(name); }

  // Tokens begin .. end of a segment: q, k, v and the features.
  void load(const Tokens& tokens, int64_t begin, int64_t end) {
    count = end - begin, flag = tokens.flag + begin;
    read(TAYLOR_Q, q), read(TAYLOR_K, k);
    for (int64_t i = 0; i < count; ++i) read_token(TAYLOR_V, i, v + i * stride);
    if (call.taylor) map(q, phi_q), map(k, phi_k);
  }

  // A token's row of a tensor. Rows of one head lie pages apart, where the processor fetches nothing ahead by itself.
  void read_token(TaylorName name, int64_t i, T* out) const {
    const Tensor& x = call.inputs[name];
    const int64_t width = call.row(name), bytes = x.type == FLOAT64 ? 8 : x.type == FLOAT32 ? 4 : 2;
    if (i + AHEAD < count && x.data != nullptr) {
      const char* next = static_cast<const char*>(x.data) + offset(i + AHEAD, name) * bytes;
      for (int64_t line = 0; line < width * bytes; line += 64) __builtin_prefetch(next + line);
    }
    read_row(x, offset(i, name), width, out);
  }

  // weights and, where `slope` is given, d weight / d product; den becomes the sum of a token's weights.
  void weigh(T* slope) {
    for (int64_t first = 0; first < count; first += BLOCK) {
      const int64_t rows = count - first < BLOCK ? count - first : BLOCK;
      multiply<T>({q + first, 1, C}, {k, C}, rows, call.size, first + BLOCK, {weights + first * C, C}, false);
    }
    for (int64_t i = 0; i < count; ++i) weigh_token(i, slope);
  }

  // den += phi(q) . z + eps
  void add_old_weights(const FeatureState<T>& state) {
    for_tokens<T>(count, [&](int64_t i) {
      Vec<T> total = load_tokens(den + i) + static_cast<T>(call.eps);
      for (int64_t e = 0; e < features; ++e) total += load_tokens(phi_q + e * C + i) * state.z[e];
      store(den + i, total);
    });
  }

  // Zeros in `x` for the tokens of the segment at `first` that do not exist.
  void clear_missing(int64_t first, TaylorName name, const Tensor& x) {
    if (call.mask == nullptr) return;
    const int64_t end = first + C < call.time ? first + C : call.time, width = call.row(name);
    std::memset(row, 0, width * sizeof(T));
    for (int64_t t = first; t < end; ++t) {
      const int64_t at = batch * call.time + t;
      if (call.mask[at] == 0) write_row(row, (at * call.heads + head) * width, width, x);
    }
  }

 private:
  static WKV_INLINE Vec<T> load_tokens(const T* p) { return wkv::WKV_ISA::load(p); }

  void read(TaylorName name, T* x) {
    std::memset(x, 0, call.size * C * sizeof(T));
    for (int64_t i = 0; i < count; ++i) {
      read_token(name, i, row);
      to_lanes(row, call.size, static_cast<T>(call.root), i, x);
    }
  }

  void map(const T* x, T* phi) {
    for (int64_t i = 0; i < C; ++i) phi[i] = i < count;
    std::memcpy(phi + C, x, call.size * C * sizeof(T));
    T* to = phi + (1 + call.size) * C;
    for (int64_t i = 0; i < call.size; ++i)
      for (int64_t j = i; j < call.size; ++j, to += C) {
        const T weight = i == j ? static_cast<T>(0.70710678118654752440) : 1;
        for_tokens<T>(count, [&](int64_t t) {
          store<T>(to + t, load_tokens(x + i * C + t) * weight * load_tokens(x + j * C + t));
        });
      }
  }

  void weigh_token(int64_t i, T* slope) {
    T* w = weights + i * C;
    const int64_t end = i / BLOCK * BLOCK + BLOCK;
    for (int64_t j = i + 1; j < end; ++j) w[j] = 0;
    if (!call.taylor) {
      den[i] = total(w, end);
      return;
    }
    for_tokens<T>(end, [&](int64_t j) {
      const Vec<T> one_more = load_tokens(w + j) + static_cast<T>(1);
      if (slope != nullptr) store<T>(slope + i * C + j, one_more);
      store<T>(w + j, one_more * one_more * static_cast<T>(0.5) + static_cast<T>(0.5));
    });
    for (int64_t j = i + 1; j < end; ++j) w[j] = 0;
    den[i] = total(w, end);
  }

  static T total(const T* w, int64_t end) {
    Vec<T> sums = {};
    for_tokens<T>(end, [&](int64_t j) { sums += load_tokens(w + j); });
    return sum<T>(sums);
  }
};

}  // namespace wkv::WKV_ISA
