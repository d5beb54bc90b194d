// The loss of a language model straight from its hidden states on a CPU, with the gradients of hidden states and weight.
//
// A chunk of tokens at a time. The vocabulary is cut into blocks. Two phases go through the blocks, and a task is one of them:
//   1. logits of the chunk; while they are in the cache, e^(logit - the block's maximum in the row) takes their place, the only numbers that are kept
//   2. the exponentials become the error, (softmax - one_hot(label)) * scale: each needs one factor of its row and block. dW += error^T hidden.
// dhidden = error W follows for some blocks at a time, with their part of W packed once. No result depends on the number of threads.
#include "op.h"

#include <limits>
#include <type_traits>

#include "../include/blocks.h"
#include "../include/exponential.h"

namespace NEOX_ISA {
namespace {

constexpr int64_t LARGEST_BLOCK = 2 * ROW_BLOCK;  // of the vocabulary
constexpr int64_t SMALLEST_SHARE = 16;            // blocks that even a small vocabulary has
constexpr int64_t PACKED_BYTES = 16 << 20;        // of W for dhidden

template <class S>
class Loss {
  using P = typename ProductFor<S>::type;
  using Sum = typename P::Sum;
  using Left = typename P::Left;
  using Right = typename P::Right;

 public:
  explicit Loss(const LinearCrossEntropy& given) : op(given) {}

  void run() {
    if (op.T == 0) return no_tokens();
    prepare();
#pragma omp parallel num_threads(op.threads) if (op.threads > 1)
    {
#pragma omp for schedule(static)
      for (int64_t r = 0; r < (hidden.copied ? op.T : 0); r++) hidden.fill(static_cast<const S*>(op.hidden), op.D, nullptr, 1, r);
      for (int64_t first = 0; first < op.T; first += op.rows) chunk(first, std::min(op.rows, op.T - first));
    }
  }

 private:
  const LinearCrossEntropy& op;
  Rows<P> hidden;
  int64_t block = 0, blocks = 0, wide = 0;  // columns of a block; blocks; D as products write it
  int64_t together = 0;                     // blocks whose part of W is packed at a time
  int64_t columns = 0;                      // of a task of dhidden
  Buffer<Left> error;                       // [blocks][rows][block]: exponentials, then the error
  Buffer<Sum> most, total, own;             // [blocks][rows]: maximum, later what makes exponentials the error, and their sum; [rows]: the label's logit
  Buffer<Right> packed_hidden, packed_weight;
  Buffer<Sum> grad_hidden, grad_weight;     // sums: of a chunk [rows, wide], and of all chunks [V, wide] where they cannot stand in the result

  bool with_gradients() const { return op.grad_hidden != nullptr || op.grad_weight != nullptr; }
  bool direct() const { return std::is_same<S, Sum>::value && op.D % P::NR == 0; }

  void no_tokens() {
    if (op.grad_weight != nullptr) clear(static_cast<S*>(op.grad_weight), op.V * op.D);
  }

  void prepare() {
    hidden.prepare(static_cast<const S*>(op.hidden), op.T, op.D, nullptr, op.V);
    block = std::min(LARGEST_BLOCK, round_up((op.V + SMALLEST_SHARE - 1) / SMALLEST_SHARE, P::NR));
    blocks = (op.V + block - 1) / block;
    wide = round_up(op.D, P::NR);
    own = allocate<Sum>(op.rows);
    most = allocate<Sum>(blocks * op.rows), total = allocate<Sum>(blocks * op.rows);
    if (!with_gradients()) return;
    error = allocate<Left>(blocks * op.rows * block);
    together = blocks;
    if (op.grad_weight != nullptr) {
      packed_hidden = allocate<Right>(P::right_size(op.rows, op.D));
      if (!direct() && op.rows < op.T) grad_weight = allocate<Sum>(op.V * wide);
    }
    if (op.grad_hidden == nullptr) return;
    const int64_t part = P::right_size(block, op.D);
    together = std::min(blocks, std::max<int64_t>(4 * op.threads, PACKED_BYTES / int64_t(part * sizeof(Right))));
    packed_weight = allocate<Right>(together * part);
    grad_hidden = allocate<Sum>(op.rows * wide);
    columns = wide;
    while (columns > P::NR && (op.rows + ROW_BLOCK - 1) / ROW_BLOCK * ((wide + columns - 1) / columns) < 8 * op.threads) columns = round_up(columns / 2, P::NR);
  }

