// Basis files: GGUF out and in by ggml's reader, which checks structure; what a basis must be on top of that
// is checked here. Nothing in the file is believed before it is checked: ggml's accessors abort on a wrong
// type.
#include "cache/basis_file.h"

#include <cmath>
#include <cstdio>
#include <memory>
#include <new>
#include <stdexcept>

#include "base/file.h"
#include "cache/klt_page.h"
#include "ggml.h"
#include "gguf.h"

namespace narrows {

namespace {

constexpr const char* kArchitecture = "narrows-basis";
constexpr uint32_t kVersion = 2;
constexpr const char* kKeyArchitecture = "general.architecture";
constexpr const char* kKeyVersion = "narrows-basis.version";
constexpr const char* kKeyFingerprint = "narrows-basis.fingerprint";
constexpr const char* kKeyMadeFrom = "narrows-basis.made_from";
constexpr const char* kKeyTokens = "narrows-basis.tokens";
constexpr const char* kKeyLayers = "narrows-basis.layers";
constexpr const char* kKeyHeadsKv = "narrows-basis.head_count_kv";
constexpr const char* kKeyHeadDim = "narrows-basis.key_length";

struct FreeGguf {
  void operator()(gguf_context* g) const { gguf_free(g); }
};
struct FreeGgml {
  void operator()(ggml_context* g) const { ggml_free(g); }
};
struct CloseFile {
  void operator()(std::FILE* f) const { std::fclose(f); }
};
using Gguf = std::unique_ptr<gguf_context, FreeGguf>;
using File = std::unique_ptr<std::FILE, CloseFile>;

std::string tensor_name(int64_t layer, const char* what) {
  return "blk." + std::to_string(layer) + "." + what;
}

/// One tensor of a layer, [rows, columns], and where its numbers are.
template <class Vector>
struct Field {
  const char* name;
  int64_t rows;
  int64_t columns;
  Vector* data;
};

/// Tensors of the transform of one part; all parts of a layer are one tensor, part after part.
struct KltShape {
  int64_t width;  ///< of a part
  int64_t head_dim;
  int64_t n_part;
};

KltShape klt_shape(const ModelInfo& model) {
  const int64_t heads = heads_of_part(model.n_head_kv, model.head_dim);
  return {heads * model.head_dim, model.head_dim, model.n_head_kv / heads};
}

/// Transforms of keys or of values in file order, parts joined; the numbers of a KltBasis each.
struct JoinedKlt {
  std::vector<float> mean, weight, decode, variance;

