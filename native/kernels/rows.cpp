// Elementwise stages of a model on one row of channels. Rows are padded with zeros to a multiple of 64 bytes, and so
// are the parameters, so that no loop has a remainder.
#include "convert.h"

namespace wkv::WKV_ISA {
namespace {
constexpr int W = LANES<float>;
WKV_INLINE Vec<float> sigmoid(Vec<float> x) { return 1.0f / (1.0f + vexp(-x)); }
}  // namespace

// z = (x - mean) / sqrt(variance + eps) * weight + bias over n channels; z may be x.
void layer_norm(const float* x, const float* weight, const float* bias, int64_t n, int64_t padded, float eps,
                float* z) {
  Vec<float> sums[2] = {};
  int64_t i = 0;
  for (; i + 2 * W <= n; i += 2 * W) {
    sums[0] += load(x + i);
    sums[1] += load(x + i + W);
  }
  float total = sum<float>(sums[0] + sums[1]);
  for (; i < n; ++i) total += x[i];
  const float mean = total / n;
  Vec<float> squares[2] = {};
  for (i = 0; i + 2 * W <= n; i += 2 * W)
    for (int j = 0; j < 2; ++j) {
      const Vec<float> d = load(x + i + j * W) - mean;
      squares[j] += d * d;
    }
  float variance = sum<float>(squares[0] + squares[1]);
  for (; i < n; ++i) variance += (x[i] - mean) * (x[i] - mean);
  const float inverse = 1.0f / std::sqrt(variance / n + eps);
  for (i = 0; i < padded; i += W) store<float>(z + i, (load(x + i) - mean) * inverse * load(weight + i) + load(bias + i));
}

// out = z + (previous - z) * share
void token_shift(const float* z, const float* previous, const float* share, int64_t padded, float* out) {
  for (int64_t i = 0; i < padded; i += W) {
    const Vec<float> v = load(z + i);
    store<float>(out + i, v + (load(previous + i) - v) * load(share + i));
  }
}

void add_to(float* x, const float* y, int64_t padded) {
  for (int64_t i = 0; i < padded; i += W) store<float>(x + i, load(x + i) + load(y + i));
}

void relu_squared(float* x, int64_t n) {
  int64_t i = 0;
  for (; i + W <= n; i += W) {
    const Vec<float> v = vmax(load(x + i), Vec<float>{});
    store<float>(x + i, v * v);
  }
  for (; i < n; ++i) x[i] = x[i] > 0 ? x[i] * x[i] : 0;
}

void sigmoid_of(float* x, int64_t n) {
  int64_t i = 0;
  for (; i + W <= n; i += W) store<float>(x + i, sigmoid(load(x + i)));
  for (; i < n; ++i) x[i] = 1.0f / (1.0f + std::exp(-x[i]));
}

void tanh_of(float* x, int64_t n) {
  int64_t i = 0;
  // tanh x = 2 sigmoid(2 x) - 1 loses digits near 0, where tanh x = x - x^3 / 3 + 2 x^5 / 15 is right.
  for (; i + W <= n; i += W) {
    const Vec<float> v = load(x + i), s = v * v;
    const Vec<float> small = v * (1.0f + s * (-1.0f / 3 + s * (2.0f / 15 - s * (17.0f / 315))));
    const Vec<float> large = 2.0f * sigmoid(2.0f * v) - 1.0f;
    store<float>(x + i, s < 0.01f ? small : large);
  }
  for (; i < n; ++i) x[i] = std::tanh(x[i]);
}

// Row `index` of an embedding table in float32 (0), bfloat16 (1), float16 (2) or int8 with one scale per row (3).
void embedding_row(int64_t format, const void* table, const float* scale, int64_t index, int64_t n, float* x) {
  const int64_t at = index * n;
  for (int64_t i = 0; i < n; ++i) {
    switch (format) {
      case 0: x[i] = static_cast<const float*>(table)[at + i]; break;
      case 1: x[i] = to_float(static_cast<const bf16*>(table)[at + i]); break;
      case 2: x[i] = to_float(static_cast<const f16*>(table)[at + i]); break;
      default: x[i] = scale[index] * static_cast<float>(static_cast<const int8_t*>(table)[at + i]);
    }
  }
}

}  // namespace wkv::WKV_ISA
