// RWKV-7 inference: any number of tokens of any number of sequences in one call.
//
// The rows (tokens) of a call are processed in blocks. Within a layer, stages alternate between "every row on its own"
// (norms, token shift, fixed-point conversion) and "every output on its own" (matrices, heads); threads meet between
// stages. With a single row each thread repeats the row stages for itself, which is cheaper than meeting.
// The value matrix of the channel mix skips inputs that are exactly zero, as most are after the squared ReLU.
#include "api.h"
#include "dispatch.h"
#include "multiply.h"
#include "rwkv7_head.h"
#include "threads.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <new>

WKV_DISPATCH(rwkv7_head, (const Rwkv7Head& h, int64_t row, int64_t count, float* S), (h, row, count, S))
WKV_DISPATCH(layer_norm,
             (const float* x, const float* weight, const float* bias, int64_t n, int64_t padded, float eps, float* z),
             (x, weight, bias, n, padded, eps, z))
WKV_DISPATCH(token_shift, (const float* z, const float* previous, const float* share, int64_t padded, float* out),
             (z, previous, share, padded, out))
WKV_DISPATCH(add_to, (float* x, const float* y, int64_t padded), (x, y, padded))
WKV_DISPATCH(relu_squared, (float* x, int64_t n), (x, n))
WKV_DISPATCH(sigmoid_of, (float* x, int64_t n), (x, n))
WKV_DISPATCH(tanh_of, (float* x, int64_t n), (x, n))
WKV_DISPATCH(embedding_row,
             (int64_t format, const void* table, const float* scale, int64_t index, int64_t n, float* x),
             (format, table, scale, index, n, x))

namespace wkv {
namespace {

constexpr int64_t BLOCK_ROWS = 256;
constexpr int64_t PAD = 128;             // floats; every row of every buffer is a multiple of this
constexpr int64_t SHARE_BYTES = 1 << 16;  // weights that a thread takes at a time

// Zeroed, aligned memory that grows to what is asked and keeps its contents only until then.
template <class T>
class Buffer {
 public:
  T* resize(int64_t count) {
    if (count > size_) {
      memory_.reset();
      memory_.reset(static_cast<T*>(::operator new(sizeof(T) * static_cast<size_t>(count), std::align_val_t(64))));
      size_ = count;
      std::memset(static_cast<void*>(memory_.get()), 0, sizeof(T) * static_cast<size_t>(count));
    }
    return memory_.get();
  }
  T* get() const { return memory_.get(); }

 private:
  struct Free {
    void operator()(T* p) const { ::operator delete(p, std::align_val_t(64)); }
  };
  std::unique_ptr<T, Free> memory_;
  int64_t size_ = 0;
};

// The order of the matrices and vectors of a layer, as the Python side (inference/native_rwkv7.py) lists them.
enum MatrixName { W1, W2, A1, A2, V1, V2, G1, G2, RECEPTANCE, KEY, VALUE, OUTPUT, FFN_KEY, FFN_VALUE, MATRICES };
enum VectorName {
  LN1_WEIGHT, LN1_BIAS, LN2_WEIGHT, LN2_BIAS, X_R, X_W, X_K, X_V, X_A, X_G, FFN_X_K,
  W0, A0, V0, K_K, K_A, R_K, LNX_WEIGHT, LNX_BIAS, VECTORS
};  // clang-format: keep the two groups: [C] first, [A] from W0 on

struct Layer {
  Matrix matrix[MATRICES];
  const float* vector[VECTORS];
};

// A run of consecutive rows of one sequence within a block.
struct Piece {
  int64_t sequence, row, count;
  bool last;  // the sequence ends with it
};

// What the row stages write. With one row every thread has its own.
struct RowBuffers {
  Buffer<float> x, z, previous, mixed[6], zeros;
  Buffer<char> fixed[3], wide_fixed;
};

struct Call {
  const int64_t* tokens;
  const int64_t* offsets;  // [sequences + 1]
  int64_t sequences;
  float* const* att_shift;  // per layer [sequences][C]
  float* const* wkv;        // per layer [sequences][H][N][N]
  float* const* ffn_shift;
  float* logits;
  bool all_logits;
};

class Rwkv7 {
 public:
  int64_t layers, hidden, heads, head_size, ffn, vocabulary;
  int64_t embedding_format;
  const void* embedding;
  const float* embedding_scale;
  float eps, head_eps;
  const float *ln0_weight, *ln0_bias, *ln_out_weight, *ln_out_bias;
  Matrix head;
  std::vector<Layer> layer;
  std::atomic<int64_t> skipped{0}, value_inputs{0};