  template <class F>
  void each(const KltShape& s, bool key, F&& visit) {
    const int64_t width = s.width * s.n_part;
    visit(Field<std::vector<float>>{key ? "klt_key_mean" : "klt_value_mean", 1, width, &mean});
    visit(Field<std::vector<float>>{key ? "klt_key_weight" : "klt_value_weight", width, s.head_dim, &weight});
    visit(Field<std::vector<float>>{key ? "klt_key_decode" : "klt_value_decode", width, s.width, &decode});
    visit(Field<std::vector<float>>{key ? "klt_key_variance" : "klt_value_variance", 1, width, &variance});
  }
};

JoinedKlt join(const std::vector<KltBasis>& parts) {
  JoinedKlt all;
  for (const KltBasis& b : parts) {
    all.mean.insert(all.mean.end(), b.mean.begin(), b.mean.end());
    all.weight.insert(all.weight.end(), b.weight.begin(), b.weight.end());
    all.decode.insert(all.decode.end(), b.decode.begin(), b.decode.end());
    all.variance.insert(all.variance.end(), b.variance.begin(), b.variance.end());
  }
  return all;
}

std::vector<KltBasis> split(const JoinedKlt& all, const KltShape& s) {
  std::vector<KltBasis> parts;
  for (int64_t p = 0; p < s.n_part; ++p) {
    const auto slice = [p](const std::vector<float>& x, int64_t n) {
      return std::vector<float>(x.begin() + p * n, x.begin() + (p + 1) * n);
    };
    parts.push_back({s.width, s.head_dim, slice(all.mean, s.width), slice(all.weight, s.width * s.head_dim),
                     slice(all.decode, s.width * s.width), slice(all.variance, s.width)});
  }
  return parts;
}

/// A string of the file, fit for a message: short, one line, plain characters.
std::string printable(const std::string& text) {
  std::string out;
  for (const char c : text.substr(0, 64)) out += c >= ' ' && c <= '~' ? c : '?';
  return out;
}

// --- writing
// -----------------------------------------------------------------------------------------------------

Status check_writable(const BasisFile& basis, const ModelInfo& model) {
  const int64_t width = model.n_head_kv * model.head_dim;
  bool good = static_cast<int64_t>(basis.layers.size()) == model.n_layer && model.n_layer > 0;
  for (const LayerBasis& layer : basis.layers) {
    good = good && layer.width == width && layer.rank == width &&
           static_cast<int64_t>(layer.u.size()) == width * width &&
           static_cast<int64_t>(layer.energy.size()) == width;
  }
  const KltShape shape = klt_shape(model);
  good = good && static_cast<int64_t>(basis.klt.size()) == model.n_layer;
  for (const KltLayerBasis& layer : basis.klt) {
    for (const auto* parts : {&layer.key, &layer.value}) {
      good = good && static_cast<int64_t>(parts->size()) == shape.n_part;
      for (const KltBasis& b : *parts) {
        const auto holds = [](const std::vector<float>& x, int64_t n) {
          return static_cast<int64_t>(x.size()) == n;
        };
        good = good && b.width == shape.width && b.block == shape.head_dim && holds(b.mean, b.width) &&
               holds(b.weight, b.width * b.block) && holds(b.decode, b.width * b.width) &&
               holds(b.variance, b.width);
      }
    }
  }
  if (good) return {};
  return {StatusCode::invalid_argument, "a basis file needs all " + std::to_string(width) +
                                            " vectors of each of the " + std::to_string(model.n_layer) +
                                            " layers"};
}

void write_padded(std::FILE* file, const std::vector<float>& data, size_t alignment) {
  const size_t bytes = data.size() * sizeof(float);
  std::fwrite(data.data(), 1, bytes, file);
  for (size_t i = bytes; i % alignment != 0; ++i) std::fputc(0, file);
}

Status write_content(const BasisFile& basis, const ModelInfo& model, std::FILE* file) {
  const int64_t width = model.n_head_kv * model.head_dim;
  const Gguf gguf(gguf_init_empty());
  const size_t n_tensor = basis.layers.size() * 10;
  const std::unique_ptr<ggml_context, FreeGgml> tensors(
      ggml_init({.mem_size = n_tensor * ggml_tensor_overhead(), .mem_buffer = nullptr, .no_alloc = true}));
  if (!tensors) return {StatusCode::out_of_memory, "no memory to describe the tensors of a basis file"};

  gguf_set_val_str(gguf.get(), kKeyArchitecture, kArchitecture);
  gguf_set_val_u32(gguf.get(), kKeyVersion, kVersion);
  gguf_set_val_str(gguf.get(), kKeyFingerprint, basis.fingerprint.c_str());
  gguf_set_val_str(gguf.get(), kKeyMadeFrom, basis.made_from.c_str());
  gguf_set_val_i64(gguf.get(), kKeyTokens, basis.n_tokens);
  gguf_set_val_u32(gguf.get(), kKeyLayers, static_cast<uint32_t>(model.n_layer));
  gguf_set_val_u32(gguf.get(), kKeyHeadsKv, static_cast<uint32_t>(model.n_head_kv));
  gguf_set_val_u32(gguf.get(), kKeyHeadDim, static_cast<uint32_t>(model.head_dim));
  const KltShape shape = klt_shape(model);
  const auto declare = [&](int64_t layer, const char* name, int64_t rows, int64_t columns) {
    // ggml's shapes are reversed: ne[0] is the fastest dimension.
    ggml_tensor* t = rows == 1 ? ggml_new_tensor_1d(tensors.get(), GGML_TYPE_F32, columns)
                               : ggml_new_tensor_2d(tensors.get(), GGML_TYPE_F32, columns, rows);
    ggml_set_name(t, tensor_name(layer, name).c_str());
    gguf_add_tensor(gguf.get(), t);
  };
  for (int64_t i = 0; i < model.n_layer; ++i) {
    declare(i, "key_basis", width, width);
    declare(i, "key_energy", 1, width);
    JoinedKlt none;
    for (const bool key : {true, false})
      none.each(shape, key, [&](const auto& f) { declare(i, f.name, f.rows, f.columns); });
  }

  std::vector<char> head(gguf_get_meta_size(gguf.get()));
  gguf_get_meta_data(gguf.get(), head.data());
  std::fwrite(head.data(), 1, head.size(), file);
  const size_t alignment = gguf_get_alignment(gguf.get());
  for (size_t i = 0; i < basis.layers.size(); ++i) {
    write_padded(file, basis.layers[i].u, alignment);
    write_padded(file, basis.layers[i].energy, alignment);
    for (const bool key : {true, false}) {
      JoinedKlt all = join(key ? basis.klt[i].key : basis.klt[i].value);
      all.each(shape, key, [&](const auto& f) { write_padded(file, *f.data, alignment); });
    }
  }
  return {};  // write_file_atomically() looks at the stream's errors
}

// --- reading
// -----------------------------------------------------------------------------------------------------

/// One open file; every failure names it.
class Reader {
 public:
  Reader(const std::string& path, File file, Gguf gguf, uint64_t file_bytes)
      : path_(path), file_(std::move(file)), gguf_(std::move(gguf)), file_bytes_(file_bytes) {}

