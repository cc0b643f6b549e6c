// One family of models: how its file says what its layers are. A file of this folder describes one and is
// found by the build (model/CMakeLists.txt): nothing else has to be touched.
#pragma once

#include <span>
#include <vector>

#include "gguf/key_reader.h"
#include "model/spec.h"

namespace narrows {

struct Architecture {
  const char* name;  ///< general.architecture, and the prefix of its keys
  /// Fills in all of a spec but architecture and name. Errors as read_spec().
  Status (*read)(KeyReader& keys, ModelSpec& spec);
};

/// All that this build has, by name.
std::span<const Architecture* const> architectures();

/// Whether files of a family have experts.
enum class Experts { never, if_said, always };

/// The decoder that most families share: equal layers of RMS norm, grouped attention with one RoPE and a
/// gated feed-forward or experts, their sizes by GGUF's usual keys. What a family does otherwise it changes
/// in the result.
Status read_transformer(KeyReader& keys, ModelSpec& spec, Experts experts);

/// Layers of gated DeltaNet in the place of attention, one in some attending, with an output gate and norms
/// of q and k; as the Qwen hybrids have them. grouped: see DeltaNetSpec. After read_transformer().
Status read_delta_net(KeyReader& keys, bool grouped, ModelSpec& spec);

/// RoPE in sections of time, height and width, coordinates dealt out in turn: of text all three are the same
/// position, and it is a RoPE like any other; unsupported if a coordinate belongs to none of the three.
Status check_sections(KeyReader& keys, const ModelSpec& spec);

/// A gated expert beside the others that all rows go through; n_ff: its width where the file does not say.
Status read_shared_expert(KeyReader& keys, int64_t n_ff, ModelSpec& spec);

/// A flag a layer: false for one in `period`, the last of each.
std::vector<bool> all_but_one_in(int64_t period, int64_t n_layer);

/// Layers that are flagged see a window, with the second of the spec's RoPEs.
void set_windows(ModelSpec& spec, int64_t window, const std::vector<bool>& flagged);

/// A RoPE that turns nothing, for layers that know no positions; its index among spec's.
int64_t add_no_rope(ModelSpec& spec);

/// What Granite's files scale: embeddings, what layers add, logits; and whether there is a RoPE. After
/// read_transformer().
Status read_granite_scales(KeyReader& keys, ModelSpec& spec);

}  // namespace narrows