  int64_t width() const { return heads * head_size; }

  // A copy of n floats, padded with zeros.
  const float* keep(const float* values, int64_t n) {
    arena_.emplace_back();
    float* to = arena_.back().resize(round_up(n, PAD));
    std::copy(values, values + n, to);
    return to;
  }

  // A low-rank matrix [K][N] of a checkpoint, copied into blocks of 16 rows that are read as one stream.
  Matrix keep_blocked(const Matrix& w) {
    const int64_t size = w.format == Format::f32_columns ? 4 : 2, rows = round_up(w.rows, TILE_ROWS);
    blocks_.emplace_back();
    char* to = blocks_.back().resize(rows * w.cols * size);
    const char* from = static_cast<const char*>(w.data);
    for (int64_t n = 0; n < w.rows; n += TILE_ROWS)
      for (int64_t k = 0; k < w.cols; ++k)
        std::memcpy(to + (n * w.cols + k * TILE_ROWS) * size, from + (k * w.rows + n) * size,
                    static_cast<size_t>(std::min<int64_t>(TILE_ROWS, w.rows - n) * size));
    return {w.format, rows, w.cols, to, nullptr};
  }

  void forward(const Call& call, int threads) {
    const int64_t total = call.offsets[call.sequences];
    for (int64_t first = 0; first < total; first += BLOCK_ROWS) {
      split(call, first, std::min(first + BLOCK_ROWS, total));
      prepare(threads);
      parallel(threads, [&](int thread, int count) { run_block(call, thread, count); });
    }
  }

 private:
  std::vector<Buffer<float>> arena_;
  std::vector<Buffer<char>> blocks_;
  std::vector<Piece> pieces_;
  std::vector<RowBuffers> rows_;
  std::vector<std::vector<uint8_t>> scratch_;
  std::vector<int64_t> wanted_;  // rows whose logits are asked for
  Buffer<float> r_, k_, v_, first_value_, y_, o_, f_, partial_, low_[4], up_[4], head_in_;
  std::vector<std::atomic<int64_t>> next_;
  Barrier barrier_;
  int64_t first_ = 0, count_ = 0;

  int64_t channels() const { return round_up(hidden, PAD); }
  int64_t wide() const { return round_up(width(), PAD); }
  int64_t inner() const { return round_up(ffn, PAD); }

  void split(const Call& call, int64_t first, int64_t end) {
    first_ = first;
    count_ = end - first;
    pieces_.clear();
    wanted_.clear();
    for (int64_t s = 0; s < call.sequences; ++s) {
      const int64_t from = std::max(call.offsets[s], first), to = std::min(call.offsets[s + 1], end);
      if (from >= to) continue;
      pieces_.push_back({s, from - first, to - from, to == call.offsets[s + 1]});
    }
    if (call.logits == nullptr) return;
    for (const Piece& piece : pieces_)
      for (int64_t i = call.all_logits ? 0 : piece.count - 1; i < piece.count; ++i)
        if (call.all_logits || piece.last) wanted_.push_back(piece.row + i);
  }

  void prepare(int threads) {
    const size_t owners = count_ == 1 ? static_cast<size_t>(threads) : 1;
    if (rows_.size() < owners) rows_.resize(owners);
    if (scratch_.size() < static_cast<size_t>(threads)) scratch_.resize(static_cast<size_t>(threads));
    for (size_t i = 0; i < owners; ++i) {
      RowBuffers& b = rows_[i];
      for (Buffer<float>* buffer : {&b.x, &b.z, &b.previous}) buffer->resize(count_ * channels());
      for (Buffer<float>& buffer : b.mixed) buffer.resize(count_ * channels());
      b.zeros.resize(channels());
      for (Buffer<char>& buffer : b.fixed) buffer.resize(count_ * FixedLayout(channels()).bytes);
      b.wide_fixed.resize(count_ * FixedLayout(std::max({channels(), wide(), inner()})).bytes);
    }
    for (Buffer<float>* buffer : {&r_, &k_, &v_, &first_value_, &y_}) buffer->resize(count_ * wide());
    for (Buffer<float>& buffer : up_) buffer.resize(count_ * wide());
    for (int i = 0; i < 4; ++i) low_[i].resize(count_ * low_stride(i));
    o_.resize(count_ * channels());
    f_.resize(count_ * inner());
    partial_.resize(threads * channels());
    head_in_.resize(std::max<int64_t>(1, static_cast<int64_t>(wanted_.size())) * channels());
    const size_t counters = static_cast<size_t>(layers) * 6 + 1;
    if (next_.size() != counters) next_ = std::vector<std::atomic<int64_t>>(counters);
    for (auto& n : next_) n.store(0, std::memory_order_relaxed);
  }

