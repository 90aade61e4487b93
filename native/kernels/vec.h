// Vectors of floats (or doubles) as wide as the instruction set, in GCC's and Clang's portable vector extension.
// Included by kernel files only: they are compiled once per instruction set, in namespace wkv::WKV_ISA.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#ifndef WKV_ISA
#define WKV_ISA portable
#define WKV_VECTOR_BYTES 16
#endif

#define WKV_INLINE inline __attribute__((always_inline))

namespace wkv::WKV_ISA {

constexpr int VECTOR_BYTES = WKV_VECTOR_BYTES;

template <class T>
struct Lanes;
template <>
struct Lanes<float> {
  typedef float type __attribute__((vector_size(WKV_VECTOR_BYTES)));
  typedef int32_t integer __attribute__((vector_size(WKV_VECTOR_BYTES)));
  typedef float half __attribute__((vector_size(32)));
  typedef float quarter __attribute__((vector_size(16)));
};
template <>
struct Lanes<double> {
  typedef double type __attribute__((vector_size(WKV_VECTOR_BYTES)));
  typedef int64_t integer __attribute__((vector_size(WKV_VECTOR_BYTES)));
  typedef double half __attribute__((vector_size(32)));
  typedef double quarter __attribute__((vector_size(16)));
};

template <class T>
using Vec = typename Lanes<T>::type;
template <class T>
constexpr int LANES = VECTOR_BYTES / static_cast<int>(sizeof(T));

template <class T>
WKV_INLINE Vec<T> load(const T* p) {
  Vec<T> v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

// Asks for memory that a stream of weights will soon reach. With vectors of 64 bytes the processor's own prefetching was
// faster, with 32 bytes this is (bf16 by a quarter).
WKV_INLINE void prefetch_ahead(const void* p) {
  if (VECTOR_BYTES == 32) __builtin_prefetch(static_cast<const char*>(p) + 1024);
}

template <class T>
WKV_INLINE void store(T* p, Vec<T> v) {
  std::memcpy(p, &v, sizeof v);
}

template <class T>
WKV_INLINE Vec<T> splat(T x) {
  return x - Vec<T>{};  // a scalar broadcasts in arithmetic with a vector
}

// Pairwise: fewer roundings than from left to right.
template <class T>
WKV_INLINE T sum(Vec<T> v) {
  if constexpr (VECTOR_BYTES == 64) {  // halves first: they stay in registers
    typedef typename Lanes<T>::half Half;
    typedef typename Lanes<T>::quarter Quarter;
    Half half[2];
    std::memcpy(half, &v, 64);
    half[0] += half[1];
    Quarter quarter[2];
    std::memcpy(quarter, half, 32);
    quarter[0] += quarter[1];
    T lane[16 / sizeof(T)];
    std::memcpy(lane, quarter, 16);
    if constexpr (sizeof(T) == 8) return lane[0] + lane[1];
    else return (lane[0] + lane[2]) + (lane[1] + lane[3]);
  } else {
    T lane[LANES<T>];
    std::memcpy(lane, &v, sizeof v);
    for (int width = LANES<T> / 2; width > 0; width /= 2)
      for (int i = 0; i < width; ++i) lane[i] += lane[i + width];
    return lane[0];
  }
}

WKV_INLINE Vec<float> vmax(Vec<float> a, Vec<float> b) { return a > b ? a : b; }
WKV_INLINE Vec<double> vmax(Vec<double> a, Vec<double> b) { return a > b ? a : b; }

// exp in float32, within 1.5 units in the last place for x in [-87, 88]; smaller x give 0, larger inf.
WKV_INLINE Vec<float> vexp(Vec<float> x) {
  using I = typename Lanes<float>::integer;
  const Vec<float> low = splat<float>(-87.3f), high = splat<float>(88.7f);
  const Vec<float> clamped = x < low ? low : (x > high ? high : x);
  // x = n ln 2 + f with |f| <= ln(2) / 2; the magic number rounds to the nearest integer.
  const Vec<float> magic = splat<float>(12582912.0f);
  const Vec<float> shifted = clamped * 1.44269504088896341f + magic;
  const Vec<float> n = shifted - magic;
  Vec<float> f = clamped - n * 0.693359375f;
  f = f + n * 2.12194440e-4f;
  Vec<float> p = splat<float>(1.9875691500e-4f);
  p = p * f + 1.3981999507e-3f;
  p = p * f + 8.3334519073e-3f;
  p = p * f + 4.1665795894e-2f;
  p = p * f + 1.6666665459e-1f;
  p = p * f + 5.0000001201e-1f;
  p = p * f * f + f + 1.0f;
  I exponent;
  std::memcpy(&exponent, &shifted, sizeof exponent);
  exponent = (exponent - 0x4B400000) << 23;
  I bits;
  std::memcpy(&bits, &p, sizeof bits);
  bits += exponent;
  Vec<float> y;
  std::memcpy(&y, &bits, sizeof y);
  y = x < low ? Vec<float>{} : y;
  y = x > high ? splat<float>(INFINITY) : y;
  return x != x ? x : y;
}

WKV_INLINE Vec<double> vexp(Vec<double> x) {
  Vec<double> y{};
  for (int i = 0; i < LANES<double>; ++i) y[i] = std::exp(x[i]);
  return y;
}

// Half-precision types as they lie in memory; arithmetic is always in float.
struct bf16 {
  uint16_t bits;
};

WKV_INLINE float to_float(float x) { return x; }
WKV_INLINE double to_float(double x) { return x; }
WKV_INLINE float to_float(bf16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float y;
  std::memcpy(&y, &bits, sizeof y);
  return y;
}

WKV_INLINE void from_float(float x, float* out) { *out = x; }
WKV_INLINE void from_float(double x, double* out) { *out = x; }
WKV_INLINE void from_float(float x, bf16* out) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  // Round to nearest even; a NaN stays a NaN.
  const uint32_t rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
  out->bits = static_cast<uint16_t>(x != x ? (bits >> 16) | 0x40 : rounded);
}

}  // namespace wkv::WKV_ISA
