// An expert layer for a few rows, in one parallel region. Every matrix is read once for all rows that use its expert.
//
// The hidden numbers of every chosen expert are shared out among the threads. A thread computes its hidden numbers and adds what they contribute to
// results of its own. At the end the threads' results are added up in order. So with a given number of threads the sums have one order, wherever the
// experts lie in memory, and whichever other rows and experts a call has.
#include <omp.h>

#include <type_traits>

#include "choose.h"
#include "op.h"

#include "../include/decode_input.h"
#include "../include/threads.h"

namespace NEOX_ISA {
namespace {

using few_rows::Part;
using few_rows::part_of;

constexpr int64_t BLOCK = 64;  // hidden numbers computed before they are multiplied on

template <class W>
inline Vec<float> natural(const W* from) {
  if constexpr (std::is_same_v<W, int8_t>) return few_rows::wide_bytes(from);
  else return load_wide(from);
}

// How many floats a row of `width` numbers takes, as a matrix of the format multiplies it.
int64_t width_for(int format, int64_t width) { return format == INT8 ? few_rows::row_width<int8_t>(width) : width; }

// Rows as they are, and arranged for bf16 and for int8.
struct Rows {
  float *plain, *paired, *whole;
  int64_t width;
  const float* of(int format, int64_t row) const {
    const float* first = format == INT8 ? whole : Dtype(format) == Dtype::bfloat16 ? paired : plain;
    return first + row * width_for(format, width);
  }
  static int64_t size(int64_t rows, int64_t width) { return rows * (2 * width + width_for(INT8, width)); }
  static Rows at(float* memory, int64_t rows, int64_t width) { return {memory, memory + rows * width, memory + 2 * rows * width, width}; }
  void arrange(int64_t row) const {
    const float* from = plain + row * width;
    few_rows::arrange<bf16>(paired + row * width, from, width);
    few_rows::arrange<int8_t>(whole + row * width_for(INT8, width), from, width);
  }
};

// An expert that somebody chose: where it lies, and its pairs (row, place) in `Layer::pairs`.
struct Active {
  int64_t slot, first, count;
};

// What all threads share in one call.
struct Layer {
  const DecodeExperts& op;
  const int64_t P;          // pairs of rows and experts
  const int64_t L;          // LoREs of a pair
  float *logits, *lore_logits, *lore_weight;  // [N, C], [P, M], [P, L]
  int64_t* lore;            // [P, L], of the pairs in the order of `active`
  Rows u[2];                // [P, rank or L*Q] of up and gate
  float *sums, *second;     // of each thread [P, middle], [P, D]
  Active* active;
  int64_t* pairs;           // [P]: number n * K + k of each pair, expert by expert
  int64_t count = 0;