  int64_t low_stride(int i) const { return round_up(layer[0].matrix[2 * i].rows, PAD); }

  // ---- the pieces of a layer ----

  // Calls function(row) for every row: for all of them where this thread works alone, else for its share.
  template <class F>
  void for_rows(int thread, int threads, F&& function) {
    if (count_ == 1) return function(int64_t{0});
    const int64_t begin = count_ * thread / threads, end = count_ * (thread + 1) / threads;
    for (int64_t m = begin; m < end; ++m) function(m);
    barrier_.meet(threads);
  }

  // Hands out shares of work until none is left. `stage` numbers the stages of a block.
  template <class F>
  void for_shares(int64_t stage, int64_t shares, F&& function) {
    std::atomic<int64_t>& next = next_[static_cast<size_t>(stage)];
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < shares;) function(i);
  }

  struct Job {
    const Matrix* matrix;
    Operand operand;
    float* out;
    int64_t stride;
    void (*activation)(float*, int64_t);
  };

  // All jobs of a stage together, shared out by rows of their matrices.
  void multiply_all(int thread, int threads, int64_t stage, const Job* jobs, int count, int64_t rows) {
    int64_t shares[16], total = 0;
    for (int j = 0; j < count; ++j) {
      const int64_t share = rows_per_share(*jobs[j].matrix, SHARE_BYTES);
      total += shares[j] = (jobs[j].matrix->rows + share - 1) / share;
    }
    for_shares(stage, total, [&](int64_t i) {
      int j = 0;
      while (i >= shares[j]) i -= shares[j++];
      const Job& job = jobs[j];
      const int64_t share = rows_per_share(*job.matrix, SHARE_BYTES);
      const int64_t begin = i * share, end = std::min(job.matrix->rows, begin + share);
      multiply(*job.matrix, job.operand, rows, begin, end, job.out, job.stride, scratch_[static_cast<size_t>(thread)]);
      if (job.activation != nullptr)
        for (int64_t m = 0; m < rows; ++m) job.activation(job.out + m * job.stride + begin, end - begin);
    });
    barrier_.meet(threads);
  }

  Operand operand(const Matrix& w, const float* x, int64_t stride, const char* fixed) const {
    return {x, stride, fixed, is_integer(w.format) ? FixedLayout(w.cols).bytes : 0};
  }

  static void to_fixed(const Matrix& w, const float* x, char* blocks, int64_t row) {
    if (is_integer(w.format)) quantize_row(x, w.cols, blocks + row * FixedLayout(w.cols).bytes);
  }

  // What stands before row m: the row above, or for the first row of a piece the carried state.
  void set_previous(RowBuffers& b, const Piece& piece, int64_t m, const float* carried) {
    const int64_t c = channels();
    float* to = b.previous.get() + m * c;
    if (m > piece.row) std::memcpy(to, b.z.get() + (m - 1) * c, sizeof(float) * static_cast<size_t>(hidden));
    else std::memcpy(to, carried + piece.sequence * hidden, sizeof(float) * static_cast<size_t>(hidden));
  }

  const Piece& piece_of(int64_t m) const {
    const auto after = std::upper_bound(pieces_.begin(), pieces_.end(), m,
                                        [](int64_t row, const Piece& piece) { return row < piece.row; });
    return *(after - 1);
  }

  // The carried state becomes the last row of every piece. Called by one thread, when no other reads the state.
  void carry(const RowBuffers& b, float* state) {
    for (const Piece& piece : pieces_)
      std::memcpy(state + piece.sequence * hidden, b.z.get() + (piece.row + piece.count - 1) * channels(),
                  sizeof(float) * static_cast<size_t>(hidden));
  }