  Status bad(const std::string& what) const { return {StatusCode::invalid_file, path_ + ": " + what}; }

  /// The key's index if it is there with this type; else -1, and status says what is wrong.
  int64_t key(const char* name, gguf_type type, Status& status) const {
    const int64_t id = gguf_find_key(gguf_.get(), name);
    if (id >= 0 && gguf_get_kv_type(gguf_.get(), id) == type) return id;
    if (status.ok()) status = bad(std::string(id < 0 ? "it lacks " : "of the wrong type is ") + name);
    return -1;
  }
  std::string text(const char* name, Status& status) const {
    const int64_t id = key(name, GGUF_TYPE_STRING, status);
    return id < 0 ? std::string() : gguf_get_val_str(gguf_.get(), id);
  }
  int64_t count(const char* name, Status& status) const {
    const int64_t id = key(name, GGUF_TYPE_UINT32, status);
    return id < 0 ? -1 : gguf_get_val_u32(gguf_.get(), id);
  }
  int64_t long_count(const char* name, Status& status) const {
    const int64_t id = key(name, GGUF_TYPE_INT64, status);
    return id < 0 ? -1 : gguf_get_val_i64(gguf_.get(), id);
  }

  /// An F32 tensor of exactly this shape (ggml's order), all numbers finite.
  Status tensor(const std::string& name, int64_t ne0, int64_t ne1, std::vector<float>& to) {
    const int64_t id = gguf_find_tensor(gguf_.get(), name.c_str());
    if (id < 0) return bad("it lacks tensor " + name);
    const int64_t* ne = gguf_get_tensor_ne(gguf_.get(), id);
    if (gguf_get_tensor_type(gguf_.get(), id) != GGML_TYPE_F32 || ne[0] != ne0 || ne[1] != ne1 ||
        ne[2] != 1 || ne[3] != 1) {
      return bad("tensor " + name + " is not F32 [" + std::to_string(ne1) + ", " + std::to_string(ne0) + "]");
    }
    // The shape is as wide as the model's keys, so the sums below cannot overflow; the offset is anything.
    const uint64_t bytes = static_cast<uint64_t>(ne0) * static_cast<uint64_t>(ne1) * sizeof(float);
    const uint64_t base = gguf_get_data_offset(gguf_.get());
    const uint64_t offset = gguf_get_tensor_offset(gguf_.get(), id);
    if (base > file_bytes_ || offset > file_bytes_ - base || bytes > file_bytes_ - base - offset) {
      return bad("it is cut off within tensor " + name);
    }
    to.resize(static_cast<size_t>(ne0 * ne1));
    if (fseeko(file_.get(), static_cast<off_t>(base + offset), SEEK_SET) != 0 ||
        std::fread(to.data(), 1, bytes, file_.get()) != bytes) {
      return bad("tensor " + name + " could not be read");
    }
    for (const float x : to) {
      if (!std::isfinite(x)) return bad("tensor " + name + " holds a number that is not finite");
    }
    return {};
  }

