// Model::load: file -> spec -> weights -> plan, and the tokenizer of the same file.
#include <fmt/format.h>

#include <array>
#include <mutex>

#include "base/checksum.h"
#include "device/library.h"
#include "engine/model_parts.h"
#include "gguf/gguf_file.h"
#include "kv/recurrent/recurrent_layer.h"
#include "model/rope_override.h"
#include "narrows/engine.h"
#include "text/llama_log.h"

namespace narrows {

Model::Model(std::unique_ptr<const Impl> impl) : impl_(std::move(impl)) {}
Model::~Model() = default;

const ModelInfo& Model::info() const { return impl_->info; }
const Tokenizer& Model::tokenizer() const { return *impl_->tokenizer; }
const std::string& Model::path() const { return impl_->path; }

namespace {

/// Tells models apart, and the same model with another RoPE: its caches are others.
std::string with_overrides(const std::string& fingerprint, const RopeOverrides& rope) {
  const std::string what = describe(rope);
  if (what.empty()) return fingerprint;
  Checksum sum;
  sum.add(fingerprint.data(), fingerprint.size());
  sum.add(what.data(), what.size());
  return fmt::format("{:016x}", sum.value());
}

/// What libllama's log says at load, where nobody sees it.
std::vector<std::string> warnings_about(const GgufFile& file, const ModelSpec& spec) {
  std::vector<std::string> all;
  if (spec.n_layer_unused > 0) {
    all.push_back(fmt::format("{}: {} of its layers predict{} further tokens (nextn) and {} not used",
                              file.path(), spec.n_layer_unused, spec.n_layer_unused == 1 ? "s" : "",
                              spec.n_layer_unused == 1 ? "is" : "are"));
  }
  const auto kind = file.text("tokenizer.ggml.model"), pre = file.text("tokenizer.ggml.pre");
  if (kind.ok() && kind->has_value() && **kind == "gpt2" && !(pre.ok() && pre->has_value())) {
    all.push_back(
        fmt::format("{}: metadata tokenizer.ggml.pre is missing, so that the text may be cut into "
                    "other tokens than the model was trained with; get a newer conversion of it",
                    file.path()));
  }
  return all;
}

Result<std::shared_ptr<device::Device>> open_device(int index) {
  Result<const device::Api*> api = device::load_library();
  if (!api.ok()) return api.status();
  return device::Device::open(**api, index);
}

/// Moves the weights to the device that was asked for, if it is not the CPU.
Status place(const std::string& asked, ModelParts& parts, std::string& name) {
  const Result<device::Choice> choice = device::parse_choice(asked);
  if (!choice.ok()) return choice.status();
  if (choice->kind == device::Choice::Kind::cpu) return {};
  Result<std::shared_ptr<device::Device>> opened = open_device(choice->index);
  Status status = opened.ok() ? parts.move_to(*opened) : opened.status();
  if (!status.ok()) return choice->kind == device::Choice::Kind::automatic ? Status() : status;
  name = fmt::format("cuda:{} ({})", choice->index, (*opened)->name());
  return {};
}

/// How the file wants its hidden states pooled, by llama.cpp's numbers; "" if it does not say.
Result<std::string> pooling_of(const GgufFile& file, const std::string& architecture) {
  const Result<std::optional<int64_t>> type = file.integer(architecture + ".pooling_type");
  if (!type.ok()) return type.status();
  constexpr std::array kNames = {"none", "mean", "cls", "last", "rank"};
  const int64_t n = type->value_or(-1);
  if (n < 0) return std::string();
  return n < static_cast<int64_t>(kNames.size()) ? std::string(kNames[static_cast<size_t>(n)])
                                                 : std::to_string(n);
}

}  // namespace

Result<std::shared_ptr<const Model>> Model::load(const std::string& path, const LoadOptions& options) {
  // ggml and libllama fill tables of their own at first use; one load at a time leaves nobody reading a
  // half-made one.
  static std::mutex one_at_a_time;
  const std::lock_guard<std::mutex> lock(one_at_a_time);
  silence_llama_log();
  Result<GgufFile> file = GgufFile::open(path);
  if (!file.ok()) return file.status();
  Result<ModelSpec> spec = read_spec(*file);
  if (!spec.ok()) return spec.status();
  if (Status s = override_rope(options.rope, *spec); !s.ok()) return s;
  Result<std::string> fingerprint = file->fingerprint();
  if (!fingerprint.ok()) return fingerprint.status();

  const Result<std::string> pooling = pooling_of(*file, spec->architecture);
  if (!pooling.ok()) return pooling.status();

  auto model = std::make_unique<Impl>();
  model->path = file->path();
  ModelInfo& info = model->info;
  const AttentionSpec& attention = spec->attention();
  info.architecture = spec->architecture;
  info.name = spec->name;
  info.fingerprint = with_overrides(*fingerprint, options.rope);
  info.rope = options.rope;
  info.warnings = warnings_about(*file, *spec);
  info.n_layer = spec->n_layer();
  info.n_layer_recurrent = spec->n_recurrent();
  for (const LayerSpec& l : spec->layers) {
    if (l.attention.window > 0) ++info.n_layer_windowed;
    if (l.delta_net) info.recurrent_bytes += RecurrentLayer::bytes_for(l.delta_net, 1);
  }
  info.n_embd = spec->n_embd;
  info.n_ff = spec->layers.front().ffn.n_ff;
  info.n_expert = spec->layers.front().ffn.experts.n_expert;
  info.n_expert_used = spec->layers.front().ffn.experts.n_used;
  info.n_head = attention.n_head;
  info.n_head_kv = attention.n_head_kv;
  info.head_dim = attention.head_dim;
  info.n_vocab = spec->n_vocab;
  info.n_ctx_train = spec->n_ctx_train;
  info.pooling = *pooling;
  for (const TensorEntry& t : file->tensors()) info.weight_bytes += t.bytes;

  Result<std::unique_ptr<ModelWeights>> weights = ModelWeights::load(std::move(*file), *spec, options);
  if (!weights.ok()) return weights.status();
  auto parts = std::make_unique<ModelParts>(std::move(*weights));
  if (Status s = place(options.device, *parts, info.device); !s.ok()) return s;
  model->parts = std::move(parts);
  Result<std::unique_ptr<Tokenizer>> tokenizer = Tokenizer::load(model->path, options.chat_template);
  if (!tokenizer.ok()) return tokenizer.status();
  model->tokenizer = std::move(*tokenizer);
  // Weights and vocabulary were read one after another: of one file, if it is still as it was.
  if (Status s = model->parts->weights->file().unchanged_under_its_name(); !s.ok()) return s;
  return std::shared_ptr<const Model>(new Model(std::move(model)));
}

}  // namespace narrows
