// The hidden layer of the experts on a CPU, forward. The backward is in backward.h.
//
// A task is (expert, block of columns): the block's part of both projections is packed once. While the expert's rows pass over it, the sums start at the
// bias, the LoREs' products are added LoRE by LoRE, and activation and gate follow before the sums leave the cache. Where a LoRE has few rows, its B
// is read for little work, so it must be read in long runs, once: then the LoREs' products are computed before, for all columns, and the sums start there.
#include "backward.h"

namespace NEOX_ISA {
namespace {

template <class S>
class Forward {
  using P = typename ProductFor<S>::type;
  using Sum = typename P::Sum;
  using Left = typename P::Left;
  using Right = typename P::Right;

 public:
  explicit Forward(const LoreForward& given) : op(given), layer(given.layer), by(given.layer) {}

  void run() {
    prepare();
#pragma omp parallel num_threads(layer.threads) if (layer.threads > 1)
    {
      const S* x = static_cast<const S*>(op.x);
#pragma omp for schedule(static)
      for (int64_t r = 0; r < (rows.copied ? layer.R : 0); r++) rows.fill(x, layer.D, by.place, 1, r);
#pragma omp for schedule(static)
      for (int64_t n = 0; n < (lore_rows.copied ? by.choices : 0); n++) lore_rows.fill(x, layer.D, layer.order, layer.L, n);
      for (int p = 0; p < 2; p++) {
        if (layer.projections[p].a == nullptr) continue;
#pragma omp for schedule(dynamic, 1)
        for (int64_t t = 0; t < int64_t(lore_tasks.size()); t++) shrink(p, lore_tasks[t]);
#pragma omp for schedule(dynamic, 4)
        for (int64_t t = 0; t < int64_t(grow_tasks.size()); t++) grow(p, grow_tasks[t]);
      }
#pragma omp for schedule(dynamic, 1)
      for (int64_t t = 0; t < int64_t(tasks.size()); t++) expand(tasks[t]);
    }
  }

 private:
  const LoreForward& op;
  const LoreLayer& layer;
  const Arrangement by;
  Rows<P> rows, lore_rows;  // x by place, and by LoRE row
  Buffer<Left> z[2];        // pi x A by LoRE row
  bool beside = false;      // z B is computed beside the product with W
  Buffer<Sum> y[2];         // z B by place, where it is computed before
  int64_t rank[2] = {0, 0};
  std::vector<RowTask> tasks;
  std::vector<RowTask> lore_tasks, grow_tasks;
  int64_t block = 0, width = 0;
  bool far = false;     // results are written past the caches
  int64_t stretch = 0;  // columns of B that are read in one go: memory is read faster in long stretches

  static constexpr int64_t LONGEST_STRETCH = 16384 / sizeof(S);
  static constexpr int64_t BESIDE_ROWS = 16;  // of a LoRE, in the mean: for fewer, packing its B block by block costs more than y does

  void prepare() {
    const S* x = static_cast<const S*>(op.x);
    rows.prepare(x, layer.R, layer.D, by.place, layer.F);
    if (by.several) lore_rows.prepare(x, by.choices, layer.D, layer.order, 0);
    beside = by.has_lores && !by.several && layer.R >= BESIDE_ROWS * layer.G;
    int weights = 0;
    for (int p = 0; p < 2; p++) {
      weights += layer.projections[p].weight != nullptr;
      if (layer.projections[p].a == nullptr) continue;
      rank[p] = round_up(layer.projections[p].Q, P::K_ALIGN);
      z[p] = allocate<Left>(by.choices * rank[p]);
      if (!by.several && !beside) y[p] = allocate<Sum>(layer.R * padded());
    }
    const int64_t depth = std::max(layer.D * weights, std::max(rank[0], rank[1]));
    block = column_block(depth * sizeof(Right), layer.F, P::NR, layer.threads, layer.E);
    width = round_up(block, P::NR);
    far = layer.R * layer.F * int64_t(sizeof(S)) > STREAM_BYTES;
    tasks = row_tasks(by, layer.F, block, by.several ? TASK_ROWS : std::max<int64_t>(1, layer.R));
    if (by.has_lores)
      for (int64_t e = 0; e < layer.E; e++)
        by.strips(e, by.first_choice(e), by.starts[e + 1] * layer.L, [&](int64_t g, int64_t from, int64_t to) {
          for (int64_t n = from; n < to; n += TASK_ROWS) lore_tasks.push_back({g, n, std::min(to, n + TASK_ROWS), 0, 0});
        });
    if (by.several || beside) return;
    stretch = std::min(LONGEST_STRETCH, padded());
    while (stretch > P::NR && int64_t(lore_tasks.size()) * ((layer.F + stretch - 1) / stretch) < 4 * layer.threads) stretch = round_up(stretch / 2, P::NR);
    for (const RowTask& lore : lore_tasks)
      for (int64_t j = 0; j < layer.F; j += stretch) grow_tasks.push_back({lore.expert, lore.first, lore.last, j, std::min(layer.F, j + stretch)});
  }
  int64_t padded() const { return round_up(layer.F, P::NR); }

