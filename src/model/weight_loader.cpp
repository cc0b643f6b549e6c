// Loads weights: claims and allocates memory for all that is wanted, reads it from the file, converts,
// reorders and packs it.
#include "model/weight_loader.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstring>

#include "base/memory_ledger.h"
#include "kernels/pack_weights.h"

namespace narrows {

namespace {

/// Room for graph buffers, logits and the program itself beside the weights.
constexpr int64_t kMemoryMargin = int64_t{256} << 20;

/// Row `r` in halves order comes from row rope_source(r) of the file (neighbour order).
int64_t rope_source(int64_t r, int64_t head_dim, int64_t n_rot) {
  const int64_t i = r % head_dim;
  const int64_t half = n_rot / 2;
  if (i >= n_rot) return r;
  return r - i + (i < half ? 2 * i : 2 * (i - half) + 1);
}

std::vector<float> transposed(const std::vector<float>& rows, int64_t n, int64_t m) {
  std::vector<float> columns(rows.size());
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t j = 0; j < m; ++j)
      columns[static_cast<size_t>(j * n + i)] = rows[static_cast<size_t>(i * m + j)];
  }
  return columns;
}

}  // namespace

Status WeightLoader::run() {
  declare();
  if (!status_.ok()) return status_;
  if (Status s = check_leftovers(); !s.ok()) return s;
  if (Status s = claim_memory(); !s.ok()) return s;
  if (Status s = allocate(); !s.ok()) return s;
  if (Status s = fill(); !s.ok()) return s;
  m_.claim_.resize(m_.allocated_bytes());
  return {};
}

Status WeightLoader::bad(const std::string& what) const {
  return {StatusCode::invalid_file, fmt::format("{}: {}", m_.file_.path(), what)};
}

int64_t WeightLoader::bytes_of(const Wanted& p) const {
  if (const auto kind = packing(p)) {
    return kernels::pack_tiles(n_out(p)) * kernels::tile_bytes(*kind, p.front().n_in());
  }
  int64_t bytes = 0;
  for (const Rows& r : p.parts) bytes += to_f32(p) ? r.n_in() * r.n * 4 : r.bytes();
  return bytes;
}

int64_t WeightLoader::bytes_needed() const {
  int64_t need = kMemoryMargin;
  for (const Wanted& p : wanted_) need += bytes_of(p);
  return need;
}

Status WeightLoader::too_large(const std::string& why) const {
  return {
      StatusCode::out_of_memory,
      fmt::format(
          "{}: the weights need {:.1f} GB of memory and {}, use a smaller model or a stronger quantisation "
          "of it",
          m_.file_.path(), static_cast<double>(bytes_needed()) / 1e9, why)};
}

Status WeightLoader::claim_memory() {
  const int64_t have = MemoryLedger::process().free_bytes();
  if (m_.claim_.resize(bytes_needed())) return {};
  return too_large(fmt::format("{:.1f} GB are free", static_cast<double>(have) / 1e9));
}

Status WeightLoader::allocate() {
  int64_t matrices = 0, vectors = 0;
  for (Wanted& p : wanted_) {
    int64_t& before = p.vector != nullptr ? vectors : matrices;
    p.at = before;
    before += (bytes_of(p) + 63) / 64 * 64;
  }
  m_.matrices_ = PageArray(matrices);
  m_.vectors_ = AlignedArray<float>(vectors / static_cast<int64_t>(sizeof(float)));
  if (!m_.matrices_.ok() || !m_.vectors_.ok()) return too_large("the system does not give it");
  for (const Wanted& p : wanted_) {
    if (p.vector != nullptr) {
      *p.vector = m_.vectors_.data() + p.at / static_cast<int64_t>(sizeof(float));
      continue;
    }
    const TensorEntry& first = *p.front().of;
    const uint8_t* at = m_.matrices_.data() + p.at;
    const std::string which = first.ne[2] > 1 ? fmt::format(" {}", p.front().first / p.front().n) : "";
    *p.matrix = {
        first.name + which, to_f32(p) ? TensorType::f32 : first.type, first.ne[0], n_out(p), {}, nullptr};
    if (const auto kind = packing(p)) {
      p.matrix->tiles = {*kind, first.ne[0], n_out(p), at};
    } else {
      p.matrix->rows = reinterpret_cast<const char*>(at);
    }
  }
  return {};
}

char* WeightLoader::memory_of(const Wanted& p) {
  return p.vector != nullptr ? reinterpret_cast<char*>(m_.vectors_.data()) + p.at
                             : reinterpret_cast<char*>(m_.matrices_.data()) + p.at;
}