  int64_t width_of(int64_t b) const { return std::min(block, op.V - b * block); }
  Left* error_of(int64_t b) { return error.get() + b * op.rows * block; }

  // By all threads.
  void chunk(int64_t first, int64_t m) {
#pragma omp for schedule(dynamic, 1)
    for (int64_t b = 0; b < blocks; b++) exponentials(b, first, m);
#pragma omp for schedule(static)
    for (int64_t r = 0; r < m; r++) finish(r, first);
    if (!with_gradients()) return;
#pragma omp for schedule(static)
    for (int64_t j = 0; j < (op.grad_weight == nullptr ? 0 : wide); j += P::NR)
      P::pack(packed_hidden.get() + P::right_size(m, P::NR) * (j / P::NR), hidden.at + first * hidden.ld + j, hidden.ld, m, std::min(P::NR, op.D - j));
    const int64_t row_blocks = (m + ROW_BLOCK - 1) / ROW_BLOCK, pieces = op.grad_hidden == nullptr ? 0 : (wide + columns - 1) / columns;
    for (int64_t begin = 0; begin < blocks; begin += together) {
      const int64_t end = std::min(blocks, begin + together);
#pragma omp for schedule(dynamic, 1)
      for (int64_t b = begin; b < end; b++) {
        to_error(b, first, m);
        if (op.grad_weight != nullptr) weight_gradient(b, first, m);
        if (op.grad_hidden != nullptr)
          P::pack(packed_weight.get() + (b - begin) * P::right_size(block, op.D), static_cast<const S*>(op.weight) + b * block * op.D, op.D, width_of(b), op.D);
      }
#pragma omp for schedule(dynamic, 1)
      for (int64_t t = 0; t < row_blocks * pieces; t++) hidden_gradient(t / pieces * ROW_BLOCK, t % pieces * columns, begin, end, first, m);
    }
  }

  // e^(logit - maximum) of a block.
  void exponentials(int64_t b, int64_t first, int64_t m) {
    const int64_t n = width_of(b), width = round_up(n, P::NR), deepest = std::min(DEPTH, op.D);
    const S* weight = static_cast<const S*>(op.weight) + b * block * op.D;
    const bool at_once = op.D <= DEPTH;
    Right* panel = scratch<Right, 40>(P::right_size(deepest, block));
    Sum* sums = scratch<Sum, 41>((at_once ? ROW_BLOCK : m) * block);
    for (int64_t k = 0; k < op.D; k += DEPTH) {
      const int64_t depth = std::min(DEPTH, op.D - k);
      P::pack_transposed(panel, weight + k, op.D, depth, n);
      for (int64_t i = 0; i < m; i += ROW_BLOCK) {
        const int64_t rows = std::min(ROW_BLOCK, m - i);
        Sum* logits = sums + (at_once ? 0 : i * width);
        P::product(hidden.at + (first + i) * hidden.ld + k, hidden.ld, rows, panel, depth, n, logits, width, k == 0);
        if (k + depth == op.D)
          for (int64_t r = 0; r < rows; r++) row_exponentials(b, first, i + r, logits + r * width);
      }
    }
  }

  void row_exponentials(int64_t b, int64_t first, int64_t r, Sum* logits) {
    const int64_t n = width_of(b), width = round_up(n, P::NR), label = op.labels[first + r] - b * block;
    if (0 <= label && label < n) own[r] = logits[label];
    const Sum least = -std::numeric_limits<Sum>::infinity();
    for (int64_t j = n; j < width; j++) logits[j] = least;
    Vec<Sum> largest = all(least);
    for (int64_t j = 0; j < width; j += LANES<Sum>) {
      const Vec<Sum> x = load(logits + j);
      largest = x > largest ? x : largest;
    }
    const Sum maximum = largest_of(largest), base = maximum == least ? Sum(0) : maximum;
    Vec<Sum> sum = {};
    Left* to = with_gradients() ? error_of(b) + r * block : nullptr;
    for (int64_t j = 0; j < width; j += LANES<Sum>) {
      const Vec<Sum> e = exponential(load(logits + j) - base);
      sum += e;
      if (to != nullptr) store_narrow(to + j, e);
    }
    most[b * op.rows + r] = maximum;
    total[b * op.rows + r] = sum_of(sum);
  }