  int64_t middle() const { return op.rank ? op.rank : op.D; }
  int64_t u_width() const { return op.rank ? op.rank : L * op.Q; }
};

int64_t slot_of(const DecodeExperts& op, int64_t pair) { return op.slot == nullptr ? op.expert[pair] : op.slot[pair]; }

// The chosen experts in the order in which the rows name them.
void find_active(Layer& layer) {
  const DecodeExperts& op = layer.op;
  int64_t next = 0;
  for (int64_t p = 0; p < layer.P; p++) {
    const int64_t slot = slot_of(op, p);
    bool known = false;
    for (int64_t a = 0; a < layer.count; a++) known = known || layer.active[a].slot == slot;
    if (known) continue;
    Active& found = layer.active[layer.count++] = {slot, next, 0};
    for (int64_t later = p; later < layer.P; later++)
      if (slot_of(op, later) == slot) layer.pairs[next++] = later, found.count++;
  }
}

void add_scaled(float* to, const float* from, float by, int64_t n) {
  for (int64_t i = 0; i < n; i++) to[i] += by * from[i];
}

// Product of rows [first, end) of a matrix with `right` rows of x; out[(row - first) * right + r].
void multiply(const DecodeMatrix& matrix, int64_t first, int64_t end, const float* x, int64_t right, int64_t width, float* out) {
  with_format(matrix.format, [&](auto* format) {
    using W = std::remove_const_t<std::remove_pointer_t<decltype(format)>>;
    few_rows::dots_of(row_of<W>(matrix, first, width), end - first, x, right, few_rows::row_width<W>(width), width, out, right);
  });
  if (matrix.scale != nullptr)
    for (int64_t o = first; o < end; o++)
      for (int64_t r = 0; r < right; r++) out[(o - first) * right + r] *= matrix.scale[o];
}

// y[r] += factor[f, r] * row f of the matrix, for rows [first, end).
void add(const DecodeMatrix& matrix, int64_t first, int64_t end, int64_t width, float* factor, float* y, int64_t right) {
  if (matrix.scale != nullptr)
    for (int64_t f = first; f < end; f++)
      for (int64_t r = 0; r < right; r++) factor[(f - first) * right + r] *= matrix.scale[f];
  with_format(matrix.format, [&](auto* format) {
    using W = std::remove_const_t<std::remove_pointer_t<decltype(format)>>;
    few_rows::add_rows_of(row_of<W>(matrix, first, width), end - first, width, factor, right, y, right, width);
  });
}

class Worker {
 public:
  Worker(Layer& layer) : s(layer), op(layer.op), thread(omp_get_thread_num()), threads(omp_get_num_threads()) {
    const int64_t widest = op.D > 2 ? op.D : 2;  // int8 takes two floats for a row of one number
    float* memory = scratch<float, 72>(Rows::size(op.N, op.D) + widest * op.N + 4 * BLOCK * op.N + 2 * op.D + op.choice.C + op.M);
    x = Rows::at(memory, op.N, op.D);
    gathered = memory + Rows::size(op.N, op.D);
    hidden[0] = gathered + widest * op.N, hidden[1] = hidden[0] + BLOCK * op.N, products = hidden[1] + BLOCK * op.N, factor = products + BLOCK * op.N;
    row = factor + BLOCK * op.N;
    plain_row = row + op.D, scores = plain_row + op.D;
  }

  void prepare() {
    for (int64_t n = 0; n < op.N; n++) {
      prepare_row(op.input, op.x + n * op.D, op.D, x.plain + n * op.D);
      x.arrange(n);
    }
  }

  // This thread's part of the router's logits.
  void route() {
    const Part part = part_of(op.choice.C, 4, thread, threads);
    for (int64_t c = part.first; c < part.end; c++) {
      multiply(op.router, c, c + 1, x.of(op.router.format, 0), op.N, op.D, products);
      for (int64_t n = 0; n < op.N; n++) s.logits[n * op.choice.C + c] = products[n];
    }
  }

  void choose() {
    for (int64_t n = 0; n < op.N; n++) {
      std::memcpy(scores, s.logits + n * op.choice.C, op.choice.C * sizeof(float));
      choose_row(op.choice, scores, op.expert + n * op.choice.K, op.weight + n * op.choice.K);
    }
  }

  // This thread's part of `rows` numbers of each pair: the product of the row of x with `rows` rows of a matrix, from the row that `first` says.
  template <class First, class Take>
  void project(const DecodeMatrix& matrix, int64_t rows, First first, Take take) {
    const Part part = part_of(s.P * rows, 1, thread, threads);
    for (int64_t unit = part.first; unit < part.end;) {
      const int64_t p = unit / rows, from = unit % rows;
      const int64_t most = part.end - unit < BLOCK ? part.end - unit : BLOCK;
      const int64_t n = s.pairs[p] / op.choice.K, start = first(p, from);
      const int64_t end = last_of(p, from, rows < from + most ? rows : from + most, start, first);
      multiply(matrix, start, start + end - from, x.of(matrix.format, n), 1, op.D, products);
      for (int64_t i = from; i < end; i++) take(p, i, products[i - from]);
      unit += end - from;
    }
  }

