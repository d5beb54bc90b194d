// The hidden layer of the experts on a CPU, forward. The backward is in backward.h.
//
// A task is (expert, block of columns): the block's part of both projections is packed once; while the expert's rows pass over it, the LoREs' products
// are added to the sums as one more step along K, and bias, activation and gate follow before the sums leave the cache.
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
  int64_t rank[2] = {0, 0};
  std::vector<RowTask> tasks;
  std::vector<RowTask> lore_tasks;
  int64_t block = 0, width = 0;

  void prepare() {
    const S* x = static_cast<const S*>(op.x);
    rows.prepare(x, layer.R, layer.D, by.place);
    if (by.several) lore_rows.prepare(x, by.choices, layer.D, layer.order);
    int weights = 0;
    for (int p = 0; p < 2; p++) {
      weights += layer.projections[p].weight != nullptr;
      if (layer.projections[p].a == nullptr) continue;
      rank[p] = round_up(layer.projections[p].Q, P::K_ALIGN);
      z[p] = allocate<Left>(by.choices * rank[p]);
    }
    const int64_t depth = std::max(layer.D * weights, std::max(rank[0], rank[1]));
    block = column_block(depth * sizeof(Right), layer.F, P::NR, layer.threads, layer.E);
    width = round_up(block, P::NR);
    tasks = row_tasks(by, layer.F, block, by.several ? TASK_ROWS : std::max<int64_t>(1, layer.R));
    if (by.has_lores)
      for (int64_t e = 0; e < layer.E; e++)
        by.strips(e, by.first_choice(e), by.starts[e + 1] * layer.L, [&](int64_t g, int64_t from, int64_t to) {
          for (int64_t n = from; n < to; n += TASK_ROWS) lore_tasks.push_back({g, n, std::min(to, n + TASK_ROWS), 0, 0});
        });
  }

  // u = x A of one LoRE's rows, and z = pi u.
  void shrink(int p, const RowTask& task) {
    const LoreProjection& projection = layer.projections[p];
    const int64_t Q = projection.Q, wide = round_up(Q, P::NR);
    const Rows<P>& source = by.several ? lore_rows : rows;
    Right* panel = scratch<Right, 10>(P::right_size(layer.D, Q));
    Sum* sums = scratch<Sum, 11>(ROW_BLOCK * wide);
    P::pack_transposed(panel, static_cast<const S*>(projection.a) + task.expert * Q * layer.D, layer.D, layer.D, Q);
    for (int64_t n = task.first; n < task.last; n += ROW_BLOCK) {
      const int64_t m = std::min(ROW_BLOCK, task.last - n);
      if (layer.D == 0) clear(sums, m * wide);
      P::product(source.at + n * source.ld, source.ld, m, panel, layer.D, Q, sums, wide, true);
      for (int64_t i = 0; i < m; i++) {
        Left* to = z[p].get() + (n + i) * rank[p];
        if (op.u[p] != nullptr) copy(static_cast<S*>(op.u[p]) + (n + i) * Q, sums + i * wide, Q);
        const Sum pi = Sum(by.pi(n + i));
        for (int64_t q = 0; q < Q; q++) to[q] = convert<Left>(Sum(pi * sums[i * wide + q]));
        if (rank[p] > Q) clear(to + Q, rank[p] - Q);
      }
    }
  }

  // The hidden layer of one expert's rows, for one block of columns.
  void expand(const RowTask& task) {
    const int64_t n = task.end - task.begin;
    Right* panels[2] = {scratch<Right, 12>(P::right_size(layer.D, block)), scratch<Right, 13>(P::right_size(layer.D, block))};
    Sum* sums[2] = {scratch<Sum, 14>(ROW_BLOCK * width), scratch<Sum, 15>(ROW_BLOCK * width)};
    const Sum* added[2] = {nullptr, nullptr};
    for (int p = 0; p < 1 + layer.gated; p++) {
      const LoreProjection& projection = layer.projections[p];
      if (projection.weight != nullptr)
        P::pack_transposed(panels[p], static_cast<const S*>(projection.weight) + (task.expert * layer.F + task.begin) * layer.D, layer.D, layer.D, n);
      if (projection.a != nullptr && by.several) added[p] = p ? expand_choices<17>(p, task) : expand_choices<16>(p, task);
    }
    int64_t packed[2] = {-1, -1};
    for (int64_t r = task.first; r < task.last; r += ROW_BLOCK) {
      const int64_t m = std::min(ROW_BLOCK, task.last - r);
      for (int p = 0; p < 1 + layer.gated; p++) {
        const bool fresh = layer.projections[p].bias == nullptr && layer.projections[p].weight != nullptr && layer.D > 0;
        if (!fresh) start(p, task, sums[p], m);
        if (layer.projections[p].weight != nullptr) P::product(rows.at + r * rows.ld, rows.ld, m, panels[p], layer.D, n, sums[p], width, fresh);
        if (added[p] != nullptr) {
          add_choices(added[p], task, r, m, sums[p]);
        } else if (layer.projections[p].a != nullptr) {
          by.strips(task.expert, r, r + m, [&](int64_t g, int64_t from, int64_t to) {
            const Right* b = pack_b(p, g, task, packed[p]);
            P::product(z[p].get() + from * rank[p], rank[p], to - from, b, layer.projections[p].Q, n, sums[p] + (from - r) * width, width, false);
          });
        }
      }
      finish(task, r, m, sums);
    }
  }

  // The sums start at the bias.
  void start(int p, const RowTask& task, Sum* sums, int64_t m) {
    const S* bias = static_cast<const S*>(layer.projections[p].bias);
    clear(sums, m * width);
    if (bias != nullptr)
      for (int64_t i = 0; i < m; i++) copy(sums + i * width, bias + task.expert * layer.F + task.begin, task.end - task.begin);
  }

  // The block's columns of one LoRE's B, packed; the last one is kept.
  const Right* pack_b(int p, int64_t g, const RowTask& task, int64_t& packed) {
    const int64_t size = P::right_size(layer.projections[p].Q, block);
    Right* panel = p ? scratch<Right, 19>(size) : scratch<Right, 18>(size);
    if (packed != g) {
      const int64_t Q = layer.projections[p].Q, n = task.end - task.begin;
      const S* b = static_cast<const S*>(layer.projections[p].b) + g * Q * layer.F + task.begin;
      // The next LoRE's rows are short and far apart: they are asked for while this one is multiplied.
      if (g + 1 < (task.expert + 1) * by.per_expert)
        for (int64_t q = 0; q < Q; q++)
          for (int64_t j = 0; j < n; j += 64 / int64_t(sizeof(S))) __builtin_prefetch(b + (Q + q) * layer.F + j, 0, 2);
      P::pack(panel, b, layer.F, Q, n);
      packed = g;
    }
    return panel;
  }

  // z B of all choices of the task's rows.
  template <int PURPOSE>
  const Sum* expand_choices(int p, const RowTask& task) {
    const int64_t first = by.first_choice(task.expert), last = by.starts[task.expert + 1] * layer.L;
    Sum* y = scratch<Sum, PURPOSE>((last - first) * width);
    clear(y, (last - first) * width);
    int64_t packed = -1;
    by.strips(task.expert, first, last, [&](int64_t g, int64_t from, int64_t to) {
      const Right* b = pack_b(p, g, task, packed);
      P::product(z[p].get() + from * rank[p], rank[p], to - from, b, layer.projections[p].Q, task.end - task.begin, y + (from - first) * width, width, false);
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
    with_activation<Sum>(layer.activation, [&](auto act) {
      for (int64_t i = 0; i < m; i++) {
        const int64_t at = by.row_at(r + i) * layer.F + task.begin;
        const Sum *up = sums[0] + i * width, *gate = sums[1] + i * width;
        if (op.before[0] != nullptr) copy(static_cast<S*>(op.before[0]) + at, up, n);
        if (op.before[1] != nullptr) copy(static_cast<S*>(op.before[1]) + at, gate, n);
        S* to = static_cast<S*>(op.hidden) + at;
        for (int64_t j = 0; j < n; j += Stride<Sum>::width)
          put(to + j, layer.gated ? act.value(take(gate + j, n - j)) * take(up + j, n - j) : act.value(take(up + j, n - j)), n - j);
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
