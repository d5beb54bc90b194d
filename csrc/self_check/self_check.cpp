#include "self_check.h"

#include <csignal>
#include <cstdio>

#if defined(__unix__) || defined(__APPLE__)
#include <sys/wait.h>
#include <unistd.h>
#endif

#include "../include/processor.h"
#include "arrays.h"

namespace self_check {

void products(const InstructionSet& right, const InstructionSet& ours, const Format& f, bool quick, Tally& tally);
void rows(const InstructionSet& right, const InstructionSet& ours, const Format& f, Tally& tally);
void decoding(const InstructionSet& right, const InstructionSet& ours, const Format& f, Tally& tally);

void compare(const Array& right, const Array& ours, double bound, const std::string& what, Tally& tally) {
  double largest = 1e-30, difference = 0;
  for (int64_t i = 0; i < right.size(); i++) {
    largest = std::fmax(largest, std::fabs(right.get(i)));
    const double d = std::fabs(right.get(i) - ours.get(i));
    difference = d >= difference || d != d ? d : difference;
    if (d != d) break;
  }
  const double relative = difference / largest;
  const bool good = relative <= bound && ours.guarded();  // NaN is not
  tally.worst = tally.worst > relative ? tally.worst : relative;
  (good ? tally.passed : tally.failed)++;
  if (good || !tally.first.empty()) return;
  char text[64];
  std::snprintf(text, sizeof text, " differs by %.1e of its largest number", relative);
  tally.first = what + (relative <= bound ? " is written beyond its end" : text);
}

Tally compare_sets(const InstructionSet& right, const InstructionSet& ours, const Format& format, bool quick) {
  Tally tally;
  if (format.dtype == Dtype::bfloat16 || !has_pairs(ours.name)) products(right, ours, format, quick, tally);
  rows(right, ours, format, tally);
  decoding(right, ours, format, tally);
  return tally;
}

namespace {

std::string first_difference(const InstructionSet& ours) {
  for (const Format& format : FORMATS) {
    const Tally tally = compare_sets(SETS[0], ours, format, true);
    if (tally.failed) return tally.first;
  }
  return "";
}

#if defined(__unix__) || defined(__APPLE__)
// What the process wrote until it ended.
std::string read_all(int from) {
  std::string text;
  char part[256];
  for (ssize_t n; (n = read(from, part, sizeof part)) > 0;) text.append(part, size_t(n));
  return text;
}

constexpr unsigned SECONDS = 20;  // it needs a fifth of one

// Nobody but this thread runs in the child: it computes with one thread, and ends without any clean-up that could wait for others.
[[noreturn]] void answer(const InstructionSet& ours, int to) {
  for (const int fatal : {SIGILL, SIGSEGV, SIGBUS, SIGFPE, SIGABRT, SIGALRM}) std::signal(fatal, SIG_DFL);
  alarm(SECONDS);
  const std::string found = first_difference(ours);
  const bool written = write(to, found.data(), found.size()) == ssize_t(found.size());
  _exit(written ? 0 : 1);
}
#endif

}  // namespace

std::string difference(const InstructionSet& ours) {
#if defined(__unix__) || defined(__APPLE__)
  int ends[2];
  if (pipe(ends) != 0) return "it could not be tried: there is no pipe";
  const pid_t child = fork();
  if (child == 0) answer(ours, ends[1]);
  close(ends[1]);
  const std::string found = child < 0 ? "it could not be tried: there is no process" : read_all(ends[0]);
  close(ends[0]);
  int status = 0;
  if (child < 0 || waitpid(child, &status, 0) < 0) return found;
  if (WIFSIGNALED(status)) return "the process that tried it was ended by signal " + std::to_string(WTERMSIG(status));
  return WEXITSTATUS(status) == 0 ? found : "the process that tried it failed";
#else
  return first_difference(ours);
#endif
}

}  // namespace self_check