  // u = x A of one LoRE's rows, and z = pi u.
  void shrink(int p, const RowTask& task) {
    const LoreProjection& projection = layer.projections[p];
    const int64_t Q = projection.Q, wide = round_up(Q, P::NR);
    const Rows<P>& source = by.several ? lore_rows : rows;
    Right* panel = scratch<Right, 10>(P::right_size(std::min(DEPTH, layer.D), Q));
    Sum* sums = scratch<Sum, 11>(TASK_ROWS * wide);
    const S* a = static_cast<const S*>(projection.a) + task.expert * Q * layer.D;
    product_transposed<P>(source.at + task.first * source.ld, source.ld, task.last - task.first, a, layer.D, layer.D, Q, panel, sums, wide);
    for (int64_t n = task.first; n < task.last; n++, sums += wide) {
      Left* to = z[p].get() + n * rank[p];
      if (op.u[p] != nullptr) copy(static_cast<S*>(op.u[p]) + n * Q, sums, Q);
      const Sum pi = Sum(by.pi(n));
      for (int64_t q = 0; q < Q; q++) to[q] = convert<Left>(Sum(pi * sums[q]));
      if (rank[p] > Q) clear(to + Q, rank[p] - Q);
    }
  }

  // y = z B of one LoRE's rows, for a run of columns.
  void grow(int p, const RowTask& task) {
    const int64_t Q = layer.projections[p].Q, n = task.end - task.begin, m = task.last - task.first, ldy = padded();
    const S* b = static_cast<const S*>(layer.projections[p].b) + task.expert * Q * layer.F + task.begin;
    const Left* left = z[p].get() + task.first * rank[p];
    Sum* to = y[p].get() + task.first * ldy + task.begin;
    const bool past = layer.R * ldy * int64_t(sizeof(Sum)) > STREAM_BYTES;
    Sum* sums = scratch<Sum, 19>(std::max(P::THIN_ROWS * stretch, ROW_BLOCK * MAX_COLUMNS));
    if (m <= P::THIN_ROWS) {
      for (int64_t j = 0; j < n; j += std::min(stretch, P::THIN_COLUMNS)) {
        const int64_t columns = std::min(n - j, P::THIN_COLUMNS);
        P::thin(left, rank[p], m, b + j, layer.F, Q, columns, sums, stretch);
        put_rows(to + j, ldy, sums, stretch, m, columns, past);
      }
      if (past) streamed();
      return;
    }
    Right* panel = scratch<Right, 18>(P::right_size(Q, stretch));
    P::pack(panel, b, layer.F, Q, n);
    for (int64_t i = 0; i < m; i += ROW_BLOCK)
      for (int64_t j = 0; j < n; j += MAX_COLUMNS) {
        const int64_t rows = std::min(ROW_BLOCK, m - i), columns = std::min(MAX_COLUMNS, n - j);
        P::product(left + i * rank[p], rank[p], rows, panel + P::right_size(Q, j), Q, columns, sums, MAX_COLUMNS, true);
        put_rows(to + i * ldy + j, ldy, sums, MAX_COLUMNS, rows, columns, past);
      }
    if (past) streamed();
  }

  // The hidden layer of one expert's rows, for one block of columns.
  void expand(const RowTask& task) {
    const int64_t n = task.end - task.begin;
    Right* panels[2] = {scratch<Right, 12>(P::right_size(layer.D, block)), scratch<Right, 13>(P::right_size(layer.D, block))};
    Sum* sums[2] = {scratch<Sum, 14>(ROW_BLOCK * width), scratch<Sum, 15>(ROW_BLOCK * width)};
    const Sum* added[2] = {nullptr, nullptr};
    int64_t packed[2] = {-1, -1};  // the LoRE whose B is packed
    for (int p = 0; p < 1 + layer.gated; p++) {
      const LoreProjection& projection = layer.projections[p];
      if (projection.weight != nullptr)
        P::pack_transposed(panels[p], static_cast<const S*>(projection.weight) + (task.expert * layer.F + task.begin) * layer.D, layer.D, layer.D, n);
      if (projection.a != nullptr && by.several) added[p] = p ? expand_choices<17>(p, task) : expand_choices<16>(p, task);
    }
    for (int64_t r = task.first; r < task.last; r += ROW_BLOCK) {
      const int64_t m = std::min(ROW_BLOCK, task.last - r);
      for (int p = 0; p < 1 + layer.gated; p++) {
        const bool weighted = layer.projections[p].weight != nullptr && layer.D > 0;
        const bool fresh = weighted && layer.projections[p].bias == nullptr && y[p] == nullptr;
        if (!fresh) start(p, task, r, m, sums[p]);
        if (weighted) P::product(rows.at + r * rows.ld, rows.ld, m, panels[p], layer.D, n, sums[p], width, fresh);
        if (beside && layer.projections[p].a != nullptr) add_lores(p, task, r, m, sums[p], packed[p]);
        if (added[p] != nullptr) add_choices(added[p], task, r, m, sums[p]);
      }
      finish(task, r, m, sums);
    }
    if (far) streamed();
  }