  void lore_logits() {
    project(op.lore_router, op.M, [&](int64_t p, int64_t m) { return slot_of(op, s.pairs[p]) * op.M + m; },
            [&](int64_t p, int64_t m, float sum) { s.lore_logits[p * op.M + m] = sum; });
  }

  void choose_lores() {
    for (int64_t p = thread; p < s.P; p += threads) {
      if (op.lore_router.weight == nullptr) {
        s.lore[p] = 0, s.lore_weight[p] = 1;
        continue;
      }
      std::memcpy(scores, s.lore_logits + p * op.M, op.M * sizeof(float));
      choose_row(op.lore_choice, scores, s.lore + p * s.L, s.lore_weight + p * s.L);
      if (op.lore != nullptr) std::memcpy(op.lore + s.pairs[p] * s.L, s.lore + p * s.L, s.L * sizeof(int64_t));
    }
  }

  // u = pi * (x A) of the chosen LoREs, or x times the left factor.
  void thin() {
    const DecodeProjection* projections[2] = {&op.up, &op.gate};
    for (int side = 0; side < 2; side++) {
      const DecodeProjection& projection = *projections[side];
      float* u = s.u[side].plain;
      const int64_t width = s.u_width();
      if (projection.left.weight != nullptr)
        project(projection.left, op.rank, [&](int64_t p, int64_t q) { return slot_of(op, s.pairs[p]) * op.rank + q; },
                [&](int64_t p, int64_t q, float sum) { u[p * width + q] = sum; });
      if (projection.a.weight != nullptr)
        project(projection.a, width, [&](int64_t p, int64_t q) { return (slot_of(op, s.pairs[p]) * op.M + s.lore[p * s.L + q / op.Q]) * op.Q + q % op.Q; },
                [&](int64_t p, int64_t q, float sum) { u[p * width + q] = s.lore_weight[p * s.L + q / op.Q] * sum; });
    }
  }

  // The hidden numbers of this thread, and what they add to the results.
  void multiply_on() {
    float* own = s.sums + thread * s.P * s.middle();
    std::memset(own, 0, s.P * s.middle() * sizeof(float));
    const Part part = part_of(op.F, 8, thread, threads);  // of every expert: a sum has one order, whichever other experts are chosen
    const int64_t from = part.first, to = part.end;
    for (int64_t a = 0; a < s.count; a++) {
      const Active& expert = s.active[a];
      for (int side = 0; side < 2; side++) inputs[side] = rows_of(expert, side);
      for (int64_t f = from; f < to; f += BLOCK) {
        const int64_t here = to - f < BLOCK ? to - f : BLOCK;
        hidden_block(expert, f, here);
        add(op.down.matrix, expert.slot * op.F + f, expert.slot * op.F + f + here, s.middle(), factor, own + expert.first * s.middle(), expert.count);
      }
    }
  }

  // Decomposed experts: the sums so far times the right factor of the down-projection.
  void last_factor() {
    float* own = s.second + thread * s.P * op.D;
    std::memset(own, 0, s.P * op.D * sizeof(float));
    const Part part = part_of(op.rank, 4, thread, threads);
    const int64_t own_rows = part.end - part.first;
    for (int64_t unit = 0; unit < s.count * own_rows; unit++) {
      const Active& expert = s.active[unit / own_rows];
      const int64_t q = part.first + unit % own_rows, place = place_in(op.down.matrix, q, op.rank);
      for (int64_t r = 0; r < expert.count; r++) {
        factor[r] = 0;
        for (int64_t t = 0; t < threads; t++) factor[r] += s.sums[(t * s.P + expert.first + r) * op.rank + place];
      }
      add(op.down.left, expert.slot * op.rank + q, expert.slot * op.rank + q + 1, op.D, factor, own + expert.first * op.D, expert.count);
    }
  }