  // The loss of a row, and the factors of its exponentials.
  void finish(int64_t r, int64_t first) {
    Sum maximum = most[r], sum = 0;
    for (int64_t b = 1; b < blocks; b++) maximum = std::max(maximum, most[b * op.rows + r]);
    for (int64_t b = 0; b < blocks; b++) {
      Sum& factor = most[b * op.rows + r];
      factor = std::exp(factor - maximum);
      sum += factor * total[b * op.rows + r];
    }
    static_cast<Sum*>(op.loss)[first + r] = maximum - own[r] + std::log(sum);
    if (!with_gradients()) return;
    const Sum scale = static_cast<const Sum*>(op.scale)[first + r] / sum;
    for (int64_t b = 0; b < blocks; b++) most[b * op.rows + r] *= scale;
  }

  void to_error(int64_t b, int64_t first, int64_t m) {
    const int64_t n = width_of(b), width = round_up(n, P::NR);
    for (int64_t r = 0; r < m; r++) {
      Left* row = error_of(b) + r * block;
      const Sum by = most[b * op.rows + r];
      const int64_t label = op.labels[first + r] - b * block;
      const bool here = 0 <= label && label < n;
      const Sum at_label = here ? Sum(widen(row[label]) * by - static_cast<const Sum*>(op.scale)[first + r]) : Sum(0);
      for (int64_t j = 0; j < width; j += LANES<Sum>) store_narrow(row + j, load_wide(row + j) * by);
      if (here) row[label] = convert<Left>(at_label);
    }
  }

  // dW += error^T hidden, for a block of its rows.
  void weight_gradient(int64_t b, int64_t first, int64_t m) {
    Left* turned = scratch<Left, 42>(P::turned_size(TURNED_DEPTH, ROW_BLOCK));
    const bool last = first + m == op.T, buffered = grad_weight != nullptr;
    S* result = static_cast<S*>(op.grad_weight) + b * block * op.D;
    for (int64_t i = 0; i < width_of(b); i += ROW_BLOCK, result += ROW_BLOCK * op.D) {
      const int64_t rows = std::min(ROW_BLOCK, width_of(b) - i);
      Sum* sums = direct() ? reinterpret_cast<Sum*>(result) : buffered ? grad_weight.get() + (b * block + i) * wide : scratch<Sum, 43>(ROW_BLOCK * wide);
      for (int64_t k = 0; k < m; k += TURNED_DEPTH) {
        const int64_t depth = std::min(TURNED_DEPTH, m - k);
        P::pack_turned(turned, error_of(b) + k * block + i, block, depth, rows);
        P::turned(turned, rows, packed_hidden.get(), m, k, depth, op.D, sums, wide, first == 0 && k == 0);
      }
      if (!direct() && last) put_rows(result, op.D, sums, wide, rows, op.D, false);
    }
  }

  // dhidden += error W, for a block of rows and some columns, over blocks of the vocabulary.
  void hidden_gradient(int64_t row, int64_t column, int64_t begin, int64_t end, int64_t first, int64_t m) {
    const int64_t rows = std::min(ROW_BLOCK, m - row), n = std::min(columns, op.D - column);
    Sum* sums = grad_hidden.get() + row * wide + column;
    for (int64_t b = begin; b < end; b++) {
      const Right* weight = packed_weight.get() + (b - begin) * P::right_size(block, op.D) + P::right_size(width_of(b), P::NR) * (column / P::NR);
      P::product(error_of(b) + row * block, block, rows, weight, width_of(b), n, sums, wide, b == 0);
    }
    if (end == blocks) put_rows(static_cast<S*>(op.grad_hidden) + (first + row) * op.D + column, op.D, sums, wide, rows, n, false);
  }
};

}  // namespace

void linear_cross_entropy(const LinearCrossEntropy& op) {
  for_each_dtype(op.dtype, [&](auto of) { Loss<typename decltype(of)::type>(op).run(); });
}

}  // namespace NEOX_ISA
