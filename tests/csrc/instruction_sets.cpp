// Runs every operation of csrc in several instruction sets, and compares the results with those of the set `generic`.
//
//     instruction_sets [--tiles-are-on] [SET ...]
//
// Without names: all sets that are compiled and that this processor has. --tiles-are-on: do not ask Linux for AMX's registers. The last line counts
// the comparisons; exit status 0: all are close and nothing was written beyond a result; 1: some are not; 2: a set is unknown or does not run here.
// It needs no Python, so it also runs as the only program of an emulated computer.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "grouped_gemm/op.h"
#include "grouped_lore/op.h"
#include "include/instruction_sets.h"

#define NEOX_DECLARE(set)                    \
  namespace set {                            \
  void grouped_matmul(const GroupedMatmul&); \
  void grouped_outer(const GroupedOuter&);   \
  void lore_forward(const LoreForward&);     \
  void lore_backward(const LoreBackward&);   \
  }
NEOX_SETS(NEOX_DECLARE)

namespace {

struct Set {
  std::string name;
  void (*matmul)(const GroupedMatmul&);
  void (*outer)(const GroupedOuter&);
  void (*forward)(const LoreForward&);
  void (*backward)(const LoreBackward&);
};
#define NEOX_ROW(set) Set{#set, set::grouped_matmul, set::grouped_outer, set::lore_forward, set::lore_backward},
const std::vector<Set> SETS{NEOX_SETS(NEOX_ROW)};
using Counts = std::vector<int64_t>;

bool emulated(const std::string& set) { return set.rfind("emulated", 0) == 0; }
bool only_bf16(const std::string& set) { return set == "amx" || set == "avx512bf16" || emulated(set); }

// As in csrc/bindings.cpp.
bool runs_here(const std::string& set, [[maybe_unused]] bool tiles_are_on) {
  if (set == "generic" || emulated(set)) return true;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512dq");
  const bool pairs = avx512 && __builtin_cpu_supports("avx512bf16");
  unsigned a, b, c, d;
  const bool tiles = __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & (1u << 24)) && (d & (1u << 22));
  if (set == "avx2") return avx2;
  if (set == "avx512") return avx512;
  if (set == "avx512bf16") return pairs;
  if (set == "amx") return pairs && tiles && (tiles_are_on || syscall(SYS_arch_prctl, 0x1023, 18) == 0);
#endif
  return false;
}

uint32_t random_bits() {
  static uint32_t state = 12345;
  state = state * 1664525u + 1013904223u;
  return state >> 8;
}

// Numbers in one format, with bytes behind them that no operation may change.
class Array {
 public:
  Array() = default;
  Array(Dtype given, int64_t numbers) : dtype(given), n(numbers), bytes(n * width() + GUARD, 0xcd) {}
  static Array random(Dtype dtype, int64_t n, double scale) {
    Array out(dtype, n);
    for (int64_t i = 0; i < n; i++) out.put(i, scale * (double(random_bits()) / (1 << 23) - 1));
    return out;
  }
  void* at() { return bytes.empty() ? nullptr : bytes.data(); }
  double get(int64_t i) const {
    double wide = 0;
    float single = 0;
    if (dtype == Dtype::float64) return std::memcpy(&wide, &bytes[i * 8], 8), wide;
    uint32_t bits = 0;
    if (dtype == Dtype::bfloat16) std::memcpy(reinterpret_cast<char*>(&bits) + 2, &bytes[i * 2], 2);
    else std::memcpy(&bits, &bytes[i * 4], 4);
    std::memcpy(&single, &bits, 4);
    return single;
  }
  bool guarded() const {
    for (size_t i = bytes.size() - GUARD; !bytes.empty() && i < bytes.size(); i++)
      if (bytes[i] != 0xcd) return false;
    return true;
  }
  int64_t size() const { return n; }

 private:
  static constexpr size_t GUARD = 256;
  Dtype dtype = Dtype::float32;
  int64_t n = 0;
  std::vector<unsigned char> bytes;

  int width() const { return dtype == Dtype::float64 ? 8 : dtype == Dtype::float32 ? 4 : 2; }
  void put(int64_t i, double x) {
    const float single = float(x);
    if (dtype == Dtype::float64) std::memcpy(&bytes[i * 8], &x, 8);
    else if (dtype == Dtype::float32) std::memcpy(&bytes[i * 4], &single, 4);
    else std::memcpy(&bytes[i * 2], reinterpret_cast<const char*>(&single) + 2, 2);
  }
};

