// What WKV-4 and Bi-WKV share: segments of tokens of a few channels as blocks in compute type, and the scan of
// log-weighted sums over them. Lanes run along channels.
#pragma once
#include "../src/channel_scan.h"
#include "convert.h"

namespace wkv::WKV_ISA::channels {

constexpr int TOKENS = SCAN_TOKENS;
constexpr double EMPTY = -1e30;  // the logarithm of nothing

template <class A>
constexpr int WIDTH = SCAN_ROW_BYTES / static_cast<int>(sizeof(A));

// [token][channel], channels beyond the last one hold zeros.
template <class A>
using Block = A[TOKENS][WIDTH<A>];

// Where a work item lies: batch row b, channels first .. first + count - 1.
struct Item {
  int64_t b, first;
  int count;
};

template <class A>
WKV_INLINE Item item_at(const ChannelScan& x, int64_t number) {
  const int64_t blocks = (x.channels + WIDTH<A> - 1) / WIDTH<A>;
  const int64_t first = number % blocks * WIDTH<A>;
  const int64_t left = x.channels - first;
  return {number / blocks, first, left < WIDTH<A> ? static_cast<int>(left) : WIDTH<A>};
}

template <class A, class S>
WKV_INLINE void load_row(A* out, const S* in, int count) {
  if (count == WIDTH<A>) {
    for (int c = 0; c < WIDTH<A>; ++c) out[c] = static_cast<A>(to_float(in[c]));
    return;
  }
  for (int c = 0; c < count; ++c) out[c] = static_cast<A>(to_float(in[c]));
  for (int c = count; c < WIDTH<A>; ++c) out[c] = 0;
}

template <class A, class S>
WKV_INLINE void put(A x, S* out) {
  from_float(static_cast<float>(x), out);
}
template <class A>
WKV_INLINE void put(A x, double* out) {
  *out = static_cast<double>(x);
}
template <class A>
WKV_INLINE void put(A x, f16* out) {
  const float single = static_cast<float>(x);
  uint32_t bits;
  std::memcpy(&bits, &single, sizeof bits);
  const uint32_t sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7FFFFFFFu;
  // Round to nearest even: normal numbers by integer addition, subnormal ones by adding 0.5 as a float.
  const uint32_t normal = (magnitude + 0xC8000FFFu + (magnitude >> 13 & 1u)) >> 13;
  float small;
  std::memcpy(&small, &magnitude, sizeof small);
  small += 0.5f;
  uint32_t subnormal;
  std::memcpy(&subnormal, &small, sizeof subnormal);
  const uint32_t large = magnitude > 0x7F800000u ? 0x7E00u : 0x7C00u;
  const uint32_t finite = magnitude < 0x38800000u ? subnormal - 0x3F000000u : normal;
  out->bits = static_cast<uint16_t>(sign | (magnitude >= 0x477FF000u ? large : finite));
}

template <class A, class S>
WKV_INLINE void store_row(S* out, const A* in, int count) {
  if (count == WIDTH<A>) {
    for (int c = 0; c < WIDTH<A>; ++c) put(in[c], out + c);
    return;
  }
  for (int c = 0; c < count; ++c) put(in[c], out + c);
}

// A segment of tokens from .. from + size - 1 of one item.
struct Segment {
  int64_t number, from;
  int size;
  bool exists[TOKENS], reset[TOKENS];
};

WKV_INLINE Segment segment_at(const ChannelScan& x, int64_t b, int64_t number) {
  Segment s;
  s.number = number;
  s.from = number * TOKENS;
  const int64_t left = x.length - s.from;
  s.size = left < TOKENS ? static_cast<int>(left) : TOKENS;
  const int64_t flags = b * x.length + s.from;
  for (int t = 0; t < s.size; ++t) {
    s.exists[t] = x.mask == nullptr || x.mask[flags + t] != 0;
    s.reset[t] = x.reset != nullptr && x.reset[flags + t] != 0 && s.exists[t];
  }
  return s;
}

template <class A, class S>
void load_rows(Block<A>& out, const S* in, int64_t stride, int size, int count) {
  for (int t = 0; t < size; ++t) load_row(out[t], in + t * stride, count);
}

template <class A, class S>
void store_rows(S* out, const Block<A>& in, int64_t stride, int size, int count) {
  for (int t = 0; t < size; ++t) store_row(out + t * stride, in[t], count);
}

// Reads the segment's tokens out of an array [B, T, C].
template <class A>
void load_block(Block<A>& out, const ChannelScan& x, Item i, const Segment& s, const void* array, Element type) {
  const int64_t stride = x.channels, start = (i.b * x.length + s.from) * stride + i.first;
  switch (type) {
    case Element::bfloat16: return load_rows(out, static_cast<const bf16*>(array) + start, stride, s.size, i.count);
    case Element::float16: return load_rows(out, static_cast<const f16*>(array) + start, stride, s.size, i.count);
    case Element::float64: return load_rows(out, static_cast<const double*>(array) + start, stride, s.size, i.count);
    default: return load_rows(out, static_cast<const float*>(array) + start, stride, s.size, i.count);
  }
}

// Writes the segment's tokens into an array [B, T, C].
template <class A>
void store_block(void* array, Element type, const ChannelScan& x, Item i, const Segment& s, const Block<A>& in) {
  const int64_t stride = x.channels, start = (i.b * x.length + s.from) * stride + i.first;
  switch (type) {
    case Element::bfloat16: return store_rows(static_cast<bf16*>(array) + start, in, stride, s.size, i.count);
    case Element::float16: return store_rows(static_cast<f16*>(array) + start, in, stride, s.size, i.count);
    case Element::float64: return store_rows(static_cast<double*>(array) + start, in, stride, s.size, i.count);
    default: return store_rows(static_cast<float*>(array) + start, in, stride, s.size, i.count);
  }
}

// The sums (a, b) exp(m) of every channel of an item.
template <class A>
struct Sums {
  alignas(64) A m[WIDTH<A>];
  alignas(64) A a[WIDTH<A>];
  alignas(64) A b[WIDTH<A>];
};

template <class A>
WKV_INLINE void clear(Sums<A>& s) {
  for (int c = 0; c < WIDTH<A>; ++c) s.m[c] = static_cast<A>(EMPTY), s.a[c] = 0, s.b[c] = 0;
}

// Where an item's sums at the border of a segment lie in an array [B, segments, slots, C], from `slot` on.
template <class A>
A* border(const ChannelScan& x, Item i, int64_t segment, void* array, int slots = 3, int slot = 0) {
  return static_cast<A*>(array) + ((i.b * x.segments() + segment) * slots + slot) * x.channels + i.first;
}

template <class A>
void load_sums(Sums<A>& s, const A* from, int64_t stride, int count) {
  load_row(s.m, from, count);
  load_row(s.a, from + stride, count);
  load_row(s.b, from + 2 * stride, count);
}

template <class A>
void store_sums(A* to, const Sums<A>& s, int64_t stride, int count) {
  store_row(to, s.m, count);
  store_row(to + stride, s.a, count);
  store_row(to + 2 * stride, s.b, count);
}

// Sums over a lane group while a segment runs: (num + a, den + b) exp(m + count * gap).
//
// Decay is counted, not multiplied in, and the segment's own terms (a, b) are added to the older ones at its end only:
// otherwise every token would round the sums and their exponent, which adds up over thousands of tokens.
template <class A>
struct Lane {
  Vec<A> m, count, num, den, a, b;
};

template <class A>
WKV_INLINE Lane<A> lane_of(const Sums<A>& s, int c) {
  return {load(s.m + c), Vec<A>{}, load(s.a + c), load(s.b + c), Vec<A>{}, Vec<A>{}};
}

template <class A>
WKV_INLINE Lane<A> empty_lane() {
  return {splat<A>(static_cast<A>(EMPTY)), Vec<A>{}, Vec<A>{}, Vec<A>{}, Vec<A>{}, Vec<A>{}};
}

// The end of a segment: what rounds off the exponent goes into the sums.
template <class A>
WKV_INLINE void keep_lane(Sums<A>& s, int c, const Lane<A>& lane, Vec<A> gap) {
  const Vec<A> m = lane.m + lane.count * gap, rest = (lane.m - m) + lane.count * gap;
  const Vec<A> rounded = lane.count > Vec<A>{} ? rest : Vec<A>{};
  const Vec<A> num = lane.num + lane.a, den = lane.den + lane.b;
  store(s.m + c, m), store(s.a + c, num + num * rounded), store(s.b + c, den + den * rounded);
}

// exp(x) for an x that is no more than the rounding of a sum.
template <class A>
WKV_INLINE Vec<A> exp_of_rounding(Vec<A> x) {
  const Vec<A> one = splat<A>(1);
  return x * (x * splat<A>(A(0.5)) + one) + one;
}

// The log-decay: minus infinity would turn into NaN when no token is multiplied by it.
template <class A>
WKV_INLINE Vec<A> load_gap(const A* log_w) {
  return vmax(splat<A>(static_cast<A>(EMPTY)), load(log_w));
}

template <class A>
struct Weights {
  Vec<A> old, fresh;
};

// sums exp(E)  <-  sums exp(E + gap) + (x, y) exp(e), normalised by the larger of the two exponents: one weight is 1.
// With a slack, e wins only when it is that much larger.
template <class A>
WKV_INLINE Weights<A> advance(Lane<A>& s, Vec<A> gap, Vec<A> e, Vec<A> x, Vec<A> y, A slack = 0) {
  const Vec<A> one = splat<A>(1), count = s.count + one;
  const Vec<A> above = (e - s.m) - count * gap;
  const auto higher = above > splat<A>(slack);
  const Vec<A> weight = vexp(higher ? -above : above);
  const Vec<A> old = higher ? weight : one, fresh = higher ? one : weight;
  s.num *= old;
  s.den *= old;
  s.a = old * s.a + fresh * x;
  s.b = old * s.b + fresh * y;
  s.m = higher ? e : s.m;
  s.count = higher ? Vec<A>{} : count;
  return {old, fresh};
}

// The same for gradients, p (1, -y) exp(-q). Their exponents follow the sums' own, so that both sides of the comparison
// are alike up to rounding: without slack the sums would be scaled, and rounded, at almost every token.
template <class A>
WKV_INLINE void advance_back(Lane<A>& s, Vec<A> gap, Vec<A> minus_q, Vec<A> p, Vec<A> minus_py) {
  advance<A>(s, gap, minus_q, p, minus_py, 2);
}

// Sums as a token finds them, kept for the way back.
template <class A>
struct Found {
  alignas(64) Block<A> m, count, num, den;
};

template <class A>
WKV_INLINE void keep_found(Found<A>& f, int t, int c, const Lane<A>& s) {
  store(&f.m[t][c], s.m), store(&f.count[t][c], s.count);
  store(&f.num[t][c], s.num + s.a), store(&f.den[t][c], s.den + s.b);
}

template <class A>
WKV_INLINE Lane<A> found_at(const Found<A>& f, int t, int c) {
  return {load(&f.m[t][c]), load(&f.count[t][c]), load(&f.num[t][c]), load(&f.den[t][c]), Vec<A>{}, Vec<A>{}};
}

// The weights of a token's step, and the exponent of the sums behind it.
template <class A>
struct Steps {
  alignas(64) Block<A> old, fresh, m, count;
};

template <class A>
WKV_INLINE void keep_step(Steps<A>& steps, int t, int c, const Weights<A>& w, const Lane<A>& behind) {
  store(&steps.old[t][c], w.old), store(&steps.fresh[t][c], w.fresh);
  store(&steps.m[t][c], behind.m), store(&steps.count[t][c], behind.count);
}

// What a gradient `back` of the sums behind token t gives to the sums before it (old) and to the token (fresh).
template <class A>
WKV_INLINE Weights<A> weights_back(const Steps<A>& steps, int t, int c, const Lane<A>& back, Vec<A> gap) {
  const Vec<A> exponent = (load(&steps.m[t][c]) + back.m) + (load(&steps.count[t][c]) + back.count) * gap;
  const Vec<A> both = vexp(exponent);
  return {load(&steps.old[t][c]) * both, load(&steps.fresh[t][c]) * both};
}

}  // namespace wkv::WKV_ISA::channels