  // The sums start at the LoREs' products and the bias.
  void start(int p, const RowTask& task, int64_t r, int64_t m, Sum* sums) {
    const int64_t n = task.end - task.begin;
    const S* bias = static_cast<const S*>(layer.projections[p].bias);
    for (int64_t i = 0; i < m; i++, sums += width) {
      if (y[p] != nullptr) copy(sums, y[p].get() + (r + i) * padded() + task.begin, n);
      else clear(sums, width);
      if (bias == nullptr) continue;
      const S* from = bias + task.expert * layer.F + task.begin;
      for (int64_t j = 0; j < n; j++) sums[j] += widen(from[j]);
    }
  }

  // sums += z B, LoRE by LoRE.
  void add_lores(int p, const RowTask& task, int64_t r, int64_t m, Sum* sums, int64_t& packed) {
    const int64_t Q = layer.projections[p].Q, n = task.end - task.begin;
    Right* panel = p ? scratch<Right, 17>(P::right_size(Q, block)) : scratch<Right, 16>(P::right_size(Q, block));
    by.strips(task.expert, r, r + m, [&](int64_t g, int64_t from, int64_t to) {
      if (g != packed) P::pack(panel, static_cast<const S*>(layer.projections[p].b) + g * Q * layer.F + task.begin, layer.F, Q, n);
      packed = g;
      P::product(z[p].get() + from * rank[p], rank[p], to - from, panel, Q, n, sums + (from - r) * width, width, false);
    });
  }

  // z B of all choices of the task's rows.
  template <int PURPOSE>
  const Sum* expand_choices(int p, const RowTask& task) {
    const int64_t first = by.first_choice(task.expert), last = by.starts[task.expert + 1] * layer.L;
    Sum* y = scratch<Sum, PURPOSE>((last - first) * width);
    clear(y, (last - first) * width);
    const int64_t Q = layer.projections[p].Q, n = task.end - task.begin;
    Right* panel = scratch<Right, 19>(P::right_size(Q, block));
    by.strips(task.expert, first, last, [&](int64_t g, int64_t from, int64_t to) {
      P::pack(panel, static_cast<const S*>(layer.projections[p].b) + g * Q * layer.F + task.begin, layer.F, Q, n);
      P::product(z[p].get() + from * rank[p], rank[p], to - from, panel, Q, n, y + (from - first) * width, width, false);
    });
    return y;
  }

  void add_choices(const Sum* y, const RowTask& task, int64_t r, int64_t m, Sum* sums) {
    for (int64_t i = 0; i < m; i++)
      for (int64_t l = 0; l < layer.L; l++) {
        const Sum* from = y + (layer.inverse[(r + i) * layer.L + l] - by.first_choice(task.expert)) * width;
        for (int64_t j = 0; j < task.end - task.begin; j++) sums[i * width + j] += from[j];
      }
  }

  // Activation and gate, and every row to its own place.
  void finish(const RowTask& task, int64_t r, int64_t m, Sum* const (&sums)[2]) {
    const int64_t n = task.end - task.begin;
    alignas(64) S line[MAX_COLUMNS];
    with_activation<Sum>(layer.activation, [&](auto act) {
      for (int64_t i = 0; i < m; i++) {
        const int64_t at = by.row_at(r + i) * layer.F + task.begin;
        const Sum *up = sums[0] + i * width, *gate = sums[1] + i * width;
        if (op.before[0] != nullptr) put_row(static_cast<S*>(op.before[0]) + at, up, n, far);
        if (op.before[1] != nullptr) put_row(static_cast<S*>(op.before[1]) + at, gate, n, far);
        S* to = far ? line : static_cast<S*>(op.hidden) + at;
        for (int64_t j = 0; j < n; j += Stride<Sum>::width)
          put(to + j, layer.gated ? act.value(take(gate + j, n - j)) * take(up + j, n - j) : act.value(take(up + j, n - j)), n - j);
        if (far) stream(static_cast<S*>(op.hidden) + at, line, n);
      }
    });
  }
};

}  // namespace

void lore_forward(const LoreForward& op) {
  for_each_dtype(op.layer.dtype, [&](auto of) { Forward<typename decltype(of)::type>(op).run(); });
}

void lore_backward(const LoreBackward& op) {
  for_each_dtype(op.layer.dtype, [&](auto of) { Backward<typename decltype(of)::type>(op).run(); });
}

}  // namespace NEOX_ISA
