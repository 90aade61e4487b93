// Products of a weight matrix with rows of activations: the kernels behind one name.
#pragma once
#include "weights.h"

#include <vector>

namespace wkv {

// Rows of W that one call of `multiply` must start and end at.
int64_t row_unit(const Matrix& w);

// Rows [begin, end) of y [count][ld] = W x. `scratch` is the calling thread's own, for the sparse formats.
void multiply(const Matrix& w, const Operand& x, int64_t count, int64_t begin, int64_t end, float* y, int64_t ld,
              std::vector<uint8_t>& scratch);

// How many rows to hand to a thread at a time so that a share is about `bytes` of weights.
int64_t rows_per_share(const Matrix& w, int64_t bytes);

void quantize_row(const float* x, int64_t k, char* out);

void multiply_sparse(const Matrix& w, const FixedRow& x, int64_t group_begin, int64_t group_end, float* y,
                     int64_t* skipped);

}  // namespace wkv
