// C interface of WKV-5 and WKV-6. Tables `inputs`, `types` and `gradients` are ordered as in matrix.h (enum Name);
// u is [H, N], and so is log_w where `constant_decay` (WKV-5).
#include "dispatch.h"
#include "matrix_api.h"

WKV_DISPATCH(linear_forward, (const MatrixCall& call, int64_t index, int64_t first_row, int64_t rows, void* scratch),
             (call, index, first_row, rows, scratch))
WKV_DISPATCH(linear_backward, (const MatrixCall& call, int64_t index, void* scratch), (call, index, scratch))

// y gets the type of v; starts may be null.
WKV_API int64_t wkv_linear_forward(void* const* inputs, const int64_t* types, const void* state, const uint8_t* mask,
                                   const uint8_t* reset, void* y, void* final, void* starts, int64_t constant_decay,
                                   int64_t batch, int64_t time, int64_t heads, int64_t size, int64_t wide,
                                   int64_t threads) {
  wkv::MatrixCall call = wkv::matrix_call(inputs, types, mask, reset, batch, time, heads, size, wide);
  call.state = state, call.result = final, call.starts = starts, call.y = {y, types[wkv::ROW_V]};
  call.constant_decay = constant_decay != 0;
  wkv::run_forward(call, threads, wkv::linear_forward);
  return 0;
}

// d_final may be null, and so may dy in `inputs`. Gradients get the types of their inputs, but those of tensors [H, N]
// are [B, H, N] in the compute type, for the caller to add up.
WKV_API int64_t wkv_linear_backward(void* const* inputs, const int64_t* types, const void* d_final, const uint8_t* mask,
                                    const uint8_t* reset, void* starts, void* const* gradients, void* d_state,
                                    int64_t constant_decay, int64_t batch, int64_t time, int64_t heads, int64_t size,
                                    int64_t wide, int64_t threads) {
  wkv::MatrixCall call = wkv::matrix_call(inputs, types, mask, reset, batch, time, heads, size, wide);
  call.state = d_final, call.result = d_state, call.starts = starts;
  call.constant_decay = constant_decay != 0;
  for (int i = 0; i < wkv::ROW_COUNT; ++i) call.gradients[i] = {gradients[i], types[i]};
  const int64_t compute_type = wide != 0 ? wkv::FLOAT64 : wkv::FLOAT32;
  call.gradients[wkv::ROW_U].type = compute_type;
  if (call.constant_decay) call.gradients[wkv::ROW_LOG_W].type = compute_type;
  wkv::run_backward(call, threads, wkv::linear_backward);
  return 0;
}
