// A small deterministic mutation driver, so that fuzzing needs no clang: fuzz_<target> [--seconds S] [--seed
// N] [FILE...]. Mutates the target's seeds (or the files), a fresh seed each time; prints how many inputs ran
// and how many were accepted, and fails if none was. A crash ends the process; the input is then in
// fuzz_last_input.bin.
#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <random>
#include <string>
#include <vector>

#include "fuzz/fuzz.h"

namespace {

using Random = std::mt19937_64;

constexpr const char* kLastInput = "fuzz_last_input.bin";

/// Numbers at which size arithmetic goes wrong.
constexpr uint64_t kEdges[] = {0,          1,          2,          31,         32,         64,
                               127,        128,        255,        256,        0x7FFF,     0x8000,
                               0xFFFF,     0x10000,    0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 0x100000000,
                               1ULL << 40, ~0ULL >> 1, 1ULL << 63, ~0ULL};

size_t below(Random& r, size_t n) { return n == 0 ? 0 : r() % n; }

void write_edge(Random& r, std::string& s) {
  const size_t width = size_t{1} << below(r, 4);
  if (s.size() < width) return;
  const uint64_t v = kEdges[below(r, std::size(kEdges))];
  std::memcpy(s.data() + below(r, s.size() - width + 1), &v, width);
}

/// Where damage matters: the header far more often than the data behind it.
size_t position(Random& r, const std::string& s) {
  return below(r, r() % 4 == 0 ? s.size() : std::min<size_t>(s.size(), 4096));
}

void mutate_once(Random& r, std::string& s, const std::vector<std::string>& seeds) {
  if (s.empty()) {
    s = seeds[below(r, seeds.size())];
    return;
  }
  const size_t at = position(r, s);
  switch (r() % 8) {
    case 0:
      s[at] = static_cast<char>(s[at] ^ (1 << below(r, 8)));
      break;
    case 1:
      s[at] = static_cast<char>(r());
      break;
    case 2:
      write_edge(r, s);
      break;
    case 3: {
      std::string head = s.substr(0, std::min<size_t>(s.size(), 4096));
      write_edge(r, head);
      s.replace(0, head.size(), head);
      break;
    }
    case 4:
      s.resize(at);
      break;
    case 5:
      s.erase(at, below(r, 64));
      break;
    case 6:
      s.insert(at, s.substr(position(r, s), below(r, 64)));
      break;
    default: {
      const std::string& other = seeds[below(r, seeds.size())];
      s = s.substr(0, at) + other.substr(std::min(at, other.size()));
      break;
    }
  }
}

std::vector<std::string> read_all(const std::vector<std::string>& paths) {
  std::vector<std::string> out;
  for (const std::string& path : paths) {
    std::ifstream file(path, std::ios::binary);
    out.emplace_back(std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>());
  }
  return out;
}

/// Kept aside before the run, because a crash leaves no chance afterwards; removed at the end.
void run_one(const std::string& input) {
  static const int fd = open(kLastInput, O_RDWR | O_CREAT | O_TRUNC, 0600);
  if (ftruncate(fd, 0) != 0 || pwrite(fd, input.data(), input.size(), 0) < 0) std::perror(kLastInput);
  LLVMFuzzerTestOneInput(reinterpret_cast<const uint8_t*>(input.data()), input.size());
}

}  // namespace

int main(int argc, char** argv) {
  double seconds = 10;
  uint64_t seed = 1;
  std::vector<std::string> paths;
  for (int i = 1; i < argc; ++i) {
    const std::string word = argv[i];
    if (word == "--seconds" && i + 1 < argc)
      seconds = std::atof(argv[++i]);
    else if (word == "--seed" && i + 1 < argc)
      seed = std::strtoull(argv[++i], nullptr, 10);
    else
      paths.push_back(word);
  }
  const std::vector<std::string> seeds = paths.empty() ? fuzz_seeds() : read_all(paths);
  long runs = 0, accepted = 0, valid = 0;
  for (const std::string& s : seeds) {
    run_one(s);
    valid += fuzz_accepted();
  }
  Random r(seed);
  const auto end = std::chrono::steady_clock::now() + std::chrono::duration<double>(seconds);
  while (std::chrono::steady_clock::now() < end) {
    std::string input = seeds[below(r, seeds.size())];
    for (size_t n = 1 + below(r, 6); n > 0; --n) mutate_once(r, input, seeds);
    run_one(input);
    ++runs;
    accepted += fuzz_accepted();
  }
  std::remove(kLastInput);
  std::printf("%zu seeds, %ld of them accepted; %ld mutated inputs, %ld accepted\n", seeds.size(), valid,
              runs, accepted);
  return valid == static_cast<long>(seeds.size()) && runs > 0 && accepted < runs ? 0 : 1;
}
