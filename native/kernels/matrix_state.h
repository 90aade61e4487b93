// What the kernels of WKV-5, 6 and 7 share: reading and writing rows of any type, products of rows, and a segment of
// tokens in the compute type.
#pragma once
#include <type_traits>
#include <utility>

#include "convert.h"
#include "matrix.h"

namespace wkv::WKV_ISA {

// ---- rows of any type ----

WKV_INLINE void from_float(float x, f16* out) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  const uint32_t sign = (bits >> 16) & 0x8000, size = bits & 0x7FFFFFFF;
  // Round to nearest even. Below 2^-14 a sum with 0.5 leaves the subnormal's bits at the end of the mantissa.
  const uint32_t normal = (size + 0xFFF + ((size >> 13) & 1) - ((127 - 15) << 23)) >> 13;
  float shifted;
  std::memcpy(&shifted, &size, sizeof size);
  shifted += 0.5f;
  uint32_t small;
  std::memcpy(&small, &shifted, sizeof small);
  small -= 126u << 23;
  uint32_t half = size < (113u << 23) ? small : normal;
  half = size >= 0x477FF000 ? 0x7C00 : half;  // 65520 and more
  half = size > 0x7F800000 ? 0x7E00 : half;   // NaN
  out->bits = static_cast<uint16_t>(sign | half);
}

template <class From, class T>
WKV_INLINE void convert(const From* from, int64_t size, T* out) {
  for (int64_t i = 0; i < size; ++i) out[i] = static_cast<T>(to_float(from[i]));
}

// out[0 .. size) = x[offset ..) in the compute type; zeros for a tensor that is absent.
template <class T>
inline void read_row(const Tensor& x, int64_t offset, int64_t size, T* out) {
  if (x.data == nullptr) {
    std::memset(out, 0, size * sizeof(T));
    return;
  }
  switch (x.type) {
    case BFLOAT16: return convert(static_cast<const bf16*>(x.data) + offset, size, out);
    case FLOAT16: return convert(static_cast<const f16*>(x.data) + offset, size, out);
    case FLOAT64: return convert(static_cast<const double*>(x.data) + offset, size, out);
    default: return convert(static_cast<const float*>(x.data) + offset, size, out);
  }
}

template <class To, class T>
WKV_INLINE void write_as(const T* row, int64_t offset, int64_t size, void* data) {
  To* to = static_cast<To*>(data) + offset;
  for (int64_t i = 0; i < size; ++i) from_float(static_cast<float>(row[i]), to + i);
}

template <class T>
inline void write_row(const T* row, int64_t offset, int64_t size, const Tensor& x) {
  switch (x.type) {
    case BFLOAT16: return write_as<bf16>(row, offset, size, x.data);
    case FLOAT16: return write_as<f16>(row, offset, size, x.data);
    case FLOAT32: return write_as<float>(row, offset, size, x.data);
    default: break;
  }
  double* to = static_cast<double*>(x.data) + offset;
  for (int64_t i = 0; i < size; ++i) to[i] = row[i];
}

// ---- vectors across and along ----

// The lanes I of a and b laid end to end.
template <class T, size_t... I>
WKV_INLINE Vec<T> pick(Vec<T> a, Vec<T> b) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, I...);
#else
  return __builtin_shuffle(a, b, typename Lanes<T>::integer{I...});
#endif
}

template <class T, size_t... I>
WKV_INLINE Vec<T> add_neighbours(Vec<T> a, Vec<T> b, std::index_sequence<I...>) {
  return pick<T, 2 * I...>(a, b) + pick<T, 2 * I + 1 ...>(a, b);
}

// Lane i of the result is the sum of all lanes of x[i]. Overwrites x.
template <class T>
WKV_INLINE Vec<T> sums(Vec<T> (&x)[LANES<T>]) {
#pragma GCC unroll 8
  for (int count = LANES<T> / 2; count > 0; count /= 2)
#pragma GCC unroll 16
    for (int i = 0; i < count; ++i)
      x[i] = add_neighbours<T>(x[2 * i], x[2 * i + 1], std::make_index_sequence<LANES<T>>());
  return x[0];
}

// Lane i of the result is the product of row i with x: LANES rows of `size` (a whole number of vectors).
template <class T>
WKV_INLINE Vec<T> rows_times(const T* rows, int64_t stride, const T* x) {
  Vec<T> total[LANES<T>] = {};
  for (int64_t c = 0; c < stride; c += LANES<T>) {
    const Vec<T> factor = load(x + c);
#pragma GCC unroll 16
    for (int m = 0; m < LANES<T>; ++m) total[m] += load(rows + m * stride + c) * factor;
  }
  return sums<T>(total);
}

