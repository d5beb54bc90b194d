// Runs every operation of csrc in several instruction sets, and compares the results with those of the set `generic`.
//
//     instruction_sets [--quick] [--tiles-are-on] [SET ...]
//
// Without names: all sets that are compiled and that this processor has. --quick: fewer sizes, as when the module is loaded. --tiles-are-on: do not ask
// Linux for AMX's registers. The last line counts the comparisons; exit status 0: all are close and nothing was written beyond a result; 1: some are not; 2: a set is unknown or does not run here.
// It needs no Python, so it also runs as the only program of an emulated computer.
#include <algorithm>
#include <cstdio>
#include <string>
#include <vector>

#include "include/processor.h"
#include "self_check/self_check.h"

int main(int count, char** arguments) {
  std::vector<std::string> names(arguments + 1, arguments + count);
  const auto given = [&](const std::string& option) {
    const auto at = std::find(names.begin(), names.end(), option);
    return at != names.end() && (names.erase(at), true);
  };
  const bool quick = given("--quick"), tiles_are_on = given("--tiles-are-on");
  if (names.empty())
    for (const InstructionSet& set : SETS)
      if (set.name != std::string("generic") && runs_here(set.name, !tiles_are_on)) names.push_back(set.name);
  int passed = 0, failed = 0;
  for (const std::string& name : names) {
    const InstructionSet* found = nullptr;
    for (const InstructionSet& set : SETS)
      if (set.name == name) found = &set;
    if (found == nullptr || !runs_here(name, !tiles_are_on)) return std::printf("%s is not compiled, or this processor does not have it\n", name.c_str()), 2;
    for (const self_check::Format& f : self_check::FORMATS) {
      const self_check::Tally tally = self_check::compare_sets(SETS[0], *found, f, quick);
      std::printf("%s %s: %d results, worst difference %.2g of the largest number, bound %.2g\n", name.c_str(), f.name, tally.passed + tally.failed, tally.worst, f.bound);
      if (tally.failed) std::printf("FAILED %s\n", tally.first.c_str());
      std::fflush(stdout);
      passed += tally.passed, failed += tally.failed;
    }
  }
  std::printf("%d passed, %d failed\n", passed, failed);
  return failed != 0;
}
