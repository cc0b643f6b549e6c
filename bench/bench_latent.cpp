// Kernels of a sparse klt step, each in the amount that one layer of SmolLM2 (9 query heads over 3 KV heads
// of 64) needs with 8,192 tokens in its cache: microseconds a layer on one thread, caches warm.
//
//   build/bench/bench_latent --benchmark_filter='AVX3_DL/'
#include <benchmark/benchmark.h>

#include <algorithm>
#include <cstdint>
#include <random>
#include <string>
#include <vector>

#include "kernels/latent_page.h"
#include "kernels/ops.h"

namespace narrows::kernels {
namespace {

constexpr int64_t kHeads = 9, kHeadsKv = 3, kGroup3 = 3, kDim = 64, kPages = 128, kIndex = 32, kRead = 254,
                  kNew = 64, kCoord = 176;

std::mt19937 random_source(1);

std::vector<float> normal(int64_t n) {
  std::normal_distribution<float> value;
  std::vector<float> x(static_cast<size_t>(n));
  for (float& v : x) v = value(random_source);
  return x;
}

std::vector<uint8_t> bytes(int64_t n) {
  std::vector<uint8_t> x(static_cast<size_t>(n));
  for (uint8_t& v : x) v = static_cast<uint8_t>(random_source());
  return x;
}

/// Falling bits like those of klt's values: 3 on average of 192 coordinates.
std::vector<uint8_t> octet_bits() {
  return {6, 5, 5, 4, 4, 4, 4, 3, 3, 3, 3, 3, 3, 3, 2, 2, 2, 2, 2, 1, 1, 1};
}

void project(benchmark::State& state, const Ops& op) {
  const int64_t columns = kHeads * (kIndex + 1);
  const auto turns = normal(kPages * kDim), folded = normal(kDim * columns);
  std::vector<float> out(static_cast<size_t>(24 * columns));
  for (auto _ : state) {
    for (int64_t p = 0; p < kPages; p += 24) {
      op.gemm(std::min<int64_t>(24, kPages - p), columns, kDim, turns.data() + p * kDim, kDim, folded.data(),
              columns, out.data(), columns, false);
      benchmark::ClobberMemory();
    }
  }
}

void fold(benchmark::State& state, const Ops& op) {
  const auto q = normal(kHeads * kDim), basis = normal(192 * (kIndex + 1));
  std::vector<float> out(static_cast<size_t>(kDim * kHeads * (kIndex + 1)));
  for (auto _ : state) {
    for (int64_t h = 0; h < kHeads; ++h) {
      op.fold_query(q.data() + h * kDim, kDim / 2, basis.data() + h / kGroup3 * kDim * (kIndex + 1),
                    kIndex + 1, kIndex + 1, out.data() + h * (kIndex + 1), kHeads * (kIndex + 1));
    }
    benchmark::ClobberMemory();
  }
}

void expand(benchmark::State& state, const Ops& op) {
  const std::vector<uint8_t> bits = {6, 5, 5, 4};
  const auto planes = bytes(20 * 8 * 8);
  std::vector<uint8_t> codes(static_cast<size_t>(kIndex * kTile));
  for (auto _ : state) {
    for (int64_t p = 0; p < kPages; ++p) {
      op.expand_index(planes.data(), bits.data(), 4, kScoreBits, codes.data());
      benchmark::ClobberMemory();
    }
  }
}

void score(benchmark::State& state, const Ops& op) {
  std::vector<uint8_t> codes = bytes(kIndex * kTile);
  for (uint8_t& c : codes) c &= 63;
  const auto u = normal(kHeads * (kIndex + 1)), step = normal(kIndex), centre = normal(kIndex);
  std::vector<float> out(static_cast<size_t>(kHeads * kPages * kTile));
  for (auto _ : state) {
    for (int64_t p = 0; p < kPages; ++p) {
      op.score_index(codes.data(), kIndex, u.data(), kIndex + 1, kHeads, step.data(), centre.data(), 0, kTile,
                     out.data() + p * kTile, kPages * kTile);
    }
    benchmark::ClobberMemory();
  }
}

void softmax(benchmark::State& state, const Ops& op) {
  const auto x = normal(kHeads * kPages * kTile);
  std::vector<float> s(x);
  for (auto _ : state) {
    float max = 0, sum = 0;
    for (int64_t i = 0; i < kHeads * 16; ++i) op.softmax_part(s.data() + i * 512, 512, &max, &sum);
    benchmark::ClobberMemory();
  }
}

void pool(benchmark::State& state, const Ops& op) {
  std::vector<float> p = normal(kHeads * kPages * kTile);
  for (float& v : p) v = v > 1.6F ? v : 0;  // 5% are candidates
  const std::vector<float> weight(3, 0.3F);
  std::vector<float> value(static_cast<size_t>(kPages * kTile));
  std::vector<int32_t> index(value.size());
  for (auto _ : state) {
    for (int64_t h = 0; h < kHeadsKv; ++h) {
      for (int64_t i = 0; i < 16; ++i) {
        benchmark::DoNotOptimize(op.pool_candidates(p.data() + h * 3 * kPages * kTile + i * 512,
                                                    kPages * kTile, 3, weight.data(), 512, 0.1F, 0,
                                                    index.data(), value.data()));
      }
    }
  }
}

void score_rows(benchmark::State& state, const Ops& op) {
  std::vector<f16_t> key(static_cast<size_t>(kHeadsKv * 432 * kDim), 0x3c00);
  std::vector<int32_t> slot;
  for (int64_t i = 0; i < kHeadsKv * kRead; ++i)
    slot.push_back(static_cast<int32_t>(random_source() % (kHeadsKv * 432)));
  const auto q = normal(kHeads * kDim);
  std::vector<float> out(static_cast<size_t>(3 * kRead));
  for (auto _ : state) {
    for (int64_t h = 0; h < kHeadsKv; ++h) {
      op.score_rows_f16(key.data(), slot.data() + h * kRead, kRead, q.data() + h * 3 * kDim, 3, kDim,
                        out.data(), kRead);
      benchmark::ClobberMemory();
    }
  }
}

void sum_values(benchmark::State& state, const Ops& op) {
  const auto bits = octet_bits();
  const PlaneRow shape = make_plane_row(bits.data(), kCoord / 8);
  const auto rows = bytes(4096 * shape.bytes);
  const auto amplitude = normal(64 * 208), weight = normal(3 * 64);
  std::vector<float> sum(3 * 208);
  for (auto _ : state) {
    for (int64_t done = 0; done < kHeadsKv * kRead; done += 64) {
      const uint8_t* row[64];
      const float* amplitudes[64];
      for (int64_t i = 0; i < 64; ++i) {
        row[i] = rows.data() + (done * 7 + i * 53) % 4096 * shape.bytes;
        amplitudes[i] = amplitude.data() + i / 2 * 208;
      }
      op.sum_planes(row, amplitudes, 64, shape, weight.data(), 64, 3, false, sum.data(), 208);
      benchmark::ClobberMemory();
    }
  }
}

void amplitudes(benchmark::State& state, const Ops& op) {
  const auto scales = bytes(kCoord);
  std::vector<float> out(208);
  for (auto _ : state) {
    for (int64_t i = 0; i < kHeadsKv * 100; ++i) {
      op.amplitudes(scales.data(), kCoord, out.data());
      benchmark::ClobberMemory();
    }
  }
}

void unpack_keys(benchmark::State& state, const Ops& op) {
  const std::vector<uint8_t> bits = {4, 3, 3, 3, 2, 2, 2, 2, 2, 1, 1, 1, 1, 1};
  const PlaneRow shape = make_plane_row(bits.data(), 14);
  const auto rows = bytes(4096 * shape.bytes);
  const auto amplitude = normal(208);
  std::vector<float> z(208);
  for (auto _ : state) {
    for (int64_t i = 0; i < kHeadsKv * kNew; ++i) {
      op.unpack_planes(rows.data() + i * 17 * shape.bytes, shape, amplitude.data(), z.data());
      benchmark::ClobberMemory();
    }
  }
}

void rebuild(benchmark::State& state, const Ops& op) {
  const auto latent = normal(16 * 208);
  const std::vector<f16_t> decode(static_cast<size_t>(144 * 192), 0x3c00);
  std::vector<float> out(static_cast<size_t>(16 * kDim));
  for (auto _ : state) {
    for (int64_t i = 0; i < kHeadsKv * kNew; i += 16) {
      op.gemm_f16(16, kDim, 144, latent.data(), 208, decode.data(), 192, out.data(), kDim, false);
      benchmark::ClobberMemory();
    }
  }
}

}  // namespace
}  // namespace narrows::kernels

int main(int argc, char** argv) {
  using namespace narrows::kernels;
  using Run = void (*)(benchmark::State&, const Ops&);
  const std::pair<const char*, Run> all[] = {{"fold", fold},
                                             {"project", project},
                                             {"expand", expand},
                                             {"score", score},
                                             {"softmax", softmax},
                                             {"pool", pool},
                                             {"unpack_keys", unpack_keys},
                                             {"rebuild", rebuild},
                                             {"score_rows", score_rows},
                                             {"amplitudes", amplitudes},
                                             {"sum_values", sum_values}};
  for (const Ops* op : available_targets()) {
    for (const auto& [name, run] : all) {
      benchmark::RegisterBenchmark((std::string(op->name) + "/" + name).c_str(), run, *op)
          ->Unit(benchmark::kMicrosecond);
    }
  }
  benchmark::Initialize(&argc, argv);
  benchmark::RunSpecifiedBenchmarks();
  return 0;
}
