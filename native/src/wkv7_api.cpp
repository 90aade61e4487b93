// C interface of WKV-7. Tables `inputs`, `types` and `gradients` are ordered as in matrix.h (enum Name).
#include "dispatch.h"
#include "matrix_api.h"

WKV_DISPATCH(wkv7_forward, (const MatrixCall& call, int64_t index, int64_t first_row, int64_t rows, void* scratch),
             (call, index, first_row, rows, scratch))
WKV_DISPATCH(wkv7_backward, (const MatrixCall& call, int64_t index, void* scratch), (call, index, scratch))

// y gets the type of v; starts may be null.
WKV_API int64_t wkv_wkv7_forward(void* const* inputs, const int64_t* types, const void* state, const uint8_t* mask,
                                 const uint8_t* reset, void* y, void* final, void* starts, int64_t batch, int64_t time,
                                 int64_t heads, int64_t size, int64_t wide, int64_t threads) {
  wkv::MatrixCall call = wkv::matrix_call(inputs, types, mask, reset, batch, time, heads, size, wide);
  call.state = state, call.result = final, call.starts = starts, call.y = {y, types[wkv::ROW_V]};
  wkv::run_forward(call, threads, wkv::wkv7_forward);
  return 0;
}

// d_final may be null, and so may dy in `inputs`; gradients get the types of their inputs.
WKV_API int64_t wkv_wkv7_backward(void* const* inputs, const int64_t* types, const void* d_final, const uint8_t* mask,
                                  const uint8_t* reset, void* starts, void* const* gradients, void* d_state,
                                  int64_t batch, int64_t time, int64_t heads, int64_t size, int64_t wide,
                                  int64_t threads) {
  wkv::MatrixCall call = wkv::matrix_call(inputs, types, mask, reset, batch, time, heads, size, wide);
  call.state = d_final, call.result = d_state, call.starts = starts;
  for (int i = 0; i < wkv::ROW_COUNT; ++i) call.gradients[i] = {gradients[i], types[i]};
  wkv::run_backward(call, threads, wkv::wkv7_backward);
  return 0;
}