template <class T>
WKV_INLINE T dot(const T* x, const T* y, int64_t size) {
  Vec<T> total = {};
  for (int64_t c = 0; c < size; c += LANES<T>) total += load(x + c) * load(y + c);
  return sum<T>(total);
}

// ---- one segment of one head ----

// Hands out zeroed scratch memory, rows of padded(size) numbers.
template <class T>
class Scratch {
 public:
  Scratch(void* memory, int64_t size) : next_(static_cast<T*>(memory)), stride_(padded(size)) {}
  T* take(int64_t rows) {
    T* block = next_;
    next_ += rows * stride_;
    std::memset(block, 0, rows * stride_ * sizeof(T));
    return block;
  }

 private:
  T* next_;
  int64_t stride_;
};

// The tokens of a segment that exist, every row in the compute type and padded with zeros; exp(log_w) for log_w.
template <class T>
struct Segment {
  int64_t count = 0;
  int64_t stride = 0;
  int64_t offset[SEGMENT];  // where the token's row starts in a tensor [B, T, H, N]
  bool reset[SEGMENT];
  T* rows[ROW_COUNT] = {};

  T* row(Name name, int64_t token) const { return rows[name] + token * stride; }
};

WKV_INLINE void exponentiate(float* row, int64_t stride) {
  for (int64_t c = 0; c < stride; c += LANES<float>) store(row + c, vexp(load(row + c)));
}

WKV_INLINE void exponentiate(double* row, int64_t stride) {
  for (int64_t c = 0; c < stride; ++c) row[c] = std::exp(row[c]);
}

// Reserves the rows of the named tensors; a decay that no token changes is filled in here.
template <class T, int COUNT>
Segment<T> make_segment(const MatrixCall& call, int64_t head, Scratch<T>& scratch, const Name (&names)[COUNT]) {
  Segment<T> segment;
  segment.stride = padded(call.size);
  for (Name name : names) segment.rows[name] = scratch.take(SEGMENT);
  if (call.constant_decay) {
    T* decay = segment.rows[ROW_LOG_W];
    read_row(call.inputs[ROW_LOG_W], head * call.size, call.size, decay);
    exponentiate(decay, segment.stride);
    for (int64_t i = 1; i < SEGMENT; ++i) std::memcpy(segment.row(ROW_LOG_W, i), decay, segment.stride * sizeof(T));
  }
  return segment;
}

// Reads the tokens first .. first + SEGMENT that exist.
template <class T>
void read_segment(const MatrixCall& call, int64_t batch, int64_t head, int64_t first, Segment<T>& segment) {
  const int64_t end = first + SEGMENT < call.time ? first + SEGMENT : call.time;
  segment.count = 0;
  for (int64_t t = first; t < end; ++t) {
    const int64_t flag = batch * call.time + t, i = segment.count;
    if (call.mask != nullptr && call.mask[flag] == 0) continue;
    segment.offset[i] = (flag * call.heads + head) * call.size;
    segment.reset[i] = call.reset != nullptr && call.reset[flag] != 0;
    for (int name = 0; name < ROW_COUNT; ++name) {
      if (segment.rows[name] == nullptr || (name == ROW_LOG_W && call.constant_decay)) continue;
      T* row = segment.row(static_cast<Name>(name), i);
      read_row(call.inputs[name], segment.offset[i], call.size, row);
      if (name == ROW_LOG_W) exponentiate(row, segment.stride);
    }
    ++segment.count;
  }
}

// Zeros in `x` for the tokens first .. first + SEGMENT that do not exist.
template <class T>
void clear_missing(const MatrixCall& call, int64_t batch, int64_t head, int64_t first, int64_t row, int64_t rows,
                   const T* zeros, const Tensor& x) {
  if (call.mask == nullptr) return;
  const int64_t end = first + SEGMENT < call.time ? first + SEGMENT : call.time;
  for (int64_t t = first; t < end; ++t) {
    const int64_t flag = batch * call.time + t;
    if (call.mask[flag] == 0) write_row(zeros, (flag * call.heads + head) * call.size + row, rows, x);
  }
}

// Rows first .. first + rows of a state [N, N], from memory to padded rows and back.
template <class T>
void load_rows(const T* state, int64_t size, int64_t first, int64_t rows, T* out, int64_t out_rows) {
  const int64_t stride = padded(size);
  std::memset(out, 0, out_rows * stride * sizeof(T));
  if (state == nullptr) return;
  for (int64_t m = 0; m < rows; ++m) std::memcpy(out + m * stride, state + (first + m) * size, size * sizeof(T));
}

template <class T>
const T* at(const void* states, int64_t index, int64_t size) {
  return states == nullptr ? nullptr : static_cast<const T*>(states) + index * size * size;
}

}  // namespace wkv::WKV_ISA
