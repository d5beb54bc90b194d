// In which order the rows stand while the hidden layer is computed.
//
// With one LoRE a row, the rows are put into LoRE order: every LoRE's rows then follow each other inside the rows of its expert, and its product is one
// more step along K for a strip of the expert's block. With more LoREs a row, the rows stay as they are; the LoREs' products are computed for all
// choices first and then added row by row.
#pragma once

#include "../include/blocks.h"
#include "op.h"

namespace NEOX_ISA {

struct Arrangement {
  const LoreLayer& layer;
  std::vector<int64_t> starts, lore_starts;  // first place of each expert, of each LoRE
  bool has_lores, several;                   // several: more than one LoRE a row
  int64_t choices, per_expert;
  const int64_t* place;  // which row stands where; nullptr: row r at place r

  explicit Arrangement(const LoreLayer& given) : layer(given), starts(starts_of(given.rows, given.E)) {
    has_lores = layer.projections[0].a != nullptr || layer.projections[1].a != nullptr;
    several = has_lores && layer.chosen && layer.L > 1;
    if (has_lores) lore_starts = layer.chosen ? starts_of(layer.lore_rows, layer.G) : starts;
    choices = layer.R * layer.L;
    per_expert = layer.E ? layer.G / layer.E : 0;
    place = has_lores && layer.chosen && !several ? layer.order : nullptr;
  }

  int64_t row_at(int64_t p) const { return place == nullptr ? p : place[p]; }
  double pi(int64_t n) const {
    if (!layer.chosen) return 1;
    const int64_t choice = layer.order[n];
    return layer.pi_is_double ? static_cast<const double*>(layer.pi)[choice] : static_cast<const float*>(layer.pi)[choice];
  }
  // Calls f(LoRE, begin, end) for the strips of one expert's LoREs between two places.
  template <class F>
  void strips(int64_t expert, int64_t begin, int64_t end, F f) const {
    const auto first = lore_starts.begin() + expert * per_expert;
    int64_t g = std::upper_bound(first, first + per_expert, begin) - lore_starts.begin() - 1;
    for (; g < (expert + 1) * per_expert && lore_starts[g] < end; g++) {
      const int64_t from = std::max(begin, lore_starts[g]), to = std::min(end, lore_starts[g + 1]);
      if (from < to) f(g, from, to);
    }
  }
  // The LoRE rows of an expert's places.
  int64_t first_choice(int64_t expert) const { return starts[expert] * layer.L; }
};

struct RowTask {
  int64_t expert, first, last, begin, end;  // places, columns
};

constexpr int64_t TASK_ROWS = 1024;

inline std::vector<RowTask> row_tasks(const Arrangement& by, int64_t N, int64_t block, int64_t rows_of_task) {
  std::vector<RowTask> tasks;
  for (int64_t e = 0; e < by.layer.E; e++)
    for (int64_t r = by.starts[e]; r < by.starts[e + 1]; r += rows_of_task)
      for (int64_t j = 0; j < N; j += block) tasks.push_back({e, r, std::min(by.starts[e + 1], r + rows_of_task), j, std::min(N, j + block)});
  return tasks;
}

// Tasks of two kinds, evenly spread over each other. While one core waits for memory, another one multiplies.
struct MixedTask {
  bool of_memory;
  int64_t index;
};
inline std::vector<MixedTask> mixed(int64_t of_memory, int64_t of_products) {
  std::vector<MixedTask> tasks;
  int64_t next = 0;
  for (int64_t i = 0; i < of_products; i++) {
    tasks.push_back({false, i});
    for (; next * of_products < (i + 1) * of_memory && next < of_memory; next++) tasks.push_back({true, next});
  }
  for (; next < of_memory; next++) tasks.push_back({true, next});
  return tasks;
}

}  // namespace NEOX_ISA
