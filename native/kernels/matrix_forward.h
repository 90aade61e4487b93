// The forward walk that WKV-5, 6 and 7 share. The state lies transposed, [key][value row], so that vector lanes run
// along the value rows: these never meet, no sum crosses a vector, and any part of them may run on its own thread.
#pragma once
#include "matrix_state.h"

namespace wkv::WKV_ISA {

// Vectors of value rows carried at once: as many as the registers hold.
#if defined(__aarch64__) || WKV_VECTOR_BYTES == 64
constexpr int WIDE = 4;
#else
constexpr int WIDE = 2;
#endif

// Value rows first .. first + rows of the state of one head.
template <class T>
struct TransposedState {
  T* S;            // [size][stride]
  int64_t size;    // keys
  int64_t first;
  int64_t rows;
  int64_t stride;  // rows, rounded up to whole vectors

  void clear() { std::memset(S, 0, size * stride * sizeof(T)); }

  void load(const T* state) {
    clear();
    if (state == nullptr) return;
    for (int64_t m = 0; m < rows; ++m)
      for (int64_t c = 0; c < size; ++c) S[c * stride + m] = state[(first + m) * size + c];
  }

  void save(T* state) const {
    for (int64_t m = 0; m < rows; ++m)
      for (int64_t c = 0; c < size; ++c) state[(first + m) * size + c] = S[c * stride + m];
  }
};

// Calls function(first lane, std::integral_constant<int, vectors>) for `stride` lanes, WIDE, 2 or 1 vectors at a time.
template <class T, class F>
WKV_INLINE void for_lanes(int64_t stride, F&& function) {
  int64_t lane = 0;
  for (; lane + WIDE * LANES<T> <= stride; lane += WIDE * LANES<T>) function(lane, std::integral_constant<int, WIDE>());
  if (WIDE > 2 && lane + 2 * LANES<T> <= stride) {
    function(lane, std::integral_constant<int, 2>());
    lane += 2 * LANES<T>;
  }
  if (lane < stride) function(lane, std::integral_constant<int, 1>());
}

// Runs one head, or some of its value rows. Operator::token(segment, i, state, y) does one token.
template <class T, class Operator>
void forward(const MatrixCall& call, int64_t index, int64_t first_row, int64_t rows, void* memory) {
  const int64_t batch = index / call.heads, head = index % call.heads, size = call.size;
  Scratch<T> scratch(memory, size);
  const int64_t stride = (rows + LANES<T> - 1) / LANES<T> * LANES<T>;
  TransposedState<T> state{scratch.take(size), size, first_row, rows, stride};
  Operator op(call, head, scratch);
  Segment<T> segment = make_segment(call, head, scratch, Operator::names);
  T *y = scratch.take(1), *zeros = scratch.take(1);
  state.load(at<T>(call.state, index, size));
  T* starts = static_cast<T*>(call.starts);
  for (int64_t t = 0, number = 0; t < call.time; t += SEGMENT, ++number) {
    if (starts != nullptr) state.save(starts + (number * call.batch * call.heads + index) * size * size);
    read_segment(call, batch, head, t, segment);
    for (int64_t i = 0; i < segment.count; ++i) {
      op.token(segment, i, state, y);
      write_row(y, segment.offset[i] + first_row, rows, call.y);
    }
    clear_missing(call, batch, head, t, first_row, rows, zeros, call.y);
  }
  state.save(static_cast<T*>(call.result) + index * size * size);
}

}  // namespace wkv::WKV_ISA