  void time_mix(const Call& call, RowBuffers& b, int64_t index, int thread, int threads) {
    const Layer& l = layer[static_cast<size_t>(index)];
    const Matrix* m = l.matrix;
    const int64_t c = channels(), a = wide(), stage = 6 * index;
    for_rows(thread, threads, [&](int64_t row) {
      layer_norm(b.x.get() + row * c, l.vector[LN1_WEIGHT], l.vector[LN1_BIAS], hidden, c, eps, b.z.get() + row * c);
    });
    for_rows(thread, threads, [&](int64_t row) {
      set_previous(b, piece_of(row), row, call.att_shift[index]);
      for (int i = 0; i < 6; ++i)
        token_shift(b.z.get() + row * c, b.previous.get() + row * c, l.vector[X_R + i], c, b.mixed[i].get() + row * c);
      to_fixed(m[RECEPTANCE], b.mixed[0].get() + row * c, b.fixed[0].get(), row);
      to_fixed(m[KEY], b.mixed[2].get() + row * c, b.fixed[1].get(), row);
      to_fixed(m[VALUE], b.mixed[3].get() + row * c, b.fixed[2].get(), row);
    });
    const auto mixed = [&](int i, const Matrix& w, const char* fixed) {
      return operand(w, b.mixed[i].get(), c, fixed);
    };
    const Job down[] = {
        {&m[RECEPTANCE], mixed(0, m[RECEPTANCE], b.fixed[0].get()), r_.get(), a, nullptr},
        {&m[KEY], mixed(2, m[KEY], b.fixed[1].get()), k_.get(), a, nullptr},
        {&m[VALUE], mixed(3, m[VALUE], b.fixed[2].get()), v_.get(), a, nullptr},
        {&m[W1], mixed(1, m[W1], nullptr), low_[0].get(), low_stride(0), tanh_of},
        {&m[A1], mixed(4, m[A1], nullptr), low_[1].get(), low_stride(1), nullptr},
        {&m[G1], mixed(5, m[G1], nullptr), low_[3].get(), low_stride(3), sigmoid_of},
        {&m[V1], mixed(3, m[V1], nullptr), low_[2].get(), low_stride(2), nullptr},
    };
    multiply_all(thread, threads, stage, down, index == 0 ? 6 : 7, count_);
    if (thread == 0) carry(b, call.att_shift[index]);

    for_shares(stage + 1, heads, [&](int64_t h) { run_head(call, l, index, h); });
    barrier_.meet(threads);

    for_rows(thread, threads, [&](int64_t row) { to_fixed(m[OUTPUT], y_.get() + row * a, b.wide_fixed.get(), row); });
    const Job out{&m[OUTPUT], operand(m[OUTPUT], y_.get(), a, b.wide_fixed.get()), o_.get(), c, nullptr};
    multiply_all(thread, threads, stage + 2, &out, 1, count_);
    for_rows(thread, threads, [&](int64_t row) { add_to(b.x.get() + row * c, o_.get() + row * c, c); });
  }

  void run_head(const Call& call, const Layer& l, int64_t index, int64_t h) {
    const int64_t a = wide(), begin = h * head_size, end = begin + head_size;
    std::vector<uint8_t> none;
    for (int i = 0; i < 4; ++i)
      if (i != 2 || index > 0)
        multiply(l.matrix[2 * i + 1], {low_[i].get(), low_stride(i), nullptr, 0}, count_, begin, end, up_[i].get(), a,
                 none);
    const Rwkv7Head head{
        head_size, a, index == 0, head_eps,
        l.vector[W0] + begin, l.vector[A0] + begin, l.vector[V0] + begin, l.vector[K_K] + begin,
        l.vector[K_A] + begin, l.vector[R_K] + begin, l.vector[LNX_WEIGHT] + begin, l.vector[LNX_BIAS] + begin,
        r_.get() + begin, k_.get() + begin, up_[0].get() + begin, up_[1].get() + begin, up_[2].get() + begin,
        up_[3].get() + begin, v_.get() + begin, first_value_.get() + begin, y_.get() + begin};
    for (const Piece& piece : pieces_)
      rwkv7_head(head, piece.row, piece.count,
                 call.wkv[index] + (piece.sequence * heads + h) * head_size * head_size);
  }

