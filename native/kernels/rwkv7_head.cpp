// The time mix of RWKV-7 for one head (arXiv 2503.14456, section 3; models/rwkv7.py is the same in torch):
//
//   decay = exp(-e^(-1/2) sigmoid(w0 + w)),  iclr = sigmoid(a0 + a),  v += (v_first - v) sigmoid(v0 + v_mix)
//   kk = normalise(k k_k),  k *= 1 + (iclr - 1) k_a
//   S = S (diag(decay) - kk (kk iclr)^T) + v k^T,  y = norm(S r) + (r . r_k k) v,  out = y g
#include "rwkv7_head.h"

#include "transpose.h"

namespace wkv::WKV_ISA {
namespace {

constexpr int W = LANES<float>;

WKV_INLINE Vec<float> sigmoid(Vec<float> x) { return 1.0f / (1.0f + vexp(-x)); }

// The vectors of one token.
template <int N>
struct Token {
  alignas(64) float r[N], decay[N], k[N], v[N], minus_kk[N], b[N], bonus;
};

template <int N>
WKV_INLINE void prepare(const Rwkv7Head& h, int64_t row, Token<N>& t) {
  const int64_t at = row * h.stride;
  Vec<float> kk[N / W], iclr[N / W], squares = {}, bonus = {};
  for (int i = 0; i < N / W; ++i) {
    const int c = i * W;
    const Vec<float> k = load(h.k + at + c), r = load(h.r + at + c);
    Vec<float> v = load(h.v + at + c);
    store<float>(t.decay + c, vexp(-0.60653065971263342f * sigmoid(load(h.w0 + c) + load(h.w + at + c))));
    iclr[i] = sigmoid(load(h.a0 + c) + load(h.a + at + c));
    if (h.first_layer) {
      store<float>(h.first_value + at + c, v);
    } else {
      v += (load(h.first_value + at + c) - v) * sigmoid(load(h.v0 + c) + load(h.v_mix + at + c));
      store<float>(h.v + at + c, v);
    }
    kk[i] = k * load(h.k_k + c);
    squares += kk[i] * kk[i];
    const Vec<float> key = k * (1.0f + (iclr[i] - 1.0f) * load(h.k_a + c));
    bonus += r * key * load(h.r_k + c);
    store<float>(t.r + c, r);
    store<float>(t.k + c, key);
    store<float>(t.v + c, v);
  }
  const float norm = std::sqrt(sum<float>(squares));
  const float inverse = 1.0f / (norm > 1e-12f ? norm : 1e-12f);
  for (int i = 0; i < N / W; ++i) {
    const Vec<float> unit = kk[i] * inverse;
    store<float>(t.minus_kk + i * W, -unit);
    store<float>(t.b + i * W, unit * iclr[i]);
  }
  t.bonus = sum<float>(bonus);
}

// Group norm of y over the head, bonus and gate.
template <int N>
WKV_INLINE void finish(const Rwkv7Head& h, int64_t row, const Token<N>& t, const float* y) {
  Vec<float> total = {}, squares = {};
  for (int i = 0; i < N / W; ++i) total += load(y + i * W);
  const float mean = sum<float>(total) / N;
  for (int i = 0; i < N / W; ++i) {
    const Vec<float> d = load(y + i * W) - mean;
    squares += d * d;
  }
  const float inverse = 1.0f / std::sqrt(sum<float>(squares) / N + h.eps);
  for (int i = 0; i < N / W; ++i) {
    const int c = i * W;
    const Vec<float> normed = (load(y + c) - mean) * inverse * load(h.norm_weight + c) + load(h.norm_bias + c);
    store<float>(h.y + row * h.stride + c, (normed + t.bonus * load(t.v + c)) * load(h.g + row * h.stride + c));
  }
}

// One token: the state is read and written once, row by row (a row of S belongs to one value channel).
template <int N>
WKV_INLINE void step(float* S, const Token<N>& t, float* y) {
  for (int first = 0; first < N; first += W) {
    Vec<float> partial[W];
    for (int i = 0; i < W; ++i) {
      const float* row = S + (first + i) * N;
      partial[i] = Vec<float>{};
      for (int c = 0; c < N; c += W) partial[i] += load(row + c) * load(t.minus_kk + c);
    }
    const Vec<float> removed = sums_of(partial);
    for (int i = 0; i < W; ++i) {
      float* row = S + (first + i) * N;
      const float s = removed[i], v = t.v[first + i];
      partial[i] = Vec<float>{};
      for (int c = 0; c < N; c += W) {
        const Vec<float> next = load(row + c) * load(t.decay + c) + s * load(t.b + c) + v * load(t.k + c);
        store<float>(row + c, next);
        partial[i] += next * load(t.r + c);
      }
    }
    store<float>(y + first, sums_of(partial));
  }
}

template <int N>
WKV_INLINE void transpose_state(const float* from, float* to) {
  for (int i = 0; i < N; i += W)
    for (int j = 0; j < N; j += W) {
      Vec<float> v[W];
      for (int l = 0; l < W; ++l) v[l] = load(from + (i + l) * N + j);
      transpose(v);
      for (int l = 0; l < W; ++l) store<float>(to + (j + l) * N + i, v[l]);
    }
}

// One token on the transposed state [key][value]: no horizontal sums. `removed` is S minus_kk of this token on entry,
// of the next token on return.
template <int N>
WKV_INLINE void step_transposed(float* S, const Token<N>& t, const float* next_minus_kk, float* removed, float* y) {
  constexpr int COLUMNS = 4 * W < N ? 4 * W : N;  // value channels at a time: what the registers hold
  for (int first = 0; first < N; first += COLUMNS) {
    constexpr int V = COLUMNS / W;
    Vec<float> s[V], v[V], out[V] = {}, next[V] = {};
    for (int i = 0; i < V; ++i) {
      s[i] = load(removed + first + i * W);
      v[i] = load(t.v + first + i * W);
    }
    for (int c = 0; c < N; ++c) {
      const float decay = t.decay[c], b = t.b[c], k = t.k[c], r = t.r[c], a = next_minus_kk[c];
      float* row = S + c * N + first;
      for (int i = 0; i < V; ++i) {
        const Vec<float> x = load(row + i * W) * decay + s[i] * b + v[i] * k;
        store<float>(row + i * W, x);
        out[i] += x * r;
        next[i] += x * a;
      }
    }
    for (int i = 0; i < V; ++i) {
      store<float>(removed + first + i * W, next[i]);
      store<float>(y + first + i * W, out[i]);
    }
  }
}

template <int N>
void run(const Rwkv7Head& h, int64_t row, int64_t count, float* S) {
  alignas(64) float y[N];
  if (count < 4) {
    Token<N> t;
    for (int64_t i = 0; i < count; ++i) {
      prepare(h, row + i, t);
      step(S, t, y);
      finish(h, row + i, t, y);
    }
    return;
  }
  alignas(64) float transposed[N * N];
  alignas(64) float removed[N];
  transpose_state<N>(S, transposed);
  Token<N> tokens[2];
  prepare(h, row, tokens[0]);
  for (int c = 0; c < N; c += W) {
    Vec<float> total = {};
    for (int j = 0; j < N; ++j) total += load(transposed + j * N + c) * tokens[0].minus_kk[j];
    store<float>(removed + c, total);
  }
  for (int64_t i = 0; i < count; ++i) {
    const Token<N>& t = tokens[i & 1];
    Token<N>& next = tokens[(i + 1) & 1];
    if (i + 1 < count) prepare(h, row + i + 1, next);
    else std::memset(next.minus_kk, 0, sizeof next.minus_kk);
    step_transposed(transposed, t, next.minus_kk, removed, y);
    finish(h, row + i, t, y);
  }
  transpose_state<N>(transposed, S);
}

}  // namespace

// `count` tokens from `row` on with the state S [N_value][N_key], which is brought up to date.
// Head sizes 16, 32, 64, 128 and 256.
void rwkv7_head(const Rwkv7Head& h, int64_t row, int64_t count, float* S) {
  switch (h.size) {
    case 16: return run<16>(h, row, count, S);
    case 32: return run<32>(h, row, count, S);
    case 64: return run<64>(h, row, count, S);
    case 128: return run<128>(h, row, count, S);
    case 256: return run<256>(h, row, count, S);
  }
}

}  // namespace wkv::WKV_ISA
