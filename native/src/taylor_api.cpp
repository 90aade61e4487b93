// C interface of linear attention and its Taylor form. Tables `inputs`, `types` and `gradients` are ordered as in
// taylor.h (enum TaylorName); `scale` 0 says that q and k are features already.
#include <cmath>
#include <new>

#include "api.h"
#include "dispatch.h"
#include "taylor.h"
#include "threads.h"

WKV_DISPATCH(taylor_forward, (const TaylorCall& call, int64_t index, void* scratch), (call, index, scratch))
WKV_DISPATCH(taylor_backward, (const TaylorCall& call, int64_t index, void* scratch), (call, index, scratch))

namespace {

using wkv::TaylorCall;

TaylorCall make_call(void* const* inputs, const int64_t* types, const void* kv, const void* z, const uint8_t* mask,
                     const uint8_t* reset, int64_t batch, int64_t time, int64_t heads, int64_t size, int64_t values,
                     int64_t wide, double scale, double eps) {
  TaylorCall call{};
  call.batch = batch, call.time = time, call.heads = heads, call.size = size, call.values = values;
  call.wide = wide != 0, call.taylor = scale != 0, call.root = call.taylor ? std::sqrt(scale) : 1, call.eps = eps;
  call.mask = mask, call.reset = reset, call.kv = kv, call.z = z;
  for (int i = 0; i < wkv::TAYLOR_COUNT; ++i) call.inputs[i] = {inputs[i], types[i]};
  return call;
}

// Heads side by side: each is one thread's, so that no sum depends on how many there are.
template <class Kernel>
void run(const TaylorCall& call, int64_t threads, Kernel kernel) {
  const std::align_val_t alignment{64};
  wkv::parallel_for(static_cast<int>(threads), call.batch * call.heads, [&](int64_t index) {
    void* scratch = ::operator new(wkv::taylor_scratch(call) * (call.wide ? 8 : 4), alignment);
    kernel(call, index, scratch);
    ::operator delete(scratch, alignment);
  });
}

}  // namespace

// y gets the type of v; kv and z (the initial state) may be null, and so may starts.
WKV_API int64_t wkv_taylor_forward(void* const* inputs, const int64_t* types, const void* kv, const void* z,
                                   const uint8_t* mask, const uint8_t* reset, void* y, void* final_kv, void* final_z,
                                   void* starts, int64_t batch, int64_t time, int64_t heads, int64_t size,
                                   int64_t values, int64_t wide, int64_t threads, double scale, double eps) {
  TaylorCall call = make_call(inputs, types, kv, z, mask, reset, batch, time, heads, size, values, wide, scale, eps);
  call.y = {y, types[wkv::TAYLOR_V]}, call.out_kv = final_kv, call.out_z = final_z, call.starts = starts;
  run(call, threads, wkv::taylor_forward);
  return 0;
}

// d_kv and d_z (of the final state) may be null, and so may dy in `inputs`. Gradients get the types of their inputs.
WKV_API int64_t wkv_taylor_backward(void* const* inputs, const int64_t* types, const void* d_kv, const void* d_z,
                                    const uint8_t* mask, const uint8_t* reset, void* const* gradients, void* out_d_kv,
                                    void* out_d_z, void* starts, int64_t batch, int64_t time, int64_t heads,
                                    int64_t size, int64_t values, int64_t wide, int64_t threads, double scale,
                                    double eps) {
  TaylorCall call =
      make_call(inputs, types, d_kv, d_z, mask, reset, batch, time, heads, size, values, wide, scale, eps);
  for (int i = 0; i < wkv::TAYLOR_DY; ++i) call.gradients[i] = {gradients[i], types[i]};
  call.out_kv = out_d_kv, call.out_z = out_d_z, call.starts = starts;
  run(call, threads, wkv::taylor_backward);
  return 0;
}
