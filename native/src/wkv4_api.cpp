// WKV-4 as C functions: forward and backward over whole sequences.
#include "api.h"
#include "channel_scan.h"
#include "dispatch.h"
#include "threads.h"

WKV_DISPATCH(wkv4_forward, (const ChannelScan& x, bool in_double, int64_t item), (x, in_double, item))
WKV_DISPATCH(wkv4_backward, (const ChannelScan& x, bool in_double, int64_t item), (x, in_double, item))

// Arguments as described in channel_scan.h. Returns 0.
WKV_API int64_t wkv4_forward(int64_t batch, int64_t length, int64_t channels, int64_t in_double, int64_t k_type,
                             int64_t v_type, int64_t threads, const void* log_w, const void* u, const void* k,
                             const void* v, const uint8_t* mask, const uint8_t* reset, const void* num,
                             const void* den, const void* top, void* states, void* y, void* out_num, void* out_den,
                             void* out_top) {
  wkv::ChannelScan x{};
  x.batch = batch, x.length = length, x.channels = channels;
  x.k_type = static_cast<wkv::Element>(k_type), x.v_type = static_cast<wkv::Element>(v_type);
  x.log_w = log_w, x.u = u, x.k = k, x.v = v, x.mask = mask, x.reset = reset;
  x.num = num, x.den = den, x.top = top, x.states = states, x.y = y;
  x.out_num = out_num, x.out_den = out_den, x.out_top = out_top;
  wkv::parallel_for(static_cast<int>(threads), wkv::scan_items(x, in_double != 0),
                    [&](int64_t item) { wkv::wkv4_forward(x, in_double != 0, item); });
  return 0;
}

// As above; `states` and `end_top` are what the forward pass returned, the gradients of log_w and u are [C].
WKV_API int64_t wkv4_backward(int64_t batch, int64_t length, int64_t channels, int64_t in_double, int64_t k_type,
                              int64_t v_type, int64_t threads, const void* dy, const void* d_num, const void* d_den,
                              const void* log_w, const void* u, const void* k, const void* v, const uint8_t* mask,
                              const uint8_t* reset, const void* num, const void* den, const void* top,
                              const void* end_top, void* states, void* d_log_w_rows, void* d_u_rows, void* d_log_w,
                              void* d_u, void* dk, void* dv, void* out_num, void* out_den, void* out_top) {
  wkv::ChannelScan x{};
  x.batch = batch, x.length = length, x.channels = channels;
  x.k_type = static_cast<wkv::Element>(k_type), x.v_type = static_cast<wkv::Element>(v_type);
  x.dy = dy, x.d_num = d_num, x.d_den = d_den;
  x.log_w = log_w, x.u = u, x.k = k, x.v = v, x.mask = mask, x.reset = reset;
  x.num = num, x.den = den, x.top = top, x.end_top = end_top, x.states = states;
  x.d_log_w_rows = d_log_w_rows, x.d_u_rows = d_u_rows, x.dk = dk, x.dv = dv;
  x.out_num = out_num, x.out_den = out_den, x.out_top = out_top;
  wkv::parallel_for(static_cast<int>(threads), wkv::scan_items(x, in_double != 0),
                    [&](int64_t item) { wkv::wkv4_backward(x, in_double != 0, item); });
  wkv::sum_gradients(x, in_double != 0, d_log_w, d_u);
  return 0;
}