  void channel_mix(const Call& call, RowBuffers& b, int64_t index, int thread, int threads) {
    const Layer& l = layer[static_cast<size_t>(index)];
    const Matrix &key = l.matrix[FFN_KEY], &value = l.matrix[FFN_VALUE];
    const int64_t c = channels(), stage = 6 * index + 3;
    for_rows(thread, threads, [&](int64_t row) {
      layer_norm(b.x.get() + row * c, l.vector[LN2_WEIGHT], l.vector[LN2_BIAS], hidden, c, eps, b.z.get() + row * c);
    });
    for_rows(thread, threads, [&](int64_t row) {
      set_previous(b, piece_of(row), row, call.ffn_shift[index]);
      token_shift(b.z.get() + row * c, b.previous.get() + row * c, l.vector[FFN_X_K], c, b.mixed[0].get() + row * c);
      to_fixed(key, b.mixed[0].get() + row * c, b.fixed[0].get(), row);
    });
    const Job up{&key, operand(key, b.mixed[0].get(), c, b.fixed[0].get()), f_.get(), inner(), relu_squared};
    multiply_all(thread, threads, stage, &up, 1, count_);
    if (thread == 0) carry(b, call.ffn_shift[index]);
    for_rows(thread, threads, [&](int64_t row) { to_fixed(value, f_.get() + row * inner(), b.wide_fixed.get(), row); });
    if (count_ == 1 && is_sparse(value.format)) {
      sparse_value(b, value, stage + 1, thread, threads);
      return;
    }
    const Job down{&value, operand(value, f_.get(), inner(), b.wide_fixed.get()), o_.get(), c, nullptr};
    multiply_all(thread, threads, stage + 1, &down, 1, count_);
    for_rows(thread, threads, [&](int64_t row) { add_to(b.x.get() + row * c, o_.get() + row * c, c); });
  }

  // Every thread takes groups of inputs and sums their columns for itself; the sums are added where they are needed.
  void sparse_value(RowBuffers& b, const Matrix& value, int64_t stage, int thread, int threads) {
    const int64_t c = channels(), groups = value.cols / GROUP;
    float* mine = partial_.get() + thread * c;
    std::memset(mine, 0, sizeof(float) * static_cast<size_t>(c));
    const FixedRow x = FixedLayout(value.cols).at(b.wide_fixed.get());
    int64_t zero = 0;
    // Within a share the next group's memory is fetched ahead, so shares are as large as an even division allows.
    const int64_t share = std::max<int64_t>(4, groups / (4 * threads));
    for_shares(stage, (groups + share - 1) / share, [&](int64_t i) {
      multiply_sparse(value, x, i * share, std::min(groups, (i + 1) * share), mine, &zero);
    });
    skipped.fetch_add(zero, std::memory_order_relaxed);
    if (thread == 0) value_inputs.fetch_add(value.cols, std::memory_order_relaxed);
    barrier_.meet(threads);
    float* sum = b.previous.get();
    std::memcpy(sum, partial_.get(), sizeof(float) * static_cast<size_t>(c));
    for (int t = 1; t < threads; ++t) add_to(sum, partial_.get() + t * c, c);
    if (value.scale != nullptr)
      for (int64_t i = 0; i < hidden; ++i) sum[i] *= value.scale[i];
    add_to(b.x.get(), sum, c);
  }

  void write_logits(const Call& call, RowBuffers& b, int thread, int threads) {
    const int64_t c = channels(), count = static_cast<int64_t>(wanted_.size());
    if (count == 0) return;
    // Where the first of these rows stands among all logits asked for.
    int64_t before = call.all_logits ? first_ : 0;
    if (!call.all_logits)
      for (int64_t s = 0; s < pieces_.front().sequence; ++s) before += call.offsets[s + 1] > call.offsets[s];
    const bool alone = count_ == 1;
    for (int64_t i = 0; i < count; ++i) {
      if (!alone && i % threads != thread) continue;
      float* z = alone ? b.z.get() : head_in_.get() + i * c;
      layer_norm(b.x.get() + wanted_[static_cast<size_t>(i)] * c, ln_out_weight, ln_out_bias, hidden, c, eps, z);
      to_fixed(head, z, b.wide_fixed.get(), i);
    }
    if (!alone) barrier_.meet(threads);
    const float* z = alone ? b.z.get() : head_in_.get();
    const Job job{&head, operand(head, z, c, b.wide_fixed.get()), call.logits + before * head.rows, head.rows, nullptr};
    multiply_all(thread, threads, 6 * layers, &job, 1, count);
  }

