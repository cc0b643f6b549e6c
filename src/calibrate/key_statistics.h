// Key statistics of a text, layer by layer: what `calibrate` makes a basis of and `inspect` shows. The text
// goes through the model in sequences of at most kSequence tokens; nothing is kept but second moments.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "kv/basis_file.h"
#include "narrows/engine.h"

namespace narrows {

/// Longest sequence that statistics are gathered from, as in the paper's calibration (4096 tokens).
inline constexpr int64_t kSequence = 4096;
/// Farthest look back that a basis file weighs errors for.
inline constexpr int64_t kCalibratedReach = 8192;
/// First tokens of a sequence that are left out: attention sinks, whose keys lie far from all others.
inline constexpr int64_t kSkipTokens = 4;

/// Second moments of the pre-RoPE keys of every layer. invalid_argument if the text is too short for the
/// model's width (both numbers).
Result<std::vector<KeyMoments>> gather_key_moments(const Model& model, std::span<const Token> text,
                                                   int n_threads, const ProgressFn& progress = {});

/// A basis of a text, ready to be written. made_from: words for the file.
Result<BasisFile> calibrate(const Model& model, std::span<const Token> text, const std::string& made_from,
                            int n_threads, const ProgressFn& progress = {});

/// Text that the model writes by itself (temperature 1, fixed seed), to calibrate on when no file is given.
Result<std::vector<Token>> write_own_text(std::shared_ptr<const Model> model, int64_t n_tokens, int n_threads,
                                          const ProgressFn& progress = {});

}  // namespace narrows