  // y = residual + the weighted results, for this thread's part of the width.
  void finish() {
    const DecodeMatrix& last = op.rank ? op.down.left : op.down.matrix;
    const float* sums = op.rank ? s.second : s.sums;
    const Part part = part_of(op.D, few_rows::STEP, thread, threads);
    const int64_t width = part.end - part.first;
    for (int64_t n = 0; n < op.N; n++) {
      std::memset(row, 0, width * sizeof(float));
      for (int64_t k = 0; k < op.choice.K; k++) {
        const int64_t pair = n * op.choice.K + k, p = place_of(pair);
        for (int64_t t = 0; t < threads; t++) add_scaled(row, sums + (t * s.P + p) * op.D + part.first, op.weight[pair], width);
      }
      float* y = op.y + n * op.D + part.first;
      with_format(last.format, [&](auto* format) {
        few_rows::restore<std::remove_const_t<std::remove_pointer_t<decltype(format)>>>(plain_row, row, width);
      });
      for (int64_t k = 0; k < op.choice.K && op.down.bias != nullptr; k++) {
        const int64_t pair = n * op.choice.K + k;
        add_scaled(plain_row, op.down.bias + slot_of(op, pair) * op.D + part.first, op.weight[pair], width);
      }
      if (op.residual == nullptr) std::memcpy(y, plain_row, width * sizeof(float));
      else for (int64_t d = 0; d < width; d++) y[d] = op.residual[n * op.D + part.first + d] + plain_row[d];
    }
  }

 private:
  Layer& s;
  const DecodeExperts& op;
  const int64_t thread, threads;
  Rows x;
  const float* inputs[2];
  float *gathered, *hidden[2], *products, *factor, *row, *plain_row, *scores;

  static int64_t place_in(const DecodeMatrix& matrix, int64_t k, int64_t n) {
    return Dtype(matrix.format) == Dtype::bfloat16 ? few_rows::place<bf16>(k, n) : k;
  }

  // Where the run of neighbouring rows of the matrix that starts at `from` ends.
  template <class First>
  int64_t last_of(int64_t p, int64_t from, int64_t end, int64_t start, First first) const {
    int64_t last = from + 1;
    while (last < end && first(p, last) == start + last - from) last++;
    return last;
  }

  int64_t place_of(int64_t pair) const {
    for (int64_t p = 0; p < s.P; p++)
      if (s.pairs[p] == pair) return p;
    return 0;
  }

  // The rows that an expert's projection multiplies: its rows of x, or of u where the projection is decomposed.
  const float* rows_of(const Active& expert, int side) {
    const DecodeProjection& projection = side ? op.gate : op.up;
    if (projection.matrix.weight == nullptr) return nullptr;
    const int format = projection.matrix.format;
    if (op.rank) return s.u[side].of(format, expert.first);
    if (expert.count == op.N && op.choice.K == 1) return x.of(format, 0);
    if (side == 1 && op.up.matrix.format == format) return inputs[0];
    const int64_t width = width_for(format, op.D);
    for (int64_t r = 0; r < expert.count; r++)
      std::memcpy(gathered + r * width, x.of(format, s.pairs[expert.first + r] / op.choice.K), width * sizeof(float));
    return gathered;
  }

  // factor[f, r] = the hidden numbers [f, f + here) of an expert's rows.
  void hidden_block(const Active& expert, int64_t f, int64_t here) {
    const int64_t R = expert.count;
    const bool gated = op.gate.matrix.weight != nullptr;
    for (int side = 0; side < (gated ? 2 : 1); side++) projected(expert, side, f, here, hidden[side]);
    for (int64_t r = 0; r < R; r++) {
      float* to = hidden[0] + r * BLOCK;
      activate_row(op.activation, gated ? hidden[1] + r * BLOCK : to, gated ? to : nullptr, here, to);
      for (int64_t i = 0; i < here; i++) factor[i * R + r] = to[i];
    }
  }