  void run_block(const Call& call, int thread, int threads) {
    RowBuffers& b = count_ == 1 ? rows_[static_cast<size_t>(thread)] : rows_[0];
    for_rows(thread, threads, [&](int64_t row) {
      float* x = b.x.get() + row * channels();
      embedding_row(embedding_format, embedding, embedding_scale, call.tokens[first_ + row], hidden, x);
      layer_norm(x, ln0_weight, ln0_bias, hidden, channels(), eps, x);
    });
    for (int64_t i = 0; i < layers; ++i) {
      time_mix(call, b, i, thread, threads);
      channel_mix(call, b, i, thread, threads);
    }
    write_logits(call, b, thread, threads);
  }
};

Matrix matrix_at(const int64_t* p) {
  return {static_cast<Format>(p[0]), p[1], p[2], reinterpret_cast<const void*>(p[3]),
          reinterpret_cast<const float*>(p[4])};
}

const float* floats(int64_t address) { return reinterpret_cast<const float*>(address); }

}  // namespace
}  // namespace wkv

// A model from tables of numbers and addresses; large matrices stay where they are, the others are copied.
//   sizes: layers, C, heads, head size, ffn, vocabulary, embedding format, embedding, embedding scale,
//          ln0 weight, ln0 bias, ln_out weight, ln_out bias, then the head matrix (format, rows, columns, data, scale)
//   tables: per layer the matrices (5 numbers each; those in columns as [K][N]), then the vectors (addresses)
// Returns its address, or 0 if memory runs out.
WKV_API int64_t wkv_rwkv7_create(const int64_t* sizes, const int64_t* tables, float eps, float head_eps) {
  using namespace wkv;
  try {
    auto model = std::make_unique<Rwkv7>();
    model->layers = sizes[0];
    model->hidden = sizes[1];
    model->heads = sizes[2];
    model->head_size = sizes[3];
    model->ffn = sizes[4];
    model->vocabulary = sizes[5];
    model->embedding_format = sizes[6];
    model->embedding = reinterpret_cast<const void*>(sizes[7]);
    model->embedding_scale = floats(sizes[8]);
    model->eps = eps;
    model->head_eps = head_eps;
    const float** norms[] = {&model->ln0_weight, &model->ln0_bias, &model->ln_out_weight, &model->ln_out_bias};
    for (int i = 0; i < 4; ++i) *norms[i] = model->keep(floats(sizes[9 + i]), model->hidden);
    model->head = matrix_at(sizes + 13);
    model->layer.resize(static_cast<size_t>(model->layers));
    for (Layer& layer : model->layer) {
      for (int i = 0; i < MATRICES; ++i, tables += 5) {
        const Matrix matrix = matrix_at(tables);
        layer.matrix[i] = is_columns(matrix.format) ? model->keep_blocked(matrix) : matrix;
      }
      for (int i = 0; i < VECTORS; ++i, ++tables)
        layer.vector[i] = model->keep(floats(*tables), i < W0 ? model->hidden : model->width());
    }
    return reinterpret_cast<int64_t>(model.release());
  } catch (const std::bad_alloc&) {
    return 0;
  }
}

WKV_API void wkv_rwkv7_free(int64_t model) { delete reinterpret_cast<wkv::Rwkv7*>(model); }

// Reads the tokens of all sequences (sequence s: offsets[s] .. offsets[s + 1] - 1; none is allowed) and brings the
// states up to date in place. Logits [rows][head rows]: of every token, or of the last token of every sequence that
// has one; null for none. One call at a time per model. Returns 0, or -1 if memory runs out (states are then lost).
WKV_API int64_t wkv_rwkv7_forward(int64_t model, const int64_t* tokens, const int64_t* offsets, int64_t sequences,
                                  float* const* att_shift, float* const* wkv, float* const* ffn_shift, float* logits,
                                  int64_t all_logits, int64_t threads) {
  try {
    reinterpret_cast<wkv::Rwkv7*>(model)->forward(
        {tokens, offsets, sequences, att_shift, wkv, ffn_shift, logits, all_logits != 0}, static_cast<int>(threads));
    return 0;
  } catch (const std::bad_alloc&) {
    return -1;
  }
}

// How many inputs of the channel mix's value matrices were zero and not read, of how many, in single-token calls.
WKV_API void wkv_rwkv7_sparsity(int64_t model, int64_t* skipped, int64_t* of) {
  const auto* m = reinterpret_cast<const wkv::Rwkv7*>(model);
  *skipped = m->skipped.load();
  *of = m->value_inputs.load();
}
