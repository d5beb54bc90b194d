// Grouped products, the experts' hidden layer and the loss in one set and in another.
#include "arrays.h"

namespace self_check {
namespace {

int64_t sum(const Counts& rows) {
  int64_t total = 0;
  for (const int64_t n : rows) total += n;
  return total;
}

void grouped(const InstructionSet& right, const InstructionSet& ours, const Format& f, bool quick, Tally& tally) {
  struct Case {
    Counts rows;
    int64_t K, N;
  };
  std::vector<Case> cases{{{37, 0, 150, 5}, 72, 100}, {{37, 0, 150, 5}, 9, 33}, {{32, 0, 160, 48}, 64, 96}, {{16, 96}, 544, 64},
                        {{1, 17, 31, 33}, 65, 31}, {{3}, 1, 1},               {{0, 0}, 8, 8},             {{12, 13, 97}, 1055, 40}};
  if (!quick) cases.push_back({{0, 19}, 2048, 512});  // rows that are copied, because they collide in the cache
  for (const Case& c : cases) {
    const int64_t E = int64_t(c.rows.size()), R = sum(c.rows);
    Array x = Array::random(f.dtype, R * c.K, 1), w = Array::random(f.dtype, E * c.K * c.N, 1), y = Array::random(f.dtype, R * c.N, 1);
    const std::string at = std::string(ours.name) + " " + f.name + " K=" + std::to_string(c.K) + " N=" + std::to_string(c.N) + " R=" + std::to_string(R);
    for (const bool transposed : {false, true}) {
      Array wanted(f.dtype, R * c.N), found(f.dtype, R * c.N);
      right.grouped_matmul({x.at(), w.at(), wanted.at(), c.rows.data(), E, R, c.K, c.N, transposed, f.dtype, 1});
      ours.grouped_matmul({x.at(), w.at(), found.at(), c.rows.data(), E, R, c.K, c.N, transposed, f.dtype, 1});
      compare(wanted, found, f.bound, "grouped_matmul " + at + (transposed ? " transposed" : ""), tally);
    }
    Array wanted(f.dtype, E * c.K * c.N), found(f.dtype, E * c.K * c.N);
    right.grouped_outer({x.at(), y.at(), wanted.at(), c.rows.data(), E, R, c.K, c.N, f.dtype, 1});
    ours.grouped_outer({x.at(), y.at(), found.at(), c.rows.data(), E, R, c.K, c.N, f.dtype, 1});
    compare(wanted, found, f.bound, "grouped_outer " + at, tally);
  }
}

enum class Lores { none, one_an_expert, one_a_row, two_a_row };

struct LoreCase {
  Counts rows;
  int64_t D, F, Q;
  Lores lores;
  bool weight, gated, bias;
  int activation;
};

// A layer with its memory.
struct Layer {
  LoreLayer layer{};
  Array weight[2], a[2], b[2], bias[2], pi;
  Counts rows, order, inverse, lore_rows;

  Layer(const LoreCase& c, Dtype dtype) : rows(c.rows) {
    const int64_t E = int64_t(rows.size()), per_expert = c.lores >= Lores::one_a_row ? 3 : 1;
    layer.E = E, layer.R = sum(rows), layer.D = c.D, layer.F = c.F, layer.L = c.lores == Lores::two_a_row ? 2 : 1;
    layer.G = c.lores == Lores::none ? 0 : E * per_expert;
    for (int p = 0; p < 1 + c.gated; p++) {
      LoreProjection& to = layer.projections[p];
      if (c.weight) weight[p] = Array::random(dtype, E * c.F * c.D, 1 / std::sqrt(double(c.D)));
      if (c.bias) bias[p] = Array::random(dtype, E * c.F, 1);
      if (layer.G) {
        to.Q = c.Q + p;
        a[p] = Array::random(dtype, layer.G * to.Q * c.D, 1 / std::sqrt(double(c.D)));
        b[p] = Array::random(dtype, layer.G * to.Q * c.F, 1 / std::sqrt(double(to.Q)));
      }
      to = {weight[p].at(), a[p].at(), b[p].at(), bias[p].at(), to.Q};
    }
    layer.gated = c.gated, layer.chosen = c.lores >= Lores::one_a_row, layer.activation = c.activation, layer.dtype = dtype, layer.threads = 1;
    layer.pi_is_double = dtype == Dtype::float64;
    layer.rows = rows.data();
    if (layer.chosen) choose(per_expert);
  }
  Layer(const Layer&) = delete;

