// The arguments of the channelwise operators (WKV-4 and Bi-WKV), as wkv4_api.cpp and bi_wkv_api.cpp hand them to the
// kernels. Arrays are contiguous; "compute type" is float, or double where any argument is.
#pragma once
#include <cstdint>

namespace wkv {

// The element types an array may have, numbered as in wkv/ops/native_wkv4.py.
enum class Element : int64_t { float32 = 0, bfloat16 = 1, float16 = 2, float64 = 3 };

constexpr int SCAN_TOKENS = 16;       // tokens per segment: states are kept at its border, the rest is computed again
constexpr int SCAN_ROW_BYTES = 128;   // a work item is one batch row and as many channels as fill this in compute type

struct ChannelScan {
  int64_t batch, length, channels;
  Element k_type, v_type;           // y, dy and dv are of v's type, dk of k's
  const void *log_w, *u;            // [C] in compute type
  const void *k, *v;                // [B, T, C]
  const uint8_t *mask, *reset;      // [B, T] or null
  const void *num, *den, *top;      // initial state, [B, C] in compute type, or null
  void *states;                     // [B, segments, 3, C]: (max, num, den) at the border of every segment, or null
  void *y;                          // [B, T, C]
  void *out_num, *out_den, *out_top;  // [B, C]: the final state; in a backward pass the gradients of the initial one

  // Backward passes only.
  const void *dy;                   // [B, T, C]
  const void *d_num, *d_den;        // [B, C]: gradients of the final state
  const void *end_top;              // [B, C]: the final max
  void *scratch;                    // [B, segments, 6, C]
  void *dk, *dv;                    // [B, T, C]
  void *d_log_w_rows, *d_u_rows;    // [B, C]: not yet summed over the batch

  int64_t segments() const { return (length + SCAN_TOKENS - 1) / SCAN_TOKENS; }
};

// How many work items there are: items 0 .. n - 1 share no results.
inline int64_t scan_items(const ChannelScan& x, bool in_double) {
  const int64_t width = SCAN_ROW_BYTES / (in_double ? 8 : 4);
  return x.batch * ((x.channels + width - 1) / width);
}

template <class A>
void sum_rows(const ChannelScan& x, const void* rows, void* out) {
  A* sums = static_cast<A*>(out);
  for (int64_t c = 0; c < x.channels; ++c) sums[c] = 0;
  const A* row = static_cast<const A*>(rows);
  for (int64_t b = 0; b < x.batch; ++b, row += x.channels)
    for (int64_t c = 0; c < x.channels; ++c) sums[c] += row[c];
}

// The gradients of log_w and u, [C], summed over the batch in one order for any number of threads.
inline void sum_gradients(const ChannelScan& x, bool in_double, void* d_log_w, void* d_u) {
  const auto sum = in_double ? sum_rows<double> : sum_rows<float>;
  sum(x, x.d_log_w_rows, d_log_w);
  sum(x, x.d_u_rows, d_u);
}

}  // namespace wkv
