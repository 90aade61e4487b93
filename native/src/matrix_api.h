// From the arguments of the plain C functions to a MatrixCall, and its heads to threads.
#pragma once
#include <cstdlib>
#include <new>

#include "api.h"
#include "matrix.h"
#include "threads.h"

namespace wkv {

// Aligned for vectors; every number the kernels read they wrote before.
class ScratchMemory {
 public:
  explicit ScratchMemory(const MatrixCall& call)
      : data_(::operator new(scratch_numbers(call.size) * (call.wide ? 8 : 4), std::align_val_t(64))) {}
  ~ScratchMemory() { ::operator delete(data_, std::align_val_t(64)); }
  ScratchMemory(const ScratchMemory&) = delete;
  ScratchMemory& operator=(const ScratchMemory&) = delete;
  void* data() const { return data_; }

 private:
  void* data_;
};

inline MatrixCall matrix_call(void* const* inputs, const int64_t* types, const uint8_t* mask, const uint8_t* reset,
                              int64_t batch, int64_t time, int64_t heads, int64_t size, int64_t wide) {
  MatrixCall call{};
  call.batch = batch, call.time = time, call.heads = heads, call.size = size, call.wide = wide != 0;
  call.mask = mask, call.reset = reset;
  for (int i = 0; i < ROW_COUNT; ++i) call.inputs[i] = {inputs[i], types[i]};
  return call;
}

// Heads side by side; where there are fewer of them than threads, value rows of a head too (they never meet).
template <class Kernel>
void run_forward(const MatrixCall& call, int64_t threads, Kernel kernel) {
  const int64_t heads = call.batch * call.heads, units = padded(call.size) / 16;
  int64_t parts = (threads + heads - 1) / heads;
  parts = parts < units ? parts : units;
  const int64_t rows = (units + parts - 1) / parts * 16;
  parallel_for(static_cast<int>(threads), heads * parts, [&](int64_t item) {
    const int64_t first = item % parts * rows, rest = call.size - first;
    if (rest <= 0) return;
    const ScratchMemory scratch(call);
    kernel(call, item / parts, first, rest < rows ? rest : rows, scratch.data());
  });
}

template <class Kernel>
void run_backward(const MatrixCall& call, int64_t threads, Kernel kernel) {
  parallel_for(static_cast<int>(threads), call.batch * call.heads, [&](int64_t index) {
    const ScratchMemory scratch(call);
    kernel(call, index, scratch.data());
  });
}

}  // namespace wkv