  void projected(const Active& expert, int side, int64_t f, int64_t here, float* to) {
    const DecodeProjection& projection = side ? op.gate : op.up;
    const int64_t R = expert.count, start = expert.slot * op.F + f;
    multiply(projection.matrix, start, start + here, inputs[side], R, op.rank ? op.rank : op.D, products);
    for (int64_t r = 0; r < R; r++) {
      float* hidden_row = to + r * BLOCK;
      for (int64_t i = 0; i < here; i++) hidden_row[i] = products[i * R + r] + (projection.bias == nullptr ? 0 : projection.bias[start + i]);
      if (projection.b.weight != nullptr) add_lores(projection, side, expert.first + r, expert.slot, f, here, hidden_row);
    }
  }

  void add_lores(const DecodeProjection& projection, int side, int64_t p, int64_t slot, int64_t f, int64_t here, float* to) {
    const float* u = s.u[side].plain + p * s.u_width();
    with_format(projection.b.format, [&](auto* format) {
      using W = std::remove_const_t<std::remove_pointer_t<decltype(format)>>;
      for (int64_t q = 0; q < s.u_width(); q++) {
        const int64_t number = (slot * op.M + s.lore[p * s.L + q / op.Q]) * op.Q + q % op.Q;
        const W* b = row_of<W>(projection.b, number, op.F) + f;
        const float by = projection.b.scale == nullptr ? u[q] : u[q] * projection.b.scale[number];
        int64_t i = 0;
        for (; i + LANES<float> <= here; i += LANES<float>) store(to + i, load(to + i) + by * natural(b + i));
        for (; i < here; i++) to[i] += by * few_rows::wide_one(b[i]);
      }
    });
  }
};

void arrange_thin(Layer& layer) {
  for (int side = 0; side < 2; side++)
    for (int64_t p = 0; p < layer.P && layer.op.rank; p++) layer.u[side].arrange(p);
}

// The phases of a call. After each of them the threads wait for each other.
void work(Layer& layer) {
  const DecodeExperts& op = layer.op;
  Worker worker(layer);
  worker.prepare();
  if (op.choose) {
    worker.route();
#pragma omp barrier
#pragma omp single
    worker.choose();
  }
  if (!op.compute) return;
#pragma omp single
  find_active(layer);
  if (op.lore_router.weight != nullptr) {
    worker.lore_logits();
#pragma omp barrier
  }
  if (op.M) {
    worker.choose_lores();
#pragma omp barrier
  }
  if (op.M || op.rank) {
    worker.thin();
#pragma omp barrier
#pragma omp single
    arrange_thin(layer);
  }
  worker.multiply_on();
#pragma omp barrier
  if (op.rank) {
    worker.last_factor();
#pragma omp barrier
  }
  worker.finish();
}

}  // namespace

void decode_experts(const DecodeExperts& op) {
  const int64_t P = op.N * op.choice.K, L = op.M ? (op.lore_router.weight == nullptr ? 1 : op.lore_choice.K) : 0;
  const int64_t thin = op.rank ? op.rank : L * op.Q, middle = op.rank ? op.rank : op.D;
  float* memory = scratch<float, 71>(op.N * op.choice.C + P * op.M + P * L + 2 * Rows::size(P, thin) + op.threads * P * (middle + op.D));
  Layer layer{op, P, L, memory, nullptr, nullptr, nullptr, {}, nullptr, nullptr, nullptr, nullptr};
  layer.lore_logits = layer.logits + op.N * op.choice.C;
  layer.lore_weight = layer.lore_logits + P * op.M;
  float* next = layer.lore_weight + P * L;
  for (int side = 0; side < 2; side++) layer.u[side] = Rows::at(next, P, thin), next += Rows::size(P, thin);
  layer.sums = next, layer.second = next + op.threads * P * middle;
  layer.pairs = scratch<int64_t, 73>(P + P * L), layer.lore = layer.pairs + P;
  layer.active = scratch<Active, 74>(P);
#pragma omp parallel num_threads(op.threads) if (op.threads > 1)
  work(layer);
}

}  // namespace NEOX_ISA