struct Tally {
  int passed = 0, failed = 0;
  double worst = 0;

  // The largest difference, relative to the largest number.
  void compare(const Array& right, const Array& ours, double bound, const std::string& what) {
    double largest = 1e-30, difference = 0;
    for (int64_t i = 0; i < right.size(); i++) {
      largest = std::fmax(largest, std::fabs(right.get(i)));
      const double d = std::fabs(right.get(i) - ours.get(i));
      difference = d >= difference || d != d ? d : difference;
      if (d != d) break;
    }
    const double relative = difference / largest;
    const bool good = relative <= bound && ours.guarded();  // NaN is not
    worst = worst > relative ? worst : relative;
    (good ? passed : failed)++;
    if (!good) std::printf("FAILED %s: %.3g of the largest number %.3g%s\n", what.c_str(), relative, largest, ours.guarded() ? "" : "; written beyond the end");
  }
};

struct Format {
  Dtype dtype;
  const char* name;
  double bound;
};
const Format FORMATS[] = {{Dtype::bfloat16, "bf16", 4e-2}, {Dtype::float32, "float", 2e-4}, {Dtype::float64, "double", 1e-10}};

int64_t sum(const Counts& rows) {
  int64_t total = 0;
  for (const int64_t n : rows) total += n;
  return total;
}

