// The matrix-state operators (WKV-5, 6 and 7): what one call is made of, and the scratch memory it needs.
// S is the state [N_value, N_key] of one head; all tensors are contiguous [B, T, H, N] unless said otherwise.
#pragma once
#include <cstdint>

namespace wkv {

// Tokens between two states kept for the backward pass.
constexpr int64_t SEGMENT = 32;

enum Type : int64_t { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2, FLOAT64 = 3 };

// The tensors of a call by their place in its table. WKV-5 and 6 have the bonus u [H, N] where WKV-7 has a.
enum Name { ROW_R, ROW_LOG_W, ROW_K, ROW_V, ROW_A, ROW_B, ROW_DY, ROW_COUNT, ROW_U = ROW_A };

struct Tensor {
  void* data = nullptr;
  int64_t type = FLOAT32;
};

struct MatrixCall {
  int64_t batch, time, heads, size;
  bool wide;            // compute in double, else in float; states have the compute type
  bool constant_decay;  // log_w and its gradient are [H, N] (WKV-5)
  const uint8_t* mask;  // [B, T] or null: 0 where a token does not exist
  const uint8_t* reset;  // [B, T] or null: the state is zeroed before these tokens
  Tensor inputs[ROW_COUNT];
  const void* state;  // [B, H, N, N]: the initial state (forward) or the final state's gradient (backward); null: zeros
  void* starts;       // [segments, B, H, N, N]: the states at segment starts; null: not kept
  void* result;       // [B, H, N, N]: the final state (forward) or the initial state's gradient (backward)
  Tensor y;
  Tensor gradients[ROW_COUNT];  // of the inputs; those of tensors [H, N] are [B, H, N] here, in the compute type
};

constexpr int64_t padded(int64_t size) { return (size + 15) / 16 * 16; }

// Numbers of the compute type that one work item may use, forward or backward (kernels/matrix_state.h hands them out).
constexpr int64_t scratch_numbers(int64_t size) {
  const int64_t rows = ROW_COUNT * SEGMENT           // the inputs of a segment
                       + ROW_COUNT * SEGMENT         // their gradients
                       + padded(size)                // the state or its gradient
                       + 16 * (SEGMENT + 2)          // the states of a segment, 16 value rows of them
                       + 2 * SEGMENT + 8;            // what the removal keys read, and single rows
  return rows * padded(size);
}

}  // namespace wkv
