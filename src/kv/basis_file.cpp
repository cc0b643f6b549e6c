// Basis files: what a basis must be on top of a GGUF file of float32 tensors. Nothing in the file is believed
// before it is checked.
#include "kv/basis_file.h"

#include <cmath>
#include <cstdio>
#include <memory>
#include <stdexcept>

#include "base/file.h"
#include "gguf/float_file.h"
#include "kv/klt/klt_page.h"

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

Status write_content(const BasisFile& basis, const ModelInfo& model, std::FILE* file) {
  const int64_t width = model.n_head_kv * model.head_dim;
  FloatFileWriter out(basis.layers.size() * 10);
  out.text(kKeyArchitecture, kArchitecture);
  out.count(kKeyVersion, kVersion);
  out.text(kKeyFingerprint, basis.fingerprint);
  out.text(kKeyMadeFrom, basis.made_from);
  out.long_count(kKeyTokens, basis.n_tokens);
  out.count(kKeyLayers, static_cast<uint32_t>(model.n_layer));
  out.count(kKeyHeadsKv, static_cast<uint32_t>(model.n_head_kv));
  out.count(kKeyHeadDim, static_cast<uint32_t>(model.head_dim));
  const KltShape shape = klt_shape(model);
  for (int64_t i = 0; i < model.n_layer; ++i) {
    out.tensor(tensor_name(i, "key_basis"), width, width);
    out.tensor(tensor_name(i, "key_energy"), 1, width);
    JoinedKlt none;
    for (const bool key : {true, false})
      none.each(shape, key, [&](const auto& f) { out.tensor(tensor_name(i, f.name), f.rows, f.columns); });
  }
  out.write_head(file);
  for (size_t i = 0; i < basis.layers.size(); ++i) {
    out.write(basis.layers[i].u, file);
    out.write(basis.layers[i].energy, file);
    for (const bool key : {true, false}) {
      JoinedKlt all = join(key ? basis.klt[i].key : basis.klt[i].value);
      all.each(shape, key, [&](const auto& f) { out.write(*f.data, file); });
    }
  }
  return {};  // write_file_atomically() looks at the stream's errors
}

// --- reading
// -----------------------------------------------------------------------------------------------------

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
  auto opened = FloatFileReader::open(path, "basis file", "`narrows calibrate`");
  if (!opened.ok()) return opened.status();
  FloatFileReader& in = *opened;

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
    if (Status s = in.tensor(tensor_name(i, "key_energy"), 1, width, layer.energy); !s.ok()) return s;
    if (!has_unit_columns(layer))
      return in.bad("tensor " + tensor_name(i, "key_basis") + " has a column that is not of length 1");
    basis->layers.push_back(std::move(layer));
    KltLayerBasis klt;
    const KltShape shape = klt_shape(model);
    for (const bool key : {true, false}) {
      JoinedKlt all;
      Status s;
      all.each(shape, key, [&](const auto& f) {
        if (s.ok()) s = in.tensor(tensor_name(i, f.name), f.rows, f.columns, *f.data);
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