void products(const Set& right, const Set& ours, const Format& f, Tally& tally) {
  struct Case {
    Counts rows;
    int64_t K, N;
  };
  const Case cases[] = {{{37, 0, 150, 5}, 72, 100}, {{37, 0, 150, 5}, 9, 33}, {{32, 0, 160, 48}, 64, 96}, {{16, 96}, 544, 64},
                        {{1, 17, 31, 33}, 65, 31}, {{3}, 1, 1},               {{0, 0}, 8, 8},             {{12, 13, 97}, 1055, 40}};
  for (const Case& c : cases) {
    const int64_t E = int64_t(c.rows.size()), R = sum(c.rows);
    Array x = Array::random(f.dtype, R * c.K, 1), w = Array::random(f.dtype, E * c.K * c.N, 1), y = Array::random(f.dtype, R * c.N, 1);
    const std::string at = ours.name + " " + f.name + " K=" + std::to_string(c.K) + " N=" + std::to_string(c.N) + " R=" + std::to_string(R);
    for (const bool transposed : {false, true}) {
      Array wanted(f.dtype, R * c.N), found(f.dtype, R * c.N);
      right.matmul({x.at(), w.at(), wanted.at(), c.rows.data(), E, R, c.K, c.N, transposed, f.dtype, 1});
      ours.matmul({x.at(), w.at(), found.at(), c.rows.data(), E, R, c.K, c.N, transposed, f.dtype, 1});
      tally.compare(wanted, found, f.bound, "grouped_matmul " + at + (transposed ? " transposed" : ""));
    }
    Array wanted(f.dtype, E * c.K * c.N), found(f.dtype, E * c.K * c.N);
    right.outer({x.at(), y.at(), wanted.at(), c.rows.data(), E, R, c.K, c.N, f.dtype, 1});
    ours.outer({x.at(), y.at(), found.at(), c.rows.data(), E, R, c.K, c.N, f.dtype, 1});
    tally.compare(wanted, found, f.bound, "grouped_outer " + at);
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
  void forward(const Set& set, const Layer& of, Array& from) {
    set.forward({of.layer, from.at(), hidden.at(), {before[0].at(), before[1].at()}, {u[0].at(), u[1].at()}});
  }
  // With what the forward of `saved` kept.
  void backward(const Set& set, const Layer& of, Array& from, Array& grad, Results& saved) {
    LoreBackward op{};
    op.layer = of.layer, op.grad = grad.at(), op.x = from.at(), op.grad_x = x.at(), op.grad_pi = pi.at();
    for (int p = 0; p < 2; p++) {
      op.saved[p] = saved.before[p].at(), op.u[p] = saved.u[p].at();
      op.gradients[p] = {weight[p].at(), a[p].at(), b[p].at(), bias[p].at()};
    }
    set.backward(op);
  }
};

void layer(const Set& right, const Set& ours, const Format& f, const LoreCase& c, Tally& tally) {
  Layer of(c, f.dtype);
  Array x = Array::random(f.dtype, of.layer.R * c.D, 1), grad = Array::random(f.dtype, of.layer.R * c.F, 1);
  Results wanted(of), found(of);
  wanted.forward(right, of, x), found.forward(ours, of, x);
  wanted.backward(right, of, x, grad, wanted), found.backward(ours, of, x, grad, wanted);
  const std::string at = ours.name + " " + f.name + " D=" + std::to_string(c.D) + " F=" + std::to_string(c.F) + " Q=" + std::to_string(c.Q) +
                         " LoREs=" + std::to_string(int(c.lores)) + (c.weight ? " weight" : "") + (c.gated ? " gated" : "") + (c.bias ? " bias" : "") +
                         " activation=" + std::to_string(c.activation) + ": ";
  tally.compare(wanted.hidden, found.hidden, f.bound, at + "hidden");
  tally.compare(wanted.x, found.x, f.bound, at + "gradient of x");
  tally.compare(wanted.pi, found.pi, f.bound, at + "gradient of pi");
  for (int p = 0; p < 1 + c.gated; p++) {
    const std::string which = p ? " of the gate" : " of up";
    tally.compare(wanted.before[p], found.before[p], f.bound, at + "projection" + which);
    tally.compare(wanted.u[p], found.u[p], f.bound, at + "x A" + which);
    tally.compare(wanted.weight[p], found.weight[p], f.bound, at + "gradient of the weight" + which);
    tally.compare(wanted.a[p], found.a[p], f.bound, at + "gradient of A" + which);
    tally.compare(wanted.b[p], found.b[p], f.bound, at + "gradient of B" + which);
    tally.compare(wanted.bias[p], found.bias[p], f.bound, at + "gradient of the bias" + which);
  }
}

void layers(const Set& right, const Set& ours, const Format& f, Tally& tally) {
  const Counts odd{37, 0, 150, 5}, round{32, 0, 160, 48};
  int activation = 1;
  for (const Lores lores : {Lores::none, Lores::one_an_expert, Lores::one_a_row, Lores::two_a_row})
    for (const bool gated : {false, true}) {
      layer(right, ours, f, {odd, 72, 100, 9, lores, true, gated, gated != (lores == Lores::two_a_row), activation}, tally);
      layer(right, ours, f, {round, 64, 96, 32, lores, true, gated, lores == Lores::none, 1 + activation % 7}, tally);
      activation = 1 + (activation + 1) % 7;
    }
  layer(right, ours, f, {odd, 33, 65, 17, Lores::one_a_row, false, true, false, 4}, tally);
  layer(right, ours, f, {{1, 0, 18}, 544, 130, 40, Lores::two_a_row, true, true, true, 4}, tally);
  layer(right, ours, f, {{0, 0}, 16, 16, 4, Lores::one_a_row, true, true, true, 4}, tally);
}

}  // namespace

int main(int count, char** arguments) {
  std::vector<std::string> names(arguments + 1, arguments + count);
  const bool tiles_are_on = !names.empty() && names[0] == "--tiles-are-on";
  if (tiles_are_on) names.erase(names.begin());
  if (names.empty())
    for (const Set& set : SETS)
      if (set.name != "generic" && runs_here(set.name, tiles_are_on)) names.push_back(set.name);
  int passed = 0, failed = 0;
  for (const std::string& name : names) {
    const Set* found = nullptr;
    for (const Set& set : SETS)
      if (set.name == name) found = &set;
    if (found == nullptr || !runs_here(name, tiles_are_on)) return std::printf("%s is not compiled, or this processor does not have it\n", name.c_str()), 2;
    for (const Format& f : FORMATS) {
      if (only_bf16(name) && f.dtype != Dtype::bfloat16) continue;
      Tally tally;
      products(SETS[0], *found, f, tally);
      layers(SETS[0], *found, f, tally);
      std::printf("%s %s: %d results, worst difference %.2g of the largest number, bound %.2g\n", name.c_str(), f.name, tally.passed + tally.failed, tally.worst, f.bound);
      std::fflush(stdout);
      passed += tally.passed, failed += tally.failed;
    }
  }
  std::printf("%d passed, %d failed\n", passed, failed);
  return failed != 0;
}