 private:
  void choose(int64_t per_expert) {
    const int64_t choices = layer.R * layer.L;
    pi = Array::random(layer.pi_is_double ? Dtype::float64 : Dtype::float32, choices, 1);
    Counts lore(choices);
    lore_rows.assign(layer.G, 0), inverse.assign(choices, 0);
    for (int64_t e = 0, r = 0; e < layer.E; e++)
      for (int64_t end = r + rows[e]; r < end; r++) {
        const int64_t first = random_bits() % per_expert;
        for (int64_t l = 0; l < layer.L; l++) lore_rows[lore[r * layer.L + l] = e * per_expert + (first + l) % per_expert]++;
      }
    for (int64_t g = 0; g < layer.G; g++)
      for (int64_t n = 0; n < choices; n++)
        if (lore[n] == g) inverse[n] = int64_t(order.size()), order.push_back(n);
    layer.pi = pi.at(), layer.order = order.data(), layer.inverse = inverse.data(), layer.lore_rows = lore_rows.data();
  }
};

struct Results {
  Array hidden, before[2], u[2], x, pi, weight[2], a[2], b[2], bias[2];

  explicit Results(Layer& of) {
    const LoreLayer& l = of.layer;
    hidden = Array(l.dtype, l.R * l.F), x = Array(l.dtype, l.R * l.D);
    if (l.chosen) pi = Array(l.pi_is_double ? Dtype::float64 : Dtype::float32, l.R * l.L);
    for (int p = 0; p < 1 + l.gated; p++) {
      before[p] = Array(l.dtype, l.R * l.F);
      if (l.G) u[p] = Array(l.dtype, l.R * l.L * l.projections[p].Q);
      weight[p] = Array(l.dtype, of.weight[p].size()), a[p] = Array(l.dtype, of.a[p].size());
      b[p] = Array(l.dtype, of.b[p].size()), bias[p] = Array(l.dtype, of.bias[p].size());
    }
  }
  void forward(const InstructionSet& set, const Layer& of, Array& from) {
    set.lore_forward({of.layer, from.at(), hidden.at(), {before[0].at(), before[1].at()}, {u[0].at(), u[1].at()}});
  }
  // With what the forward of `saved` kept.
  void backward(const InstructionSet& set, const Layer& of, Array& from, Array& grad, Results& saved) {
    LoreBackward op{};
    op.layer = of.layer, op.grad = grad.at(), op.x = from.at(), op.grad_x = x.at(), op.grad_pi = pi.at();
    for (int p = 0; p < 2; p++) {
      op.saved[p] = saved.before[p].at(), op.u[p] = saved.u[p].at();
      op.gradients[p] = {weight[p].at(), a[p].at(), b[p].at(), bias[p].at()};
    }
    set.lore_backward(op);
  }
};

void layer(const InstructionSet& right, const InstructionSet& ours, const Format& f, const LoreCase& c, Tally& tally) {
  Layer of(c, f.dtype);
  Array x = Array::random(f.dtype, of.layer.R * c.D, 1), grad = Array::random(f.dtype, of.layer.R * c.F, 1);
  Results wanted(of), found(of);
  wanted.forward(right, of, x), found.forward(ours, of, x);
  wanted.backward(right, of, x, grad, wanted), found.backward(ours, of, x, grad, wanted);
  const std::string at = std::string(ours.name) + " " + f.name + " D=" + std::to_string(c.D) + " F=" + std::to_string(c.F) + " Q=" + std::to_string(c.Q) +
                         " LoREs=" + std::to_string(int(c.lores)) + (c.weight ? " weight" : "") + (c.gated ? " gated" : "") + (c.bias ? " bias" : "") +
                         " activation=" + std::to_string(c.activation) + ": ";
  compare(wanted.hidden, found.hidden, f.bound, at + "hidden", tally);
  compare(wanted.x, found.x, f.bound, at + "gradient of x", tally);
  compare(wanted.pi, found.pi, f.bound, at + "gradient of pi", tally);
  for (int p = 0; p < 1 + c.gated; p++) {
    const std::string which = p ? " of the gate" : " of up";
    compare(wanted.before[p], found.before[p], f.bound, at + "projection" + which, tally);
    compare(wanted.u[p], found.u[p], f.bound, at + "x A" + which, tally);
    compare(wanted.weight[p], found.weight[p], f.bound, at + "gradient of the weight" + which, tally);
    compare(wanted.a[p], found.a[p], f.bound, at + "gradient of A" + which, tally);
    compare(wanted.b[p], found.b[p], f.bound, at + "gradient of B" + which, tally);
    compare(wanted.bias[p], found.bias[p], f.bound, at + "gradient of the bias" + which, tally);
  }
}

void layers(const InstructionSet& right, const InstructionSet& ours, const Format& f, bool quick, Tally& tally) {
  const Counts odd{37, 0, 150, 5}, round{32, 0, 160, 48};
  int activation = 1;
  layer(right, ours, f, {{9, 0, 41, 90, 2, 31}, 40, 330, 9, Lores::one_a_row, true, true, false, 4}, tally);  // LoREs of few rows, many columns
  if (quick) return layer(right, ours, f, {{17, 0, 35}, 72, 100, 9, Lores::two_a_row, true, true, true, 4}, tally);
  for (const Lores lores : {Lores::none, Lores::one_an_expert, Lores::one_a_row, Lores::two_a_row})
    for (const bool gated : {false, true}) {
      layer(right, ours, f, {odd, 72, 100, 9, lores, true, gated, gated != (lores == Lores::two_a_row), activation}, tally);
      layer(right, ours, f, {round, 64, 96, 32, lores, true, gated, lores == Lores::none, 1 + activation % 7}, tally);
      activation = 1 + (activation + 1) % 7;
    }
  layer(right, ours, f, {odd, 33, 65, 17, Lores::one_a_row, false, true, false, 4}, tally);
  layer(right, ours, f, {{1, 0, 18}, 544, 130, 40, Lores::two_a_row, true, true, true, 4}, tally);
  layer(right, ours, f, {{1100, 16, 0, 257, 513}, 40, 70, 9, Lores::one_an_expert, false, false, false, 4}, tally);  // in one pass, and in several
  layer(right, ours, f, {{0, 0}, 16, 16, 4, Lores::one_a_row, true, true, true, 4}, tally);
}

// Tokens, width, vocabulary, tokens of a chunk; the last token's label is the last one.
void loss(const InstructionSet& right, const InstructionSet& ours, const Format& f, int64_t T, int64_t D, int64_t V, int64_t rows, Tally& tally) {
  const Dtype wide = f.dtype == Dtype::float64 ? Dtype::float64 : Dtype::float32;
  const Array hidden = Array::random(f.dtype, T * D, 1), weight = Array::random(f.dtype, V * D, 1), scale = Array::random(wide, T, 1);
  Counts labels(T);
  for (int64_t t = 0; t < T; t++) labels[t] = t + 1 == T ? V - 1 : random_bits() % V;
  for (const bool gradients : {false, true}) {
    const auto results = [&](const InstructionSet& set) {
      std::vector<Array> out{Array(wide, T), Array(f.dtype, gradients * T * D), Array(f.dtype, gradients * V * D)};
      set.linear_cross_entropy({hidden.at(), weight.at(), labels.data(), scale.at(), out[0].at(), gradients ? out[1].at() : nullptr,
                                gradients ? out[2].at() : nullptr, T, D, V, rows, f.dtype, 1});
      return out;
    };
    const std::vector<Array> wanted = results(right), found = results(ours);
    const char* const names[] = {"loss", "gradient of hidden", "gradient of weight"};
    for (int i = 0; i < 1 + 2 * gradients; i++)
      compare(wanted[i], found[i], f.bound,
              std::string("linear_cross_entropy ") + ours.name + " " + f.name + " T=" + std::to_string(T) + " D=" + std::to_string(D) + " V=" +
                  std::to_string(V) + ": " + names[i],
              tally);
  }
}

void losses(const InstructionSet& right, const InstructionSet& ours, const Format& f, bool quick, Tally& tally) {
  loss(right, ours, f, 131, 40, 409, 100, tally);
  if (quick) return;
  loss(right, ours, f, 1, 1, 1, 1, tally);
  loss(right, ours, f, 97, 33, 17, 97, tally);
  loss(right, ours, f, 30, 1055, 70, 25, tally);     // in two parts along D
  loss(right, ours, f, 1100, 64, 3300, 1060, tally);  // blocks of full size, more rows than are turned at a time
}

}  // namespace

void products(const InstructionSet& right, const InstructionSet& ours, const Format& f, bool quick, Tally& tally) {
  grouped(right, ours, f, quick, tally);
  layers(right, ours, f, quick, tally);
  losses(right, ours, f, quick, tally);
}

}  // namespace self_check