Status WeightLoader::fill() {
  std::vector<char> raw, whole;
  for (const Wanted& p : wanted_) {
    const bool in_order =
        std::none_of(p.parts.begin(), p.parts.end(), [](const Rows& r) { return r.reorder; });
    const bool packs = packing(p).has_value();
    if (packs && in_order) {
      if (Status s = pack_from_file(p); !s.ok()) return s;
      continue;
    }
    char* to = memory_of(p);
    if (packs) {
      int64_t bytes = 0;
      for (const Rows& r : p.parts) bytes += r.bytes();
      whole.resize(static_cast<size_t>(bytes));
      to = whole.data();
    }
    for (const Rows& r : p.parts) {
      raw.resize(static_cast<size_t>(r.bytes()));
      if (Status s = m_.file_.read(*r.of, r.begin(), r.bytes(), raw.data()); !s.ok()) return s;
      to += put(p, r, raw.data(), to);
    }
    if (p.at_most_0) {
      const float* x = *p.vector;
      if (!std::all_of(x, x + n_out(p), [](float rate) { return rate <= 0; }))
        return bad(fmt::format("tensor {} has a number above 0: a state would grow", p.front().of->name));
    }
    if (packs) pack(p, 0, n_out(p), whole.data());
  }
  return {};
}

/// Rows in the file's order, some at a time.
Status WeightLoader::pack_from_file(const Wanted& p) {
  const int64_t row = p.front().of->row_bytes(), n = n_out(p);
  const int64_t at_once = std::max<int64_t>(1, read_bytes_ / (row * kernels::kPackRows)) * kernels::kPackRows;
  std::vector<char> rows(static_cast<size_t>(std::min(at_once, n) * row));
  for (int64_t first = 0; first < n; first += at_once) {
    const int64_t end = std::min(first + at_once, n);
    int64_t part = 0;  // the part's first row
    for (const Rows& r : p.parts) {
      const int64_t from = std::max(first, part), to = std::min(end, part + r.n);
      if (from < to) {
        Status s = m_.file_.read(*r.of, r.begin() + (from - part) * row, (to - from) * row,
                                 rows.data() + (from - first) * row);
        if (!s.ok()) return s;
      }
      part += r.n;
    }
    pack(p, first, end, rows.data());
  }
  return {};
}

/// Rows [begin, end) of a wanted matrix in the file's blocks into its tiles; begin is a tile's first.
void WeightLoader::pack(const Wanted& p, int64_t begin, int64_t end, const char* rows) {
  const kernels::Packing kind = *packing(p);
  const int64_t n_in = p.front().n_in();
  const int64_t row = kernels::file_row_bytes(kind, n_in), tile = kernels::tile_bytes(kind, n_in);
  uint8_t* const to = m_.matrices_.data() + p.at;
  for (int64_t first = begin; first < end; first += kernels::kPackRows) {
    const uint8_t* of_tile[kernels::kPackRows] = {};
    for (int64_t r = 0; r < std::min(kernels::kPackRows, end - first); ++r)
      of_tile[r] = reinterpret_cast<const uint8_t*>(rows) + (first - begin + r) * row;
    kernels::pack_tile(kind, n_in, of_tile, to + first / kernels::kPackRows * tile);
  }
}

/// Copies one part, converted and reordered; returns the bytes written. What moves is a row of a matrix, or
/// one number of a vector.
int64_t WeightLoader::put(const Wanted& p, const Rows& part, const char* raw, char* to) const {
  std::vector<float> numbers;
  int64_t bytes = part.bytes();
  if (to_f32(p)) {
    numbers.resize(static_cast<size_t>(part.n_in() * part.n));
    to_float(part.of->type, raw, numbers.data(), static_cast<int64_t>(numbers.size()));
    for (float& x : numbers) x *= p.scale;
    if (p.transposed) numbers = transposed(numbers, part.n, part.n_in());
    raw = reinterpret_cast<const char*>(numbers.data());
    bytes = static_cast<int64_t>(numbers.size() * sizeof(float));
  }
  if (!part.reorder) {
    std::memcpy(to, raw, static_cast<size_t>(bytes));
    return bytes;
  }
  const int64_t n_item = p.vector != nullptr ? part.n_in() : part.n, item = bytes / n_item;
  for (int64_t r = 0; r < n_item; ++r) {
    std::memcpy(to + r * item, raw + rope_source(r, p.head_dim, p.n_rot) * item, static_cast<size_t>(item));
  }
  return bytes;
}

Result<std::unique_ptr<ModelWeights>> ModelWeights::load(GgufFile file, const ModelSpec& spec,
                                                         const LoadOptions& options, int64_t read_bytes) {
  std::unique_ptr<ModelWeights> m(new ModelWeights(std::move(file), spec));
  if (Status s = WeightLoader(*m, options, read_bytes).run(); !s.ok()) return s;
  return m;
}

}  // namespace narrows