 private:
  std::string path_;
  File file_;
  Gguf gguf_;
  uint64_t file_bytes_;
};

Result<Reader> open_reader(const std::string& path) {
  if (Status s = check_readable(path, /*regular=*/true); !s.ok()) return s;
  File file(std::fopen(path.c_str(), "rb"));
  if (!file || fseeko(file.get(), 0, SEEK_END) != 0) {
    return Status{StatusCode::invalid_file, path + ": the basis file cannot be read as a file on disk"};
  }
  const off_t size = ftello(file.get());
  // ggml says why it refuses a file on its own log; a file that is not GGUF at all should not get that far.
  char magic[4] = {};
  if (size < 4 || fseeko(file.get(), 0, SEEK_SET) != 0 || std::fread(magic, 1, 4, file.get()) != 4 ||
      std::string(magic, 4) != "GGUF" || fseeko(file.get(), 0, SEEK_SET) != 0) {
    return Status{StatusCode::invalid_file,
                  path + ": not a basis file (not GGUF); `narrows calibrate` makes one"};
  }
  Gguf gguf(gguf_init_from_file_ptr(file.get(), {.no_alloc = true, .ctx = nullptr}));
  if (!gguf) return Status{StatusCode::invalid_file, path + ": the basis file is cut off or damaged"};
  return Reader(path, std::move(file), std::move(gguf), static_cast<uint64_t>(size));
}

/// Columns must be directions: anything else would scale keys.
bool has_unit_columns(const LayerBasis& basis) {
  std::vector<double> norm(static_cast<size_t>(basis.rank));
  for (size_t i = 0; i < basis.u.size(); ++i) {
    norm[i % norm.size()] += static_cast<double>(basis.u[i]) * static_cast<double>(basis.u[i]);
  }
  for (const double x : norm) {
    if (!(std::fabs(x - 1.0) <= 1e-3)) return false;
  }
  return true;
}

Result<std::shared_ptr<const BasisFile>> read_content(const std::string& path, const ModelInfo& model) {
  auto opened = open_reader(path);
  if (!opened.ok()) return opened.status();
  Reader& in = *opened;

  Status status;
  const std::string architecture = in.text(kKeyArchitecture, status);
  if (!status.ok() || architecture != kArchitecture) {
    return in.bad("not a basis file; `narrows calibrate` makes one");
  }
  const int64_t version = in.count(kKeyVersion, status);
  if (!status.ok()) return status;
  if (version != kVersion) {
    return in.bad("basis file version " + std::to_string(version) + "; this build reads version " +
                  std::to_string(kVersion));
  }
  auto basis = std::make_shared<BasisFile>();
  basis->fingerprint = in.text(kKeyFingerprint, status);
  basis->made_from = in.text(kKeyMadeFrom, status);
  basis->n_tokens = in.long_count(kKeyTokens, status);
  const int64_t n_layer = in.count(kKeyLayers, status);
  const int64_t n_head_kv = in.count(kKeyHeadsKv, status);
  const int64_t head_dim = in.count(kKeyHeadDim, status);
  if (!status.ok()) return status;
  if (basis->fingerprint != model.fingerprint) {
    return in.bad("made for model " + printable(basis->fingerprint) + ", but this model is " +
                  model.fingerprint + "; run `narrows calibrate` on it");
  }
  if (n_layer != model.n_layer || n_head_kv != model.n_head_kv || head_dim != model.head_dim ||
      basis->n_tokens < 1) {
    return in.bad("its counts (layers " + std::to_string(n_layer) + ", KV heads " +
                  std::to_string(n_head_kv) + ", key length " + std::to_string(head_dim) +
                  ") are not the model's");
  }

  const int64_t width = n_head_kv * head_dim;
  for (int64_t i = 0; i < n_layer; ++i) {
    LayerBasis layer;
    layer.width = width;
    layer.rank = width;
    if (Status s = in.tensor(tensor_name(i, "key_basis"), width, width, layer.u); !s.ok()) return s;
    if (Status s = in.tensor(tensor_name(i, "key_energy"), width, 1, layer.energy); !s.ok()) return s;
    if (!has_unit_columns(layer))
      return in.bad("tensor " + tensor_name(i, "key_basis") + " has a column that is not of length 1");
    basis->layers.push_back(std::move(layer));
    KltLayerBasis klt;
    const KltShape shape = klt_shape(model);
    for (const bool key : {true, false}) {
      JoinedKlt all;
      Status s;
      all.each(shape, key, [&](const auto& f) {
        if (s.ok()) s = in.tensor(tensor_name(i, f.name), f.columns, f.rows, *f.data);
      });
      if (!s.ok()) return s;
      (key ? klt.key : klt.value) = split(all, shape);
    }
    basis->klt.push_back(std::move(klt));
  }
  return std::shared_ptr<const BasisFile>(std::move(basis));
}

}  // namespace

Status write_basis_file(const std::string& path, const BasisFile& basis, const ModelInfo& model) {
  if (Status s = check_writable(basis, model); !s.ok()) return s;
  try {
    return write_file_atomically(path, [&](std::FILE* file) { return write_content(basis, model, file); });
  } catch (const std::exception&) {
    return {StatusCode::out_of_memory, path + ": no memory to write the basis file"};
  }
}

Result<std::shared_ptr<const BasisFile>> read_basis_file(const std::string& path, const ModelInfo& model) {
  try {
    return read_content(path, model);
  } catch (const std::exception&) {  // bad_alloc or length_error, from ggml's reader too
    return Status{StatusCode::invalid_file, path + ": the basis file asks for more memory than there is"};
  }
}

}  // namespace narrows
