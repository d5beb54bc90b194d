// Attention, norms, Adam, routes and combined rows in one set and in another.
#include "../include/processor.h"
#include "arrays.h"

namespace self_check {
namespace {

struct Pair {
  const InstructionSet &right, &ours;
  const Format& format;
  Tally& tally;

  std::string at(const char* op) const { return std::string(op) + " " + ours.name + " " + format.name; }
  void same(const Array& wanted, const Array& found, const std::string& what) const { compare(wanted, found, format.bound, what, tally); }
};

struct Attended {
  Array output, log_sum, query, key, value;
};

// Two texts, four heads on two of keys, 20 numbers each, the first 12 turned; rows of a head lie `heads` rows apart.
Attended attend(const InstructionSet& set, Dtype dtype, int64_t length, const Array (&given)[4], const Array& turns) {
  constexpr int64_t B = 2, H = 4, KV = 2, D = 20, PAIRS = 6;
  const int64_t q = B * length * H * D, k = B * length * KV * D;
  Attended to{Array(dtype, q), Array(Dtype::float32, B * H * length), Array(dtype, q), Array(dtype, k), Array(dtype, k)};
  const auto many = [&](const Array& a) { return attention::Heads{a.at(), length * H * D, D, H * D}; };
  const auto few = [&](const Array& a) { return attention::Heads{a.at(), length * KV * D, D, KV * D}; };
  const float* cosines = static_cast<const float*>(turns.at());
  attention::Problem op{B, H, KV, length, D, 0.2f, dtype == Dtype::bfloat16, 1, many(given[0]), few(given[1]), few(given[2]), many(to.output),
                        {cosines, cosines + length * PAIRS, 0, PAIRS}, static_cast<float*>(to.log_sum.at())};
  set.attention_forward(op);
  set.attention_backward(op, {many(given[3]), many(to.query), few(to.key), few(to.value)});
  return to;
}

void attention(const Pair& p, int64_t length) {
  const Dtype dtype = p.format.dtype;
  const int64_t rows = 2 * length;
  const Array given[4] = {Array::random(dtype, rows * 80, 1), Array::random(dtype, rows * 40, 1), Array::random(dtype, rows * 40, 1),
                          Array::random(dtype, rows * 80, 1)};
  const Array turns = Array::random(Dtype::float32, 2 * length * 6, 1);
  const Attended wanted = attend(p.right, dtype, length, given, turns), found = attend(p.ours, dtype, length, given, turns);
  const std::string at = p.at("attention") + " length=" + std::to_string(length) + ": ";
  p.same(wanted.output, found.output, at + "output"), p.same(wanted.log_sum, found.log_sum, at + "log of the sums");
  p.same(wanted.query, found.query, at + "gradient of the queries"), p.same(wanted.key, found.key, at + "gradient of the keys");
  p.same(wanted.value, found.value, at + "gradient of the values");
}

void norm(const Pair& p, int64_t dim) {
  const Dtype dtype = p.format.dtype;
  constexpr int64_t ROWS = 34, GROUPS = 2;
  const Array x = Array::random(dtype, ROWS * dim, 1), scale = Array::random(dtype, GROUPS * dim, 1), grad = Array::random(dtype, ROWS * dim, 1);
  const auto results = [&](const InstructionSet& set) {
    std::vector<Array> out{Array(Dtype::float32, ROWS), Array(dtype, ROWS * dim), Array(dtype, ROWS * dim), Array(dtype, GROUPS * dim)};
    const RmsNorm op{x.at(), scale.at(), static_cast<float*>(out[0].at()), ROWS, GROUPS, dim, dtype == Dtype::bfloat16, 1};
    set.rms_norm_forward({op, out[1].at(), 1e-5});
    set.rms_norm_backward({op, grad.at(), out[2].at(), out[3].at()});
    return out;
  };
  const std::vector<Array> wanted = results(p.right), found = results(p.ours);
  for (size_t i = 0; i < wanted.size(); i++) p.same(wanted[i], found[i], p.at("rms_norm") + " dim=" + std::to_string(dim) + ": result " + std::to_string(i));
}

// float weights with gradients in the format of the pair.
void adam(const Pair& p) {
  const Dtype dtype = p.format.dtype;
  const std::vector<int64_t> sizes{1, 37, 5000};
  const std::vector<double> steps{1, 2, 30};
  std::vector<Array> gradients, weights, averages, squares;
  for (const int64_t n : sizes) {
    gradients.push_back(Array::random(dtype, n, 1)), weights.push_back(Array::random(Dtype::float32, n, 1));
    averages.push_back(Array::random(Dtype::float32, n, 1)), squares.push_back(Array(Dtype::float32, n));
    std::memset(squares.back().at(), 0, size_t(n) * 4);
  }
  const auto addresses = [](const std::vector<Array>& of) {
    std::vector<int64_t> all;
    for (const Array& a : of) all.push_back(int64_t(reinterpret_cast<intptr_t>(a.at())));
    return all;
  };
  const auto results = [&](const InstructionSet& set) {
    std::vector<Array> out, w = weights, m = averages, v = squares, rounded;
    for (const int64_t n : sizes) rounded.push_back(Array(Dtype::bfloat16, n));
    const std::vector<int64_t> is_bf16(sizes.size(), dtype == Dtype::bfloat16), at_g = addresses(gradients), at_w = addresses(w), at_m = addresses(m),
                               at_v = addresses(v), at_r = addresses(rounded);
    const ::adam::Gradients g{int64_t(sizes.size()), sizes.data(), at_g.data(), is_bf16.data()};
    const double length = set.gradient_norm(g, 1);
    set.adam_update({g, at_w.data(), at_m.data(), at_v.data(), at_r.data(), steps.data(), {1e-2, 0.9, 0.95, 1e-8, 0.1, true, length}}, 1);
    for (auto* some : {&w, &m, &v, &rounded}) out.insert(out.end(), some->begin(), some->end());
    return out;
  };
  const std::vector<Array> wanted = results(p.right), found = results(p.ours);
  for (size_t i = 0; i < wanted.size(); i++) {
    const double bound = i < 9 ? 1e-5 : 1e-2;  // averages and squares come from gradients, the last three are bf16
    compare(wanted[i], found[i], bound, p.at("adam") + ": result " + std::to_string(i), p.tally);
  }
}

// Every token's two rows, in an order where one choice in seven is empty.
void combine(const Pair& p, int64_t D) {
  const Dtype dtype = p.format.dtype, sums = dtype == Dtype::float64 ? Dtype::float64 : Dtype::float32;
  constexpr int64_t T = 41, K = 2, N = T * K, G = 5;
  std::vector<int64_t> group(N);
  for (int64_t n = 0; n < N; n++) group[n] = n % 7 == 3 ? G : random_bits() % G;
  const Array rows = Array::random(dtype, N * D, 1), weight = Array::random(sums, N, 1), grad = Array::random(dtype, T * D, 1);
  const auto results = [&](const InstructionSet& set) {
    std::vector<int64_t> order(N), inverse(N), counts(G);
    const Sorted sorted = set.sort_by_group({group.data(), order.data(), inverse.data(), counts.data(), N, G, true, 1});
    const int64_t R = sorted.rows;
    std::vector<Array> out{Array(dtype, T * D), Array(dtype, R * D), Array(sums, N), Array(dtype, R * D)};
    set.combine_rows({rows.at(), inverse.data(), weight.at(), out[0].at(), T, K, R, D, dtype, 1});
    set.combine_backward({grad.at(), rows.at(), order.data(), weight.at(), out[1].at(), out[2].at(), T, K, R, D, dtype, 1});
    set.gather_rows({grad.at(), order.data(), out[3].at(), T, K, R, D * (dtype == Dtype::float64 ? 8 : dtype == Dtype::float32 ? 4 : 2), 1});
    return out;
  };
  const std::vector<Array> wanted = results(p.right), found = results(p.ours);
  for (size_t i = 0; i < wanted.size(); i++) p.same(wanted[i], found[i], p.at("combine") + " D=" + std::to_string(D) + ": result " + std::to_string(i));
}

void route(const Pair& p, int64_t C, bool normalize) {
  const Dtype dtype = p.format.dtype;
  constexpr int64_t N = 43, K = 3, P = 1;
  const Array logit = Array::random(dtype, N * C, 3), g_weight = Array::random(dtype, N * K, 1), g_log = Array::random(dtype, N, 1);
  const auto results = [&](const InstructionSet& set) {
    std::vector<Array> out{Array(dtype, N * K), Array(dtype, N * C), Array(dtype, N), Array(dtype, P * C), Array(dtype, 1), Array(dtype, N * C)};
    std::vector<int64_t> choice(N * K), order(N * K), inverse(N * K), counts(P * C), all{N};
    const Selected selected{N, C, K, P, 1.5, normalize, dtype, 1};
    set.route({selected, logit.at(), all.data(), out[0].at(), choice.data(), out[1].at(), out[2].at(), out[3].at(), out[4].at(), order.data(),
               inverse.data(), counts.data()});
    set.route_backward({selected, g_weight.at(), nullptr, g_log.at(), nullptr, out[1].at(), choice.data(), all.data(), out[5].at()});
    return out;
  };
  const std::vector<Array> wanted = results(p.right), found = results(p.ours);
  for (size_t i = 0; i < wanted.size(); i++) p.same(wanted[i], found[i], p.at("route") + " C=" + std::to_string(C) + ": result " + std::to_string(i));
}

}  // namespace

// As the bindings call them: formats that a set does not serve are left out.
void rows(const InstructionSet& right, const InstructionSet& ours, const Format& f, Tally& tally) {
  const Pair p{right, ours, f, tally};
  const bool serves = f.dtype == Dtype::bfloat16 || !has_pairs(ours.name);
  for (const int64_t wide : {33, 72}) combine(p, wide);
  if (f.dtype != Dtype::bfloat16)
    for (const int64_t candidates : {5, 37}) route(p, candidates, candidates == 5);
  if (f.dtype != Dtype::float64 && serves) {
    attention(p, 131), attention(p, 3);
    for (const int64_t dim : {20, 71, 128}) norm(p, dim);
    adam(p);
  }
}

}  // namespace self_check
