// Grouped matrix products on a CPU. A task is (expert, block of columns): its part of the weight is packed once and stays in the cache while the
// expert's rows pass over it.
#include "op.h"

#include <type_traits>

#include "../include/blocks.h"

namespace NEOX_ISA {
namespace {

template <class S>
void matmul(const GroupedMatmul& op) {
  using P = typename ProductFor<S>::type;
  using Sum = typename P::Sum;
  const S* x = static_cast<const S*>(op.x);
  const S* weight = static_cast<const S*>(op.weight);
  S* y = static_cast<S*>(op.y);
  // A row of [out, in] is read in one go, whatever the block. Of [in, out] a block has a piece of every row: wide blocks then, packed a part of K at a time.
  const int64_t widest = op.transposed ? op.K : std::min(op.K, PANEL_BYTES / int64_t(MAX_COLUMNS * sizeof(typename P::Right)));
  const int64_t block = column_block(round_up(widest, P::K_ALIGN) * sizeof(typename P::Right), op.N, P::NR, op.threads, op.E);
  const int64_t depth = op.transposed ? op.K : std::min(op.K, PANEL_BYTES / int64_t(block * sizeof(typename P::Right)) / P::K_ALIGN * P::K_ALIGN);
  const int64_t together = depth < op.K ? SUM_ROWS : ROW_BLOCK;  // rows for which a part of the weight is packed
  const std::vector<Task> tasks = column_tasks(op.rows, op.E, op.N, block, false);
  const std::vector<int64_t> starts = starts_of(op.rows, op.E);
  Rows<P> left;
  left.prepare(x, op.R, op.K, nullptr, op.N);
  const int64_t copies = left.copied ? op.R : 0, width = round_up(block, P::NR);
  const bool far = op.R * op.N * int64_t(sizeof(S)) > STREAM_BYTES;

#pragma omp parallel num_threads(op.threads) if (op.threads > 1)
  {
#pragma omp for schedule(static)
    for (int64_t r = 0; r < copies; r++) left.fill(x, op.K, nullptr, 1, r);

    auto* panel = scratch<typename P::Right, 0>(P::right_size(depth, block));
    auto* sums = scratch<Sum, 1>(together * width);
#pragma omp for schedule(dynamic, 1)
    for (int64_t t = 0; t < int64_t(tasks.size()); t++) {
      const auto [e, begin, end] = tasks[t];
      const S* w = weight + e * op.K * op.N;
      if (op.transposed) {
        P::pack_transposed(panel, w + begin * op.K, op.K, op.K, end - begin);
      } else if (depth == op.K) {
        P::pack(panel, w + begin, op.N, op.K, end - begin);
      }
      for (int64_t r = starts[e]; r < starts[e + 1]; r += together) {
        const int64_t m = std::min(together, starts[e + 1] - r);
        if (op.K == 0) clear(sums, m * width);
        if (depth == op.K) P::product(left.at + r * left.ld, left.ld, m, panel, op.K, end - begin, sums, width, true);
        else product_in_parts<P>(left.at + r * left.ld, left.ld, m, w + begin, op.N, op.K, end - begin, panel, depth, sums, width, true);
        put_rows(y + r * op.N + begin, op.N, sums, width, m, end - begin, far);
      }
      if (far) streamed();
    }
  }
}

// out[e] = x_e^T y_e. y is packed once for all tasks; a task packs its columns of x, turned.
template <class S>
void outer(const GroupedOuter& op) {
  using P = typename ProductFor<S>::type;
  using Sum = typename P::Sum;
  const S* x = static_cast<const S*>(op.x);
  const S* y = static_cast<const S*>(op.y);
  S* out = static_cast<S*>(op.out);
  const std::vector<int64_t> starts = starts_of(op.rows, op.E);
  std::vector<int64_t> panels(op.E + 1, 0);
  for (int64_t e = 0; e < op.E; e++) panels[e + 1] = panels[e] + P::right_size(op.rows[e], op.N);
  const int64_t block = ROW_BLOCK, width = round_up(op.N, P::NR);
  const std::vector<Task> tasks = column_tasks(op.rows, op.E, op.M, block, true);
  const std::vector<Task> packs = column_tasks(op.rows, op.E, op.N, P::NR, false);
  const auto packed = allocate<typename P::Right>(panels[op.E]);
  const bool far = op.E * op.M * op.N * int64_t(sizeof(S)) > STREAM_BYTES;
  const bool direct = std::is_same<S, Sum>::value && op.N % P::NR == 0 && op.N > SUM_COLUMNS;

#pragma omp parallel num_threads(op.threads) if (op.threads > 1)
  {
#pragma omp for schedule(dynamic, 4)
    for (int64_t t = 0; t < int64_t(packs.size()); t++) {
      const auto [e, begin, end] = packs[t];
      auto* to = packed.get() + panels[e] + P::right_size(op.rows[e], P::NR) * (begin / P::NR);
      P::pack(to, y + starts[e] * op.N + begin, op.N, op.rows[e], end - begin);
    }

    auto* turned = scratch<typename P::Left, 2>(P::turned_size(TURNED_DEPTH, block));
    auto* sums = scratch<Sum, 3>(block * width);
#pragma omp for schedule(dynamic, 1)
    for (int64_t t = 0; t < int64_t(tasks.size()); t++) {
      const auto [e, begin, end] = tasks[t];
      S* to = out + (e * op.M + begin) * op.N;
      if (!op.rows[e]) {
        clear(to, (end - begin) * op.N);
        continue;
      }
      Sum* into = direct ? reinterpret_cast<Sum*>(to) : sums;  // N is the width then
      for (int64_t r = 0; r < op.rows[e]; r += TURNED_DEPTH) {
        const int64_t depth = std::min(TURNED_DEPTH, op.rows[e] - r);
        P::pack_turned(turned, x + (starts[e] + r) * op.M + begin, op.M, depth, end - begin);
        P::turned(turned, end - begin, packed.get() + panels[e], op.rows[e], r, depth, op.N, into, width, r == 0);
      }
      if (direct) continue;
      put_rows(to, op.N, sums, width, end - begin, op.N, far);
      if (far) streamed();
    }
  }
}

}  // namespace

void grouped_matmul(const GroupedMatmul& op) {
  for_each_dtype(op.dtype, [&](auto of) { matmul<typename decltype(of)::type>(op); });
}

void grouped_outer(const GroupedOuter& op) {
  for_each_dtype(op.dtype, [&](auto of) { outer<typename decltype(of)::type>(op); });
}

}  // namespace NEOX_ISA
