// WKV-4 for one batch row and a few channels, token by token; the equations are in wkv/ops/wkv4_chunked.py.
#include "channel_scan.h"

namespace wkv::WKV_ISA {
namespace channels {
namespace {

// What a token reads from the state before it: all scaled by exp(-q), q the larger exponent.
template <class A>
struct Reading {
  Vec<A> q, bonus, z, y;
};

template <class A>
WKV_INLINE Reading<A> read(const Lane<A>& s, Vec<A> gap, Vec<A> u, Vec<A> k, Vec<A> v) {
  const Vec<A> before = s.m + s.count * gap, own = k + u;
  const auto old_wins = before > own;
  const Vec<A> q = old_wins ? before : own;
  // One of the two is the rounding of q, so one exponential suffices.
  const Vec<A> below_old = (s.m - q) + s.count * gap, below_own = (k - q) + u;
  const Vec<A> weight = vexp(old_wins ? below_own : below_old);
  const Vec<A> near_one = exp_of_rounding<A>(old_wins ? below_old : below_own);
  const Vec<A> old = old_wins ? near_one : weight, bonus = old_wins ? weight : near_one;
  const Vec<A> z = old * (s.den + s.b) + bonus;
  return {q, bonus, z, (old * (s.num + s.a) + bonus * v) / z};
}

template <class A>
void load_start(Sums<A>& s, const ChannelScan& x, Item i) {
  if (x.num == nullptr) return clear(s);
  const int64_t start = i.b * x.channels + i.first;
  load_row(s.m, static_cast<const A*>(x.top) + start, i.count);
  load_row(s.a, static_cast<const A*>(x.num) + start, i.count);
  load_row(s.b, static_cast<const A*>(x.den) + start, i.count);
}

template <class A>
void forward_segment(const Segment& g, Sums<A>& state, const A* log_w, const A* u, const Block<A>& k, Block<A>& v) {
  for (int c = 0; c < WIDTH<A>; c += LANES<A>) {
    const Vec<A> gap = load_gap<A>(log_w + c), bonus = load(u + c), one = splat<A>(1);
    Lane<A> s = lane_of(state, c);
    for (int t = 0; t < g.size; ++t) {
      if (!g.exists[t]) {
        store(&v[t][c], Vec<A>{});
        continue;
      }
      if (g.reset[t]) s = empty_lane<A>();
      const Vec<A> key = load(&k[t][c]), value = load(&v[t][c]);
      store(&v[t][c], read(s, gap, bonus, key, value).y);
      advance(s, gap, key, value, one);
    }
    keep_lane(state, c, s, gap);
  }
}

template <class A>
void forward(const ChannelScan& x, int64_t number) {
  const Item i = item_at<A>(x, number);
  alignas(64) A log_w[WIDTH<A>], u[WIDTH<A>];
  alignas(64) Block<A> k, v;
  Sums<A> state;
  load_row(log_w, static_cast<const A*>(x.log_w) + i.first, i.count);
  load_row(u, static_cast<const A*>(x.u) + i.first, i.count);
  load_start(state, x, i);
  for (int64_t n = 0; n < x.segments(); ++n) {
    const Segment g = segment_at(x, i.b, n);
    if (x.states != nullptr) store_sums(border<A>(x, i, n, x.states), state, x.channels, i.count);
    load_block<A>(k, x, i, g, x.k, x.k_type);
    load_block<A>(v, x, i, g, x.v, x.v_type);
    forward_segment<A>(g, state, log_w, u, k, v);  // v becomes y
    store_block<A>(x.y, x.v_type, x, i, g, v);
  }
  const int64_t start = i.b * x.channels + i.first;
  store_row(static_cast<A*>(x.out_num) + start, state.a, i.count);
  store_row(static_cast<A*>(x.out_den) + start, state.b, i.count);
  store_row(static_cast<A*>(x.out_top) + start, state.m, i.count);
}

template <class A>
struct BackwardBlocks {
  alignas(64) Block<A> k, v, dy;  // k and v become dk and dv
  Found<A> found;
  Steps<A> steps;
};

// `state` is the one before the segment, `back` the gradients of num and den behind it, then before it.
template <class A>
void backward_segment(const Segment& g, BackwardBlocks<A>& x, const Sums<A>& state, Sums<A>& back, const A* log_w,
                      const A* u, A* d_log_w, A* d_u) {
  for (int c = 0; c < WIDTH<A>; c += LANES<A>) {
    const Vec<A> gap = load_gap<A>(log_w + c), bonus = load(u + c), one = splat<A>(1);
    Lane<A> s = lane_of(state, c), n = lane_of(back, c);
    for (int t = 0; t < g.size; ++t) {
      if (!g.exists[t]) continue;
      if (g.reset[t]) s = empty_lane<A>();
      keep_found(x.found, t, c, s);
      const Weights<A> w = advance(s, gap, load(&x.k[t][c]), load(&x.v[t][c]), one);
      keep_step(x.steps, t, c, w, s);
    }
    Vec<A> decay_gradient{}, bonus_gradient{};
    for (int t = g.size - 1; t >= 0; --t) {
      if (!g.exists[t]) {
        store(&x.k[t][c], Vec<A>{}), store(&x.v[t][c], Vec<A>{});
        continue;
      }
      s = found_at(x.found, t, c);
      const Vec<A> key = load(&x.k[t][c]), value = load(&x.v[t][c]);
      const Reading<A> r = read(s, gap, bonus, key, value);
      const Vec<A> p = load(&x.dy[t][c]) / r.z, direct = r.bonus * p, own = direct * (value - r.y);
      const Weights<A> w = weights_back(x.steps, t, c, n, gap);
      const Vec<A> num_back = n.num + n.a, den_back = n.den + n.b;
      decay_gradient += w.old * (s.num * num_back + s.den * den_back);
      bonus_gradient += own;
      store(&x.k[t][c], w.fresh * (num_back * value + den_back) + own);
      store(&x.v[t][c], w.fresh * num_back + direct);
      advance_back(n, gap, -r.q, p, -p * r.y);
      if (g.reset[t]) n = empty_lane<A>();
    }
    keep_lane(back, c, n, gap);
    store(d_log_w + c, load(d_log_w + c) + decay_gradient);
    store(d_u + c, load(d_u + c) + bonus_gradient);
  }
}

// Gradients of the initial num, den and max from those of num exp(max) and den exp(max).
template <class A>
void store_start_gradients(const ChannelScan& x, Item i, const Sums<A>& back, bool wiped) {
  Sums<A> start, out;
  load_start(start, x, i);
  for (int c = 0; c < WIDTH<A>; c += LANES<A>) {
    const Vec<A> scale = vexp(load(back.m + c) + load(start.m + c)), none{};
    const Vec<A> num = load(back.a + c) * scale, den = load(back.b + c) * scale;
    const Vec<A> top = num * load(start.a + c) + den * load(start.b + c);
    // A state that was wiped before anything read it may hold anything.
    store(out.m + c, wiped ? none : top), store(out.a + c, wiped ? none : num), store(out.b + c, wiped ? none : den);
  }
  const int64_t start_at = i.b * x.channels + i.first;
  store_row(static_cast<A*>(x.out_num) + start_at, out.a, i.count);
  store_row(static_cast<A*>(x.out_den) + start_at, out.b, i.count);
  store_row(static_cast<A*>(x.out_top) + start_at, out.m, i.count);
}

template <class A>
void backward(const ChannelScan& x, int64_t number) {
  const Item i = item_at<A>(x, number);
  const int64_t start = i.b * x.channels + i.first;
  alignas(64) A log_w[WIDTH<A>], u[WIDTH<A>], d_log_w[WIDTH<A>] = {}, d_u[WIDTH<A>] = {};
  BackwardBlocks<A> blocks;
  Sums<A> state, back;
  load_row(log_w, static_cast<const A*>(x.log_w) + i.first, i.count);
  load_row(u, static_cast<const A*>(x.u) + i.first, i.count);
  load_row(back.m, static_cast<const A*>(x.end_top) + start, i.count);
  for (int c = 0; c < WIDTH<A>; ++c) back.m[c] = -back.m[c];
  load_row(back.a, static_cast<const A*>(x.d_num) + start, i.count);
  load_row(back.b, static_cast<const A*>(x.d_den) + start, i.count);
  bool wiped = false;  // whether the first token that exists resets the state
  for (int64_t n = x.segments() - 1; n >= 0; --n) {
    const Segment g = segment_at(x, i.b, n);
    for (int t = g.size - 1; t >= 0; --t) wiped = g.exists[t] ? g.reset[t] : wiped;
    load_sums(state, border<A>(x, i, n, x.states), x.channels, i.count);
    load_block<A>(blocks.k, x, i, g, x.k, x.k_type);
    load_block<A>(blocks.v, x, i, g, x.v, x.v_type);
    load_block<A>(blocks.dy, x, i, g, x.dy, x.v_type);
    backward_segment<A>(g, blocks, state, back, log_w, u, d_log_w, d_u);
    store_block<A>(x.dk, x.k_type, x, i, g, blocks.k);
    store_block<A>(x.dv, x.v_type, x, i, g, blocks.v);
  }
  store_row(static_cast<A*>(x.d_log_w_rows) + start, d_log_w, i.count);
  store_row(static_cast<A*>(x.d_u_rows) + start, d_u, i.count);
  if (x.num != nullptr) store_start_gradients<A>(x, i, back, wiped);
}

}  // namespace
}  // namespace channels

void wkv4_forward(const ChannelScan& x, bool in_double, int64_t item) {
  return in_double ? channels::forward<double>(x, item) : channels::forward<float>(x, item);
}

void wkv4_backward(const ChannelScan& x, bool in_double, int64_t item) {
  return in_double ? channels::backward<double>(x, item) : channels::backward<float>(x, item);
}

}  // namespace wkv::WKV_ISA
