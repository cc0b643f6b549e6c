// A driver for the fuzz targets where there is no libFuzzer: mutates the target's seeds, each input from its
// own random numbers, so that any one can be made again from the seed and its number alone.
//
//   fuzz_gguf [--seconds 10] [--iterations N] [--seed 1] [--first 0]    run
//   fuzz_gguf FILE...                                                   feed these files (a finding, a
//   corpus) fuzz_gguf --write-seeds FOLDER                                      a corpus for libFuzzer
#include <signal.h>
#include <sys/stat.h>
#include <unistd.h>

#include <chrono>
#include <cstring>
#include <fstream>
#include <iterator>
#include <random>
#include <string>
#include <vector>

#include "fuzz/allocation_cap.h"
#include "fuzz/fuzz.h"

extern "C" void __sanitizer_set_death_callback(void (*callback)()) __attribute__((weak));

namespace narrows::fuzz {

namespace {

using Random = std::mt19937_64;

/// An input may hold the machine for so many seconds.
constexpr unsigned kPatience = 60;

/// What a reader may use while it reads: the file itself a few times (the tables of many short entries are
/// the worst case: ggml's entry of a tensor takes 25 bytes in the file and 400 in memory, twice while its
/// array grows), and fixed buffers.
int64_t allowed_bytes(size_t input) {
  return (int64_t{6} << 20) + g_more_bytes + 40 * static_cast<int64_t>(input);
}

// What the handler of a crash prints: no allocation is allowed there.
uint64_t g_seed = 0;
volatile uint64_t g_number = 0;

void name_input() {
  char line[200];
  const int n = std::snprintf(
      line, sizeof(line), "fuzz: input %llu of seed %llu; again: --seed %llu --first %llu --iterations 1\n",
      static_cast<unsigned long long>(g_number), static_cast<unsigned long long>(g_seed),
      static_cast<unsigned long long>(g_seed), static_cast<unsigned long long>(g_number));
  (void)!::write(2, line, static_cast<size_t>(n));
}

void on_signal(int number) {
  name_input();
  ::signal(number, SIG_DFL);
  ::raise(number);
}

size_t below(Random& random, size_t n) { return n == 0 ? 0 : static_cast<size_t>(random() % n); }

/// A place to change: mostly in the header, and there mostly near a field (a multiple of four).
size_t place(Random& random, const Seed& seed, size_t size) {
  const size_t header = std::min(seed.header, size);
  return random() % 8 == 0 ? below(random, size) : below(random, header > 0 ? header : size);
}

uint64_t interesting(Random& random, size_t size) {
  constexpr uint64_t kValues[] = {0,          1,
                                  2,          3,
                                  4,          5,
                                  7,          8,
                                  9,          10,
                                  12,         13,
                                  15,         16,
                                  31,         32,
                                  63,         64,
                                  65,         127,
                                  128,        255,
                                  256,        257,
                                  32767,      32768,
                                  65535,      65536,
                                  1 << 20,    (1 << 20) + 1,
                                  1 << 30,    0x7FFFFFFF,
                                  0x80000000, 0xFFFFFFFF,
                                  1ULL << 32, 1ULL << 40,
                                  1ULL << 60, 1ULL << 62,
                                  ~0ULL >> 1, 1ULL << 63,
                                  ~0ULL - 31, ~0ULL - 7,
                                  ~0ULL,      0x7FC00000 /* NaN */,
                                  0x7F800000 /* infinity */};
  if (random() % 6 == 0) return size + random() % 65 - 32;
  return kValues[below(random, std::size(kValues))];
}

void put(std::string& bytes, size_t at, uint64_t value, size_t width) {
  for (size_t i = 0; i < width && at + i < bytes.size(); ++i)
    bytes[at + i] = static_cast<char>(value >> (8 * i));
}

uint64_t get(const std::string& bytes, size_t at, size_t width) {
  uint64_t value = 0;
  for (size_t i = 0; i < width && at + i < bytes.size(); ++i)
    value |= uint64_t{static_cast<unsigned char>(bytes[at + i])} << (8 * i);
  return value;
}

void mutate(std::string& bytes, const Seed& seed, const Seed& other, Random& random) {
  const size_t size = bytes.size();
  const size_t at = place(random, seed, size);
  const size_t width = size_t{1} << below(random, 4);
  switch (random() % 11) {
    case 0:
    case 1:
      if (size > 0) bytes[at] = static_cast<char>(bytes[at] ^ (1 << below(random, 8)));
      break;
    case 2:
      if (size > 0) bytes[at] = static_cast<char>(random());
      break;
    case 3:
    case 4:
    case 5:
      put(bytes, at, interesting(random, size), width);
      break;
    case 6:
      put(bytes, at, get(bytes, at, width) + random() % 9 - 4, width);
      break;
    case 7:  // a block somewhere else: a name, a whole entry
      if (size > 0) {
        const size_t n = std::min(below(random, 64) + 1, size - at), to = place(random, seed, size);
        const std::string block = bytes.substr(at, n);
        bytes.replace(to, std::min(n, size - to), block.substr(0, std::min(n, size - to)));
      }
      break;
    case 8:
      bytes.resize(random() % 2 == 0 ? at : below(random, size + 1));
      break;
    case 9:  // a piece is missing or there twice
      if (size > 0) {
        const std::string block = bytes.substr(at, std::min(below(random, 48) + 1, size - at));
        random() % 2 == 0 ? (void)bytes.erase(at, block.size()) : (void)bytes.insert(at, block);
      }
      break;
    default: {  // this one's beginning, another's end
      const size_t from = place(random, other, other.bytes.size());
      bytes = bytes.substr(0, at) +
              other.bytes.substr(std::min(random() % 2 == 0 ? at : from, other.bytes.size()));
    }
  }
}

std::string make_input(const std::vector<Seed>& all, uint64_t seed, uint64_t number) {
  std::seed_seq numbers{static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32),
                        static_cast<uint32_t>(number), static_cast<uint32_t>(number >> 32)};
  Random random(numbers);
  const Seed& base = all[below(random, all.size())];
  if (number < all.size()) return all[static_cast<size_t>(number)].bytes;  // first the good ones
  std::string bytes = base.bytes;
  for (size_t n = 1 + below(random, 4); n > 0; --n)
    mutate(bytes, base, all[below(random, all.size())], random);
  return bytes;
}

/// Peak of memory beyond the input's own, as a multiple of its size and the 1 MB buffer of the fingerprint.
struct Memory {
  double worst_share = 0;
  int64_t worst_bytes = 0;
};

void feed(const std::string& input, Memory& memory) {
  ::alarm(kPatience);
  set_allocation_cap(allowed_bytes(input.size()));
  LLVMFuzzerTestOneInput(reinterpret_cast<const uint8_t*>(input.data()), input.size());
  lift_allocation_cap();
  memory.worst_bytes = std::max(memory.worst_bytes, allocation_peak());
  memory.worst_share = std::max(memory.worst_share, static_cast<double>(allocation_peak()) /
                                                        static_cast<double>(input.size() + (1 << 20)));
  ::alarm(0);
}

struct Options {
  double seconds = 10;
  uint64_t iterations = ~uint64_t{0};
  uint64_t seed = 1;
  uint64_t first = 0;
  std::string write_seeds;
  std::vector<std::string> files;
};

bool parse(int argc, char** argv, Options& o) {
  for (int i = 1; i < argc; ++i) {
    const std::string flag = argv[i];
    if (flag.rfind("--", 0) != 0) {
      o.files.push_back(flag);
      continue;
    }
    if (++i >= argc) return false;
    const std::string value = argv[i];
    if (flag == "--seconds") {
      o.seconds = std::strtod(value.c_str(), nullptr);
    } else if (flag == "--iterations") {
      o.iterations = std::strtoull(value.c_str(), nullptr, 10);
    } else if (flag == "--seed") {
      o.seed = std::strtoull(value.c_str(), nullptr, 10);
    } else if (flag == "--first") {
      o.first = std::strtoull(value.c_str(), nullptr, 10);
    } else if (flag == "--write-seeds") {
      o.write_seeds = value;
    } else {
      return false;
    }
  }
  return true;
}

int write_seeds(const std::vector<Seed>& all, const std::string& folder) {
  ::mkdir(folder.c_str(), 0777);
  for (size_t i = 0; i < all.size(); ++i) {
    std::ofstream out(folder + "/seed" + std::to_string(i), std::ios::binary);
    out.write(all[i].bytes.data(), static_cast<std::streamsize>(all[i].bytes.size()));
    if (!out) {
      (void)std::fprintf(stderr, "fuzz: %s cannot be written\n", folder.c_str());
      return 2;
    }
  }
  return 0;
}

int run(const Options& o) {
  const std::vector<Seed> all = seeds();
  if (!o.write_seeds.empty()) return write_seeds(all, o.write_seeds);
  Memory memory;
  for (const std::string& path : o.files) {
    std::ifstream in(path, std::ios::binary);
    const std::string bytes((std::istreambuf_iterator<char>(in)), std::istreambuf_iterator<char>());
    feed(bytes, memory);
  }
  uint64_t done = 0;
  if (o.files.empty()) {
    const auto start = std::chrono::steady_clock::now();
    const auto seconds = [&] {
      return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    };
    for (g_seed = o.seed; done < o.iterations && seconds() < o.seconds; ++done) {
      g_number = o.first + done;
      const std::string input = make_input(all, o.seed, g_number);
      feed(input, memory);
    }
    (void)std::printf("fuzz: %llu inputs of seed %llu in %.1f s", static_cast<unsigned long long>(done),
                      static_cast<unsigned long long>(o.seed), seconds());
  } else {
    (void)std::printf("fuzz: %zu files", o.files.size());
  }
  (void)std::printf("; %llu were accepted; at most %lld kB of memory for one, %.1f times its size + 1 MB\n",
                    static_cast<unsigned long long>(g_accepted),
                    static_cast<long long>(memory.worst_bytes / 1024), memory.worst_share);
  return 0;
}

}  // namespace

}  // namespace narrows::fuzz

int main(int argc, char** argv) {
  narrows::fuzz::Options options;
  if (!narrows::fuzz::parse(argc, argv, options)) {
    (void)std::fprintf(
        stderr,
        "usage: %s [--seconds N] [--iterations N] [--seed N] [--first N] [--write-seeds FOLDER] [FILE...]\n",
        argv[0]);
    return 2;
  }
  // Sanitizers that end the program without a signal call this instead.
  if (__sanitizer_set_death_callback != nullptr) __sanitizer_set_death_callback(narrows::fuzz::name_input);
  for (const int number : {SIGABRT, SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGALRM})
    ::signal(number, narrows::fuzz::on_signal);
  return narrows::fuzz::run(options);
}
