// Bi-WKV as C functions: forward and backward over whole sequences.
#include "api.h"
#include "channel_scan.h"
#include "dispatch.h"
#include "threads.h"

WKV_DISPATCH(bi_wkv_forward, (const ChannelScan& x, bool in_double, int64_t item), (x, in_double, item))
WKV_DISPATCH(bi_wkv_backward, (const ChannelScan& x, bool in_double, int64_t item), (x, in_double, item))

// Arguments as described in channel_scan.h. Returns 0.
WKV_API int64_t bi_wkv_forward(int64_t batch, int64_t length, int64_t channels, int64_t in_double, int64_t k_type,
                               int64_t v_type, int64_t threads, const void* log_w, const void* u, const void* k,
                               const void* v, const uint8_t* mask, void* states, void* y) {
  wkv::ChannelScan x{};
  x.batch = batch, x.length = length, x.channels = channels;
  x.k_type = static_cast<wkv::Element>(k_type), x.v_type = static_cast<wkv::Element>(v_type);
  x.log_w = log_w, x.u = u, x.k = k, x.v = v, x.mask = mask, x.states = states, x.y = y;
  wkv::parallel_for(static_cast<int>(threads), wkv::scan_items(x, in_double != 0),
                    [&](int64_t item) { wkv::bi_wkv_forward(x, in_double != 0, item); });
  return 0;
}

// As above; `states` is what the forward pass left there, the gradients of log_w and u are [C].
WKV_API int64_t bi_wkv_backward(int64_t batch, int64_t length, int64_t channels, int64_t in_double, int64_t k_type,
                                int64_t v_type, int64_t threads, const void* dy, const void* log_w, const void* u,
                                const void* k, const void* v, const uint8_t* mask, void* states, void* scratch,
                                void* d_log_w_rows, void* d_u_rows, void* d_log_w, void* d_u, void* dk, void* dv) {
  wkv::ChannelScan x{};
  x.batch = batch, x.length = length, x.channels = channels;
  x.k_type = static_cast<wkv::Element>(k_type), x.v_type = static_cast<wkv::Element>(v_type);
  x.dy = dy, x.log_w = log_w, x.u = u, x.k = k, x.v = v, x.mask = mask;
  x.states = states, x.scratch = scratch;
  x.d_log_w_rows = d_log_w_rows, x.d_u_rows = d_u_rows, x.dk = dk, x.dv = dv;
  wkv::parallel_for(static_cast<int>(threads), wkv::scan_items(x, in_double != 0),
                    [&](int64_t item) { wkv::bi_wkv_backward(x, in_double != 0, item); });
  wkv::sum_gradients(x, in_double != 0, d_log_w, d_u);
  return 0;
}
