// Bi-WKV for one batch row and a few channels; the equations are in wkv/ops/bi_wkv.py.
//
// Every token reads two sums, L over the tokens to its left and R over those to its right. Backward, the gradients of
// these sums are sums of the same form over (p, -p y) exp(-q): N over the tokens to the right (for L) and M over those
// to the left (for R). Sums are kept at the borders of segments and computed again inside.
#include "channel_scan.h"

namespace wkv::WKV_ISA {
namespace channels {
namespace {

// What a token reads, scaled by exp(-q), q the largest of the three exponents.
template <class A>
struct Reading {
  Vec<A> q, bonus, z, y;
};

template <class A>
WKV_INLINE Reading<A> read(const Lane<A>& left, const Lane<A>& right, Vec<A> gap, Vec<A> u, Vec<A> k, Vec<A> v) {
  const Vec<A> q = vmax(vmax(left.m + left.count * gap, right.m + right.count * gap), k + u);
  const Vec<A> l = vexp((left.m - q) + left.count * gap), r = vexp((right.m - q) + right.count * gap);
  const Vec<A> bonus = vexp((k - q) + u);
  const Vec<A> z = l * (left.den + left.b) + r * (right.den + right.b) + bonus;
  return {q, bonus, z, (l * (left.num + left.a) + r * (right.num + right.a) + bonus * v) / z};
}

template <class A>
struct Decays {
  alignas(64) A log_w[WIDTH<A>];
  alignas(64) A u[WIDTH<A>];
};

template <class A>
void load_decays(Decays<A>& d, const ChannelScan& x, Item i) {
  load_row(d.log_w, static_cast<const A*>(x.log_w) + i.first, i.count);
  load_row(d.u, static_cast<const A*>(x.u) + i.first, i.count);
}

template <class A>
struct Blocks {
  alignas(64) Block<A> k, v, dy;  // become y, or dk and dv
  Found<A> found;                 // R behind every token, later L before it
  Steps<A> steps;                 // those of R, later those of L
  alignas(64) Block<A> q, p, py;
};

template <class A>
void load_tokens(Blocks<A>& blocks, const ChannelScan& x, Item i, const Segment& g) {
  load_block<A>(blocks.k, x, i, g, x.k, x.k_type);
  load_block<A>(blocks.v, x, i, g, x.v, x.v_type);
  if (x.dy != nullptr) load_block<A>(blocks.dy, x, i, g, x.dy, x.v_type);
}

// Runs R over one lane group of a segment from its end, and keeps what every token reads.
template <class A>
WKV_INLINE Lane<A> run_right(const Segment& g, Blocks<A>& x, Lane<A> right, Vec<A> gap, int c, bool keep_steps) {
  for (int t = g.size - 1; t >= 0; --t) {
    if (!g.exists[t]) continue;
    keep_found(x.found, t, c, right);
    const Weights<A> w = advance(right, gap, load(&x.k[t][c]), load(&x.v[t][c]), splat<A>(1));
    if (keep_steps) keep_step(x.steps, t, c, w, right);
  }
  return right;
}

// R at the right border of every segment, into x.states.
template <class A>
void sweep_right(const ChannelScan& x, Item i, const Decays<A>& d, Blocks<A>& blocks) {
  Sums<A> right;
  clear(right);
  for (int64_t n = x.segments() - 1; n >= 0; --n) {
    const Segment g = segment_at(x, i.b, n);
    store_sums(border<A>(x, i, n, x.states), right, x.channels, i.count);
    load_tokens(blocks, x, i, g);
    for (int c = 0; c < WIDTH<A>; c += LANES<A>) {
      const Vec<A> gap = load_gap<A>(d.log_w + c);
      keep_lane(right, c, run_right<A>(g, blocks, lane_of(right, c), gap, c, false), gap);
    }
  }
}

template <class A>
void forward(const ChannelScan& x, int64_t number) {
  const Item i = item_at<A>(x, number);
  Decays<A> d;
  Blocks<A> blocks;
  Sums<A> left, right;
  load_decays(d, x, i);
  sweep_right(x, i, d, blocks);
  clear(left);
  for (int64_t n = 0; n < x.segments(); ++n) {
    const Segment g = segment_at(x, i.b, n);
    load_tokens(blocks, x, i, g);
    load_sums(right, border<A>(x, i, n, x.states), x.channels, i.count);
    for (int c = 0; c < WIDTH<A>; c += LANES<A>) {
      const Vec<A> gap = load_gap<A>(d.log_w + c), u = load(d.u + c), one = splat<A>(1);
      run_right<A>(g, blocks, lane_of(right, c), gap, c, false);
      Lane<A> l = lane_of(left, c);
      for (int t = 0; t < g.size; ++t) {
        const Vec<A> key = load(&blocks.k[t][c]), value = load(&blocks.v[t][c]);
        if (!g.exists[t]) {
          store(&blocks.v[t][c], Vec<A>{});
          continue;
        }
        store(&blocks.v[t][c], read(l, found_at(blocks.found, t, c), gap, u, key, value).y);
        advance(l, gap, key, value, one);
      }
      keep_lane(left, c, l, gap);
    }
    store_block<A>(x.y, x.v_type, x, i, g, blocks.v);
  }
}

// L and M at the left border of every segment, into x.scratch.
template <class A>
void sweep_left(const ChannelScan& x, Item i, const Decays<A>& d, Blocks<A>& blocks) {
  Sums<A> left, right, back;
  clear(left);
  clear(back);
  for (int64_t n = 0; n < x.segments(); ++n) {
    const Segment g = segment_at(x, i.b, n);
    load_tokens(blocks, x, i, g);
    load_sums(right, border<A>(x, i, n, x.states), x.channels, i.count);
    store_sums(border<A>(x, i, n, x.scratch, 6), left, x.channels, i.count);
    store_sums(border<A>(x, i, n, x.scratch, 6, 3), back, x.channels, i.count);
    for (int c = 0; c < WIDTH<A>; c += LANES<A>) {
      const Vec<A> gap = load_gap<A>(d.log_w + c), u = load(d.u + c), one = splat<A>(1);
      run_right<A>(g, blocks, lane_of(right, c), gap, c, false);
      Lane<A> l = lane_of(left, c), m = lane_of(back, c);
      for (int t = 0; t < g.size; ++t) {
        if (!g.exists[t]) continue;
        const Vec<A> key = load(&blocks.k[t][c]), value = load(&blocks.v[t][c]);
        const Reading<A> r = read(l, found_at(blocks.found, t, c), gap, u, key, value);
        const Vec<A> p = load(&blocks.dy[t][c]) / r.z;
        advance(l, gap, key, value, one);
        advance_back(m, gap, -r.q, p, -p * r.y);
      }
      keep_lane(left, c, l, gap), keep_lane(back, c, m, gap);
    }
  }
}

// One lane group of a segment from left to right: gradients through R and the token's own weight. Leaves behind, for
// every token, -q, p and -p y, L before it and its step.
template <class A>
WKV_INLINE void backward_left(const Segment& g, Blocks<A>& x, Lane<A> l, Lane<A> m, Vec<A> gap, Vec<A> u, int c,
                              Vec<A>& d_log_w, Vec<A>& d_u) {
  for (int t = 0; t < g.size; ++t) {
    if (!g.exists[t]) {
      store(&x.k[t][c], Vec<A>{}), store(&x.dy[t][c], Vec<A>{});
      continue;
    }
    const Vec<A> key = load(&x.k[t][c]), value = load(&x.v[t][c]);
    const Lane<A> right = found_at(x.found, t, c);
    const Reading<A> r = read(l, right, gap, u, key, value);
    const Vec<A> p = load(&x.dy[t][c]) / r.z, direct = r.bonus * p, own = direct * (value - r.y);
    const Weights<A> back = weights_back(x.steps, t, c, m, gap);
    const Vec<A> num_back = m.num + m.a, den_back = m.den + m.b;
    d_log_w += back.old * (right.num * num_back + right.den * den_back);
    d_u += own;
    store(&x.k[t][c], back.fresh * (num_back * value + den_back) + own);
    store(&x.dy[t][c], back.fresh * num_back + direct);
    store(&x.q[t][c], -r.q), store(&x.p[t][c], p), store(&x.py[t][c], -p * r.y);
    advance_back(m, gap, -r.q, p, -p * r.y);
    keep_found(x.found, t, c, l);
    const Weights<A> w = advance(l, gap, key, value, splat<A>(1));
    keep_step(x.steps, t, c, w, l);
  }
}

// The same segment from right to left: gradients through L.
template <class A>
WKV_INLINE Lane<A> backward_right(const Segment& g, Blocks<A>& x, Lane<A> n, Vec<A> gap, int c, Vec<A>& d_log_w) {
  for (int t = g.size - 1; t >= 0; --t) {
    if (!g.exists[t]) continue;
    const Lane<A> l = found_at(x.found, t, c);
    const Weights<A> w = weights_back(x.steps, t, c, n, gap);
    const Vec<A> num_back = n.num + n.a, den_back = n.den + n.b;
    d_log_w += w.old * (l.num * num_back + l.den * den_back);
    store(&x.k[t][c], load(&x.k[t][c]) + w.fresh * (num_back * load(&x.v[t][c]) + den_back));
    store(&x.dy[t][c], load(&x.dy[t][c]) + w.fresh * num_back);
    advance_back(n, gap, load(&x.q[t][c]), load(&x.p[t][c]), load(&x.py[t][c]));
  }
  return n;
}

template <class A>
void backward(const ChannelScan& x, int64_t number) {
  const Item i = item_at<A>(x, number);
  Decays<A> d;
  Blocks<A> blocks;
  Sums<A> left, right, back_left, back_right;
  alignas(64) A d_log_w[WIDTH<A>] = {}, d_u[WIDTH<A>] = {};
  load_decays(d, x, i);
  sweep_left(x, i, d, blocks);
  clear(back_right);
  for (int64_t n = x.segments() - 1; n >= 0; --n) {
    const Segment g = segment_at(x, i.b, n);
    load_tokens(blocks, x, i, g);
    load_sums(right, border<A>(x, i, n, x.states), x.channels, i.count);
    load_sums(left, border<A>(x, i, n, x.scratch, 6), x.channels, i.count);
    load_sums(back_left, border<A>(x, i, n, x.scratch, 6, 3), x.channels, i.count);
    for (int c = 0; c < WIDTH<A>; c += LANES<A>) {
      const Vec<A> gap = load_gap<A>(d.log_w + c), u = load(d.u + c);
      Vec<A> decay_gradient{}, bonus_gradient{};
      run_right<A>(g, blocks, lane_of(right, c), gap, c, true);
      backward_left<A>(g, blocks, lane_of(left, c), lane_of(back_left, c), gap, u, c, decay_gradient, bonus_gradient);
      keep_lane(back_right, c, backward_right<A>(g, blocks, lane_of(back_right, c), gap, c, decay_gradient), gap);
      store(d_log_w + c, load(d_log_w + c) + decay_gradient);
      store(d_u + c, load(d_u + c) + bonus_gradient);
    }
    store_block<A>(x.dk, x.k_type, x, i, g, blocks.k);
    store_block<A>(x.dv, x.v_type, x, i, g, blocks.dy);
  }
  const int64_t start = i.b * x.channels + i.first;
  store_row(static_cast<A*>(x.d_log_w_rows) + start, d_log_w, i.count);
  store_row(static_cast<A*>(x.d_u_rows) + start, d_u, i.count);
}

}  // namespace
}  // namespace channels

void bi_wkv_forward(const ChannelScan& x, bool in_double, int64_t item) {
  return in_double ? channels::forward<double>(x, item) : channels::forward<float>(x, item);
}

void bi_wkv_backward(const ChannelScan& x, bool in_double, int64_t item) {
  return in_double ? channels::backward<double>(x, item) : channels::backward<float>(x, item);
}

}  // namespace wkv::WKV_ISA
